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
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from kfac_triton import ops
from kfac_triton.capture import Inputs, ModuleState
from kfac_triton.config import DEFAULT_KL_CLIP, Settings
from kfac_triton.fisher.parts import Parts
from kfac_triton.steps.directions import combined, inner_products, stacked, turn_
from kfac_triton.steps.fixed import Scales
from kfac_triton.steps.minimum import minimise, promised, within
from kfac_triton.steps.motion import Motion
from kfac_triton.steps.objective import Objective, moved
from kfac_triton.steps.quadratic import Direction, FisherProducts
from kfac_triton.steps.runner import Groups, Runner

log = logging.getLogger("kfac_triton")

# The last step of a few examples is mostly noise, and a longer one along it more so. With batches of 16 and no bound,
# one of five seeds of a small ResNet and one of a transformer ended above AdamW; with this one none did.
MAX_MOMENTUM = 1.0
# No step promises more than LEAP times the usual promise, which at most doubles or halves from one step to the next:
# where the loss is a thousand times too large for some steps, these would be longer than training recovers from.
LEAP = 100.0


@dataclass(frozen=True, eq=False, slots=True)
class Proposal:
    """A step of `parameters` by `delta`, which proposals share; `coefficients` are alpha, mu and 1; `predicted` is
    M(delta), NaN where the step does without the model.

    `slope`: <grad, Delta>, 0 where no block has a gradient. `decay`: eta of every parameter in the objective, 0 for
    those without a block.
    """

    parameters: list[Tensor]
    delta: list[Tensor]
    coefficients: tuple[float, float, float]
    predicted: float
    slope: float
    decay: list[float]

    @property
    def modelled(self) -> bool:
        return math.isfinite(self.predicted)

    def judges_damping(self, resolution: float = 0.0) -> bool:
        """Whether its reduction ratio can say anything about the damping: there is a model, and the blocks have a part
        in what it promises, to first order, of more than `resolution`."""
        return self.modelled and abs(self.coefficients[0] * self.slope) > resolution

    @property
    def promise(self) -> float:
        """M(delta), inf where that is no number."""
        return self.predicted if self.modelled else math.inf


@dataclass(frozen=True, eq=False, slots=True)
class Occasion:
    """One call of step(): parameters with a gradient, the inputs seen, what multiplies the gradients, and the objective
    of a closure."""

    parameters: list[nn.Parameter]
    kept: list[Inputs]
    scales: Scales
    objective: Objective | None


class Proposer:
    """Holds no state but which way of computing J v works, and whether a missing model was reported."""

    def __init__(self, state: ModuleState, settings: Settings, parts: Parts) -> None:
        assert settings.likelihood is not None
        self.products = FisherProducts(
            state, settings.likelihood, settings.output, settings.mask, settings.quadratic_fraction, parts
        )
        self._loss_scale, self._seed, self._precision = settings.loss_scale, settings.seed, settings.precision
        self._reported = False

    def propose(
        self, groups: Groups, runner: Runner, now: Occasion, fallback: Direction, distrust: str = ""
    ) -> Proposal:
        """The step that the model of the kept inputs asks for, with the inverses as they are.

        Without a finite model, or with a reason to `distrust` it: a step along Delta that a trust region bounds, and
        one warning.
        """
        first, motion = groups[0], runner.plan(now.parameters)[0]
        longest = max([float(group["lr"]) for group in groups])
        size = float(now.scales.size)
        if motion is not None:
            asked = self._precision == "bf16"
            bf16 = asked or (self._precision == "auto" and bool(first.get("bf16")))
            motion.precondition_(bf16=bf16, narrowest=0 if asked else ops.ROUNDED, chain=runner.estimator.chain)
            turn_(motion, [float(group["lr"]) for group in groups], longest)
        moving = first["adaptive_momentum"] or first["momentum"] != 0
        fixed = [
            None if first["adaptive_lr"] else longest * size,
            (None if first["adaptive_momentum"] else float(first["momentum"])) if moving else 0.0,
            1.0,
        ]
        F, reason = self._fisher(motion, fallback, now, first["step"], runner)
        if distrust:
            F, reason = np.full_like(F, math.nan), distrust
        strength = [self._loss_scale * group["damping"] + group["weight_decay"] for group in groups]
        D, b = inner_products(motion, strength, fallback, now.scales)
        H, b = F + D, self._loss_scale * size * b
        w = _bounded_minimum(H, b, fixed)
        if first["adaptive_lr"] and longest != 1.0:
            w[0] *= longest
        decay = [] if motion is None else motion.decays(groups)
        parameters = [*([] if motion is None else motion.values()), *fallback]
        predicted = promised(w, H, b)
        usual = LEAP * first["promise"] or math.inf
        loss = 0.0 if now.objective is None else now.objective.first
        if not 0.0 <= -predicted <= min(loss, usual):  # the objective's height is at least its loss
            limits = [limit for limit in (self._height(now, parameters, decay), usual) if 0 < limit < math.inf]
            w = within(w, H, b, min(limits)) if limits else w
            predicted = promised(w, H, b)
        if not math.isfinite(predicted):
            self._report(reason)
            w = _without_model(b[0] / (self._loss_scale * size), longest * size, fixed[1] or 0.0, first["kl_clip"])
            predicted = math.nan
        delta = combined(motion, w) if motion is not None else []
        return Proposal(
            parameters, [*delta, *fallback.values()], (w[0] / size, w[1], 1.0), predicted, float(b[0] * size), decay
        )

    def _height(self, now: Occasion, parameters: list[Tensor], decay: list[float]) -> float:
        """The objective here, weight decay included; 0 without a closure."""
        if now.objective is None:
            return 0.0
        if not any(decay):
            return now.objective.first
        norms = torch._foreach_norm(parameters[: len(decay)], 2, dtype=torch.float64)
        squares = torch.stack(norms).square().tolist()
        return now.objective.first + float(np.dot(decay, squares)) / 2

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

    def _fisher(
        self, motion: Motion | None, fallback: Direction, now: Occasion, step: int, runner: Runner
    ) -> tuple[np.ndarray, str]:
        """scale v_i^T F v_j over the directions Delta, delta_0 and `fallback`; and why that is not finite, if so."""
        seed = self._seed if now.objective is None else now.objective.opening
        parameters, directions = stacked(motion, fallback)
        reason = "is not finite"
        try:
            found = self.products.stacked_gram(now.kept, parameters, directions, seed, step)
        except (RuntimeError, NotImplementedError) as error:
            # other ranks may have found theirs: NaN makes the mean over ranks NaN on all of them
            k = directions[0].shape[0]
            found = torch.full((k, k), math.nan, dtype=torch.float64, device=runner.device)
            reason = f"cannot be computed ({str(error).split(chr(10), 1)[0]})"
        runner.estimator.ranks.average_([found])
        F = np.zeros((3, 3))
        k = len(found)
        F[:k, :k] = found.cpu().numpy()
        return self._loss_scale * F, reason


