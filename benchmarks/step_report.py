"""What `kfac-bench step` measures, as tables on the terminal and as a file."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from kfac_triton.benchmarks.counts import COLUMNS, OTHER, OUTSIDE, Tally
from kfac_triton.benchmarks.step import StepCost, StepOptions, interleave, kept_batches, lane
from kfac_triton.benchmarks.step_counts import StepCount, count_steps
from kfac_triton.benchmarks.step_rivals import rival_lanes
from kfac_triton.tuning import environment
from kfac_triton.tuning.store import write_json
from kfac_triton.tuning.task import Task

FILE_WIDTH = 120  # columns where no terminal sets them
BEGINS = '{\n "command": "kfac-bench step"'


@dataclass(frozen=True)
class Measured:
    """Times of everything that was asked for, counts of our own list of optimizers, and lines on absent rivals."""

    costs: list[StepCost]
    counts: list[StepCount]
    notes: list[str]


def measure(task: Task, options: StepOptions, device: torch.device, rivals: bool) -> Measured:
    """Counts first, then times, the rivals' in turn with the others'."""
    batches = kept_batches(task, options)
    counts = [one for name in options.optimizers for one in count_steps(task, name, options, batches, device)]
    more, notes = rival_lanes(task, options, batches, device) if rivals else ([], [])
    if not options.chunks:
        return Measured([], counts, notes)
    lanes = [lane(task, name, options, batches, device) for name in options.optimizers]
    return Measured(interleave([*lanes, *more], options), counts, notes)


def write(path: Path, task: str, options: StepOptions, measured: Measured, device: torch.device) -> None:
    """All of it as JSON. Counts are sums over the steps of a kind."""
    found = {
        "command": "kfac-bench step",
        "task": task,
        "options": asdict(options),
        "environment": environment.describe(device),
        "times": [asdict(cost) for cost in measured.costs],
        "counts": [count.as_dict() for count in measured.counts],
        "notes": measured.notes,
    }
    write_json(path, found, f"--json {path}")


def print_measured(task: str, options: StepOptions, measured: Measured, stages: bool) -> None:
    """The times, the counts (by stage where `stages`), and what there is to say of rivals."""
    console = Console(markup=False, emoji=False, highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, FILE_WIDTH)
    if measured.costs:
        console.print(times_table(task, options, measured.costs))
    console.print(counts_table(task, measured.counts, stages))
    for note in measured.notes:
        print(note)


def times_table(task: str, options: StepOptions, costs: list[StepCost]) -> Table:
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
    return table


def counts_table(task: str, counts: list[StepCount], stages: bool) -> Table:
    """Means over the steps of a kind; where those differ, the lowest and the highest of the whole step."""
    table = Table(title=f"{task}: counts of an eager step, the mean of its kind")
    for column in ("optimizer", "part", "operators", "Python calls", "launches", "waits"):
        table.add_column(column, justify="left" if column in ("optimizer", "part") else "right")
    for count in counts:
        kind = f"{count.kind}, {count.steps} steps" if count.steps > 1 else f"{count.kind}, 1 step"
        table.add_section()
        table.add_row(count.optimizer, "whole step", *_means(count.whole, count.steps))
        table.add_row(kind, "step() alone", *_means(count.alone, count.steps))
        for name, tally in count.stages.items() if stages and not count.stages.keys() <= {OUTSIDE, OTHER} else ():
            table.add_row("", f"  {name}", *_means(tally, count.steps))
        if count.lowest != count.highest:
            table.add_row("", "whole, range", *(_range(count, column) for column in COLUMNS))
    return table


def _means(tally: Tally, steps: int) -> list[str]:
    return [f"{getattr(tally, column) / steps:,.1f}".removesuffix(".0") for column in COLUMNS]


def _range(count: StepCount, column: str) -> str:
    low, high = getattr(count.lowest, column), getattr(count.highest, column)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"
