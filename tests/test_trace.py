"""K-FAC's own passes start where the user's pass began, and leave everything as it was."""

from __future__ import annotations

import gc
import itertools
import logging
import random
import sys
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small import WHOLE, closure_step, data, mlp, second_moment, train_step
from torch import Tensor, nn

from kfac_triton import KFAC
from kfac_triton.capture import ModuleState, patches
from kfac_triton.capture import state as module_state
from kfac_triton.objective import Objective

FORMS = ["plain", "paper"]


def optimizer_of(form: str, model: nn.Module, *args: Any, **options: Any) -> KFAC:
    if form == "paper":
        return KFAC.paper(model, *args, likelihood="categorical", compile=False, **options)
    return KFAC(model, *args, **{**WHOLE, **options})


def step(form: str, *args: Any) -> float:
    return (closure_step if form == "paper" else train_step)(*args)


# ------------------------------------------------------------------------------------------------- state of the module


class Holder:
    """A plain object that holds a state."""

    def __init__(self, value: Any) -> None:
        self.value = value


class Stateful(nn.Module):
    """A network with a state v: v <- v / 2 + tanh(a(x)), which enters the second layer.

    With `noise`, K-FAC's own passes, which draw other numbers, would leave another state than the user's.
    """

    noise: ClassVar[float] = 0.0

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)
        self.begin(torch.zeros(128, 8))

    def begin(self, v: Tensor) -> None:
        raise NotImplementedError

    def read(self) -> Tensor:
        raise NotImplementedError

    def write(self, v: Tensor) -> None:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        v = 0.5 * self.read().detach() + F.dropout(torch.tanh(self.a(x)), self.noise)
        self.write(v)
        return self.b(v)


class Attribute(Stateful):
    def begin(self, v: Tensor) -> None:
        self.v = v

    def read(self) -> Tensor:
        return self.v

    def write(self, v: Tensor) -> None:
        self.v = v


class Appearing(Attribute):
    """The attribute appears in the first pass, and another disappears."""

    def begin(self, v: Tensor) -> None:
        self.young = True

    def read(self) -> Tensor:
        return self.__dict__.get("v", torch.zeros(128, 8))

    def write(self, v: Tensor) -> None:
        self.v = v
        self.__dict__.pop("young", None)


class InPlace(Attribute):
    def write(self, v: Tensor) -> None:
        self.v.copy_(v.detach())


class ByData(Attribute):
    """No version counter tells of this write."""

    def write(self, v: Tensor) -> None:
        self.v.data.copy_(v.detach())


class WithItsGraph(Attribute):
    """A membrane as spiking neurons have it: in place, and part of the graph."""

    def write(self, v: Tensor) -> None:
        self.v.detach_()
        self.v.mul_(0).add_(v)


class OfTwoViews(Stateful):
    """Written through one view, read through the other, also in the same pass."""

    def begin(self, v: Tensor) -> None:
        self.both = torch.stack([v, v])
        self.second = self.both[1]

    def read(self) -> Tensor:
        return self.both[1]

    def write(self, v: Tensor) -> None:
        self.second.copy_(v.detach())

    def forward(self, x: Tensor) -> Tensor:
        v = 0.5 * self.read().detach() + F.dropout(torch.tanh(self.a(x)), self.noise)
        self.write(v)
        return self.b(self.read().clone() + (v - v.detach()))


class InList(Stateful):
    def begin(self, v: Tensor) -> None:
        self.states = [v]

    def read(self) -> Tensor:
        return self.states[-1]

    def write(self, v: Tensor) -> None:
        self.states.append(v.detach())


class InNested(Stateful):
    def begin(self, v: Tensor) -> None:
        self.cache = {"layers": [{"v": v, "calls": 0}]}

    def read(self) -> Tensor:
        return self.cache["layers"][0]["v"]

    def write(self, v: Tensor) -> None:
        layer = self.cache["layers"][0]
        layer["calls"] += 1
        layer["v"].copy_(v.detach() if layer["calls"] < 100 else 0 * v)


class InDeque(Stateful):
    def begin(self, v: Tensor) -> None:
        self.states = deque([v], maxlen=2)

    def read(self) -> Tensor:
        return self.states[-1]

    def write(self, v: Tensor) -> None:
        self.states.append(v.detach())


class InArray(Stateful):
    def begin(self, v: Tensor) -> None:
        self.array = v.numpy().copy()

    def read(self) -> Tensor:
        return torch.from_numpy(self.array.copy())

    def write(self, v: Tensor) -> None:
        self.array[:] = v.detach().numpy()


