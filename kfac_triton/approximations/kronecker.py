"""Block-diagonal Fisher of Kronecker products: F_i = A_i (x) G_i for each weight (Martens & Grosse 2015, section 4).

The functions here work on the state of one weight, a plain dictionary of tensors and numbers that a checkpoint holds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_triton import factors, ops, uncorrelated
from kfac_triton.approximations import average
from kfac_triton.approximations.average import Update
from kfac_triton.blocks.layout import BLOCKS, DENSE, DIAGONAL, FORMS, OPERATIONS, UNCORRELATED, Layout
from kfac_triton.factors import Accumulation, Shape
from kfac_triton.fisher import SeenUse
from kfac_triton.ops import Patches, Rows


@dataclass(eq=False, repr=False)
class Statistics:
    """The rows of one weight in one Fisher pass.

    `a`: matrices (n, d_in), or patches or one-hot rows that are not written; with `ones` a homogeneous coordinate 1 is
    still to be added to every row. `g`: matrices (n, d_out), or (images, n, d_out), gradients of the summed nll; in an
    exact pass one for each output direction.
    `terms`: loss terms L in the pass. `rows`: uses of the weight. A = sum a a^T / terms, G = sum g g^T / rows.
    `sums`: both sums, where they were taken already; then there are no rows. `examples`: for each matrix in `a`, how
    many examples its rows belong to, those of one together; 0 where that is not known, and every row counts as one.
    `uses`: what the pass saw, for what needs the order of time.
    """

    layout: Layout
    bias: nn.Parameter | None
    a: list[Rows]
    g: list[Tensor]
    terms: float | Tensor
    rows: float | Tensor
    ones: bool
    sums: tuple[Tensor, Tensor] | None = None
    examples: list[int] = field(default_factory=list)
    uses: list[SeenUse] = field(default_factory=list)

    def present(self) -> Tensor:
        """Whether a loss term and a row are in them (0-d bool)."""
        held = self._tensors()[0]
        return (tensor_of(self.terms, held) > 0) & (tensor_of(self.rows, held) > 0)

    def sizes(self) -> tuple[Tensor, Tensor]:
        """How large A and G of these statistics are, 0-d: their traces where there are rows, the norms of sums. Finite
        if and only if the factors are."""
        sides = (self._written_rows(), self.g) if self.sums is None else ([self.sums[0]], [self.sums[1]])
        held = self._tensors()[0]
        sizes = []
        for tensors, count in zip(sides, (self.terms, self.rows), strict=True):
            norms = [torch.linalg.vector_norm(t, dtype=_wide(t.dtype)) for t in tensors]
            total = torch.stack(norms) if norms else held.new_zeros(1, dtype=_wide(held.dtype))
            total = total if self.sums is not None else total.square()
            sizes.append(total.sum() / tensor_of(count, held).clamp(min=1))
        return sizes[0], sizes[1]

    def _written_rows(self) -> list[Tensor]:
        written = [rows.image if isinstance(rows, Patches) else rows for rows in self.a]
        return [rows for rows in written if isinstance(rows, Tensor)]

    def _tensors(self) -> list[Tensor]:
        return list(self.sums) if self.sums is not None else [*self._written_rows(), *self.g]


def typical(state: dict[str, Any], own: Statistics, sizes: tuple[Tensor, Tensor], decay: float) -> Tensor:
    """Whether statistics are no outlier, 0-d bool: not far larger than those before.

    One batch that is a thousand times larger would stand in the averages for hundreds of updates, and hold its layer
    still. A lasting change is let in after some updates, since what is usual moves towards it with each of them.
    """
    return _note_size(state, "A", sizes[0], decay, own.layout.operation == "scale") & _note_size(
        state, "G", sizes[1], decay, True
    )


def _note_size(state: dict[str, Any], name: str, new: Tensor, decay: float, of_gradients: bool) -> Tensor:
    """Whether a factor of this size is usual; moves the running average of what is."""
    known: Tensor = state.get(f"{name}_size", torch.zeros_like(new))
    outlier = (known > 0) & (new > (factors.OUTLIER_GRADIENTS if of_gradients else factors.OUTLIER) * known)
    counted = torch.where(outlier, factors.LASTING * known, new)
    k = state.get("factor_updates", torch.zeros_like(known)) + 1
    beta, share = factors.average_weights(k.to(new.dtype), decay, torch.isfinite(new))
    moved = torch.where(known > 0, beta * known + share * counted, counted)
    state[f"{name}_size"] = torch.where(torch.isfinite(new), moved, known)
    return ~outlier


def tensor_of(count: float | Tensor, like: Tensor) -> Tensor:
    """A count as a 0-d tensor of the wide dtype on the device of `like`."""
    if isinstance(count, Tensor):
        return count.to(like.device, _wide(like.dtype))
    return torch.full((), float(count), dtype=_wide(like.dtype), device=like.device)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def factor_dtype(weight: Tensor) -> torch.dtype:
    """float64 for a float64 weight, else float32."""
    return _wide(weight.dtype)


def initialise(state: dict[str, Any], weight: Tensor, layout: Layout, bias_index: int, *, factors: bool = True) -> None:
    """Space for the factors, which hold nothing until the first data; `bias_index` counts the model's parameters.

    Without `factors` only what describes the block: something else stands in their place.
    """
    for name, shape in zip("AG", layout.factor_shapes(weight.shape) if factors else (), strict=False):
        state[name] = torch.zeros(shape, dtype=factor_dtype(weight), device=weight.device)
        if buffered(layout, name):
            state |= {**dict.fromkeys(average.buffers(name, shape[-1]), 0), f"{name}_waiting": 0}
    state["factor_updates"] = torch.zeros((), dtype=torch.float32, device=weight.device)
    state["operation"] = OPERATIONS.index(layout.operation)
    state["groups"] = layout.groups
    for side in "AG":
        state[f"form_{side}"] = FORMS.index(getattr(layout, side))
        state[f"blocks_{side}"] = getattr(layout, f"blocks_{side}")
    state["transposed"] = int(layout.transposed)
    state["bias"] = bias_index


def buffered(layout: Layout, name: str) -> bool:
    """Whether rows of the factor may wait in the state for later ones."""
    return getattr(layout, name) not in (DIAGONAL, BLOCKS) and layout.groups == 1


def restored_layout(state: Mapping[str, Any], weight: Tensor) -> Layout:
    """The layout that `initialise` wrote into the state."""
    A, G = (FORMS[int(state[f"form_{side}"])] for side in "AG")
    return Layout(
        OPERATIONS[int(state["operation"])],
        transposed=bool(state["transposed"]),
        groups=int(state["groups"]),
        bias=state["bias"] >= 0,
        A=A,
        G=G,
        blocks_A=int(state["blocks_A"]),
        blocks_G=int(state["blocks_G"]),
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
        terms, rows = (tensor_of(count, state["A"]).clamp(min=1) for count in (own.terms, own.rows))
        if own.sums is not None:
            settle([state])
            for name, total, count in zip("AG", own.sums, (terms, rows), strict=True):
                averaged = beta * state[name] + weight / count * total
                state[name].copy_(torch.where(ok, averaged, state[name]))
            continue
        for name, given, share, ones in (("A", own.a, weight / terms, own.ones), ("G", own.g, weight / rows, False)):
            form = getattr(own.layout, name)
            matrices, lack_ones = by_form(given, form, state[name], ones)
            averages.append(Update(state, name, matrices, share, beta, lack_ones, form == DIAGONAL))
    average.update_(averages, at_once=at_once)


def by_form(rows: Sequence[Rows], form: str, F: Tensor, ones: bool) -> tuple[Sequence[Rows], bool]:
    """The row matrices as an average F of that form takes them, and whether they still lack the homogeneous 1."""
    if form != BLOCKS:
        return rows, ones
    return [blocked(X, F.shape, ones) for X in rows], False


def blocked(X: Rows, shape: torch.Size, ones: bool) -> Tensor:
    """Rows (n, d), with a homogeneous 1 where there are `ones`, by the blocks of a factor (b, w, w): (b, n, w)."""
    assert isinstance(X, Tensor)
    rows = F.pad(X.flatten(0, -2), (0, 1), value=1.0) if ones else X.flatten(0, -2)
    b, w = shape[:2]
    by_block: Tensor = F.pad(rows, (0, b * w - rows.shape[-1])).unflatten(-1, (b, w))
    return by_block.transpose(0, 1)


def sums_of(statistics: Statistics, weight: Tensor) -> tuple[Tensor, Tensor]:
    """sum a a^T / L and sum g g^T / rows of statistics whose sides are dense or diagonal."""
    layout, counts = statistics.layout, (statistics.terms, statistics.rows)
    totals: list[Tensor] = list(statistics.sums or ())
    if not totals:
        shapes = layout.factor_shapes(weight.shape)
        totals = [torch.zeros(s, dtype=factor_dtype(weight), device=weight.device) for s in shapes]
        one = torch.ones((), dtype=totals[0].dtype, device=weight.device)
        sides: Sequence[tuple[Sequence[Rows], bool, str]] = (
            (statistics.a, statistics.ones, layout.A),
            (statistics.g, False, layout.G),
        )
        factors.accumulate_(
            [
                Accumulation(total, rows, one, one, ones, form == DIAGONAL)
                for total, (rows, ones, form) in zip(totals, sides, strict=True)
            ]
        )
    A, G = (total / tensor_of(count, total).clamp(min=1) for total, count in zip(totals, counts, strict=True))
    return A, G


def _pad(state: dict[str, Any], layout: Layout) -> None:
    """Rows of dense factors as the kernels want them, where kernels serve; a loaded state may have others."""
    if ops.fuses(state["A"].device):
        for name in "AG":
            if getattr(layout, name) == DENSE:
                state[name] = ops.padded(state[name])


def settle(states: Sequence[dict[str, Any]]) -> None:
    """Brings A and G up to date with every update so far."""
    average.settle_([(state, name) for state in states for name in "AG"])


class Refresh(NamedTuple):
    """The weight whose inverses are due: its state, its layout, its damping, and the shape of the weight."""

    state: dict[str, Any]
    layout: Layout
    damping: float | Tensor
    weight_shape: torch.Size


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
    state, layout, damping, weight_shape = refresh
    last = (state["A_inv"], state["G_inv"]) if "A_inv" in state else None
    A, G = shapes(layout, weight_shape)
    whole = layout.operation in ("scale", "position")
    return factors.Pair(state["A"], state["G"], damping, A, G, last, whole)


def written_out(F: Tensor, shape: Shape) -> Tensor:
    """The factor as it stands for all its rows: dense, or the diagonal."""
    if shape.form == BLOCKS:
        whole: Tensor = torch.block_diag(*F)
        return whole[: shape.d, : shape.d]
    return uncorrelated.expanded(F, shape.taps, shape.bias) if shape.form == UNCORRELATED else F


def shapes(layout: Layout, weight_shape: torch.Size) -> tuple[Shape, Shape]:
    """What the factors of a weight stand for."""
    d_in, d_out = layout.dims(weight_shape)
    return Shape(d_in, layout.A, layout.taps(weight_shape), layout.bias), Shape(d_out, layout.G)


def memory(weight: Tensor, layout: Layout) -> tuple[int, int]:
    """Bytes of (A and G, their inverses), with the zeros around dense ones where kernels serve."""
    pads = ops.fuses(weight.device)

    def bytes_of(shapes: tuple[tuple[int, ...], ...]) -> int:
        elements = 0
        for shape, form in zip(shapes, (layout.A, layout.G), strict=True):
            around = shape if form != DENSE or not pads else (*shape[:-2], *2 * (ops.padded_width(shape[-1]),))
            elements += torch.Size(around).numel()
        return factor_dtype(weight).itemsize * elements

    return bytes_of(layout.factor_shapes(weight.shape)), bytes_of(layout.inverse_shapes(weight.shape))


def memory_of_rows(weight: Tensor, layout: Layout) -> int:
    """Bytes for the rows that wait, if a pass brings so few that they do."""
    sides = zip("AG", layout.factor_shapes(weight.shape), strict=True)
    return sum(average.memory(shape[-1], factor_dtype(weight)) for name, shape in sides if buffered(layout, name))
