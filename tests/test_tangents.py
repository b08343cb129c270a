"""The tangents of every function with a rule, and of whole networks, against torch's forward mode in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import dense
import pytest
import torch
import torch.nn.functional as F
from tangent_cases import CASES, MASK, M, V
from torch import Tensor, nn
from torch.func import jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from kfac_triton.capture.tangents import Tangents, moving
from kfac_triton.tangents import RULES

F64 = torch.float64
K = 3


def leaves(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for one in value for t in leaves(one)]


def by_rules(function: Callable[..., Any], xs: list[Tensor], ds: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """(z, dz) of every tensor that the function returns."""
    parameters = [nn.Parameter(x) for x in xs]
    with torch.no_grad(), moving(parameters, ds) as tangents:
        zs = leaves(function(*parameters))
        found = [(z.detach(), tangents.of(z)) for z in zs]
    assert not any(name.startswith("_kfac") for p in parameters for name in vars(p))
    return found


def by_torch(function: Callable[..., Any], xs: list[Tensor], ds: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    zs, each = [], []
    for i in range(K):
        with sdpa_kernel(SDPBackend.MATH):  # others have no forward-mode derivative
            zs, us = jvp(lambda *p: tuple(leaves(function(*p))), tuple(xs), tuple(d[i] for d in ds))
        each.append(us)
    return [(z, torch.stack(us)) for z, us in zip(zs, zip(*each, strict=True), strict=True)]


def assert_the_same(found: list[tuple[Tensor, Tensor]], expected: list[tuple[Tensor, Tensor]]) -> None:
    assert len(found) == len(expected)
    for pair, other in zip(found, expected, strict=True):
        for one, two in zip(pair, other, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-10)


def drawn(shapes: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Arguments, and directions as strided views of one buffer."""
    xs = [dense.randn(*shape, seed=i) for i, shape in enumerate(shapes)]
    sizes = [x.numel() for x in xs]
    buffer = dense.randn(K, sum(sizes), seed=9)
    return xs, [part.view(K, *x.shape) for part, x in zip(buffer.split(sizes, 1), xs, strict=True)]


@pytest.mark.parametrize("name", CASES)
def test_tangents_of_a_function(name):
    function, shapes = CASES[name]
    xs, ds = drawn(shapes)
    assert_the_same(by_rules(function, xs, ds), by_torch(function, xs, ds))


ARGUMENTS = {
    "clamp_": (-0.5, 0.5), "clip_": (-0.5, 0.5), "clamp_min_": (0.1,), "clamp_max_": (0.1,), "pow_": (2,),
    "masked_fill_": (MASK, 2.0), "leaky_relu_": (0.2,),
}  # fmt: skip
WRITTEN = sorted({f.__name__ for f in RULES if f.__name__[-1] == "_" != f.__name__[0] and "dropout" not in f.__name__})


@pytest.mark.parametrize("name", WRITTEN)
def test_tangents_of_a_function_in_place(name):
    of_two = name in ("add_", "sub_", "subtract_", "mul_", "multiply_", "div_", "divide_", "true_divide_")
    xs, ds = drawn((M, M) if of_two else (M,))
    xs[-1] = xs[-1].abs() + 0.5
    forms = {n: next(f for f in RULES if f.__name__ == n) for n in (name, name[:-1])}

    def applied(n: str, *p: Tensor) -> Tensor:
        y = p[0] * 1.0
        z = forms[n](y, *p[1:], *ARGUMENTS.get(name, ()))
        return y + z

    found = by_rules(lambda *p: applied(name, *p), xs, ds)
    ((z, dz),) = by_torch(lambda *p: forms[name[:-1]](p[0] * 1.0, *p[1:], *ARGUMENTS.get(name, ())) * 2, xs, ds)
    assert_the_same(found, [(z, dz)])


def test_operators_in_place():
    def function(x: Tensor, y: Tensor) -> Tensor:
        z = x * 1.0
        z += y
        z *= 3
        z -= 2 * y
        z /= y.exp()
        return z

    xs, ds = drawn((M, V))
    assert_the_same(by_rules(function, xs, ds), by_torch(lambda x, y: (3 * x + y) / y.exp(), xs, ds))


@pytest.mark.parametrize("function", [F.dropout, F.dropout1d, F.dropout2d, F.dropout3d])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_dropout_draws_as_the_model_does(function, inplace, training):
    def seeded(x: Tensor) -> Tensor:
        torch.manual_seed(3)
        return function(x * 1.0, 0.4, training, inplace) + torch.rand(1, dtype=F64)

    xs, ds = drawn(((3, 4, 5),) if function is F.dropout1d else ((3, 4, 5, 2, 2),))
    xs, ds = (xs, ds) if function is not F.dropout2d else drawn(((3, 4, 5, 2),))
    assert_the_same(by_rules(seeded, xs, ds), by_torch(seeded, xs, ds))


def test_casts_to_other_precisions():
    xs, ds = drawn((M,))
    for cast, dtype in ((Tensor.float, torch.float32), (Tensor.half, torch.float16), (Tensor.bfloat16, torch.bfloat16)):
        ((_, dz),) = by_rules(lambda x, cast=cast: cast(x) * 2, xs, ds)
        assert torch.equal(dz, (ds[0].to(dtype) * 2))


def test_every_rule_is_tested(monkeypatch):
    called = {f for f in RULES if f.__name__ in WRITTEN or "dropout" in f.__name__}
    original = Tangents.__torch_function__

    def noted(self: Tangents, func: Any, *more: Any) -> Any:
        called.add(func)
        return original(self, func, *more)

    monkeypatch.setattr(Tangents, "__torch_function__", noted)
    for function, shapes in CASES.values():
        by_rules(function, *drawn(shapes))
    names = {f.__name__ for f in called} | {"cuda", "float", "half", "bfloat16"}
    assert {f.__name__ for f in RULES} <= names  # of an overload, tanh.default
