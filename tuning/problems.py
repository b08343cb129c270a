"""The built-in tasks.

The autoencoders are those of the K-FAC paper (Martens & Grosse 2015, section 13): logistic hidden units, a linear
code, logistic outputs (linear ones for FACES), the initial weights of Martens (2010): 15 incoming weights a unit drawn
from N(0, 1), the rest zero. The loss is the sigmoid cross-entropy (half the squared error for FACES), summed over
pixels and averaged over examples; what is reported is always the squared reconstruction error, summed over pixels and
averaged over images, for training on a fixed subset.

Why logistic and not tanh: on CURVES, at lr 1e-3 and one seed, AdamW's 1,500 steps end at 8.2 with these units and
weights, at 12.8 with tanh and Xavier's. SGD left the error of the mean image (14.26) within them at none of the few
settings tried of either: there its target says little, and AdamW's is the one to look at.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kfac_triton.initialisation import sparse_
from kfac_triton.tuning.datasets import Dataset, load_curves, load_digits, load_faces, load_fashion, load_mnist
from kfac_triton.tuning.errors import Mistake
from kfac_triton.tuning.network_tasks import NETWORKS
from kfac_triton.tuning.sets import (
    JUDGED,
    cross_entropy,
    half_squared_error,
    on_device,
    shuffled,
    squared_error,
    summed_cross_entropy,
)
from kfac_triton.tuning.step_tasks import ABOUT, step_task, tanh_chain
from kfac_triton.tuning.task import Task, load_user_task

CURVES_WIDTHS = (784, 400, 200, 100, 50, 25, 6)
MNIST_WIDTHS = (784, 1000, 500, 250, 30)
FACES_WIDTHS = (625, 2000, 1000, 500, 30)
SMALL_WIDTHS = (64, 48, 32, 16, 6)
DIGITS_WIDTHS = (64, 128, 64, 10)


def find_task(spec: str, data: Path | None = None, device: torch.device | str = "cpu") -> Task:
    """A built-in task by name, its data on `device`, or the user's own (see `load_user_task`).

    Raises:
        Mistake: no such task, or its data is not there.
    """
    if data is not None and not data.is_dir():
        raise Mistake(f"--data {data}: there is no such folder")
    if spec in BUILT_IN:
        return BUILT_IN[spec](data, torch.device(device))
    if ":" in spec:
        return load_user_task(spec)
    chain = step_task(spec)
    if chain is not None:
        return chain(torch.device(device))
    raise Mistake(f"unknown task {spec!r}: built in are {', '.join(LISTED)}; your own is path/to/file.py:factory")


def digits(data: Path | None, device: torch.device) -> Task:
    """Classifier 64-128-64-10 with tanh units on scikit-learn's digits, batch 128."""
    images = on_device(load_digits(), device)
    return Task(
        model=lambda: tanh_chain(DIGITS_WIDTHS),
        batches=shuffled(images.train, images.train_labels, 128),
        loss=F.cross_entropy,
        likelihood="categorical",
        evaluate=cross_entropy(images.train, images.train_labels),
        name="digits",
        metric="training cross-entropy (nats an image)",
        test=cross_entropy(images.test, images.test_labels),
        data=(images.provenance,),
    )


def fashion_cnn(data: Path | None, device: torch.device) -> Task:
    """Two strided convolutions and two linear layers on Fashion-MNIST (else on generated strokes), batch 256."""
    images = on_device(load_fashion(data), device)
    return Task(
        model=convolutional,
        batches=shuffled(images.train, images.train_labels, 256),
        loss=F.cross_entropy,
        likelihood="categorical",
        evaluate=cross_entropy(images.train[:JUDGED], images.train_labels[:JUDGED]),
        name="fashion-cnn",
        metric=f"cross-entropy (nats an image), first {JUDGED:,} training images",
        test=cross_entropy(images.test[:JUDGED], images.test_labels[:JUDGED]),
        data=(images.provenance,),
    )


@dataclass(frozen=True)
class Autoencoder:
    """An autoencoder task: its name, what it is in a line, where its images come from, its widths and batch size;
    `gaussian`: linear outputs and half the squared error, else logistic ones and the sigmoid cross-entropy."""

    name: str
    about: str
    load: Callable[[Path | None], Dataset]
    widths: tuple[int, ...]
    batch: int
    gaussian: bool = False

    def task(self, data: Path | None, device: torch.device) -> Task:
        images = on_device(self.load(data), device)
        judged = min(JUDGED, len(images.train))
        picture: Callable[[Tensor], Tensor] = nn.Identity() if self.gaussian else torch.sigmoid
        return Task(
            model=lambda: autoencoder(self.widths),
            batches=shuffled(images.train, images.train, self.batch),
            loss=half_squared_error if self.gaussian else summed_cross_entropy,
            likelihood="gaussian" if self.gaussian else "bernoulli",
            evaluate=squared_error(images.train[:judged], picture),
            name=self.name,
            metric=f"squared reconstruction error an image, first {judged:,} training images",
            test=squared_error(images.test[:JUDGED], picture),
            data=(images.provenance,),
        )


AUTOENCODERS = {
    one.name: one
    for one in (
        Autoencoder(
            "digits-autoencoder",
            "Autoencoder 64-48-32-16-6 and back on scikit-learn's digits, batch 256: a small deep problem.",
            lambda data: load_digits(),
            SMALL_WIDTHS,
            256,
        ),
        Autoencoder(
            "curves",
            "The paper's autoencoder 784-400-200-100-50-25-6 and back on the generated CURVES, batch 512.",
            lambda data: load_curves(),
            CURVES_WIDTHS,
            512,
        ),
        Autoencoder(
            "mnist",
            "The paper's autoencoder 784-1000-500-250-30 and back on MNIST, batch 512; needs the files.",
            lambda data: load_mnist(data),
            MNIST_WIDTHS,
            512,
        ),
        Autoencoder(
            "faces",
            "The paper's autoencoder 625-2000-1000-500-30 and back, linear, on FACES, batch 512; needs the file.",
            lambda data: load_faces(data),
            FACES_WIDTHS,
            512,
            gaussian=True,
        ),
    )
}

BUILT_IN: dict[str, Callable[[Path | None, torch.device], Task]] = {
    "digits": digits,
    **{name: one.task for name, one in AUTOENCODERS.items()},
    "fashion-cnn": fashion_cnn,
    **NETWORKS,
}
LISTED = (*BUILT_IN, *ABOUT)


def about(name: str) -> str:
    """A built-in task in a line."""
    if name in ABOUT:
        return ABOUT[name]
    return AUTOENCODERS[name].about if name in AUTOENCODERS else (BUILT_IN[name].__doc__ or "").strip()


def autoencoder(widths: tuple[int, ...]) -> nn.Sequential:
    """Linear layers `widths` and back, logistic units between them except at the code and the output (logits); Martens'
    sparse initial weights."""
    mirrored = [*widths, *reversed(widths[:-1])]
    code = len(widths) - 2
    layers: list[nn.Module] = []
    for i in range(len(mirrored) - 1):
        layers.append(sparse_(nn.Linear(mirrored[i], mirrored[i + 1])))
        if i not in (code, len(mirrored) - 2):
            layers.append(nn.Sigmoid())
    return nn.Sequential(*layers)


def convolutional() -> nn.Sequential:
    """Rows of 28 x 28 pixels to ten logits: 8 and 16 filters of 3 x 3 at stride 2, 64 hidden units, ReLU between."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 28, 28)),
        nn.Conv2d(1, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(784, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )
