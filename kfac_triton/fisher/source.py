"""Where samples come from: passes of K-FAC's own, the user's own graph, or taps in the user's passes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kfac_triton.capture import Call, Ledger, ModuleState, compiled_parts, sweep_inert
from kfac_triton.config import Settings
from kfac_triton.distributed import Ranks
from kfac_triton.fisher.chains import check_chain
from kfac_triton.fisher.empirical import EmpiricalSums
from kfac_triton.fisher.graphs import Closure, Graphs
from kfac_triton.fisher.loss_scale import FirstGradients
from kfac_triton.fisher.parts import Parts
from kfac_triton.fisher.piggyback import Piggyback
from kfac_triton.fisher.resolution import Resolution, Resolver
from kfac_triton.fisher.rows import samples_of
from kfac_triton.fisher.sampled import FisherPass, Seen, mixed_seed
from kfac_triton.layer import Layer
from kfac_triton.sample import Sample

log = logging.getLogger("kfac_triton")


class Observed(NamedTuple):
    """The samples of one step, in the order of `found.layers`, and the loss terms of an example."""

    found: Resolution
    samples: Sequence[Sample]
    terms_per_example: int


class Source:
    """The passes of `module` and what they tell of its layers.

    `due()`: the number of the next factor update, or None where the next step makes none. `follow()` takes in what the
    user changed in the model, before a pass of theirs that taps collect from.
    """

    def __init__(
        self,
        module: nn.Module,
        settings: Settings,
        parameters: list[nn.Parameter],
        ranks: Ranks,
        due: Callable[[], int | None],
        follow: Callable[[], None],
    ) -> None:
        self.module, self.settings, self.ranks = module, settings, ranks
        self.module_state = ModuleState(module)
        self.parameters = parameters
        self.names = {p: name for name, p in module.named_parameters()}
        self.parts = Parts()
        self.chain: tuple[nn.Parameter, ...] = ()  # of a tridiagonal form, once it is known
        self._resolver = Resolver(settings)
        self._pass: FisherPass | None = None
        self._piggyback: Piggyback | None = None
        self.sums: EmpiricalSums | None = None
        self.scripted = isinstance(module, torch.jit.ScriptModule)  # it takes no hooks and hides its functions
        if settings.fisher == "empirical" and not self.scripted:
            self.sums = EmpiricalSums(self.module_state, parameters, settings)
        elif settings.likelihood is not None and not self.scripted:
            self._pass = FisherPass(
                self.module_state, settings.likelihood, settings.output, settings.mask, settings.fisher == "exact",
                settings.factor_fraction, settings.seed, settings.blocks, self.parts,
            )  # fmt: skip
        sweep_inert(module)
        if self._pass is not None and settings.fisher_pass != "replay":
            always = settings.fisher_pass == "piggyback"
            self._piggyback = Piggyback(self._pass, lambda: self.parameters, ranks, due, always)
        device_types = {"cpu", *(p.device.type for p in parameters)}
        self.passes = Ledger(self.module_state, parameters, device_types, self.sums or self._piggyback, follow)
        if self.sums is not None:
            self.sums.destination, self.sums.follow = self.passes.backward.destination, follow
        if self._piggyback is not None:
            self._piggyback.ledger = self.passes
        self.graphs: Graphs | None = None
        if settings.compile in (True, "step"):
            if self._pass is not None:
                self.graphs = Graphs(self.passes, self._pass)
            else:
                log.warning('compile has no effect, the step runs eagerly: fisher="empirical", or a ScriptModule')
        known = settings.likelihood if settings.check_loss_scale else None
        self._first = None if known is None else FirstGradients(settings, known)
        self.passes.on_outputs = None if self._first is None else self._first.outputs

    def close(self) -> None:
        """Remove every hook."""
        self.passes.close()
        if self.sums is not None:
            self.sums.close()

    def extend(self, parameters: list[nn.Parameter], replaced: Mapping[nn.Parameter, nn.Parameter]) -> None:
        """Takes in what changed in the groups or in the module; `parameters` are all there are now."""
        self.names = {p: name for name, p in self.module.named_parameters()}
        self.parameters = parameters
        self.chain = tuple(replaced.get(w, w) for w in self.chain)
        self._resolver = Resolver(self.settings)
        self.passes.follow(parameters)
        if self.sums is not None:
            self.sums.extend(parameters)

    def forget(self) -> None:
        """Drop what was kept for a step that does not come."""
        self.passes.backward.forget()
        if self._first is not None:
            self._first.forget()

    def trust_loss_scale(self) -> None:
        """Compare loss_scale with no gradient."""
        self._first = self.passes.on_outputs = None

    def record_passes(self, on: bool) -> None:
        """Whether samples come from the user's own passes, as a checkpoint says or a step has found."""
        if self._piggyback is not None:
            self._piggyback.armed |= on

    @property
    def records_passes(self) -> bool:
        return self._piggyback is not None and self._piggyback.armed

    def observe(
        self,
        kept: list[Call],
        parameters: list[nn.Parameter],
        update: int,
        terms: int,
        unscale: float | Tensor,
        graph: Closure | None = None,
    ) -> Observed | None:
        """What the passes `kept` tell of `parameters`; None where they cannot be run again.

        `update`: the number of this update. `terms`: the loss terms of an example in the last one. `unscale` undoes the
        GradScaler's scale, which the empirical Fisher's gradients carry. `graph`: what these passes were.
        """
        seen = None if self._piggyback is None else self._piggyback.take(kept)
        if graph is None:
            self._compare_loss_scale(kept, unscale)
        if seen is None and not self._repeatable(kept):
            return None
        if self.scripted:
            return Observed(Resolution((), (), dict.fromkeys(parameters, "inside a ScriptModule")), (), terms)
        if self._pass is None:
            assert self.sums is not None
            samples = self.sums.take(kept, unscale)
            found = self._resolver.known([own.layer for own in samples], self.sums.refused)
            return Observed(found, samples, terms)
        if seen is None:
            seen = self._graph_pass(kept, parameters, update, terms, graph)
        if seen is None:
            seen = self._pass.run(kept, parameters, update, terms, self.ranks.rank)
        found = self._resolver.resolve(seen, parameters, self.names)
        samples = samples_of(found, seen, masked=self.settings.mask is not None)
        if self.settings.approximation == "tridiagonal" and samples:
            self._check_chain(seen, samples)
        return Observed(found, samples, seen.terms_per_example)

    def follow_layers(self, layers: Iterable[Layer], version: Any) -> bool:
        """Whether a closure may be a graph now; `version` is that of the layers."""
        graphs = self.graphs
        if graphs is None or graphs.reason is not None:
            return False
        if not graphs.started:
            graphs.begin(self._why_no_graph())
        own = self.passes.hears_gradients  # for the next eager step, after the model has changed
        if not own and self._hooked():
            graphs.refuse("hooks wait for gradients")
        graphs.follow(version, [p for layer in layers for p in (layer.weight, layer.bias) if p is not None])
        return graphs.reason is None and not own

    def run_closure(self, closure: Callable[[], Any], update: int | None) -> Closure | None:
        """Runs a closure as a graph, with the Fisher's pass of that `update`; None where it cannot be one."""
        assert self.graphs is not None
        seed = None if update is None else mixed_seed(self.settings.seed, update, 0)
        return self.graphs.closure(closure, self.parameters, seed)

    def _graph_pass(
        self, kept: list[Call], parameters: list[nn.Parameter], update: int, terms: int, graph: Closure | None
    ) -> Seen | None:
        """What a graph sees, or has seen."""
        graphs, seen = self.graphs, None
        if graphs is None:
            return None
        if graph is not None and graph.uses is not None and graph.shape is not None:
            seen = graphs.seen(graph.inputs, graph.shape, graph.uses, parameters)
        elif graphs.reason is None and graphs.parameters and [call.inputs.module for call in kept] == [self.module]:
            kept[0].check_unwritten()
            seen = graphs.fisher(kept[0].inputs, parameters, update, terms)
        if seen is not None:
            seen.unsupported |= {p: why for p, why in self._resolver.reasons.items() if p not in seen.uses}
        return seen

    def _hooked(self) -> bool:
        of_parameters = any([p._backward_hooks or p._post_accumulate_grad_hooks for p in self.parameters])
        return of_parameters or any([m._backward_hooks or m._backward_pre_hooks for m in self.module_state.modules])

    def _why_no_graph(self) -> str | None:
        """Why passes cannot be graphs that do what they do eagerly; known after the first step."""
        settings, state = self.settings, self.module_state
        reasons = {
            'fisher is not "mc"': settings.fisher != "mc",
            "mask is given": settings.mask is not None,
            "blocks are given": bool(settings.blocks),
            'approximation="tridiagonal"': settings.approximation == "tridiagonal",
            "several processes share the factors": self.ranks.active,
            "samples come from the program's own passes": self.records_passes,
            "the model is compiled itself": bool(compiled_parts(self.module)),
            "calls of the model are compiled, or return no tensor": self.passes.hides_outputs,
            "the model draws random numbers": state.draws or state.draws_others,
            "the forward pass changes the model": bool(state.changing()) or state.writes_inputs,
        }
        return next((reason for reason, holds in reasons.items() if holds), None)

    def _compare_loss_scale(self, kept: list[Call], unscale: float | Tensor) -> None:
        if self._first is None:
            return
        named = self._first.warn([call.inputs for call in kept], unscale)
        for source in (self._pass, self.sums):
            if source is not None:
                source.axis_named = named
        self.trust_loss_scale()

    def _repeatable(self, kept: list[Call]) -> bool:
        """Whether each call can be run again by itself. From the next step on the others are recorded as they run."""
        if not any([call.ancestors for call in kept]):
            return True
        if self._piggyback is None:
            other = 'fisher="mc" or "exact"' if self.sums is not None else 'fisher_pass="auto" or "piggyback"'
            raise RuntimeError(
                "parts of the model are called one after the other, so a call cannot be repeated from its inputs; "
                f"use {other}, or call the parts in the forward method of one module"
            )
        self.record_passes(True)
        log.info(
            "parts of the model are called one after the other: the factors come from the program's own backward pass, "
            "from the next step on"
        )
        return False

    def _check_chain(self, seen: Seen, samples: Sequence[Sample]) -> None:
        by_weight = {own.layer.weight: own for own in samples}
        missing = [self.names[w] for w in self.chain if w not in by_weight]
        if missing:
            raise RuntimeError(
                'approximation="tridiagonal" needs a gradient for every layer of its chain in every step; '
                f"{missing[0]} has none. Freeze layers before the first step"
            )
        if [id(w) for w in by_weight] != [id(w) for w in self.chain]:
            check_chain(seen, by_weight, self.names)
            self.chain = tuple(by_weight)
