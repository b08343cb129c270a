"""What `kfac-tune` prints: tuned files, tile files and studies as tables."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

import optuna
from rich.console import Console
from rich.table import Table

from kfac_triton.tuned import Tiles
from kfac_triton.tuning.shapes import AXES
from kfac_triton.tuning.tiles import Row, Search
from kfac_triton.tuning.trials import Trials
from kfac_triton.tuning.view import listed, outcome


def console() -> Console:
    """As wide as the terminal; in a file or a pipe wide enough for every column."""
    width = None if sys.stdout.isatty() else 160
    return Console(width=width, markup=False, emoji=False, highlight=False)  # a task's name is no markup


def how(source: str) -> str:
    return "measured on it" if source == "measured" else "as the model has it; no GPU was measured"


def times(numbers: Sequence[object]) -> str:
    return "×".join(map(str, numbers))


def tile_text(tile: Sequence[int]) -> str:
    """Sides, terms, warps, stages, and "tma" where descriptors load."""
    block, block_k, warps, stages, descriptors = tile
    return f"{block}×{block}×{block_k} w{warps} s{stages}{' tma' if descriptors else ''}"


def print_ranking(search: Search, rows: list[Row], source: str, name: str) -> None:
    """The best tile of each shape of a search."""
    axes = "; ".join(f"{kernel} {times(names)}" for kernel, names in AXES.items())
    title = f"{name} ({search.gpu.target}): best tile of each shape, {how(source)}"
    table = Table(title=title, caption=f"shapes: {axes}")
    time = "µs" if source == "measured" else "model's µs"
    for column in ("kernel", "dtype", "shape", "tile", "parts", time, "next best", "bound by"):
        table.add_column(column, justify="right" if column in ("parts", time, "next best") else "left")
    for row in rows:
        cells = [row.problem.kernel, f"{row.problem.dtype} {row.problem.precision}", times(row.shape.size)]
        if row.ranking:
            (tile, parts), seconds = row.ranking[0]
            later = f"{row.ranking[1][1] / seconds:.2f}x" if len(row.ranking) > 1 else ""
            cells += [tile_text(tile), str(parts), f"{seconds * 1e6:.1f}", later]
        else:
            cells += ["", "", "", ""]
        table.add_row(*cells, row.bound)
    shown = console()
    shown.print(table)
    fallen = search.thrown_out()
    kept = sum(not faults for p in search.problems for faults in search.faults(p).values())
    reasons = ", ".join(f"{times} for {reason}" for reason, times in fallen.most_common())
    shown.print(f"{kept} candidates ranked; thrown out: {reasons or 'none'}")


def print_tiles(held: dict[str, Any], found: Tiles) -> None:
    table = Table(title=f"{held['gpu']} ({held['target']}), {how(held['source'])}")
    for column in ("kernel", "dtype", "precision", "log2 of the shape", "tile", "parts"):
        table.add_column(column)
    for key, entries in found.items():
        for shape, (tile, parts) in entries.items():
            table.add_row(*key, " ".join(map(str, shape)), tile_text(tile), str(parts))
    console().print(table)


def print_tuned(content: dict[str, Any]) -> None:
    objective, evidence = content["objective"], content["evidence"]
    shown = console()
    chosen = Table(title=f"{content['task']}: K-FAC's arguments on {content['device']}")
    chosen.add_column("argument")
    chosen.add_column("value")
    for name, value in content["arguments"].items():
        chosen.add_row(name, json.dumps(value) if isinstance(value, dict) else str(value))
    shown.print(chosen)
    goal = (
        f"seconds to {objective['target']:g}"
        if objective["target"] is not None
        else f"after {objective['seconds']:g} s"
    )
    table = Table(title=f"held-out seeds: {objective['metric']}, {goal}")
    for column in ("", "median", "range", "reached", "seeds"):
        table.add_column(column, justify="left" if not column else "right")
    for name, row in evidence["held_out"].items():
        span = "" if row["interval"] is None else f"{row['interval'][0]:.4g} to {row['interval'][1]:.4g}"
        middle = "missed" if row["median"] is None else f"{row['median']:.4g}"
        table.add_row(
            name, middle, span, "" if row["reached"] is None else str(row["reached"]), str(len(row["metric"]))
        )
    shown.print(table)
    for name, search in evidence["searches"].items():
        ended = ", ".join(f"{number} {kind}" for kind, number in search["ended"].items())
        shown.print(f"{name}: {search['trials']} trials ({ended}), {search['seconds']:.0f} s of training")
    listed = ", ".join(f"{value:.0f} {name}" for name, value in evidence["seconds"].items() if name != "command")
    shown.print(f"{evidence['seconds'].get('command', 0.0):.0f} s in all: {listed}")
    for line in (content["verdict"], *content["advice"]):
        shown.print(line, soft_wrap=True)


def print_studies(title: str, studies: Sequence[optuna.Study]) -> None:
    """A line for each."""
    table = Table(title=title)
    for column in ("study", "trials", "pruned", "running", "best"):
        table.add_column(column)
    for study in studies:
        trials = Trials(study, 0)
        counts, good = trials.counts(), [result.value for result in trials.results() if result.good]
        told, best = counts["done"] + counts["pruned"], f"{min(good):.4g}" if good else ""
        table.add_row(study.study_name, str(told), str(counts["pruned"]), str(counts["running"]), best)
    console().print(table)


def print_study(study: optuna.Study) -> None:
    """Its trials, the best first."""
    table = Table(title=f"{study.study_name}: trials by what they came to")
    for column in ("trial", "objective", "outcome", "seconds", "began from", "setting"):
        table.add_column(column)
    for result in sorted(Trials(study, 0).results(), key=lambda one: (not one.good, one.value)):
        table.add_row(
            str(result.number), f"{result.value:.4g}", outcome(result), f"{result.seconds:.1f}", result.start,
            listed(result.setting),
        )  # fmt: skip
    console().print(table)


def print_pairs(pairs: Sequence[tuple[str, str]]) -> None:
    """Names and what they are."""
    table = Table(box=None, show_header=False)
    for name, text in pairs:
        table.add_row(name, text)
    console().print(table)
