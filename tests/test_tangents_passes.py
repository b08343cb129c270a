"""Passes of whole networks with tangents: right, or refused; and what they cost."""

from __future__ import annotations

import copy
import gc
import sys
import threading
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import dense
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from kfac_triton import quadratic
from kfac_triton.capture import Inputs, ModuleState
from kfac_triton.capture.tangents import moving
from kfac_triton.likelihoods import as_likelihood
from kfac_triton.quadratic import FisherProducts

F64 = torch.float64
K = 2


class Applied(nn.Module):
    """A function of the outputs h of a linear layer."""

    def __init__(self, function: Callable[[Tensor], Any], d: int = 4) -> None:
        super().__init__()
        self.layer, self.function = nn.Linear(3, d), function

    def forward(self, x: Tensor) -> Any:
        return self.function(self.layer(x))


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


def directions(model: nn.Module, k: int = K) -> list[Tensor]:
    return [dense.randn(k, *p.shape, seed=i).to(p.dtype) for i, p in enumerate(model.parameters())]


def by_rules(model: nn.Module, x: Tensor, ds: list[Tensor]) -> tuple[Tensor, Tensor]:
    with torch.no_grad(), moving(list(model.parameters()), ds) as tangents:
        z = model(x)
        return z.detach(), tangents.of(z)


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


def refused(model: nn.Module, x: Tensor | None = None, match: str = "") -> None:
    with pytest.raises((NotImplementedError, RuntimeError), match=match):
        by_rules(model.double(), dense.randn(5, 3) if x is None else x, directions(model.double()))
    assert not any(name.startswith("_kfac") for p in model.parameters() for name in vars(p))
    assert torch.is_grad_enabled() and torch.is_autocast_cache_enabled()


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


def test_outputs_that_do_not_move_have_zeros():
    z, dz = by_rules(Applied(lambda h: h.detach() * 2).double(), dense.randn(5, 3), directions(Applied(abs).double()))
    assert dz.shape == (K, *z.shape) and not dz.any()


# What is refused.


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, g):
        return g * 2


REFUSED: dict[str, Callable[[Tensor], Any]] = {
    "an unknown function": lambda h: torch.fft.rfft(h).abs(),
    "an unknown method": lambda h: h.renorm(2, 0, 1.0),
    "an operator by its own name": lambda h: torch.ops.aten.tanh(h),
    "data": lambda h: h.data * h,
    "item": lambda h: h * h.sum().item(),
    "tolist": lambda h: torch.tensor(h.tolist()) * h.sum(),
    "numpy": lambda h: torch.from_numpy(h.numpy()) * h.sum(),
    "array": lambda h: h * float(__import__("numpy").asarray(h)[0, 0]),
    "float": lambda h: h * float(h[0, 0]),
    "bool": lambda h: h if h.sum() else -h,
    "data_ptr": lambda h: h * h.data_ptr(),
    "grad_fn": lambda h: h if h.grad_fn is None else -h,
    "a copy": lambda h: h + copy.deepcopy(h),
    "a new tensor": lambda h: h * torch.tensor([h[0, 0], 1.0, 1.0, 1.0]),
    "an autograd function": lambda h: torch.tanh(Double.apply(h)),
    "an autograd function, last": lambda h: Double.apply(h),
    "a scripted function": lambda h: scripted(h) + 1,
    "a scripted function, last": lambda h: scripted(h),
    "without function modes": lambda h: unseen(h) + 1,
    "another thread": lambda h: threaded(h) + 1,
    "a derivative": lambda h: torch.autograd.grad(h.sum(), h)[0],
    "a result given": lambda h: torch.sin(h, out=torch.empty(5, 4, dtype=F64)),
    "complex numbers": lambda h: (h * 1j).abs(),
    "a cast to complex numbers": lambda h: h.to(torch.complex128).abs(),
    "a view of another dtype": lambda h: h.view(torch.int64).double(),
    "a write to a view": lambda h: (h[0].mul_(2), h)[1],
    "a write beside a view": lambda h: (lambda v: (h.mul_(2), v)[1])(h[0]),
    "a write by an index": lambda h: (h.__setitem__(0, 0.0), h)[1],
    "a write to a constant": lambda h: torch.zeros(5, 4, dtype=F64).add_(h),
    "a copy into a constant": lambda h: torch.zeros(5, 4, dtype=F64).copy_(h),
    "zeroing": lambda h: (h.zero_(), h)[1],
    "a moving bound": lambda h: h.clamp(min=h.mean()),
    "a hook": lambda h: (h.register_hook(lambda g: 2 * g), h)[1],
    "a subclass": lambda h: h * torch.ones(4, dtype=F64).as_subclass(Sub),
}