class InObject(Stateful):
    def begin(self, v: Tensor) -> None:
        self.holders = [Holder(v)]

    def read(self) -> Tensor:
        return self.holders[0].value

    def write(self, v: Tensor) -> None:
        self.holders[0].value = v.detach()


class InSlots(Stateful):
    __slots__ = ("inside",)

    def begin(self, v: Tensor) -> None:
        object.__setattr__(self, "inside", v)

    def read(self) -> Tensor:
        return self.inside

    def write(self, v: Tensor) -> None:
        object.__setattr__(self, "inside", v.detach())


class InSubmodule(Stateful):
    def begin(self, v: Tensor) -> None:
        self.memory = nn.Module()
        self.memory.v = v

    def read(self) -> Tensor:
        return self.memory.v

    def write(self, v: Tensor) -> None:
        self.memory.v = v.detach()


class InBuffer(Stateful):
    def begin(self, v: Tensor) -> None:
        self.register_buffer("v", v)

    def read(self) -> Tensor:
        return self.v

    def write(self, v: Tensor) -> None:
        self.v.copy_(v.detach())


class InReboundBuffer(InBuffer):
    def write(self, v: Tensor) -> None:
        self.v = v.detach()


class InUntrained(Stateful):
    """An exponential average in a parameter that no optimizer has, updated in forward."""

    def begin(self, v: Tensor) -> None:
        self.v = nn.Parameter(v, requires_grad=False)

    def read(self) -> Tensor:
        return self.v

    def write(self, v: Tensor) -> None:
        with torch.no_grad():
            self.v.copy_(v)


class InUntrainedData(InUntrained):
    def write(self, v: Tensor) -> None:
        self.v.data.mul_(0).add_(v.detach())


class Counted(Attribute):
    """A call counter that decides what happens."""

    calls: Any = 0

    def read(self) -> Tensor:
        return self.v * self.calls

    def write(self, v: Tensor) -> None:
        self.v, self.calls = v.detach(), self.calls + 1


class Drawing(Attribute):
    """Generators of its own."""

    def begin(self, v: Tensor) -> None:
        super().begin(v)
        self.torch = torch.Generator().manual_seed(1)
        self.python, self.numpy = random.Random(2), np.random.default_rng(3)

    def read(self) -> Tensor:
        drawn = torch.rand(1, generator=self.torch) + self.python.random() + float(self.numpy.random())
        return self.v + drawn


STATEFUL = [
    Attribute, Appearing, InPlace, ByData, WithItsGraph, OfTwoViews, InList, InNested, InDeque, InArray, InObject,
    InSlots, InSubmodule, InBuffer, InReboundBuffer, InUntrained, InUntrainedData, Counted, Drawing,
]  # fmt: skip


def contents(value: Any) -> Any:
    """What an attribute holds, in values that compare."""
    if isinstance(value, Tensor):
        return value.detach().tolist()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, torch.Generator):
        return value.get_state().tolist()
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, np.random.Generator):
        return value.bit_generator.state
    if isinstance(value, dict):
        return {name: contents(one) for name, one in value.items()}
    if isinstance(value, (list, tuple, deque)):
        return [contents(one) for one in value]
    return contents(vars(value)) if isinstance(value, Holder) else value


def state_of(model: nn.Module) -> Any:
    """Everything that modules hold besides trained parameters."""
    internal = vars(nn.Module()).keys() - {"training"} | {"_is_torch_compile"}
    found = []
    for m in model.modules():
        found.append({name: contents(value) for name, value in vars(m).items() if name not in internal})
        found.append({name: contents(value) for name, value in m._buffers.items()})
        found.append({name: contents(p) for name, p in m._parameters.items() if not p.requires_grad})
        found.append(contents(getattr(m, "inside", None)))
    return found


def passes_with_the_weights_of(model: nn.Module, twin: nn.Module, x: Tensor) -> None:
    """One forward pass of the twin, which has the same state, takes over the trained weights and draws the same."""
    generator = torch.get_rng_state()
    with torch.no_grad():
        for p, own in zip(model.parameters(), twin.parameters(), strict=True):
            if p.requires_grad:
                own.copy_(p)
    twin(x)
    torch.set_rng_state(generator)


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
        objective = Objective(closure, state, list(model.parameters()))
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


