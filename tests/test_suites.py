"""The paper's experiments: the suite's plan, what its findings say of given curves, and its pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from kfac_triton.benchmarks import cli, report
from kfac_triton.benchmarks.plan import Plan, Request, derive, write_plan
from kfac_triton.benchmarks.race import run_path, target_path, tuning_path
from kfac_triton.benchmarks.results import collect
from kfac_triton.benchmarks.suites import SUITES, findings
from kfac_triton.tuning.baselines import ENTRANTS
from kfac_triton.tuning.errors import Mistake
from kfac_triton.tuning.problems import BUILT_IN
from kfac_triton.tuning.store import read_json, write_json

PAPER = SUITES["paper"]
SEEDS = (1, 2, 3)


def points(rate: float, ms: float, steps: int) -> list[dict[str, Any]]:
    """100 exp(-rate step) at every tenth step."""
    return [
        {"seconds": step * ms / 1e3, "step": step, "train": 100 * math.exp(-rate * step), "test": None}
        for step in range(0, steps + 1, 10)
    ]


def optimizer(name: str, curves: Sequence[list[dict[str, Any]]], ms: float) -> dict[str, Any]:
    ends = sorted(curve[-1]["train"] for curve in curves)
    summary = {
        "final_train": {"median": median(ends), "low": ends[0], "high": ends[-1]},
        "ms_per_step": {"median": ms, "low": ms, "high": ms},
        "seconds": {"median": curves[0][-1]["seconds"]},
        "steps": {"median": curves[0][-1]["step"]},
    }
    return {"name": name, "summary": summary, "runs": [{"points": curve} for curve in curves]}


def test_the_suite_is_made_of_what_there_is() -> None:
    assert set(PAPER.tasks) <= set(BUILT_IN)
    assert set(PAPER.optimizers) <= set(ENTRANTS)
    assert {name for names in PAPER.pictures.values() for name in names} == set(PAPER.optimizers)
    assert {side for claim in PAPER.claims for side in (claim.one, claim.other)} <= set(PAPER.optimizers)


def test_a_finding_compares_at_the_worse_end() -> None:
    """K-FAC falls 40 times as fast an update, ten times as dear; so it needs a 40th of the updates, a quarter of the
    seconds."""
    sgd = optimizer("nesterov", [points(0.001, 1.0, 2000)] * 3, 1.0)
    kfac = optimizer("kfac-paper", [points(0.04, 10.0, 200)] * 3, 10.0)
    (said,) = findings(PAPER, {"optimizers": [sgd, kfac]})
    assert said.startswith("As in the paper")
    assert (
        "to an error of 13.53, kfac-paper needs 0.03 times the updates and 0.25 times the seconds of nesterov" in said
    )
    assert "at 10.00 times the seconds an update" in said


def test_what_the_paper_says_otherwise_is_said() -> None:
    block = optimizer("kfac-paper", [points(0.05, 10.0, 100)] * 3, 10.0)
    slow = optimizer("kfac-tridiagonal", [points(0.04, 20.0, 50)] * 3, 20.0)
    (said,) = findings(PAPER, {"optimizers": [block, slow]})
    assert said.startswith("Not as in the paper")
    assert "needs 1.25 times the updates and 2.50 times the seconds" in said
    fast = optimizer("kfac-tridiagonal", [points(0.06, 20.0, 50)] * 3, 20.0)
    (said,) = findings(PAPER, {"optimizers": [block, fast]})
    assert said.startswith("As in the paper")


def test_who_ends_there_in_the_median_needs_no_more_than_its_whole_run() -> None:
    """Of two runs one ends above their median, and so never reaches it."""
    sgd = optimizer("nesterov", [points(0.001, 1.0, 2000), points(0.0011, 1.0, 2000)], 1.0)
    kfac = optimizer("kfac-paper", [points(0.04, 10.0, 200)] * 2, 10.0)
    (said,) = findings(PAPER, {"optimizers": [sgd, kfac]})
    assert "needs 0.03 times the updates and 0.30 times the seconds of nesterov" in said


def test_who_ends_where_it_began_needs_nothing() -> None:
    still = optimizer("kfac-paper", [[{"seconds": 0.0, "step": 0, "train": 9.0, "test": None}]] * 3, 10.0)
    moved = optimizer("kfac-growing", [points(0.05, 10.0, 100)] * 3, 10.0)
    (said,) = findings(PAPER, {"optimizers": [still, moved]})
    assert said.startswith("Not as in the paper") and "needs inf times the updates" in said


def test_a_divergence_is_not_compared() -> None:
    block = optimizer("kfac-paper", [points(0.05, 10.0, 100)] * 3, 10.0)
    lost = optimizer("kfac-growing", [points(0.05, 10.0, 100)] * 3, 10.0)
    lost["summary"]["final_train"]["median"] = math.inf
    assert findings(PAPER, {"optimizers": [block, lost]}) == [
        f"{PAPER.claims[-1].text}: kfac-growing or kfac-paper diverged, so nothing is compared."
    ]


def test_nobody_there_no_finding() -> None:
    assert findings(PAPER, {"optimizers": [{"name": "kfac-paper", "runs": []}]}) == []


def test_baselines_run_once_where_no_challenger_is_tuned() -> None:
    untuned = derive(Request(("curves",), ("nesterov", "kfac-paper"), seconds=120.0, tuning_seconds=40.0))
    tuned = derive(Request(("curves",), ("nesterov", "kfac")))
    alone = derive(Request(("curves",), ("nesterov",)))
    assert (untuned.targets_first, untuned.measured, untuned.searched) == (False, 6, 12)
    assert (tuned.targets_first, tuned.measured) == (True, 9)
    assert (alone.targets_first, alone.reported_stage, alone.measured) == (True, "target", 3)
    assert (untuned.seconds_a_trial, tuned.seconds_a_trial) == (40.0, 60.0)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """The requests that the command line makes; none is run."""
    requests: list[Request] = []
    monkeypatch.setattr(cli, "_race", lambda request, *_: requests.append(request))
    return requests


def test_the_suite_on_the_command_line(asked: list[Request]) -> None:
    assert cli.main(["run", "--suite", "paper"]) == 0
    assert cli.main(["run", "curves", "--suite", "paper", "--optimizers", "nesterov,kfac-paper", "--seconds", "9"]) == 0
    assert cli.main(["run", "--suite", "paper", "--budget", "3600"]) == 0
    whole, part, budgeted = asked
    assert (whole.tasks, whole.optimizers, whole.suite) == (PAPER.tasks, PAPER.optimizers, "paper")
    assert (whole.seconds, whole.tuning_seconds, whole.seeds, whole.trials) == (120.0, 40.0, 3, None)
    assert (part.tasks, part.optimizers) == (("curves",), ("nesterov", "kfac-paper"))
    assert (part.seconds, part.tuning_seconds) == (9.0, None)
    assert (budgeted.seconds, budgeted.tuning_seconds, budgeted.budget) == (None, None, 3600.0)


def test_an_unknown_suite_is_refused(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "--suite", "thesis"]) == 2
    assert "unknown suite 'thesis': one of networks, paper" in capfd.readouterr().err


def test_seconds_of_tuning_need_those_of_a_run(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "digits", "--tuning-seconds", "3"]) == 2
    assert "--tuning-seconds 3: give --seconds too" in capfd.readouterr().err


def test_the_report_of_a_suite(tmp_path: Path) -> None:
    """Findings beside verdicts, and a picture of each group on each axis."""
    names = ("nesterov", "kfac-paper", "kfac-growing")
    plan = Plan(("curves",), names, SEEDS, trials=1, seconds=2.0, tuning_seconds=1.0, suite="paper")
    write_plan(tmp_path, Request(("curves",), names, suite="paper"), plan)
    write_json(target_path(tmp_path, "curves"), {"targets": {"nesterov": 13.53}, "set": "2026-01-01T00:00:00+00:00"})
    write_json(
        tuning_path(tmp_path, "curves", "nesterov"),
        {"best": {"lr": 0.01}, "trials": [], "space": {"lr": "0.1 to 1"}, "widened": {}, "edges": {}, "seconds": 1.0},
    )
    for name, rate, ms in (("nesterov", 0.001, 1.0), ("kfac-paper", 0.04, 10.0), ("kfac-growing", 0.05, 10.0)):
        for seed in SEEDS:
            run = {
                "points": points(rate, ms, int(2000 / ms)), "ended": "done", "reason": "", "seconds": 2.0,
                "steps": int(2000 / ms), "ms_per_step": ms, "median_step_ms": ms, "compile_seconds": 0.0,
            }  # fmt: skip
            job = {"task": "curves", "optimizer": name, "hyper": {}, "seed": seed, "stage": "race"}
            record = {
                "job": job, "run": run, "final": run["points"][-1]["train"], "peak_memory": 1, "own_process": True,
                "metric": "error", "data": [], "environment": {"cpu": "", "device": "", "torch": ""},
            }  # fmt: skip
            write_json(run_path(tmp_path, "curves", "race", name, seed), record)
    results = report.make(tmp_path)
    (task,) = results["tasks"]
    assert [finding.split(" the paper")[0] for finding in task["findings"]] == ["As in", "As in"]
    pictures = sorted(path.name for path in (tmp_path / "pictures").iterdir())
    groups = ("against_first-order_methods", "approximation_and_momentum", "batches")
    assert pictures == sorted(f"curves-{group}-{axis}.png" for group in groups for axis in ("seconds", "step"))
    page = (tmp_path / "index.html").read_text()
    assert task["findings"][0].replace("'", "&#39;") in page
    assert "1 settings of 1 s searched" in page and "no challenger was tuned" in page
    assert read_json(tmp_path / "results.json")["tasks"][0]["findings"] == task["findings"]
    assert collect(tmp_path)["targets_first"] is False


def test_a_suite_that_no_longer_exists_is_named(tmp_path: Path) -> None:
    plan = Plan(("curves",), ("nesterov",), SEEDS, trials=1, seconds=2.0, suite="lost")
    write_plan(tmp_path, Request(("curves",), ("nesterov",)), plan)
    with pytest.raises(Mistake, match="unknown suite 'lost'"):
        report.make(tmp_path)
