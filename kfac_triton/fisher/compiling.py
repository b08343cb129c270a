"""How K-FAC calls torch.compile, and what it makes of its errors."""

from __future__ import annotations

import os
import re
import types
from collections.abc import Callable
from typing import Any

import torch

from kfac_triton.capture import NotTraceable


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """A code object of its own, since torch counts recompilations by these."""
    own = types.FunctionType(
        function.__code__.replace(), function.__globals__, function.__name__, None, function.__closure__
    )
    made: Callable[..., Any] = torch.compile(own, fullgraph=True, dynamic=False)
    return made


def graphs_so_far() -> int:
    """How many graphs this process has made."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def why(error: Exception) -> str:
    """What an error says: of ours what stands in it, of torch's the first lines."""
    said = re.search(r"NotTraceable\(['\"](.*?)['\"]\)", str(error))
    if said is not None or isinstance(error, NotTraceable):
        return said[1] if said is not None else str(error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])}"


def cannot_compile(device: torch.device) -> str | None:
    """Why nothing compiles here, found without trying."""
    if os.environ.get("TORCH_COMPILE_DISABLE") == "1" or torch._dynamo.config.disable:
        return "TORCH_COMPILE_DISABLE is set"
    if device.type == "cpu":
        from torch._inductor import cpp_builder, exc

        try:
            cpp_builder.get_cpp_compiler()
        except exc.InvalidCxxCompiler:
            return "no C++ compiler found"
    return None
