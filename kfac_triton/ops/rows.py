"""Forms of the rows of a factor that are not written down, and memory whose rows the kernels load in one piece."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kfac_triton.ops.backends import load

ALIGNMENT = 16  # elements: rows that begin at multiples of 64 bytes of float32


@dataclass(frozen=True)
class Patches:
    """The rows a of a convolution that nobody has written down: an image (N, C, H, W) and how the filter meets it.

    `window`: ten integers, kernel, stride, padding (left, right, top, bottom) and dilation, (height, width) each.
    """

    image: Tensor
    window: tuple[int, ...]
    groups: int

    def rows(self) -> Tensor:
        """(n, d), or (groups, n, d): d = taps * C / groups, the channels innermost."""
        load()
        from kfac_triton.kernels import conv_syrk

        return conv_syrk.patches(self.image, conv_syrk.window_of(self.window), self.groups)

    def count(self) -> int:
        """n, the positions of the filter in all images."""
        load()
        from kfac_triton.kernels import conv_syrk

        down, across = conv_syrk.window_of(self.window).outputs(*self.image.shape[-2:])
        return int(self.image.shape[0]) * down * across


@dataclass(frozen=True)
class OneHot:
    """Rows a that are one-hot: the place of the one in each, `index` (n,); `weight` (n,) multiplies them, 0 or 1."""

    index: Tensor
    width: int
    weight: Tensor | None = None

    def counts(self, dtype: torch.dtype) -> Tensor:
        """The diagonal of sum a a^T, all that it has (width,)."""
        ones = self.index.new_ones(self.index.shape, dtype=dtype) if self.weight is None else self.weight.to(dtype)
        found = torch.zeros(self.width, dtype=dtype, device=self.index.device)
        return found.index_add_(0, self.index, ones)


Rows = Tensor | Patches | OneHot


def padded_width(d: int) -> int:
    """The next multiple of 16."""
    return -(-d // ALIGNMENT) * ALIGNMENT


def padded(t: Tensor) -> Tensor:
    """The square matrices t (..., d, d) as a view of memory (..., D, D) with zeros around them, D the next multiple of
    16: rows that the kernels load and store 16 bytes at a time. t itself where it is such a view, or needs none.
    """
    d = t.shape[-1]
    D = padded_width(d)
    if t.stride()[-2:] == (D, 1) and (t.dim() < 3 or t.stride(0) == D * D):
        return t
    around = t.new_zeros(*t.shape[:-2], D, D)
    around[..., :d, :d] = t
    return around[..., :d, :d]


def whole(t: Tensor) -> Tensor:
    """All of the memory around a view that `padded` made: (..., D, D)."""
    D = padded_width(t.shape[-1])
    return t.as_strided((*t.shape[:-2], D, D), (*t.stride()[:-2], D, 1))
