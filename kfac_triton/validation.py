"""Whether a state that comes in is one of this optimizer's: checked against the schema before anything is written."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from kfac_triton import config, groups, schedules, schema
from kfac_triton.config import COUNTERS, Settings, integer, number
from kfac_triton.layer import described
from kfac_triton.operations.layout import Layout
from kfac_triton.schema import Neighbour, Part

YOUNGER = {**COUNTERS, "kl_annealing": False}  # what groups of older checkpoints lack, but for "step"

Entries = Sequence[tuple[str, nn.Parameter, Mapping[str, Any]]]  # (name, parameter, its state) of every parameter
Layouts = Mapping[str, tuple[nn.Parameter, Mapping[str, Any], Layout]]  # by name: weight, its state, its layout


def check(
    optimizer: torch.optim.Optimizer, state_dict: Mapping[str, Any], settings: Settings, model: nn.Module | None,
    names: Sequence[str | None],
) -> None:  # fmt: skip
    """Raises ValueError where the state cannot be one of this optimizer's: it names the parameter and what is wrong."""
    if "state" not in state_dict or "param_groups" not in state_dict:
        raise ValueError("not the state of an optimizer: it must hold 'state' and 'param_groups'")
    saved, own = state_dict["param_groups"], optimizer.param_groups
    sizes = [len(group["params"]) for group in saved], [len(group["params"]) for group in own]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"the state has groups of {sizes[0]} parameters, this optimizer of {sizes[1]}: another model's"
        )
    for group in saved:
        _check_group(group, optimizer.defaults, settings)
    keys = [key for group in saved for key in group["params"]]
    stray = next((key for key in state_dict["state"] if key not in keys), None)
    if stray is not None:
        raise ValueError(f"the state has an entry for {stray!r}, which no group lists")
    parameters = [p for group in own for p in group["params"]]
    check_entries(
        [
            (name or f"parameter {i}", p, state_dict["state"].get(key, {}))
            for i, (key, p, name) in enumerate(zip(keys, parameters, names, strict=True))
        ],
        settings,
        model,
        adaptive=config.adapts(saved[0]),
    )


def _check_group(group: Mapping[str, Any], defaults: Mapping[str, Any], settings: Settings) -> None:
    needed = ["damping", "step", *(name for name in defaults if name not in (*YOUNGER, "differentiable"))]
    if group.get("adaptive_damping"):
        needed += ["gamma", "bf16"]
    lacking = next((name for name in needed if name not in group), None)
    if lacking is not None:
        raise ValueError(f"the state has a group without {lacking!r}: it is not one of KFAC")
    whole = {**YOUNGER, **group}
    if whole["kl_clip"] is None:  # set during training; the next step makes it inf
        whole["kl_clip"] = math.inf
    try:
        for name in ("adaptive_lr", "adaptive_momentum", "adaptive_damping", "calibrate_damping"):
            if not isinstance(whole[name], bool):
                raise ValueError(f"{name} must be True or False; got {whole[name]!r}")
            if whole[name] and settings.likelihood is None:
                raise ValueError(f"{name} needs an optimizer with a likelihood")
        groups.check(whole)
        integer("step", whole["step"], least=0)
        integer("terms_per_example", whole["terms_per_example"])
        number("peak_lr", whole["peak_lr"], least=0.0)
        number("fallback_ratio", whole["fallback_ratio"], least=0.0)
        if whole["adaptive_damping"]:
            number("gamma", whole["gamma"], least=0.0)
        for name in ("rho", "predicted"):
            if whole[name] is not None and not isinstance(whole[name], (int, float)):
                raise ValueError(f"{name} must be a number or None; got {whole[name]!r}")
        for name in ("lr_schedule", "damping_schedule"):
            _check_schedule(name, whole[name])
    except ValueError as error:
        raise ValueError(f"the state has a group in which {error}") from error


def _check_schedule(name: str, numbers: Any) -> None:
    if numbers is None:
        return
    if not isinstance(numbers, dict) or "kind" not in numbers:
        raise ValueError(f"{name} must be what Schedule.as_numbers() returned, or None; got {numbers!r}")
    schedules.restored(numbers)


def check_entries(entries: Entries, settings: Settings, model: nn.Module | None, *, adaptive: bool) -> None:
    """Raises ValueError where an entry is not the state of its parameter; `model`, if known, numbers the biases."""
    layouts: dict[str, tuple[nn.Parameter, Mapping[str, Any], Layout]] = {}
    for name, p, stored in entries:
        if not isinstance(stored, Mapping):
            raise ValueError(f"the state of {name} is a {type(stored).__name__}, not a dictionary")
        for part in schema.parts_of_parameter(p):
            _check_part(part, stored, name, p)
        if not adaptive:
            _check_rule(name, stored, settings)
        if schema.describes_block(stored):
            layouts[name] = (p, stored, _checked_layout(name, p, stored, settings))
    following = _neighbours(layouts) if settings.approximation == "tridiagonal" else {}
    for name, (p, stored, layout) in layouts.items():
        for part in schema.parts_of_block(p, layout, settings, following.get(name)):
            _check_part(part, stored, name, p)
        _check_waiting(name, stored)
    if model is not None:
        _check_biases(layouts, list(model.parameters()))


