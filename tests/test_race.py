"""The protocol: its order, its targets, what resuming runs, what a budget becomes, a run in its own process."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kfac_triton.benchmarks import race as race_module
from kfac_triton.benchmarks.plan import Overhead, Plan, Request, check, derive, load_plan, open_folder, write_plan
from kfac_triton.benchmarks.race import Race, run_path, target_path
from kfac_triton.benchmarks.results import collect
from kfac_triton.benchmarks.step import StepOptions, compare_steps
from kfac_triton.benchmarks.worker import Job, measure_apart
from kfac_triton.tuning.errors import Mistake
from kfac_triton.tuning.problems import find_task
from kfac_triton.tuning.store import read_json
from kfac_triton.tuning.study import TrialRow
from kfac_triton.tuning.task import Task
from kfac_triton.tuning.trainer import Point

FILE = """
import torch
from kfac_triton.tuning import Task

def factory():
    def batches(seed):
        generator = torch.Generator().manual_seed(seed)
        while True:
            inputs = torch.randn(16, 3, generator=generator)
            yield inputs, inputs.sum(1, keepdim=True)

    return Task(
        model=lambda: torch.nn.Linear(3, 1),
        batches=batches,
        loss=lambda outputs, targets: 0.5 * (outputs - targets).square().sum() / len(outputs),
        likelihood="gaussian",
    )

def judged_by_nothing():
    task = factory()
    return Task(task.model, task.batches, task.loss, task.likelihood, evaluate=lambda model: 1.0, target=0.5)
