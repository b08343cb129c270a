"""The step that the quadratic model asks for with the inverses as they are (Martens & Grosse 2015, sections 6.4, 7).

    delta = alpha Delta + mu delta_0 + delta_fallback,   Delta = -V,   delta_0 the last step of the covered parameters

alpha and mu minimise M(delta) where they are adaptive and are the groups' numbers where they are not; beyond the paper
|mu| is at most MAX_MOMENTUM. Parameters without a block move by AdamW; the model counts their movement in, at the
coefficient 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from kfac_triton import assembly, distributed, update
from kfac_triton.arguments import Settings
from kfac_triton.capture import Inputs
from kfac_triton.curvature import Curvature
from kfac_triton.objective import Objective, moved
from kfac_triton.quadratic import Direction, FisherProducts, minimise, within
from kfac_triton.step_plan import Blocks, Fallback, Gradients, Hyper, Plan

# The last step of a few examples is mostly noise, and a longer one along it more so. With batches of 16 and no bound,
# one of five seeds of a small ResNet and one of a transformer ended above AdamW; with this one none did.
MAX_MOMENTUM = 1.0
LEAP = 100.0  # times the last step's promise is the most that one without a loss to go by may promise

Arguments = tuple[Plan, Hyper, Blocks, Fallback]


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
class Occasion:
    """One call of step(): parameters with a gradient, the inputs seen, what is known of the gradients, and with a
    closure the objective."""

    parameters: list[nn.Parameter]
    kept: list[Inputs]
    gradients: Gradients
    objective: Objective | None


class Proposer:
    """Holds no state but which way of computing J v works."""

    def __init__(self, module: nn.Module, settings: Settings) -> None:
        assert settings.likelihood is not None
        self.products = FisherProducts(
            module, settings.likelihood, settings.output, settings.mask, settings.quadratic_fraction
        )
        self._loss_scale = settings.loss_scale
        self._seed = settings.seed

    def propose(
        self, optimizer: torch.optim.Optimizer, curvature: Curvature, now: Occasion, fallback: Direction
    ) -> Proposal:
        """The step that the model of the kept inputs asks for, with the inverses as they are."""
        plan, hyper, blocks, tensors = step_arguments(optimizer, curvature, now)
        group_of = {p: group for group in optimizer.param_groups for p in group["params"]}
        first = optimizer.param_groups[0]
        longest = max(float(group["lr"]) for group in optimizer.param_groups)
        units = hyper.loss_scale * hyper.size  # in which the gradient is, and V
        gradient, natural = _gradient_and_natural(*update.precondition(plan, hyper, blocks), plan, blocks)
        for p, grad in zip(tensors.parameters, tensors.grads, strict=True):
            gradient[cast(nn.Parameter, p)] = grad * (hyper.unscale / units).to(grad)
        for own, v in natural.items():  # an adaptive alpha would undo a factor that all share
            lr = float(group_of[own]["lr"])
            if lr != longest:
                v *= lr / longest
        last: Direction = {}
        if first["adaptive_momentum"] or first["momentum"] != 0:
            last = {p: optimizer.state[p]["momentum_buffer"] for p in natural}
        directions = [natural, last, fallback]
        fixed = [
            None if first["adaptive_lr"] else longest * float(hyper.size),
            None if first["adaptive_momentum"] else float(first["momentum"]),
            1.0,
        ]
        strength = {p: self._loss_scale * group_of[p]["damping"] + group_of[p]["weight_decay"] for p in natural}
        F = self._fisher(directions, now, first["step"])
        H = F + _gram(directions, strength)
        b = units * torch.stack([_inner(gradient, v, F) for v in directions])
        w, _ = minimise(H, b, fixed)
        if first["adaptive_momentum"] and abs(float(w[1])) > MAX_MOMENTUM:
            fixed[1] = math.copysign(MAX_MOMENTUM, float(w[1]))
            w, _ = minimise(H, b, fixed)
        if first["adaptive_lr"] and longest != 1.0:
            w[0] *= longest
        decay = {p: group_of[p]["weight_decay"] for p in natural if group_of[p]["weight_decay"]}
        height = self._height(now, decay)
        most = height if height > 0 else LEAP * first["promise"]
        w = within(w, H, b, most) if most > 0 else w
        coefficients = torch.stack([w[0] / hyper.size, *w[1:]])
        return Proposal(_combined(directions, w), coefficients, w @ H @ w / 2 + b @ w, decay)

    def _height(self, now: Occasion, decay: dict[nn.Parameter, float]) -> float:
        """The objective here, weight decay included; 0 without a closure."""
        if now.objective is None:
            return 0.0
        return now.objective.first + float(sum(eta * _dot(p, p) for p, eta in decay.items())) / 2

    def _fisher(self, directions: list[Direction], now: Occasion, step: int) -> Tensor:
        """scale v_i^T F v_j, with zeros for directions that are empty."""
        present = [i for i, v in enumerate(directions) if v]
        seed = self._seed if now.objective is None else now.objective.streams
        found = self.products.gram(now.kept, [directions[i] for i in present], seed, step)
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


def step_arguments(optimizer: torch.optim.Optimizer, curvature: Curvature, now: Occasion) -> Arguments:
    """The arguments of `update.precondition` and of AdamW's update."""
    known = curvature.settings.precision, curvature.settings.loss_scale
    return assembly.assemble(optimizer, now.parameters, curvature.blocks, now.gradients, *known)


def reduction_of(proposal: Proposal, objective: Objective) -> float:
    """By how much the objective, weight decay included, changes along a proposal, which is not taken."""
    decay = decay_change(proposal.decay, proposal.delta)
    with moved(proposal.delta):
        return objective.loss() + decay - objective.first


def decay_change(decay: dict[nn.Parameter, float], delta: Direction) -> float:
    """By how much eta |w|^2 / 2 changes from here along delta, over the parameters w of `decay`."""
    changes = [eta * (_dot(p, delta[p]) + _dot(delta[p], delta[p]) / 2) for p, eta in decay.items() if eta]
    return float(torch.stack(changes).sum()) if changes else 0.0


def _gradient_and_natural(
    grads: list[Tensor], V: list[Tensor], plan: Plan, blocks: Blocks
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