def test_containers_that_a_compiled_forward_empties():
    x, y = data()
    model = Popping()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    optimizer = optimizer_of("plain", compiled)
    for _ in range(3):
        train_step(optimizer, lambda x: compiled({"x": x / 2, "more": [x / 2]}), x, y)
    torch.testing.assert_close(optimizer.factors()["f"]["A"], second_moment(x))


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_compiled_model_in_paper_mode_leaves_generators_and_keeps_nothing_of_k_facs_own_calls(dropout):
    x, y = data()
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(dropout), nn.Linear(8, 3))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    optimizer = optimizer_of("paper", compiled)
    torch.manual_seed(0)
    model(x)
    expected = generators()
    torch.manual_seed(0)
    closure_step(optimizer, compiled, x, y)
    assert generators() == expected
    with pytest.raises(RuntimeError, match="saw no call"):
        optimizer.step(lambda: F.cross_entropy(model(x).detach(), y))


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


# -------------------------------------------------------------------------------------------------------------- inputs


class Normalising(nn.Module):
    """Writes to its input."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.f = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x.sub_(2.0).div_(4.0))


@pytest.mark.parametrize("form", FORMS)
def test_an_input_that_forward_normalises_in_place(form):
    x, y = data()
    model = Normalising()
    optimizer = optimizer_of(form, model, **({"lr": 0.0} if form == "plain" else {"factor_fraction": 1.0}))
    for _ in range(3):
        given = 4 * x + 2

        def call(_: Tensor, given: Tensor = given) -> Tensor:
            return model(given if form == "plain" else given.clone())

        step(form, optimizer, call, x, y)
        torch.testing.assert_close(given, x if form == "plain" else 4 * x + 2)
        torch.testing.assert_close(optimizer.factors()["f"]["A"], second_moment(x))


def test_an_input_that_a_later_pass_writes_to_is_refused_once(caplog):
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.f(x.mul_(0.5) if x[0, 0] == 0 else x)

    x, y = data()
    model = Late()
    optimizer = optimizer_of("plain", model)
    train_step(optimizer, model, x, y)
    zero = x.clone()
    zero[0, 0] = 0
    with pytest.raises(RuntimeError, match=r"Late writes to its input in place.*pass a copy"):
        train_step(optimizer, model, zero, y)
    train_step(optimizer, model, zero.clone(), y)
    assert optimizer.param_groups[0]["step"] == 2


@pytest.mark.parametrize("write", ["values", "attribute"])
def test_an_object_whose_tensor_forward_changes_is_refused(write):
    class Normalising(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Linear(6, 3)

        def forward(self, batch: Holder) -> Tensor:
            if write == "values":
                batch.value.mul_(0.5)
            else:
                batch.value = 0.5 * batch.value
            return self.f(batch.value)

    x, y = data()
    model = Normalising()
    optimizer = optimizer_of("plain", model)
    with pytest.raises(RuntimeError, match=r"writes to its input in place.*pass a copy"):
        train_step(optimizer, lambda x: model(Holder(x)), x, y)
    torch.testing.assert_close(x, data()[0] * (0.5 if write == "values" else 1))


def test_a_compiled_model_that_normalises_its_input_in_place_is_refused():
    x, y = data()
    model = Normalising()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    optimizer = optimizer_of("plain", compiled)
    given = 4 * x + 2
    with pytest.raises(RuntimeError, match=r"Normalising writes to its input in place.*pass a copy"):
        train_step(optimizer, compiled, given, y)
    torch.testing.assert_close(given, x)


def test_an_input_of_a_graph_may_be_written_to():
    """As an activation in place does that is the first layer of a discriminator."""

    class Critic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.f(F.leaky_relu(x, 0.2, inplace=True))

    x, y = data()
    generator, critic = nn.Linear(6, 6), Critic()
    optimizer = optimizer_of("plain", critic, lr=0.0)
    for _ in range(3):
        train_step(optimizer, lambda x: critic(generator(x)), x, y)
    entered = F.leaky_relu(generator(x), 0.2).detach()
    torch.testing.assert_close(optimizer.factors()["f"]["A"], second_moment(entered))


class Popping(nn.Module):
    """Takes its inputs out of the containers that hold them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.f = nn.Linear(6, 3)

    def forward(self, batch: dict[str, Any]) -> Tensor:
        return self.f(batch.pop("x") + batch["more"].pop())


