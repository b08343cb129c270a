"""What K-FAC's own passes leave alone beside the model: inputs, random numbers, and gradients of all parameters."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small import closure_step, data, mlp, second_moment, train_step
from stateful import (
    FORMS,
    Holder,
    generators,
    optimizer_of,
    step,
)
from torch import Tensor, nn

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


def test_containers_that_a_compiled_forward_empties():
    x, y = data()
    model = Popping()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    optimizer = optimizer_of("plain", compiled)
    for _ in range(3):
        train_step(optimizer, lambda x: compiled({"x": x / 2, "more": [x / 2]}), x, y)
    torch.testing.assert_close(optimizer.factors()["f"]["A"], second_moment(x))


# ----------------------------------------------------------------------------------------------------- random numbers


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
