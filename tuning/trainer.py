"""One training run on the clock.

The clock counts what training costs: fetching a batch, forward, backward, the optimizer's step. Evaluation stops it.
On a GPU it is read only after a synchronisation. Runs are bounded by seconds, and the schedule follows the share of
them that is spent.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from kfac_triton.batching import GrowingBatches
from kfac_triton.tuning.baselines import Entrant, Hyper, in_force
from kfac_triton.tuning.errors import Mistake
from kfac_triton.tuning.task import Task

EVALUATION_SEED = 2**31 - 1  # of the batches that judge a task without `evaluate`
EVALUATION_BATCHES = 8
WARM_STEPS = 3
GPU_STRIDE = 10  # steps between two synchronisations
GROWN, GROWN_AT = 40, 500  # a growing batch is so many of the task's from that step on (the paper: 500)
EXPLODED = 1e3  # a metric this many times its first value counts as diverged


@dataclass
class Point:
    """An evaluation: training seconds and steps so far, the task's metric and its held-out twin."""

    seconds: float
    step: int
    train: float
    test: float | None


@dataclass
class Run:
    """What a training run left. `ended` is "done", "diverged" or "pruned", `reason` says why in words; `in_force` holds
    every hyper-parameter that it began with."""

    points: list[Point] = field(default_factory=list)
    steps: int = 0
    seconds: float = 0.0
    ms_per_step: float = 0.0
    median_step_ms: float = 0.0
    compile_seconds: float = 0.0
    ended: str = "done"
    reason: str = ""
    in_force: dict[str, Any] = field(default_factory=dict)
    evaluation_seconds: float = 0.0

    @property
    def final(self) -> float:
        """The last value of the metric, inf for a run that diverged."""
        return math.inf if self.ended == "diverged" or not self.points else self.points[-1].train

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Budget:
    """How long a run trains, how often it is judged, and on what. `stop(point) -> bool` may end it early."""

    seconds: float
    evaluations: int = 30
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    compile: bool = False
    held_out: bool = True
    stop: Callable[[Point], bool] | None = None


class Clock:
    """Training seconds, stopped while we look."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = 0.0
        self._since: float | None = None

    def start(self) -> None:
        self._since = time.perf_counter()

    def read(self) -> float:
        if self._since is None:
            return self.seconds
        return self.seconds + time.perf_counter() - self._since

    def stop(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds, self._since = self.read(), None


def train(task: Task, entrant: Entrant, hyper: Hyper, seed: int, budget: Budget, *, warm: bool = True) -> Run:
    """Trains a fresh model of `task` from `seed` for `budget.seconds`, judged at even distances on the clock.

    `warm`: after a warm-up, which a process that has just trained with this optimizer can do without.
    """
    # a state that decays into denormals would make a CPU slower by an order of magnitude
    torch.set_flush_denormal(True)
    run = Run(compile_seconds=warm_up(task, entrant, hyper, budget) if warm else 0.0)
    torch.manual_seed(seed)
    model = task.model().to(budget.device)
    optimizer = entrant.build(model, task, hyper, budget.compile)
    run.in_force = in_force(optimizer)
    try:
        batches = endless(task, seed)
        _loop(task, model, optimizer, entrant, hyper, grown(batches) if entrant.growing else batches, budget, run)
    finally:
        _close(optimizer)
    return run


def warm_up(task: Task, entrant: Entrant, hyper: Hyper, budget: Budget) -> float:
    """Seconds that the first steps cost beyond later ones: compilation, libraries, first touches of memory.

    Trains a throwaway model, so that the clock of the run itself starts warm.
    """
    times = []
    torch.manual_seed(0)
    model = task.model().to(budget.device)
    optimizer = entrant.build(model, task, hyper, budget.compile)
    batches = endless(task, 0)
    for _ in range(2 * WARM_STEPS):
        start = time.perf_counter()
        loss = train_step(task, model, optimizer, batches, budget.device)
        float(loss)
        times.append(time.perf_counter() - start)
    _close(optimizer)
    steady = median(times[WARM_STEPS:])
    return sum(max(spent - steady, 0.0) for spent in times[:WARM_STEPS])


def train_step(
    task: Task,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterator[tuple[Any, Any]],
    device: torch.device,
) -> Tensor:
    """One step on the next batch; returns its loss before the step."""
    inputs, targets = (moved(part, device) for part in next(batches))
    return step_on(task, model, optimizer, inputs, targets)


def step_on(task: Task, model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Any, targets: Any) -> Tensor:
    """As `train_step`, on a batch that is on the model's device."""

    def closure() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = task.loss(model(inputs), targets)
        loss.backward()
        return loss

    if optimizer.param_groups[0].get("adaptive_damping"):
        return cast(Tensor, optimizer.step(cast(Callable[[], float], closure))).detach()
    loss = closure()
    optimizer.step()
    return loss.detach()


