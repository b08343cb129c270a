"""The empirical Fisher: sums over the gradients of the user's own loss, taken by taps in the user's own passes.

With loss = loss_scale * mean nll over the L terms of a batch, divided by the k batches of an accumulated step and
multiplied by a GradScaler's s, the gradient of the summed nll is g = dy * L * k / (loss_scale * s).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from kfac_triton import factors
from kfac_triton.approximations.kronecker import Statistics, factor_dtype
from kfac_triton.arguments import Settings
from kfac_triton.blocks.layout import Layout
from kfac_triton.blocks.use import Use
from kfac_triton.capture import Inputs, ModuleTaps, Recorded, module_use
from kfac_triton.fisher import SeenUse, counted_terms, tensor_of_outputs
from kfac_triton.likelihoods import Categorical
from kfac_triton.statistics import limited, weight_statistics


class _Sums:
    """Sums of one weight since the last step: A = sum a a^T, G = sum g g^T with g = dy * L, and the rows.

    Compiled code knows L only after its taps were traced: `G_raw` sums dy dy^T, and L^2 follows in `take`.
    """

    def __init__(self, module: nn.Module, weight: nn.Parameter, known: set[nn.Parameter], max_factor_dim: int) -> None:
        bias = getattr(module, "bias", None)
        self.bias = bias if bias in known else None
        operation = "linear" if isinstance(module, nn.Linear) else "conv"
        layout = Layout(operation, groups=getattr(module, "groups", 1), bias=self.bias is not None)
        self.layout = limited(layout, weight, max_factor_dim)
        shape_A, shape_G = self.layout.factor_shapes(weight.shape)
        self.A = torch.zeros(shape_A, dtype=factor_dtype(weight), device=weight.device)
        self.G = torch.zeros(shape_G, dtype=factor_dtype(weight), device=weight.device)
        self.G_raw = torch.zeros_like(self.G)
        self.rows = torch.zeros((), dtype=torch.float64, device=weight.device)


class _Pass:
    """One forward pass of the user's: its loss terms (0-d), and with a mask which of them count (bool, flat)."""

    def __init__(self, terms: Tensor) -> None:
        self.terms = terms
        self.counted: Tensor | None = None


class EmpiricalSums:
    """Collects the sums of every tapped weight until `take`."""

    def __init__(self, module: nn.Module, parameters: list[nn.Parameter], settings: Settings) -> None:
        self._module = module
        self._settings = settings
        self._likelihood = settings.likelihood or Categorical()
        device = parameters[0].device if parameters else torch.device("cpu")
        self._zero = torch.zeros((), dtype=torch.float64, device=device)
        self._pass = _Pass(self._zero)
        self._one = torch.ones((), device=device)
        self._sums: dict[nn.Parameter, _Sums] = {}
        self._taps = self._tapped(parameters)

    def _tapped(self, parameters: list[nn.Parameter]) -> ModuleTaps:
        taps = ModuleTaps(self._module, parameters, self._use, self._note_terms)
        known = set(parameters)
        self._sums = {w: _Sums(m, w, known, self._settings.max_factor_dim) for w, m in taps.weights.items()}
        return taps

    def extend(self, parameters: list[nn.Parameter]) -> None:
        """Taps the layers of new parameters too; `parameters` are all there are."""
        self._taps.close()
        self._taps = self._tapped(parameters)

    def layouts(self) -> dict[nn.Parameter, tuple[Layout, nn.Parameter | None]]:
        """Layout and bias of every tapped weight."""
        return {weight: (sums.layout, sums.bias) for weight, sums in self._sums.items()}

    def begin(self) -> _Pass:
        """A forward pass begins."""
        self._pass = _Pass(self._zero)
        return self._pass

    def _note_terms(self, inputs: Inputs, returned: object) -> None:
        z = tensor_of_outputs(returned, self._settings.output).detach()
        terms = self._likelihood.terms_last(z)
        if self._settings.mask is None:
            self._pass.terms = self._zero + terms.numel() // terms.shape[-1]
        else:
            self._pass.counted = counted_terms(self._settings.mask, inputs, z, terms).flatten()
            self._pass.terms = self._pass.counted.sum().to(self._zero.dtype)

    def _use(self, module: nn.Module) -> Callable[[Tensor, Tensor], None]:
        forward = self._pass

        def seen(x: Tensor, dy: Tensor) -> None:
            self._add(module_use(module, x), dy, forward)

        return seen

    def _add(self, use: Use, dy: Tensor, forward: _Pass) -> None:
        sums = self._sums[use.weight.parameter]
        gradient, into = dy.to(sums.G.dtype), sums.G_raw
        if not torch.compiler.is_compiling():
            gradient, into = gradient * forward.terms.to(sums.G.dtype), sums.G
        rows = weight_statistics(
            [SeenUse(Recorded(use, None, dy.shape), [gradient], 0, use.x.shape[0], forward.counted)],
            sums.layout,
            sums.bias,
            1,
            reduce=self._settings.weight_sharing == "reduce",
            masked=self._settings.mask is not None,
        )
        one, layout = self._one, sums.layout
        factors.accumulate_(sums.A, rows.a, one, one, bias=rows.ones, diagonal=layout.diagonal_A)
        factors.accumulate_(into, rows.g, one, one, bias=False, diagonal=layout.diagonal_G)
        sums.rows.add_(rows.rows)

    def take(self, kept: list[Inputs], unscale: float | Tensor) -> dict[nn.Parameter, Statistics]:
        """The statistics since the last call, from the passes `kept`; `unscale` is 1 / s of the GradScaler."""
        for weight, sums in self._sums.items():
            if weight.grad is not None and not bool(sums.rows > 0):
                self._check_not_compiled_before(self._taps.weights[weight])
        scale = (len(kept) / self._settings.loss_scale * unscale) ** 2
        terms = torch.stack([inputs.note.terms for inputs in kept]).sum()
        squared = (terms / len(kept)) ** 2
        statistics = {
            weight: Statistics(
                sums.layout,
                sums.bias,
                [],
                [],
                terms.to(sums.A.dtype),
                sums.rows.to(sums.G.dtype, copy=True),
                ones=False,
                sums=(sums.A.clone(), (sums.G + sums.G_raw * squared) * scale),
            )
            for weight, sums in self._sums.items()
            if bool(sums.rows > 0)
        }
        self.clear()
        return statistics

    def _check_not_compiled_before(self, silent: nn.Module) -> None:
        """Raises where a tapped module with a gradient stayed silent inside compiled code."""
        around = [m for m in self._module.modules() if any(child is silent for child in m.modules())]
        if any(m._compiled_call_impl is not None for m in around):
            raise RuntimeError(
                f"a compiled {type(silent).__name__} has a gradient, but its hook never ran: it was called "
                "before KFAC added the hook, which compiled code ignores. Build KFAC before the first compiled call"
            )

    def clear(self) -> None:
        """Forget what was summed."""
        for sums in self._sums.values():
            for total in (sums.A, sums.G, sums.G_raw, sums.rows):
                total.zero_()

    def close(self) -> None:
        """Remove every hook."""
        self._taps.close()
