"""The step whose length, momentum and damping follow the quadratic model (Martens & Grosse 2015, algorithm 2).

    delta = alpha Delta + mu delta_0 + delta_fallback,   Delta = -V,   delta_0 the last step of the covered parameters

alpha and mu minimise M(delta) where they are adaptive and are the groups' numbers where they are not. Parameters
without a block move by AdamW; the model counts their movement in, at the coefficient 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from kfac_triton import assembly, distributed, loss_scale, ops, update
from kfac_triton.arguments import Settings
from kfac_triton.capture import Inputs
from kfac_triton.curvature import Curvature
from kfac_triton.damping import Adaptation, factored_damping, reduction_ratio
from kfac_triton.objective import Objective, move_, moved
from kfac_triton.quadratic import Direction, FisherProducts, minimise, within

ROUNDING = 0.95  # the share of a step's promise that its products in bfloat16 must keep

Group = dict[str, Any]
Arguments = tuple[update.Plan, update.Hyper, update.Blocks, update.Fallback]


@dataclass(frozen=True)
class Proposal:
    """A step: delta = sum of coefficients (alpha, mu, 1) times directions; `predicted` is M(delta), 0-d float64.

    `decay` holds eta for the parameters whose weight decay is in the objective, those with a block.
    """

    delta: Direction
    coefficients: Tensor
    predicted: Tensor
    decay: dict[nn.Parameter, float]

    @property
    def promise(self) -> float:
        """M(delta), inf where that is no number."""
        value = float(self.predicted)
        return value if math.isfinite(value) else math.inf


@dataclass(frozen=True)
class Candidate:
    """A gamma with its inverses, and what they propose."""

    gamma: float
    proposal: Proposal
    inverses: dict[nn.Parameter, dict[str, Tensor]]

    @property
    def promise(self) -> float:
        return self.proposal.promise


@dataclass(frozen=True)
class Occasion:
    """One call of step(): parameters with a gradient, the inputs seen, what undoes a GradScaler's scale, whether every
    gradient is finite, and with a closure the objective."""

    parameters: list[nn.Parameter]
    kept: list[Inputs]
    unscale: Tensor
    finite: Tensor
    objective: Objective | None


class AdaptiveStep:
    """Steps by the quadratic model. Holds no state but which way of computing J v works: numbers live in the groups."""

    def __init__(self, module: nn.Module, settings: Settings) -> None:
        assert settings.likelihood is not None
        self._module = module
        self._products = FisherProducts(
            module, settings.likelihood, settings.output, settings.mask, settings.quadratic_fraction
        )
        self._loss_scale = settings.loss_scale
        self._seed = settings.seed
        self._adaptation = Adaptation()

    def step(self, optimizer: torch.optim.Optimizer, curvature: Curvature, now: Occasion) -> dict[str, Any]:
        """One step; returns what `diagnostics` reports of it.

        Raises:
            ValueError: in the first step, with a closure: loss_scale does not fit the loss.
        """
        groups = optimizer.param_groups
        first, step, objective = groups[0], groups[0]["step"], now.objective
        if step == 0 and objective is not None:
            loss_scale.check(self._loss_scale, objective, self._products, self._seed)
        fresh_rho = self._judge_last_step(optimizer, curvature, objective)
        search = first["adaptive_damping"] and step % self._adaptation.gamma_interval == 0
        _refresh(optimizer, curvature, all_of_them=search)
        fallback = fallback_direction(_arguments(optimizer, curvature, now))
        if step == 0 and first["calibrate_damping"]:
            self._calibrate(optimizer, curvature, now, fallback)
        if search:
            proposal = self._search(optimizer, curvature, now, fallback)
        else:
            proposal = self.propose(optimizer, curvature, now, fallback)
        report = {
            "loss": None if objective is None else objective.first, "predicted_reduction": proposal.predicted,
            "lr": proposal.coefficients[0], "momentum": proposal.coefficients[1],
            "reduction": None, "rho": None, "fresh_rho": fresh_rho,
            "damping": first["damping"], "gamma": factored_damping(first) ** 0.5,
        }  # fmt: skip
        for group in groups:
            group["step"] += 1
        if not bool(torch.isfinite(proposal.predicted)):
            self._adapt(groups, -math.inf)
            return report
        check = first["adaptive_damping"] and (step + 1) % self._adaptation.interval == 0
        if check:
            report |= self._check(optimizer, proposal, objective)
        if not check or math.isfinite(report["reduction"]):
            move_(proposal.delta)
            for p in proposal.delta:
                if "momentum_buffer" in optimizer.state[p]:
                    optimizer.state[p]["momentum_buffer"] = proposal.delta[p]
        return report

    def _check(
        self, optimizer: torch.optim.Optimizer, proposal: Proposal, objective: Objective | None
    ) -> dict[str, float]:
        """rho of a proposal on its own batch, noted until the next judges it; more damping if it leads nowhere."""
        assert objective is not None
        reduction = _reduction(proposal, objective)
        rho = reduction_ratio(reduction, float(proposal.predicted), objective.resolution)
        for group in optimizer.param_groups:
            group["rho"], group["predicted"] = rho, float(proposal.predicted)
        if not math.isfinite(reduction):
            self._reject(optimizer)
        return {"reduction": reduction, "rho": rho}

    def take_back(self, optimizer: torch.optim.Optimizer) -> None:
        """Undoes the last step of the covered parameters, after which nothing is finite any more."""
        for group in optimizer.param_groups:
            for p in group["params"]:
                if "momentum_buffer" in optimizer.state[p]:
                    p.sub_(optimizer.state[p]["momentum_buffer"].to(p.dtype))
        self._reject(optimizer)

    def _reject(self, optimizer: torch.optim.Optimizer) -> None:
        """More damping, and no momentum from a step that was taken back."""
        self._adapt(optimizer.param_groups, -math.inf)
        for group in optimizer.param_groups:
            group["rho"] = None
            for p in group["params"]:
                if "momentum_buffer" in optimizer.state[p]:
                    optimizer.state[p]["momentum_buffer"].zero_()

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
            change = objective.first - objective.loss() + decay_change(decay, last)
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
        self, optimizer: torch.optim.Optimizer, curvature: Curvature, now: Occasion, fallback: Direction
    ) -> None:
        """Finds the damping to start from, and gamma with it, by first steps that are taken back."""
        objective = now.objective
        assert objective is not None

        def start_from(damping: float) -> None:
            if damping != optimizer.param_groups[0]["damping"]:
                for group in optimizer.param_groups:
                    group["damping"] = damping
                    group["gamma"] = math.sqrt(damping + group["weight_decay"] / self._loss_scale)
                _refresh(optimizer, curvature, all_of_them=True)

        def reduction_at(damping: float) -> tuple[float, float]:
            start_from(damping)
            proposal = self.propose(optimizer, curvature, now, fallback)
            reduction = _reduction(proposal, objective)
            return reduction, reduction_ratio(reduction, float(proposal.predicted))

        start_from(self._adaptation.calibrated(optimizer.param_groups[0]["damping"], reduction_at))

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
            proposal = self.propose(optimizer, curvature, now, fallback)
            return Candidate(gamma, proposal, {w: curvature.inverses(state[w]) for w in curvature.blocks})

        least = groups[0]["weight_decay"] / self._loss_scale
        start, smaller, larger = self._adaptation.gammas(groups[0]["gamma"], least)
        best = min(map(tried, dict.fromkeys((start, smaller, larger))), key=lambda one: one.promise)
        for group in groups:
            group["gamma"] = best.gamma
        for w, own in best.inverses.items():
            state[w].update(own)
        device = now.finite.device
        faster = curvature.settings.precision == "auto" and ops.multiplies_bf16_faster(device)
        if distributed.common([faster], device)[0]:
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
        proposals[groups[0]["bf16"]] = self.propose(optimizer, curvature, now, fallback)
        rounded = proposals[True].promise <= ROUNDING * proposals[False].promise
        for group in groups:
            group["bf16"] = rounded
        return proposals[rounded]

    def propose(
        self, optimizer: torch.optim.Optimizer, curvature: Curvature, now: Occasion, fallback: Direction
    ) -> Proposal:
        """The step that the model of the kept inputs asks for, with the inverses as they are."""
        plan, hyper, blocks, tensors = _arguments(optimizer, curvature, now)
        group_of = {p: group for group in optimizer.param_groups for p in group["params"]}
        first = optimizer.param_groups[0]
        longest = max(float(group["lr"]) for group in optimizer.param_groups)
        gradient, natural = _gradient_and_natural(*update.precondition(plan, hyper, blocks), plan, blocks)
        for p, grad in zip(tensors.parameters, tensors.grads, strict=True):
            gradient[cast(nn.Parameter, p)] = grad * hyper.unscale.to(grad)
        for own, v in natural.items():  # an adaptive alpha would undo a factor that all share
            lr = float(group_of[own]["lr"])
            if lr != longest:
                v *= lr / longest
        last: Direction = {}
        if first["adaptive_momentum"] or first["momentum"] != 0:
            last = {p: optimizer.state[p]["momentum_buffer"] for p in natural}
        directions = [natural, last, fallback]
        fixed = [
            None if first["adaptive_lr"] else longest,
            None if first["adaptive_momentum"] else float(first["momentum"]),
            1.0,
        ]
        strength = {p: self._loss_scale * group_of[p]["damping"] + group_of[p]["weight_decay"] for p in natural}
        F = self._fisher(directions, now, first["step"])
        H = F + _gram(directions, strength)
        b = torch.stack([_inner(gradient, v, F) for v in directions])
        w, _ = minimise(H, b, fixed)
        if first["adaptive_lr"] and longest != 1.0:
            w[0] *= longest
        decay = {p: group_of[p]["weight_decay"] for p in natural if group_of[p]["weight_decay"]}
        if now.objective is not None:
            height = now.objective.first + float(sum(eta * _dot(p, p) for p, eta in decay.items())) / 2
            w = within(w, H, b, height) if height > 0 else w
        return Proposal(_combined(directions, w), w, w @ H @ w / 2 + b @ w, decay)

    def _fisher(self, directions: list[Direction], now: Occasion, step: int) -> Tensor:
        """scale v_i^T F v_j, with zeros for directions that are empty."""
        present = [i for i, v in enumerate(directions) if v]
        seed = self._seed if now.objective is None else now.objective.streams
        found = self._products.gram(now.kept, [directions[i] for i in present], seed, step)
        distributed.average_([found])
        F = found.new_zeros(len(directions), len(directions))
        index = torch.tensor(present, device=F.device)
        F[index.unsqueeze(1), index] = found
        return self._loss_scale * F


def fallback_direction(arguments: Arguments) -> Direction:
    """How AdamW moves the parameters without a block, which stay where they are; its averages move on."""
    plan, hyper, _, fallback = arguments
    moved: Direction = {}
    for i, (p, group) in enumerate(zip(fallback.parameters, plan.fallback_groups, strict=True)):
        before = p.clone()
        update.adamw_(plan, hyper, group, fallback, i)
        moved[cast(nn.Parameter, p)] = p - before
        p.copy_(before)
    return moved


def _arguments(optimizer: torch.optim.Optimizer, curvature: Curvature, now: Occasion) -> Arguments:
    precision = curvature.settings.precision
    return assembly.assemble(optimizer, now.parameters, curvature.blocks, now.unscale, now.finite, precision)


def _refresh(optimizer: torch.optim.Optimizer, curvature: Curvature, *, all_of_them: bool) -> None:
    """Refreshes the inverses that are due, or all of them."""
    group_of = {p: group for group in optimizer.param_groups for p in group["params"]}
    curvature.update_inverses(optimizer.state, group_of.__getitem__, all_of_them=all_of_them)


def _reduction(proposal: Proposal, objective: Objective) -> float:
    """By how much the objective, weight decay included, changes along a proposal, which is not taken."""
    decay = decay_change(proposal.decay, proposal.delta)
    with moved(proposal.delta):
        return objective.loss() + decay - objective.first


def decay_change(decay: dict[nn.Parameter, float], delta: Direction) -> float:
    """By how much eta |w|^2 / 2 changes from here along delta, over the parameters w of `decay`."""
    changes = [eta * (_dot(p, delta[p]) + _dot(delta[p], delta[p]) / 2) for p, eta in decay.items() if eta]
    return float(torch.stack(changes).sum()) if changes else 0.0


def _gradient_and_natural(
    grads: list[Tensor], V: list[Tensor], plan: update.Plan, blocks: update.Blocks
) -> tuple[Direction, Direction]:
    """grad + weight_decay W, and -V, by parameter."""
    gradient: Direction = {}
    natural: Direction = {}
    for i, layer in enumerate(plan.layers):
        for into, matrix, written in ((gradient, grads[i], Tensor.contiguous), (natural, V[i], Tensor.neg)):
            weight, bias = layer.layout.split(matrix, blocks.weights[i].shape)
            into[cast(nn.Parameter, blocks.weights[i])] = written(weight)
            if bias is not None and layer.bias_has_grad:
                into[cast(nn.Parameter, blocks.biases[i])] = written(bias)
    return gradient, natural


def _gram(directions: list[Direction], strength: dict[nn.Parameter, float]) -> Tensor:
    """D_ij = sum over the parameters in `strength` of strength <v_i, v_j>."""
    k = len(directions)
    everywhere = {p for v in directions for p in v}
    D = torch.zeros(k, k, dtype=torch.float64, device=next(iter(everywhere)).device)
    for i in range(k):
        for j in range(i + 1):
            u, v = directions[i], directions[j]
            weighted = [eta * _dot(u[p], v[p]) for p, eta in strength.items() if p in u and p in v]
            if weighted:
                D[i, j] = D[j, i] = torch.stack(weighted).sum()
    return D


def _inner(u: Direction, v: Direction, like: Tensor) -> Tensor:
    products = [_dot(u[p], v[p]) for p in u if p in v]
    return torch.stack(products).sum() if products else like.new_zeros(())


def _dot(u: Tensor, v: Tensor) -> Tensor:
    """<u, v>, summed in float32 or wider, as float64."""
    wide = torch.float64 if u.dtype == torch.float64 else torch.float32
    return torch.dot(u.flatten().to(wide), v.flatten().to(wide)).double()


def _combined(directions: list[Direction], w: Tensor) -> Direction:
    total: Direction = {}
    for coefficient, direction in zip(w, directions, strict=True):
        for p, v in direction.items():
            part = v * coefficient.to(v.dtype)
            total[p] = total[p].add_(part) if p in total else part
    return total
