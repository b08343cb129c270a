"""Tiles: how large a piece of the output one program computes, and into how many parts it splits the sum.

A tile comes from the table of the device, made by `kfac-tune kernels` and given to this module by `use`; where no
entry is near, from a rule: the largest tile that keeps every multiprocessor busy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

MAX_PARTS = 32
WORKSPACE_BYTES = 64 * 2**20
LEAST_STEPS = 4  # of a part: fewer would not fill the pipeline that hides the latency of memory
NEAR = 3  # steps of a factor of two, over all axes, from which an entry still speaks for a shape
MULTIPROCESSORS_OF_THE_INTERPRETER = 132  # an H100's, so that tests see what an H100 would run


class Tile(NamedTuple):
    """BLOCK x BLOCK outputs, BLOCK_K terms of the sum at a time; `descriptors`: loads by tensor descriptors (TMA)."""

    block: int
    block_k: int
    warps: int
    stages: int
    descriptors: bool = False


class Choice(NamedTuple):
    """A tile, and the parts into which the sum is split (1: not at all)."""

    tile: Tile
    parts: int = 1


class Key(NamedTuple):
    """What an entry of a table is found by, beside the shape."""

    kernel: str
    dtype: str
    precision: str


Shape = tuple[int, ...]
Table = Mapping[Key, Mapping[Shape, Choice]]  # shapes as log2-buckets
Finder = Callable[[torch.device], Mapping[tuple[str, str, str], Mapping[Shape, tuple[tuple[Any, ...], int]]]]


class _Tables:
    """The tables by device, from whoever knows the files."""

    def __init__(self) -> None:
        self.find: Finder = lambda device: {}
        self.known: dict[torch.device, Table] = {}

    def __call__(self, device: torch.device) -> Table:
        if device not in self.known:
            self.known[device] = {
                Key(*key): {shape: Choice(Tile(*tile), parts) for shape, (tile, parts) in entries.items()}
                for key, entries in self.find(device).items()
            }
        return self.known[device]


tables = _Tables()


def use(find: Finder) -> None:
    """Takes tables from `find` from now on; it is asked once for each device, and answers in plain tuples."""
    if tables.find is find:
        return
    tables.find = find
    tables.known = {}


def bucket(shape: Sequence[int]) -> Shape:
    """The nearest power of two of every size, as its exponent."""
    return tuple(round(math.log2(max(size, 1))) for size in shape)


def multiprocessors(device: torch.device) -> int:
    """How many programs run at once at least."""
    if device.type != "cuda":
        return MULTIPROCESSORS_OF_THE_INTERPRETER
    return torch.cuda.get_device_properties(device).multi_processor_count


def tabled(key: Key, shape: Sequence[int], device: torch.device, allowed: Callable[[Tile], bool]) -> Choice | None:
    """The device's entry nearest to the shape, of those with an allowed tile; None where none is near."""
    entries = tables(device).get(key, {})
    here = bucket(shape)
    near = [
        (sum(abs(a - b) for a, b in zip(at, here, strict=True)), at, choice)
        for at, choice in entries.items()
        if len(at) == len(here) and allowed(choice.tile)
    ]
    distance, _, choice = min(near, default=(NEAR + 1, (), None))
    return choice if distance <= NEAR else None


def fitting(tiles: Sequence[Tile], side: int) -> Sequence[Tile]:
    """The tiles no larger than a side of the output, or the smallest one: the rest would compute mostly padding."""
    return [tile for tile in tiles if tile.block <= side] or tiles[-1:]


def filling(
    tiles: Sequence[Tile],
    programs: Callable[[Tile], int],
    device: torch.device,
    steps: Callable[[Tile], int] = lambda tile: 1,
) -> Choice:
    """The largest tile, its sum split if it must be, that gives every multiprocessor a program; else what gives most.

    Args:
        programs: how many programs compute the output with that tile.
        steps: how many steps of BLOCK_K their sums take; by default too few to be split.
    """
    enough = multiprocessors(device)
    best, most = Choice(tiles[-1]), 0
    for tile in tiles:
        parts = clipped_parts(-(-enough // max(programs(tile), 1)), tile, programs(tile), steps(tile))
        if programs(tile) * parts >= enough:
            return Choice(tile, parts)
        if programs(tile) * parts > most:
            best, most = Choice(tile, parts), programs(tile) * parts
    return best


def tabled_or_filling(
    key: Key,
    shape: Sequence[int],
    device: torch.device,
    allowed: Sequence[Tile],
    side: int,
    programs: Callable[[Tile], int],
    steps: Callable[[Tile], int] = lambda tile: 1,
    *,
    descriptors: bool = False,
) -> Choice:
    """The device's entry for the shape, with no larger a tile than the first of `allowed`; else what fills the device.

    Args:
        side: of the output, the shorter one.
        programs, steps: as in `filling`.
        descriptors: whether an entry may load by them.
    """
    largest = allowed[0].block
    found = tabled(key, shape, device, lambda tile: tile.block <= largest and (descriptors or not tile.descriptors))
    if found is None:
        return filling(fitting(allowed, side), programs, device, steps)
    tile = found.tile
    return Choice(tile, clipped_parts(found.parts, tile, programs(tile), steps(tile)))


def clipped_parts(parts: int, tile: Tile, programs: int, steps: int) -> int:
    """No more parts than leave each LEAST_STEPS steps, than MAX_PARTS, and than the workspace holds."""
    room = WORKSPACE_BYTES // max(4 * tile.block**2 * programs, 1)
    return max(1, min(parts, steps // LEAST_STEPS, MAX_PARTS, room))


def options(tile: Tile) -> dict[str, int]:
    """Warps and stages of a launch: at most two stages on ROCm, where a workgroup has 64 KiB of local memory."""
    stages = min(tile.stages, 2) if torch.version.hip is not None else tile.stages
    return {"num_warps": tile.warps, "num_stages": stages}
