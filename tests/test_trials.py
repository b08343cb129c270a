"""Trials that workers share: never more than were wanted, none lost, none counted twice, whoever dies when."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import optuna
import pytest
from optuna.trial import TrialState

from kfac_triton.tuning import trials as trials_of
from kfac_triton.tuning.storage import open_storage
from kfac_triton.tuning.trials import ATTEMPTS, Result, Trials, attempts, start_of


def sampler(number: int) -> optuna.samplers.BaseSampler:
    return optuna.samplers.RandomSampler(seed=number)


@pytest.fixture
def study(tmp_path) -> optuna.Study:
    return optuna.create_study(storage=open_storage(str(tmp_path / "t.journal")), study_name="s")


def opened(study: optuna.Study, wanted: int, **options) -> Trials:
    """As another process would have it."""
    storage = study._storage
    path = getattr(storage, "_backend", None)
    storage = storage if path is None else open_storage(path._file_path)
    return Trials(optuna.load_study(study_name="s", storage=storage), wanted, **options)


def work(trials: Trials, trial: optuna.Trial, value: float | None = None, ended: str = "done") -> bool:
    x = trial.suggest_float("x", 0, 1)
    return trials.tell(trial, Result({"x": x}, x if value is None else value, ended, points=[(0.0, 1.0)]))


def of_the_dead(trials: Trials, monkeypatch, host: str = trials_of.HOST) -> optuna.Trial:
    """A trial whose worker has gone, in the middle of its run."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    gone = {"host": host, "process": child.pid, "started": "1"}
    with monkeypatch.context() as patch:
        patch.setattr(trials_of, "_owner", lambda: gone)
        trial = trials.claim(sampler)
    trial.suggest_float("x", 0, 1)
    with trials.alive(trial):
        return trial


def test_results_come_back_as_they_were_told(study):
    trials = Trials(study, 3)
    trials.enqueue({"x": 0.25}, "known")
    trial = trials.claim(sampler)
    assert start_of(trial) == "known" and attempts(trial) == 1
    x = trial.suggest_float("x", 0, 1)
    told = Result({"x": x}, 2.0, "reached", "", 1.0, 0.1, 1.2, 7, [(0.0, 3.0), (1.0, 1.0)], "known")
    assert x == 0.25 and trials.tell(trial, told)
    (found,) = opened(study, 3).results()
    assert found == Result({"x": x}, 2.0, "reached", "", 1.0, 0.1, 1.2, 7, [(0.0, 3.0), (1.0, 1.0)], "known", 0)
    assert found.good and trials.counts() == {"done": 1, "running": 0, "pruned": 0}


def test_a_pruned_trial_is_pruned_for_optuna_and_diverged_ones_have_a_value(study):
    trials = Trials(study, 3)
    for ended in ("pruned", "diverged", "failed"):
        trial = trials.claim(sampler)
        trial.report(1.0, 1)
        work(trials, trial, 9.0, ended)
    assert [t.state for t in study.trials] == [TrialState.PRUNED, TrialState.COMPLETE, TrialState.COMPLETE]
    assert trials.complete and trials.claim(sampler) is None
    assert not any(result.good for result in trials.results())
    assert trials.counts()["pruned"] == 1


def test_workers_that_race_for_the_last_trial_tell_exactly_as_many_as_were_wanted(study):
    """Eight threads, each with a connection of its own, all asking at once."""
    wanted, barrier = 20, threading.Barrier(8, timeout=300)

    def run() -> None:
        trials = opened(study, wanted)
        barrier.wait()
        while not trials.complete:
            trial = trials.claim(sampler)
            if trial is not None:
                work(trials, trial)
            else:
                time.sleep(0.01)

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    results = Trials(study, wanted).results()
    assert len(results) == wanted and len({result.number for result in results}) == wanted


def test_more_known_settings_than_trials(study):
    trials = Trials(study, 2)
    for x in (0.1, 0.2, 0.3, 0.4):
        trials.enqueue({"x": x}, str(x))
    while (trial := trials.claim(sampler)) is not None:
        work(trials, trial)
    assert [result.setting["x"] for result in trials.results()] == [0.1, 0.2]


