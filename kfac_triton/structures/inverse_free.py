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

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kfac_triton.distributed import Ranks
from kfac_triton.joint import Joint, Stack
from kfac_triton.linalg import factors
from kfac_triton.numbers import on_host
from kfac_triton.sample import Sample
from kfac_triton.structures.base import Moves, Room, Structure
from kfac_triton.structures.factor import factor
from kfac_triton.structures.kronecker import Multiplier
from kfac_triton.structures.sums import sums_of

FIRST_STEPS = 12  # on the first data, where the root of a scaled identity is far from its place


class InverseFree(Structure):
    """Roots of the damped inverses and their squares; no factors."""

    name = "inverse_free"

    def __init__(self, stack: Stack, ranks: Ranks) -> None:
        super().__init__(stack, ranks)
        self.A, self.G = factor(stack, "A", averaged=False), factor(stack, "G", averaged=False)
        self._multiply = Multiplier(stack, self.A, self.G)
        dtype, k = stack.layers[0].weight.dtype, len(stack.layers)
        self.roots = [torch.zeros_like(F.inverse, dtype=dtype) for F in (self.A, self.G)]
        self.means = torch.zeros(2, k, dtype=stack.dtype, device=stack.device)

    def update_(
        self, samples: Sequence[Sample | None], rows: tuple[Room, Room] | None, moves: Moves, damping: Sequence[float]
    ) -> None:
        for i, own in enumerate(samples):
            if own is not None:
                measured = sums_of(own)
                self.ranks.average_([*measured])
                self._move_(i, measured, moves, damping[i])

    def _move_(self, i: int, measured: tuple[Tensor, Tensor], moves: Moves, damping: float) -> None:
        beta, b, ok = moves.beta[i], moves.share[i], moves.ok[i]
        if not self.ready[i] and on_host(self.stack.device) and not bool(ok):
            return  # else the first steps would be taken for no data, and a single one for the first
        sides = (self.A, self.G)
        for known, F, side in zip(self.means, measured, sides, strict=True):
            mean = factors.mean_diagonal(F, side.shape).mean()
            known[i] = torch.where(ok, beta * known[i] + b * mean, known[i])
        strengths = self._strengths(i, damping)
        for root, mean, F, side, d in zip(self.roots, self.means, measured, sides, strengths, strict=True):
            if not self.ready[i]:
                root[i].copy_(_scaled_identity(F, d + mean[i], diagonal=side.shape.diagonal))
            for _ in range(1 if self.ready[i] else FIRST_STEPS):
                moved = _moved(root[i], F, d, b, diagonal=side.shape.diagonal)
                root[i].copy_(torch.where(ok, moved, root[i]))
            wide = root[i].to(F.dtype)
            side.inverse[i].copy_(wide.square() if side.shape.diagonal else wide @ wide.mT)
        self.ready[i] = True

    def _strengths(self, i: int, damping: float) -> tuple[Tensor, Tensor]:
        """(pi gamma, gamma / pi)."""
        pi = factors.pi_of(self.means[0, i], self.means[1, i])
        gamma = damping**0.5
        return pi * gamma, gamma / pi

    def refresh_(self, members: Sequence[int], damping: Sequence[float]) -> list[bool]:
        return [True] * len(members)

    def renewed(self) -> list[Tensor]:
        return []

    def apply_(self, grad: Joint, out: Joint, number: int, scratch: Tensor, *, bf16: bool) -> None:
        self._multiply(grad, out, number, scratch, bf16=bf16)

    def tensors(self, member: int) -> dict[str, Any]:
        return self._views(member) if self.ready[member] else {}

    def restore(self, stored: Sequence[Mapping[str, Any]]) -> None:
        for i, own in enumerate(stored):
            if "A_root" in own:
                for name, t in self._views(i).items():
                    t.copy_(own[name])
                self.ready[i] = True

    def _views(self, member: int) -> dict[str, Tensor]:
        return {
            "A_root": self.roots[0][member], "G_root": self.roots[1][member],
            "A_inv": self.A.inverse[member], "G_inv": self.G.inverse[member],
            "A_mean": self.means[0, member], "G_mean": self.means[1, member],
        }  # fmt: skip

    def nbytes(self) -> dict[str, int]:
        inverses = self.A.inverse_whole.nbytes + self.G.inverse_whole.nbytes
        return {"factors": sum(t.nbytes for t in self.roots), "inverses": inverses, "rows": 0}

    def factors(self, member: int, damping: float) -> tuple[Tensor, Tensor]:
        """What the roots stand for, (K K^T)^-1 less its damping."""
        implied = []
        for F, d in zip((self.A, self.G), self._strengths(member, damping), strict=True):
            inverse = F.inverse[member].double()
            if F.shape.diagonal:
                found = 1 / inverse - d
            else:
                found = torch.linalg.inv(inverse)
                found.diagonal(dim1=-2, dim2=-1).sub_(d.double())
            implied.append(found.to(F.inverse.dtype))
        return implied[0], implied[1]


def _scaled_identity(F: Tensor, mean: Tensor, *, diagonal: bool) -> Tensor:
    """The root of the inverse of mean * I, in the form of F."""
    scale = mean.clamp(min=torch.finfo(F.dtype).tiny).rsqrt()
    eye = torch.ones_like(F) if diagonal else torch.eye(F.shape[-1], dtype=F.dtype, device=F.device).expand_as(F)
    return eye * scale


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
