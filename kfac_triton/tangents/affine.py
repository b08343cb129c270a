"""Tangents of functions that are linear in every argument: dz = sum over the arguments of the function with that one's
tangent in its place."""

from __future__ import annotations

import string
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kfac_triton.tangents.rule import KEY, MANY, PARAMETERS, Function, Moved, Rule, aligned, functions, tangents, total


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Moved:
    dx, dW, db = getattr(input, KEY, None), getattr(weight, KEY, None), getattr(bias, KEY, None)
    if input.dim() != 2:
        z = F.linear(input, weight, bias)
        rows = None if dx is None else dx.reshape(dx.shape[0], -1, dx.shape[-1])
        dz = _rows(input.reshape(-1, input.shape[-1]), weight.t(), rows, dW, db)
        return z, dz.reshape(-1, *z.shape)
    Wt = weight.t()
    z = torch.mm(input, Wt) if bias is None else torch.addmm(bias, input, Wt)
    if dx is None or dW is None or db is None:
        return z, _rows(input, Wt, dx, dW, db)
    k = dW.shape[0]
    dz = torch.baddbmm(db.unsqueeze(1), input.expand(k, -1, -1), dW.mT)
    return z, torch.baddbmm(dz, dx, Wt.expand(k, -1, -1))


def _rows(x: Tensor, Wt: Tensor, dx: Tensor | None, dW: Tensor | None, db: Tensor | None) -> Tensor:
    """Tangents (k, n, d_out) of x W^T + b, x (n, d_in): dx W^T + x dW^T + db, for what of these there is."""
    dz = None if db is None else db.unsqueeze(1)
    for factor, other in ((x, dW), (dx, Wt)):
        if factor is None or other is None:
            continue
        k = other.shape[0] if factor is x else factor.shape[0]
        left = factor.expand(k, -1, -1) if factor is x else factor
        right = other.mT if factor is x else other.expand(k, -1, -1)
        dz = torch.bmm(left, right) if dz is None else torch.baddbmm(dz, left, right)
    assert dz is not None
    return dz.expand(-1, len(x), -1)


def _matmul(input: Tensor, other: Tensor) -> Moved:
    """Products of any two shapes; a vector is a matrix of one row, or one column."""
    z = torch.matmul(input, other)
    da, db = tangents(input), tangents(other)
    if other.dim() == 2 and input.dim() > 1:
        rows = None if da is None else da.reshape(len(da), -1, da.shape[-1])
        dz = _rows(input.reshape(-1, input.shape[-1]), other, rows, None if db is None else db.mT, None)
        return z, dz.reshape(-1, *z.shape)
    left = input if input.dim() > 1 else input.unsqueeze(0)
    right = other if other.dim() > 1 else other.unsqueeze(1)
    n = max(left.dim(), right.dim())
    parts = []
    if da is not None:
        parts.append(torch.matmul(aligned(da if input.dim() > 1 else da.unsqueeze(1), n), right))
    if db is not None:
        parts.append(torch.matmul(left, aligned(db if other.dim() > 1 else db.unsqueeze(2), n)))
    dz = parts[0] if len(parts) == 1 else parts[0] + parts[1]
    return z, dz.reshape(-1, *z.shape)


def _sum_of_product(function: Function) -> Callable[..., Moved]:
    """beta input + alpha left @ right, as in addmm, addmv and baddbmm."""

    def rule(input: Tensor, left: Tensor, right: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Moved:
        z = function(input, left, right, beta=beta, alpha=alpha)
        d, dl, dr = tangents(input), tangents(left), tangents(right)
        if left.dim() == right.dim() == 2 and input.dim() == alpha == beta == 1:  # a linear layer
            return z, _rows(left, right, dl, None if dr is None else dr.mT, d)
        dz = None if dl is None and dr is None else _matmul(left, right)[1] * alpha
        return z, total(None if d is None else aligned(d, z.dim()) * beta, dz, z)

    return rule


def _convolution(function: Function, *, transposed: bool) -> Callable[..., Moved]:
    def rule(input: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any) -> Moved:
        z = function(input, weight, bias, *args, **kwargs)
        dx, dW, db = tangents(input), tangents(weight), tangents(bias)
        batched = input.dim() == weight.dim()
        parts = []
        if dx is not None and batched:
            parts.append(function(dx.flatten(0, 1), weight, None, *args, **kwargs).unflatten(0, dx.shape[:2]))
        elif dx is not None:
            parts.append(function(dx, weight, None, *args, **kwargs))
        if dW is not None and not transposed and input.shape[int(batched)] == weight.shape[1]:  # one group
            found = function(input, dW.flatten(0, 1), None, *args, **kwargs)
            parts.append(found.unflatten(int(batched), dW.shape[:2]).movedim(int(batched), 0))
        elif dW is not None:
            parts.append(torch.stack([function(input, d, None, *args, **kwargs) for d in dW]))
        if db is not None:
            parts.append(db.view(len(db), *(1,) * int(batched), -1, *(1,) * (weight.dim() - 2)))
        return z, sum(parts[1:], parts[0]).expand(-1, *z.shape)

    return rule


def _embedding(weight: Tensor, indices: Tensor, *args: Any, **kwargs: Any) -> Moved:
    return torch.embedding(weight, indices, *args, **kwargs), tangents(weight)[:, indices]


def _einsum(equation: Any, operands: Any, **options: Any) -> Moved:
    if not isinstance(equation, str) or "->" not in equation:
        raise NotImplementedError("an einsum does not name its output")
    inputs, output = equation.split("->")
    letter = next(one for one in string.ascii_letters if one not in equation)
    dz = []
    for i, d in enumerate(map(tangents, operands)):
        if d is not None:
            terms = inputs.split(",")
            terms[i] = letter + terms[i].strip()
            changed = [*operands[:i], d, *operands[i + 1 :]]
            dz.append(torch.einsum(f"{','.join(terms)}->{letter}{output.strip()}", *changed))
    return torch.einsum(equation, *operands), sum(dz[1:], dz[0])


def _rules() -> Iterator[tuple[Any, Rule]]:
    yield F.linear, Rule(_linear, 3, PARAMETERS)
    yield from ((f, Rule(_matmul, 2)) for f in functions("matmul", "mm", "bmm", "mv"))
    yield from ((f, Rule(_sum_of_product(f), 3)) for f in functions("addmm", "addmv", "baddbmm"))
    for f in functions("conv1d", "conv2d", "conv3d"):
        yield f, Rule(_convolution(f, transposed=False), 3, PARAMETERS)
    for f in functions("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"):
        yield f, Rule(_convolution(f, transposed=True), 3, PARAMETERS)
    yield from ((f, Rule(_embedding, 1)) for f in functions("embedding"))
    yield from ((f, Rule(_einsum, MANY)) for f in functions("einsum"))


RULES = dict(_rules())
