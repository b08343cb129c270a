"""From uses of a weight to the rows of its factors, for shared weights in either way (Eschenhagen et al. 2023).

expand: every position of every use is a row. reduce: one row an example, a summed and g averaged over its positions.
With a mask, positions whose loss term does not count and which no gradient reaches are left out. Tables and scales have
rows of their own in either way.
"""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from kfac_triton import ops
from kfac_triton.fisher.resolution import Resolution
from kfac_triton.fisher.sampled import Seen, SeenUse
from kfac_triton.layer import Layer
from kfac_triton.linalg.moments import rows_in
from kfac_triton.operations.conv import ConvUse
from kfac_triton.operations.embedding import TableUse
from kfac_triton.operations.layout import DENSE, DIAGONAL, UNCORRELATED, Layout
from kfac_triton.operations.linear import LinearUse
from kfac_triton.operations.norm import ScaleUse
from kfac_triton.operations.recurrent import RecurrentUse
from kfac_triton.ops import Rows
from kfac_triton.sample import Sample
from kfac_triton.structures.sums import sums_of


def samples_of(found: Resolution, seen: Seen, *, masked: bool) -> list[Sample]:
    """The rows of every layer."""
    by_weight, terms = seen.uses, seen.terms
    samples = []
    for layer, sharing in zip(found.layers, found.sharing, strict=True):
        uses, reduce = by_weight[layer.weight], sharing == "reduce"
        plain = None if masked or reduce else _plain(uses, layer, terms)
        samples.append(plain or sample_of(uses, layer, terms, reduce=reduce, masked=masked))
    return samples


def _plain(uses: list[SeenUse], layer: Layer, terms: float | Tensor) -> Sample | None:
    """The rows of a linear layer that was called once, with rows: they are what it received and what came back."""
    seen = uses[0]
    use = seen.recorded.use
    if len(uses) > 1 or len(seen.dys) > 1 or type(use) is not LinearUse or layer.layout.operation != "linear":
        return None
    x, dy, weight, ones = use.x, seen.dys[0], use.weight, layer.layout.bias
    if x.dim() != 2 or dy.dim() != 2 or dy.is_nested or use.columns or use.batch_axis or (ones and use.bias is None):
        return None
    if weight.start or weight.stop != weight.parameter.shape[0] or dy.shape != seen.recorded.shape:
        return None
    n = x.shape[0]
    return Sample(layer, [x], [dy], terms, n, ones, None, [n if n == seen.examples else 0], uses)


def sample_of(uses: list[SeenUse], layer: Layer, terms: float | Tensor, *, reduce: bool, masked: bool) -> Sample:
    """The rows of one weight; `terms` are the loss terms of all passes together."""
    layout = layer.layout
    if layout.operation == "scale":
        return _of_scales(uses, layer, terms)
    if layout.table:
        return _of_tables(uses, layer, terms, masked)
    if layout.operation == "tied":
        return _tied(uses, layer, terms, masked)
    if layout.A == UNCORRELATED:
        return _of_pixels(uses, layer, terms)
    if reduce:
        return _reduced(uses, layer, terms, masked)
    if not masked and (not layout.bias or all([seen.recorded.use.bias is not None for seen in uses])):
        return _whole(uses, layer, terms)
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
    examples = [
        _examples(seen, len(rows[0]) if rows.dim() > 2 else len(rows)) for seen, rows in zip(uses, a, strict=True)
    ]
    return Sample(layer, [*a], g, terms, count, ones=False, examples=examples, uses=uses)


def _examples(seen: SeenUse, rows: int) -> int:
    """How many examples the rows of a use belong to, those of one together; 0 where they are not told apart."""
    use = seen.recorded.use
    if use.operation in ("linear", "recurrent") and not use.batch_axis and len(use.x) != seen.examples:
        return 0
    return seen.examples if seen.examples and rows % seen.examples == 0 else 0


def _of_scales(uses: list[SeenUse], layer: Layer, terms: float | Tensor) -> Sample:
    """One row for every example: its gradient, summed over the calls of one pass."""
    gradients: dict[tuple[int, int, int], Tensor] = {}
    for seen in uses:
        use = cast(ScaleUse, seen.recorded.use)
        for i, dy in enumerate(seen.dys):
            own = use.gradients(dy.reshape(seen.recorded.shape), seen.examples, layer.layout.bias)
            key = (seen.batch, i, len(own))
            gradients[key] = gradients[key] + own if key in gradients else own
    first = {(batch, rows): own for (batch, direction, rows), own in gradients.items() if direction == 0}
    ones = [own.new_ones(rows, 1) for (_, rows), own in first.items()]
    return Sample(layer, [*gradients.values()], ones, terms, sum(len(g) for g in ones), ones=False)


def _of_tables(uses: list[SeenUse], layer: Layer, terms: float | Tensor, masked: bool) -> Sample:
    """One row for every row that was picked, but for those without a gradient; they are one-hot."""
    a: list[Rows] = []
    g: list[Tensor] = []
    count: float | Tensor = 0
    for seen in uses:
        use = cast(TableUse, seen.recorded.use)
        gradients = [seen.recorded.g(dy) for dy in seen.dys]
        kept = use.kept()
        if masked:
            reached = _reached(gradients, seen.counted)
            kept = reached if kept is None else kept & reached
        a.append(use.one_hot(None if kept is None else kept.to(torch.float32)))
        g += gradients if kept is None else [own * kept.unsqueeze(-1).to(own.dtype) for own in gradients]
        count = count + (len(gradients[0]) if kept is None else kept.sum())
    return Sample(layer, a, g, terms, count, ones=False)


