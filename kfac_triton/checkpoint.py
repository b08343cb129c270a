"""What torch.optim leaves to be done when a state is loaded, made to appear, or follows its model."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kfac_triton import schema
from kfac_triton.approximations import kronecker
from kfac_triton.curvature import Block, Curvature
from kfac_triton.schema import Neighbour, Part


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
        own = (*schema.ADAMW[:2], "momentum_buffer", "A_root", "G_root")
        for name, value in optimizer.state.get(p, {}).items():
            if isinstance(value, Tensor):
                counter = name in ("factor_updates", "spectrum_updates", "fallback_step")
                wanted = value.dtype if counter else p.dtype if name in own else kronecker.factor_dtype(p)
                optimizer.state[p][name] = value.to(p.device, wanted)


def prepare(optimizer: torch.optim.Optimizer, curvature: Curvature, parameters: list[nn.Parameter]) -> None:
    """Makes the whole state appear, without data, for the blocks that the modules' types promise.

    torch.distributed.checkpoint loads in place, and so only what is there.
    """
    blocks, first = curvature.known_blocks(parameters), optimizer.param_groups[0]
    adaptive = any(first[f"adaptive_{name}"] for name in ("lr", "momentum", "damping"))
    moving = any(group["momentum"] != 0 or group["adaptive_damping"] for group in optimizer.param_groups)
    _prepare_blocks(optimizer, curvature, blocks)
    covered = {*blocks, *(block.bias for block in blocks.values())}
    bounded = moving and any(group["kl_clip"] < math.inf for group in optimizer.param_groups)
    apart = _apart(optimizer, blocks)
    for p in parameters:
        momentum, adamw, quadratic = schema.parts_of_parameter(p)
        stored = optimizer.state[p]  # empty where nothing else is: torch.distributed.checkpoint asks for an entry
        if p not in covered:
            _fill(stored, adamw, p)
        elif moving:
            _fill(stored, momentum, p, which=-1 if adaptive else 0)
            if bounded and (p in blocks or p in apart):
                _fill(stored, quadratic, p)


def _apart(optimizer: torch.optim.Optimizer, blocks: Mapping[nn.Parameter, Block]) -> set[nn.Parameter]:
    """The biases that are in another group than their weight."""
    group_of = {p: i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
    pairs = ((weight, block.bias) for weight, block in blocks.items())
    return {bias for weight, bias in pairs if bias is not None and group_of.get(bias) != group_of.get(weight)}


def _prepare_blocks(
    optimizer: torch.optim.Optimizer, curvature: Curvature, blocks: Mapping[nn.Parameter, Block]
) -> None:
    """Those of a tridiagonal chain in the order of the modules."""
    chained = curvature.settings.approximation == "tridiagonal"
    following = [Neighbour(weight, block.layout) for weight, block in blocks.items()][1:]
    for place, (weight, block) in enumerate(blocks.items()):
        curvature.begin(weight, block, optimizer.state)
        stored = optimizer.state[weight]
        if chained:
            stored["chain"] = place
        after = following[place] if chained and place < len(following) else None
        for part in schema.parts_of_block(weight, block.layout, curvature.settings, after):
            _fill(stored, part, weight)


def _fill(stored: dict[str, Any], part: Part, p: nn.Parameter, which: int = 0) -> None:
    """Zeros for all tensors of a part, in the first of their dtypes or another; as the parameter lies in memory."""
    for name, (shape, dtypes) in part.slots.items():
        like = p if shape == p.shape else p.new_empty(shape)
        stored[name] = torch.zeros_like(like, dtype=dtypes[which])
