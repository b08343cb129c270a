"""A state that is damaged or somebody else's is refused with its name, and nothing is changed by the attempt."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small import closure_step, data, mlp, train_step
from torch import Tensor, nn

from kfac_triton import KFAC
from kfac_triton.late import LateRead
from kfac_triton.schedules import Linear
from kfac_triton.structures import buffered

State = dict[str, Any]
Change = Callable[[State], None]


@pytest.fixture(autouse=True)
def narrow_factors_have_rows_that_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffered, "NARROWEST", 1)


def convolutional() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 4, 3), nn.PReLU(4), nn.Flatten(), nn.LayerNorm(16), nn.Linear(16, 3)
    )


def stepped(model: nn.Module, steps: int = 3, **options: Any) -> KFAC:
    optimizer = KFAC(model, likelihood="categorical", compile=False, **options)
    for i in range(steps):
        train_step(optimizer, model, *data(seed=i))
    return optimizer


def identities(optimizer: KFAC) -> dict[str, Any]:
    """Every object that holds state, by identity: replaced ones would differ even with the same values."""
    assert optimizer._estimator is not None
    return {
        "groups": [id(group) for group in optimizer.param_groups],
        "params": [id(p) for group in optimizer.param_groups for p in group["params"]],
        "state": id(optimizer.state),
        "entries": {id(p): {name: id(t) for name, t in entry.items()} for p, entry in optimizer.state.items()},
        "blocks": {id(w): id(layer) for w, layer in optimizer._estimator.layers.items()},
    }


def written(content: object) -> bytes:
    """As a file: equal for equal values, NaN among them."""
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def assert_refused(optimizer: KFAC, bad: State, message: str) -> None:
    before, objects = copy.deepcopy(optimizer.state_dict()), identities(optimizer)
    kept = copy.deepcopy(bad)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(bad)
    assert identities(optimizer) == objects
    assert written(optimizer.state_dict()) == written(before)
    assert written(bad) == written(kept)


def put(entry: int, name: str, value: object) -> Change:
    """Replaces something in the state of a parameter."""

    def change(state: State) -> None:
        state["state"][entry][name] = value

    return change


def lose(entry: int, *names: str) -> Change:
    def change(state: State) -> None:
        for name in names:
            del state["state"][entry][name]

    return change


def group(name: str, value: object) -> Change:
    def change(state: State) -> None:
        state["param_groups"][0][name] = value

    return change


def spoil(entry: int, name: str, value: float = math.nan) -> Change:
    def change(state: State) -> None:
        state["state"][entry][name].view(-1)[0] = value

    return change


def cast(entry: int, name: str, dtype: torch.dtype) -> Change:
    def change(state: State) -> None:
        state["state"][entry][name] = state["state"][entry][name].to(dtype)

    return change


def cut(entry: int, name: str) -> Change:
    def change(state: State) -> None:
        state["state"][entry][name] = state["state"][entry][name][:-1]

    return change


BIAS = r"bias=.*which is not the index of its bias among the model's 4 parameters"
DAMAGES: dict[str, tuple[Change, str]] = {
    # The network is Linear(6, 8), Tanh, Linear(8, 3): parameters 0 and 2 are weights, 1 and 3 biases.
    "bias out of range": (put(0, "bias", 99), f"0.weight has {BIAS}"),
    "bias below -1": (put(0, "bias", -2), "0.weight has bias=-2; it must be an integer from -1"),
    "bias of another layer": (put(0, "bias", 3), f"0.weight has {BIAS}"),
    "bias is a weight": (put(2, "bias", 0), f"2.weight has {BIAS}"),
    "bias is a float": (put(0, "bias", 1.0), "0.weight has bias=1.0; it must be an integer"),
    "bias is a string": (put(0, "bias", "1"), "0.weight has bias='1'; it must be an integer"),
    "bias is True": (put(0, "bias", True), "0.weight has bias=True; it must be an integer"),
    "bias is lost": (lose(0, "bias"), "0.weight has bias=None; it must be an integer"),
    "A without G": (lose(0, "G"), "0.weight lacks the tensor 'G'"),
    "G without A": (lose(2, "A"), "2.weight lacks the tensor 'A'"),
    "neither": (lose(0, "A", "G"), "0.weight lacks the tensor 'A'"),
    "A_inv without G_inv": (lose(0, "G_inv"), "0.weight lacks the tensor 'G_inv'"),
    "rows without weights": (lose(0, "A_weights"), "0.weight lacks the tensor 'A_weights'"),
    "no operation": (lose(0, "operation"), "0.weight has operation=None"),
    "no form": (lose(0, "form_A"), "0.weight has form_A=None"),
    "no count of updates": (lose(0, "factor_updates"), "0.weight lacks the tensor 'factor_updates'"),
    "half of AdamW": (put(1, "exp_avg", torch.zeros(8)), "0.bias lacks the tensor 'exp_avg_sq'"),
    "an unknown operation": (put(0, "operation", 99), "0.weight has operation=99; it must be an integer from 0 to"),
    "an unknown form": (put(0, "form_G", -1), "0.weight has form_G=-1; it must be an integer from 0 to"),
    "an unknown approximation": (put(0, "approximation", 17), "0.weight has approximation=17; it must be"),
    "another form": (put(0, "form_A", 2), r"'A' of shape \(7, 7\) where \(7,\) fits: another model's"),
    "groups that do not divide": (put(0, "groups", 100), "0.weight.*another model's"),
    "NaN in A": (spoil(0, "A"), "0.weight has numbers in 'A' that are not finite"),
    "inf in G": (spoil(2, "G", math.inf), "2.weight has numbers in 'G' that are not finite"),
    "NaN in an inverse": (spoil(2, "A_inv"), "2.weight has numbers in 'A_inv' that are not finite"),
    "NaN in momentum": (spoil(3, "momentum_buffer"), "2.bias has numbers in 'momentum_buffer' that are not finite"),
    "NaN in rows": (spoil(0, "G_rows"), "0.weight has numbers in 'G_rows' that are not finite"),
    "NaN in a count": (spoil(0, "factor_updates"), "0.weight has numbers in 'factor_updates'"),
    "a narrower A": (cut(0, "A"), r"0.weight, of shape \(8, 6\), has 'A' of shape \(6, 7\).*another model's"),
    "a narrower inverse": (cut(0, "G_inv"), r"'G_inv' of shape \(7, 8\) where \(8, 8\) fits"),
    "a narrower momentum": (cut(1, "momentum_buffer"), r"0.bias.*'momentum_buffer' of shape \(7,\)"),
    "fewer rows": (cut(0, "A_rows"), r"'A_rows' of shape"),
    "halved factors": (cast(0, "A", torch.float16), "'A' in torch.float16 where torch.float32 fits"),
    "doubled inverses": (cast(0, "A_inv", torch.float64), "'A_inv' in torch.float64 where torch.float32 fits"),
    "whole numbers": (cast(0, "momentum_buffer", torch.int64), "'momentum_buffer' in torch.int64"),
    "a list for a tensor": (put(0, "A", [[1.0]]), "0.weight has list for the tensor 'A'"),
    "a number for a tensor": (put(0, "G", 1.0), "0.weight has float for the tensor 'G'"),
    "a negative count": (put(0, "factor_updates", torch.tensor(-1.0)), "factor_updates=-1; a count is never negative"),
    "more rows than there are": (put(0, "A_waiting", 1000), "A_waiting=1000; it has 256 rows"),
    "a negative place": (put(0, "A_waiting", -1), "A_waiting=-1"),
    "an entry that is no dictionary": (lambda s: s["state"].update({0: [1]}), "the state of 0.weight is a list"),
    "an entry of nobody": (lambda s: s["state"].update({17: {}}), "an entry for 17, which no group lists"),
    "another number of groups": (lambda s: s["param_groups"].append(s["param_groups"][0]), "groups of"),
    "no groups": (lambda s: s["param_groups"].clear(), "groups of"),
    "another number of parameters": (lambda s: s["param_groups"][0]["params"].pop(), "groups of.*another model's"),
    "no lr": (lambda s: s["param_groups"][0].pop("lr"), "a group without 'lr'"),
    "no fallback_ratio": (lambda s: s["param_groups"][0].pop("fallback_ratio"), "a group without 'fallback_ratio'"),
    "no step": (lambda s: s["param_groups"][0].pop("step"), "a group without 'step'"),
    "lr is NaN": (group("lr", math.nan), "lr must be a number >= 0.0; got nan"),
    "lr is a string": (group("lr", "fast"), "lr must be a number"),
    "damping below 0": (group("damping", -1.0), "damping must be a number >= 0.0; got -1.0"),
    "an interval of 0": (group("factor_interval", 0), "factor_interval must be an integer >= 1; got 0"),
    "steps below 0": (group("step", -1), "step must be an integer >= 0; got -1"),
    "steps that are no integer": (group("step", 1.5), "step must be an integer >= 0; got 1.5"),
    "terms of 0": (group("terms_per_example", 0), "terms_per_example must be an integer >= 1; got 0"),
    "a fallback below 0": (group("fallback_ratio", -0.1), "fallback_ratio must be a number >= 0.0; got -0.1"),
    "a flag that is none": (group("adaptive_lr", "yes"), "adaptive_lr must be True or False; got 'yes'"),
    "adaptive without its numbers": (group("adaptive_damping", True), "a group without 'gamma'"),
    "a schedule that is none": (group("lr_schedule", 0.1), r"lr_schedule must be what Schedule.as_numbers\(\)"),
    "a schedule without values": (group("lr_schedule", {"kind": "Linear"}), "Linear has other values"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_is_refused_and_changes_nothing(damage):
    change, message = DAMAGES[damage]
    optimizer = stepped(mlp())
    bad = copy.deepcopy(optimizer.state_dict())
    change(bad)
    for p in optimizer.param_groups[0]["params"]:
        assert "momentum_buffer" in optimizer.state[p]
    assert_refused(optimizer, bad, message)
    train_step(optimizer, optimizer._module, *data())
    assert optimizer.param_groups[0]["step"] == 4


def test_one_bias_belongs_to_one_weight():
    """Also where it would fit another."""
    optimizer = stepped(nn.Sequential(nn.Linear(6, 3), nn.Tanh(), nn.Linear(3, 3)))
    bad = copy.deepcopy(optimizer.state_dict())
    bad["state"][2]["bias"] = 1
    assert_refused(optimizer, bad, f"2.weight has {BIAS}")


@pytest.mark.parametrize("damage", ["A without G", "NaN in momentum", "bias out of range", "no lr"])
def test_a_fresh_optimizer_refuses_it_too(damage):
    change, message = DAMAGES[damage]
    bad = copy.deepcopy(stepped(mlp()).state_dict())
    change(bad)
    fresh = stepped(mlp(), steps=0)
    assert_refused(fresh, bad, message)
    assert not fresh.state


def test_whatever_comes_last_is_found_before_the_first_is_written():
    """The damage is in the last parameter of the second group, behind a first group that differs but is sound."""
    model = convolutional()
    groups = [{"params": model[:5].parameters()}, {"params": model[5].parameters(), "lr": 0.02}]
    optimizer = stepped(model, params=groups)
    bad = copy.deepcopy(optimizer.state_dict())
    bad["param_groups"][0]["lr"] = 0.5
    bad["state"][0]["A"] *= 2
    last = max(bad["state"])
    bad["state"][last]["momentum_buffer"][-1] = math.inf
    assert_refused(optimizer, bad, "5.bias has numbers in 'momentum_buffer' that are not finite")


@pytest.mark.parametrize(
    ("options", "entry", "name"),
    [
        ({"approximation": "eigen"}, 0, "Q_A"),
        ({"approximation": "eigen"}, 0, "spectrum"),
        ({"approximation": "eigen"}, 0, "eigen_damping"),
        ({"approximation": "inverse_free"}, 0, "A_root"),
        ({"approximation": "inverse_free"}, 2, "G_mean"),
        ({"approximation": "tridiagonal"}, 0, "A_next"),
        ({"approximation": "tridiagonal"}, 0, "link_K_G"),
    ],
    ids=str,
)
def test_every_tensor_of_an_approximation_is_needed_and_checked(options, entry, name):
    optimizer = stepped(mlp(), **options)
    sound = copy.deepcopy(optimizer.state_dict())
    for change, message in (
        (lose(entry, name), f"lacks the tensor '{name}'"),
        (spoil(entry, name), f"numbers in '{name}' that are not finite"),
        (cast(entry, name, torch.int32), f"'{name}' in torch.int32"),
    ):
        bad = copy.deepcopy(sound)
        change(bad)
        assert_refused(optimizer, bad, message)
    optimizer.load_state_dict(sound)


@pytest.mark.parametrize("places", [(0, 0), (1, 2), (None, 0)])
def test_a_chain_needs_its_places(places):
    optimizer = stepped(mlp(), approximation="tridiagonal")
    bad = copy.deepcopy(optimizer.state_dict())
    for entry, place in zip((0, 2), places, strict=True):
        bad["state"][entry]["chain"] = place
    assert_refused(optimizer, bad, "do not form a chain")


APPROXIMATIONS = ("kronecker", "tridiagonal", "eigen", "inverse_free")


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("saved", APPROXIMATIONS)
@pytest.mark.parametrize("loaded", APPROXIMATIONS)
def test_the_state_of_another_approximation_is_refused(saved, loaded, named):
    """Also where it does not name the one that wrote it, if it can be told."""
    if saved == loaded or (saved, loaded, named) == ("kronecker", "eigen", False):
        pytest.skip("not refused")
    state = copy.deepcopy(stepped(mlp(), approximation=saved).state_dict())
    if not named:
        for entry in state["state"].values():
            entry.pop("approximation", None)
    optimizer = stepped(mlp(), approximation=loaded)
    assert_refused(
        optimizer, state, f'of approximation="{saved}", this optimizer of "{loaded}": build it with the same'
    )


def test_the_state_of_another_temporal_form_is_refused():
    def trained(form: str) -> KFAC:
        torch.manual_seed(0)
        layer = nn.RNN(6, 4, batch_first=True)
        optimizer = KFAC(
            layer, likelihood="gaussian", output=lambda returned: returned[0], temporal=form, compile=False
        )
        for _ in range(2):
            optimizer.zero_grad()
            layer(torch.randn(4, 5, 6))[0].square().mean().backward()
            optimizer.step()
        return optimizer

    optimizer = trained("chain_symmetric")
    assert_refused(optimizer, trained("chain").state_dict(), 'of another temporal than "chain_symmetric"')


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop])
def test_the_state_of_another_optimizer_is_refused(optimizer):
    model = mlp()
    other = optimizer(model.parameters(), lr=0.1)
    train_step(other, model, *data())
    assert_refused(stepped(mlp()), other.state_dict(), "a group without 'damping': it is not one of KFAC")


def test_groups_of_an_adaptive_run_need_a_likelihood():
    """Their flags come with the groups, and an empirical optimizer without a likelihood has no quadratic model."""
    model = mlp()
    paper = KFAC.paper(model, likelihood="categorical", compile=False)
    closure_step(paper, model, *data())
    optimizer = KFAC(mlp(), fisher="empirical", compile=False)
    assert_refused(optimizer, paper.state_dict(), "adaptive_lr needs an optimizer with a likelihood")


def test_a_damaged_state_is_refused_while_detached_or_when_attached():
    """A copy without its model can't number biases; then attach finds what is wrong, and stays detached."""
    model = mlp()
    optimizer = stepped(model)
    _, copied = copy.deepcopy((model, optimizer))
    bad = copy.deepcopy(optimizer.state_dict())
    bad["state"][0]["bias"] = 99
    copied.load_state_dict(bad)
    twin = mlp()
    before = copied.param_groups[0]["params"]
    with pytest.raises(ValueError, match=BIAS):
        copied.attach(twin)
    assert copied.param_groups[0]["params"] is before
    with pytest.raises(RuntimeError, match=r"attach\(model\)"):
        copied.step()
    copied.load_state_dict(optimizer.state_dict())
    copied.attach(twin)
    bad["state"][0]["A"].fill_(math.nan)
    with pytest.raises(ValueError, match="numbers in 'A'"):
        copied.load_state_dict(bad)


