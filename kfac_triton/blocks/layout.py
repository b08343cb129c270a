"""How a weight and its bias become one matrix of shape (d_out, d_in[+1]), and how that matrix becomes both again.

The bias is the weight of a homogeneous coordinate: the last column. A convolution's weight is flattened behind its
output channels, in the order of its own axes; with groups > 1 a leading axis holds one matrix for each group.
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
        matrix = weight.t() if self.transposed else weight.flatten(1)
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
            weight = weight.t()
        return weight.reshape(weight_shape), bias

    @property
    def name(self) -> str:
        """What coverage() reports: the operation, and the sides that a diagonal stands for."""
        sides = [side for side, diagonal in (("A", self.diagonal_A), ("G", self.diagonal_G)) if diagonal]
        return f"{self.operation} (diagonal {' and '.join(sides)})" if sides else self.operation
