"""The whole of kfac-tune from Python: stages, resumption, warm starts, verdicts, the time that it may take."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
import torch
from sqlalchemy.exc import OperationalError
from torch import nn
from torch.nn import functional as F

from kfac_triton import KFAC, load_tuned, tuned
from kfac_triton.schedules import Schedule
from kfac_triton.tuning import Task, TunedResult, search, tiles, tune
from kfac_triton.tuning import plan as plan_of
from kfac_triton.tuning import tuner as tuner_of
from kfac_triton.tuning.errors import Mistake
from kfac_triton.tuning.plan import Plan
from kfac_triton.tuning.storage import open_storage
from kfac_triton.tuning.trials import Trials
from kfac_triton.tuning.tuner import HELD_OUT, Tuning

QUICK = {"trials": 5, "seconds": 0.12, "seeds": 2, "device": "cpu", "compile": False}


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 2))


def batches(seed: int):
    generator = torch.Generator().manual_seed(seed)
    while True:
        x = torch.randn(64, 6, generator=generator)
        yield x, (x[:, 0] * x[:, 1] > 0).long()


def evaluate(net: nn.Module) -> float:
    x, y = next(batches(99))
    return float(F.cross_entropy(net(x), y))


TASK = Task(model, batches, F.cross_entropy, "categorical", evaluate, name="product")


def studies(path: Path) -> dict[str, Trials]:
    storage = open_storage(str(path))
    return {
        one.study_name: Trials(optuna.load_study(study_name=one.study_name, storage=storage), 0)
        for one in storage.get_all_studies()
    }


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> tuple[TunedResult, Path]:
    """A tuning of everything, once for several tests."""
    path = tmp_path_factory.mktemp("tuned") / "t.journal"
    return tune(TASK, **QUICK, storage=str(path)), path


def test_every_stage_is_in_the_result(done):
    result, path = done
    content = result.content
    tuned.check(content, "result")
    assert result.finished
    assert set(content["evidence"]["searches"]) == {"kfac", "sgd", "adamw"}
    assert all(found["trials"] == 5 for found in content["evidence"]["searches"].values())
    assert list(content["evidence"]["held_out"]) == ["defaults", "tuned", "sgd", "adamw"]
    for row in content["evidence"]["held_out"].values():
        assert len(row["metric"]) == 2 and row["interval"][0] <= row["median"] <= row["interval"][1]
        assert row["seconds_to_target"] is None and row["reached"] is None
    spent = content["evidence"]["seconds"]
    assert 0 < spent["training"] < spent["command"] and 0 < spent["evaluating"] < spent["command"]
    assert content["model"]["parameters"] == 6 * 12 + 12 + 12 * 2 + 2
    assert content["objective"] == {"seconds": 0.12, "target": None, "metric": "mean training loss"}
    assert set(studies(path)) == {"product", "product/sgd", "product/adamw"}


def test_the_first_trials_are_the_known_settings_and_the_seed_is_held_out(done):
    _, path = done
    found = studies(path)
    starts = [result.start for result in found["product"].results()]
    assert starts == ["defaults", "falling", "lively", "brisk", "wide"]
    assert [result.start for result in found["product/sgd"].results()[:2]] == ["first", "second"]
    seeds = {key.split()[3] for key in found["product"].study.user_attrs if key.startswith("held-out")}
    assert seeds == {str(HELD_OUT), str(HELD_OUT + 1)}


def test_a_baseline_with_a_single_known_setting_is_searched(tmp_path):
    path = tmp_path / "t.journal"
    tune(TASK, **{**QUICK, "trials": 2, "seeds": 1}, baselines=("kfac-adaptive",), storage=str(path))
    assert [result.start for result in studies(path)["product/kfac-adaptive"].results()] == ["first", ""]


def test_the_file_makes_the_optimizer(done, tmp_path):
    result, _ = done
    result.save(tmp_path / "tuned.json")
    arguments = load_tuned(tmp_path / "tuned.json", model())
    assert arguments["likelihood"] == "categorical"
    assert {name: value for name, value in arguments.items() if name != "tuned_for"} == result.arguments
    net = model()
    with KFAC(net, compile=False, **arguments) as optimizer:
        x, y = next(batches(0))
        F.cross_entropy(net(x), y).backward()
        optimizer.step()


def test_going_on_runs_nothing_that_was_run(done, monkeypatch):
    result, path = done
    called = []
    monkeypatch.setattr(search, "train", lambda *a, **k: called.append(a))
    again = tune(TASK, **QUICK, storage=str(path))
    assert not called
    for name in ("arguments", "verdict"):
        assert again.content[name] == result.content[name]
    assert again.content["evidence"]["held_out"] == result.content["evidence"]["held_out"]


def test_more_trials_go_on_from_those_there_are(done, tmp_path):
    _, path = done
    copy = tmp_path / "copy.journal"
    copy.write_bytes(path.read_bytes())
    before = studies(copy)["product"].results()
    tune(TASK, **{**QUICK, "trials": 7}, storage=str(copy), baselines=())
    after = studies(copy)["product"].results()
    assert len(after) == 7 and after[:5] == before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seconds": 0.2}, "seconds 0.12 there, 0.2 here"),
        ({"target": 0.3}, "target None there, 0.3 here"),
        ({"seed": 4}, "seed 0 there, 4 here"),
        ({"fix": ("lr=0.1",)}, "space"),
        ({"task": replace(TASK, model=lambda: nn.Linear(6, 2))}, "signature"),
    ],
)
def test_a_study_of_something_else_is_left_alone(done, change, said):
    _, path = done
    before = path.read_bytes()
    with pytest.raises(Mistake, match="name another --study or --storage") as error:
        tune(**{"task": TASK, **QUICK, **change}, storage=str(path))
    assert said in str(error.value) and "study 'product'" in str(error.value)
    assert path.read_bytes() == before


def test_a_study_of_another_version_or_of_another_tool_is_left_alone(tmp_path):
    path = str(tmp_path / "t.journal")
    optuna.create_study(storage=open_storage(path), study_name="product").enqueue_trial({"lr": 0.1})
    with pytest.raises(Mistake, match="none of this version of kfac-tune; name another --study"):
        tune(TASK, **QUICK, storage=path)


def test_a_second_study_begins_with_what_the_first_found(done, tmp_path):
    _, path = done
    copy = tmp_path / "copy.journal"
    copy.write_bytes(path.read_bytes())
    tune(TASK, **QUICK, storage=str(copy), study="second", baselines=())
    best = min((r for r in studies(copy)["product"].results() if r.good), key=lambda r: r.value)
    starts = {r.start: r.setting for r in studies(copy)["second"].results()}
    if "study product" in starts:
        assert starts["study product"] == best.setting
    else:  # it was one of the known settings
        assert best.setting in starts.values()


def test_without_a_storage_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = tune(TASK, **{**QUICK, "trials": 2, "seeds": 1}, baselines=())
    assert isinstance(result, TunedResult) and not list(tmp_path.iterdir())


def test_a_target_is_what_the_defaults_end_with(tmp_path):
    path = tmp_path / "t.journal"
    result = tune(TASK, **{**QUICK, "trials": 2, "seeds": 1}, baselines=(), target="defaults", storage=str(path))
    attributes = studies(path)["product"].study.user_attrs
    ends = sorted(value["value"] for key, value in attributes.items() if key.startswith("target"))
    assert len(ends) == 3 and result.content["objective"]["target"] == pytest.approx(ends[1], rel=1e-3)
    again = tune(TASK, **{**QUICK, "trials": 2, "seeds": 1}, baselines=(), target="defaults", storage=str(path))
    assert again.content["objective"] == result.content["objective"]


class Clock:
    """Seconds that pass only where somebody says so; in the place of the module `time`."""

    def __init__(self) -> None:
        self.now = 100.0

    def go(self, seconds: float) -> None:
        self.now += seconds

    def monotonic(self) -> float:
        return self.now

    perf_counter = monotonic


@pytest.fixture
def clock(monkeypatch) -> Clock:
    """Time in the tuner and its search."""
    made = Clock()
    for module in (tuner_of, search):
        monkeypatch.setattr(module, "time", made)
    return made


def test_the_timeout_bounds_everything_and_the_rest_goes_on_later(tmp_path, clock, monkeypatch):
    """A run takes a sixth more than its seconds, in 24 parts; the timeout holds eighteen runs of 255 or more."""
    trained = []

    def train(task, entrant, setting, seed, budget, *, warm):
        run = search.Run()
        trained.append((entrant.name, seed))
        for place in range(budget.evaluations + 1):
            clock.go(budget.seconds * 7 / 6 / budget.evaluations)
            run.points.append(search.Point(place * budget.seconds / budget.evaluations, place, 1 / (1 + place), None))
            budget.stop(run.points[-1])
        run.steps, run.seconds = budget.evaluations, budget.seconds
        return run

    monkeypatch.setattr(search, "train", train)
    path, begun = tmp_path / "t.journal", clock.now
    asked = {**QUICK, "trials": 40, "seconds": 0.3, "prune": "none"}
    result = tune(TASK, **asked, timeout=6.0, storage=str(path))
    assert clock.now - begun < 6.0 + 0.3 * 7 / 6 / 6, "at most an evaluation late"
    assert not result.finished and len(trained) > 12
    told = {name: len(trials.results()) for name, trials in studies(path).items()}
    assert all(0 < number < 40 for number in told.values()), "every search had its share"
    assert result.content["evidence"]["held_out"]["defaults"]["metric"], "the end had its share"


def test_seconds_follow_from_the_timeout():
    asked = {"timeout": 600.0, "trials": 30, "seeds": 5, "baselines": ("sgd", "adamw")}
    seconds = plan_of.seconds_for(asked)
    assert 4 < seconds < 6
    assert plan_of.seconds_for({**asked, "timeout": None}) == plan_of.SECONDS
    assert plan_of.seconds_for({**asked, "timeout": 1e6}) == plan_of.SECONDS


def test_nothing_good_keeps_the_defaults(monkeypatch):
    """Every run but the defaults' on the held-out seeds diverges."""

    def train(task, entrant, setting, seed, budget, *, warm):
        run = search.Run()
        for place in range(3):
            value = math.nan if setting and place == 2 else 1.0 - 0.1 * place
            run.points.append(search.Point(0.05 * place, place, value, None))
            if setting and place == 2:
                run.ended = "diverged"
            else:
                budget.stop(run.points[-1])
        run.steps = 3
        return run

    monkeypatch.setattr(search, "train", train)
    result = tune(TASK, **QUICK, baselines=("sgd",))
    assert not result.better and result.arguments == {"likelihood": "categorical"}
    assert "the defaults are kept" in result.content["verdict"]
    tuned.check(result.content, "result")


