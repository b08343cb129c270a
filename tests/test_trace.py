"""K-FAC's own passes start in the state that the user's pass met, and leave the model as it was."""

from __future__ import annotations

import gc
import itertools
import logging
import sys
import threading
import warnings
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small import data, mlp, second_moment, train_step
from stateful import (
    FORMS,
    STATEFUL,
    Attribute,
    InArray,
    InBuffer,
    InList,
    InNested,
    InObject,
    InPlace,
    InUntrained,
    Stateful,
    WithItsGraph,
    optimizer_of,
    passes_with_the_weights_of,
    state_of,
    step,
)
from torch import Tensor, nn

from kfac_triton.capture import ModuleState
from kfac_triton.capture import state as module_state
from kfac_triton.distributed import Ranks
from kfac_triton.steps.objective import Objective


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", STATEFUL)
def test_a_step_leaves_the_state_of_one_forward_pass(kind, form, monkeypatch):
    monkeypatch.setattr(Stateful, "noise", 0.1)
    x, y = data()
    model, twin = kind(), kind()
    optimizer = optimizer_of(form, model)
    for _ in range(3):
        passes_with_the_weights_of(model, twin, x)
        step(form, optimizer, model, x, y)
        assert state_of(model) == state_of(twin)


@pytest.mark.parametrize("kind", STATEFUL)
def test_the_statistics_are_those_of_the_state_that_the_users_pass_met(kind):
    """Three steps at rest: A of the second layer is the mean second moment of what entered it in the user's passes."""
    x, y = data()
    model = kind()
    optimizer = optimizer_of("plain", model, lr=0.0)
    entered: list[Tensor] = []
    model.b.register_forward_pre_hook(lambda layer, args: entered.append(args[0].detach().clone()))
    moments = []
    for _ in range(3):
        entered.clear()
        train_step(optimizer, model, x, y)
        moments.append(second_moment(entered[0]))
        torch.testing.assert_close(optimizer.factors()["b"]["A"], torch.stack(moments).mean(0))


@pytest.mark.parametrize("first", ["a layer", "the model"])
@pytest.mark.parametrize("kind", STATEFUL)
def test_a_call_of_one_module_does_not_tell_what_one_of_another_changes(kind, first):
    """A model that holds one with a state: a layer of it, or a way past it, is called before it is."""

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = kind()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner.b(torch.tanh(self.inner.a(x)))

    x, y = data()
    model = Holder()
    optimizer = optimizer_of("plain", model, lr=0.0)
    if first == "the model":
        model(x)
    else:
        model.inner.a(x)
    entered: list[Tensor] = []
    model.inner.b.register_forward_pre_hook(lambda layer, args: entered.append(args[0].detach().clone()))
    F.cross_entropy(model.inner(x), y).backward()
    moment = second_moment(entered[0])
    optimizer.step()
    torch.testing.assert_close(optimizer.factors()["inner.b"]["A"], moment)


@pytest.mark.parametrize("kind", STATEFUL)
def test_the_objective_is_asked_in_the_state_of_the_first_call(kind):
    x, y = data()
    model = kind()

    def closure() -> Tensor:
        model.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    state = ModuleState(model)
    for _ in range(2):
        objective = Objective(closure, state, list(model.parameters()), Ranks(model))
        objective.call()
        for objective.forward_only in (True, False):
            assert objective.loss() == objective.first


def test_objects_and_their_graphs_are_the_same_afterwards():
    x, y = data()
    model = WithItsGraph()
    optimizer = optimizer_of("plain", model)
    F.cross_entropy(model(x), y).backward()
    attribute, node, version = model.v, model.v.grad_fn, model.v._version
    optimizer.step()
    assert model.v is attribute and attribute.grad_fn is node and attribute._version == version


@pytest.mark.parametrize("kind", [Attribute, InList, InNested, InArray, InObject, InBuffer, InUntrained])
def test_what_a_later_pass_changes_is_learnt_then(kind, monkeypatch, caplog):
    """From the third pass on there is a state; the statistics follow it from the fourth on."""

    class Late(kind):
        calls = 0

        def write(self, v: Tensor) -> None:
            self.calls += 1
            if self.calls > 2:
                super().write(v)

    x, y = data()
    model, twin = Late(), Late()
    optimizer = optimizer_of("plain", model, lr=0.0)
    entered: list[Tensor] = []
    model.b.register_forward_pre_hook(lambda layer, args: entered.append(args[0].detach().clone()))
    before = torch.zeros(9, 9)
    with caplog.at_level(logging.WARNING, "kfac_triton"):
        for k in range(1, 7):
            monkeypatch.setattr(Stateful, "noise", 0.1 if k == 3 else 0.0)
            passes_with_the_weights_of(model, twin, x)
            entered.clear()
            train_step(optimizer, model, x, y)
            assert state_of(model) == state_of(twin)
            after = k * optimizer.factors()["b"]["A"]
            if k > 3:
                torch.testing.assert_close(after - before, second_moment(entered[0]), rtol=1e-4, atol=1e-5)
            before = after
    assert not caplog.records


