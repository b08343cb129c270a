"""The curvature of one model as training goes on: layers found, averages moved, inverses renewed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from kfac_triton.config import check_sharing
from kfac_triton.coverage import Coverage
from kfac_triton.curvature import Curvature, State
from kfac_triton.fisher.source import Observed, Source
from kfac_triton.layer import Layer, described
from kfac_triton.numbers import on_host
from kfac_triton.sample import Sample, pass_nbytes
from kfac_triton.steps.damping import factored_damping
from kfac_triton.structures import inversion
from kfac_triton.structures.base import Structure
from kfac_triton.structures.inversion import Due

log = logging.getLogger("kfac_triton")


class CurvatureEstimator(Curvature):
    """The layers of a model with their curvature, which follows the passes that `source` makes."""

    def __init__(self, source: Source, state: Callable[[], State]) -> None:
        super().__init__(source, state)
        self.coverage = Coverage(source)
        self._found: object = None
        self._order: list[tuple[int, int]] = []
        self._chained: list[int] = []
        self._said: set[str] = set()
        self._size: Any = None
        self.pass_nbytes = 0  # of the last pass that was of another size than the one before
        check_sharing(self.settings.weight_sharing, source.names.values())

    def adopt(self, layers: Iterable[Layer]) -> None:
        """As `Curvature.adopt`; the next pass is looked at anew."""
        super().adopt(layers)
        self._found = None

    def extend(
        self,
        parameters: list[nn.Parameter],
        groups: Sequence[Mapping[str, Any]],
        replaced: Mapping[nn.Parameter, nn.Parameter],
        reshaped: set[nn.Parameter],
    ) -> None:
        """Takes in what changed in the groups or in the module; `parameters` are all that are left or new.

        The state of parameters that left or were reshaped goes, and so does the layer of such a weight; those that were
        `replaced` have theirs already.
        """
        self.source.extend(parameters, replaced)
        here, known = set(parameters) - reshaped, self.names.keys() - reshaped
        layers = [
            Layer(replaced.get(w, w), None if own.bias is None else replaced.get(own.bias, own.bias), own.layout)
            for w, own in self.layers.items()
        ]
        kept = [own for own in layers if own.weight in here and (own.bias is None or own.bias in known)]
        if len(kept) < len(layers) and self.settings.approximation == "tridiagonal":
            kept, self.source.chain = [], ()  # what links the layers that stay goes through those that left
        gone = {own.weight for own in layers} | {p for p in self._state if isinstance(p, Tensor) and p not in here}
        for p in gone - {own.weight for own in kept}:
            self._state.pop(p, None)
        self.layers = {}
        self.regroup(groups)
        self.adopt(kept)

    def restore(self) -> None:
        """The layers that a loaded state describes."""
        parameters, layers = list(self.source.module.parameters()), []
        chained = []
        for weight in self.names:
            stored = self._state.get(weight, {})
            if "operation" not in stored:
                continue
            if not stored["factor_updates"] > 0 and "exp_avg" not in stored:  # it was prepared, and never trained
                stored.clear()
                continue
            layout = described(stored)
            layers.append(Layer(weight, parameters[int(stored["bias"])] if layout.bias else None, layout))
            if "chain" in stored:
                chained.append((int(stored["chain"]), weight))
        if self.settings.approximation == "tridiagonal":
            self.source.chain = tuple(weight for _, weight in sorted(chained, key=lambda pair: pair[0]))
            self._chained = [id(w) for w in self.source.chain]
        self.coverage.observed = bool(layers)
        self.adopt(layers)

    def update_(self, observed: Observed, groups: Sequence[Mapping[str, Any]]) -> None:
        """Moves the averages of layers towards what was observed of them, of those whose group is due."""
        self._averages.report(self._warn_of_sample)
        self._note_size(observed)
        if self._update_as_before(observed, groups):
            return
        samples = self._common(list(observed.samples))
        if self._found is not observed.found or self.ranks.active:
            self._take_in(observed, samples)
        due = [group["step"] % group["factor_interval"] == 0 for group in groups]
        numbers = [self.group_numbers[id(own.layer.weight)] for own in samples]
        places = [place if due[i] else None for place, i in zip(self._order, numbers, strict=True)]
        if any([place is not None for place in places]):
            decay, damping = (
                [values[i] for i in self._groups_of_layers]
                for values in ([group["factor_decay"] for group in groups], [factored_damping(own) for own in groups])
            )
            self._updates.move_(samples, places, decay, damping)
            if on_host(self._averages.updates.device):
                self._averages.report(self._warn_of_sample)
            self.write_state()

    def _note_size(self, observed: Observed) -> None:
        """Counts what the pass held, where it is not the last one again."""
        size = observed.found, [len(g) for own in observed.samples[:1] for g in own.g]
        if size != self._size:
            self._size, self.pass_nbytes = size, pass_nbytes(observed.samples)

    def _update_as_before(self, observed: Observed, groups: Sequence[Mapping[str, Any]]) -> bool:
        """The same where nothing but the numbers in the samples is new; else nothing, and false."""
        decay = groups[0]["factor_decay"]
        if self._found is not observed.found or any(
            [group["factor_decay"] != decay or group["step"] % group["factor_interval"] != 0 for group in groups]
        ):
            return False
        return self._updates.usual_(observed.samples, decay)

    def _common(self, samples: list[Sample]) -> list[Sample]:
        """Those of layers that every rank has seen."""
        if not self.ranks.active:
            return samples
        seen, parameters = {own.layer.weight for own in samples}, self.source.parameters
        everywhere = self.ranks.common([p in seen for p in parameters], parameters[0].device)
        common = {p for p, flag in zip(parameters, everywhere, strict=True) if flag}
        return [own for own in samples if own.layer.weight in common]

    def _take_in(self, observed: Observed, samples: Sequence[Sample]) -> None:
        """Makes room for layers that are new or are used in another way, and remembers why others have no block."""
        self.coverage.note(observed.found.reasons, list(self.layers.values()), samples)
        kept = {w: layer for w, layer in self.layers.items() if w not in self.coverage.reasons}
        found = {own.layer.weight: own.layer for own in samples}
        changed = {w: layer for w, layer in found.items() if not layer.is_like(kept.get(w))}
        chained = [id(w) for w in self.source.chain] != self._chained
        for p in {*self.coverage.reasons, *changed, *(layer.bias for layer in changed.values())}:
            if p is not None and ("operation" in self._state.get(p, {}) or p not in self.coverage.reasons):
                self._state[p].clear()
        if changed or chained or len(kept) < len(self.layers):
            self.adopt({**kept, **changed}.values())
            self._chained = [id(w) for w in self.source.chain]
        self._order = [self._places[own.layer.weight] for own in samples]
        self._found = observed.found

    def refresh_(self, groups: Sequence[Mapping[str, Any]], *, all_of_them: bool = False) -> None:
        """Renews the inverses of the layers whose group is due, or of all."""
        due = [all_of_them or inverse_due(group["step"], group["inverse_interval"]) for group in groups]
        if self._all_ready and not any(due):
            return
        dampings = [factored_damping(group) for group in groups]
        damping = [dampings[i] for i in self._groups_of_layers]
        wanted = [due[i] for i in self._groups_of_layers]
        todo = []
        for structure in self.structures:
            at = structure.stack.numbers
            updated = self._averages.updated(at)
            members = [
                i for i, (want, ready) in enumerate(zip(wanted[at], structure.ready, strict=True))
                if updated[i] and (want or not ready)
            ]  # fmt: skip
            if members:
                todo.append(Due(structure, members, damping[at]))
        for one, done in zip(todo, inversion.refresh_(todo), strict=True):
            for i, fine in zip(one.members, done, strict=True):
                if not fine:
                    self._warn_of_inverse(one.structure, i)
        if todo and self.chain is not None:
            own = [self.group_numbers[id(place.layer.weight)] for place in self.chain.places]
            self.chain.refresh_([dampings[i] for i in own])
        self._all_ready = all([all(structure.ready) for structure in self.structures])
        self.write_state()

    def _warn_of_sample(self, layer: Layer, finite: bool) -> None:
        what = "that are not finite" if not finite else "far larger than those before"
        self._warn_once(layer.weight, f"a Fisher pass gave numbers {what}; its factors skipped that pass")

    def _warn_of_inverse(self, structure: Structure, member: int) -> None:
        instead = "its last inverse stays" if structure.ready[member] else "it takes AdamW steps until it has one"
        self._warn_once(
            structure.stack.layers[member].weight,
            f"its factors have no finite inverse, in double precision and damped more either; {instead}",
        )

    def _warn_once(self, weight: nn.Parameter, message: str) -> None:
        name = self.names[weight]
        if (name + message) not in self._said:
            self._said.add(name + message)
            log.warning("%s: %s", name, message)


def inverse_due(step: int, interval: int) -> bool:
    """Every `interval` steps; in the first interval also at steps 1, 2, 4, 8, ..., while the factors are young."""
    return step % interval == 0 or (step < interval and step & (step - 1) == 0)
