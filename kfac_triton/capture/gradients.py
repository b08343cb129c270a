"""Whether the gradients of some parameters are still those that a backward pass accumulated."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from operator import attrgetter

import torch
from torch import Tensor, nn


class Destination(Enum):
    """Where a backward pass puts the gradients of parameters."""

    ACCUMULATED = "added to .grad"
    RETURNED = "returned by torch.autograd.grad"
    NOWHERE = "not computed"


_grad_of, _version_of = attrgetter("grad"), attrgetter("_version")

Mark = tuple[int, int] | None  # identity and version of a gradient; None where there is none


class Gradients:
    """The gradients of `parameters`, told apart by identity and version, so that nothing waits for a device."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters: list[nn.Parameter] = []
        self._noted: list[Mark] = []
        self.follow(parameters)

    def follow(self, parameters: Sequence[nn.Parameter]) -> None:
        """Look at these parameters from now on."""
        self.parameters = list(parameters)
        self._noted = []

    def marks(self, besides: Tensor | None = None) -> list[Mark]:
        """The mark of every gradient; None for that of the parameter `besides`."""
        if besides is None:
            grads = list(map(_grad_of, self.parameters))
            try:
                return list(zip(map(id, grads), map(_version_of, grads), strict=True))
            except AttributeError:  # one is None
                pass
        return [None if (g := p.grad) is None or p is besides else (id(g), g._version) for p in self.parameters]

    def note(self) -> None:
        """Remember the gradients as they are now."""
        self._noted = self.marks()

    def changed(self, before: Sequence[Mark]) -> bool:
        """Whether a gradient is there that was not there, or was another, when `before` was made."""
        return any(now is not None and now != mark for now, mark in zip(self.marks(), before, strict=True))

    def cleared(self) -> bool:
        """Whether no parameter has a gradient."""
        return all(p.grad is None for p in self.parameters)

    def kept(self, besides: Tensor | None = None) -> bool:
        """Whether something of what was noted is still there. `besides` has been accumulated into since.

        A gradient that was written to counts if it is not zero: clipping keeps it, `zero_` does not. Only then a GPU is
        waited for. On a CPU every gradient is looked at, since torch does not count `grad.data.zero_()` as a write.
        """
        doubtful = []
        for p, mark in zip(self.parameters, self._noted, strict=False):
            g = p.grad
            if g is None or mark is None or p is besides or g.layout is not torch.strided:
                continue
            if (id(g), g._version) == mark and (g.device.type != "cpu" or bool(g.any())):
                return True
            doubtful.append(g)
        return any(bool(g.any()) for g in doubtful)

    def destination(self) -> Destination:
        """In a backward pass: what becomes of the gradients of parameters, inner backward passes left out."""
        for p in self.parameters:
            if p.requires_grad:
                # asked for anew each time: a node that is held would keep the shape of a parameter that changes it
                before = torch.is_grad_enabled()
                torch._C._set_grad_enabled(True)
                made = p.view_as(p).grad_fn  # `get_gradient_edge` without its Python calls
                torch._C._set_grad_enabled(before)
                node = None if made is None else made.next_functions[0][0]
                try:
                    if node is not None and torch._C._will_engine_execute_node(node):
                        return Destination.ACCUMULATED
                except RuntimeError:  # torch.autograd.grad with respect to this very parameter
                    return Destination.RETURNED
        return Destination.NOWHERE
