"""Which operators take Triton and which torch's own libraries: every rule, and what stands behind it.

An argument `backend` ("triton" or "torch") overrules the environment variable KFAC_TRITON_BACKEND, which overrules the
rules. Arithmetic that a kernel does not have (sums in float64, diagonal factors) goes to torch in any case.

Some of what is measured below was measured by others, with kernels of this kind; what these kernels do on an H200 was
measured there by `kfac-bench kernels` (torch 2.11, triton 3.6, clocks as they were, medians, tiles of the model's).
"""

from __future__ import annotations

import os

import torch

from kfac_triton.kernels import _launch
from kfac_triton.kernels._launch import HALF, interpreted

BACKENDS = ("triton", "torch")

# Public timings of a symmetric bf16 product against cuBLAS (the README of flash-muon, 2025): on an H800 0.90 times its
# speed at 1024 x 1024, 1.19 at 2048, 1.61 at 4096; on an A100 1.19, 1.69, 1.78. gram-newton-schulz (2026) goes to
# cuBLAS for sides up to 256. Below 256 the sum is long instead and split, for which no library has a symmetric product.
# These on an H200, as multiples of the library's speed in float32 and in bfloat16: one matrix X (4096, 512) 0.32, 0.25,
# (8192, 1024) 0.74, 0.15, (32768, 128) 0.27, 0.34, (8192, 4096) 1.11, 0.68; 24 matrices (8192, 64) in float32 1.14.
# Most of that time is spent before the launch. So there one matrix is the library's, unless it is large and float32.
LARGE_SIDE = 4096

# Fewer rows than a tile has terms leave the matrix units waiting for the D^2 elements of F. Not measured.
LEAST_ROWS = 64

# Where launches, not arithmetic, take the time, two for a bucket replace two for each layer. Beyond this side, or with
# fewer matrices, a library's own product should be as good or better. On an H200, as a multiple of the library's speed:
# 16 matrices (128, 128) 1.13, 16 of (256, 288) 1.24, in eigenbases 1.57, 2 of (1024, 1024) 0.76.
GROUPED_FROM = 4
GROUPED_SIDE = 512

# A multiple of 16 channels makes every load of a patch 16 bytes wide; with fewer, most of a load would be masked. On an
# H200, 3 x 3 filters, images (64, 64, 32, 32) and (64, 256, 8, 8): 1.64 and 1.61 times the library's speed in bfloat16,
# 0.93 and 0.75 in float32, so that there float32 goes to the library.
LEAST_CHANNELS = 16


def takes_triton(rule: bool, device: torch.device, backend: str | None = None) -> bool:
    """Whether an operator on `device` runs its kernel, where its own rule says `rule`.

    Off a GPU only when asked for, and only in Triton's interpreter; elsewhere the variable means GPUs alone.

    Raises:
        ValueError: `backend` or KFAC_TRITON_BACKEND is neither "triton" nor "torch", or asks for what is not there.
    """
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; allowed: {', '.join(BACKENDS)}, or None")
    variable = os.environ.get("KFAC_TRITON_BACKEND", "")
    if variable and variable not in BACKENDS:
        raise ValueError(f"KFAC_TRITON_BACKEND is {variable!r}; allowed: {', '.join(BACKENDS)}, or unset")
    asked, name = (backend, "backend") if backend is not None else (variable, "KFAC_TRITON_BACKEND")
    if asked == "triton" and _launch.triton is None:
        raise ValueError(f"{name} is 'triton', and triton is not installed; allowed here: torch, or nothing")
    if device.type != "cuda":
        if backend == "triton" and not interpreted():
            raise ValueError("backend is 'triton' for CPU tensors; allowed: torch, or TRITON_INTERPRET=1 at the import")
        return asked == "triton" and interpreted()
    return _launch.triton is not None and (asked == "triton" or (rule and not asked))


def syrk(dtype: torch.dtype, n: int, d: int, count: int, aligned: bool, precision: str, device: torch.device) -> bool:
    """The rule of `syrk_` for `count` matrices X (n, d) of that dtype; `aligned`: rows begin at multiples of 16 bytes.

    Strict float32 has no matrix units on NVIDIA, and cuBLAS the better loops without them. Unaligned rows are copied
    element by element.
    """
    if precision == "ieee" and dtype not in HALF and torch.version.hip is None:
        return False
    if not aligned or n < LEAST_ROWS:
        return False
    if count > 1:
        return True
    if _hopper_or_later(device):
        return dtype not in HALF and d >= LARGE_SIDE
    return True


def conv_syrk(channels: int, aligned: bool, precision: str, dtype: torch.dtype, device: torch.device) -> bool:
    """The rule of `conv_syrk_`: the patches that it does not write are kernel-size times the image.

    The first layer of a network, of three channels, is unfolded.
    """
    if precision == "ieee" and dtype not in HALF and torch.version.hip is None:
        return False
    if dtype not in HALF and _hopper_or_later(device):
        return False
    return aligned and channels % LEAST_CHANNELS == 0


def grouped(count: int, rows: int, columns: int) -> bool:
    """The rule of the products with inverses or eigenvectors, for `count` equal matrices (rows, columns)."""
    return count >= GROUPED_FROM and max(rows, columns) <= GROUPED_SIDE


def newton_schulz() -> bool:
    """Cholesky: on an H200 the iteration took 0.65 of its time for 16 matrices (256, 256), 1.5 for one of (1024, 1024).

    A rule needs more sizes than these two.
    """
    return False


def tf32_needs_descriptors(device: torch.device) -> bool:
    """Whether one TF32 product is slow there without them: sm_90 and later transpose its operands 4 bytes at a time."""
    return _hopper_or_later(device)


def _hopper_or_later(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] >= 9
