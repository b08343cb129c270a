"""Block-diagonal Fisher of Kronecker products: F_i = A_i (x) G_i for each weight (Martens & Grosse 2015, section 4).

The functions here work on the state of one weight, a plain dictionary of tensors and numbers that a checkpoint holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kfac_triton import factors
from kfac_triton.approximations import average
from kfac_triton.blocks.layout import Layout


@dataclass
class Statistics:
    """The rows of one weight in one Fisher pass.

    `a`: matrices (n, d_in); with `ones` a homogeneous coordinate 1 is still to be added to every row.
    `g`: matrices (n, d_out), gradients of the summed nll; in an exact pass one for each output direction.
    `terms`: loss terms L in the pass. `rows`: uses of the weight. A = sum a a^T / terms, G = sum g g^T / rows.
    `sums`: both sums, where they were taken already; then there are no rows.
    """

    layout: Layout
    bias: nn.Parameter | None
    a: list[Tensor]
    g: list[Tensor]
    terms: float | Tensor
    rows: float | Tensor
    ones: bool
    sums: tuple[Tensor, Tensor] | None = None

    def present(self) -> Tensor:
        """Whether a loss term and a row are in them (0-d bool)."""
        held = (*self.a, *self.g) if self.sums is None else self.sums
        return (_tensor(self.terms, held[0]) > 0) & (_tensor(self.rows, held[0]) > 0)

    def magnitudes(self) -> list[Tensor]:
        """Norms, finite if and only if the factors from these statistics are."""
        held = (*self.a, *self.g) if self.sums is None else self.sums
        return [torch.linalg.vector_norm(t, dtype=_wide(t.dtype)) for t in held]


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


def update_factors(
    state: dict[str, Any], statistics: Statistics, decay: float, ok: Tensor, *, at_once: bool = False
) -> None:
    """Moves A and G towards the statistics; where `ok` (0-d bool) is false nothing changes.

    A few rows wait in the state for later ones, but for `at_once`; `settle` brings A and G up to date.
    """
    k = state["factor_updates"]
    k += ok
    beta, weight = factors.average_weights(k.to(state["A"].dtype), decay, ok)
    layout = statistics.layout
    terms, rows = (_tensor(count, state["A"]).clamp(min=1) for count in (statistics.terms, statistics.rows))
    if statistics.sums is not None:
        settle(state)
        for name, total, count in zip("AG", statistics.sums, (terms, rows), strict=True):
            averaged = beta * state[name] + weight / count * total
            state[name].copy_(torch.where(ok, averaged, state[name]))
        return
    for name, held, count, ones, diagonal in (
        ("A", statistics.a, terms, statistics.ones, layout.diagonal_A),
        ("G", statistics.g, rows, False, layout.diagonal_G),
    ):
        average.update_(state, name, held, weight / count, beta, bias=ones, diagonal=diagonal, at_once=at_once)


def settle(state: dict[str, Any]) -> None:
    """Brings A and G up to date with every update so far."""
    for name in "AG":
        average.settle_(state, name)


def update_inverses(state: dict[str, Any], layout: Layout, damping: float | Tensor) -> bool:
    """Refreshes A_inv and G_inv; false where no finite inverse was found and the last ones stay."""
    if not state["factor_updates"] > 0:
        return True
    settle(state)
    inverses = factors.damped_inverses(
        state["A"], state["G"], damping, diagonal_A=layout.diagonal_A, diagonal_G=layout.diagonal_G
    )
    if inverses is None:
        return False
    state["A_inv"], state["G_inv"] = inverses
    return True


def memory(weight: Tensor, layout: Layout) -> int:
    """Bytes of A and G; the inverses take as many again."""
    return factor_dtype(weight).itemsize * sum(torch.Size(s).numel() for s in layout.factor_shapes(weight.shape))


def memory_of_rows(weight: Tensor, layout: Layout) -> int:
    """Bytes for the rows that wait, if a pass brings so few that they do."""
    diagonals = (layout.diagonal_A, layout.diagonal_G)
    sides = zip(layout.dims(weight.shape), diagonals, strict=True) if layout.groups == 1 else ()
    return sum(average.memory(d, factor_dtype(weight)) for d, diagonal in sides if not diagonal)
