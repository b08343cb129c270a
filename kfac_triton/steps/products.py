"""Inner products of joint matrices, by layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kfac_triton.joint import Joint, Stack
from kfac_triton.numbers import Numbers, library, shared


class Products:
    """Inner products of two joint matrices, by layer."""

    def __init__(self, stacks: Sequence[Stack]) -> None:
        self._stacks, self._device = stacks, stacks[0].device
        self._prepared: dict[tuple[int, int], tuple[list[Tensor], list[tuple[Tensor, Tensor, Tensor]]]] = {}

    def of(self, left: Joint, right: Joint, index: Any, *, split: bool) -> Numbers:
        """The products of the layers at these `places`, float64; with `split` of weights, and then of biases."""
        key = id(left), id(right)
        if key not in self._prepared:
            self._prepared[key] = self._rooms(left, right)
        found, products = self._prepared[key]
        for a, b, room in products:
            torch.bmm(a, b, out=room)
        whole = _chosen(found, index)
        if not split:
            return whole
        of_biases = _chosen([self._biases(left, right)], index)
        return library(self._device).concatenate([whole - of_biases, of_biases])

    def _rooms(self, left: Joint, right: Joint) -> tuple[list[Tensor], list[tuple[Tensor, Tensor, Tensor]]]:
        """Where the products go, (layers,), and for every stack the matrices as rows and columns, with its place."""
        dtypes = {flat.dtype for flat in left.flats}
        count = sum(len(stack.layers) for stack in self._stacks)
        vectors = {dtype: torch.zeros(count, dtype=dtype, device=self._device) for dtype in dtypes}
        products = []
        for a, b, stack in zip(left.whole, right.whole, self._stacks, strict=True):
            k, vector = len(stack.layers), vectors[stack.dtype]
            products.append((a.view(k, 1, -1), b.view(k, -1, 1), vector[stack.numbers].view(k, 1, 1)))
        return list(vectors.values()), products

    def _biases(self, left: Joint, right: Joint) -> Tensor:
        found = []
        for a, b, stack in zip(left.matrices, right.matrices, self._stacks, strict=True):
            columns = [layer.layout.bias_columns(layer.weight.shape) for layer in stack.layers]
            products = [
                (x[..., -c:] * y[..., -c:]).sum() if c else x.new_zeros(())
                for x, y, c in zip(a, b, columns, strict=True)
            ]
            found.append(torch.stack(products))
        return torch.cat([t.double() for t in found])


def _chosen(vectors: list[Tensor], index: Any) -> Numbers:
    """Those numbers of a vector, float64; of several, one a dtype, each holds zeros where another has the number."""
    return shared(vectors[0].double() if len(vectors) == 1 else torch.stack([v.double() for v in vectors]).sum(0))[
        index
    ]
