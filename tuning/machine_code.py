"""What a kernel becomes on a GPU that is not here: compiled ahead of time, its machine code read.

Each configuration is compiled in a process of its own, apart from any that interprets kernels. Triton keeps what it
compiled, so a second examination takes a fraction of a second each.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

from kfac_triton.kernels.tiles import Tile
from kfac_triton.tuning.orphans import end_with

# Shared memory that one program may use, in bytes (CUDA C++ programming guide, table of compute capabilities; on
# CDNA 3 the local data share of a workgroup).
SHARED_LIMIT = {
    "sm_80": 163 * 1024,
    "sm_86": 99 * 1024,
    "sm_89": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "sm_120": 99 * 1024,
    "gfx942": 64 * 1024,
}
# The matrix instructions of each generation that Triton may choose: the last one named is the newest.
MATRIX = {
    "sm_80": ("HMMA",),
    "sm_86": ("HMMA",),
    "sm_89": ("HMMA",),
    "sm_90": ("HMMA", "HGMMA"),
    "sm_100": ("HMMA", "UTCHMMA"),
    "sm_120": ("HMMA",),
    "gfx942": ("v_mfma",),
}
WIDE = 16  # bytes: the widest load, store and copy of one thread


class Configuration(NamedTuple):
    """A kernel as a launcher might choose it; `options` are arguments of its `ahead_of_time`, by name."""

    target: str
    kernel: str
    dtype: str
    tile: Tile
    precision: str
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def name(self) -> str:
        """As a key of a table."""
        more = [f"{key}={value}" for key, value in self.options]
        tile = "x".join(map(str, self.tile[:4])) + ("-tma" if self.tile.descriptors else "")
        return " ".join((self.target, self.kernel, self.dtype, tile, self.precision, *more))


class Facts(NamedTuple):
    """What stands in the machine code.

    `spilled`: bytes of a thread's stack. `matrix`: instructions by kind. `bulk`: loads by the TMA unit. `copies`:
    asynchronous copies from global to shared memory, how many of each width in bytes; `loads` and `stores`: those of
    global memory by way of registers.
    """

    registers: int
    spilled: int
    shared: int
    matrix: dict[str, int]
    bulk: int
    copies: dict[int, int]
    loads: dict[int, int]
    stores: dict[int, int]

    def faults(self, configuration: Configuration) -> list[str]:
        """Why the configuration must not be shipped; empty where it may."""
        target, precision = configuration.target, configuration.precision
        found = []
        if self.spilled:
            found.append(f"{self.spilled} bytes of registers spill")
        if self.shared > SHARED_LIMIT[target]:
            found.append(f"{self.shared} bytes of shared memory, of {SHARED_LIMIT[target]}")
        strict = precision == "ieee" and configuration.dtype == "fp32" and target != "gfx942"
        if configuration.kernel not in ELEMENTWISE:
            if not self.matrix and not strict:
                found.append("no matrix instructions")
            if configuration.tile.descriptors and not self.bulk:
                found.append("no loads by descriptors")
        kinds = {"copies": self.copies, "loads": self.loads, "stores": self.stores}
        vectors = VECTORS if ("epilogue", "divide") in configuration.options else 0
        if ("conv", True) not in configuration.options:  # a weight's channels lie apart, in the order of its axes
            found += [f"{kind} of {min(widths)} bytes" for kind, widths in kinds.items() if _narrow(widths, vectors)]
        return found


ELEMENTWISE = ("reduce", "fused_update")
SCALARS = 16  # loads of addresses, of alpha and beta, and stores of sums, are this few
VECTORS = 64  # loads of a tile's eigenvalues, of its rows and of its columns, element by element from the first cache


def _narrow(widths: Mapping[int, int], vectors: int) -> bool:
    """Whether more than scalars and vectors are moved in less than 16 bytes: a quarter of what the wide ones move."""
    few = sum(times for width, times in widths.items() if width < WIDE)
    moved = sum(width * times for width, times in widths.items() if width < WIDE)
    wide = sum(width * times for width, times in widths.items() if width >= WIDE)
    return few > SCALARS + vectors and moved > wide / 4


def examine(configurations: Sequence[Configuration], jobs: int | None = None) -> Iterator[tuple[int, Facts | str]]:
    """(index, facts) of each configuration as it is done, in any order; a message instead where it does not compile."""
    with ProcessPoolExecutor(
        jobs or os.cpu_count(),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_compiled_process,
        initargs=(os.getpid(),),
    ) as pool:
        yield from pool.map(_examined, enumerate(configurations))


def _compiled_process(parent: int) -> None:
    end_with(parent)
    os.environ.pop("TRITON_INTERPRET", None)


def _examined(numbered: tuple[int, Configuration]) -> tuple[int, Facts | str]:
    index, configuration = numbered
    try:
        return index, facts_of(configuration)
    except Exception as error:
        return index, f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"


def facts_of(configuration: Configuration) -> Facts:
    """Compiles and reads one configuration, in this process."""
    kernel = compiled(configuration)
    if configuration.target.startswith("gfx"):
        return _amd(kernel)
    return _nvidia(kernel, configuration.target)


def compiled(configuration: Configuration) -> Any:
    """What `triton.compile` made of the configuration."""
    from kfac_triton.kernels import _grouped, _symmetric, conv_syrk, fused_update, newton_schulz, syrk
    from kfac_triton.kernels._ahead import gpu_target

    entries: dict[str, Callable[..., Any]] = {
        "syrk": syrk.ahead_of_time,
        "conv_syrk": conv_syrk.ahead_of_time,
        "reduce": _symmetric.ahead_of_time,
        "grouped": _grouped.ahead_of_time,
        "symmetric_product": newton_schulz.ahead_of_time,
        "fused_update": fused_update.ahead_of_time,
    }
    target, name, dtype, tile, precision, options = configuration
    stages = min(tile.stages, 2) if target.startswith("gfx") else tile.stages
    return entries[name](gpu_target(target), dtype, tile, stages, precision, **dict(options))


def _amd(kernel: Any) -> Facts:
    code = kernel.asm["amdgcn"]

    def number(name: str) -> int:
        return max((int(n) for n in re.findall(rf"\.{name}:\s*(\d+)", code)), default=0)

    matrix = Counter(name.split("_f32")[0] for name in re.findall(r"^\s*(v_mfma_\w+)", code, re.M))
    return Facts(
        registers=number("vgpr_count"),
        spilled=number("private_segment_fixed_size") + 4 * number("vgpr_spill_count"),
        shared=kernel.metadata.shared,
        matrix={"v_mfma": sum(matrix.values())} if matrix else {},
        bulk=0,
        copies={},
        loads=_amd_widths(code, "load"),
        stores=_amd_widths(code, "store"),
    )


def _amd_widths(code: str, kind: str) -> dict[int, int]:
    """Loads or stores of global memory by their width in bytes."""
    of = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "short_d16": 2, "ushort": 2, "short": 2, "ubyte": 1}
    found = re.findall(rf"^\s*(?:global|buffer)_{kind}_(dwordx[234]|dword|short_d16|u?short|ubyte)", code, re.M)
    return dict(Counter(of[name] for name in found))


def _nvidia(kernel: Any, target: str) -> Facts:
    from kfac_triton.kernels._ahead import nvidia_tools

    tools = nvidia_tools()
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.check_output([tools / "cuobjdump", "--dump-resource-usage", file.name], text=True)
        code = subprocess.check_output([tools / "nvdisasm", "-c", file.name], text=True, stderr=subprocess.DEVNULL)
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())  # type: ignore[union-attr]
    opcodes = re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9]+)((?:\.[A-Z0-9_]+)*)", code, re.M)
    kinds = Counter(name for name, _ in opcodes)
    widths = re.findall(r"cp\.async\.c[ag]\.shared\.global [^;]*?, (0x[0-9a-f]+)", kernel.asm["ptx"])
    return Facts(
        registers=registers,
        spilled=stack,
        shared=kernel.metadata.shared,
        matrix={name: kinds[name] for name in MATRIX[target] if kinds[name]},
        bulk=kinds["UTMALDG"],
        copies=dict(Counter(int(width, 16) for width in widths)),
        loads=_nvidia_widths(opcodes, "LDG"),
        stores=_nvidia_widths(opcodes, "STG"),
    )


def _nvidia_widths(opcodes: Iterable[tuple[str, str]], kind: str) -> dict[int, int]:
    of = {".128": 16, ".64": 8, ".U16": 2, ".U8": 1, ".256": 32}
    found = (suffixes for name, suffixes in opcodes if name == kind)
    return dict(Counter(next((width for suffix, width in of.items() if suffix in suffixes), 4) for suffixes in found))
