"""What one K-FAC step costs against an SGD and an AdamW step: forward, backward and update, on the same batches.

Chunks of steps alternate between the optimizers in one process, so that a drifting clock hits all alike. A chunk is
as long as `inverse_interval` (or a multiple), so each contains its share of inverses: the mean over a chunk is
honest, the median over chunks is robust.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from statistics import median
from typing import Any

import torch
from torch import nn

from kfac_triton.tuning import limits
from kfac_triton.tuning.baselines import find_entrant
from kfac_triton.tuning.errors import Mistake
from kfac_triton.tuning.space import SPACES
from kfac_triton.tuning.task import Task
from kfac_triton.tuning.trainer import endless, train_step

KEPT_BATCHES = 16


@dataclass(frozen=True)
class StepOptions:
    """`chunk` is at least the steps of a chunk; it is rounded up to whole inverse intervals."""

    optimizers: tuple[str, ...] = ("sgd", "adamw", "kfac")
    factor_interval: int = 1
    inverse_interval: int = 20
    factor_fraction: float = 0.125
    batch: int | None = None
    chunks: int = 10
    chunk: int = 20
    compile: bool = True

    @property
    def steps(self) -> int:
        return math.ceil(self.chunk / self.inverse_interval) * self.inverse_interval


@dataclass(frozen=True)
class StepCost:
    """Milliseconds a step: median, smallest and largest chunk mean; `ratio` is to the first optimizer's median."""

    optimizer: str
    median_ms: float
    low_ms: float
    high_ms: float
    ratio: float
    first_seconds: float


class Lane:
    """One optimizer with a model of its own and its place in the batches."""

    def __init__(self, task: Task, name: str, options: StepOptions, batches: list[Any], device: torch.device) -> None:
        torch.manual_seed(0)
        self.task, self.name, self.device = task, name, device
        self.model: nn.Module = task.model().to(device)
        self.optimizer = find_entrant(name).build(self.model, task, _hyper(name, options), options.compile)
        self.batches = _cycle(batches)
        self.times: list[float] = []
        self.first_seconds = self.chunk(options.steps)

    def chunk(self, steps: int) -> float:
        """Seconds of `steps` steps."""
        self._synchronise()
        start = time.perf_counter()
        for _ in range(steps):
            train_step(self.task, self.model, self.optimizer, self.batches, self.device)
        self._synchronise()
        return time.perf_counter() - start

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def check(options: StepOptions) -> None:
    """Raises: Mistake: an unknown optimizer, or a number out of its range."""
    for name in options.optimizers:
        find_entrant(name)
    for name in ("factor_interval", "inverse_interval", "batch", "chunks", "chunk"):
        limits.whole(f"--{name.replace('_', '-')}", getattr(options, name), limits.STEPS)
    if not 0 < options.factor_fraction <= 1:
        raise Mistake(f"--factor-fraction {options.factor_fraction:g}: above 0, at most 1")


def compare_steps(task: Task, options: StepOptions, device: torch.device) -> list[StepCost]:
    """The cost of each optimizer's step, the first one's being the unit."""
    torch.set_flush_denormal(True)
    batches = resized(list(islice(endless(task, 0), KEPT_BATCHES)), options.batch)
    lanes = [Lane(task, name, options, batches, device) for name in options.optimizers]
    for _ in range(options.chunks):
        for lane in lanes:
            lane.times.append(1e3 * lane.chunk(options.steps) / options.steps)
    unit = median(lanes[0].times)
    return [
        StepCost(
            lane.name,
            median(lane.times),
            min(lane.times),
            max(lane.times),
            median(lane.times) / unit,
            lane.first_seconds,
        )
        for lane in lanes
    ]


def print_costs(task: str, options: StepOptions, costs: list[StepCost]) -> None:
    """A table on the terminal."""
    from rich.console import Console
    from rich.table import Table

    batch = options.batch or "the task's own"
    table = Table(
        "optimizer",
        "ms a step, median",
        "lowest to highest chunk",
        f"x {costs[0].optimizer}",
        "first chunk, s",
        title=f"{task}, batch {batch}; factors every {options.factor_interval} from {options.factor_fraction:g} of it, "
        f"inverses every {options.inverse_interval}; {options.chunks} chunks of {options.steps} steps",
    )
    for cost in costs:
        table.add_row(
            cost.optimizer,
            f"{cost.median_ms:.2f}",
            f"{cost.low_ms:.2f} to {cost.high_ms:.2f}",
            f"{cost.ratio:.2f}",
            f"{cost.first_seconds:.1f}",
        )
    Console(markup=False, emoji=False).print(table)


def resized(batches: list[Any], size: int | None) -> list[Any]:
    """The rows of `batches`, dealt out again in batches of `size`; as they are without one."""
    if size is None:
        return batches
    inputs, targets = (torch.cat([batch[i] for batch in batches]) for i in range(2))
    while len(inputs) < size:
        inputs, targets = torch.cat([inputs, inputs]), torch.cat([targets, targets])
    count = len(inputs) // size
    return [(inputs[i * size : (i + 1) * size], targets[i * size : (i + 1) * size]) for i in range(count)]


def _hyper(name: str, options: StepOptions) -> dict[str, Any]:
    if name in ("kfac", "kfac-default"):
        intervals = {one: getattr(options, one) for one in ("factor_interval", "inverse_interval", "factor_fraction")}
        return {"lr": 1e-3, "momentum": 0.9, "damping": 1.0, "kl_clip": 1e-2, **intervals}
    return {**SPACES[name].first, "lr": 1e-4} if name in SPACES else {}


def _cycle(batches: list[Any]) -> Iterator[tuple[Any, Any]]:
    while True:
        yield from batches
