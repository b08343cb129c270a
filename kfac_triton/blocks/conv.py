"""Convolutions over one and two axes: Kronecker factors for convolution, KFC (Grosse & Martens 2016, section 3).

A row is one output position: a = the patch under the kernel (d_in = kernel positions * C_in / groups, in that order:
see `layout`), g = dL/dy at that position (d_out = C_out / groups). With a row for each of |T| positions of N
examples, A = sum a a^T / L carries the factor |T| and G = sum g g^T / (N |T|), the paper's Omega and Gamma.
A one-dimensional convolution is a two-dimensional one of height 1. Groups are independent blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from kfac_triton import ops
from kfac_triton.blocks.linear import Resolve
from kfac_triton.blocks.use import Use
from kfac_triton.ops import Patches, Rows


@dataclass(frozen=True)
class ConvUse(Use):
    """`kernel`, `stride`, `dilation`: (height, width); `padding`: (left, right, top, bottom) zeros around x."""

    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    axes: int = 2

    operation = "conv"

    def _image(self, t: Tensor) -> Tensor:
        """t as (N, C, H, W), whatever of N and H was left out."""
        if t.dim() == self.axes + 1:
            t = t.unsqueeze(0)
        return t.unsqueeze(2) if self.axes == 1 else t

    def _patches(self) -> Patches:
        window = (*self.kernel, *self.stride, *self.padding, *self.dilation)
        return Patches(self._image(self.x), window, self.groups)

    def a(self) -> Tensor:
        return self._patches().rows()

    def a_unwritten(self) -> Rows:
        return self._patches() if ops.takes_patches(self._image(self.x), self.groups) else self.a()

    def g(self, dy: Tensor) -> Tensor:
        return self.g_by_images(dy).flatten(-3, -2)

    def g_by_images(self, dy: Tensor) -> Tensor:
        positions = self._image(dy).flatten(2)
        if self.groups == 1:
            return positions.transpose(1, 2)
        by_group: Tensor = positions.unflatten(1, (self.groups, -1))
        return by_group.permute(1, 0, 3, 2)


def _pair(value: int | Sequence[int], axes: int, fill: int) -> tuple[int, int]:
    """An argument of a convolution as (height, width)."""
    values = [value] * axes if isinstance(value, int) else list(value) * (axes if len(value) == 1 else 1)
    return (fill, int(values[0])) if axes == 1 else (int(values[0]), int(values[1]))


def _padding(padding: Any, kernel: tuple[int, int], dilation: tuple[int, int], axes: int) -> tuple[int, int, int, int]:
    """(left, right, top, bottom); "same" puts the odd zero behind, as torch does."""
    if padding == "same":
        height, width = (d * (k - 1) for k, d in zip(kernel, dilation, strict=True))
        return width // 2, width - width // 2, height // 2, height - height // 2
    vertical, horizontal = (0, 0) if padding == "valid" else _pair(padding, axes, 0)
    return horizontal, horizontal, vertical, vertical


def _matcher(axes: int) -> Callable[..., Use | None]:
    def match(
        resolve: Resolve,
        input: Any,
        weight: Any,
        bias: Any = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> ConvUse | None:
        part = resolve(weight)
        if part is None or not part.whole or part.transposed or weight.shape != part.parameter.shape:
            return None
        kernel = _pair(weight.shape[2:], axes, 1)
        rate = _pair(dilation, axes, 1)
        return ConvUse(
            part,
            resolve(bias),
            input.detach(),
            groups=groups,
            kernel=kernel,
            stride=_pair(stride, axes, 1),
            padding=_padding(padding, kernel, rate, axes),
            dilation=rate,
            axes=axes,
        )

    return match


MATCHERS: dict[Any, Callable[..., Use | None]] = {F.conv1d: _matcher(1), F.conv2d: _matcher(2)}
