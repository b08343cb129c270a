"""Chains of linear layers on generated data, on which the targets for the cost of a step are stated.

Their layers are so small that arithmetic costs nothing: what a step takes is the work of Python and of the dispatcher.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn

from kfac_triton.tuning.errors import Mistake
from kfac_triton.tuning.sets import shuffled, summed_cross_entropy
from kfac_triton.tuning.task import Task

SMALL_AUTOENCODER = (49, 64, 64, 32, 16, 32, 64, 64, 49)
EXAMPLES, BATCH = 1024, 64
CAUSES = 4  # numbers behind each example
CHAIN = re.compile(r"chain-(\d+)x(\d+)")
MOST_LAYERS, MOST_WIDTH = 1_000, 10_000
ABOUT = {
    "small-autoencoder": "Linear layers 49-64-64-32-16-32-64-64-49 with tanh, Bernoulli, batch 64: what a step costs.",
    "chain-24x16": "24 linear layers of width 16 with tanh, Bernoulli, batch 64; any LAYERSxWIDTH.",
}


def step_task(name: str) -> Callable[[torch.device], Task] | None:
    """What makes the task `name` on a device: "small-autoencoder", or a chain such as "chain-24x16"; None for others.

    Raises: Mistake: a chain without layers, or one too large.
    """
    if name == "small-autoencoder":
        return lambda device: _task(name, SMALL_AUTOENCODER, device)
    match = CHAIN.fullmatch(name)
    if match is None:
        return None
    layers, width = int(match[1]), int(match[2])
    if not (1 <= layers <= MOST_LAYERS and 1 <= width <= MOST_WIDTH):
        raise Mistake(f"task {name!r}: 1 to {MOST_LAYERS} layers of width 1 to {MOST_WIDTH}, as in chain-24x16")
    return lambda device: _task(name, (width,) * (layers + 1), device)


def _task(name: str, widths: tuple[int, ...], device: torch.device) -> Task:
    inputs, targets = (rows.to(device) for rows in _generated(widths[0], widths[-1]))
    return Task(
        model=lambda: tanh_chain(widths),
        batches=shuffled(inputs, targets, BATCH),
        loss=summed_cross_entropy,
        likelihood="bernoulli",
        name=name,
        metric="mean sigmoid cross-entropy (nats an example)",
        data=({"name": name, "source": "generated", "digest": f"{EXAMPLES} examples, seed 0", "size": EXAMPLES},),
    )


def tanh_chain(widths: tuple[int, ...]) -> nn.Sequential:
    """Linear layers `widths` with tanh between them; the last one gives logits."""
    layers: list[nn.Module] = []
    for d_in, d_out in pairwise(widths):
        layers += [nn.Linear(d_in, d_out), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def _generated(d_in: int, d_out: int) -> tuple[Tensor, Tensor]:
    """Inputs (EXAMPLES, d_in) in (0, 1) and targets (EXAMPLES, d_out), 0 or 1, of the same few causes."""
    generator = torch.Generator().manual_seed(0)
    causes = torch.randn(EXAMPLES, CAUSES, generator=generator)
    mixing_in = torch.randn(CAUSES, d_in, generator=generator)
    mixing_out = torch.randn(CAUSES, d_out, generator=generator)
    return torch.sigmoid(causes @ mixing_in), (causes @ mixing_out > 0).float()
