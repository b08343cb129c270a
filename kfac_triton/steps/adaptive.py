"""Steps whose damping, gamma and precision follow what the quadratic model promised and what came of it (Martens &
Grosse 2015, algorithm 2)."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kfac_triton import ops
from kfac_triton.capture import ModuleState
from kfac_triton.config import Settings
from kfac_triton.fisher import loss_scale
from kfac_triton.fisher.parts import Parts
from kfac_triton.steps import fixed
from kfac_triton.steps.damping import (
    Adaptation,
    calibration_due,
    factored_damping,
    note_calibration,
    reduction_ratio,
)
from kfac_triton.steps.objective import Objective, move_, moved
from kfac_triton.steps.proposal import (
    Occasion,
    Proposal,
    Proposer,
    decay_change,
    fallback_direction,
    reduction_of,
    usual_promise,
)
from kfac_triton.steps.quadratic import Direction
from kfac_triton.steps.runner import Runner

log = logging.getLogger("kfac_triton")

ROUNDING = 0.95  # the share of a step's promise that its products in bfloat16 must keep

Group = dict[str, Any]


@dataclass(frozen=True)
class Candidate:
    """A gamma with its inverses, and what they propose; `steps` are copies of the covered parameters' deltas."""

    gamma: float
    proposal: Proposal
    steps: list[Tensor]
    inverses: list[Tensor]

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

    def step(self, optimizer: torch.optim.Optimizer, runner: Runner, now: Occasion) -> dict[str, Any]:
        """One step; returns what `diagnostics` reports of it.

        Raises:
            ValueError: in the first step, with a closure: loss_scale does not fit the loss.
        """
        if not runner.estimator.layers:
            return self._without_blocks(optimizer, runner, now)
        groups = optimizer.param_groups
        first, step, objective = groups[0], groups[0]["step"], now.objective
        if step == 0 and objective is not None and self._settings.check_loss_scale:
            loss_scale.check(self._loss_scale, objective, self._proposer.products, self._settings.seed)
        fresh_rho = self._judge_last_step(optimizer, runner, objective)
        search = first["adaptive_damping"] and step % self._adaptation.gamma_interval == 0
        runner.estimator.refresh_(groups, all_of_them=search)
        blocks, distrust = self._begin(runner, now, groups), ""
        fallback = fallback_direction(runner, now)
        if calibration_due(first, blocks):
            distrust = self._calibrate(groups, runner, now, fallback, blocks)
        if search and not distrust:
            proposal = self._search(groups, runner, now, fallback)
        else:
            proposal = self._proposer.propose(groups, runner, now, fallback, distrust)
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
            resolution = 0.0 if objective is None else objective.resolution
            for group in groups:
                group["promise"] = usual_promise(group["promise"], proposal.predicted, resolution)
        check = first["adaptive_damping"] and (step + 1) % self._adaptation.interval == 0 and proposal.judges_damping()
        if check:
            report |= self._check(optimizer, runner, proposal, objective)
        if not check or math.isfinite(report["reduction"]):
            move_(proposal.parameters, proposal.delta)
            runner.remember_step(now.parameters)
        return report

    @staticmethod
    def _begin(runner: Runner, now: Occasion, groups: list[Group]) -> int:
        """Makes the gathered gradients those of the objective; how many layers take part."""
        runner.hyper.fill_(groups)
        motion, _ = runner.plan(now.parameters)
        if motion is None:
            return 0
        if runner.stale:
            motion.gather_()
        fixed.joint_gradients_(motion, runner.hyper, now.scales)
        first = groups[0]
        if first["adaptive_damping"] or first["adaptive_momentum"] or runner.hyper.moving:
            runner.publish(motion)
        return len(motion.layers)

    def _without_blocks(self, optimizer: torch.optim.Optimizer, runner: Runner, now: Occasion) -> dict[str, Any]:
        """A step of AdamW alone, of which the quadratic model has nothing to say."""
        self._begin(runner, now, optimizer.param_groups)
        fallback = fallback_direction(runner, now)
        move_(list(fallback), list(fallback.values()))
        for group in optimizer.param_groups:
            group["step"] += 1
        first = optimizer.param_groups[0]
        return {"damping": first["damping"], "gamma": factored_damping(first) ** 0.5}

    def _check(
        self, optimizer: torch.optim.Optimizer, runner: Runner, proposal: Proposal, objective: Objective | None
    ) -> dict[str, float]:
        """rho of a proposal on its own batch, noted until the next judges it; more damping if it leads nowhere."""
        assert objective is not None
        reduction = reduction_of(proposal, objective)
        rho = reduction_ratio(reduction, proposal.predicted, objective.resolution)
        for group in optimizer.param_groups:
            group["rho"], group["predicted"] = rho, proposal.predicted
        if not math.isfinite(reduction):
            self._reject(optimizer, runner)
        return {"reduction": reduction, "rho": rho}

    def take_back(self, optimizer: torch.optim.Optimizer, runner: Runner, objective: Objective) -> None:
        """Undoes the last step of the covered parameters if it, and not the batch, is why the loss is not finite."""
        last = _last_step(optimizer)
        if not last or math.isfinite(objective.first):
            return
        parameters, steps = list(last), list(last.values())
        with moved(parameters, steps, -1.0):
            blameless = not math.isfinite(objective.loss(moved=True))
        if not blameless:
            move_(parameters, steps, -1.0)
            self._reject(optimizer, runner)

    def _reject(self, optimizer: torch.optim.Optimizer, runner: Runner) -> None:
        """More damping, and no momentum from a step that was taken back."""
        if not self._reported:
            self._reported = True
            log.warning("a step led to a loss that is not finite; such steps are taken back, and the damping grows")
        self._adapt(optimizer.param_groups, -math.inf)
        for group in optimizer.param_groups:
            group["rho"] = None
        runner.forget_step()

    def _judge_last_step(
        self, optimizer: torch.optim.Optimizer, runner: Runner, objective: Objective | None
    ) -> float | None:
        """rho of the last step on this batch, to which it was not fitted; moves the damping now that both are known."""
        first = optimizer.param_groups[0]
        if not first["adaptive_damping"] or first["rho"] is None or objective is None:
            return None
        parameters, last, decay = [], [], []
        for group in optimizer.param_groups:
            for p in group["params"]:
                step = optimizer.state[p].get("momentum_buffer")
                if step is not None:
                    parameters.append(p)
                    last.append(step)
                    decay.append(group["weight_decay"])
        with moved(parameters, last, -1.0):
            change = objective.first - objective.loss(moved=True) + decay_change(decay, parameters, last)
        fresh_rho = reduction_ratio(change, first["predicted"], objective.resolution)
        self._adapt(optimizer.param_groups, first["rho"], fresh_rho)
        for group in optimizer.param_groups:
            group["rho"] = None
        return fresh_rho

    def _adapt(self, groups: list[Group], rho: float, fresh_rho: float = math.inf) -> None:
        for group in groups:
            if group["adaptive_damping"]:
                group["damping"] = self._adaptation.next_damping(group["damping"], rho, fresh_rho)

    def _calibrate(self, groups: list[Group], runner: Runner, now: Occasion, fallback: Direction, blocks: int) -> str:
        """Finds the damping to start from, and gamma with it, by steps that are taken back.

        Where nothing tells, no gradient or no model, both stay as they are and the next step tries again; where the
        model is wrong at any damping too. Returns why the model is not to be trusted in this step, or "".
        """
        objective = now.objective
        assert objective is not None
        before = [(group["damping"], group["gamma"]) for group in groups]

        def start_from(damping: float) -> None:
            if damping != groups[0]["damping"]:
                for group in groups:
                    group["damping"] = damping
                    group["gamma"] = math.sqrt(damping + group["weight_decay"] / self._loss_scale)
                runner.estimator.refresh_(groups, all_of_them=True)

        def reduction_at(damping: float) -> tuple[float, float]:
            start_from(damping)
            proposal = self._proposer.propose(groups, runner, now, fallback)
            reduction = reduction_of(proposal, objective)
            visible = proposal.judges_damping(objective.resolution)
            return reduction, reduction_ratio(reduction, proposal.predicted) if visible else -math.inf

        first = self._proposer.propose(groups, runner, now, fallback)
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
        runner.estimator.refresh_(groups, all_of_them=True)
        return "does not hold at any damping: the gradient is not that of the closure's loss, or it is spoiled"

    def _search(self, groups: list[Group], runner: Runner, now: Occasion, fallback: Direction) -> Proposal:
        """The best of the proposals for three gammas, the first that of the inverses; its gamma and inverses stay."""

        def tried(gamma: float) -> Candidate:
            if gamma != start:
                for group in groups:
                    group["gamma"] = gamma
                runner.estimator.refresh_(groups, all_of_them=True)
            proposal = self._proposer.propose(groups, runner, now, fallback)
            copies = [t.clone() for t in runner.proposed()], [t.clone() for t in runner.estimator.renewed()]
            return Candidate(gamma, proposal, *copies)

        least = groups[0]["weight_decay"] / self._loss_scale
        start, smaller, larger = self._adaptation.gammas(groups[0]["gamma"], least)
        best = min(map(tried, dict.fromkeys((start, smaller, larger))), key=lambda one: one.promise)
        for group in groups:
            group["gamma"] = best.gamma
        _put_back([*runner.proposed(), *runner.estimator.renewed()], [*best.steps, *best.inverses])
        if not best.proposal.modelled:
            return best.proposal
        device, estimator = runner.device, runner.estimator
        widest = max([min(structure.stack.dims) for structure in estimator.structures])
        faster = estimator.settings.precision == "auto" and ops.multiplies_bf16_faster(device, widest)
        if estimator.ranks.common([faster], device)[0]:
            return self._rounded_or_not(groups, runner, now, fallback, best)
        return best.proposal

    def _rounded_or_not(
        self, groups: list[Group], runner: Runner, now: Occasion, fallback: Direction, best: Candidate
    ) -> Proposal:
        """Products in bfloat16 until the next search, if the model promises nearly as much of their step."""
        before = groups[0]["bf16"]
        proposals = {before: best.proposal}
        for group in groups:
            group["bf16"] = not group["bf16"]
        proposals[groups[0]["bf16"]] = self._proposer.propose(groups, runner, now, fallback)
        rounded = proposals[True].promise <= ROUNDING * proposals[False].promise
        for group in groups:
            group["bf16"] = rounded
        if rounded == before:
            _put_back(runner.proposed(), best.steps)
        return proposals[rounded]


def _put_back(tensors: list[Tensor], values: list[Tensor]) -> None:
    for t, value in zip(tensors, values, strict=True):
        t.copy_(value)


def _last_step(optimizer: torch.optim.Optimizer) -> Direction:
    """The last step of the parameters that have or had a block."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return {p: optimizer.state[p]["momentum_buffer"] for p in parameters if "momentum_buffer" in optimizer.state[p]}
