"""Backward passes under way, and the calls whose gradients the parameters hold."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from kfac_triton.capture.calls import Call, Listener
from kfac_triton.capture.gradients import Destination, Gradients, Mark
from kfac_triton.capture.tensors import nbytes

log = logging.getLogger("kfac_triton")

MAX_KEPT_BYTES = 2**31


class BackwardPass:
    """One that is under way: the calls that it has reached, where it puts gradients, and those from before it."""

    def __init__(self, destination: Destination, before: list[Mark]) -> None:
        self.calls: list[Call] = []
        self.destination = destination
        self.before = before
        self.compiled_known = False


class BackwardPasses:
    """Keeps the calls that made the present `gradients` of parameters: `pending`.

    `returned`: those of the last pass whose gradients `torch.autograd.grad` returned. `paused`: a pass of K-FAC's own
    runs through the user's graph, which is none of the user's. `changed()` makes `gradients` follow other parameters if
    there are some.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], listener: Listener, changed: Callable[[], None]) -> None:
        self.gradients = Gradients(parameters)
        self.paused = False
        self.pending: list[Call] = []
        self.returned: list[Call] = []
        self._listener, self._changed = listener, changed
        self._under_way: dict[int, BackwardPass] = {}
        self._asked = (-1, Destination.NOWHERE)
        self._bytes = 0
        self._full = False

    def reached(self, call: Call, gradients: tuple[Tensor, ...]) -> None:
        """A backward pass is where an output was made; nothing in front of it has been accumulated yet."""
        if self.paused:
            return
        calls = self.here().calls
        if call not in calls:
            calls.append(call)

    def here(self, besides: Tensor | None = None) -> BackwardPass:
        """The record of this backward pass; a re-entrant checkpoint inside one has its own.

        `besides`: a parameter that has its gradient already.
        """
        number = torch._C._current_graph_task_id()
        found = self._under_way.get(number)
        if found is None:
            if self.pending and not self.gradients.kept(besides):
                self.forget()
            destination = self.destination()
            sure = destination is Destination.ACCUMULATED
            found = BackwardPass(destination, [] if sure else self.gradients.marks(besides))
            self._under_way[number] = found
            torch.autograd.Variable._execution_engine.queue_callback(functools.partial(self._ended, number))
        return found

    def calls_here(self) -> list[Call]:
        """In a backward pass: the calls that it has reached so far."""
        found = self._under_way.get(torch._C._current_graph_task_id())
        return [] if found is None else found.calls

    def destination(self) -> Destination:
        """In a backward pass: what becomes of the gradients of parameters."""
        number = torch._C._current_graph_task_id()
        if self._asked[0] != number:
            found = self.gradients.destination()
            if found is Destination.NOWHERE:  # perhaps since the user exchanged parameters
                self._changed()
                found = self.gradients.destination()
            self._asked = (number, found)
        return self._asked[1]

    def runs_again(self, module: nn.Module) -> bool:
        """Whether a call of this module belongs to one that a backward pass has reached: under a checkpoint."""
        if not self._under_way:
            return False
        if torch._C._current_graph_task_id() == -1:
            self._under_way.clear()  # of a backward pass that raised
        again = (call.inputs.module for one in self._under_way.values() for call in one.calls)
        return any(module in set(root.modules()) for root in again)

    def _ended(self, number: int) -> None:
        one = self._under_way.pop(number, None)
        if one is None:
            return
        counted = one.destination is Destination.ACCUMULATED or self.gradients.changed(one.before)
        if counted:
            self.gradients.note()
            for call in one.calls:
                self._keep(call)
        elif one.destination is Destination.RETURNED and self._listener.assigned_gradients:
            self.returned = one.calls
        self._listener.ended(counted)

    def _keep(self, call: Call) -> None:
        if call in self.pending:
            return
        size = sum(map(nbytes, call.inputs.tensors()))
        if self.pending and self._bytes + size > MAX_KEPT_BYTES:
            if not self._full:
                log.warning("a step's inputs exceed %d bytes; the later ones stay out of the factors", MAX_KEPT_BYTES)
            self._full = True
            return
        self._bytes += size
        self.pending.append(call)

    def forget(self) -> None:
        """Drop what was kept: its gradients were cleared, or the step is skipped."""
        self.pending, self._bytes = [], 0
        self._listener.dropped()

    def reset(self) -> None:
        """Forget all calls, and backward passes that raised."""
        self.pending, self.returned, self._bytes = [], [], 0
        self._under_way.clear()
