"""Products of many equal matrices in one launch: out_e <- left_e right_e, with what may follow a product at its end.

The matrices of a launch share shapes and strides, and a table of addresses says where each one is: shapes read from a
table would leave the compiler without a divisor of anything, and it would copy element by element.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kfac_triton.kernels import tiles
from kfac_triton.kernels._ahead import compile_ahead
from kfac_triton.kernels._launch import (
    addresses,
    aligned,
    device_of,
    jit,
    precision_of,
    table_of,
    tl,
    triton_dtype,
    type_named,
)
from kfac_triton.kernels._symmetric import pointer
from kfac_triton.kernels.tiles import Tile

# Square output tiles, largest first, chosen as syrk's: no register spilled on any target.
TILES = (Tile(128, 16, 8, 4), Tile(64, 32, 4, 3), Tile(32, 32, 2, 3))

PLAIN, DOT, DIVIDE, RESIDUAL = "plain", "dot", "divide", "residual"


@jit
def grouped_matmul_kernel(  # type: ignore[no-untyped-def]
    table, partials, count, M, N, K, split, left_row, left_col, right_row, right_col, out_row, out_col,
    with_row, with_col, EPILOGUE: tl.constexpr, LEFT: tl.constexpr, WITH: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out_e (M, N) <- left_e (M, K) right_e (K, N) for e < count, float32 but for left of type LEFT.

    table (5, count) int64 holds the addresses of left, right, out, and of what an epilogue needs besides:
    "dot": `with` (M, N) of type WITH; the sums of out * with over the columns before `split` and from it on go to
    partials (count, tiles, 2), one pair a tile.
    "divide": `with` (M, N) of type WITH and a scalar damping, float32; out is divided by with + damping.
    "residual": nothing; out is I - product, and partials (count, tiles, 2) get the sums of its squares, and of product
    * I, the trace.
    The grid has count x ceil(M / BLOCK) x ceil(N / BLOCK) programs, one tile each, a matrix's next to one another.
    """
    tiles_n = tl.cdiv(N, BLOCK)
    tiles_all = tl.cdiv(M, BLOCK) * tiles_n
    entry = tl.program_id(0) // tiles_all
    index = tl.program_id(0) % tiles_all
    left = pointer(table, 0, count, entry, LEFT, ALIGNED)
    right = pointer(table, 1, count, entry, tl.float32, ALIGNED)
    out = pointer(table, 2, count, entry, tl.float32, ALIGNED)

    row = index // tiles_n * BLOCK + tl.arange(0, BLOCK)
    column = index % tiles_n * BLOCK + tl.arange(0, BLOCK)
    at_m, at_n, at_k = row.to(tl.int64), column.to(tl.int64), tl.arange(0, BLOCK_K).to(tl.int64)
    left += at_m[:, None] * left_row + at_k[None, :] * left_col
    right += at_k[:, None] * right_row + at_n[None, :] * right_col
    left_step = tl.full((), BLOCK_K, tl.int64) * left_col
    right_step = tl.full((), BLOCK_K, tl.int64) * right_row
    product = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for start in tl.range(0, K, BLOCK_K):
        x = tl.load(left, mask=(at_m[:, None] < M) & (at_k[None, :] < K - start), other=0.0).to(tl.float32)
        y = tl.load(right, mask=(at_k[:, None] < K - start) & (at_n[None, :] < N), other=0.0)
        product = tl.dot(x, y, product, input_precision=PRECISION)
        left += left_step
        right += right_step

    inside = (at_m[:, None] < M) & (at_n[None, :] < N)
    first = tl.full((), 0.0, tl.float32)
    second = tl.full((), 0.0, tl.float32)
    if EPILOGUE == "dot":
        other = pointer(table, 3, count, entry, WITH, ALIGNED)
        other += at_m[:, None] * with_row + at_n[None, :] * with_col
        terms = product * tl.load(other, mask=inside, other=0.0).to(tl.float32)
        first = tl.sum(tl.where(column[None, :] < split, terms, 0.0))
        second = tl.sum(tl.where(column[None, :] < split, 0.0, terms))
    elif EPILOGUE == "divide":
        other = pointer(table, 3, count, entry, WITH, ALIGNED)
        other += at_m[:, None] * with_row + at_n[None, :] * with_col
        damping = tl.load(pointer(table, 4, count, entry, tl.float32, False))
        product = product / (tl.load(other, mask=inside, other=1.0).to(tl.float32) + damping)
    elif EPILOGUE == "residual":
        on_diagonal = (row[:, None] == column[None, :]) & inside
        second = tl.sum(tl.where(on_diagonal, product, 0.0))
        product = tl.where(on_diagonal, 1.0, 0.0) - product
        first = tl.sum(tl.where(inside, product * product, 0.0))
    out += at_m[:, None] * out_row + at_n[None, :] * out_col
    tl.store(out, product, mask=inside)
    if EPILOGUE == "dot" or EPILOGUE == "residual":
        place = partials + (entry.to(tl.int64) * tiles_all + index) * 2
        tl.store(place, first)
        tl.store(place + 1, second)