"""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "task.py"
    path.write_text(FILE)
    return path


class Witness:
    """Remembers what happened, in order; may interrupt after so many events."""

    def __init__(self, patience: int = 1000) -> None:
        self.events: list[tuple[str, ...]] = []
        self.patience = patience

    def _happened(self, *event: str) -> None:
        self.events.append(event)
        if len(self.events) >= self.patience:
            raise KeyboardInterrupt

    def trial(self, task: str, optimizer: str, row: TrialRow, trials: int) -> None:
        self._happened("trial", optimizer)

    def run(self, job: Job, record: dict[str, Any]) -> None:
        self._happened(job.stage, job.optimizer, str(job.seed))

    def point(self, job: Job, point: Point) -> None:
        pass

    def targets(self, task: str, targets: dict[str, float]) -> None:
        self._happened("targets", *targets)


def plan_for(spec: str, *optimizers: str, **changes: Any) -> Plan:
    plan = derive(Request((spec,), optimizers, seeds=2, trials=2, seconds=0.03, isolate=False))
    return replace(plan, evaluations=3, **changes)


def race(plan: Plan, folder: Path, witness: Witness, deadline: float = float("inf")) -> Race:
    tasks = {spec: find_task(spec) for spec in plan.tasks}
    request = Request(plan.tasks, plan.optimizers)
    if open_folder(folder, request, overwrite=False) is None:
        write_plan(folder, request, plan)
    return Race(plan, folder, tasks, watcher=witness, deadline=deadline)


def test_targets_are_set_by_the_baselines_before_a_challenger_trains(file: Path, tmp_path: Path) -> None:
    spec, witness, out = f"{file}:factory", Witness(), tmp_path / "out"
    assert race(plan_for(spec, "sgd", "adamw", "kfac", "sgd-default"), out, witness).go()
    events = witness.events
    at = events.index(("targets", "sgd", "adamw"))
    assert all("kfac" not in event and "sgd-default" not in event for event in events[:at])
    assert events[:at].count(("trial", "sgd")) == events[:at].count(("trial", "adamw")) == 2
    assert events[at + 1 : at + 3] == [("trial", "kfac")] * 2
    assert sorted(events[at + 3 :]) == sorted(
        ("race", name, seed) for name in ("sgd", "adamw", "kfac", "sgd-default") for seed in "12"
    )
    assert [event[2] for event in events[at + 3 :]] == ["1"] * 4 + ["2"] * 4, "interleaved by seed"
    finals = [read_json(run_path(out, spec, "target", "sgd", seed))["final"] for seed in (1, 2)]
    assert read_json(target_path(out, spec))["targets"]["sgd"] == pytest.approx(sum(finals) / 2)


def test_an_interrupted_race_runs_only_what_is_missing(file: Path, tmp_path: Path) -> None:
    spec, out = f"{file}:factory", tmp_path / "out"
    plan = plan_for(spec, "sgd", "adamw")
    with pytest.raises(KeyboardInterrupt):
        race(plan, out, Witness(patience=6)).go()
    first = Witness()
    assert race(plan, out, first).go()
    assert [event[0] for event in first.events] == ["target"] * 2 + ["targets"], "four trials and two runs were done"
    target = target_path(out, spec).read_text()
    run_path(out, spec, "target", "adamw", 2).unlink()
    second = Witness()
    assert race(plan, out, second).go()
    assert second.events == [("target", "adamw", "2")]
    assert target_path(out, spec).read_text() == target, "a target never changes once it is set"


def test_a_deadline_ends_the_race_between_two_runs_and_the_same_command_goes_on(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, out = plan_for(f"{file}:factory", "sgd"), tmp_path / "out"
    witness = Witness()
    assert race(plan, out, witness, deadline=time.monotonic()).go() is False
    assert witness.events == []
    results = collect(out)
    assert not results["complete"] and len(results["missing"]) == 2
    assert race(plan, out, witness).go() is True
    assert collect(out)["complete"]


def test_a_task_with_a_target_of_its_own_needs_no_baseline_and_misses_count(file: Path, tmp_path: Path) -> None:
    spec, out = f"{file}:judged_by_nothing", tmp_path / "out"
    assert race(plan_for(spec, "kfac-default"), out, Witness()).go()
    task = collect(out)["tasks"][0]
    reached = task["optimizers"][0]["summary"]["targets"]["task"]
    assert reached["reached"] == 0 and reached["runs"] == 2
    assert reached["seconds"]["median"] == float("inf")
    assert (
        "kfac-default does not reach the task's target (0.5) in the median: 0 of 2 runs reach it." in task["verdicts"]
    )


def test_a_changed_task_file_is_not_resumed(file: Path, tmp_path: Path) -> None:
    plan, out = plan_for(f"{file}:factory", "sgd-default"), tmp_path / "out"
    assert race(plan, out, Witness()).go()
    file.write_text(FILE + "\n# another problem\n")
    with pytest.raises(Mistake, match=r"changed since .* was begun; pass --overwrite"):
        race(plan, out, Witness()).go()


def test_an_optimizer_that_always_diverges_is_a_mistake_that_says_so(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.write_text(FILE.replace("0.5 * (outputs", "float('nan') * (outputs"))
    with pytest.raises(Mistake, match="all 2 settings of sgd diverged"):
        race(plan_for(f"{file}:factory", "sgd"), tmp_path / "out", Witness()).go()


def test_a_run_in_a_process_of_its_own_reports_its_own_memory_and_points(file: Path) -> None:
    job = Job(f"{file}:factory", "kfac-default", {}, 1, "race", 0.05, 3, "cpu", 1, False, None)
    points: list[Point] = []
    record = measure_apart(job, points.append)
    assert record["own_process"] is True and record["peak_memory"] > 2**20
    assert [point.train for point in points] == [point["train"] for point in record["run"]["points"]]
    assert record["environment"]["threads"] == 1
    with pytest.raises(Mistake, match="has no callable 'missing'"):
        measure_apart(replace(job, task=f"{file}:missing"))


def test_the_default_plan_is_twelve_settings_of_a_minute() -> None:
    plan = derive(Request(("curves",), ("sgd", "adamw", "kfac")))
    assert (plan.trials, plan.seconds, plan.seeds) == (12, 60.0, (1, 2, 3))
    assert not plan.compile and plan.isolate
    assert (plan.searched, plan.measured) == (36, 15), "three optimizers searched; baselines run twice"
    assert 0 not in plan.seeds and plan.tuning_seed == 0


@pytest.mark.parametrize("budget", [30.0, 120.0, 600.0, 3600.0, 20_000.0])
def test_a_budget_holds_every_run_it_plans(budget: float) -> None:
    overhead = Overhead(evaluation=0.01, warm_up=0.05)
    plan = derive(Request(("digits", "curves"), ("sgd", "adamw", "kfac"), budget=budget), [overhead, overhead])
    runs = 2 * (plan.searched + plan.measured)
    evaluations = 2 * (5 * plan.searched + (plan.evaluations + 1) * plan.measured)
    assert 0.2 * budget < runs * plan.seconds + runs * 0.05 + evaluations * 0.01 < budget
    assert plan.trials == 12 or plan.seconds < 2


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"optimizers": ("sgd", "lion")}, "unknown optimizer 'lion': one of sgd, nesterov, adamw, soap, kfac"),
        ({"optimizers": ("sgd", "sgd")}, "optimizer 'sgd' is named twice"),
        ({"optimizers": ()}, "at least one"),
        ({"seeds": 0}, "--seeds 0: at least 1"),
        ({"seconds": -1.0}, "--seconds -1: a positive number"),
        ({"budget": float("nan")}, "--budget nan: a positive number"),
        ({"budget": 10.0, "seconds": 5.0}, "--budget 10 is less than"),
        ({"budget": 0.1}, "--budget 0.1 does not hold its runs"),
    ],
)
def test_a_request_that_cannot_be_is_refused(changes: dict[str, Any], said: str) -> None:
    request = replace(Request(("digits",), ("sgd", "adamw")), **changes)
    with pytest.raises(Mistake, match=said):
        check(request)
        derive(request)


def test_a_folder_of_somebody_else_is_refused_and_never_deleted(tmp_path: Path) -> None:
    request, foreign = Request(("digits",), ("sgd",)), tmp_path / "thesis.txt"
    foreign.write_text("years of work")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "old.json").write_text("{}")
    for overwrite in (False, True):
        with pytest.raises(Mistake, match="is not empty and holds no kfac-bench run"):
            open_folder(tmp_path, request, overwrite=overwrite)
    assert foreign.read_text() == "years of work" and (tmp_path / "runs" / "old.json").is_file()


def test_overwrite_clears_a_run_of_ours_and_nothing_else(tmp_path: Path) -> None:
    request, foreign = Request(("digits",), ("sgd",)), tmp_path / "thesis.txt"
    write_plan(tmp_path, request, derive(request))
    foreign.write_text("years of work")
    (tmp_path / "runs").mkdir()
    assert open_folder(tmp_path, request, overwrite=True) is None
    assert list(tmp_path.iterdir()) == [foreign]


def test_another_plan_in_the_folder_is_refused_and_the_same_one_resumed(tmp_path: Path) -> None:
    request = Request(("digits",), ("sgd",), trials=5)
    plan = derive(request)
    write_plan(tmp_path, request, plan)
    assert open_folder(tmp_path, request, overwrite=False) == plan == load_plan(tmp_path)
    with pytest.raises(Mistake, match=r"another plan .trials 5 there, 6 here.; repeat its command"):
        open_folder(tmp_path, replace(request, trials=6), overwrite=False)


def test_a_run_is_written_in_one_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.json"
    race_module.write_json(path, {"final": float("inf")})
    assert json.loads(path.read_text()) == {"final": None}

    def interrupted(*_: object, **__: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(json, "dumps", interrupted)
    with pytest.raises(KeyboardInterrupt):
        race_module.write_json(path, {"final": 1.0})
    assert json.loads(path.read_text()) == {"final": None} and list(tmp_path.iterdir()) == [path]


def test_steps_are_compared_in_whole_inverse_intervals(file: Path) -> None:
    options = StepOptions(("sgd", "kfac"), inverse_interval=7, chunk=10, chunks=3, batch=24, compile=False)
    assert options.steps == 14
    seen: list[int] = []
    task = find_task(f"{file}:factory")

    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        seen.append(len(outputs))
        return task.loss(outputs, targets)

    costs = compare_steps(replace(task, loss=loss) if isinstance(task, Task) else task, options, torch.device("cpu"))
    assert [cost.optimizer for cost in costs] == ["sgd", "kfac"]
    assert costs[0].ratio == 1.0 and costs[1].ratio == pytest.approx(costs[1].median_ms / costs[0].median_ms)
    assert all(cost.low_ms <= cost.median_ms <= cost.high_ms for cost in costs)
    assert set(seen) == {24} and len(seen) == 2 * 14 * (1 + 3)
