"""Block-diagonal Fisher of Kronecker products: F = A (x) G for each weight (Martens & Grosse 2015, section 4).

V = (G + gamma / pi I)^-1 grad (A + pi gamma I)^-1,   gamma = sqrt(damping),  pi^2 = (tr A / dim A) / (tr G / dim G)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kfac_triton import ops
from kfac_triton.distributed import Ranks
from kfac_triton.joint import Joint, Stack
from kfac_triton.linalg import factors, moments
from kfac_triton.linalg.factors import Pair
from kfac_triton.linalg.moments import Accumulation
from kfac_triton.numbers import Numbers, as_tensor, library, numbers, on_host, shared
from kfac_triton.operations.layout import DIAGONAL
from kfac_triton.sample import Sample
from kfac_triton.structures.base import Moves, Product, Room, Structure
from kfac_triton.structures.factor import Dense, Factor, factor

STACKED = 2**17  # entries of a row matrix that are copied, to be multiplied in one product with those of other layers


class Kronecker(Structure):
    """Two factors, and their damped inverses."""

    name = "kronecker"

    def __init__(self, stack: Stack, ranks: Ranks) -> None:
        super().__init__(stack, ranks)
        self.A, self.G = factor(stack, "A"), factor(stack, "G")
        self._multiply = Multiplier(stack, self.A, self.G)
        layouts = [layer.layout for layer in stack.layers]
        plain = isinstance(self.A, Dense) and isinstance(self.G, Dense) and stack.groups == 1 and not stack.fuses
        # where kernels serve, one launch reads the rows of all layers where they lie
        self._stacks_rows = plain and len({layout.bias for layout in layouts}) == 1

    def room(self, counts: Sequence[int]) -> tuple[Room, Room] | None:
        n = counts[0]
        if not (n and self._stacks_rows) or n * max(self.stack.dims) > STACKED or any([m != n for m in counts]):
            return None
        assert isinstance(self.A, Dense)
        assert isinstance(self.G, Dense)
        at_once = self.ranks.active  # averages that wait could not be shared
        bias = self.stack.layers[0].layout.bias
        return self.A.room(n, ones=bias, at_once=at_once), self.G.room(n, ones=False, at_once=at_once)

    def products(self, rows: tuple[Room, Room]) -> list[Product] | None:
        if type(self).update_ is not Kronecker.update_ or not (self.A.keeps(rows[0]) and self.G.keeps(rows[1])):
            return None
        return [
            Product(F.values, room.rows, side)
            for side, (F, room) in enumerate(zip((self.A, self.G), rows, strict=True))
        ]

    def update_(
        self, samples: Sequence[Sample | None], rows: tuple[Room, Room] | None, moves: Moves, damping: Sequence[float]
    ) -> None:
        if rows is not None:
            self._add_rows_(rows, moves)
        else:
            self._add_each_(samples, moves)
        self.ranks.average_([self.A.values, self.G.values])

    def _add_rows_(self, rows: tuple[Room, Room], moves: Moves) -> None:
        assert isinstance(self.A, Dense)
        assert isinstance(self.G, Dense)
        ok = None if moves.uniform is not None else moves.ok
        beta, alpha_A, alpha_G = moves.uniform or (moves.beta, moves.alpha_A, moves.alpha_G)
        self.A.add_(rows[0].rows, alpha_A, beta, ok)
        self.G.add_(rows[1].rows, alpha_G, beta, ok)

    def _add_each_(self, samples: Sequence[Sample | None], moves: Moves) -> None:
        self.settle_()
        moments.accumulate_([*self._accumulations(samples, moves)])
        for i, own in enumerate(samples):
            if own is not None and own.sums is not None:
                for F, total, alpha in zip((self.A, self.G), own.sums, (moves.alpha_A, moves.alpha_G), strict=True):
                    moved = moves.beta[i] * F.values[i] + alpha[i] * total
                    F.values[i].copy_(torch.where(moves.ok[i], moved, F.values[i]))

    def _accumulations(self, samples: Sequence[Sample | None], moves: Moves) -> Iterator[Accumulation]:
        for i, own in enumerate(samples):
            if own is None or own.sums is not None:
                continue
            for F, given, alpha, ones in (
                (self.A, own.a, moves.alpha_A, own.ones),
                (self.G, own.g, moves.alpha_G, False),
            ):
                rows, lack_ones = moments.by_form(given, F.shape.form, F.values[i], ones)
                yield Accumulation(F.values[i], rows, alpha[i], moves.beta[i], lack_ones, F.shape.form == DIAGONAL)

    def empty_rows(self) -> dict[str, Any]:
        return {**self.A.empty_rows(), **self.G.empty_rows()}

    def shown(self) -> Any:
        buffers = [F.buffer for F in (self.A, self.G)]
        return tuple(self.ready), [None if buffer is None else buffer.waiting for buffer in buffers]

    def settle_(self) -> None:
        self.A.settle_()
        self.G.settle_()

    def refresh_(self, members: Sequence[int], damping: Sequence[float]) -> list[bool]:
        self.settle_()
        device = self.stack.device
        if not (isinstance(self.A, Dense) and isinstance(self.G, Dense)) or ops.iterates(device):
            return self._refresh_each_(members, damping)
        a, g = shared(self.A.mean()), shared(self.G.mean())
        strengths = factors.strengths(
            library(device), a, g, _by_layer(damping, a), self.A.shape, self.G.shape,
            torch.finfo(self.stack.dtype).tiny, undivided=self.stack.layers[0].layout.undivided,
        )  # fmt: skip
        together = len(members) if max(self.stack.dims) <= factors.TOGETHER else 1
        refused = []
        for run in _runs(members, together):
            refused += self._refresh_run_(run, strengths)
        if refused:
            done = self._refresh_each_(refused, damping)
            refused = [i for i, found in zip(refused, done, strict=True) if not found]
        for i in members:
            self.ready[i] |= i not in refused
        return [i not in refused for i in members]

    def _refresh_run_(self, run: slice, strengths: factors.Strengths) -> list[int]:
        """Renews the inverses of neighbours in the stack; returns those that have none in their own precision."""
        whole = run.stop - run.start == len(self.ready)
        found, flags = [], []
        for F, side in ((self.A, strengths.of_A), (self.G, strengths.of_G)):
            inner, scale, d = side if whole else (t[run] for t in side)
            shaped = (inner[..., None, None], scale[..., None, None], d[..., None])
            own = [as_tensor(t, self.stack.dtype, self.stack.device) for t in shaped]
            inverse, ok = factors.inverses(F.values if whole else F.values[run], *own)
            found.append((F.inverse if whole else F.inverse[run], inverse))
            if ok is not None:
                flags.append(ok.all(dim=1) if self.stack.groups > 1 else ok)
        good = torch.stack(flags).all(dim=0) if flags else None
        for into, inverse in found:
            if good is not None:
                inverse = torch.where(good.reshape(-1, *(1,) * (into.dim() - 1)), inverse, into)
            into.copy_(inverse)
        if good is None or not on_host(self.stack.device):
            return []
        return [run.start + i for i, fine in enumerate(good.tolist()) if not fine]

    def _refresh_each_(self, members: Sequence[int], damping: Sequence[float]) -> list[bool]:
        """The same for any form, one after the other, with more damping or digits where that is needed."""
        undivided = self.stack.layers[0].layout.undivided
        found = factors.all_damped_inverses(
            [
                Pair(
                    self.A.values[i], self.G.values[i], damping[i], self.A.shape, self.G.shape,
                    (self.A.inverse[i], self.G.inverse[i]) if self.ready[i] else None, undivided,
                )
                for i in members
            ]
        )  # fmt: skip
        for i, pair in zip(members, found, strict=True):
            if pair is not None:
                self.A.inverse[i].copy_(pair[0])
                self.G.inverse[i].copy_(pair[1])
                self.ready[i] = True
        return [pair is not None for pair in found]

    def renewed(self) -> list[Tensor]:
        return [self.A.inverse_whole, self.G.inverse_whole]

    def apply_(self, grad: Joint, out: Joint, number: int, scratch: Tensor, *, bf16: bool) -> None:
        self._multiply(grad, out, number, scratch, bf16=bf16)

    def tensors(self, member: int) -> dict[str, Any]:
        held = {**self.A.tensors(member), **self.G.tensors(member)}
        if self.ready[member]:
            held |= {"A_inv": self.A.inverse[member], "G_inv": self.G.inverse[member]}
        return held

    def restore(self, stored: Sequence[Mapping[str, Any]]) -> None:
        self.A.restore(stored)
        self.G.restore(stored)
        for i, own in enumerate(stored):
            if "A_inv" in own:
                self.A.inverse[i].copy_(own["A_inv"])
                self.G.inverse[i].copy_(own["G_inv"])
                self.ready[i] = True

    def nbytes(self) -> dict[str, int]:
        sides = (self.A, self.G)
        return {
            "factors": sum(F.values_whole.nbytes for F in sides),
            "inverses": sum(F.inverse_whole.nbytes for F in sides),
            "rows": sum(F.rows_nbytes() for F in sides),
        }

    def room_nbytes(self) -> int:
        return self.A.room_nbytes() + self.G.room_nbytes()

    def factors(self, member: int, damping: float) -> tuple[Tensor, Tensor]:
        return self.A.written_out(member), self.G.written_out(member)


class Multiplier:
    """out <- G_inv grad A_inv for the joint matrices of a stack, with views made once for each pair of these."""

    def __init__(self, stack: Stack, A: Factor, G: Factor) -> None:
        self._stack, self._A, self._G = stack, A, G
        self._products: dict[tuple[int, int], list[tuple[Any, ...]]] = {}

    def __call__(self, grad: Joint, out: Joint, number: int, scratch: Tensor, *, bf16: bool) -> None:
        """`scratch` (n, d_out, d_in) is written over."""
        if not self._stack.dense:
            grads = grad.matrices[number]
            out.matrices[number].copy_(self._A.multiply(self._G.multiply(grads).mT).mT)
        elif self._stack.fuses or bf16:
            ops.kron_matmul_(*([t] for t in self._matrices(grad, out, number)), bf16=bf16)
        else:
            key = id(grad), id(out)
            if key not in self._products:
                self._products[key] = list(self._prepared(grad, out, number, scratch))
            for multiply, G_inv, J, between, A_inv, V in self._products[key]:
                multiply(G_inv, J, out=between)
                multiply(between, A_inv, out=V)

    def _matrices(self, grad: Joint, out: Joint, number: int) -> tuple[Tensor, ...]:
        """(out, G_inv, grad, A_inv), with the zeros around them where kernels want these, groups as layers."""
        lists = (
            (out.whole[number], self._G.inverse_whole, grad.whole[number], self._A.inverse_whole)
            if self._stack.fuses and self._stack.groups == 1
            else (out.matrices[number], self._G.inverse, grad.matrices[number], self._A.inverse)
        )
        return tuple(t.flatten(0, 1) for t in lists) if self._stack.groups > 1 else lists

    def _prepared(self, grad: Joint, out: Joint, number: int, scratch: Tensor) -> Iterator[tuple[Any, ...]]:
        """(operator, G_inv, grad, scratch, A_inv, out) of the parts of the stack that fit into the scratch."""
        V, G_inv, J, A_inv = self._matrices(grad, out, number)
        for i in range(0, len(J), len(scratch)):
            part = slice(i, i + len(scratch))
            if len(J[part]) == 1:
                yield torch.mm, G_inv[i], J[i], scratch[0], A_inv[i], V[i]
            else:
                yield torch.bmm, G_inv[part], J[part], scratch[: len(J[part])], A_inv[part], V[part]


def _runs(members: Sequence[int], most: int) -> Iterator[slice]:
    """Neighbours among the members, at most so many together."""
    start = 0
    for i in range(1, len(members) + 1):
        if i == len(members) or members[i] != members[i - 1] + 1 or i - start == most:
            yield slice(members[start], members[i - 1] + 1)
            start = i


def _by_layer(damping: Sequence[float], like: Numbers) -> Numbers:
    """Numbers (layers,), with an axis for groups where there are some."""
    vector = numbers(damping, like.device) if isinstance(like, Tensor) else np.array(damping)
    return vector[:, None] if like.ndim > 1 else vector
