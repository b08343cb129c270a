"""Convolutions over one, two and three axes, and their transposes: Kronecker factors for convolution, KFC (Grosse &
Martens 2016, section 3).

A row is one output position: a = the patch under the kernel (d_in = kernel positions * C_in / groups, in that order:
see `layout`), g = dL/dy at that position (d_out = C_out / groups). With a row for each of |T| positions of N
examples, A = sum a a^T / L carries the factor |T| and G = sum g g^T / (N |T|), the paper's Omega and Gamma.
A one-dimensional convolution is a two-dimensional one of height 1. Groups are independent blocks.

A transposed convolution is the convolution of its input with zeros put between the pixels, stride - 1 of them, and the
filter turned round: that has the same positions, patches and gradients.

With `uncorrelated`, the moments of single pixels stand for those of patches (the paper's spatially uncorrelated
activations): see `Layout` and `kfac_triton.linalg.uncorrelated`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kfac_triton import ops
from kfac_triton.operations.use import ATEN, Resolve, Use
from kfac_triton.ops import Patches, Rows


@dataclass(eq=False, repr=False)
class ConvUse(Use):
    """`kernel`, `stride`, `dilation`: by axis, the last one last; `padding`: zeros around x as F.pad takes them, the
    last axis first. `axes`: of the convolution; one of one axis has a height of 1. Of a transposed convolution these
    are those of the convolution that it is, and `spread` the distance of x's pixels in its image."""

    kernel: tuple[int, ...] = (1, 1)
    stride: tuple[int, ...] = (1, 1)
    padding: tuple[int, ...] = (0, 0, 0, 0)
    dilation: tuple[int, ...] = (1, 1)
    axes: int = 2
    spread: tuple[int, ...] = (1, 1)

    operation = "conv"

    def _image(self, t: Tensor) -> Tensor:
        """t as (N, C, [D,] H, W), whatever of N and H was left out."""
        if t.dim() == self.axes + 1:
            t = t.unsqueeze(0)
        return t.unsqueeze(2) if self.axes == 1 else t

    def _spread(self) -> Tensor:
        """The image, with zeros between the pixels where the convolution is a transposed one."""
        image = self._image(self.x)
        if all(step == 1 for step in self.spread):
            return image
        sizes = [(n - 1) * step + 1 for n, step in zip(image.shape[2:], self.spread, strict=True)]
        wide = image.new_zeros(*image.shape[:2], *sizes)
        places = wide
        for axis, step in enumerate(self.spread, start=2):
            places = places[(slice(None),) * axis + (slice(None, None, step),)]
        places.copy_(image)
        return wide

    def _planes(self) -> list[Patches]:
        """The patches; of a convolution over three axes a set for each depth of the kernel."""
        image, window = self._spread(), (*self.kernel[-2:], *self.stride[-2:], *self.padding[:4], *self.dilation[-2:])
        if any(zeros < 0 for zeros in self.padding):
            image, window = F.pad(image, self.padding), (*window[:4], 0, 0, 0, 0, *window[8:])
        elif self.axes == 3:
            image = F.pad(image, (0, 0, 0, 0, *self.padding[4:]))
        if self.axes < 3:
            return [Patches(image, window, self.groups)]
        reach = self.dilation[0] * (self.kernel[0] - 1)
        depths = range((image.shape[2] - reach - 1) // self.stride[0] + 1)
        planes = []
        for tap in range(self.kernel[0]):
            first = tap * self.dilation[0]
            at = image[:, :, first : first + (len(depths) - 1) * self.stride[0] + 1 : self.stride[0]]
            planes.append(Patches(at.transpose(1, 2).flatten(0, 1), window, self.groups))
        return planes

    def a(self) -> Tensor:
        planes = [patches.rows() for patches in self._planes()]
        rows = planes[0] if len(planes) == 1 else torch.cat(planes, dim=-1)
        if not self.transposed:
            return rows
        by_taps: Tensor = rows.unflatten(-1, (math.prod(self.kernel), -1))
        return by_taps.flip(-2).flatten(-2)

    def a_unwritten(self) -> Rows:
        simple = not self.transposed and self.axes < 3 and ops.takes_patches(self._image(self.x), self.groups)
        return self._planes()[0] if simple else self.a()

    def pixels(self) -> Tensor:
        """Rows [x, 1] of the pixels, zeros around included, each times the root of the share of taps that it meets: so
        that their second moments are those of a tap, on average over all (n, C + 1), or (groups, n, C / groups + 1)."""
        padded = F.pad(self._spread(), self.padding) if any(self.padding) else self._spread()
        share = self._meetings(padded.shape[2:], padded).sqrt()
        image = torch.cat([padded, torch.ones_like(padded[:, :1]).expand(-1, self.groups, *padded.shape[2:])], dim=1)
        image = image * share
        pixels, ones = image.flatten(2).split([padded.shape[1], self.groups], dim=1)
        by_group = torch.cat([pixels.unflatten(1, (self.groups, -1)), ones.unsqueeze(2)], dim=2)
        rows = by_group.permute(1, 0, 3, 2).flatten(1, 2)
        return rows if self.groups > 1 else rows[0]

    def _meetings(self, sizes: Sequence[int], like: Tensor) -> Tensor:
        """The share of the kernel's taps under which a pixel comes to lie, summed over the output positions."""
        share = torch.ones((), dtype=like.dtype, device=like.device)
        for size, kernel, stride, dilation in zip(sizes, self.kernel, self.stride, self.dilation, strict=True):
            outputs = (size - dilation * (kernel - 1) - 1) // stride + 1
            met = torch.zeros(size, dtype=like.dtype, device=like.device)
            for tap in range(kernel):
                first = tap * dilation
                met[first : first + (outputs - 1) * stride + 1 : stride] += 1 / kernel
            share = share.unsqueeze(-1) * met
        return share

    def g(self, dy: Tensor) -> Tensor:
        return self.g_by_images(dy).flatten(-3, -2)

    def g_by_images(self, dy: Tensor) -> Tensor:
        if self.axes == 3:  # rows by image and depth, as the planes of `a` have them
            dy = self._image(dy).transpose(1, 2).flatten(0, 1)
            positions = dy.flatten(2)
        else:
            positions = self._image(dy).flatten(2)
        if self.groups == 1:
            return positions.transpose(1, 2)
        by_group: Tensor = positions.unflatten(1, (self.groups, -1))
        return by_group.permute(1, 0, 3, 2)


def _by_axis(value: int | Sequence[int], axes: int, fill: int) -> tuple[int, ...]:
    """An argument of a convolution by axis, two of them at least."""
    values = [value] * axes if isinstance(value, int) else list(value) * (axes if len(value) == 1 else 1)
    return (fill, int(values[0])) if axes == 1 else tuple(map(int, values))


def _padding(padding: Any, kernel: tuple[int, ...], dilation: tuple[int, ...], axes: int) -> tuple[int, ...]:
    """As F.pad takes it, the last axis first; "same" puts the odd zero behind, as torch does."""
    if padding == "same":
        around = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        return tuple(zeros for total in reversed(around) for zeros in (total // 2, total - total // 2))
    sides = (0,) * len(kernel) if padding == "valid" else _by_axis(padding, axes, 0)
    return tuple([zeros for side in reversed(sides) for zeros in (side, side)])


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
        kernel = _by_axis(weight.shape[2:], axes, 1)
        rate = _by_axis(dilation, axes, 1)
        return ConvUse(
            part,
            resolve(bias),
            input.detach(),
            groups=groups,
            kernel=kernel,
            stride=_by_axis(stride, axes, 1),
            padding=_padding(padding, kernel, rate, axes),
            dilation=rate,
            axes=axes,
            spread=(1,) * len(kernel),
        )

    return match


def _transposed_matcher(axes: int) -> Callable[..., Use | None]:
    def match(
        resolve: Resolve,
        input: Any,
        weight: Any,
        bias: Any = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        dilation: Any = 1,
    ) -> ConvUse | None:
        part = resolve(weight)
        if part is None or not part.whole or part.transposed or weight.shape != part.parameter.shape:
            return None
        kernel, rate = _by_axis(weight.shape[2:], axes, 1), _by_axis(dilation, axes, 1)
        cut, more = _by_axis(padding, axes, 0), _by_axis(output_padding, axes, 0)
        around: list[int] = []
        for k, d, p, behind in reversed(list(zip(kernel, rate, cut, more, strict=True))):
            around += [d * (k - 1) - p, d * (k - 1) - p + behind]
        return ConvUse(
            part,
            resolve(bias),
            input.detach(),
            transposed=True,
            groups=groups,
            kernel=kernel,
            stride=(1,) * len(kernel),
            padding=tuple(around),
            dilation=rate,
            axes=axes,
            spread=_by_axis(stride, axes, 1),
        )

    return match


def _match_convolution(
    resolve: Resolve, input: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, transposed: bool,
    output_padding: Any, groups: int,
) -> Use | None:  # fmt: skip
    """Any of them, as decomposed programs call it."""
    axes = weight.dim() - 2
    if transposed:
        match = _transposed_matcher(axes)
        return match(resolve, input, weight, bias, stride, padding, output_padding, groups, dilation)
    return _matcher(axes)(resolve, input, weight, bias, stride, padding, dilation, groups)


MATCHERS: dict[Any, Callable[..., Use | None]] = {
    F.conv1d: _matcher(1),
    F.conv2d: _matcher(2),
    F.conv3d: _matcher(3),
    F.conv_transpose1d: _transposed_matcher(1),
    F.conv_transpose2d: _transposed_matcher(2),
    F.conv_transpose3d: _transposed_matcher(3),
    ATEN.conv1d.default: _matcher(1),
    ATEN.conv1d.padding: _matcher(1),
    ATEN.conv2d.default: _matcher(2),
    ATEN.conv2d.padding: _matcher(2),
    ATEN.conv3d.default: _matcher(3),
    ATEN.conv3d.padding: _matcher(3),
    ATEN.conv_transpose1d.default: _transposed_matcher(1),
    ATEN.conv_transpose2d.input: _transposed_matcher(2),
    ATEN.conv_transpose3d.input: _transposed_matcher(3),
    ATEN.convolution.default: _match_convolution,
}
