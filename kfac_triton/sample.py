"""What one pass gave of one layer: the rows of its two factors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kfac_triton.capture.tensors import nbytes
from kfac_triton.joint import wide_dtype
from kfac_triton.layer import Layer
from kfac_triton.ops import Patches, Rows


@dataclass(eq=False, repr=False, slots=True)
class Sample:
    """The rows of one weight in one Fisher pass.

    `a`: matrices (n, d_in), or patches or one-hot rows that are not written; with `ones` a homogeneous coordinate 1 is
    still to be added to every row. `g`: matrices (n, d_out), or (images, n, d_out), gradients of the summed nll; in an
    exact pass one for each output direction.
    `terms`: loss terms L in the pass. `rows`: uses of the weight. A = sum a a^T / terms, G = sum g g^T / rows.
    `sums`: both sums, where they were taken already; then there are no rows. `examples`: for each matrix in `a`, how
    many examples its rows belong to, those of one together; 0 where that is not known, and every row counts as one.
    `uses`: what the pass saw, for what needs the order of time.
    """

    layer: Layer
    a: list[Rows]
    g: list[Tensor]
    terms: float | Tensor
    rows: float | Tensor
    ones: bool
    sums: tuple[Tensor, Tensor] | None = None
    examples: list[int] = field(default_factory=list)
    uses: list[Any] = field(default_factory=list)

    def plain(self) -> int:
        """n, where the rows are one matrix a (n, d_in) and one g (n, d_out) and all of them count; else 0."""
        if self.sums is not None or len(self.a) != 1 or len(self.g) != 1:
            return 0
        a, g, ones = self.a[0], self.g[0], self.layer.layout.bias
        if self.ones is not ones or isinstance(self.terms, Tensor) or not isinstance(a, Tensor):
            return 0
        return int(a.shape[0]) if a.dim() == g.dim() == 2 and a.shape[0] == g.shape[0] else 0

    def written(self) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """What lies in memory of both sides, rows or sums: finite only if the factors are."""
        return (self._written_rows(), self.g) if self.sums is None else ([self.sums[0]], [self.sums[1]])

    def _written_rows(self) -> list[Tensor]:
        written = [rows.image if isinstance(rows, Patches) else rows for rows in self.a]
        return [rows for rows in written if isinstance(rows, Tensor)]


def pass_nbytes(samples: Sequence[Sample]) -> int:
    """Bytes of what the pass of these samples held: what weights received, the gradients that came back, and the rows
    of both; of patches that are not written, the rows of one layer at a time."""
    held: dict[int, int] = {}
    written = 0
    for own in samples:
        images = [rows.image for rows in own.a if isinstance(rows, Patches)]
        seen = [t for use in own.uses for t in (use.recorded.use.x, *use.dys)]
        for t in (*images, *own.written()[0], *own.g, *seen):
            if t.layout == torch.strided:
                held[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            else:  # nested or sparse, without a storage of its own
                held[id(t)] = nbytes(t)
        d_in = own.layer.layout.dims(own.layer.weight.shape)[0]
        of_layer = [rows.count() * rows.groups * d_in for rows in own.a if isinstance(rows, Patches)]
        written = max(written, sum(of_layer) * own.layer.weight.itemsize)
    return sum(held.values()) + written


def tensor_of(count: float | Tensor, like: Tensor) -> Tensor:
    """A count as a 0-d tensor of the wide dtype on the device of `like`."""
    if isinstance(count, Tensor):
        return count.to(like.device, wide_dtype(like))
    return torch.full((), float(count), dtype=wide_dtype(like), device=like.device)
