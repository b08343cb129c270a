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

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

LARGEST = 2.0**16  # entry of a gradient divided by its size
MOST = 2.0**48  # size that counts without a bound: beyond, a gradient is as long as one of that size
LONGEST = 1e37  # quadratic, which a group without a bound beside one with could bring out of float32's range
LEAST_LR = 1e-12  # in the bounds: lr = 0 would bound nothing, and the momentum waits for an lr that is not 0


class Share(NamedTuple):
    """Numbers (n,) of the parameters that share lr, momentum and the `region` whose kl_clip bounds them, float64.

    `dots`: <V, grad>; with momentum also `overlaps`: <buf, grad>, and `quadratics`: q before this step.
    """

    lr: Tensor
    momentum: Tensor
    region: int
    dots: Tensor
    overlaps: Tensor
    quadratics: Tensor


def size_of(largest: Tensor, finite: Tensor) -> Tensor:
    """The power of two that divides a gradient with this largest entry, or norm; 1 where nothing is that large."""
    needed = torch.exp2(torch.ceil(torch.log2(largest.double() / LARGEST)))
    return torch.where(finite, needed.clamp(min=1.0), torch.ones_like(needed))


def bounds_of_gradient(shares: Sequence[Share], kl_clip: Sequence[Tensor], size: Tensor) -> list[Tensor]:
    """nu times size, by region: what multiplies the V of a gradient that was divided by its size."""
    total = _sum([share.lr**2 * share.dots.sum() for share in shares], size)
    return [torch.minimum(_bound(clip, total), size.clamp(max=MOST)) for clip in kl_clip]


def bounds_of_step(
    shares: Sequence[Share], nu: Sequence[Tensor], kl_clip: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """(tau by region, the quadratics of every share after this step)."""
    weights = [(share.lr * share.momentum, share.lr * nu[share.region]) for share in shares]
    pairs = list(zip(shares, weights, strict=True))
    old = _sum([m**2 * share.quadratics.sum() for share, (m, _) in pairs], nu[0])
    cross = _sum([m * n * share.overlaps.sum() for share, (m, n) in pairs], nu[0])
    new = _sum([n**2 * share.dots.sum() for share, (_, n) in pairs], nu[0])
    least = torch.where(new > 0, cross**2 / new, 0.0)
    in_old = _sum([m**2 * share.dots.sum() for share, (m, _) in pairs], nu[0])
    raised = torch.where(in_old > 0, (least - old).clamp(min=0.0) / in_old, 0.0)  # in proportion to <V, grad>
    quadratics = []
    for share in shares:
        mu, n = share.momentum, nu[share.region]
        before = share.quadratics + raised * share.dots
        after = mu**2 * before + 2 * mu * n * share.overlaps + n**2 * share.dots
        quadratics.append(after.clamp(max=LONGEST))
    total = torch.maximum(old, least) + 2 * cross + new
    return [_bound(clip, total).clamp(max=1.0) for clip in kl_clip], quadratics


def _sum(terms: Sequence[Tensor], like: Tensor) -> Tensor:
    return torch.stack(list(terms)).sum() if terms else like.new_zeros(())


def _bound(kl_clip: Tensor, total: Tensor) -> Tensor:
    return torch.sqrt(2 * kl_clip / total.clamp(min=torch.finfo(total.dtype).tiny))
