"""Inverses of symmetric positive definite matrices from their last ones: X <- X + X (I - M X) until I - M X is small.

M_i and X_i are (d, d), or (B, d, d), float32; X_i holds an inverse of an earlier M_i on entry, at any scale, and that
of M_i on return; residual (matrices,) gets ||I - M_i X_i||_F, over the batch of an entry. Who calls looks at it: no
iteration converges from a start too far away, and then Cholesky serves.

The start is scaled by c = tr(M X) / ||M X||_F^2, which minimises the residual over c. An iteration squares I - M X, so
five or six go from a norm of 0.9 to the rounding error of float32. The coupled form, M X <- M X (2 I - M X) beside
X <- X (2 I - M X), has two symmetric products in place of a general and a symmetric one, but M X must commute with X,
which a warm start does not, and its errors are never seen again; this one takes 3 d^3 floating-point operations an
iteration where that takes 2 d^3, and corrects itself.

X (I - M X) + X = 2 X - X M X is symmetric, so one program computes a tile (i, j), i >= j, of it and stores it twice;
I - M X is a grouped product, its squares and M X's trace added up at its end.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kfac_triton.kernels import dispatch, tiles
from kfac_triton.kernels._ahead import compile_ahead
from kfac_triton.kernels._grouped import RESIDUAL, grouped
from kfac_triton.kernels._launch import (
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
)
from kfac_triton.kernels._symmetric import pointer, store_tile, triangle, triangle_of
from kfac_triton.kernels.tiles import Tile

ITERATIONS = 20
STALLED = 0.5  # a norm below 1 that an iteration does not halve is at its rounding error
ROW_ALIGNMENT = 16

Pair = tuple[Tensor, Tensor]  # X and M of one entry


def reference(pairs: Sequence[Pair], residual: Tensor) -> None:
    """The specification, and the operator wherever the kernel does not run."""

    def left_over(X: Sequence[Tensor], M: Sequence[Tensor], R: Sequence[Tensor]) -> Tensor:
        sums = []
        for x, m, r in zip(X, M, R, strict=True):
            product = m @ x
            r.copy_(-product).diagonal(dim1=-2, dim2=-1).add_(1)
            sums.append(torch.stack([r.square().sum(), product.diagonal(dim1=-2, dim2=-1).sum()]))
        return torch.stack(sums)

    def improved(X: Sequence[Tensor], R: Sequence[Tensor], out: Sequence[Tensor]) -> None:
        for x, r, o in zip(X, R, out, strict=True):
            new = (x + x @ r).tril()
            o.copy_(new + new.tril(-1).mT)

    _iterate(pairs, residual, left_over, improved)


def _iterate(
    pairs: Sequence[Pair],
    residual: Tensor,
    left_over: Callable[[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]], Tensor],
    improved: Callable[[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]], None],
) -> None:
    """The iteration over equal entries.

    Args:
        left_over: (X, M, R): R <- I - M X; returns (entries, 2), the squares of R added up, and the trace of M X.
        improved: (X, R, out): out <- X + X R, symmetric.
    """
    X, M = ([pair[side] for pair in pairs] for side in (0, 1))
    R, other = _like(X), _like(X)
    d = X[0].shape[-1] * (X[0].shape[0] if X[0].ndim > 2 else 1)
    squares, trace = left_over(X, M, R).unbind(1)
    scale = trace / (squares - d + 2 * trace)
    for x, c in zip(X, scale, strict=True):
        x.mul_(c)
    current, last = X, torch.full_like(residual, torch.inf)
    for _ in range(ITERATIONS):
        residual.copy_(left_over(current, M, R)[:, 0].clamp(min=0).sqrt())
        falls = residual < torch.where(last < 1, STALLED * last, last)
        if not bool(falls.any()):
            break
        last = residual.clone()
        improved(current, R, other)
        current, other = other, current
    if current is not X:
        for x, new in zip(X, current, strict=True):
            x.copy_(new)


def _like(X: Sequence[Tensor]) -> list[Tensor]:
    """Space for matrices of these shapes, rows at multiples of 64 bytes."""
    d = X[0].shape[-1]
    width = -(-d // ROW_ALIGNMENT) * ROW_ALIGNMENT
    return [x.new_empty(*x.shape[:-1], width)[..., :d] for x in X]


# Chosen as syrk's: no register spilled on any target.
TILES = (Tile(64, 32, 4, 3), Tile(32, 32, 4, 3))


@jit
def symmetric_product_kernel(  # type: ignore[no-untyped-def]
    table, count, d, X_row, R_row, out_row,
    ALIGNED: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out_e <- X_e + X_e R_e (d, d), known to be symmetric, float32 with unit column strides, for e < count.

    table (3, count) int64 holds the addresses of X, R and out. The grid has count x T (T + 1) / 2 programs, one tile
    (i, j), i >= j, each, T = ceil(d / BLOCK).
    """
    side = tl.cdiv(d, BLOCK)
    programs = side * (side + 1) // 2
    entry = tl.program_id(0) // programs
    i, j = triangle(tl.program_id(0) % programs)
    X = pointer(table, 0, count, entry, tl.float32, ALIGNED)
    R = pointer(table, 1, count, entry, tl.float32, ALIGNED)
    out = pointer(table, 2, count, entry, tl.float32, ALIGNED)
    at_i = i * BLOCK + tl.arange(0, BLOCK)
    at_j = j * BLOCK + tl.arange(0, BLOCK)
    at_k = tl.arange(0, BLOCK_K)
    left = X + at_i.to(tl.int64)[:, None] * X_row + at_k[None, :]
    right = R + at_k.to(tl.int64)[:, None] * R_row + at_j[None, :]
    right_step = tl.full((), BLOCK_K, tl.int64) * R_row
    product = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for start in tl.range(0, d, BLOCK_K):
        x = tl.load(left, mask=(at_i[:, None] < d) & (at_k[None, :] < d - start), other=0.0)
        r = tl.load(right, mask=(at_k[:, None] < d - start) & (at_j[None, :] < d), other=0.0)
        product = tl.dot(x, r, product, input_precision=PRECISION)
        left += BLOCK_K
        right += right_step
    inside = (at_i[:, None] < d) & (at_j[None, :] < d)
    product += tl.load(X + at_i.to(tl.int64)[:, None] * X_row + at_j[None, :], mask=inside, other=0.0)
    store_tile(out, i, j, d, out_row, product, 1.0, 0.0, BLOCK)


