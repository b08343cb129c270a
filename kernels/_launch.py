"""What every kernel file shares: Triton where it is installed, the choice of a backend, the registration of operators.

Triton comes only with some of torch's builds. Without it `jit` leaves a kernel a plain function that nobody calls, and
the operators run in torch on every device.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    import triton
    import triton.language as tl
else:
    try:
        import triton
        import triton.language as tl
    except ImportError:
        triton = tl = None

__all__ = [
    "Tile",
    "compile_ahead",
    "device_of",
    "fitting",
    "float32_precision",
    "jit",
    "largest_filling",
    "prefers_triton",
    "register",
    "stages_here",
    "tl",
]

BACKENDS = ("triton", "torch")


def jit(function: Callable[..., Any]) -> Any:
    """`triton.jit`, or the function itself where Triton is absent."""
    return function if triton is None else triton.jit(function)


def register(name: str, schema: str, cpu: Callable[..., None], cuda: Callable[..., None]) -> None:
    """Defines the opaque operator `kfac_triton::name`. It only writes tensors it is given, so its fake form is empty.

    Opaque, because a traced Triton operator is lowered to Triton on CPU tensors too, where no driver is active. The
    "CUDA" key serves ROCm as well.
    """
    qualified = f"kfac_triton::{name}"
    torch.library.define(qualified, schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(qualified, "CPU", cpu)
    torch.library.impl(qualified, "CUDA", cuda)
    torch.library.register_fake(qualified, lambda *args: None)


def prefers_triton(default: bool) -> bool:
    """The backend on a GPU: `default`, the operator's own rule, unless KFAC_TRITON_BACKEND names one.

    Raises:
        ValueError: KFAC_TRITON_BACKEND is neither "triton" nor "torch", or asks for a Triton that is not installed.
    """
    forced = os.environ.get("KFAC_TRITON_BACKEND", "")
    if forced and forced not in BACKENDS:
        raise ValueError(f"KFAC_TRITON_BACKEND is {forced!r}; allowed: {', '.join(BACKENDS)}, or unset")
    if forced == "triton" and triton is None:
        raise ValueError("KFAC_TRITON_BACKEND is 'triton', and triton is not installed; allowed here: torch, or unset")
    return triton is not None and (forced == "triton" or (default and not forced))


class Tile(NamedTuple):
    """One tile configuration: BLOCK x BLOCK outputs, BLOCK_K terms of the sum at a time."""

    block: int
    block_k: int
    warps: int
    stages: int


def float32_precision() -> str:
    """How float32 enters the matrix units: "ieee" on ROCm, whose units take it whole; on NVIDIA, whose units do not,
    "tf32x3" (three products, an error like float32's), or "tf32" when torch's own matmul setting asks for it.
    """
    if torch.version.hip is not None:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


def device_of(tensor: Tensor) -> AbstractContextManager[None]:
    """Makes the tensor's GPU the current one, where Triton launches; nothing for a CPU tensor."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def stages_here(tile: Tile) -> int:
    """At most two stages on ROCm, where a workgroup has 64 KiB of local memory."""
    return min(tile.stages, 2) if torch.version.hip is not None else tile.stages


def multiprocessors(device: torch.device) -> int:
    """How many programs run at once at least; in the interpreter, which has no device, the number of an H100."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def fitting(tiles: Sequence[Tile], side: int) -> Sequence[Tile]:
    """The tiles no larger than a side of the output, or the smallest one: the rest would compute mostly padding."""
    return [tile for tile in tiles if tile.block <= side] or tiles[-1:]


def largest_filling(tiles: Sequence[Tile], programs: Callable[[Tile], int], device: torch.device) -> tuple[Tile, bool]:
    """The largest tile that gives every multiprocessor a program, and True; or the smallest tile, and False."""
    enough = multiprocessors(device)
    for tile in tiles:
        if programs(tile) >= enough:
            return tile, True
    return tiles[-1], False


def compile_ahead(
    kernel: Any, types: Mapping[str, str], constants: Mapping[str, Any], target: Any, warps: int, stages: int
) -> Any:
    """Compiles a kernel for a `GPUTarget`, with no device present.

    Pointers and integers count as divisible by 16, as they are when a caller pads its row strides.

    Args:
        types: Triton's type of each run-time argument, as "*fp32" or "i32".
        constants: the value of each constexpr, and of each argument specialised to a value.
    """
    names = kernel.arg_names
    source = triton.compiler.ASTSource(
        fn=kernel,
        signature={name: "constexpr" if name in constants else types[name] for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in names if name not in constants},
    )
    return triton.compile(source, target=target, options={"num_warps": warps, "num_stages": stages})
