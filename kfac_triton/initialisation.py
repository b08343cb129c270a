"""Sparse initial weights (Martens 2010, section 5): units that differ, and that do not saturate at any width."""

from __future__ import annotations

import torch
from torch import Generator, nn


@torch.no_grad()
def sparse_(module: nn.Module, incoming: int = 15, std: float = 1.0, generator: Generator | None = None) -> nn.Module:
    """Gives every unit of the module's linear and convolutional layers `incoming` weights from N(0, std^2), the rest 0.

    Places are drawn without replacement; where a unit has fewer inputs, all get a weight. Biases become 0.

    Raises:
        ValueError: incoming < 1, or std is not positive.
    """
    if not isinstance(incoming, int) or incoming < 1:
        raise ValueError(f"incoming must be an integer >= 1; got {incoming!r}")
    if not std > 0:
        raise ValueError(f"std must be a number > 0; got {std!r}")
    for layer in module.modules():
        if not isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d)):
            continue
        rows = layer.weight.flatten(1)
        places = torch.rand(rows.shape, generator=generator).topk(min(incoming, rows.shape[1])).indices
        drawn = std * torch.randn(places.shape, generator=generator)
        sparse = torch.zeros(rows.shape).scatter_(1, places, drawn)
        layer.weight.copy_(sparse.reshape(layer.weight.shape))
        if layer.bias is not None:
            layer.bias.zero_()
    return module
