"""Laws of every structure of curvature, over all forms of layers, against definitions in dense float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import dense
import pytest
import torch
from definitions import DECAY
from laws import ALL, DAMPING, MEMBERS, NOT_INVERSE_FREE, assert_follows, bench_of, definitions, given, refresh, run
from stacks import FORMS, Bench, in_use, rows_of, sample_of, spoiled, sums_instead
from torch import Tensor

from kfac_triton.ops import Patches

pytestmark = pytest.mark.usefixtures("matrix_memory")
BLOCKED = ("blocks", "blocks of A", "pixels", "pixels without bias", "pixels in groups")  # of which there are no sums


@pytest.mark.parametrize("count", [1, MEMBERS])
@ALL
def test_updates_and_products_are_those_of_the_definition(approximation, form, count):
    """Inverses are refreshed after the second and the fifth of seven updates, and stay as they were in between."""
    bench = bench_of(approximation, form, count)
    wanted = definitions(bench, approximation)
    run(bench, wanted, range(2), (1,))
    assert_follows(bench, wanted)
    run(bench, wanted, range(2, 7), (4,))
    assert_follows(bench, wanted)


@ALL
def test_rows_added_layer_by_layer_give_the_same(approximation, form):
    together, apart = (bench_of(approximation, form) for _ in range(2))
    for bench in (together, apart):
        for step in range(7):
            bench.update_(given(bench, step)[1], damping=DAMPING, decay=DECAY, together=bench is together)
            if step > 2:  # before, there are fewer rows than eigenvectors, which are then any
                bench.refresh_(DAMPING)
    grad = dense.randn(*together.memory.V.matrices[0].shape)
    dense.assert_exact(together.apply(grad), apart.apply(grad))
    for i in range(MEMBERS):
        for F, other in zip(together.structure.factors(i, 0.1), apart.structure.factors(i, 0.1), strict=True):
            dense.assert_exact(F, other, 1e-9)


@pytest.mark.parametrize("approximation", ["kronecker", "eigen", "inverse_free"])
@pytest.mark.parametrize("groups", [1, 2])
def test_patches_that_are_not_written_are_their_rows(approximation, groups):
    """The image and the window of a convolution in the place of its rows."""
    form = "conv in groups" if groups > 1 else "conv"
    written, unwritten = bench_of(approximation, form), bench_of(approximation, form)
    window = (1, 3) if groups > 1 else (2, 2)
    for step in range(3):
        samples = []
        for i in range(MEMBERS):
            rows = rows_of(written.stack.layers[i], 10 * step + i, n=2 * 3 * 3)
            image = dense.randn(2, 2 * groups, 2 + window[0], 2 + window[1], seed=10 * step + i)
            patches = Patches(image, (*window, 1, 1, 0, 0, 0, 0, 1, 1), groups)
            own = sample_of(written.stack.layers[i], rows)
            samples.append((replace(own, a=[patches.rows()]), replace(own, a=[patches])))
        for bench, chosen in ((written, 0), (unwritten, 1)):
            bench.update_([pair[chosen] for pair in samples], damping=DAMPING)
            bench.refresh_(DAMPING)
    grad = dense.randn(*written.memory.V.matrices[0].shape)
    dense.assert_exact(unwritten.apply(grad), written.apply(grad))


@pytest.mark.parametrize("form", [form for form in FORMS if not FORMS[form][0].table and form not in BLOCKED])
@pytest.mark.parametrize("approximation", ["kronecker", "eigen", "inverse_free"])
def test_sums_are_their_rows(approximation, form):
    """As a table that is a last layer too gives them, and the empirical Fisher; no eigenvalues are measured then."""
    if approximation == "inverse_free" and FORMS[form][0].A in NOT_INVERSE_FREE:
        pytest.skip("no such side")
    by_rows, by_sums = bench_of("kronecker" if approximation == "eigen" else approximation, form), None
    by_sums = bench_of(approximation, form)
    for step in range(3):
        rows, samples = given(by_rows, step)
        by_rows.update_(samples, damping=DAMPING)
        by_sums.update_([sums_instead(one, own) for one, own in zip(samples, rows, strict=True)], damping=DAMPING)
    by_rows.refresh_(DAMPING), by_sums.refresh_(DAMPING)
    if approximation != "eigen" or not by_sums.structure.stack.layers[0].layout.undivided:
        grad = dense.randn(*by_rows.memory.V.matrices[0].shape)
        dense.assert_exact(by_sums.apply(grad), by_rows.apply(grad), 1e-9)


# ----------------------------------------------------------------------------------------- samples that are refused


@pytest.mark.parametrize("bad", [(1,), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("at", [0, 3])
@ALL
def test_a_refused_sample_changes_no_bit_and_the_others_move_as_if_alone(approximation, form, at, bad):
    bench = bench_of(approximation, form)
    wanted = definitions(bench, approximation)
    for step in range(5):
        rows, samples = given(bench, step)
        refused = bad if step == at else ()
        samples = [spoiled(own) if i in refused else own for i, own in enumerate(samples)]
        before = {i: snapshot(bench, i) for i in refused}
        bench.update_(samples, damping=DAMPING, decay=DECAY)
        for i, held in before.items():
            assert_same(snapshot(bench, i), held)
        for i, (one, own) in enumerate(zip(wanted, rows, strict=True)):
            if i not in refused:
                one.update(own, DAMPING[i])
        if step in (1, 4) or not all(bench.structure.ready):
            refresh(bench, wanted)
    assert_follows(bench, wanted)


@ALL
def test_a_member_without_a_sample_stays_as_it_is(approximation, form):
    bench = bench_of(approximation, form)
    wanted = definitions(bench, approximation)
    for step in range(4):
        rows, samples = given(bench, step)
        left_out = step % 2
        before = snapshot(bench, left_out)
        bench.update_([None if i == left_out else own for i, own in enumerate(samples)], damping=DAMPING, decay=DECAY)
        assert_same(snapshot(bench, left_out), before)
        for i, (one, own) in enumerate(zip(wanted, rows, strict=True)):
            if i != left_out:
                one.update(own, DAMPING[i])
        refresh(bench, wanted)
    assert_follows(bench, wanted)


def snapshot(bench: Bench, member: int) -> dict[str, Any]:
    """What a member holds, and its gradient's product where there is one; of rows that wait, the average with them."""
    held = in_use(bench.structure.tensors(member))
    if any(name.endswith("_waiting") for name in bench.structure.tensors(member)):
        raw = {f"{side}{end}" for side in "AG" for end in ("", "_rows", "_weights", "_kept", "_waiting")}
        held = {name: value for name, value in held.items() if name not in raw}
        held |= {f"settled {side}": getattr(bench.structure, side).current(member) for side in "AG"}
    if bench.structure.ready[member]:
        held["V"] = bench.apply(dense.randn(*bench.memory.V.matrices[0].shape))[member]
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in held.items()}


def assert_same(value: dict[str, Any], expected: dict[str, Any]) -> None:
    """To the bit; where rows wait, their product may add in another order."""
    for name, held in expected.items():
        if f"settled {name}" in value:  # rows wait since
            continue
        tolerance = 1e-14 if name.startswith("settled") else 0.0
        torch.testing.assert_close(value[name], held, rtol=tolerance, atol=tolerance)
