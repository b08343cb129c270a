"""How a command of the package ends: its exit status, and the one line of a user's mistake.

Exit status: 0 done, 2 a user's mistake (one line says which and how to mend it), 1 a fault of ours.
"""

from __future__ import annotations

import sys
import traceback
from typing import Any

import typer

from kfac_triton.tuning.errors import Mistake

FAULT, MISTAKE, INTERRUPTED = 1, 2, 130


def status_of(app: typer.Typer, name: str, arguments: list[str] | None) -> int:
    """Runs the command line of `name`; returns the exit status."""
    try:
        answer: Any = app(args=arguments, standalone_mode=False)
    except Mistake as mistake:
        return _complain(name, str(mistake), MISTAKE)
    except KeyboardInterrupt:
        return _complain(name, "interrupted; the same command goes on", INTERRUPTED)
    except Exception as error:
        if hasattr(error, "show"):  # a usage error of the command line itself
            return _misused(name, error)
        traceback.print_exc()
        return FAULT
    return answer if isinstance(answer, int) else 0


def _misused(name: str, error: Any) -> int:
    said = error.format_message().rstrip(".")
    if "\n" in said:  # a command without arguments: its help
        error.show()
        return MISTAKE
    return _complain(name, f"{said}; {error.ctx.command_path if error.ctx else name} --help lists the options", MISTAKE)


def _complain(name: str, text: str, status: int) -> int:
    print(f"{name}: {text}", file=sys.stderr)
    return status
