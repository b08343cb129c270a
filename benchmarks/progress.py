"""How a race is told: bars on a terminal, plain lines elsewhere, nothing when quiet."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from kfac_triton.benchmarks.plan import Plan
from kfac_triton.benchmarks.worker import Job
from kfac_triton.tuning.study import TrialRow
from kfac_triton.tuning.trainer import Point


class Progress:
    """A watcher of `Race`, and a context manager for the bars."""

    def __init__(self, plan: Plan, quiet: bool = False) -> None:
        self.plan, self.quiet, self.started = plan, quiet, time.monotonic()
        self.console = Console(stderr=True, quiet=quiet, highlight=False, soft_wrap=True, markup=False, emoji=False)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TimeElapsedColumn(),
        )
        self.bars = Bars(*columns, console=self.console, disable=quiet or not self.console.is_terminal, transient=True)
        self.all = self.bars.add_task("all runs", total=len(plan.tasks) * (plan.searched + plan.measured))
        self.one = self.bars.add_task("this run, s", total=plan.seconds)

    def __enter__(self) -> Progress:
        self.bars.start()
        plan = self.plan
        self._say(
            f"{len(plan.tasks)} task(s), {len(plan.optimizers)} optimizer(s), {plan.trials} settings, "
            f"{plan.seconds_a_trial:g} s each, {len(plan.seeds)} seed(s), {plan.seconds:g} s a run, on {plan.device}"
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bars.stop()

    def trial(self, task: str, optimizer: str, row: TrialRow, trials: int) -> None:
        how = row.reason if row.ended != "done" else f"{row.value:.4g} after {row.steps} steps"
        self._say(f"{task}: {optimizer}, setting {row.number + 1} of {trials}: {how}")
        self.bars.advance(self.all)

    def run(self, job: Job, record: dict[str, Any]) -> None:
        run = record["run"]
        how = run["reason"] if run["ended"] == "diverged" else f"{record['final']:.4g} after {run['steps']} steps"
        self._say(f"{job.task}: {job.optimizer}, seed {job.seed} ({job.stage}): {how}")
        self.bars.advance(self.all)

    def point(self, job: Job, point: Point) -> None:
        self.bars.update(self.one, completed=point.seconds, description=f"{job.optimizer} {point.train:.4g}")

    def targets(self, task: str, targets: dict[str, float]) -> None:
        listed = ", ".join(f"{name} {value:.4g}" for name, value in targets.items())
        self._say(f"{task}: targets: {listed or 'none'}")

    def _say(self, text: str) -> None:
        self.console.print(f"[{time.monotonic() - self.started:7.1f} s] {text}")