@pytest.mark.parametrize("mask", [None, lambda inputs, z: inputs["x"][:, 0] < 100])
@pytest.mark.parametrize("form", FORMS)
def test_containers_that_forward_empties(form, mask):
    x, y = data()
    model = Popping()
    optimizer = optimizer_of(form, model, factor_fraction=1.0, mask=mask)
    for _ in range(3):
        step(form, optimizer, lambda x: model({"x": x / 2, "more": [x / 2]}), x, y)
    torch.testing.assert_close(optimizer.factors()["f"]["A"], second_moment(x))


def test_containers_that_the_loader_fills_again():
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Linear(6, 3)

        def forward(self, batch: list[Tensor], *, more: dict[str, list[Tensor]]) -> Tensor:
            return self.f(batch[0] + more["x"][0])

    x, y = data()
    model = Nested()
    optimizer = optimizer_of("plain", model)
    batch, more = [x / 2], {"x": [x / 2]}
    loss = F.cross_entropy(model(batch, more=more), y)
    batch[0] = 100 * x
    more["x"] = [100 * x]
    loss.backward()
    optimizer.step()
    torch.testing.assert_close(optimizer.factors()["f"]["A"], second_moment(x))
    assert torch.equal(batch[0], 100 * x) and len(more["x"]) == 1


