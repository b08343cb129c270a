"""Uses of weights that no function call shows: where the outputs are derivatives, and in functions of one's own."""

from __future__ import annotations

import logging
from collections.abc import Callable

import dense
import pytest
import torch
import torch.nn.functional as F
from small import WHOLE, closure_step, data, mlp, second_moment, train_step
from torch import Tensor, nn

from kfac_triton import KFAC
from kfac_triton.capture import Inputs, ModuleState
from kfac_triton.likelihoods import as_likelihood
from kfac_triton.steps.quadratic import FisherProducts


class Square(torch.autograd.Function):
    """(x W^T)^2, with a backward pass of its own."""

    @staticmethod
    def forward(ctx, x: Tensor, W: Tensor) -> Tensor:
        y = x @ W.T
        ctx.save_for_backward(x, W, y)
        return y.square()

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor]:
        x, W, y = ctx.saved_tensors
        dy = 2 * y * dy
        return dy @ W, dy.T @ x


class Field(nn.Module):
    """A layer before, an energy, and a layer after whatever `how` makes of the energy."""

    def __init__(self, how: Callable[[Field, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.before, self.after = nn.Linear(4, 4), nn.Linear(4, 4)
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 1)
        self.how = how

    def energy(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))

    def total(self, x: Tensor) -> Tensor:
        return self.energy(x).sum()

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.how(self, self.before(x)))


def by_grad(m: Field, x: Tensor) -> Tensor:
    return torch.autograd.grad(m.total(x), x, create_graph=True)[0]


def by_backward(m: Field, x: Tensor) -> Tensor:
    x.retain_grad()
    m.total(x).backward(create_graph=True)
    assert x.grad is not None
    return x.grad


def by_autograd_backward(m: Field, x: Tensor) -> Tensor:
    x.retain_grad()
    torch.autograd.backward(m.total(x), create_graph=True)
    assert x.grad is not None
    return x.grad


def by_vjp(m: Field, x: Tensor) -> Tensor:
    return torch.func.vjp(m.energy, x)[1](torch.ones(len(x), 1))[0]


WAYS = {
    "autograd.grad": by_grad,
    "Tensor.backward": by_backward,
    "autograd.backward": by_autograd_backward,
    "func.grad": lambda m, x: torch.func.grad(m.total)(x),
    "func.jvp": lambda m, x: x + torch.func.jvp(m.energy, (x,), (torch.ones_like(x),))[1],
    "func.vjp": by_vjp,
    "func.jacrev": lambda m, x: torch.func.jacrev(m.total)(x),
    "vmap of grad": lambda m, x: torch.vmap(torch.func.grad(m.total))(x),
    "two derivatives": lambda m, x: by_grad(m, by_grad(m, x)),
    "penalty": lambda m, x: x + m.energy(x) + by_grad(m, x).square().sum(-1, keepdim=True),
}
GAUSSIAN = {**WHOLE, "likelihood": "gaussian", "fisher": "exact", "lr": 0.0}


def half_square(z: Tensor, y: Tensor) -> Tensor:
    return 0.5 * (z - y).square().sum(1).mean()


@pytest.mark.filterwarnings("ignore:Using backward")
@pytest.mark.parametrize("way", WAYS)
def test_weights_inside_a_derivative_fall_back_and_the_others_keep_their_blocks(way, caplog):
    m, x = Field(WAYS[way]), torch.randn(64, 4)
    o = KFAC(m, **GAUSSIAN)
    with caplog.at_level(logging.INFO, "kfac_triton"):
        train_step(o, m, x, torch.sin(x), half_square)
    expected = {name: "fallback" if name[0] in "ab" and name[1] == "." else "linear" for name in o.coverage()}
    assert o.coverage() == expected
    assert "a.weight (a derivative)" in caplog.text and "after" not in caplog.text
    torch.testing.assert_close(o.factors()["before"]["A"], second_moment(x))


@pytest.mark.filterwarnings("ignore:Using backward")
@pytest.mark.parametrize("way", WAYS)
def test_the_blocks_beside_a_derivative_are_right(way):
    """The layer behind it: its block of the Fisher is exact, since the outputs are linear in it."""
    m, x = Field(WAYS[way]), torch.randn(32, 4)
    o = KFAC(m, **GAUSSIAN)
    train_step(o, m, x, torch.sin(x), half_square)
    inputs: list[Tensor] = []
    m.after.register_forward_hook(lambda _, args, out: inputs.append(args[0].detach()))
    m(x)
    torch.testing.assert_close(o.factors()["after"]["A"], second_moment(inputs[0]))
    torch.testing.assert_close(o.factors()["after"]["G"], torch.eye(4))


