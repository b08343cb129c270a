"""What `kfac-tune` may choose for K-FAC: the parameters, where a search begins, and the arguments that a choice means.

A setting is flat: {"lr": 0.1, "lr_schedule": "cosine", "damping_schedule": "adaptive", ...}. In a trial its schedules
follow the share of the seconds that is spent; in a tuned file the same schedules count steps.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import kfac_triton.tuning.limits as limits
from kfac_triton.config import APPROXIMATIONS, FISHERS
from kfac_triton.schedules import Cosine, Exponential, Linear, Schedule, WarmUp
from kfac_triton.tuning.errors import Mistake
from kfac_triton.tuning.schedules import SHAPES
from kfac_triton.tuning.space import BRISK, KFAC_MOMENTUM, WIDE, Choice, Range, Space
from kfac_triton.tuning.task import Task

LR_END = 0.01  # a schedule of lr ends at this share of its start: training beyond it goes on, slowly
RESOLUTION = 1000  # steps of a schedule that stand for the seconds of a trial

# The core is searched from the first trial on. What trades the cost of a step for its quality, and what seldom matters,
# keeps its first value for the first part of a search.
CORE = (
    "lr_rule", "lr", "cap", "lr_schedule", "horizon", "momentum", "damping", "damping_schedule", "damping_end",
    "kl_clip",
)  # fmt: skip
FIXED, CAPPED, ADAPTIVE = "fixed", "capped", "adaptive"
SCHEDULED = (FIXED, CAPPED)  # rules with a learning rate
FALLING = ("exponential", "cosine")

KFAC_SPACE = Space(
    {
        "lr_rule": Choice((FIXED, CAPPED, ADAPTIVE)),
        "lr": Range(1e-2, 1.0),
        "cap": Range(1e-3, 0.1),
        "lr_schedule": Choice(SHAPES),
        "horizon": Choice((1.0, 0.6, 0.35)),
        "warmup": Choice((0.0, 0.05)),
        "momentum": KFAC_MOMENTUM,
        "damping": Range(1e-4, 10.0),
        "damping_schedule": Choice(("constant", *FALLING, ADAPTIVE)),
        "damping_end": Range(1e-3, 1.0, ceiling=1.0),
        "kl_clip": Range(1e-4, 1.0),
        "kl_annealing": Choice((True, False)),
        "weight_decay": Choice((0.0, 1e-5, 1e-4, 1e-3)),
        "factor_decay": Range(0.8, 0.99, below_one=True, ceiling=0.999),
        "factor_interval": Choice((1, 2, 5)),
        "inverse_interval": Choice((5, 10, 20, 50)),
        "factor_fraction": Choice((0.125, 0.25, 0.5, 1.0)),
        "fisher": Choice(("mc", "empirical")),
        "approximation": Choice(("kronecker", "eigen")),
    },
    {},
    {
        "lr": ("lr_rule", (FIXED,)),
        "cap": ("lr_rule", (CAPPED,)),
        "lr_schedule": ("lr_rule", SCHEDULED),
        "warmup": ("lr_rule", SCHEDULED),
        "momentum": ("lr_rule", SCHEDULED),
        "kl_clip": ("lr_rule", SCHEDULED),
        "kl_annealing": ("lr_rule", (FIXED,)),
        "damping_end": ("damping_schedule", FALLING),
    },
)

_SHARED = {
    "damping": 1e-3, "damping_schedule": "constant", "weight_decay": 0.0, "factor_decay": 0.95, "factor_interval": 1,
    "inverse_interval": 10, "factor_fraction": 0.125, "fisher": "mc", "approximation": "kronecker", "horizon": 1.0,
}  # fmt: skip
_SCHEDULED = {**_SHARED, "lr_schedule": "constant", "warmup": 0.0, "momentum": 0.9}
DEFAULTS = {**_SCHEDULED, "lr_rule": CAPPED, "cap": 1e-2, "kl_clip": 1e-2}
LIVELY = {
    **_SCHEDULED, "lr_rule": FIXED, "lr": 0.1, "lr_schedule": "linear", "warmup": 0.05, "kl_clip": 2e-3,
    "kl_annealing": False, "damping_schedule": "exponential", "damping_end": 0.3, "inverse_interval": 20,
}  # fmt: skip
_ADAPTIVE = {**_SHARED, "lr_rule": ADAPTIVE, "inverse_interval": 20}
STARTS: dict[str, dict[str, Any]] = {
    "defaults": DEFAULTS,
    "falling": {**DEFAULTS, "lr_schedule": "linear", "warmup": 0.05},
    "lively": LIVELY,
    "brisk": {**LIVELY, **BRISK, "factor_interval": 5, "inverse_interval": 10},
    "wide": {**LIVELY, **WIDE, "factor_interval": 5, "inverse_interval": 10},
    "paper": {**_ADAPTIVE, "damping": 1.0, "damping_schedule": ADAPTIVE, "weight_decay": 1e-5},
    "sure": {**_ADAPTIVE, "damping": 0.03, "damping_schedule": "constant", "factor_fraction": 0.25},
}  # fmt: skip

# What each parameter may ever be; a file that asks for more is refused.
LIMITS: dict[str, tuple[str | bool, ...]] = {
    "lr_rule": (FIXED, CAPPED, ADAPTIVE),
    "lr_schedule": SHAPES,
    "damping_schedule": ("constant", *FALLING, ADAPTIVE),
    "kl_annealing": (True, False),
    "fisher": FISHERS,
    "approximation": APPROXIMATIONS,
}
BOUNDS: dict[str, tuple[float, float]] = {
    "lr": (0.0, math.inf), "cap": (0.0, math.inf), "horizon": (0.0, 1.0), "warmup": (0.0, 0.9),
    "momentum": (0.0, 0.9999),
    "damping": (0.0, math.inf), "damping_end": (0.0, 1.0), "kl_clip": (0.0, math.inf),
    "weight_decay": (0.0, math.inf), "factor_decay": (0.0, 0.9999), "factor_interval": (1, limits.STEPS),
    "inverse_interval": (1, limits.STEPS), "factor_fraction": (0.0, 1.0),
}  # fmt: skip
WHOLE = ("factor_interval", "inverse_interval")


def arguments(setting: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """What `KFAC` takes for `setting`, with schedules over `horizon` times `steps`."""
    own = {name: setting[name] for name in (
        "weight_decay", "factor_decay", "factor_interval", "inverse_interval", "factor_fraction", "fisher",
        "approximation",
    ) if name in setting}  # fmt: skip
    over = max(2, round(setting.get("horizon", 1.0) * steps))
    if setting["lr_rule"] == ADAPTIVE:
        own |= {"lr": ADAPTIVE, "momentum": ADAPTIVE, "quadratic_fraction": 0.25}
    else:
        capped = setting["lr_rule"] == CAPPED
        lr = setting["cap" if capped else "lr"]
        own["rule"] = "cap" if capped else "kl"
        own["lr"] = _scheduled(setting["lr_schedule"], lr, LR_END * lr, over, setting.get("warmup", 0.0))
        own |= {name: setting[name] for name in ("momentum", "kl_clip", "kl_annealing") if name in setting}
    damping, shape = setting["damping"], setting["damping_schedule"]
    if shape == ADAPTIVE and setting["lr_rule"] == CAPPED:  # which has no model to adapt to
        own["damping"] = damping
    elif shape == ADAPTIVE:
        own |= {"damping": ADAPTIVE, "initial_damping": damping, "quadratic_fraction": 0.25}
    else:
        own["damping"] = _scheduled(shape, damping, damping * setting.get("damping_end", 1.0), over)
    return own


def _scheduled(shape: str, start: float, end: float, steps: int, warmup: float = 0.0) -> float | Schedule:
    rise = round(warmup * steps)
    shapes: dict[str, Callable[[float, float, int], Schedule]] = {
        "linear": Linear, "cosine": Cosine, "exponential": Exponential
    }  # fmt: skip
    if shape == "constant":
        # a constant schedule that rises first
        return WarmUp(rise, Linear(start, start, 1)) if rise else start
    falling = shapes[shape](start, end, max(steps - rise, 1))
    return WarmUp(rise, falling) if rise else falling


def build(model: nn.Module, task: Task, setting: Mapping[str, Any], compile: bool) -> torch.optim.Optimizer:
    """K-FAC for a trial of `setting`: what is scheduled stands at its peak, which sets the fallback's lr."""
    from kfac_triton import KFAC

    own: dict[str, Any] = {
        name: value.peak if isinstance(value, Schedule) else value
        for name, value in arguments(setting, RESOLUTION).items()
    }
    return KFAC(model, likelihood=task.likelihood, loss_scale=task.loss_scale, compile=compile, **own)


