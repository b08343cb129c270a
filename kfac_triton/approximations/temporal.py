"""Recurrent weights whose gradients at neighbouring times are correlated (Martens, Ba & Johnson 2018, section 3.5).

`kfac_triton.temporal_chain` has the mathematics: "independent" times are the ordinary factors; "chain_symmetric" and
"chain" couple every time with the one before.

In the state of a weight: `A_lag`, `G_lag`, running averages of the moments of neighbours in time by the rule of the
factors, `time_steps` (0-d), the length T of a sequence; and refreshed with the inverses `time_K_A`, `time_K_G`,
`time_scale` (d_out, d_in), and for "chain" `time_P_A`, `time_P_G`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from kfac_triton import factors
from kfac_triton.approximations import kronecker
from kfac_triton.approximations.kronecker import FactorUpdate, Refresh, Statistics
from kfac_triton.blocks.layout import DENSE, Layout
from kfac_triton.blocks.recurrent import RecurrentUse
from kfac_triton.temporal_chain import Transform, transform

NAMES = tuple(f"time_{name}" for name in Transform._fields)


def applies(layout: Layout) -> bool:
    """Whether a weight has an order of time and factors that know it."""
    return layout.operation == "recurrent" and layout.A == layout.G == DENSE


def update_lags(updates: Sequence[FactorUpdate]) -> None:
    """Moves the moments of neighbours in time, by the rule of the factors, which were moved before."""
    for state, own, decay, ok in updates:
        if not applies(own.layout) or not own.uses:
            continue
        beta, share = factors.average_weights(state["factor_updates"].to(state["A"].dtype), decay, ok)
        A_lag, G_lag, steps = moments_of_neighbours(own, state["A"].dtype)
        for name, measured in (("A_lag", A_lag), ("G_lag", G_lag), ("time_steps", steps)):
            known = state.get(name)
            known = torch.zeros_like(measured) if known is None else known
            state[name] = torch.where(ok, beta * known + share * measured, known)


def moments_of_neighbours(own: Statistics, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
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
    terms = kronecker.tensor_of(own.terms, A).clamp(min=1)
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


def _sequences(own: Statistics) -> Iterator[tuple[Tensor, list[Tensor], tuple[int, ...]]]:
    """Inputs (with the bias's 1) and gradients by time, and each step's rows; calls of cells follow one another."""
    cells = []
    for seen in own.uses:
        use = seen.recorded.use
        assert isinstance(use, RecurrentUse)
        x = use.x.flatten(0, -2)
        a = torch.cat([x, x.new_full((len(x), 1), float(use.bias is not None))], 1) if own.layout.bias else x
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


def update_transforms(refreshes: Sequence[Refresh], *, symmetric: bool) -> None:
    """Refreshes the transforms of recurrent weights, from factors that are up to date."""
    for state, layout, damping, _ in refreshes:
        if applies(layout) and "A_lag" in state and state["factor_updates"] > 0:
            found = transform(
                state["A"], state["G"], state["A_lag"], state["G_lag"], float(state["time_steps"]), damping,
                symmetric=symmetric,
            )  # fmt: skip
            if found is not None:
                for name, value in found._asdict().items():
                    state[f"time_{name}"] = value


def stored(state: dict[str, Any]) -> Transform | None:
    """The transform in the state of a weight."""
    if "time_K_A" not in state:
        return None
    return Transform(*(state[f"time_{name}"] for name in Transform._fields))


def memory(weight: Tensor, layout: Layout, *, symmetric: bool) -> tuple[int, int]:
    """Bytes of (moments of neighbours, transforms) beyond the block-diagonal state."""
    if not applies(layout):
        return 0, 0
    d_in, d_out = layout.dims(weight.shape)
    size, squares = kronecker.factor_dtype(weight).itemsize, d_in**2 + d_out**2
    return size * squares, size * ((1 if symmetric else 2) * squares + d_in * d_out)
