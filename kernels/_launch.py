"""What every kernel file shares: Triton where it is installed, operators, tables of addresses, launches.

Triton comes only with some of torch's builds. Without it `jit` leaves a kernel a plain function that nobody calls, and
the operators run in torch on every device.
"""

from __future__ import annotations

import contextvars
import logging
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar

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
    "HALF",
    "addresses",
    "aligned",
    "attempt",
    "buckets",
    "device_of",
    "float32_precision",
    "interpreted",
    "jit",
    "precision_of",
    "register",
    "table_of",
    "tl",
    "triton",
    "triton_dtype",
    "type_named",
    "with_scratch",
]

log = logging.getLogger("kfac_triton")

HALF = (torch.float16, torch.bfloat16)
PRECISIONS = ("ieee", "tf32", "tf32x3", "bf16x6")
ADDRESSES_A_LAUNCH = 32

Entry = TypeVar("Entry")


def jit(function: Callable[..., Any]) -> Any:
    """`triton.jit`, or the function itself where Triton is absent."""
    return function if triton is None else triton.jit(function)


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, which takes CPU tensors."""
    return triton is not None and bool(triton.knobs.runtime.interpret)


def register(name: str, schema: str, implementation: Callable[..., None]) -> None:
    """Defines the opaque operator `kfac_triton::name`. It only writes tensors it is given, so its fake form is empty.

    Opaque, because a traced Triton operator is lowered to Triton on CPU tensors too, where no driver is active. The
    "CUDA" key serves ROCm as well.
    """
    qualified = f"kfac_triton::{name}"
    torch.library.define(qualified, schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key in ("CPU", "CUDA"):
        torch.library.impl(qualified, key, implementation)
    torch.library.register_fake(qualified, lambda *args, **kwargs: None)


def buckets(entries: Iterable[Entry], key: Callable[[Entry], Hashable]) -> list[list[Entry]]:
    """The entries with equal keys together, in the order of their first ones."""
    found: dict[Hashable, list[Entry]] = defaultdict(list)
    for entry in entries:
        found[key(entry)].append(entry)
    return list(found.values())


# ------------------------------------------------------------------------------------------------------------ precision


def float32_precision() -> str:
    """How float32 enters the matrix units: "ieee" on ROCm, whose units take it whole; on NVIDIA, whose units do not,
    "tf32x3" (three products, an error like float32's), or "tf32" when torch's own matmul setting asks for it.
    """
    if torch.version.hip is not None:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


def precision_of(dtype: torch.dtype, asked: str | None = None) -> str:
    """The precision of a product of operands of this dtype; half types have one only.

    Raises:
        ValueError: `asked` is unknown, or not one of this platform's.
    """
    if asked is not None and asked not in PRECISIONS:
        raise ValueError(f"precision is {asked!r}; allowed: {', '.join(PRECISIONS)}, or None")
    foreign = {"tf32x3"} if torch.version.hip is not None else {"bf16x6"}
    if asked in foreign and not interpreted():
        platform = "ROCm" if torch.version.hip is not None else "CUDA"
        raise ValueError(f"precision is {asked!r}, which {platform} lacks; allowed: {_allowed_here(foreign)}, or None")
    return "ieee" if dtype in HALF else asked or float32_precision()


def _allowed_here(foreign: set[str]) -> str:
    return ", ".join(p for p in PRECISIONS if p not in foreign)


def triton_dtype(dtype: torch.dtype) -> Any:
    """Triton's type of that dtype."""
    return {
        torch.float32: tl.float32,
        torch.float64: tl.float64,
        torch.bfloat16: tl.bfloat16,
        torch.float16: tl.float16,
    }[dtype]


def type_named(name: str) -> Any:
    """Triton's type of a name, as "fp32" or "bf16"."""
    return {"fp32": tl.float32, "bf16": tl.bfloat16, "fp16": tl.float16}[name]


# ------------------------------------------------------------------------------------------------- tables of addresses


def addresses(tensors: Sequence[Tensor], axes: int = 2) -> list[int]:
    """Where each matrix starts (each tensor of `axes` axes); a batch in front is so many of them."""
    found = []
    for t in tensors:
        step = t.stride(0) * t.element_size() if t.ndim > axes else 0
        found += [t.data_ptr() + b * step for b in range(t.shape[0] if t.ndim > axes else 1)]
    return found


def aligned(*rows: Sequence[int]) -> bool:
    """Whether every address is a multiple of 16 bytes: one read from memory tells a compiler nothing."""
    return all(address % 16 == 0 for row in rows for address in row)


def table_of(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """The addresses as int64 on the device, one row after the other; kept, since a training loop asks for them again.

    They reach a GPU as arguments of a kernel, not by a copy from the host's memory: a CUDA graph that captures the
    launch then holds them itself. A table made during a capture belongs to that graph and is not kept.
    """
    flat = tuple(address for row in rows for address in row)
    if device.type == "cpu":
        return torch.tensor(flat, dtype=torch.int64)
    if torch.cuda.is_current_stream_capturing():
        return _written(flat, device)
    return _kept_table(flat, device, torch.cuda.current_stream(device).cuda_stream)


@lru_cache(maxsize=512)
def _kept_table(flat: tuple[int, ...], device: torch.device, stream: int) -> Tensor:
    """By stream too: on another one nothing says that the table has been written."""
    return _written(flat, device)


def _written(flat: tuple[int, ...], device: torch.device) -> Tensor:
    table = torch.empty(len(flat), dtype=torch.int64, device=device)
    for start in range(0, len(flat), ADDRESSES_A_LAUNCH):
        some = flat[start : start + ADDRESSES_A_LAUNCH]
        some += some[-1:] * (ADDRESSES_A_LAUNCH - len(some))
        with device_of(device):
            write_kernel[(1,)](table, start, len(flat), some, COUNT=ADDRESSES_A_LAUNCH, num_warps=1)
    return table


def _write(table, start, size, values, COUNT: tl.constexpr):  # type: ignore[no-untyped-def]
    """table[start + i] <- values[i], a tuple of COUNT integers, while inside the table."""
    for i in tl.static_range(COUNT):
        tl.store(table + start + i, values[i], mask=start + i < size)


# Unspecialised: what an address is divisible by must not make a new kernel.
write_kernel: Any = _write if triton is None else triton.jit(_write, do_not_specialize=["start", "size", "values"])


# --------------------------------------------------------------------------------------------------------------- launch


def device_of(device: torch.device) -> AbstractContextManager[None]:
    """Makes a GPU the current one, where Triton launches; nothing for the CPU."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def with_scratch(launch: Callable[[], None], device: torch.device) -> None:
    """A launch of a kernel that makes tensor descriptors, which need memory; an allocator of the user's own stays."""

    def run() -> None:
        triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=device))
        launch()

    contextvars.copy_context().run(run)


def attempt(kernel: str, shape: Hashable, device: torch.device, launch: Callable[[], None], otherwise: Any) -> None:
    """Runs `launch`, and where the kernel does not compile `otherwise`, after one warning for each kernel and shape.

    Nothing has been written to an argument of the operator before its kernel is compiled. Errors of the device and
    exhausted memory are not the compiler's, and pass through; in the interpreter everything does.
    """
    if (kernel, shape, device) in _failed():
        otherwise()
        return
    try:
        launch()
    except (torch.AcceleratorError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if interpreted():
            raise
        _failed().add((kernel, shape, device))
        first = str(error).strip().split("\n", 1)[0]
        log.warning(
            "kernel %s failed to compile for %s on %s (%s: %s); torch's own operations serve there",
            kernel, shape, _name(device), type(error).__name__, first,
        )  # fmt: skip
        otherwise()


@lru_cache(maxsize=1)
def _failed() -> set[tuple[str, Hashable, torch.device]]:
    return set()


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
