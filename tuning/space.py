"""What a search may choose, declared before any run: one space for each optimizer, the same for every task.

Each space names the settings that a search begins with, known reasonable points, so that it never ends below them. All
share the schedule family. A range is a number's; when the winner of the first part of a search sits at its edge,
`Space.widened` moves that edge.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from kfac_triton.tuning.errors import Mistake
from kfac_triton.tuning.schedules import SHAPES

EDGE = 0.05  # share of a range, on its own scale, that counts as its edge
STEP_BEYOND = 0.15  # share of the old range by which the first setting after a widening lies beyond the old edge
Side = Literal["low", "high"]

if TYPE_CHECKING:
    from optuna.trial import Trial


@dataclass(frozen=True)
class Range:
    """A number in [low, high].

    `log` draws its logarithm evenly, `below_one` the logarithm of 1 - x (a momentum, a decay). `floor` and `ceiling`
    are what a widening never passes.
    """

    low: float
    high: float
    log: bool = True
    below_one: bool = False
    floor: float = 0.0
    ceiling: float = math.inf

    def position(self, value: float) -> float:
        """Where `value` lies in the range: 0 at low, 1 at high, on the scale it is drawn on."""
        low, high, at = (self._scale(x) for x in (self.low, self.high, value))
        return (at - low) / (high - low)

    def value(self, position: float) -> float:
        low, high = self._scale(self.low), self._scale(self.high)
        at = low + position * (high - low)
        if self.below_one:
            return 1 - math.exp(-at)
        return math.exp(at) if self.log else at

    def edge(self, value: float) -> Side | None:
        position = self.position(value)
        return "low" if position <= EDGE else "high" if position >= 1 - EDGE else None

    def widened(self, side: Side) -> Range:
        """Half as long again on `side`, at most to the floor or the ceiling."""
        if side == "low":
            return replace(self, low=max(self.value(-0.5), self.floor))
        return replace(self, high=min(self.value(1.5), self.ceiling))

    def beyond(self, side: Side) -> float:
        """A value a little past the edge, clipped to the floor and the ceiling."""
        past = self.value(-STEP_BEYOND if side == "low" else 1 + STEP_BEYOND)
        return min(max(past, self.floor), self.ceiling)

    def nearest(self, value: Any) -> float:
        """`value` clipped to the range; its middle for None."""
        return self.value(0.5) if value is None else min(max(float(value), self.low), self.high)

    def suggest(self, trial: Trial, name: str) -> float:
        if self.below_one:  # Optuna has no scale for this: the distance to one is drawn
            return 1 - trial.suggest_float(self.name_drawn(name), 1 - self.high, 1 - self.low, log=True)
        return trial.suggest_float(name, self.low, self.high, log=self.log)

    def name_drawn(self, name: str) -> str:
        """What Optuna knows the parameter `name` by."""
        return f"1-{name}" if self.below_one else name

    def drawn(self, value: float) -> float:
        """`value` as Optuna knows it, inside the bounds that `suggest` gives."""
        if not self.below_one:
            return value
        return min(max(1 - value, 1 - self.high), 1 - self.low)

    def describe(self) -> str:
        scale = "log of 1 - x" if self.below_one else "log" if self.log else "linear"
        return f"{self.low:g} to {self.high:g} ({scale})"

    def _scale(self, x: float) -> float:
        if self.below_one:
            return -math.log(1 - x)
        return math.log(x) if self.log else x


@dataclass(frozen=True)
class Choice:
    """One of a few values."""

    values: tuple[Any, ...]

    def nearest(self, value: Any) -> Any:
        """`value` if it is one of these; else the nearest number, or the first."""
        numbers = [v for v in (value, *self.values) if isinstance(v, (int, float)) and not isinstance(v, bool)]
        if value in self.values or len(numbers) <= len(self.values):
            return value if value in self.values else self.values[0]
        return min(self.values, key=lambda one: abs(one - value))

    def suggest(self, trial: Trial, name: str) -> Any:
        return trial.suggest_categorical(name, self.values)

    def name_drawn(self, name: str) -> str:
        return name

    def drawn(self, value: Any) -> Any:
        return value

    def describe(self) -> str:
        return "one of " + ", ".join(str(value) for value in self.values)


@dataclass(frozen=True)
class Space:
    """Names and what each may be; `first` is the setting that is tried first, then `others` in their order.

    `conditions`: {name: (other, values)} for a parameter that counts only where `other`, named before it, has one of
    these values.
    """

    parameters: dict[str, Range | Choice]
    first: dict[str, Any]
    conditions: Mapping[str, tuple[str, tuple[Any, ...]]] = field(default_factory=dict)
    others: tuple[dict[str, Any], ...] = ()

    @property
    def starts(self) -> tuple[dict[str, Any], ...]:
        return self.first, *self.others

    def counts(self, name: str, setting: Mapping[str, Any]) -> bool:
        """Whether `setting`, as far as it is known, leaves the parameter a meaning."""
        other, values = self.conditions.get(name, ("", ()))
        return not other or setting.get(other) in values

    def suggest(self, trial: Trial) -> dict[str, Any]:
        """A setting, as the trial's sampler has it."""
        setting: dict[str, Any] = {}
        for name, parameter in self.parameters.items():
            if self.counts(name, setting):
                setting[name] = parameter.suggest(trial, name)
        return setting

    def drawn(self, setting: Mapping[str, Any]) -> dict[str, Any]:
        """`setting` in the names and scales that `suggest` draws."""
        known = {name: self.parameters[name] for name in setting}
        return {known[name].name_drawn(name): known[name].drawn(value) for name, value in setting.items()}

    def moved_into(self, setting: Mapping[str, Any], otherwise: Mapping[str, Any]) -> dict[str, Any]:
        """The nearest setting that the space has; what `setting` lacks comes from `otherwise`."""
        moved: dict[str, Any] = {}
        for name, parameter in self.parameters.items():
            if self.counts(name, moved):
                moved[name] = parameter.nearest(setting.get(name, otherwise.get(name)))
        return moved

    def edges(self, setting: dict[str, Any]) -> dict[str, Side]:
        """The ranges at whose edge `setting` sits, an edge at a floor or a ceiling left out: nothing lies beyond."""
        found: dict[str, Side] = {}
        for name, parameter in self.parameters.items():
            side = parameter.edge(setting[name]) if isinstance(parameter, Range) and name in setting else None
            if isinstance(parameter, Range) and side is not None and parameter.beyond(side) != getattr(parameter, side):
                found[name] = side
        return found

    def widened(self, edges: dict[str, Side]) -> Space:
        parameters = dict(self.parameters)
        for name, side in edges.items():
            parameter = parameters[name]
            if isinstance(parameter, Range):
                parameters[name] = parameter.widened(side)
        return replace(self, parameters=parameters)

    def beyond(self, setting: dict[str, Any], edges: dict[str, Side]) -> dict[str, Any]:
        """`setting` with every number at an edge moved a little past it."""
        moved = dict(setting)
        for name, side in edges.items():
            parameter = self.parameters[name]
            if isinstance(parameter, Range):
                moved[name] = parameter.beyond(side)
        return moved

    def describe(self) -> dict[str, str]:
        return {name: parameter.describe() for name, parameter in self.parameters.items()}


