"""The end of a step where kernels serve: momentum and weights in one pass over memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kfac_triton import ops
from kfac_triton.joint import Joint
from kfac_triton.numbers import Numbers
from kfac_triton.steps.motion import Motion, Part


def serves(motion: Motion) -> bool:
    """Whether the kernel can write every parameter where it lies, with a momentum of its own dtype."""
    return all(
        [p.dtype == _stack(motion, part).dtype and _in_place(motion, p, part) for p, part in motion.parts.items()]
    )


def move_(motion: Motion, lr: Numbers, momentum: Numbers | None, nu: Numbers, tau: Numbers) -> None:
    """buf <- momentum buf + nu V,  W <- W - lr tau buf for every parameter that takes part; without momentum W moves by
    nu V itself. Numbers by group."""
    memory = motion.memory
    parameters, parts = list(motion.parts), list(motion.parts.values())
    device, dtype = memory.device, memory.V.flats[0].dtype

    def scalar(value: Any) -> Tensor:
        return torch.as_tensor(value, dtype=dtype, device=device)

    def scalars(values: Numbers, index: list[int]) -> list[Tensor]:
        made = [scalar(value) for value in values]
        return [made[i] for i in index]

    regions, groups = [part.region for part in parts], [part.group for part in parts]
    # one by one, since torch.as_tensor reads the numbers of a list of tensors on the host
    steps = {(g, r): scalar(lr[g] * tau[r]) for g, r in dict.fromkeys(zip(groups, regions, strict=True))}
    ops.fused_update_(
        [_layout(motion, part).by_taps(p) for p, part in zip(parameters, parts, strict=True)],
        [] if momentum is None else [_taps(motion, motion.with_momentum(), part) for part in parts],
        [_taps(motion, memory.V, part) for part in parts],
        scalars(nu, regions),
        [steps[pair] for pair in zip(groups, regions, strict=True)],
        scalars(lr if momentum is None else momentum, groups),
        [torch.zeros((), dtype=dtype, device=device)] * len(parts),  # weight decay is l2: it is in the gradient
    )


def _stack(motion: Motion, part: Part) -> Any:
    return motion.memory.stacks[part.number]


def _layout(motion: Motion, part: Part) -> Any:
    return _stack(motion, part).layers[part.member].layout


def _taps(motion: Motion, joint: Joint, part: Part) -> Tensor:
    """What of a joint matrix belongs to a parameter, (rows, taps, channels)."""
    weight = _stack(motion, part).layers[part.member].weight
    found: Tensor = _layout(motion, part).parts(joint.of(part.number, part.member), weight.shape)[int(part.is_bias)]
    return found


def _in_place(motion: Motion, p: nn.Parameter, part: Part) -> bool:
    return bool(_layout(motion, part).by_taps(p).data_ptr() == p.data_ptr())