def _check_rule(name: str, stored: Mapping[str, Any], settings: Settings) -> None:
    if _absent(stored.get("momentum_buffer", 0)):
        return
    written = "kl" if _absent(stored.get("square_buffer", 0)) else "cap"
    if written != settings.rule:
        raise ValueError(
            f'the state of {name} holds the momentum of rule="{written}", which that of rule="{settings.rule}" is not: '
            "build this optimizer with the same rule"
        )


def _checked_layout(name: str, p: nn.Parameter, stored: Mapping[str, Any], settings: Settings) -> Layout:
    for key, allowed in schema.INTEGERS.items():
        value = stored.get(key, 0 if key == schema.APPROXIMATION else None)
        if not isinstance(value, int) or isinstance(value, bool) or value not in allowed:
            raise ValueError(
                f"the state of {name} has {key}={value!r}; it must be an integer from {allowed.start} to "
                f"{allowed.stop - 1}"
            )
    written = schema.approximation_of(stored, settings.approximation)
    if written != settings.approximation:
        raise ValueError(
            f'the state of {name} is of approximation="{written}", this optimizer of "{settings.approximation}": build '
            "it with the same one"
        )
    P_A = stored.get("time_P_A")
    if isinstance(P_A, Tensor) and settings.temporal == ("chain_symmetric" if P_A.numel() else "chain"):
        raise ValueError(f'the state of {name} is of another temporal than "{settings.temporal}"')
    layout = described(stored)
    try:
        layout.factor_shapes(p.shape)
    except (IndexError, ZeroDivisionError) as error:
        raise ValueError(
            f"the state's factors do not fit {name}, a parameter of shape {tuple(p.shape)}: another model's"
        ) from error
    return layout


def _neighbours(layouts: Layouts) -> dict[str, Neighbour]:
    """The next weight of the chain, by name."""
    places = {name: stored.get("chain") for name, (_, stored, _) in layouts.items()}
    if sorted(place for place in places.values() if isinstance(place, int)) != list(range(len(places))):
        raise ValueError(f"the state's layers do not form a chain: their places are {places}")
    order = sorted(places, key=lambda name: int(places[name] or 0))
    return {name: Neighbour(layouts[after][0], layouts[after][2]) for name, after in pairwise(order)}


def _check_part(part: Part, stored: Mapping[str, Any], name: str, p: nn.Parameter) -> None:
    values = {key: stored[key] for key in part.slots if key in stored and not _absent(stored[key])}
    if not values and not part.always:
        return
    for key, (shape, dtypes) in part.slots.items():
        t = values.get(key)
        if not isinstance(t, Tensor):
            came = "lacks" if key not in stored else f"has {type(stored[key]).__name__} for"
            raise ValueError(f"the state of {name} {came} the tensor {key!r}")
        if tuple(t.shape) != shape:
            raise ValueError(
                f"the state of {name}, of shape {tuple(p.shape)}, has {key!r} of shape {tuple(t.shape)} where "
                f"{shape} fits: another model's"
            )
        if t.dtype not in dtypes:
            raise ValueError(
                f"the state of {name} has {key!r} in {t.dtype} where {dtypes[0]} fits; load it into a model of the "
                "dtype that it was saved from, and convert that model"
            )
        if not bool(torch.isfinite(t).all()):
            raise ValueError(f"the state of {name} has numbers in {key!r} that are not finite")
        if shape == () and dtypes == schema.COUNTER.dtypes and bool(t < 0):
            raise ValueError(f"the state of {name} has {key}={float(t):g}; a count is never negative")


def _absent(value: Any) -> bool:
    return type(value) is int and value == 0


def _check_waiting(name: str, stored: Mapping[str, Any]) -> None:
    for side in "AG":
        waiting, rows = stored.get(f"{side}_waiting", 0), stored.get(f"{side}_rows")
        most = len(rows) if isinstance(rows, Tensor) else 0
        if not isinstance(waiting, int) or not 0 <= waiting <= most:
            raise ValueError(f"the state of {name} has {side}_waiting={waiting!r}; it has {most} rows")


def _check_biases(layouts: Layouts, parameters: list[nn.Parameter]) -> None:
    taken: dict[int, str] = {}
    weights = {id(weight) for weight, _, _ in layouts.values()}
    for name, (weight, stored, layout) in layouts.items():
        index = stored["bias"]
        if index < 0:
            continue
        fits = index < len(parameters) and id(parameters[index]) not in weights
        if not fits or parameters[index].numel() != _bias_size(layout, weight) or index in taken:
            raise ValueError(
                f"the state of {name} has bias={index}, which is not the index of its bias among the model's "
                f"{len(parameters)} parameters"
            )
        taken[index] = name


def _bias_size(layout: Layout, weight: nn.Parameter) -> int:
    return weight.numel() if layout.operation == "scale" else layout.dims(weight.shape)[1] * layout.groups