SCHEDULE: dict[str, Range | Choice] = {"schedule": Choice(SHAPES), "warmup": Choice((0.0, 0.05))}
SCHEDULE_FIRST = {"schedule": "linear", "warmup": 0.05}
MOMENTUM = Range(0.8, 0.99, below_one=True, ceiling=0.999)
KFAC_MOMENTUM = Range(0.3, 0.99, below_one=True, ceiling=0.999)  # long natural steps want a shorter memory
# deep autoencoders ask for little damping and much momentum, most other networks for the opposite and a damping that
# falls far; recurrent ones take a wide trust region
BRISK = {"lr": 0.3, "damping": 0.03, "damping_end": 0.01, "momentum": 0.5, "kl_clip": 0.007, "kl_annealing": True}
WIDE = {**BRISK, "damping": 0.01, "damping_end": 0.03, "kl_clip": 0.1}
CAPPED = {"lr": 1e-2, "damping": 1e-3, "damping_end": 0.3, "momentum": 0.9, "kl_clip": 1e-2, "kl_annealing": True}

SGD_FIRST = {"lr": 3e-3, "momentum": 0.9, "weight_decay": 0.0, **SCHEDULE_FIRST}
NESTEROV_FIRST = {"lr": 3e-3, "mu_max": 0.99, **SCHEDULE_FIRST}
ADAMW_FIRST = {"lr": 2e-3, "beta1": 0.9, "beta2": 0.999, "weight_decay": 0.0, **SCHEDULE_FIRST}
SOAP_FIRST = {
    "lr": 3e-3, "beta1": 0.95, "beta2": 0.95, "precondition_frequency": 10, "weight_decay": 0.0, **SCHEDULE_FIRST,
}  # fmt: skip

