"""The end of a step in one pass: buf <- momentum buf + nu V,  W <- W - lr (buf + weight_decay W).

W, buf and V are (rows, taps, channels), any strides: V of a convolution has its channels innermost, its weight has not.
W and buf have one dtype, V is float32. nu, lr, momentum and weight_decay are scalars on the device, so that a schedule
changes no launch and a CUDA graph replays with the numbers of the day. Without buf, W moves by nu V itself.

Each element takes 6 floating-point operations; W and buf are read and written once and V read once, in place of the
four passes that scaling, momentum, decay and the write take apart. All is computed in float32 and rounded once.

One program of the kernel updates BLOCK elements of one tensor; one launch serves any number of equal tensors.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kfac_triton.kernels import dispatch
from kfac_triton.kernels._ahead import compile_ahead
from kfac_triton.kernels._launch import (
    addresses,
    aligned,
    attempt,
    buckets,
    device_of,
    jit,
    register,
    table_of,
    tl,
    triton_dtype,
    type_named,
)
from kfac_triton.kernels._symmetric import pointer
from kfac_triton.kernels.tiles import Tile

BLOCK, WARPS = 1024, 4  # eight elements a thread, two loads of 16 bytes


class Entry(NamedTuple):
    """One tensor; `buffer` None without momentum, every scalar 0-d."""

    W: Tensor
    buffer: Tensor | None
    V: Tensor
    nu: Tensor
    lr: Tensor
    momentum: Tensor
    weight_decay: Tensor


def reference(entry: Entry) -> None:
    """The specification, and the operator wherever the kernel does not run."""
    W, buffer, V, nu, lr, momentum, weight_decay = entry
    wide = torch.promote_types(W.dtype, torch.float32)
    nu, lr, momentum, weight_decay = (scalar.to(wide) for scalar in (nu, lr, momentum, weight_decay))
    direction = V.to(wide) * nu
    if buffer is not None:
        direction = buffer.to(wide) * momentum + direction
        buffer.copy_(direction)
    W.copy_(W.to(wide) - lr * (direction + weight_decay * W.to(wide)))


@jit
def fused_update_kernel(  # type: ignore[no-untyped-def]
    table, count, rows, taps, channels, W_row, W_tap, W_channel, B_row, B_tap, B_channel, V_row, V_tap, V_channel,
    MOMENTUM: tl.constexpr, VALUE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The update of W_e and buf_e (rows, taps, channels), of type VALUE, by V_e, float32, for e < count.

    table (7, count) int64 holds the addresses of W, buf, V, nu, lr, momentum and weight_decay, float32 scalars.
    The grid has count x ceil(rows taps channels / BLOCK) programs. MOMENTUM: there is a buf.
    """
    blocks = tl.cdiv(rows * taps * channels, BLOCK)
    entry = tl.program_id(0) // blocks
    at = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = at < rows * taps * channels
    channel = (at % channels).to(tl.int64)
    tap = (at // channels % taps).to(tl.int64)
    row = (at // (channels * taps)).to(tl.int64)
    nu = tl.load(pointer(table, 3, count, entry, tl.float32, False)).to(tl.float32)
    lr = tl.load(pointer(table, 4, count, entry, tl.float32, False)).to(tl.float32)
    weight_decay = tl.load(pointer(table, 6, count, entry, tl.float32, False)).to(tl.float32)
    W = pointer(table, 0, count, entry, VALUE, ALIGNED) + row * W_row + tap * W_tap + channel * W_channel
    V = pointer(table, 2, count, entry, tl.float32, ALIGNED) + row * V_row + tap * V_tap + channel * V_channel
    direction = nu * tl.load(V, mask=inside, other=0.0)
    if MOMENTUM:
        momentum = tl.load(pointer(table, 5, count, entry, tl.float32, False)).to(tl.float32)
        buffer = pointer(table, 1, count, entry, VALUE, ALIGNED) + row * B_row + tap * B_tap + channel * B_channel
        direction += momentum * tl.load(buffer, mask=inside, other=0.0).to(tl.float32)
        tl.store(buffer, direction.to(VALUE), mask=inside)
    w = tl.load(W, mask=inside, other=0.0).to(tl.float32)
    tl.store(W, (w - lr * (direction + weight_decay * w)).to(VALUE), mask=inside)


def launch(bucket: Sequence[Entry], *, block: int = BLOCK) -> None:
    """Runs the kernel once on equal entries."""
    W, buffer, V, *scalars = (list(column) for column in zip(*bucket, strict=True))
    scalars = [[scalar.float() for scalar in column] for column in scalars]
    count, first, held = len(bucket), bucket[0], [W if b is None else b for W, b, *_ in bucket]
    if first.W.numel() == 0:
        return
    rows = [addresses(tensors, axes=3) for tensors in (W, held, V)]
    rows += [[scalar.data_ptr() for scalar in column] for column in scalars]
    with device_of(first.W.device):
        fused_update_kernel[(count * -(-first.W.numel() // block),)](
            table_of(rows, first.W.device), count, *first.W.shape,
            *first.W.stride(), *held[0].stride(), *first.V.stride(),
            MOMENTUM=buffer[0] is not None, VALUE=triton_dtype(first.W.dtype),
            ALIGNED=aligned(*rows[:3]), BLOCK=block, num_warps=WARPS,
        )  # fmt: skip


def ahead_of_time(
    target: Any, dtype: str, tile: Tile | None, stages: int, precision: str, momentum: bool = True, conv: bool = False
) -> Any:
    """The kernel compiled for a `GPUTarget`, its channels contiguous, but for the weight of a `conv`."""
    strides = [f"{t}_{axis}" for t in "WBV" for axis in ("row", "tap", "channel")]
    types = {"table": "*i64"} | dict.fromkeys(("count", "rows", "taps", "channels", *strides), "i32")
    unit = ["V_channel"] if conv else ["W_channel", "B_channel", "V_channel"]
    constants: dict[str, Any] = dict.fromkeys(unit, 1) | {"MOMENTUM": momentum, "VALUE": type_named(dtype)}
    constants |= {"ALIGNED": True, "BLOCK": BLOCK}
    return compile_ahead(fused_update_kernel, types, constants, target, WARPS, 1)


def _key(entry: Entry) -> Hashable:
    return tuple(None if t is None else (t.shape, t.stride(), t.dtype) for t in entry)


def run(
    W: list[Tensor], buffer: list[Tensor], V: list[Tensor], nu: list[Tensor], lr: list[Tensor],
    momentum: list[Tensor], weight_decay: list[Tensor], backend: str | None = None,
) -> None:  # fmt: skip
    """The operator on every device: bucket by bucket the kernel, or torch; an empty `buffer` means no momentum."""
    buffers = buffer if buffer else [None] * len(W)
    entries = list(map(Entry, W, buffers, V, nu, lr, momentum, weight_decay))
    for bucket in buckets(entries, _key):
        first = bucket[0]
        narrow = first.W.dtype != torch.float64 and first.V.dtype == torch.float32
        if narrow and dispatch.takes_triton(True, first.W.device, backend):
            attempt("fused_update", tuple(first.W.shape), first.W.device, partial(launch, bucket),
                    partial(_torch, bucket))  # fmt: skip
        else:
            _torch(bucket)


def _torch(bucket: Sequence[Entry]) -> None:
    for entry in bucket:
        reference(entry)


register(
    "fused_update_",
    "(Tensor(a!)[] W, Tensor(b!)[] buffer, Tensor[] V, Tensor[] nu, Tensor[] lr, Tensor[] momentum,"
    " Tensor[] weight_decay, str? backend=None) -> ()",
    run,
)
