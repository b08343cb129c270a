"""The machine and the versions a result belongs to."""

from __future__ import annotations

import hashlib
import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import kfac_triton
from kfac_triton.tuning.errors import Mistake
from kfac_triton.version import __version__


def describe(device: torch.device) -> dict[str, Any]:
    """Versions, processor, threads and the precision of matrix products."""
    return {
        "kfac_triton": __version__,
        "code": code_digest(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "optuna": _version("optuna"),
        "system": platform.platform(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }


def code_digest() -> str:
    """Twelve digits of the sha256 of this package's Python files, names included."""
    root, digest = Path(kfac_triton.__file__).parent, hashlib.sha256()
    # os.walk, since in a checkout some folders are links, which rglob passes over
    folders = [Path(folder) for folder, _, _ in os.walk(root, followlinks=True)]
    for file in sorted(path for folder in folders for path in folder.glob("*.py")):
        digest.update(f"{file.relative_to(root)}\n".encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def find_device(name: str) -> torch.device:
    """ "auto" is the GPU where there is one. Raises: Mistake: no such device."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise Mistake(f"--device {name!r}: one of auto, cpu, cuda, cuda:N") from error
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and not torch.cuda.is_available()):
        raise Mistake(f"--device {name}: this machine has no such device; use cpu")
    return device


def peak_memory(device: torch.device) -> int:
    """Bytes: the most the GPU's allocator held, or the most this process had resident."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:  # Windows has no such count
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
