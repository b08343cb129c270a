"""From runs to a page: times to target with their misses, sentences computed from numbers, one file."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kfac_triton.benchmarks import report
from kfac_triton.benchmarks.plan import Plan, Request, write_plan
from kfac_triton.benchmarks.race import run_path, target_path, tuning_path
from kfac_triton.benchmarks.results import collect, spread
from kfac_triton.benchmarks.verdicts import first_below
from kfac_triton.tuning.errors import Mistake
from kfac_triton.tuning.store import write_json

DATA = {"name": "made up", "source": "by this test", "digest": "ab" * 32, "size": "3 + 2"}
SEEDS = (1, 2, 3)
HYPER = {"sgd": {"lr": 0.0123}, "adamw": {"lr": 0.0456}, "kfac": {"lr": 0.0789, "damping": 0.321}}

Curve = list[tuple[float, int, float]]


def falling(start: float, rate: float, ms: float, seconds: float = 10.0) -> Curve:
    """A metric that falls by `rate` a second, judged every second."""
    return [(float(s), int(1000 * s / ms), start * math.exp(-rate * s)) for s in range(int(seconds) + 1)]


def record(name: str, seed: int, curve: Curve, stage: str, ended: str = "done") -> dict[str, Any]:
    points = [{"seconds": s, "step": step, "train": value, "test": 2 * value} for s, step, value in curve]
    run = {
        "points": points,
        "steps": curve[-1][1],
        "seconds": curve[-1][0],
        "ms_per_step": 1000 * curve[-1][0] / curve[-1][1],
        "median_step_ms": 9.0,
        "compile_seconds": 4.0 if name == "kfac" and seed == 1 else 0.5,
        "ended": ended,
        "reason": "",
    }
    environment = {"cpu": "a processor", "device": "cpu", "torch": "2.x", "threads": 2}
    return {
        "job": {"task": "t", "optimizer": name, "hyper": HYPER[name], "seed": seed, "stage": stage},
        "run": run,
        "final": math.inf if ended == "diverged" else points[-1]["train"],
        "peak_memory": 300 * 2**20,
        "own_process": True,
        "metric": "a metric",
        "data": [DATA],
        "environment": environment,
        "finished": "2026-01-01T00:00:00+00:00",
    }


def tuning(name: str, edges: dict[str, str]) -> dict[str, Any]:
    trial = {
        "number": 0,
        "setting": HYPER[name],
        "value": 1.5,
        "ended": "done",
        "reason": "",
        "seconds": 10.0,
        "steps": 5,
    }
    space = {parameter: "0.001 to 1 (log)" for parameter in HYPER[name]}
    lost = {**trial, "number": 1, "value": None, "ended": "diverged", "reason": "the loss was nan at step 3"}
    return {
        "best": HYPER[name],
        "trials": [trial, lost],
        "space": space,
        "widened": {},
        "edges": edges,
        "seconds": 20.0,
        "seconds_a_trial": 10.0,
    }


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Path]:
    """A folder as a race leaves it, from each optimizer's curve (None: that run is missing)."""

    def build(curves: dict[str, Callable[[int], Curve | None]], targets: dict[str, float], edges: Any = None) -> Path:
        names = tuple(curves)
        plan = Plan(("t",), names, SEEDS, trials=2, seconds=10.0)
        write_plan(tmp_path, Request(("t",), names), plan)
        write_json(target_path(tmp_path, "t"), {"targets": targets, "set": "2026-01-01T00:00:00+00:00"})
        stage = "race" if plan.challengers else "target"
        for name, curve in curves.items():
            write_json(tuning_path(tmp_path, "t", name), tuning(name, (edges or {}).get(name, {})))
            for seed in SEEDS:
                run = curve(seed)
                if run is not None:
                    ended = "diverged" if len(run) < 3 else "done"
                    write_json(run_path(tmp_path, "t", stage, name, seed), record(name, seed, run, stage, ended))
        return tmp_path

    return build