def by_seconds(optimizer: torch.optim.Optimizer, setting: Mapping[str, Any]) -> Callable[[float], None]:
    """Sets lr and damping, where they are scheduled, for a share of the seconds."""
    own = arguments(setting, RESOLUTION)
    moving = {name: own[name] for name in ("lr", "damping") if isinstance(own[name], Schedule)}

    def follow(progress: float) -> None:
        for name, schedule in moving.items():
            for group in optimizer.param_groups:
                group[name] = schedule(round(progress * RESOLUTION))

    return follow


def read_space(path: Path | None, fixed: Iterable[str] = (), base: Space = KFAC_SPACE) -> Space:
    """The space with what a YAML or JSON file says, and with `fixed`, texts "name=value".

    In a file each parameter is [values], {"low": x, "high": y, "log": true}, or a single value, which pins it.

    Raises:
        Mistake: the file cannot be read, or it or `fixed` names or asks for what cannot be.
    """
    said: dict[str, Any] = {} if path is None else _read(path)
    where = dict.fromkeys(said, f"--space {path}")
    for text in fixed:
        name, equals, value = text.partition("=")
        if not equals or not value:
            raise Mistake(f"--fix {text}: write name=value, as in --fix lr=0.01")
        if where.get(name, "").startswith("--fix") and said[name] != _value(value):
            raise Mistake(f"--fix {text}: {name} is already fixed to {said[name]!r}; fix it once")
        said[name], where[name] = _value(value), f"--fix {text}"
    parameters = dict(base.parameters)
    for name, value in said.items():
        if name not in parameters:
            raise Mistake(f"{where[name]}: no parameter {name!r}; there are {', '.join(parameters)}")
        parameters[name] = _parameter(where[name], name, value, parameters[name])
    space = replace(base, parameters=parameters)
    space = replace(space, first=space.moved_into(LIVELY, LIVELY))
    for text in fixed:
        name = text.partition("=")[0]
        other, values = space.conditions.get(name, ("", ()))
        chosen = space.parameters.get(other)
        if isinstance(chosen, Choice) and not set(chosen.values) & set(values):
            raise Mistake(
                f"--fix {text}: {name} counts only where {other} is {' or '.join(map(str, values))}, which is excluded"
            )
    return space


