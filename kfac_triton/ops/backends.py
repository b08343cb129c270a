"""Which of Triton and torch's libraries serve a device, and the numbers of that choice that callers need."""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDED = 160  # the narrowest matrices whose products are cheaper in bfloat16, see `multiplies_bf16_faster`


def load() -> None:
    """Loads the kernels, which registers the operators; a second call costs a dictionary lookup."""
    import kfac_triton.kernels.conv_syrk
    import kfac_triton.kernels.eigen_scale
    import kfac_triton.kernels.fused_update
    import kfac_triton.kernels.kron_matmul
    import kfac_triton.kernels.newton_schulz
    import kfac_triton.kernels.syrk  # noqa: F401
    from kfac_triton import tuned
    from kfac_triton.kernels import tiles

    tiles.use(tuned.tiles_for)


def fuses(device: torch.device) -> bool:
    """Whether kernels serve that device: a GPU, or, where KFAC_TRITON_BACKEND has them interpreted, the CPU.

    Not while code is traced, which could not follow the question: then rows are laid out for any operator.
    """
    if torch.compiler.is_compiling():
        return False
    load()
    from kfac_triton.kernels import dispatch

    return dispatch.takes_triton(True, device)


def iterates(device: torch.device) -> bool:
    """Whether damped inverses come from `newton_schulz_`, where there is an inverse to start from."""
    load()
    from kfac_triton.kernels import dispatch

    return dispatch.takes_triton(dispatch.newton_schulz(), device)


def takes_patches(image: Tensor, groups: int) -> bool:
    """Whether the patches of an image had better stay unwritten: `conv_syrk_` would take its kernel."""
    if not fuses(image.device):
        return False
    from kfac_triton.kernels import dispatch
    from kfac_triton.kernels._launch import precision_of

    channels = image.shape[1] // groups
    whole = channels * image.element_size() % 16 == 0
    rule = dispatch.conv_syrk(channels, whole, precision_of(image.dtype), image.dtype, image.device)
    return image.dtype != torch.float64 and dispatch.takes_triton(rule, image.device)


def multiplies_bf16_faster(device: torch.device, width: int) -> bool:
    """Whether products with two matrices of at least this width are cheaper in bfloat16, rounding them included.

    Only CPUs with instructions for it, and wide matrices: the two products and the rounding took 3.2 of the time of
    float32 at a width of 64, 1.1 at 128, 0.7 at 192 and 0.5 from 512 on (medians, one core; two cores are alike).
    """
    if device.type != "cpu" or width < ROUNDED:
        return False
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
