"""Tangents of functions of single entries: dz = sum over the arguments of df/dx dx."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kfac_triton.tangents.rule import (
    KEY,
    Function,
    Moved,
    Rule,
    aligned,
    broadcast,
    functions,
    in_place,
    tangents,
    total,
)

aten: Any = torch.ops.aten
Derivative = Callable[..., Tensor]  # (dx, x, z, *the other arguments) -> dz


def _tanh(input: Tensor) -> Moved:
    z = torch.tanh(input)
    return z, _TANH(getattr(input, KEY), z)


def _relu(input: Tensor, inplace: bool = False) -> Moved:
    z = torch.relu(input)
    return z, _THRESHOLD(getattr(input, KEY), z, 0)


_TANH: Derivative = aten.tanh_backward.default
_THRESHOLD: Derivative = aten.threshold_backward.default
_GELU: Derivative = aten.gelu_backward.default
_ELU: Derivative = aten.elu_backward.default


def _gelu(dx: Tensor, x: Tensor, z: Tensor, *, approximate: str = "none") -> Tensor:
    return _GELU(dx, x.expand_as(dx), approximate=approximate)


def _elu(dx: Tensor, x: Tensor, z: Tensor, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> Tensor:
    return _ELU(dx, alpha, scale, input_scale, False, x)


def _clamp(dx: Tensor, x: Tensor, z: Tensor, min: Any = None, max: Any = None) -> Tensor:
    inside = torch.ones_like(x, dtype=torch.bool)
    inside = inside if min is None else inside & (x >= min)
    return dx * (inside if max is None else inside & (x <= max))


def _power(dx: Tensor, x: Tensor, z: Tensor, exponent: Any) -> Tensor:
    if isinstance(exponent, Tensor):
        n = max(x.dim(), exponent.dim())
        slope = torch.where(exponent == 0, 0.0, exponent * x ** torch.where(exponent == 0, 1, exponent - 1))
        return aligned(dx, n) * slope
    return torch.zeros_like(dx) if exponent == 0 else dx * (exponent * x ** (exponent - 1))


def _log_sigmoid(dx: Tensor, x: Tensor, z: Tensor) -> Tensor:
    return dx * torch.sigmoid(-x)


UNARY: dict[str, Derivative] = {
    "tanh": lambda dx, x, z: aten.tanh_backward(dx, z),
    "sigmoid": lambda dx, x, z: aten.sigmoid_backward(dx, z),
    "relu": lambda dx, x, z: aten.threshold_backward(dx, z, 0),
    "gelu": _gelu,
    "silu": lambda dx, x, z: aten.silu_backward(dx, x),
    "mish": lambda dx, x, z: aten.mish_backward(dx, x),
    "elu": _elu,
    "selu": lambda dx, x, z: _elu(dx, x, z, 1.6732632423543772848170429916717, 1.0507009873554804934193349852946),
    "celu": lambda dx, x, z, alpha=1.0: _elu(dx, x, z, alpha, 1.0, 1.0 / alpha),
    "leaky_relu": lambda dx, x, z, negative_slope=0.01: aten.leaky_relu_backward(dx, x, negative_slope, False),
    "softplus": lambda dx, x, z, beta=1, threshold=20: aten.softplus_backward(dx, x, beta, threshold),
    "hardtanh": lambda dx, x, z, min_val=-1.0, max_val=1.0: aten.hardtanh_backward(dx, x, min_val, max_val),
    "relu6": lambda dx, x, z: aten.hardtanh_backward(dx, x, 0.0, 6.0),
    "hardswish": lambda dx, x, z: aten.hardswish_backward(dx, x),
    "hardsigmoid": lambda dx, x, z: aten.hardsigmoid_backward(dx, x),
    "log_sigmoid": _log_sigmoid,
    "exp": lambda dx, x, z: dx * z,
    "expm1": lambda dx, x, z: dx * (z + 1),
    "exp2": lambda dx, x, z: dx * z * math.log(2),
    "log": lambda dx, x, z: dx / x,
    "log1p": lambda dx, x, z: dx / (1 + x),
    "log2": lambda dx, x, z: dx / (x * math.log(2)),
    "log10": lambda dx, x, z: dx / (x * math.log(10)),
    "sqrt": lambda dx, x, z: dx / (2 * z),
    "rsqrt": lambda dx, x, z: dx * (z**3 / -2),
    "reciprocal": lambda dx, x, z: dx * -z.square(),
    "square": lambda dx, x, z: dx * (2 * x),
    "sin": lambda dx, x, z: dx * torch.cos(x),
    "cos": lambda dx, x, z: dx * -torch.sin(x),
    "abs": lambda dx, x, z: dx * torch.sign(x),
    "neg": lambda dx, x, z: -dx,
    "negative": lambda dx, x, z: -dx,
    "erf": lambda dx, x, z: dx * (2 / math.sqrt(math.pi) * torch.exp(-x.square())),
    "clamp": _clamp,
    "clip": _clamp,
    "clamp_min": _clamp,
    "clamp_max": lambda dx, x, z, max: _clamp(dx, x, z, None, max),
    "pow": _power,
}


def _unary(function: Function, derivative: Derivative) -> Callable[..., Moved]:
    def rule(x: Tensor, *args: Any, **kwargs: Any) -> Moved:
        z = function(x, *args, **kwargs)
        dz = derivative(getattr(x, KEY), x, z, *args, **kwargs)
        return z, dz if dz.shape[1:] == z.shape else dz.expand(-1, *z.shape)

    return rule


def _exponential(base: Any, x: Tensor) -> Moved:
    """base ** x for a number."""
    z = torch.pow(base, x)
    return z, getattr(x, KEY) * z * math.log(base)


def _power_of(function: Function) -> Callable[..., Moved]:
    by_exponent = _unary(function, _power)

    def rule(x: Any, exponent: Any) -> Moved:
        if tangents(exponent) is None:
            return by_exponent(x, exponent)
        if isinstance(x, (int, float)) and x > 0:
            return _exponential(x, exponent)
        raise NotImplementedError("the exponent of a tensor moves")

    return rule


def _sum(x: Any, y: Any, *, alpha: Any = 1) -> Moved:
    z = torch.add(x, y, alpha=alpha)
    dx, dy = getattr(x, KEY, None), getattr(y, KEY, None)
    if dy is not None and alpha != 1:
        dy = dy * alpha
    return z, total(dx, dy, z)


def _difference(x: Any, y: Any, *, alpha: Any = 1) -> Moved:
    z = torch.sub(x, y, alpha=alpha)
    dy = getattr(y, KEY, None)
    return z, total(getattr(x, KEY, None), None if dy is None else dy * -alpha, z)


def _reflected_difference(x: Any, y: Any, *, alpha: Any = 1) -> Moved:
    z = torch.rsub(x, y, alpha=alpha)
    dx = getattr(x, KEY, None)
    return z, total(None if dx is None else dx * -alpha, getattr(y, KEY, None), z)


def _product(x: Any, y: Any) -> Moved:
    z = torch.mul(x, y)
    dx, dy, n = getattr(x, KEY, None), getattr(y, KEY, None), z.dim()
    if dx is not None:
        dx = aligned(dx, n) * y
    if dy is not None:
        dy = aligned(dy, n) * x
    return z, total(dx, dy, z)


def _quotient(x: Any, y: Any, *, rounding_mode: str | None = None) -> Moved:
    if rounding_mode is not None:
        raise NotImplementedError("a quotient is rounded")
    z = torch.div(x, y)
    dx, dy, n = getattr(x, KEY, None), getattr(y, KEY, None), z.dim()
    if dx is not None:
        dx = aligned(dx, n) / y
    if dy is not None:
        dy = aligned(dy, n) * (-z / y)
    return z, total(dx, dy, z)


def _choice(condition: Tensor, x: Any, y: Any) -> Moved:
    z = torch.where(condition, x, y)
    dx, dy, n = tangents(x), tangents(y), z.dim()
    zero = torch.zeros((), dtype=z.dtype, device=z.device)
    return z, broadcast(
        torch.where(
            condition, zero if dx is None else aligned(dx, n), zero if dy is None else aligned(dy, n)
        ), z
    )  # fmt: skip


def _choice_of(x: Tensor, condition: Tensor, y: Any) -> Moved:
    return _choice(condition, x, y)


def _filled(x: Tensor, mask: Tensor, value: Any) -> Moved:
    z = torch.masked_fill(x, mask, value)
    return z, broadcast(aligned(getattr(x, KEY), z.dim()).masked_fill(mask, 0.0), z)


def _extreme(function: Function, sign: int) -> Callable[..., Moved]:
    """The larger of two, or with sign -1 the smaller; of two that are alike the half of either."""

    def rule(x: Tensor, y: Tensor) -> Moved:
        z = function(x, y)
        share = (x > y if sign > 0 else x < y).to(z.dtype) + (x == y).to(z.dtype) / 2
        dx, dy, n = tangents(x), tangents(y), z.dim()
        dx = None if dx is None else aligned(dx, n) * share
        dy = None if dy is None else aligned(dy, n) * (1 - share)
        return z, total(dx, dy, z)

    return rule


def _relu_or_written(input: Tensor, inplace: bool = False) -> Moved:
    return _RELU_WRITTEN(input) if inplace else _relu(input)


_RELU_WRITTEN = in_place(_relu)


def _rules() -> Iterator[tuple[Any, Rule]]:
    for name, derivative in UNARY.items():
        for f in functions(name):
            yield f, Rule(_unary(f, derivative), 1)
            for written in functions(name + "_"):
                yield written, Rule(in_place(_unary(f, derivative)), 1)
    for rule, follows, *names in (
        (_tanh, 1, "tanh"),
        (_relu, 1, "relu"),
        (_sum, 2, "add"),
        (_difference, 2, "sub", "subtract"),
        (_product, 2, "mul", "multiply"),
        (_quotient, 2, "div", "divide", "true_divide"),
        (_filled, 1, "masked_fill"),
    ):
        yield from ((f, Rule(rule, follows)) for f in functions(*names))
        yield from ((f, Rule(in_place(rule), follows)) for f in functions(*(name + "_" for name in names)))
    yield from ((f, Rule(_reflected_difference, 2)) for f in functions("rsub"))
    yield from ((f, Rule(_power_of(f), 1)) for f in functions("pow"))
    for name, sign in (("maximum", 1), ("minimum", -1)):
        yield from ((f, Rule(_extreme(f, sign), 2)) for f in functions(name))
    yield from (
        (torch.where, Rule(_choice, 2)),
        (Tensor.where, Rule(_choice_of, 2)),
        (F.relu, Rule(_relu_or_written, 1)),
    )


RULES = dict(_rules())
