"""Whether loss_scale is that of the user's loss, from how the loss curves in the outputs.

Under shifted outputs z + e u, the second difference of a loss c mean nll is c e^2 sum u^T H u / L, with H the Fisher of
the outputs: their Hessian, since the likelihoods known by name are exponential families in z (Martens 2020, section 9).
The network has no part in it, nor have penalties on parameters; the reduction ratio of a step cannot tell a wrong scale
from a Hessian that is not the Fisher.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from kfac_triton.capture import Inputs, changed_outputs
from kfac_triton.fisher import tensor_of_outputs
from kfac_triton.likelihoods import NAMES
from kfac_triton.objective import Objective
from kfac_triton.quadratic import FisherProducts

LIMIT = 1.5  # of the true over the claimed loss_scale, or its inverse: beyond, an error
SHIFT, MOST_SHIFT = 0.1, 1e4  # of the outputs; ten times more while the loss hides it below VISIBLE of itself
VISIBLE = 1e-4


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
