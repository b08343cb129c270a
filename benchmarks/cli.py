"""The command `kfac-bench`.

torch, Optuna and matplotlib are imported by the commands that need them, so that help comes at once.
"""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kfac_triton.tuning.commands import FAULT, status_of

if TYPE_CHECKING:
    from kfac_triton.benchmarks.plan import Request

STARTED = time.monotonic() - time.process_time()  # a budget counts from here: imports are part of the command
DEFAULT_OPTIMIZERS = ("sgd", "adamw", "kfac")
REPORTING = 8.0  # seconds of a budget kept for the report, at most a fifth of it

app = typer.Typer(
    help="Races K-FAC against tuned baselines and reports what came out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Data = Annotated[
    Path | None, typer.Option(help="Folder with the data files; default: $KFAC_DATA, then the usual folders.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Threads = Annotated[int | None, typer.Option(help="CPU threads; default: torch's own choice.")]


@app.command()
def run(
    tasks: Annotated[
        list[str] | None,
        typer.Argument(metavar="[TASK]...", help="Built-in names or path/to/file.py:factory; default: digits."),
    ] = None,
    optimizers: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated; default sgd,adamw,kfac. Also nesterov, soap, kfac-adaptive, kfac-paper, "
            "kfac-growing, kfac-tridiagonal, *-no-momentum, *-default."
        ),
    ] = None,
    suite: Annotated[
        str | None,
        typer.Option(
            help="paper: the experiments of Martens & Grosse (2015), an hour a task; networks: six real ones."
        ),
    ] = None,
    budget: Annotated[float | None, typer.Option(help="Seconds for the whole command, tuning included.")] = None,
    seeds: Annotated[int, typer.Option(help="Report seeds.")] = 3,
    trials: Annotated[int | None, typer.Option(help="Settings tried for each tuned optimizer; default 12.")] = None,
    seconds: Annotated[
        float | None, typer.Option(help="Training seconds of each run; default 60, or from --budget.")
    ] = None,
    tuning_seconds: Annotated[
        float | None, typer.Option(help="Training seconds of each setting tried; default: those of a run.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("report"),
    data: Data = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite/--resume", help="Begin anew, or go on with a run of the same plan.")
    ] = False,
    device: Device = "auto",
    threads: Threads = None,
    compile: Annotated[
        bool | None,
        typer.Option("--compile/--no-compile", help="Compile K-FAC's Fisher pass; default: no."),
    ] = None,
    isolate: Annotated[
        bool | None,
        typer.Option(
            "--isolate/--no-isolate", help="A process for each measured run; default: in runs of 5 s and more."
        ),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only the verdicts.")] = False,
) -> None:
    """Tune, race and report; interrupted, the same command goes on."""
    import torch

    from kfac_triton.benchmarks.plan import Request
    from kfac_triton.benchmarks.suites import find_suite
    from kfac_triton.tuning.environment import find_device

    whole = None if suite is None else find_suite(suite)
    named = tuple(name.strip() for name in (optimizers or "").split(",") if name.strip())
    if whole is not None and seconds is None and budget is None:
        seconds, tuning_seconds = whole.seconds, tuning_seconds or whole.tuning_seconds
    request = Request(
        tasks=tuple(tasks or (whole.tasks if whole else ["digits"])),
        optimizers=named or (whole.optimizers if whole else DEFAULT_OPTIMIZERS),
        seeds=seeds,
        trials=trials,
        seconds=seconds,
        tuning_seconds=tuning_seconds,
        budget=budget,
        suite=suite,
        device=str(find_device(device)),
        threads=torch.get_num_threads() if threads is None else threads,
        compile=compile,
        isolate=isolate,
    )
    _race(request, out, data, overwrite, quiet)


def _race(request: Request, out: Path, data: Path | None, overwrite: bool, quiet: bool) -> None:
    from kfac_triton.benchmarks import report as report_of
    from kfac_triton.benchmarks.plan import check, derive, open_folder, write_plan
    from kfac_triton.benchmarks.progress import Progress
    from kfac_triton.benchmarks.race import Race, measure_overhead
    from kfac_triton.tuning.environment import find_device
    from kfac_triton.tuning.problems import find_task
    from kfac_triton.tuning.store import check_folder

    check(request)
    check_folder("--out", out)
    device = find_device(request.device)
    tasks = {spec: find_task(spec, data, device) for spec in request.tasks}
    plan = open_folder(out, request, overwrite)
    deadline = math.inf
    if request.budget is not None:
        deadline = STARTED + request.budget - min(REPORTING, request.budget / 5)
    if plan is None:
        budgeted = request.budget is not None and request.seconds is None
        plan = derive(request, [measure_overhead(task, device) for task in tasks.values()] if budgeted else ())
        write_plan(out, request, plan)
    with Progress(plan, quiet) as progress:
        finished = Race(plan, out, tasks, data=data, watcher=progress, deadline=deadline).go()
    results = report_of.make(out)
    for line in report_of.summary_lines(results):
        typer.echo(line)
    if not finished:
        typer.echo(f"The budget ended with {len(results['missing'])} runs missing; the same command goes on.", err=True)
    typer.echo(f"{out / 'index.html'}")


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="The --out folder of a run.")]) -> None:
    """Write results.json, results.csv, the pictures and index.html again."""
    from kfac_triton.benchmarks import report as report_of
    from kfac_triton.benchmarks.plan import load_plan
    from kfac_triton.tuning.store import check_folder

    load_plan(folder)
    check_folder("report", folder)
    results = report_of.make(folder)
    for line in report_of.summary_lines(results):
        typer.echo(line)
    typer.echo(f"{folder / 'index.html'}")


