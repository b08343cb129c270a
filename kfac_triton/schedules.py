"""Schedules over the optimizer's own steps, for `KFAC(lr=...)` and `KFAC(damping=...)`.

A schedule is a frozen object: `schedule(k)` is the value of step k, which counts from 0. It lives in the parameter
group as plain values, so a checkpoint takes it along; a step that is skipped does not count.

A subclass of `Schedule` of your own works too. Its attributes are saved, so they must be numbers, strings, or lists and
dictionaries of these; code belongs in methods. Loading a checkpoint finds the class by its name among those defined.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class Schedule(ABC):
    """A value for every step."""

    @abstractmethod
    def __call__(self, step: int) -> float:
        """The value of step `step`, counted from 0."""

    @property
    @abstractmethod
    def peak(self) -> float:
        """The largest value."""

    def as_numbers(self) -> dict[str, Any]:
        """The schedule as a dictionary of plain values, from which `restored` makes it again.

        Raises:
            ValueError: an attribute is no plain value.
        """
        return {"kind": _kind(type(self)), **{name: _plain(name, value) for name, value in vars(self).items()}}


@dataclass(frozen=True)
class Constant(Schedule):
    """Always `value`."""

    value: float

    def __post_init__(self) -> None:
        _check("value", self.value, 0.0)

    def __call__(self, step: int) -> float:
        return self.value

    @property
    def peak(self) -> float:
        return self.value


@dataclass(frozen=True)
class _Ramp(Schedule):
    """From `start` to `end` over `steps`; then `end`."""

    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        for name in ("start", "end"):
            _check(name, getattr(self, name), 0.0)
        _check_count("steps", self.steps)

    def _share(self, step: int) -> float:
        """How much of the way is done, in [0, 1]."""
        return min(step / self.steps, 1.0)

    @property
    def peak(self) -> float:
        return max(self.start, self.end)


class Linear(_Ramp):
    """From `start` to `end` along a line, over `steps`; then `end`."""

    def __call__(self, step: int) -> float:
        return self.start + (self.end - self.start) * self._share(step)


class Exponential(_Ramp):
    """From `start` to `end`, both positive, by a constant factor a step, over `steps`; then `end`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("start", "end"):
            _check(name, getattr(self, name), above=0.0)

    def __call__(self, step: int) -> float:
        return float(self.start * (self.end / self.start) ** self._share(step))


class Cosine(_Ramp):
    """From `start` to `end` along half a cosine, over `steps`; then `end`."""

    def __call__(self, step: int) -> float:
        return self.end + (self.start - self.end) * (1 + math.cos(math.pi * self._share(step))) / 2


@dataclass(frozen=True)
class StepWise(Schedule):
    """`start`, multiplied by `factor` at each of the steps in `milestones`."""

    start: float
    factor: float
    milestones: tuple[int, ...]

    def __post_init__(self) -> None:
        _check("start", self.start, 0.0)
        _check("factor", self.factor, above=0.0)
        object.__setattr__(self, "milestones", tuple(self.milestones))
        for milestone in self.milestones:
            _check_count("milestones", milestone)
        if list(self.milestones) != sorted(self.milestones):
            raise ValueError(f"milestones must rise; got {self.milestones!r}")

    def __call__(self, step: int) -> float:
        return float(self.start * self.factor ** sum(step >= milestone for milestone in self.milestones))

    @property
    def peak(self) -> float:
        return max(self.start, self(self.milestones[-1])) if self.milestones else self.start


@dataclass(frozen=True)
class WarmUp(Schedule):
    """A linear rise to the first value of `then` over `steps`, and then that schedule from its beginning."""

    steps: int
    then: Schedule

    def __post_init__(self) -> None:
        _check_count("steps", self.steps)
        if not isinstance(self.then, Schedule):
            raise ValueError(f"then must be a Schedule; got {self.then!r}")

    def __call__(self, step: int) -> float:
        return self.then(0) * (step + 1) / self.steps if step < self.steps else self.then(step - self.steps)

    @property
    def peak(self) -> float:
        return self.then.peak


KINDS: dict[str, type[Schedule]] = {
    kind.__name__: kind for kind in (Constant, Linear, Exponential, Cosine, StepWise, WarmUp)
}