@jit
def add_partials_kernel(partials, table, size, WRITTEN: tl.constexpr):  # type: ignore[no-untyped-def]
    """The pair at table[e] <- sums of partials (programs, size, 2) over e's `size` pairs, in their order."""
    entry = tl.program_id(0)
    place = partials + entry.to(tl.int64) * size * 2
    first = tl.full((), 0.0, WRITTEN)
    second = tl.full((), 0.0, WRITTEN)
    for i in tl.range(0, size):
        first += tl.load(place + 2 * i).to(WRITTEN)
        second += tl.load(place + 2 * i + 1).to(WRITTEN)
    written = tl.load(table + entry).to(tl.pointer_type(WRITTEN))
    tl.store(written, first)
    tl.store(written + 1, second)


def grouped(
    out: Sequence[Tensor],
    left: Sequence[Tensor],
    right: Sequence[Tensor],
    *,
    epilogue: str = PLAIN,
    extra: Sequence[Sequence[int]] = (),
    like: Tensor | None = None,
    split: int = 0,
    sums: Sequence[Tensor] = (),
    tile: Tile | None = None,
    precision: str | None = None,
) -> None:
    """One launch of equal float32 products; each tensor a matrix, or a batch of matrices.

    Args:
        extra: rows of the table beyond out's: addresses, one for each matrix.
        like: what the matrices of "dot" and "divide" have for a dtype and strides.
        sums: one pair of adjacent numbers for each entry of the lists, for an epilogue that adds up.
    """
    rows = [addresses(left), addresses(right), addresses(out)]
    count, (M, N), K = len(rows[0]), out[0].shape[-2:], left[0].shape[-1]
    device = out[0].device
    if count == 0 or M == 0 or N == 0:
        for pair in sums:
            pair.zero_()
        return
    precision = precision_of(torch.float32, precision)
    tile = tile or choose(count, (M, N, K), precision, device, allowed_tiles(epilogue))
    programs = -(-M // tile.block) * -(-N // tile.block)
    table = table_of([*rows, *extra, *rows[2:] * (2 - len(extra))], device)  # addresses alone: all are of one type
    whole = aligned(*rows, *(extra[:1] if like is not None else ()))
    partials = torch.empty(count * programs * 2 if sums else 1, dtype=torch.float32, device=device)
    with device_of(device):
        grouped_matmul_kernel[(count * programs,)](
            table, partials, count, M, N, K, split,
            *left[0].stride()[-2:], *right[0].stride()[-2:], *out[0].stride()[-2:],
            *((0, 0) if like is None else like.stride()[-2:]),
            EPILOGUE=epilogue, LEFT=triton_dtype(left[0].dtype), ALIGNED=whole,
            WITH=triton_dtype(torch.float32 if like is None else like.dtype),
            BLOCK=tile.block, BLOCK_K=tile.block_k, PRECISION=precision, **tiles.options(tile),
        )  # fmt: skip
        if sums:
            add_partials_kernel[(len(sums),)](
                partials, table_of([[pair.data_ptr() for pair in sums]], device), count // len(sums) * programs,
                WRITTEN=triton_dtype(sums[0].dtype), num_warps=1,
            )  # fmt: skip


def allowed_tiles(epilogue: str) -> Sequence[Tile]:
    """What an epilogue may use, of `TILES`: its other matrix and a product of side 128 spill on sm_90."""
    return TILES[1:] if epilogue in (DOT, DIVIDE) else TILES


def choose(
    count: int, shape: tuple[int, int, int], precision: str, device: torch.device, allowed: Sequence[Tile] = TILES
) -> Tile:
    """The table's tile, or the largest one that fills the device; `shape` is (M, N, K)."""
    M, N, _ = shape
    return tiles.tabled_or_filling(
        tiles.Key("kron_matmul", "float32", precision),
        (count, *shape),
        device,
        allowed,
        min(M, N),
        lambda tile: count * -(-M // tile.block) * -(-N // tile.block),
    ).tile


def ahead_of_time(
    target: Any, dtype: str, tile: Tile, stages: int, precision: str, epilogue: str = PLAIN, transposed: bool = False
) -> Any:
    """The kernel compiled for a `GPUTarget`, for matrices in memory order; `dtype` is Triton's name for LEFT.

    `transposed`: the left matrix in the order of its columns, as Q^T.
    """
    numbers = ("count", "M", "N", "K", "split", "left_row", "left_col", "right_row", "out_row", "with_row")
    types = {"table": "*i64", "partials": "*fp32"} | dict.fromkeys(numbers, "i32")
    constants: dict[str, Any] = {"left_row" if transposed else "left_col": 1}
    constants |= {"right_col": 1, "out_col": 1, "with_col": 1, "LEFT": type_named(dtype), "WITH": tl.float32}
    constants |= {"ALIGNED": True, "EPILOGUE": epilogue}
    constants |= {"BLOCK": tile.block, "BLOCK_K": tile.block_k, "PRECISION": precision}
    return compile_ahead(grouped_matmul_kernel, types, constants, target, tile.warps, stages)
