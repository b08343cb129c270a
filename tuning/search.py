"""The search of `kfac-tune` for one optimizer, as any number of workers take part in it.

Optuna's TPE proposes. Its successive halving prunes (Hyperband from `HYPERBAND_FROM` trials on), on seconds: rungs are
at a sixth and a half of a run's, and a third of the runs pass each, once `FEW` have. From `LAG_FROM` of the best run's
time on, a run also ends that isn't yet where the best was in a `LAG`th of the time. Neither touches what isn't clearly
behind (`Objective.behind`): where all are on a plateau, all go on. With a target, a run ends when it is there, and no
later than `SLACK` times the best time yet. In the first `CORE_SHARE` of the trials everything but `core` keeps its
first value.
"""

from __future__ import annotations

import math
import random
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from optuna.exceptions import ExperimentalWarning, UpdateFinishedTrialError
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner, SuccessiveHalvingPruner
from optuna.samplers import BaseSampler, PartialFixedSampler, TPESampler
from optuna.trial import Trial

import kfac_triton.tuning.trials as outcomes
from kfac_triton.tuning.baselines import Entrant
from kfac_triton.tuning.errors import Mistake
from kfac_triton.tuning.objective import Objective
from kfac_triton.tuning.space import Space
from kfac_triton.tuning.task import Task, one_line
from kfac_triton.tuning.trainer import Budget, Point, Run, train
from kfac_triton.tuning.trials import Result, Trials, curve

EVALUATIONS = (24, 12, 6)  # of a run; multiples of 6, for the rungs
REDUCTION = 3
FEW = 4  # runs that pass a rung before one is pruned there
PRUNERS = ("auto", "halving", "hyperband", "median", "none")
HYPERBAND_FROM = 40  # trials: with fewer, its brackets are too thin
SLACK = 1.2  # what noise may make a run late by
LAG, LAG_FROM = 1.5, 1 / 3
CORE_SHARE = 0.6
RANDOM_SHARE = 0.2  # of the trials are random, beside the known starts, before TPE begins to model
CODE = ("adaptive", "exact", "empirical", "eigen", "tridiagonal")  # values that run code of their own
ALIKE = 3  # runs in a row that fail with the same error: it is not the settings' fault
WAIT = 0.5  # seconds between two looks at what others still work on

Kind = tuple[str, frozenset[tuple[str, Any]]]
Watch = Callable[[str, Any], None]  # ("phase" | "counts" | "trial" | "run" | "point" | "told" | "ran", what)


class OutOfTime(Exception):
    """The command's time is up, in the middle of a run."""


@dataclass(frozen=True)
class Runs:
    """How runs are made: on which task, from which seed, towards what, on which device; `deadline` on the monotonic
    clock ends one in the middle; `ledger` collects what each came to, `warmed` what kinds this process has run."""

    task: Task
    objective: Objective
    seed: int
    device: torch.device
    evaluations: int = EVALUATIONS[0]
    compile: bool = False
    deadline: float = math.inf
    ledger: list[Result] = field(default_factory=list)
    warmed: set[Kind] = field(default_factory=set)

    def is_cold(self, entrant: Entrant, setting: Mapping[str, Any]) -> bool:
        """Whether a run would pay for what this process has not done yet: loading, compiling, first touches."""
        kind = entrant.name, frozenset((name, value) for name, value in setting.items() if value in CODE)
        cold = self.compile or kind not in self.warmed
        self.warmed.add(kind)
        return cold


