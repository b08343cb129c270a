"""Tables: embeddings, whose rows are picked by number, and positional parameters, whose rows are added in their order.

As a linear map of one-hot rows: a = e_i (d_in, the table's rows), g = dL/dy (d_out), y = table[i]. A one-hot row has
a a^T = diag(e_i), so A = diag(counts) / L exactly, held as its diagonal and never written as rows; G (d_out, d_out).
A vector that is added at every position is a table of one row, and its block a full one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kfac_triton.operations.layout import Layout
from kfac_triton.operations.use import ATEN, Part, Resolve, Use
from kfac_triton.ops import OneHot


@dataclass(eq=False, repr=False)
class TableUse(Use):
    """`x` holds the number of the row that went into each vector of the outputs; `leave_out` names one without a
    gradient (an embedding's padding). `axis`: where the outputs hold the vectors."""

    operation = "embedding"
    leave_out: int | None = None
    axis: int = -1

    def a(self) -> Tensor:
        raise NotImplementedError("one-hot rows are not written; see `one_hot`")

    def one_hot(self, counts: Tensor | None = None) -> OneHot:
        """The rows a, each weighted by `counts` (n,), which masks set to 0."""
        width = self.weight.parameter.numel() // self._layout().row_width(self.weight.parameter.shape)
        return OneHot(self.x.reshape(-1), width, counts)

    def _layout(self) -> Layout:
        return Layout(self.operation)

    def g(self, dy: Tensor) -> Tensor:
        moved = dy.movedim(self.axis, -1)
        return moved.reshape(-1, moved.shape[-1])

    def kept(self) -> Tensor | None:
        """Which rows count, bool (n,); None: all."""
        return None if self.leave_out is None else (self.x != self.leave_out).reshape(-1)


@dataclass(eq=False, repr=False)
class PositionUse(TableUse):
    """A table that is added to activations, or stands beside them: there at `place`, (axis, start, length)."""

    operation = "position"
    place: tuple[int, int, int] | None = None

    def g(self, dy: Tensor) -> Tensor:
        return super().g(dy if self.place is None else dy.narrow(*self.place))


def _match_embedding(
    resolve: Resolve,
    input: Any,
    weight: Any,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> TableUse | None:
    part = resolve(weight)
    if part is None or not part.whole or part.transposed or scale_grad_by_freq or weight.dim() != 2:
        return None
    rows = weight.shape[0]
    padding = None if padding_idx is None else padding_idx % rows
    return TableUse(part, None, input.detach(), transposed=True, leave_out=padding)


def _match_plain_embedding(
    resolve: Resolve, weight: Any, indices: Any, padding_idx: int = -1, scale_grad_by_freq: bool = False, *rest: Any
) -> TableUse | None:
    """torch.embedding, to which a padding of -1 is none."""
    padding = None if padding_idx < 0 else padding_idx
    return _match_embedding(resolve, indices, weight, padding, scale_grad_by_freq=scale_grad_by_freq)


def _match_index(resolve: Resolve, table: Any, index: Any) -> TableUse | None:
    whole = isinstance(index, Tensor) and index.dtype in (torch.int64, torch.int32)
    if not whole or not isinstance(table, Tensor) or table.dim() != 2:
        return None
    index = torch.where(index < 0, index + table.shape[0], index)
    return _match_embedding(resolve, index, table)


def _match_aten_index(resolve: Resolve, table: Any, indices: Any) -> TableUse | None:
    return _match_index(resolve, table, indices[0]) if len(indices) == 1 else None


def _match_index_select(resolve: Resolve, input: Any, dim: int, index: Any) -> TableUse | None:
    return _match_index(resolve, input, index) if dim == 0 else None


def positions(resolve: Resolve, t: Any, shape: torch.Size) -> tuple[Part, Tensor, int] | None:
    """The rows of a positional parameter that t, broadcast to `shape`, puts at each place of the outputs.

    Returns the part, the numbers of the rows (the shape without its axis of vectors), and that axis; None where t is
    no run of whole rows of a parameter.
    """
    parameter = resolve.owner(t)
    if parameter is None or not parameter.is_contiguous() or t.dim() > len(shape):
        return None
    width = Layout("position").row_width(parameter.shape)
    steps = [0] * (len(shape) - t.dim()) + [0 if n == 1 else s for n, s in zip(t.shape, t.stride(), strict=True)]
    start, rest = divmod(int(t.storage_offset()) - int(parameter.storage_offset()), width)
    axes = [i for i, (n, s) in enumerate(zip(shape, steps, strict=True)) if n == width and (s == 1 or width == 1)]
    if rest or not axes or any(s % width for i, s in enumerate(steps) if i != axes[-1]):
        return None
    if width == 1 and parameter.numel() > 1:
        return None
    axis = axes[-1]
    rows = torch.full((), start, dtype=torch.int64, device=t.device)
    for i, (n, s) in enumerate(zip(shape, steps, strict=True)):
        if i != axis:
            rows = rows.unsqueeze(-1) + torch.arange(n, device=t.device) * (s // width)
    if rows.numel() != math.prod(shape) // width:
        return None
    return Part(parameter, 0, parameter.shape[0] if parameter.dim() else 1), rows, axis - len(shape)


def _match_add(resolve: Resolve, left: Any, right: Any, *, alpha: Any = 1, out: Any = None) -> PositionUse | None:
    if alpha != 1 or out is not None or not isinstance(left, Tensor) or not isinstance(right, Tensor):
        return None
    shape = torch.broadcast_shapes(left.shape, right.shape)
    ours = [t for t in (left, right) if resolve.owner(t) is not None]
    found = positions(resolve, ours[0], shape) if len(ours) == 1 else None
    return None if found is None else PositionUse(found[0], None, found[1], transposed=True, axis=found[2])


def _match_cat(resolve: Resolve, tensors: Any, dim: int = 0, *, out: Any = None) -> list[Use] | None:
    uses: list[Use] = []
    start = 0
    for t in tensors:
        if resolve.owner(t) is not None:
            found = positions(resolve, t, t.shape)
            if found is None or out is not None or found[2] == dim or found[2] + t.dim() == dim:
                return None
            place = (dim, start, t.shape[dim])
            uses.append(PositionUse(found[0], None, found[1], transposed=True, axis=found[2], place=place))
        start += t.shape[dim]
    return uses


def _match_repeat(resolve: Resolve, input: Any, *sizes: Any) -> PositionUse | None:
    times = list(sizes[0]) if len(sizes) == 1 and not isinstance(sizes[0], int) else list(sizes)
    found = positions(resolve, input, input.shape)
    if found is None or times[found[2]] != 1:
        return None
    times.pop(len(times) + found[2])
    return PositionUse(found[0], None, found[1].repeat(times), transposed=True, axis=found[2])


SUMS = (torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, ATEN.add.Tensor)
DIFFERENCES = (torch.sub, torch.subtract, Tensor.sub, Tensor.subtract, Tensor.__sub__, ATEN.sub.Tensor)
PLAIN_ADDITIONS = frozenset({*SUMS, *DIFFERENCES})
ADDITIONS = (
    *SUMS, *DIFFERENCES, Tensor.add_, Tensor.__iadd__, Tensor.sub_, Tensor.subtract_, Tensor.__rsub__, Tensor.__isub__,
    ATEN.add_.Tensor, ATEN.sub_.Tensor,
)  # fmt: skip
MATCHERS: dict[Any, Callable[..., Use | list[Use] | None]] = {
    F.embedding: _match_embedding,
    torch.embedding: _match_plain_embedding,
    Tensor.__getitem__: _match_index,
    torch.index_select: _match_index_select,
    Tensor.index_select: _match_index_select,
    torch.cat: _match_cat,
    torch.concat: _match_cat,
    Tensor.repeat: _match_repeat,
    ATEN.embedding.default: _match_plain_embedding,
    ATEN.index.Tensor: _match_aten_index,
    ATEN.index_select.default: _match_index_select,
    ATEN.cat.default: _match_cat,
    ATEN.repeat.default: _match_repeat,
    **dict.fromkeys(ADDITIONS, _match_add),
}


def moved_by_a_number(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The tensor whose gradient the result has, in 1 + w, as norms have it that hold the rest of their scale."""
    if func not in PLAIN_ADDITIONS or len(args) != 2 or "out" in kwargs:
        return None
    left, right = args
    if isinstance(left, Tensor) and isinstance(right, (int, float)):
        return left
    swapped = isinstance(left, (int, float)) and isinstance(right, Tensor) and func in SUMS and not kwargs
    return right if swapped else None
