"""Which gradients enter the factors: K-FAC's own pass over a part of the kept inputs, through the bare module.

Forward with every use of a known weight recorded, then one backward pass to the layer outputs for targets sampled from
the likelihood ("mc"), or one for each output direction ("exact"). Kunstner et al. (2019) on why not the data's labels.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kfac_triton.capture import (
    Call,
    Inputs,
    ModuleState,
    Recorded,
    Replay,
    UnseenUses,
    UseRecorder,
    bare_pass,
    custom_layers,
    dense,
    gradients_at,
    uncheckpointed,
)
from kfac_triton.fisher.parts import Parts, batch_size
from kfac_triton.likelihoods import Likelihood, warn_of_image_axis
from kfac_triton.operations.custom import LayerBlock

log = logging.getLogger("kfac_triton")

MIN_EXAMPLES, MIN_SEQUENCES = 64, 8
MIN_TERMS = 512

Blocks = Mapping[type[nn.Module], LayerBlock]


@dataclass(eq=False, repr=False, slots=True)
class SeenUse:
    """One use of a weight, the gradients of its output (one for each backward pass), its batch and examples in that.

    `counted`: with a mask, whether each loss term of the batch counts, bool (terms,).
    """

    recorded: Recorded
    dys: list[Tensor]
    batch: int
    examples: int
    counted: Tensor | None = None


@dataclass(eq=False, repr=False)
class Seen:
    """What the passes of one step saw. `terms`: the loss terms in all of them; `unsupported`: parameter -> function;
    `roots`: where the outputs stand in the backward graph of each pass; `terms_per_example`: loss terms, masked or not.
    """

    uses: dict[nn.Parameter, list[SeenUse]] = field(default_factory=dict)
    unsupported: dict[nn.Parameter, str] = field(default_factory=dict)
    terms: float | Tensor = 0.0
    roots: list[Any] = field(default_factory=list)
    terms_per_example: int = 1


def tensor_of_outputs(returned: Any, output: Callable[[Any], Tensor] | None) -> Tensor:
    """The outputs z in what the model returned: by `output`, else the tensor itself or its `.logits`.

    Raises:
        TypeError: no floating-point tensor is there.
    """
    z = output(returned) if output is not None else returned
    if output is None and not isinstance(z, Tensor):
        z = getattr(z, "logits", z)
    if not isinstance(z, Tensor) or not z.is_floating_point() or z.dim() == 0:
        came = f"a {z.dtype} tensor of shape {tuple(z.shape)}" if isinstance(z, Tensor) else f"a {type(z).__name__}"
        raise TypeError(
            f"the model's output must be a floating-point tensor with at least one axis; got {came}. "
            "Name it with output=, a callable from what the model returned to the tensor: output=lambda r: r[0]"
        )
    return z


def recorded_forward(
    replay: Replay, inputs: Inputs, parameters: Iterable[nn.Parameter], blocks: Blocks | None = None
) -> tuple[UseRecorder, Any]:
    """What the called module does with `parameters` on `inputs`, and what it returned.

    `blocks`: those of the user's own types of layers.
    """
    module = inputs.module
    args, kwargs = replay.start(inputs.args, inputs.kwargs)
    recorder = UseRecorder(parameters)
    if not (blocks or replay.recurrent):
        with recorder:
            return recorder, module(*args, **kwargs)
    with uncheckpointed(module), custom_layers(module, recorder, blocks or {}), recorder:
        return recorder, module(*args, **kwargs)


def visible_inputs(inputs: Inputs) -> Any:
    """What `mask` receives: the only argument itself, several as a tuple, keyword arguments alone as a dictionary."""
    if not inputs.kwargs:
        return inputs.args[0] if len(inputs.args) == 1 else inputs.args
    return (*inputs.args, inputs.kwargs) if inputs.args else inputs.kwargs


def counted_terms(mask: Callable[[Any, Tensor], Tensor], inputs: Inputs, outputs: Tensor, terms: Tensor) -> Tensor:
    """The bool tensor of the loss terms that count, shape (N, ...) for `terms` of shape (N, ..., C).

    Raises:
        ValueError: `mask` returned something else.
    """
    counted = mask(visible_inputs(inputs), outputs)
    if not isinstance(counted, Tensor) or counted.dtype != torch.bool or counted.shape != terms.shape[:-1]:
        came = f"{counted.dtype} {tuple(counted.shape)}" if isinstance(counted, Tensor) else type(counted).__name__
        raise ValueError(
            "mask must return a bool tensor with one entry for each loss term, "
            f"shape {tuple(terms.shape[:-1])}; got {came}"
        )
    return counted


@dataclass(eq=False, repr=False)
class FisherPass:
    """Runs the called modules on kept inputs and collects the uses of its weights with their gradients.

    `fraction` of each batch is used, never fewer than `least_examples`, from a place that moves with each update; in
    the k-th update at least 1/k of it, since the first averages stand on so little. Each pass starts where the user's
    pass began and leaves everything as it was.
    """

    state: ModuleState
    likelihood: Likelihood
    output: Callable[[Any], Tensor] | None
    mask: Callable[[Any, Tensor], Tensor] | None
    exact: bool
    fraction: float
    seed: int
    blocks: Blocks = field(default_factory=dict)
    parts: Parts = field(default_factory=Parts)
    _unseen: UnseenUses = field(default_factory=UnseenUses)
    axis_named: bool = False
    _outputs_checked: bool = False

    def run(
        self,
        kept: list[Call],
        parameters: list[nn.Parameter],
        update: int,
        terms_per_example: int = 1,
        rank: int = 0,
    ) -> Seen:
        """`update`: the number of this factor update; with `seed` it decides samples, dropout and the part used.

        `terms_per_example`: what the last update saw. `rank`: among data-parallel ranks, which sample apart.
        """
        seen = Seen(terms_per_example=terms_per_example)
        for number, call in enumerate(kept):
            call.check_unwritten()
            seed = mixed_seed(self.seed, update, number + (rank << 32))
            with bare_pass(self.state, call.inputs, seed) as replay:
                self._one_batch(replay, call.inputs, parameters, update, seed, number, seen)
        return seen

    def _one_batch(
        self,
        replay: Replay,
        inputs: Inputs,
        parameters: list[nn.Parameter],
        update: int,
        seed: int,
        number: int,
        seen: Seen,
    ) -> None:
        inputs, (recorder, z) = self.parts.run(
            inputs,
            lambda part: self._outputs(replay, part, parameters),
            fraction=max(self.fraction, 1 / (update + 1)),
            update=update,
            least=least_examples(seen.terms_per_example),
        )
        recorder.add_unseen(self._unseen, z)
        self.check_outputs(inputs, z)
        directions, valid, examples = self.directions(inputs, z.detach(), seed, seen)
        seen.unsupported.update(recorder.uses.unsupported)
        seen.roots.append(z.grad_fn)
        recorded = [(w, r) for w, uses in recorder.uses.recorded.items() for r in uses]
        if not recorded or not z.requires_grad:
            return
        edges = [r.edge for _, r in recorded]
        dys: list[list[Tensor]] = [[] for _ in recorded]
        for i, direction in enumerate(directions):
            found = gradients_at(edges, z, direction, keep_graph=i + 1 < len(directions))
            for into, dy in zip(dys, found, strict=True):
                if dy is not None:
                    into.append(dy)
        counted = None if valid is None else valid.flatten()
        uses = seen.uses
        for (weight, r), gradients in zip(recorded, dys, strict=True):
            if gradients:
                use = SeenUse(r, gradients, number, examples, counted)
                if weight in uses:
                    uses[weight].append(use)
                else:
                    uses[weight] = [use]

    def directions(self, inputs: Inputs, z: Tensor, seed: int, seen: Seen) -> tuple[list[Tensor], Tensor | None, int]:
        """What to back-propagate from the outputs z, which of their terms count (None: all), and their examples.

        The loss terms are added to those of `seen`.
        """
        terms = self.likelihood.terms_last(z)
        terms = terms.float() if terms.dtype.itemsize < 4 else terms
        valid = None if self.mask is None else counted_terms(self.mask, inputs, z, terms)
        count = math.prod(terms.shape[:-1])
        seen.terms = seen.terms + (count if valid is None else valid.sum())
        examples = batch_size(inputs) or z.shape[0]
        seen.terms_per_example = max(count // max(examples, 1), 1)
        directions = []
        for d in self._directions(terms, seed):
            back = self.likelihood.terms_back(d if valid is None else d * valid.unsqueeze(-1), z)
            directions.append(back if back.dtype == z.dtype else back.to(z.dtype))
        return directions, valid, examples

    def check_outputs(self, inputs: Inputs, z: Tensor) -> None:
        """Warns where the outputs of the very first pass are probabilities, or have their classes on another axis.

        Later passes are not looked at: a device would have to be waited for. `axis_named`: it was said already.
        """
        if self._outputs_checked:
            return
        self._outputs_checked = True
        if not self.axis_named:
            warn_of_image_axis(self.likelihood, z, filter(dense, inputs.tensors()))
        if self.likelihood.looks_like_probabilities(z):
            log.warning(
                "the model returns probabilities, but likelihood=%r takes logits: pass logits, without the softmax or "
                "sigmoid, and use the loss that belongs to them (cross_entropy, binary_cross_entropy_with_logits); or "
                "name the logits with output=",
                self.likelihood,
            )

    def _directions(self, terms: Tensor, seed: int) -> Iterator[Tensor]:
        """What to back-propagate from the outputs `terms` (N, ..., C): the gradients of the summed nll.

        Exact: column c of the likelihood's B for one position at a time, since positions may mix inside the network,
        and with a random sign for every example: second moments of one example's rows do not see it, and where a use
        serves the whole batch, as a table of positions does, those of different examples cancel on average.
        """
        if not self.exact:
            yield self.likelihood.sampled_gradient(terms, torch.Generator(terms.device).manual_seed(seed))
            return
        positions = math.prod(terms.shape[1:-1])
        generator = torch.Generator(terms.device).manual_seed(seed)
        for c in range(terms.shape[-1]):
            column = self.likelihood.fisher_column(terms, c)
            flat = column.reshape(terms.shape[0], positions, -1)
            for t in range(positions):
                one = torch.zeros_like(flat)
                coin = torch.randint(2, (len(flat), 1), generator=generator, device=flat.device)
                one[:, t] = flat[:, t] * (2 * coin - 1).to(flat.dtype)
                yield one.reshape(terms.shape)

    def _outputs(
        self, replay: Replay, inputs: Inputs, parameters: list[nn.Parameter]
    ) -> tuple[torch.Size, tuple[UseRecorder, Tensor]]:
        recorder, returned = recorded_forward(replay, inputs, parameters, self.blocks)
        z = tensor_of_outputs(returned, self.output)
        return self.likelihood.terms_last(z).shape, (recorder, z)


def least_examples(terms_per_example: int) -> int:
    """The fewest examples of an update: 64; of sequences, whose terms are alike, as many as have 512 loss terms, and at
    least 8."""
    return min(max(math.ceil(MIN_TERMS / terms_per_example), MIN_SEQUENCES), MIN_EXAMPLES)


def mixed_seed(seed: int, update: int, batch: int) -> int:
    """One 63-bit seed from three counters (the finaliser of SplitMix64)."""
    x = (seed * 0x9E3779B97F4A7C15 + update * 0xBF58476D1CE4E5B9 + batch * 0x94D049BB133111EB) & (2**64 - 1)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = ((x ^ (x >> shift)) * factor) & (2**64 - 1)
    return (x ^ (x >> 31)) >> 1
