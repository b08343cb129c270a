"""What a search tells while it runs."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from kfac_triton.tuning.setting import DEFAULTS
from kfac_triton.tuning.trainer import Point
from kfac_triton.tuning.trials import Result
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
    view.trials = 10
    view.note("searching")
    view.watch("told", Result({"lr": 1.0}, 3.0, "reached", wall=4.0, number=0))
    view.watch("told", Result({"lr": 2.0}, 6.0, "pruned", "behind after 1.0 s", wall=2.0, number=1))
    view.watch("counts", {"done": 1, "running": 2, "pruned": 1})
    view.watch("trial", (2, {"lr": 3.0}))
    for value in (8.0, 4.0, 1.0):
        view.watch("point", (2, Point(0.0, 0, value, None)))
    console = Console(file=io.StringIO(), width=100)
    console.print(view._table())
    text = console.file.getvalue()
    assert "1 done, 2 running, 1 pruned; best 3" in text and "about 24 s left in this search" in text
    assert "behind after 1.0 s" in text and "trial 2: lr 3" in text and "█▄▁ 1" in text


def test_with_a_timeout_the_time_left_is_its_own():
    view = View(timeout=50.0)
    view.watch("told", Result({"lr": 1.0}, 3.0, "reached", wall=4.0))
    console = Console(file=io.StringIO(), width=100)
    console.print(view._table())
    assert "50 s left" in console.file.getvalue() or "49 s left" in console.file.getvalue()


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
