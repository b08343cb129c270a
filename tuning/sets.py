"""Batches of data sets and what is measured on them, as the built-in tasks share them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kfac_triton.tuning.datasets import Dataset
from kfac_triton.tuning.task import Batches, Metric

JUDGED = 2_000  # training and test images that an evaluation looks at, the first ones of each
CHUNK = 1_000  # rows of an evaluation's forward pass


def summed_cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Sigmoid cross-entropy of logits (n, d), summed over d, averaged over n: the Bernoulli nll per example."""
    return F.binary_cross_entropy_with_logits(outputs, targets, reduction="sum") / len(outputs)


def half_squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Squared error of outputs (n, d), summed over d, averaged over n, halved: the unit-variance Gaussian's nll."""
    return F.mse_loss(outputs, targets, reduction="sum") / (2 * len(outputs))


def squared_error(images: Tensor, picture: Callable[[Tensor], Tensor] = torch.sigmoid) -> Metric:
    """Reconstruction error of `images` (n, d): sum over pixels of (picture(outputs) - x)^2, mean over images."""

    def measure(model: nn.Module) -> float:
        total = torch.zeros((), device=images.device)
        for start in range(0, len(images), CHUNK):
            chunk = images[start : start + CHUNK]
            total += (picture(model(chunk)) - chunk).square().sum()
        return float(total) / len(images)

    return measure


def cross_entropy(images: Tensor, labels: Tensor) -> Metric:
    """Mean categorical nll of `labels` (n,)."""

    def measure(model: nn.Module) -> float:
        return float(F.cross_entropy(model(images), labels))

    return measure


def shuffled(inputs: Tensor, targets: Tensor, size: int) -> Batches:
    """Endless batches of `size` rows, each epoch in a new order drawn from the seed; its rest is dropped."""

    def batches(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(len(inputs), generator=generator).to(inputs.device)
            for start in range(0, len(order) - size + 1, size):
                rows = order[start : start + size]
                batch = inputs[rows]
                yield batch, batch if targets is inputs else targets[rows]

    return batches


def on_device(images: Dataset, device: torch.device) -> Dataset:
    if device.type == "cpu":
        return images
    train, test, train_labels, test_labels = (
        part.to(device) for part in (images.train, images.test, images.train_labels, images.test_labels)
    )
    return Dataset(train, test, train_labels, test_labels, images.provenance)
