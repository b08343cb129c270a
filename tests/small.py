"""Small classification problems and the two loops that train them, for tests of whole steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Loss = Callable[[Tensor, Tensor], Tensor]

# Statistics of the whole batch, so that factors can be compared with second moments of all inputs.
WHOLE: dict[str, Any] = {"likelihood": "categorical", "factor_fraction": 1.0, "compile": False}


def data(n: int = 128, d: int = 6, c: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs (n, d) and the classes (n,) that a random linear map gives them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator)
    return x, (x @ torch.randn(d, c, generator=generator)).argmax(1)


def mlp(d: int = 6, h: int = 8, c: int = 3, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(d, h), nn.Tanh(), nn.Linear(h, c))


def train_step(
    optimizer: torch.optim.Optimizer, model: Callable[..., Tensor], x: Tensor, y: Tensor, loss: Loss = F.cross_entropy
) -> float:
    """zero_grad, forward, backward, step; returns the loss."""
    optimizer.zero_grad()
    value = loss(model(x), y)
    value.backward()
    optimizer.step()
    return float(value.detach())


def closure_step(
    optimizer: torch.optim.Optimizer, model: Callable[..., Tensor], x: Tensor, y: Tensor, loss: Loss = F.cross_entropy
) -> float:
    """The same by a closure, as adaptive steps need it."""

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(model(x), y)
        value.backward()
        return value

    return float(optimizer.step(closure).detach())


def second_moment(x: Tensor) -> Tensor:
    """The factor A of a linear layer with bias and inputs x (n, d): [x, 1]^T [x, 1] / n."""
    a = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    return a.T @ a / len(x)