def measure(
    runs: Runs,
    entrant: Entrant,
    setting: Mapping[str, Any],
    seed: int,
    *,
    stop: Callable[[Point, Sequence[Point]], str] | None = None,
) -> Result:
    """One run of `setting` from `seed`: to the target, or to the end of its seconds, or until `stop` says why not.

    Raises:
        OutOfTime: at the deadline. Mistake: the task's fault. What `stop` raises, which is no fault of the setting.
    """
    begun, seen, why = time.perf_counter(), list[Point](), ""
    raised: Exception | None = None  # by `stop`

    def judge(point: Point) -> bool:
        nonlocal why, raised
        seen.append(point)
        if time.monotonic() > runs.deadline:
            raise OutOfTime
        if runs.objective.reached(seen) is not None:
            why = outcomes.REACHED
        elif stop is not None:
            try:
                why = stop(point, seen)
            except Exception as error:
                raised = error
                raise
        return bool(why)

    budget = Budget(runs.objective.seconds, runs.evaluations, runs.device, runs.compile, held_out=False, stop=judge)
    own = dict(setting)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"`torch\.jit\.script` is deprecated")  # torch's own, for forward mode
            run = train(runs.task, entrant, own, seed, budget, warm=runs.is_cold(entrant, own))
    except (OutOfTime, Mistake):
        raise
    except Exception as error:
        if error is raised:
            raise
        result = _failed(runs, own, error, seen, time.perf_counter() - begun)
    else:
        result = _result(runs.objective, own, run, why, time.perf_counter() - begun)
    runs.ledger.append(result)
    return result


def _result(objective: Objective, setting: dict[str, Any], run: Run, why: str, wall: float) -> Result:
    diverged = run.ended == outcomes.DIVERGED
    ended = outcomes.DIVERGED if diverged else why if why in ("", outcomes.REACHED) else outcomes.PRUNED
    return Result(
        setting,
        objective.worst(run.points) if diverged else objective.score(run.points),
        ended or outcomes.DONE,
        run.reason if diverged else why if ended == outcomes.PRUNED else "",
        run.seconds,
        run.evaluation_seconds,
        wall,
        run.steps,
        curve(run.points),
    )


def _failed(runs: Runs, setting: dict[str, Any], error: Exception, seen: Sequence[Point], wall: float) -> Result:
    memory = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)
    if runs.device.type == "cuda":
        torch.cuda.empty_cache()
    listed = ", ".join(f"{name}={value}" for name, value in setting.items())
    reason = f"out of memory with {listed}" if memory else one_line(error)
    seconds = seen[-1].seconds if seen else 0.0
    value = runs.objective.worst(seen)
    return Result(setting, value, outcomes.FAILED, reason, seconds, 0.0, wall, 0, curve(list(seen)))


