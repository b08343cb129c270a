"""The empirical Fisher: sums over the gradients of the user's own loss, taken by taps in the user's own passes.

With loss = loss_scale * mean nll over the L terms of a batch, divided by the k batches of an accumulated step and
multiplied by a GradScaler's s, the gradient of the summed nll is g = dy * L * k / (loss_scale * s).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kfac_triton import factors
from kfac_triton.approximations.kronecker import Statistics, factor_dtype
from kfac_triton.arguments import Settings
from kfac_triton.blocks.layout import Layout
from kfac_triton.blocks.use import Use
from kfac_triton.capture import Inputs, ModuleTaps, Recorded
from kfac_triton.fisher import SeenUse, counted_terms, tensor_of_outputs
from kfac_triton.likelihoods import Categorical
from kfac_triton.statistics import limited, weight_statistics


class _Sums:
    """Sums of one weight since the last step: A = sum a a^T, G = sum g g^T with g = dy * L, and the rows."""

    def __init__(self, module: nn.Module, weight: nn.Parameter, known: set[nn.Parameter], max_factor_dim: int) -> None:
        bias = getattr(module, "bias", None)
        self.bias = bias if bias in known else None
        operation = "linear" if isinstance(module, nn.Linear) else "conv"
        layout = Layout(operation, groups=getattr(module, "groups", 1), bias=self.bias is not None)
        self.layout = limited(layout, weight, max_factor_dim)
        shape_A, shape_G = self.layout.factor_shapes(weight.shape)
        self.A = torch.zeros(shape_A, dtype=factor_dtype(weight), device=weight.device)
        self.G = torch.zeros(shape_G, dtype=factor_dtype(weight), device=weight.device)
        self.rows = torch.zeros((), dtype=torch.float64, device=weight.device)


class EmpiricalSums:
    """Collects the sums of every tapped weight until `take`."""

    def __init__(self, module: nn.Module, parameters: list[nn.Parameter], settings: Settings) -> None:
        self._settings = settings
        self._likelihood = settings.likelihood or Categorical()
        known = set(parameters)
        self._taps = ModuleTaps(module, parameters, self._add, self._note_terms)
        self._sums = {w: _Sums(m, w, known, settings.max_factor_dim) for w, m in self._taps.weights.items()}
        device = parameters[0].device
        self._terms = torch.zeros((), dtype=torch.float64, device=device)
        self._total_terms = torch.zeros_like(self._terms)
        self._batches = 0
        self._one = torch.ones((), device=device)

    def _note_terms(self, inputs: Inputs, returned: object) -> None:
        z = tensor_of_outputs(returned, self._settings.output).detach()
        terms = self._likelihood.terms_last(z)
        if self._settings.mask is None:
            self._terms.fill_(terms.numel() // terms.shape[-1])
        else:
            self._terms.copy_(counted_terms(self._settings.mask, inputs, z, terms).sum())

    def _add(self, use: Use, dy: Tensor) -> None:
        weight = use.weight.parameter
        sums = self._sums[weight]
        gradient = dy.to(sums.G.dtype) * self._terms.to(sums.G.dtype)
        seen = SeenUse(Recorded(use, None, dy.shape), [gradient], 0, use.x.shape[0])
        rows = weight_statistics(
            [seen],
            sums.layout,
            sums.bias,
            1,
            reduce=self._settings.weight_sharing == "reduce",
            masked=self._settings.mask is not None,
        )
        one, layout = self._one, sums.layout
        factors.accumulate_(sums.A, rows.a, one, one, bias=rows.ones, diagonal=layout.diagonal_A)
        factors.accumulate_(sums.G, rows.g, one, one, bias=False, diagonal=layout.diagonal_G)
        sums.rows.add_(rows.rows)

    def count_batch(self) -> None:
        """One more batch went through its backward pass."""
        self._batches += 1
        self._total_terms.add_(self._terms)

    def take(self, unscale: float | Tensor) -> dict[nn.Parameter, Statistics]:
        """The statistics since the last call; `unscale` is 1 / s of the GradScaler."""
        scale = (self._batches / self._settings.loss_scale * unscale) ** 2
        statistics = {
            weight: Statistics(
                sums.layout,
                sums.bias,
                [],
                [],
                self._total_terms.to(sums.A.dtype).clone(),
                sums.rows.to(sums.G.dtype).clone(),
                ones=False,
                sums=(sums.A.clone(), sums.G * scale),
            )
            for weight, sums in self._sums.items()
            if bool(sums.rows > 0)
        }
        self.clear()
        return statistics

    def clear(self) -> None:
        """Forget what was summed."""
        self._batches = 0
        self._total_terms.zero_()
        for sums in self._sums.values():
            for total in (sums.A, sums.G, sums.rows):
                total.zero_()

    def close(self) -> None:
        """Remove every hook."""
        self._taps.close()
