"""Symmetric rank-n update of a running second moment: F <- beta F + alpha Xa^T Xa.

Xa is X of shape (n, d), or [X, 1] with a ones column last when `bias`. F is (D, D), D = d + 1 with `bias` and d
without; both may carry a leading batch axis B. The ones column is never stored: its row and column of F are the column
sums of X, its corner is n.

Only the lower triangle is computed, and the upper one copied from it, so F is symmetric bit for bit. That takes
n d (d + 1) floating-point operations, where a general product takes 2 n d^2; D^2 / 2 elements of F are read and D^2
written, and the n d elements of X are read once for each tile of a row of tiles.

One program of the kernel computes a square tile (i, j), i >= j, of one matrix of the batch and stores it twice, or one
block of the border's column sums. No program reads what another one writes and every sum has one order, so the result
never varies between runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kfac_triton.kernels._launch import (
    Tile,
    compile_ahead,
    device_of,
    fitting,
    float32_precision,
    jit,
    largest_filling,
    prefers_triton,
    register,
    stages_here,
    tl,
)

# On the CPU the lower triangle goes in block columns. Two threads, float32, against one full product and the same
# mirror, for (n, d): 2.7 against 3.1 ms at (64, 1001), 11.3 against 15.9 ms at (512, 1001), 76 against 118 ms at
# (4096, 1001). A smaller matrix is one block, hence one product.
REFERENCE_BLOCK = 256


def reference(F: Tensor, X: Tensor, alpha: Tensor, beta: Tensor, bias: bool) -> None:
    """The specification, and the operator on the CPU.

    F is symmetric on entry (its lower triangle is read); beta = 0 does not read it; alpha = 0 or n = 0 leaves beta F.
    """
    a, b, (n, d) = float(alpha), float(beta), X.shape[-2:]
    if a == 0.0 or n == 0:
        _scale_(F, b)
        return
    X = X.to(F.dtype)
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
    n, d = X.shape[-2:]
    X = X.to(F.dtype)
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
# needs eight warps, and in tf32x3 on sm_80 at most 16 terms at a time). No timing on a device stands behind them.
TILES = {
    "half": (Tile(128, 64, 8, 3), Tile(64, 64, 4, 3), Tile(32, 32, 4, 3)),
    "float32": (Tile(128, 16, 8, 4), Tile(64, 32, 4, 3), Tile(32, 32, 2, 3)),
}


@jit
def _triangle(index):  # type: ignore[no-untyped-def]
    """Row and column (i, j), i >= j, of the index-th tile of a lower triangle counted row by row.

    The root in float32 is off by one at most; integers settle it.
    """
    i = ((tl.sqrt(8.0 * index.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    i = tl.where(i * (i + 1) // 2 > index, i - 1, i)
    i = tl.where((i + 1) * (i + 2) // 2 <= index, i + 1, i)
    return i, index - i * (i + 1) // 2


@jit
def _tile(  # type: ignore[no-untyped-def]
    F, X, i, j, a, b, rows, d, F_row, X_row, X_col, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr
):
    """F[i, j] and F[j, i] <- b F[i, j] + a X[:rows, i]^T X[:rows, j], in tiles."""
    at_i = i * BLOCK + tl.arange(0, BLOCK)
    at_j = j * BLOCK + tl.arange(0, BLOCK)
    at_k = tl.arange(0, BLOCK_K)
    step = tl.full((), BLOCK_K, tl.int64) * X_row
    X_i = X + at_k.to(tl.int64)[:, None] * X_row + at_i.to(tl.int64)[None, :] * X_col
    X_j = X + at_k.to(tl.int64)[:, None] * X_row + at_j.to(tl.int64)[None, :] * X_col
    product = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for start in tl.range(0, rows, BLOCK_K):
        here = at_k[:, None] < rows - start
        x_i = tl.load(X_i, mask=here & (at_i[None, :] < d), other=0.0)
        x_j = tl.load(X_j, mask=here & (at_j[None, :] < d), other=0.0)
        product = tl.dot(tl.trans(x_i), x_j, product, input_precision=PRECISION)
        X_i += step
        X_j += step

    inside = (at_i[:, None] < d) & (at_j[None, :] < d)
    lower = F + at_i.to(tl.int64)[:, None] * F_row + at_j[None, :]
    readable = at_i[:, None] < tl.where(b == 0.0, 0, d)
    new = a * product + b * tl.load(lower, mask=inside & readable, other=0.0)
    if i == j:
        # tf32x3 adds two cross terms in an order that a transposition swaps, so a diagonal tile is mirrored too.
        tl.store(lower, tl.where(at_i[:, None] >= at_j[None, :], new, tl.trans(new)), mask=inside)
    else:
        tl.store(lower, new, mask=inside)
        upper = F + at_j.to(tl.int64)[:, None] * F_row + at_i[None, :]
        tl.store(upper, tl.trans(new), mask=(at_j[:, None] < d) & (at_i[None, :] < d))


@jit
def _border(  # type: ignore[no-untyped-def]
    F, X, i, a, b, rows, d, F_row, X_row, X_col, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr
):
    """F[d, i] and F[:, d] <- b F[d, i] + a (column sums of X[:rows, i]); the first block adds the corner F[d, d]."""
    at_i = (i * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    at_k = tl.arange(0, BLOCK_K).to(tl.int64)
    step = tl.full((), BLOCK_K, tl.int64) * X_row
    X_i = X + at_k[:, None] * X_row + at_i[None, :] * X_col
    sums = tl.zeros((BLOCK_K, BLOCK), dtype=tl.float32)
    for start in tl.range(0, rows, BLOCK_K):
        sums += tl.load(X_i, mask=(at_k[:, None] < rows - start) & (at_i[None, :] < d), other=0.0).to(tl.float32)
        X_i += step

    inside = at_i < d
    last_row = F + tl.full((), 1, tl.int64) * d * F_row
    new = a * tl.sum(sums, axis=0)
    corner = a * rows
    if b != 0.0:
        new += b * tl.load(last_row + at_i, mask=inside, other=0.0)
        corner += b * tl.load(last_row + d)
    tl.store(last_row + at_i, new, mask=inside)
    tl.store(F + at_i * F_row + d, new, mask=inside)
    if i == 0:
        tl.store(last_row + d, corner)


@jit
def syrk_kernel(  # type: ignore[no-untyped-def]
    F, X, alpha, beta, n, d, F_batch, F_row, X_batch, X_row, X_col,
    BIAS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """F <- beta F + alpha Xa^T Xa for F (B, D, D), float32 with strides (F_batch, F_row, 1), X (B, n, d), any strides.

    alpha and beta point at scalars. The grid has B x (T (T + 1) / 2 tiles, then T border blocks when BIAS) programs,
    T = ceil(d / BLOCK).
    """
    side = tl.cdiv(d, BLOCK)
    tiles = side * (side + 1) // 2
    programs = tiles + side if BIAS else tiles
    index = tl.program_id(0) % programs
    batch = (tl.program_id(0) // programs).to(tl.int64)
    F += batch * F_batch
    X += batch * X_batch
    a = tl.load(alpha).to(tl.float32)
    b = tl.load(beta).to(tl.float32)
    rows = tl.where(a == 0.0, 0, n)  # alpha = 0 reads no row of X, so nothing in it can spread
    if index < tiles:
        i, j = _triangle(index)
        _tile(F, X, i, j, a, b, rows, d, F_row, X_row, X_col, BLOCK, BLOCK_K, PRECISION)
    elif BIAS:
        _border(F, X, index - tiles, a, b, rows, d, F_row, X_row, X_col, BLOCK, BLOCK_K)


def _programs(batch: int, d: int, bias: bool, block: int) -> int:
    side = -(-d // block)
    return batch * (side * (side + 1) // 2 + (side if bias else 0))


def _tiles(X: Tensor) -> Sequence[Tile]:
    """What X may use: where its rows are not contiguous, addresses take too many registers for the largest tile."""
    tiles = TILES["half" if X.dtype in (torch.float16, torch.bfloat16) else "float32"]
    return tiles if X.stride(-1) == 1 else tiles[1:]


def _choose(F: Tensor, X: Tensor) -> tuple[Tile, bool]:
    batch, d = F[..., 0, 0].numel(), X.shape[-1]
    return largest_filling(fitting(_tiles(X), d), lambda tile: _programs(batch, d, False, tile.block), F.device)


def launch(
    F: Tensor,
    X: Tensor,
    alpha: Tensor,
    beta: Tensor,
    bias: bool,
    *,
    tile: Tile | None = None,
    precision: str | None = None,
) -> None:
    """Runs the kernel on a float32 F."""
    if X.dtype == torch.float64:
        X = X.to(F.dtype)
    tile = _choose(F, X)[0] if tile is None else tile
    precision = precision or (float32_precision() if X.dtype == torch.float32 else "ieee")
    F, X = (F.unsqueeze(0), X.unsqueeze(0)) if F.ndim == 2 else (F, X)
    batch, n, d = X.shape
    if batch == 0:
        return
    with device_of(F):
        syrk_kernel[(_programs(batch, d, bias, tile.block),)](
            F, X, alpha, beta, n, d, *F.stride()[:2], *X.stride(),
            BIAS=bias, BLOCK=tile.block, BLOCK_K=tile.block_k, PRECISION=precision,
            num_warps=tile.warps, num_stages=stages_here(tile),
        )  # fmt: skip


def ahead_of_time(
    target: Any, dtype: str, tile: Tile, stages: int, precision: str, bias: bool, unit_stride: str | None = "X_col"
) -> Any:
    """The kernel compiled for a `GPUTarget`; `dtype` is Triton's name for X's, `unit_stride` names X's stride of 1."""
    types = {"F": "*fp32", "X": f"*{dtype}", "alpha": "*fp32", "beta": "*fp32"}
    types |= dict.fromkeys(("n", "d", "F_batch", "F_row", "X_batch", "X_row", "X_col"), "i32")
    constants = {"BIAS": bias, "BLOCK": tile.block, "BLOCK_K": tile.block_k, "PRECISION": precision}
    constants |= {unit_stride: 1} if unit_stride else {}
    return compile_ahead(syrk_kernel, types, constants, target, tile.warps, stages)


def _on_gpu(F: Tensor, X: Tensor, alpha: Tensor, beta: Tensor, bias: bool) -> None:
    # Without a split of the sum over n, a matrix with fewer tiles than multiprocessors leaves some of them idle.
    if F.dtype == torch.float32 and prefers_triton(default=_choose(F, X)[1]):
        launch(F, X, alpha, beta, bias)
    else:
        without_sync(F, X, alpha, beta, bias)


register("syrk_", "(Tensor(a!) F, Tensor X, Tensor alpha, Tensor beta, bool bias) -> ()", cpu=reference, cuda=_on_gpu)
