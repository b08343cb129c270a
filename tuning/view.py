"""How a search is told: a live table on a terminal, plain lines elsewhere, nothing when quiet."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from kfac_triton.tuning.setting import DEFAULTS
from kfac_triton.tuning.trainer import Point
from kfac_triton.tuning.trials import Result

BARS = "▁▂▃▄▅▆▇█"
SHOWN = 6  # of the last results


class View:
    """Notes and watches a `Tuning`; a context manager for the live table."""

    def __init__(self, timeout: float | None = None, quiet: bool = False) -> None:
        self.begun, self.timeout = time.monotonic(), timeout
        self.console = Console(stderr=True, quiet=quiet, highlight=False, soft_wrap=True, markup=False, emoji=False)
        self.live = Live(console=self.console, auto_refresh=False, transient=True) if self.console.is_terminal else None
        self.trials = 0  # of a search
        self.stage, self.running, self.curve = "", "", list[float]()
        self.results: list[Result] = []
        self.counts = {"done": 0, "running": 0, "pruned": 0}

    def __enter__(self) -> View:
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live is not None:
            self.live.stop()

    def note(self, text: str) -> None:
        """A new stage, or what came out of one."""
        self.stage, self.results, self.running = text, [], ""
        self.counts = dict.fromkeys(self.counts, 0)
        self._say(text)

    def watch(self, what: str, value: Any) -> None:
        """What `search.Search` tells of its trials."""
        if what == "trial":
            number, setting = value
            self.running = f"trial {number}: {listed(setting)}"
            self.curve = []
        elif what == "plan":
            self.trials = value.trials
        elif what == "counts":
            self.counts = value
        elif what == "point":
            point: Point = value[1]
            self.curve.append(point.train)
        else:
            self._told(value)
        if self.live is not None:
            self.live.update(self._table(), refresh=True)

    def _told(self, result: Result) -> None:
        self.results.append(result)
        self._say(f"trial {result.number}: {outcome(result)} ({listed(result.setting)})", plain_only=True)

    def _table(self) -> Group:
        good = [result for result in self.results if result.good]
        best = min((result.value for result in good), default=math.nan)
        spent = time.monotonic() - self.begun
        if self.timeout is not None:
            left = f"{max(self.timeout - spent, 0):.0f} s left"
        else:  # of this search, if its trials go on as long as they did
            walls = [result.wall for result in self.results]
            more = max(self.trials - self.counts["done"] - self.counts["pruned"], 0)
            left = f"about {more * sum(walls) / len(walls):.0f} s left in this search" if walls else "the first trial"
        head = Text(
            f"{self.stage}\n{self.counts['done']} done, {self.counts['running']} running, "
            f"{self.counts['pruned']} pruned; best "
            f"{best:.4g}; {spent:.0f} s spent, {left}"
        )
        table = Table(box=None, show_header=False)
        for result in self.results[-SHOWN:]:
            table.add_row(str(result.number), outcome(result), Text(listed(result.setting), overflow="ellipsis"))
        return Group(head, table, Text(f"{self.running}\n{sparkline(self.curve)}"))

    def _say(self, text: str, plain_only: bool = False) -> None:
        if self.live is None or not plain_only:
            self.console.print(f"[{time.monotonic() - self.begun:7.1f} s] {text}")


def outcome(result: Result) -> str:
    """How a result ended, in a few words."""
    if result.ended == "reached":
        return f"target in {result.value:.3g} s"
    if result.ended == "done":
        return f"{result.points[-1][1]:.4g} after {result.steps} steps"
    return f"{result.ended}: {result.reason}"


def listed(setting: Mapping[str, Any]) -> str:
    """A setting in a line; of K-FAC's only what its defaults have otherwise."""
    own = {k: v for k, v in setting.items() if "lr_rule" not in setting or DEFAULTS.get(k) != v}
    if not own:
        return "the defaults"
    return ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in own.items())


def sparkline(values: list[float]) -> str:
    """The curve of a metric, in a line, on a scale of its own."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return ""
    low, high = min(finite), max(finite)
    width = (high - low) or 1.0
    return "".join(BARS[round((value - low) / width * (len(BARS) - 1))] for value in finite) + f" {finite[-1]:.4g}"
