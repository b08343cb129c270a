"""Kernels compiled for a GPU that is not here, and the programs that come with Triton to read what came out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kfac_triton.kernels._launch import triton


def gpu_target(name: str) -> Any:
    """Triton's description of "sm_90" or "gfx942"."""
    from triton.backends.compiler import GPUTarget

    if name.startswith("gfx"):
        return GPUTarget("hip", name, 64)
    return GPUTarget("cuda", int(name.removeprefix("sm_")), 32)


def nvidia_tools() -> Path:
    """The folder of cuobjdump and nvdisasm."""
    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


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
