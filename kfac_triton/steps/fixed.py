"""The step with a learning rate: gather, precondition, bound, momentum, weights.

    V = (F + damping)^-1 grad,    grad = (grad_W + weight_decay W) / loss_scale
    buf <- momentum buf + nu V,   W <- W - tau lr buf

with the bounds nu and tau of `bounds`, in which the largest lr so far stands for lr where kl_annealing is on. The
gradient of the whole network is divided by its size, a power of two, before the products and the sums, so that nothing
overflows: 1 but for huge gradients.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kfac_triton.numbers import Numbers, library, on_host, scalars, shared
from kfac_triton.steps import fused
from kfac_triton.steps.bounds import Shares, at_most, bounds, bounds_of_sums
from kfac_triton.steps.hyper import Hyper
from kfac_triton.steps.memory import Memory
from kfac_triton.steps.motion import Motion
from kfac_triton.structures.tridiagonal import Chain


class Scales(NamedTuple):
    """What multiplies the gradients, host numbers or 0-d on the device: `unscale` undoes a GradScaler's scale, `share`
    is 1 / (loss_scale size). `finite`: 0-d bool, whether the step is taken; None where the host knows that it is."""

    unscale: Any
    share: Any
    size: Any
    finite: Tensor | None


def joint_gradients_(motion: Motion, hyper: Hyper, scales: Scales) -> None:
    """J, which holds the gradients, becomes those of the objective, in units of loss_scale and size."""
    flats = motion.memory.J.flats
    if isinstance(scales.unscale, Tensor) or scales.unscale != 1.0:
        torch._foreach_mul_(flats, scales.unscale)
    if hyper.decaying:
        for own in motion.lists:
            eta = hyper.host["weight_decay"][own.group]
            if eta != 0:
                torch._foreach_add_(own.J, own.values(), alpha=eta)
    if scales.finite is not None or scales.share != 1.0:
        torch._foreach_mul_(flats, scales.share)
    if scales.finite is not None:
        skipped = ~scales.finite
        for flat in flats:
            flat.masked_fill_(skipped, 0.0)


def move_(motion: Motion, hyper: Hyper, scales: Scales, *, bf16: bool, chain: Chain | None) -> None:
    """One step of the parameters that take part, whose gradients J holds."""
    joint_gradients_(motion, hyper, scales)
    motion.precondition_(bf16=bf16, chain=chain)
    if hyper.moving:
        motion.with_momentum()
    nu, tau = _bounds(motion, hyper, scales)
    lr, momentum = hyper.lr, hyper.momentum
    if scales.finite is not None:
        lr, momentum = lr * scales.finite, torch.where(scales.finite, momentum, 1.0)
    memory = motion.memory
    if memory.fuses and fused.serves(motion):
        fused.move_(motion, lr, momentum if hyper.moving else None, nu, tau)
        if memory.M is not None:
            motion.clear_fixed_biases_(memory.M)
        return
    if not hyper.moving:
        for own in motion.lists:
            subtract_(own.values(), own.V, lr[own.group] * nu[own.region])
        return
    assert memory.M is not None
    if hyper.alike and motion.whole:
        follow_(memory.M.flats, momentum[0], memory.V.flats, nu[0])
    else:
        for own in motion.lists:
            follow_(own.M, momentum[own.group], own.V, nu[own.region])
    motion.clear_fixed_biases_(memory.M)
    for own in motion.lists:
        subtract_(own.values(), own.M, lr[own.group] * tau[own.region])


def _bounds(motion: Motion, hyper: Hyper, scales: Scales) -> tuple[Numbers, Numbers]:
    """(nu times size, tau) by group."""
    xp = library(motion.memory.device)
    if not hyper.bounded:
        ones = xp.ones_like(hyper.lr)
        return ones * at_most(scales.size), ones
    if hyper.alike:
        return _bounds_of_sums(motion, hyper, scales)
    lr, mu, region = motion.by_number(hyper)
    dots = motion.dots()
    if not hyper.moving:
        return bounds(xp, Shares(lr, mu, region, dots), hyper.kl_clip, scales.size)
    rows = slice(0, 2 if motion.split else 1)
    held = shared(motion.memory.quadratics)[rows]
    shares = Shares(lr, mu, region, dots, motion.overlaps(), held[:, motion.index].reshape(-1))
    nu, tau = bounds(xp, shares, hyper.kl_clip, scales.size)
    after = shares.quadratics.reshape(len(held), -1)
    if scales.finite is not None:
        after = torch.where(scales.finite, after, held[:, motion.index])
    held[:, motion.index] = after
    return nu, tau


def _bounds_of_sums(motion: Motion, hyper: Hyper, scales: Scales) -> tuple[Numbers, Numbers]:
    """The same where all parameters have the same lr, momentum and bound.

    Only the sum of the quadratics is followed then, of which each layer holds the same share.
    """
    memory, host = motion.memory, on_host(motion.memory.device)
    xp = scalars if host else library(memory.device)
    lr, mu, kl_clip = (hyper.first(name) for name in ("bounded_lr", "momentum", "kl_clip"))
    held = shared(memory.quadratics)
    dots, overlaps = _sums_of_products(memory, host=host, moving=hyper.moving)
    quadratic = None
    if hyper.moving:
        total = held if motion.whole else held[:, motion.index]
        quadratic = float(total.sum()) if host else total.sum(dtype=torch.float64)
    nu, tau, after = bounds_of_sums(xp, lr, mu, dots, overlaps, quadratic, kl_clip, scales.size)
    if hyper.moving:
        index = slice(None) if motion.whole else motion.index
        if scales.finite is not None:
            after = torch.where(scales.finite, after, quadratic)  # type: ignore[arg-type]
        held[0, index] = after / len(motion.layers)
        held[1, index] = 0
    count = len(hyper.lr)
    return [nu] * count, [tau] * count


def _sums_of_products(memory: Memory, *, host: bool, moving: bool) -> tuple[Any, Any]:
    """<V, J> and, with momentum, <M, J> over all layers."""
    if not moving:
        products = [torch.dot(V, J) for V, J in zip(memory.V.flats, memory.J.flats, strict=True)]
    else:
        products = memory.products()
    total = products[0] if len(products) == 1 else torch.stack([own.double() for own in products]).sum(0)
    if host:
        found = total.tolist()
        return tuple(found) if moving else (found, None)
    total = total.double()
    return (total[0], total[1]) if moving else (total, None)


def follow_(momentum: list[Tensor], mu: Any, V: list[Tensor], nu: Any) -> None:
    """buf <- mu buf + nu V."""
    if isinstance(nu, Tensor):
        torch._foreach_mul_(momentum, mu)
        torch._foreach_add_(momentum, torch._foreach_mul(V, nu))
    elif len(momentum) == 1:
        momentum[0].mul_(float(mu)).add_(V[0], alpha=float(nu))
    else:
        torch._foreach_mul_(momentum, float(mu))
        torch._foreach_add_(momentum, V, alpha=float(nu))


def subtract_(parameters: list[Tensor], moves: list[Tensor], factor: Any) -> None:
    """W <- W - factor move."""
    if isinstance(factor, Tensor):
        torch._foreach_sub_(parameters, torch._foreach_mul(moves, factor))
    else:
        torch._foreach_add_(parameters, moves, alpha=-float(factor))
