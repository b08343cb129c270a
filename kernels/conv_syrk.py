"""The patch factor of a convolution, without the patches: F <- beta F + alpha Pa^T Pa (KFC, Grosse & Martens 2016).

P (n, d) has a row for each output position of an image (N, C, H, W), n = N OH OW, and a column for each weight of one
filter, d = kh kw C / groups, channels innermost: column (tap_row kw + tap_column) C / groups + channel. With `bias`, Pa
is [P, 1]. F is (D, D), D = d + 1 with `bias` and d without, or (groups, D, D).

It takes the n d (d + 1) operations of `syrk`, and reads the image kh kw times from the caches, where the patches would
be written once and read once for each tile of a row: kh kw times the image, which most often is the largest tensor of
the step. An element's place follows from its row (which position) and its column (which tap and channel), two offsets
that are added; where C / groups is a multiple of 16, sixteen bytes of a column's neighbours lie together, and one mask
for them says whether the tap falls into the padding. No stride, dilation or padding makes it compute what is not
wanted, as a product of shifted images would.

One program of the kernel computes a square tile (i, j), i >= j, of one matrix and stores it twice, or one block of the
border's column sums, or a part of one of these.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kfac_triton.kernels import dispatch, syrk, tiles
from kfac_triton.kernels._ahead import compile_ahead
from kfac_triton.kernels._launch import (
    HALF,
    addresses,
    aligned,
    attempt,
    buckets,
    device_of,
    jit,
    precision_of,
    register,
    table_of,
    tl,
    triton_dtype,
    type_named,
)
from kfac_triton.kernels._symmetric import (
    part_of,
    pointer,
    reduce_kernel,
    store_border,
    store_border_part,
    store_part,
    store_tile,
    triangle,
    triangle_of,
    weights,
    workspace_for,
)
from kfac_triton.kernels.tiles import Choice, Tile


class Window(NamedTuple):
    """How a filter meets an image: sizes and steps as (height, width), zeros around it as torch.nn.functional.pad's."""

    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)

    def outputs(self, height: int, width: int) -> tuple[int, int]:
        """Positions of the filter, down and across."""
        left, right, top, bottom = self.padding
        down, across = (
            (size + zeros - dilation * (kernel - 1) - 1) // stride + 1
            for size, zeros, dilation, kernel, stride in zip(
                (height, width), (top + bottom, left + right), self.dilation, self.kernel, self.stride, strict=True
            )
        )
        return down, across

    def flat(self) -> list[int]:
        """As an operator takes it: ten integers."""
        return [*self.kernel, *self.stride, *self.padding, *self.dilation]


def window_of(flat: Sequence[int]) -> Window:
    """The inverse of `Window.flat`."""
    return Window((flat[0], flat[1]), (flat[2], flat[3]), (flat[4], flat[5], flat[6], flat[7]), (flat[8], flat[9]))


def patches(image: Tensor, window: Window, groups: int) -> Tensor:
    """P (n, d), or (groups, n, d) where there are several."""
    pixels = image.movedim(1, -1).contiguous()
    if any(window.padding):
        pixels = torch.nn.functional.pad(pixels, (0, 0, *window.padding))
    for axis in (1, 2):
        reach = window.dilation[axis - 1] * (window.kernel[axis - 1] - 1) + 1
        pixels = pixels.unfold(axis, reach, window.stride[axis - 1])[..., :: window.dilation[axis - 1]]
    by_group = pixels.unflatten(3, (groups, -1))  # (N, down, across, groups, C / groups, taps down, taps across)
    taps = window.kernel[0] * window.kernel[1]
    rows: Tensor = by_group.permute(3, 0, 1, 2, 5, 6, 4).reshape(groups, -1, by_group.shape[4] * taps)
    return rows if groups > 1 else rows[0]


def reference(F: Tensor, image: Tensor, alpha: Tensor, beta: Tensor, bias: bool, window: Window) -> None:
    """The specification: `syrk` of the patches."""
    syrk.reference(F, patches(image, window, _groups(F)), alpha, beta, bias)


def _groups(F: Tensor) -> int:
    return F.shape[0] if F.ndim > 2 else 1


# Chosen as syrk's, with the addresses of patches in the loop: no register spilled on any target.
TILES = {
    "half": (Tile(128, 64, 8, 3), Tile(64, 64, 4, 3), Tile(32, 64, 4, 3)),
    "float32": (Tile(64, 32, 4, 3), Tile(32, 32, 2, 3)),
}


