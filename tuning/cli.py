"""The command `kfac-tune`.

torch and Triton are imported by the commands that need them, so that help comes at once.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kfac_triton.tuning.commands import INTERRUPTED, status_of

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from kfac_triton.tuned import Tiles
    from kfac_triton.tuning.gpus import GPU
    from kfac_triton.tuning.tiles import Row, Search

STARTED = time.monotonic() - time.process_time()  # a timeout counts from here: imports are part of the command

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

    width = None if sys.stdout.isatty() else 160
    return Console(width=width, markup=False, emoji=False, highlight=False)  # a task's name is no markup


def _how(source: str) -> str:
    return "measured on it" if source == "measured" else "as the model has it; no GPU was measured"


def _times(numbers: Sequence[object]) -> str:
    return "×".join(map(str, numbers))


def _tile(tile: Sequence[int]) -> str:
    """Sides, terms, warps, stages, and "tma" where descriptors load."""
    block, block_k, warps, stages, descriptors = tile
    return f"{block}×{block}×{block_k} w{warps} s{stages}{' tma' if descriptors else ''}"


@app.command()
def run(
    task: Annotated[str, typer.Argument(help="A built-in name (kfac-tune tasks) or path/to/file.py:factory.")],
    trials: Annotated[int, typer.Option(help="Settings tried, for K-FAC and for each baseline.")] = 30,
    seconds: Annotated[
        float | None, typer.Option(help="Training seconds of a trial; default 60, or from --timeout.")
    ] = None,
    timeout: Annotated[
        float | None, typer.Option(help="Seconds for the whole command, baselines and re-measurement included.")
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(help="The metric's value to reach, for the task's; 'defaults' is what K-FAC's defaults end with."),
    ] = None,
    storage: Annotated[
        str | None,
        typer.Option(help="Journal file, or sqlite://, postgresql://, mysql://, grpc://; default: beside --out."),
    ] = None,
    study: Annotated[str | None, typer.Option(help="Its name in the storage; default: the task's.")] = None,
    jobs: Annotated[int, typer.Option(help="Processes on this machine; they share its cores.")] = 1,
    join: Annotated[bool, typer.Option("--join", help="Only help with the search of a study that there is.")] = False,
    seed: Annotated[int, typer.Option(help="Of the search.")] = 0,
    seeds: Annotated[int, typer.Option(help="Held-out seeds that decide.")] = 5,
    space: Annotated[Path | None, typer.Option(help="YAML or JSON that narrows or widens the space.")] = None,
    fix: Annotated[list[str] | None, typer.Option(help="name=value pins a parameter; may be repeated.")] = None,
    baselines: Annotated[str, typer.Option(help="Comma-separated: sgd, nesterov, adamw; or none.")] = "sgd,adamw",
    pruner: Annotated[str, typer.Option(help="auto, halving, hyperband, median or none.")] = "auto",
    out: Annotated[Path, typer.Option(help="The tuned file.")] = Path("tuned.json"),
    html: Annotated[Path | None, typer.Option(help="The report; default: beside --out.")] = None,
    tiles: Annotated[bool, typer.Option("--tiles/--no-tiles", help="On a GPU, measure kernel tiles too.")] = True,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    data: Annotated[Path | None, typer.Option(help="Folder with the data files of built-in tasks.")] = None,
    compile: Annotated[
        bool | None, typer.Option("--compile/--no-compile", help="Compile K-FAC's step; default: from 30 s a trial.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only the file's name.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The tuned file's content on standard output.")] = False,
) -> None:
    """Find K-FAC's settings for a task, compare them on held-out seeds, write them down."""
    from kfac_triton.tuning import report
    from kfac_triton.tuning.errors import Mistake
    from kfac_triton.tuning.tuner import Tuning
    from kfac_triton.tuning.tuner import write as write_tuned
    from kfac_triton.tuning.view import View

    if quiet and as_json:
        raise Mistake("--quiet with --json: one of them")
    if join and (storage is None or jobs > 1):
        raise Mistake("--join: needs the study's --storage, and is one process itself")
    if not join:
        _check_out(out)
        html = html or out.with_suffix(".html")
    asked: dict[str, Any] = {
        "trials": trials, "seconds": seconds, "timeout": timeout, "target": _number_or_word(target),
        "storage": storage or str(out.with_suffix(".journal")), "study": study, "jobs": jobs, "seed": seed,
        "seeds": seeds, "space": space, "fix": tuple(fix or ()), "baselines": _names(baselines), "prune": pruner,
        "device": device, "data": data, "compile": compile,
    }  # fmt: skip
    view = View(timeout, quiet or as_json)
    work = Tuning(task, joined=join, note=view.note, watch=view.watch, begun=STARTED, **asked)
    view.trials = work.plan.trials
    try:
        with view:
            if join:
                return work.join()
            result = work.go(tiles)
    except KeyboardInterrupt:
        typer.echo(f"kfac-tune: {work.standing()}; the same command goes on: {' '.join(sys.argv)}", err=True)
        raise typer.Exit(INTERRUPTED) from None
    write_tuned(out, result.content)
    assert html is not None
    if work.searched:
        report.write(html, work.studies["kfac"], result.content)
    if as_json:
        typer.echo(json.dumps(result.content, indent=1))
        return
    if not quiet:
        _print_tuned(result.content)
        if not result.finished:
            typer.echo("The time ended before everything was tried; the same command goes on.", err=True)
    typer.echo(f"{out}")


def _names(text: str) -> tuple[str, ...]:
    return () if text == "none" else tuple(name.strip() for name in text.split(",") if name.strip())


