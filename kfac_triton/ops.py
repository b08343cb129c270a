"""The one door to the kernels: operators that only write the tensors they are given, checked here.

The kernels' modules are loaded by the first call (or `load`), so that this import is cheap. On the CPU, and wherever
Triton is absent, the operators run in plain torch. On a GPU each has a rule of its own for taking Triton or torch's
libraries; the environment variable KFAC_TRITON_BACKEND=triton or =torch overrules it. Triton's kernels add in float32,
so float64 factors, and diagonal ones, go to torch in any case.

No check reads a tensor's values: nothing here waits for a device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FACTOR_DTYPES = (torch.float32, torch.float64)
DATA_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
DEVICES = ("cpu", "cuda")


def load() -> None:
    """Loads the kernels, which registers the operators; a second call costs a dictionary lookup."""
    import kfac_triton.kernels.kron_matmul
    import kfac_triton.kernels.syrk  # noqa: F401


def syrk_(F: Tensor, X: Tensor, alpha: Tensor, beta: Tensor, *, bias: bool = False) -> None:
    """Updates a running second moment in place: F <- beta F + alpha Xa^T Xa, exactly symmetric.

    Xa is X, or [X, 1] with a ones column last when `bias`. F must be symmetric on entry: only its lower triangle
    counts. beta = 0 never reads F, and alpha = 0 never lets X in, whatever either holds; so a decision taken on the
    device, to skip a non-finite batch for example, is a choice of alpha and beta.

    Args:
        F: (D, D) or (B, D, D), float32 or float64, unit column stride, D = d + 1 with `bias` and d without.
        X: (n, d) or (B, n, d), n >= 0, float32, float64, bfloat16 or float16, any strides. Sums are taken in F's dtype.
        alpha, beta: 0-d floating-point tensors on F's device.

    Raises:
        ValueError: a shape, dtype, device or stride is not one of these.
    """
    _check_syrk(F, X, bias)
    _check_scalar("alpha", alpha, F)
    _check_scalar("beta", beta, F)
    load()
    torch.ops.kfac_triton.syrk_(F, X, alpha, beta, bias)


def multiplies_bf16_faster(device: torch.device) -> bool:
    """Whether this CPU has instructions for products of bfloat16 numbers; false for other devices, none measured."""
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def kron_matmul_(
    out: Sequence[Tensor],
    G_inv: Sequence[Tensor],
    V: Sequence[Tensor],
    A_inv: Sequence[Tensor],
    *,
    bf16: bool = False,
) -> None:
    """Preconditions a list of layers: out_i <- G_inv_i V_i A_inv_i.

    Args:
        out: (d_out, d_in) or (B, d_out, d_in) each, float32 or float64; memory apart from V's.
        G_inv: (d_out, d_out) or (B, d_out, d_out); with one axis less, a diagonal that scales the rows. out's dtype.
        V: as out; also bfloat16 or float16.
        A_inv: (d_in, d_in) or (B, d_in, d_in); with one axis less, a diagonal that scales the columns. out's dtype.
        bf16: round the matrices of dense float32 layers to bfloat16; sums stay in float32.

    Raises:
        ValueError: the lists differ in length, or an entry's shape, dtype or device is not one of these.
    """
    lengths = {"G_inv": len(G_inv), "V": len(V), "A_inv": len(A_inv)}
    for name, length in lengths.items():
        if length != len(out):
            raise ValueError(f"{name} has {length} entries; allowed: {len(out)}, as out has")
    if len(out) == 0:
        return
    for i, (o, G, v, A) in enumerate(zip(out, G_inv, V, A_inv, strict=True)):
        _check_layer(i, o, G, v, A)
    load()
    torch.ops.kfac_triton.kron_matmul_(list(out), list(G_inv), list(V), list(A_inv), bf16)


def _check_syrk(F: Tensor, X: Tensor, bias: bool) -> None:
    if X.ndim not in (2, 3) or X.shape[-1] == 0:
        raise ValueError(f"X has shape {tuple(X.shape)}; allowed: (n, d) or (B, n, d) with d >= 1")
    D = X.shape[-1] + int(bias)
    expected = (*X.shape[:-2], D, D)
    if tuple(F.shape) != expected:
        raise ValueError(f"F has shape {tuple(F.shape)}; allowed: {expected}, from X {tuple(X.shape)} and bias={bias}")
    if D > 1 and F.stride(-1) != 1:
        raise ValueError(f"F has column stride {F.stride(-1)}; allowed: 1")
    _check_dtype("F", F, FACTOR_DTYPES)
    _check_dtype("X", X, DATA_DTYPES)
    _check_device("F", F, F)
    _check_device("X", X, F)


def _check_scalar(name: str, value: Tensor, F: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} is {value!r}; allowed: a 0-d tensor on {F.device}")
    if value.ndim != 0 or not value.is_floating_point():
        raise ValueError(f"{name} is {value.dtype} of shape {tuple(value.shape)}; allowed: a 0-d floating-point tensor")
    _check_device(name, value, F)


def _check_layer(i: int, out: Tensor, G_inv: Tensor, V: Tensor, A_inv: Tensor) -> None:
    if out.ndim not in (2, 3):
        raise ValueError(f"out[{i}] has shape {tuple(out.shape)}; allowed: (d_out, d_in) or (B, d_out, d_in)")
    *batch, d_out, d_in = out.shape
    _check_shape(f"V[{i}]", V, (*batch, d_out, d_in))
    _check_shape(f"G_inv[{i}]", G_inv, (*batch, d_out, d_out), (*batch, d_out))
    _check_shape(f"A_inv[{i}]", A_inv, (*batch, d_in, d_in), (*batch, d_in))
    _check_dtype(f"out[{i}]", out, FACTOR_DTYPES)
    _check_dtype(f"G_inv[{i}]", G_inv, (out.dtype,))
    _check_dtype(f"A_inv[{i}]", A_inv, (out.dtype,))
    _check_dtype(f"V[{i}]", V, DATA_DTYPES)
    for name, tensor in (("out", out), ("G_inv", G_inv), ("V", V), ("A_inv", A_inv)):
        _check_device(f"{name}[{i}]", tensor, out)
    if out is V:
        raise ValueError(f"out[{i}] is V[{i}]; allowed: memory of its own")


def _check_shape(name: str, tensor: Tensor, *allowed: tuple[int, ...]) -> None:
    if tuple(tensor.shape) not in allowed:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; allowed: {' or '.join(map(str, allowed))}")


def _check_dtype(name: str, tensor: Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    if tensor.dtype not in allowed:
        raise ValueError(f"{name} has dtype {tensor.dtype}; allowed: {', '.join(map(str, allowed))}")


def _check_device(name: str, tensor: Tensor, like: Tensor) -> None:
    if tensor.device.type not in DEVICES:
        raise ValueError(f"{name} is on {tensor.device}; allowed: {', '.join(DEVICES)}")
    if tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}; allowed: {like.device}, as the written tensor")