@dataclass
class Search:
    """The part of one worker in the search for `entrant`'s setting."""

    runs: Runs
    entrant: Entrant
    space: Space
    trials: Trials
    pruner: str
    core: tuple[str, ...] = ()
    watch: Watch = lambda what, value: None
    worker: int = 0

    def go(self, *, stay: bool = True) -> bool:
        """Works until every trial is told, or, unless `stay`, until nothing is left to begin; False: out of time.

        Raises:
            Mistake: the task's fault. KeyboardInterrupt: what was running is back in the queue.
        """
        while not self.trials.complete:
            if time.monotonic() > self.runs.deadline:
                return False
            trial = self.trials.claim(self._sampler)
            if trial is not None:
                if not self._run(trial):
                    return False
            elif not stay:
                return True
            elif not self.trials.complete:
                self.watch("counts", self.trials.counts())
                time.sleep(WAIT)
        return True

    def _run(self, trial: Trial) -> bool:
        try:
            setting = self.space.suggest(trial)
            self.watch("counts", self.trials.counts())
            self.watch("trial", (trial.number, setting))
            if outcomes.attempts(trial) > outcomes.ATTEMPTS:
                reason = f"its worker died {outcomes.ATTEMPTS} times"
                result = Result(setting, self.runs.objective.worst([]), outcomes.FAILED, reason)
            else:
                with self.trials.alive(trial):
                    result = measure(self.runs, self.entrant, setting, self.runs.seed, stop=self._stop_rule(trial))
        except UpdateFinishedTrialError:
            return True  # another worker took this one for dead, and the setting is back in the queue
        except OutOfTime:
            self.trials.give_back(trial)
            return False
        except BaseException:
            self.trials.give_back(trial)
            raise
        result = replace(result, start=outcomes.start_of(trial), number=trial.number)
        if self.trials.tell(trial, result):
            self.watch("counts", self.trials.counts())
            self.watch("told", result)
        self._check_failures()
        return True

    def _stop_rule(self, trial: Trial) -> Callable[[Point, Sequence[Point]], str]:
        """Why a run is to end at a point, or "": too late for the target, behind the best's curve, or at a rung."""
        objective, evaluations = self.runs.objective, self.runs.evaluations
        rung = evaluations // 6
        good = [result for result in self.trials.results() if result.good]
        best = min(good, key=lambda result: result.value, default=None)
        reach = min((result.points[-1][1] for result in good), default=math.inf)

        def stop(point: Point, seen: Sequence[Point]) -> str:
            self.watch("point", (trial.number, point))
            place = len(seen) - 1
            if place == 0 or not math.isfinite(point.train):  # the trainer ends it
                return ""
            trial.report(objective.score(seen), place)
            if self.pruner == "none":
                return ""
            if best is not None and objective.hopeless(point, best.value, SLACK):
                return f"no target after {point.seconds:.1f} s, the best took {best.value:.1f} s"
            if best is not None and point.seconds >= LAG_FROM * best.points[-1][0]:
                then = metric_at(best.points, point.seconds / LAG)
                if objective.behind(point.train, then, seen[0].train, min(reach, then)):
                    return f"at {point.seconds:.1f} s not where the best was after {point.seconds / LAG:.1f} s"
            if place % rung == 0 and place < evaluations and trial.should_prune():
                rivals = [r.points[place][1] for r in self.trials.results() if len(r.points) > place]
                rivals = [value for value in rivals if math.isfinite(value)]
                ahead = min(rivals, default=math.inf)
                if len(rivals) >= FEW and objective.behind(point.train, ahead, seen[0].train, min(reach, ahead)):
                    return f"behind after {point.seconds:.1f} s"
            return ""

        return stop

    def _sampler(self, number: int) -> BaseSampler:
        """TPE made anew for every trial from (seed, trial, worker): going on after an interruption changes nothing."""
        seed = random.Random(f"{self.runs.seed} {number} {self.worker}").randrange(2**32)
        told = self.trials.results()
        startup = max(2, round(RANDOM_SHARE * self.trials.wanted)) + sum(bool(result.start) for result in told)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            tpe = TPESampler(seed=seed, n_startup_trials=startup, multivariate=True, group=True, constant_liar=True)
            if not self.core or len(told) >= CORE_SHARE * self.trials.wanted:
                return tpe
            first = {name: value for name, value in self.space.first.items() if name not in self.core}
            return PartialFixedSampler(self.space.drawn(first), tpe)

    def _check_failures(self) -> None:
        """Raises: Mistake: the last runs all failed alike."""
        last = self.trials.results()[-ALIKE:]
        reasons = {result.reason for result in last}
        if len(last) == ALIKE and all(result.ended == outcomes.FAILED for result in last) and len(reasons) == 1:
            name = self.runs.task.name
            raise Mistake(f"task {name!r}: {ALIKE} runs of {self.entrant.name} in a row failed: {last[0].reason}")


def metric_at(points: Sequence[tuple[float, float]], seconds: float) -> float:
    """The metric of a curve at a time, on a straight line between two evaluations."""
    for (start, before), (end, after) in pairwise(points):
        if seconds <= end:
            return before + (after - before) * (seconds - start) / max(end - start, 1e-9)
    return points[-1][1]


def pruner(name: str, wanted: int, evaluations: int = EVALUATIONS[0]) -> BasePruner:
    """Optuna's pruner of that name, its resource counted in evaluations, which lie at even distances in seconds.

    Raises:
        Mistake: no such pruner.
    """
    if name not in PRUNERS:
        raise Mistake(f"--pruner {name}: one of {', '.join(PRUNERS)}")
    if name == "auto":
        name = "hyperband" if wanted >= HYPERBAND_FROM else "halving"
    rung = evaluations // 6
    if name == "hyperband":
        return HyperbandPruner(min_resource=rung, max_resource=evaluations, reduction_factor=REDUCTION)
    if name == "halving":
        return SuccessiveHalvingPruner(min_resource=rung, reduction_factor=REDUCTION)
    return MedianPruner(n_warmup_steps=rung, interval_steps=rung) if name == "median" else NopPruner()
