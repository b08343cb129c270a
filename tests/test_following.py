"""What users do to groups and models between steps: the optimizer follows, or says why it can't."""

from __future__ import annotations

import copy
import logging
import math
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small import WHOLE, closure_step, data, mlp, second_moment, train_step
from torch import Tensor, nn

from kfac_triton import KFAC

FISHERS = ["mc", "exact", "empirical"]
APPROXIMATIONS = ["kronecker", "tridiagonal", "eigen", "inverse_free"]


def kfac(model: nn.Module, **options: Any) -> KFAC:
    return KFAC(model, **{"likelihood": "categorical", "lr": 0.03, "compile": False, **options})


def both(optimizer: KFAC, model: nn.Module, steps: int = 1, seed: int = 0) -> list[float]:
    dtype = next(model.parameters()).dtype
    x, y = data(seed=seed)
    return [train_step(optimizer, model, x.to(dtype), y) for _ in range(steps)]


# ------------------------------------------------------------------------------------------- parameters leave and come


@pytest.mark.parametrize("approximation", ["kronecker", "eigen", "inverse_free"])
@pytest.mark.parametrize("fisher", FISHERS)
def test_parameters_that_left_their_group(fisher, approximation):
    """As if the optimizer had been made without them, but for what is known of the others."""
    model = mlp()
    optimizer = kfac(model, fisher=fisher, approximation=approximation)
    both(optimizer, model)
    optimizer.param_groups[0]["params"] = list(model[0].parameters())
    model[2].requires_grad_(False)
    head = copy.deepcopy(model[2].state_dict())
    losses = both(optimizer, model, 20)
    assert losses[-1] < losses[0]
    assert set(optimizer.factors()) == {"0"} == {name.split(".")[0] for name in optimizer.coverage()}
    torch.testing.assert_close(model[2].state_dict(), head, rtol=0, atol=0)
    assert set(optimizer.state_dict()["state"]) == {0, 1} and set(optimizer.state) == set(model[0].parameters())


def test_parameters_that_left_are_not_moved_and_not_saved_even_before_the_next_step():
    model = mlp()
    optimizer = kfac(model)
    both(optimizer, model, 2)
    del optimizer.param_groups[0]["params"][2:]
    assert set(optimizer.state_dict()["state"]) == {0, 1}
    assert set(optimizer.coverage()) == {"0.weight", "0.bias"}
    before = model[2].weight.detach().clone()
    both(optimizer, model, 2)
    assert torch.equal(model[2].weight, before)


def test_only_the_bias_leaves():
    model = mlp()
    optimizer = kfac(model)
    both(optimizer, model, 2)
    optimizer.param_groups[0]["params"] = [model[0].weight, *model[2].parameters()]
    bias = model[0].bias.detach().clone()
    losses = both(optimizer, model, 20)
    assert losses[-1] < losses[0] and torch.equal(model[0].bias, bias)
    assert optimizer.factors()["0"]["A"].shape == (6, 6)


def test_parameters_that_come_back_begin_anew():
    model = mlp()
    optimizer = kfac(model, factor_fraction=1.0)
    both(optimizer, model, 3)
    whole = list(optimizer.param_groups[0]["params"])
    optimizer.param_groups[0]["params"] = whole[:2]
    both(optimizer, model)
    optimizer.param_groups[0]["params"] = whole
    both(optimizer, model)
    assert float(optimizer.state[model[2].weight]["factor_updates"]) == 1
    assert float(optimizer.state[model[0].weight]["factor_updates"]) == 5


def test_layers_of_a_chain_that_leave_make_another_chain():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer = kfac(model, approximation="tridiagonal")
    both(optimizer, model, 3)
    optimizer.param_groups[0]["params"] = [*model[2].parameters(), *model[4].parameters()]
    losses = both(optimizer, model, 20)
    assert losses[-1] < losses[0]
    assert [optimizer.state[model[i].weight]["chain"] for i in (2, 4)] == [0, 1]


