"""What torch.optim leaves to be done when a state is loaded, made to appear, or follows its model."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kfac_triton import schema
from kfac_triton.config import APPROXIMATIONS
from kfac_triton.estimator import CurvatureEstimator
from kfac_triton.inspection import known_layers
from kfac_triton.joint import wide_dtype
from kfac_triton.layer import Layer, description
from kfac_triton.operations.layout import DENSE
from kfac_triton.schema import Neighbour, Part
from kfac_triton.structures import buffered


def restore_dtypes(optimizer: torch.optim.Optimizer, state_dict: Mapping[str, Any]) -> None:
    """Puts back the tensors that Optimizer.load_state_dict cast to their parameter's dtype."""
    for saved, own in zip(state_dict["param_groups"], optimizer.param_groups, strict=True):
        for key, p in zip(saved["params"], own["params"], strict=True):
            for name, value in state_dict["state"].get(key, {}).items():
                if isinstance(value, Tensor):
                    optimizer.state[p][name] = value.detach().to(p.device, copy=True)


def rebind(optimizer: torch.optim.Optimizer, new: Mapping[Any, nn.Parameter]) -> None:
    """Replaces parameters of the optimizer by others, which take over their state."""
    state: defaultdict[Any, Any] = defaultdict(dict)
    for p, stored in optimizer.state.items():
        state[new.get(p, p)] = stored
    for group in optimizer.param_groups:
        group["params"] = [new.get(p, p) for p in group["params"]]
    optimizer.state = state


def by_name(
    listed: Iterable[nn.Parameter], names: Iterable[str | None], model: nn.Module
) -> dict[nn.Parameter, nn.Parameter]:
    """The model's parameters in the place of those listed, which have these names; without a name one stays.

    Raises:
        ValueError: the model has none of that name and shape.
    """
    named = dict(model.named_parameters())
    found = {}
    for old, name in zip(listed, names, strict=True):
        if name is None:
            continue
        new = named.get(name)
        if new is None or new.shape != old.shape:
            came = "none" if new is None else f"shape {tuple(new.shape)}"
            raise ValueError(f"the optimizer holds {name} of shape {tuple(old.shape)}; the model has {came}")
        found[old] = new
    return found


def follow(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Converts the state of parameters that were converted to another dtype or device; counters keep their dtype."""
    for p in parameters:
        own = (*schema.ADAMW[:2], "A_root", "G_root")
        for name, value in optimizer.state.get(p, {}).items():
            if isinstance(value, Tensor):
                counter = name in schema.COUNTERS
                wanted = value.dtype if counter else p.dtype if name in own else wide_dtype(p)
                optimizer.state[p][name] = value.to(p.device, wanted)


def prepare(optimizer: torch.optim.Optimizer, estimator: CurvatureEstimator, parameters: list[nn.Parameter]) -> None:
    """Makes the whole state appear, without data, for the blocks that the modules' types promise.

    torch.distributed.checkpoint loads in place, and so only what is there.
    """
    layers = known_layers(estimator, parameters)
    for group in optimizer.param_groups:
        if group["kl_annealing"] and isinstance(group["lr"], Tensor):
            group["peak_lr"] = torch.as_tensor(group["peak_lr"]).to(group["lr"])
    capped = estimator.settings.rule == "cap"
    moving = capped or any(group["momentum"] != 0 or group["adaptive_damping"] for group in optimizer.param_groups)
    bounded = moving and not capped and any(group["kl_clip"] < math.inf for group in optimizer.param_groups)
    _prepare_layers(optimizer, estimator, layers)
    group_of = {p: i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
    covered = {p for layer in layers for p in (layer.weight, layer.bias) if p is not None}
    weights = {layer.weight for layer in layers}
    counted = set(weights)
    counted |= {own.bias for own in layers if own.bias is not None and group_of.get(own.bias) != group_of[own.weight]}
    for p in parameters:
        momentum, adamw, quadratic, squares, moments = schema.parts_of_parameter(p)
        stored = optimizer.state[p]  # empty where nothing else is: torch.distributed.checkpoint asks for an entry
        if p not in covered:
            _fill(stored, adamw, p)
        elif moving:
            _fill(stored, momentum, p)
            if bounded and p in counted:
                _fill(stored, quadratic, p)
            if capped:
                _fill(stored, squares, p)
                if p in weights:
                    _fill(stored, moments, p)


def _prepare_layers(optimizer: torch.optim.Optimizer, estimator: CurvatureEstimator, layers: Sequence[Layer]) -> None:
    """Those of a tridiagonal chain in the order of the modules."""
    settings = estimator.settings
    chained = settings.approximation == "tridiagonal"
    following = [Neighbour(layer.weight, layer.layout) for layer in layers][1:]
    indices = {p: i for i, p in enumerate(estimator.source.module.parameters())}
    for place, layer in enumerate(layers):
        stored = optimizer.state[layer.weight]
        index = -1 if layer.bias is None else indices[layer.bias]
        stored |= description(layer.layout, index, APPROXIMATIONS.index(settings.approximation))
        if chained:
            stored["chain"] = place
        after = following[place] if chained and place < len(following) else None
        for part in schema.parts_of_block(layer.weight, layer.layout, settings, after):
            _fill(stored, part, layer.weight)
        for side, d in zip("AG", layer.layout.dims(layer.weight.shape), strict=True):
            stacks_rows = layer.layout.A == layer.layout.G == DENSE and layer.weight.device.type == "cpu"
            if d < buffered.NARROWEST or settings.fisher == "empirical" or not stacks_rows:
                for name in ("rows", "weights", "kept"):
                    stored.pop(f"{side}_{name}", None)
            elif f"{side}_rows" in stored:
                stored[f"{side}_waiting"] = 0


def _fill(stored: dict[str, Any], part: Part, p: nn.Parameter) -> None:
    """Zeros for all tensors of a part, in the first of their dtypes; as the parameter lies in memory."""
    for name, (shape, dtypes) in part.slots.items():
        like = p if shape == p.shape else p.new_empty(shape)
        stored[name] = torch.zeros_like(like, dtype=dtypes[0])
