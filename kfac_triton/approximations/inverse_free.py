"""Kronecker factors without an inverse: IKFAC (Lin et al. 2023, "Structured inverse-free natural gradient").

In the place of each factor stands a root of its damped inverse, K K^T ~ (A + pi gamma I)^-1 and C C^T ~ (G + gamma / pi
I)^-1, which follows the statistics by a multiplicative step, the natural gradient's on the roots cut off after its
first order:

    M = K^T (A_new + pi gamma I) K - I,    K <- K (I - b M / 2),    b = 1 - beta of the running average

From the root of an exact inverse this is the root of the inverse of beta A + (1 - beta) A_new, up to O(b^2). Nothing is
inverted or decomposed, so bfloat16 will do: under bfloat16 parameters the roots and all their products are that, at
half the memory of factors, and no factor is held. b is cut where a step would be longer than what the cut allows.

In the state of a weight: `A_root`, `G_root`, `A_inv` and `G_inv`, the roots' squares in float32, `A_mean` and `G_mean`
(0-d), running averages of the factors' mean diagonals, for pi. A diagonal side has a diagonal root, and a side that is
too wide is diagonal.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kfac_triton import factors
from kfac_triton.approximations import kronecker
from kfac_triton.approximations.kronecker import FactorUpdate
from kfac_triton.blocks.layout import Layout
from kfac_triton.distributed import Ranks

FIRST_STEPS = 12  # on the first data, where the root of a scaled identity is far from its place


def update(updates: Sequence[tuple[FactorUpdate, Tensor, float]], ranks: Ranks | None = None) -> None:
    """Moves the roots of many weights towards their statistics; each with its weight and damping; the
    statistics are averaged over `ranks`."""
    for (state, own, decay, ok), weight, damping in updates:
        k = state["factor_updates"]
        k += ok
        measured = kronecker.sums_of(own, weight)
        if ranks is not None:
            ranks.average_([*measured])
        sides = list(zip("AG", measured, kronecker.shapes(own.layout, weight.shape), strict=True))
        beta, b = factors.average_weights(k.to(measured[0].dtype), decay, ok)
        for name, F, shape in sides:
            known = state.get(f"{name}_mean", torch.zeros_like(b))
            mean = factors.mean_diagonal(F, shape).mean()
            state[f"{name}_mean"] = torch.where(ok, beta * known + b * mean, known)
        strengths = _strengths(state, damping)
        for (name, F, shape), d in zip(sides, strengths, strict=True):
            first = f"{name}_root" not in state
            if first:
                state[f"{name}_root"] = _scaled_identity(F, d + state[f"{name}_mean"], weight.dtype)
            for _ in range(FIRST_STEPS if first else 1):
                moved = _moved(state[f"{name}_root"], F, d, b, diagonal=shape.diagonal)
                state[f"{name}_root"] = torch.where(ok, moved, state[f"{name}_root"])
            root = state[f"{name}_root"].to(F.dtype)
            state[f"{name}_inv"] = root.square() if shape.diagonal else root @ root.mT


def _strengths(state: dict[str, Any], damping: float) -> tuple[Tensor, Tensor]:
    """(pi gamma, gamma / pi)."""
    a, g = state["A_mean"], state["G_mean"]
    smallest = torch.finfo(a.dtype).tiny
    pi = torch.where((a > smallest) & (g > smallest), (a / g.clamp(min=smallest)).sqrt(), 1.0)
    gamma = torch.as_tensor(damping, dtype=a.dtype, device=a.device).sqrt()
    return pi * gamma, gamma / pi


def _scaled_identity(F: Tensor, mean: Tensor, dtype: torch.dtype) -> Tensor:
    """The root of the inverse of mean * I, in the form of F and the precision of the weight."""
    scale = mean.clamp(min=torch.finfo(F.dtype).tiny).rsqrt()
    eye = torch.ones_like(F) if F.dim() == 1 else torch.eye(F.shape[-1], dtype=F.dtype, device=F.device).expand_as(F)
    return (eye * scale).to(dtype)


def _moved(root: Tensor, F: Tensor, d: Tensor, b: Tensor, *, diagonal: bool) -> Tensor:
    """K (I - b M / 2), M = K^T (F + d I) K - I; b no larger than the reciprocal of a bound on M's eigenvalues."""
    tiny = torch.finfo(F.dtype).tiny
    if diagonal:
        wide = root.to(F.dtype)
        M = wide.square() * (F + d) - 1
        step = torch.minimum(b, 1 / M.abs().max().clamp(min=tiny))
        found: Tensor = (wide * (1 - step / 2 * M)).to(root.dtype)
        return found
    d = d.to(root.dtype)
    M = root.mT @ (F.to(root.dtype) @ root) + d * (root.mT @ root)
    M.diagonal(dim1=-2, dim2=-1).sub_(1)
    bound = M.abs().sum(dim=-1).amax().to(b.dtype).clamp(min=tiny)
    moved: Tensor = root - torch.minimum(b, 1 / bound).to(root.dtype) / 2 * (root @ M)
    return moved


def implied(state: dict[str, Any], name: str, damping: float) -> Tensor:
    """The factor that a root stands for, (K K^T)^-1 less its damping."""
    d = dict(zip("AG", _strengths(state, damping), strict=True))[name].double()
    inverse = state[f"{name}_inv"].double()
    if inverse.dim() == 1:
        found = 1 / inverse - d
    else:
        found = torch.linalg.inv(inverse)
        found.diagonal(dim1=-2, dim2=-1).sub_(d)
    factor: Tensor = found.to(state[f"{name}_inv"].dtype)
    return factor


def memory(weight: Tensor, layout: Layout) -> tuple[int, int]:
    """Bytes of (roots, their squares)."""
    elements = sum(torch.Size(shape).numel() for shape in layout.factor_shapes(weight.shape))
    return weight.element_size() * elements, kronecker.factor_dtype(weight).itemsize * elements
