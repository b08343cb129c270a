"""The state of the user's model besides its trained parameters: where each of the user's forward passes began.

State is what a forward pass may write: plain attributes of modules, buffers, parameters that are not trained, training
flags, and random number generators. The first pass shows which of these a forward pass changes; from then on only
these are saved when a pass begins.
"""

from __future__ import annotations

import logging
import math
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import nn

from kfac_triton.capture.copies import Copies, storage_of
from kfac_triton.capture.owners import INTERNAL, Owner, Tree
from kfac_triton.capture.randomness import OtherGenerators, TorchGenerators
from kfac_triton.capture.received import Arguments, Received
from kfac_triton.capture.still import Still, still

log = logging.getLogger("kfac_triton")

SMALL = 2**24  # bytes of a tensor that is copied before it is known whether a forward pass writes to it
MOST_UNTRAINED = 2**28  # bytes of parameters that are not trained, all together, that are
MISSING = object()
_requires_grad, training_of = attrgetter("requires_grad"), attrgetter("training")


class Placed(NamedTuple):
    """A parameter, its name, and the module's dictionary that holds it."""

    place: Owner
    name: str
    parameter: nn.Parameter


class Opening:
    """Where a forward pass began: `attributes` (owner, name, copy), the modules' training flags, generators.

    `drew`: whether torch's global generators moved in the pass; None until it returned. `lost`: the pass wrote to a
    tensor that it received, and there is no copy.
    """

    def __init__(
        self, copies: Copies | None, received: Received, modules: list[nn.Module], device: torch.device
    ) -> None:
        self.copies, self.received = copies, received
        self.modules, self.training = modules, list(map(training_of, modules))
        self.attributes: list[tuple[Owner, str, Any]] = []
        self.versions: list[int] = []
        self.torch = TorchGenerators.now(device)
        self.others: OtherGenerators | None = None
        self.drew: bool | None = None
        self.lost = False


class _FirstOpening(Opening):
    """Where the first pass of `called` began; `owners` and the versions of trained parameters show what it changes."""

    copies: Copies
    called: nn.Module
    owners: list[Owner]
    trained: list[tuple[nn.Parameter, int]]