def _tied(uses: list[SeenUse], layer: Layer, terms: float | Tensor, masked: bool) -> Sample:
    """One product for a table that is embedding and last layer, F = G_l (x) A_l + diag(counts / L) (x) G_e.

    As factored damping does (Martens & Grosse 2015, section 6.3), (G_l + diag(counts / L) / pi) (x) (A_l + pi G_e)
    stands for the sum, with the pi that makes the bound on what it adds smallest,
    pi^2 = tr A_l tr diag(counts / L) / (tr G_l tr G_e). What it adds is positive semi-definite.
    """
    linear = [seen for seen in uses if seen.recorded.use.operation == "linear"]
    picked = [seen for seen in uses if seen.recorded.use.operation == "embedding"]
    layout = layer.layout
    wide = replace(layer, layout=replace(layout, operation="linear"))
    table = Layer(layer.weight, None, Layout("embedding", True, A=DIAGONAL, G=layout.A))
    A, G = sums_of(sample_of(linear, wide, terms, reduce=False, masked=masked))
    counts, G_table = sums_of(_of_tables(picked, table, terms, masked))
    if layout.bias:
        G_table = F.pad(G_table, (0, 1) if layout.A == DIAGONAL else (0, 1, 0, 1))
    traces = [(t if t.dim() == 1 else t.diagonal()).sum() for t in (A, counts, G, G_table)]
    usable = torch.stack(traces).min() > 0
    pi = torch.where(usable, (traces[0] * traces[1] / (traces[2] * traces[3])).sqrt(), 1.0)
    G_all = G + (counts / pi if layout.G == DIAGONAL else torch.diag(counts / pi))
    return Sample(layer, [], [], 1.0, 1.0, ones=False, sums=(A + pi * G_table, G_all))


def _of_pixels(uses: list[SeenUse], layer: Layer, terms: float | Tensor) -> Sample:
    """A from single pixels, G as ever."""
    a: list[Rows] = [cast(ConvUse, seen.recorded.use).pixels() for seen in uses]
    g = [[seen.recorded.g(dy) for dy in seen.dys] for seen in uses]
    rows = sum(own[0].shape[-2] for own in g)
    return Sample(layer, a, [one for own in g for one in own], terms, rows, ones=False)


def _whole(uses: list[SeenUse], layer: Layer, terms: float | Tensor) -> Sample:
    """Every row counts, and all have the homogeneous coordinate 1 if one has: rows can stay as they lie in memory."""
    layout = layer.layout
    kernels = layout.operation == "conv" and ops.fuses(uses[0].recorded.use.x.device)
    a = [seen.recorded.use.a_unwritten() if layout.A == DENSE else seen.recorded.use.a() for seen in uses]
    g = [seen.recorded.g_by_images(dy) if kernels else seen.recorded.g(dy) for seen in uses for dy in seen.dys]
    counts = [rows_in(rows, 3 if layout.groups > 1 else 2) for rows in a]
    examples = [_examples(seen, count) for seen, count in zip(uses, counts, strict=True)]
    return Sample(layer, a, g, terms, sum(counts), ones=layout.bias, examples=examples, uses=uses)


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


def _reduced(uses: list[SeenUse], layer: Layer, terms: float | Tensor, masked: bool) -> Sample:
    """One row an example; the calls of a tied weight stand behind each other as positions."""
    batches: dict[int, list[SeenUse]] = {}
    for seen in uses:
        batches.setdefault(seen.batch, []).append(seen)
    a: list[Tensor] = []
    g: list[Tensor] = []
    for calls in batches.values():
        inputs, gradients, positions = zip(*(_summed(seen, layer.layout.bias, masked) for seen in calls), strict=True)
        a.append(torch.stack(inputs).sum(dim=0))
        total = torch.stack(positions).sum(dim=0).clamp(min=1)
        g += [torch.stack(by_call).sum(dim=0) / total.unsqueeze(-1) for by_call in zip(*gradients, strict=True)]
    rows = sum(calls[0].examples for calls in batches.values())
    return Sample(layer, [*a], g, terms, rows, ones=False)


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
    misplaced = (
        use.operation in ("linear", "recurrent") and use.x.dim() > 2 and use.x.shape[use.batch_axis] != seen.examples
    )
    ragged = isinstance(use, RecurrentUse) and len(set(use.steps)) > 1
    if misplaced or ragged or rows.shape[-2] % seen.examples:
        raise ValueError(
            f"weight_sharing='reduce' needs the examples on the first axis of a layer's input: "
            f"{seen.examples} examples, but a weight of shape {tuple(use.weight.parameter.shape)} "
            f"received an input of shape {tuple(use.x.shape)}; use weight_sharing='expand'"
        )
    by_example: Tensor = rows.unflatten(-2, (seen.examples, -1))
    return by_example
