"""The cases of the structures' laws: every approximation over every form of layer, with samples given in every way."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import dense
import pytest
from definitions import CHAINS, DECAY, Definition, as_dense, definition
from stacks import FORMS, Bench, Rows, rows_of, sample_of, stack_of

from kfac_triton.operations.layout import BLOCKS, DENSE, DIAGONAL, UNCORRELATED
from kfac_triton.sample import Sample

MEMBERS = 3
DAMPING = (0.3, 0.02, 1.5)
NOT_INVERSE_FREE = (BLOCKS, UNCORRELATED)  # such sides are diagonal, or refused, before a structure sees them


def cases() -> Iterator[tuple[str, str]]:
    for form, (layout, _) in FORMS.items():
        yield "kronecker", form
        if layout.A == layout.G == DENSE:
            yield "eigen", form
        if layout.A not in NOT_INVERSE_FREE:
            yield "inverse_free", form
    yield from ((chain, "recurrent") for chain in CHAINS)


ALL = pytest.mark.parametrize(("approximation", "form"), [pytest.param(*c, id=", ".join(c)) for c in cases()])


def bench_of(approximation: str, form: str, count: int = MEMBERS) -> Bench:
    temporal = approximation if approximation in CHAINS else "independent"
    return Bench(stack_of(form, count), "kronecker" if approximation in CHAINS else approximation, temporal)


def definitions(bench: Bench, approximation: str) -> list[Definition]:
    return [definition(layer, approximation) for layer in bench.stack.layers]


def assert_follows(bench: Bench, wanted: list[Definition], seed: int = 0) -> None:
    """Factors, and the product with random gradients of all members at once."""
    V_of = bench.memory.V.matrices[0]
    grad = dense.randn(*V_of.shape, seed=seed + 100)
    V = bench.apply(grad)
    for i, one in enumerate(wanted):
        dense.assert_exact(V[i], one.solved(grad[i]), 1e-9)
        if one.approximation == "inverse_free":
            continue
        for F, side in zip(bench.structure.factors(i, DAMPING[i]), "AG", strict=True):
            expected = as_dense(one.A if side == "A" else one.G, one.layer, side)
            diagonal = getattr(one.layer.layout, side) == DIAGONAL
            dense.assert_exact(F, expected.diagonal(dim1=-2, dim2=-1) if diagonal else expected)
        if one.approximation in CHAINS:
            for name, value in (("A_lag", one.lag_A), ("G_lag", one.lag_G)):
                dense.assert_exact(bench.state(i)[name], value)


# Ways in which a pass gives its rows, by update; the first and the fourth go in one product where there is room.
WAYS: list[dict[str, Any]] = [
    {}, {"matrices": 2, "directions": 2}, {"examples": 2}, {}, {"ones": False}, {"images": True}, {"directions": 2},
]  # fmt: skip


def given(bench: Bench, step: int) -> tuple[list[Rows], list[Sample]]:
    """Rows of one update for every member, and the same as a pass gives them."""
    way = dict(WAYS[step % len(WAYS)])
    how = {name: way.pop(name) for name in ("ones", "images") if name in way}
    layout = bench.stack.layers[0].layout
    if layout.groups > 1 or layout.table:
        how.pop("images", None)
    rows = [rows_of(layer, 10 * step + i, **way) for i, layer in enumerate(bench.stack.layers)]
    return rows, [sample_of(layer, own, **how) for layer, own in zip(bench.stack.layers, rows, strict=True)]


def run(
    bench: Bench, wanted: list[Definition], steps: range, refreshes: tuple[int, ...], together: bool = True
) -> None:
    damping = DAMPING[: len(wanted)]
    for step in steps:
        rows, samples = given(bench, step)
        bench.update_(samples, damping=damping, decay=DECAY)
        for one, own, d in zip(wanted, rows, damping, strict=True):
            one.update(own, d)
        if step in refreshes:
            refresh(bench, wanted)


def refresh(bench: Bench, wanted: list[Definition]) -> None:
    """Renews the inverses of members that have had an update."""
    damping = DAMPING[: len(wanted)]
    assert all(bench.refresh_(damping))
    for i, one in enumerate(wanted):
        if one.k:
            one.refresh(damping[i], bench.state(i))
