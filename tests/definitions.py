"""What a structure stands for, member by member: running averages and damped blocks in dense float64."""

from __future__ import annotations

from typing import Any

import dense
import torch
from stacks import F64, STEPS, Rows
from torch import Tensor

from kfac_triton.layer import Layer
from kfac_triton.linalg.temporal_chain import product, transform
from kfac_triton.operations.layout import BLOCKS, DIAGONAL, UNCORRELATED

CHAINS = ("chain_symmetric", "chain")
DECAY = 0.6  # reached at the third update


def as_dense(F: Tensor, layer: Layer, side: str) -> Tensor:
    """What a side's form keeps of the moments F, as a matrix over all of its rows; with an axis of groups."""
    form, d = getattr(layer.layout, side), layer.layout.dims(layer.weight.shape)["AG".index(side)]
    if form == DIAGONAL:
        return torch.diag_embed(F.diagonal(dim1=-2, dim2=-1))
    if form == BLOCKS:
        width = -(-d // getattr(layer.layout, f"blocks_{side}"))
        block = torch.arange(d) // width
        return F * (block[:, None] == block)
    if form != UNCORRELATED:
        return F
    taps, bias = layer.layout.taps(layer.weight.shape), layer.layout.bias
    by_group = [pixels_written_out(own, taps, bias) for own in (F if F.dim() > 2 else [F])]
    return torch.stack(by_group) if F.dim() > 2 else by_group[0]


def pixels_written_out(S: Tensor, taps: int, bias: bool) -> Tensor:
    """Entry by entry: of one tap the covariance and the means, of two taps the means alone."""
    C, t = len(S) - 1, S[-1, -1]
    A = torch.empty(taps * C + bias, taps * C + bias, dtype=F64)
    for i in range(taps * C):
        for j in range(taps * C):
            alone = S[i % C, -1] * S[j % C, -1] / t
            A[i, j] = S[i % C, j % C] if i // C == j // C else alone
    if bias:
        A[-1, :-1] = A[:-1, -1] = S[:-1, -1].repeat(taps)
        A[-1, -1] = t
    return A


def by_group(t: Tensor) -> Tensor:
    """With an axis of groups, of which there may be one."""
    return t if t.dim() > 2 else t.unsqueeze(0)


def each(function: Any, *tensors: Tensor) -> Tensor:
    """A function of the matrices of each group."""
    return torch.stack([function(*own) for own in zip(*map(by_group, tensors), strict=True)])


def damped(A: Tensor, G: Tensor, damping: float, undivided: bool) -> Tensor:
    """The block of one group; where one factor is a number, it is damped as a whole."""
    if undivided and 1 in (len(A), len(G)):
        return torch.kron(G, A) + damping * torch.eye(len(A) * len(G), dtype=F64)
    gamma = damping**0.5
    pi = ((A.trace() / len(A)) / (G.trace() / len(G))).sqrt()
    return torch.kron(G + gamma / pi * torch.eye(len(G), dtype=F64), A + gamma * pi * torch.eye(len(A), dtype=F64))


class Definition:
    """One member alone: the running averages of its moments, and the matrix that multiplies with its gradient."""

    def __init__(self, layer: Layer, approximation: str) -> None:
        self.layer, self.approximation = layer, approximation
        self.k = 0
        self.A: Tensor = torch.zeros((), dtype=F64)
        self.G = self.lag_A = self.lag_G = self.length = self.A
        self.undivided = layer.layout.operation in ("scale", "position")

    def update(self, rows: Rows, damping: float) -> float:
        """Returns beta."""
        self.k += 1
        beta = min(1 - 1 / self.k, DECAY)
        A, G = (
            as_dense(F, self.layer, side) if side == "G" else F for F, side in zip(rows.moments(), "AG", strict=True)
        )
        self.A, self.G = beta * self.A + (1 - beta) * A, beta * self.G + (1 - beta) * G
        if self.approximation in CHAINS:
            lags = lagged(rows)
            known = self.lag_A, self.lag_G, self.length
            self.lag_A, self.lag_G, self.length = (
                beta * old + (1 - beta) * new for old, new in zip(known, lags, strict=True)
            )
        return beta

    def refresh(self, damping: float, state: dict[str, Any]) -> None:
        A = as_dense(self.A, self.layer, "A")
        self.matrix = each(lambda *F: damped(*F, damping, self.undivided), A, self.G)
        if self.approximation in CHAINS:
            self.transform = transform(
                A, self.G, self.lag_A, self.lag_G, float(self.length), damping, symmetric=self.approximation != "chain"
            )

    def solved(self, grad: Tensor) -> Tensor:
        if self.approximation in CHAINS:
            return product(grad, self.transform)
        return each(lambda F, v: torch.linalg.solve(F, v.flatten()).view(v.shape), self.matrix, grad).view(grad.shape)


def lagged(rows: Rows) -> tuple[Tensor, Tensor, float]:
    """Means over neighbours in time, at the scale of A and G; and the rows of a sequence."""
    starts = [sum(STEPS[:t]) for t in range(len(STEPS))]
    pairs = [(starts[t - 1] + i, starts[t] + i) for t in range(1, len(STEPS)) for i in range(STEPS[t])]
    count = len(pairs) * len(rows.a)
    A = sum(torch.outer(a[after], a[before]) for a in rows.a for before, after in pairs)
    G = sum(torch.outer(g[after], g[before]) for by in rows.g for g in by for before, after in pairs)
    return A * rows.count / rows.terms / count, G / count, sum(STEPS) / STEPS[0]


class EigenDefinition(Definition):
    """The eigenvalues S in the bases that the structure found, once those are seen to be eigenbases."""

    def __init__(self, layer: Layer, approximation: str) -> None:
        super().__init__(layer, approximation)
        self.measured = 0
        self.bases: tuple[Tensor, Tensor] | None = None
        self.waiting: Rows | None = None

    def update(self, rows: Rows, damping: float) -> float:
        beta = super().update(rows, damping)
        if self.bases is None:
            self.waiting = rows
        else:
            self._measure(rows)
        return beta

    def _measure(self, rows: Rows) -> None:
        self.measured += 1
        beta = min(1 - 1 / self.measured, DECAY)
        self.S = beta * self.S + (1 - beta) * rows.second_moments(*self.bases)

    def refresh(self, damping: float, state: dict[str, Any]) -> None:
        Q_A, Q_G = state["Q_A"].clone(), state["Q_G"].clone()
        for Q, F in ((Q_A, self.A), (Q_G, self.G)):
            dense.assert_exact(Q.mT @ Q, torch.eye(Q.shape[-1], dtype=F64).expand_as(Q))
            values = Q.mT @ F @ Q
            dense.assert_exact(values, torch.diag_embed(values.diagonal(dim1=-2, dim2=-1)))
        if self.measured:
            old = self.bases
            self.S = each(lambda *own: moved_along(*own), self.S, *old, Q_A, Q_G).view(self.S.shape)
        else:
            values = [(Q.mT @ F @ Q).diagonal(dim1=-2, dim2=-1) for Q, F in ((Q_A, self.A), (Q_G, self.G))]
            self.S = values[1].unsqueeze(-1) * values[0].unsqueeze(-2)
        self.bases = Q_A, Q_G
        if self.waiting is not None:
            self._measure(self.waiting)
            self.waiting = None
        self.at_refresh = self.A, self.G, damping

    def solved(self, grad: Tensor) -> Tensor:
        A, G, damping = self.at_refresh

        def block(S: Tensor, Q_A: Tensor, Q_G: Tensor, A: Tensor, G: Tensor) -> Tensor:
            Q = torch.kron(Q_G, Q_A)
            return Q * S.flatten() @ Q.T + damped(A, G, damping, False) - torch.kron(G, A)

        self.matrix = each(block, self.S, *self.bases, A, G)
        return super().solved(grad)


def moved_along(S: Tensor, Q_A: Tensor, Q_G: Tensor, new_A: Tensor, new_G: Tensor) -> Tensor:
    """The diagonal that Q diag(S) Q^T has in the new bases."""
    Q, new = torch.kron(Q_G, Q_A), torch.kron(new_G, new_A)
    return (new.T @ (Q * S.flatten() @ Q.T) @ new).diagonal().view(S.shape)


class InverseFreeDefinition(Definition):
    """Roots as dense matrices; twelve steps on the first data, then one an update."""

    def __init__(self, layer: Layer, approximation: str) -> None:
        super().__init__(layer, approximation)
        self.means, self.roots = [0.0, 0.0], [None, None]

    def update(self, rows: Rows, damping: float) -> float:
        beta = super().update(rows, damping)
        sides = [as_dense(F, self.layer, side) for F, side in zip(rows.moments(), "AG", strict=True)]
        means = [float(F.diagonal(dim1=-2, dim2=-1).mean()) for F in sides]
        self.means = [beta * old + (1 - beta) * new for old, new in zip(self.means, means, strict=True)]
        pi = (self.means[0] / self.means[1]) ** 0.5
        for i, (F, d) in enumerate(zip(sides, (pi * damping**0.5, damping**0.5 / pi), strict=True)):
            eye = torch.eye(F.shape[-1], dtype=F64).expand_as(F)
            first = self.roots[i] is None
            K = eye * (d + self.means[i]) ** -0.5 if first else self.roots[i]
            for _ in range(12 if first else 1):
                M = K.mT @ (F + d * eye) @ K - eye
                b = min(1 - beta, 1 / max(float(M.abs().sum(dim=-1).max()), 1e-300))
                K = K - b / 2 * K @ M
            self.roots[i] = K
        return beta

    def refresh(self, damping: float, state: dict[str, Any]) -> None: ...

    def solved(self, grad: Tensor) -> Tensor:
        K_A, K_G = self.roots
        self.matrix = each(lambda K, C: torch.linalg.inv(torch.kron(C @ C.T, K @ K.T)), K_A, K_G)
        return super().solved(grad)


def definition(layer: Layer, approximation: str) -> Definition:
    kinds = {"eigen": EigenDefinition, "inverse_free": InverseFreeDefinition}
    return kinds.get(approximation, Definition)(layer, approximation)
