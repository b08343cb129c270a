"""How a tuning is told: a live table of its phase on a terminal, plain lines elsewhere, nothing when quiet."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
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

    def __init__(
        self,
        timeout: float | None = None,
        quiet: bool = False,
        *,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.clock, self.begun, self.timeout = clock, clock(), timeout
        self.console = console or Console(
            stderr=True, quiet=quiet, highlight=False, soft_wrap=True, markup=False, emoji=False
        )
        self.live = Live(console=self.console, auto_refresh=False, transient=True) if self.console.is_terminal else None
        self._begin("", 0)

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
        """A phase begins, or what came out of one."""
        self._say(text)

    def watch(self, what: str, value: Any) -> None:
        """What a `Tuning` tells of its phases and runs, and `search.Search` of its trials."""
        if what == "phase":
            self._begin(*value)
        elif what == "trial":
            self._run(f"trial {value[0]}", value[1])
        elif what == "run":
            self._run(*value)
        elif what == "counts":
            self.counts = value
        elif what == "point":
            point: Point = value[1]
            self.curve.append(point.train)
        elif what == "told":
            self._ran(f"trial {value.number}", value)
        else:
            self._ran(*value)
        if self.live is not None:
            self.live.update(self._table(), refresh=True)

    def _begin(self, phase: str, runs: int) -> None:
        """A phase of so many runs; 0: nobody counts them."""
        self.phase, self.runs, self.running, self.curve = phase, runs, "", list[float]()
        self.results = list[tuple[str, Result]]()
        self.counts = dict[str, int]()

    def _run(self, label: str, setting: Mapping[str, Any]) -> None:
        self.running, self.curve = f"{label}: {listed(setting)}", []

    def _ran(self, label: str, result: Result) -> None:
        self.results.append((label, result))
        self._say(f"{label}: {outcome(result)} ({listed(result.setting)})", plain_only=True)

    def _table(self) -> Group:
        head = Text(f"{self.phase}\n" + "; ".join(part for part in (self._progress(), self._time()) if part))
        table = Table(box=None, show_header=False)
        for label, result in self.results[-SHOWN:]:
            table.add_row(label, outcome(result), Text(listed(result.setting), overflow="ellipsis"))
        return Group(head, table, Text(f"{self.running}\n{sparkline(self.curve)}"))

    def _progress(self) -> str:
        if not self.runs:
            return ""
        good = [result.value for _, result in self.results if result.good]
        done = (
            ", ".join(f"{number} {kind}" for kind, number in self.counts.items())
            if self.counts
            else f"{len(self.results)} of {self.runs} runs done"
        )
        return f"{done}; best {min(good):.4g}" if good else done

    def _time(self) -> str:
        spent = self.clock() - self.begun
        if self.timeout is not None:
            return f"{spent:.0f} s spent, {max(self.timeout - spent, 0):.0f} s left"
        walls = [result.wall for _, result in self.results]
        if not walls:
            return f"{spent:.0f} s spent"
        done = self.counts["done"] + self.counts["pruned"] if self.counts else len(walls)
        left = max(self.runs - done, 0) * sum(walls) / len(walls)  # if the others take as long
        return f"{spent:.0f} s spent, about {left:.0f} s left in this phase"

    def _say(self, text: str, plain_only: bool = False) -> None:
        if self.live is None or not plain_only:
            self.console.print(f"[{self.clock() - self.begun:7.1f} s] {text}")


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
