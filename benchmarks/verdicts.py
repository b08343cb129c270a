"""What a race showed, in sentences computed from its numbers, good or bad for whoever it is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

FEW_SEEDS = 3


def verdicts(task: dict[str, Any], seeds: int) -> dict[str, list[str]]:
    """`verdicts`: who reaches which target in which share of the time and steps; `warnings`: what weakens them."""
    entrants = {one["name"]: one for one in task["optimizers"] if one["runs"]}
    said = []
    if not task["targets"] and task["targets_set"]:
        said.append("No target: no tuned baseline among the optimizers came to an end, and the task names none.")
    for target, value in task["targets"].items():
        said += _target(target, value, entrants)
    if entrants:
        said.append(_final(entrants))
    return {"verdicts": said, "warnings": _warnings(task, entrants, seeds)}


def _target(target: str, value: float, entrants: dict[str, Any]) -> list[str]:
    """One sentence for each optimizer, and who is fastest."""
    reference = entrants.get(target)
    what = f"what tuned {target} ends with ({value:.4g})" if reference else f"the task's target ({value:.4g})"
    said = []
    for name, one in entrants.items():
        if name != target:
            said.append(_against(name, one["summary"]["targets"][target], what, target, value, reference))
    ranked = sorted(entrants, key=lambda name: entrants[name]["summary"]["targets"][target]["seconds"]["median"])
    fastest = entrants[ranked[0]]["summary"]["targets"][target]["seconds"]["median"]
    if not math.isfinite(fastest):
        said.append(f"In the median nobody reaches {what}.")
    elif ranked[0] == target:
        said.append(f"{target} wins: nobody reaches {what} sooner than {target} itself ({fastest:.3g} s).")
    else:
        said.append(f"{ranked[0]} is the first to reach {what}, after {fastest:.3g} s in the median.")
    return said


def _against(
    name: str, reached: dict[str, Any], what: str, target: str, value: float, reference: dict[str, Any] | None
) -> str:
    seconds, steps = reached["seconds"]["median"], reached["steps"]["median"]
    count = f"{reached['reached']} of {reached['runs']} runs reach it"
    if not math.isfinite(seconds):
        return f"{name} does not reach {what} in the median: {count}."
    text = f"{name} reaches {what} in {seconds:.3g} s and {steps:.0f} steps"
    if reference:
        own = time_to(reference, value)
        share, step_share = seconds / own["seconds"], steps / max(own["steps"], 1)
        verb = "less" if share < 1 else "more"
        text += (
            f", {share:.2f} of {target}'s {own['seconds']:.3g} s ({verb} time) and {step_share:.2f} of its "
            f"{own['steps']:.0f} steps"
        )
    return f"{text}; cold, compilation included, {reached['cold_seconds']['median']:.3g} s; {count}."


def time_to(entrant: Mapping[str, Any], error: float) -> dict[str, float]:
    """Median seconds and steps of an entrant to an error that it ends at: its whole run where the median misses."""
    reached = [first_below(run["points"], error) for run in entrant["runs"]]
    seconds, steps = (median(one[i] for one in reached) for i in (0, 1))
    if math.isfinite(seconds):
        return {"seconds": seconds, "steps": steps}
    return {name: entrant["summary"][name]["median"] for name in ("seconds", "steps")}


def first_below(points: Sequence[Mapping[str, Any]], error: float) -> tuple[float, float]:
    """Seconds and steps at the first evaluation at or below `error`; inf, inf where there is none."""
    for point in points:
        if point["train"] is not None and point["train"] <= error:
            return point["seconds"], point["step"]
    return math.inf, math.inf


def _final(entrants: dict[str, Any]) -> str:
    finals = {name: one["summary"]["final_train"]["median"] for name, one in entrants.items()}
    ranked = sorted(finals, key=lambda name: finals[name])
    listed = ", ".join(f"{name} {_number(finals[name])}" for name in ranked)
    if not math.isfinite(finals[ranked[0]]):
        return "Every optimizer diverged in the median."
    return f"{ranked[0]} ends lowest; medians at the end of the run: {listed}."


def _number(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else "diverged"


def _warnings(task: dict[str, Any], entrants: dict[str, Any], seeds: int) -> list[str]:
    found = []
    if seeds < FEW_SEEDS:
        found.append(f"Only {seeds} seed(s): a median of so few says little.")
    for name, one in entrants.items():
        for parameter, side in ((one["tuning"] or {}).get("edges") or {}).items():
            found.append(
                f"{name}: the best {parameter} sits at the {side} edge of its range, so it may not be at its best."
            )
        lost = sum(run["ended"] == "diverged" for run in one["runs"])
        if lost:
            found.append(f"{name}: {lost} of {len(one['runs'])} runs diverged.")
        if len(one["runs"]) < seeds:
            found.append(f"{name}: {seeds - len(one['runs'])} of {seeds} runs are missing.")
    if any(not run["own_process"] for one in entrants.values() for run in one["runs"]):
        found.append("Runs shared one process: peak memory is that of the whole command, not of an optimizer.")
    if any("generated" in str(part.get("source")) for part in task["data"]):
        found.append("The data is generated, a stand-in for the published set.")
    return found
