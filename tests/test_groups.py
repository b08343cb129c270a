"""What a group may hold: options by name, values in range whenever they change, and foreign names carried along."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from small import closure_step, data, mlp, train_step
from torch import nn

from kfac_triton import KFAC


def kfac(model: nn.Module, **options: Any) -> KFAC:
    return KFAC(model, **{"likelihood": "categorical", "lr": 0.03, "compile": False, **options})


OF_THE_OPTIMIZER = (
    "fisher", "compile", "likelihood", "approximation", "seed", "loss_scale", "output", "mask", "weight_sharing",
    "temporal", "spatial", "norm", "blocks", "factor_fraction", "quadratic_fraction", "max_factor_dim", "precision",
    "tuned_for", "initial_damping", "process_group", "model",
)  # fmt: skip


@pytest.mark.parametrize("name", OF_THE_OPTIMIZER)
def test_arguments_that_a_group_cannot_hold(name):
    model = mlp()
    message = rf"^{name} belongs to the whole optimizer, not to a group: write KFAC\(model, {name}=...\)"
    with pytest.raises(ValueError, match=message):
        kfac(model, params=[{"params": model.parameters(), name: 1.0}])
    optimizer = kfac(model, params=model[0].parameters())
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": model[2].parameters(), name: 1.0})
    assert len(optimizer.param_groups) == 1 and name not in optimizer.param_groups[0]


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("dampinng", "damping"), ("Damping", "damping"), ("dampening", "damping"), ("momentun", "momentum"),
        ("weight_deacy", "weight_decay"), ("weightdecay", "weight_decay"), ("weight-decay", "weight_decay"),
        ("factor_intervals", "factor_interval"), ("inverse_intervall", "inverse_interval"), ("kl_clipp", "kl_clip"),
        ("factor_decy", "factor_decay"), ("fallback_Ir", "fallback_lr"), ("LR", "lr"), ("kl_anealing", "kl_annealing"),
    ],
)  # fmt: skip
def test_misspellings(name, meant):
    model = mlp()
    optimizer = kfac(model, params=model[0].parameters())
    message = f"^'{name}' is no option of a group; did you mean '{meant}'"
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": model[2].parameters(), name: 1.0})
    with pytest.raises(ValueError, match=message):
        kfac(model, params=[{"params": model.parameters(), name: 1.0}])


FOREIGN = (
    "name", "initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "lr_scale", "swa_lr", "lr_mult",
    "layer", "betas", "eps", "nesterov", "foreach", "fused", "group_name", "weight_decay_scale",
)  # fmt: skip


def test_foreign_names_are_carried_as_torch_carries_them():
    model = mlp()
    foreign = {name: f"of {name}" for name in FOREIGN}
    optimizer = kfac(model, params=[{"params": model[0].parameters(), **foreign}])
    optimizer.add_param_group({"params": model[2].parameters(), **foreign})
    train_step(optimizer, model, *data())
    other = kfac(model, params=[{"params": model[0].parameters()}, {"params": model[2].parameters()}])
    other.load_state_dict(optimizer.state_dict())
    for group in (*optimizer.param_groups, *other.param_groups):
        assert foreign.items() <= group.items()


def test_every_option_is_taken():
    model = mlp()
    options = {
        "lr": 0.1, "momentum": 0.5, "damping": 0.1, "weight_decay": 0.1, "kl_clip": None, "kl_annealing": True,
        "factor_decay": 0.5, "factor_interval": 2, "inverse_interval": 3, "fallback_lr": 0.01,
    }  # fmt: skip
    optimizer = kfac(model, params=[{"params": model.parameters(), **options}])
    group = optimizer.param_groups[0]
    assert {name for name in options if group.get(name) != options[name]} == {"kl_clip", "fallback_lr"}
    assert group["kl_clip"] == math.inf and group["fallback_ratio"] == pytest.approx(0.1)


def test_a_group_made_from_another_groups_values():
    model = mlp()
    optimizer = kfac(model, params=model[0].parameters())
    train_step(optimizer, model, *data())
    optimizer.add_param_group({**optimizer.param_groups[0], "params": model[2].parameters()})
    train_step(optimizer, model, *data())
    assert [group["step"] for group in optimizer.param_groups] == [2, 2]


@pytest.mark.parametrize(
    "scheduler",
    [
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, 20),
        lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.01, 0.1, cycle_momentum=True),
        lambda o: torch.optim.lr_scheduler.StepLR(o, 2),
        lambda o: torch.optim.swa_utils.SWALR(o, swa_lr=0.05),
    ],
)
def test_torchs_schedulers_write_into_groups(scheduler):
    model = mlp()
    optimizer = kfac(model)
    schedule = scheduler(optimizer)
    rates = []
    for _ in range(4):
        train_step(optimizer, model, *data())
        schedule.step()
        rates.append(optimizer.param_groups[0]["lr"])
    assert len(set(rates)) > 1
    optimizer.add_param_group({**optimizer.param_groups[0], "params": []})


# ------------------------------------------------------------------------------------------- values during the training

BAD = [
    ("lr", math.nan, "a number >= 0.0; got nan"),
    ("lr", math.inf, "a number >= 0.0; got inf"),
    ("lr", -0.1, "a number >= 0.0; got -0.1"),
    ("lr", "0.1", "a number, a 0-d tensor or a Schedule; got '0.1'"),
    ("lr", None, "a number, a 0-d tensor or a Schedule; got None"),
    ("momentum", 1.5, "a number >= 0.0 and < 1.0; got 1.5"),
    ("momentum", math.nan, "a number"),
    ("damping", -1.0, "a number >= 0.0; got -1.0"),
    ("damping", math.inf, "a number >= 0.0; got inf"),
    ("damping", "adaptive", "a number or a Schedule; got 'adaptive'"),
    ("weight_decay", math.nan, "a number >= 0.0; got nan"),
    ("weight_decay", [0.1], "a number >= 0.0; got"),
    ("factor_decay", 1.0, "a number >= 0.0 and < 1.0; got 1.0"),
    ("factor_interval", 0, "an integer >= 1; got 0"),
    ("inverse_interval", 2.0, "an integer >= 1; got 2.0"),
    ("kl_clip", 0.0, "a number > 0.0; got 0.0"),
    ("kl_clip", -math.inf, "a number > 0.0; got -inf"),
    ("kl_annealing", 1, "True or False; got 1"),
]


@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize(("name", "value", "allowed"), BAD, ids=lambda value: str(value)[:12])
def test_a_value_that_goes_wrong_is_refused_at_the_next_step(name, value, allowed, second):
    """Before anything is done: the closure isn't called, and with the right value all goes on as if undisturbed."""
    runs = []
    for disturbed in (False, True):
        model = mlp()
        groups = [{"params": model[0].parameters()}, {"params": model[2].parameters()}]
        optimizer = kfac(model, params=groups)
        x, y = data()
        for _ in range(3):
            train_step(optimizer, model, x, y)
        if disturbed:
            group = optimizer.param_groups[int(second)]
            right, group[name] = group[name], value
            for _ in range(2):
                with pytest.raises(ValueError, match=rf"^{name} must be {allowed}"):
                    optimizer.step(lambda: pytest.fail("called"))
            group[name] = right
        for _ in range(3):
            train_step(optimizer, model, x, y)
        runs.append(copy.deepcopy((model.state_dict(), optimizer.state_dict())))
    torch.testing.assert_close(runs[1], runs[0], rtol=0, atol=0)


