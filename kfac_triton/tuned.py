"""Files that `kfac-tune` wrote: the kernels' tiles of a GPU, and the settings for a model.

A tile file is JSON: {"format": "kfac-triton tiles 1", "gpu": the device's name, "target": "sm_90", "triton": version,
"source": "model" or "measured", "entries": [{"kernel", "dtype", "precision", "shape": log2-buckets, "tile": [block,
block_k, warps, stages, descriptors], "parts"}, ...]}. It is looked for in the user's cache folder ($KFAC_CACHE, else
$XDG_CACHE_HOME/kfac-triton, else ~/.cache/kfac-triton), then among the files that come with the package:
"tiles-rtx-4090.json" is for every device whose name has those words, the longest name first; and last one for the
device's generation. A tuned file is what tuned.schema.json says.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kfac_triton import schedules
from kfac_triton.config import unwrapped
from kfac_triton.version import __version__

log = logging.getLogger("kfac_triton")

FORMAT, TUNED_FORMAT = "kfac-triton tiles 1", "kfac-triton tuned 1"
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


# ------------------------------------------------------------------------------------------------------- tuned settings


def load_tuned(path: str | Path, model: nn.Module | None = None, *, steps: int | None = None) -> dict[str, Any]:
    """The arguments in a file that `kfac-tune run` wrote, for `KFAC(model, **load_tuned("tuned.json"))`.

    KFAC warns where its model or device is another one than the file's. Here another version warns, and a tile file
    that is not where tiles are looked for.

    Args:
        model: refused, if it is another one.
        steps: of the training to come; the schedules of the file stretch from its own runs' to these.

    Raises:
        ValueError: the file is damaged or of another format, or it is for another model.
    """
    path = Path(path)
    content = read_tuned(path)
    model = None if model is None else unwrapped(model)
    if model is not None and signature(model) != content["model"]["signature"]:
        raise ValueError(
            f"{path} was tuned for another model ({content['model']['parameters']} parameters, here "
            f"{sum(p.numel() for p in model.parameters())}); run kfac-tune for this one"
        )
    if steps is not None and steps < 1:
        raise ValueError(f"steps must be at least 1; got {steps!r}")
    version = content["environment"].get("kfac_triton")
    if version != __version__:
        log.warning("%s was tuned with kfac-triton %s, and this is %s", path, version, __version__)
    tiles = content["tiles"]
    if tiles is not None and not (cache_folder() / tiles).is_file():
        log.warning("%s was tuned with the tiles in %s, which is not in %s", path, tiles, cache_folder())
    ratio = 1.0 if steps is None else steps / content["steps"]
    arguments = {
        name: schedules.restored(schedules.stretched(value, ratio)) if isinstance(value, dict) else value
        for name, value in content["arguments"].items()
    }
    if "lr" in arguments and arguments["lr"] != "adaptive":
        arguments.setdefault("rule", "kl")  # the only one when the first such files were written
    return {**arguments, "tuned_for": {**content["model"], "device": content["device"], "file": str(path)}}


def read_tuned(path: Path) -> dict[str, Any]:
    """What a tuned file holds.

    Raises:
        ValueError: the file is damaged, or of another format.
    """
    content = read(path)
    check(content, str(path))
    return content


def read(path: Path) -> dict[str, Any]:
    """The JSON object in a file of ours, which has a "format".

    Raises:
        ValueError: there is none.
    """
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error})") from None
    if not isinstance(held, dict) or not isinstance(held.get("format"), str):
        raise ValueError(f"{path} is no file of kfac-tune's: it has no format")
    return held


def check(content: Mapping[str, Any], name: str) -> None:
    """Raises: ValueError: `content` is not what tuned.schema.json says, or an argument is none of KFAC's values."""
    import jsonschema  # needs a moment, and `import kfac_triton` none of it

    found = content.get("format")
    if found != TUNED_FORMAT:
        raise ValueError(f"{name} is no tuned file of this version ({TUNED_FORMAT!r}); its format is {found!r}")
    schema = json.loads((Path(__file__).parent / "tuned.schema.json").read_text(encoding="utf-8"))
    fault = jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(schema).iter_errors(dict(content)))
    if fault is not None:
        where = ".".join(str(part) for part in fault.absolute_path) or "the file"
        raise ValueError(f"{name}: {where}: {fault.message[:200]}")
    for argument, value in content["arguments"].items():
        if isinstance(value, dict):
            try:
                schedules.restored(value)
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{name}: arguments.{argument}: no schedule ({error})") from None


def signature(model: nn.Module) -> str:
    """Twelve digits of the sha256 of the names and shapes of a model's parameters."""
    listed = sorted((name, tuple(parameter.shape)) for name, parameter in model.named_parameters())
    return hashlib.sha256(repr(listed).encode()).hexdigest()[:12]


def device_name(device: torch.device) -> str:
    """A GPU's name, "cpu" for the processor: what a tuned file is for."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def compare(tuned_for: Mapping[str, Any], module: nn.Module) -> None:
    """Warns where `module` or its device is another than the one a tuned file is for."""
    name = tuned_for.get("file", "the tuned file")
    if signature(module) != tuned_for.get("signature"):
        log.warning("%s was tuned for another model (%s parameters)", name, tuned_for.get("parameters"))
    device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    here = device_name(device)
    if here != tuned_for.get("device"):
        log.warning("%s was tuned on %s, and the model is on %s", name, tuned_for.get("device"), here)
