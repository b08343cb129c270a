"""The race, in an order that keeps it honest.

1. Each baseline is tuned. 2. The tuned baselines run on the report seeds, interleaved; the median of what each ends
with becomes a target, written down before anybody else trains. 3. The challengers are tuned with the same number of
settings and seconds. 4. All run on the report seeds, interleaved by seed, the baselines once more, so that everybody
is timed in the same hour. Where no challenger is tuned, none can be tuned to a target: steps 2 and 3 fall away, and the
targets are what the baselines end with in step 4.

Tuning has a seed of its own. Every finished run is a file of its own, so an interrupted race goes on where it stopped.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import torch

from kfac_triton.benchmarks.plan import RACE, TARGET, Overhead, Plan
from kfac_triton.benchmarks.worker import Job, measure, measure_apart
from kfac_triton.tuning import environment
from kfac_triton.tuning.baselines import find_entrant
from kfac_triton.tuning.errors import Mistake
from kfac_triton.tuning.store import read_json, write_json
from kfac_triton.tuning.study import Outcome, TrialRow, search
from kfac_triton.tuning.task import Task
from kfac_triton.tuning.trainer import Budget, Point, evaluate, held_out, warm_up

EVALUATION_SHARE = 1.3  # what a run takes on the wall, in seconds of its clock


class Watcher(Protocol):
    """Who is told how the race goes."""

    def trial(self, task: str, optimizer: str, row: TrialRow, trials: int) -> None: ...

    def run(self, job: Job, record: dict[str, Any]) -> None: ...

    def point(self, job: Job, point: Point) -> None: ...

    def targets(self, task: str, targets: dict[str, float]) -> None: ...


class OutOfTime(Exception):
    """The budget does not hold the next run."""


class Race:
    """A plan, the folder it fills, and its tasks by name; `deadline`, on `time.monotonic`, ends it between two runs."""

    def __init__(
        self,
        plan: Plan,
        folder: Path,
        tasks: dict[str, Task],
        *,
        data: Path | None = None,
        watcher: Watcher | None = None,
        deadline: float = math.inf,
    ) -> None:
        self.plan, self.folder, self.tasks, self.data, self.watcher = plan, folder, tasks, data, watcher
        self.device = environment.find_device(plan.device)
        self.deadline = deadline

    def go(self) -> bool:
        """Runs what is missing; False when the budget ended first."""
        torch.set_num_threads(self.plan.threads)
        for spec in self.plan.tasks:
            self._check_data(spec)
        try:
            for spec in self.plan.tasks:
                self._race(spec)
        except OutOfTime:
            return False
        return True

    def _race(self, spec: str) -> None:
        baselines, challengers = self.plan.baselines, self.plan.challengers
        settings = {name: self._tuned(spec, name) for name in baselines}
        if self.plan.targets_first:
            self._stage(spec, TARGET, settings)
            self._set_targets(spec, TARGET)
        settings |= {name: self._tuned(spec, name) for name in challengers}
        if challengers:
            self._stage(spec, RACE, settings)
            self._set_targets(spec, RACE)

    def _tuned(self, spec: str, optimizer: str) -> dict[str, Any]:
        """The setting of an optimizer: found by its search, or empty for one that runs untuned."""
        if not find_entrant(optimizer).tuned:
            return {}
        path = tuning_path(self.folder, spec, optimizer)
        if not path.is_file():
            outcome = self._search(spec, optimizer, path.with_suffix(".journal"))
            write_json(path, _outcome_record(outcome, self.plan))
        setting: dict[str, Any] | None = read_json(path).get("best")
        if setting is None:
            raise Mistake(
                f"task {spec!r}: all {self.plan.trials} settings of {optimizer} diverged; "
                "give more --trials or mend the task"
            )
        return setting

    def _search(self, spec: str, optimizer: str, journal: Path) -> Outcome:
        plan = self.plan

        def report(row: TrialRow) -> None:
            if self.watcher:
                self.watcher.trial(spec, optimizer, row, plan.trials)

        outcome = search(
            self.tasks[spec],
            optimizer,
            trials=plan.trials,
            budget=Budget(plan.seconds_a_trial, device=self.device, compile=plan.compile),
            journal=journal,
            seed=plan.tuning_seed,
            report=report,
            go_on=lambda: self._time_for_a_run(plan.seconds_a_trial),
        )
        if outcome is None:
            raise OutOfTime
        return outcome

    def _stage(self, spec: str, stage: str, settings: dict[str, dict[str, Any]]) -> None:
        """The runs of a stage that are missing: seed by seed, all optimizers, each seed begun by another one."""
        names = list(settings)
        for i, seed in enumerate(self.plan.seeds):
            for name in names[i % max(len(names), 1) :] + names[: i % max(len(names), 1)]:
                path = run_path(self.folder, spec, stage, name, seed)
                if not path.is_file():
                    if not self._time_for_a_run(self.plan.seconds):
                        raise OutOfTime
                    self._run(self._job(spec, stage, name, settings[name], seed), path)

    def _run(self, job: Job, path: Path) -> None:
        def progress(point: Point) -> None:
            if self.watcher:
                self.watcher.point(job, point)

        apart = self.plan.isolate
        record = measure_apart(job, progress) if apart else measure(job, self.tasks[job.task], progress)
        write_json(path, {**record, "finished": _now()})
        if self.watcher:
            self.watcher.run(job, record)

    def _job(self, spec: str, stage: str, optimizer: str, hyper: dict[str, Any], seed: int) -> Job:
        plan = self.plan
        data = str(self.data) if self.data else None
        return Job(
            spec,
            optimizer,
            hyper,
            seed,
            stage,
            plan.seconds,
            plan.evaluations,
            plan.device,
            plan.threads,
            plan.compile,
            data,
        )

    def _set_targets(self, spec: str, stage: str) -> None:
        """Writes the targets once, from the baselines' runs of a stage; they never change afterwards."""
        path = target_path(self.folder, spec)
        if not path.is_file():
            targets: dict[str, float] = {}
            given = self.tasks[spec].target
            if given is not None:
                targets["task"] = given
            for name in self.plan.baselines:
                finals = [
                    read_json(run_path(self.folder, spec, stage, name, seed))["final"] for seed in self.plan.seeds
                ]
                middle = median(math.inf if final is None else final for final in finals)
                if math.isfinite(middle):
                    targets[name] = middle
            write_json(path, {"targets": targets, "set": _now()})
            if self.watcher:
                self.watcher.targets(spec, targets)

    def _check_data(self, spec: str) -> None:
        """The data a folder was begun with must be the data it goes on with."""
        path = self.folder / "tuning" / f"{slug(spec)}.data.json"
        data = [dict(part) for part in self.tasks[spec].data]
        if not path.is_file():
            write_json(path, {"data": data})
        elif read_json(path).get("data") != data:
            raise Mistake(f"task {spec!r}: its data or file changed since {self.folder} was begun; pass --overwrite")

    def _time_for_a_run(self, seconds: float) -> bool:
        return time.monotonic() + EVALUATION_SHARE * seconds <= self.deadline


