"""The command `kfac-tune`.

torch and Triton are imported by the commands that need them, so that help comes at once.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kfac_triton.tuning.commands import status_of

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from kfac_triton.tuning.gpus import GPU
    from kfac_triton.tuning.tiles import Row, Search


app = typer.Typer(
    help="Finds what suits your model and your GPU, in files that the optimizer loads.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def commands() -> None:
    """Finds what suits your model and your GPU, in files that the optimizer loads."""


@app.command()
def kernels(
    target: Annotated[
        str, typer.Option(help="auto, the GPU here; or a generation, as sm_90 or gfx942, that need not be here.")
    ] = "auto",
    gpu: Annotated[str | None, typer.Option(help="Which GPU of that generation, as H200; default: its first.")] = None,
    shapes: Annotated[
        str, typer.Option(help="standard; a JSON file of shapes; a task, or path/to/file.py:factory of one.")
    ] = "standard",
    out: Annotated[
        Path | None, typer.Option(help="The tile file; default: in the cache folder, where the optimizer finds it.")
    ] = None,
    jobs: Annotated[int | None, typer.Option(help="Processes that compile; default: one a core.")] = None,
    top: Annotated[int, typer.Option(help="Candidates that a GPU here times, of each shape.")] = 6,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only the file's name.")] = False,
) -> None:
    """Rank tiles for a GPU, here or not: compile, throw out, model; with the GPU here, measure the best."""
    from kfac_triton import tuned
    from kfac_triton.kernels._launch import triton
    from kfac_triton.tuning import shapes as shapes_of
    from kfac_triton.tuning import tiles
    from kfac_triton.tuning.errors import Mistake

    if triton is None:
        raise Mistake("triton is not installed; it comes with the CUDA and ROCm builds of torch for Linux")
    if top < 1 or (jobs is not None and jobs < 1):
        raise Mistake(f"--top {top} and --jobs {jobs}: numbers above 0")
    described, device, name = find_gpu(target, gpu)
    facts = tiles.KnownFacts(tuned.cache_folder() / f"facts-{described.target}.json")
    search = tiles.Search(described, shapes_of.of(shapes), facts)
    _compile(search, jobs, quiet)
    rows = search.rows(top)
    if device is not None:
        rows = _measure(rows, device, quiet)
    source = "model" if device is None else "measured"
    path = out or tuned.cache_folder() / tuned.file_name(name)
    tiles.write(path, tiles.contents(name, described.target, rows, source))
    if not quiet:
        _print(search, rows, source, name)
    print(path)


def find_gpu(target: str, name: str | None) -> tuple[GPU, torch.device | None, str]:
    """(its description, the device where it is here, its name).

    Raises:
        Mistake: there is no such GPU.
    """
    import torch

    from kfac_triton import tuned
    from kfac_triton.tuning import gpus
    from kfac_triton.tuning.errors import Mistake

    device = torch.device("cuda") if torch.cuda.is_available() else None
    if target == "auto" and name is None:
        if device is None:
            raise Mistake("no GPU here to find by itself; name a generation with --target, as sm_90")
        own = torch.cuda.get_device_name(device)
        described = gpus.find(own) or gpus.for_target(tuned.target_of(device))
        return described, device, own
    if name is not None:
        found = gpus.find(name)
        if found is None or target not in ("auto", found.target):
            allowed = ", ".join(g.name for g in gpus.GPUS if target in ("auto", g.target))
            raise Mistake(f"--gpu {name}: no GPU of target {target} is described under it; allowed: {allowed}")
        return found, None, found.name
    try:
        found = gpus.for_target(target)
    except ValueError as error:
        raise Mistake(f"--target {target}: {error}") from None
    return found, None, found.name


def _compile(search: Search, jobs: int | None, quiet: bool) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True, quiet=quiet)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=quiet or not console.is_terminal, transient=True) as bars:
        bar = bars.add_task(f"compiling for {search.gpu.target}")
        search.compile(jobs, lambda done, total: bars.update(bar, completed=done, total=total))


def _measure(rows: list[Row], device: torch.device, quiet: bool) -> list[Row]:
    from rich.console import Console
    from rich.progress import track

    from kfac_triton.tuning.tiles import measured

    console = Console(stderr=True, quiet=quiet)
    return [measured(row, device) for row in track(rows, "measuring", console=console, transient=True)]


def _print(search: Search, rows: list[Row], source: str, name: str) -> None:
    from rich.table import Table

    from kfac_triton.tuning.shapes import AXES

    axes = "; ".join(f"{kernel} {_times(names)}" for kernel, names in AXES.items())
    title = f"{name} ({search.gpu.target}): best tile of each shape, {_how(source)}"
    table = Table(title=title, caption=f"shapes: {axes}")
    time = "µs" if source == "measured" else "model's µs"
    for column in ("kernel", "dtype", "shape", "tile", "parts", time, "next best", "bound by"):
        table.add_column(column, justify="right" if column in ("parts", time, "next best") else "left")
    for row in rows:
        cells = [row.problem.kernel, f"{row.problem.dtype} {row.problem.precision}", _times(row.shape.size)]
        if row.ranking:
            (tile, parts), seconds = row.ranking[0]
            later = f"{row.ranking[1][1] / seconds:.2f}x" if len(row.ranking) > 1 else ""
            cells += [_tile(tile), str(parts), f"{seconds * 1e6:.1f}", later]
        else:
            cells += ["", "", "", ""]
        table.add_row(*cells, row.bound)
    console = _console()
    console.print(table)
    fallen = search.thrown_out()
    kept = sum(not faults for p in search.problems for faults in search.faults(p).values())
    reasons = ", ".join(f"{times} for {reason}" for reason, times in fallen.most_common())
    console.print(f"{kept} candidates ranked; thrown out: {reasons or 'none'}")


def _console() -> Console:
    """As wide as the terminal; in a file or a pipe wide enough for every column."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=160)


def _how(source: str) -> str:
    return "measured on it" if source == "measured" else "as the model has it; no GPU was measured"


def _times(numbers: Sequence[object]) -> str:
    return "×".join(map(str, numbers))


def _tile(tile: Sequence[int]) -> str:
    """Sides, terms, warps, stages, and "tma" where descriptors load."""
    block, block_k, warps, stages, descriptors = tile
    return f"{block}×{block}×{block_k} w{warps} s{stages}{' tma' if descriptors else ''}"


@app.command()
def show(path: Annotated[Path, typer.Argument(help="A tile file.")]) -> None:
    """Print a tile file as a table."""
    from rich.table import Table

    from kfac_triton import tuned
    from kfac_triton.tuning.errors import Mistake

    try:
        found = tuned.read_tiles(path)
    except ValueError as error:
        raise Mistake(str(error)) from None
    held = json.loads(path.read_text())
    table = Table(title=f"{held['gpu']} ({held['target']}), {_how(held['source'])}")
    for column in ("kernel", "dtype", "precision", "log2 of the shape", "tile", "parts"):
        table.add_column(column)
    for key, entries in found.items():
        for shape, (tile, parts) in entries.items():
            table.add_row(*key, " ".join(map(str, shape)), _tile(tile), str(parts))
    _console().print(table)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    return status_of(app, "kfac-tune", arguments)
