"""The search: the same number of settings, seconds a setting and rules for every optimizer.

A study is an Optuna TPE study in a journal file, so that an interrupted one goes on. The sampler is made anew for
every trial from (seed, trial number), hence resuming changes nothing. The first three quarters of the settings come
from the declared space; if the best of them sits at the edge of a numeric range, that edge moves out by half the
range's length, the next setting lies just past the old edge, and the rest are drawn from the wider space. A trial
that diverges ends at once and counts as infinitely bad. At half of its seconds a trial ends when its metric is more
than `BEHIND` times the best seen at that point.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, Trial, TrialState

from kfac_triton.tuning.baselines import find_entrant
from kfac_triton.tuning.space import Space, find_space
from kfac_triton.tuning.storage import open_journal
from kfac_triton.tuning.task import Task
from kfac_triton.tuning.trainer import Budget, Point, Run, train

DECLARED_SHARE = 0.75  # of the settings come from the space as declared
BEHIND = 3.0
EVALUATIONS = 4  # of a trial; an even number, so that one falls on the half
RANDOM_SHARE = 0.4  # of the settings are random before TPE begins to model

Runner = Callable[[dict[str, Any], Callable[[Point], bool]], Run]
Report = Callable[["TrialRow"], None]


@dataclass(frozen=True)
class TrialRow:
    """A finished trial: its setting, what it ended with (inf: diverged), how it ended and the seconds it trained."""

    number: int
    setting: dict[str, Any]
    value: float
    ended: str
    reason: str
    seconds: float
    steps: int


@dataclass(frozen=True)
class Outcome:
    """What a search found. `edges` are the ranges at whose edge the winner sits although they were widened once."""

    optimizer: str
    best: dict[str, Any] | None
    value: float
    trials: tuple[TrialRow, ...]
    space: dict[str, str]
    widened: dict[str, str]
    edges: dict[str, str]

    @property
    def seconds(self) -> float:
        return sum(row.seconds for row in self.trials)


def search(
    task: Task,
    optimizer: str,
    *,
    trials: int,
    budget: Budget,
    journal: Path,
    seed: int = 0,
    report: Report | None = None,
    go_on: Callable[[], bool] = lambda: True,
) -> Outcome | None:
    """Finds a setting for `optimizer` on `task`; None when `go_on` says that the time is up before the last trial."""
    entrant = find_entrant(optimizer)

    def run(setting: dict[str, Any], stop: Callable[[Point], bool]) -> Run:
        own = Budget(budget.seconds, EVALUATIONS, budget.device, budget.compile, held_out=False, stop=stop)
        return train(task, entrant, setting, seed, own)

    return Search(optimizer, find_space(optimizer), journal, seed, trials, run).complete(report, go_on)


class Search:
    """One study, asked and told in a loop."""

    def __init__(self, optimizer: str, space: Space, journal: Path, seed: int, trials: int, run: Runner) -> None:
        self.optimizer, self.declared, self.seed, self.trials, self.run = optimizer, space, seed, trials, run
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.study = optuna.create_study(storage=open_journal(journal), study_name=optimizer, load_if_exists=True)
        self._repair()

    def complete(self, report: Report | None, go_on: Callable[[], bool]) -> Outcome | None:
        while len(self.rows()) < self.trials:
            if not go_on():
                return None
            row = self._next()
            if report:
                report(row)
        return self.outcome()

    def outcome(self) -> Outcome:
        rows, (space, edges) = self.rows(), self._space()
        winner = best(rows)
        return Outcome(
            self.optimizer,
            winner.setting if winner else None,
            winner.value if winner else math.inf,
            tuple(rows),
            self.declared.describe(),
            {name: space.parameters[name].describe() for name in edges},
            dict(space.edges(winner.setting)) if winner else {},
        )

    def rows(self) -> list[TrialRow]:
        """The settings that were told, counted from 0."""
        told = self.study.get_trials(states=(TrialState.COMPLETE,))
        return [_row(number, trial) for number, trial in enumerate(told)]

    def _next(self) -> TrialRow:
        done = len(self.rows())
        space, edges = self._space()
        self._enqueue_known(done, space, edges)
        self.study.sampler = self._sampler()
        trial = self.study.ask()
        setting = space.suggest(trial)
        run = self.run(setting, self._stop_rule())
        return self._tell(trial, setting, run)

    def _tell(self, trial: Trial, setting: dict[str, Any], run: Run) -> TrialRow:
        trial.set_user_attr("setting", setting)
        trial.set_user_attr(
            "run", {"ended": run.ended, "reason": run.reason, "seconds": run.seconds, "steps": run.steps}
        )
        trial.set_user_attr("values", [point.train for point in run.points])
        # TPE ranks trials by value: a pruned one is told the worse value it had, a diverged one the worst there is
        self.study.tell(trial, run.final)
        return self.rows()[-1]

    def _space(self) -> tuple[Space, dict[str, Any]]:
        """The space for the next setting and the edges that moved: decided once, by the declared part of the search."""
        first_part = self.rows()[: self._declared_trials()]
        winner = best(first_part)
        if len(first_part) < self._declared_trials() or winner is None:
            return self.declared, {}
        edges = self.declared.edges(winner.setting)
        return self.declared.widened(edges), dict(edges)

    def _declared_trials(self) -> int:
        return max(1, math.ceil(DECLARED_SHARE * self.trials))

    def _enqueue_known(self, done: int, space: Space, edges: dict[str, Any]) -> None:
        if any(trial.state == TrialState.WAITING for trial in self.study.trials):
            return
        if done < len(self.declared.starts):
            self.study.enqueue_trial(self.declared.drawn(self.declared.starts[done]))
        elif done == self._declared_trials() and edges:
            winner = best(self.rows())
            if winner:
                self.study.enqueue_trial(space.drawn(self.declared.beyond(winner.setting, edges)))

    def _sampler(self) -> optuna.samplers.BaseSampler:
        number = len(self.study.trials)
        return optuna.samplers.TPESampler(
            seed=self.seed * 100_003 + number, n_startup_trials=max(2, round(RANDOM_SHARE * self.trials))
        )

    def _stop_rule(self) -> Callable[[Point], bool]:
        """Half-way through, is a trial more than `BEHIND` times worse than the best was then?"""
        half = EVALUATIONS // 2
        finished = [trial.user_attrs["values"] for trial in self.study.trials if "values" in trial.user_attrs]
        bar = min((values[half] for values in finished if len(values) > half), default=math.inf)
        seen = 0

        def stop(point: Point) -> bool:
            nonlocal seen
            seen += 1
            return seen == half + 1 and point.train > BEHIND * bar

        return stop

    def _repair(self) -> None:
        """The setting of a trial that an interruption left running is queued, all of one that came from the queue, and
        the trial closed."""
        waiting = [trial.system_attrs["fixed_params"] for trial in self.study.get_trials(states=(TrialState.WAITING,))]
        for trial in self.study.get_trials(states=(TrialState.RUNNING,)):
            setting = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
            if setting and setting not in waiting:
                self.study.enqueue_trial(setting)
            self.study.tell(trial.number, state=TrialState.FAIL)


def best(rows: Sequence[TrialRow]) -> TrialRow | None:
    """The trial with the smallest value among those that trained to their end."""
    finished = [row for row in rows if row.ended == "done" and math.isfinite(row.value)]
    return min(finished, key=lambda row: row.value, default=None)


def _row(number: int, trial: FrozenTrial) -> TrialRow:
    run = trial.user_attrs["run"]
    value = math.inf if trial.value is None else trial.value
    return TrialRow(number, trial.user_attrs["setting"], value, **run)