@pytest.mark.filterwarnings("ignore:Using backward")
@pytest.mark.parametrize("way", ["Tensor.backward", "autograd.backward"])
def test_a_backward_pass_inside_the_model_leaves_the_gradients_of_the_step(way):
    m, x = Field(WAYS[way]), torch.randn(64, 4)
    o = KFAC(m, **GAUSSIAN)
    half_square(m(x), torch.sin(x)).backward()
    before = {p: (p.grad, p.grad.detach().clone()) for p in m.parameters() if p.grad is not None}
    o.step()
    assert len(before) > 4
    for p, (grad, value) in before.items():
        assert p.grad is grad
        assert torch.equal(grad, value)


def test_outputs_that_are_forces():
    class Force(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.other = mlp(4, 8, 1), mlp(4, 8, 1, seed=1)

        def forward(self, x: Tensor) -> Tensor:
            x = x.detach().requires_grad_()
            energy = self.net(x).sum() + self.other(x).sum()
            return -torch.autograd.grad(energy, x, create_graph=True)[0]

    m, x = Force(), torch.randn(64, 4)
    for form, step in ((KFAC, train_step), (KFAC.paper, closure_step)):
        o = form(m, likelihood="gaussian", compile=False)
        losses = [step(o, m, x, torch.sin(x), half_square) for _ in range(10)]
        assert losses[-1] < losses[0]
        assert set(o.coverage().values()) == {"fallback"}


def test_where_everything_falls_back_it_is_a_warning(caplog):
    m, x = Field(by_grad), torch.randn(64, 4)
    inner = [*m.a.parameters(), *m.b.parameters()]
    o = KFAC(m, inner, **GAUSSIAN)
    with caplog.at_level(logging.WARNING, "kfac_triton"):
        for _ in range(3):
            train_step(o, m, x, torch.sin(x), half_square)
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert all(name in caplog.text for name in ("a.weight", "a.bias", "b.weight"))


def test_a_derivative_that_is_a_constant_hides_nothing():
    """Without create_graph the inner pass is a feature of the input; the weights are used in `energy` alone."""

    def constant(m: Field, x: Tensor) -> Tensor:
        return m.energy(x) + x + torch.autograd.grad(m.total(x), x, retain_graph=True)[0]

    m, x = Field(constant), torch.randn(64, 4)
    for options in ({}, {"fisher": "empirical"}):
        o = KFAC(m, **{**GAUSSIAN, **options})
        train_step(o, m, x, torch.sin(x), half_square)
        assert set(o.coverage().values()) == {"linear"}
        torch.testing.assert_close(o.factors()["before"]["A"], second_moment(x))
        o.close()


def test_the_gradient_of_parameters_inside_the_model():
    """One step of an inner loop (MAML): the first weights are in the derivative, the last layer is not."""

    class Meta(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            (dW,) = torch.autograd.grad(torch.tanh(self.a(x)).square().mean(), self.a.weight, create_graph=True)
            return self.b(torch.tanh(F.linear(x, self.a.weight - 0.1 * dW, self.a.bias)))

    x, y = data()
    m = Meta()
    o = KFAC(m, **WHOLE)
    train_step(o, m, x, y)
    assert o.coverage()["a.weight"] == "fallback" and o.coverage()["b.weight"] == "linear"


@pytest.mark.parametrize("fisher", ["mc", "empirical"])
def test_a_weight_that_a_function_of_ones_own_uses_too(fisher, caplog):
    """`Function.apply` shows no call; without its use the block of the weight would be wrong."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.tanh(self.a(x) + Square.apply(x, self.a.weight)))

    x, y = data()
    m = Twice()
    o = KFAC(m, **{**WHOLE, "fisher": fisher})
    with caplog.at_level(logging.INFO, "kfac_triton"):
        train_step(o, m, x, y)
    assert o.coverage()["a.weight"] == "fallback" and o.coverage()["b.weight"] == "linear"
    assert "SquareBackward, which no function call shows" in caplog.text


def test_a_derivative_that_comes_and_goes():
    """The answer follows the graph: a weight has its block again when the derivative is gone."""

    def sometimes(m: Field, x: Tensor) -> Tensor:
        return by_grad(m, x) if m.on else m.energy(x) + x

    m, x = Field(sometimes), torch.randn(64, 4)
    o = KFAC(m, **GAUSSIAN)
    for m.on, name in ((False, "linear"), (True, "fallback"), (False, "linear"), (True, "fallback")):
        train_step(o, m, x, torch.sin(x), half_square)
        assert o.coverage()["a.weight"] == name


@pytest.mark.parametrize("inside", [False, True], ids=["as it is", "under enable_grad"])
def test_products_of_the_quadratic_model_with_a_derivative(inside):
    """J v of outputs that are gradients, against the dense Jacobian."""

    class Force(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp(3, 4, 1).double()

        def forward(self, x: Tensor) -> Tensor:
            with torch.set_grad_enabled(inside or torch.is_grad_enabled()):
                x = x.detach().requires_grad_()
                return torch.autograd.grad(self.net(x).sum(), x, create_graph=True)[0]

    m, x = Force(), dense.randn(5, 3)
    vs = [{p: dense.randn(*p.shape, seed=i) for p in m.parameters()} for i in range(2)]
    found = FisherProducts(ModuleState(m), as_likelihood("gaussian")).gram([Inputs(m, (x,), {})], vs, seed=0)
    us = []
    for v in vs:
        products = []
        for z in m(x).flatten():
            grads = torch.autograd.grad(
                z, list(m.parameters()), retain_graph=True, allow_unused=True, materialize_grads=True
            )
            products.append(sum((g * v[p]).sum() for g, p in zip(grads, m.parameters(), strict=True)))
        us.append(torch.stack(products))
    expected = torch.stack([torch.stack([u @ w for w in us]) for u in us]) / len(x)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-8, atol=1e-10)


# ---------------------------------------------------------------------------------------- classes on an axis of images


class Shaped(nn.Module):
    """A linear layer over the input's axis 1, whose outputs `shape` brings into form."""

    def __init__(self, outputs: int, shape: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.f, self.shape = nn.LazyLinear(outputs), shape

    def forward(self, x: Tensor) -> Tensor:
        return self.shape(self.f(x.movedim(1, -1).float()))


IMAGES = {
    "images": ((4, 3, 6, 6), lambda z: z.movedim(-1, 1), 5),
    "as many channels as classes": ((4, 3, 6, 6), lambda z: z.movedim(-1, 1), 3),
    "strides": ((4, 3, 6, 6), lambda z: z.movedim(-1, 1)[..., ::2, ::2], 5),
    "volumes": ((4, 2, 3, 4, 5), lambda z: z.movedim(-1, 1), 5),
}
CLASSES_LAST = {
    "pixels last": ((4, 6, 6, 3), lambda z: z.movedim(1, 2), 5),
    "sequences": ((4, 7, 5), lambda z: z, 6),
    "several codes a position": ((4, 2, 7), lambda z: z.unsqueeze(-1).expand(4, 7, 6, 3), 6),
}


@pytest.mark.parametrize("case", IMAGES)
@pytest.mark.parametrize("fisher", ["mc", "empirical"])
def test_a_softmax_over_the_columns_of_images_is_named(case, fisher, caplog):
    shape, form, outputs = IMAGES[case]
    m, x = Shaped(outputs, form), torch.randn(shape)
    z = m(x)
    o = KFAC(m, **{**WHOLE, "fisher": fisher})
    with caplog.at_level(logging.WARNING, "kfac_triton"):
        for _ in range(3):
            o.zero_grad()
            F.cross_entropy(m(x), z.argmax(1)).backward()
            o.step()
    assert [r.message for r in caplog.records if "Categorical(dim=1)" in r.message] == [caplog.messages[0]]


@pytest.mark.parametrize("case", [*CLASSES_LAST, *IMAGES])
def test_a_softmax_over_classes_is_not(case, caplog):
    """Where an input shows that the classes are last, and where the axis is named."""
    from kfac_triton import Categorical

    shape, form, outputs = {**CLASSES_LAST, **IMAGES}[case]
    m, x = Shaped(outputs, form), torch.randn(shape)
    if case == "pixels last":
        m = nn.Linear(3, 5)
    elif case == "several codes a position":
        m, x = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 6)), torch.randint(9, (4, 7, 2))
    dim = 1 if case in IMAGES else -1
    m(x)
    o = KFAC(m, **{**WHOLE, "likelihood": Categorical(dim=dim)})
    with caplog.at_level(logging.WARNING, "kfac_triton"):
        o.zero_grad()
        m(x).square().mean().backward()
        o.step()
    assert not caplog.messages