def test_a_leader_that_stalls_on_another_seed_has_not_won(monkeypatch):
    """The start "brisk" is best on two seeds of three, that of the search among them; "wide" is steady."""
    ends = {0.007: {0: 0.1, 1: 0.1}, 0.1: dict.fromkeys((0, 1, 2, HELD_OUT, HELD_OUT + 1), 0.3)}  # by kl_clip and seed

    def train(task, entrant, setting, seed, budget, *, warm):
        run = search.Run()
        end = ends.get(setting.get("kl_clip"), {}).get(seed, 1.0)
        for place in range(3):
            run.points.append(search.Point(0.05 * place, place, end, None))
            budget.stop(run.points[-1])
        run.steps = 3
        return run

    monkeypatch.setattr(search, "train", train)
    result = tune(TASK, **QUICK, baselines=(), prune="none")
    assert result.better and result.arguments["kl_clip"] == 0.1


# ---------------------------------------------------------------------------------------------------- options and parts


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"trials": 0}, "--trials 0: at least 1"),
        ({"seconds": 0.0}, "--seconds 0: a positive number"),
        ({"timeout": -1.0}, "--timeout -1: a positive number"),
        ({"jobs": 0}, "--jobs 0"),
        ({"seeds": 0}, "--seeds 0"),
        ({"jobs": 2}, "needs a --storage that the processes share"),
        ({"jobs": 2, "storage": "x.journal"}, "needs a task that each process can load"),
        ({"target": "best"}, "--target best: a number, or defaults"),
        ({"baselines": ("sgd", "lion")}, "--baselines lion: among sgd, nesterov, adamw, soap, kfac-adaptive, or none"),
        ({"baselines": ("kfac",)}, "--baselines kfac"),
        ({"prune": "asha"}, "--pruner asha"),
        ({"device": "cuda:7"}, "no such device"),
        ({"fix": ("speed=1",)}, "no parameter 'speed'"),
    ],
)
def test_an_option_that_cannot_be_is_refused(tmp_path, monkeypatch, change, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Mistake) as error:
        tune(TASK, **{**QUICK, **change})
    assert said in str(error.value)


