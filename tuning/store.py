"""Files that commands write: refused before any work where they cannot be, written in one piece, read with an error
that names them."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

from kfac_triton.tuning.errors import Mistake

REPORT_BEGINS = "<!doctype html><html lang='en'><head><meta charset='utf-8'><title>"  # of kfac-tune
PROBE = 4096  # bytes that a disk must still take before a command begins


def check_file(option: str, path: Path, is_ours: Callable[[bytes], bool] = lambda content: True) -> None:
    """Whether `path` can be written at the end, found out by opening; nothing is left there and nothing is changed.

    Args:
        option: what an error calls the file, as "--out".
        is_ours: whether what is there may be written over, from its content.

    Raises:
        Mistake: it is a folder, a device or somebody else's file, or nothing can be written there.
    """
    called = f"{option} {path}"
    try:
        if path.exists() and not path.is_file():
            kind = "a folder" if path.is_dir() else "no regular file"
            raise Mistake(f"{called} cannot be written: it is {kind}; name a file")
        if path.exists() and not is_ours(_content(path)):
            raise Mistake(f"{called} is there and was not written by this command; name another file")
        _probe(path)
    except OSError as error:
        raise Mistake(f"{called} cannot be written: {error.strerror}; name a file in a folder that is there") from error


def check_folder(option: str, path: Path) -> None:
    """Whether files can be written in the folder `path`, which need not be there yet; nothing is left there.

    Raises:
        Mistake: it is a file, or nothing can be written there.
    """
    if path.exists() and not path.is_dir():
        raise Mistake(f"{option} {path} is a file; name a folder")
    check_room(f"{option} {path}", path)


def check_room(called: str, folder: Path) -> None:
    """As `check_folder`, for what an error calls `called`."""
    try:
        there = next(one for one in (folder, *folder.absolute().parents) if one.exists())
        _probe(there / "probe")
    except OSError as error:
        raise Mistake(f"{called} cannot be written: {error.strerror}; name another place") from error


def _content(path: Path) -> bytes:
    """What is there, which can be written too."""
    with path.open("r+b") as file:
        return file.read()


def _probe(path: Path) -> None:
    """Writes a file beside `path`, which is gone again; its name is about as long as that of `part_of`."""
    target = Path(os.path.realpath(path))
    with NamedTemporaryFile(prefix=f".{target.name}.", suffix=".part", dir=target.parent) as file:
        file.write(bytes(PROBE))
        file.flush()
        os.fsync(file.fileno())


def part_of(path: Path) -> Path:
    """Where a file is written before it takes its name: beside what a link points to."""
    target = Path(os.path.realpath(path))
    return target.with_name(f".{target.name}.{os.getpid()}.part")


def write_json(path: Path, content: Any, called: str = "") -> None:
    """As `write_text`. Numbers that are not finite become null."""
    write_text(path, json.dumps(plain(content), indent=1, allow_nan=False) + "\n", called)


def write_text(path: Path, text: str, called: str = "") -> None:
    """Writes beside and renames, so that a reader never sees half a file.

    Raises:
        Mistake: it cannot be written, the file being `called` so; what was there is still whole.
    """
    part = part_of(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text, encoding="utf-8")
        part.replace(os.path.realpath(path))
    except OSError as error:
        raise Mistake(
            f"{called or path} cannot be written: {error.strerror}; make room or name another place, and the same "
            "command goes on"
        ) from error
    finally:
        with suppress(OSError):
            part.unlink()


def read_json(path: Path) -> dict[str, Any]:
    """Raises: Mistake: the file is not there, is cut short, or holds no JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise Mistake(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise Mistake(f"{path} is damaged ({error}); delete it and repeat the kfac-bench run command") from error
    if not isinstance(content, dict):
        raise Mistake(f"{path} is damaged (no JSON object); delete it and repeat the kfac-bench run command")
    return content


def plain(content: Any) -> Any:
    """`content` with tuples as lists and numbers that are not finite as None."""
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, dict):
        return {str(name): plain(value) for name, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [plain(value) for value in content]
    return content if isinstance(content, (str, int, bool, type(None))) else str(content)
