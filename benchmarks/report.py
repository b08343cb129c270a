"""The report: pictures and one self-contained page, both views of the results and nothing else.

The only file that imports matplotlib. Pictures are written as PNG and inlined into the page, which asks no network
for anything.
"""

from __future__ import annotations

import base64
import io
import math
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from kfac_triton.benchmarks import results as results_of
from kfac_triton.benchmarks.race import slug
from kfac_triton.benchmarks.suites import find_suite
from kfac_triton.tuning.baselines import BASELINES
from kfac_triton.tuning.store import write_text

# told apart by the colour-blind too
COLOURS = {
    "sgd": "#0072b2",
    "nesterov": "#0072b2",
    "adamw": "#d55e00",
    "soap": "#e69f00",
    "kfac": "#009e73",
    "kfac-paper": "#009e73",
}
OTHERS = ("#cc79a7", "#e69f00", "#56b4e9", "#999999")
GRID = 200  # places on the axis where a median over the seeds is drawn
AXES = (("seconds", "training seconds"), ("step", "steps"))


def make(folder: Path) -> dict[str, Any]:
    """Writes results.json, results.csv, pictures/*.png and index.html into `folder`; returns the results.

    Raises:
        Mistake: no run there, or a damaged file.
    """
    results = results_of.collect(folder)
    results_of.write(folder, results)
    suite = results["plan"]["suite"]
    groups = find_suite(suite).pictures if suite else {}
    pictures = {task["name"]: _pictures(folder, task, groups) for task in results["tasks"]}
    write_text(folder / "index.html", render(results, pictures))
    return results


def render(results: dict[str, Any], pictures: dict[str, list[str]]) -> str:
    """The page; `pictures` are data: addresses by task."""
    environment = Environment(
        loader=PackageLoader("kfac_triton.benchmarks", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    environment.filters |= {"number": number, "between": between}
    template = environment.get_template("report.html.j2")
    return template.render(results=results, pictures=pictures, baselines=BASELINES)


def number(value: float | None, digits: int = 4) -> str:
    """A number for reading; what never happened is a dash."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == int(value) and abs(value) < 1e6:
        return f"{int(value):,}"
    return f"{value:.{digits}g}"


def between(three: dict[str, float]) -> str:
    """median (low to high)"""
    middle, low, high = (number(three[name]) for name in ("median", "low", "high"))
    return middle if low == high else f"{middle} ({low} to {high})"


def _pictures(folder: Path, task: dict[str, Any], groups: dict[str, tuple[str, ...]]) -> list[str]:
    """One picture for each axis (and group of optimizers), as data: addresses; none before the first run."""
    everybody = {"": tuple(one["name"] for one in task["optimizers"])}
    inlined = []
    for group, names in (groups or everybody).items():
        shown = {**task, "optimizers": [one for one in task["optimizers"] if one["name"] in names and one["runs"]]}
        for axis, label in AXES if shown["optimizers"] else ():
            png = _draw(shown, axis, label, group)
            name = "-".join(part for part in (slug(task["name"]), slug(group), axis) if part)
            path = folder / "pictures" / f"{name}.png"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(png)
            inlined.append("data:image/png;base64," + base64.b64encode(png).decode("ascii"))
    return inlined


def _draw(task: dict[str, Any], axis: str, label: str, group: str) -> bytes:
    """Training and held-out metric of every optimizer: the median over the seeds, smallest to largest as a band."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    held_out = any(
        point["test"] is not None for one in task["optimizers"] for run in one["runs"] for point in run["points"]
    )
    figure = Figure(figsize=(11 if held_out else 6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    sides = (("train", task["metric"]), ("test", "the same, held out"))[: 1 + held_out]
    for i, (side, title) in enumerate(sides):
        plot = figure.add_subplot(1, len(sides), i + 1)
        for k, one in enumerate(task["optimizers"]):
            _draw_optimizer(plot, one, axis, side, COLOURS.get(one["name"], OTHERS[k % len(OTHERS)]))
        names = {one["name"] for one in task["optimizers"]}
        for target, value in task["targets"].items() if side == "train" else ():
            if target in names or target == "task":
                plot.axhline(value, color=COLOURS.get(target, "black"), linestyle=":", linewidth=1)
        plot.set(xlabel=label, yscale="log")
        plot.set_title(title, fontsize=9)
        plot.grid(alpha=0.3, which="both")
    figure.axes[0].legend(fontsize=9)
    if group:
        figure.suptitle(f"{task['name']}: {group}", fontsize=10)
    written = io.BytesIO()
    figure.savefig(written, format="png", dpi=110)
    return written.getvalue()


def _draw_optimizer(plot: Any, optimizer: dict[str, Any], axis: str, side: str, colour: str) -> None:
    import numpy as np

    curves, ends = [], []
    for run in optimizer["runs"]:
        kept = [(p[axis], p[side]) for p in run["points"] if p[side] is not None and p[side] > 0]
        if kept:
            curves.append(np.array(kept, dtype=float).T)
            if run["ended"] == "done":
                ends.append(kept[-1][0])
    if not curves:
        return
    # runs end a step apart: the median stops with the shortest, lest it jump; a diverged one counts as far as it went
    grid = np.linspace(0, min(ends) if ends else max(curve[0][-1] for curve in curves), GRID)
    values = np.array([np.interp(grid, curve[0], curve[1], right=np.nan) for curve in curves])
    plot.plot(grid, np.nanmedian(values, axis=0), color=colour, label=optimizer["name"])
    plot.fill_between(grid, np.nanmin(values, axis=0), np.nanmax(values, axis=0), color=colour, alpha=0.2, linewidth=0)


def summary_lines(results: dict[str, Any]) -> list[str]:
    """The verdicts and warnings of all tasks, for a terminal."""
    lines = []
    for task in results["tasks"]:
        lines += [f"{task['name']}: {line}" for line in task["verdicts"] + task["findings"]]
        lines += [f"{task['name']}: note: {line}" for line in task["warnings"]]
    return lines
