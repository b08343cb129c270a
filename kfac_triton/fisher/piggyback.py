"""Statistics from the user's own graph, for programs that call a model in pieces.

An encoder and a decoder called one after the other, layers called one by one or a cell called in a loop cannot be run
again from the inputs of one call. There the uses of weights are recorded while the user's forward pass runs, and when
the user's backward pass reaches the outputs, the gradients for sampled targets go back through the same graph first.
No second forward pass runs; the whole batch enters the factors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from kfac_triton.capture import (
    Call,
    Destination,
    Ledger,
    Listener,
    Recorded,
    UnseenUses,
    UseRecorder,
    compiled_parts,
    custom_layers,
    gradients_at,
    unseen_uses,
)
from kfac_triton.distributed import Ranks
from kfac_triton.fisher.sampled import FisherPass, Seen, SeenUse, mixed_seed, tensor_of_outputs


@dataclass(eq=False, repr=False)
class _Record:
    """What was recorded in one call: the uses of weights and, detached, the outputs z if it returned such."""

    recorder: UseRecorder
    surroundings: ExitStack
    z: Tensor | None = None


@dataclass(eq=False, repr=False)
class _Outputs:
    """The outputs of one backward pass: those that others were not computed from, with the calls behind each."""

    seen: Seen = field(default_factory=Seen)
    of: dict[Recorded, SeenUse] = field(default_factory=dict)
    behind: list[set[Call]] = field(default_factory=list)

    def batch_of(self, calls: set[Call]) -> int:
        """The number of the batch that these calls work on: that of earlier outputs which share a call with them."""
        batch = next((i for i, others in enumerate(self.behind) if others & calls), len(self.behind))
        if batch == len(self.behind):
            self.behind.append(set())
        self.behind[batch] |= calls
        return batch


class Piggyback(Listener):
    """Records the passes of `ledger` while `armed`, in steps whose factors are due, and from a call of a lone layer on
    until the next step.

    `due()` returns the number of the next factor update, or None where the next step makes none.
    """

    ledger: Ledger

    def __init__(
        self,
        sampling: FisherPass,
        parameters: Callable[[], Iterable[nn.Parameter]],
        ranks: Ranks,
        due: Callable[[], int | None],
        armed: bool,
    ) -> None:
        self.armed = armed
        self._unseen = UnseenUses()
        self._layers = False
        self._sampling = sampling
        self._parameters, self._ranks, self._due = parameters, ranks, due
        self._here: _Outputs | None = None
        self._counted: list[Seen] = []

    def opened(self, call: Call) -> None:
        module = call.inputs.module
        if module is not self.ledger.root and not any(module.children()):
            self._layers = True
        if not (self.armed or self._layers) or self._due() is None or compiled_parts(module):
            return
        recorder = UseRecorder(p for p in self._parameters() if p.requires_grad)
        surroundings = ExitStack()
        surroundings.enter_context(custom_layers(module, recorder, self._sampling.blocks))
        surroundings.enter_context(recorder)
        call.record = _Record(recorder, surroundings)

    def closed(self, call: Call, returned: Any) -> Tensor | None:
        record: _Record | None = call.record
        if record is None:
            return None
        record.surroundings.close()
        try:
            z = tensor_of_outputs(returned, self._sampling.output)
        except Exception:  # an inner call may return whatever it likes
            return None
        if z.grad_fn is None:
            return None
        record.z = z.detach()
        return z

    def arrived(self, call: Call, edge: GradientEdge) -> None:
        if self.ledger.backward.destination() is not Destination.ACCUMULATED:
            return
        if any(call in other.ancestors for other in self.ledger.backward.calls_here()):
            return
        update = self._due()
        if update is None:
            return
        if self._here is None:
            self._here = _Outputs()
        self.ledger.backward.paused = True
        try:
            self._back_from(call, edge, update, self._here)
        finally:
            self.ledger.backward.paused = False

    def _back_from(self, call: Call, edge: GradientEdge, update: int, here: _Outputs) -> None:
        behind = [c for c in (call, *call.ancestors) if c.record is not None]
        uses = [
            (weight, recorded)
            for c in behind
            for weight, own in c.record.recorder.uses.recorded.items()
            for recorded in own
            if recorded.edge is not None
        ]
        recorders = [c.record.recorder for c in behind]
        here.seen.unsupported |= unseen_uses(recorders, self._unseen, edge.node)
        for recorder in recorders:
            here.seen.unsupported |= recorder.uses.unsupported
        number = len(here.seen.roots) + sum(len(seen.roots) for seen in self._counted)
        seed = mixed_seed(self._sampling.seed, update, number + (self._ranks.rank << 32))
        self._sampling.check_outputs(call.inputs, call.record.z)
        directions, valid, examples = self._sampling.directions(call.inputs, call.record.z, seed, here.seen)
        here.seen.roots.append(edge.node)
        counted = None if valid is None else valid.flatten()
        batch = here.batch_of(set(behind))
        edges = [recorded.edge for _, recorded in uses]
        for direction in directions if edges else ():
            found = gradients_at(edges, edge, direction, keep_graph=True)
            for (weight, recorded), dy in zip(uses, found, strict=True):
                if dy is not None:
                    use = here.of.setdefault(recorded, SeenUse(recorded, [], batch, examples, counted))
                    if not use.dys:
                        here.seen.uses.setdefault(weight, []).append(use)
                    if use.dys and not self._sampling.exact:  # of another output: one sample for the whole loss
                        use.dys[0] = use.dys[0] + dy
                    else:
                        use.dys.append(dy)

    def ended(self, counted: bool) -> None:
        here, self._here = self._here, None
        if here is not None and counted:
            self._counted.append(here.seen)

    def dropped(self) -> None:
        self._counted.clear()
        self._layers = False

    def take(self, kept: Sequence[Call]) -> Seen | None:
        """What the passes of this step gave; None where one of its calls was not recorded."""
        found, self._counted = self._counted, []
        recorded = all(call.record is not None for call in kept)
        for call in kept:
            call.record = None  # it holds the graph
        if not found or not recorded:
            return None
        self.armed |= any(call.ancestors for call in kept)
        seen, last = Seen(terms_per_example=found[-1].terms_per_example), 0
        for one in found:
            seen.terms = seen.terms + one.terms
            seen.unsupported.update(one.unsupported)
            seen.roots += one.roots
            batches = {use.batch for uses in one.uses.values() for use in uses}
            for weight, uses in one.uses.items():
                for use in uses:
                    use.batch += last
                    seen.uses.setdefault(weight, []).append(use)
            last += 1 + max(batches, default=0)
        return seen