def test_what_a_dead_worker_of_this_machine_left_is_tried_again_at_once(study, monkeypatch):
    trials = Trials(study, 2)
    dead = of_the_dead(trials, monkeypatch)
    again = opened(study, 2).claim(sampler)
    assert again.number != dead.number and attempts(again) == 2
    assert again.suggest_float("x", 0, 1) == dead.params["x"]
    assert study.trials[dead.number].state == TrialState.FAIL
    assert work(trials, again) and [result.number for result in trials.results()] == [again.number]


def test_what_a_silent_worker_of_another_machine_left_is_tried_again_after_a_while(study, monkeypatch):
    now = [0.0]
    dead = of_the_dead(Trials(study, 5), monkeypatch, "elsewhere")
    trials = opened(study, 5, grace=60.0, clock=lambda: now[0])
    first = trials.claim(sampler)
    assert attempts(first) == 1 and study.trials[dead.number].state == TrialState.RUNNING
    now[0] = 40.0
    dead.set_user_attr("beat", 1)  # it is alive after all
    trials.reap()
    now[0] = 80.0
    trials.reap()
    assert study.trials[dead.number].state == TrialState.RUNNING
    now[0] = 101.0
    assert attempts(trials.claim(sampler)) == 2
    assert study.trials[dead.number].state == TrialState.FAIL


def test_the_result_of_a_worker_that_was_only_slow_is_dropped(study, monkeypatch):
    trials = Trials(study, 1)
    slow = of_the_dead(trials, monkeypatch)
    other = opened(study, 1)
    again = other.claim(sampler)
    assert work(other, again)
    assert not trials.tell(slow, Result({"x": 0.0}, 0.0, "done"))
    assert [result.number for result in trials.results()] == [again.number]


def test_a_worker_that_dies_between_its_result_and_the_telling_counts_as_dead(study, monkeypatch):
    trials = Trials(study, 1)
    dead = of_the_dead(trials, monkeypatch)
    dead.set_user_attr("setting", {"x": 0.5})
    dead.set_user_attr("run", {"value": 0.5})
    again = opened(study, 1).claim(sampler)
    assert work(trials, again) and [result.number for result in trials.results()] == [again.number]


def test_attempts_are_counted_through_every_death(study, monkeypatch):
    trials = Trials(study, 1)
    for attempt in range(1, ATTEMPTS + 2):
        trial = of_the_dead(trials, monkeypatch)
        assert attempts(trial) == attempt
    assert len({trial.params["x"] for trial in study.trials if trial.params}) == 1


def test_what_is_given_back_keeps_its_place_its_name_and_its_attempt(study):
    trials = Trials(study, 3)
    trials.enqueue({"x": 0.75}, "known")
    trial = trials.claim(sampler)
    trial.suggest_float("x", 0, 1)
    trials.give_back(trial)
    again = trials.claim(sampler)
    assert again.suggest_float("x", 0, 1) == 0.75 and start_of(again) == "known" and attempts(again) == 1
    assert trials.counts()["running"] == 1


def test_a_trial_that_died_before_it_had_a_setting_is_forgotten(study, monkeypatch):
    trials = Trials(study, 1)
    gone = {"host": trials_of.HOST, "process": 2**22 + 1, "started": "1"}
    with monkeypatch.context() as patch:
        patch.setattr(trials_of, "_owner", lambda: gone)
        trials.claim(sampler)
    assert work(trials, trials.claim(sampler)) and trials.complete


def test_this_process_is_alive_and_a_number_that_came_back_is_another():
    assert trials_of._started(os.getpid()) is not None
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    assert trials_of._started(child.pid) is None


def test_a_worker_says_that_it_lives(study, monkeypatch):
    trials, beats, beaten = Trials(study, 1, beat=0.001), [], threading.Event()
    trial = trials.claim(sampler)
    said = trial.set_user_attr

    def set_user_attr(key, value):
        said(key, value)
        beats.append((key, value))
        if value == 2:
            beaten.set()

    monkeypatch.setattr(trial, "set_user_attr", set_user_attr)
    with trials.alive(trial):
        assert beats[0] == ("beat", 0)
        assert beaten.wait(300)
        (beating,) = [thread for thread in threading.enumerate() if thread.name == "beat"]
    assert study.trials[0].user_attrs["beat"] >= 2 and not beating.is_alive()
