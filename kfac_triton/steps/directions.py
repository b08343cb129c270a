"""The directions that a step of the quadratic model may take: the preconditioned gradient Delta, the last step delta_0
of the covered parameters, and AdamW's movement of those without a block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kfac_triton.steps.fixed import Scales
from kfac_triton.steps.motion import Motion
from kfac_triton.steps.quadratic import Direction


def turn_(motion: Motion, lrs: Sequence[float], longest: float) -> None:
    """V becomes Delta, the descent direction; of groups with a smaller lr as much shorter.

    Not by lr itself: an adaptive alpha would undo a factor that all share.
    """
    if min(lrs) == longest:
        torch._foreach_neg_(motion.memory.V.flats)
        return
    for own in motion.lists:
        lr = lrs[own.group]
        torch._foreach_mul_(own.V, -1.0 if lr == longest else -lr / longest)


def stacked(motion: Motion | None, fallback: Direction) -> tuple[list[nn.Parameter], list[Tensor]]:
    """(parameters, their directions Delta, delta_0 and, where there is one, `fallback`, stacked)."""
    covered = [] if motion is None else motion.owners
    both = [] if motion is None else motion.directions()
    if not fallback:
        return covered, both
    longer = [torch.cat([t, torch.zeros_like(t[:1])]) for t in both]
    alone = [torch.stack([torch.zeros_like(d), torch.zeros_like(d), d]) for d in fallback.values()]
    return [*covered, *fallback], [*longer, *alone]


def inner_products(
    motion: Motion | None, strength: Sequence[float], fallback: Direction, scales: Scales
) -> tuple[np.ndarray, np.ndarray]:
    """(D, b): D_ij = sum over covered parameters of strength <v_i, v_j>, b_i = <grad, v_i>; (3, 3) and (3,)."""
    D, b = np.zeros((3, 3)), np.zeros(3)
    if motion is not None:
        memory = motion.memory
        assert memory.M is not None
        if motion.whole and min(strength) == max(strength):
            # V times J, V and M and then M times J and M, of which mm's sums would be less exact
            found = [torch.cat([torch.mv(rows, rows[1]), torch.mv(rows[::2], rows[2])]) for rows in memory.rows]
            b[0], VV, VM, b[1], MM = np.sum([product.tolist() for product in found], axis=0)
            D[:2, :2] = strength[0] * np.array([[VV, VM], [VM, MM]])
        else:
            b[:2] = np.sum([torch.mv(rows[1:], rows[0]).tolist() for rows in memory.rows], axis=0)
            joints = (motion.views(memory.V), motion.views(memory.M))
            etas = [strength[own.group] for own in motion.lists for _ in own.J]
            for i, j in ((0, 0), (0, 1), (1, 1)):
                D[i, j] = D[j, i] = _dot(joints[i], joints[j], etas)
    for p, d in fallback.items():
        assert p.grad is not None
        b[2] += float((p.grad * (scales.unscale * scales.share)).double().flatten() @ d.double().flatten())
    return D, b


def _dot(left: Sequence[Tensor], right: Sequence[Tensor], weights: Sequence[float]) -> float:
    """sum of weight <l, r>."""
    products = torch.stack([(a * b).sum().double() for a, b in zip(left, right, strict=True)]).tolist()
    return float(sum([weight * product for weight, product in zip(weights, products, strict=True)]))


def combined(motion: Motion, w: Any) -> list[Tensor]:
    """D <- w_0 Delta + w_1 delta_0, by parameter."""
    memory = motion.memory
    assert memory.M is not None
    for D, V, M in zip(memory.D.flats, memory.V.flats, memory.M.flats, strict=True):
        torch.mul(M, float(w[1]), out=D)
        if w[0] != 0:  # V may have overflowed
            D.add_(V, alpha=float(w[0]))
    motion.clear_fixed_biases_(memory.D)
    return motion.views(memory.D)
