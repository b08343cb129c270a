"""The step that the quadratic model asks for with the inverses as they are (Martens & Grosse 2015, sections 6.4, 7).

    delta = alpha Delta + mu delta_0 + delta_fallback,   Delta = -V,   delta_0 the last step of the covered parameters

alpha and mu minimise M(delta) where they are adaptive and are the groups' numbers where they are not; beyond the paper
|mu| is at most MAX_MOMENTUM. Parameters without a block move by AdamW; the model counts their movement in, at the
coefficient 1.

Where M is not finite or cannot be computed, alpha is at most sqrt(2 kl / <V, grad>). With the factors' Fisher for the
exact F, V^T F V <= <V, grad>, so that this bounds the KL divergence of the step (Wu et al. 2017, section 3).
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from kfac_triton import assembly, update
from kfac_triton.arguments import DEFAULT_KL_CLIP, Settings
from kfac_triton.capture import Inputs, ModuleState
from kfac_triton.curvature import Curvature
from kfac_triton.distributed import Ranks
from kfac_triton.objective import Objective, moved
from kfac_triton.parts import Parts
from kfac_triton.quadratic import Direction, FisherProducts, minimise, within
from kfac_triton.step_plan import Blocks, Fallback, Gradients, Hyper, Plan

log = logging.getLogger("kfac_triton")

# The last step of a few examples is mostly noise, and a longer one along it more so. With batches of 16 and no bound,
# one of five seeds of a small ResNet and one of a transformer ended above AdamW; with this one none did.
MAX_MOMENTUM = 1.0
LEAP = 100.0  # times the last step's promise is the most that one without a loss to go by may promise

Arguments = tuple[Plan, Hyper, Blocks, Fallback]


@dataclass(frozen=True)
class Proposal:
    """A step: delta = sum of coefficients (alpha, mu, 1) times directions; `predicted` is M(delta), 0-d float64, NaN
    where the step does without the model.

    `slope`: <grad, Delta>, 0 where no block has a gradient. `decay` holds eta for the parameters whose weight decay is
    in the objective, those with a block.
    """

    delta: Direction
    coefficients: Tensor
    predicted: Tensor
    slope: Tensor
    decay: dict[nn.Parameter, float]

    @property
    def modelled(self) -> bool:
        return math.isfinite(float(self.predicted))

    def judges_damping(self, resolution: float = 0.0) -> bool:
        """Whether its reduction ratio can say anything about the damping: there is a model, and the blocks have a part
        in what it promises, to first order, of more than `resolution`."""
        return self.modelled and abs(float(self.coefficients[0] * self.slope)) > resolution

    @property
    def promise(self) -> float:
        """M(delta), inf where that is no number."""
        return float(self.predicted) if self.modelled else math.inf


@dataclass(frozen=True)
class Occasion:
    """One call of step(): parameters with a gradient, the inputs seen, what is known of the gradients, and with a
    closure the objective."""

    parameters: list[nn.Parameter]
    kept: list[Inputs]
    gradients: Gradients
    objective: Objective | None


class Proposer:
    """Holds no state but which way of computing J v works, and whether a missing model was reported."""

    def __init__(self, state: ModuleState, settings: Settings, parts: Parts) -> None:
        assert settings.likelihood is not None
        self.products = FisherProducts(
            state, settings.likelihood, settings.output, settings.mask, settings.quadratic_fraction, parts
        )
        self._loss_scale = settings.loss_scale
        self._seed = settings.seed
        self._reported = False

    def propose(
        self,
        optimizer: torch.optim.Optimizer,
        curvature: Curvature,
        now: Occasion,
        fallback: Direction,
        distrust: str = "",
    ) -> Proposal:
        """The step that the model of the kept inputs asks for, with the inverses as they are.

        Without a finite model, or with a reason to `distrust` it: a step along Delta that a trust region bounds, and
        one warning.
        """
        group_of = {p: group for group in optimizer.param_groups for p in group["params"]}
        first = optimizer.param_groups[0]
        longest = max(float(group["lr"]) for group in optimizer.param_groups)
        size, gradient, directions = _gradient_and_directions(optimizer, curvature, now, fallback)
        natural, units = directions[0], self._loss_scale * size
        fixed = [
            None if first["adaptive_lr"] else longest * size,
            None if first["adaptive_momentum"] else float(first["momentum"]),
            1.0,
        ]
        strength = {p: self._loss_scale * group_of[p]["damping"] + group_of[p]["weight_decay"] for p in natural}
        decay = {p: group_of[p]["weight_decay"] for p in natural if group_of[p]["weight_decay"]}
        F, reason = self._fisher(directions, now, first["step"], curvature.ranks)
        if distrust:
            F, reason = torch.full_like(F, math.nan), distrust
        H = F + _gram(directions, strength)
        b = units * torch.stack([_inner(gradient, v, F) for v in directions])
        w = _bounded_minimum(H, b, fixed)
        if first["adaptive_lr"] and longest != 1.0:
            w[0] *= longest
        height = self._height(now, decay)
        most = height if height > 0 else LEAP * first["promise"]
        w = within(w, H, b, most) if most > 0 else w
        predicted = w @ H @ w / 2 + b @ w
        if not bool(torch.isfinite(predicted)):
            self._report(reason)
            wanted = (longest * size, fixed[1] or 0.0)
            return _without_model(directions, gradient, size, wanted, min(DEFAULT_KL_CLIP, first["kl_clip"]), decay)
        coefficients = torch.stack([w[0] / size, *w[1:]])
        return Proposal(_combined(directions, w), coefficients, predicted, b[0] * size, decay)

    def _height(self, now: Occasion, decay: dict[nn.Parameter, float]) -> float:
        """The objective here, weight decay included; 0 without a closure."""
        if now.objective is None:
            return 0.0
        return now.objective.first + float(sum(eta * _dot(p, p) for p, eta in decay.items())) / 2

    def _report(self, reason: str) -> None:
        """Warns, once, that steps are taken without the model."""
        if not self._reported:
            self._reported = True
            log.warning(
                "the quadratic model of the loss %s; such steps are along the preconditioned gradient alone, with a KL "
                "divergence of at most %g, and leave the damping as it is",
                reason,
                DEFAULT_KL_CLIP,
            )

    def _fisher(self, directions: list[Direction], now: Occasion, step: int, ranks: Ranks) -> tuple[Tensor, str]:
        """scale v_i^T F v_j, with zeros for directions that are empty; and why that is not finite, if it is not."""
        present = [i for i, v in enumerate(directions) if v]
        seed = self._seed if now.objective is None else now.objective.opening
        reason = "is not finite"
        try:
            found = self.products.gram(now.kept, [directions[i] for i in present], seed, step)
        except (RuntimeError, NotImplementedError) as error:
            # other ranks may have found theirs: NaN makes the mean over ranks NaN on all of them
            shape, device = (len(present), len(present)), now.gradients.finite.device
            found = torch.full(shape, math.nan, dtype=torch.float64, device=device)
            reason = f"cannot be computed ({str(error).split(chr(10), 1)[0]})"
        ranks.average_([found])
        F = found.new_zeros(len(directions), len(directions))
        index = torch.tensor(present, device=F.device)
        F[index.unsqueeze(1), index] = found
        return self._loss_scale * F, reason


def _bounded_minimum(H: Tensor, b: Tensor, fixed: list[float | None]) -> Tensor:
    """The coefficients that minimise M with |mu| <= MAX_MOMENTUM; those in `fixed` are given."""
    w, _ = minimise(H, b, fixed)
    if fixed[1] is None and abs(float(w[1])) > MAX_MOMENTUM:
        w, _ = minimise(H, b, [fixed[0], math.copysign(MAX_MOMENTUM, float(w[1])), *fixed[2:]])
    return w


def _without_model(
    directions: list[Direction],
    gradient: Direction,
    size: float,
    wanted: tuple[float, float],
    most: float,
    decay: dict[nn.Parameter, float],
) -> Proposal:
    """The step with the coefficients `wanted`, alpha cut so that alpha^2 <V, grad> / 2 <= most.

    `size`: as in `_gradient_and_directions`, in whose units gradient, V and alpha are.
    """
    natural, *others = directions
    products = [torch.dot(gradient[p].double().flatten(), v.double().flatten()) for p, v in natural.items()]
    slope = torch.stack(products).sum() if products else torch.zeros((), dtype=torch.float64)
    alpha, mu = wanted
    if bool(torch.isfinite(slope)):
        alpha = min(alpha, math.sqrt(2 * most / max(-float(slope), torch.finfo(torch.float64).tiny)))
    else:  # V itself has overflowed
        natural, alpha = {}, 0.0
    w = torch.tensor([alpha, mu, 1.0], dtype=torch.float64, device=slope.device)
    told = torch.stack([w[0] / size, *w[1:]])
    return Proposal(_combined([natural, *others], w), told, torch.full_like(slope, math.nan), slope, decay)


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
        return objective.loss(moved=True) + decay - objective.first


def decay_change(decay: dict[nn.Parameter, float], delta: Direction) -> float:
    """By how much eta |w|^2 / 2 changes from here along delta, over the parameters w of `decay`."""
    changes = [eta * (_dot(p, delta[p]) + _dot(delta[p], delta[p]) / 2) for p, eta in decay.items() if eta]
    return float(torch.stack(changes).sum()) if changes else 0.0


def _gradient_and_directions(
    optimizer: torch.optim.Optimizer, curvature: Curvature, now: Occasion, fallback: Direction
) -> tuple[float, Direction, list[Direction]]:
    """(size, the gradient of the objective, the directions Delta, delta_0 and `fallback`).

    The gradient is in units of size times loss_scale, and Delta in units of size, so that neither overflows.
    """
    plan, hyper, blocks, tensors = step_arguments(optimizer, curvature, now)
    group_of = {p: group for group in optimizer.param_groups for p in group["params"]}
    first = optimizer.param_groups[0]
    longest = max(float(group["lr"]) for group in optimizer.param_groups)
    gradient, natural = _gradient_and_natural(*update.precondition(plan, hyper, blocks), plan, blocks)
    for p, grad in zip(tensors.parameters, tensors.grads, strict=True):
        gradient[cast(nn.Parameter, p)] = grad * hyper.unscale.to(grad) / (hyper.loss_scale * hyper.size).to(grad)
    for own, v in natural.items():  # an adaptive alpha would undo a factor that all share
        lr = float(group_of[own]["lr"])
        if lr != longest:
            v *= lr / longest
    last: Direction = {}
    if first["adaptive_momentum"] or first["momentum"] != 0:
        last = {p: optimizer.state[p]["momentum_buffer"] for p in natural}
    return float(hyper.size), gradient, [natural, last, fallback]


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
