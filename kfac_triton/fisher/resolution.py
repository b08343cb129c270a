"""Which layers the uses of weights make: the bias and the layout of each, and why other parameters have no block."""

from __future__ import annotations

import fnmatch
from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor, nn

from kfac_triton.config import Settings
from kfac_triton.fisher.sampled import Seen, SeenUse
from kfac_triton.layer import Layer
from kfac_triton.operations.layout import BLOCKS, DIAGONAL, UNCORRELATED, Layout

UNCHAINED = ("scale", "position", "embedding")  # what stands between or before the layers of a chain


class Resolution(NamedTuple):
    """The layers that a pass saw, with how each is shared, and why other parameters have no block."""

    layers: tuple[Layer, ...]
    sharing: tuple[str, ...]
    reasons: Mapping[nn.Parameter, str]


class Resolver:
    """Finds the layers of a pass; the same object again where nothing changed since the last."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._signature: Any = None
        self._last = Resolution((), (), {})

    @property
    def reasons(self) -> Mapping[nn.Parameter, str]:
        """Why parameters had no block in the last pass."""
        return self._last.reasons

    def resolve(self, seen: Seen, parameters: Sequence[nn.Parameter], names: Mapping[nn.Parameter, str]) -> Resolution:
        """The layers with uses in `seen`, in the order of their first uses; a bias must be one of the parameters."""
        signature = _signature(seen, parameters)
        if signature != self._signature:
            self._signature, self._last = signature, self._resolved(seen, set(parameters), names)
        return self._last

    def known(self, layers: Sequence[Layer], reasons: Mapping[nn.Parameter, str]) -> Resolution:
        """The resolution of layers that were found otherwise."""
        signature = list(layers), dict(reasons)
        if signature != self._signature:
            self._signature = signature
            self._last = Resolution(tuple(layers), ("expand",) * len(layers), dict(reasons))
        return self._last

    def _resolved(self, seen: Seen, known: set[nn.Parameter], names: Mapping[nn.Parameter, str]) -> Resolution:
        uses = {w: u for w, u in seen.uses.items() if w not in seen.unsupported}
        joint, refused = joint_biases(seen, known)
        both = {bias for bias in joint.values() if bias in uses}
        reasons = {**seen.unsupported, **refused, **dict.fromkeys(both, "used in more than one way")}
        layers = []
        for weight, own in uses.items():
            if weight in both:
                continue
            bias = joint.get(weight)
            bias = None if bias in both else bias
            layout = block_layout(own, weight, bias is not None, self._settings)
            if layout is None:
                reasons[weight] = "used in more than one way"
            elif self._settings.approximation == "tridiagonal" and layout.operation in UNCHAINED:
                reasons[weight] = 'approximation="tridiagonal" has no block for it'
            else:
                layers.append(Layer(weight, bias, layout))
        return Resolution(
            tuple(layers), tuple(sharing_of(self._settings, names[layer.weight]) for layer in layers), reasons
        )


def _signature(seen: Seen, parameters: Sequence[nn.Parameter]) -> list[Any]:
    """What layers follow from; one flat list, since this is made in every pass."""
    flat: list[Any] = [*map(id, parameters)]
    for weight, own in seen.uses.items():
        flat += (id(weight), len(own))
        for one in own:
            use = one.recorded.use
            part, bias = use.weight, use.bias
            flat += (use.operation, use.transposed, use.groups, part.start, part.stop)
            flat += (None,) if bias is None else (id(bias.parameter), bias.start, bias.stop)
    for p, why in seen.unsupported.items():
        flat += (id(p), why)
    return flat


def joint_biases(
    seen: Seen, parameters: Container[nn.Parameter]
) -> tuple[dict[nn.Parameter, nn.Parameter], dict[nn.Parameter, str]]:
    """The bias of every weight that shares its block with one, and why the other biases share none."""
    weights_of: dict[nn.Parameter, set[nn.Parameter]] = {}
    biases_of: dict[nn.Parameter, set[nn.Parameter]] = {}
    refused: dict[nn.Parameter, str] = {}
    for weight, uses in seen.uses.items():
        for use in (u.recorded.use for u in uses):
            if use.bias is None or use.bias.parameter not in parameters:
                continue
            bias = use.bias.parameter
            weights_of.setdefault(bias, set()).add(weight)
            biases_of.setdefault(weight, set()).add(bias)
            if (use.bias.start, use.bias.stop) != (use.weight.start, use.weight.stop) and not use.transposed:
                refused[bias] = "added to other rows than its weight's"
    for bias, weights in weights_of.items():
        if bias in seen.unsupported:
            refused[bias] = seen.unsupported[bias]
        elif len(weights) > 1:
            refused[bias] = "the bias of several weights"
        elif next(iter(weights)) in seen.unsupported:
            refused[bias] = "its weight has no block"
    for biases in biases_of.values():
        if len(biases) > 1:
            refused.update(dict.fromkeys(biases, "one of several biases of one weight"))
    joint = {weight: b for weight, (b, *_) in ((w, tuple(bs)) for w, bs in biases_of.items()) if b not in refused}
    return joint, refused


def block_layout(uses: Sequence[SeenUse], weight: Tensor, bias: bool, settings: Settings) -> Layout | None:
    """The layout that all uses agree on; None where they differ (a weight used both ways round).

    An embedding's table that is a linear weight too is the exception: it is "tied".
    """
    seen = {(u.recorded.use.operation, u.recorded.use.transposed, u.recorded.use.groups) for u in uses}
    if seen == {("embedding", True, 1), ("linear", False, 1)}:
        return layout_of("tied", weight, bias, settings)
    if len(seen) > 1:
        return None
    operation, transposed, groups = seen.pop()
    return layout_of(operation, weight, bias, settings, transposed=transposed, groups=groups)


def sharing_of(settings: Settings, name: str) -> str:
    """How the weight of that name is shared; by the first pattern of a mapping that fits, "expand" where none does."""
    shared = settings.weight_sharing
    if isinstance(shared, str):
        return shared
    layer = name.removesuffix(".weight")
    return next((value for pattern, value in shared.items() if fnmatch.fnmatchcase(layer, pattern)), "expand")


def layout_of(
    operation: str, weight: Tensor, bias: bool, settings: Settings, *, transposed: bool = False, groups: int = 1
) -> Layout:
    """The layout of a weight that is used so, with the forms of its sides that its width and the settings ask for."""
    layout = Layout(operation, transposed, groups, bias)
    if layout.table or (operation == "scale" and settings.norm == "diagonal"):
        layout = replace(layout, A=DIAGONAL)
    if operation == "conv" and settings.spatial == "uncorrelated" and layout.taps(weight.shape) > 1:
        layout = replace(layout, A=UNCORRELATED)
    limited = layout.limited(weight.shape, settings.max_factor_dim)
    if operation == "tied" or settings.approximation == "inverse_free":
        limited = replace(limited, A=_plain(limited.A), G=_plain(limited.G), blocks_A=1, blocks_G=1)
    return limited


def _plain(form: str) -> str:
    return DIAGONAL if form == BLOCKS else form
