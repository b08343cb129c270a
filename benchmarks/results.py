"""From a folder of runs to results: time to each target with its misses, medians and spreads, verdicts in words.

A run that never reaches a target needs infinitely many seconds; infinity takes part in the median and no run is
dropped. A target counts as reached at the first evaluation that is at or below it, so times are upper bounds by one
evaluation's distance.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from kfac_triton.benchmarks.plan import Plan, load_plan
from kfac_triton.benchmarks.race import run_path, target_path, tuning_path
from kfac_triton.benchmarks.suites import find_suite, findings
from kfac_triton.benchmarks.verdicts import first_below, verdicts
from kfac_triton.tuning.errors import Mistake
from kfac_triton.tuning.store import read_json, write_json, write_text

SCHEMA = 1
COLUMNS = [
    "task",
    "optimizer",
    "seed",
    "stage",
    "ended",
    "final_train",
    "final_test",
    "seconds",
    "steps",
    "ms_per_step",
    "median_step_ms",
    "compile_seconds",
    "peak_memory_mib",
    "target",
    "target_value",
    "seconds_to_target",
    "cold_seconds_to_target",
    "steps_to_target",
    "data",
    "data_digest",
]


def collect(folder: Path) -> dict[str, Any]:
    """Everything in `folder` as one JSON-able object.

    Raises:
        Mistake: no run there, or a damaged file, which is named.
    """
    plan = load_plan(folder)
    tasks = [_task(folder, plan, spec) for spec in plan.tasks]
    missing = [one for task in tasks for one in task.pop("missing")]
    environments = [run["environment"] for task in tasks for one in task["optimizers"] for run in one["runs"]]
    return {
        "schema": SCHEMA,
        "plan": asdict(plan),
        "targets_first": plan.targets_first,
        "complete": not missing,
        "missing": missing,
        "environment": environments[0] if environments else {},
        "machines": len({(one["cpu"], one["device"], one["torch"]) for one in environments}),
        "codes": len({one.get("code") for one in environments}),
        "tasks": tasks,
    }


def write(folder: Path, results: dict[str, Any]) -> None:
    """results.json and results.csv, a row for each run and target."""
    write_json(folder / "results.json", results)
    table = io.StringIO()
    writer = csv.DictWriter(table, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(row for task in results["tasks"] for row in _rows(task))
    write_text(folder / "results.csv", table.getvalue())


def spread(values: Iterable[float | None]) -> dict[str, float]:
    """Median, smallest, largest; None counts as infinite."""
    known = sorted(math.inf if value is None else value for value in values)
    return {"median": median(known), "low": known[0], "high": known[-1]}


def _task(folder: Path, plan: Plan, spec: str) -> dict[str, Any]:
    path = target_path(folder, spec)
    targets = read_json(path).get("targets", {}) if path.is_file() else {}
    stage = plan.reported_stage
    optimizers, missing = [], []
    for name in plan.optimizers:
        runs = []
        for seed in plan.seeds:
            run = run_path(folder, spec, stage, name, seed)
            if run.is_file():
                runs.append(_run(run, targets))
            else:
                missing.append({"task": spec, "optimizer": name, "seed": seed})
        optimizers.append(_optimizer(folder, spec, name, runs, targets))
    some: dict[str, Any] = next((run for one in optimizers for run in one["runs"]), {})
    task = {
        "name": spec,
        "metric": some.get("metric", ""),
        "data": some.get("data", []),
        "targets": targets,
        "targets_set": read_json(path).get("set", "") if path.is_file() else "",
        "optimizers": optimizers,
        "missing": missing,
    }
    found = findings(find_suite(plan.suite), task) if plan.suite else []
    return {**task, **verdicts(task, len(plan.seeds)), "findings": found}


def _optimizer(
    folder: Path, spec: str, name: str, runs: list[dict[str, Any]], targets: dict[str, float]
) -> dict[str, Any]:
    path = tuning_path(folder, spec, name)
    tuning = read_json(path) if path.is_file() else None
    summary: dict[str, Any] = {}
    if runs:
        summary = {
            "final_train": spread(run["final"] for run in runs),
            "final_test": spread(run["final_test"] for run in runs),
            "seconds": spread(run["seconds"] for run in runs),
            "steps": spread(run["steps"] for run in runs),
            "ms_per_step": spread(run["ms_per_step"] for run in runs),
            "median_step_ms": spread(run["median_step_ms"] for run in runs),
            "compile_seconds": max(run["compile_seconds"] for run in runs),
            "peak_memory_mib": spread(run["peak_memory_mib"] for run in runs),
            "targets": {target: _reached(runs, target) for target in targets},
        }
    first: dict[str, Any] = runs[0] if runs else {"hyper": {}, "in_force": {}}
    hyper = {name: first[name] for name in ("hyper", "in_force")}
    return {"name": name, **hyper, "tuning": tuning, "summary": summary, "runs": runs}


def _reached(runs: list[dict[str, Any]], target: str) -> dict[str, Any]:
    """Time to one target over the seeds. Cold adds the compilation of the run that compiled longest: the first one."""
    times = [run["to_target"][target] for run in runs]
    seconds = spread(time["seconds"] for time in times)
    compilation = max(run["compile_seconds"] for run in runs)
    return {
        "seconds": seconds,
        "cold_seconds": {name: value + compilation for name, value in seconds.items()},
        "steps": spread(time["steps"] for time in times),
        "reached": sum(math.isfinite(time["seconds"]) for time in times),
        "runs": len(times),
    }


def _run(path: Path, targets: dict[str, float]) -> dict[str, Any]:
    """The record of a run, flattened, with its time to each target."""
    record = read_json(path)
    try:
        job, run = record["job"], record["run"]
        points = run["points"]
        to_target = {
            name: dict(zip(("seconds", "steps"), first_below(points, value), strict=True))
            for name, value in targets.items()
        }
        return {
            **{name: job[name] for name in ("task", "optimizer", "hyper", "seed", "stage")},
            **{
                name: run[name]
                for name in ("ended", "reason", "seconds", "steps", "ms_per_step", "median_step_ms", "compile_seconds")
            },
            "in_force": run.get("in_force", {}),
            "final": record["final"],
            "final_test": points[-1]["test"] if run["ended"] != "diverged" else None,
            "peak_memory_mib": record["peak_memory"] / 2**20,
            "own_process": record["own_process"],
            "metric": record["metric"],
            "data": record["data"],
            "environment": record["environment"],
            "finished": record.get("finished", ""),
            "to_target": to_target,
            "points": points,
        }
    except (KeyError, TypeError, IndexError) as error:
        raise Mistake(
            f"{path} is damaged ({error!r} is missing); delete it and repeat the kfac-bench run command"
        ) from error


def _rows(task: dict[str, Any]) -> Iterable[dict[str, Any]]:
    for optimizer in task["optimizers"]:
        for run in optimizer["runs"]:
            common = {name: run.get(name) for name in COLUMNS if name in run}
            common |= {"final_train": run["final"], "data": _joined(run, "name"), "data_digest": _joined(run, "digest")}
            for target, value in (task["targets"] or {"": None}).items():
                time = run["to_target"].get(target, {"seconds": math.inf, "steps": math.inf})
                yield {
                    **common,
                    "target": target,
                    "target_value": value,
                    "seconds_to_target": time["seconds"],
                    "cold_seconds_to_target": time["seconds"] + run["compile_seconds"],
                    "steps_to_target": time["steps"],
                }


def _joined(run: dict[str, Any], name: str) -> str:
    return " ".join(str(part.get(name, "")) for part in run["data"])
