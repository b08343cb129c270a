"""The uses of weights that one pass of K-FAC's own has shown."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, _engine_run_backward

from kfac_triton.capture.tensors import packed
from kfac_triton.operations.use import Use

# A GradientEdge from a tuple of its fields without a Python call; behind node and output_nr come those with a default.
edge_from: Callable[[tuple[Any, ...]], GradientEdge] = partial(tuple.__new__, GradientEdge)
DEFAULTS = (None,) * (len(GradientEdge._fields) - 2)


def gradients_at(
    edges: Sequence[GradientEdge | None], root: Tensor | GradientEdge, direction: Tensor, *, keep_graph: bool
) -> Sequence[Tensor | None]:
    """`torch.autograd.grad` without the Python calls in which it looks at every edge; None where no gradient comes."""
    found: Sequence[Tensor | None] = _engine_run_backward(
        (root,), (direction,), keep_graph, False, tuple(edges), allow_unreachable=True, accumulate_grad=False
    )
    return found


@dataclass(eq=False, repr=False)
class Recorded:
    """A use and the place in the graph where its gradient dy appears; `shape` is dy's, as the operation returned it."""

    use: Use
    edge: GradientEdge | None
    shape: torch.Size

    def g(self, dy: Tensor) -> Tensor:
        return self.use.g(self._as_returned(dy) if dy.is_nested or dy.shape != self.shape else dy)

    def g_by_images(self, dy: Tensor) -> Tensor:
        return self.use.g_by_images(self._as_returned(dy) if dy.is_nested or dy.shape != self.shape else dy)

    def _as_returned(self, dy: Tensor) -> Tensor:
        return packed(dy) if dy.is_nested else dy.reshape(self.shape)


class ByParameter:
    """The recorded uses of every parameter, in the order of the first ones; `lists` by the parameter's id."""

    def __init__(self) -> None:
        self.lists: dict[int, tuple[nn.Parameter, list[Recorded]]] = {}

    def append(self, parameter: nn.Parameter, recorded: Recorded) -> None:
        self.lists.setdefault(id(parameter), (parameter, []))[1].append(recorded)

    def items(self) -> Collection[tuple[nn.Parameter, list[Recorded]]]:
        return self.lists.values()

    def get(self, parameter: nn.Parameter, default: Sequence[Recorded] = ()) -> Sequence[Recorded]:
        return self.lists[id(parameter)][1] if id(parameter) in self.lists else default


@dataclass(eq=False, repr=False)
class Uses:
    """What one pass saw: the uses of every weight, and the parameters used by something no block covers."""

    recorded: ByParameter = field(default_factory=ByParameter)
    unsupported: dict[nn.Parameter, str] = field(default_factory=dict)
