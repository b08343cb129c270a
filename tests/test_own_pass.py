"""What a pass of K-FAC's own costs beside the model's, in Python calls and operators, and that it leaves as it was what
it does not look at each time."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from replayed import own_forward, recorded
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from kfac_triton.capture import Inputs, ModuleState, bare_pass
from kfac_triton.capture.owners import modules_of
from kfac_triton.capture.patches import PerThread
from kfac_triton.fisher.sampled import recorded_forward


class Counted(TorchDispatchMode):
    """Counts the operators in here."""

    def __init__(self) -> None:
        super().__init__()
        self.operators = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators += 1
        return func(*args, **(kwargs or {}))


def python_calls(f: Callable[[], Any]) -> int:
    count = 0

    def profile(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(profile)
    try:
        f()
    finally:
        sys.setprofile(None)
    return count


def operators(f: Callable[[], Any]) -> int:
    with Counted() as mode:
        f()
    return mode.operators


def own_pass(model: nn.Module, x: Tensor) -> Callable[[], Any]:
    """The same with the backward pass to the uses."""
    forward = own_forward(model, x)

    def run() -> None:
        recorder, z = forward()
        torch.autograd.grad(z, [one.edge for one in recorded(recorder)], z.detach())

    return run


def users_pass(model: nn.Module, x: Tensor) -> Callable[[], Any]:
    """The model's own forward pass, and a backward pass through all of its layers to the first one's output."""

    def run() -> None:
        y = model[0](x)
        z = model[1:](y)
        torch.autograd.grad(z, y, z.detach())

    return run


# ------------------------------------------------------------------------------------------------------- what it costs


def deep(*kinds: Callable[[], nn.Module], layers: int) -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), *(kind() for _ in range(layers) for kind in kinds), nn.Linear(8, 8))


def linear() -> nn.Module:
    return nn.Linear(8, 8)


def conv() -> nn.Module:
    return nn.Sequential(nn.Unflatten(-1, (2, 2, 2)), nn.Conv2d(2, 2, 3, padding=1), nn.Flatten())


COSTS = {
    "linear": ((linear,), (16, 8), 4),  # __torch_function__, its short way for linear layers, and two objects
    "linear, positions": ((linear,), (16, 3, 8), 4),
    "no weight": ((nn.Tanh,), (16, 8), 1),
    "a layer and its activation": ((linear, nn.Tanh), (16, 8), 5),
    "convolution": ((conv,), (16, 8), 65),
    "normalisation": ((lambda: nn.LayerNorm(8),), (16, 8), 50),
}


@pytest.mark.parametrize("name", COSTS)
def test_what_one_more_layer_adds_to_the_models_own_python_calls(name):
    kinds, shape, allowed = COSTS[name]
    x = torch.randn(shape)

    def added(layers: int) -> int:
        model = deep(*kinds, layers=layers)
        return python_calls(own_forward(model, x)) - python_calls(lambda: model(x))

    few, more = added(2), added(12)
    assert more - few <= 10 * allowed


def test_what_a_pass_adds_at_any_depth():
    """Copies, generators, patches and the walk over the modules."""
    model, x = deep(linear, nn.Tanh, layers=4), torch.randn(16, 8)
    added = python_calls(own_forward(model, x)) - python_calls(lambda: model(x))
    assert added - 6 * 4 - 4 <= 170


def test_a_kept_input_holds_no_graph():
    model, x = deep(linear, nn.Tanh, layers=2), torch.randn(16, 8)
    recorder, _ = own_forward(model, x)()
    xs = [one.use.x for one in recorded(recorder)]
    assert len(xs) == 4 and not any(x.requires_grad or x.grad_fn is not None or x._is_view() for x in xs)


def test_one_operator_more_for_every_use():
    x = torch.randn(16, 8)

    def added(layers: int) -> int:
        model = deep(linear, nn.Tanh, layers=layers)
        return operators(own_pass(model, x)) - operators(users_pass(model, x))

    few, more = added(2), added(12)
    assert more - few <= 10


# ------------------------------------------------------------------------------- what is looked up only when it changes


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        self.again, self.none, self.inside = self.first[0], None, nn.ModuleList([self.first, nn.ReLU()])
        self.register_module("empty", None)


def test_modules_in_the_order_of_torch():
    model = Shared()
    model.inside.append(model)  # a cycle
    assert modules_of(model) == list(model.modules())


class Notes(nn.Linear):
    """Counts its calls, from an attribute that the first one makes."""

    def forward(self, x: Tensor) -> Tensor:
        self.seen = getattr(self, "seen", 0) + 1
        return super().forward(x)


@pytest.mark.parametrize("place", ["attribute", "list"])
def test_an_exchanged_layer_is_left_as_it_was_too(place):
    """The modules are known from the passes before."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8)))
    x = torch.randn(4, 8)
    state = ModuleState(model)

    def run() -> None:
        with bare_pass(state, Inputs(model, (x,), {}), 0) as replay:
            recorded_forward(replay, Inputs(model, (x,), {}), model.parameters())

    run()
    layer = Notes(8, 8)
    if place == "attribute":
        model[1] = layer
    else:
        model[1].append(layer)
    run()
    assert not hasattr(layer, "seen")
    layer.weight = nn.Parameter(torch.eye(8))
    layer.extra = nn.Parameter(torch.ones(8), requires_grad=False)
    run()
    assert state.trained[-2] is layer.weight or state.trained[-1] is layer.weight
    assert [one.parameter for one in state.untrained] == [layer.extra]
    with torch.no_grad():
        layer.scale = 1
    run()
    assert layer.scale == 1 and not hasattr(layer, "seen")


def test_a_pass_that_starts_again_begins_where_it_began():
    layer, x = Notes(8, 8), torch.randn(4, 8)
    inputs = Inputs(layer, (x,), {})
    with bare_pass(ModuleState(layer), inputs, 0) as replay:
        for _ in range(2):
            recorded_forward(replay, inputs, layer.parameters())
            assert layer.seen == 1
    assert not hasattr(layer, "seen")


def test_a_list_in_a_tuple_is_left_as_it_was():
    """A tuple of numbers alone needs no copy."""

    class Writes(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            self.held[1].append(len(x))
            return super().forward(x)

    layer, x = Writes(8, 8), torch.randn(4, 8)
    layer.numbers, layer.held = (1, 2), (0, [])
    with bare_pass(ModuleState(layer), Inputs(layer, (x,), {}), 0) as replay:
        recorded_forward(replay, Inputs(layer, (x,), {}), layer.parameters())
        assert layer.held == (0, [4])
    assert layer.held == (0, [])


def test_a_function_that_the_user_replaces_between_two_passes_is_called():
    owner = SimpleNamespace(f=lambda: "first")
    place = PerThread(owner, "f")
    for name in ("first", "second", "second"):
        owner.f = {"first": owner.f, "second": lambda: "second"}[name]
        with place.replaced_by(lambda original: f"around {original()}"):
            assert owner.f() == f"around {name}"
        assert owner.f() == name
