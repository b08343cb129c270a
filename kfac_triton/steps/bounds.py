"""How long a step may be: its KL divergence, in nats of the mean nll, is at most kl_clip, momentum included.

With F the damped Fisher, V = F^-1 grad and buf the momentum, <V, grad> = V^T F V, and the divergence of a step s is
s^T F s / 2 (Wu et al. 2017, section 3). Two bounds, where each sum runs over all parameters with a block:

    nu  = min(1, sqrt(2 kl_clip / sum lr^2 <V, grad>))    on V, before it enters buf <- mu buf + nu V
    tau = min(1, sqrt(2 kl_clip / sum lr^2 q))            on the step that is taken, W <- W - tau lr buf

q = buf^T F buf needs no product with F and no second buffer. Since F V = grad,

    q_k = mu^2 q_{k-1} + 2 mu nu <buf_{k-1}, grad_k> + nu^2 <V_k, grad_k>

which is exact while F stays. Where F has changed, q_{k-1} is raised to <buf_{k-1}, grad_k>^2 / <V_k, grad_k> if it is
less: by Cauchy-Schwarz buf^T F buf with the present F is no smaller. So q is never negative either.

A network's gradient comes divided by its `size`, so that <V, grad> stays in float32's range; nu takes it back.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kfac_triton.numbers import Numbers

LARGEST = 2.0**16  # entry of a gradient divided by its size
MOST = 2.0**48  # size that counts without a bound: beyond, a gradient is as long as one of that size
LONGEST = 1e37  # quadratic, which a group without a bound beside one with could bring out of float32's range
LEAST_LR = 1e-12  # in the bounds: lr = 0 would bound nothing, and the momentum waits for an lr that is not 0
TINY = 2.0**-1022


@dataclass(frozen=True, eq=False, slots=True)
class Shares:
    """What the parameters contribute, (n,) float64, those with a bound in common together.

    `region`: which of the groups' bounds holds. `dots`: <V, grad>; with momentum also `overlaps`: <buf, grad>, and
    `quadratics`: q before this step, over which q after it is written.
    """

    lr: Numbers
    momentum: Numbers
    region: Any
    dots: Numbers
    overlaps: Numbers = None
    quadratics: Numbers = None


def size_of(largest: float | Tensor) -> Any:
    """The power of two that divides a gradient with this largest entry, or norm; 1 where nothing is that large."""
    if isinstance(largest, Tensor):
        return torch.exp2(torch.ceil(torch.log2(largest.double() / LARGEST))).clamp(min=1.0)
    return 1.0 if largest <= LARGEST else 2.0 ** math.ceil(math.log2(largest / LARGEST))


def bounds(xp: Any, shares: Shares, kl_clip: Numbers, size: Any) -> tuple[Numbers, Numbers]:
    """(nu times size, tau) by group, (groups,): what multiplies the V of a gradient divided by its size, and the step.

    `xp`: the library of the numbers.
    """
    lr, mu, dots = shares.lr.clip(LEAST_LR, None), shares.momentum, shares.dots
    nu = _nu(xp, (lr * lr * dots).sum(), kl_clip, size)
    if shares.overlaps is None:
        return nu, xp.ones_like(nu)
    own = nu[shares.region]
    m, n = lr * mu, lr * own
    old, in_old = (m * m * shares.quadratics).sum(), (m * m * dots).sum()
    tau, raised = _tau(xp, old, in_old, (m * n * shares.overlaps).sum(), (n * n * dots).sum(), kl_clip)
    shares.quadratics[...] = _after(xp, shares.quadratics, dots, shares.overlaps, mu, own, raised)
    return nu, tau


def bounds_of_sums(
    xp: Any, lr: Any, mu: Any, dots: Any, overlaps: Any, quadratic: Any, kl_clip: Any, size: Any
) -> tuple[Any, Any, Any]:
    """(nu times size, tau, q after this step) where all parameters have the same lr, momentum and bound: from the sums
    of <V, grad>, <buf, grad> and q over them; without momentum the last two are None."""
    lr = max(lr, LEAST_LR) if isinstance(lr, float) else xp.clip(lr, LEAST_LR, None)
    nu = _nu(xp, lr * lr * dots, kl_clip, size)
    if overlaps is None:
        return nu, 1.0, None
    m, n = lr * mu, lr * nu
    tau, raised = _tau(xp, m * m * quadratic, m * m * dots, m * n * overlaps, n * n * dots, kl_clip)
    return nu, tau, _after(xp, quadratic, dots, overlaps, mu, nu, raised)


def _nu(xp: Any, total: Any, kl_clip: Any, size: Any) -> Any:
    return xp.minimum(xp.sqrt(2 * kl_clip / xp.clip(total, TINY, None)), at_most(size))


def _tau(xp: Any, old: Any, in_old: Any, cross: Any, new: Any, kl_clip: Any) -> tuple[Any, Any]:
    """tau, and by how much of its <V, grad> each q is raised to the least that it can be."""
    least = xp.where(new > 0, cross * cross / xp.clip(new, TINY, None), 0.0)
    raised = xp.where(in_old > 0, xp.clip(least - old, 0.0, None) / xp.clip(in_old, TINY, None), 0.0)
    length = xp.maximum(old, least) + 2 * cross + new
    return xp.clip(xp.sqrt(2 * kl_clip / xp.clip(length, TINY, None)), None, 1.0), raised


def _after(xp: Any, quadratics: Any, dots: Any, overlaps: Any, mu: Any, nu: Any, raised: Any) -> Any:
    before = quadratics + raised * dots
    return xp.clip(mu * mu * before + 2 * mu * nu * overlaps + nu * nu * dots, None, LONGEST)


def at_most(size: Any) -> Any:
    return size.clamp(max=MOST) if isinstance(size, Tensor) else min(size, MOST)