def test_the_arguments_are_those_that_were_measured(done):
    """The winner's schedules, in the file and on the held-out seeds, count the steps of a run."""
    result, path = done
    found = {key for key in studies(path)["product"].study.user_attrs if key.startswith("held-out tuned")}
    assert len(found) == 2 and result.content["steps"] > 1
    for value in result.arguments.values():
        if isinstance(value, Schedule):
            assert value.as_numbers()["kind"] in ("Linear", "Cosine", "Exponential", "WarmUp")


def test_a_plan_that_every_worker_reads(done):
    _, path = done
    plan = Plan(**studies(path)["product"].study.user_attrs["plan"])
    assert plan.task == "product" and plan.trials == 5 and plan.signature == tuned.signature(model())
    assert plan.evaluations in search.EVALUATIONS


def test_a_dear_evaluation_is_made_less_often(clock):
    slow = replace(TASK, evaluate=lambda net: clock.go(0.02) or 1.0)
    assert Tuning(slow, **_asked(seconds=1.3)).plan.evaluations == 12
    assert Tuning(slow, **_asked(seconds=0.13)).plan.evaluations == 6
    assert Tuning(TASK, **_asked(seconds=20.0)).plan.evaluations == 24


def _asked(**change):
    idle = {
        "timeout": None, "target": None, "storage": None, "study": None, "jobs": 1, "seed": 0, "space": None,
        "fix": (), "baselines": (), "prune": "auto", "data": None, "note": lambda text: None,
        "watch": lambda what, value: None,
    }  # fmt: skip
    return {**idle, **QUICK, **change}


