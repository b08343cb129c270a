"""What a GPU is made of, as far as the cost model of a kernel asks: a table, each row with its sources.

Peaks are those of dense products, with sums in float32. `sustained` is the share of the bf16 peak that the vendor's own
library keeps up on large products: power and clocks take the rest, from any kernel.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

KIB = 2**10
MEASURED = "github.com/mag-/gpu_benchmark, README: bf16 matrix products"


@dataclass(frozen=True)
class GPU:
    """One device.

    `clock`: boost, in Hz. `bandwidth`: of its memory, bytes a second. `shared`, `shared_per_program`: bytes of shared
    memory of one multiprocessor and of one program. `registers`: of 32 bits, of a multiprocessor. `peaks`: operations a
    second by kind of operand; "fp32" is that of strict float32, on matrix units where they take it (AMD).
    """

    name: str
    target: str
    multiprocessors: int
    clock: float
    bandwidth: float
    peaks: dict[str, float]
    sustained: float
    sources: tuple[str, ...]
    registers: int = 65536
    shared: int = 228 * KIB
    shared_per_program: int = 227 * KIB
    threads: int = 2048
    programs: int = 32
    warp: int = 32


def _peaks(bf16: float, tf32: float, fp32: float) -> dict[str, float]:
    return {"bf16": bf16 * 1e12, "fp16": bf16 * 1e12, "tf32": tf32 * 1e12, "fp32": fp32 * 1e12}


HOPPER = "NVIDIA H100 Tensor Core GPU Architecture, whitepaper, tables 1 and 3"
ADA = {"shared": 100 * KIB, "shared_per_program": 99 * KIB, "threads": 1536, "programs": 24}
LIMITS = "CUDA C++ Programming Guide, technical specifications per compute capability"

GPUS = (
    GPU(
        "H100", "sm_90", 132, 1.83e9, 3.35e12, _peaks(989.4, 494.7, 66.9), 792.1 / 989.4,
        (HOPPER, "NVIDIA H100 datasheet (SXM)", LIMITS, MEASURED),
    ),
    GPU(
        "H200", "sm_90", 132, 1.83e9, 4.8e12, _peaks(989.4, 494.7, 66.9), 792.1 / 989.4,
        (HOPPER, "NVIDIA H200 datasheet", LIMITS, MEASURED + ", of the H100: the same chip"),
    ),
    GPU(
        "B200", "sm_100", 148, 1.965e9, 8.0e12, _peaks(2250, 1125, 75), 792.1 / 989.4,
        ("NVIDIA HGX B200 datasheet (dense: half of the sparse figures)", LIMITS,
         "sustained carried over from the H100"),
    ),
    GPU(
        "A100", "sm_80", 108, 1.41e9, 2.039e12, _peaks(312, 156, 19.5), 267.9 / 312,
        ("NVIDIA A100 Tensor Core GPU Architecture, whitepaper", "NVIDIA A100 datasheet (SXM, 80 GB)", LIMITS,
         MEASURED),
        shared=164 * KIB, shared_per_program=163 * KIB,
    ),
    GPU(
        "L4", "sm_89", 58, 2.04e9, 300e9, _peaks(121, 60.5, 30.3), 91.4 / 121,
        ("NVIDIA L4 datasheet (dense: half of the sparse figures)", LIMITS, MEASURED), **ADA,
    ),
    GPU(
        "RTX 4090", "sm_89", 128, 2.52e9, 1.008e12, _peaks(165.2, 82.6, 82.6), 1.0,
        ("NVIDIA Ada GPU Architecture, whitepaper, appendix A", LIMITS,
         MEASURED + ": 178.5, above the peak at the boost clock, which it exceeds; counted as 1"), **ADA,
    ),
    GPU(
        "RTX 5090", "sm_120", 170, 2.407e9, 1.792e12, _peaks(209.5, 104.8, 104.8), 1.0,
        ("NVIDIA RTX Blackwell GPU Architecture, whitepaper, appendix A", LIMITS,
         "sustained carried over from the RTX 4090"), **ADA,
    ),
    GPU(
        "MI300X", "gfx942", 304, 2.1e9, 5.3e12, _peaks(1307.4, 653.7, 163.4), 758.3 / 1307.4,
        ("AMD Instinct MI300X datasheet", "AMD CDNA 3 architecture, white paper",
         MEASURED),
        registers=131072, shared=64 * KIB, shared_per_program=64 * KIB, threads=2048, programs=32, warp=64,
    ),
)  # fmt: skip


def find(name: str) -> GPU | None:
    """The row for what `torch.cuda.get_device_name` says, as "NVIDIA H100 80GB HBM3"; None without one."""
    words = set(re.split(r"[^a-z0-9]+", name.lower()))
    return next((gpu for gpu in GPUS if set(gpu.name.lower().split()) <= words), None)


def for_target(target: str) -> GPU:
    """The first row of a generation.

    Raises:
        ValueError: there is none.
    """
    found = next((gpu for gpu in GPUS if gpu.target == target), None)
    if found is None:
        allowed = ", ".join(dict.fromkeys(gpu.target for gpu in GPUS))
        raise ValueError(f"no GPU of target {target!r} is described; allowed: {allowed}")
    return found
