"""Products with the two factors of many layers at once: out_i <- G_inv_i V_i A_inv_i.

V_i and out_i are (d_out, d_in), G_inv_i is (d_out, d_out), A_inv_i is (d_in, d_in); all may carry a leading batch axis
B, as the groups of a convolution do. A factor with one axis less is a diagonal, and scales rows (G_inv) or columns
(A_inv).

A dense layer takes 2 d_out d_in (d_out + d_in) floating-point operations in either order of the two products, and one
intermediate of V's size in either, so A_inv always goes first. It reads d_out^2 + d_in^2 + 2 d_out d_in elements and
writes 2 d_out d_in. A diagonal factor goes last, in place on out, and needs no intermediate. The intermediate lies in
memory as out does, so who calls with aligned rows has both products write aligned rows.

With `bf16`, dense float32 layers are multiplied as bfloat16 matrices, the intermediate rounded too, with sums in
float32: an error of some 2^-8 of the largest entries.

One program of the kernel computes one tile of one matrix product; the matrices of a launch share shapes and strides,
and a table of addresses says where each one is. Two launches serve any number of equal layers.
"""

from __future__ import annotations

from collections import defaultdict
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

Layer = tuple[Tensor, Tensor, Tensor, Tensor]


def reference(out: list[Tensor], G_inv: list[Tensor], V: list[Tensor], A_inv: list[Tensor], bf16: bool = False) -> None:
    """The specification, the operator on the CPU, and the path through torch's own libraries on a GPU."""
    layers = _layers(out, G_inv, V, A_inv)
    scratch: dict[torch.dtype, Tensor] = {}
    for dtype in {o.dtype for o in out}:
        sizes = [_span(o) for o, G, _, A in layers if o.dtype == dtype and _dense(o, G, A)]
        scratch[dtype] = out[0].new_empty(max(sizes, default=0), dtype=dtype)
    for o, G, v, A in layers:
        if bf16 and o.dtype == torch.float32 and _dense(o, G, A):
            o.copy_(G.bfloat16() @ (v.bfloat16() @ A.bfloat16()))
        else:
            _product(o, G, v.to(o.dtype), A, scratch[o.dtype])


def _layers(out: list[Tensor], G_inv: list[Tensor], V: list[Tensor], A_inv: list[Tensor]) -> list[Layer]:
    shared = {o.data_ptr() for o in out if o.numel()} & {v.data_ptr() for v in V}
    if shared:
        i = next(i for i, o in enumerate(out) if o.data_ptr() in shared)
        raise ValueError(f"out[{i}] starts at the address of an entry of V; allowed: memory of its own")
    return list(zip(out, G_inv, V, A_inv, strict=True))


def _span(t: Tensor) -> int:
    """Elements from the first to the last one in memory."""
    return 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)) if t.numel() else 0


def _dense(out: Tensor, G: Tensor, A: Tensor) -> bool:
    return out.ndim == G.ndim == A.ndim


def _product(out: Tensor, G: Tensor, V: Tensor, A: Tensor, scratch: Tensor) -> None:
    if _dense(out, G, A):
        VA = scratch.as_strided(out.shape, out.stride())
        torch.matmul(V, A, out=VA)
        torch.matmul(G, VA, out=out)
    elif G.ndim == out.ndim:
        torch.matmul(G, V, out=out)
        out.mul_(A.unsqueeze(-2))
    elif A.ndim == out.ndim:
        torch.matmul(V, A, out=out)
        out.mul_(G.unsqueeze(-1))
    else:
        torch.mul(V, G.unsqueeze(-1), out=out)
        out.mul_(A.unsqueeze(-2))


# Square output tiles, largest first, chosen as syrk's: no register spilled on any target, no timing on a device.
TILES = (Tile(128, 16, 8, 4), Tile(64, 32, 4, 3), Tile(32, 32, 4, 3))

# Where launches, not arithmetic, take the time, two for a bucket replace two for each layer. Beyond this side, or with
# fewer matrices, torch's library should be as good or better. Neither number was measured on a device.
GROUPED_FROM = 4
GROUPED_SIDE = 512


