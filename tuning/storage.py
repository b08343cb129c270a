"""Where studies are kept: a journal file for the processes that share it, SQLite for one, a server for many machines.

Raises, wherever a storage is opened: Mistake, with what is wrong and how to mend it.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from optuna.storages.journal._file import get_lock_file
from sqlalchemy.exc import SQLAlchemyError

from kfac_triton.tuning.errors import Mistake
from kfac_triton.tuning.task import one_line

LOST = (StorageInternalError, SQLAlchemyError)  # what a server that goes away makes the database layers raise
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
                f"--storage {name} cannot be written: {error.strerror}; make room, and the same command goes on"
            ) from error

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
    scheme = url.partition(":")[0].partition("+")[0] if "://" in url else ""
    if scheme == "sqlite" and jobs > 1:
        raise Mistake(
            f"--storage {url} with --jobs {jobs}: SQLite is for one process; take a journal file, or --jobs 1"
        )
    if scheme in ("sqlite", *DRIVERS):
        return _database(url, scheme)
    if scheme == "grpc":
        return _proxy(url)
    if scheme not in ("", "journal"):
        raise Mistake(f"--storage {url}: {scheme!r} is no kind of storage; one of {FORMS}")
    return _journal(Path(url.removeprefix("journal://")))


def names_storage(text: str) -> bool:
    """Whether a command's argument is a storage rather than a JSON file."""
    return "://" in text or not text.endswith(".json")


def _journal(path: Path) -> BaseStorage:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab"):
            pass
        backend = WholeLines(str(path), JournalFileSymlinkLock(str(path), grace_period=LOCK_SECONDS))
        return JournalStorage(backend)
    except OSError as error:
        raise Mistake(f"--storage {path} cannot be written: {error.strerror}; name another file") from error
    except Exception as error:
        raise Mistake(f"--storage {path} is no journal of Optuna's ({one_line(error)}); name another file") from error


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
