"""Recurrent weights whose gradients at neighbouring times are correlated (Martens, Ba & Johnson 2018, section 3.5).

`kfac_triton.linalg.temporal_chain` has the mathematics: "independent" times are the ordinary factors; "chain_symmetric"
and "chain" couple every time with the one before.

In the state of a weight: `A_lag`, `G_lag`, running averages of the moments of neighbours in time by the rule of the
factors, `time_steps` (0-d), the length T of a sequence; and refreshed with the inverses `time_K_A`, `time_K_G`,
`time_scale` (d_out, d_in), and for "chain" `time_P_A`, `time_P_G`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kfac_triton.distributed import Ranks
from kfac_triton.joint import Joint, Stack
from kfac_triton.linalg.temporal_chain import Transform, product, transform
from kfac_triton.operations.recurrent import RecurrentUse
from kfac_triton.sample import Sample, tensor_of
from kfac_triton.structures.base import Moves, Room
from kfac_triton.structures.kronecker import Kronecker

LAGS = ("A_lag", "G_lag", "time_steps")
TRANSFORMS = tuple(f"time_{name}" for name in Transform._fields)


class TemporalChain(Kronecker):
    """Factors, moments of neighbours in time, and the transforms that follow from both."""

    def __init__(self, stack: Stack, ranks: Ranks, *, symmetric: bool) -> None:
        super().__init__(stack, ranks)
        self.symmetric = symmetric
        (d_in, d_out), k = stack.dims, len(stack.layers)
        sides = {"A": (d_in, d_in), "G": (d_out, d_out)}
        shapes: dict[str, tuple[int, ...]] = {"A_lag": sides["A"], "G_lag": sides["G"], "time_steps": ()}
        shapes |= {"time_K_A": sides["A"], "time_K_G": sides["G"], "time_scale": (d_out, d_in)}
        shapes |= {f"time_P_{side}": (0,) if symmetric else shape for side, shape in sides.items()}
        self.memory = {
            name: torch.zeros(k, *shape, dtype=stack.dtype, device=stack.device) for name, shape in shapes.items()
        }
        self.transformed = [False] * k

    def update_(
        self, samples: Sequence[Sample | None], rows: tuple[Room, Room] | None, moves: Moves, damping: Sequence[float]
    ) -> None:
        super().update_(samples, rows, moves, damping)
        for i, own in enumerate(samples):
            if own is None or not own.uses:
                continue
            beta, share, ok = moves.beta[i], moves.share[i], moves.ok[i]
            for name, new in zip(LAGS, moments_of_neighbours(own, self.stack.dtype), strict=True):
                known = self.memory[name][i]
                known.copy_(torch.where(ok, beta * known + share * new, known))
        self.ranks.average_([self.memory[name] for name in LAGS])

    def refresh_(self, members: Sequence[int], damping: Sequence[float]) -> list[bool]:
        done = super().refresh_(members, damping)
        for i in members:
            found = transform(
                self.A.values[i], self.G.values[i], self.memory["A_lag"][i], self.memory["G_lag"][i],
                float(self.memory["time_steps"][i]), damping[i], symmetric=self.symmetric,
            )  # fmt: skip
            if found is not None:
                for name, value in zip(TRANSFORMS, found, strict=True):
                    self.memory[name][i].copy_(value)
                self.transformed[i] = True
        return done

    def renewed(self) -> list[Tensor]:
        return [*super().renewed(), *(self.memory[name] for name in TRANSFORMS)]

    def apply_(self, grad: Joint, out: Joint, number: int, scratch: Tensor, *, bf16: bool) -> None:
        super().apply_(grad, out, number, scratch, bf16=bf16)
        for i, known in enumerate(self.transformed):
            if known:
                own = Transform(*(self.memory[name][i] for name in TRANSFORMS))
                out.of(number, i).copy_(product(grad.of(number, i), own))

    def tensors(self, member: int) -> dict[str, Any]:
        held = super().tensors(member)
        held |= {name: self.memory[name][member] for name in LAGS}
        if self.transformed[member]:
            held |= {name: self.memory[name][member] for name in TRANSFORMS}
        return held

    def nbytes(self) -> dict[str, int]:
        held = super().nbytes()
        lags, transforms = (sum(self.memory[n].nbytes for n in names) for names in (LAGS[:2], TRANSFORMS))
        return {**held, "factors": held["factors"] + lags, "inverses": held["inverses"] + transforms}

    def restore(self, stored: Sequence[Mapping[str, Any]]) -> None:
        super().restore(stored)
        for i, own in enumerate(stored):
            for name, t in self.memory.items():
                if name in own:
                    t[i].copy_(own[name])
            self.transformed[i] = "time_K_A" in own


def moments_of_neighbours(own: Sample, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """(A_1, G_1, T): means of a_{t+1} a_t^T and g_{t+1} g_t^T over neighbours, at the scale of A and G, and how many
    rows a sequence has."""
    like = own.uses[0].recorded.use.x
    A = G = torch.zeros((), dtype=dtype, device=like.device)
    pairs = rows = sequences = 0
    for a, gs, counts in _sequences(own):
        first, second = (t.to(like.device) for t in _neighbours(counts))
        rows, sequences, pairs = rows + sum(counts), sequences + counts[0], pairs + len(first)
        A = A + a[second].mT.to(dtype) @ a[first].to(dtype)
        G = G + sum((g[second].mT.to(dtype) @ g[first].to(dtype) for g in gs), start=torch.zeros_like(G))
    share = 1 / max(pairs, 1)
    terms = tensor_of(own.terms, A).clamp(min=1)
    return (
        A * (rows * share / terms),
        G * share,
        torch.as_tensor(rows / max(sequences, 1), dtype=dtype, device=A.device),
    )


def _neighbours(counts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The rows that another one continues, and those, where step t has counts[t] rows."""
    sizes = torch.tensor(counts)
    starts = sizes.cumsum(0) - sizes
    within = torch.cat([torch.arange(n) for n in counts[1:]]) if len(counts) > 1 else sizes.new_empty(0)
    return (torch.repeat_interleave(start, sizes[1:]) + within for start in (starts[:-1], starts[1:]))  # type: ignore


def _sequences(own: Sample) -> Iterator[tuple[Tensor, list[Tensor], tuple[int, ...]]]:
    """Inputs (with the bias's 1) and gradients by time, and each step's rows; calls of cells follow one another."""
    cells = []
    for seen in own.uses:
        use = seen.recorded.use
        assert isinstance(use, RecurrentUse)
        x = use.x.flatten(0, -2)
        with_bias = own.layer.layout.bias
        a = torch.cat([x, x.new_full((len(x), 1), float(use.bias is not None))], 1) if with_bias else x
        gs = [dy.reshape(len(x), -1) for dy in seen.dys]
        if len(use.steps) > 1:
            yield a, gs, use.steps
        else:
            cells.append((seen.batch, a, gs))
    for batch in sorted({batch for batch, _, _ in cells}):
        calls = [(a, gs) for b, a, gs in cells if b == batch]
        even = all(len(a) == len(calls[0][0]) and len(gs) == len(calls[0][1]) for a, gs in calls)
        for run in [calls] if even else [[call] for call in calls]:
            gradients = [torch.cat(parts) for parts in zip(*(gs for _, gs in run), strict=True)]
            yield torch.cat([a for a, _ in run]), gradients, tuple(len(a) for a, _ in run)
