"""The curvature of one model: which weights have blocks, when their factors and inverses are refreshed.

The tensors live in the optimizer's state, one dictionary for each weight; here stand only the layouts that follow from
what the passes saw, and what was said about it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kfac_triton.approximations import eigen, inverse_free, kronecker, temporal, tridiagonal
from kfac_triton.arguments import APPROXIMATIONS, Settings, check_sharing
from kfac_triton.blocks.layout import Layout
from kfac_triton.capture import Call, Ledger, ModuleState, sweep_inert
from kfac_triton.damping import factored_damping
from kfac_triton.distributed import Ranks
from kfac_triton.empirical import EmpiricalSums
from kfac_triton.expected import expected_uses
from kfac_triton.fisher import FisherPass, Seen
from kfac_triton.loss_scale import FirstGradients
from kfac_triton.parts import Parts
from kfac_triton.piggyback import Piggyback
from kfac_triton.statistics import block_layout, joint_biases, layout_of, sharing_of, weight_statistics

log = logging.getLogger("kfac_triton")

UNCHAINED = ("scale", "position", "embedding")  # what stands between or before the layers of a chain

State = MutableMapping[Tensor, dict[str, Any]]
GroupOf = Callable[[nn.Parameter], dict[str, Any]]


@dataclass(frozen=True)
class Block:
    """The block of one weight: its layout and the bias inside."""

    layout: Layout
    bias: nn.Parameter | None


class Curvature:
    """Factors and inverses of the blocks of `module`, from its own Fisher passes or from taps in the user's passes.

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
        self.module = module
        self.module_state = ModuleState(module)
        self.settings = settings
        self.ranks = ranks
        self.blocks: dict[nn.Parameter, Block] = {}
        self.reasons: dict[nn.Parameter, str] = {}
        self.names = {p: name for name, p in module.named_parameters()}
        self.parameters = parameters
        self.observed = False
        self.parts = Parts()
        self._pass: FisherPass | None = None
        self._piggyback: Piggyback | None = None
        self._sums: EmpiricalSums | None = None
        self._said: set[str] = set()
        self._named: set[nn.Parameter] = set()
        self._chain: list[nn.Parameter] = []
        self._suspects: list[tuple[nn.Parameter, tuple[Tensor, Tensor]]] = []
        self._unmeasured: list[kronecker.FactorUpdate] = []
        check_sharing(settings.weight_sharing, self.names.values())
        self.scripted = isinstance(module, torch.jit.ScriptModule)  # it takes no hooks and hides its functions
        if settings.fisher == "empirical" and not self.scripted:
            self._sums = EmpiricalSums(self.module_state, parameters, settings)
        elif settings.likelihood is not None and not self.scripted:
            self._pass = FisherPass(
                self.module_state,
                settings.likelihood,
                settings.output,
                settings.mask,
                settings.fisher == "exact",
                settings.factor_fraction,
                settings.seed,
                settings.blocks,
                self.parts,
            )
        sweep_inert(module)
        if self._pass is not None and settings.fisher_pass != "replay":
            always = settings.fisher_pass == "piggyback"
            self._piggyback = Piggyback(self._pass, lambda: self.parameters, ranks, due, always)
        device_types = {"cpu", *(p.device.type for p in parameters)}
        self.passes = Ledger(self.module_state, parameters, device_types, self._sums or self._piggyback, follow)
        if self._sums is not None:
            self._sums.destination = self.passes.destination
            self._sums.follow = follow
        if self._piggyback is not None:
            self._piggyback.ledger = self.passes
        known = settings.likelihood if settings.check_loss_scale else None
        self._first = None if known is None else FirstGradients(settings, known)
        self.passes.on_outputs = None if self._first is None else self._first.outputs

    def close(self) -> None:
        """Remove every hook."""
        self.passes.close()
        if self._sums is not None:
            self._sums.close()

    def extend(
        self,
        parameters: list[nn.Parameter],
        state: State,
        replaced: Mapping[nn.Parameter, nn.Parameter],
        reshaped: set[nn.Parameter],
    ) -> None:
        """Takes in what changed in the groups or in the module; `parameters` are all that are left or new.

        The state of parameters that left or were reshaped goes, and so does the block of such a weight; those that were
        `replaced` have theirs already.
        """
        self.names = {p: name for name, p in self.module.named_parameters()}
        self.parameters = parameters
        self._chain = [replaced.get(w, w) for w in self._chain]
        self._suspects, self._unmeasured = [], []
        here, known = set(parameters) - reshaped, self.names.keys() - reshaped
        blocks = {
            replaced.get(w, w): Block(b.layout, None if b.bias is None else replaced.get(b.bias, b.bias))
            for w, b in self.blocks.items()
        }
        self.blocks = {w: b for w, b in blocks.items() if w in here and (b.bias is None or b.bias in known)}
        if len(self.blocks) < len(blocks) and self.settings.approximation == "tridiagonal":
            self.blocks, self._chain = {}, []  # what links the layers that stay goes through those that left
        for p in {*blocks, *(p for p in state if isinstance(p, Tensor) and p not in here)} - self.blocks.keys():
            state.pop(p, None)
        for weight, block in self.blocks.items():
            state[weight]["bias"] = self._index(block.bias)
        self.passes.follow(parameters)
        if self._sums is not None:
            self._sums.extend(parameters)

    def forget(self) -> None:
        """Drop what was kept for a step that does not come."""
        self.passes.forget()
        if self._first is not None:
            self._first.forget()

    def trust_loss_scale(self) -> None:
        """Compare loss_scale with no gradient."""
        self._first = self.passes.on_outputs = None

    def restore(self, state: State) -> None:
        """The blocks that a loaded state describes."""
        parameters = list(self.module.parameters())
        self.blocks = {}
        for weight in self.names:
            stored = state.get(weight, {})
            if "operation" not in stored:
                continue
            if not stored["factor_updates"] > 0 and "exp_avg" not in stored:  # it was prepared, and never trained
                stored.clear()
                continue
            layout = kronecker.restored_layout(stored, weight)
            self.blocks[weight] = Block(layout, parameters[int(stored["bias"])] if layout.bias else None)
            if self.settings.temporal == "independent" and temporal.stored(stored) is not None:
                for name in self.inverses(stored):  # the next step makes its own
                    del stored[name]
        self.observed = bool(self.blocks)
        if self.settings.approximation == "tridiagonal":
            self._chain = tridiagonal.in_order(state, self.blocks)

    def update_factors(
        self,
        kept: list[Call],
        state: State,
        parameters: list[nn.Parameter],
        group_of: GroupOf,
        unscale: float | Tensor = 1.0,
    ) -> None:
        """Refreshes the factors of every weight that the passes saw and whose group is due.

        `unscale` undoes the GradScaler's scale, which the empirical Fisher's gradients carry.
        """
        self._report_suspects()
        seen = None if self._piggyback is None else self._piggyback.take(kept)
        if self._first is not None:
            named = self._first.warn([call.inputs for call in kept], unscale)
            for source in (self._pass, self._sums):
                if source is not None:
                    source.axis_named = named
            self.trust_loss_scale()
        if seen is None and not self._repeatable(kept):
            return
        due = [p for p in parameters if group_of(p)["step"] % group_of(p)["factor_interval"] == 0]
        update = max(group_of(p)["step"] for p in due)
        terms = max(group_of(p)["terms_per_example"] for p in due)
        found, reasons, terms = self._statistics(kept, seen, parameters, update, terms, unscale)
        for p in due:
            group_of(p)["terms_per_example"] = terms
        seen_by_all = self.ranks.common([p in found for p in self.parameters], due[0].device)
        found = {p: found[p] for p, seen in zip(self.parameters, seen_by_all, strict=True) if seen}
        self._note_reasons(reasons, found)
        for p in self.reasons:
            if "operation" in state.get(p, {}):
                state[p].clear()
        statistics = {w: found[w] for w in due if w in found}
        if not statistics:
            return
        sizes = {weight: own.sizes() for weight, own in statistics.items()}
        finite = torch.isfinite(torch.stack([a + g for a, g in sizes.values()]))
        present = torch.stack([own.present() for own in statistics.values()])
        decays = {weight: group_of(weight)["factor_decay"] for weight in statistics}
        for weight, own in statistics.items():
            self._adopt(weight, own.layout, own.bias, state)
        usual = [kronecker.typical(state[w], own, sizes[w], decays[w]) for w, own in statistics.items()]
        usable = finite & present & torch.stack(usual)
        self.ranks.all_agree_(usable)
        updates = [
            kronecker.FactorUpdate(state[weight], own, decays[weight], ok)
            for (weight, own), ok in zip(statistics.items(), usable.unbind(), strict=True)
        ]
        self._suspects = list(zip(statistics, zip(finite.unbind(), usual, strict=True), strict=True))
        if finite.device.type == "cpu":
            self._report_suspects()
        if self.settings.approximation == "inverse_free":
            self._update_roots(updates, list(statistics), state, group_of)
            return
        kronecker.update_factors(updates, at_once=self.ranks.active)
        if self.settings.temporal != "independent":
            temporal.update_lags(updates)
            names = ("A_lag", "G_lag", "time_steps")
            self.ranks.average_([u.state[name] for u in updates for name in names if name in u.state])
        if self.settings.approximation == "eigen":
            self._measure([update for update in updates if eigen.stored(update.state)])
            self._unmeasured = [update for update in updates if not eigen.stored(update.state)]
        if self.settings.approximation == "tridiagonal" and list(statistics) == self._chain:
            decay = group_of(next(iter(statistics)))["factor_decay"]
            tridiagonal.update_cross_moments(
                state, statistics, decay, dict(zip(statistics, usable.unbind(), strict=True))
            )
            self.ranks.average_([state[w][name] for w in list(statistics)[:-1] for name in ("A_next", "G_next")])
        self.ranks.average_([state[w][name] for w in statistics for name in "AG"])

    def _repeatable(self, kept: list[Call]) -> bool:
        """Whether each call can be run again by itself. From the next step on the others are recorded as they run."""
        if not any(call.ancestors for call in kept):
            return True
        if self._piggyback is None:
            other = 'fisher="mc" or "exact"' if self._sums is not None else 'fisher_pass="auto" or "piggyback"'
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

    def record_passes(self, on: bool) -> None:
        """Whether statistics come from the user's own passes, as a checkpoint says or a step has found."""
        if self._piggyback is not None:
            self._piggyback.armed |= on

    @property
    def records_passes(self) -> bool:
        return self._piggyback is not None and self._piggyback.armed

    def _update_roots(
        self, updates: list[kronecker.FactorUpdate], weights: list[nn.Parameter], state: State, group_of: GroupOf
    ) -> None:
        """Inverse-free: the statistics move the roots at once."""
        inverse_free.update(
            [(update, w, factored_damping(group_of(w))) for update, w in zip(updates, weights, strict=True)],
            self.ranks,
        )

    def _measure(self, updates: list[kronecker.FactorUpdate]) -> None:
        """Eigenvalues in the bases as they are."""
        eigen.correct(updates)
        self.ranks.average_([update.state["spectrum"] for update in updates if eigen.stored(update.state)])

    def update_inverses(self, state: State, group_of: GroupOf, *, all_of_them: bool = False) -> None:
        """Refreshes the inverses of every block whose group is due, or of `all_of_them`."""
        if self.settings.approximation == "inverse_free":
            return
        due = {}
        for weight, block in self.blocks.items():
            group, stored = group_of(weight), state[weight]
            if all_of_them or not eigen.ready(stored) or inverse_due(group["step"], group["inverse_interval"]):
                due[weight] = kronecker.Refresh(stored, block.layout, factored_damping(group), weight.shape)
        update = eigen.update_bases if self.settings.approximation == "eigen" else kronecker.update_inverses
        for weight, done in zip(due, update(list(due.values())), strict=True):
            if not done:
                held = eigen.ready(state[weight])
                instead = "its last inverse stays" if held else "it takes AdamW steps until it has one"
                self._warn_once(
                    weight, f"its factors have no finite inverse, in double precision and damped more either; {instead}"
                )
        self._measure(self._unmeasured)
        self._unmeasured = []
        if self.settings.temporal != "independent":
            temporal.update_transforms(list(due.values()), symmetric=self.settings.temporal == "chain_symmetric")
        if due and self.settings.approximation == "tridiagonal":
            layouts = {w: b.layout for w, b in self.blocks.items()}
            tridiagonal.update_links(state, layouts, {w: factored_damping(group_of(w)) for w in self.blocks})

    @staticmethod
    def inverses(stored: dict[str, Any]) -> dict[str, Tensor]:
        """What a refresh of the inverses replaces in the state of a weight."""
        replaced = ("A_inv", "G_inv", *eigen.NAMES, *temporal.NAMES)
        return {name: t for name, t in stored.items() if name in replaced or name.startswith("link_")}

    def _statistics(
        self,
        kept: list[Call],
        seen: Seen | None,
        parameters: list[nn.Parameter],
        update: int,
        terms: int,
        unscale: float | Tensor,
    ) -> tuple[dict[nn.Parameter, kronecker.Statistics], dict[nn.Parameter, str], int]:
        """What the passes saw of every weight, why other parameters have no block, and the loss terms of an example.

        `terms`: those of the last update's examples.
        """
        if self.scripted:
            return {}, dict.fromkeys(parameters, "inside a ScriptModule"), terms
        if self._pass is None:
            assert self._sums is not None
            return self._sums.take(kept, unscale), self._sums.refused, terms
        if seen is None:
            seen = self._pass.run(kept, parameters, update, terms, self.ranks.rank)
        known = set(parameters)
        uses = {w: u for w, u in seen.uses.items() if w not in seen.unsupported}
        joint, refused = joint_biases(seen, known)
        both = {bias for bias in joint.values() if bias in uses}
        joint = {w: bias for w, bias in joint.items() if bias not in both}
        uses = {w: u for w, u in uses.items() if w not in both}
        reasons = {**seen.unsupported, **refused, **dict.fromkeys(both, "used in more than one way")}
        statistics = {}
        for weight, found in uses.items():
            bias = joint.get(weight)
            layout = block_layout(found, weight, bias is not None, self.settings)
            if layout is None:
                reasons[weight] = "used in more than one way"
                continue
            if self.settings.approximation == "tridiagonal" and layout.operation in UNCHAINED:
                reasons[weight] = 'approximation="tridiagonal" has no block for it'
                continue
            statistics[weight] = weight_statistics(
                found,
                layout,
                bias,
                seen.terms,
                reduce=sharing_of(self.settings, self.names[weight]) == "reduce",
                masked=self.settings.mask is not None,
            )
        if self.settings.approximation == "tridiagonal" and statistics:
            self._check_chain(seen, statistics)
        return statistics, reasons, seen.terms_per_example

    def _check_chain(self, seen: Seen, statistics: dict[nn.Parameter, kronecker.Statistics]) -> None:
        missing = [self.names[w] for w in self._chain if w not in statistics]
        if missing:
            raise RuntimeError(
                'approximation="tridiagonal" needs a gradient for every layer of its chain in every step; '
                f"{missing[0]} has none. Freeze layers before the first step"
            )
        if list(statistics) != self._chain:
            tridiagonal.chain_of(seen, statistics, self.names)
            self._chain = list(statistics)

    def _note_reasons(
        self,
        reasons: dict[nn.Parameter, str],
        statistics: dict[nn.Parameter, kronecker.Statistics],
    ) -> None:
        """Remembers why trainable parameters have no block, those without a gradient too, and names each once."""
        for weight in [w for w in self.blocks if w in reasons]:
            del self.blocks[weight]
        covered = {*self.blocks, *statistics}
        covered |= {b.bias for b in self.blocks.values() if b.bias is not None}
        covered |= {s.bias for s in statistics.values() if s.bias is not None}
        without = [p for p in self.parameters if p.requires_grad and p not in covered]
        self.reasons = {p: reasons.get(p, "no use that a block covers was seen") for p in without}
        unsaid = [f"{self.names[p]} ({why})" for p, why in self.reasons.items() if p not in self._named]
        self._named.update(self.reasons)
        self.observed = True
        if unsaid and covered:
            log.info("without a K-FAC block, so AdamW updates them: %s", ", ".join(unsaid))
        elif unsaid:
            log.warning("no parameter has a K-FAC block, so AdamW updates all of them: %s", ", ".join(unsaid))

    def _adopt(self, weight: nn.Parameter, layout: Layout, bias: nn.Parameter | None, state: State) -> None:
        """Makes the block of a weight, anew where it is used in another way than before."""
        known = self.blocks.get(weight)
        if known is not None and known.layout == layout and known.bias is bias:
            return
        self.blocks[weight] = Block(layout, bias)
        for p in (weight, bias):
            if p is not None:
                state[p].clear()
        self.begin(weight, self.blocks[weight], state)

    def begin(self, weight: nn.Parameter, block: Block, state: State) -> None:
        """Writes what describes a block into the state, and space for its factors."""
        factors = self.settings.approximation != "inverse_free"
        kronecker.initialise(state[weight], weight, block.layout, self._index(block.bias), factors=factors)
        state[weight]["approximation"] = APPROXIMATIONS.index(self.settings.approximation)

    def _index(self, bias: nn.Parameter | None) -> int:
        """Which of the module's parameters the bias is; -1 for none."""
        return next((i for i, p in enumerate(self.module.parameters()) if p is bias), -1)

    def _report_suspects(self) -> None:
        flags = torch.stack([torch.stack(both) for _, both in self._suspects]).tolist() if self._suspects else []
        for (weight, _), (finite, usual) in zip(self._suspects, flags, strict=True):
            if not finite:
                self._warn_once(weight, "a Fisher pass gave numbers that are not finite; its factors skipped that pass")
            elif not usual:
                self._warn_once(
                    weight, "a Fisher pass gave numbers far larger than those before; its factors skipped that pass"
                )
        self._suspects.clear()

    def _warn_once(self, weight: nn.Parameter, message: str) -> None:
        name = self.names[weight]
        if (name + message) not in self._said:
            self._said.add(name + message)
            log.warning("%s: %s", name, message)

    def known_blocks(self, parameters: Iterable[nn.Parameter]) -> dict[nn.Parameter, Block]:
        """The blocks of these parameters; before the first pass those that the modules' types promise."""
        return self.blocks if self.observed else self._expected(set(parameters))

    def memory_of_sums(self) -> dict[str, int]:
        """Bytes that the empirical Fisher's taps collect in; empty for a Fisher pass of K-FAC's own."""
        return {} if self._sums is None else {"sums": self._sums.memory()}

    def coverage(self, parameters: list[nn.Parameter]) -> dict[str, str]:
        """{parameter name: block name}, "fallback" without one."""
        blocks = self.known_blocks(parameters)
        names = {w: b.layout.name for w, b in blocks.items()}
        names |= {b.bias: b.layout.name for b in blocks.values() if b.bias is not None}
        return {self.names[p]: names.get(p, "fallback") for p in parameters}

    def _expected(self, known: set[nn.Parameter]) -> dict[nn.Parameter, Block]:
        if self._sums is not None:
            return {weight: Block(layout, bias) for weight, (layout, bias) in self._sums.layouts().items()}
        blocks: dict[nn.Parameter, Block] = {}
        for use in expected_uses(self.module, self.settings.blocks):
            weight, bias = use.weight, use.bias if use.bias in known else None
            unchained = self.settings.approximation == "tridiagonal" and use.operation in UNCHAINED
            if weight not in known or not weight.requires_grad or unchained:
                continue
            operation = use.operation
            if weight in blocks:  # a table that a linear layer shares, or a layer that is called from two places
                operations = {blocks[weight].layout.operation, operation}
                operation = "tied" if operations == {"embedding", "linear"} else operation
                bias = bias if bias is not None else blocks[weight].bias
            layout = layout_of(
                operation, weight, bias is not None, self.settings,
                transposed=use.transposed and operation != "tied", groups=use.groups,
            )  # fmt: skip
            blocks[weight] = Block(layout, bias)
        return blocks


def inverse_due(step: int, interval: int) -> bool:
    """Every `interval` steps; in the first interval also at steps 1, 2, 4, 8, ..., while the factors are young."""
    return step % interval == 0 or (step < interval and step & (step - 1) == 0)
