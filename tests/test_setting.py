"""The space of kfac-tune: what may be chosen, what a choice means for KFAC, and what a file may say about it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import optuna
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kfac_triton import KFAC, Categorical
from kfac_triton.schedules import Schedule
from kfac_triton.tuning import setting as settings_of
from kfac_triton.tuning.errors import Mistake
from kfac_triton.tuning.setting import DEFAULTS, KFAC_SPACE, STARTS, arguments, by_seconds, read_space, starts
from kfac_triton.tuning.space import Choice, Range
from kfac_triton.tuning.task import Task

DOCUMENT = Path(__file__).parents[1] / "docs" / "tuning.md"


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))


TASK = Task(model, lambda seed: iter(()), nn.functional.cross_entropy, "categorical")


def drawn(seed: int) -> dict:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    return KFAC_SPACE.suggest(study.ask())


def test_the_defaults_as_a_setting_are_kfacs_own():
    likelihood = Categorical()
    with (
        KFAC(model(), likelihood=likelihood) as ours,
        KFAC(model(), likelihood=likelihood, **arguments(DEFAULTS, 100)) as theirs,
    ):
        for group, other in zip(ours.param_groups, theirs.param_groups, strict=True):
            assert {k: v for k, v in group.items() if k != "params"} == {
                k: v for k, v in other.items() if k != "params"
            }
        assert ours.settings == theirs.settings


@pytest.mark.parametrize("name", STARTS)
def test_a_start_is_in_the_space_and_its_setting_comes_back_from_what_is_drawn(name):
    setting = starts(KFAC_SPACE)[name]
    assert setting == STARTS[name]
    study = optuna.create_study()
    study.enqueue_trial(KFAC_SPACE.drawn(setting))
    with _no_warning():
        again = KFAC_SPACE.suggest(study.ask())
    assert again.keys() == setting.keys()
    for key, value in setting.items():
        assert again[key] == (pytest.approx(value) if isinstance(value, float) else value)


class _no_warning:
    """An enqueued value outside its range would make Optuna warn."""

    def __enter__(self):
        import warnings

        self.caught = warnings.catch_warnings(record=True)
        self.list = self.caught.__enter__()
        warnings.simplefilter("always")

    def __exit__(self, *error):
        self.caught.__exit__(*error)
        assert not [w for w in self.list if "out of" in str(w.message) or "range" in str(w.message)]


@given(st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_kfac_takes_every_setting_and_the_numbers_that_it_says(seed):
    setting = drawn(seed)
    own = arguments(setting, 200)
    if setting["approximation"] == "eigen":
        own["precision"] = "ieee"
    with KFAC(model(), likelihood="categorical", compile=False, **own) as optimizer:
        group = optimizer.param_groups[0]
    if setting["lr_rule"] == "adaptive":
        assert group["adaptive_lr"] and group["adaptive_momentum"]
        assert not {"lr", "momentum", "kl_clip", "kl_annealing"} & setting.keys()
    else:
        names = ("momentum", "kl_clip", *(["kl_annealing"] if setting["lr_rule"] == "fixed" else []))
        assert all(group[name] == setting[name] for name in names)
        assert optimizer.settings["rule"] == {"fixed": "kl", "capped": "cap"}[setting["lr_rule"]]
        assert group["lr"] == own["lr"] or group["lr_schedule"] is not None
    assert ("damping_end" in setting) == (setting["damping_schedule"] in ("exponential", "cosine"))
    adapts = setting["damping_schedule"] == "adaptive" and setting["lr_rule"] != "capped"
    assert group["adaptive_damping"] == adapts
    assert group["inverse_interval"] == setting["inverse_interval"]


@given(st.integers(0, 10_000), st.sampled_from([0.0, 0.04, 0.2, 0.5, 0.99, 1.0]))
@settings(max_examples=60, deadline=None)
def test_a_trials_schedules_are_the_files_schedules(seed, progress):
    """By the share of the seconds, and by as many steps: equal but for the rounding to a step."""
    setting, steps = drawn(seed), settings_of.RESOLUTION
    own = arguments(setting, steps)
    optimizer = settings_of.build(model(), TASK, setting, compile=False)
    by_seconds(optimizer, setting)(progress)
    group = optimizer.param_groups[0]
    for name in ("lr", "damping"):
        if isinstance(own[name], Schedule):
            assert group[name] == pytest.approx(own[name](round(progress * steps)))
            assert group[name] <= own[name].peak * (1 + 1e-9)
        elif own[name] != "adaptive":
            assert group[name] == own[name]
    optimizer.close()


def test_a_schedule_ends_at_its_horizon():
    setting = {**STARTS["lively"], "horizon": 0.5, "warmup": 0.0}
    lr = arguments(setting, 100)["lr"]
    assert lr(0) == 0.1 and lr(50) == pytest.approx(0.001) == lr(99) and lr(49) > 0.001


def test_a_constant_lr_rises_and_stays():
    lr = arguments({**DEFAULTS, "warmup": 0.1}, 100)["lr"]
    assert lr(0) == pytest.approx(0.001) and lr(9) == pytest.approx(0.01) == lr(99)


def test_a_fallback_lr_does_not_depend_on_where_a_schedule_begins():
    warm = settings_of.build(model(), TASK, {**DEFAULTS, "warmup": 0.05}, compile=False)
    cold = settings_of.build(model(), TASK, DEFAULTS, compile=False)
    assert warm.param_groups[0]["fallback_ratio"] == cold.param_groups[0]["fallback_ratio"]


# ---------------------------------------------------------------------------------------------- files and pinned values


def test_every_parameter_has_an_example_in_the_documentation_that_is_its_default(tmp_path):
    block = next(b for b in re.findall(r"```yaml\n(.*?)```", DOCUMENT.read_text(), re.S) if "lr_rule" in b)
    path = tmp_path / "space.yaml"
    path.write_text(block)
    assert set(yaml.safe_load(block)) == set(KFAC_SPACE.parameters)
    assert read_space(path).describe() == KFAC_SPACE.describe()


def test_a_file_narrows_widens_and_pins(tmp_path):
    path = tmp_path / "space.json"
    path.write_text(json.dumps({"lr": {"low": 1, "high": 5, "log": False}, "fisher": "exact", "damping": [0.1, 0.2]}))
    space = read_space(path, ["momentum=0.5", "inverse_interval=7"])
    assert space.parameters["lr"] == Range(1.0, 5.0, log=False)
    assert space.parameters["fisher"] == Choice(("exact",))
    assert space.parameters["damping"] == Choice((0.1, 0.2))
    assert space.parameters["momentum"] == Choice((0.5,))
    assert space.parameters["inverse_interval"] == Choice((7,))
    for setting in (space.first, *starts(space).values()):
        if setting["lr_rule"] == "fixed":
            assert 1 <= setting["lr"] <= 5 and setting["momentum"] == 0.5
        assert setting["fisher"] == "exact" and setting["damping"] in (0.1, 0.2)


def test_starts_that_a_narrow_space_makes_equal_are_tried_once():
    space = read_space(None, ["lr=0.1", "lr_rule=fixed", "lr_schedule=constant", "damping=1", "kl_clip=0.1"])
    found = list(starts(space).values())
    assert all(a != b for i, a in enumerate(found) for b in found[:i])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[1, 2]", "a mapping of parameters"),
        ("{lr: {low: 1", "neither YAML nor JSON"),
        ("{speed: 3}", "no parameter 'speed'; there are lr_rule, lr,"),
        ("{lr: []}", "empty list"),
        ("{lr: fast}", "lr is a number from 0 to inf; got 'fast'"),
        ("{lr: {low: 1}}", "needs low and high"),
        ("{lr: {low: 2, high: 1}}", "low < high"),
        ("{lr: {low: 0, high: 1, log: true}}", "above 0 on a log scale"),
        ("{lr: {low: 1, high: 2, log: maybe}}", "log is true or false"),
        ("{momentum: {low: 0.5, high: 1.5}}", "momentum is a number from 0 to 0.9999; got 1.5"),
        ("{factor_interval: {low: 1, high: 3}}", "takes a list of values"),
        ("{factor_interval: [0]}", "an integer from 1 to 1000000; got 0"),
        ("{inverse_interval: [2.5]}", "an integer from 1 to 1000000; got 2.5"),
        ("{fisher: [true]}", "one of mc, exact, empirical; got True"),
        ("{kl_annealing: [1]}", "one of True, False; got 1"),
        ("{lr: .nan}", "lr is a number"),
    ],
)
def test_a_file_that_asks_for_what_cannot_be_is_refused_with_its_place(tmp_path, text, said):
    path = tmp_path / "space.yaml"
    path.write_text(text)
    with pytest.raises(Mistake) as error:
        read_space(path)
    assert said in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("fixed", "said"),
    [
        (["lr"], "write name=value"),
        (["lr="], "write name=value"),
        (["speed=1"], "no parameter 'speed'"),
        (["lr=0.1", "lr=0.2"], "already fixed to 0.1"),
        (["lr=fast"], "lr is a number"),
        (["lr_rule=adaptive", "lr=0.1"], "lr counts only where lr_rule is fixed, which is excluded"),
        (["damping_end=0.1", "damping_schedule=constant"], "damping_end counts only where damping_schedule is"),
    ],
)
def test_a_pinned_value_that_contradicts_is_refused(fixed, said):
    with pytest.raises(Mistake, match=re.escape(said)):
        read_space(None, fixed)


def test_a_missing_file_is_named():
    with pytest.raises(Mistake, match=r"nowhere\.yaml cannot be read: No such file"):
        read_space(Path("nowhere.yaml"))


def test_values_are_moved_to_the_nearest_allowed_one():
    assert Choice((1, 2, 5)).nearest(4) == 5 and Choice((1, 2, 5)).nearest(2) == 2
    assert Choice(("a", "b")).nearest("c") == "a" and Choice((1, 2)).nearest(None) == 1
    assert Range(1.0, 2.0).nearest(3) == 2.0 and Range(1.0, 4.0).nearest(None) == pytest.approx(2.0)
    assert torch.tensor(KFAC_SPACE.parameters["momentum"].nearest(1.0)).item() == pytest.approx(0.99)
