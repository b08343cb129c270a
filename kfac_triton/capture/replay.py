"""K-FAC's own pass through the user's model: it starts where the user's pass began, and afterwards everything is as it
was before it.

The pass works on copies of the state. So it does not write to the user's own objects, and giving attributes back what
they held undoes what it did.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kfac_triton.capture.copies import PLAIN, Copies, plain
from kfac_triton.capture.owners import INTERNAL, Owner, restore
from kfac_triton.capture.randomness import FirstDraw, OtherGenerators, TorchDraws
from kfac_triton.capture.received import Arguments, Received, fresh
from kfac_triton.capture.state import MISSING, SMALL, ModuleState, Opening

MOST_TRAINED = 2**30  # bytes of trained parameters that are copied to find out that no forward pass writes to them
_LOST = (
    "the forward pass of {} writes to its input in place, and K-FAC has no copy of what came in; pass a copy of the "
    "input to the model"
)
RESCALED = {"rtol": 1e-4, "atol": 1e-6}  # how little a weight changes that a bound on its norm rescales once more


@contextmanager
def replayed(state: ModuleState, opening: Opening | None, seed: int | None, *, draws: bool = True) -> Iterator[Replay]:
    """Surrounds a pass of K-FAC's own, which calls `start` before it runs the model.

    `opening`: where the user's pass began; None: as the module is now. `seed`: of torch's global generators; None: as
    they were when the user's pass began. `draws`: whether the pass may draw from these at all.

    Raises:
        RuntimeError: the forward pass writes to a trained parameter, or it wrote to the input of the user's pass.
    """
    if opening is not None and opening.lost:
        raise RuntimeError(_LOST.format(type(state.root).__name__))
    state.refresh()
    replay = Replay(state, opening, seed, draws=draws)
    try:
        if replay.first_draw is None:
            yield replay
        else:
            with replay.first_draw:
                yield replay
        replay.learn()
    finally:
        rewritten = replay.put_back()
    if opening is None and replay.wrote_input:
        raise RuntimeError(_LOST.format(type(state.root).__name__))
    if rewritten is not None:
        name = next(name for name, p in state.root.named_parameters() if p is rewritten)
        raise RuntimeError(
            f"the forward pass of {type(state.root).__name__} writes to the trained parameter {name}. K-FAC runs the "
            "forward pass again inside step(), which would write to it twice: write to it outside of forward, or "
            f"freeze it with {name}.requires_grad_(False)"
        )


class Replay:
    """One pass of K-FAC's own through the root of `state`, or a part of it."""

    def __init__(self, state: ModuleState, opening: Opening | None, seed: int | None, *, draws: bool) -> None:
        self._state, self._opening = state, opening
        self._before: list[tuple[Owner, dict[str, Any]]] = [
            (owner, dict(owner)) for owner in (*state.owners, *state.places)
        ]
        self._keys, self._names = state.keys, state.names
        self._started = False
        self._objects: dict[int, tuple[dict[str, Any], dict[str, Any]]] = {}  # id(vars(one)) -> (vars(one), a copy)
        self._copies = Copies(state.storages, SMALL)
        self._received: Received | None = None
        self.wrote_input = False
        self._scripted = [(b, b.clone()) for m in state.scripted for b in m.buffers(recurse=False)]
        self._untrained = [(one, one.parameter._version) for one in state.untrained if not state.changes(*one[:2])]
        elsewhere = [p for m in state.scripted for p in m.parameters(recurse=False)]
        self._requires_grad = [(p, p.requires_grad) for p in (*state.parameters, *elsewhere)]
        self._weights = self._trained_weights()
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
        for (owner, before), keys, names in zip(self._before, self._keys, self._names, strict=False):
            same = list(owner) == keys
            for name in names if same else (owner.keys() | before.keys()) - INTERNAL:
                value, now = before.get(name, MISSING), owner.get(name, MISSING)
                if (now is value and (type(value) in PLAIN or plain(value))) or state.changes(owner, name):
                    continue
                if not self._copies.untouched(now, value, self._attributes_of):
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
        for p, flag in self._requires_grad:
            if p.requires_grad != flag:
                p.requires_grad_(flag)
        moved = self._others.moved()
        if moved or self._others_set:
            self._others.restore()
            self._state.draws_others |= moved
        return self._restore_weights()

    def _restore_attributes(self) -> None:
        for owner, before in self._before:
            owner.update(before)
            if len(owner) != len(before):
                restore(owner, before)
        for attributes, before in self._objects.values():
            restore(attributes, before)

    def _place_copies(self) -> None:
        """Copies in the place of what the pass could write into."""
        state = self._state
        self._copies = Copies(state.storages, SMALL)
        for (owner, before), names in zip(self._before, self._names, strict=False):
            for name in names:
                if type(before[name]) not in PLAIN and not plain(before[name]):
                    owner[name] = self._copies.of(before[name])
        self._place_objects(self._copies, self._copies)
        changed = Copies(state.storages, math.inf)
        for owner, name in state.changing():
            if name in owner:
                owner[name] = changed.attribute(owner[name])

    def _place_opening(self, opening: Opening) -> None:
        copies = Copies(self._state.storages, math.inf)
        for owner, name, kept in opening.attributes:
            if kept is not MISSING:
                owner[name] = copies.attribute(kept)
            elif name in owner:
                del owner[name]
        self._place_objects(opening.copies, copies)
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

    def _trained_weights(self) -> list[tuple[nn.Parameter, int, Tensor | None]]:
        """(parameter, version, copy): copies of those that a pass writes to, and of all in the first pass."""
        state, size = self._state, 0
        weights = []
        for p in state.trained:
            size += 0 if state.verified else p.nbytes
            known = bool(state.written) and p in state.written  # torch hashes a tensor in Python
            copied = known or (not state.verified and size <= MOST_TRAINED)
            weights.append((p, p._version, p.detach().clone() if copied else None))
        return weights

    def _restore_weights(self) -> nn.Parameter | None:
        state, rewritten = self._state, None
        for p, version, before in self._weights:
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
