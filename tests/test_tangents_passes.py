"""Passes of whole networks with tangents: right, or refused; and what they cost."""

from __future__ import annotations

import copy
import gc
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import dense
import pytest
import torch
import torch.nn.functional as F
from tangent_cases import K, by_rules, directions
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from kfac_triton.capture import Inputs, ModuleState, bare_pass
from kfac_triton.capture.tangents import moving
from kfac_triton.likelihoods import as_likelihood
from kfac_triton.steps import quadratic
from kfac_triton.steps.quadratic import FisherProducts


class Residual(nn.Module):
    """Convolutions with batch normalisation, additions and relus in place."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Conv2d(3, 3, 3, padding=1, bias=False) for _ in range(2))
        self.norms, self.head = nn.ModuleList([nn.BatchNorm2d(3) for _ in range(2)]), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norms[0](self.a(x)), inplace=True)
        h = self.norms[1](self.b(h))
        h += x
        h = nn.ReLU(inplace=True)(h)
        return self.head(F.adaptive_avg_pool2d(F.max_pool2d(h, 2), 1).flatten(1))


class Block(nn.Module):
    """A block of a language model: learned positions, packed projections, tied weights of its words."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(7, 8), nn.Embedding(5, 8)
        self.first, self.second = nn.LayerNorm(8), nn.LayerNorm(8)
        self.project, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, words: Tensor) -> Tensor:
        B, T = words.size()
        x = self.words(words) + self.places(torch.arange(T, device=words.device))
        q, k, v = (t.view(B, T, 2, 4).transpose(1, 2) for t in self.project(self.first(x)).split(8, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).contiguous().view(B, T, 8))
        x = x + self.down(F.gelu(self.up(self.second(x))))
        return x @ self.words.weight.t()


class Cast(nn.Module):
    """Weights through views, casts and slices."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.unused = nn.Parameter(torch.randn(6, 3)), nn.Parameter(torch.randn(2))

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        return torch.tanh(x @ w[:4].t()) @ w[2:].to(w.dtype).view(4, 3) + F.linear(x, w[None][0, 3:], w.mean(1)[:3])


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), dense.randn(5, 3)),
    "cnn": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 2)
        ),
        dense.randn(5, 3, 6, 6),
    ),
    "cnn in evaluation": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.GELU(), nn.AdaptiveAvgPool2d(1)).eval(),
        dense.randn(5, 3, 6, 6),
    ),
    "encoder": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), dense.randn(3, 4, 8)
    ),
    "encoder in evaluation": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True).eval(), dense.randn(3, 4, 8)
    ),
    "attention with weights": (
        lambda: Wrapped(nn.MultiheadAttention(8, 2, add_bias_kv=True), lambda m, x: m(x, x, x)[0]), dense.randn(4, 3, 8)
    ),
    "block": (Block, torch.randint(7, (2, 5), generator=torch.Generator().manual_seed(0))),
    "residual": (Residual, dense.randn(4, 3, 4, 4)),
    "casts": (Cast, dense.randn(5, 3)),
    "lstm": (lambda: Wrapped(nn.LSTM(3, 4, 2, bidirectional=True), lambda m, x: m(x)[0]), dense.randn(4, 2, 3)),
    "gru": (lambda: Wrapped(nn.GRU(3, 4, batch_first=True), lambda m, x: m(x)[1]), dense.randn(4, 2, 3)),
    "norms": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.RMSNorm(4), nn.SiLU(), nn.GroupNorm(2, 4), nn.LogSoftmax(-1)),
        dense.randn(5, 3),
    ),
    "checkpoints": (
        lambda: Wrapped(nn.Linear(3, 3), lambda m, x: checkpoint(m, torch.sin(m(x)), use_reentrant=False)),
        dense.randn(5, 3),
    ),
}  # fmt: skip


class Wrapped(nn.Module):
    def __init__(self, inner: nn.Module, call: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.call = inner, call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.inner, x)


def by_torch(model: nn.Module, x: Tensor, ds: list[Tensor]) -> tuple[Tensor, Tensor]:
    names = [name for name, _ in model.named_parameters()]
    values = {name: p.detach() for name, p in model.named_parameters()}
    us = []
    with sdpa_kernel(SDPBackend.MATH), without_fast_path():
        for i in range(K):
            v = {name: d[i] for name, d in zip(names, ds, strict=True)}
            z, u = jvp(lambda values: functional_call(copy.deepcopy(model), values, (x,)), (values,), (v,))
            us.append(u)
    return z, torch.stack(us)


@contextmanager
def without_fast_path() -> Iterator[None]:
    """Fused layers, which evaluation takes, have no forward-mode derivative."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@pytest.mark.parametrize("name", NETWORKS)
