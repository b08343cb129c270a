"""Preconditioning in the factors' eigenbases: out_i <- Q_G [(Q_G^T V_i Q_A) / (S + damping)] Q_A^T.

V_i, out_i and the eigenvalues S are (d_out, d_in), Q_G is (d_out, d_out) and Q_A (d_in, d_in) with eigenvectors as
columns, damping a scalar; all but damping may carry a leading batch axis B. This is (F + damping I)^-1 applied exactly,
for an F that is diag(S) in these bases, where the factored form of `kron_matmul` only approximates the sum.

Four products take 4 d_out d_in (d_out + d_in) floating-point operations. The division stands at the end of the second,
on the tile in registers, so it reads d_out d_in numbers and writes nothing of its own.

One program of the kernel computes one tile of one product; four launches serve any number of equal layers.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from kfac_triton.kernels import dispatch
from kfac_triton.kernels._grouped import DIVIDE, TILES, ahead_of_time, grouped
from kfac_triton.kernels._launch import addresses, attempt, buckets, register
from kfac_triton.kernels.tiles import Tile

__all__ = ["TILES", "Layer", "ahead_of_time", "launch", "reference", "run"]


class Layer(NamedTuple):
    """One entry of every list."""

    out: Tensor
    Q_G: Tensor
    V: Tensor
    Q_A: Tensor
    S: Tensor
    damping: Tensor


def reference(layer: Layer) -> None:
    """The specification, the operator on the CPU, and the path through torch's own libraries on a GPU."""
    out, Q_G, V, Q_A, S, damping = layer
    rotated = Q_G.mT @ (V.to(out.dtype) @ Q_A)
    rotated /= S + damping.to(out.dtype)
    out.copy_(Q_G @ (rotated @ Q_A.mT))


def launch(bucket: Sequence[Layer], *, tile: Tile | None = None, precision: str | None = None) -> None:
    """Runs the kernel on equal float32 layers: four launches."""
    out, Q_G, V, Q_A, S, damping = (list(column) for column in zip(*bucket, strict=True))
    V = [v.float() if v.dtype == torch.float64 else v for v in V]
    batch = out[0].shape[0] if out[0].ndim > 2 else 1
    dampings = [d.float() for d in damping]
    right, both = ([torch.empty_strided(o.shape, o.stride(), device=o.device) for o in out] for _ in range(2))
    where = [addresses(S), [d.data_ptr() for d in dampings for _ in range(batch)]]
    product = partial(grouped, tile=tile, precision=precision)
    product(right, V, Q_A)
    product(both, [Q.mT for Q in Q_G], right, epilogue=DIVIDE, extra=where, like=S[0])
    product(right, both, [Q.mT for Q in Q_A])
    product(out, Q_G, right)


def _key(layer: Layer) -> Hashable:
    return tuple((t.shape, t.stride(), t.dtype) for t in layer)


def run(
    out: list[Tensor], Q_G: list[Tensor], V: list[Tensor], Q_A: list[Tensor], S: list[Tensor],
    damping: list[Tensor], precision: str | None = None, backend: str | None = None,
) -> None:  # fmt: skip
    """The operator on every device: bucket by bucket the kernel, or torch."""
    shared = {o.data_ptr() for o in out if o.numel()} & {v.data_ptr() for v in V}
    if shared:
        i = next(i for i, o in enumerate(out) if o.data_ptr() in shared)
        raise ValueError(f"out[{i}] starts at the address of an entry of V; allowed: memory of its own")
    all_layers = map(Layer, out, Q_G, V, Q_A, S, damping)
    for bucket in buckets(all_layers, _key):
        o = bucket[0].out
        count = len(bucket) * (len(o) if o.ndim == 3 else 1)
        wanted = dispatch.takes_triton(dispatch.grouped(count, *o.shape[-2:]), o.device, backend)
        if wanted and o.dtype == torch.float32:
            attempt("eigen_scale", tuple(o.shape), o.device, partial(launch, bucket, precision=precision),
                    partial(_torch, bucket))  # fmt: skip
        else:
            _torch(bucket)


def _torch(bucket: Sequence[Layer]) -> None:
    for layer in bucket:
        reference(layer)


register(
    "eigen_scale_",
    "(Tensor(a!)[] out, Tensor[] Q_G, Tensor[] V, Tensor[] Q_A, Tensor[] S, Tensor[] damping,"
    " str? precision=None, str? backend=None) -> ()",
    run,
)