def test_a_stranger_in_a_group_is_refused():
    model = mlp()
    optimizer = kfac(model)
    both(optimizer, model)
    optimizer.param_groups[0]["params"].append(nn.Parameter(torch.zeros(4, 4)))
    for use in (lambda: both(optimizer, model), optimizer.state_dict, optimizer.coverage):
        with pytest.raises(ValueError, match=r"params holds a tensor of shape \(4, 4\) that is no parameter of model"):
            use()
    optimizer.param_groups[0]["params"].pop()
    both(optimizer, model)


def test_a_group_that_was_put_in_by_hand():
    model = mlp()
    optimizer = kfac(model, params=model[0].parameters())
    optimizer.param_groups.append({"params": list(model[2].parameters())})
    with pytest.raises(ValueError, match=r"a parameter group has no 'adaptive_lr'; add_param_group makes groups"):
        both(optimizer, model)


# ----------------------------------------------------------------------------------------------------- layers exchanged


@pytest.mark.parametrize("classes", [3, 5])
@pytest.mark.parametrize("fisher", FISHERS)
def test_a_head_that_is_exchanged(fisher, classes, caplog):
    """The new head has a block of its own from the first step on; the old one's state is dropped."""
    model = mlp()
    optimizer = kfac(model, fisher=fisher, factor_fraction=1.0)
    both(optimizer, model, 2)
    old = model[2]
    torch.manual_seed(1)
    model[2] = nn.Linear(8, classes)
    with caplog.at_level(logging.INFO, "kfac_triton"):
        optimizer.add_param_group({"params": model[2].parameters()})
        losses = both(optimizer, model, 30)
    assert losses[-1] < losses[0]
    assert caplog.messages == ["no longer in the model, so the optimizer drops its state of them: 2.weight, 2.bias"]
    assert optimizer.coverage() == dict.fromkeys(("0.weight", "0.bias", "2.weight", "2.bias"), "linear")
    assert float(optimizer.state[model[2].weight]["factor_updates"]) == 30
    assert old.weight not in optimizer.state and optimizer.factors()["2"]["G"].shape == (classes, classes)
    state = optimizer.state_dict()
    assert set(state["state"]) == {0, 1, 4, 5}
    optimizer.load_state_dict(state)
    both(optimizer, model)


def test_a_layer_put_in_front_moves_the_numbers_of_the_biases():
    """A checkpoint names a bias by its place among the model's parameters."""
    model = mlp()
    optimizer = kfac(model)
    both(optimizer, model, 2)
    model.insert(0, nn.Linear(6, 6))
    optimizer.add_param_group({"params": model[0].parameters()})
    both(optimizer, model, 2)
    parameters = list(model.parameters())
    for layer in (model[0], model[1], model[3]):
        assert parameters[optimizer.state[layer.weight]["bias"]] is layer.bias
    assert set(optimizer.factors()) == {"0", "1", "3"}
    assert float(optimizer.state[model[1].weight]["factor_updates"]) == 4


def test_an_exchanged_head_that_no_group_has_stays_as_it_is():
    """As in torch.optim, where a new layer trains once a group has it."""
    model = mlp()
    optimizer = kfac(model)
    both(optimizer, model, 2)
    model[2] = nn.Linear(8, 3)
    before = copy.deepcopy(model[2].state_dict())
    both(optimizer, model, 2)
    torch.testing.assert_close(model[2].state_dict(), before, rtol=0, atol=0)
    optimizer.add_param_group({"params": model[2].parameters()})
    both(optimizer, model)
    assert not torch.equal(model[2].weight, before["weight"])


def test_a_copy_after_an_exchange():
    model = mlp()
    optimizer = kfac(model)
    both(optimizer, model, 2)
    model[2] = nn.Linear(8, 3)
    optimizer.add_param_group({"params": model[2].parameters()})
    both(optimizer, model, 2)
    twin, other = pickle.loads(pickle.dumps((model, optimizer)))
    other.attach(twin)
    assert both(other, twin, 3) == both(optimizer, model, 3)


# ------------------------------------------------------------------------------------------------ parameters as objects