def test_what_a_state_may_hold_besides():
    """Foreign entries and foreign names in groups are carried; groups of older versions lack some counters."""
    optimizer = stepped(mlp(), lr=Linear(0.1, 0.01, 5))
    state = copy.deepcopy(optimizer.state_dict())
    state["state"][0]["slow_weights"] = torch.ones(8, 6)
    state["param_groups"][0]["initial_lr"] = 0.3
    for name in ("terms_per_example", "peak_lr", "kl_annealing"):
        del state["param_groups"][0][name]
    for entry in state["state"].values():
        entry.pop("approximation", None)
    twin = stepped(mlp(), steps=1)
    twin.load_state_dict(state)
    assert torch.equal(twin.state[twin.param_groups[0]["params"][0]]["slow_weights"], torch.ones(8, 6))
    assert twin.param_groups[0]["initial_lr"] == 0.3
    train_step(twin, twin._module, *data())


def test_a_skipped_step_of_before_is_not_taken_back_from_the_loaded_count():
    optimizer = stepped(mlp())
    state = copy.deepcopy(optimizer.state_dict())
    optimizer._uncounted = LateRead(torch.tensor(False))
    optimizer.load_state_dict(state)
    assert optimizer.state_dict()["param_groups"][0]["step"] == 3


def test_tensors_come_in_as_copies():
    optimizer = stepped(mlp())
    state = optimizer.state_dict()
    loaded = stepped(mlp(), steps=0)
    loaded.load_state_dict(state)
    given = {t.data_ptr() for entry in state["state"].values() for t in entry.values() if isinstance(t, Tensor)}
    own = {t.data_ptr() for entry in loaded.state.values() for t in entry.values() if isinstance(t, Tensor)}
    assert given.isdisjoint(own)
