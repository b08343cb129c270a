"""What the kernels with a symmetric output share: the lower triangle, mirrored stores, the split of a long sum.

Square tiles (i, j), i >= j, of the lower triangle are computed, each by one program, and stored twice. With a
rectangular tile, a program would own elements on both sides of the diagonal: two programs would write them, and each
would decay them. A long sum is split into parts; the parts go to a workspace and are added in one order, so the result
never varies between runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kfac_triton.kernels._ahead import compile_ahead
from kfac_triton.kernels._launch import jit, tl


def triangle_of(d: int, block: int) -> int:
    """Tiles of the lower triangle of a (d, d) matrix."""
    side = -(-d // block)
    return side * (side + 1) // 2


@jit
def triangle(index):  # type: ignore[no-untyped-def]
    """Row and column (i, j), i >= j, of the index-th tile of a lower triangle counted row by row.

    The root in float32 is off by one at most; integers settle it.
    """
    i = ((tl.sqrt(8.0 * index.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    i = tl.where(i * (i + 1) // 2 > index, i - 1, i)
    i = tl.where((i + 1) * (i + 2) // 2 <= index, i + 1, i)
    return i, index - i * (i + 1) // 2


@jit
def pointer(table, row, count, entry, TYPE: tl.constexpr, ALIGNED: tl.constexpr):  # type: ignore[no-untyped-def]
    """The address in table (rows, count) at [row, entry]; ALIGNED, a multiple of 16 bytes: one read from memory tells
    the compiler nothing, and it would copy element by element.
    """
    address = tl.load(table + row * count + entry).to(tl.pointer_type(TYPE))
    if ALIGNED:
        address = tl.multiple_of(address, 16)
    return address


@jit
def part_of(steps, part, parts):  # type: ignore[no-untyped-def]
    """First step of a part, and the one behind its last."""
    size = tl.cdiv(steps, parts)
    first = tl.minimum(part * size, steps)
    return first, tl.minimum(first + size, steps)


@jit
def store_tile(F, i, j, d, F_row, product, a, b, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """F[i, j] and F[j, i] <- b F[i, j] + a product, in tiles, of a (d, d) matrix with rows F_row apart.

    b = 0 reads nothing. A tile inside the matrix is stored without masks, 16 bytes at a time where the rows allow.
    """
    at_i = i * BLOCK + tl.arange(0, BLOCK)
    at_j = j * BLOCK + tl.arange(0, BLOCK)
    lower = F + at_i.to(tl.int64)[:, None] * F_row + at_j[None, :]
    upper = F + at_j.to(tl.int64)[:, None] * F_row + at_i[None, :]
    # Three TF32 products are added in an order that a transposition swaps, so a diagonal tile is mirrored too.
    keep = (at_i[:, None] >= at_j[None, :]) | (i != j)
    if (i + 1) * BLOCK <= d:
        new = a * product
        if b != 0.0:
            new += b * tl.load(lower)
        tl.store(lower, tl.where(keep, new, tl.trans(new)))
        if i != j:
            tl.store(upper, tl.trans(new))
    else:
        inside = (at_i[:, None] < d) & (at_j[None, :] < d)
        new = a * product
        if b != 0.0:
            new += b * tl.load(lower, mask=inside, other=0.0)
        tl.store(lower, tl.where(keep, new, tl.trans(new)), mask=inside)
        if i != j:
            tl.store(upper, tl.trans(new), mask=(at_j[:, None] < d) & (at_i[None, :] < d))


@jit
def store_border(F, i, d, F_row, sums, rows, a, b, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """F[d, i] and F[i, d] <- b F[d, i] + a sums, in blocks; the first block adds the corner, b F[d, d] + a rows."""
    at_i = i * BLOCK + tl.arange(0, BLOCK)
    inside = at_i < d
    last_row = F + tl.full((), 1, tl.int64) * d * F_row
    new = a * sums
    if b != 0.0:
        new += b * tl.load(last_row + at_i, mask=inside, other=0.0)
    tl.store(last_row + at_i, new, mask=inside)
    tl.store(F + at_i.to(tl.int64) * F_row + d, new, mask=inside)
    if i == 0:
        corner = a * rows
        if b != 0.0:
            corner += b * tl.load(last_row + d)
        tl.store(last_row + d, corner)


@jit
def store_part(workspace, entry, part, parts, index, programs, product, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Puts a tile's part where `reduce_kernel` looks for it: workspace (count, parts, programs, BLOCK, BLOCK)."""
    at = tl.arange(0, BLOCK)
    slot = (entry.to(tl.int64) * parts + part) * programs + index
    tl.store(workspace + slot * (BLOCK * BLOCK) + at[:, None] * BLOCK + at[None, :], product)