class Sub(Tensor):
    pass


with warnings.catch_warnings():
    warnings.simplefilter("ignore")

    @torch.jit.script
    def scripted(h: Tensor) -> Tensor:
        return torch.tanh(h)


def unseen(h: Tensor) -> Tensor:
    with torch._C.DisableTorchFunction():
        return torch.tanh(h)


def threaded(h: Tensor) -> Tensor:
    results: list[Tensor] = []
    thread = threading.Thread(target=lambda: results.append(torch.tanh(h)))
    thread.start()
    thread.join()
    return results[0]


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_followed_is_refused(name):
    refused(Applied(REFUSED[name]))


def test_a_write_to_a_parameter_is_refused():
    model = Applied(lambda h: h)
    model.function = lambda h: h + model.layer.bias.mul_(1.0)
    refused(model, match="writes")


def test_a_parameter_of_another_kind_is_refused():
    model = nn.Linear(3, 2).double()
    model.weight.requires_grad_(False)
    with pytest.raises(NotImplementedError), moving(list(model.parameters()), directions(model)):
        pass


# What is constant in a backward pass is so here.


def test_nothing_moves_where_gradients_are_disabled():
    def function(h: Tensor) -> Tensor:
        with torch.no_grad():
            scale = torch.tanh(h)
        with torch.no_grad(), torch.enable_grad():
            again = h * 3
        return h * scale + again

    torch.manual_seed(0)
    model, x = Applied(function).double(), dense.randn(5, 3)
    ds = directions(model)
    h, dh = by_rules(model.layer, x, ds)
    torch.testing.assert_close(by_rules(model, x, ds)[1], dh * torch.tanh(h) + 3 * dh)


def test_tensors_that_move_require_gradients():
    model = Applied(lambda h: h * 2 if h.requires_grad and torch.is_grad_enabled() else h).double()
    x, ds = dense.randn(5, 3), directions(Applied(abs).double())
    assert torch.equal(by_rules(model, x, ds)[1], 2 * by_rules(model.layer, x, ds)[1])


def test_what_a_model_keeps_from_an_earlier_pass_is_a_constant():
    kept: list[Tensor] = []

    def function(h: Tensor) -> Tensor:
        kept.append(h)
        return h + kept[0]

    model, x = Applied(function).double(), dense.randn(5, 3)
    ds = directions(model)
    first, second = by_rules(model, x, ds)[1], by_rules(model, x, ds)[1]
    torch.testing.assert_close(first, 2 * second)


def test_tangents_go_when_their_tensors_go():
    """A pass holds no more than the model's own forward pass does."""
    alive: list[int] = []
    references: list[weakref.ref] = []

    def function(h: Tensor) -> Tensor:
        for _ in range(5):
            h = torch.tanh(h)
            references.append(weakref.ref(h._kfac_tangents))
            alive.append(sum(one() is not None for one in references))
        return h

    gc.disable()
    try:
        by_rules(Applied(function).double(), dense.randn(5, 3), directions(Applied(abs).double()))
    finally:
        gc.enable()
    assert max(alive) <= 2


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


def test_autocast_keeps_no_cast_of_a_tensor_that_is_written_to():
    weight = torch.randn(4, 4)

    def function(h: Tensor) -> Tensor:
        h = h.float() * 1.0
        before = F.linear(h, weight)
        h.mul_(2)
        return torch.stack([before, F.linear(h, weight)])

    torch.manual_seed(0)
    model = Applied(function)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for one in by_rules(model, torch.randn(5, 3), directions(model)):
            once, twice = one.unbind(-3)
            assert torch.equal(2 * once, twice)


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
