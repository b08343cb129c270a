"""What torch.optim leaves to be done when a state is loaded, and when a copied optimizer meets its model again."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kfac_triton.approximations import kronecker


def check_compatible(optimizer: torch.optim.Optimizer, state_dict: Mapping[str, Any]) -> None:
    """Raises ValueError where the state cannot be one of this optimizer's model."""
    if "state" not in state_dict or "param_groups" not in state_dict:
        raise ValueError("not the state of an optimizer: it must hold 'state' and 'param_groups'")
    saved, own = state_dict["param_groups"], optimizer.param_groups
    sizes = [len(group["params"]) for group in saved], [len(group["params"]) for group in own]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"the state has groups of {sizes[0]} parameters, this optimizer of {sizes[1]}: another model's"
        )
    lacking = next((name for group in saved for name in ("damping", "step") if name not in group), None)
    if lacking is not None:
        raise ValueError(f"the state has a group without {lacking!r}: it is not one of KFAC")
    for p, stored in _pairs(optimizer, state_dict):
        shapes = {name: t for name, t in stored.items() if name in ("momentum_buffer", "exp_avg", "exp_avg_sq")}
        wrong = next((t for t in shapes.values() if t.shape != p.shape), None)
        if wrong is not None:
            raise ValueError(
                f"the state holds a tensor of shape {tuple(wrong.shape)} for a parameter of shape {tuple(p.shape)}: "
                "another model's"
            )
        if "operation" in stored and not _factors_fit(stored, p):
            raise ValueError(f"the state's factors do not fit a parameter of shape {tuple(p.shape)}: another model's")


def _factors_fit(stored: Mapping[str, Any], p: Tensor) -> bool:
    try:
        shapes = kronecker.restored_layout(stored, p).factor_shapes(p.shape)
    except (IndexError, KeyError, ZeroDivisionError):
        return False
    names = "AG" if "A" in stored else ("A_root", "G_root")
    return all(
        name not in stored or tuple(stored[name].shape) == shape for name, shape in zip(names, shapes, strict=True)
    )


def restore_dtypes(optimizer: torch.optim.Optimizer, state_dict: Mapping[str, Any]) -> None:
    """Puts back the tensors that Optimizer.load_state_dict cast to their parameter's dtype."""
    for p, stored in _pairs(optimizer, state_dict):
        for name, value in stored.items():
            if isinstance(value, Tensor):
                optimizer.state[p][name] = value.detach().to(p.device, copy=True)


def _pairs(
    optimizer: torch.optim.Optimizer, state_dict: Mapping[str, Any]
) -> Iterator[tuple[nn.Parameter, Mapping[str, Any]]]:
    for saved, own in zip(state_dict["param_groups"], optimizer.param_groups, strict=True):
        for key, p in zip(saved["params"], own["params"], strict=True):
            yield p, state_dict["state"].get(key, {})


def rebind(optimizer: torch.optim.Optimizer, named: Mapping[str, nn.Parameter], names: list[str]) -> None:
    """Replaces the optimizer's parameters, which `names` lists in order, by the model's of the same name.

    Raises:
        ValueError: the model has none of that name and shape.
    """
    order = iter(names)
    state: defaultdict[Any, Any] = defaultdict(dict)
    lists = []
    for group in optimizer.param_groups:
        parameters = []
        for old in group["params"]:
            name = next(order)
            new = named.get(name)
            if new is None or new.shape != old.shape:
                came = "none" if new is None else f"shape {tuple(new.shape)}"
                raise ValueError(f"the optimizer holds {name} of shape {tuple(old.shape)}; the model has {came}")
            if old in optimizer.state:
                state[new] = optimizer.state[old]
            parameters.append(new)
        lists.append(parameters)
    for group, parameters in zip(optimizer.param_groups, lists, strict=True):
        group["params"] = parameters
    optimizer.state = state