@jit
def store_border_part(workspace, entry, part, parts, index, programs, sums, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The same for a block of column sums, the first row of its slot."""
    slot = (entry.to(tl.int64) * parts + part) * programs + index
    tl.store(workspace + slot * (BLOCK * BLOCK) + tl.arange(0, BLOCK), sums)


@jit
def weights(table, count, entry, ALPHA: tl.constexpr, BETA: tl.constexpr):  # type: ignore[no-untyped-def]
    """(alpha, beta) of an entry, float32; rows 2 and 3 of the table have their addresses."""
    a = tl.load(pointer(table, 2, count, entry, ALPHA, False)).to(tl.float32)
    b = tl.load(pointer(table, 3, count, entry, BETA, False)).to(tl.float32)
    return a, b


@jit
def reduce_kernel(  # type: ignore[no-untyped-def]
    table, workspace, count, parts, rows, d, F_row,
    BIAS: tl.constexpr, ALPHA: tl.constexpr, BETA: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """F <- beta F + alpha (sum of the parts), one tile or one border block a program, parts in their order.

    table (4, count) int64 holds the addresses of F, X, alpha and beta; workspace as in `store_part`. `rows`: rows of
    X, for the corner.
    """
    side = tl.cdiv(d, BLOCK)
    tiles = side * (side + 1) // 2
    programs = tiles + side if BIAS else tiles
    entry = tl.program_id(0) // programs
    index = tl.program_id(0) % programs
    F = pointer(table, 0, count, entry, tl.float32, ALIGNED)
    a, b = weights(table, count, entry, ALPHA, BETA)
    present = tl.where(a == 0.0, 0, parts)  # alpha = 0 computed no part
    at = tl.arange(0, BLOCK)
    slot = entry.to(tl.int64) * parts * programs + index
    if index < tiles:
        i, j = triangle(index)
        product = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
        for part in tl.range(0, present):
            here = workspace + (slot + part * programs) * (BLOCK * BLOCK)
            product += tl.load(here + at[:, None] * BLOCK + at[None, :])
        store_tile(F, i, j, d, F_row, product, a, b, BLOCK)
    elif BIAS:
        sums = tl.zeros((BLOCK,), dtype=tl.float32)
        for part in tl.range(0, present):
            sums += tl.load(workspace + (slot + part * programs) * (BLOCK * BLOCK) + at)
        store_border(F, index - tiles, d, F_row, sums, rows, a, b, BLOCK)


def workspace_for(count: int, parts: int, programs: int, block: int, device: torch.device) -> Tensor:
    """Room for the parts of every tile; one element where the sum is not split."""
    size = count * parts * programs * block * block if parts > 1 else 1
    return torch.empty(size, dtype=torch.float32, device=device)


def ahead_of_time(target: Any, dtype: str, tile: Any, stages: int, precision: str, bias: bool = True) -> Any:
    """`reduce_kernel` compiled for a `GPUTarget`; it knows neither dtype, precision nor stages."""
    types = {"table": "*i64", "workspace": "*fp32"} | dict.fromkeys(("count", "parts", "rows", "d", "F_row"), "i32")
    constants = {"BIAS": bias, "ALPHA": tl.float32, "BETA": tl.float32, "ALIGNED": True, "BLOCK": tile.block}
    return compile_ahead(reduce_kernel, types, constants, target, tile.warps, 1)
