"""The linear map y = W x (+ b), whichever function computes it: linear, matmul, mm, mv, addmm.

A row is one position: a = x (d_in,), g = dL/dy (d_out,), and grad_W = sum over positions of g a^T
(Martens & Grosse 2015, section 2).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kfac_triton.operations.use import ATEN, Part, Resolve, Use


@dataclass(eq=False, repr=False)
class LinearUse(Use):
    """`columns`: the positions are columns of x, as in W @ x."""

    columns: bool = False

    operation = "linear"

    def _rows(self, t: Tensor) -> Tensor:
        """t (..., d) as rows (n, d)."""
        if self.columns and t.dim() > 1:
            t = t.transpose(-1, -2)
        if self.batch_axis and t.dim() == 2:
            t = t.unflatten(0, (-1, self.examples))
        if self.batch_axis and t.dim() > 2:
            t = t.movedim(self.batch_axis, 0)
        return t.reshape(-1, t.shape[-1])

    def a(self) -> Tensor:
        plain = self.x.dim() == 2 and not self.columns and not self.batch_axis
        return self.x if plain else self._rows(self.x)

    a_unwritten = a

    def g(self, dy: Tensor) -> Tensor:
        plain = dy.dim() == 2 and not self.columns and not self.batch_axis
        rows = dy if plain else self._rows(dy)
        before, after = self.weight.start, self.weight.parameter.shape[0] - self.weight.stop
        return F.pad(rows, (before, after)) if before or after else rows


def _use(weight: Part, bias: Part | None, x: Any, *, in_out: bool, columns: bool = False) -> LinearUse | None:
    """`in_out`: the operation received the weight as (d_in, d_out)."""
    transposed = in_out != weight.transposed
    if not isinstance(x, Tensor) or weight.parameter.dim() < 2 or (transposed and not weight.whole):
        return None
    return LinearUse(weight, bias, x.detach(), transposed=transposed, columns=columns)


def _match_linear(resolve: Resolve, input: Any, weight: Any, bias: Any = None) -> LinearUse | None:
    part = resolve(weight)
    return None if part is None else _use(part, resolve(bias), input, in_out=False)


def _match_matmul(resolve: Resolve, left: Any, right: Any) -> LinearUse | None:
    left_part, right_part = resolve(left), resolve(right)
    if right_part is not None and left_part is None and right.dim() == 2:
        return _use(right_part, None, left, in_out=True)
    if left_part is not None and right_part is None and left.dim() == 2:
        return _use(left_part, None, right, in_out=False, columns=True)
    return None


def _match_addmm(
    resolve: Resolve, input: Any, mat1: Any, mat2: Any, *, beta: float = 1, alpha: float = 1
) -> LinearUse | None:
    part, bias = resolve(mat2), resolve(input)
    if part is None or resolve(mat1) is not None or beta != 1 or alpha != 1:
        return None
    return _use(part, bias if bias is not None and input.dim() == 1 else None, mat1, in_out=True)


def _swapped(resolve: Resolve, right: Any, left: Any) -> LinearUse | None:
    return _match_matmul(resolve, left, right)


MATCHERS: dict[Any, Callable[..., Use | None]] = {
    F.linear: _match_linear,
    torch.matmul: _match_matmul,
    torch.mm: _match_matmul,
    torch.mv: _match_matmul,
    Tensor.matmul: _match_matmul,
    Tensor.mm: _match_matmul,
    Tensor.mv: _match_matmul,
    Tensor.__matmul__: _match_matmul,
    Tensor.__rmatmul__: _swapped,
    torch.addmm: _match_addmm,
    Tensor.addmm: _match_addmm,
    ATEN.linear.default: _match_linear,
    ATEN.matmul.default: _match_matmul,
    ATEN.mm.default: _match_matmul,
    ATEN.mv.default: _match_matmul,
    ATEN.addmm.default: _match_addmm,
}