@pytest.mark.parametrize("fisher", FISHERS)
def test_a_model_loaded_with_assign(fisher, caplog):
    """Its parameters are new objects, which go on with the state of the old ones: as a load that copies."""
    losses = []
    for assign in (False, True):
        model, weights = mlp(), mlp(seed=3).state_dict()
        optimizer = kfac(model, fisher=fisher)
        both(optimizer, model, 3)
        model.load_state_dict(weights, assign=assign)
        with caplog.at_level(logging.WARNING, "kfac_triton"):
            losses.append(both(optimizer, model, 5))
        assert all(a is b for a, b in zip(optimizer.param_groups[0]["params"], model.parameters(), strict=True))
        assert set(optimizer.state) == set(model.parameters())
    assert losses[0] == losses[1]
    (message,) = caplog.messages
    assert "new parameters in the place of 0.weight, 0.bias, 2.weight, 2.bias" in message


def test_a_part_loaded_with_assign_before_the_first_step():
    model = mlp()
    optimizer = kfac(model)
    model[2].load_state_dict(nn.Linear(8, 3).state_dict(), assign=True)
    losses = both(optimizer, model, 20)
    assert losses[-1] < losses[0] and optimizer.coverage()["2.weight"] == "linear"
    assert optimizer.param_groups[0]["params"][2] is model[2].weight


def test_a_parameter_that_another_group_has_is_not_taken_twice():
    """assign=True with tied weights: one new object for both."""
    model = mlp(d=8, h=8, c=8)
    optimizer = kfac(model, params=[{"params": model[0].parameters()}, {"params": model[2].parameters()}])
    both_ = model[2].weight
    model[0].weight = both_
    x = torch.randn(32, 8)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(x), torch.zeros(32, dtype=torch.long)).backward()
        optimizer.step()
    assert sum(p is both_ for group in optimizer.param_groups for p in group["params"]) == 1


@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("approximation", APPROXIMATIONS)
def test_a_model_converted_after_steps(approximation, dtype, fisher):
    """Factors, inverses and momentum follow at the next step, in the precision that a run of that dtype has."""
    if approximation == "tridiagonal" and fisher == "empirical":
        pytest.skip("refused")
    model, fresh = mlp(), mlp().to(dtype)
    optimizer = kfac(model, approximation=approximation, fisher=fisher)
    both(optimizer, model, 3)
    before = copy.deepcopy(optimizer.factors())
    model.to(dtype)
    for name, pair in optimizer.factors().items():
        for side, F_ in pair.items():
            assert F_.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            torch.testing.assert_close(F_.float(), before[name][side], rtol=2e-2, atol=2e-2)
    losses = both(optimizer, model, 10)
    assert losses[-1] < losses[0] and {p.dtype for p in model.parameters()} == {dtype}
    expected = kfac(fresh, approximation=approximation, fisher=fisher)
    both(expected, fresh, 3)
    for p, q in zip(model.parameters(), fresh.parameters(), strict=True):
        for name, value in expected.state[q].items():
            if isinstance(value, Tensor):
                assert optimizer.state[p][name].dtype == value.dtype, name
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def test_a_paper_run_goes_on_in_double():
    model = mlp()
    optimizer = KFAC.paper(model, likelihood="categorical", compile=False)
    x, y = data(256)
    for _ in range(4):
        closure_step(optimizer, model, x, y)
    model.double()
    losses = [closure_step(optimizer, model, x.double(), y) for _ in range(10)]
    assert losses[-1] < losses[0]
    assert optimizer.state[model[0].weight]["momentum_buffer"].dtype == torch.float64


@pytest.mark.parametrize("factor_interval", [1, 5])
def test_a_conversion_there_and_back_changes_nothing(factor_interval):
    runs = []
    for converted in (False, True):
        model = mlp()
        optimizer = kfac(model, factor_interval=factor_interval)
        both(optimizer, model, 4)
        if converted:
            model.double()
            optimizer.coverage()
            model.float()
        runs.append(both(optimizer, model, 8))
    assert runs[0] == runs[1]