@pytest.fixture
def won(make: Callable[..., Path]) -> Path:
    """K-FAC falls three times as fast in steps three times as dear; AdamW never gets there."""
    return make(
        {
            "sgd": lambda seed: falling(100, 0.1 + 0.001 * seed, 10),
            "adamw": lambda seed: falling(100, 0.05, 12),
            "kfac": lambda seed: falling(100, 0.3, 30),
        },
        {"sgd": 100 * math.exp(-1.02), "adamw": 100 * math.exp(-0.5)},
        {"kfac": {"damping": "low"}},
    )


def test_the_first_evaluation_at_or_below_the_target_counts() -> None:
    points = [{"seconds": s, "step": 10 * s, "train": value} for s, value in enumerate([9.0, None, 4.0, 5.0, 1.0])]
    assert first_below(points, 4.0) == (2, 20)
    assert first_below(points, 3.9) == (4, 40)
    assert first_below(points, 0.5) == (math.inf, math.inf)


def test_a_miss_takes_part_in_the_median() -> None:
    assert spread([3.0, math.inf, 1.0]) == {"median": 3.0, "low": 1.0, "high": math.inf}
    assert spread([3.0, None, None])["median"] == math.inf
    assert spread([2.0, math.inf])["median"] == math.inf


def test_a_win_is_told_with_its_shares_and_a_loss_as_a_loss(won: Path) -> None:
    task = collect(won)["tasks"][0]
    said = task["verdicts"]
    assert said[1] == (
        "kfac reaches what tuned sgd ends with (36.06) in 4 s and 133 steps, "
        "0.40 of sgd's 10 s (less time) and 0.13 of its 1000 steps; "
        "cold, compilation included, 8 s; 3 of 3 runs reach it."
    )
    assert said[0] == "adamw does not reach what tuned sgd ends with (36.06) in the median: 0 of 3 runs reach it."
    assert said[2] == "kfac is the first to reach what tuned sgd ends with (36.06), after 4 s in the median."
    assert said[-1].startswith("kfac ends lowest; medians at the end of the run: kfac 4.979, sgd 36.06, adamw 60.65")
    assert "kfac: the best damping sits at the low edge of its range, so it may not be at its best." in task["warnings"]


def test_where_sgd_wins_it_says_so(make: Callable[..., Path]) -> None:
    folder = make(
        {"sgd": lambda seed: falling(100, 0.3, 10), "kfac": lambda seed: falling(100, 0.2, 30)}, {"sgd": 30.0}
    )
    said = collect(folder)["tasks"][0]["verdicts"]
    assert "1.40 of sgd's 5 s (more time)" in said[0]
    assert said[1] == "sgd wins: nobody reaches what tuned sgd ends with (30) sooner than sgd itself (5 s)."
    assert said[2].startswith("sgd ends lowest")


def test_misses_and_divergence_are_counted_and_never_dropped(make: Callable[..., Path]) -> None:
    folder = make(
        {
            "sgd": lambda seed: falling(100, 0.1, 10),
            "kfac": lambda seed: falling(100, 0.5, 30) if seed == 1 else falling(100, 0.5, 30)[:2],
        },
        {"sgd": 40.0},
    )
    task = collect(folder)["tasks"][0]
    kfac = task["optimizers"][1]["summary"]
    assert kfac["targets"]["sgd"]["reached"] == 1 and kfac["targets"]["sgd"]["runs"] == 3
    assert kfac["targets"]["sgd"]["seconds"] == {"median": math.inf, "low": 2.0, "high": math.inf}
    assert kfac["final_train"]["median"] == math.inf and kfac["final_test"]["median"] == math.inf
    assert "kfac does not reach what tuned sgd ends with (40) in the median: 1 of 3 runs reach it." in task["verdicts"]
    assert "kfac: 2 of 3 runs diverged." in task["warnings"]
    assert "sgd 36.79, kfac diverged" in task["verdicts"][-1]
    assert "1 of 3" in render(folder)


