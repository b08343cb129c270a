"""What the state of a parameter holds: names, shapes and dtypes of its tensors, and which of them come together.

A weight with a block holds what describes the block as plain integers, the factors, and what follows from them; a bias
holds its momentum; a parameter without a block holds AdamW's averages.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kfac_triton.config import APPROXIMATIONS, Settings
from kfac_triton.joint import wide_dtype
from kfac_triton.operations.layout import BLOCKS, DENSE, DIAGONAL, FORMS, OPERATIONS, Layout
from kfac_triton.structures.buffered import CAPACITY


class Slot(NamedTuple):
    """The shape of a tensor, and the dtypes that it may have, its own first."""

    shape: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]


@dataclass(frozen=True)
class Part:
    """Tensors that are there together, from the block's first update on if `always`; a 0 stands for one not there."""

    slots: dict[str, Slot]
    always: bool = False


class Neighbour(NamedTuple):
    """The next weight in a tridiagonal chain."""

    weight: Tensor
    layout: Layout


COUNTER = Slot((), (torch.float32,))
COUNTERS = ("factor_updates", "spectrum_updates", "fallback_step", "moment_steps", "bounded_steps")
ADAMW = ("exp_avg", "exp_avg_sq", "fallback_step")
# Integers that describe a block, and the values that they may have.
INTEGERS: Mapping[str, range] = {
    "operation": range(len(OPERATIONS)),
    "groups": range(1, 2**31),
    "form_A": range(len(FORMS)),
    "form_G": range(len(FORMS)),
    "blocks_A": range(1, 2**31),
    "blocks_G": range(1, 2**31),
    "transposed": range(2),
    "bias": range(-1, 2**31),
    "approximation": range(len(APPROXIMATIONS)),
}
APPROXIMATION = "approximation"  # younger than the others
MARKS = {"A_root": "inverse_free", "Q_A": "eigen", "chain": "tridiagonal"}  # of states that do not name it


def describes_block(stored: Mapping[str, Any]) -> bool:
    """Whether the state of a parameter is that of a weight with a block."""
    return any(name in stored for name in (*INTEGERS, "A", "G", "A_root", "G_root", "factor_updates"))


def approximation_of(stored: Mapping[str, Any], usual: str) -> str:
    """The approximation that wrote the state of a weight; `usual` where the state does not tell."""
    if APPROXIMATION in stored:
        return APPROXIMATIONS[stored[APPROXIMATION]]
    marked = next((name for mark, name in MARKS.items() if mark in stored), None)
    return marked or ("kronecker" if usual in MARKS.values() and usual != "eigen" else usual)


def parts_of_parameter(p: Tensor) -> Iterator[Part]:
    """What every parameter may hold: momentum, in the factors' precision (older states: in the parameter's), AdamW's
    averages, the quadratic form of the momentum where a trust region bounds it, and of capped steps the mean squares of
    the gradient and, of a weight, numbers of its steps."""
    like = Slot(tuple(p.shape), (p.dtype,))
    yield Part({"momentum_buffer": Slot(like.shape, (wide_dtype(p), p.dtype))})
    yield Part({"exp_avg": like, "exp_avg_sq": like, "fallback_step": COUNTER})
    yield Part({"quadratic": Slot((), (wide_dtype(p),))})
    yield Part({"square_buffer": Slot(like.shape, (wide_dtype(p),))})
    counts = {"moment_steps": COUNTER, "bounded_steps": COUNTER}
    yield Part({"gradient_norm": Slot((), (wide_dtype(p),)), **counts})


def parts_of_block(weight: Tensor, layout: Layout, settings: Settings, after: Neighbour | None) -> Iterator[Part]:
    """What the weight of a block may hold besides; `after` is the next layer of a tridiagonal chain."""
    wide = (wide_dtype(weight),)
    (d_in, d_out), shapes = layout.dims(weight.shape), layout.factor_shapes(weight.shape)
    A, G = (Slot(shape, wide) for shape in shapes)
    A_inv, G_inv = (Slot(shape, wide) for shape in layout.inverse_shapes(weight.shape))
    yield Part({"factor_updates": COUNTER}, always=True)
    yield Part({"A_size": Slot((), wide), "G_size": Slot((), wide)})
    if settings.approximation == "inverse_free":
        roots = {f"{side}_root": Slot(shape, (weight.dtype,)) for side, shape in zip("AG", shapes, strict=True)}
        means = {f"{side}_mean": Slot((), wide) for side in "AG"}
        yield Part({**roots, **means, "A_inv": A, "G_inv": G})
        return
    yield Part({"A": A, "G": G}, always=True)
    for side, shape in zip("AG", shapes, strict=True):
        if getattr(layout, side) not in (DIAGONAL, BLOCKS) and layout.groups == 1:  # UNCORRELATED: of older states
            rows = {f"{side}_rows": (CAPACITY, shape[-1]), f"{side}_weights": (CAPACITY,), f"{side}_kept": ()}
            yield Part({name: Slot(size, wide) for name, size in rows.items()})
    if settings.approximation == "eigen" and layout.A == layout.G == DENSE:
        bases = {"Q_A": A, "Q_G": G, "spectrum": Slot((*G.shape[:-1], d_in), wide), "spectrum_updates": COUNTER}
        dampings = {"damping_A": Slot(A.shape[:-1], wide), "damping_G": Slot(G.shape[:-1], wide)}
        yield Part({**bases, **dampings, "eigen_damping": Slot((), wide)})
    else:
        yield Part({"A_inv": A_inv, "G_inv": G_inv})
    if settings.temporal != "independent" and layout.operation == "recurrent" and layout.A == layout.G == DENSE:
        yield Part({"A_lag": A, "G_lag": G, "time_steps": Slot((), wide)})
        P_A, P_G = (Slot((0,), wide),) * 2 if settings.temporal == "chain_symmetric" else (A, G)
        sides = {"time_K_A": A, "time_K_G": G, "time_scale": Slot((d_out, d_in), wide)}
        yield Part({**sides, "time_P_A": P_A, "time_P_G": P_G})
    if settings.approximation == "tridiagonal" and after is not None:
        next_in, next_out = after.layout.dims(after.weight.shape)
        cross = Slot((d_in, next_in), wide), Slot((d_out, next_out), wide)
        yield Part(dict(zip(("A_next", "G_next"), cross, strict=True)))
        link = {"link_psi_A": cross[0], "link_psi_G": cross[1], "link_K_A": A, "link_K_G": G}
        yield Part({**link, "link_s_A": Slot((d_in,), wide), "link_s_G": Slot((d_out,), wide)})
