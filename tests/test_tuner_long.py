"""What kfac-tune must reach, on real tasks, with the budget of its users: 30 trials of a few seconds on two cores."""

from __future__ import annotations

import math
import os
from statistics import median

import pytest

from kfac_triton.tuning import tune
from kfac_triton.tuning.errors import Mistake

pytestmark = pytest.mark.slow

# A target is what the defaults end with; that of `digits`, whose loss they take down to rounding, is a round number.
TASKS = {
    "digits": (6.0, 1e-3),
    "fashion-cnn": (6.0, "defaults"),
    "mnist": (8.0, "defaults"),
    "curves": (10.0, "defaults"),
}


def tuned(name: str, **options) -> dict:
    if name == "mnist" and not os.environ.get("KFAC_DATA"):
        pytest.skip("needs MNIST in $KFAC_DATA")
    try:
        return tune(name, device="cpu", **options).content
    except Mistake as mistake:
        if "download" in str(mistake):
            pytest.skip(str(mistake))
        raise


def middle(content: dict, name: str) -> float:
    value = content["evidence"]["held_out"][name]["median"]
    return math.inf if value is None else value


@pytest.mark.parametrize("name", TASKS)
def test_the_tuned_setting_beats_the_defaults_and_the_tuner_costs_next_to_nothing(name, tmp_path):
    """1.3 times faster to the target on five held-out seeds; or a search four times as long finds nothing better."""
    seconds, target = TASKS[name]
    asked = {"seconds": seconds, "target": target, "storage": str(tmp_path / "t.journal"), "baselines": ()}
    content = tuned(name, trials=30, **asked)
    spent = content["evidence"]["seconds"]
    print(f"{name}: {content['verdict']}\n{spent}\n{content['arguments']}")
    assert spent["tuner"] < 0.02 * spent["command"]
    if not middle(content, "defaults") >= 1.3 * middle(content, "tuned"):
        more = tuned(name, trials=120, **asked)
        print(f"{name}, 120 trials: {more['verdict']}")
        assert not middle(more, "defaults") >= 1.3 * middle(more, "tuned")


def test_pruning_saves_half_of_the_seconds_at_no_worse_result(tmp_path):
    found: dict[str, list[tuple[float, float]]] = {"auto": [], "none": []}
    for seed in range(3):
        for how, rows in found.items():
            content = tuned(
                "fashion-cnn", trials=30, seconds=4.0, target=0.4, seed=seed, prune=how, baselines=(),
                storage=str(tmp_path / f"{seed}{how}.journal"),
            )  # fmt: skip
            rows.append((content["evidence"]["searches"]["kfac"]["seconds"], middle(content, "tuned")))
            print(f"seed {seed}, pruner {how}: {rows[-1][0]:.1f} s of search, {rows[-1][1]:.3g} s to the target")
    seconds, results = ({how: [row[column] for row in rows] for how, rows in found.items()} for column in (0, 1))
    assert sum(seconds["auto"]) < 0.5 * sum(seconds["none"])
    assert median(results["auto"]) < 1.1 * median(results["none"])
