"""The cost model against published speeds of symmetric kernels that others wrote, and against what must hold anyway."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from kfac_triton.kernels.tiles import Tile
from kfac_triton.tuning import gpus, roofline
from kfac_triton.tuning.roofline import Footprint, Work

# Milliseconds of X X^T, bf16, for sides 1024, 2048, 4096, 8192, from the README of flash-muon (2025): its symmetric
# kernel, and cuBLAS in the same run. The last of cuBLAS is what each device's sustained share is taken from.
PUBLISHED = {
    "H800": ((0.0124, 0.0322, 0.1838, 1.4528), (0.0112, 0.0384, 0.2955, 2.2643)),
    "H20": ((0.0164, 0.0746, 0.5068, 3.9265), (0.0275, 0.1588, 1.0431, 7.9691)),
    "A100": ((0.0191, 0.0689, 0.3733, 2.9815), (0.0228, 0.1166, 0.6644, 5.1604)),
    "RTX 4090": ((0.0208, 0.0823, 0.5249, 3.5689), (0.0213, 0.1098, 0.8535, 6.7631)),
}
SIDES = (1024, 2048, 4096, 8192)
H100 = gpus.find("H100")
# NVIDIA's datasheet of the H20; the H800 is an H100 with a slower link between GPUs.
H20 = replace(
    H100, name="H20", multiprocessors=78, clock=1.98e9, bandwidth=4.0e12,
    peaks={"bf16": 148e12, "fp16": 148e12, "tf32": 74e12, "fp32": 44e12},
)  # fmt: skip
DEVICES = {"H800": H100, "H20": H20, "A100": gpus.find("A100"), "RTX 4090": gpus.find("RTX 4090")}
# Registers by side of the tile, as the compiler has them for bf16 (kernel_facts.json), four warps and eight.
REGISTERS = {(32, 4): 64, (32, 8): 52, (64, 4): 128, (64, 8): 84, (128, 8): 211}


def footprint(gpu: gpus.GPU, tile: Tile) -> Footprint:
    """cp.async fills stages - 1 buffers ahead on sm_80 and sm_89; warpgroups read from `stages` of them."""
    buffers = tile.stages if gpu.target == "sm_90" else tile.stages - 1
    return Footprint(REGISTERS[tile.block, tile.warps], buffers * 2 * tile.block * tile.block_k * 2)


def space(gpu: gpus.GPU) -> list[tuple[Tile, int, Footprint]]:
    """What flash-muon tunes over, but for a side of 128 in four warps, which spills."""
    tiles = [
        Tile(block, block_k, warps, stages)
        for block, warps in REGISTERS
        for block_k in (32, 64)
        for stages in (3, 4, 5)
    ]
    return [(tile, 1, footprint(gpu, tile)) for tile in tiles]


def calibrated(name: str) -> gpus.GPU:
    gpu = DEVICES[name]
    library = 2 * 8192**3 / (PUBLISHED[name][1][3] * 1e-3)
    return replace(gpu, sustained=library / gpu.peaks["bf16"])


def predictions() -> list[tuple[str, int, float, float]]:
    """(device, side, the model's milliseconds for its best tile, the published ones)."""
    found = []
    for name, (measured, _) in PUBLISHED.items():
        gpu = calibrated(name)
        for side, milliseconds in zip(SIDES, measured, strict=True):
            work = Work(1, side, side, side, "bf16", 2, symmetric=True, output=2)
            best, _, _ = roofline.ranked(gpu, work, space(gpu))[0]
            found.append((name, side, best.seconds * 1e3, milliseconds))
    return found


def test_published_speeds():
    """Geometric mean of the error under 1.3 times, over four devices and four sides; at most 1.8 at the worst."""
    errors = [abs(math.log(predicted / measured)) for _, _, predicted, measured in predictions()]
    assert math.exp(sum(errors) / len(errors)) < 1.3
    assert math.exp(max(errors)) < 1.8


@pytest.mark.parametrize("count", [12, 16])
def test_the_published_best_tile_is_among_the_top_six(count):
    """modded-nanogpt's frozen choice on an H100 for K = 768, 128 x 128 x 64, four stages, eight warps, of 30.
    (Its other one, 64 x 128 x 128, is no square, and square tiles are all that an in-place average can have.)
    """
    work = Work(count, 768, 768, 768, "bf16", 2, symmetric=True, output=2)
    ranking = roofline.ranked(H100, work, space(H100))
    assert len(ranking) == 30
    best = [tuple(tile[:4]) for _, tile, _ in ranking[:6]]
    assert (128, 64, 8, 4) in best


TILE, FOOT = Tile(64, 32, 4, 3), Footprint(128, 24 * 1024)


def seconds(gpu=H100, tile=TILE, parts=1, foot=FOOT, **changed) -> float:
    work = replace(Work(1, 1024, 1024, 4096, "bf16", 2, symmetric=True), **changed)
    return roofline.estimate(gpu, work, tile, parts, foot).seconds


@pytest.mark.parametrize("gpu", gpus.GPUS, ids=lambda gpu: gpu.name)
def test_more_work_is_never_faster_and_a_better_device_never_slower(gpu):
    for changed in ({"K": 8192}, {"count": 3}, {"M": 2048, "N": 2048}, {"size": 4}):
        assert seconds(gpu, **changed) >= seconds(gpu)
    assert seconds(gpu, M=8192, N=8192) < seconds(gpu, M=8192, N=8192, symmetric=False)
    for better in ({"clock": gpu.clock * 2}, {"bandwidth": gpu.bandwidth * 2}, {"sustained": 1.0}):
        assert seconds(replace(gpu, **better)) <= seconds(gpu)
    assert seconds(gpu, kind="tf32x3", size=4) >= seconds(gpu, kind="tf32", size=4)
    assert 0 < gpu.sustained <= 1 and gpu.shared_per_program <= gpu.shared and gpu.sources


def test_a_long_sum_of_a_small_output_must_be_split():
    assert 4 * seconds(M=128, N=128, K=32768, parts=32) < seconds(M=128, N=128, K=32768)
    assert seconds(M=8192, N=8192, parts=4) > seconds(M=8192, N=8192)


def test_narrow_copies_and_small_tiles_cost():
    assert seconds(foot=Footprint(128, 24 * 1024, 4)) > seconds()
    large = {"M": 8192, "N": 8192}
    assert seconds(tile=Tile(16, 32, 4, 3), foot=Footprint(64, 8192), **large) > seconds(**large)


def test_what_a_multiprocessor_holds():
    a100 = gpus.find("A100")
    assert roofline.resident(a100, TILE, Footprint(255, 1024)) == 2  # 255 registers round to 256, times 128 threads
    assert roofline.resident(a100, TILE, Footprint(32, 80 * 1024)) == 2
    assert roofline.resident(a100, TILE, Footprint(16, 1)) == 16  # 2048 threads


def test_what_does_not_fit_is_not_ranked():
    work = Work(1, 128, 128, 128, "bf16", 2)
    assert roofline.ranked(H100, work, [(TILE, 1, Footprint(128, 300 * 1024))]) == []


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA H200", "H200"), ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA L4", "L4"), ("NVIDIA GeForce RTX 4090", "RTX 4090"), ("AMD Instinct MI300X", "MI300X"),
        ("NVIDIA L40S", None), ("Tesla V100-SXM2-16GB", None),
    ],
)  # fmt: skip
def test_a_device_by_its_name(name, row):
    found = gpus.find(name)
    assert (found and found.name) == row


def test_a_device_by_its_generation():
    assert gpus.for_target("sm_90").name == "H100"
    with pytest.raises(ValueError, match="no GPU of target 'sm_70' is described; allowed: sm_90, sm_100, sm_80, sm_89"):
        gpus.for_target("sm_70")


if __name__ == "__main__":
    for name, side, predicted, milliseconds in predictions():
        print(f"{name:9} {side:5} {predicted:8.4f} ms predicted, {milliseconds:8.4f} ms published")
    logs = [math.log(predicted / milliseconds) for _, _, predicted, milliseconds in predictions()]
    mean, size = (math.exp(sum(values) / len(logs)) for values in (logs, map(abs, logs)))
    print(f"geometric means: of the ratio {mean:.2f}, of the error {size:.2f}")