def _number_or_word(text: str | None) -> float | str | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return text


def _check_out(out: Path) -> None:
    """Raises: Mistake: nothing can be written there, or it is something else's."""
    import os

    from kfac_triton.tuning.errors import Mistake

    folder = out.parent
    if (
        out.is_dir()
        or not folder.is_dir()
        or not os.access(folder, os.W_OK)
        or (out.exists() and not os.access(out, os.W_OK))
    ):
        raise Mistake(f"--out {out} cannot be written; name a file in a folder that is there")
    if out.exists():
        from kfac_triton import tuned

        try:
            tuned.read_tuned(out)
        except ValueError as error:
            raise Mistake(f"--out {out} is there and is no tuned file ({error}); name another file") from None


@app.command()
def tasks() -> None:
    """List the built-in tasks."""
    from rich.table import Table

    from kfac_triton.tuning.problems import BUILT_IN, about

    table = Table(box=None, show_header=False)
    for name in BUILT_IN:
        table.add_row(name, about(name))
    _console().print(table)


@app.command()
def show(
    what: Annotated[str, typer.Argument(metavar="FILE|STORAGE", help="A tuned file, a tile file, or a storage.")],
    study: Annotated[
        str | None, typer.Option(help="Which of the storage's studies; default: all, in a line each.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write the study's report there.")] = None,
) -> None:
    """Print a tuned file, a tile file or a study as a table."""
    from kfac_triton import tuned
    from kfac_triton.tuning.errors import Mistake
    from kfac_triton.tuning.storage import names_storage

    if names_storage(what):
        return _show_storage(what, study, html)
    if study is not None or html is not None:
        raise Mistake(f"{what} is a file of settings; --study and --html go with a storage")
    path = Path(what)
    try:
        held = tuned.read(path)
        if held["format"] == tuned.TUNED_FORMAT:
            return _print_tuned(tuned.read_tuned(path))
        return _print_tiles(held, tuned.read_tiles(path))
    except ValueError as error:
        raise Mistake(str(error)) from None


def _print_tiles(held: dict[str, Any], found: Tiles) -> None:
    from rich.table import Table

    table = Table(title=f"{held['gpu']} ({held['target']}), {_how(held['source'])}")
    for column in ("kernel", "dtype", "precision", "log2 of the shape", "tile", "parts"):
        table.add_column(column)
    for key, entries in found.items():
        for shape, (tile, parts) in entries.items():
            table.add_row(*key, " ".join(map(str, shape)), _tile(tile), str(parts))
    _console().print(table)


def _print_tuned(content: dict[str, Any]) -> None:
    from rich.table import Table

    objective, evidence = content["objective"], content["evidence"]
    console = _console()
    chosen = Table(title=f"{content['task']}: K-FAC's arguments on {content['device']}")
    chosen.add_column("argument")
    chosen.add_column("value")
    for name, value in content["arguments"].items():
        chosen.add_row(name, json.dumps(value) if isinstance(value, dict) else str(value))
    console.print(chosen)
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
    console.print(table)
    for name, search in evidence["searches"].items():
        ended = ", ".join(f"{number} {kind}" for kind, number in search["ended"].items())
        console.print(f"{name}: {search['trials']} trials ({ended}), {search['seconds']:.0f} s of training")
    listed = ", ".join(f"{value:.0f} {name}" for name, value in evidence["seconds"].items() if name != "command")
    console.print(f"{evidence['seconds'].get('command', 0.0):.0f} s in all: {listed}")
    for line in (content["verdict"], *content["advice"]):
        console.print(line, soft_wrap=True)


def _show_storage(url: str, name: str | None, html: Path | None) -> None:
    import optuna
    from rich.table import Table

    from kfac_triton.tuning import report
    from kfac_triton.tuning.errors import Mistake
    from kfac_triton.tuning.storage import open_storage
    from kfac_triton.tuning.trials import Trials
    from kfac_triton.tuning.view import listed, outcome

    if "://" not in url and not Path(url).is_file():
        raise Mistake(f"{url}: there is no such file")
    storage = open_storage(url)
    names = [study.study_name for study in storage.get_all_studies()]
    if not names:
        raise Mistake(f"{url} holds no study")
    if name is None and len(names) > 1 and html is None:
        table = Table(title=url)
        for column in ("study", "trials", "pruned", "running", "best"):
            table.add_column(column)
        for each in names:
            trials = Trials(optuna.load_study(study_name=each, storage=storage), 0)
            counts, good = trials.counts(), [result.value for result in trials.results() if result.good]
            best = f"{min(good):.4g}" if good else ""
            told = counts["done"] + counts["pruned"]
            table.add_row(each, str(told), str(counts["pruned"]), str(counts["running"]), best)
        return _console().print(table)
    name = name or names[0]
    if name not in names:
        raise Mistake(f"--study {name}: there are {', '.join(names)}")
    study = optuna.load_study(study_name=name, storage=storage)
    results = Trials(study, 0).results()
    table = Table(title=f"{name}: trials by what they came to")
    for column in ("trial", "objective", "outcome", "seconds", "began from", "setting"):
        table.add_column(column)
    for result in sorted(results, key=lambda one: (not one.good, one.value)):
        table.add_row(
            str(result.number), f"{result.value:.4g}", outcome(result), f"{result.seconds:.1f}", result.start,
            listed(result.setting),
        )  # fmt: skip
    _console().print(table)
    if html is not None:
        report.write(html, study)
        typer.echo(f"{html}")


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    return status_of(app, "kfac-tune", arguments)
