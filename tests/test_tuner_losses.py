"""kfac-tune loses no known setting and blames none, wherever a worker is killed or the disk fills."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from failing import Failing, Killed, full
from optuna.storages import BaseStorage, InMemoryStorage, get_storage
from optuna.trial import TrialState
from torch import nn
from torch.nn import functional as F

import kfac_triton.tuning.setting as settings_of
from kfac_triton.tuning import Task, search, tune
from kfac_triton.tuning import trials as trials_of
from kfac_triton.tuning.baselines import ENTRANTS
from kfac_triton.tuning.errors import Mistake
from kfac_triton.tuning.objective import Objective
from kfac_triton.tuning.search import Runs, Search, pruner
from kfac_triton.tuning.space import Choice, Range, Space
from kfac_triton.tuning.storage import JournalFileBackend, open_storage
from kfac_triton.tuning.trainer import Point, Run
from kfac_triton.tuning.trials import Trials, attempts, start_of

SPACE = Space(
    {
        "kind": Choice(("plain", "curved")),
        "x": Range(0.0, 1.0, log=False),
        "m": Range(0.3, 0.99, below_one=True),
        "bend": Range(1e-3, 1.0),
    },
    {},
    {"bend": ("kind", ("curved",))},
)
KNOWN = {
    "first": {"kind": "plain", "x": 0.25, "m": 0.75},
    "second": {"kind": "curved", "x": 0.75, "m": 0.5, "bend": 0.125},
}
TASK = Task(
    lambda: nn.Linear(2, 2),
    lambda seed: iter([(torch.ones(4, 2), torch.zeros(4).long())] * 3),
    F.cross_entropy,
    "categorical",
    name="made up",
)


@pytest.fixture(autouse=True)
def unsynchronised(monkeypatch: pytest.MonkeyPatch) -> None:
    """No machine loses its power here, and thousands of lines are written."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(params=["memory", "journal", pytest.param("sqlite", marks=pytest.mark.slow)])
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[int], Callable[[], BaseStorage]]:
    """opened(n)() is the n-th storage, as a process that has just begun has it."""

    def number(n: int) -> Callable[[], BaseStorage]:
        memory = InMemoryStorage()
        where = {"journal": str(tmp_path / f"{n}.journal"), "sqlite": f"sqlite:///{tmp_path}/{n}.db"}
        if request.param == "memory":
            return lambda: memory
        return lambda: get_storage(open_storage(where[request.param]))

    return number


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Training in no time, from 1 down to x; the returned function makes this process another one."""

    def train(task, entrant, setting, seed, budget, *, warm):
        run = Run()
        for place in range(3):
            run.points.append(Point(place / 2 * budget.seconds, place, 2.0 - place * (1 - setting.get("x", 0.5)), None))
            budget.stop(run.points[-1])
        run.steps, run.seconds = 2, budget.seconds
        return run

    monkeypatch.setattr(search, "train", train)
    monkeypatch.setattr(search, "WAIT", 0.0)
    monkeypatch.setattr(trials_of, "GRACE", -1.0)
    born = iter(range(1, 10**6))

    def another() -> None:
        me = {"host": trials_of.HOST, "process": 2**22 + next(born), "started": "1"}  # beyond the numbers there are
        monkeypatch.setattr(trials_of, "_owner", lambda: me)

    another()
    return another


def searcher(storage: Any, wanted: int) -> Search:
    study = optuna.create_study(storage=storage, study_name="s", load_if_exists=True, pruner=pruner("none", wanted))
    runs = Runs(TASK, Objective(6.0), 0, torch.device("cpu"))
    return Search(runs, ENTRANTS["sgd"], SPACE, Trials(study, wanted, grace=-1.0), "none")


def work(storage: Any, wanted: int = 3) -> Search:
    """What a command does: it queues what is known, unless that was done, and searches."""
    made = searcher(storage, wanted)
    for start, setting in KNOWN.items():
        made.trials.enqueue(SPACE.drawn(setting), start)
    assert made.go()
    return made


def assert_nothing_lost(trials: Trials, wanted: int = 3) -> None:
    results = trials.results()
    assert len(results) == wanted and all(result.ended == "done" for result in results)
    starts = {result.start: result.setting for result in results if result.start}
    assert starts == KNOWN and sum(bool(result.start) for result in results) == len(KNOWN)
    assert not trials.study.get_trials(states=(TrialState.RUNNING,))


# ------------------------------------------------------------------------------------------------------------- killed


def test_a_worker_killed_after_any_number_of_suggestions_leaves_the_whole_known_setting(opened, pretend):
    for number, (start, setting) in enumerate(KNOWN.items()):
        for suggested in range(len(setting) + 1):
            storage = opened(10 * number + suggested)
            trials = searcher(storage(), 1).trials
            trials.enqueue(SPACE.drawn(setting), start)
            trial = trials.claim(lambda number: optuna.samplers.RandomSampler(seed=number))
            for name in list(setting)[:suggested]:
                SPACE.parameters[name].suggest(trial, name)
            pretend()
            again = searcher(storage(), 1).trials.claim(lambda number: optuna.samplers.RandomSampler(seed=number))
            assert again.number != trial.number
            assert SPACE.suggest(again) == setting
            assert start_of(again) == start and attempts(again) == 1, "its run had not begun"


def test_a_command_killed_at_any_write_goes_on_with_every_known_setting_once(opened, pretend):
    for writes in range(1000):
        storage = opened(writes)
        failing = Failing(storage(), writes, Killed)
        try:
            work(failing)
        except Killed:
            pretend()
            assert_nothing_lost(work(storage()).trials)
        if not failing.lost:
            break
    assert writes > 30, "the whole search was cut"


def test_one_killed_at_any_write_of_taking_a_dead_ones_place_loses_nothing_either(opened, pretend):
    for writes in range(1000):
        storage = opened(writes)
        with pytest.raises(Killed):
            work(Failing(storage(), 8, Killed))  # in the middle of the first setting
        pretend()
        failing = Failing(storage(), writes, Killed)
        try:
            work(failing)
        except Killed:
            pretend()
            assert_nothing_lost(work(storage()).trials)
        if not failing.lost:
            break
    assert writes > 30


def test_ctrl_c_whose_giving_back_is_cut_short_loses_nothing(opened, pretend, monkeypatch):
    def pressed(*arguments, **options):
        raise KeyboardInterrupt

    for writes in range(1000):
        storage = opened(writes)
        made = searcher(storage(), 3)
        for start, setting in KNOWN.items():
            made.trials.enqueue(SPACE.drawn(setting), start)
        failing = Failing(storage(), writes, Killed)
        with monkeypatch.context() as patch, pytest.raises((KeyboardInterrupt, Killed)):
            patch.setattr(search, "train", pressed)
            searcher(failing, 3).go()
        pretend()
        assert_nothing_lost(work(storage()).trials)
        if not failing.lost:
            break
    assert writes > 5


def test_two_workers_that_take_the_same_dead_ones_place_repeat_its_setting_once(opened, pretend):
    storage = opened(0)
    with pytest.raises(Killed):
        work(Failing(storage(), 8, Killed))
    pretend()
    trials = searcher(storage(), 3).trials
    (dead,) = trials.study.get_trials(states=(TrialState.RUNNING,))
    drawn = SPACE.drawn(KNOWN["first"])
    for _ in range(2):  # both looked before either wrote
        trials.study.enqueue_trial(drawn, user_attrs={"start": "first", "attempt": 2, "after": dead.number})
    assert_nothing_lost(work(storage()).trials)


def test_a_slow_worker_that_was_replaced_is_told_so_and_one_that_was_first_is_not_repeated(opened, pretend):
    trials = searcher(opened(0)(), 3).trials
    for start, setting in KNOWN.items():
        trials.enqueue(SPACE.drawn(setting), start)
    sampler = optuna.samplers.RandomSampler(seed=0)
    slow, quick = (trials.claim(lambda number: sampler) for _ in range(2))
    for trial, wins in ((slow, False), (quick, True)):
        setting = SPACE.suggest(trial)
        result = trials_of.Result(setting, 1.0, "done", points=[(0.0, 1.0)], start=start_of(trial))
        told = trials.tell(trial, result) if wins else None
        said = {"start": start_of(trial), "attempt": 2, "after": trial.number}
        trials.study.enqueue_trial(SPACE.drawn(setting), user_attrs=said)
        assert trials.tell(trial, result) is False if told is None else told
    assert_nothing_lost(work(trials.study._storage).trials)


def test_the_setting_of_a_worker_that_came_too_late_for_the_last_trial_stays_in_the_queue(opened, pretend, monkeypatch):
    storage = opened(0)
    trials = searcher(storage(), 1).trials
    for start, setting in KNOWN.items():
        trials.enqueue(SPACE.drawn(setting), start)
    ask, raced = trials.study.ask, []

    def late(*arguments):
        if not raced:
            raced.append(searcher(storage(), 1).trials.claim(lambda number: optuna.samplers.RandomSampler()))
        return ask(*arguments)

    monkeypatch.setattr(trials.study, "ask", late)
    assert trials.claim(lambda number: optuna.samplers.RandomSampler()) is None
    assert raced[0] is not None
    trials.give_back(raced[0])
    assert_nothing_lost(work(storage()).trials)


# ---------------------------------------------------------------------------------------------------------- full disks


@pytest.mark.parametrize("once", [True, False])
def test_a_storage_that_fails_in_a_run_is_no_fault_of_the_setting(opened, pretend, once):
    for writes in range(1000):
        storage = opened(writes)
        failing = Failing(storage(), writes, full, once=once)
        try:
            trials = work(failing).trials
        except OSError:
            pretend()
            trials = work(storage()).trials
        assert_nothing_lost(trials)
        if not failing.lost:
            break
    assert writes > 30


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Journals have room for `lines` more; then half of a line is written, as a full disk takes it."""
    room = {"lines": float("inf")}
    append = JournalFileBackend.append_logs

    def append_logs(self, logs):
        if room["lines"] < 1:
            with open(self._file_path, "ab") as file:
                file.write(json.dumps(logs[0]).encode()[:20])
            raise full()
        room["lines"] -= 1
        append(self, logs)

    monkeypatch.setattr(JournalFileBackend, "append_logs", append_logs)
    return room


