"""How long one product of tiles should take on a GPU that is not here: roofline, occupancy and waves.

A program holds a tile of the output and walks over the terms of its sum in steps of BLOCK_K. As many programs run on a
multiprocessor as registers, shared memory and threads allow; a wave of them takes, for each step, the longest of

    arithmetic    2 BLOCK^2 BLOCK_K operations on the matrix units, at the share that the vendor's library sustains
    shared memory what the warps read again of both operands, at 128 bytes a clock
    L2            the operands of the step, at the multiprocessor's share of the L2 bandwidth
    latency       of one load, divided by the loads in flight: (stages - 1) of every resident program

then comes the epilogue, and the whole takes no less than its traffic with the device's memory. The constants are those
of datasheets and published microbenchmarks, named beside them; none was fitted to the kernels that it is checked
against (tests/test_roofline.py). It sees no bank conflicts, no clocks under load beyond the library's, no hit rates: it
ranks tiles, and a measurement on the device decides.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from kfac_triton.tuning.gpus import GPU

LAUNCH = 3e-6  # s: of a kernel in a stream, from its call to its start (NVIDIA, "Getting Started with CUDA Graphs")
LATENCY = 600e-9  # s: of global memory, 480 to 690 ns on A100 and H100 (Luo et al. 2024, Hopper by microbenchmarks)
SHARED_BYTES = 128  # bytes a clock of a multiprocessor's shared memory (NVIDIA's tuning guides, sm_80 and sm_90)
L2_BYTES = 47  # bytes a clock and multiprocessor from the L2 (A100 whitepaper: 5120 a clock, for 108 of them)
NARROW = 2.5  # times the cost of 16-byte copies, where they are of 4 bytes: an assumption, to rank them last
WARPGROUP = ("sm_90", "sm_100")  # read operands from shared memory once for four warps, from sides of 64 on

PRODUCTS = {"tf32x3": ("tf32", 3), "bf16x6": ("bf16", 6), "ieee": ("fp32", 1)}


class TileLike(Protocol):
    """`kernels.tiles.Tile`, or anything like it."""

    @property
    def block(self) -> int: ...
    @property
    def block_k(self) -> int: ...
    @property
    def warps(self) -> int: ...
    @property
    def stages(self) -> int: ...


class Footprint(NamedTuple):
    """What the compiler reported: registers of a thread, shared bytes of a program, bytes of the narrowest copy."""

    registers: int
    shared: int
    copies: int = 16


@dataclass(frozen=True)
class Work:
    """`count` products (M, K) (K, N), or of the lower triangle alone where `symmetric`.

    `kind`: operands as the matrix units take them: bf16, fp16, tf32, tf32x3, bf16x6, ieee. `size`: bytes of an element
    in memory. `output`: bytes read and written for an element of the output.
    """

    count: int
    M: int
    N: int
    K: int
    kind: str
    size: int
    symmetric: bool = False
    output: int = 8


class Estimate(NamedTuple):
    """Seconds; `bound` names the longest part of a step, or "memory" for the device's."""

    seconds: float
    bound: str