@app.command()
def tasks() -> None:
    """List the built-in tasks."""
    from kfac_triton.tuning.problems import LISTED, about

    for name in LISTED:
        typer.echo(f"{name:20}{about(name)}")


@app.command()
def step(
    task: Annotated[str, typer.Argument(help="A task, as for run.")],
    optimizers: Annotated[
        str, typer.Option(help="Comma-separated; the first one's step is the unit.")
    ] = "sgd,adamw,kfac",
    factor_interval: Annotated[int, typer.Option(help="Steps between factor updates.")] = 1,
    inverse_interval: Annotated[int, typer.Option(help="Steps between inverses.")] = 20,
    factor_fraction: Annotated[float, typer.Option(help="Share of the batch for the factors.")] = 0.125,
    batch: Annotated[int | None, typer.Option(help="Batch size; default: the task's own.")] = None,
    chunks: Annotated[int, typer.Option(help="Timed chunks of each optimizer; 0: counts alone.")] = 10,
    chunk: Annotated[int, typer.Option(help="Steps of a chunk, rounded up to whole inverse intervals.")] = 20,
    compile: Annotated[
        bool, typer.Option(help="Compile K-FAC's Fisher pass for the times; counts are of eager steps.")
    ] = False,
    counts: Annotated[bool, typer.Option("--counts", help="Count each stage of a step by itself.")] = False,
    rivals: Annotated[
        bool, typer.Option("--rivals", help="Time SOAP, ASDL and kfac-jax in turn with ours, where installed.")
    ] = False,
    json: Annotated[Path | None, typer.Option(help="File for all of it.")] = None,
    data: Data = None,
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Compare what a step costs: its time, interleaved in one process, its operators, Python calls, launches, waits."""
    import torch

    from kfac_triton.benchmarks import step_report
    from kfac_triton.benchmarks.step import StepOptions, check
    from kfac_triton.tuning import limits
    from kfac_triton.tuning.environment import find_device
    from kfac_triton.tuning.problems import find_task
    from kfac_triton.tuning.store import check_file

    limits.whole("--threads", threads, limits.THREADS)
    torch.set_num_threads(threads or torch.get_num_threads())
    found = find_device(device)
    names = tuple(name.strip() for name in optimizers.split(","))
    options = StepOptions(names, factor_interval, inverse_interval, factor_fraction, batch, chunks, chunk, compile)
    check(options)
    if json is not None:
        check_file("--json", json, lambda content: content.startswith(step_report.BEGINS.encode()))
    measured = step_report.measure(find_task(task, data, found), options, found, rivals)
    step_report.print_measured(task, options, measured, counts)
    if json is not None:
        step_report.write(json, task, options, measured, found)


@app.command()
def kernels(
    only: Annotated[str, typer.Option(help="Comma-separated kernels; default: all.")] = "",
    seconds: Annotated[float, typer.Option(help="After so many seconds the rest is checked, and not timed.")] = 360.0,
    out: Annotated[Path, typer.Option(help="Folder of kernels.json and kernels.html.")] = Path("kernels-report"),
    device: Device = "auto",
) -> None:
    """Check every kernel on the device against float64, then time it against torch's libraries: 8 minutes at most."""
    from kfac_triton.benchmarks import kernels as bench
    from kfac_triton.tuning import limits
    from kfac_triton.tuning.environment import find_device
    from kfac_triton.tuning.errors import Mistake
    from kfac_triton.tuning.store import check_folder

    found = find_device(device)
    names = [name.strip() for name in only.split(",") if name.strip()]
    known = list(dict.fromkeys(case.kernel for case in bench.cases()))
    strange = [name for name in names if name not in known]
    if strange:
        raise Mistake(f"--only {strange[0]}: one of {', '.join(known)}")
    if not 0 <= seconds <= limits.SECONDS:
        raise Mistake(f"--seconds {seconds:g}: a number of seconds, from 0 to {limits.SECONDS:g}")
    check_folder("--out", out)
    outcomes = []
    for outcome in bench.run(found, seconds, names):
        outcomes.append(outcome)
        typer.echo(f"{outcome.kernel:14}{outcome.label:44}{bench.verdict(outcome, found.type == 'cuda')}")
    bench.write(out, outcomes, found)
    for line in bench.summary(outcomes, found):
        typer.echo(line)
    typer.echo(f"{out / 'kernels.html'}")
    if not all(outcome.right for outcome in outcomes):
        raise typer.Exit(FAULT)


@app.command()
def rival(
    task: Annotated[str, typer.Argument(help="One of the autoencoders.")] = "mnist",
    python: Annotated[str, typer.Option(help="A Python with jax 0.8.3 and kfac-jax 0.0.8.")] = sys.executable,
    seconds: Annotated[float, typer.Option(help="Training seconds of each run.")] = 120.0,
    seeds: Annotated[int, typer.Option(help="Report seeds.")] = 1,
    grid: Annotated[
        str, typer.Option(help="Initial dampings of kfac-jax, the best of which it runs with.")
    ] = "1e-4,1e-3,1e-2,0.1,1,10,150",
    grid_seconds: Annotated[float, typer.Option(help="Training seconds for each of them.")] = 20.0,
    best_known: Annotated[
        float | None, typer.Option(help="Error from which distances count; default: the lowest of these runs.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of rival.json.")] = Path("rival"),
    data: Data = None,
    threads: Threads = None,
) -> None:
    """Run KFAC.paper and kfac-jax's adaptive optimizer in turn, on the same weights and batches."""
    import torch
    from rich.console import Console

    from kfac_triton.benchmarks.rival import Options, compare, print_comparison
    from kfac_triton.tuning import limits
    from kfac_triton.tuning.errors import Mistake
    from kfac_triton.tuning.store import check_folder

    try:
        dampings = tuple(float(damping) for damping in grid.split(","))
    except ValueError as error:
        raise Mistake(f"--grid {grid}: numbers with commas between them") from error
    if not all(0 < damping < math.inf for damping in dampings):
        raise Mistake(f"--grid {grid}: dampings above 0")
    limits.seconds("--seconds", seconds)
    limits.seconds("--grid-seconds", grid_seconds)
    limits.whole("--seeds", seeds, limits.SEEDS)
    limits.whole("--threads", threads, limits.THREADS)
    limits.finite("--best-known", best_known)
    check_folder("--out", out)
    torch.set_num_threads(threads or torch.get_num_threads())
    options = Options(task, python, seconds, tuple(range(1, seeds + 1)), dampings, grid_seconds)
    console = Console(highlight=False)
    print_comparison(compare(options, data, out, Console(stderr=True, highlight=False)), best_known, console)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    return status_of(app, "kfac-bench", arguments)