def test_a_compiled_model_keeps_its_state_and_is_named(caplog):
    """Compiled code shows no place to save the state at: the statistics are those of the state after the pass."""
    x, y = data()
    model, twin = InBuffer(), InBuffer()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    optimizer = optimizer_of("plain", compiled)
    with caplog.at_level(logging.WARNING, "kfac_triton"):
        for _ in range(3):
            passes_with_the_weights_of(model, twin, x)
            train_step(optimizer, compiled, x, y)
            assert state_of(model) == state_of(twin)
    assert len(caplog.records) == 1 and "InBuffer changes v, and compiled code" in caplog.text


def test_training_flags_are_those_of_the_users_pass():
    """A model that is set to eval mode between its forward pass and the step; and one that does so itself."""

    class Switching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.drop = nn.Linear(6, 3), nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            flags.append(self.drop.training)
            z = self.layer(self.drop(x))
            self.drop.eval()
            return z

    flags: list[bool] = []
    x, y = data()
    model = Switching()
    optimizer = optimizer_of("plain", model)
    for _ in range(3):
        optimizer.zero_grad()
        model.train()
        F.cross_entropy(model(x), y).backward()
        model.eval()
        optimizer.step()
        assert not any(m.training for m in model.modules())
    assert all(flags)


def test_a_view_of_a_weight_stays_one():
    """Used by a forward pass as an attribute, it is the weight: the layer has its block."""

    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
            self.tied = {"W": self.layer.weight, "half": [self.head.weight.detach()]}

        def forward(self, x: Tensor) -> Tensor:
            assert self.tied["half"][0].data_ptr() == self.head.weight.data_ptr()
            return self.head(torch.tanh(F.linear(x, self.tied["W"], self.layer.bias)))

    x, y = data()
    model = Views()
    optimizer = optimizer_of("plain", model, lr=0.0)
    train_step(optimizer, model, x, y)
    assert set(optimizer.coverage().values()) == {"linear"}
    torch.testing.assert_close(optimizer.factors()["layer"]["A"], second_moment(x))