def test_tangents_of_networks(name):
    build, x = NETWORKS[name]
    torch.manual_seed(0)
    model = build().double()
    if model.training:
        quadratic.use_batch_statistics(model.modules())
    ds = directions(model)
    expected = by_torch(model, x, ds)
    for found, one in zip(by_rules(model, x, ds), expected, strict=True):
        torch.testing.assert_close(found, one, rtol=1e-9, atol=1e-10)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_a_parameter_that_does_not_move_is_a_constant():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, ds = dense.randn(5, 3), directions(model)
    with torch.no_grad(), moving([model[2].weight], ds[2:3]) as tangents:
        found = tangents.of(model(x))
    still = [d if i == 2 else torch.zeros_like(d) for i, d in enumerate(ds)]
    torch.testing.assert_close(found, by_torch(model, x, still)[1])


@pytest.mark.parametrize("name", ["mlp", "cnn", "block", "residual", "encoder"])
def test_products_under_autocast(name):
    build, x = NETWORKS[name]
    torch.manual_seed(0)
    model = build()
    x = x.float() if x.is_floating_point() else x
    ds = directions(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z, dz = by_rules(model, x, ds)
    model = copy.deepcopy(model).double()
    exact = by_rules(model, x.double() if x.is_floating_point() else x, [d.double() for d in ds])[1]
    assert dz.dtype == z.dtype
    assert float((dz.double() - exact).norm() / exact.norm()) < 0.05


# Cost.


class Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def python_calls(run: Callable[[], Any]) -> Counter[str]:
    calls: Counter[str] = Counter()

    def note(frame: Any, event: str, argument: Any) -> None:
        if event == "call":
            calls[frame.f_code.co_qualname] += 1

    run()
    gc.collect()
    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
    return calls


def layers(n: int) -> tuple[nn.Module, Tensor, list[Tensor]]:
    model = nn.Sequential(*(m for _ in range(n) for m in (nn.Linear(16, 16), nn.Tanh())))
    ds = directions(model)
    return model, torch.randn(32, 16), ds


def test_a_layer_of_a_pass_costs_few_operators_and_python_calls():
    counts = []
    for n in (8, 24):
        model, x, ds = layers(n)
        with Operators() as operators:
            by_rules(model, x, ds)
        parameters = list(model.parameters())

        def run(model=model, x=x, ds=ds, parameters=parameters) -> None:
            with torch.no_grad(), moving(parameters, ds) as tangents:
                tangents.of(model(x))

        counts.append((operators.count, python_calls(run).total()))
    (few, calls), (more, more_calls) = counts
    assert (more - few) / 16 <= 10
    assert (more_calls - calls) / 16 <= 15
    assert more_calls - 24 * (more_calls - calls) / 16 <= 50


def test_products_cost_few_python_calls_beside_the_surroundings_of_the_pass():
    def calls_of(n: int) -> int:
        model, x, ds = layers(n)
        products = FisherProducts(ModuleState(model), as_likelihood("gaussian"))
        (inputs,), parameters = [Inputs(model, (x,), {})], list(model.parameters())

        def surroundings() -> None:
            with bare_pass(products.state, inputs, 0) as replay:
                replay.start(inputs.args, inputs.kwargs)

        products.state.draws = True  # so that no mode looks for the first draw
        whole = python_calls(lambda: products.stacked_gram([inputs], parameters, ds, 0))
        return whole.total() - python_calls(surroundings).total()

    few, many = calls_of(8), calls_of(24)
    assert (many - few) / 16 <= 15
    assert many - 24 * (many - few) / 16 <= 100


def test_the_module_runs_with_its_own_parameters():
    """And FisherProducts takes directions as they are stacked."""
    model, x, ds = layers(3)
    products = FisherProducts(ModuleState(model), as_likelihood("gaussian"))
    kept, parameters = [Inputs(model, (x,), {})], list(model.parameters())
    found = products.stacked_gram(kept, parameters, ds, 0)
    assert quadratic.WAYS[products._way] is quadratic._by_rules
    apart = [{p: d[i] for p, d in zip(parameters, ds, strict=True)} for i in range(K)]
    torch.testing.assert_close(found, products.gram(kept, apart, 0))
    calls = python_calls(lambda: products.stacked_gram(kept, parameters, ds, 0))
    assert not any("functional_call" in name for name in calls)
