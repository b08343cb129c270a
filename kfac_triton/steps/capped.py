"""The step with two bounds: in KL divergence, and for each layer in the length of AdamW's step.

    m <- beta m + (1 - beta) g,   v <- 0.999 v + 0.001 g^2,   m' and v' without their bias towards 0
    V = (F + damping)^-1 m',      u = m' / (sqrt(v') + eps)
    W <- W - lr min(nu / peak, |u| / |V|) V,   nu = min(1, sqrt(2 kl_clip / sum <V, m'>))

Norms are of a layer, weight and bias together; peak is the largest lr so far, so that a schedule of lr shortens both
bounds alike. g is the gradient of the objective as in `fixed`, but at most LIMIT times as long as the layer's gradient
usually is: one huge gradient would stay in m and v.

Why two bounds. Where the Fisher is tiny or of low rank, the KL divergence does not see how far a step goes in the
space of parameters; |u| does, in the unit that users of AdamW know. Bias correction and eps are those of Adam's second
form (Kingma & Ba 2015, section 2).

What is usual is a running mean of the norms, in which a longer gradient counts for LIMIT times the mean before it, and
for twice as much after each step in a row that was bounded: single outliers hardly move the mean, and a lasting change
is let in within some ten steps.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from kfac_triton.numbers import Numbers, library, on_host, shared
from kfac_triton.steps import fused
from kfac_triton.steps.fixed import Scales, joint_gradients_, subtract_
from kfac_triton.steps.hyper import Hyper
from kfac_triton.steps.motion import Motion
from kfac_triton.structures.tridiagonal import Chain

BETA2, EPS = 0.999, 1e-8
MEMORY = 0.95  # of the usual norm of a gradient
LIMIT = 2.0  # times the usual norm, what counts of a gradient
LONGEST_ROW = 64.0  # steps that were bounded, one after the other, which are told apart
FIRST = 2.0**48  # norm of a gradient that nothing is known to be usual for
LEAST_LR = 1e-12
TINY = 1e-200


def move_(motion: Motion, hyper: Hyper, scales: Scales, *, bf16: bool, chain: Chain | None) -> None:
    """One step of the parameters that take part, whose gradients J holds."""
    joint_gradients_(motion, hyper, scales)
    memory = motion.memory
    motion.with_momentum()
    beta, peak, region = motion.by_layer(hyper)
    steps = _limited(motion, scales)
    _follow_(motion, hyper, scales)
    motion.precondition_(memory.momentum(), bf16=bf16, chain=chain)
    motion.clear_fixed_biases_(memory.V)
    _updates_of_adam_(motion)
    xp = library(memory.device)
    unbiased = 1 / (1 - beta**steps)
    u = unbiased * xp.sqrt(1 - BETA2**steps) * motion.norms(memory.J)
    V = unbiased * motion.norms(memory.V)
    divergence = _divergence(motion, unbiased)
    nu = xp.minimum(xp.sqrt(2 * hyper.kl_clip / xp.clip(divergence, TINY, None)), xp.ones_like(hyper.kl_clip))
    share = xp.minimum(nu[region] / peak.clip(LEAST_LR, None), u / V.clip(TINY, None))
    motion.scale_(memory.V, unbiased * share)
    lr = hyper.lr if scales.finite is None else torch.where(scales.finite, hyper.lr, 0.0)
    if memory.fuses and fused.serves(motion):
        ones = xp.ones_like(lr)
        fused.move_(motion, lr, None, ones, ones)
        return
    for own in motion.lists:
        subtract_(own.values(), own.V, lr[own.group])


def _limited(motion: Motion, scales: Scales) -> Numbers:
    """Bounds the gradient of every layer; returns how many steps each has taken, this one included."""
    memory = motion.memory
    xp, index = library(memory.device), slice(None) if motion.whole else motion.index
    norm = scales.size * motion.norms(memory.J)
    held = [shared(t) for t in (memory.usual, memory.steps, memory.bounded)]
    one = xp.ones_like(norm)
    before, steps, bounded = (one * numbers[index] for numbers in held)
    taken = steps + 1
    most = xp.where(before > 0, LIMIT * before, FIRST)
    allowed = scales.size * xp.minimum(one, most / xp.clip(norm, TINY, None))
    if not on_host(memory.device) or bool(np.any(allowed != 1.0)):
        motion.scale_(memory.J, allowed)
    weight = xp.clip(1 / taken, 1 - MEMORY, None)
    counted = xp.minimum(norm, most * 2.0 ** bounded.clip(None, LONGEST_ROW))
    usual = xp.where(before > 0, before + weight * (counted - before), counted)
    usual = xp.where(norm > 0, usual, before)
    row = xp.where(norm > most, bounded + 1, 0.0)
    for numbers, old, new in zip(held, (before, steps, bounded), (usual, taken, row), strict=True):
        if scales.finite is not None:
            numbers[index] = torch.where(scales.finite, new, old).to(numbers.dtype)
        else:
            numbers[index] = new
    return taken


def _divergence(motion: Motion, unbiased: Numbers) -> Any:
    """<V, m'> over all layers that take part, from V and m as they are."""
    V, m = motion.memory.V, motion.memory.momentum()
    if motion.whole and on_host(motion.memory.device) and unbiased.min() == unbiased.max():
        return float(unbiased[0]) ** 2 * sum([float(torch.dot(*flats)) for flats in zip(V.flats, m.flats, strict=True)])
    return (unbiased * unbiased * motion.products(V, m)).sum()


def _follow_(motion: Motion, hyper: Hyper, scales: Scales) -> None:
    """m and v <- their averages with J and J^2."""
    memory = motion.memory
    for M, S, J, region in _pieces(motion, hyper):
        new: Any = 1 - hyper.momentum[region]
        square: Any = 1 - BETA2
        if scales.finite is None and on_host(memory.device):
            torch._foreach_lerp_(M, J, float(new))
            torch._foreach_mul_(S, BETA2)
            torch._foreach_addcmul_(S, J, J, square)
            continue
        if scales.finite is not None:
            new, square = (weight * scales.finite.double() for weight in (new, square))
        for average, weight, value in ((M, new, J), (S, square, torch._foreach_mul(J, J))):
            change = torch._foreach_sub(value, average)
            torch._foreach_mul_(change, weight)
            torch._foreach_add_(average, change)
    motion.clear_fixed_biases_(memory.momentum())


def _updates_of_adam_(motion: Motion) -> None:
    """J <- m / (sqrt(v) + eps), which the bias correction is still to multiply."""
    for M, S, J, _ in _pieces(motion, None):
        torch._foreach_copy_(J, S)
        torch._foreach_sqrt_(J)
        torch._foreach_add_(J, EPS)
        torch._foreach_reciprocal_(J)
        torch._foreach_mul_(J, M)


def _pieces(motion: Motion, hyper: Hyper | None) -> list[tuple[list[Tensor], list[Tensor], list[Tensor], int]]:
    """(m, v, J, the group whose momentum holds): flat where all layers take part, and alike."""
    memory = motion.memory
    if motion.whole and (hyper is None or hyper.alike):
        return [(memory.momentum().flats, memory.squares().flats, memory.J.flats, 0)]
    return [(own.M, own.S, own.J, own.region) for own in motion.lists]
