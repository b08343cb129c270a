"""The built-in tasks of real networks: residual, recurrent and attending ones."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kfac_triton.tuning.datasets import load_digits, load_fashion
from kfac_triton.tuning.networks import Adder, CharGPT, CharLSTM, DigitsViT, resnet
from kfac_triton.tuning.sets import JUDGED, cross_entropy, half_squared_error, on_device, shuffled
from kfac_triton.tuning.task import Batches, Metric, Task
from kfac_triton.tuning.text import load_shakespeare

LENGTH, SENTENCES = 64, 32  # characters of a window, windows of a batch
JUDGED_WINDOWS = 128
STEPS, SUMS = 30, 128  # of the adding problem: length of a sequence, sequences of a batch


def small_resnet(data: Path | None, device: torch.device) -> Task:
    """A residual network with BatchNorm on Fashion-MNIST (else on generated strokes), batch 128."""
    images = on_device(load_fashion(data), device)
    return Task(
        model=resnet,
        batches=shuffled(images.train, images.train_labels, 128),
        loss=F.cross_entropy,
        likelihood="categorical",
        evaluate=cross_entropy(images.train[:JUDGED], images.train_labels[:JUDGED]),
        name="resnet",
        metric=f"cross-entropy (nats an image), first {JUDGED:,} training images",
        test=cross_entropy(images.test[:JUDGED], images.test_labels[:JUDGED]),
        data=(images.provenance,),
    )


def digits_vit(data: Path | None, device: torch.device) -> Task:
    """A vision transformer of two blocks on scikit-learn's digits, batch 128."""
    images = on_device(load_digits(), device)
    return Task(
        model=DigitsViT,
        batches=shuffled(images.train, images.train_labels, 128),
        loss=F.cross_entropy,
        likelihood="categorical",
        evaluate=cross_entropy(images.train, images.train_labels),
        name="digits-vit",
        metric="training cross-entropy (nats an image)",
        test=cross_entropy(images.test, images.test_labels),
        data=(images.provenance,),
    )


def char_lstm(data: Path | None, device: torch.device) -> Task:
    """An LSTM of 128 units that predicts the characters of Shakespeare (else of a grammar), 32 windows of 64."""
    return _characters("char-lstm", lambda letters: CharLSTM(letters), data, device)


def char_gpt(data: Path | None, device: torch.device) -> Task:
    """A transformer of two blocks that predicts the characters of Shakespeare (else of a grammar), 32 windows of 64."""
    return _characters("char-gpt", lambda letters: CharGPT(letters, LENGTH), data, device)


def _characters(name: str, make: type[nn.Module] | object, data: Path | None, device: torch.device) -> Task:
    text = load_shakespeare(data)
    train, test = text.train.to(device), text.test.to(device)
    assert callable(make)
    return Task(
        model=lambda: make(len(text.letters)),
        batches=windows(train),
        loss=next_character,
        likelihood="categorical",
        evaluate=_windowed(train),
        name=name,
        metric=f"cross-entropy (nats a character), {JUDGED_WINDOWS} training windows",
        test=_windowed(test),
        data=(text.provenance,),
    )


def next_character(scores: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of scores (N, T, letters) over all positions."""
    return F.cross_entropy(scores.flatten(0, 1), targets.flatten())


def windows(text: Tensor) -> Batches:
    """Endless batches of windows from anywhere in the text, and the same a character later."""

    def batches(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        ahead = torch.arange(LENGTH + 1, device=text.device)
        while True:
            starts = torch.randint(len(text) - LENGTH, (SENTENCES, 1), generator=generator).to(text.device)
            rows = text[starts + ahead]
            yield rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    return batches


def _windowed(text: Tensor) -> Metric:
    """Mean cross-entropy of windows that stand evenly over the text."""
    starts = torch.linspace(0, len(text) - LENGTH - 1, JUDGED_WINDOWS).long().unsqueeze(1)
    rows = text[(starts + torch.arange(LENGTH + 1)).to(text.device)]

    def measure(model: nn.Module) -> float:
        return float(next_character(model(rows[:, :-1]), rows[:, 1:]))

    return measure


def adding(data: Path | None, device: torch.device) -> Task:
    """The adding problem over 30 steps (Hochreiter & Schmidhuber 1997): an LSTM of 64 units, batch 128."""
    x, y = (t.to(device) for t in sums(JUDGED, torch.Generator().manual_seed(1)))
    held_x, held_y = (t.to(device) for t in sums(JUDGED, torch.Generator().manual_seed(2)))
    return Task(
        model=Adder,
        batches=_summed,
        loss=half_squared_error,
        likelihood="gaussian",
        evaluate=_squared_error(x, y),
        name="adding",
        metric=f"squared error of the sum, {JUDGED:,} sequences",
        test=_squared_error(held_x, held_y),
        data=({"name": "adding", "source": "generated", "digest": f"{STEPS} steps", "size": "endless"},),
    )


def sums(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sequences (count, STEPS, 2) of values in [0, 1) and marks, one in either half, and the sums of both marked."""
    values = torch.rand(count, STEPS, generator=generator)
    half = STEPS // 2
    places = torch.stack([torch.randint(half, (count,), generator=generator) + h for h in (0, half)], dim=1)
    marks = torch.zeros(count, STEPS).scatter_(1, places, 1.0)
    return torch.stack([values, marks], dim=-1), values.gather(1, places).sum(dim=1, keepdim=True)


def _summed(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed + 1000)
    while True:
        yield sums(SUMS, generator)


def _squared_error(x: Tensor, y: Tensor) -> Metric:
    def measure(model: nn.Module) -> float:
        return float(F.mse_loss(model(x), y))

    return measure


NETWORKS = {
    "resnet": small_resnet, "char-lstm": char_lstm, "char-gpt": char_gpt, "adding": adding, "digits-vit": digits_vit,
}  # fmt: skip
