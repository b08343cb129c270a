"""The plan of a race: what is run for how long. Derived once, written down, and the same for every optimizer."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from kfac_triton.tuning import limits
from kfac_triton.tuning.baselines import BASELINES, find_entrant
from kfac_triton.tuning.errors import Mistake
from kfac_triton.tuning.store import read_json, write_json

SCHEMA = 1
TRIALS, SECONDS, SEEDS, EVALUATIONS = 12, 60.0, 3, 30
TARGET, RACE = "target", "race"  # the stages whose runs are kept
FEWEST_TRIALS, FEWEST_EVALUATIONS = 4, 8
COMFORTABLE, SHORTEST = (
    1.0,
    0.02,
)  # seconds a run: below the first trials are given up, below the second the budget is refused
WORTH_A_PROCESS = 5.0  # seconds a run from which on it gets a process of its own
PROCESS_START, COMPILATION = 8.0, 60.0  # seconds set aside for each
SLACK = 0.7  # share of a budget that is planned; steps and evaluations overrun, machines stall
LEAST_CLOCKED = 0.25  # share of a budget that is training seconds whatever the overheads were measured to be
OURS = ("plan.json", "results.json", "results.csv", "index.html", "tuning", "targets", "runs", "pictures")


@dataclass(frozen=True)
class Request:
    """What the user asked for; None is ours to choose. Two requests that compare equal may share a folder."""

    tasks: tuple[str, ...]
    optimizers: tuple[str, ...]
    seeds: int = SEEDS
    trials: int | None = None
    seconds: float | None = None
    tuning_seconds: float | None = None
    budget: float | None = None
    suite: str | None = None
    device: str = "cpu"
    threads: int = 1
    compile: bool | None = None
    isolate: bool | None = None


@dataclass(frozen=True)
class Plan:
    """What a folder holds or will hold."""

    tasks: tuple[str, ...]
    optimizers: tuple[str, ...]
    seeds: tuple[int, ...]
    trials: int
    seconds: float
    tuning_seconds: float | None = None
    suite: str | None = None
    budget: float | None = None
    evaluations: int = EVALUATIONS
    tuning_seed: int = 0
    device: str = "cpu"
    threads: int = 1
    compile: bool = False
    isolate: bool = False
    schema: int = SCHEMA

    @property
    def baselines(self) -> list[str]:
        return [name for name in self.optimizers if name in BASELINES]

    @property
    def challengers(self) -> list[str]:
        """Those that run after the targets are set, untuned baselines included."""
        return [name for name in self.optimizers if name not in BASELINES]

    @property
    def seconds_a_trial(self) -> float:
        return self.tuning_seconds or self.seconds

    @property
    def targets_first(self) -> bool:
        """Whether the baselines run before anybody else trains: where a challenger is tuned, so might be to them."""
        return not self.challengers or any(find_entrant(name).tuned for name in self.challengers)

    @property
    def reported_stage(self) -> str:
        return RACE if self.challengers else TARGET

    @property
    def searched(self) -> int:
        """Trials of a task, over all optimizers."""
        return self.trials * sum(find_entrant(name).tuned for name in self.optimizers)

    @property
    def measured(self) -> int:
        """Kept runs of a task: baselines run twice where somebody challenges them."""
        again = len(self.baselines) if self.challengers and self.targets_first else 0
        return len(self.seeds) * (len(self.optimizers) + again)


@dataclass(frozen=True)
class Overhead:
    """Seconds of a task beside the training clock: of one evaluation, and of the steps that warm a run up."""

    evaluation: float = 0.0
    warm_up: float = 0.0


def derive(request: Request, overheads: Sequence[Overhead] = ()) -> Plan:
    """The plan of a request. Without a budget: 12 settings of 60 s for each optimizer.

    A budget is shared out over all runs alike, after what `overheads` (one for each task) say evaluation and warming
    up take.

    Raises:
        Mistake: a budget too small for what is asked.
    """
    plan = Plan(
        tasks=request.tasks,
        optimizers=request.optimizers,
        seeds=tuple(range(1, request.seeds + 1)),
        trials=request.trials or TRIALS,
        seconds=request.seconds or SECONDS,
        tuning_seconds=request.tuning_seconds,
        suite=request.suite,
        budget=request.budget,
        device=request.device,
        threads=request.threads,
        compile=bool(request.compile),
    )
    if request.budget is not None:
        plan = _share_out(plan, request, overheads or [Overhead()] * len(request.tasks))
    isolate = plan.seconds >= WORTH_A_PROCESS if request.isolate is None else request.isolate
    return replace(plan, isolate=isolate)


def _share_out(plan: Plan, request: Request, overheads: Sequence[Overhead]) -> Plan:
    """Settles seconds, then trials and evaluations, so that the whole command fits its budget."""
    budget = request.budget or 0.0
    if request.seconds is not None:
        needed = len(plan.tasks) * (plan.searched * plan.seconds_a_trial + plan.measured * plan.seconds)
        if needed > budget:
            raise Mistake(
                f"--budget {budget:g} is less than the {needed:g} s of {plan.trials} trials and {request.seeds} seeds "
                f"at --seconds {plan.seconds:g}; leave one of them out"
            )
        return plan
    plan = _affordable(plan, budget, overheads)
    while plan.seconds < COMFORTABLE and plan.evaluations > FEWEST_EVALUATIONS:
        plan = _affordable(replace(plan, evaluations=plan.evaluations - 1), budget, overheads)
    while request.trials is None and plan.seconds < COMFORTABLE and plan.trials > FEWEST_TRIALS:
        plan = _affordable(replace(plan, trials=plan.trials - 1), budget, overheads)
    if plan.seconds < SHORTEST:
        raise Mistake(f"--budget {budget:g} does not hold its runs; give more, or fewer tasks, optimizers or seeds")
    return plan


def _affordable(plan: Plan, budget: float, overheads: Sequence[Overhead]) -> Plan:
    """`plan` with the seconds a run that `budget` pays for, with and without processes and compilation."""
    tasks, runs = len(plan.tasks), plan.searched + plan.measured
    left = SLACK * budget
    for one in overheads:
        left -= runs * one.warm_up + (plan.searched * 5 + plan.measured * (plan.evaluations + 1)) * one.evaluation
    left -= COMPILATION * tasks if plan.compile else 0.0
    seconds = left / (tasks * runs)
    if seconds >= WORTH_A_PROCESS:
        left -= PROCESS_START * tasks * plan.measured
        seconds = max(left / (tasks * runs), 0.99 * WORTH_A_PROCESS)
    least = (
        LEAST_CLOCKED * budget / (tasks * runs)
    )  # where overheads were measured in a bad moment, the deadline decides
    return replace(plan, seconds=round(max(seconds, least), 3))


def check(request: Request) -> None:
    """Raises: Mistake: an unknown or repeated name, or a number out of its range."""
    if not request.tasks or not request.optimizers:
        raise Mistake("name at least one task and one optimizer")
    for name in request.optimizers:
        find_entrant(name)
    for kind, names in (("task", request.tasks), ("optimizer", request.optimizers)):
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise Mistake(f"{kind} {twice[0]!r} is named twice")
    limits.whole("--seeds", request.seeds, limits.SEEDS)
    limits.whole("--trials", request.trials, limits.TRIALS)
    limits.whole("--threads", request.threads, limits.THREADS)
    if request.tuning_seconds is not None and request.seconds is None:
        raise Mistake(f"--tuning-seconds {request.tuning_seconds:g}: give --seconds too, those of a measured run")
    limits.seconds("--seconds", request.seconds)
    limits.seconds("--tuning-seconds", request.tuning_seconds)
    limits.seconds("--budget", request.budget)


def open_folder(folder: Path, request: Request, overwrite: bool) -> Plan | None:
    """The plan of the run in `folder` that `request` goes on with; None for a folder that begins a new one.

    Raises:
        Mistake: it holds something else, or a run of another plan and `overwrite` is not set. Nothing is deleted in a
            folder that holds no run of ours.
    """
    if folder.exists() and not folder.is_dir():
        raise Mistake(f"--out {folder} is a file; name a folder")
    if (folder / "plan.json").is_file():
        if overwrite:
            _clear(folder)
            return None
        there, plan = _load(folder)
        _same(folder, there, request)
        return plan
    if folder.is_dir() and any(folder.iterdir()):
        raise Mistake(f"--out {folder} is not empty and holds no kfac-bench run; name another folder")
    return None


def write_plan(folder: Path, request: Request, plan: Plan) -> None:
    write_json(folder / "plan.json", {"request": asdict(request), "plan": asdict(plan)})


def load_plan(folder: Path) -> Plan:
    """Raises: Mistake: no plan there, or a damaged one."""
    return _load(folder)[1]


def _load(folder: Path) -> tuple[Request, Plan]:
    path = folder / "plan.json"
    if not path.is_file():
        raise Mistake(f"{folder} holds no kfac-bench run (no plan.json); name the --out folder of one")
    content = read_json(path)
    try:
        request = Request(**{name: _tupled(value) for name, value in content["request"].items()})
        return request, Plan(**{name: _tupled(value) for name, value in content["plan"].items()})
    except (AttributeError, KeyError, TypeError) as error:
        raise Mistake(f"{path} is damaged ({error!r}); repeat the kfac-bench run command with --overwrite") from error


def _same(folder: Path, there: Request, here: Request) -> None:
    old, new = asdict(there), asdict(here)
    other = [f"{name} {_short(old[name])} there, {_short(new[name])} here" for name in new if old[name] != new[name]]
    if other:
        raise Mistake(
            f"--out {folder} holds a run of another plan ({'; '.join(other)}); repeat its command, "
            "name another folder or pass --overwrite"
        )


def _clear(folder: Path) -> None:
    for name in OURS:
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _tupled(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _short(value: Any) -> str:
    return ",".join(str(part) for part in value) if isinstance(value, tuple) else str(value)