def endless(task: Task, seed: int) -> Iterator[tuple[Any, Any]]:
    """The task's batches, begun again with another seed whenever they end."""
    epoch = count = 0
    while True:
        empty = True
        for batch in task.batches(seed + 1_000_003 * epoch):
            empty = False
            count += 1
            yield batch
        if empty:
            after = f" after {count} batches; batches(seed) must begin anew at every call" if count else ""
            raise Mistake(f"task {task.name!r}: batches(seed) yields nothing{after}")
        epoch += 1


def grown(batches: Iterator[tuple[Any, Any]]) -> Iterator[tuple[Any, Any]]:
    """Batches of more and more of the task's, first one, as those of `GrowingBatches`."""
    schedule = GrowingBatches(GROWN, steps=1, first=1, full_at=GROWN_AT)
    for k in itertools.count(1):
        parts = [next(batches) for _ in range(schedule.batch_size(k))]
        yield tree_map(lambda *leaves: torch.cat(leaves), *parts)


def evaluate(task: Task, model: nn.Module, device: torch.device) -> float:
    """The task's metric, or the mean loss of fixed batches, in evaluation mode and without gradients."""
    return _quietly(model, lambda: task.evaluate(model) if task.evaluate else _mean_loss(task, model, device))


def held_out(task: Task, model: nn.Module) -> float | None:
    """The task's metric on held-out data, where it has one."""
    test = task.test
    return _quietly(model, lambda: test(model)) if test else None


def _loop(
    task: Task,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    entrant: Entrant,
    hyper: Hyper,
    batches: Iterator[tuple[Any, Any]],
    budget: Budget,
    run: Run,
) -> None:
    schedule, clock = entrant.schedule(optimizer, hyper), Clock(budget.device)
    stride = 1 if budget.device.type == "cpu" else GPU_STRIDE
    times: list[float] = []
    _judge(task, model, budget, run, clock)
    due = budget.seconds / budget.evaluations
    clock.start()
    while run.ended == "done" and clock.read() < budget.seconds:
        begun, loss = clock.read(), torch.zeros(())
        for _ in range(stride):
            schedule(min(clock.read() / budget.seconds, 1.0))
            loss = train_step(task, model, optimizer, batches, budget.device)
        run.steps += stride
        if not math.isfinite(float(loss)):
            run.ended, run.reason = "diverged", f"the loss was {float(loss)} at step {run.steps}"
        times.append((clock.read() - begun) / stride)
        if clock.read() >= due and run.ended == "done":
            clock.stop()
            _judge(task, model, budget, run, clock)
            due = max(due, clock.seconds - clock.seconds % (budget.seconds / budget.evaluations))
            due += budget.seconds / budget.evaluations
            clock.start()
    clock.stop()
    if run.ended == "done" and run.points[-1].step < run.steps:
        _judge(task, model, budget, run, clock)
    run.seconds = clock.seconds
    run.ms_per_step = 1e3 * clock.seconds / max(run.steps, 1)
    run.median_step_ms = 1e3 * median(times) if times else 0.0


def _judge(task: Task, model: nn.Module, budget: Budget, run: Run, clock: Clock) -> None:
    begun = time.perf_counter()
    value = evaluate(task, model, budget.device)
    point = Point(clock.seconds, run.steps, value, held_out(task, model) if budget.held_out else None)
    run.evaluation_seconds += time.perf_counter() - begun
    run.points.append(point)
    if not math.isfinite(value) or (run.points[0].train > 0 and value > EXPLODED * run.points[0].train):
        run.ended, run.reason = "diverged", f"the metric was {value:g} at step {run.steps}"
    elif budget.stop and budget.stop(point):
        run.ended, run.reason = "pruned", f"clearly behind after {point.seconds:.1f} s"


def _mean_loss(task: Task, model: nn.Module, device: torch.device) -> float:
    batches = endless(task, EVALUATION_SEED)
    losses = []
    for _ in range(EVALUATION_BATCHES):
        inputs, targets = next(batches)
        losses.append(float(task.loss(model(moved(inputs, device)), moved(targets, device))))
    return sum(losses) / len(losses)


def _quietly(model: nn.Module, measure: Callable[[], float]) -> float:
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return float(measure())
    finally:
        model.train(was_training)


def moved(batch: Any, device: torch.device) -> Any:
    """A batch, or part of one, on `device`: tensors, and tuples, lists and dictionaries of them."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, (tuple, list)):
        return type(batch)(moved(part, device) for part in batch)
    if isinstance(batch, dict):
        return {name: moved(part, device) for name, part in batch.items()}
    return batch


def _close(optimizer: torch.optim.Optimizer) -> None:
    close = getattr(optimizer, "close", None)
    if close is not None:
        close()
