"""Likelihoods p(y | z) of a network's outputs z: the loss, samples from the model, and the Fisher of the outputs.

A loss term is one output position: every axis of z but the likelihood's own (`dim`). For one term the Fisher of the
outputs is H = E[grad nll grad nll^T] = B B^T; the columns of B, back-propagated, give the exact Fisher (equal to the
generalised Gauss-Newton matrix, Martens 2020), a sampled gradient gives an unbiased estimate of it.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

log = logging.getLogger("kfac_triton")


class Likelihood(ABC):
    """`dim`: the axis of the outputs that belongs to one loss term, -1 for (N, ..., C), 1 for (N, C, H, W)."""

    def __init__(self, dim: int = -1) -> None:
        if not isinstance(dim, int) or isinstance(dim, bool):
            raise ValueError(f"dim must be an int, the outputs' axis of one loss term; got {dim!r}")
        self.dim = dim

    def __repr__(self) -> str:
        return f"{type(self).__name__}(dim={self.dim})"

    def terms_last(self, outputs: Tensor) -> Tensor:
        """Outputs as (..., C) with the likelihood's own axis last; (N,) becomes (N, 1)."""
        if self._scalar(outputs):
            return outputs.unsqueeze(-1)
        return outputs if self.dim == -1 else outputs.movedim(self.dim, -1)

    def terms_back(self, terms: Tensor, outputs: Tensor) -> Tensor:
        """The inverse of `terms_last`, in the shape of `outputs`."""
        if self._scalar(outputs):
            return terms.squeeze(-1)
        return terms if self.dim == -1 else terms.movedim(-1, self.dim)

    def _scalar(self, outputs: Tensor) -> bool:
        return outputs.dim() == 1

    def looks_like_probabilities(self, outputs: Tensor) -> bool:
        """Whether these outputs are probabilities where this likelihood takes logits."""
        return False

    @abstractmethod
    def nll(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean negative log-likelihood over the loss terms, in nats (0-d); constants in the targets are left out."""

    @abstractmethod
    def sampled_gradient(self, z: Tensor, generator: Generator) -> Tensor:
        """d nll / d z of every term at a target sampled from the model; z (..., C), the likelihood's axis last."""

    @abstractmethod
    def fisher_column(self, z: Tensor, c: int) -> Tensor:
        """Column c of B for every term, (..., C), where B B^T is the Fisher of the outputs z (..., C)."""

    def fisher_root_product(self, z: Tensor, v: Tensor) -> Tensor:
        """B^T v for every term, (..., C); z and v (..., C), either with more leading axes than the other."""
        return torch.stack([(self.fisher_column(z, c) * v).sum(-1) for c in range(z.shape[-1])], dim=-1)


def _ends_in(outputs: Tensor, *operations: str) -> bool:
    """Whether one of the operations made the outputs, perhaps followed by casts, views and clamps."""
    node = outputs.grad_fn
    while node is not None:
        if any(operation in node.name() for operation in operations):
            return True
        inputs = [previous for previous, _ in node.next_functions if previous is not None]
        passes_on = any(
            kind in node.name()
            for kind in ("Alias", "Clamp", "Copy", "Select", "Slice", "Squeeze", "Unsqueeze", "View")
        )
        node = inputs[0] if passes_on and len(inputs) == 1 else None
    return False


class Categorical(Likelihood):
    """Class logits; targets are class indices, or probabilities of z's own shape."""

    def _scalar(self, outputs: Tensor) -> bool:
        return False

    def looks_like_probabilities(self, outputs: Tensor) -> bool:
        p = self.terms_last(outputs.detach())
        in_range = bool(((p >= 0) & (p <= 1)).all()) and p.numel() > 0
        return in_range and bool(((p.double().sum(-1) - 1).abs() < torch.finfo(p.dtype).eps ** 0.5).all())

    def nll(self, outputs: Tensor, targets: Tensor) -> Tensor:
        last = self.terms_last(outputs)
        z = last.reshape(-1, last.shape[-1])
        if targets.is_floating_point():
            return F.cross_entropy(z, self.terms_last(targets).reshape(z.shape))
        return F.cross_entropy(z, targets.flatten())

    def sampled_gradient(self, z: Tensor, generator: Generator) -> Tensor:
        p = torch.softmax(z, dim=-1)
        # what torch.multinomial does for one draw, without its refusal of probabilities that are not finite: the
        # gradient keeps these
        noise = torch.empty_like(p).exponential_(generator=generator)
        drawn = (p / noise).argmax(dim=-1, keepdim=True)
        return p - noise.zero_().scatter_(-1, drawn, 1.0)

    def fisher_column(self, z: Tensor, c: int) -> Tensor:
        p = torch.softmax(z, dim=-1)
        root = p[..., c : c + 1].sqrt()
        column = -p * root
        column[..., c : c + 1] += root
        return column

    def fisher_root_product(self, z: Tensor, v: Tensor) -> Tensor:
        p = torch.softmax(z, dim=-1)
        return p.sqrt() * (v - (p * v).sum(-1, keepdim=True))


def warn_of_image_axis(likelihood: Likelihood, outputs: Tensor, inputs: Iterable[Tensor]) -> None:
    """One warning where a softmax over the last axis is probably one over the columns of images, (N, C, H, W).

    Outputs (N, ..., C) of four axes or more have an input with all axes but the last, as tokens or pixels do.
    """
    shape = outputs.shape
    if not isinstance(likelihood, Categorical) or likelihood.dim != -1 or len(shape) < 4:
        return
    for t in inputs:
        if t.dim() in (len(shape) - 1, len(shape)) and t.shape[: len(shape) - 1] == shape[:-1] and t.shape != shape:
            return
    log.warning(
        "the categorical likelihood takes the softmax over the last axis of the outputs, %s: %d classes. "
        "For classes on axis 1, as in (N, C, H, W), pass likelihood=Categorical(dim=1); "
        "Categorical(dim=%d) keeps the last axis and silences this warning",
        tuple(shape), shape[-1], len(shape) - 1,
    )  # fmt: skip


class Bernoulli(Likelihood):
    """Logits of independent binary outputs; the nll of a term is the sum over its outputs."""

    def looks_like_probabilities(self, outputs: Tensor) -> bool:
        # Logits near 0 may all lie in (0, 1) too: only the operation that made the outputs tells.
        return _ends_in(outputs, "Sigmoid", "Softmax") and bool(((outputs >= 0) & (outputs <= 1)).all())

    def nll(self, outputs: Tensor, targets: Tensor) -> Tensor:
        loss = F.binary_cross_entropy_with_logits(outputs, targets.to(outputs.dtype), reduction="none")
        return self.terms_last(loss).sum(-1).mean()

    def sampled_gradient(self, z: Tensor, generator: Generator) -> Tensor:
        p = torch.sigmoid(z)
        noise = torch.rand(p.shape, dtype=p.dtype, device=p.device, generator=generator)
        return p - noise.lt_(p)  # torch.bernoulli draws one number after the other, in double precision

    def fisher_column(self, z: Tensor, c: int) -> Tensor:
        p = torch.sigmoid(z[..., c])
        column = torch.zeros_like(z)
        column[..., c] = (p * (1 - p)).sqrt()
        return column

    def fisher_root_product(self, z: Tensor, v: Tensor) -> Tensor:
        p = torch.sigmoid(z)
        return (p * (1 - p)).sqrt() * v


class Gaussian(Likelihood):
    """Means of a unit-variance normal: nll = 0.5 * squared error, and the Fisher of the outputs is the identity."""

    def nll(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return 0.5 * self.terms_last((outputs - targets).square()).sum(-1).mean()

    def sampled_gradient(self, z: Tensor, generator: Generator) -> Tensor:
        return torch.randn(z.shape, dtype=z.dtype, device=z.device, generator=generator)

    def fisher_column(self, z: Tensor, c: int) -> Tensor:
        column = torch.zeros_like(z)
        column[..., c] = 1.0
        return column

    def fisher_root_product(self, z: Tensor, v: Tensor) -> Tensor:
        return v


NAMES: dict[str, type[Likelihood]] = {"categorical": Categorical, "bernoulli": Bernoulli, "gaussian": Gaussian}


def as_likelihood(likelihood: str | Likelihood) -> Likelihood:
    """The likelihood of that name, or the object itself.

    Raises:
        ValueError: an unknown name, or something that is no likelihood.
    """
    if isinstance(likelihood, Likelihood):
        return likelihood
    if isinstance(likelihood, str) and likelihood in NAMES:
        return NAMES[likelihood]()
    allowed = ", ".join(f'"{name}"' for name in NAMES)
    raise ValueError(f"likelihood must be {allowed} or a kfac_triton.Likelihood; got {likelihood!r}")
