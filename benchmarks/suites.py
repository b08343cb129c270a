"""Experiments that belong together: what they run, which of their curves share a picture, and what their paper says.

"paper": the autoencoders of Martens & Grosse (2015, section 13) with K-FAC block-diagonal and tridiagonal, with and
without momentum, on batches that stay and that grow, against SGD with Nesterov's momentum as tuned by Sutskever et al.
(2013), and AdamW.
"networks": convolutional, residual, recurrent and attending networks with K-FAC of a tuned and of an adaptive step
length, against SGD, AdamW and SOAP (Vyas et al. 2024) with the same budgets.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from kfac_triton.benchmarks.verdicts import time_to
from kfac_triton.tuning.errors import Mistake

Ratio = float  # of what one optimizer needs to what another needs, inf where that is nothing
SAVED = 0.9  # a smaller ratio counts as fewer updates; what lies above may be chance


@dataclass(frozen=True)
class Claim:
    """What a paper says of `one` against `other`, and whether (steps ratio, seconds ratio, step-cost ratio) agree."""

    one: str
    other: str
    text: str
    agrees: Callable[[Ratio, Ratio, Ratio], bool]


@dataclass(frozen=True)
class Suite:
    """Tasks, optimizers, seconds of a measured and of a tuning run; `pictures`: title -> whose curves it shows."""

    tasks: tuple[str, ...]
    optimizers: tuple[str, ...]
    seconds: float
    tuning_seconds: float
    pictures: dict[str, tuple[str, ...]] = field(default_factory=dict)
    claims: tuple[Claim, ...] = ()


SUITES = {
    "networks": Suite(
        tasks=("fashion-cnn", "resnet", "char-lstm", "char-gpt", "adding", "digits-vit"),
        optimizers=("sgd", "adamw", "soap", "kfac", "kfac-adaptive"),
        seconds=30.0,
        tuning_seconds=10.0,
    ),
    "paper": Suite(
        tasks=("mnist", "curves", "faces"),
        optimizers=(
            "nesterov",
            "adamw",
            "kfac-paper",
            "kfac-paper-no-momentum",
            "kfac-tridiagonal",
            "kfac-tridiagonal-no-momentum",
            "kfac-growing",
        ),
        seconds=120.0,
        tuning_seconds=40.0,
        pictures={
            "against first-order methods": ("nesterov", "adamw", "kfac-paper"),
            "approximation and momentum": (
                "kfac-paper",
                "kfac-paper-no-momentum",
                "kfac-tridiagonal",
                "kfac-tridiagonal-no-momentum",
            ),
            "batches": ("kfac-paper", "kfac-growing"),
        },
        claims=(
            Claim(
                "kfac-paper",
                "nesterov",
                "K-FAC needs far fewer updates and less time than SGD with momentum (a 14.7th of the updates and a "
                "3.8th of the seconds on such an autoencoder, says the documentation of their TensorFlow package)",
                lambda steps, seconds, cost: steps < 1 / 14.7 and seconds < 1 / 3.8,
            ),
            Claim(
                "kfac-tridiagonal",
                "kfac-paper",
                "the block-tridiagonal inverse needs fewer updates than the block-diagonal one, dearer ones",
                lambda steps, seconds, cost: steps < SAVED and cost > 1,
            ),
            Claim(
                "kfac-paper",
                "kfac-paper-no-momentum",
                "momentum saves updates",
                lambda steps, seconds, cost: steps < SAVED,
            ),
            Claim(
                "kfac-tridiagonal",
                "kfac-tridiagonal-no-momentum",
                "momentum saves updates with the tridiagonal inverse too",
                lambda steps, seconds, cost: steps < SAVED,
            ),
            Claim(
                "kfac-growing",
                "kfac-paper",
                "batches that grow make more of every update than small ones that stay",
                lambda steps, seconds, cost: steps < SAVED,
            ),
        ),
    ),
}


def find_suite(name: str) -> Suite:
    """Raises: Mistake: no suite of that name."""
    if name not in SUITES:
        raise Mistake(f"unknown suite {name!r}: one of {', '.join(SUITES)}")
    return SUITES[name]


def findings(suite: Suite, task: Mapping[str, Any]) -> list[str]:
    """A sentence for every claim of the suite of which both sides ran: the numbers here, and whether they agree."""
    entrants = {one["name"]: one for one in task["optimizers"] if one["runs"]}
    return [
        _finding(claim, entrants[claim.one], entrants[claim.other])
        for claim in suite.claims
        if claim.one in entrants and claim.other in entrants
    ]


def _finding(claim: Claim, one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """Compared at the worse of what the two end with in the median, which the better one reaches on its way."""
    ends = [side["summary"]["final_train"]["median"] for side in (one, other)]
    if not all(map(math.isfinite, ends)):
        return f"{claim.text}: {claim.one} or {claim.other} diverged, so nothing is compared."
    at = max(ends)
    own, others = time_to(one, at), time_to(other, at)
    seconds, steps = (_ratio(own[name], others[name]) for name in ("seconds", "steps"))
    cost = one["summary"]["ms_per_step"]["median"] / other["summary"]["ms_per_step"]["median"]
    verdict = "As" if claim.agrees(steps, seconds, cost) else "Not as"
    return (
        f"{verdict} in the paper ({claim.text}): to an error of {at:.4g}, {claim.one} needs {steps:.2f} times the "
        f"updates and {seconds:.2f} times the seconds of {claim.other}, at {cost:.2f} times the seconds an update; "
        f"they end at {ends[0]:.4g} and {ends[1]:.4g}."
    )


def _ratio(one: float, other: float) -> Ratio:
    return one / other if other > 0 else math.inf
