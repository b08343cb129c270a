"""kfac-jax beside `KFAC.paper`: the same autoencoder, initial weights, batches and judged images, run in turn.

kfac-jax runs in a Python of its own (`rival_kfac_jax.py`), with the initial damping that is best on a seed that is not
reported. `KFAC.paper` has nothing set. Compilation and first touches are off both clocks.
"""

from __future__ import annotations

import math
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from kfac_triton.tuning import environment
from kfac_triton.tuning.baselines import find_entrant
from kfac_triton.tuning.errors import Mistake
from kfac_triton.tuning.problems import AUTOENCODERS, autoencoder
from kfac_triton.tuning.sets import JUDGED, shuffled
from kfac_triton.tuning.store import read_json, write_json
from kfac_triton.tuning.trainer import Budget, train

SCRIPT = Path(__file__).with_name("rival_kfac_jax.py")
# Neither side takes more steps in a second than these allow, so no run ends for want of batches.
FLOPS_A_SECOND, STEPS_A_SECOND = 2e12, 2000
POINTS = 12  # evaluations of a run
GRID_SEED = 0


@dataclass(frozen=True)
class Options:
    """`grid`: initial dampings of kfac-jax, each tried for `grid_seconds`."""

    task: str
    python: str
    seconds: float = 120.0
    seeds: tuple[int, ...] = (1,)
    grid: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0, 150.0)
    grid_seconds: float = 20.0


@dataclass(frozen=True)
class Curve:
    """(seconds, steps, error) at each evaluation of a run."""

    optimizer: str
    seed: int
    points: list[list[float]]
    ms_per_step: float

    def at(self, seconds: float) -> float:
        """The error at the evaluation nearest to `seconds`."""
        return min(self.points, key=lambda point: abs(point[0] - seconds))[2]


def compare(options: Options, data: Path | None, out: Path, console: Console) -> dict[str, Any]:
    """Runs the grid and both optimizers on every seed; writes rival.json into `out` and returns it.

    Raises:
        Mistake: the task is no autoencoder, or kfac-jax does not run in that Python.
    """
    if options.task not in AUTOENCODERS:
        raise Mistake(f"task {options.task!r}: kfac-jax is compared on {', '.join(AUTOENCODERS)}")
    with tempfile.TemporaryDirectory(prefix="kfac-bench-") as folder:
        grid: dict[float, float] = {}
        for damping in options.grid:
            run = _rival(options, data, Path(folder), GRID_SEED, damping, options.grid_seconds)
            error = run["points"][-1][2]
            grid[damping] = error if math.isfinite(error) else math.inf
            console.print(f"kfac-jax, initial damping {damping:g}: {error:.4g} after {options.grid_seconds:g} s")
        best = min(grid, key=lambda damping: grid[damping])
        curves = []
        for seed in options.seeds:
            curves.append(_ours(options, data, seed))
            run = _rival(options, data, Path(folder), seed, best, options.seconds)
            curves.append(Curve("kfac-jax", seed, run["points"], 1e3 * run["seconds"] / run["steps"]))
            for curve in curves[-2:]:
                end = curve.points[-1]
                console.print(f"{curve.optimizer}, seed {seed}: {end[2]:.4g} after {end[1]:.0f} steps")
    found = {
        "options": asdict(options),
        "grid": {str(damping): error for damping, error in grid.items()},
        "initial_damping": best,
        "versions": {"jax": run["jax"], "kfac-jax": run["kfac_jax"]},
        "environment": environment.describe(torch.device("cpu")),
        "curves": [asdict(curve) for curve in curves],
        "marks": _marks(curves, options.seconds),
        "ms_per_step": {name: median(c.ms_per_step for c in curves if c.optimizer == name) for name in _names(curves)},
    }
    write_json(out / "rival.json", found)
    return found


