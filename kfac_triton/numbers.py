"""Small vectors of numbers, one a layer or group: NumPy arrays in a CPU's memory, tensors on another device.

A hundred operations on a few numbers each cost a CPU more than the products of a small network, and NumPy's cost a
third of torch's. Formulas that both understand stand once; `library(...)` is what they take functions from. On other
devices nothing waits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

Numbers = Any  # an array or a tensor
NUMPY = {torch.float32: np.float32, torch.float64: np.float64, torch.bool: np.bool_}


class scalars:
    """What formulas take from a library, for Python's own numbers."""

    sqrt, minimum, maximum = math.sqrt, min, max

    @staticmethod
    def where(condition: bool, one: float, other: float) -> float:
        return one if condition else other

    @staticmethod
    def clip(value: float, least: float | None, most: float | None) -> float:
        value = value if least is None or value >= least else least
        return value if most is None or value <= most else most


def on_host(device: torch.device) -> bool:
    """Whether numbers on that device are read without waiting for it."""
    return device.type == "cpu"


def library(device: torch.device) -> Any:
    """NumPy or torch: what has `where`, `sqrt`, `minimum` and the like for numbers on that device."""
    return np if on_host(device) else torch


def shared(t: Tensor) -> Numbers:
    """The tensor as numbers, in the same memory."""
    return t.numpy() if on_host(t.device) else t


def numbers(values: Sequence[Any], device: torch.device) -> Numbers:
    """Numbers in float64; an entry that is a 0-d tensor on the device is read there."""
    if on_host(device):
        return np.array([float(value) for value in values])
    if any(isinstance(value, Tensor) for value in values):
        return torch.stack([torch.as_tensor(v, dtype=torch.float64).to(device, non_blocking=True) for v in values])
    return torch.tensor([float(v) for v in values], dtype=torch.float64).to(device, non_blocking=True)


def places(index: Sequence[int], device: torch.device) -> Any:
    """An index of vectors of numbers; on a device a tensor, since a list is copied there, and waited for, each time."""
    return list(index) if on_host(device) else torch.tensor(index).to(device, non_blocking=True)


def as_tensor(values: Numbers, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers as a tensor."""
    if isinstance(values, np.ndarray) and dtype in NUMPY and device.type == "cpu":
        return torch.from_numpy(np.ascontiguousarray(values, NUMPY[dtype]))  # which dispatches nothing
    return torch.as_tensor(values, dtype=dtype, device=device)
