"""The calls that a ledger keeps, and what it tells of them."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.autograd.graph import GradientEdge

from kfac_triton.capture.inputs import Inputs
from kfac_triton.capture.state import ModuleState
from kfac_triton.capture.tensors import version


class Call:
    """One outermost call: what it received, and the calls whose outputs its inputs were computed from.

    `record` belongs to the listener.
    """

    __slots__ = ("__weakref__", "_versions", "ancestors", "inputs", "record")

    def __init__(self, inputs: Inputs, ancestors: dict[Call, None]) -> None:
        self.inputs = inputs
        self.ancestors = ancestors
        self.record: Any = None
        # outside of compiled code the call may still write to its inputs: `close` notes what it leaves
        self._versions = list(map(version, inputs.tensors())) if inputs.opening is None else []

    def close(self, state: ModuleState) -> None:
        """The call returned: what it received is in containers of its own, and no tensor that the call wrote to."""
        module, _, _, autocast, note, opening = self.inputs
        assert opening is not None
        self.inputs = Inputs(module, *state.closing(opening), autocast, note, opening)
        self._versions = list(map(version, self.inputs.tensors()))

    def check_unwritten(self) -> None:
        """Raises RuntimeError where an input was written to since the call, so that it cannot be repeated."""
        if list(map(version, self.inputs.tensors())) != self._versions:
            raise RuntimeError(
                "an input of the model was modified in place between its forward pass and step(); "
                "pass a copy of it to the model, or move the write behind step()"
            )


class Listener:
    """What a ledger tells of the passes it sees. `begun` and `returned` are traced in compiled code.

    `assigned_gradients`: whether a pass counts whose gradients `torch.autograd.grad` returned, for want of another.
    """

    assigned_gradients = True

    def begun(self) -> Any:
        """A call begins; what this returns becomes the `note` of its inputs."""

    def returned(self, inputs: Inputs, returned: Any) -> None:
        """A call returned."""

    def opened(self, call: Call) -> None:
        """A call begins, outside of compiled code."""

    def closed(self, call: Call, returned: Any) -> Tensor | None:
        """That call is over; after an exception it returned None. `arrived` is told of the tensor that this returns."""

    def arrived(self, call: Call, edge: GradientEdge) -> None:
        """A backward pass has come to this tensor; `edge` is its place in the graph, of which all is still there."""

    def ended(self, counted: bool) -> None:
        """A backward pass is over; `counted`: it accumulated gradients."""

    def dropped(self) -> None:
        """What counted so far does not count any more."""


def ancestors_of(tensors: Iterable[Tensor], made: Mapping[int, weakref.ref[Call]]) -> dict[Call, None]:
    """The calls whose outputs these tensors were computed from, with their ancestors, in an order that repeats.

    `made`: the calls by the sequence numbers of the autograd nodes of their outputs.
    """
    found: dict[Call, None] = {}
    nodes = [t.grad_fn for t in tensors if t.grad_fn is not None]
    known = set(nodes)
    while nodes:
        node = nodes.pop()
        reference = made.get(node._sequence_nr())
        call = None if reference is None else reference()
        if call is not None:
            found |= {call: None, **call.ancestors}
            continue
        for following, _ in node.next_functions:
            if following is not None and following not in known:
                known.add(following)
                nodes.append(following)
    return found