SPACES = {
    "sgd": Space(
        {"lr": Range(1e-4, 1.0), "momentum": MOMENTUM, "weight_decay": Choice((0.0, 1e-5)), **SCHEDULE},
        SGD_FIRST,
        others=({**SGD_FIRST, "lr": 0.1},),
    ),
    "nesterov": Space(
        {"lr": Range(1e-4, 1.0), "mu_max": Choice((0.999, 0.995, 0.99, 0.9, 0.0)), **SCHEDULE},
        NESTEROV_FIRST,
        others=({**NESTEROV_FIRST, "lr": 0.1, "mu_max": 0.9},),
    ),
    "adamw": Space(
        {
            "lr": Range(1e-4, 1e-1),
            "beta1": MOMENTUM,
            "beta2": Range(0.9, 0.9999, below_one=True, ceiling=0.99999),
            "weight_decay": Choice((0.0, 1e-2)),
            **SCHEDULE,
        },
        ADAMW_FIRST,
        others=({**ADAMW_FIRST, "lr": 1e-2},),
    ),
    "soap": Space(
        {
            "lr": Range(1e-4, 1e-1),
            "beta1": MOMENTUM,
            "beta2": MOMENTUM,
            "precondition_frequency": Choice((5, 10, 20)),
            "weight_decay": Choice((0.0, 1e-2)),
            **SCHEDULE,
        },
        SOAP_FIRST,
        others=({**SOAP_FIRST, "lr": 1e-2},),
    ),
    "kfac-adaptive": Space(
        {
            "damping": Range(1e-4, 10.0),
            "damping_end": Range(1e-3, 1.0, ceiling=1.0),
            "factor_interval": Choice((1, 4, 10)),
            "inverse_interval": Choice((5, 20)),
            "factor_fraction": Choice((0.125, 0.25)),
            "quadratic_fraction": Choice((0.25, 1.0)),
            **SCHEDULE,
        },
        {
            "damping": 0.03,
            "damping_end": 0.3,
            "factor_interval": 1,
            "inverse_interval": 20,
            "factor_fraction": 0.25,
            "quadratic_fraction": 0.25,
            "schedule": "constant",
            "warmup": 0.0,
        },
    ),
    "kfac": Space(
        {
            "rule": Choice(("kl", "cap")),
            "lr": Range(3e-3, 1.0),
            "damping": Range(1e-4, 10.0),
            "damping_end": Range(1e-3, 1.0, ceiling=1.0),
            "momentum": KFAC_MOMENTUM,
            "kl_clip": Range(1e-4, 1.0),
            "kl_annealing": Choice((True, False)),
            "factor_interval": Choice((1, 4, 10)),
            "inverse_interval": Choice((10, 20)),
            **SCHEDULE,
        },
        {
            "rule": "kl",
            "lr": 0.1,
            "damping": 1e-3,
            "damping_end": 0.3,
            "momentum": 0.9,
            "kl_clip": 2e-3,
            "kl_annealing": False,
            "factor_interval": 1,
            "inverse_interval": 20,
            **SCHEDULE_FIRST,
        },
        others=tuple(
            {**start, "inverse_interval": 10, **SCHEDULE_FIRST}
            for start in (
                {"rule": "kl", "factor_interval": 10, **BRISK},
                {"rule": "kl", "factor_interval": 10, **WIDE},
                {"rule": "cap", "factor_interval": 1, **CAPPED},
            )
        ),
    ),
}


def find_space(optimizer: str) -> Space:
    """Raises: Mistake: the optimizer is not tuned."""
    if optimizer not in SPACES:
        raise Mistake(f"optimizer {optimizer!r} has no search space: one of {', '.join(SPACES)}")
    return SPACES[optimizer]