@jit
def _offsets(column, channels, taps_across, H_step, W_step, H_dilation, W_dilation):  # type: ignore[no-untyped-def]
    """(how far down, how far across, offset in the image) of a column's tap and channel, from a patch's corner."""
    tap = column // channels
    down = tap // taps_across * H_dilation
    across = tap % taps_across * W_dilation
    return down, across, down.to(tl.int64) * H_step + across.to(tl.int64) * W_step + column % channels


@jit
def _load(  # type: ignore[no-untyped-def]
    image, row, down, across, offset, inside, n, positions, positions_across, height, width, H_stride, W_stride,
    top, left, N_step, H_step, W_step,
):  # fmt: skip
    """P[row, column] for columns with those offsets, zero beyond the image; `inside` says which columns there are."""
    position = row % positions
    corner_down = position // positions_across * H_stride - top
    corner_across = position % positions_across * W_stride - left
    corner = (row // positions).to(tl.int64) * N_step
    corner += corner_down.to(tl.int64) * H_step + corner_across.to(tl.int64) * W_step
    y = corner_down[:, None] + down[None, :]
    x = corner_across[:, None] + across[None, :]
    mask = (row[:, None] < n) & inside[None, :] & (y >= 0) & (y < height) & (x >= 0) & (x < width)
    return tl.load(image + corner[:, None] + offset[None, :], mask=mask, other=0.0)


@jit
def conv_syrk_kernel(  # type: ignore[no-untyped-def]
    table, workspace, count, parts, n, d, channels, taps_across, positions, positions_across, height, width,
    H_stride, W_stride, top, left, H_dilation, W_dilation, F_row, N_step, H_step, W_step,
    BIAS: tl.constexpr, SPLIT: tl.constexpr, UNIT: tl.constexpr, INPUT: tl.constexpr, ALPHA: tl.constexpr,
    BETA: tl.constexpr, F_ALIGNED: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """F_e <- beta_e F_e + alpha_e Pa^T Pa, for e < count.

    table (4, count) int64 holds the addresses of F (D, D) float32 with strides (F_row, 1), of the image's first channel
    of that group, type INPUT, strides (N_step, H_step, W_step, 1), and of the scalars alpha and beta. d, channels (of a
    group) and the strides of the image count UNITs of 16 bytes, or elements where UNIT is 1. The grid is that of
    `syrk_kernel`.
    """
    d *= UNIT
    channels *= UNIT
    N_step *= UNIT
    H_step *= UNIT
    W_step *= UNIT
    side = tl.cdiv(d, BLOCK)
    tiles = side * (side + 1) // 2
    programs = tiles + side if BIAS else tiles
    index = tl.program_id(0) % programs
    part = tl.program_id(0) // programs % parts
    entry = tl.program_id(0) // programs // parts
    F = pointer(table, 0, count, entry, tl.float32, F_ALIGNED)
    image = pointer(table, 1, count, entry, INPUT, UNIT > 1)
    a, b = weights(table, count, entry, ALPHA, BETA)
    present = tl.where(a == 0.0, 0, tl.cdiv(n, BLOCK_K))  # alpha = 0 reads nothing, so nothing in it can spread
    first, last = part_of(present, part, parts)
    at_k = tl.arange(0, BLOCK_K)
    if index < tiles:
        i, j = triangle(index)
        at_i = i * BLOCK + tl.arange(0, BLOCK)
        at_j = j * BLOCK + tl.arange(0, BLOCK)
        down_i, across_i, offset_i = _offsets(at_i, channels, taps_across, H_step, W_step, H_dilation, W_dilation)
        down_j, across_j, offset_j = _offsets(at_j, channels, taps_across, H_step, W_step, H_dilation, W_dilation)
        product = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
        for step in tl.range(first, last):
            row = step * BLOCK_K + at_k
            x_i = _load(image, row, down_i, across_i, offset_i, at_i < d, n, positions, positions_across, height, width,
                        H_stride, W_stride, top, left, N_step, H_step, W_step)  # fmt: skip
            x_j = _load(image, row, down_j, across_j, offset_j, at_j < d, n, positions, positions_across, height, width,
                        H_stride, W_stride, top, left, N_step, H_step, W_step)  # fmt: skip
            product = tl.dot(tl.trans(x_i), x_j, product, input_precision=PRECISION)
        if SPLIT:
            store_part(workspace, entry, part, parts, index, programs, product, BLOCK)
        else:
            store_tile(F, i, j, d, F_row, product, a, b, BLOCK)
    elif BIAS:
        at_i = (index - tiles) * BLOCK + tl.arange(0, BLOCK)
        down_i, across_i, offset_i = _offsets(at_i, channels, taps_across, H_step, W_step, H_dilation, W_dilation)
        sums = tl.zeros((BLOCK_K, BLOCK), dtype=tl.float32)
        for step in tl.range(first, last):
            row = step * BLOCK_K + at_k
            x_i = _load(image, row, down_i, across_i, offset_i, at_i < d, n, positions, positions_across, height, width,
                        H_stride, W_stride, top, left, N_step, H_step, W_step)  # fmt: skip
            sums += x_i.to(tl.float32)
        if SPLIT:
            store_border_part(workspace, entry, part, parts, index, programs, tl.sum(sums, axis=0), BLOCK)
        else:
            store_border(F, index - tiles, d, F_row, tl.sum(sums, axis=0), n, a, b, BLOCK)


class Entry(NamedTuple):
    """One average, F (D, D) or (groups, D, D), and the image (N, C, H, W) that goes into it."""

    F: Tensor
    image: Tensor
    alpha: Tensor
    beta: Tensor
    bias: bool
    window: Window


def channels_last(image: Tensor) -> Tensor:
    """The image as (N, H, W, C), its channels next to one another: a view where they are."""
    last = image.permute(0, 2, 3, 1)
    return last if last.stride(-1) == 1 else last.contiguous()


def unit_of(images: Sequence[Tensor], groups: int) -> int:
    """Elements in 16 bytes, where all addresses, strides and channels of images (N, H, W, C) are whole multiples."""
    first = images[0]
    unit = 16 // first.element_size()
    apart = [stride for stride, size in zip(first.stride()[:-1], first.shape[:-1], strict=True) if size > 1]
    whole = first.shape[-1] // groups % unit == 0 and all(stride % unit == 0 for stride in apart)
    return unit if whole and aligned([image.data_ptr() for image in images]) else 1


def choose(F: Tensor, image: Tensor, n: int, d: int, count: int, precision: str) -> Choice:
    """The tile for `count` matrices like F, and the parts of the sum."""
    return tiles.tabled_or_filling(
        tiles.Key("conv_syrk", str(image.dtype).removeprefix("torch."), precision),
        (count, n, d),
        F.device,
        TILES["half" if image.dtype in HALF else "float32"],
        d,
        lambda tile: count * triangle_of(d, tile.block),
        lambda tile: -(-n // tile.block_k),
    )


def launch(bucket: Sequence[Entry], *, choice: Choice | None = None, precision: str | None = None) -> None:
    """Runs the kernel on equal entries with a float32 F; images in another order of axes are copied first."""
    F, _, alpha, beta, bias, window = bucket[0]
    images = [channels_last(e.image.to(F.dtype) if e.image.dtype == torch.float64 else e.image) for e in bucket]
    N, height, width, C = images[0].shape
    down, across = window.outputs(height, width)
    groups = _groups(F)
    channels, count, n = C // groups, len(bucket) * groups, N * down * across
    d = window.kernel[0] * window.kernel[1] * channels
    unit = unit_of(images, groups)
    precision = precision_of(images[0].dtype, precision)
    if precision == "tf32" and dispatch.tf32_needs_descriptors(F.device):
        precision = "tf32x3"
    tile, parts = choice or choose(F, images[0], n, d, count, precision)
    rows = [addresses([e.F for e in bucket])]
    size = images[0].element_size()
    rows += [[image.data_ptr() + group * channels * size for image in images for group in range(groups)]]
    rows += [[getattr(e, name).data_ptr() for e in bucket for _ in range(groups)] for name in ("alpha", "beta")]
    table = table_of(rows, F.device)
    programs = triangle_of(d, tile.block) + (-(-d // tile.block) if bias else 0)
    workspace = workspace_for(count, parts, programs, tile.block, F.device)
    steps = [s // unit if length > 1 else 0 for s, length in zip(images[0].stride(), images[0].shape, strict=True)]
    types = {"ALPHA": triton_dtype(alpha.dtype), "BETA": triton_dtype(beta.dtype)}
    with device_of(F.device):
        conv_syrk_kernel[(count * parts * programs,)](
            table, workspace, count, parts, n, d // unit, channels // unit, window.kernel[1], max(down * across, 1),
            max(across, 1), height, width, *window.stride, window.padding[2], window.padding[0], *window.dilation,
            F.stride(-2), *steps[:3], BIAS=bias, SPLIT=parts > 1, UNIT=unit, INPUT=triton_dtype(images[0].dtype),
            F_ALIGNED=aligned(rows[0]), **types, BLOCK=tile.block, BLOCK_K=tile.block_k, PRECISION=precision,
            **tiles.options(tile),
        )  # fmt: skip
        if parts > 1:
            reduce_kernel[(count * programs,)](
                table, workspace, count, parts, n, d, F.stride(-2),
                BIAS=bias, ALIGNED=aligned(rows[0]), **types, BLOCK=tile.block, num_warps=tile.warps,
            )  # fmt: skip


def ahead_of_time(
    target: Any, dtype: str, tile: Tile, stages: int, precision: str, bias: bool = True, split: bool = False
) -> Any:
    """The kernel compiled for a `GPUTarget`, for whole UNITs of channels; `dtype` is Triton's name for the image's."""
    numbers = (
        "count", "parts", "n", "d", "channels", "taps_across", "positions", "positions_across", "height", "width",
        "H_stride", "W_stride", "top", "left", "H_dilation", "W_dilation", "F_row", "N_step", "H_step", "W_step",
    )  # fmt: skip
    types = {"table": "*i64", "workspace": "*fp32"} | dict.fromkeys(numbers, "i32")
    constants = {"BIAS": bias, "SPLIT": split, "UNIT": 4 if dtype == "fp32" else 8, "INPUT": type_named(dtype)}
    constants |= {"ALPHA": tl.float32, "BETA": tl.float32, "F_ALIGNED": True}
    constants |= {"BLOCK": tile.block, "BLOCK_K": tile.block_k, "PRECISION": precision}
    return compile_ahead(conv_syrk_kernel, types, constants, target, tile.warps, stages)


def _key(entry: Entry) -> Hashable:
    F, image, alpha, beta, bias, window = entry
    tensors = ((t.shape, t.stride(), t.dtype) for t in (F, image, alpha, beta))
    return bias, window, *tensors


def run(
    F: list[Tensor], image: list[Tensor], alpha: list[Tensor], beta: list[Tensor], bias: list[bool],
    windows: list[int], precision: str | None = None, backend: str | None = None,
) -> None:  # fmt: skip
    """The operator on every device: bucket by bucket the kernel, or the patches and `syrk_`; ten `windows` an entry."""
    each = [window_of(windows[i : i + 10]) for i in range(0, len(windows), 10)]
    checked = syrk.entries(F, image, alpha, beta, bias)
    for bucket in buckets(map(Entry, *zip(*checked, strict=True), each), _key):
        first = bucket[0]
        groups = _groups(first.F)
        whole = first.image.shape[1] // groups * first.image.element_size() % 16 == 0
        chosen = precision_of(first.image.dtype, precision)
        rule = dispatch.conv_syrk(first.image.shape[1] // groups, whole, chosen, first.image.dtype, first.image.device)
        unfolded = partial(_unfolded, bucket, precision, backend)
        if dispatch.takes_triton(rule, first.F.device, backend) and first.F.dtype == torch.float32:
            attempt("conv_syrk", (*first.image.shape, *first.window), first.F.device,
                    partial(launch, bucket, precision=precision), unfolded)  # fmt: skip
        else:
            unfolded()


def _unfolded(bucket: Sequence[Entry], precision: str | None, backend: str | None) -> None:
    for F, image, alpha, beta, bias, window in bucket:
        syrk.run([F], [patches(image, window, _groups(F))], [alpha], [beta], [bias], precision, backend)


register(
    "conv_syrk_",
    "(Tensor(a!)[] F, Tensor[] image, Tensor[] alpha, Tensor[] beta, bool[] bias, int[] windows,"
    " str? precision=None, str? backend=None) -> ()",
    run,
)