@jit
def grouped_matmul_kernel(  # type: ignore[no-untyped-def]
    table, count, M, N, K, left_row, left_col, right_row, right_col, out_row, out_col,
    LEFT: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out_e (M, N) <- left_e (M, K) right_e (K, N) for e < count, float32 but for left of type LEFT.

    table (3, count) int64 holds the addresses of left, right and out. The grid has count x ceil(M / BLOCK) x
    ceil(N / BLOCK) programs, one tile each, the tiles of a matrix next to one another.
    """
    tiles_n = tl.cdiv(N, BLOCK)
    tiles = tl.cdiv(M, BLOCK) * tiles_n
    entry = tl.program_id(0) // tiles
    index = tl.program_id(0) % tiles
    left = tl.load(table + entry).to(tl.pointer_type(LEFT))
    right = tl.load(table + count + entry).to(tl.pointer_type(tl.float32))
    out = tl.load(table + 2 * count + entry).to(tl.pointer_type(tl.float32))
    if ALIGNED:  # an address read from memory tells the compiler nothing, and it would copy element by element
        left = tl.multiple_of(left, 16)
        right = tl.multiple_of(right, 16)
        out = tl.multiple_of(out, 16)

    at_m = (index // tiles_n * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    at_n = (index % tiles_n * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    at_k = tl.arange(0, BLOCK_K).to(tl.int64)
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
    out += at_m[:, None] * out_row + at_n[None, :] * out_col
    tl.store(out, product, mask=(at_m[:, None] < M) & (at_n[None, :] < N))


def launch(
    out: list[Tensor],
    G_inv: list[Tensor],
    V: list[Tensor],
    A_inv: list[Tensor],
    *,
    tile: Tile | None = None,
    precision: str | None = None,
) -> None:
    """Runs the kernel on dense float32 layers: two launches for each bucket of equal shapes, strides and dtypes."""
    for bucket in _buckets(_layers(out, G_inv, V, A_inv)):
        o, G, v, A = (list(column) for column in zip(*bucket, strict=True))
        scratch = o[0].new_empty(len(o), -(-_span(o[0]) // 4) * 4)  # the kernel copies 16 bytes where it may
        VA = [one.as_strided(o[0].shape, o[0].stride(), one.storage_offset()) for one in scratch]
        _grouped(VA, [x.float() if x.dtype == torch.float64 else x for x in v], A, tile, precision)
        _grouped(o, G, VA, tile, precision)


def _buckets(layers: list[Layer]) -> list[list[Layer]]:
    buckets: dict[Any, list[Layer]] = defaultdict(list)
    for layer in layers:
        buckets[tuple((t.shape, t.stride(), t.dtype) for t in layer)].append(layer)
    return list(buckets.values())


def _grouped(
    out: list[Tensor], left: list[Tensor], right: list[Tensor], tile: Tile | None, precision: str | None
) -> None:
    rows = [_addresses(left), _addresses(right), _addresses(out)]
    count, (M, N), K = len(rows[0]), out[0].shape[-2:], left[0].shape[-1]
    device = out[0].device
    if count == 0 or M == 0 or N == 0:
        return
    # Pinned, so that the copy waits for nothing that the device still has to do.
    table = torch.tensor(rows, dtype=torch.int64, pin_memory=device.type == "cuda").to(device, non_blocking=True)
    tiles = fitting(TILES, min(M, N))
    tile = tile or largest_filling(tiles, lambda tile: count * _tiles(M, N, tile.block), device)[0]
    with device_of(out[0]):
        grouped_matmul_kernel[(count * _tiles(M, N, tile.block),)](
            table, count, M, N, K, *left[0].stride()[-2:], *right[0].stride()[-2:], *out[0].stride()[-2:],
            LEFT=_triton_dtype(left[0].dtype), ALIGNED=all(p % 16 == 0 for row in rows for p in row),
            BLOCK=tile.block, BLOCK_K=tile.block_k, PRECISION=precision or float32_precision(),
            num_warps=tile.warps, num_stages=stages_here(tile),
        )  # fmt: skip


def _addresses(tensors: list[Tensor]) -> list[int]:
    """Where each matrix starts; a batch is so many matrices."""
    addresses = []
    for t in tensors:
        step = t.stride(0) * t.element_size() if t.ndim == 3 else 0
        addresses += [t.data_ptr() + b * step for b in range(t.shape[0] if t.ndim == 3 else 1)]
    return addresses


def _tiles(M: int, N: int, block: int) -> int:
    return -(-M // block) * -(-N // block)


def _triton_dtype(dtype: torch.dtype) -> Any:
    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]


def ahead_of_time(target: Any, dtype: str, tile: Tile, stages: int, precision: str) -> Any:
    """The kernel compiled for a `GPUTarget`, for matrices in memory order; `dtype` is Triton's name for LEFT."""
    types = {"table": "*i64"} | {name: "i32" for name in ("count", "M", "N", "K", "left_row", "right_row", "out_row")}
    left = {"fp32": tl.float32, "bf16": tl.bfloat16, "fp16": tl.float16}[dtype]
    constants = {"left_col": 1, "right_col": 1, "out_col": 1, "LEFT": left, "ALIGNED": True}
    constants |= {"BLOCK": tile.block, "BLOCK_K": tile.block_k, "PRECISION": precision}
    return compile_ahead(grouped_matmul_kernel, types, constants, target, tile.warps, stages)


def _on_gpu(out: list[Tensor], G_inv: list[Tensor], V: list[Tensor], A_inv: list[Tensor], bf16: bool = False) -> None:
    rest: list[Layer] = []
    for bucket in _buckets(_layers(out, G_inv, V, A_inv)):
        o, G, _, A = bucket[0]
        grouped = len(bucket) * (len(o) if o.ndim == 3 else 1) >= GROUPED_FROM and max(o.shape[-2:]) <= GROUPED_SIDE
        if not bf16 and o.dtype == torch.float32 and _dense(o, G, A) and prefers_triton(default=grouped):
            launch(*(list(column) for column in zip(*bucket, strict=True)))
        else:
            rest += bucket
    if rest:
        out, G_inv, V, A_inv = (list(column) for column in zip(*rest, strict=True))
        reference(out, G_inv, V, A_inv, bf16)


register(
    "kron_matmul_",
    "(Tensor(a!)[] out, Tensor[] G_inv, Tensor[] V, Tensor[] A_inv, bool bf16=False) -> ()",
    cpu=reference,
    cuda=_on_gpu,
)
