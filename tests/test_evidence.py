"""Verdicts and summaries of held-out runs whose times are known."""

from __future__ import annotations

import math
from dataclasses import replace

from kfac_triton.tuning.evidence import summary, verdict
from kfac_triton.tuning.objective import Objective
from kfac_triton.tuning.trials import Result


def runs(*values: float | None) -> list[Result]:
    """Results whose time to the target is a value, None for a miss close to it."""
    return [
        Result({}, 10.5 if v is None else v, "done" if v is None else "reached", points=[(0.0, 9.0), (5.0, 1.0)])
        for v in values
    ]


TIMED = Objective(10.0, target=1.0)


def test_better_needs_a_better_median_and_most_of_the_seeds():
    better, why = verdict({"defaults": runs(5, 6, 7), "tuned": runs(3, 3.5, 8)}, TIMED)
    assert better and why == "better than the defaults on 2 of 3 held-out seeds: tuned 3.5 s, defaults 6 s"
    better, why = verdict({"defaults": runs(5, 6, 7), "tuned": runs(4.9, 5.9, 6.9)}, TIMED)
    assert not better and "not better than the defaults (on 3 of 3 held-out seeds), which are kept" in why
    better, _ = verdict({"defaults": runs(5, 6, 100), "tuned": runs(5.1, 5.2, 99)}, TIMED)
    assert better
    better, _ = verdict({"defaults": runs(3, 5, 9), "tuned": runs(3.5, 4.5, 9.5)}, TIMED)
    assert not better, "one of three"
    assert not verdict({"defaults": runs(3), "tuned": []}, TIMED)[0]
    assert not verdict({"defaults": runs(3)}, TIMED)[0]


def test_the_verdict_names_baselines_that_did_better_and_misses():
    found = {"defaults": runs(None, None, 9), "tuned": runs(3, 3, None), "sgd": runs(1, 2, 3), "adamw": runs(4, 4, 4)}
    better, why = verdict(found, TIMED)
    assert better
    assert "tuned 3 s, defaults misses the target (1 of 3 reach it), sgd 2 s, adamw 4 s; sgd did better" in why


def test_a_median_counts_misses_and_a_range_does_not():
    row = summary(runs(2, None, 3), TIMED)
    assert row["seconds_to_target"] == [2, None, 3] and row["median"] == 3 and row["interval"] == [2, 3]
    assert row["reached"] == 2 and summary(runs(None, None, 3), TIMED)["median"] is None
    free = summary([replace(one, ended="done") for one in runs(2, 3)], Objective(10.0))
    ends = zip(runs(2, 3), (math.inf, math.nan), strict=True)
    lost = [replace(one, ended="diverged", points=[(0.0, 9.0), (5.0, end)]) for one, end in ends]
    row = summary([*lost, *runs(4)], Objective(10.0))
    assert row["metric"] == [None, None, 1.0] and row["median"] is None and row["interval"] == [1.0, 1.0]
    assert free["median"] == 1.0 and free["metric"] == [1.0, 1.0] and free["seconds_to_target"] is None
