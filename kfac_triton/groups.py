"""What a parameter group may hold: checked when the group is made, and again when a value changes during training."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from torch import Tensor

from kfac_triton.config import Settings, integer, number

# The options of a group; whoever trains may change them between steps.
OPTIONS = (
    "lr", "momentum", "damping", "weight_decay", "kl_clip", "kl_annealing", "factor_decay", "factor_interval",
    "inverse_interval",
)  # fmt: skip
RANGES: Mapping[str, Mapping[str, Any]] = {
    "lr": {"least": 0.0},
    "momentum": {"least": 0.0, "below": 1.0},
    "damping": {"least": 0.0},
    "weight_decay": {"least": 0.0},
    "factor_decay": {"least": 0.0, "below": 1.0},
    "kl_clip": {"above": 0.0, "infinite": True},
}
TENSORS = {"lr": "a number, a 0-d tensor or a Schedule", "momentum": "a number", "damping": "a number or a Schedule"}
OF_THE_OPTIMIZER = {
    *(field.name for field in fields(Settings)), "model", "initial_damping", "tuned_for", "process_group",
}  # fmt: skip
SIMILAR = 0.85  # difflib's ratio: "dampinng" is "damping" to 0.93, the foreign "max_momentum" is "momentum" to 0.8


def rule_of(rule: str | None, adaptive: Sequence[str]) -> str:
    """The rule of steps, by default "cap"; `adaptive`: the arguments that are, for which steps have another one."""
    if rule == "cap" and adaptive:
        raise ValueError(f'rule must be "kl" with {adaptive[0]}="adaptive", which finds its own length; got "cap"')
    return ("kl" if adaptive else "cap") if rule is None else rule


def check_names(group: Mapping[str, Any]) -> None:
    """Raises ValueError for a name that a group cannot hold, or that is nearly one that it can.

    Other names belong to somebody else, a learning rate scheduler for instance, and are carried along.
    """
    options = (*OPTIONS, "fallback_lr")
    for name in group:
        if name in OF_THE_OPTIMIZER:
            raise ValueError(f"{name} belongs to the whole optimizer, not to a group: write KFAC(model, {name}=...)")
        similar = difflib.get_close_matches(str(name).lower(), options, n=1, cutoff=SIMILAR)
        if similar and name not in options:
            raise ValueError(f"{name!r} is no option of a group; did you mean {similar[0]!r}?")


def check(group: Mapping[str, Any], names: Iterable[str] = OPTIONS, *, wait: bool = True) -> None:
    """Checks options of one group, which are numbers or (lr) a 0-d tensor; the value of one on a device if `wait`.

    Raises:
        ValueError: an option is out of its range.
    """
    for name in names:
        value = group.get(name)
        if name in TENSORS and not isinstance(value, (int, float, Tensor)):
            raise ValueError(f"{name} must be {TENSORS[name]}; got {value!r}")
        if name == "lr" and isinstance(value, Tensor) and value.dim() != 0:
            raise ValueError(f"lr as a tensor must be 0-d; got shape {tuple(value.shape)}")
        if name == "kl_annealing":
            if not isinstance(value, bool):
                raise ValueError(f"kl_annealing must be True or False; got {value!r}")
        elif name not in RANGES:
            integer(name, value)
        elif wait or not isinstance(value, Tensor):
            adaptive = name == "momentum" and group["adaptive_momentum"]  # a multiplier, 1 by default
            number(name, value, **({"least": 0.0} if adaptive else RANGES[name]))


def check_complete(group: Mapping[str, Any], names: Iterable[str]) -> None:
    """Raises ValueError where the group lacks one of the names, other than torch's own."""
    lacking = next((name for name in names if name not in (*group, "differentiable")), None)
    if lacking is not None:
        raise ValueError(f"a parameter group has no {lacking!r}; add_param_group makes groups that have all")


class Watch:
    """Checks what changed in the groups since the last call, without waiting for a device."""

    def __init__(self) -> None:
        self._passed: list[tuple[dict[str, Any], list[Any]]] = []

    def check(self, groups: list[dict[str, Any]], defaults: Iterable[str]) -> None:
        """A `kl_clip` of None becomes inf; `defaults` are the names that every group holds.

        Raises:
            ValueError: an option is missing or out of its range.
        """
        passed = []
        for i, group in enumerate(groups):
            if group.get("kl_clip", 0.0) is None:
                group["kl_clip"] = math.inf
            if i < len(self._passed) and self._passed[i][0] is group:
                before = self._passed[i][1]
                changed = [n for n, value in zip(OPTIONS, before, strict=True) if group.get(n) is not value]
                if changed:
                    check(group, changed, wait=False)
            else:
                check_complete(group, defaults)
                check(group, wait=False)
            passed.append((group, [group[name] for name in OPTIONS]))
        self._passed = passed