def starts(space: Space, more: Mapping[str, Mapping[str, Any]] = {}) -> dict[str, dict[str, Any]]:
    """Where a search begins, by name, each moved into the space; `more` follow, and what is there twice falls away."""
    found: dict[str, dict[str, Any]] = {}
    for name, setting in {**STARTS, **more}.items():
        moved = space.moved_into(setting, LIVELY)
        if moved not in found.values():
            found[name] = moved
    return found


def _read(path: Path) -> dict[str, Any]:
    import yaml

    try:
        held = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise Mistake(f"--space {path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise Mistake(f"--space {path} is neither YAML nor JSON: {' '.join(str(error).split())}") from error
    if not isinstance(held, dict):
        raise Mistake(f"--space {path}: a mapping of parameters, as in {{lr: {{low: 0.01, high: 1}}}}")
    return {str(name): value for name, value in held.items()}


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _parameter(where: str, name: str, said: Any, was: Range | Choice) -> Range | Choice:
    if isinstance(said, dict):
        return _range(where, name, said, was)
    values = said if isinstance(said, list) else [said]
    if not values:
        raise Mistake(f"{where}: {name} has an empty list; give at least one value")
    return Choice(tuple(_allowed(where, name, value) for value in values))


def _range(where: str, name: str, said: dict[str, Any], was: Range | Choice) -> Range:
    if name in LIMITS or name in WHOLE:
        raise Mistake(f"{where}: {name} takes a list of values, not a range")
    unknown = set(said) - {"low", "high", "log"}
    if unknown or "low" not in said or "high" not in said:
        raise Mistake(
            f"{where}: {name} needs low and high, and may have log; got {', '.join(map(str, said)) or 'none'}"
        )
    low, high = (_allowed(where, name, said[end]) for end in ("low", "high"))
    below_one = isinstance(was, Range) and was.below_one and "log" not in said
    log = said.get("log", isinstance(was, Range) and was.log and low > 0)
    if not isinstance(log, bool):
        raise Mistake(f"{where}: {name}: log is true or false; got {log!r}")
    if not low < high or (log and not below_one and low <= 0):
        raise Mistake(
            f"{where}: {name}: low < high{', and above 0 on a log scale' if log else ''}; got {low!r}, {high!r}"
        )
    return Range(float(low), float(high), log=log, below_one=below_one, ceiling=BOUNDS[name][1])


def _allowed(where: str, name: str, value: Any) -> Any:
    if name in LIMITS:
        if value not in LIMITS[name] or isinstance(value, bool) != isinstance(LIMITS[name][0], bool):
            raise Mistake(f"{where}: {name} is one of {', '.join(map(str, LIMITS[name]))}; got {value!r}")
        return value
    low, high = BOUNDS[name]
    if name in WHOLE:
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise Mistake(f"{where}: {name} is an integer from {low:.0f} to {high:.0f}; got {value!r}")
        return value
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not low <= value <= high:
        raise Mistake(f"{where}: {name} is a number from {low:g} to {high:g}; got {value!r}")
    return float(value)