def restored(numbers: dict[str, Any]) -> Schedule:
    """The schedule that `as_numbers` wrote down.

    Raises:
        ValueError: no schedule of its kind is defined, or its values are not those of one.
    """
    kind = numbers["kind"]
    values = {name: _revived(value) for name, value in numbers.items() if name != "kind"}
    if kind in KINDS:
        try:
            return KINDS[kind](**values)
        except TypeError as error:
            raise ValueError(f"{kind} has other values than {values!r}") from error
    known = [cls for cls in _subclasses() if _kind(cls).rpartition(":")[2] == str(kind).rpartition(":")[2]]
    if not known:
        raise ValueError(f"the schedule {kind!r} is not defined; import its class before it is needed")
    cls = next((cls for cls in known if _kind(cls) == kind), known[-1])
    schedule = cls.__new__(cls)
    vars(schedule).update(values)
    return schedule


def _kind(cls: type[Schedule]) -> str:
    """The name of a schedule's class: that of this module's own, "module:name" for any other."""
    return cls.__name__ if KINDS.get(cls.__name__) is cls else f"{cls.__module__}:{cls.__qualname__}"


def _subclasses() -> Iterator[type[Schedule]]:
    """Every class of schedules that is defined now."""
    frontier = Schedule.__subclasses__()
    while frontier:
        cls = frontier.pop(0)
        yield cls
        frontier += cls.__subclasses__()


def _plain(name: str, value: Any) -> Any:
    """What a checkpoint may hold of an attribute."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, (int, float)):
        return float(value) if isinstance(value, float) else int(value)  # numpy's numbers too
    if isinstance(value, Schedule):
        return value.as_numbers()
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(name, item) for item in value)
    if isinstance(value, dict) and all(isinstance(key, (int, str)) for key in value):
        return {key: _plain(name, item) for key, item in value.items()}
    raise ValueError(
        f"the schedule's {name} must be a number, a string, or a list or dictionary of these, since a checkpoint holds "
        f"it; got {value!r}. Put code into methods of the class"
    )


def _revived(value: Any) -> Any:
    """An attribute from what `_plain` made of it."""
    if isinstance(value, dict):
        return restored(value) if "kind" in value else {key: _revived(item) for key, item in value.items()}
    return type(value)(map(_revived, value)) if isinstance(value, (list, tuple)) else value


def stretched(numbers: dict[str, Any], ratio: float) -> dict[str, Any]:
    """What `as_numbers` wrote down, over `ratio` times as many steps."""
    found = dict(numbers)
    if "steps" in found:
        found["steps"] = max(1, round(found["steps"] * ratio))
    if "milestones" in found:
        found["milestones"] = tuple(round(milestone * ratio) for milestone in found["milestones"])
    if "then" in found:
        found["then"] = stretched(found["then"], ratio)
    return found


def take_out(group: dict[str, Any]) -> None:
    """Puts numbers in the place of the group's schedules, which go to "lr_schedule" and "damping_schedule"."""
    for name in ("lr", "damping"):
        value = group.get(name)
        if isinstance(value, Schedule):
            group[f"{name}_schedule"] = value.as_numbers()
            group[name] = value(0)
        elif name in group:
            group.setdefault(f"{name}_schedule", None)


def apply(group: dict[str, Any]) -> None:
    """Sets what is scheduled to its value for the group's step."""
    for name in ("lr", "damping"):
        numbers = group.get(f"{name}_schedule")
        if numbers is not None:
            group[name] = restored(numbers)(group["step"])


def larger(a: float | Tensor, b: float | Tensor) -> float | Tensor:
    """The larger of two learning rates, without waiting for a device that holds one."""
    if isinstance(b, Tensor):
        return torch.maximum(torch.as_tensor(a, dtype=b.dtype, device=b.device), b.detach())
    return max(float(a), b)


def peak(group: dict[str, Any], name: str) -> Any:
    """The largest value that the group's `name` will have: its schedule's, else what it is."""
    numbers = group.get(f"{name}_schedule")
    return group[name] if numbers is None else restored(numbers).peak


def _check(name: str, value: Any, least: float = -math.inf, *, above: float = -math.inf) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not (number and value >= least and value > above):
        allowed = f">= {least:g}" if math.isfinite(least) else f"> {above:g}"
        raise ValueError(f"{name} must be a number {allowed}; got {value!r}")


def _check_count(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be an integer >= 1; got {value!r}")