@pytest.mark.parametrize(("name", "value"), [("lr", math.nan), ("momentum", -1.0), ("damping", -1.0)])
def test_an_adaptive_run_refuses_them_too(name, value):
    model = mlp()
    optimizer = KFAC.paper(model, likelihood="categorical", compile=False)
    closure_step(optimizer, model, *data(256))
    optimizer.param_groups[0][name] = value
    with pytest.raises(ValueError, match=f"^{name} must be a number >= 0"):
        closure_step(optimizer, model, *data(256))


def test_an_lr_on_the_device_is_not_waited_for(monkeypatch):
    """Its dimensions are checked, its value stays where it is."""
    model = mlp()
    optimizer = kfac(model, lr=torch.tensor(0.03))
    train_step(optimizer, model, *data())
    optimizer.param_groups[0]["lr"] = torch.tensor(0.02)
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "__float__", lambda self: pytest.fail("waited for the device"))
        optimizer._watch.check(optimizer.param_groups, optimizer.defaults)
    optimizer.param_groups[0]["lr"] = torch.tensor([0.02])
    with pytest.raises(ValueError, match=r"^lr as a tensor must be 0-d; got shape \(1,\)"):
        train_step(optimizer, model, *data())


def test_only_what_changed_is_checked(monkeypatch):
    """Groups whose values are the same objects as in the last step cost comparisons alone."""
    model = mlp()
    optimizer = kfac(model)
    train_step(optimizer, model, *data())
    checked = []
    monkeypatch.setattr("kfac_triton.groups.number", lambda name, value, **limits: checked.append(name))
    train_step(optimizer, model, *data())
    assert checked == []
    optimizer.param_groups[0]["damping"] = 0.5
    train_step(optimizer, model, *data())
    train_step(optimizer, model, *data())
    assert checked == ["damping"]