def print_comparison(found: dict[str, Any], best_known: float | None, console: Console) -> None:
    """The errors at the marks, and the share of kfac-jax's distance to the best known error that is left."""
    best = min(point[2] for curve in found["curves"] for point in curve["points"])
    known = best if best_known is None else best_known
    table = Table(title=f"{found['options']['task']}: squared error, medians of the seeds; best known {known:.4g}")
    for column in ("seconds", "kfac-paper", "kfac-jax", "share of its distance"):
        table.add_column(column, justify="right")
    for mark in found["marks"]:
        ours, theirs = mark["kfac-paper"], mark["kfac-jax"]
        share = f"{(ours - known) / (theirs - known):.2f}" if theirs > known else "none left"
        table.add_row(f"{mark['seconds']:g}", f"{ours:.4g}", f"{theirs:.4g}", share)
    console.print(table)
    cost = found["ms_per_step"]
    console.print(
        f"a step: kfac-paper {cost['kfac-paper']:.1f} ms, kfac-jax {cost['kfac-jax']:.1f} ms "
        f"({cost['kfac-paper'] / cost['kfac-jax']:.2f} of it); its initial damping, the best of "
        f"{', '.join(found['grid'])}: {found['initial_damping']:g}"
    )


def _ours(options: Options, data: Path | None, seed: int) -> Curve:
    task = AUTOENCODERS[options.task].task(data, torch.device("cpu"))
    run = train(task, find_entrant("kfac-paper"), {}, seed, Budget(options.seconds, POINTS, held_out=False))
    points = [[point.seconds, point.step, point.train] for point in run.points]
    return Curve("kfac-paper", seed, points, run.ms_per_step)


def _rival(
    options: Options, data: Path | None, folder: Path, seed: int, damping: float, seconds: float
) -> dict[str, Any]:
    problem = _laid_out(options, data, folder, seed)
    asked, answered = folder / "setting.json", folder / "result.json"
    gaussian = AUTOENCODERS[options.task].gaussian
    write_json(asked, {"seconds": seconds, "points": POINTS, "initial_damping": damping, "gaussian": gaussian})
    command = [options.python, str(SCRIPT), str(problem), str(asked), str(answered)]
    try:
        child = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise Mistake(f"--python {options.python} does not run: {error.strerror}") from error
    if child.returncode != 0:
        lines = child.stderr.strip().splitlines() or ["no word"]
        raise Mistake(
            f"--python {options.python}: kfac-jax does not run there ({lines[-1]}); "
            "make an environment with pip install jax==0.8.3 jaxlib==0.8.3 kfac-jax==0.0.8"
        )
    return read_json(answered)


def _laid_out(options: Options, data: Path | None, folder: Path, seed: int) -> Path:
    """The problem of a seed as a file: images, the order of the batches, the initial weights."""
    path = folder / f"problem-{seed}.npz"
    if not path.is_file():
        recipe = AUTOENCODERS[options.task]
        images = recipe.load(data).train
        torch.manual_seed(seed)
        model = autoencoder(recipe.widths)
        rows = torch.arange(len(images), dtype=torch.int32)
        stream = shuffled(rows, rows, recipe.batch)(seed)
        cost = 6 * recipe.batch * sum(p.numel() for p in model.parameters())
        steps = math.ceil(options.seconds * min(STEPS_A_SECOND, FLOPS_A_SECOND / cost))
        order = np.stack([next(stream)[0].numpy() for _ in range(steps)])
        layers = [layer for layer in model if isinstance(layer, torch.nn.Linear)]
        weights: dict[str, Any] = {f"weight_{i}": layer.weight.detach().numpy() for i, layer in enumerate(layers)}
        biases: dict[str, Any] = {f"bias_{i}": layer.bias.detach().numpy() for i, layer in enumerate(layers)}
        arrays: dict[str, Any] = {"images": images.numpy(), "judged": images[:JUDGED].numpy(), "order": order}
        np.savez(path, **arrays, **weights, **biases)
    return path


def _marks(curves: Sequence[Curve], seconds: float) -> list[dict[str, float]]:
    """Median errors of both after a twelfth, a sixth, a third and all of the seconds."""
    marks = []
    for share in (1 / 12, 1 / 6, 1 / 3, 1.0):
        errors = {name: median(c.at(share * seconds) for c in curves if c.optimizer == name) for name in _names(curves)}
        marks.append({"seconds": share * seconds, **errors})
    return marks


def _names(curves: Sequence[Curve]) -> list[str]:
    return list(dict.fromkeys(curve.optimizer for curve in curves))
