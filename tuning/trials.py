"""One study's trials, shared by workers that may join, leave or be killed at any moment.

A trial counts once it is told, and a study has at most as many of those as were wanted. A worker that works on one says
every few seconds that it lives. What a dead one left goes back into the queue and is closed; if that worker was only
slow, its result finds the trial closed and is dropped. A setting whose workers keep dying in its run counts as bad.

A queued setting is never lost, wherever a worker dies or a disk fills: its successor, which names it in the attribute
"after", is queued before the trial is closed. Where two workers queue a successor, only the first one counts.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, Trial, TrialState

from kfac_triton.tuning.trainer import Point

BEAT, GRACE = 10.0, 60.0  # seconds between two signs of life; without one for so long a worker counts as dead
ATTEMPTS = 3  # workers that a setting may kill
TOLD = (TrialState.COMPLETE, TrialState.PRUNED)

HOST = socket.gethostname()
DIVERGED, FAILED, PRUNED, REACHED, DONE = "diverged", "failed", "pruned", "reached", "done"


@dataclass(frozen=True)
class Result:
    """What a run of a setting came to. `start` names the known setting that it began from, if it did; `seconds` it
    trained, `wall` it took in all; `ended` is "reached", "done", "pruned", "diverged" or "failed"."""

    setting: dict[str, Any]
    value: float
    ended: str
    reason: str = ""
    seconds: float = 0.0
    evaluating: float = 0.0
    wall: float = 0.0
    steps: int = 0
    points: list[tuple[float, float]] = field(default_factory=list)
    start: str = ""
    number: int = -1

    @property
    def good(self) -> bool:
        return self.ended in (REACHED, DONE)


def curve(points: list[Point]) -> list[tuple[float, float]]:
    """(seconds, metric) of each."""
    return [(round(point.seconds, 4), point.train) for point in points]


class Trials:
    """The trials of `study`; at most `wanted` of them count."""

    def __init__(
        self,
        study: optuna.Study,
        wanted: int,
        *,
        beat: float = BEAT,
        grace: float = GRACE,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.study, self.wanted, self.beat, self.grace, self.clock = study, wanted, beat, grace, clock
        self._seen: dict[int, tuple[Any, float]] = {}

    def results(self) -> list[Result]:
        """Those told, in the order of their numbers."""
        return [_result(trial) for trial in self._trials(TOLD)]

    def counts(self) -> dict[str, int]:
        """How many trials are done, running and pruned."""
        told = self.results()
        pruned = sum(result.ended == PRUNED for result in told)
        return {"done": len(told) - pruned, "running": len(self._trials((TrialState.RUNNING,))), "pruned": pruned}

    @property
    def complete(self) -> bool:
        return len(self._trials(TOLD)) >= self.wanted

    def enqueue(self, setting: Mapping[str, Any], start: str) -> None:
        """Puts a known setting into the queue, unless it was there before."""
        self.study.enqueue_trial(dict(setting), user_attrs={"start": start}, skip_if_exists=True)

    def claim(self, sampler: Callable[[int], BaseSampler]) -> Trial | None:
        """The next trial; None while others work on the last ones, and when all are told."""
        self.reap()
        while len(self._trials((*TOLD, TrialState.RUNNING))) < self.wanted:
            self.study.sampler = sampler(len(self._trials()))
            trial = self.study.ask()
            try:
                trial.set_user_attr("owner", _owner())
            except UpdateFinishedTrialError:  # another worker took this one for dead
                continue
            if self._superseded(trial):
                self._close(trial.number)
                continue
            earlier = (TrialState.RUNNING, TrialState.WAITING)
            before = sum(other.number < trial.number for other in self._trials(earlier)) + len(self._trials(TOLD))
            if before < self.wanted:
                return trial
            self.give_back(trial)  # another worker was first
            return None
        return None

    @contextmanager
    def alive(self, trial: Trial) -> Iterator[None]:
        """Says that the run of `trial` begins, and in the background that somebody works on it."""
        over = threading.Event()
        trial.set_user_attr("beat", 0)

        def beat() -> None:
            times = 0
            while not over.wait(self.beat):
                times += 1
                try:
                    trial.set_user_attr("beat", times)
                except Exception:  # closed by another worker, or the storage is away: telling the result will show it
                    return

        thread = threading.Thread(target=beat, name="beat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def tell(self, trial: Trial, result: Result) -> bool:
        """Records the result; False if the trial was closed in the meantime, and the result is dropped."""
        if self._successors(trial.number):
            self._close(trial.number)
            return False
        try:
            trial.set_user_attr("setting", result.setting)
            trial.set_user_attr("run", {k: v for k, v in asdict(result).items() if k not in ("setting", "number")})
            if result.ended == PRUNED:
                self.study.tell(trial, state=TrialState.PRUNED)
            else:
                self.study.tell(trial, result.value)
        except (UpdateFinishedTrialError, ValueError):
            if self._held(trial.number).state == TrialState.RUNNING:
                raise
            return False
        return True

    def give_back(self, trial: Trial) -> None:
        """Closes a trial that was broken off through no fault of its setting, which goes back into the queue."""
        held = self._held(trial.number)
        if held.state == TrialState.RUNNING:
            self._put_back(held, attempts(held))

    def reap(self) -> None:
        """Closes what dead workers left, and puts the settings back into the queue.

        A setting whose run had not begun has no part in its worker's death.
        """
        for trial in self._trials((TrialState.RUNNING,)):
            if self._stale(trial):
                self._put_back(trial, attempts(trial) + ("beat" in trial.user_attrs))

    def _put_back(self, trial: FrozenTrial, attempt: int) -> None:
        """Queues what is known of the setting: all of one that came from the queue, however little was suggested."""
        setting = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
        if setting:
            said = {"start": start_of(trial), "attempt": attempt, "after": trial.number}
            self.study.enqueue_trial(setting, user_attrs=said)
        self._close(trial.number)

    def _successors(self, number: int) -> list[int]:
        return [trial.number for trial in self._trials() if trial.user_attrs.get("after") == number]

    def _superseded(self, trial: Trial) -> bool:
        """Whether what `trial` was queued to repeat was told after all, or is repeated by an earlier one."""
        after = trial.user_attrs.get("after")
        return after is not None and (self._held(after).state in TOLD or min(self._successors(after)) < trial.number)

    def _stale(self, trial: FrozenTrial) -> bool:
        owner = trial.user_attrs.get("owner")
        if owner == _owner():
            return False  # this process's own
        if owner is not None and owner["host"] == HOST:
            return bool(_started(owner["process"]) != owner["started"])
        sign, now = trial.user_attrs.get("beat"), self.clock()
        last, since = self._seen.setdefault(trial.number, (sign, now))
        if last != sign:
            self._seen[trial.number] = sign, now
            return False
        return now - since > self.grace

    def _close(self, number: int) -> bool:
        """Fails a running trial; False if it was finished in the meantime."""
        try:
            self.study.tell(number, state=TrialState.FAIL)
        except (UpdateFinishedTrialError, ValueError):
            return False
        return True

    def _held(self, number: int) -> FrozenTrial:
        return next(trial for trial in self._trials() if trial.number == number)

    def _trials(self, states: tuple[TrialState, ...] | None = None) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False, states=states)


def _owner() -> dict[str, Any]:
    return {"host": HOST, "process": os.getpid(), "started": _started(os.getpid())}


def _started(process: int) -> str | None:
    """When a process of this machine began, None if there is none: a number that came back is another process."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    stat = Path(f"/proc/{process}/stat")
    try:
        fields = stat.read_text().rpartition(")")[2].split()
    except OSError:
        return "running"
    return None if fields[0] == "Z" else fields[19]


def attempts(trial: Trial | FrozenTrial) -> int:
    return int(trial.user_attrs.get("attempt", 1))


def start_of(trial: Trial | FrozenTrial) -> str:
    return str(trial.user_attrs.get("start", ""))


def _result(trial: FrozenTrial) -> Result:
    run = dict(trial.user_attrs["run"])
    run["points"] = [tuple(point) for point in run["points"]]
    return Result(setting=trial.user_attrs["setting"], number=trial.number, **run)
