"""How a weight and its bias become one matrix of shape (d_out, d_in[+1]), and how that matrix becomes both again.

The bias is the weight of a homogeneous coordinate: the last column. A convolution's weight (C_out, C, height, width) is
flattened behind its output channels with the input channels innermost, (height, width, C), so that neighbours in a row
of A are neighbours in an image whose channels come last; with groups > 1 a leading axis holds a matrix for each group.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """The shape of one block.

    `transposed`: the weight is stored (d_in, d_out), as in x @ weight. `groups`: independent groups of a convolution.
    `bias`: the bias shares the block. `diagonal_A`, `diagonal_G`: the side is too wide for a dense factor.
    """

    operation: str
    transposed: bool = False
    groups: int = 1
    bias: bool = False
    diagonal_A: bool = False
    diagonal_G: bool = False

    def dims(self, weight_shape: torch.Size) -> tuple[int, int]:
        """(d_in[+1], d_out) of one group's factors A and G."""
        stored_out = weight_shape[0]
        stored_in = math.prod(weight_shape[1:])
        d_out, d_in = (stored_in, stored_out) if self.transposed else (stored_out, stored_in)
        return d_in + int(self.bias), d_out // self.groups

    def factor_shapes(self, weight_shape: torch.Size) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of A and G: (d, d), or (d,) where diagonal; with a leading axis of groups where there are several."""
        lead = (self.groups,) if self.groups > 1 else ()
        d_in, d_out = self.dims(weight_shape)
        return (
            (*lead, d_in) if self.diagonal_A else (*lead, d_in, d_in),
            (*lead, d_out) if self.diagonal_G else (*lead, d_out, d_out),
        )

    def join(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Weight and bias (or their gradients) as a matrix (d_out, d_in[+1]), (groups, d_out / groups, d_in[+1])."""
        matrix = self.by_taps(weight).flatten(1)
        if self.groups > 1:
            matrix = matrix.unflatten(0, (self.groups, -1))
        if not self.bias:
            return matrix
        column = matrix.new_zeros(matrix.shape[:-1]) if bias is None else bias.reshape(matrix.shape[:-1])
        return torch.cat([matrix, column.unsqueeze(-1)], dim=-1)

    def split(self, matrix: Tensor, weight_shape: torch.Size) -> tuple[Tensor, Tensor | None]:
        """The inverse of `join`: views of the matrix where its strides allow."""
        weight, bias = (matrix[..., :-1], matrix[..., -1].reshape(-1)) if self.bias else (matrix, None)
        if self.groups > 1:
            weight = weight.flatten(0, 1)
        if self.transposed:
            return weight.t(), bias
        if len(weight_shape) > 2:
            weight = weight.unflatten(1, (-1, weight_shape[1])).transpose(1, 2)
        return weight.reshape(weight_shape), bias

    def by_taps(self, parameter: Tensor) -> Tensor:
        """The weight, or the bias, as (d_out, taps, channels): one tap but for a convolution.

        A view, unless the height and width of a filter do not lie behind one another in memory.
        """
        if parameter.dim() == 1:
            return parameter.view(-1, 1, 1)
        if self.transposed:
            return parameter.t().unsqueeze(1)
        if parameter.dim() == 2:
            return parameter.unsqueeze(1)
        return parameter.flatten(2).transpose(1, 2)

    def parts(self, matrix: Tensor, weight_shape: torch.Size) -> list[Tensor]:
        """What of a matrix belongs to the weight, and to the bias if there is one, each as `by_taps` has it."""
        columns = (matrix[..., :-1], matrix[..., -1:]) if self.bias else (matrix,)
        rows = [part.flatten(0, 1) if self.groups > 1 else part for part in columns]
        channels = weight_shape[1] if len(weight_shape) > 2 else rows[0].shape[1]
        return [rows[0].unflatten(1, (-1, channels)), *(part.unsqueeze(1) for part in rows[1:])]

    def in_weight_order(self, A: Tensor, weight_shape: torch.Size) -> Tensor:
        """A with its rows and columns in the order of `weight.flatten(1)`, the bias still last."""
        if self.operation != "conv":
            return A
        channels = weight_shape[1]
        order = torch.arange(math.prod(weight_shape[1:]), device=A.device).unflatten(0, (-1, channels)).t().flatten()
        if self.bias:
            order = torch.cat([order, order.new_full((1,), len(order))])
        return A[..., order] if self.diagonal_A else A[..., order, :][..., order]

    @property
    def name(self) -> str:
        """What coverage() reports: the operation, and the sides that a diagonal stands for."""
        sides = [side for side, diagonal in (("A", self.diagonal_A), ("G", self.diagonal_G)) if diagonal]
        return f"{self.operation} (diagonal {' and '.join(sides)})" if sides else self.operation
