"""How a parameter and its bias become one matrix of shape (d_out, d_in[+1]), and how that matrix becomes both again.

linear, conv: the bias is the weight of a homogeneous coordinate, the last column. A convolution's weight (C_out, C,
height, width) is flattened behind its output channels with the input channels innermost, (height, width, C), so that
neighbours in a row of A are neighbours in an image whose channels come last; a transposed convolution's (C, C_out,
height, width) likewise. With groups > 1 a leading axis holds a matrix for each group.
recurrent, custom: as linear. tied: as linear; an embedding's table that the last layer multiplies with too.
embedding, position: the table (rows, d_out) transposed, a column for every entry of the vocabulary or every position.
scale: one row, the scales and then the shifts.

A side of a block is held in one of these forms, by the width d of its factor:

    dense         (d, d)
    blocks        (b, w, w): the b dense blocks on the diagonal, w = ceil(d / b), zeros where the last one has no rows
    diagonal      (d,)
    uncorrelated  (C + 1, C + 1): moments of the pixels of an image, for all taps of a filter (see `uncorrelated`)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

DENSE, BLOCKS, DIAGONAL, UNCORRELATED = FORMS = ("dense", "blocks", "diagonal", "uncorrelated")
OPERATIONS = ("linear", "conv", "embedding", "position", "scale", "tied", "recurrent", "custom")
MOST_BLOCKS = 4  # a side that needs more is diagonal, so that memory does not grow with a vocabulary times a cap


@dataclass(frozen=True)
class Layout:
    """The shape of one block.

    `transposed`: the weight is stored with its inputs first, as in x @ weight. `groups`: independent groups of a
    convolution. `bias`: the bias shares the block. `A`, `G`: the forms of the sides. `blocks_A`, `blocks_G`: how many
    blocks a side of that form has.
    """

    operation: str
    transposed: bool = False
    groups: int = 1
    bias: bool = False
    A: str = DENSE
    G: str = DENSE
    blocks_A: int = 1
    blocks_G: int = 1

    @property
    def table(self) -> bool:
        """Whether the parameter is a table of rows that are picked, not multiplied."""
        return self.operation in ("embedding", "position")

    @property
    def undivided(self) -> bool:
        """Whether one of the factors is a number, so that damping is added to the product of both."""
        return self.operation in ("scale", "position")

    def row_width(self, shape: torch.Size) -> int:
        """The width of a row of a table: its last axis; of a position's also the only axis along which it extends."""
        wide = [size for size in shape if size > 1]
        if self.operation == "position" and len(wide) == 1:
            return wide[0]
        return shape[-1] if len(shape) else 1

    def bias_columns(self, weight_shape: torch.Size) -> int:
        """How many columns of the matrix are the bias."""
        if not self.bias:
            return 0
        return math.prod(weight_shape) if self.operation == "scale" else 1

    def dims(self, weight_shape: torch.Size) -> tuple[int, int]:
        """(d_in[+1], d_out): the width of one group's factors A and G."""
        size = math.prod(weight_shape)
        if self.operation == "scale":
            return size + self.bias_columns(weight_shape), 1
        if self.table:
            d_out = self.row_width(weight_shape)
            return size // d_out, d_out
        if self.operation == "conv" and self.transposed:
            d_out = weight_shape[1] * self.groups
        else:
            d_out = size // weight_shape[0] if self.transposed else weight_shape[0]
        return size // d_out + int(self.bias), d_out // self.groups

    def taps(self, weight_shape: torch.Size) -> int:
        """The positions of a filter; 1 for what is no convolution."""
        return math.prod(weight_shape[2:]) if self.operation == "conv" else 1

    def factor_shapes(self, weight_shape: torch.Size) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of A and G, with a leading axis of groups where there are several."""
        lead = (self.groups,) if self.groups > 1 else ()
        d_in, d_out = self.dims(weight_shape)

        def shape(form: str, d: int, blocks: int) -> tuple[int, ...]:
            if form == DIAGONAL:
                return (*lead, d)
            if form == BLOCKS:
                return (blocks, -(-d // blocks), -(-d // blocks))
            if form == UNCORRELATED:
                d = (d - int(self.bias)) // self.taps(weight_shape) + 1
            return (*lead, d, d)

        return shape(self.A, d_in, self.blocks_A), shape(self.G, d_out, self.blocks_G)

    def inverse_shapes(self, weight_shape: torch.Size) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of A_inv and G_inv: those of the factors, but for the dense inverse of uncorrelated moments."""
        A = replace(self, A=DENSE) if self.A == UNCORRELATED else self
        return A.factor_shapes(weight_shape)[0], self.factor_shapes(weight_shape)[1]

    def join(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Weight and bias (or their gradients) as a matrix (d_out, d_in[+1]), (groups, d_out / groups, d_in[+1])."""
        matrix = self.by_taps(weight).flatten(1)
        if self.groups > 1:
            matrix = matrix.unflatten(0, (self.groups, -1))
        if not self.bias:
            return matrix
        if self.operation == "scale":
            return torch.cat([matrix, torch.zeros_like(matrix) if bias is None else bias.reshape(1, -1)], dim=-1)
        column = matrix.new_zeros(matrix.shape[:-1]) if bias is None else bias.reshape(matrix.shape[:-1])
        return torch.cat([matrix, column.unsqueeze(-1)], dim=-1)

    def split(self, matrix: Tensor, weight_shape: torch.Size) -> tuple[Tensor, Tensor | None]:
        """The inverse of `join`: views of the matrix where its strides allow."""
        at = matrix.shape[-1] - self.bias_columns(weight_shape)
        weight, bias = matrix[..., :at], matrix[..., at:].reshape(-1) if self.bias else None
        if self.operation == "scale" and bias is not None:
            bias = bias.reshape(weight_shape)
        if self.groups > 1:
            weight = weight.flatten(0, 1)
        if self.operation == "conv":
            by_taps = weight.unflatten(1, (self.taps(weight_shape), -1))  # (d_out, taps, channels)
            if self.transposed:
                by_group = by_taps.unflatten(0, (self.groups, -1))
                return by_group.permute(0, 3, 1, 2).reshape(weight_shape), bias
            return by_taps.transpose(1, 2).reshape(weight_shape), bias
        if self.transposed or self.table:
            weight = weight.t()
        return weight.reshape(weight_shape), bias

    def pieces(self, weight: Tensor) -> list[Tensor]:
        """The weight as `views` has it: whole, but for a transposed convolution with groups, which is no view of the
        matrix."""
        return list(weight.unflatten(0, (self.groups, -1))) if self._by_group else [weight]

    def views(self, matrix: Tensor, weight_shape: torch.Size) -> list[Tensor]:
        """What of a joint matrix belongs to the weight, as views with the shapes of its `pieces`."""
        at = matrix.shape[-1] - self.bias_columns(weight_shape)
        columns = matrix[..., :at]
        if self.operation == "conv":
            taps, spatial = self.taps(weight_shape), weight_shape[2:]
            if self._by_group:
                return [m.unflatten(-1, (taps, -1)).permute(2, 0, 1).unflatten(2, spatial) for m in columns]
            filters = (columns.flatten(0, 1) if self.groups > 1 else columns).unflatten(-1, (taps, -1))
            order = (2, 0, 1) if self.transposed else (0, 2, 1)
            return [filters.permute(order).unflatten(2, spatial)]
        return [(columns.t() if self.transposed or self.table else columns).view(weight_shape)]

    def bias_view(self, matrix: Tensor, weight_shape: torch.Size, bias_shape: torch.Size) -> Tensor:
        """What of a joint matrix belongs to the bias, as a view."""
        at = matrix.shape[-1] - self.bias_columns(weight_shape)
        columns = matrix[..., at:]
        return (columns if self.operation == "scale" else columns[..., 0]).reshape(-1).view(bias_shape)

    @property
    def _by_group(self) -> bool:
        return self.operation == "conv" and self.transposed and self.groups > 1

    def by_taps(self, parameter: Tensor) -> Tensor:
        """The weight, or a bias of one axis, as (d_out, taps, channels): one tap but for a convolution.

        A view, unless the height and width of a filter do not lie behind one another in memory, or a transposed
        convolution has groups.
        """
        if self.operation == "scale":
            return parameter.reshape(1, 1, -1)
        if self.table:
            return parameter.reshape(-1, self.row_width(parameter.shape)).t().unsqueeze(1)
        if parameter.dim() == 1:
            return parameter.view(-1, 1, 1)
        if self.operation == "conv":
            by_filter = parameter.flatten(2)
            if not self.transposed:
                return by_filter.transpose(1, 2)
            by_group: Tensor = by_filter.unflatten(0, (self.groups, -1))
            return by_group.permute(0, 2, 3, 1).flatten(0, 1)
        matrix = parameter.flatten(1)
        return (matrix.t() if self.transposed else matrix).unsqueeze(1)

    def parts(self, matrix: Tensor, weight_shape: torch.Size) -> list[Tensor]:
        """What of a matrix belongs to the weight, and to the bias if there is one, each as `by_taps` has it."""
        at = matrix.shape[-1] - self.bias_columns(weight_shape)
        columns = (matrix[..., :at], matrix[..., at:]) if self.bias else (matrix,)
        rows = [part.flatten(0, 1) if self.groups > 1 else part for part in columns]
        return [rows[0].unflatten(1, (self.taps(weight_shape), -1)), *(part.unsqueeze(1) for part in rows[1:])]

    def in_weight_order(self, A: Tensor, weight_shape: torch.Size) -> Tensor:
        """A dense or diagonal A with its rows and columns in the order of `weight.flatten(1)`, the bias still last."""
        if self.operation != "conv":
            return A
        taps = self.taps(weight_shape)
        d_in = self.dims(weight_shape)[0] - int(self.bias)
        order = torch.arange(d_in, device=A.device).unflatten(0, (taps, -1)).t().flatten()
        if self.bias:
            order = torch.cat([order, order.new_full((1,), len(order))])
        return A[..., order] if self.A == DIAGONAL else A[..., order, :][..., order]

    @property
    def name(self) -> str:
        """What coverage() reports: the operation, and the sides that are not dense."""
        usual = DIAGONAL if self.operation == "embedding" else DENSE
        forms = (("A", self.A, self.blocks_A), ("G", self.G, self.blocks_G))
        sides = [
            f"{form} {side}" if form != BLOCKS else f"{side} in {blocks} blocks"
            for side, form, blocks in forms
            if form != (usual if side == "A" else DENSE) and not (self.operation == "position" and side == "A")
        ]
        return f"{self.operation} ({', '.join(sides)})" if sides else self.operation

    def limited(self, weight_shape: torch.Size, widest: int) -> Layout:
        """This layout with blocks or a diagonal on every dense side wider than `widest`."""
        forms: dict[str, Any] = {}
        for side, d in zip("AG", self.dims(weight_shape), strict=True):
            blocks = -(-d // widest)
            if getattr(self, side) == DENSE and blocks > 1:
                split = blocks <= MOST_BLOCKS and self.groups == 1
                forms[side] = BLOCKS if split else DIAGONAL
                if split:
                    forms[f"blocks_{side}"] = blocks
        return replace(self, **forms)
