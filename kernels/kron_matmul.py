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

Where asked, `dots` (layers, 2) get <out_i, V_i>, for the trust region: over the columns before `split_i`, and over the
rest, a bias whose learning rate may be its own. They are sums over tiles in one order, and never vary between runs.

One program of the kernel computes one tile of one matrix product; two launches serve any number of equal layers.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from kfac_triton.kernels import dispatch
from kfac_triton.kernels._grouped import DOT, PLAIN, TILES, ahead_of_time, grouped
from kfac_triton.kernels._launch import addresses, attempt, buckets, register
from kfac_triton.kernels.tiles import Tile

__all__ = ["TILES", "Layer", "ahead_of_time", "launch", "layers", "reference", "run"]


class Layer(NamedTuple):
    """One entry of every list; `dots` the row (2,) of its own, or None, and `split` the first column of its second."""

    out: Tensor
    G_inv: Tensor
    V: Tensor
    A_inv: Tensor
    dots: Tensor | None
    split: int


def reference(
    out: Sequence[Tensor],
    G_inv: Sequence[Tensor],
    V: Sequence[Tensor],
    A_inv: Sequence[Tensor],
    bf16: bool = False,
    dots: Tensor | None = None,
    splits: Sequence[int] = (),
) -> None:
    """The specification, the operator on the CPU, and the path through torch's own libraries on a GPU."""
    _torch(layers(out, G_inv, V, A_inv, dots, splits), bf16)


def layers(
    out: Sequence[Tensor], G_inv: Sequence[Tensor], V: Sequence[Tensor], A_inv: Sequence[Tensor],
    dots: Tensor | None = None, splits: Sequence[int] = (),
) -> list[Layer]:  # fmt: skip
    """The lists' entries; raises ValueError where an output begins where an input does."""
    shared = {o.data_ptr() for o in out if o.numel()} & {v.data_ptr() for v in V}
    if shared:
        i = next(i for i, o in enumerate(out) if o.data_ptr() in shared)
        raise ValueError(f"out[{i}] starts at the address of an entry of V; allowed: memory of its own")
    pairs = [None] * len(out) if dots is None else dots.unbind()
    firsts = splits if splits else [o.shape[-1] for o in out]
    return [Layer(*layer) for layer in zip(out, G_inv, V, A_inv, pairs, firsts, strict=True)]


def _torch(all_layers: Sequence[Layer], bf16: bool) -> None:
    scratch: dict[torch.dtype, Tensor] = {}
    for dtype in {layer.out.dtype for layer in all_layers}:
        sizes = [_span(layer.out) for layer in all_layers if layer.out.dtype == dtype and _dense(layer)]
        scratch[dtype] = all_layers[0].out.new_empty(max(sizes, default=0), dtype=dtype)
    for layer in all_layers:
        out, G, V, A, pair, split = layer
        if bf16 and out.dtype == torch.float32 and _dense(layer):
            out.copy_(G.bfloat16() @ (V.bfloat16() @ A.bfloat16()))
        else:
            _product(layer, V.to(out.dtype), scratch[out.dtype])
        if pair is not None:
            terms = out * V
            pair[0].copy_(terms[..., :split].sum())
            pair[1].copy_(terms[..., split:].sum())


def _span(t: Tensor) -> int:
    """Elements from the first to the last one in memory."""
    return 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)) if t.numel() else 0


def _dense(layer: Layer) -> bool:
    return layer.out.ndim == layer.G_inv.ndim == layer.A_inv.ndim


def _product(layer: Layer, V: Tensor, scratch: Tensor) -> None:
    out, G, _, A, *_ = layer
    if _dense(layer):
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


def launch(bucket: Sequence[Layer], *, tile: Tile | None = None, precision: str | None = None) -> None:
    """Runs the kernel on equal dense float32 layers: two launches, and a third for their dots."""
    o, G, v, A, dots, splits = (list(column) for column in zip(*bucket, strict=True))
    scratch = o[0].new_empty(len(o), -(-_span(o[0]) // 4) * 4)  # the kernel copies 16 bytes where it may
    VA = [one.as_strided(o[0].shape, o[0].stride(), one.storage_offset()) for one in scratch]
    v = [x.float() if x.dtype == torch.float64 else x for x in v]
    grouped(VA, v, A, tile=tile, precision=precision)
    if dots[0] is None:
        grouped(o, G, VA, epilogue=PLAIN, tile=tile, precision=precision)
    else:
        grouped(o, G, VA, epilogue=DOT, extra=[addresses(v)], like=v[0], split=splits[0], sums=dots,
                tile=tile, precision=precision)  # fmt: skip


def _key(layer: Layer) -> Hashable:
    return layer.split, *((t.shape, t.stride(), t.dtype) for t in layer[:4])


def run(
    out: list[Tensor], G_inv: list[Tensor], V: list[Tensor], A_inv: list[Tensor], bf16: bool = False,
    dots: Tensor | None = None, splits: Sequence[int] = (), precision: str | None = None, backend: str | None = None,
) -> None:  # fmt: skip
    """The operator on every device: bucket by bucket the kernel, and all the rest by torch."""
    rest: list[Layer] = []
    for bucket in buckets(layers(out, G_inv, V, A_inv, dots, splits), _key):
        o = bucket[0].out
        count = len(bucket) * (len(o) if o.ndim == 3 else 1)
        wanted = dispatch.takes_triton(dispatch.grouped(count, *o.shape[-2:]), o.device, backend)
        if wanted and not bf16 and o.dtype == torch.float32 and _dense(bucket[0]):
            attempt("kron_matmul", tuple(o.shape), o.device, partial(launch, bucket, precision=precision),
                    partial(_torch, bucket, bf16))  # fmt: skip
        else:
            rest += bucket
    if rest:
        _torch(rest, bf16)


register(
    "kron_matmul_",
    "(Tensor(a!)[] out, Tensor[] G_inv, Tensor[] V, Tensor[] A_inv, bool bf16=False, Tensor(b!)? dots=None,"
    " int[] splits=[], str? precision=None, str? backend=None) -> ()",
    run,
)
