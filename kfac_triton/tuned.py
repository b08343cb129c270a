"""Files that `kfac-tune` wrote: the kernels' tiles of a GPU.

A tile file is JSON: {"format": "kfac-triton tiles 1", "gpu": the device's name, "target": "sm_90", "triton": version,
"source": "model" or "measured", "entries": [{"kernel", "dtype", "precision", "shape": log2-buckets, "tile": [block,
block_k, warps, stages, descriptors], "parts"}, ...]}. It is looked for in the user's cache folder ($KFAC_CACHE, else
$XDG_CACHE_HOME/kfac-triton, else ~/.cache/kfac-triton), then among the files that come with the package:
"tiles-rtx-4090.json" is for every device whose name has those words, the longest name first; and last one for the
device's generation.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path

import torch

log = logging.getLogger("kfac_triton")

FORMAT = "kfac-triton tiles 1"
SOURCES = ("model", "measured")
MAX_PARTS = 32

Tile = tuple[int, int, int, int, bool]  # block, block_k, warps, stages, descriptors
Tiles = dict[tuple[str, str, str], dict[tuple[int, ...], tuple[Tile, int]]]  # (kernel, dtype, precision), log2-buckets


def cache_folder() -> Path:
    """Where `kfac-tune kernels` writes, and this module looks first."""
    own = os.environ.get("KFAC_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kfac-triton"


def file_name(gpu: str) -> str:
    """A device's name as the name of its file."""
    return "tiles-" + re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".json"


def target_of(device: torch.device) -> str:
    """A device's generation as compilers call it: "sm_90", "gfx942"."""
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def read_tiles(path: Path, target: str | None = None) -> Tiles:
    """The table in a tile file.

    Raises:
        ValueError: the file is damaged, or for another kind of device than `target`.
    """
    try:
        held = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error})") from None
    if not isinstance(held, dict) or held.get("format") != FORMAT:
        raise ValueError(f"{path} is no tile file of this version ({FORMAT!r})")
    if target is not None and held.get("target") != target:
        raise ValueError(f"{path} is for {held.get('target')!r}, and this device is {target!r}")
    if held.get("source") not in SOURCES:
        raise ValueError(f"{path} has the source {held.get('source')!r}; allowed: {', '.join(SOURCES)}")
    table: Tiles = {}
    try:
        for entry in held["entries"]:
            tile, parts = _checked(*map(int, entry["tile"])), int(entry["parts"])
            if not 1 <= parts <= MAX_PARTS:
                raise ValueError(f"{parts} parts")
            key = str(entry["kernel"]), str(entry["dtype"]), str(entry["precision"])
            table.setdefault(key, {})[tuple(int(n) for n in entry["shape"])] = tile, parts
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} has an entry that cannot be read ({type(error).__name__}: {error})") from None
    return table


def _checked(block: int, block_k: int, warps: int, stages: int, descriptors: int) -> Tile:
    sides = all(16 <= n <= 256 and n & (n - 1) == 0 for n in (block, block_k))
    if not sides or warps not in (1, 2, 4, 8, 16) or not 1 <= stages <= 8 or descriptors not in (0, 1):
        raise ValueError(f"no tile: {(block, block_k, warps, stages, descriptors)}")
    return block, block_k, warps, stages, bool(descriptors)


def tiles_for(device: torch.device) -> Tiles:
    """The table of a device; empty where no file is for it. A file that is refused is named in one warning."""
    if device.type != "cuda":
        return {}
    name, target = torch.cuda.get_device_name(device), target_of(device)
    for path in candidates(name, target):
        try:
            return read_tiles(path, target)
        except ValueError as error:
            log.warning("%s; the tiles that come with kfac-triton serve", error)
    return {}


def candidates(name: str, target: str) -> Iterator[Path]:
    """Files that there are for a device of that name and target, the best first."""
    words = set(file_name(name).removesuffix(".json").split("-"))
    own = sorted(cache_folder().glob("tiles-*.json"), key=lambda path: -len(path.stem))
    shipped = shipped_files()
    yield from (path for path in (*own, *shipped) if set(path.stem.split("-")) <= words)
    yield from (path for path in shipped if json.loads(path.read_text()).get("target") == target)


def shipped_files() -> list[Path]:
    """The tile files that come with the package, by name: "tiles-h100.json" is for every device with that word."""
    return sorted((Path(__file__).parent / "tiles").glob("tiles-*.json"))
