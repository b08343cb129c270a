"""What a pass with tangents refuses, and what is constant in it."""

from __future__ import annotations

import copy
import gc
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import dense
import pytest
import torch
import torch.nn.functional as F
from tangent_cases import F64, K, by_rules, directions
from torch import Tensor, nn

from kfac_triton.capture.tangents import moving


class Applied(nn.Module):
    """A function of the outputs h of a linear layer."""

    def __init__(self, function: Callable[[Tensor], Any], d: int = 4) -> None:
        super().__init__()
        self.layer, self.function = nn.Linear(3, d), function

    def forward(self, x: Tensor) -> Any:
        return self.function(self.layer(x))


def refused(model: nn.Module, x: Tensor | None = None, match: str = "") -> None:
    with pytest.raises((NotImplementedError, RuntimeError), match=match):
        by_rules(model.double(), dense.randn(5, 3) if x is None else x, directions(model.double()))
    assert not any(name.startswith("_kfac") for p in model.parameters() for name in vars(p))
    assert torch.is_grad_enabled() and torch.is_autocast_cache_enabled()


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
    "complex numbers": lambda h: torch.tanh(h * 1j + 1).to(F64),
    "a cast to complex numbers": lambda h: h.to(torch.complex128).abs(),
    "a view of another dtype": lambda h: h.half().view(torch.bfloat16),
    "a write to a view": lambda h: (h[0].mul_(2), h)[1],
    "a write beside a view": lambda h: (lambda v: (h.mul_(2), v)[1])(h[0]),
    "a write by an index": lambda h: (h.__setitem__(0, 0.0), h)[1],
    "a write to a constant": lambda h: torch.zeros(5, 4, dtype=F64).add_(h),
    "a copy into a constant": lambda h: torch.zeros(5, 4, dtype=F64).copy_(h),
    "zeroing": lambda h: (h.zero_(), h)[1],
    "a moving bound": lambda h: h.clamp(h.mean()),
    "a moving bound by name": lambda h: h.clamp(min=h.mean()),
    "a moving average": lambda h: F.batch_norm(h.detach(), h.mean(0), torch.ones(4, dtype=F64)),
    "a hook": lambda h: (h.register_hook(lambda g: 2 * g), h)[1],
    "a subclass": lambda h: h * torch.ones(4, dtype=F64).as_subclass(Squares),
}


class Squares(Tensor):
    """Every function of it is the square of the plain one."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return super().__torch_function__(func, types, args, kwargs).as_subclass(Tensor) ** 2


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


def test_a_tensor_kept_from_an_earlier_pass_may_have_been_detached():
    kept: list[Tensor] = []

    def function(h: Tensor) -> Tensor:
        kept.append(h)
        return kept[0] * 2 if len(kept) > 1 else h

    model, x = Applied(function).double(), dense.randn(5, 3)
    ds = directions(model)
    by_rules(model, x, ds)
    kept[0].requires_grad_(False)
    assert not by_rules(model, x, ds)[1].any()


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


def test_outputs_that_do_not_move_have_zeros():
    z, dz = by_rules(Applied(lambda h: h.detach() * 2).double(), dense.randn(5, 3), directions(Applied(abs).double()))
    assert dz.shape == (K, *z.shape) and not dz.any()


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
