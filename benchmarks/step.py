"""What one K-FAC step costs against an SGD and an AdamW step: forward, backward and update, on the same batches.

Chunks of steps alternate between the optimizers in one process, so that a drifting clock hits all alike. A chunk is
as long as `inverse_interval` (or a multiple), so each contains its share of inverses: the mean over a chunk is
honest, the median over chunks is robust.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from statistics import median
from typing import Any

import torch

from kfac_triton.tuning import limits
from kfac_triton.tuning.baselines import find_entrant
from kfac_triton.tuning.errors import Mistake
from kfac_triton.tuning.space import SPACES
from kfac_triton.tuning.task import Task
from kfac_triton.tuning.trainer import endless, train_step

KEPT_BATCHES = 16
LR, MOMENTUM, DAMPING, KL_CLIP = 1e-3, 0.9, 1.0, 1e-2  # of every K-FAC here: steps that stay small


@dataclass(frozen=True)
class StepOptions:
    """`chunk` is at least the steps of a chunk; it is rounded up to whole inverse intervals. No `chunks`: no times."""

    optimizers: tuple[str, ...] = ("sgd", "adamw", "kfac")
    factor_interval: int = 1
    inverse_interval: int = 20
    factor_fraction: float = 0.125
    batch: int | None = None
    chunks: int = 10
    chunk: int = 20
    compile: bool = False

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


@dataclass
class Lane:
    """An optimizer under the clock: `step` takes its next step, `finish` waits until the device has taken all."""

    name: str
    step: Callable[[], Any]
    finish: Callable[[], Any]
    first_seconds: float = 0.0
    times: list[float] = field(default_factory=list)

    def warm_up(self, steps: int) -> None:
        """A first chunk, unless there was one: compilation, libraries and memory."""
        if not self.first_seconds:
            self.first_seconds = self.chunk(steps)

    def chunk(self, steps: int) -> float:
        """Seconds of `steps` steps."""
        self.finish()
        start = time.perf_counter()
        for _ in range(steps):
            self.step()
        self.finish()
        return time.perf_counter() - start


def check(options: StepOptions) -> None:
    """Raises: Mistake: an unknown optimizer, or a number out of its range."""
    for name in options.optimizers:
        find_entrant(name)
    for name in ("factor_interval", "inverse_interval", "batch", "chunk"):
        limits.whole(f"--{name.replace('_', '-')}", getattr(options, name), limits.STEPS)
    limits.whole("--chunks", options.chunks, limits.STEPS, least=0)
    if not 0 < options.factor_fraction <= 1:
        raise Mistake(f"--factor-fraction {options.factor_fraction:g}: above 0, at most 1")


def compare_steps(task: Task, options: StepOptions, device: torch.device) -> list[StepCost]:
    """The cost of each optimizer's step, the first one's being the unit."""
    batches = kept_batches(task, options)
    return interleave([lane(task, name, options, batches, device) for name in options.optimizers], options)


def kept_batches(task: Task, options: StepOptions) -> list[Any]:
    """The batches that every optimizer sees in turn."""
    return resized(list(islice(endless(task, 0), KEPT_BATCHES)), options.batch)


def lane(task: Task, name: str, options: StepOptions, batches: list[Any], device: torch.device) -> Lane:
    """One of our optimizers with a model of its own and its place in the batches."""
    torch.manual_seed(0)
    model = task.model().to(device)
    optimizer = find_entrant(name).build(model, task, hyper_of(name, options), options.compile)
    stream = cycle(batches)
    return Lane(name, lambda: train_step(task, model, optimizer, stream, device), lambda: synchronise(device))


def interleave(lanes: Sequence[Lane], options: StepOptions) -> list[StepCost]:
    """Times them in turn, each after a first chunk."""
    torch.set_flush_denormal(True)
    for one in lanes:
        one.warm_up(options.steps)
    for _ in range(options.chunks):
        for one in lanes:
            one.times.append(1e3 * one.chunk(options.steps) / options.steps)
    unit = median(lanes[0].times)
    return [
        StepCost(one.name, mid, min(one.times), max(one.times), mid / unit, one.first_seconds)
        for one, mid in ((one, median(one.times)) for one in lanes)
    ]


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def resized(batches: list[Any], size: int | None) -> list[Any]:
    """The rows of `batches`, dealt out again in batches of `size`; as they are without one."""
    if size is None:
        return batches
    inputs, targets = (torch.cat([batch[i] for batch in batches]) for i in range(2))
    while len(inputs) < size:
        inputs, targets = torch.cat([inputs, inputs]), torch.cat([targets, targets])
    count = len(inputs) // size
    return [(inputs[i * size : (i + 1) * size], targets[i * size : (i + 1) * size]) for i in range(count)]


def hyper_of(name: str, options: StepOptions) -> dict[str, Any]:
    """What an optimizer is built from; `options` set the intervals of "kfac" alone, and "soap" works as it comes."""
    if name in ("kfac", "kfac-default"):
        intervals = {one: getattr(options, one) for one in ("factor_interval", "inverse_interval", "factor_fraction")}
        return {"lr": LR, "momentum": MOMENTUM, "damping": DAMPING, "kl_clip": KL_CLIP, **intervals}
    return {**SPACES[name].first, "lr": 1e-4} if name in SPACES else {}
