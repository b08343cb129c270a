"""K-FAC's own pass through the user's model: it starts where the user's pass began, and afterwards everything is as it
was before it.

The pass works on copies of the state. So it does not write to the user's own objects, and giving attributes back what
they held undoes what it did.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from kfac_triton.capture.copies import PLAIN, Copies, plain
from kfac_triton.capture.owners import INTERNAL, Owner, restore
from kfac_triton.capture.randomness import FirstDraw, OtherGenerators, TorchDraws
from kfac_triton.capture.received import Arguments, Received, fresh
from kfac_triton.capture.state import MISSING, SMALL, ModuleState, Opening, training_of

MOST_TRAINED = 2**30  # bytes of trained parameters that are copied to find out that no forward pass writes to them
_LOST = (
    "the forward pass of {} writes to its input in place, and K-FAC has no copy of what came in; pass a copy of the "
    "input to the model"
)
_requires_grad, _version = attrgetter("requires_grad"), attrgetter("_version")
RESCALED = {"rtol": 1e-4, "atol": 1e-6}  # how little a weight changes that a bound on its norm rescales once more


class replayed:
    """Surrounds a pass of K-FAC's own, which calls `start` before it runs the model.

    `opening`: where the user's pass began; None: as the module is now. `seed`: of torch's global generators; None: as
    they were when the user's pass began. `draws`: whether the pass may draw from these at all.

    Raises:
        RuntimeError: the forward pass writes to a trained parameter, or it wrote to the input of the user's pass.
    """

    def __init__(self, state: ModuleState, opening: Opening | None, seed: int | None, *, draws: bool = True) -> None:
        if opening is not None and opening.lost:
            raise RuntimeError(_LOST.format(type(state.root).__name__))
        self._state, self._arguments, self._draws = state, (opening, seed), draws

    def __enter__(self) -> Replay:
        self._state.refresh()
        self._replay = replay = Replay(self._state, *self._arguments, draws=self._draws)
        if replay.first_draw is not None:
            replay.first_draw.__enter__()  # type: ignore[no-untyped-call]
        return replay

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        state, replay, rewritten = self._state, self._replay, None
        try:
            if replay.first_draw is not None:
                replay.first_draw.__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
            if kind is None:
                replay.learn()
        finally:
            rewritten = replay.put_back()
        if kind is not None:
            return
        if self._arguments[0] is None and replay.wrote_input:
            raise RuntimeError(_LOST.format(type(state.root).__name__))
        if rewritten is not None:
            name = next(name for name, p in state.root.named_parameters() if p is rewritten)
            raise RuntimeError(
                f"the forward pass of {type(state.root).__name__} writes to the trained parameter {name}. K-FAC runs "
                "the forward pass again inside step(), which would write to it twice: write to it outside of forward, "
                f"or freeze it with {name}.requires_grad_(False)"
            )


class Replay:
    """One pass of K-FAC's own through the root of `state`, or a part of it; `recurrent`: there are recurrent layers."""

    def __init__(self, state: ModuleState, opening: Opening | None, seed: int | None, *, draws: bool) -> None:
        self._state, self._opening = state, opening
        self.recurrent = state.recurrent
        self._still, self._still_unchanged = state.still, False
        self._live: list[tuple[Owner, dict[str, Any], list[str]]] = [
            (owner, dict(owner), names) for owner, _, names in state.live
        ]
        self._started = False
        self._objects: dict[int, tuple[dict[str, Any], dict[str, Any]]] = {}  # id(vars(one)) -> (vars(one), a copy)
        self._copies: Copies | None = None
        self._received: Received | None = None
        self.wrote_input = False
        self._scripted: list[tuple[Tensor, Tensor]] = []
        self._parameters, self._requires_grad = state.parameters, state.requires_grad
        if state.scripted:
            self._scripted = [(b, b.clone()) for m in state.scripted for b in m.buffers(recurse=False)]
            elsewhere = [p for m in state.scripted for p in m.parameters(recurse=False)]
            self._parameters = [*self._parameters, *elsewhere]
            self._requires_grad = [*self._requires_grad, *(p.requires_grad for p in elsewhere)]
        self._untrained = [(one, one.parameter._version) for one in state.untrained if not state.changes(*one[:2])]
        self._trained, self._versions = state.trained, list(map(_version, state.trained))
        self._weights = self._copied_weights() if state.written or not state.verified else {}
        self._others, self._others_set = OtherGenerators.now(), False
        perhaps = draws and (opening is None or opening.drew is not False)
        self._draws = TorchDraws(state.device, _beginning(opening, seed, state.device), surely=perhaps and state.draws)
        self.first_draw = FirstDraw(self._draws) if perhaps and not state.draws else None

    def start(self, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Arguments:
        """Puts the module where the user's pass began. Returns the arguments to call it with.

        A pass that failed, or that is one of several, starts again.
        """
        if self._started:
            self._restore_attributes()
        self._started = True
        self._place_copies()
        if self._opening is not None:
            self._place_opening(self._opening)
        self._draws.start()
        arguments = fresh((args, kwargs or {}))
        self._received = Received(*arguments, copied=False)
        return arguments

    def learn(self) -> None:
        """Notes what this pass changed and none was known to change."""
        state = self._state
        self._still_unchanged = self._still.unchanged()
        touched = [] if self._still_unchanged else [(*one, list(one[1])) for one in self._still.owners()]
        for owner, before, names in (*self._live, *touched):
            for name in names if owner.keys() == before.keys() else owner.keys() | before.keys():
                value, now = before.get(name, MISSING), owner.get(name, MISSING)
                if (now is value and (type(value) in PLAIN or plain(value))) or state.changes(owner, name):
                    continue
                if name not in INTERNAL and not self._untouched(now, value):
                    state.learn(owner, name)
                    if now is value and isinstance(value, Tensor):
                        self._warn_of_write(name)
        for one, version in self._untrained:
            if one.parameter._version != version:
                state.learn(one.place, one.name)
                self._warn_of_write(one.name)
        if self._opening is None and state.changing():
            state.warn(
                "the forward pass of %s changes %s, and compiled code does not show where a pass begins: the "
                "statistics are those of the state after it. Train the model without torch.compile, or keep the state "
                "outside of the model",
                type(state.root).__name__,
                ", ".join(sorted({name for _, name in state.changing()})),
            )
        self.wrote_input = self._received is not None and self._received.written()
        state.writes_inputs |= self.wrote_input

    def put_back(self) -> nn.Parameter | None:
        """Makes everything as it was. Returns a trained parameter to which the pass wrote, if there is one."""
        self._draws.close()
        self._state.draws |= self._draws.drew
        self._restore_attributes()
        with torch.no_grad():
            for b, value in self._scripted:
                b.copy_(value)
        if list(map(_requires_grad, self._parameters)) != self._requires_grad:
            for p, flag in zip(self._parameters, self._requires_grad, strict=True):
                if p.requires_grad != flag:
                    p.requires_grad_(flag)
        moved = self._others.moved()
        if moved or self._others_set:
            self._others.restore()
            self._state.draws_others |= moved
        return self._restore_weights()

    def _restore_attributes(self) -> None:
        if not (self._still_unchanged or self._still.unchanged()):
            self._still.restore()
        for owner, before, _ in self._live:
            owner.update(before)
            if len(owner) != len(before):
                restore(owner, before)
        for attributes, before in self._objects.values():
            restore(attributes, before)

    def _place_copies(self) -> None:
        """Copies in the place of what the pass could write into."""
        state = self._state
        if self._live:
            self._copies = copies = Copies(state.storages, SMALL)
            for owner, before, names in self._live:
                for name in names:
                    if type(before[name]) not in PLAIN and not plain(before[name]):
                        owner[name] = copies.of(before[name])
            self._place_objects(copies, copies)
        changing = state.changing()
        if changing:
            changed = Copies(state.storages, math.inf)
            for owner, name in changing:
                if name in owner:
                    owner[name] = changed.attribute(owner[name])

    def _place_opening(self, opening: Opening) -> None:
        if opening.copies is not None:
            copies = Copies(self._state.storages, math.inf)
            for owner, name, kept in opening.attributes:
                if kept is not MISSING:
                    owner[name] = copies.attribute(kept)
                elif name in owner:
                    del owner[name]
            self._place_objects(opening.copies, copies)
        if list(map(training_of, opening.modules)) != opening.training:
            for m, flag in zip(opening.modules, opening.training, strict=True):
                if m.training != flag:
                    m.training = flag
        if opening.others is not None:
            opening.others.restore()
            self._others_set = True

    def _place_objects(self, kept: Copies, copies: Copies) -> None:
        for attributes, values in list(kept.objects.values()):
            self._objects.setdefault(id(attributes), (attributes, dict(attributes)))
            restore(attributes, {name: copies.of(value) for name, value in values.items()})

    def _attributes_of(self, one: Any) -> dict[str, Any] | None:
        return self._objects.get(id(vars(one)), (None, None))[1]

    def _untouched(self, now: Any, value: Any) -> bool:
        """Whether an attribute holds what it held when the pass began, with the same content."""
        copies = self._copies or Copies(self._state.storages, SMALL)
        return copies.untouched(now, value, self._attributes_of)

    def _copied_weights(self) -> dict[int, Tensor]:
        """Copies, by id, of the trained parameters that a pass writes to, and in the first pass of all."""
        state, size = self._state, 0
        copies = {}
        for p in state.trained:
            size += 0 if state.verified else p.nbytes
            if p in state.written or (not state.verified and size <= MOST_TRAINED):
                copies[id(p)] = p.detach().clone()
        return copies

    def _restore_weights(self) -> nn.Parameter | None:
        state, rewritten = self._state, None
        if state.verified and list(map(_version, self._trained)) == self._versions:
            return None
        for p, version in zip(self._trained, self._versions, strict=True):
            before = self._weights.get(id(p))
            if p._version == version and (state.verified or before is None or torch.equal(p.detach(), before)):
                continue
            state.written[p] = None
            if before is None or not torch.allclose(p.detach(), before, equal_nan=True, **RESCALED):
                rewritten = p
            if before is not None:
                p.detach().copy_(before)
        state.verified = True
        return rewritten

    def _warn_of_write(self, what: str) -> None:
        self._state.warn(
            "the forward pass of %s inside step() wrote to %s, as no pass before did; it is protected from now on",
            type(self._state.root).__name__,
            what,
        )


def _beginning(opening: Opening | None, seed: int | None, device: torch.device) -> Callable[[], None]:
    """Sets torch's global generators as they are when the pass begins."""

    def begin() -> None:
        if seed is not None:
            torch.default_generator.manual_seed(seed)
            if device.type == "cuda":
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(seed)
        elif opening is not None:
            opening.torch.restore()

    return begin