@pytest.mark.parametrize("form", FORMS)
def test_large_tensors_that_nobody_writes_to_are_not_copied(form):
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 3)
            self.table = torch.ones(module_state.SMALL // 4 + 1)
            self.register_buffer("grid", torch.ones(module_state.SMALL // 4 + 1))

        def forward(self, x: Tensor) -> Tensor:
            addresses.add((self.table.data_ptr(), self.grid.data_ptr()))
            return self.layer(x) * self.table[0] * self.grid[0]

    addresses: set[tuple[int, int]] = set()
    x, y = data()
    model = Table()
    step(form, optimizer_of(form, model), model, x, y)
    assert len(addresses) == 1


def test_a_large_state_that_is_written_to_is_copied():
    class Large(InPlace):
        def begin(self, v: Tensor) -> None:
            self.v = torch.zeros(module_state.SMALL // 32 + 8, 8)

        def read(self) -> Tensor:
            return self.v[:128]

        def write(self, v: Tensor) -> None:
            self.v[:128] = v.detach()

    x, y = data()
    model, twin = Large(), Large()
    optimizer = optimizer_of("plain", model)
    for _ in range(3):
        passes_with_the_weights_of(model, twin, x)
        train_step(optimizer, model, x, y)
        assert torch.equal(model.v, twin.v)


class Proud:
    """Cannot be copied or compared."""

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("do not compare me")

    __hash__ = None  # type: ignore[assignment]

    def __copy__(self) -> Proud:
        raise RuntimeError("do not copy me")

    def __deepcopy__(self, memo: Any) -> Proud:
        raise RuntimeError("do not copy me")


class ProudList(list):
    def __copy__(self) -> ProudList:
        raise RuntimeError("do not copy me")

    def __eq__(self, other: object) -> Any:
        return np.array([True, False])


@pytest.mark.parametrize("form", FORMS)
def test_attributes_of_every_kind_do_no_harm(form, caplog):
    class Strange(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 3)
            self.proud, self.array, self.lock = Proud(), np.array([1, None], dtype=object), threading.Lock()
            self.list, self.iterator, self.file = ProudList([Proud()]), itertools.count(), sys.stdout
            self.itself, self.function, self.kind = [self], torch.tanh, nn.Linear
            self.cycle: list[Any] = []
            self.cycle.append(self.cycle)
            self.sparse, self.rows, self.empty = torch.eye(3).to_sparse(), torch.eye(3).to_sparse_csr(), torch.empty(0)
            self.register_buffer("adjacency", torch.eye(3).to_sparse())
            self.complex, self.meta = torch.ones(2, dtype=torch.complex64).conj(), torch.empty(3, device="meta")
            self.nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
            with torch.inference_mode():
                self.inferred = torch.ones(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

    x, y = data()
    model = Strange()
    optimizer = optimizer_of(form, model)
    before = dict(vars(model))
    with caplog.at_level(logging.WARNING, "kfac_triton"):
        for _ in range(3):
            step(form, optimizer, model, x, y)
    assert not caplog.records
    assert all(vars(model)[name] is value for name, value in before.items())


def test_buffers_of_a_traced_model_stay():
    x, y = data()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.jit.trace(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)), x)
    before = int(dict(model.named_buffers())["1.num_batches_tracked"])
    optimizer = optimizer_of("plain", model)
    for _ in range(3):
        train_step(optimizer, model, x, y)
    assert int(dict(model.named_buffers())["1.num_batches_tracked"]) == before + 3


def test_passes_inside_functional_transformations_are_left_alone():
    x, y = data()
    model = mlp()
    optimizer = optimizer_of("plain", model, lr=0.0)

    def loss(parameters: dict[str, Tensor], a: Tensor, b: Tensor) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(model, parameters, (a[None],)), b[None])

    parameters = {name: p.detach() for name, p in model.named_parameters()}
    for _ in range(2):
        torch.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, 100 * x, y)
        train_step(optimizer, model, x, y)
    torch.testing.assert_close(optimizer.factors()["0"]["A"], second_moment(x))


# ------------------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("by_data", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_a_forward_pass_that_writes_to_a_trained_weight_is_refused_by_name(form, by_data):
    class Decaying(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            if by_data:
                self.layer.weight.data.mul_(0.9)
            else:
                with torch.no_grad():
                    self.layer.weight.mul_(0.9)
            return self.layer(x)

    x, y = data()
    model = Decaying()
    optimizer = optimizer_of(form, model)
    before = 0.9 * model.layer.weight.detach()
    with pytest.raises(RuntimeError, match=r"Decaying writes to the trained parameter layer\.weight"):
        step(form, optimizer, model, x, y)
    torch.testing.assert_close(model.layer.weight.detach(), before)


def test_a_bound_on_the_norm_of_rows_is_allowed():
    """nn.Embedding(max_norm=...) writes to its weight in each forward pass, and the second time nothing new."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 4, max_norm=0.5), nn.Flatten(), nn.Linear(8, 3))
    optimizer = optimizer_of("plain", model, lr=0.0)
    x, y = torch.tensor([[0, 1], [2, 3], [4, 1]]), torch.tensor([0, 1, 2])
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.step()
        assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_requires_grad_of_parameters_stays():
    class Freezing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            self.layer.requires_grad_(not self.layer.weight.requires_grad)
            return self.head(torch.tanh(self.layer(x)))

    x, y = data()
    model = Freezing()
    optimizer = optimizer_of("plain", model)
    for trained in (False, True, False):
        train_step(optimizer, model, x, y)
        assert model.layer.weight.requires_grad is trained


# ----------------------------------------------------------------------------------------------------------- the price


def test_what_is_saved_of_a_module_without_state_costs_as_little_at_any_depth():
    """Python and C calls of the opening and closing of a pass, once it is known that it changes nothing."""
    counts = []
    for depth in (4, 24):
        model = nn.Sequential(*(layer for _ in range(depth) for layer in (nn.Linear(4, 4), nn.Tanh())))
        state, x = ModuleState(model), torch.ones(2, 4)
        state.closing(state.opening(None, (x,), {}))
        calls = []
        gc.disable()
        sys.setprofile(lambda frame, event, arg: calls.append(event))  # noqa: B023
        state.closing(state.opening(None, (x,), {}))
        sys.setprofile(None)
        gc.enable()
        counts.append(sum(event in ("call", "c_call") for event in calls))
    assert counts[0] == counts[1] <= 40


def test_running_statistics_are_not_saved_when_a_pass_begins():
    """They change no output in training. Other buffers that a pass writes are."""
    sizes = []
    for layer in (nn.BatchNorm1d(6), nn.BatchNorm1d(6, momentum=None), nn.utils.spectral_norm(nn.Linear(6, 6))):
        state, x = ModuleState(nn.Sequential(nn.Linear(6, 6), layer)), data()[0]
        for _ in range(2):
            opening = state.opening(None, (x,), {})
            state.root(x)
            state.closing(opening)
        sizes.append(len(opening.attributes))
    assert sizes == [0, 3, 3]


def test_what_is_protected_is_not_warned_about(caplog):
    x, y = data()
    with caplog.at_level(logging.WARNING, "kfac_triton"):
        for kind in STATEFUL:
            model = kind()
            train_step(optimizer_of("plain", model), model, x, y)
    assert not caplog.records
