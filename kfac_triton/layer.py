"""A layer: one weight that has a block, with the bias that shares the block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from kfac_triton.operations.layout import FORMS, OPERATIONS, Layout


@dataclass(frozen=True, eq=False, slots=True)
class Layer:
    """`layout` says how weight and bias are one matrix (d_out, d_in[+1]), and in which form each factor is held."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    layout: Layout

    def is_like(self, other: Layer | None) -> bool:
        """Whether both are the same block."""
        return other is not None and self.layout == other.layout and self.bias is other.bias


def description(layout: Layout, bias: int, approximation: int) -> dict[str, int]:
    """What a state says of a layer, in integers; `bias` counts the model's parameters, -1 for none."""
    return {
        "operation": OPERATIONS.index(layout.operation), "groups": layout.groups,
        "form_A": FORMS.index(layout.A), "form_G": FORMS.index(layout.G),
        "blocks_A": layout.blocks_A, "blocks_G": layout.blocks_G,
        "transposed": int(layout.transposed), "bias": bias, "approximation": approximation,
    }  # fmt: skip


def described(stored: Mapping[str, Any]) -> Layout:
    """The layout that `description` wrote."""
    A, G = (FORMS[int(stored[f"form_{side}"])] for side in "AG")
    return Layout(
        OPERATIONS[int(stored["operation"])],
        transposed=bool(stored["transposed"]),
        groups=int(stored["groups"]),
        bias=stored["bias"] >= 0,
        A=A,
        G=G,
        blocks_A=int(stored["blocks_A"]),
        blocks_G=int(stored["blocks_G"]),
    )
