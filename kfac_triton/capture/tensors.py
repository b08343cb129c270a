"""Tensors of any layout, dense, sparse or nested: in containers, their sizes and versions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def dense(t: Tensor) -> bool:
    """Whether t has axes that can be cut: strided, and not nested."""
    return t.layout == torch.strided and not t.is_nested


def packed(t: Any) -> Any:
    """The values of a jagged tensor, all rows behind one another; anything else as it is."""
    return t.values() if isinstance(t, Tensor) and t.layout == torch.jagged else t


def nbytes(t: Tensor) -> int:
    """Bytes of the values and, in sparse layouts, of the indices."""
    if t.layout == torch.sparse_coo:
        return t._indices().nbytes + t._values().nbytes
    if t.layout in (torch.sparse_csr, torch.sparse_bsr):
        return t.crow_indices().nbytes + t.col_indices().nbytes + t.values().nbytes
    if t.layout in (torch.sparse_csc, torch.sparse_bsc):
        return t.ccol_indices().nbytes + t.row_indices().nbytes + t.values().nbytes
    return t.nbytes


def version(t: Tensor) -> int | None:
    """How often t was written to in place; None where torch does not count, under inference mode."""
    return None if t.is_inference() else t._version


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in tuples, lists and dictionaries, in their order."""
    found: list[Tensor] = []
    ahead = [value]
    while ahead:
        one = ahead.pop()
        if isinstance(one, Tensor):
            found.append(one)
        elif isinstance(one, (tuple, list)):
            ahead.extend(reversed(one))
        elif isinstance(one, dict):
            ahead.extend(reversed([*one.values()]))
    return found
