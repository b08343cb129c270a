"""The command `kfac-tune`.

torch and Triton are imported by the commands that need them, so that help comes at once.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kfac_triton.tuning.commands import INTERRUPTED, status_of

if TYPE_CHECKING:
    import torch

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
    from kfac_triton.tuning import limits, tables, tiles
    from kfac_triton.tuning import shapes as shapes_of
    from kfac_triton.tuning.errors import Mistake
    from kfac_triton.tuning.store import check_file

    if triton is None:
        raise Mistake("triton is not installed; it comes with the CUDA and ROCm builds of torch for Linux")
    limits.whole("--top", top, limits.TRIALS)
    limits.whole("--jobs", jobs, limits.JOBS)
    if out is not None:
        check_file("--out", out, lambda content: tuned.FORMAT.encode() in content)
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
        tables.print_ranking(search, rows, source, name)
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
        bool | None,
        typer.Option("--compile/--no-compile", help="Compile K-FAC's Fisher pass; default: no."),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only the file's name.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The tuned file's content on standard output.")] = False,
) -> None:
    """Find K-FAC's settings for a task, compare them on held-out seeds, write them down."""
    from kfac_triton.tuning import tables, tuner
    from kfac_triton.tuning.errors import Mistake
    from kfac_triton.tuning.view import View

    if quiet and as_json:
        raise Mistake("--quiet with --json: one of them")
    view = View(timeout, quiet or as_json)
    own: dict[str, Any] = {
        "timeout": timeout, "device": device, "data": data, "compile": compile, "space": space,
        "fix": tuple(fix or ()), "note": view.note, "watch": view.watch,
    }  # fmt: skip
    if join:
        if storage is None or jobs > 1:
            raise Mistake("--join: needs the study's --storage, and is one process itself")
        with view:
            return tuner.join(task, storage, study, **own)
    _check_out(out, task)
    storage = str(out.with_suffix(".journal")) if storage is None else storage
    html = html or out.with_suffix(".html")
    _check_html(html)
    _check_apart(out, html, storage)
    try:
        with view:
            result = tuner.tune(
                task, trials=trials, seconds=seconds, target=_number_or_word(target),
                storage=storage, study=study, jobs=jobs, seed=seed, seeds=seeds,
                baselines=_names(baselines), prune=pruner, tiles=tiles, begun=STARTED, **own,
            )  # fmt: skip
            view.watch("phase", (f"writing {out} and {html}", 0))
            result.save(out)
            result.report(html)
    except tuner.Interrupted as standing:
        typer.echo(f"kfac-tune: interrupted; {standing}; the same command goes on: {' '.join(sys.argv)}", err=True)
        raise typer.Exit(INTERRUPTED) from None
    if as_json:
        typer.echo(json.dumps(result.content, indent=1))
        return
    if not quiet:
        tables.print_tuned(result.content)
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


def _check_out(out: Path, task: str) -> None:
    """Raises: Mistake: nothing can be written there, or it is something else's."""
    from kfac_triton import tuned
    from kfac_triton.tuning.errors import Mistake
    from kfac_triton.tuning.plan import short_spec
    from kfac_triton.tuning.store import check_file

    check_file("--out", out)
    if not out.exists():
        return
    try:
        held = tuned.read_tuned(out)
    except ValueError as error:
        raise Mistake(f"--out {out} is there and is no tuned file ({error}); name another file") from None
    if short_spec(held["task"]) != short_spec(task):
        raise Mistake(f"--out {out} holds what was tuned for {held['task']}; name another file")


def _check_apart(out: Path, html: Path, storage: str) -> None:
    """Raises: Mistake: two of the files are one."""
    from kfac_triton.tuning.errors import Mistake
    from kfac_triton.tuning.storage import local_path

    named = {"--out": out, "--html": html, "--storage": local_path(storage)}
    places = {option: os.path.realpath(path) for option, path in named.items() if path is not None}
    for option, path in places.items():
        if list(places.values()).count(path) > 1:
            raise Mistake(f"{option} {path} is the place of two files; name three different ones")


def _check_html(html: Path) -> None:
    """Raises: Mistake: it cannot be written, or it is no report of ours."""
    from kfac_triton.tuning.store import REPORT_BEGINS, check_file

    check_file("--html", html, lambda content: content.startswith(REPORT_BEGINS.encode()))


@app.command()
def tasks() -> None:
    """List the built-in tasks."""
    from kfac_triton.tuning import tables
    from kfac_triton.tuning.problems import LISTED, about

    tables.print_pairs([(name, about(name)) for name in LISTED])


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
    from kfac_triton.tuning import tables
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
            tables.print_tuned(tuned.read_tuned(path))
        else:
            tables.print_tiles(held, tuned.read_tiles(path))
    except ValueError as error:
        raise Mistake(str(error)) from None


def _show_storage(url: str, name: str | None, html: Path | None) -> None:
    import optuna

    from kfac_triton.tuning import report, tables
    from kfac_triton.tuning.errors import Mistake
    from kfac_triton.tuning.storage import open_storage

    if "://" not in url and not Path(url).exists():
        raise Mistake(f"{url}: there is no such file")
    if html is not None:
        _check_html(html)
    storage = open_storage(url)
    names = [study.study_name for study in storage.get_all_studies()]
    if not names:
        raise Mistake(f"{url} holds no study")
    if name is None and len(names) > 1 and html is None:
        return tables.print_studies(url, [optuna.load_study(study_name=each, storage=storage) for each in names])
    if name is not None and name not in names:
        raise Mistake(f"--study {name}: there are {', '.join(names)}")
    found = optuna.load_study(study_name=name or names[0], storage=storage)
    tables.print_study(found)
    if html is not None:
        report.write(html, found)
        typer.echo(f"{html}")


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    return status_of(app, "kfac-tune", arguments)