def test_tiles_are_measured_on_a_gpu_and_named(monkeypatch):
    measured = []
    monkeypatch.setattr(tiles, "measured_for", lambda task, device: measured.append(task) or Path("tiles-x.json"))
    work = Tuning(TASK, **_asked())
    work._measure_tiles()
    assert work.tiles == "tiles-x.json" and measured == [work.task]
    hurried = Tuning(TASK, **_asked(timeout=60.0))
    hurried._measure_tiles()
    assert hurried.tiles is None and len(measured) == 1


def test_tiles_join_those_that_are_there():
    old = [{"kernel": "syrk", "dtype": "float32", "precision": "ieee", "shape": [1], "parts": n} for n in (1, 2)]
    new = {**old[0], "parts": 7}
    other = {**old[0], "shape": [2]}
    assert tiles._joined([other, old[0]], [new]) == [other, new]


def test_interrupted_it_says_how_it_stands(monkeypatch):
    work = Tuning(TASK, **_asked(trials=3, baselines=("sgd",)))
    original = search.train

    def train(*arguments, **options):
        if len(work.studies["kfac"].trials) > 1 and len(Trials(work.studies["kfac"], 0).results()) == 2:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    monkeypatch.setattr(search, "train", train)
    with pytest.raises(KeyboardInterrupt):
        work.go()
    said = work.standing()
    assert said.startswith("kfac: 2 of 3 trials, best ") and said.endswith("sgd: 0 of 3 trials, none good yet")


@pytest.mark.parametrize(
    "error", [optuna.exceptions.StorageInternalError("gone"), OperationalError("s", {}, OSError())]
)
def test_a_storage_that_goes_away_is_one_line(monkeypatch, tmp_path, error):
    def lost(*arguments):
        raise error

    monkeypatch.setattr(Trials, "claim", lost)
    with pytest.raises(Mistake, match=r"t\.journal was lost \(.*\); once it is back, the same command goes on"):
        tune(TASK, **QUICK, storage=str(tmp_path / "t.journal"), baselines=())
