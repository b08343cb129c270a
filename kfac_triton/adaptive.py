"""Steps whose damping, gamma and precision follow what the quadratic model promised and what came of it (Martens &
Grosse 2015, algorithm 2)."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kfac_triton import loss_scale, ops
from kfac_triton.arguments import Settings
from kfac_triton.capture import ModuleState
from kfac_triton.curvature import Curvature
from kfac_triton.damping import (
    Adaptation,
    calibration_due,
    factored_damping,
    note_calibration,
    reduction_ratio,
)
from kfac_triton.objective import Objective, move_, moved
from kfac_triton.parts import Parts
from kfac_triton.proposal import (
    Occasion,
    Proposal,
    Proposer,
    decay_change,
    fallback_direction,
    reduction_of,
    step_arguments,
)
from kfac_triton.quadratic import Direction

log = logging.getLogger("kfac_triton")

ROUNDING = 0.95  # the share of a step's promise that its products in bfloat16 must keep

Group = dict[str, Any]


@dataclass(frozen=True)
class Candidate:
    """A gamma with its inverses, and what they propose."""

    gamma: float
    proposal: Proposal
    inverses: dict[nn.Parameter, dict[str, Tensor]]

    @property
    def promise(self) -> float:
        return self.proposal.promise


class AdaptiveStep:
    """Steps by the quadratic model. Its numbers live in the groups; it remembers only whether it warned."""

    def __init__(self, state: ModuleState, settings: Settings, parts: Parts) -> None:
        self._proposer = Proposer(state, settings, parts)
        self._settings = settings
        self._loss_scale = settings.loss_scale
        self._adaptation = Adaptation()
        self._reported = False

    def step(self, optimizer: torch.optim.Optimizer, curvature: Curvature, now: Occasion) -> dict[str, Any]:
        """One step; returns what `diagnostics` reports of it.

        Raises:
            ValueError: in the first step, with a closure: loss_scale does not fit the loss.
        """
        if not curvature.blocks:
            return self._without_blocks(optimizer, curvature, now)
        groups = optimizer.param_groups
        first, step, objective = groups[0], groups[0]["step"], now.objective
        if step == 0 and objective is not None and self._settings.check_loss_scale:
            loss_scale.check(self._loss_scale, objective, self._proposer.products, self._settings.seed)
        fresh_rho = self._judge_last_step(optimizer, curvature, objective)
        search = first["adaptive_damping"] and step % self._adaptation.gamma_interval == 0
        _refresh(optimizer, curvature, all_of_them=search)
        arguments = step_arguments(optimizer, curvature, now)
        fallback = fallback_direction(arguments)
        blocks, distrust = len(arguments[0].layers), ""
        if calibration_due(first, blocks):
            distrust = self._calibrate(optimizer, curvature, now, fallback, blocks)
        if search and not distrust:
            proposal = self._search(optimizer, curvature, now, fallback)
        else:
            proposal = self._proposer.propose(optimizer, curvature, now, fallback, distrust)
        report = {
            "loss": None if objective is None else objective.first,
            "predicted_reduction": proposal.predicted if proposal.modelled else None,
            "lr": proposal.coefficients[0], "momentum": proposal.coefficients[1],
            "reduction": None, "rho": None, "fresh_rho": fresh_rho,
            "damping": first["damping"], "gamma": factored_damping(first) ** 0.5,
        }  # fmt: skip
        for group in groups:
            group["step"] += 1
        if proposal.modelled:
            for group in groups:
                group["promise"] = abs(float(proposal.predicted))
        check = first["adaptive_damping"] and (step + 1) % self._adaptation.interval == 0 and proposal.judges_damping()
        if check:
            report |= self._check(optimizer, proposal, objective)
        if not check or math.isfinite(report["reduction"]):
            self._take(optimizer, proposal)
        return report

    @staticmethod
    def _take(optimizer: torch.optim.Optimizer, proposal: Proposal) -> None:
        """Moves along a proposal, which is from now on the last step, of parameters that it leaves out too: zero."""
        move_(proposal.delta)
        for p, buffer in _last_step(optimizer).items():
            if p in proposal.delta:
                optimizer.state[p]["momentum_buffer"] = proposal.delta[p]
            else:
                buffer.zero_()

    def _without_blocks(self, optimizer: torch.optim.Optimizer, curvature: Curvature, now: Occasion) -> dict[str, Any]:
        """A step of AdamW alone, of which the quadratic model has nothing to say."""
        move_(fallback_direction(step_arguments(optimizer, curvature, now)))
        for group in optimizer.param_groups:
            group["step"] += 1
        first = optimizer.param_groups[0]
        return {"damping": first["damping"], "gamma": factored_damping(first) ** 0.5}

    def _check(
        self, optimizer: torch.optim.Optimizer, proposal: Proposal, objective: Objective | None
    ) -> dict[str, float]:
        """rho of a proposal on its own batch, noted until the next judges it; more damping if it leads nowhere."""
        assert objective is not None
        reduction = reduction_of(proposal, objective)
        rho = reduction_ratio(reduction, float(proposal.predicted), objective.resolution)
        for group in optimizer.param_groups:
            group["rho"], group["predicted"] = rho, float(proposal.predicted)
        if not math.isfinite(reduction):
            self._reject(optimizer)
        return {"reduction": reduction, "rho": rho}

    def take_back(self, optimizer: torch.optim.Optimizer, objective: Objective) -> None:
        """Undoes the last step of the covered parameters if it, and not the batch, is why the loss is not finite."""
        last = _last_step(optimizer)
        if not last or math.isfinite(objective.first):
            return
        with moved(last, -1.0):
            blameless = not math.isfinite(objective.loss(moved=True))
        if not blameless:
            move_(last, -1.0)
            self._reject(optimizer)

    def _reject(self, optimizer: torch.optim.Optimizer) -> None:
        """More damping, and no momentum from a step that was taken back."""
        if not self._reported:
            self._reported = True
            log.warning("a step led to a loss that is not finite; such steps are taken back, and the damping grows")
        self._adapt(optimizer.param_groups, -math.inf)
        for group in optimizer.param_groups:
            group["rho"] = None
        for buffer in _last_step(optimizer).values():
            buffer.zero_()

    def _judge_last_step(
        self, optimizer: torch.optim.Optimizer, curvature: Curvature, objective: Objective | None
    ) -> float | None:
        """rho of the last step on this batch, to which it was not fitted; moves the damping now that both are known."""
        first = optimizer.param_groups[0]
        if not first["adaptive_damping"] or first["rho"] is None or objective is None:
            return None
        covered = [p for w, block in curvature.blocks.items() for p in (w, block.bias) if p is not None]
        last = {p: d for p in covered if (d := optimizer.state[p].get("momentum_buffer")) is not None}
        decay = {p: g["weight_decay"] for g in optimizer.param_groups for p in g["params"] if p in last}
        with moved(last, -1.0):
            change = objective.first - objective.loss(moved=True) + decay_change(decay, last)
        fresh_rho = reduction_ratio(change, first["predicted"], objective.resolution)
        self._adapt(optimizer.param_groups, first["rho"], fresh_rho)
        for group in optimizer.param_groups:
            group["rho"] = None
        return fresh_rho

    def _adapt(self, groups: list[Group], rho: float, fresh_rho: float = math.inf) -> None:
        for group in groups:
            if group["adaptive_damping"]:
                group["damping"] = self._adaptation.next_damping(group["damping"], rho, fresh_rho)

    def _calibrate(
        self, optimizer: torch.optim.Optimizer, curvature: Curvature, now: Occasion, fallback: Direction, blocks: int
    ) -> str:
        """Finds the damping to start from, and gamma with it, by steps that are taken back.

        Where nothing tells, no gradient or no model, both stay as they are and the next step tries again; where the
        model is wrong at any damping too. Returns why the model is not to be trusted in this step, or "".
        """
        objective, groups = now.objective, optimizer.param_groups
        assert objective is not None
        before = [(group["damping"], group["gamma"]) for group in groups]

        def start_from(damping: float) -> None:
            if damping != groups[0]["damping"]:
                for group in groups:
                    group["damping"] = damping
                    group["gamma"] = math.sqrt(damping + group["weight_decay"] / self._loss_scale)
                _refresh(optimizer, curvature, all_of_them=True)

        def reduction_at(damping: float) -> tuple[float, float]:
            start_from(damping)
            proposal = self._proposer.propose(optimizer, curvature, now, fallback)
            reduction = reduction_of(proposal, objective)
            visible = proposal.judges_damping(objective.resolution)
            return reduction, reduction_ratio(reduction, float(proposal.predicted)) if visible else -math.inf

        first = self._proposer.propose(optimizer, curvature, now, fallback)
        if not first.judges_damping(objective.resolution):
            return ""
        found = self._adaptation.calibrated(groups[0]["damping"], reduction_at)
        for group in groups:
            note_calibration(group, blocks, success=found is not None)
        if found is not None:
            start_from(found)
            return ""
        for group, numbers in zip(groups, before, strict=True):
            group["damping"], group["gamma"] = numbers
        _refresh(optimizer, curvature, all_of_them=True)
        return "does not hold at any damping: the gradient is not that of the closure's loss, or it is spoiled"

    def _search(
        self, optimizer: torch.optim.Optimizer, curvature: Curvature, now: Occasion, fallback: Direction
    ) -> Proposal:
        """The best of the proposals for three gammas, the first that of the inverses; its gamma and inverses stay."""
        state, groups = optimizer.state, optimizer.param_groups

        def tried(gamma: float) -> Candidate:
            if gamma != start:
                for group in groups:
                    group["gamma"] = gamma
                _refresh(optimizer, curvature, all_of_them=True)
            proposal = self._proposer.propose(optimizer, curvature, now, fallback)
            return Candidate(gamma, proposal, {w: curvature.inverses(state[w]) for w in curvature.blocks})

        least = groups[0]["weight_decay"] / self._loss_scale
        start, smaller, larger = self._adaptation.gammas(groups[0]["gamma"], least)
        best = min(map(tried, dict.fromkeys((start, smaller, larger))), key=lambda one: one.promise)
        for group in groups:
            group["gamma"] = best.gamma
        for w, own in best.inverses.items():
            state[w].update(own)
        if not best.proposal.modelled:
            return best.proposal
        device = now.gradients.finite.device
        faster = curvature.settings.precision == "auto" and ops.multiplies_bf16_faster(device)
        if curvature.ranks.common([faster], device)[0]:
            return self._rounded_or_not(optimizer, curvature, now, fallback, best.proposal)
        return best.proposal

    def _rounded_or_not(
        self,
        optimizer: torch.optim.Optimizer,
        curvature: Curvature,
        now: Occasion,
        fallback: Direction,
        proposal: Proposal,
    ) -> Proposal:
        """Products in bfloat16 until the next search, if the model promises nearly as much of their step."""
        groups = optimizer.param_groups
        proposals = {groups[0]["bf16"]: proposal}
        for group in groups:
            group["bf16"] = not group["bf16"]
        proposals[groups[0]["bf16"]] = self._proposer.propose(optimizer, curvature, now, fallback)
        rounded = proposals[True].promise <= ROUNDING * proposals[False].promise
        for group in groups:
            group["bf16"] = rounded
        return proposals[rounded]


def _last_step(optimizer: torch.optim.Optimizer) -> Direction:
    """The last step of the parameters that have or had a block."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return {p: optimizer.state[p]["momentum_buffer"] for p in parameters if "momentum_buffer" in optimizer.state[p]}


def _refresh(optimizer: torch.optim.Optimizer, curvature: Curvature, *, all_of_them: bool) -> None:
    """Refreshes the inverses that are due, or all of them."""
    group_of = {p: group for group in optimizer.param_groups for p in group["params"]}
    curvature.update_inverses(optimizer.state, group_of.__getitem__, all_of_them=all_of_them)