def programs(work: Work, tile: TileLike) -> int:
    """Tiles of the output."""
    rows, columns = -(-work.M // tile.block), -(-work.N // tile.block)
    return work.count * (rows * (rows + 1) // 2 if work.symmetric else rows * columns)


def resident(gpu: GPU, tile: TileLike, footprint: Footprint) -> int:
    """Programs that run on a multiprocessor at once; at least one, since what does not fit was refused before."""
    threads = tile.warps * gpu.warp
    by_registers = gpu.registers // max(-(-footprint.registers // 8) * 8 * threads, 1)
    by_shared = gpu.shared // (footprint.shared + 1024)  # the system keeps 1 KiB for each program
    return max(1, min(by_registers, by_shared, gpu.threads // threads, gpu.programs))


def estimate(gpu: GPU, work: Work, tile: TileLike, parts: int, footprint: Footprint) -> Estimate:
    """The predicted time of one launch, and of the one that adds the parts up where there are several."""
    steps = math.ceil(math.ceil(work.K / tile.block_k) / parts)
    every = programs(work, tile) * parts
    together = min(resident(gpu, tile, footprint), -(-every // gpu.multiprocessors))
    waves = -(-every // (together * gpu.multiprocessors))
    step = _step(gpu, work, tile, footprint, together)
    bound = max(step, key=lambda name: step[name])
    # The last wave is as long as it is full: programs that have a multiprocessor for themselves share it with none.
    left = every - (waves - 1) * together * gpu.multiprocessors
    last = _step(gpu, work, tile, footprint, -(-left // gpu.multiprocessors))
    epilogue = _epilogue(gpu, work, tile, parts)
    full = (waves - 1) * (steps * step[bound] + epilogue * together)
    tail = steps * max(last.values()) + epilogue * -(-left // gpu.multiprocessors)
    seconds = LAUNCH + LATENCY + full + tail
    if parts > 1:
        seconds += LAUNCH + every * tile.block**2 * 4 / gpu.bandwidth
    floor = LAUNCH + _traffic(work, tile) / gpu.bandwidth
    return Estimate(max(seconds, floor), "memory" if floor > seconds else bound)


def _step(gpu: GPU, work: Work, tile: TileLike, footprint: Footprint, together: int) -> dict[str, float]:
    """Seconds of one step of `together` programs on a multiprocessor, by what may take the longest."""
    kind, products = PRODUCTS.get(work.kind, (work.kind, 1))
    rate = gpu.peaks[kind] * (gpu.sustained if kind != "fp32" else 1.0) / gpu.multiprocessors
    operands = 2 * tile.block * tile.block_k * work.size
    return {
        "arithmetic": together * products * 2 * tile.block**2 * tile.block_k / rate,
        "shared memory": together * _read_again(gpu, work, tile) / (SHARED_BYTES * gpu.clock),
        "L2": together * operands * (NARROW if 0 < footprint.copies < 16 else 1.0) / (L2_BYTES * gpu.clock),
        "latency": LATENCY / max(tile.stages - 1, 1),
    }


def _read_again(gpu: GPU, work: Work, tile: TileLike) -> float:
    """Bytes that the warps of a program read from shared memory in a step."""
    warps = tile.warps // 4 if gpu.target in WARPGROUP and tile.block >= 64 and tile.warps >= 4 else tile.warps
    down = 1 << math.ceil(math.log2(max(warps, 1)) / 2)
    across = max(warps // down, 1)
    return warps * (tile.block / down + tile.block / across) * tile.block_k * work.size


def _epilogue(gpu: GPU, work: Work, tile: TileLike, parts: int) -> float:
    """Seconds in which a program reads and writes its tile."""
    share = gpu.bandwidth / gpu.multiprocessors
    mirrored = 2 if work.symmetric and parts == 1 else 1
    return tile.block**2 * (4 if parts > 1 else work.output * mirrored) / max(share, L2_BYTES * gpu.clock / 2)


def _traffic(work: Work, tile: TileLike) -> float:
    """Bytes of the device's memory: every operand once, the output as it is read and written."""
    operands = work.count * (work.M + (0 if work.symmetric else work.N)) * work.K * work.size
    return operands + work.count * work.M * work.N * work.output


def ranked(
    gpu: GPU, work: Work, candidates: Iterable[tuple[TileLike, int, Footprint]]
) -> Sequence[tuple[Estimate, TileLike, int]]:
    """(estimate, tile, parts) of the candidates that fit the device, the fastest first."""
    found = [
        (estimate(gpu, work, tile, parts, footprint), tile, parts)
        for tile, parts, footprint in candidates
        if footprint.shared <= gpu.shared_per_program
    ]
    # What the model cannot tell apart: fewer parts are fewer sums, larger tiles read less, longer steps wait less.
    return sorted(found, key=lambda one: (float(f"{one[0].seconds:.2e}"), one[2], -one[1].block, -one[1].block_k))
