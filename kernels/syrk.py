"""Symmetric rank-n update of a running second moment: F <- beta F + alpha Xa^T Xa.

Xa is X of shape (n, d), or [X, 1] with a ones column last when `bias`. F is (D, D), D = d + 1 with `bias` and d
without; both may carry a leading batch axis B. X may have one more axis, of images (images, n, d), whose rows are all
summed over: gradients of a convolution are such, with the positions of an image next to one another in memory. The
ones column is never stored: its row and column of F are the column sums of X, its corner is the number of rows.

Only the lower triangle is computed, and the upper one copied from it, so F is symmetric bit for bit. That takes
n d (d + 1) floating-point operations, where a general product takes 2 n d^2; D^2 / 2 elements of F are read and D^2
written, and the n d elements of X are read once for each tile of a row of tiles.

One program of the kernel computes a square tile (i, j), i >= j, of one matrix of a bucket and stores it twice, or one
block of the border's column sums; where there are fewer tiles than multiprocessors and many rows, one part of that sum.
The matrices of a launch share shapes and strides, and a table of addresses says where each one is.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kfac_triton.kernels import dispatch, tiles
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
    with_scratch,
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

# On the CPU the lower triangle goes in block columns. Two threads, float32, against one full product and the same
# mirror, for (n, d): 2.7 against 3.1 ms at (64, 1001), 11.3 against 15.9 ms at (512, 1001), 76 against 118 ms at
# (4096, 1001). A smaller matrix is one block, hence one product.
REFERENCE_BLOCK = 256


def reference(F: Tensor, X: Tensor, alpha: Tensor, beta: Tensor, bias: bool) -> None:
    """The specification, and the operator on the CPU.

    F is symmetric on entry (its lower triangle is read); beta = 0 does not read it; alpha = 0 or n = 0 leaves beta F.
    """
    X = _flat(X, F)
    a, b, (n, d) = float(alpha), float(beta), X.shape[-2:]
    if a == 0.0 or n == 0:
        _scale_(F, b)
        return
    if F.ndim == 3 and d > REFERENCE_BLOCK:
        for core, rows in zip(F[:, :d, :d], X, strict=True):
            _lower_blocks_(core, rows, a, b)
    elif F.ndim == 3:
        _symmetrise_(F[:, :d, :d].baddbmm_(X.mT, X, alpha=a, beta=b))
    else:
        _lower_blocks_(F[:d, :d], X, a, b)
    if bias:
        border, corner = F[..., d, :d], F[..., d, d]
        _scale_(border, b)
        F[..., :d, d] = border.add_(X.sum(-2), alpha=a)
        _scale_(corner, b)
        corner.add_(a * n)


def _flat(X: Tensor, F: Tensor) -> Tensor:
    """X in F's dtype, its images behind one another as rows."""
    return (X.flatten(-3, -2) if X.ndim > F.ndim else X).to(F.dtype)


def _lower_blocks_(F: Tensor, X: Tensor, alpha: float, beta: float) -> None:
    d = X.shape[1]
    edges = [(start, min(start + REFERENCE_BLOCK, d)) for start in range(0, d, REFERENCE_BLOCK)]
    for start, stop in edges:
        F[start:, start:stop].addmm_(X[:, start:].mT, X[:, start:stop], alpha=alpha, beta=beta)
        _symmetrise_(F[start:stop, start:stop])
    for column, (start, stop) in enumerate(edges):
        for top, bottom in edges[column + 1 :]:  # one long strip would be read across the cache, at half the speed
            F[start:stop, top:bottom].copy_(F[top:bottom, start:stop].mT)


def _symmetrise_(F: Tensor) -> None:
    F.tril_()
    F.add_(F.tril(-1).mT)


def _scale_(F: Tensor, beta: float) -> None:
    if beta == 0.0:
        F.zero_()
    else:
        F.mul_(beta)


def without_sync(F: Tensor, X: Tensor, alpha: Tensor, beta: Tensor, bias: bool) -> None:
    """`reference` with no decision on the host: `torch.where` chooses, so that a GPU's queue never drains."""
    X = _flat(X, F)
    n, d = X.shape[-2:]
    product = torch.zeros_like(F)
    torch.matmul(X.mT, X, out=product[..., :d, :d])  # autocast leaves out= alone
    if bias:
        product[..., d, :d] = X.sum(-2)
        product[..., d, d] = n
    zero = torch.zeros((), dtype=F.dtype, device=F.device)
    new = torch.where(alpha == 0, zero, product * alpha) + torch.where(beta == 0, zero, F * beta)
    F.copy_(new)
    _symmetrise_(F)


