"""What held-out runs say: medians that count misses, ranges, and whether the tuned setting is better."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from kfac_triton.tuning.objective import Objective
from kfac_triton.tuning.trials import REACHED, Result

BETTER = 0.97  # times the defaults' median: what counts as better


def verdict(runs: Mapping[str, Sequence[Result]], objective: Objective) -> tuple[bool, str]:
    """Whether the tuned setting beats the defaults on the held-out seeds, and that in words, with the baselines."""
    tuned_runs, default_runs = runs.get("tuned", []), runs["defaults"]
    if not tuned_runs:
        return False, "nothing was measured on held-out seeds; the defaults are kept"
    ours, theirs = (median(result.value for result in results) for results in (tuned_runs, default_runs))
    wins = sum(a.value < b.value for a, b in zip(tuned_runs, default_runs, strict=True))
    margin = BETTER * theirs if theirs > 0 else theirs
    better = ours < margin and wins > len(tuned_runs) / 2
    told = f"tuned {_told(tuned_runs, objective)}, defaults {_told(default_runs, objective)}"
    rivals = [
        f"{name} {_told(results, objective)}" for name, results in runs.items() if name not in ("tuned", "defaults")
    ]
    ahead = [
        name
        for name, results in runs.items()
        if name not in ("tuned", "defaults") and median(r.value for r in results) < min(ours, theirs)
    ]
    text = (
        f"better than the defaults on {wins} of {len(tuned_runs)} held-out seeds"
        if better
        else (f"not better than the defaults (on {wins} of {len(tuned_runs)} held-out seeds), which are kept")
    )
    return better, f"{text}: {', '.join([told, *rivals])}" + (f"; {' and '.join(ahead)} did better" if ahead else "")


def summary(results: Sequence[Result], objective: Objective) -> dict[str, Any]:
    """Seeds in their order: seconds to the target (None: missed) and what each ended with; medians and ranges."""
    times = [result.value if result.ended == REACHED else None for result in results]
    ends = [result.points[-1][1] if result.points else math.inf for result in results]
    finals = [end if math.isfinite(end) else None for end in ends]
    judged = finals if objective.target is None else times
    values = [value for value in judged if value is not None]
    middle = median(math.inf if value is None else value for value in judged) if judged else math.inf
    return {
        "seconds_to_target": None if objective.target is None else times,
        "metric": finals,
        "median": middle if math.isfinite(middle) else None,
        "interval": [min(values), max(values)] if values else None,
        "reached": None if objective.target is None else len(values),
    }


def _told(results: Sequence[Result], objective: Objective) -> str:
    held = summary(results, objective)
    if objective.target is None:
        return "nothing" if held["median"] is None else f"{held['median']:.4g}"
    if held["median"] is None:
        return f"misses the target ({held['reached']} of {len(results)} reach it)"
    return f"{held['median']:.3g} s"
