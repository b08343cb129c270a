"""The one door to the kernels: operators that only write the tensors they are given, checked here.

Every operator takes lists, one entry for each layer, so that a graph holds one node however many layers there are. The
kernels' modules are loaded by the first call (or `load`), so that this import is cheap. On the CPU, and wherever
Triton is absent, the operators run in plain torch. On a GPU each has a rule for taking Triton or torch's libraries,
all of them in `kernels/dispatch.py`; `backend`, or the environment variable KFAC_TRITON_BACKEND, "triton" or "torch",
overrules it. Triton's kernels add in float32, so float64 factors, and diagonal ones, go to torch in any case.

No check reads a tensor's values: nothing here waits for a device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kfac_triton.ops.backends import ROUNDED, fuses, iterates, load, multiplies_bf16_faster, takes_patches
from kfac_triton.ops.checks import (
    FACTOR_DTYPES,
    at,
    check_choices,
    check_conv_syrk,
    check_device,
    check_dtype,
    check_layer,
    check_lengths,
    check_scalar,
    check_shape,
    check_syrk,
    check_update,
)
from kfac_triton.ops.rows import ALIGNMENT, OneHot, Patches, Rows, padded, padded_width, whole

__all__ = [
    "ALIGNMENT",
    "ROUNDED",
    "OneHot",
    "Patches",
    "Rows",
    "conv_syrk_",
    "eigen_scale_",
    "fused_update_",
    "fuses",
    "iterates",
    "kron_matmul_",
    "load",
    "multiplies_bf16_faster",
    "newton_schulz_",
    "padded",
    "padded_width",
    "syrk_",
    "takes_patches",
    "whole",
]


def syrk_(
    F: Sequence[Tensor],
    X: Sequence[Tensor],
    alpha: Sequence[Tensor],
    beta: Sequence[Tensor],
    *,
    bias: Sequence[bool] | None = None,
    precision: str | None = None,
    backend: str | None = None,
) -> None:
    """Updates running second moments in place: F_i <- beta_i F_i + alpha_i Xa_i^T Xa_i, exactly symmetric.

    Xa is X, or [X, 1] with a ones column last when `bias`. F must be symmetric on entry: only its lower triangle
    counts. beta = 0 never reads F, and alpha = 0 never lets X in, whatever either holds; so a decision taken on the
    device, to skip a non-finite batch for example, is a choice of alpha and beta.

    Args:
        F: (D, D) or (B, D, D) each, float32 or float64, unit column stride, D = d + 1 with `bias` and d without; no
            two at the same address.
        X: (n, d) or (B, n, d), n >= 0, or with an axis of images before n, over which is summed too; float32, float64,
            bfloat16 or float16, any strides. Sums are taken in F's dtype.
        alpha, beta: 0-d floating-point tensors on F's device.
        bias: false for all by default.
        precision: of float32 products on matrix units: "ieee", "tf32", "tf32x3" (CUDA), "bf16x6" (ROCm); by default
            what torch's own setting asks for, else the one as exact as float32. Torch's libraries do as they are set.
        backend: "triton" or "torch", whatever the rule says.

    Raises:
        ValueError: the lists differ in length, or an entry's shape, dtype, device or stride is not one of these.
    """
    flags = [False] * len(F) if bias is None else list(bias)
    check_lengths(len(F), "F", X=X, alpha=alpha, beta=beta, bias=flags)
    check_choices(precision)
    for i, (f, x, a, b, ones) in enumerate(zip(F, X, alpha, beta, flags, strict=True)):
        check_syrk(at(i), f, x, ones)
        check_scalar(f"alpha{at(i)}", a, f)
        check_scalar(f"beta{at(i)}", b, f)
    if len(F) == 0:
        return
    load()
    torch.ops.kfac_triton.syrk_(list(F), list(X), list(alpha), list(beta), flags, precision, backend)


def conv_syrk_(
    F: Sequence[Tensor],
    P: Sequence[Patches],
    alpha: Sequence[Tensor],
    beta: Sequence[Tensor],
    *,
    bias: Sequence[bool] | None = None,
    precision: str | None = None,
    backend: str | None = None,
) -> None:
    """`syrk_` of the rows of patches, (D, D) or (groups, D, D) each, that are never written where a kernel serves.

    Raises:
        ValueError: as `syrk_`.
    """
    flags = [False] * len(F) if bias is None else list(bias)
    check_lengths(len(F), "F", P=P, alpha=alpha, beta=beta, bias=flags)
    check_choices(precision)
    for i, (f, p, a, b, ones) in enumerate(zip(F, P, alpha, beta, flags, strict=True)):
        check_conv_syrk(i, f, p, ones)
        check_scalar(f"alpha{at(i)}", a, f)
        check_scalar(f"beta{at(i)}", b, f)
    if len(F) == 0:
        return
    load()
    windows = [size for p in P for size in p.window]
    torch.ops.kfac_triton.conv_syrk_(
        list(F), [p.image for p in P], list(alpha), list(beta), flags, windows, precision, backend
    )


def kron_matmul_(
    out: Sequence[Tensor],
    G_inv: Sequence[Tensor],
    V: Sequence[Tensor],
    A_inv: Sequence[Tensor],
    *,
    bf16: bool = False,
    dots: Tensor | None = None,
    splits: Sequence[int] = (),
    precision: str | None = None,
    backend: str | None = None,
) -> None:
    """Preconditions a list of layers: out_i <- G_inv_i V_i A_inv_i.

    Args:
        out: (d_out, d_in) or (B, d_out, d_in) each, float32 or float64; memory apart from V's.
        G_inv: (d_out, d_out) or (B, d_out, d_out); with one axis less, a diagonal that scales the rows. out's dtype.
        V: as out; also bfloat16 or float16.
        A_inv: (d_in, d_in) or (B, d_in, d_in); with one axis less, a diagonal that scales the columns. out's dtype.
        bf16: round the matrices of dense float32 layers to bfloat16; sums stay in float32.
        dots: (layers, 2), contiguous, float32 or float64; gets <out_i, V_i> over the columns before splits_i, and over
            the others.
        splits: one column for each layer; by default behind the last.
        precision, backend: as for `syrk_`.

    Raises:
        ValueError: the lists differ in length, or an entry's shape, dtype or device is not one of these.
    """
    check_lengths(len(out), "out", G_inv=G_inv, V=V, A_inv=A_inv)
    if splits:
        check_lengths(len(out), "out", splits=splits)
    check_choices(precision)
    if len(out) == 0:
        return
    for i, (o, G, v, A) in enumerate(zip(out, G_inv, V, A_inv, strict=True)):
        check_layer(i, o, G, v, A)
    if dots is not None:
        check_shape("dots", dots, (len(out), 2))
        check_dtype("dots", dots, FACTOR_DTYPES)
        check_device("dots", dots, out[0])
    load()
    torch.ops.kfac_triton.kron_matmul_(
        list(out), list(G_inv), list(V), list(A_inv), bf16, dots, list(splits), precision, backend
    )


def eigen_scale_(
    out: Sequence[Tensor],
    Q_G: Sequence[Tensor],
    V: Sequence[Tensor],
    Q_A: Sequence[Tensor],
    S: Sequence[Tensor],
    damping: Sequence[Tensor],
    *,
    precision: str | None = None,
    backend: str | None = None,
) -> None:
    """Preconditions in eigenbases: out_i <- Q_G [(Q_G^T V_i Q_A) / (S_i + damping_i)] Q_A^T, all of i.

    Args:
        out, V: as for `kron_matmul_`.
        Q_G, Q_A: eigenvectors as columns, (d_out, d_out) and (d_in, d_in), or with the batch axis of out; out's dtype.
        S: the eigenvalues, as out in shape and dtype.
        damping: 0-d floating-point tensors on out's device, added to the eigenvalues.
        precision, backend: as for `syrk_`.

    Raises:
        ValueError: the lists differ in length, or an entry's shape, dtype or device is not one of these.
    """
    check_lengths(len(out), "out", Q_G=Q_G, V=V, Q_A=Q_A, S=S, damping=damping)
    check_choices(precision)
    if len(out) == 0:
        return
    for i, (o, G, v, A) in enumerate(zip(out, Q_G, V, Q_A, strict=True)):
        check_layer(i, o, G, v, A, names=("Q_G", "Q_A"), diagonals=False)
        check_shape(f"S{at(i)}", S[i], tuple(o.shape))
        check_dtype(f"S{at(i)}", S[i], (o.dtype,))
        check_device(f"S{at(i)}", S[i], o)
        check_scalar(f"damping{at(i)}", damping[i], o)
    load()
    torch.ops.kfac_triton.eigen_scale_(
        list(out), list(Q_G), list(V), list(Q_A), list(S), list(damping), precision, backend
    )


def fused_update_(
    W: Sequence[Tensor],
    buffer: Sequence[Tensor],
    V: Sequence[Tensor],
    nu: Sequence[Tensor],
    lr: Sequence[Tensor],
    momentum: Sequence[Tensor],
    weight_decay: Sequence[Tensor],
    *,
    backend: str | None = None,
) -> None:
    """The end of a step: buffer_i <- momentum buffer_i + nu V_i,  W_i <- W_i - lr (buffer_i + weight_decay W_i).

    Args:
        W: (rows, taps, channels) each, any strides, float32, bfloat16, float16 or float64.
        buffer: as W, with its dtype; or an empty list, and W moves by nu V itself.
        V: as W in shape, float32 or float64.
        nu, lr, momentum, weight_decay: 0-d floating-point tensors on W's device; numbers would be compiled in.
        backend: "triton" or "torch", whatever the rule says.

    Raises:
        ValueError: the lists differ in length, or an entry's shape, dtype or device is not one of these.
    """
    scalars = {"nu": nu, "lr": lr, "momentum": momentum, "weight_decay": weight_decay}
    check_lengths(len(W), "W", V=V, **scalars)
    if buffer:
        check_lengths(len(W), "W", buffer=buffer)
    for i, (w, v) in enumerate(zip(W, V, strict=True)):
        check_update(i, w, v, buffer[i] if buffer else None)
        for name, values in scalars.items():
            check_scalar(f"{name}{at(i)}", values[i], w)
    if len(W) == 0:
        return
    load()
    torch.ops.kfac_triton.fused_update_(
        list(W), list(buffer), list(V), list(nu), list(lr), list(momentum), list(weight_decay), backend
    )


def newton_schulz_(
    X: Sequence[Tensor],
    M: Sequence[Tensor],
    residual: Tensor,
    *,
    precision: str | None = None,
    backend: str | None = None,
) -> None:
    """Inverts symmetric positive definite matrices from inverses of earlier ones: X_i <- M_i^-1, where it converges.

    Args:
        X: (d, d) or (B, d, d) each, float32 or float64, unit column stride; symmetric; an earlier inverse on entry, at
            any scale. Where the residual is not small, X_i is of no use afterwards.
        M: as X, any strides.
        residual: (matrices,), gets ||I - M_i X_i||_F, over the batch of an entry.
        precision, backend: as for `syrk_`; "tf32" counts as "tf32x3", since it stalls far from an inverse.

    Raises:
        ValueError: the lists differ in length, or an entry's shape, dtype, device or stride is not one of these.
    """
    check_lengths(len(X), "X", M=M)
    check_choices(precision)
    check_shape("residual", residual, (len(X),))
    for i, (x, m) in enumerate(zip(X, M, strict=True)):
        if x.ndim not in (2, 3) or x.shape[-1] != x.shape[-2]:
            raise ValueError(f"X{at(i)} has shape {tuple(x.shape)}; allowed: (d, d) or (B, d, d)")
        if x.shape[-1] > 1 and x.stride(-1) != 1:
            raise ValueError(f"X{at(i)} has column stride {x.stride(-1)}; allowed: 1")
        check_dtype(f"X{at(i)}", x, FACTOR_DTYPES)
        check_dtype(f"M{at(i)}", m, (x.dtype,))
        check_shape(f"M{at(i)}", m, tuple(x.shape))
        check_device(f"X{at(i)}", x, x)
        check_device(f"M{at(i)}", m, x)
        check_device("residual", residual, x)
    if len(X) == 0:
        return
    load()
    torch.ops.kfac_triton.newton_schulz_(list(X), list(M), residual, precision, backend)
