"""Averages of the parameters along the way (Martens & Grosse 2015, section 10; Polyak & Juditsky 1992)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


def averaged(model: nn.Module, decay: float = 0.99) -> AveragedModel:
    """A copy of the model whose parameters average those of `model`, one more at each `update_parameters(model)`.

    avg <- xi avg + (1 - xi) parameters with xi = min(1 - 1/k, decay) at the k-th update: a plain mean at first, an
    exponential one later, and nothing but data in it. Start when training has left its first phase (the authors: after
    200 steps). Buffers are the model's last ones; refresh BatchNorm's with `torch.optim.swa_utils.update_bn`.

    Raises:
        ValueError: decay is not in [0, 1).
    """
    if not 0 <= decay < 1:
        raise ValueError(f"decay must be a number >= 0 and < 1; got {decay!r}")
    return AveragedModel(model, avg_fn=_rule(decay))


def _rule(decay: float) -> Callable[[Tensor, Tensor, Tensor | int], Tensor]:
    def average(mean: Tensor, parameter: Tensor, count: Tensor | int) -> Tensor:
        k = torch.as_tensor(count, dtype=mean.dtype, device=mean.device) + 1
        xi = torch.clamp(1 - 1 / k, max=decay)
        return xi * mean + (1 - xi) * parameter

    return average
