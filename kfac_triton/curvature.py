"""The layers of a model with their structures in fixed memory, and the state's views of it.

The tensors of a layer appear in the optimizer's state under the weight: views of the memory that structures hold for
all layers of one shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from typing import Any

from torch import Tensor, nn

from kfac_triton.averages import Averages
from kfac_triton.config import APPROXIMATIONS
from kfac_triton.distributed import Ranks
from kfac_triton.fisher.source import Source
from kfac_triton.joint import stacked
from kfac_triton.layer import Layer, description
from kfac_triton.structures.base import Structure
from kfac_triton.structures.kronecker import Kronecker
from kfac_triton.structures.registry import structure_of
from kfac_triton.structures.tridiagonal import Chain, Place
from kfac_triton.updates import Updates

PASSING = {f"{side}_{name}" for side in "AG" for name in ("rows", "weights", "kept", "waiting", "lag")}  # may go again

State = MutableMapping[Any, dict[str, Any]]


class Curvature:
    """Layers with their curvature.

    `layers`: by weight, in the order of the memory. `group_numbers`: the group of every parameter, by id. `version` and
    `grouping` count the changes of the memory and of the groups, after which views and lists are made anew.
    """

    def __init__(self, source: Source, state: Callable[[], State]) -> None:
        self.source, self.settings = source, source.settings
        self.layers: dict[nn.Parameter, Layer] = {}
        self.structures: list[Structure] = []
        self.chain: Chain | None = None
        self.version = 0
        self.group_numbers: dict[int, int] = {}
        self.grouping = 0
        self._state_of = state
        self._places: dict[nn.Parameter, tuple[int, int]] = {}
        self._averages = Averages([], source.ranks)
        self._updates = Updates([], self._averages, None, alone=True)
        self._groups_of_layers: list[int] = []
        self._all_ready = False
        self._held: list[Any] = []

    @property
    def ranks(self) -> Ranks:
        return self.source.ranks

    @property
    def names(self) -> dict[nn.Parameter, str]:
        return self.source.names

    @property
    def _state(self) -> State:
        """The optimizer's, which loading a checkpoint replaces."""
        return self._state_of()

    def adopt(self, layers: Iterable[Layer]) -> None:
        """Makes the memory anew for these layers; what the state holds of each goes into it.

        Their order is the module's, whatever was seen first, so that a resumed run adds up numbers in the same order.
        """
        by_weight = {layer.weight: layer for layer in layers}
        ordered = [by_weight[p] for p in self.names if p in by_weight]
        stacks = stacked(ordered, rows_wait=self.settings.fisher != "empirical")
        settings, state = self.settings, self._state
        self.layers = {layer.weight: layer for stack in stacks for layer in stack.layers}
        self._places = {
            layer.weight: (number, member)
            for number, stack in enumerate(stacks)
            for member, layer in enumerate(stack.layers)
        }
        self.structures = [
            structure_of(stack, self.ranks, settings.approximation, settings.temporal) for stack in stacks
        ]
        stored = [[state.get(layer.weight, {}) for layer in stack.layers] for stack in stacks]
        for structure, own in zip(self.structures, stored, strict=True):
            structure.restore(own)
        self._averages = Averages(stacks, self.ranks)
        self._averages.restore([one for own in stored for one in own])
        self._make_chain()
        self._updates = Updates(self.structures, self._averages, self.chain, alone=not self.ranks.active)
        self._groups_of_layers = [self.group_numbers[id(weight)] for weight in self.layers]
        self._held, self._all_ready = [], False
        self.version += 1
        self.write_state()

    def _make_chain(self) -> None:
        """The links of a tridiagonal form, once all layers of its chain are there."""
        self.chain = None
        weights = self.source.chain
        if not weights or any(w not in self._places for w in weights):
            return
        places = []
        for number, member in (self._places[w] for w in weights):
            structure = self.structures[number]
            assert isinstance(structure, Kronecker)
            places.append(Place(number, structure, member))
        self.chain = Chain(places, self.ranks)
        self.chain.restore([self._state.get(w, {}) for w in weights])

    def write_state(self) -> None:
        """Puts views of the memory into the state, where what there is to see has changed."""
        held = [structure.shown() for structure in self.structures] + [self.chain is not None and self.chain.linked]
        if held == self._held:
            return
        parameters = {id(p): i for i, p in enumerate(self.source.module.parameters())}
        places = {} if self.chain is None else {w: i for i, w in enumerate(self.source.chain)}
        for i, (weight, layer) in enumerate(self.layers.items()):
            number, member = self._places[weight]
            entry = self._state[weight]
            for name in [name for name in entry if name in PASSING or name.startswith("time_")]:
                del entry[name]
            index = -1 if layer.bias is None else parameters.get(id(layer.bias), -1)
            entry |= description(layer.layout, index, APPROXIMATIONS.index(self.settings.approximation))
            entry |= self._averages.tensors(i)
            entry |= self.structures[number].tensors(member)
            if weight in places and self.chain is not None:
                entry |= self.chain.tensors(places[weight])
        self._held = held

    def ready(self, weight: nn.Parameter) -> bool:
        """Whether there is something to precondition the gradient of a weight with."""
        number, member = self._places[weight]
        return self.structures[number].ready[member] and self.linked

    def updated(self, weight: nn.Parameter) -> bool:
        """Whether the factors of a weight have had an update."""
        number, member = self._places[weight]
        return bool(self._averages.updates[self.structures[number].stack.first + member] > 0)

    @property
    def readiness(self) -> Any:
        """Changes where other layers have something to precondition with."""
        if self._all_ready and self.chain is None:
            return True
        return tuple([tuple(one.ready) for one in self.structures]), self.linked

    @property
    def linked(self) -> bool:
        """Whether every layer of a chain has its link, or there is no chain."""
        return self.chain is None or self.chain.linked

    def place(self, weight: nn.Parameter) -> tuple[int, int]:
        """The number of the stack of a weight, and which member of it the weight is."""
        return self._places[weight]

    def regroup(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Takes in which parameters the optimizer's groups hold."""
        self.group_numbers = {id(p): i for i, group in enumerate(groups) for p in group["params"]}
        self._groups_of_layers = [self.group_numbers[id(weight)] for weight in self.layers]
        self.grouping += 1

    def empty_rows(self, weight: nn.Parameter) -> dict[str, Any]:
        """What the checkpoint of a weight holds besides its state: torch.distributed.checkpoint loads only what a fresh
        optimizer expects, which does not know whether rows will wait."""
        return self.structures[self._places[weight][0]].empty_rows() if weight in self.layers else {}

    def renewed(self) -> list[Tensor]:
        """The tensors that `refresh_` writes."""
        found = [t for structure in self.structures for t in structure.renewed()]
        return found if self.chain is None else [*found, *self.chain.renewed()]
