"""JSON on disk: written in one piece, read with an error that names the file."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from kfac_triton.tuning.errors import Mistake


def write_json(path: Path, content: Any) -> None:
    """Writes beside and renames: a reader never sees half a file. Numbers that are not finite become null."""
    write_text(path, json.dumps(plain(content), indent=1, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Whole or not at all: where it fails, what was there is still there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


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
