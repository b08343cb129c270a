"""A helper of `kfac-tune run --jobs N`: `python -m kfac_triton.tuning.worker ORDERS`, the orders as JSON."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from kfac_triton.tuning.errors import Mistake
from kfac_triton.tuning.tuner import join

MISTAKE = 2


def main(text: str) -> int:
    """Takes part in a study's search; returns the exit status."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the command ends its helpers
    signal.signal(signal.SIGTERM, _leave)
    orders: dict[str, Any] = json.loads(text)
    torch.set_num_threads(max(1, torch.get_num_threads() // orders["jobs"]))
    folders = {name: None if orders[name] is None else Path(orders[name]) for name in ("space", "data")}
    try:
        join(**{**orders, **folders})
    except Mistake as mistake:
        print(f"kfac-tune: worker {orders['worker']}: {mistake}", file=sys.stderr)
        return MISTAKE
    except KeyboardInterrupt:
        return 0
    return 0


def _leave(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
