"""Exact Fisher products and the quadratic model, against dense Jacobians and theory (E16, E17)."""

from __future__ import annotations

import math

import dense
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from kfac_triton.capture import Inputs, ModuleState, Unrolled, bare_pass
from kfac_triton.likelihoods import as_likelihood
from kfac_triton.steps import quadratic
from kfac_triton.steps.minimum import minimise, promised, within
from kfac_triton.steps.quadratic import FisherProducts

F64 = torch.float64


class Tied(nn.Module):
    """One weight for two layers, used as it is and transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(x)) @ self.inner.weight


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x, need_weights=False)[0])


class Fused(nn.Module):
    """scaled_dot_product_attention, whose fused kernels have no forward-mode derivative."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(4, 12)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).chunk(3, dim=-1)
        return nn.functional.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]


class Cube(torch.autograd.Function):
    """Without a forward-mode derivative, and twice differentiable backwards."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**3

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, dy: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * dy


class Cubic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return Cube.apply(self.layer(x))


MODELS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), (5, 3)),
    "convolution": (
        lambda: nn.Sequential(nn.Conv2d(1, 2, 2, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3)), (4, 1, 4, 4)
    ),
    "batch norm": (lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)), (6, 3)),
    "layer norm": (lambda: nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)), (5, 3)),
    "dropout": (lambda: nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 2)), (5, 3)),
    "embedding": (lambda: nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(6, 2)), None),
    "tied": (Tied, (5, 3)),
    "attention": (Attention, (2, 3, 4)),
    "fused attention": (Fused, (2, 3, 4)),
    "lstm": (lambda: nn.Sequential(nn.LSTM(3, 2), Last()), (2, 3)),
    "no forward mode": (Cubic, (4, 3)),
}  # fmt: skip


class Last(nn.Module):
    def forward(self, returned: tuple) -> Tensor:
        return returned[0]


def model_and_inputs(name: str) -> tuple[nn.Module, Tensor]:
    build, shape = MODELS[name]
    torch.manual_seed(0)
    x = torch.tensor([[0, 3], [4, 4], [1, 0]]) if shape is None else dense.randn(*shape)
    return build().double(), x


def directions(model: nn.Module, k: int = 2) -> list[dict[nn.Parameter, Tensor]]:
    return [{p: dense.randn(*p.shape, seed=10 * i + j) for j, p in enumerate(model.parameters())} for i in range(k)]


def products(model: nn.Module, likelihood: str = "gaussian", **options) -> FisherProducts:
    return FisherProducts(ModuleState(model), as_likelihood(likelihood), **options)


def kept(model: nn.Module, *xs: Tensor) -> list[Inputs]:
    return [Inputs(model, (x,), {}) for x in xs]


@pytest.mark.parametrize("likelihood", dense.LIKELIHOODS)
@pytest.mark.parametrize("name", MODELS)
def test_products_are_those_of_the_dense_fisher(name, likelihood):
    model, x = model_and_inputs(name)
    buffers, stream = [b.clone() for b in model.buffers()], torch.get_rng_state()
    vs = directions(model)
    F = products(model, likelihood).gram(kept(model, x), vs, seed=0)
    dense.assert_exact(F, dense.gram(model, x, vs, likelihood))
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), buffers, strict=True))
    assert torch.equal(torch.get_rng_state(), stream)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("way", range(4))
@pytest.mark.parametrize("name", ["mlp", "convolution", "batch norm", "dropout"])
def test_every_way_gives_the_same(name, way):
    model, x = model_and_inputs(name)
    found = products(model, "categorical")
    found._way = way
    vs = directions(model, 3)
    dense.assert_exact(found.gram(kept(model, x), vs, seed=0), dense.gram(model, x, vs, "categorical"))
    assert found._way == way


def test_the_ways_that_fail_are_left():
    model, x = model_and_inputs("no forward mode")
    found = products(model)
    found.gram(kept(model, x), directions(model), seed=0)
    assert quadratic.WAYS[found._way] is quadratic._by_double_backward
    easy, y = model_and_inputs("mlp")
    found = products(easy)
    found.gram(kept(easy, y), directions(easy), seed=0)
    assert found._way == 0


def test_batches_are_weighted_by_their_terms():
    model, _ = model_and_inputs("mlp")
    x, y = dense.randn(5, 3, seed=1), dense.randn(2, 3, seed=2)
    vs = directions(model)
    F = products(model).gram(kept(model, x, y), vs, seed=0)
    dense.assert_exact(F, dense.gram(model, torch.cat([x, y]), vs, "gaussian"))


def test_terms_that_do_not_count_are_left_out():
    model, _ = model_and_inputs("mlp")
    x = dense.randn(5, 3)
    vs = directions(model)
    mask = lambda inputs, outputs: torch.tensor([True, False, True, True, False])  # noqa: E731
    F = products(model, mask=mask).gram(kept(model, x), vs, seed=0)
    dense.assert_exact(F, dense.gram(model, x[[0, 2, 3]], vs, "gaussian"))


def test_a_parameter_that_a_direction_leaves_out_stands_still():
    model, x = model_and_inputs("mlp")
    whole = directions(model, 2)
    part = {p: v for p, v in whole[0].items() if p.dim() == 2}
    F = products(model).gram(kept(model, x), [part, whole[1]], seed=0)
    zeros = {p: part.get(p, torch.zeros_like(p)) for p in whole[0]}
    dense.assert_exact(F, dense.gram(model, x, [zeros, whole[1]], "gaussian"))


def test_outputs_named_by_the_user():
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> tuple[str, Tensor]:
            return "z", self.layer(x)

    torch.manual_seed(0)
    model, x = Pair().double(), dense.randn(5, 3)
    vs = directions(model)
    F = products(model, output=lambda r: r[1]).gram(kept(model, x), vs, seed=0)
    plain = [{p: v for p, v in zip(model.layer.parameters(), d.values(), strict=True)} for d in vs]
    dense.assert_exact(F, dense.gram(model.layer, x, plain, "gaussian"))


def test_the_masks_of_dropout_are_those_of_the_users_pass():
    model, x = model_and_inputs("dropout")
    vs, state = directions(model), ModuleState(model)
    torch.manual_seed(7)
    opening = state.opening()
    drawn = torch.rand(3)
    F = products(model).gram(kept(model, x), vs, opening)
    dense.assert_exact(F, dense.gram(model, x, vs, "gaussian", seed=7))
    other = products(model).gram(kept(model, x), vs, seed=8)
    assert dense.relative_error(other, F) > dense.DIFFERENT
    with bare_pass(state, kept(model, x)[0], opening) as replay:
        replay.start()
        assert torch.equal(torch.rand(3), drawn)


@pytest.mark.parametrize("mask", [None, "bool", "float", "empty row"])
@pytest.mark.parametrize("options", [{}, {"scale": 0.3}, {"dropout_p": 0.5}, {"enable_gqa": True}, {"is_causal": True}])
def test_attention_without_fused_kernels_is_attention(mask, options):
    q, k = dense.randn(2, 4, 5, 8), dense.randn(2, 2 if "enable_gqa" in options else 4, 5, 8, seed=1)
    allowed = dense.randn(2, 1, 5, 5) > 0
    allowed[..., 0] = True
    if mask == "empty row":
        allowed[0, 0, 1] = False
    m = allowed if mask != "float" else dense.randn(2, 1, 5, 5)
    m = None if mask is None or "is_causal" in options else m  # torch takes one or the other
    found = []
    for how in (Unrolled(), sdpa_kernel(SDPBackend.MATH)):
        torch.manual_seed(3)
        with how:
            found.append(nn.functional.scaled_dot_product_attention(q, k, k, attn_mask=m, **options))
    assert torch.equal(*found)


# E17: the model's minimum.


def spd(k: int, seed: int = 0) -> Tensor:
    X = dense.randn(3 * k, k, seed=seed)
    return X.T @ X


@pytest.mark.parametrize("k", [1, 2])
def test_the_minimum_is_half_the_gradient_along_it(k):
    H, b = spd(k).numpy(), dense.randn(k).numpy()
    w = minimise(H, b, [None] * k)
    M = promised(w, H, b)
    np.testing.assert_allclose(w, -np.linalg.solve(H, b), rtol=1e-12)
    assert math.isclose(M, b @ w / 2, rel_tol=1e-12)


@pytest.mark.parametrize(
    "fixed", [[0.3, None], [None, -2.0], [None, 0.5, None], [None, None, 1.0], [0.1, None, 1.0], [0.1, 0.2]], ids=str
)
def test_fixed_coefficients_stay_and_the_others_are_stationary(fixed):
    k = len(fixed)
    H, b = spd(k).numpy(), dense.randn(k).numpy()
    w = minimise(H, b, fixed)
    gradient = H @ w + b
    for value, coefficient, slope in zip(fixed, w, gradient, strict=True):
        assert coefficient == value if value is not None else abs(slope) < 1e-12
    assert math.isclose(promised(w, H, b), w @ H @ w / 2 + b @ w, rel_tol=1e-12)


@pytest.mark.parametrize("scale", [1.0, 1e-8])
def test_directions_that_depend_on_each_other(scale):
    """v_2 = scale v_1: any split reaches the minimum; and none explodes."""
    v = np.array([1.0, scale])
    H, b = 4 * np.outer(v, v), 2 * v
    w = minimise(H, b, [None, None])
    assert math.isclose(promised(w, H, b), -0.5, rel_tol=1e-12)
    assert math.isclose(v @ w, -0.5, rel_tol=1e-12)
    assert np.abs(w).max() <= 1 / scale


def test_a_direction_that_vanishes_gets_nothing():
    """delta_0 in the first step."""
    w = minimise(np.diag([4.0, 0.0]), np.array([2.0, 0.0]), [None, None])
    assert w.tolist() == [-0.5, 0.0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_model_that_is_not_finite_has_no_minimum(bad):
    assert np.isnan(minimise(np.full((2, 2), bad), np.ones(2), [None, None])).all()


@pytest.mark.parametrize("most", [1e-9, 0.1, 0.9, 1.1])
def test_no_more_reduction_is_promised_than_there_is_height(most):
    H, b = spd(2).numpy(), dense.randn(2).numpy()
    w = minimise(H, b, [None, None])
    height = most * -promised(w, H, b)
    short = within(w, H, b, height)
    reduction = -(short @ H @ short / 2 + b @ short)
    if most > 1:
        assert np.array_equal(short, w)
    else:
        assert math.isclose(reduction, height, rel_tol=1e-8)
        share = short / w
        assert math.isclose(share[0], share[1], rel_tol=1e-12)
        assert 0 < share[0] < 1


def test_a_part_of_the_batch_for_the_products():
    """A quarter of 600 examples from a moving place, and no fewer than 128 of them."""
    model, _ = model_and_inputs("mlp")
    x, vs = dense.randn(600, 3), directions(model)
    part = products(model, fraction=0.25)
    dense.assert_exact(part.gram(kept(model, x), vs, 0, update=2), dense.gram(model, x[300:450], vs, "gaussian"))
    dense.assert_exact(part.gram(kept(model, x[:200]), vs, 0), dense.gram(model, x[:128], vs, "gaussian"))
    dense.assert_exact(part.gram(kept(model, x[:100]), vs, 0), dense.gram(model, x[:100], vs, "gaussian"))


# Products by two backward passes, where torch leaves a part out in silence.


class Once(torch.autograd.Function):
    """tanh with a backward pass that can't be differentiated, and says so only where the gradient is needed."""

    @staticmethod
    def forward(ctx, x):
        y = torch.tanh(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (y,) = ctx.saved_tensors
        return grad * (1 - y * y)


class Unfollowed(Once):
    """A backward pass that autograd does not follow, as those of fused kernels."""

    @staticmethod
    def backward(ctx, grad):
        (y,) = ctx.saved_tensors
        return (grad.detach() * (1 - y * y)).detach()


@pytest.mark.parametrize("function", [Once, Unfollowed, None])
def test_a_second_derivative_that_torch_leaves_out_is_noticed(function):
    """By <u, J v> = <J^T u, v> with random u, so nearly always; and never where the products are right."""
    torch.manual_seed(0)
    x = torch.randn(64, 6)
    values = (torch.randn(8, 6), torch.randn(3, 8))

    def outputs(moving: tuple[Tensor, ...]) -> Tensor:
        h = x @ moving[0].T
        return (torch.tanh(h) if function is None else function.apply(h)) @ moving[1].T

    refused = 0
    for _ in range(50):
        direction = tuple(torch.randn_like(value) for value in values)
        try:
            quadratic._by_double_backward(lambda: outputs, values, [d[None] for d in direction])
        except NotImplementedError:
            refused += 1
    assert refused == 0 if function is None else refused > 45
