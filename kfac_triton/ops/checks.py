"""Checks of what the operators are given: shapes, dtypes, devices and strides, never values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kfac_triton.ops.backends import load
from kfac_triton.ops.rows import Patches

FACTOR_DTYPES = (torch.float32, torch.float64)
DATA_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
DEVICES = ("cpu", "cuda")


def at(i: int) -> str:
    return f"[{i}]"


def check_lengths(length: int, first: str, **lists: Sequence[Any]) -> None:
    for name, entries in lists.items():
        if len(entries) != length:
            raise ValueError(f"{name} has {len(entries)} entries; allowed: {length}, as {first} has")


def check_choices(precision: str | None) -> None:
    if precision is not None:
        load()
        from kfac_triton.kernels._launch import precision_of

        precision_of(torch.float32, precision)


def check_syrk(at: str, F: Tensor, X: Tensor, bias: bool) -> None:
    if X.ndim not in (2, 3, 4) or X.shape[-1] == 0:
        raise ValueError(f"X{at} has shape {tuple(X.shape)}; allowed: (n, d) or (B, n, d) with d >= 1, or with images")
    D = X.shape[-1] + int(bias)
    expected = (*X.shape[: F.ndim - 2], D, D)
    if tuple(F.shape) != expected or X.ndim not in (F.ndim, F.ndim + 1):
        allowed = (*X.shape[:-2], D, D)
        raise ValueError(f"F{at} has shape {tuple(F.shape)}; allowed: {allowed}, from X {tuple(X.shape)}, bias={bias}")
    check_average(at, F)
    check_dtype(f"X{at}", X, DATA_DTYPES)
    check_device(f"X{at}", X, F)


def check_conv_syrk(i: int, F: Tensor, P: Patches, bias: bool) -> None:
    image, window = P.image, P.window
    if image.ndim != 4 or len(window) != 10 or image.shape[1] % P.groups:
        raise ValueError(
            f"P[{i}] has an image of shape {tuple(image.shape)}, {P.groups} groups and a window of {len(window)} "
            "numbers; allowed: (N, C, H, W), a divisor of C, and ten"
        )
    D = window[0] * window[1] * image.shape[1] // P.groups + int(bias)
    check_shape(f"F[{i}]", F, (P.groups, D, D) if P.groups > 1 else (D, D))
    check_average(f"[{i}]", F)
    check_dtype(f"the image of P[{i}]", image, DATA_DTYPES)
    check_device(f"the image of P[{i}]", image, F)


def check_average(at: str, F: Tensor) -> None:
    if F.shape[-1] > 1 and F.stride(-1) != 1:
        raise ValueError(f"F{at} has column stride {F.stride(-1)}; allowed: 1")
    check_dtype(f"F{at}", F, FACTOR_DTYPES)
    check_device(f"F{at}", F, F)


def check_scalar(name: str, value: Tensor, like: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} is {value!r}; allowed: a 0-d tensor on {like.device}")
    if value.ndim != 0 or not value.is_floating_point():
        raise ValueError(f"{name} is {value.dtype} of shape {tuple(value.shape)}; allowed: a 0-d floating-point tensor")
    check_device(name, value, like)


def check_layer(
    i: int, out: Tensor, G: Tensor, V: Tensor, A: Tensor, names: tuple[str, str] = ("G_inv", "A_inv"),
    diagonals: bool = True,
) -> None:  # fmt: skip
    if out.ndim not in (2, 3):
        raise ValueError(f"out[{i}] has shape {tuple(out.shape)}; allowed: (d_out, d_in) or (B, d_out, d_in)")
    *batch, d_out, d_in = out.shape
    check_shape(f"V[{i}]", V, (*batch, d_out, d_in))
    for name, factor, d in ((names[0], G, d_out), (names[1], A, d_in)):
        check_shape(f"{name}[{i}]", factor, (*batch, d, d), *([(*batch, d)] if diagonals else []))
    check_dtype(f"out[{i}]", out, FACTOR_DTYPES)
    check_dtype(f"{names[0]}[{i}]", G, (out.dtype,))
    check_dtype(f"{names[1]}[{i}]", A, (out.dtype,))
    check_dtype(f"V[{i}]", V, DATA_DTYPES)
    for name, tensor in (("out", out), (names[0], G), ("V", V), (names[1], A)):
        check_device(f"{name}[{i}]", tensor, out)
    if out is V:
        raise ValueError(f"out[{i}] is V[{i}]; allowed: memory of its own")


def check_update(i: int, W: Tensor, V: Tensor, buffer: Tensor | None) -> None:
    if W.ndim != 3:
        raise ValueError(f"W{at(i)} has shape {tuple(W.shape)}; allowed: (rows, taps, channels)")
    check_dtype(f"W{at(i)}", W, DATA_DTYPES)
    check_device(f"W{at(i)}", W, W)
    check_dtype(f"V{at(i)}", V, FACTOR_DTYPES)
    for name, tensor in (("V", V), ("buffer", buffer)):
        if tensor is not None:
            check_shape(f"{name}{at(i)}", tensor, tuple(W.shape))
            check_device(f"{name}{at(i)}", tensor, W)
    if buffer is not None:
        check_dtype(f"buffer{at(i)}", buffer, (W.dtype,))


def check_shape(name: str, tensor: Tensor, *allowed: tuple[int, ...]) -> None:
    if tuple(tensor.shape) not in allowed:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; allowed: {' or '.join(map(str, allowed))}")


def check_dtype(name: str, tensor: Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    if tensor.dtype not in allowed:
        raise ValueError(f"{name} has dtype {tensor.dtype}; allowed: {', '.join(map(str, allowed))}")


def check_device(name: str, tensor: Tensor, like: Tensor) -> None:
    if tensor.device.type not in DEVICES:
        raise ValueError(f"{name} is on {tensor.device}; allowed: {', '.join(DEVICES)}")
    if tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}; allowed: {like.device}, as the written tensor")