def test_what_is_missing_is_said(make: Callable[..., Path]) -> None:
    folder = make({"sgd": lambda seed: falling(100, 0.1, 10) if seed < 3 else None}, {"sgd": 40.0})
    results = collect(folder)
    assert not results["complete"] and results["missing"] == [{"task": "t", "optimizer": "sgd", "seed": 3}]
    assert "1 runs are missing; the same command goes on" in render(folder)


def render(folder: Path) -> str:
    report.make(folder)
    return (folder / "index.html").read_text(encoding="utf-8")


def test_the_page_is_one_file_with_everything_in_it(won: Path) -> None:
    page = render(won)
    sources = re.findall(r'(?:src|href)="([^"]{0,40})', page)
    assert len(sources) == 2 and all(source.startswith("data:image/png;base64,") for source in sources)
    assert "http:" not in page and "https:" not in page and "<script" not in page and "@import" not in page
    for words in (
        "kfac reaches what tuned sgd ends with (36.06) in 4 s",
        "0.0123",
        "0.0456",
        "damping=0.321",
        "0.001 to 1 (log)",
        "ab" * 8,
        "a processor",
        "low edge",
        "1 diverged",
        "the loss was nan at step 3",
        "0 of 3",
        "300",
    ):
        assert words in page or words.replace("'", "&#39;") in page, words


def test_the_pictures_are_pictures(won: Path) -> None:
    render(won)
    pictures = sorted(path.name for path in (won / "pictures").iterdir())
    assert pictures == ["t-seconds.png", "t-step.png"]
    assert all((won / "pictures" / name).read_bytes().startswith(b"\x89PNG") for name in pictures)


def test_the_tables_hold_every_run_and_its_data(won: Path) -> None:
    render(won)
    rows = list(csv.DictReader((won / "results.csv").open()))
    assert len(rows) == 3 * 3 * 2, "three optimizers, three seeds, two targets"
    one = next(row for row in rows if (row["optimizer"], row["seed"], row["target"]) == ("kfac", "2", "sgd"))
    assert (one["seconds_to_target"], one["cold_seconds_to_target"], one["steps_to_target"]) == ("4.0", "4.5", "133")
    assert one["data_digest"] == DATA["digest"] and one["data"] == "made up"
    missed = next(row for row in rows if (row["optimizer"], row["target"]) == ("adamw", "sgd"))
    assert missed["seconds_to_target"] == "inf"
    results = json.loads((won / "results.json").read_text())
    run = results["tasks"][0]["optimizers"][2]["runs"][0]
    assert run["hyper"] == HYPER["kfac"] and run["data"] == [DATA] and len(run["points"]) == 11


@pytest.mark.parametrize("which", ["plan", "run", "tuning", "targets"])
@pytest.mark.parametrize("content", ["", '{"job": ', "[]"])
def test_a_damaged_file_is_named(won: Path, which: str, content: str) -> None:
    path = {
        "plan": won / "plan.json",
        "run": run_path(won, "t", "race", "sgd", 2),
        "tuning": tuning_path(won, "t", "kfac"),
        "targets": target_path(won, "t"),
    }[which]
    path.write_text(content)
    with pytest.raises(Mistake, match=re.escape(str(path)) + " is damaged") as raised:
        collect(won)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("lost", ["job", "run", "final", "data"])
def test_a_run_without_a_part_is_damaged_too(won: Path, lost: str) -> None:
    path = run_path(won, "t", "race", "sgd", 2)
    content = json.loads(path.read_text())
    del content[lost]
    path.write_text(json.dumps(content))
    with pytest.raises(Mistake, match=re.escape(str(path))):
        collect(won)


def test_a_folder_without_a_run_is_explained(tmp_path: Path) -> None:
    with pytest.raises(Mistake, match=r"holds no kfac-bench run \(no plan.json\)"):
        collect(tmp_path)
