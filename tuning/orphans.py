"""Workers end with the command that began them, also where that was killed and could not end them."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

LOOK = 0.5  # seconds between two looks at the parent
GRACE = 3.0  # seconds for an orderly end
BEGIN = """
import runpy, sys
_, orphans, parent, module, *arguments = sys.argv
runpy.run_path(orphans)["end_with"](int(parent))
sys.argv = [module, *arguments]
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""


def worker_command(module: str, *arguments: str) -> list[str]:
    """The command line `python -m MODULE ARGUMENTS` of a worker that ends with this process.

    It watches from the start, before the package and torch are imported; so this file imports neither.
    """
    return [sys.executable, "-c", BEGIN, __file__, str(os.getpid()), module, *arguments]


def end_with(parent: int) -> None:
    """Ends this process once its parent is not, or no longer, the process `parent`.

    A process whose parent dies gets another one, so a worker that begins after that sees it at once. SIGTERM comes
    first, so that a worker can give back what it was at; SIGKILL follows for one that does not answer. Windows keeps
    no such numbers; there a worker goes on to its end.
    """
    if os.name == "nt":
        return
    threading.Thread(target=_watch, args=(parent,), name="parent", daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(LOOK)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    os.kill(os.getpid(), signal.SIGKILL)