QUICK = {"trials": 7, "seconds": 1.0, "seeds": 1, "device": "cpu", "compile": False, "prune": "none"}


def starts_of(path: Path, study: str) -> list[str]:
    return [r.start for r in Trials(optuna.load_study(study_name=study, storage=open_storage(str(path))), 0).results()]


def test_a_disk_that_fills_while_the_known_settings_are_queued_costs_none_of_them(tmp_path, pretend, disk):
    asked = {**QUICK, "baselines": ("sgd",), "target": "defaults"}
    for lines in range(1000):
        path, disk["lines"] = tmp_path / f"{lines}.journal", lines
        with pytest.raises(Mistake, match=r"cannot be written: No space left on device; make room, and the same comm"):
            tune(TASK, **asked, storage=str(path))
        queued = path.read_text().count("fixed_params")
        disk["lines"] = float("inf")
        pretend()
        tune(TASK, **asked, storage=str(path))
        assert sorted(starts_of(path, "made up")) == sorted(settings_of.STARTS)
        assert starts_of(path, "made up/sgd")[:2] == ["first", "second"]
        if queued == len(settings_of.STARTS) + 2:
            break
    assert lines > 8


@pytest.mark.slow
def test_a_disk_that_fills_at_any_write_costs_no_known_setting(tmp_path, pretend, disk):
    for lines in range(0, 1000, 7):
        path, disk["lines"] = tmp_path / f"{lines}.journal", lines
        try:
            tune(TASK, **QUICK, baselines=(), storage=str(path))
        except Mistake:
            disk["lines"] = float("inf")
            pretend()
            result = tune(TASK, **QUICK, baselines=(), storage=str(path))
            assert sorted(starts_of(path, "made up")) == sorted(settings_of.STARTS)
            assert result.content["evidence"]["searches"]["kfac"]["ended"] == {"done": 7}
        else:
            break
    assert lines > 60


def test_what_is_known_is_decided_once(tmp_path, pretend, disk):
    """A study that was broken off while it was queued goes on with what it began with, whatever was found since."""
    path = tmp_path / "s.journal"
    disk["lines"] = 5  # the study, its plan, the list and two settings
    with pytest.raises(Mistake, match="No space left"):
        tune(TASK, **QUICK, baselines=(), storage=str(path), study="late")
    disk["lines"] = float("inf")
    tune(TASK, **QUICK, baselines=(), storage=str(path), study="early", fix=("damping=0.125",))
    tune(TASK, **{**QUICK, "trials": 8}, baselines=(), storage=str(path), study="late")
    assert sorted(starts_of(path, "late")) == ["", *sorted(settings_of.STARTS)]
