"""A use of a weight: one call of an operation in one forward pass, with what is needed to make its rows a and g."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from kfac_triton.ops import Rows

ATEN = torch.ops.aten  # the functions that exported programs call


class Part(NamedTuple):
    """A parameter as an operation received it: itself, rows start:stop of it, or the transpose of either."""

    parameter: torch.nn.Parameter
    start: int
    stop: int
    transposed: bool = False

    @property
    def whole(self) -> bool:
        return self.start == 0 and self.stop == self.parameter.shape[0]


# A Part from (parameter, start, stop, transposed) without a Python call, which a pass would make for every parameter.
part_from: Callable[[tuple[torch.nn.Parameter, int, int, bool]], Part] = partial(tuple.__new__, Part)


class Resolve(Protocol):
    """What a matcher asks of the pass: which known parameter an argument is."""

    def __call__(self, t: Any) -> Part | None:
        """t as whole rows of a known parameter; None where it is none, or other elements of one."""

    def owner(self, t: Any) -> torch.nn.Parameter | None:
        """The known parameter that t is, is a view of, was cast from, or exceeds by a number."""


def part_of(parameter: torch.nn.Parameter, t: Tensor) -> Part | None:
    """t as whole rows of `parameter.flatten(1)`, perhaps transposed; decided by shape, strides and offset."""
    rows = parameter.shape[0] if parameter.dim() else 1
    if t.shape == parameter.shape and t.stride() == parameter.stride():
        return Part(parameter, 0, rows)
    if parameter.dim() == 0 or not parameter.is_contiguous():
        transposed = t.dim() == 2 and t.shape == parameter.t().shape and t.stride() == parameter.t().stride()
        return Part(parameter, 0, rows, transposed=True) if transposed else None
    width = parameter.numel() // rows
    shared = t.untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr()  # a cast has a storage of its own
    origin = int(parameter.storage_offset()) if shared else 0
    start, rest = divmod(int(t.storage_offset()) - origin, width)
    if rest or (parameter.dim() > 1) != (t.dim() > 1):
        return None
    if t.dim() == 1:
        return Part(parameter, start, start + t.shape[0]) if t.stride(0) == 1 else None
    for view, transposed in ((t.flatten(1) if t.dim() > 2 else t, False), (t.t() if t.dim() == 2 else t, True)):
        if view.dim() == 2 and view.shape[1] == width and _strides_match(view, width):
            return Part(parameter, start, start + view.shape[0], transposed)
    return None


def _strides_match(view: Tensor, width: int) -> bool:
    return (width == 1 or view.stride(1) == 1) and (view.shape[0] == 1 or view.stride(0) == width)


@dataclass(eq=False, repr=False)
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

    def a_unwritten(self) -> Rows:
        """`a`, or what a kernel can do with instead of it."""
        return self.a()

    def g_by_images(self, dy: Tensor) -> Tensor:
        """`g`, or a view of dy with an axis of images before n, whose rows need no copy."""
        return self.g(dy)