def test_data_of_another_shape():
    """A vocabulary that grew in place: its block begins anew, the others go on."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.Linear(8, 3))
    optimizer = kfac(model, factor_fraction=1.0)

    def step(words: int) -> None:
        optimizer.zero_grad()
        x = torch.randint(words, (64, 2))
        F.cross_entropy(model(x), x[:, 0] % 3).backward()
        optimizer.step()

    for _ in range(3):
        step(5)
    model[0].weight.data = torch.cat([model[0].weight.data, torch.randn(2, 4)])
    for _ in range(3):
        step(7)
    assert optimizer.factors()["0"]["A"].shape == (7,)
    assert float(optimizer.state[model[0].weight]["factor_updates"]) == 3
    assert float(optimizer.state[model[2].weight]["factor_updates"]) == 6


# --------------------------------------------------------------------------------------------------------------- copies


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
@pytest.mark.parametrize("form", [KFAC, KFAC.paper])
def test_a_model_and_its_optimizer_copied_in_one_call(form, copier):
    """The copy says that it wants its model, and then trains that one and not the original's."""
    model = mlp()
    optimizer = form(model, likelihood="categorical", compile=False)
    x, y = data()
    for _ in range(3):
        closure_step(optimizer, model, x, y)
    twin, other = copier((model, optimizer))
    with pytest.raises(RuntimeError, match=r"copied or unpickled.*attach\(model\)"):
        closure_step(other, twin, x, y)
    other.attach(twin)
    before = copy.deepcopy(model.state_dict())
    forked = [closure_step(other, twin, x, y) for _ in range(6)]
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert forked == [closure_step(optimizer, model, x, y) for _ in range(6)]


# -------------------------------------------------------------------------------------------------------- what it costs


def test_nothing_is_looked_up_where_nothing_changed(monkeypatch):
    """A step compares identities; the tree of the model is walked again only after a change."""
    model = mlp()
    optimizer = kfac(model)
    both(optimizer, model)
    members = optimizer._members
    walked = []
    named = nn.Module.named_parameters
    monkeypatch.setattr(nn.Module, "named_parameters", lambda *a, **k: walked.append(1) or named(*a, **k))
    optimizer._attached()
    assert optimizer._members is members and not walked
    model[0].register_parameter("weight", nn.Parameter(torch.randn(8, 6)))
    optimizer._attached()
    assert optimizer._members is not members and walked


def test_everything_that_falls_back_is_a_warning(caplog):
    """A model that K-FAC does nothing for: AdamW in silence is not what was asked for."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3, 6))

        def forward(self, x: Tensor) -> Tensor:
            return (x[:, None] * self.scale.sin()).sum(-1)

    model = Scaled()
    optimizer = kfac(model)
    with caplog.at_level(logging.INFO, "kfac_triton"):
        both(optimizer, model, 3)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "no parameter has a K-FAC block, so AdamW updates all of them: scale" in record.message
    mixed = nn.Sequential(nn.Linear(6, 3), nn.PReLU(3))
    caplog.clear()
    with caplog.at_level(logging.INFO, "kfac_triton"):
        both(kfac(mixed), mixed, 2)
    assert [record.levelno for record in caplog.records] == [logging.INFO]


def test_kl_clip_is_taken_out_during_training():
    """None is no bound, as in the constructor."""
    steps = []
    for late in (False, True):
        model = mlp()
        optimizer = kfac(model, lr=0.5, kl_clip=None if not late else 1e-4)
        optimizer.param_groups[0]["kl_clip"] = None
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        both(optimizer, model)
        assert optimizer.param_groups[0]["kl_clip"] == math.inf
        steps.append(model[0].weight.detach().clone())
    assert torch.equal(*steps)


def test_factors_of_a_model_whose_parts_moved():
    x, y = data()
    model = mlp()
    optimizer = KFAC(model, **WHOLE)
    train_step(optimizer, model, x, y)
    model[0].load_state_dict(copy.deepcopy(model[0].state_dict()), assign=True)
    model.double()
    torch.testing.assert_close(optimizer.factors()["0"]["A"], second_moment(x).double(), rtol=1e-5, atol=1e-6)
