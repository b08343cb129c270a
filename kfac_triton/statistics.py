"""From uses of a weight to the rows of its factors, for shared weights in either way (Eschenhagen et al. 2023).

expand: every position of every use is a row. reduce: one row an example, a summed and g averaged over its positions.
With a mask, positions whose loss term does not count and which no gradient reaches are left out.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn

from kfac_triton import ops
from kfac_triton.approximations.kronecker import Statistics
from kfac_triton.blocks.layout import Layout
from kfac_triton.factors import rows_in
from kfac_triton.fisher import Seen, SeenUse


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


def block_layout(uses: Iterable[SeenUse], weight: Tensor, bias: bool, max_factor_dim: int) -> Layout | None:
    """The layout that all uses agree on; None where they differ (a weight used both ways round)."""
    seen = {(u.recorded.use.operation, u.recorded.use.transposed, u.recorded.use.groups) for u in uses}
    if len(seen) > 1:
        return None
    return limited(Layout(*seen.pop(), bias=bias), weight, max_factor_dim)


def limited(layout: Layout, weight: Tensor, max_factor_dim: int) -> Layout:
    """The layout with a diagonal on every side wider than `max_factor_dim`."""
    d_in, d_out = layout.dims(weight.shape)
    return replace(layout, diagonal_A=d_in > max_factor_dim, diagonal_G=d_out > max_factor_dim)


def weight_statistics(
    uses: list[SeenUse], layout: Layout, bias: nn.Parameter | None, terms: float | Tensor, *, reduce: bool, masked: bool
) -> Statistics:
    """The rows of one weight; `terms` are the loss terms of all passes together."""
    if reduce:
        return _reduced(uses, layout, bias, terms, masked)
    if not masked and (not layout.bias or all(seen.recorded.use.bias is not None for seen in uses)):
        return _whole(uses, layout, bias, terms)
    a, g, columns = [], [], []
    count: float | Tensor = 0
    for seen in uses:
        rows = seen.recorded.use.a()
        gradients = [seen.recorded.g(dy) for dy in seen.dys]
        counts = _reached(gradients, seen.counted) if masked else None
        a.append(rows if counts is None else rows * counts.unsqueeze(-1).to(rows.dtype))
        g += gradients
        count = count + (rows.shape[-2] if counts is None else counts.sum())
        columns.append(_homogeneous(seen, rows, counts))
    if layout.bias:
        a = [torch.cat([rows, column.unsqueeze(-1)], dim=-1) for rows, column in zip(a, columns, strict=True)]
    return Statistics(layout, bias, [*a], g, terms, count, ones=False)


def _whole(uses: list[SeenUse], layout: Layout, bias: nn.Parameter | None, terms: float | Tensor) -> Statistics:
    """Every row counts, and all have the homogeneous coordinate 1 if one has: rows can stay as they lie in memory."""
    axes = 3 if layout.groups > 1 else 2
    kernels = ops.fuses(uses[0].recorded.use.x.device)
    a = [seen.recorded.use.a() if layout.diagonal_A else seen.recorded.use.a_unwritten() for seen in uses]
    g = [seen.recorded.g_by_images(dy) if kernels else seen.recorded.g(dy) for seen in uses for dy in seen.dys]
    return Statistics(layout, bias, a, g, terms, sum(rows_in(rows, axes) for rows in a), ones=layout.bias)


def _homogeneous(seen: SeenUse, rows: Tensor, counts: Tensor | None) -> Tensor:
    """The homogeneous coordinate of every row: 1 in a use with the bias, 0 without, 0 where a row does not count."""
    column = rows.new_full(rows.shape[:-1], float(seen.recorded.use.bias is not None))
    return column if counts is None else column * counts.to(rows.dtype)


def _reached(gradients: list[Tensor], counted: Tensor | None) -> Tensor:
    """Rows (n,) that count: their own loss term does, or in some backward pass (or group) a gradient reached them.

    Rows and loss terms are the same positions where there are as many of them.
    """
    reached = torch.stack([(g != 0).any(dim=-1) for g in gradients]).any(dim=0)
    reached = reached.any(dim=0) if reached.dim() > 1 else reached
    return reached | counted if counted is not None and counted.shape == reached.shape else reached


def _reduced(
    uses: list[SeenUse], layout: Layout, bias: nn.Parameter | None, terms: float | Tensor, masked: bool
) -> Statistics:
    """One row an example; the calls of a tied weight stand behind each other as positions."""
    batches: dict[int, list[SeenUse]] = {}
    for seen in uses:
        batches.setdefault(seen.batch, []).append(seen)
    a: list[Tensor] = []
    g: list[Tensor] = []
    for calls in batches.values():
        inputs, gradients, positions = zip(*(_summed(seen, layout.bias, masked) for seen in calls), strict=True)
        a.append(torch.stack(inputs).sum(dim=0))
        total = torch.stack(positions).sum(dim=0).clamp(min=1)
        g += [torch.stack(by_call).sum(dim=0) / total.unsqueeze(-1) for by_call in zip(*gradients, strict=True)]
    rows = sum(calls[0].examples for calls in batches.values())
    return Statistics(layout, bias, [*a], g, terms, rows, ones=False)


def _summed(seen: SeenUse, bias: bool, masked: bool) -> tuple[Tensor, list[Tensor], Tensor]:
    """Sums over one call's positions: a (N, d_in[+1]), g (N, d_out) for each backward pass, and the positions (N,)."""
    rows = seen.recorded.use.a()
    gradients = [seen.recorded.g(dy) for dy in seen.dys]
    counts = (_reached(gradients, seen.counted) if masked else rows.new_ones(rows.shape[-2])).to(rows.dtype)
    if bias:
        rows = torch.cat([rows, _homogeneous(seen, rows, None).unsqueeze(-1)], dim=-1)
    rows = rows * counts.unsqueeze(-1)
    return (
        _per_example(rows, seen).sum(dim=-2),
        [_per_example(gradient, seen).sum(dim=-2) for gradient in gradients],
        _per_example(counts.unsqueeze(-1), seen).sum(dim=(-2, -1)),
    )


def _per_example(rows: Tensor, seen: SeenUse) -> Tensor:
    """Rows (..., N * positions, d) as (..., N, positions, d)."""
    use = seen.recorded.use
    misplaced = use.operation == "linear" and use.x.dim() > 2 and use.x.shape[use.batch_axis] != seen.examples
    if misplaced or rows.shape[-2] % seen.examples:
        raise ValueError(
            f"weight_sharing='reduce' needs the examples on the first axis of a layer's input: "
            f"{seen.examples} examples, but a weight of shape {tuple(use.weight.parameter.shape)} "
            f"received an input of shape {tuple(use.x.shape)}; use weight_sharing='expand'"
        )
    by_example: Tensor = rows.unflatten(-2, (seen.examples, -1))
    return by_example
