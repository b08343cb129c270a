"""Block-diagonal Fisher of Kronecker products: F_i = A_i (x) G_i for each weight (Martens & Grosse 2015, section 4).

The functions here work on the state of one weight, a plain dictionary of tensors and numbers that a checkpoint holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kfac_triton import factors, ops
from kfac_triton.approximations import average
from kfac_triton.approximations.average import Update
from kfac_triton.blocks.layout import Layout
from kfac_triton.ops import Patches, Rows


@dataclass
class Statistics:
    """The rows of one weight in one Fisher pass.

    `a`: matrices (n, d_in), or patches that are not written; with `ones` a homogeneous coordinate 1 is still to be
    added to every row. `g`: matrices (n, d_out), or (images, n, d_out), gradients of the summed nll; in an exact pass
    one for each output direction.
    `terms`: loss terms L in the pass. `rows`: uses of the weight. A = sum a a^T / terms, G = sum g g^T / rows.
    `sums`: both sums, where they were taken already; then there are no rows.
    """

    layout: Layout
    bias: nn.Parameter | None
    a: list[Rows]
    g: list[Tensor]
    terms: float | Tensor
    rows: float | Tensor
    ones: bool
    sums: tuple[Tensor, Tensor] | None = None

    def present(self) -> Tensor:
        """Whether a loss term and a row are in them (0-d bool)."""
        held = self._tensors()[0]
        return (_tensor(self.terms, held) > 0) & (_tensor(self.rows, held) > 0)

    def magnitudes(self) -> list[Tensor]:
        """Norms, finite if and only if the factors from these statistics are."""
        return [torch.linalg.vector_norm(t, dtype=_wide(t.dtype)) for t in self._tensors()]

    def _tensors(self) -> list[Tensor]:
        if self.sums is not None:
            return list(self.sums)
        return [*(rows.image if isinstance(rows, Patches) else rows for rows in self.a), *self.g]


def _tensor(count: float | Tensor, like: Tensor) -> Tensor:
    """A count as a 0-d tensor of the wide dtype on the device of `like`."""
    if isinstance(count, Tensor):
        return count.to(like.device, _wide(like.dtype))
    return torch.full((), float(count), dtype=_wide(like.dtype), device=like.device)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def factor_dtype(weight: Tensor) -> torch.dtype:
    """float64 for a float64 weight, else float32."""
    return _wide(weight.dtype)


def initialise(state: dict[str, Any], weight: Tensor, layout: Layout, bias_index: int) -> None:
    """Space for the factors, which hold nothing until the first data; `bias_index` counts the model's parameters."""
    for name, shape in zip("AG", layout.factor_shapes(weight.shape), strict=True):
        state[name] = torch.zeros(shape, dtype=factor_dtype(weight), device=weight.device)
    state["factor_updates"] = torch.zeros((), dtype=torch.float32, device=weight.device)
    state["conv"] = int(layout.operation == "conv")
    state["groups"] = layout.groups
    state["transposed"] = int(layout.transposed)
    state["bias"] = bias_index


def restored_layout(state: dict[str, Any], weight: Tensor) -> Layout:
    """The layout that `initialise` wrote into the state."""
    dense = 3 if state["groups"] > 1 else 2
    return Layout(
        "conv" if state["conv"] else "linear",
        transposed=bool(state["transposed"]),
        groups=int(state["groups"]),
        bias=state["bias"] >= 0,
        diagonal_A=state["A"].dim() < dense,
        diagonal_G=state["G"].dim() < dense,
    )


class FactorUpdate(NamedTuple):
    """The statistics that move the factors in the state of one weight; where `ok` (0-d bool) is false none move."""

    state: dict[str, Any]
    statistics: Statistics
    decay: float
    ok: Tensor


def update_factors(updates: Sequence[FactorUpdate], *, at_once: bool = False) -> None:
    """Moves A and G of many weights towards their statistics.

    A few rows wait in the state for later ones, but for `at_once`; `settle` brings A and G up to date.
    """
    averages = []
    for state, own, decay, ok in updates:
        k = state["factor_updates"]
        k += ok
        _pad(state, own.layout)
        beta, weight = factors.average_weights(k.to(state["A"].dtype), decay, ok)
        terms, rows = (_tensor(count, state["A"]).clamp(min=1) for count in (own.terms, own.rows))
        if own.sums is not None:
            settle([state])
            for name, total, count in zip("AG", own.sums, (terms, rows), strict=True):
                averaged = beta * state[name] + weight / count * total
                state[name].copy_(torch.where(ok, averaged, state[name]))
            continue
        averages += [
            Update(state, "A", own.a, weight / terms, beta, own.ones, own.layout.diagonal_A),
            Update(state, "G", own.g, weight / rows, beta, False, own.layout.diagonal_G),
        ]
    average.update_(averages, at_once=at_once)


def _pad(state: dict[str, Any], layout: Layout) -> None:
    """Rows of dense factors as the kernels want them, where kernels serve; a loaded state may have others."""
    if ops.fuses(state["A"].device):
        for name, diagonal in (("A", layout.diagonal_A), ("G", layout.diagonal_G)):
            if not diagonal:
                state[name] = ops.padded(state[name])


def settle(states: Sequence[dict[str, Any]]) -> None:
    """Brings A and G up to date with every update so far."""
    average.settle_([(state, name) for state in states for name in "AG"])


class Refresh(NamedTuple):
    """The weight whose inverses are due: its state, its layout and its damping."""

    state: dict[str, Any]
    layout: Layout
    damping: float | Tensor


def update_inverses(refreshes: Sequence[Refresh]) -> list[bool]:
    """Refreshes A_inv and G_inv of many weights; false where no finite inverse was found and the last ones stay."""
    present = [i for i, refresh in enumerate(refreshes) if refresh.state["factor_updates"] > 0]
    settle([refreshes[i].state for i in present])
    found = factors.all_damped_inverses([_pair(refreshes[i]) for i in present])
    done = [True] * len(refreshes)
    for i, inverses in zip(present, found, strict=True):
        if inverses is None:
            done[i] = False
        else:
            refreshes[i].state["A_inv"], refreshes[i].state["G_inv"] = inverses
    return done


def _pair(refresh: Refresh) -> factors.Pair:
    state, layout, damping = refresh
    last = (state["A_inv"], state["G_inv"]) if "A_inv" in state else None
    return factors.Pair(state["A"], state["G"], damping, layout.diagonal_A, layout.diagonal_G, last)


def memory(weight: Tensor, layout: Layout) -> int:
    """Bytes of A and G, with the zeros around them where kernels serve; the inverses take as many again."""
    pads = ops.fuses(weight.device)
    elements = 0
    for shape, diagonal in zip(layout.factor_shapes(weight.shape), (layout.diagonal_A, layout.diagonal_G), strict=True):
        around = shape if diagonal or not pads else (*shape[:-2], *2 * (ops.padded_width(shape[-1]),))
        elements += torch.Size(around).numel()
    return factor_dtype(weight).itemsize * elements


def memory_of_rows(weight: Tensor, layout: Layout) -> int:
    """Bytes for the rows that wait, if a pass brings so few that they do."""
    diagonals = (layout.diagonal_A, layout.diagonal_G)
    sides = zip(layout.dims(weight.shape), diagonals, strict=True) if layout.groups == 1 else ()
    return sum(average.memory(d, factor_dtype(weight)) for d, diagonal in sides if not diagonal)