def usual_promise(before: float, predicted: float, resolution: float = 0.0) -> float:
    """What steps usually promise, after one that promised `predicted`; 0 before the first.

    Less than `resolution`, the rounding error of the objective, is not noted: where training stands still, it does not
    take ages to begin again.
    """
    promise = abs(predicted)
    if promise <= resolution:
        return before
    return min(max(promise, before / 2), 2 * before) if before > 0 else promise


def _bounded_minimum(H: np.ndarray, b: np.ndarray, fixed: list[float | None]) -> np.ndarray:
    """The coefficients that minimise M with |mu| <= MAX_MOMENTUM; those in `fixed` are given."""
    w = minimise(H, b, fixed)
    if fixed[1] is None and abs(w[1]) > MAX_MOMENTUM:
        w = minimise(H, b, [fixed[0], math.copysign(MAX_MOMENTUM, w[1]), *fixed[2:]])
    return w


def _without_model(slope: float, alpha: float, mu: float, kl_clip: float) -> np.ndarray:
    """The coefficients alpha and mu, alpha cut so that alpha^2 <V, grad> / 2 <= most; `slope` is <grad, Delta>."""
    if not math.isfinite(slope):  # V itself has overflowed
        return np.array([0.0, mu, 1.0])
    bound = math.sqrt(2 * min(DEFAULT_KL_CLIP, kl_clip) / max(-slope, sys.float_info.min))
    return np.array([min(alpha, bound), mu, 1.0])


def fallback_direction(runner: Runner, now: Occasion) -> Direction:
    """How AdamW moves the parameters without a block, which stay where they are; its averages move on."""
    rest = runner.plan(now.parameters)[1]
    before = [p.clone() for p in rest]
    runner.fallback(rest, now.scales)
    found: Direction = {}
    for p, old in zip(rest, before, strict=True):
        found[p] = p - old
        p.copy_(old)
    return found


def reduction_of(proposal: Proposal, objective: Objective) -> float:
    """By how much the objective, weight decay included, changes along a proposal, which is not taken."""
    decay = decay_change(proposal.decay, proposal.parameters, proposal.delta)
    with moved(proposal.parameters, proposal.delta):
        return objective.loss(moved=True) + decay - objective.first


def decay_change(decay: Sequence[float], parameters: Sequence[Tensor], delta: Sequence[Tensor]) -> float:
    """By how much sum eta |w|^2 / 2 changes from here along delta, over the first parameters, those with an eta."""
    if not any(decay):
        return 0.0
    changes = [((p + d / 2) * d).sum(dtype=torch.float64) for p, d, _ in zip(parameters, delta, decay, strict=False)]
    return float(sum([eta * change for eta, change in zip(decay, torch.stack(changes).tolist(), strict=True)]))
