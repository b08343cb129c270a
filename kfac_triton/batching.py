"""Batches that grow (Martens & Grosse 2015, section 13): small while gradients say much, large where noise is left."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


class GrowingBatches(Sampler[list[int]]):
    """A batch sampler: `DataLoader(data, batch_sampler=GrowingBatches(len(data), steps=2000))`.

    Batch k = 1, 2, ... has m_k = min(first * (size / first)^((k - 1) / (full_at - 1)), size) examples, drawn without
    replacement; from k = full_at on, all of them (or `most`). What batch k holds follows from `seed` and k alone, so a
    run that stopped after k batches goes on with `start=k`.

    Args:
        size: examples in the data.
        steps: batches in all.
        first: examples in the first batch (the paper: 1000).
        full_at: the step at which the batch would be the whole data (the paper: 500).
        most: no batch is larger.
        seed: of the draws.
        start: batches that were done before.

    Raises:
        ValueError: a number is out of its range.
    """

    def __init__(
        self,
        size: int,
        *,
        steps: int,
        first: int = 1000,
        full_at: int = 500,
        most: int | None = None,
        seed: int = 0,
        start: int = 0,
    ) -> None:
        for name, value, least in (
            ("size", size, 1), ("steps", steps, 1), ("first", first, 1), ("full_at", full_at, 2),
            ("most", 1 if most is None else most, 1), ("seed", seed, 0), ("start", start, 0),
        ):  # fmt: skip
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} must be an integer >= {least}; got {value!r}")
        self.size, self.steps, self.first, self.full_at = size, steps, min(first, size), full_at
        self.most, self.seed, self.start = most, seed, start

    def batch_size(self, k: int) -> int:
        """Examples in batch k, counted from 1."""
        grown = (
            self.first * (self.size / self.first) ** ((k - 1) / (self.full_at - 1)) if k < self.full_at else self.size
        )
        return min(math.floor(grown * (1 + 1e-12)), self.size, self.size if self.most is None else self.most)

    def __len__(self) -> int:
        return max(self.steps - self.start, 0)

    def __iter__(self) -> Iterator[list[int]]:
        for k in range(self.start + 1, self.steps + 1):
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + k)
            drawn: list[int] = torch.randperm(self.size, generator=generator)[: self.batch_size(k)].tolist()
            yield drawn
