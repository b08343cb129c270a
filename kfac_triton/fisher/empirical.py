"""The empirical Fisher: sums over the gradients of the user's own loss, taken by taps in the user's own passes.

With loss = loss_scale * mean nll over the L terms of a batch, divided by the k batches of an accumulated step and
multiplied by a GradScaler's s, the gradient of the summed nll is g = dy * L * k / (loss_scale * s).
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from kfac_triton.capture import (
    Call,
    Destination,
    Inputs,
    Listener,
    ModuleState,
    ModuleTaps,
    Recorded,
    UnseenUses,
    bare_pass,
    dense,
    module_use,
)
from kfac_triton.config import Settings
from kfac_triton.fisher.resolution import layout_of, sharing_of
from kfac_triton.fisher.rows import sample_of
from kfac_triton.fisher.sampled import SeenUse, counted_terms, recorded_forward, tensor_of_outputs
from kfac_triton.joint import wide_dtype
from kfac_triton.layer import Layer
from kfac_triton.likelihoods import Categorical, warn_of_image_axis
from kfac_triton.linalg import moments
from kfac_triton.linalg.moments import Accumulation, by_form
from kfac_triton.operations.layout import DIAGONAL
from kfac_triton.operations.use import Use
from kfac_triton.sample import Sample

log = logging.getLogger("kfac_triton")


class _Sums:
    """Sums of one weight since the last step: A = sum a a^T, G = sum g g^T with g = dy * L, the rows and the passes.

    Compiled code knows L only after its taps were traced: `G_raw` sums dy dy^T, and L^2 follows in `take`.
    """

    def __init__(self, module: nn.Module, weight: nn.Parameter, known: set[nn.Parameter], settings: Settings) -> None:
        bias = getattr(module, "bias", None)
        bias = bias if bias in known else None
        operation = "linear" if isinstance(module, nn.Linear) else "conv"
        layout = layout_of(operation, weight, bias is not None, settings, groups=getattr(module, "groups", 1))
        self.layer = Layer(weight, bias, layout)
        shape_A, shape_G = layout.factor_shapes(weight.shape)
        self.A = torch.zeros(shape_A, dtype=wide_dtype(weight), device=weight.device)
        self.G = torch.zeros(shape_G, dtype=wide_dtype(weight), device=weight.device)
        self.G_raw = torch.zeros_like(self.G)
        self.rows = torch.zeros((), dtype=torch.float64, device=weight.device)
        self.passes = torch.zeros((), dtype=torch.float64, device=weight.device)

    def tensors(self) -> tuple[Tensor, ...]:
        return self.A, self.G, self.G_raw, self.rows, self.passes


class _Pass:
    """One forward pass of the user's: its loss terms (0-d), with a mask which of them count (bool, flat), and while
    the whole model is compiled the weights used so far."""

    def __init__(self, terms: Tensor, used: dict[nn.Parameter, bool] | None) -> None:
        self.terms = terms
        self.used = used
        self.counted: Tensor | None = None


class EmpiricalSums(Listener):
    """Collects the sums of every tapped weight until `take`, from the passes that a ledger tells of.

    `destination`: in a backward pass, what becomes of the gradients of parameters; only accumulated ones count.
    `follow` takes in what the user changed in the model. `axis_named`: a warning has named the classes' axis already.
    """

    destination: Callable[[], Destination]
    follow: Callable[[], None]
    assigned_gradients = False
    axis_named = False

    def __init__(self, state: ModuleState, parameters: list[nn.Parameter], settings: Settings) -> None:
        self._state, self._module = state, state.root
        self._names = {p: name for name, p in state.root.named_parameters()}
        self._settings = settings
        self._likelihood = settings.likelihood or Categorical()
        device = parameters[0].device if parameters else torch.device("cpu")
        self._zero = torch.zeros((), dtype=torch.float64, device=device)
        self._pass = _Pass(self._zero, None)
        self._one = torch.ones((), device=device)
        self._sums: dict[nn.Parameter, _Sums] = {}
        self._cleared = 0
        self.refused: dict[nn.Parameter, str] = {}
        self._taps = self._tapped(parameters)

    def _tapped(self, parameters: list[nn.Parameter]) -> ModuleTaps:
        taps = ModuleTaps(self._module, parameters, self._use)
        known = set(parameters)
        self._inspected: set[nn.Parameter] = set()
        self._sums = {w: _Sums(m, w, known, self._settings) for w, m in taps.weights.items()}
        return taps

    def extend(self, parameters: list[nn.Parameter]) -> None:
        """Taps the layers of new parameters too; `parameters` are all there are."""
        self._names = {p: name for name, p in self._module.named_parameters()}
        self._taps.close()
        self._taps = self._tapped(parameters)

    def layers(self) -> list[Layer]:
        """The layers of all tapped weights."""
        return [sums.layer for weight, sums in self._sums.items() if weight not in self.refused]

    def begun(self) -> _Pass:
        """A forward pass begins."""
        if not torch.compiler.is_compiling():
            self.follow()
        self._pass = _Pass(self._zero, {} if torch.compiler.is_compiling() else None)
        return self._pass

    def dropped(self) -> None:
        """The passes so far do not count any more."""
        self.clear()

    def returned(self, inputs: Inputs, returned: object) -> None:
        """The model returned its outputs, whose loss terms are counted."""
        z = tensor_of_outputs(returned, self._settings.output).detach()
        terms = self._likelihood.terms_last(z)
        if self._settings.mask is None:
            self._pass.terms = self._zero + terms.numel() // terms.shape[-1]
        else:
            self._pass.counted = counted_terms(self._settings.mask, inputs, z, terms).flatten()
            self._pass.terms = self._pass.counted.sum().to(self._zero.dtype)

    def _use(self, module: nn.Module) -> Callable[[Tensor, Tensor], None]:
        forward, weight = self._pass, cast(nn.Parameter, module.weight)
        first = forward.used is not None and weight not in forward.used
        if forward.used is not None:
            forward.used[weight] = True

        added = [-1]

        def seen(x: Tensor, dy: Tensor) -> None:
            if torch.compiler.is_compiling():
                self._add(module_use(module, x), dy, forward)
            elif forward.terms is self._zero:
                return  # a backward pass that the model runs itself, inside its forward pass
            elif self.destination() is Destination.ACCUMULATED:
                again = added[0] == self._cleared  # another loss of the same forward pass
                added[0] = self._cleared
                self._add(module_use(module, x), dy, forward, again=again)
            if first:
                self._sums[weight].passes.add_(1)

        return seen

    def _add(self, use: Use, dy: Tensor, forward: _Pass, *, again: bool = False) -> None:
        """Adds a use to the sums; `again`: its rows of inputs are in them already."""
        sums = self._sums[use.weight.parameter]
        gradient, into = dy.to(sums.G.dtype), sums.G_raw
        if not torch.compiler.is_compiling():
            gradient, into = gradient * forward.terms.to(sums.G.dtype), sums.G
        rows = sample_of(
            [SeenUse(Recorded(use, None, dy.shape), [gradient], 0, use.x.shape[0], forward.counted)],
            sums.layer,
            1,
            reduce=sharing_of(self._settings, self._names[use.weight.parameter]) == "reduce",
            masked=self._settings.mask is not None,
        )
        one, layout = self._one, sums.layer.layout
        moments.accumulate_(
            [
                Accumulation(total, matrices, one, one, ones, form == DIAGONAL)
                for total, (matrices, ones), form in (
                    (sums.A, by_form(rows.a, layout.A, sums.A, rows.ones), layout.A),
                    (into, by_form(rows.g, layout.G, into, False), layout.G),
                )[1 if again else 0 :]
            ]
        )
        if not again:
            sums.rows.add_(rows.rows)

    def take(self, kept: list[Call], unscale: float | Tensor) -> list[Sample]:
        """The samples since the last call, from the passes `kept`; `unscale` is 1 / s of the GradScaler."""
        if not self._sums:
            return []
        trainable = {weight for weight in self._sums if weight.requires_grad}
        if trainable != self._inspected:
            self._inspected = trainable
            self._inspect(kept[0].inputs)
        present = (torch.stack([sums.rows for sums in self._sums.values()]) > 0).tolist()
        used = {weight for weight, some in zip(self._sums, present, strict=True) if some}
        for weight in self._sums:
            if weight.grad is not None and weight not in used:
                self._check_not_compiled_before(self._taps.weights[weight])
        # compiled code keeps the last of several passes before one backward pass; the taps inside it counted them all
        passes = torch.stack([sums.passes for sums in self._sums.values()]).max().clamp(min=len(kept))
        scale = (passes / self._settings.loss_scale * unscale) ** 2
        terms_of_a_pass = torch.stack([call.inputs.note.terms for call in kept]).mean()
        terms, squared = passes * terms_of_a_pass, terms_of_a_pass**2
        samples = [
            Sample(
                sums.layer,
                [],
                [],
                terms.to(sums.A.dtype),
                sums.rows.to(sums.G.dtype, copy=True),
                ones=False,
                sums=(sums.A.clone(), ((sums.G + sums.G_raw * squared) * scale).to(sums.G.dtype)),
            )
            for weight, sums in self._sums.items()
            if weight in used and weight not in self.refused
        ]
        self.clear()
        return samples

    def _inspect(self, inputs: Inputs) -> None:
        """Refuses the weights that the model also uses outside their modules, where no tap sees it."""
        self.refused, self._taps.own_calls = {}, Counter()
        try:
            with bare_pass(self._state, inputs, self._settings.seed) as replay:
                recorder, returned = recorded_forward(replay, inputs, self._sums)
                z = tensor_of_outputs(returned, self._settings.output)
                recorder.add_unseen(UnseenUses(), z)
                if not self.axis_named:
                    warn_of_image_axis(self._likelihood, z, filter(dense, inputs.tensors()))
        except Exception as error:  # the user's forward may need surroundings that step() lacks
            log.warning(
                'fisher="empirical" could not check that no weight is used outside its module: the forward pass '
                "inside step() failed (%s: %s)",
                type(error).__name__,
                str(error).split("\n", 1)[0],
            )
            return
        for weight in self._sums:
            uses = len(recorder.uses.recorded.get(weight, ()))
            if weight in recorder.uses.unsupported:
                self.refused[weight] = f"used by {recorder.uses.unsupported[weight]}, which no tap sees"
            elif uses != self._taps.own_calls[weight]:
                self.refused[weight] = "used outside its module, where no tap sees it"

    def memory(self) -> int:
        """Bytes of the sums."""
        return sum(t.nbytes for sums in self._sums.values() for t in sums.tensors())

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
        self._cleared += 1
        for sums in self._sums.values():
            for total in sums.tensors():
                total.zero_()

    def close(self) -> None:
        """Remove every hook."""
        self._taps.close()
