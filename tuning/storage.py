"""Where studies are kept: a journal file for the processes that share it, SQLite for one, a server for many machines.

Raises, wherever a storage is opened: Mistake, with what is wrong and how to mend it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sqlite3
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from optuna.storages.journal._file import get_lock_file
from sqlalchemy.exc import SQLAlchemyError

from kfac_triton.tuning.errors import Mistake
from kfac_triton.tuning.store import check_room
from kfac_triton.tuning.task import one_line

SQLITE = b"SQLite format 3\0"  # how its files begin
RECORD = b'{"op_code":'  # how a journal's begin
LOCK_SECONDS = 10  # a lock that is older than this belonged to a process that was killed
SERVER_SECONDS = 10.0
# Drivers by kind of server, the first that is installed serves where the URL names none: module, and package on PyPI.
DRIVERS = {
    "postgresql": {"psycopg": "psycopg[binary]", "psycopg2": "psycopg2-binary"},
    "mysql": {"pymysql": "pymysql", "mysqldb": "mysqlclient"},
}
FORMS = "path/to/file.journal, sqlite:///file.db, postgresql://user@host/base, mysql+pymysql://..., grpc://host:port"


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Puts Ctrl-C off until the block is over."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pressed = []
    before = signal.signal(signal.SIGINT, lambda *said: pressed.append(said))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if pressed:
            signal.raise_signal(signal.SIGINT)


def lost() -> tuple[type[Exception], ...]:
    """What a server that goes away makes the layers above it raise."""
    proxy = (sys.modules["grpc"].RpcError,) if "grpc" in sys.modules else ()
    return StorageInternalError, SQLAlchemyError, *proxy


class WholeLines(JournalFileBackend):
    """A journal whose last line is whole: what a killed process or a full disk left of a line is cut away first."""

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Raises: Mistake: it cannot be written."""
        try:
            with uninterrupted():
                if not self._whole():
                    with get_lock_file(self._lock):
                        if not self._whole():  # nobody was in the middle of writing it
                            self._cut()
                super().append_logs(logs)
        except OSError as error:
            name = self._file_path
            raise Mistake(
                f"{name} cannot be written: {error.strerror}; make room, and the same command goes on"
            ) from error

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:  # type: ignore[override]
        """Raises: Mistake: it cannot be read."""
        try:
            yield from super().read_logs(log_number_from)
        except OSError as error:
            raise Mistake(f"{self._file_path} cannot be read: {error.strerror}; restore it") from error

    def _whole(self) -> bool:
        with open(self._file_path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(size - 1, 0))
            return size == 0 or file.read() == b"\n"

    def _cut(self) -> None:
        path = Path(self._file_path)
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)