# Square tiles, largest first: they compile for sm_80, sm_90, sm_100 and gfx942 with no register spilled (a side of 128
# needs eight warps, and three TF32 products on sm_80 at most 16 terms at a time). `kfac-tune kernels` ranks them by
# device and shape; where it has not, the largest one that fills the device serves.
TILES = {
    "half": (Tile(128, 64, 8, 3), Tile(64, 64, 4, 4), Tile(32, 64, 4, 3)),
    "float32": (Tile(128, 16, 8, 4), Tile(64, 16, 4, 4), Tile(32, 32, 2, 3)),
    # One TF32 product wants its operands transposed, which only a tensor descriptor does in whole rows (sm_90 and up).
    "descriptors": (Tile(128, 32, 8, 3, True), Tile(64, 32, 4, 3, True), Tile(32, 32, 4, 3, True)),
}


@jit
def _product(  # type: ignore[no-untyped-def]
    X, i, j, first, last, steps, n, d, X_image, X_row, X_col,
    IMAGES: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """X[rows, i]^T X[rows, j] in tiles, over the steps first <= step < last of BLOCK_K rows; an image has `steps`."""
    at_i = i * BLOCK + tl.arange(0, BLOCK)
    at_j = j * BLOCK + tl.arange(0, BLOCK)
    at_k = tl.arange(0, BLOCK_K)
    X_i = X + at_k.to(tl.int64)[:, None] * X_row + at_i.to(tl.int64)[None, :] * X_col
    X_j = X + at_k.to(tl.int64)[:, None] * X_row + at_j.to(tl.int64)[None, :] * X_col
    product = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for step in tl.range(first, last):
        start, offset = _start(step, steps, X_image, X_row, IMAGES, BLOCK_K)
        here = at_k[:, None] < n - start
        x_i = tl.load(X_i + offset, mask=here & (at_i[None, :] < d), other=0.0)
        x_j = tl.load(X_j + offset, mask=here & (at_j[None, :] < d), other=0.0)
        product = tl.dot(tl.trans(x_i), x_j, product, input_precision=PRECISION)
    return product


@jit
def _start(step, steps, X_image, X_row, IMAGES: tl.constexpr, BLOCK_K: tl.constexpr):  # type: ignore[no-untyped-def]
    """The first row of a step, in its image, and the offset of that row in X."""
    zero = tl.full((), 0, tl.int64)
    if IMAGES:
        start = step % steps * BLOCK_K
        return start, (zero + step // steps) * X_image + (zero + start) * X_row
    return step * BLOCK_K, (zero + step * BLOCK_K) * X_row


@jit
def _product_by_descriptors(  # type: ignore[no-untyped-def]
    X, i, j, first, last, n, d, X_row, X_col,
    ROWS_MAJOR: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The same for one image, loaded by descriptors, which put zeros beyond its edges."""
    product = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    if ROWS_MAJOR:
        by_rows = tl.make_tensor_descriptor(X, [n, d], [tl.full((), 1, tl.int64) * X_row, 1], [BLOCK_K, BLOCK])
        for step in tl.range(first, last):
            x_i = by_rows.load([step * BLOCK_K, i * BLOCK])
            x_j = by_rows.load([step * BLOCK_K, j * BLOCK])
            product = tl.dot(tl.trans(x_i), x_j, product, input_precision=PRECISION)
    else:
        by_columns = tl.make_tensor_descriptor(X, [d, n], [tl.full((), 1, tl.int64) * X_col, 1], [BLOCK, BLOCK_K])
        for step in tl.range(first, last):
            x_i = by_columns.load([i * BLOCK, step * BLOCK_K])
            x_j = by_columns.load([j * BLOCK, step * BLOCK_K])
            product = tl.dot(x_i, tl.trans(x_j), product, input_precision=PRECISION)
    return product


@jit
def _column_sums(  # type: ignore[no-untyped-def]
    X, i, first, last, steps, n, d, X_image, X_row, X_col,
    IMAGES: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Sums of X[rows, i] over the rows of those steps."""
    at_i = i * BLOCK + tl.arange(0, BLOCK)
    at_k = tl.arange(0, BLOCK_K)
    X_i = X + at_k.to(tl.int64)[:, None] * X_row + at_i.to(tl.int64)[None, :] * X_col
    sums = tl.zeros((BLOCK_K, BLOCK), dtype=tl.float32)
    for step in tl.range(first, last):
        start, offset = _start(step, steps, X_image, X_row, IMAGES, BLOCK_K)
        inside = (at_k[:, None] < n - start) & (at_i[None, :] < d)
        sums += tl.load(X_i + offset, mask=inside, other=0.0).to(tl.float32)
    return tl.sum(sums, axis=0)


@jit
def syrk_kernel(  # type: ignore[no-untyped-def]
    table, workspace, count, parts, images, n, d, F_row, X_image, X_row, X_col,
    BIAS: tl.constexpr, IMAGES: tl.constexpr, SPLIT: tl.constexpr, DESCRIPTORS: tl.constexpr,
    ROWS_MAJOR: tl.constexpr, UNIT: tl.constexpr, INPUT: tl.constexpr, ALPHA: tl.constexpr, BETA: tl.constexpr,
    F_ALIGNED: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """F_e <- beta_e F_e + alpha_e sum over images of Xa^T Xa, for e < count.

    table (4, count) int64 holds the addresses of F (D, D) float32 with strides (F_row, 1), X (images, n, d) of type
    INPUT with strides (X_image, X_row, X_col), and the scalars alpha and beta. The grid has count x parts x (T (T + 1)
    / 2 tiles, then T border blocks when BIAS) programs, T = ceil(d / BLOCK). With SPLIT each part of the sum goes to
    `workspace`, and `reduce_kernel` follows. IMAGES: there is more than one. ROWS_MAJOR: X_col is 1.

    UNIT elements are 16 bytes, and X_image, X_row and d (or, where X_row is 1, X_col and n) count UNITs: so the
    compiler knows what they are divisible by. Where they are not, UNIT is 1.
    """
    X_image *= UNIT
    if ROWS_MAJOR:
        X_row *= UNIT
        d *= UNIT
    else:
        X_col *= UNIT
        n *= UNIT
    side = tl.cdiv(d, BLOCK)
    tiles = side * (side + 1) // 2
    programs = tiles + side if BIAS else tiles
    index = tl.program_id(0) % programs
    part = tl.program_id(0) // programs % parts
    entry = tl.program_id(0) // programs // parts
    F = pointer(table, 0, count, entry, tl.float32, F_ALIGNED)
    X = pointer(table, 1, count, entry, INPUT, UNIT > 1)
    a, b = weights(table, count, entry, ALPHA, BETA)
    steps = tl.cdiv(n, BLOCK_K)
    present = tl.where(a == 0.0, 0, images * steps)  # alpha = 0 reads no row of X, so nothing in it can spread
    first, last = part_of(present, part, parts)
    if index < tiles:
        i, j = triangle(index)
        if DESCRIPTORS:
            product = _product_by_descriptors(
                X, i, j, first, last, n, d, X_row, X_col, ROWS_MAJOR, BLOCK, BLOCK_K, PRECISION
            )
        else:
            product = _product(
                X, i, j, first, last, steps, n, d, X_image, X_row, X_col, IMAGES, BLOCK, BLOCK_K, PRECISION
            )
        if SPLIT:
            store_part(workspace, entry, part, parts, index, programs, product, BLOCK)
        else:
            store_tile(F, i, j, d, F_row, product, a, b, BLOCK)
    elif BIAS:
        sums = _column_sums(X, index - tiles, first, last, steps, n, d, X_image, X_row, X_col, IMAGES, BLOCK, BLOCK_K)
        if SPLIT:
            store_border_part(workspace, entry, part, parts, index, programs, sums, BLOCK)
        else:
            store_border(F, index - tiles, d, F_row, sums, images * n, a, b, BLOCK)


class Entry(NamedTuple):
    """One average: F (D, D) or (B, D, D), X with one axis more where there are images."""

    F: Tensor
    X: Tensor
    alpha: Tensor
    beta: Tensor
    bias: bool


def entries(
    F: Sequence[Tensor], X: Sequence[Tensor], alpha: Sequence[Tensor], beta: Sequence[Tensor], bias: Sequence[bool]
) -> list[Entry]:
    """The lists' entries; raises ValueError where two write the same memory, which no order of theirs would survive."""
    first: dict[int, int] = {}
    for i, f in enumerate(F):
        if f.numel() and first.setdefault(f.data_ptr(), i) != i:
            raise ValueError(f"F[{i}] starts at the address of F[{first[f.data_ptr()]}]; allowed: each once in a call")
    return [Entry(*entry) for entry in zip(F, X, alpha, beta, bias, strict=True)]


def _key(entry: Entry) -> Hashable:
    F, X, alpha, beta, bias = entry
    return F.shape, F.stride(), F.dtype, X.shape, X.stride(), X.dtype, alpha.dtype, beta.dtype, bias


def _as_images(X: Tensor, F: Tensor) -> Tensor:
    return X if X.ndim > F.ndim else X.unsqueeze(-3)


def _programs(d: int, bias: bool, block: int) -> int:
    return triangle_of(d, block) + (-(-d // block) if bias else 0)


def allowed_tiles(X: Tensor, precision: str) -> Sequence[Tile]:
    """What X, with its images, may use, of `TILES`."""
    if precision == "tf32" and takes_descriptors(X):
        return TILES["descriptors"]
    tiles = TILES["half" if X.dtype in HALF else "float32"]
    return tiles if X.stride(-1) == 1 else tiles[1:]  # addresses of columns apart take too many registers


def _rows_major(X: Tensor) -> bool:
    return X.stride(-1) == 1 or X.stride(-2) != 1


def unit_of(Xs: Sequence[Tensor]) -> int:
    """Elements in 16 bytes, where all addresses, strides and the contiguous size of X (..., images, n, d) are whole
    multiples of that, else 1.
    """
    X = Xs[0]
    unit = 16 // X.element_size()
    near, far = (-1, -2) if _rows_major(X) else (-2, -1)
    whole = X.stride(near) == 1 and X.shape[near] % unit == 0
    apart = [X.stride(axis) for axis in range(X.ndim) if axis != X.ndim + near and X.shape[axis] > 1]
    whole &= all(stride % unit == 0 for stride in (*apart, X.stride(far)))
    return unit if whole and aligned([x.data_ptr() for x in Xs]) else 1


def _in_units(X: Tensor, unit: int) -> list[int]:
    """n, d, and the strides of images, rows and columns, as `syrk_kernel` counts them."""
    image = X.stride(-3) if X.shape[-3] > 1 else 0
    if _rows_major(X):
        return [X.shape[-2], X.shape[-1] // unit, image // unit, X.stride(-2) // unit, X.stride(-1)]
    return [X.shape[-2] // unit, X.shape[-1], image // unit, X.stride(-2), X.stride(-1) // unit]


def takes_descriptors(X: Tensor) -> bool:
    """Whether the TMA unit can load X: sm_90 and later, one image, rows (or columns) that begin at 16 bytes."""
    if X.is_cuda and (torch.version.hip is not None or torch.cuda.get_device_capability(X.device)[0] < 9):
        return False
    return X.shape[-3] == 1 and unit_of([X]) > 1


def choose(F: Tensor, X: Tensor, count: int, precision: str) -> Choice:
    """The tile for `count` matrices like F, and the parts of the sum; X has images."""
    images, n, d = X.shape[-3:]
    return tiles.tabled_or_filling(
        tiles.Key("syrk", str(X.dtype).removeprefix("torch."), precision),
        (count, images * n, d),
        F.device,
        allowed_tiles(X, precision),
        d,
        lambda tile: count * triangle_of(d, tile.block),
        lambda tile: images * -(-n // tile.block_k),
        descriptors=takes_descriptors(X),
    )


def launch(bucket: Sequence[Entry], *, choice: Choice | None = None, precision: str | None = None) -> None:
    """Runs the kernel on equal entries with a float32 F."""
    F, _, alpha, beta, bias = bucket[0]
    Xs = [_as_images(e.X.to(F.dtype) if e.X.dtype == torch.float64 else e.X, F) for e in bucket]
    X = Xs[0]
    images, n, d = X.shape[-3:]
    unit = unit_of(Xs)
    sizes = _in_units(X, unit)
    batch = F.shape[0] if F.ndim > 2 else 1
    count = len(bucket) * batch
    if count == 0:
        return
    precision = precision_of(X.dtype, precision)
    tile, parts = choice or choose(F, X, count, precision)
    if precision == "tf32" and not tile.descriptors and dispatch.tf32_needs_descriptors(F.device):
        precision = "tf32x3"
    rows = [addresses([e.F for e in bucket]), addresses(Xs, axes=3)]
    rows += [[getattr(e, name).data_ptr() for e in bucket for _ in range(batch)] for name in ("alpha", "beta")]
    table = table_of(rows, F.device)
    programs = _programs(d, bias, tile.block)
    workspace = workspace_for(count, parts, programs, tile.block, F.device)
    types = {"ALPHA": triton_dtype(alpha.dtype), "BETA": triton_dtype(beta.dtype)}

    def run() -> None:
        syrk_kernel[(count * parts * programs,)](
            table, workspace, count, parts, images, *sizes[:2], F.stride(-2), *sizes[2:],
            BIAS=bias, IMAGES=images > 1, SPLIT=parts > 1, DESCRIPTORS=tile.descriptors,
            ROWS_MAJOR=_rows_major(X), UNIT=unit, INPUT=triton_dtype(X.dtype), F_ALIGNED=aligned(rows[0]), **types,
            BLOCK=tile.block, BLOCK_K=tile.block_k, PRECISION=precision, **tiles.options(tile),
        )  # fmt: skip
        if parts > 1:
            reduce_kernel[(count * programs,)](
                table, workspace, count, parts, images * n, d, F.stride(-2),
                BIAS=bias, ALIGNED=aligned(rows[0]), **types, BLOCK=tile.block, num_warps=tile.warps,
            )  # fmt: skip

    with device_of(F.device):
        if tile.descriptors:
            with_scratch(run, F.device)
        else:
            run()


def ahead_of_time(
    target: Any, dtype: str, tile: Tile, stages: int, precision: str, bias: bool = True,
    unit_stride: str | None = "X_col", split: bool = False, images: bool = False,
) -> Any:  # fmt: skip
    """The kernel compiled for a `GPUTarget`; `dtype` is Triton's name for X's, `unit_stride` names X's stride of 1."""
    types = {"table": "*i64", "workspace": "*fp32"}
    types |= dict.fromkeys(("count", "parts", "images", "n", "d", "F_row", "X_image", "X_row", "X_col"), "i32")
    constants: dict[str, Any] = {
        "BIAS": bias,
        "IMAGES": images,
        "SPLIT": split,
        "DESCRIPTORS": tile.descriptors,
        "F_ALIGNED": True,
    }
    constants |= {"ROWS_MAJOR": unit_stride != "X_row", "INPUT": type_named(dtype)}
    constants |= {"UNIT": 1 if unit_stride is None else 4 if dtype == "fp32" else 8}
    constants |= {"ALPHA": tl.float32, "BETA": tl.float32}
    constants |= {"BLOCK": tile.block, "BLOCK_K": tile.block_k, "PRECISION": precision}
    constants |= {unit_stride: 1} if unit_stride else {}
    return compile_ahead(syrk_kernel, types, constants, target, tile.warps, stages)


def _rule(entry: Entry, count: int, precision: str) -> bool:
    X = _as_images(entry.X, entry.F)
    rows = X.shape[-3] * X.shape[-2]
    return dispatch.syrk(X.dtype, rows, X.shape[-1], count, unit_of([X]) > 1, precision, entry.F.device)


def run(
    F: list[Tensor], X: list[Tensor], alpha: list[Tensor], beta: list[Tensor], bias: list[bool],
    precision: str | None = None, backend: str | None = None,
) -> None:  # fmt: skip
    """The operator on every device: bucket by bucket the kernel, or torch."""
    for bucket in buckets(entries(F, X, alpha, beta, bias), _key):
        first = bucket[0]
        count = len(bucket) * (first.F.shape[0] if first.F.ndim > 2 else 1)
        rule = _rule(first, count, precision_of(first.X.dtype, precision))
        wanted = dispatch.takes_triton(rule, first.F.device, backend)
        if wanted and first.F.dtype == torch.float32:
            attempt("syrk", tuple(first.X.shape), first.F.device, partial(launch, bucket, precision=precision),
                    partial(_torch, bucket))  # fmt: skip
        else:
            _torch(bucket)


def _torch(bucket: Sequence[Entry]) -> None:
    for entry in bucket:
        (without_sync if entry.F.is_cuda else reference)(*entry)


register(
    "syrk_",
    "(Tensor(a!)[] F, Tensor[] X, Tensor[] alpha, Tensor[] beta, bool[] bias, str? precision=None, str? backend=None)"
    " -> ()",
    run,
)
