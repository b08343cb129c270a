"""The curvature of one model: which weights have blocks, when their factors and inverses are refreshed.

The tensors live in the optimizer's state, one dictionary for each weight; here stand only the layouts that follow from
what the passes saw, and what was said about it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kfac_triton import distributed
from kfac_triton.approximations import eigen, inverse_free, kronecker, temporal, tridiagonal
from kfac_triton.arguments import Settings, check_sharing
from kfac_triton.blocks.layout import Layout
from kfac_triton.capture import Inputs, RootInputs, sweep_inert
from kfac_triton.damping import factored_damping
from kfac_triton.empirical import EmpiricalSums
from kfac_triton.expected import expected_uses
from kfac_triton.fisher import FisherPass, Seen
from kfac_triton.loss_scale import FirstGradients
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
    """Factors and inverses of the blocks of `module`, from its own Fisher passes or from taps in the user's passes."""

    def __init__(self, module: nn.Module, settings: Settings, parameters: list[nn.Parameter]) -> None:
        self.module = module
        self.settings = settings
        self.blocks: dict[nn.Parameter, Block] = {}
        self.reasons: dict[nn.Parameter, str] = {}
        self.names = {p: name for name, p in module.named_parameters()}
        self.parameters = parameters
        self.observed = False
        self._pass: FisherPass | None = None
        self._sums: EmpiricalSums | None = None
        self._said: set[str] = set()
        self._named: set[nn.Parameter] = set()
        self._chain: list[nn.Parameter] = []
        self._suspects: list[tuple[nn.Parameter, tuple[Tensor, Tensor]]] = []
        self._unmeasured: list[kronecker.FactorUpdate] = []
        check_sharing(settings.weight_sharing, self.names.values())
        if settings.fisher == "empirical":
            self._sums = EmpiricalSums(module, parameters, settings)
        elif settings.likelihood is not None:
            self._pass = FisherPass(
                module,
                settings.likelihood,
                settings.output,
                settings.mask,
                settings.fisher == "exact",
                settings.factor_fraction,
                settings.seed,
                settings.blocks,
            )
        sweep_inert(module)
        on_forward = None if self._sums is None else self._sums.begin
        self.root = RootInputs(module, parameters, {"cpu", *(p.device.type for p in parameters)}, on_forward)
        self._first = None if settings.likelihood is None else FirstGradients(settings, settings.likelihood)
        self.root.on_outputs = None if self._first is None else self._first.outputs

    def close(self) -> None:
        """Remove every hook."""
        self.root.close()
        if self._sums is not None:
            self._sums.close()

    def extend(self, parameters: list[nn.Parameter], state: State) -> None:
        """Takes in the parameters of a new group, perhaps of new layers; `parameters` are all there are."""
        self.names = {p: name for name, p in self.module.named_parameters()}
        self.parameters = parameters
        for weight, block in self.blocks.items():
            state[weight]["bias"] = self._index(block.bias)
        self.root.watch(parameters)
        if self._sums is not None:
            self._sums.extend(parameters)

    def forget(self) -> None:
        """Drop what was kept for a step that does not come."""
        self.root.forget()
        if self._sums is not None:
            self._sums.clear()
        if self._first is not None:
            self._first.forget()

    def restore(self, state: State) -> None:
        """The blocks that a loaded state describes."""
        parameters = list(self.module.parameters())
        self.blocks = {}
        for weight in self.names:
            stored = state.get(weight, {})
            # roots of inverses and factors say nothing of each other: the block begins anew
            has_factors, needs_factors = "A" in stored, self.settings.approximation != "inverse_free"
            if "operation" in stored and has_factors == needs_factors:
                layout = kronecker.restored_layout(stored, weight)
                self.blocks[weight] = Block(layout, parameters[int(stored["bias"])] if layout.bias else None)
                if not self._fits(stored):
                    for name in self.inverses(stored):  # of another approximation: the next step makes its own
                        del stored[name]
        self.observed = bool(self.blocks)
        if self.settings.approximation == "tridiagonal":
            self._chain = tridiagonal.in_order(state, self.blocks)

    def _fits(self, stored: dict[str, Any]) -> bool:
        """Whether what a state holds besides factors belongs to the approximation of now."""
        return eigen.stored(stored) == (self.settings.approximation == "eigen") and (
            temporal.stored(stored) is None or self.settings.temporal != "independent"
        )

    def update_factors(
        self,
        kept: list[Inputs],
        state: State,
        parameters: list[nn.Parameter],
        group_of: GroupOf,
        unscale: float | Tensor = 1.0,
    ) -> None:
        """Refreshes the factors of every weight that the passes saw and whose group is due.

        `unscale` undoes the GradScaler's scale, which the empirical Fisher's gradients carry.
        """
        self._report_suspects()
        if self._first is not None:
            self._first.warn(kept, unscale)
            self._first = self.root.on_outputs = None
        due = [p for p in parameters if group_of(p)["step"] % group_of(p)["factor_interval"] == 0]
        update = max(group_of(p)["step"] for p in due)
        terms = max(group_of(p)["terms_per_example"] for p in due)
        found, reasons, terms = self._statistics(kept, parameters, update, terms, unscale)
        for p in due:
            group_of(p)["terms_per_example"] = terms
        seen_by_all = distributed.common([p in found for p in self.parameters], due[0].device)
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
        distributed.all_agree_(usable)
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
        kronecker.update_factors(updates, at_once=distributed.active())
        if self.settings.temporal != "independent":
            temporal.update_lags(updates)
            names = ("A_lag", "G_lag", "time_steps")
            distributed.average_([u.state[name] for u in updates for name in names if name in u.state])
        if self.settings.approximation == "eigen":
            self._measure([update for update in updates if eigen.stored(update.state)])
            self._unmeasured = [update for update in updates if not eigen.stored(update.state)]
        if self.settings.approximation == "tridiagonal" and list(statistics) == self._chain:
            decay = group_of(next(iter(statistics)))["factor_decay"]
            tridiagonal.update_cross_moments(
                state, statistics, decay, dict(zip(statistics, usable.unbind(), strict=True))
            )
            distributed.average_([state[w][name] for w in list(statistics)[:-1] for name in ("A_next", "G_next")])
        distributed.average_([state[w][name] for w in statistics for name in "AG"])

    def _update_roots(
        self, updates: list[kronecker.FactorUpdate], weights: list[nn.Parameter], state: State, group_of: GroupOf
    ) -> None:
        """Inverse-free: the statistics move the roots at once."""
        inverse_free.update(
            [(update, w, factored_damping(group_of(w))) for update, w in zip(updates, weights, strict=True)]
        )

    def _measure(self, updates: list[kronecker.FactorUpdate]) -> None:
        """Eigenvalues in the bases as they are."""
        eigen.correct(updates)
        distributed.average_([update.state["spectrum"] for update in updates if eigen.stored(update.state)])

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
        self, kept: list[Inputs], parameters: list[nn.Parameter], update: int, terms: int, unscale: float | Tensor
    ) -> tuple[dict[nn.Parameter, kronecker.Statistics], dict[nn.Parameter, str], int]:
        """What the passes saw of every weight, why other parameters have no block, and the loss terms of an example.

        `terms`: those of the last update's examples.
        """
        if self._pass is None:
            assert self._sums is not None
            return self._sums.take(kept, unscale), self._sums.refused, terms
        seen = self._pass.run(kept, parameters, update, terms)
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
        if unsaid:
            log.info("without a K-FAC block, so AdamW updates them: %s", ", ".join(unsaid))

    def _adopt(self, weight: nn.Parameter, layout: Layout, bias: nn.Parameter | None, state: State) -> None:
        """Makes the block of a weight, anew where it is used in another way than before."""
        known = self.blocks.get(weight)
        if known is not None and known.layout == layout and known.bias is bias:
            return
        self.blocks[weight] = Block(layout, bias)
        for p in (weight, bias):
            if p is not None:
                state[p].clear()
        factors = self.settings.approximation != "inverse_free"
        kronecker.initialise(state[weight], weight, layout, self._index(bias), factors=factors)

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