def open_storage(url: str, jobs: int = 1) -> BaseStorage:
    """The storage of a URL or a path, reached once; see `FORMS`."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    check_storage(url, jobs)
    scheme, path = _scheme(url), local_path(url)
    if scheme in ("", "journal") and path is not None:
        return open_journal(path)
    return _proxy(url) if scheme == "grpc" else _database(url, scheme)


def check_storage(url: str, jobs: int = 1) -> None:
    """Whether the URL can be a storage, as far as can be seen without reaching or changing it."""
    scheme, path = _scheme(url), local_path(url)
    if scheme not in ("", "journal", "sqlite", "grpc", *DRIVERS):
        raise Mistake(f"--storage {url}: {scheme!r} is no kind of storage; one of {FORMS}")
    if scheme == "sqlite" and jobs > 1:
        raise Mistake(
            f"--storage {url} with --jobs {jobs}: SQLite is for one process; take a journal file, or --jobs 1"
        )
    if path is None:
        return
    try:
        complaint = _not_ours(path, scheme) if path.exists() else ""
    except OSError as error:
        raise Mistake(f"--storage {path} cannot be written: {error.strerror}; name another file") from error
    if complaint:
        raise Mistake(f"--storage {path} is no {complaint}; name another file")
    if scheme != "sqlite":
        check_room(f"--storage {path}", path.parent)


def local_path(url: str) -> Path | None:
    """The file of a journal or of SQLite; None where there is none."""
    scheme = _scheme(url)
    if scheme == "sqlite":
        name = url.partition("://")[2].partition("/")[2].partition("?")[0]
        return Path(name) if name and name != ":memory:" else None
    return Path(url.removeprefix("journal://")) if scheme in ("", "journal") else None


def _scheme(url: str) -> str:
    return url.partition(":")[0].partition("+")[0] if "://" in url else ""


def _not_ours(path: Path, scheme: str) -> str:
    """What the file ought to be and is not; "" for one that is."""
    if not path.is_file():
        return "regular file"
    with path.open("r+b") as file:
        content = file.read() if scheme != "sqlite" else file.read(len(SQLITE))
    if scheme == "sqlite":
        return "SQLite database" if content not in (b"", SQLITE) else _foreign_tables(path)
    return "journal of Optuna's" if not _is_journal(content) else ""


def _foreign_tables(path: Path) -> str:
    try:
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as base:
            tables = {name for (name,) in base.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    except sqlite3.Error:
        return "SQLite database that can be read"
    return "database of Optuna's" if tables and "studies" not in tables else ""


def _is_journal(content: bytes) -> bool:
    """Whether the first and the last whole line are records, and what follows is the beginning of one.

    Optuna reads over a last line that is none, which would be cut away or stay in the way.
    """
    *lines, torn = content.split(b"\n")
    if lines:
        torn = torn.strip(b"\0")  # as a machine that lost its power leaves it
    if not RECORD.startswith(torn[: len(RECORD)]):
        return False
    try:
        return all(isinstance(json.loads(line)["op_code"], int) for line in (*lines[:1], *lines[-1:]))
    except (KeyError, TypeError, ValueError):
        return False


def names_storage(text: str) -> bool:
    """Whether a command's argument is a storage rather than a JSON file."""
    return "://" in text or not text.endswith(".json")


def open_journal(path: Path) -> BaseStorage:
    """The storage in a journal file, which begins if it is not there."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab"):
            pass
        backend = WholeLines(str(path), JournalFileSymlinkLock(str(path), grace_period=LOCK_SECONDS))
        return JournalStorage(backend)
    except OSError as error:
        raise Mistake(f"{path} cannot be written: {error.strerror}; name another file") from error
    except Exception as error:
        raise Mistake(f"{path} is no journal of Optuna's ({one_line(error)}); name another file") from error


def _database(url: str, scheme: str) -> BaseStorage:
    options: dict[str, Any] = {} if scheme == "sqlite" else {"pool_pre_ping": True}
    if scheme in DRIVERS:
        options["connect_args"] = {"connect_timeout": int(SERVER_SECONDS)}
    shown = _without_password(url)
    try:
        return RDBStorage(_with_driver(url, scheme), engine_kwargs=options)
    except ImportError as error:
        wanted = " or ".join(DRIVERS.get(scheme, {}).values())
        raise Mistake(f"--storage {shown}: its driver is not installed; pip install {wanted}") from error
    except Exception as error:
        raise Mistake(
            f"--storage {shown} cannot be reached ({one_line(error.__cause__ or error)}); check that the server runs "
            "and that user, password and base are right"
        ) from error


def _with_driver(url: str, scheme: str) -> str:
    if not url.startswith(f"{scheme}://"):
        return url
    installed = [module for module in DRIVERS.get(scheme, {}) if _is_installed(module)]
    return url.replace(scheme, f"{scheme}+{installed[0]}", 1) if installed else url


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ValueError:  # it is barred
        return False


def _proxy(url: str) -> BaseStorage:
    host, _, port = url.removeprefix("grpc://").strip("/").rpartition(":")
    if not host or not port.isdigit():
        raise Mistake(f"--storage {url}: write grpc://host:port")
    try:
        from optuna.storages import GrpcStorageProxy

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            proxy = GrpcStorageProxy(host=host, port=int(port))
    except ImportError as error:
        raise Mistake(f"--storage {url}: the proxy needs grpcio ({error}); pip install grpcio protobuf") from error
    try:
        proxy.wait_server_ready(timeout=SERVER_SECONDS)
    except Exception as error:
        raise Mistake(
            f"--storage {url} cannot be reached ({one_line(error)}); "
            "optuna.storages.run_grpc_proxy_server starts a server"
        ) from error
    return proxy


def _without_password(url: str) -> str:
    head, at, tail = url.rpartition("@")
    scheme, _, user = head.partition("://")
    return f"{scheme}://{user.partition(':')[0]}@{tail}" if at else url
