"""Which structure serves a stack of layers under which settings."""

from __future__ import annotations

from kfac_triton.distributed import Ranks
from kfac_triton.joint import Stack
from kfac_triton.operations.layout import DENSE
from kfac_triton.structures.base import Structure
from kfac_triton.structures.ekfac import Ekfac
from kfac_triton.structures.inverse_free import InverseFree
from kfac_triton.structures.kronecker import Kronecker
from kfac_triton.structures.temporal import TemporalChain


def structure_of(stack: Stack, ranks: Ranks, approximation: str, temporal: str) -> Structure:
    """The structure of a stack under these settings."""
    layout = stack.layers[0].layout
    dense = layout.A == layout.G == DENSE
    if approximation == "inverse_free":
        return InverseFree(stack, ranks)
    if approximation == "eigen" and dense:
        return Ekfac(stack, ranks)
    if temporal != "independent" and dense and layout.operation == "recurrent":
        return TemporalChain(stack, ranks, symmetric=temporal == "chain_symmetric")
    return Kronecker(stack, ranks)
