"""What a search tells while it runs."""

from __future__ import annotations

import io
import re
from types import SimpleNamespace

import optuna
import pytest
import torch
from rich.console import Console, Group
from torch import nn

from kfac_triton.tuning import Task, search, tune
from kfac_triton.tuning.objective import Objective
from kfac_triton.tuning.setting import DEFAULTS
from kfac_triton.tuning.trainer import Point, Run
from kfac_triton.tuning.trials import Result, Trials
from kfac_triton.tuning.view import View, listed, outcome, sparkline


@pytest.fixture
def view() -> View:
    made = View()
    made.console, made.live = Console(file=io.StringIO(), width=100, markup=False, emoji=False), None
    return made


def test_plain_lines_tell_results_and_stages_and_leave_names_alone(view):
    view.note("task.py:factory: searching kfac")
    view.watch("trial", (3, {**DEFAULTS, "lr": 0.5}))
    view.watch("point", (3, Point(0.5, 10, 2.0, None)))
    view.watch("told", Result({**DEFAULTS, "lr": 0.5}, 1.5, "reached", number=3))
    text = view.console.file.getvalue()
    assert "task.py:factory: searching kfac" in text
    assert "trial 3: target in 1.5 s (lr 0.5)" in text and text.count("\n") == 2


def test_the_table_has_counts_the_best_the_time_left_and_the_curve(view):
    view.watch("phase", ("searching", 10))
    view.watch("told", Result({"lr": 1.0}, 3.0, "reached", wall=4.0, number=0))
    view.watch("told", Result({"lr": 2.0}, 6.0, "pruned", "behind after 1.0 s", wall=2.0, number=1))
    view.watch("counts", {"done": 1, "running": 2, "pruned": 1})
    view.watch("trial", (2, {"lr": 3.0}))
    for value in (8.0, 4.0, 1.0):
        view.watch("point", (2, Point(0.0, 0, value, None)))
    console = Console(file=io.StringIO(), width=100)
    console.print(view._table())
    text = console.file.getvalue()
    assert "1 done, 2 running, 1 pruned; best 3" in text and "about 24 s left in this phase" in text
    assert "behind after 1.0 s" in text and "trial 2: lr 3" in text and "█▄▁ 1" in text


def test_with_a_timeout_the_time_left_is_its_own():
    now = [7.0]
    view = View(timeout=50.0, clock=lambda: now[0])
    now[0] = 8.4
    view.watch("told", Result({"lr": 1.0}, 3.0, "reached", wall=4.0))
    console = Console(file=io.StringIO(), width=100)
    console.print(view._table())
    assert "1 s spent, 49 s left" in console.file.getvalue()


def test_a_setting_of_kfac_is_told_by_what_differs_from_the_defaults():
    assert listed(DEFAULTS) == "the defaults"
    assert listed({**DEFAULTS, "fisher": "exact"}) == "fisher exact"
    assert listed({"lr": 0.01234, "schedule": "linear"}) == "lr 0.0123, schedule linear"


def test_outcomes_in_words():
    assert outcome(Result({}, 1.0, "done", steps=7, points=[(0.0, 2.0), (1.0, 1.0)])) == "1 after 7 steps"
    assert outcome(Result({}, 1.0, "failed", "out of memory with lr=1")) == "failed: out of memory with lr=1"


def test_a_curve_in_a_line():
    assert sparkline([]) == sparkline([float("nan")]) == ""
    assert sparkline([1.0, 1.0]) == "▁▁ 1"
    assert sparkline([2.0, float("inf"), 1.0]) == "█▁ 1"


# ---------------------------------------------------------------------------------------------------- a whole tuning


class Frames(View):
    """A view on a fake terminal that keeps every table that it drew, as text, with the phase that it was drawn in."""

    def __init__(self) -> None:
        self.drawn: list[str] = []
        terminal = Console(file=io.StringIO(), force_terminal=True, width=300, markup=False, emoji=False)
        super().__init__(console=terminal, clock=lambda: 0.0)

    def _table(self) -> Group:
        table, paper = super()._table(), Console(file=io.StringIO(), width=300)
        paper.print(table)
        self.drawn.append(paper.file.getvalue())
        return table

    def of(self, phase: str) -> str:
        return "\n".join(text for text in self.drawn if text.startswith(phase))


def test_the_table_follows_every_phase_and_shows_what_runs_there(monkeypatch):
    def train(task, entrant, setting, seed, budget, *, warm):
        run = Run(ended="done", steps=3, seconds=budget.seconds)
        for place in range(4):
            run.points.append(Point(place / 3 * budget.seconds, place, 4.0 - place, None))
            budget.stop(run.points[-1])
        return run

    monkeypatch.setattr(search, "train", train)
    task = Task(
        lambda: nn.Linear(2, 2),
        lambda seed: iter([(torch.ones(4, 2), torch.zeros(4).long())] * 3),
        nn.functional.cross_entropy,
        "categorical",
        name="made up",
    )
    view = Frames()
    with view:
        tune(
            task, trials=3, seconds=1.0, seeds=2, baselines=("sgd",), prune="none", device="cpu", target="defaults",
            compile=False, note=view.note, watch=view.watch,
        )  # fmt: skip
    phases = list(dict.fromkeys(text.splitlines()[0].strip() for text in view.drawn))
    assert phases == [
        "loading made up and trying a step of it",
        "measuring the target, which the defaults end with",
        "searching kfac: 3 trials of at most 1 s",
        "searching sgd: 3 trials of at most 1 s",
        "measuring kfac's best 3 on 2 other seeds",
        "measuring sgd's best 3 on 2 other seeds",
        "measuring on held-out seed 1 of 2",
        "measuring on held-out seed 2 of 2",
    ]
    shown = {
        phases[1]: ("defaults, seed 2: the defaults", "2 of 3 runs done"),
        phases[2]: ("trial 2: ", "2 done, 1 running, 0 pruned"),
        phases[3]: ("trial 1: lr", "1 done, 1 running, 0 pruned"),
        phases[4]: ("kfac, leader 3, seed 2: ", "5 of 6 runs done"),
        phases[5]: ("sgd, leader 1, seed 1: lr", "1 of 6 runs done"),
        phases[6]: ("defaults: the defaults", "tuned: ", "sgd: lr", "2 of 3 runs done"),
        phases[7]: ("defaults: the defaults", "3 of 3 runs done"),
    }
    for phase, texts in shown.items():
        assert all(text in view.of(phase) for text in texts), phase
        assert re.search("[▁▂▃▄▅▆▇█]{3,4} [12]", view.of(phase)), "the curve of what runs"


def test_while_others_work_on_the_last_trials_their_number_is_shown(monkeypatch):
    told, view = [], Frames()
    study = optuna.create_study()
    other = Trials(study, 1)
    last = other.claim(lambda number: optuna.samplers.RandomSampler(seed=number))

    def waits(seconds: float) -> None:
        told.append(view.drawn[-1])
        if len(told) == 2:
            other.tell(last, Result({}, 1.0, "done", points=[(0.0, 1.0)]))

    monkeypatch.setattr(search, "time", SimpleNamespace(sleep=waits, monotonic=lambda: 0.0))
    runs = search.Runs(None, Objective(1.0), 0, torch.device("cpu"))
    view.watch("phase", ("searching", 1))
    assert search.Search(runs, None, None, Trials(study, 1), "none", watch=view.watch).go()
    assert len(told) == 2 and all("0 done, 1 running, 0 pruned" in text for text in told)
