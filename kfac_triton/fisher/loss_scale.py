"""Whether loss_scale is that of the user's loss: from the gradient at the outputs, or from how the loss curves there.

Where targets are classes or bits, the gradient of c mean nll at the outputs is c / L (p - target), and its signs tell
the targets, so that c follows. It costs nothing, and any first step warns by it.

Steps with a closure check the curvature, which serves every likelihood, and raise. Under shifted outputs z + e u, the
second difference of a loss c mean nll is c e^2 sum u^T H u / L, with H the Fisher of the outputs: their Hessian, since
the likelihoods known by name are exponential families in z (Martens 2020, section 9). The network has no part in it,
nor have penalties on parameters; the reduction ratio of a step cannot tell a wrong scale from a Hessian that is not the
Fisher.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from kfac_triton.capture import Inputs, changed_outputs
from kfac_triton.config import Settings
from kfac_triton.fisher.sampled import tensor_of_outputs
from kfac_triton.likelihoods import NAMES, Bernoulli, Categorical, Likelihood
from kfac_triton.steps.objective import Objective
from kfac_triton.steps.quadratic import FisherProducts

log = logging.getLogger("kfac_triton")

LIMIT = 1.5  # of the true over the claimed loss_scale, or its inverse: beyond, an error
SHIFT, MOST_SHIFT = 0.1, 1e4  # of the outputs; ten times more while the loss hides it below VISIBLE of itself
VISIBLE = 1e-4
ROUNDING = 0.02  # of a gradient at outputs in half precision; what differs more is no c / L (p - onehot)


def check(loss_scale: float, objective: Objective, products: FisherProducts, seed: int) -> None:
    """Raises ValueError where the loss is not loss_scale * mean nll over loss terms; the message names what it is.

    A likelihood of the user's own need not have its Fisher for the Hessian, so it is not checked.
    """
    if type(products.likelihood) not in NAMES.values():
        return
    likely = _likely(objective, products, seed)
    if likely is not None and not 1 / LIMIT < likely / loss_scale < LIMIT:
        raise ValueError(
            f"loss_scale={loss_scale:g} does not fit the loss, which curves {likely / loss_scale:.3g} times as much as "
            "loss_scale * mean nll over loss terms: the step would be wrong by that factor. "
            f"Likely loss_scale={likely:.3g} (a sum over L terms: L; MSELoss on (N, C): 2/C; BCEWithLogitsLoss on "
            "(N, C): 1/C); or the likelihood is not the loss's. check_loss_scale=False turns this check off"
        )


def _likely(objective: Objective, products: FisherProducts, seed: int) -> float | None:
    """c, where loss = c mean nll over loss terms; None where the outputs are out of reach."""
    shift = SHIFT
    while shift < MOST_SHIFT:
        ahead, behind = (_Shifted(products, seed, sign * shift) for sign in (1.0, -1.0))
        losses = [one.loss(objective) for one in (ahead, behind)]
        if not ahead.reached or ahead.curvature == 0:
            return None
        difference = sum(losses) - 2 * objective.first
        if abs(difference) > VISIBLE * abs(objective.first):
            return difference / (shift**2 * ahead.curvature)
        shift *= 10
    return None


class _Shifted:
    """The loss with every output z shifted by `shift` times random numbers u that depend on `seed` alone.

    Afterwards `curvature` is sum u^T H u / L over the passes (and ranks), `reached` whether z could be replaced.
    """

    def __init__(self, products: FisherProducts, seed: int, shift: float) -> None:
        self._products, self._seed, self._shift = products, seed, shift
        self.reached, self.curvature = True, 0.0

    def loss(self, objective: Objective) -> float:
        self._sums = torch.zeros(2, dtype=torch.float64)  # u^T H u and the loss terms
        with changed_outputs(self._products.state.root, self._change):
            loss = objective.loss()
        objective.ranks.average_([self._sums])
        curved, terms = self._sums.tolist()
        self.curvature = curved / terms if terms else 0.0
        return loss

    def _change(self, inputs: Inputs, returned: Any) -> Any:
        z = tensor_of_outputs(returned, self._products.output)
        generator = torch.Generator(z.device).manual_seed(self._seed)
        u = torch.randn(z.shape, dtype=z.dtype, device=z.device, generator=generator)
        curved, terms = self._products.output_gram(inputs, z.detach(), u.unsqueeze(0))
        self._sums += torch.tensor([float(curved), float(terms)], dtype=torch.float64)
        changed = _replaced(returned, z, z + self._shift * u)
        self.reached = changed is not None
        return returned if changed is None else changed


def _replaced(returned: Any, z: Tensor, new: Tensor) -> Any | None:
    """What the model returned with `new` in the place of z; None where z does not stand in it."""
    if returned is z:
        return new
    if getattr(returned, "logits", None) is z:
        changed = copy.copy(returned)
        changed.logits = new
        return changed
    leaves, structure = tree_flatten(returned)
    if not any(leaf is z for leaf in leaves):
        return None
    return tree_unflatten([new if leaf is z else leaf for leaf in leaves], structure)


def seen_in_gradient(
    likelihood: Likelihood, z: Tensor, dz: Tensor, counted: Tensor | None = None
) -> tuple[float | None, int | None]:
    """(c, axis) if the gradient dz at the outputs z is that of c mean nll over the loss terms; else (None, None).

    For one-hot and binary targets alone: smoothed or soft ones, weights of classes, terms that a loss ignores though
    `counted` (bool, a loss term each) does not, and penalties on the outputs give another gradient. `axis` is that of
    the classes, which may be another than the likelihood's.
    """
    if type(likelihood) is Bernoulli:
        scale = _consistent_scale(likelihood.terms_last(z), likelihood.terms_last(dz), _bits, counted)
        return (None, None) if scale is None else (scale, likelihood.dim)
    if type(likelihood) is not Categorical:
        return None, None
    own = likelihood.dim % z.dim()
    for axis in (own, *(axis for axis in range(1, z.dim()) if axis != own)):
        terms = counted if axis == own else None
        scale = _consistent_scale(z.movedim(axis, -1), dz.movedim(axis, -1), _classes, terms)
        if scale is not None:
            return scale, axis
    return None, None


def _classes(z: Tensor, g: Tensor) -> Tensor:
    return torch.softmax(z, -1) - torch.zeros_like(z).scatter_(-1, g.argmin(-1, keepdim=True), 1.0)


def _bits(z: Tensor, g: Tensor) -> Tensor:
    return torch.sigmoid(z) - (g < 0).to(z.dtype)


def _consistent_scale(
    z: Tensor, g: Tensor, residual: Callable[[Tensor, Tensor], Tensor], counted: Tensor | None
) -> float | None:
    """c with g = c / L (p - target) for all of the L terms (..., C), the targets told by the signs of g."""
    z, g = z.double(), g.double()
    r = residual(z, g)
    terms = r[..., 0].numel()
    if counted is not None:
        r, g, terms = r * counted.unsqueeze(-1), g * counted.unsqueeze(-1), int(counted.sum())
    share = (g * r).sum() / r.square().sum()
    left = (g - share * r).square().sum() / g.square().sum()
    return float(share) * terms if 0 < float(share) < float("inf") and float(left) <= ROUNDING**2 else None


class FirstGradients:
    """What the gradients at the outputs tell before the first step, by pass."""

    def __init__(self, settings: Settings, likelihood: Likelihood) -> None:
        self._settings, self._likelihood = settings, likelihood
        self._seen: list[tuple[Inputs, float | None, int | None]] = []
        self._own_axis = -1

    def outputs(self, inputs: Inputs, returned: Any) -> tuple[Tensor, Callable[[Tensor], None]] | None:
        """The outputs in what the model returned, and what is to receive their gradient; None where they are no node of
        the graph."""
        try:
            z = tensor_of_outputs(returned, self._settings.output)
        except TypeError:  # the factors' own pass raises, and says more
            return None
        values = z.detach()
        return None if z.grad_fn is None else (z, lambda grad: self._note(inputs, values, grad.detach()))

    def _note(self, inputs: Inputs, z: Tensor, dz: Tensor) -> None:
        counted = None
        if self._settings.mask is not None:  # which terms count shows: a gradient reaches them
            counted = (self._likelihood.terms_last(dz) != 0).any(-1)
        self._own_axis = self._likelihood.dim % z.dim()
        scale, axis = seen_in_gradient(self._likelihood, z, dz, counted)
        self._seen.append((inputs, scale, None if axis is None else axis % z.dim()))

    def forget(self) -> None:
        """The gradients were cleared."""
        self._seen.clear()

    def warn(self, kept: Sequence[Inputs], unscale: float | Tensor) -> bool:
        """One warning where all the passes of a step show another scale, or another axis, than was given.

        Returns whether it named the axis.
        """
        found = list(self._of(kept))
        if not found or any(scale is None for scale, _ in found):
            return False
        given, (_, axis) = self._settings.loss_scale, found[0]
        if axis != self._own_axis:
            log.warning(
                "likelihood=%r takes axis %d of the outputs for the classes, but the loss is a softmax over axis %d; "
                "pass likelihood=kfac_triton.Categorical(dim=%d)", self._likelihood, self._likelihood.dim, axis, axis,
            )  # fmt: skip
            return True
        likely = sum(scale for scale, _ in found if scale is not None) * float(unscale)
        if not 1 / LIMIT < likely / given < LIMIT:
            log.warning(
                "loss_scale=%g, but the gradient at the outputs is that of %.3g * mean nll over loss terms, so lr, "
                "damping and kl_clip have another scale. Pass loss_scale=%.3g (a sum over L terms: L; "
                "BCEWithLogitsLoss on (N, C): 1/C; k passes whose losses are added and not averaged: k)",
                *(given, likely, likely),
            )
        return False

    def _of(self, kept: Sequence[Inputs]) -> Iterator[tuple[float | None, int | None]]:
        """What was seen of each pass; (None, None) of one that no gradient told of."""
        for inputs in kept:
            own = [(scale, axis) for seen, scale, axis in self._seen if seen is inputs]
            yield from own or [(None, None)]
