"""Eigenvalue-corrected Kronecker factors, EKFAC (George et al. 2018), damped as the factors are.

The factors give the eigenbases, A = Q_A diag(.) Q_A^T and G = Q_G diag(.) Q_G^T; the eigenvalues in that basis are
measured, as the second moments of the examples' gradients there, which no other diagonal brings nearer to the Fisher:

    F ~ (Q_G (x) Q_A) diag(S) (Q_G (x) Q_A)^T,    S_ij = sum over examples n of (Q_G^T grad_n Q_A)_ij^2 / L
    V = Q_G [(Q_G^T grad Q_A) / (S + D)] Q_A^T,    D_ij = damping + sqrt(damping) (pi g_i + a_j / pi)

grad_n is the sum of g a^T over the positions of one example. a_j and g_i are the factors' eigenvalues, so that D is
what factored damping adds to their products. The damping alone would leave a direction that only one factor knows
nearly undamped; where inputs are zero or nearly so, most directions are such, and steps along them raise the loss.

S is a running average by the rule of the factors, refreshed with every factor update, the bases when inverses are; new
bases take S along, as the diagonal that the last form of F has in them, (R_G o R_G) S (R_A o R_A)^T with R = Q_new^T
Q_old. Until there are examples to measure with (an empirical Fisher's sums have none), S is the product of the factors'
eigenvalues.

In the state of a weight: `Q_A`, `Q_G`, `spectrum` S (d_out, d_in), `spectrum_updates` (0-d) and the parts of D,
`eigen_damping` (0-d), `damping_A` (d_in) and `damping_G` (d_out).
A refresh of the bases takes some 20 d^3 operations for each side, where a Cholesky inverse takes d^3, one of S as many
as the gradient of the weight on as many examples, and a step four products instead of two. A weight with a side that is
not dense keeps the Kronecker form.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kfac_triton import ops
from kfac_triton.distributed import Ranks
from kfac_triton.joint import Joint, Stack
from kfac_triton.linalg import factors, moments
from kfac_triton.ops import OneHot, Patches
from kfac_triton.sample import Sample, tensor_of
from kfac_triton.structures.base import Moves, Room
from kfac_triton.structures.kronecker import Kronecker

BASES = ("Q_A", "Q_G", "spectrum", "damping_A", "damping_G", "eigen_damping", "spectrum_updates")
AT_ONCE = 2**24  # entries of examples' gradients that are held at a time


class Ekfac(Kronecker):
    """Factors, their eigenbases in the place of inverses, and eigenvalues that were measured in these.

    `divisor` is S + D less the damping itself, with ones around it where kernels want them.
    """

    name = "eigen"

    def __init__(self, stack: Stack, ranks: Ranks) -> None:
        super().__init__(stack, ranks)
        (d_in, d_out), lead = stack.dims, stack.lead
        # what holds an inverse in the Kronecker form holds a basis here
        self.Q_A, self.Q_G = self.A.inverse, self.G.inverse
        self.spectrum = self.Q_A.new_zeros(*lead, d_out, d_in)
        self.damping_A, self.damping_G = self.Q_A.new_zeros(*lead, d_in), self.Q_A.new_zeros(*lead, d_out)
        self.eigen_damping = self.Q_A.new_zeros(lead[0])
        self.spectrum_updates = torch.zeros(lead[0], dtype=torch.float32, device=stack.device)
        around = self.G.inverse_whole.shape[-1], self.A.inverse_whole.shape[-1]
        self._divisor_whole = self.Q_A.new_ones(*lead, *(around if stack.fuses else (d_out, d_in)))
        self.divisor = self._divisor_whole[..., :d_out, :d_in]
        self._unmeasured: dict[int, tuple[Sample, Moves]] = {}

    def update_(
        self, samples: Sequence[Sample | None], rows: tuple[Room, Room] | None, moves: Moves, damping: Sequence[float]
    ) -> None:
        super().update_(samples, rows, moves, damping)
        given = {i: (own, moves) for i, own in enumerate(samples) if own is not None}
        self._unmeasured = {i: pair for i, pair in given.items() if not self.ready[i]}
        self._measure({i: pair for i, pair in given.items() if self.ready[i]})

    def refresh_(self, members: Sequence[int], damping: Sequence[float]) -> list[bool]:
        self.settle_()
        done = [self._new_basis(i, damping[i]) for i in members]
        self._measure({i: pair for i, pair in self._unmeasured.items() if self.ready[i]})
        self._unmeasured = {}
        self._renew_divisor()
        return done

    def _renew_divisor(self) -> None:
        torch.add(self.spectrum, self.damping_A.unsqueeze(-2), out=self.divisor)
        self.divisor.add_(self.damping_G.unsqueeze(-1))

    def _new_basis(self, i: int, damping: float) -> bool:
        """Whether there are eigenbases; else the last ones stay."""
        of_A, of_G = basis(self.A.values[i]), basis(self.G.values[i])
        if of_A is None or of_G is None:
            return False
        (lambda_A, Q_A), (lambda_G, Q_G) = of_A, of_G
        if self.ready[i] and float(self.spectrum_updates[i]) > 0:
            R_A, R_G = Q_A.mT @ self.Q_A[i], Q_G.mT @ self.Q_G[i]
            self.spectrum[i].copy_(R_G.square() @ self.spectrum[i] @ R_A.square().mT)
        else:
            self.spectrum[i].copy_(lambda_G.unsqueeze(-1) * lambda_A.unsqueeze(-2))
            self.spectrum_updates[i] = 0
        self.Q_A[i].copy_(Q_A)
        self.Q_G[i].copy_(Q_G)
        root = damping**0.5
        pi = factors.pi_of(lambda_A.mean(dim=-1), lambda_G.mean(dim=-1)).unsqueeze(-1)
        self.eigen_damping[i] = damping
        self.damping_A[i].copy_(root / pi * lambda_A)
        self.damping_G[i].copy_(root * pi * lambda_G)
        self.ready[i] = True
        return True

    def _measure(self, given: Mapping[int, tuple[Sample, Moves]]) -> None:
        """Moves the eigenvalues towards what samples measure in the bases as they are."""
        measured = {i: pair for i, pair in given.items() if pair[0].sums is None}
        for i, (own, moves) in measured.items():
            new, ok = second_moments(own, self.Q_A[i], self.Q_G[i]), moves.ok[i]
            self.spectrum_updates[i] += ok
            decay = moves.decay[i]
            beta, share = moments.average_weights(self.spectrum_updates[i].to(new.dtype), decay, ok)
            self.spectrum[i].copy_(torch.where(ok, beta * self.spectrum[i] + share * new, self.spectrum[i]))
        if measured:
            self.ranks.average_([self.spectrum])
            self._renew_divisor()

    def renewed(self) -> list[Tensor]:
        return [*super().renewed(), *(getattr(self, name) for name in BASES[2:]), self._divisor_whole]

    def apply_(self, grad: Joint, out: Joint, number: int, scratch: Tensor, *, bf16: bool) -> None:
        if self.stack.fuses:
            padded = self.stack.groups == 1
            V, J = (t.whole[number] if padded else t.matrices[number] for t in (out, grad))
            Q_G, Q_A = (F.inverse_whole if padded else F.inverse for F in (self.G, self.A))
            S = self._divisor_whole if padded else self.divisor
            ops.eigen_scale_(*(list(t) for t in (V, Q_G, J, Q_A, S, self.eigen_damping)))
            return
        damping = self.eigen_damping.reshape(-1, *(1,) * (self.divisor.dim() - 1))
        projected = self.Q_G.mT @ grad.matrices[number] @ self.Q_A
        out.matrices[number].copy_(self.Q_G @ projected.div_(self.divisor + damping) @ self.Q_A.mT)

    def tensors(self, member: int) -> dict[str, Any]:
        held = {**self.A.tensors(member), **self.G.tensors(member)}
        if self.ready[member]:
            held |= {name: getattr(self, name)[member] for name in BASES}
        return held

    def nbytes(self) -> dict[str, int]:
        held = super().nbytes()
        more = (self.spectrum, self.damping_A, self.damping_G, self._divisor_whole)
        return {**held, "inverses": held["inverses"] + sum(t.nbytes for t in more)}

    def restore(self, stored: Sequence[Mapping[str, Any]]) -> None:
        self.A.restore(stored)
        self.G.restore(stored)
        for i, own in enumerate(stored):
            if "damping_A" in own:
                for name in BASES:
                    getattr(self, name)[i].copy_(own[name])
                self.ready[i] = True
        self._renew_divisor()


def basis(F: Tensor) -> tuple[Tensor, Tensor] | None:
    """Eigenvalues, none below 0, and eigenvectors as columns; None where F is not finite."""
    if not bool(torch.isfinite(F).all()):
        return None
    try:
        values, vectors = torch.linalg.eigh(F)
    except RuntimeError:  # torch.linalg.LinAlgError is one
        values, vectors = (t.to(F.dtype) for t in torch.linalg.eigh(F.double()))
    return values.clamp(min=0.0), vectors


def second_moments(own: Sample, Q_A: Tensor, Q_G: Tensor) -> Tensor:
    """S (d_out, d_in), or with an axis of groups, of this sample alone."""
    total = Q_G.new_zeros(*Q_G.shape[:-1], Q_A.shape[-1])
    for a, g, examples in _pairs(own, Q_A, Q_G):
        if a.shape[-2] == examples:
            total += g.square().mT @ a.square()
            continue
        by_example = [t.unflatten(-2, (examples, -1)) for t in (a, g)]
        for first in range(0, examples, max(1, AT_ONCE // total.numel())):
            part = slice(first, first + max(1, AT_ONCE // total.numel()))
            gradients = by_example[1][..., part, :, :].mT @ by_example[0][..., part, :, :]
            total += gradients.square().sum(dim=-3)
    return total / tensor_of(own.terms, total).clamp(min=1)


def _pairs(own: Sample, Q_A: Tensor, Q_G: Tensor) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Rows of inputs and gradients in the bases, (n, d_in) and (n, d_out), and how many examples they belong to."""
    directions = len(own.g) // len(own.a)
    for i, rows in enumerate(own.a):
        assert not isinstance(rows, OneHot), "tables have no bases"
        a = (rows.rows() if isinstance(rows, Patches) else rows).to(Q_A.dtype)
        a = a.flatten(-3, -2) if a.dim() > Q_A.dim() else a
        if own.ones:
            a = torch.cat([a, a.new_ones(*a.shape[:-1], 1)], dim=-1)
        a = a @ Q_A
        for g in own.g[i * directions : (i + 1) * directions]:
            g = g.flatten(-3, -2) if g.dim() > Q_G.dim() else g
            yield a, g.to(Q_G.dtype) @ Q_G, (own.examples[i] if own.examples else 0) or a.shape[-2]
