"""What an optimizer tells of itself: its factors, which parameters have a block, and how much memory it takes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kfac_triton.config import adapts
from kfac_triton.distributed import Ranks
from kfac_triton.estimator import CurvatureEstimator
from kfac_triton.fisher.expected import expected_uses
from kfac_triton.fisher.resolution import UNCHAINED, layout_of
from kfac_triton.joint import Joint, stacked
from kfac_triton.layer import Layer
from kfac_triton.steps.damping import factored_damping
from kfac_triton.steps.memory import scratch_nbytes
from kfac_triton.structures.kronecker import Kronecker
from kfac_triton.structures.registry import structure_of
from kfac_triton.structures.tridiagonal import Chain, Place

Groups = Sequence[Mapping[str, Any]]


def factors(estimator: CurvatureEstimator, groups: Groups) -> dict[str, dict[str, Tensor]]:
    """Copies of the factors of every layer that has had an update, by the weight's name less ".weight"."""
    found = {}
    for weight, layer in estimator.layers.items():
        if estimator.updated(weight):
            number, member = estimator.place(weight)
            damping = factored_damping(groups[estimator.group_numbers[id(weight)]])
            A, G = estimator.structures[number].factors(member, damping)
            found[weight] = {"A": layer.layout.in_weight_order(A, weight.shape), "G": G}
    return {name.removesuffix(".weight"): found[p] for p, name in estimator.names.items() if p in found}


def known_layers(estimator: CurvatureEstimator, parameters: Sequence[nn.Parameter]) -> list[Layer]:
    """The layers; before the first pass those that the modules' types promise."""
    if estimator.coverage.observed:
        return list(estimator.layers.values())
    if estimator.source.sums is not None:
        return estimator.source.sums.layers()
    settings, known = estimator.settings, set(parameters)
    layers: dict[nn.Parameter, Layer] = {}
    for use in expected_uses(estimator.source.module, settings.blocks):
        weight, bias = use.weight, use.bias if use.bias in known else None
        unchained = settings.approximation == "tridiagonal" and use.operation in UNCHAINED
        if weight not in known or not weight.requires_grad or unchained:
            continue
        operation = use.operation
        if weight in layers:  # a table that a linear layer shares, or a layer that is called from two places
            operations = {layers[weight].layout.operation, operation}
            operation = "tied" if operations == {"embedding", "linear"} else operation
            bias = bias if bias is not None else layers[weight].bias
        layout = layout_of(
            operation, weight, bias is not None, settings,
            transposed=use.transposed and operation != "tied", groups=use.groups,
        )  # fmt: skip
        layers[weight] = Layer(weight, bias, layout)
    return list(layers.values())


def coverage(estimator: CurvatureEstimator, parameters: Sequence[nn.Parameter]) -> dict[str, str]:
    """{parameter name: block name}, "fallback" without one."""
    layers = known_layers(estimator, parameters)
    names = {layer.weight: layer.layout.name for layer in layers}
    names |= {layer.bias: layer.layout.name for layer in layers if layer.bias is not None}
    return {estimator.names[p]: names.get(p, "fallback") for p in parameters}


def memory_usage(estimator: CurvatureEstimator, parameters: Sequence[nn.Parameter], groups: Groups) -> dict[str, int]:
    """Bytes by purpose, see `KFAC.memory_usage`."""
    layers, settings = known_layers(estimator, parameters), estimator.settings
    stacks = stacked(layers, imagined=True, rows_wait=settings.fisher != "empirical")
    structures, chain = estimator.structures, estimator.chain
    if not estimator.coverage.observed:
        ranks = Ranks(nn.Module())
        structures = [structure_of(stack, ranks, settings.approximation, settings.temporal) for stack in stacks]
        chain = _expected_chain(layers, structures, ranks) if settings.approximation == "tridiagonal" else None
    usage = Counter({"factors": 0, "inverses": 0, "rows": 0})
    for structure in structures:
        usage.update(structure.nbytes())
    if chain is not None:
        usage.update(chain.nbytes())
    covered = {p for layer in layers for p in (layer.weight, layer.bias)}
    capped = settings.rule == "cap"
    moving = any(group["momentum"] != 0 or group["adaptive_damping"] for group in groups)
    joint = Joint(stacks).nbytes if stacks else 0
    usage["momentum"] = 2 * joint if capped else joint if moving else 0
    usage["fallback"] = sum(2 * p.nbytes for p in parameters if p not in covered)
    usage["gradients"] = 2 * joint
    usage["proposal"] = joint if adapts(groups[0]) else 0
    usage["scratch"] = scratch_nbytes(stacks)
    if estimator.source.sums is not None:
        usage["sums"] = estimator.source.sums.memory()
    of_pass = estimator.pass_nbytes + sum(structure.room_nbytes() for structure in structures)
    return {**usage, "total": sum(usage.values()), "pass": of_pass}


def _expected_chain(layers: Sequence[Layer], structures: Sequence[Any], ranks: Ranks) -> Chain | None:
    places = {
        layer.weight: Place(number, structure, member)
        for number, structure in enumerate(structures)
        for member, layer in enumerate(structure.stack.layers)
        if isinstance(structure, Kronecker)
    }
    return Chain([places[layer.weight] for layer in layers], ranks) if layers else None


def factor_diagnostics(F: Tensor) -> dict[str, float]:
    """Trace and condition of a factor, over all its groups."""
    diagonal = F.dim() == 1 or F.shape[-1] != F.shape[-2]
    eigenvalues = (F if diagonal else torch.linalg.eigvalsh(F.double())).double().flatten()
    least, most = float(eigenvalues.min()), float(eigenvalues.max())
    return {"trace": float(eigenvalues.sum()), "condition": most / least if least > 0 else math.inf}