def measure_overhead(task: Task, device: torch.device) -> Overhead:
    """What an evaluation and a warm-up of SGD cost here, twice the latter: other optimizers take longer."""
    entrant, budget = find_entrant("sgd-default"), Budget(1.0, device=device)
    model = task.model().to(device)

    def judge() -> None:
        evaluate(task, model, device)
        held_out(task, model)

    return Overhead(_seconds_of(judge), 2 * _seconds_of(lambda: warm_up(task, entrant, {}, budget)))


def _seconds_of(action: Callable[[], object]) -> float:
    """The least seconds of four calls: the first pays for libraries and memory, others may share the machine."""
    least = math.inf
    for _ in range(4):
        start = time.perf_counter()
        action()
        least = min(least, time.perf_counter() - start)
    return least


def slug(spec: str) -> str:
    """A task's name as a file name."""
    return "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in spec)


def tuning_path(folder: Path, spec: str, optimizer: str) -> Path:
    return folder / "tuning" / f"{slug(spec)}.{optimizer}.json"


def target_path(folder: Path, spec: str) -> Path:
    return folder / "targets" / f"{slug(spec)}.json"


def run_path(folder: Path, spec: str, stage: str, optimizer: str, seed: int) -> Path:
    return folder / "runs" / slug(spec) / f"{stage}.{optimizer}.{seed}.json"


def _outcome_record(outcome: Outcome, plan: Plan) -> dict[str, Any]:
    return {**asdict(outcome), "seconds": outcome.seconds, "seconds_a_trial": plan.seconds_a_trial, "finished": _now()}


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
