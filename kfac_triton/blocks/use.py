"""A use of a weight: one call of an operation in one forward pass, with what is needed to make its rows a and g."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Part:
    """A parameter as an operation received it: itself, rows start:stop of it, or the transpose of either."""

    parameter: torch.nn.Parameter
    start: int
    stop: int
    transposed: bool = False

    @property
    def whole(self) -> bool:
        return self.start == 0 and self.stop == self.parameter.shape[0]


@dataclass(frozen=True)
class Use(ABC):
    """One call of an operation with `weight`. The input `x` is kept by reference, without its graph.

    `transposed` and `groups` as in `Layout`. `batch_axis` is the axis of x that counts the examples; where it is 1 and
    x is flat, (positions * examples, d_in), `examples` tells them apart.
    """

    weight: Part
    bias: Part | None
    x: Tensor
    transposed: bool = False
    groups: int = 1
    batch_axis: int = 0
    examples: int = 0

    operation = ""

    @abstractmethod
    def a(self) -> Tensor:
        """Inputs as rows (n, d_in), or (groups, n, d_in); rows of one example stand together."""

    @abstractmethod
    def g(self, dy: Tensor) -> Tensor:
        """Gradients dy of the outputs as rows (n, d_out), or (groups, n, d_out), in the order of `a`."""