@pytest.mark.parametrize("form", FORMS)
def test_inputs_that_require_gradients(form):
    """A forward pass may need the gradient with respect to its input; the input's own `.grad` and flag stay."""

    class Sensitive(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            (slope,) = torch.autograd.grad(x.square().sum(), x)
            return self.f(x + 0 * slope)

    x, y = data()
    model = Sensitive()
    optimizer = optimizer_of(form, model)
    given = x.clone().requires_grad_()
    for _ in range(3):
        given.grad = None
        gradient = torch.autograd.grad(F.cross_entropy(model(given), y), given)[0]
        step(form, optimizer, model, given, y)
        assert given.requires_grad and given.is_leaf
        torch.testing.assert_close(given.grad, gradient)
    assert optimizer.coverage()["f.weight"] == "linear"


# ----------------------------------------------------------------------------------------------------- random numbers


def generators() -> list[Any]:
    numpy = np.random.get_state()
    return [torch.get_rng_state().tolist(), random.getstate(), numpy[1].tolist(), numpy[2:]]


class Depth(nn.Module):
    """Stochastic depth, dropout and noise from all global generators. `paths` has the layers of every pass."""

    def __init__(self, draws: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.draws = draws
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        path = []
        for i, layer in enumerate(self.layers):
            python = random.random() if "python" in self.draws else 1.0
            numpy = np.random.rand() if "numpy" in self.draws else 1.0
            if python > 0.3 and numpy > 0.1:
                path.append(i)
                x = x + torch.tanh(layer(x))
        PATHS.append(path)
        return self.head(F.dropout(x, 0.2) if "torch" in self.draws else x)


PATHS: list[list[int]] = []


@pytest.mark.parametrize("draws", ["", "python", "numpy", "torch", "python numpy torch"])
@pytest.mark.parametrize("form", FORMS)
def test_global_generators_are_as_one_forward_pass_leaves_them(form, draws):
    x, y = data()
    model = Depth(draws)
    optimizer = optimizer_of(form, model)
    for seed in range(3):
        random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
        model(x)
        expected = generators()
        random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
        PATHS.clear()
        step(form, optimizer, model, x, y)
        assert generators() == expected
        assert len(PATHS) > 1 and all(path == PATHS[0] for path in PATHS)


def test_draws_of_other_threads_are_their_own():
    """A thread that draws from torch's global generator while another thread trains a model that draws nothing."""
    numbers = {}
    for train in (False, True):
        torch.manual_seed(0)
        models = [mlp(seed=i) for i in range(2)]
        optimizers = [optimizer_of(form, model) for form, model in zip(FORMS, models, strict=True)]
        x, y = data()
        torch.manual_seed(7)
        drawn, stop, turns = [], threading.Event(), 0

        def draw(drawn: list[float] = drawn, stop: threading.Event = stop) -> None:
            while not stop.is_set():
                drawn.append(float(torch.rand(())))

        def with_draws(layer: nn.Module, args: Any, drawn: list[float] = drawn) -> None:
            thread = threading.Thread(target=lambda: drawn.append(float(torch.rand(()))))
            thread.start()
            thread.join()

        if train:
            for model in models:
                model[0].register_forward_pre_hook(with_draws)  # in the user's passes and in K-FAC's own
            for _ in range(6):
                for form, model, optimizer in zip(FORMS, models, optimizers, strict=True):
                    step(form, optimizer, model, x, y)
            turns = len(drawn)
        else:
            drawn += [float(torch.rand(())) for _ in range(200)]
        numbers[train] = drawn
        assert not train or 24 < turns <= 200
    assert numbers[True] == numbers[False][: len(numbers[True])]


# ----------------------------------------------------------------------------------------------------------- gradients


CLEARS: dict[str, Callable[[Any, nn.Module, nn.Module], None]] = {
    "optimizer.zero_grad": lambda optimizer, model, head: optimizer.zero_grad(),
    "zeros": lambda optimizer, model, head: optimizer.zero_grad(set_to_none=False),
    "module.zero_grad": lambda optimizer, model, head: (model.zero_grad(), head.zero_grad()),
    "grad = None": lambda optimizer, model, head: [
        setattr(p, "grad", None) for p in itertools.chain(model.parameters(), head.parameters())
    ],
}


@pytest.mark.parametrize("needs_gradients", [False, True])
@pytest.mark.parametrize("returned", ["loss", "number"])
@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("clear", CLEARS)
def test_a_second_optimizer_gets_the_gradients_of_the_first_call(clear, inside, returned, needs_gradients):
    """For the head of the model, or for a network that K-FAC's model does not contain."""
    x, y = data(256)
    model, outside = mlp(), nn.Linear(6, 3)
    head = model[2] if inside else outside
    optimizer = optimizer_of("paper", model, model[0].parameters())
    other = torch.optim.SGD(head.parameters(), lr=0.1)
    for _ in range(6):

        def closure() -> Any:
            optimizer.zero_grad()
            CLEARS[clear](other, model, head)
            loss = F.cross_entropy(model(x), y) + F.cross_entropy(outside(x), y)
            loss.backward()
            if needs_gradients:
                model[0].weight.grad.mul_(1.0)
            return loss if returned == "loss" else loss.item()

        value = F.cross_entropy((model if inside else outside)(x), y)
        expected = torch.autograd.grad(value, list(head.parameters()))
        optimizer.step(closure)
        torch.testing.assert_close(tuple(p.grad for p in head.parameters()), expected)
        other.step()


def test_gradients_that_forward_accumulates_itself_stay():
    """An inner backward pass in forward: `.grad` after the step is what one forward and backward pass gave."""

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f, self.slow = nn.Linear(6, 3), nn.Parameter(torch.ones(6))

        def forward(self, x: Tensor) -> Tensor:
            with torch.enable_grad():
                (x * self.slow).square().mean().backward()
            return self.f(x)

    x, y = data()
    model = Inner()
    model(x)
    once = model.slow.grad.clone()
    optimizer = optimizer_of("plain", model, list(model.f.parameters()))
    for k in range(2, 4):
        train_step(optimizer, model, x, y)
        torch.testing.assert_close(model.slow.grad, k * once)


def test_gradients_that_a_closure_assigns_stay():
    """Of parameters outside of the model, that no backward pass reaches."""
    x, y = data(256)
    model, head = mlp(), nn.Linear(6, 3)
    optimizer, other = optimizer_of("paper", model), torch.optim.SGD(head.parameters(), lr=0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        other.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        for p in head.parameters():
            p.grad = loss.detach() * torch.ones_like(p)
        return loss

    for _ in range(3):
        loss = optimizer.step(closure)
        assert all(torch.equal(p.grad, loss * torch.ones_like(p)) for p in head.parameters())


# ------------------------------------------------------------------------------------------------------------- threads


def trained(form: str, seed: int, model: nn.Module, steps: int = 12) -> list[Tensor]:
    x, y = data(seed=seed)
    optimizer = optimizer_of(form, model, **({"lr": 0.03} if form == "plain" else {}))
    for _ in range(steps):
        step(form, optimizer, model, x, y)
    return [p.detach().clone() for p in model.parameters()]


@pytest.fixture
def eager_switches() -> Iterator[None]:
    """Threads take turns after few instructions."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(6, 2, batch_first=True), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x[:, None], x[:, None], x[:, None], need_weights=False)[0][:, 0])


def built(kind: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    if kind == "mlp":
        return mlp(seed=seed, h=32)
    return Attention() if kind == "attention" else nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.5), nn.Linear(16, 3))


@pytest.mark.parametrize("kind", ["mlp", "attention"])
@pytest.mark.parametrize("form", FORMS)
def test_threads_train_as_they_would_alone(form, kind, eager_switches):
    expected = [trained(form, i, built(kind, i)) for i in range(3)]
    models, results = [built(kind, i) for i in range(3)], {}

    def work(i: int) -> None:
        results[i] = trained(form, i, models[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for i in range(3):
        assert all(torch.equal(a, b) for a, b in zip(results[i], expected[i], strict=True))


@pytest.mark.parametrize("form", FORMS)
def test_threads_with_dropout_all_arrive(form, eager_switches):
    models, arrived = [built("dropout", i) for i in range(3)], []

    def work(i: int) -> None:
        arrived.append(all(p.isfinite().all() for p in trained(form, i, models[i], steps=8)))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert arrived == [True] * 3


def test_with_a_process_wide_stance_threads_exclude_each_other(monkeypatch, eager_switches):
    """As before torch 2.14: afterwards the compiler has its own stance again, whoever left first."""
    frames = pytest.importorskip("torch._dynamo.eval_frame")
    monkeypatch.delattr(frames, "_use_eager_on_nested_compile", raising=False)
    models = [built("mlp", i) for i in range(3)]
    threads = [threading.Thread(target=trained, args=("plain", i, models[i])) for i in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert frames._stance.stance == "default"


PATCHED = [
    (torch.autograd, "backward"), (torch.optim.Optimizer, "zero_grad"), (nn.Module, "zero_grad"),
    (torch.utils.checkpoint.CheckpointFunction, "apply"), (F, "has_torch_function"),
]  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_a_thread_that_fails_harms_no_later_optimizer(form):
    """In K-FAC's own pass, with torch's functions exchanged for this thread."""

    class Failing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.drop = nn.Linear(6, 3), nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            z = self.drop(self.layer(x))
            if patches.own_pass_running():
                raise ZeroDivisionError("in K-FAC's own pass")
            return z

    def names() -> list[Any]:
        return [vars(owner).get(name) for owner, name in PATCHED]

    before, failed, x, y = names(), [], *data()
    expected = trained(form, 0, built("mlp", 0))

    def work() -> None:
        model = Failing()
        try:
            step(form, optimizer_of(form, model), model, x, y)
        except ZeroDivisionError as error:
            failed.append(error)
        assert not patches.own_pass_running()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert len(failed) == 1 and names() == before
    assert all(torch.equal(a, b) for a, b in zip(trained(form, 0, built("mlp", 0)), expected, strict=True))


def test_other_threads_see_nothing_of_k_facs_own_pass():
    """Compiled code stays compiled there, attention has its kernels, and checkpoints and backward passes work."""
    graphs: list[int] = []

    def backend(graph: Any, examples: Any) -> Callable[..., Any]:
        graphs.append(0)

        def run(*args: Any) -> Any:
            graphs[0] += 1
            return graph(*args)

        return run

    @torch.compile(backend=backend)
    def compiled(x: Tensor) -> Tensor:
        return 2 * x

    seen: list[Any] = []

    def look() -> None:
        compiled(torch.ones(()))
        w = torch.ones(3, requires_grad=True)
        torch.utils.checkpoint.checkpoint(torch.square, w, use_reentrant=True).sum().backward()
        kernels = torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled()
        seen.append((graphs[0], w.grad.tolist(), kernels, patches.own_pass_running()))

    class Looking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            if patches.own_pass_running():
                thread = threading.Thread(target=look)
                thread.start()
                thread.join()
            return self.layer(x)

    compiled(torch.ones(()))
    x, y = data()
    model = Looking()
    step("plain", optimizer_of("plain", model), model, x, y)
    step("paper", optimizer_of("paper", model), model, x, y)
    assert len(seen) > 3
    assert seen == [(graphs[0] - len(seen) + 1 + i, [2.0] * 3, (True, True), False) for i in range(len(seen))]


# ----------------------------------------------------------------------------------------------------------- the price


def test_what_is_saved_of_a_module_without_state_costs_as_little_at_any_depth():
    """Python and C calls of the opening and closing of a pass, once it is known that it changes nothing."""
    counts = []
    for depth in (4, 24):
        model = nn.Sequential(*(layer for _ in range(depth) for layer in (nn.Linear(4, 4), nn.Tanh())))
        state, x = ModuleState(model), torch.ones(2, 4)
        state.closing(state.opening((x,), {}))
        calls = []
        gc.disable()
        sys.setprofile(lambda frame, event, arg: calls.append(event))  # noqa: B023
        state.closing(state.opening((x,), {}))
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
            opening = state.opening((x,), {})
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