def launch(pairs: Sequence[Pair], residual: Tensor, *, tile: Tile | None = None, precision: str | None = None) -> None:
    """Runs the iteration of equal entries with the kernels."""
    d, device = pairs[0][0].shape[-1], residual.device
    count = sum(x.shape[0] if x.ndim > 2 else 1 for x, _ in pairs)
    if count == 0 or d == 0:
        residual.zero_()
        return
    precision = precision_of(torch.float32, precision)
    precision = "tf32x3" if precision == "tf32" else precision  # one TF32 product stalls at a residual of 4e-2
    if tile is None:
        tile = tiles.filling(tiles.fitting(TILES, d), lambda t: count * triangle_of(d, t.block), device).tile
    sums = torch.empty(len(pairs), 2, dtype=torch.float32, device=device)

    def left_over(X: Sequence[Tensor], M: Sequence[Tensor], R: Sequence[Tensor]) -> Tensor:
        grouped(R, M, X, epilogue=RESIDUAL, sums=sums.unbind(), tile=tile, precision=precision)
        return sums

    def improved(X: Sequence[Tensor], R: Sequence[Tensor], out: Sequence[Tensor]) -> None:
        rows = [addresses(X), addresses(R), addresses(out)]
        with device_of(device):
            symmetric_product_kernel[(count * triangle_of(d, tile.block),)](
                table_of(rows, device), count, d, X[0].stride(-2), R[0].stride(-2), out[0].stride(-2),
                ALIGNED=aligned(*rows), BLOCK=tile.block, BLOCK_K=tile.block_k, PRECISION=precision,
                **tiles.options(tile),
            )  # fmt: skip

    _iterate(pairs, residual, left_over, improved)


def ahead_of_time(target: Any, dtype: str, tile: Tile, stages: int, precision: str) -> Any:
    """The symmetric product compiled for a `GPUTarget`; it knows float32 alone."""
    types = {"table": "*i64"} | dict.fromkeys(("count", "d", "X_row", "R_row", "out_row"), "i32")
    constants = {"ALIGNED": True, "BLOCK": tile.block, "BLOCK_K": tile.block_k, "PRECISION": precision}
    return compile_ahead(symmetric_product_kernel, types, constants, target, tile.warps, stages)


def _key(numbered: tuple[int, Pair]) -> Hashable:
    return tuple((t.shape, t.stride(), t.dtype) for t in numbered[1])


def run(
    X: list[Tensor], M: list[Tensor], residual: Tensor, precision: str | None = None, backend: str | None = None
) -> None:
    """The operator on every device: bucket by bucket the kernel, or torch."""
    for bucket in buckets(enumerate(zip(X, M, strict=True)), _key):
        pairs = [pair for _, pair in bucket]
        first = pairs[0][0]
        own = residual.new_empty(len(bucket))
        if first.dtype == torch.float32 and dispatch.takes_triton(dispatch.newton_schulz(), first.device, backend):
            attempt("newton_schulz", tuple(first.shape), first.device, partial(launch, pairs, own, precision=precision),
                    partial(reference, pairs, own))  # fmt: skip
        else:
            reference(pairs, own)
        for (i, _), value in zip(bucket, own, strict=True):
            residual[i].copy_(value)


register(
    "newton_schulz_",
    "(Tensor(a!)[] X, Tensor[] M, Tensor(b!) residual, str? precision=None, str? backend=None) -> ()",
    run,
)
