"""The counts of an optimizer's steps over one interval, by kind of step: what is due in it."""

from __future__ import annotations

import inspect
import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from typing import Any

import torch

from kfac_triton.benchmarks.counts import COLUMNS, OUTSIDE, Stages, Tally, added, count_calls, count_operators, still
from kfac_triton.benchmarks.step import StepOptions, hyper_of
from kfac_triton.tuning.baselines import find_entrant
from kfac_triton.tuning.task import Task
from kfac_triton.tuning.trainer import moved, step_on

WARM_STEPS = 20  # at least: K-FAC refreshes inverses, and uses more of the batch, in its first ones
MOST_STEPS = 1_000  # of an interval
EVERY = "every step"
KINDS = (EVERY, "factors and inverses due", "factors due", "inverses due", "neither due")


@dataclass(frozen=True)
class StepCount:
    """What the `steps` of a kind cost together, by stage; `lowest` and `highest` of them, count by count."""

    optimizer: str
    kind: str
    steps: int
    stages: Stages
    lowest: Tally
    highest: Tally

    @property
    def whole(self) -> Tally:
        """zero_grad, forward, backward and step()."""
        return sum(self.stages.values(), Tally())

    @property
    def alone(self) -> Tally:
        """What runs inside step(), a closure included."""
        return sum((tally for name, tally in self.stages.items() if name != OUTSIDE), Tally())

    def as_dict(self) -> dict[str, Any]:
        """Sums over the steps, but for `lowest` and `highest`."""
        own = {"optimizer": self.optimizer, "kind": self.kind, "steps": self.steps}
        totals = {"whole": self.whole, "step": self.alone, "lowest": self.lowest, "highest": self.highest}
        stages = {name: vars(tally) for name, tally in self.stages.items()}
        return {**own, **{name: vars(tally) for name, tally in totals.items()}, "stages": stages}


def count_steps(
    task: Task, name: str, options: StepOptions, batches: list[Any], device: torch.device
) -> list[StepCount]:
    """The counts of the eager optimizer `name`: every step of an interval, after those that a fresh optimizer needs."""
    torch.manual_seed(0)
    model = task.model().to(device)
    optimizer = find_entrant(name).build(model, task, hyper_of(name, options), False)
    step = inspect.unwrap(type(optimizer).step).__code__
    on_device: Iterator[Any] = (moved(batch, device) for batch in cycle(batches))
    interval = interval_of(optimizer)
    for batch in islice(on_device, math.ceil(WARM_STEPS / interval) * interval):
        step_on(task, model, optimizer, *batch)
    seen: defaultdict[str, list[list[Stages]]] = defaultdict(lambda: [[], []])
    with still():
        for i, count in enumerate((count_operators, count_calls)):
            for inputs, targets in islice(on_device, interval):
                kind = kind_of(optimizer)
                seen[kind][i].append(count(partial(step_on, task, model, optimizer, inputs, targets), step, device))
    return [_merged(name, kind, *seen[kind]) for kind in sorted(seen, key=KINDS.index)]


def _merged(name: str, kind: str, operators: list[Stages], calls: list[Stages]) -> StepCount:
    steps = [added(one, other) for one, other in zip(operators, calls, strict=True)]
    stages: Stages = {}
    for step in steps:
        stages = added(stages, step)
    totals = [sum(step.values(), Tally()) for step in steps]
    low, high = (Tally(*(pick(getattr(t, c) for t in totals) for c in COLUMNS)) for pick in (min, max))
    return StepCount(name, kind, len(steps), stages, low, high)


def interval_of(optimizer: torch.optim.Optimizer) -> int:
    """Steps after which the kinds of step repeat."""
    group = optimizer.param_groups[0]
    intervals = [
        int(group.get(name) or 1) for name in ("factor_interval", "inverse_interval", "precondition_frequency")
    ]
    return min(math.lcm(*intervals), MOST_STEPS)


def kind_of(optimizer: torch.optim.Optimizer) -> str:
    """What is due in the next step."""
    group = optimizer.param_groups[0]
    if "factor_interval" not in group:
        return EVERY
    due = [f"{what}s" for what in ("factor", "inverse") if group["step"] % group[f"{what}_interval"] == 0]
    return f"{' and '.join(due) or 'neither'} due"