class ModuleState:
    """Saves where the user's passes of `root` begin, and knows what they change.

    `modules`, `trained` parameters and `untrained` ones with their places are those of the last `refresh`. So are the
    owners: those that are `still`, and the others, `live`, with their keys and those of them that not every module has.
    `recurrent`: there are recurrent layers.
    `written`: trained parameters that a forward pass writes to.
    """

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self.writes_inputs = False
        self.draws = self.draws_others = False  # torch's global generators; Python's or numpy's
        self.closure_draws = True  # until it is known that the last closure drew nothing
        self.clears_gradients = True  # until a pass of K-FAC's own has shown that it calls no zero_grad()
        self.written: dict[nn.Parameter, None] = {}
        self.verified = False  # whether a pass of K-FAC's own has shown that it writes to no other trained parameter
        self._known: dict[nn.Module, None] = {}  # modules of whose calls it is known what they change
        self._changing: dict[tuple[int, str], tuple[Owner, str]] = {}
        self._warned: set[str] = set()
        self._tree = Tree(root)
        self._looked = False
        self.refresh()

    def refresh(self) -> None:
        """Looks at which modules and parameters there are."""
        if not (self._tree.refresh() and self._looked and self._as_before()):
            self._look()
        self._storages: set[int | None] | None = None
        self._kept_for_evaluation = self._tree.running_statistics()
        self.device = self.parameters[0].device if self.parameters else torch.device("cpu")

    def _as_before(self) -> bool:
        return (
            self.still.unchanged()
            and list(map(_requires_grad, self.parameters)) == self.requires_grad
            and all([list(owner) == keys for owner, keys, _ in self.live])
        )

    def _look(self) -> None:
        tree = self._tree
        self._looked = True
        self.modules, self.owners, self.scripted = tree.modules, tree.owners, tree.scripted
        self.still = Still([owner for owner in self.owners if still(owner)], tree.parameters)
        self.live = [
            (owner, list(owner), [name for name in owner if name not in INTERNAL])
            for owner in self.owners
            if not still(owner)
        ]
        self.recurrent = any([isinstance(m, (nn.RNNBase, nn.RNNCellBase)) for m in tree.modules])
        places: list[Owner] = [table for table in tree.parameters if table]
        placed = [(table, name, p) for table in places for name, p in table.items() if p is not None]
        self.parameters = [p for _, _, p in placed]
        self.requires_grad = [p.requires_grad for p in self.parameters]
        self.trained = [p for p in self.parameters if p.requires_grad]
        self.untrained = [Placed(*one) for one in placed if not one[2].requires_grad and not one[2].is_inference()]
        self._known = {m: None for m in self.modules if m in self._known}
        if self._changing:
            known = {id(owner) for owner in (*self.owners, *places)}
            self._changing = {key: where for key, where in self._changing.items() if key[0] in known}

    def storages(self) -> set[int | None]:
        """The memory of the parameters, which few passes ask for."""
        if self._storages is None:
            self._storages = {storage_of(p) for p in self.parameters} - {None}
        return self._storages

    def opening(
        self, called: nn.Module | None = None, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Opening:
        """A forward pass, a call of some module, begins, or a closure that runs some."""
        called = self.root if called is None else called
        if called not in self._known:
            return self._first_opening(called, args, kwargs or {})
        received = Received(args, kwargs or {}, copied=self.writes_inputs)
        opening = Opening(None, received, self.modules, self.device)
        if self.untrained:
            opening.versions = [one.parameter._version for one in self.untrained]
        if self.draws_others:
            opening.others = OtherGenerators.now()
        if self._changing:
            opening.copies = Copies(self.storages, math.inf)
            opening.attributes = self._kept_changing(opening.copies)
        return opening

    def _kept_changing(self, copies: Copies) -> list[tuple[Owner, str, Any]]:
        return [(owner, name, copies.attribute(owner.get(name, MISSING))) for owner, name in self._changing.values()]

    def _first_opening(self, called: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Opening:
        """Saves all of the state; once some module was called, what belongs to this one, and what is known to change.

        A call of a layer says nothing of what a later one of the whole model changes.
        """
        self.refresh()
        received = Received(args, kwargs, copied=True)
        copies = Copies(self.storages, math.inf)
        opening = _FirstOpening(copies, received, self.modules, self.device)
        opening.called = called
        opening.owners = self._tree.below(called) if self._known else self.owners
        opening.trained = [(p, p._version) for p in self.trained if not p.is_inference()]
        opening.others = OtherGenerators.now()
        opening.attributes = self._kept_changing(copies)
        copies.limit = SMALL
        attributes = [(owner, name) for owner in opening.owners for name in owner.keys() - INTERNAL]
        opening.attributes += [
            (owner, name, copies.of(owner[name])) for owner, name in attributes if not self.changes(owner, name)
        ]
        opening.versions = [one.parameter._version for one in self.untrained]
        size = 0
        for place, name, p in self.untrained:
            size += p.nbytes
            if not self.changes(place, name) and p.nbytes <= SMALL and size <= MOST_UNTRAINED:
                opening.attributes.append((place, name, copies.attribute(p)))
        return opening

    def closing(self, opening: Opening) -> Arguments:
        """The pass that began there returned: learns what it changes. Returns the arguments it received."""
        if isinstance(opening, _FirstOpening):
            self._learn_all(opening)
        opening.drew = opening.torch.moved()
        for (place, name, p), version in zip(self.untrained, opening.versions, strict=False):
            if p._version != version:
                self.learn(place, name)
        written = opening.received.written()
        opening.lost = opening.received.lost(written)
        self.writes_inputs |= written
        return opening.received.arguments(copies=written)

    def _learn_all(self, opening: _FirstOpening) -> None:
        before = {(id(owner), name) for owner, name, _ in opening.attributes}
        for owner, name, copied in opening.attributes:
            if name not in owner or not opening.copies.unchanged(owner[name], copied):
                self.learn(owner, name)
        for owner in opening.owners:
            for name in owner.keys() - INTERNAL:
                if (id(owner), name) not in before:
                    self.learn(owner, name)
                    opening.attributes.append((owner, name, MISSING))
        opening.attributes = [one for one in opening.attributes if self.changes(*one[:2])]
        self.written |= dict.fromkeys(p for p, version in opening.trained if p._version != version)
        if opening.others is not None and opening.others.moved():
            self.draws_others = True
        elif not self.draws_others:
            opening.others = None
        self._known[opening.called] = None

    def learn(self, owner: Owner, name: str) -> None:
        """A forward pass changes this attribute."""
        if id(owner) not in self._kept_for_evaluation:
            self._changing[id(owner), name] = (owner, name)

    def changing(self) -> list[tuple[Owner, str]]:
        """The attributes that a forward pass is known to change."""
        return list(self._changing.values())

    def changes(self, owner: Owner, name: str) -> bool:
        """Whether a forward pass is known to change this attribute."""
        return (id(owner), name) in self._changing

    def warn(self, message: str, *values: object) -> None:
        """Logs a warning the first time."""
        if message % values not in self._warned:
            self._warned.add(message % values)
            log.warning(message, *values)
