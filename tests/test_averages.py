"""Running averages: how far each layer moves, which samples stay out, and when that is told."""

from __future__ import annotations

import math
import warnings
from typing import Any

import dense
import pytest
import torch
from stacks import ALONE, F64, Bench, rows_of, sample_of, stack_of

from kfac_triton.averages import LASTING, OUTLIER, OUTLIER_GRADIENTS, Averages
from kfac_triton.joint import Stack, stacked
from kfac_triton.sample import Sample
from kfac_triton.structures.base import Moves


def averages_of(form: str = "linear", count: int = 3, dtype: torch.dtype = F64) -> tuple[Averages, Stack]:
    stack = stack_of(form, count, dtype=dtype)
    return Averages([stack], ALONE), stack


def samples_of(stack: Stack, seed: int, sizes: tuple[float, ...] = (1.0, 1.0, 1.0), side: str = "a") -> list[Sample]:
    """One sample a layer, one side of it times its size."""
    found = []
    for i, layer in enumerate(stack.layers):
        own = sample_of(layer, rows_of(layer, 10 * seed + i))
        for t in getattr(own, side):
            t.mul_(sizes[i])
        found.append(own)
    return found


def moved(averages: Averages, stack: Stack, samples: list[Any], decay: tuple[float, ...] = (0.6,) * 3) -> Moves:
    averages.measure_([samples])
    (moves,) = averages.moves([samples], list(decay[: len(samples)]))
    return moves


def square(matrices: list[Any]) -> torch.Tensor:
    return sum((t.square().sum() for t in matrices), torch.zeros((), dtype=F64))


def told(averages: Averages) -> list[tuple[int, bool]]:
    """(number of the layer, whether its numbers were finite), as reported."""
    found = []
    averages.report(lambda layer, finite: found.append((averages._layers.index(layer), finite)))
    return found


def test_the_rule_by_layer():
    """beta_k = min(1 - 1/k, decay), each layer with its own k and decay; alpha shares it out over terms and rows."""
    averages, stack = averages_of()
    decays = (0.0, 0.6, 0.99)
    counts = [0, 0, 0]
    for step in range(8):
        samples: list[Sample | None] = list(samples_of(stack, step))
        samples[step % 3] = None
        moves = moved(averages, stack, samples, decays)
        for i, own in enumerate(samples):
            counts[i] += own is not None
            beta = 1.0 if own is None else min(1 - 1 / counts[i], decays[i])
            assert bool(moves.ok[i]) == (own is not None)
            values = float(moves.beta[i]), float(moves.share[i]), float(moves.alpha_A[i]), float(moves.alpha_G[i])
            assert values == pytest.approx((beta, 1 - beta, (1 - beta) / 5, (1 - beta) / 6), rel=1e-14)
        assert moves.uniform is None
    assert averages.updates.tolist() == counts
    assert averages.updated(slice(0, 3)) == [True] * 3


def test_numbers_that_all_layers_share_are_known_on_the_host():
    averages, stack = averages_of()
    for k in (1, 2, 3):
        moves = moved(averages, stack, samples_of(stack, k))
        beta = min(1 - 1 / k, 0.6)
        assert moves.uniform == pytest.approx((beta, (1 - beta) / 5, (1 - beta) / 6))
        assert float(moves.beta[0]) == moves.uniform[0]
    assert moved(averages, stack, samples_of(stack, 4), (0.6, 0.7, 0.6)).uniform is None


@pytest.mark.parametrize("terms", [torch.tensor(5), torch.tensor(5.0), 5])
def test_counts_may_be_tensors(terms):
    """As with a mask; a sample without any loss term stays out, and nobody is told."""
    averages, stack = averages_of()
    samples = samples_of(stack, 1)
    samples[0].terms, samples[1].terms = terms, torch.tensor(0)
    moves = moved(averages, stack, samples)
    assert moves.ok.tolist() == [True, False, True]
    assert moves.alpha_A.tolist() == pytest.approx([0.2, 0.0, 0.2])
    assert told(averages) == []


def test_counts_that_change_are_not_taken_from_the_last_update():
    averages, stack = averages_of()
    moved(averages, stack, samples_of(stack, 1))
    samples = samples_of(stack, 2)
    for own in samples:
        own.terms = 7.0
    assert moved(averages, stack, samples).alpha_A.tolist() == pytest.approx([0.5 / 7] * 3)


@pytest.mark.parametrize(("form", "side", "limit"), [
    ("linear", "a", OUTLIER), ("linear", "g", OUTLIER_GRADIENTS), ("scale", "a", OUTLIER_GRADIENTS),
])  # fmt: skip
def test_beyond_the_limit_a_sample_stays_out(form, side, limit):
    """Times the usual size in second moments; the others go on."""
    averages, stack = averages_of(form)
    for step in range(3):
        moved(averages, stack, samples_of(stack, step, (0.0,) * 3 if side == "g" and form == "scale" else (1.0,) * 3))
    usual = averages.sizes["ag".index(side)].clone()
    new = [square(getattr(own, side)) / (5.0 if side == "a" else 6.0) for own in samples_of(stack, 9)]
    factors = [math.sqrt(c * limit * float(usual[i] / new[i])) for i, c in enumerate((0.99, 1.01, 1.0 / limit))]
    moves = moved(averages, stack, samples_of(stack, 9, tuple(factors), side))
    assert moves.ok.tolist() == [True, False, True]
    assert averages.updates.tolist() == [4, 3, 4]
    assert told(averages) == [(1, True)]
    assert told(averages) == [], "once"
    beta = 0.6
    expected = [beta + (1 - beta) * c for c in (0.99 * limit, LASTING, 1.0)]
    torch.testing.assert_close(averages.sizes["ag".index(side)] / usual, torch.tensor(expected, dtype=F64))


def test_the_first_sample_is_never_too_large():
    averages, stack = averages_of()
    assert moved(averages, stack, samples_of(stack, 1, (1e150, 1e-150, 1.0))).ok.all()


def test_a_change_that_lasts_is_let_in():
    averages, stack = averages_of()
    for step in range(3):
        moved(averages, stack, samples_of(stack, step))
    taken = [moved(averages, stack, samples_of(stack, 5 + i, (1e3, 1.0, 1.0))).ok.tolist() for i in range(9)]
    assert not taken[0][0] and taken[-1][0] and all(own[1] and own[2] for own in taken)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_stays_out_and_is_told_as_such(value):
    averages, stack = averages_of()
    moved(averages, stack, samples_of(stack, 1))
    samples = samples_of(stack, 2)
    samples[2].g[0][0, 0] = value
    sizes = averages.sizes.clone()
    assert moved(averages, stack, samples).ok.tolist() == [True, True, False]
    assert told(averages) == [(2, False)]
    assert averages.sizes[1, 2] == sizes[1, 2] and torch.isfinite(averages.sizes).all()
    moved(averages, stack, samples_of(stack, 3))
    assert told(averages) == []


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_numbers_beyond_the_range_warn_of_nothing_but_the_sample(dtype, together):
    """Their squares overflow; NumPy's own warnings would reach the user."""
    bench = Bench(stack_of("linear", 3, dtype=dtype))
    huge = 1e30 if dtype == torch.float32 else 1e200
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step, size in enumerate((1.0, huge, math.inf, 1.0)):
            samples = samples_of(bench.stack, step, (size, 1.0, 1.0))
            for own in samples:
                own.a, own.g = [t.to(dtype) for t in own.a], [t.to(dtype) for t in own.g]
            bench.update_(samples, damping=[0.1] * 3, together=together)
            assert told(bench.averages) == ([] if size == 1.0 else [(0, False)])
    assert bench.averages.updates.tolist() == [2, 4, 4]
    assert all(torch.isfinite(F).all() for F in bench.structure.factors(0, 0.1))


def test_a_state_has_the_numbers_of_one_layer_and_goes_back():
    averages, stack = averages_of()
    moved(averages, stack, [None, *samples_of(stack, 1)[1:]])
    held = averages.tensors(1)
    assert held.keys() == {"factor_updates", "A_size", "G_size"} and float(held["factor_updates"]) == 1
    twin = Averages([stack], ALONE)
    twin.restore([{}, averages.tensors(1), averages.tensors(2)])
    assert torch.equal(twin.updates, averages.updates) and torch.equal(twin.sizes, averages.sizes)
    moved(averages, stack, samples_of(stack, 2))
    assert float(held["factor_updates"]) == 2, "a view of the memory"


def test_layers_of_several_stacks_have_numbers_of_their_own():
    first, second = stack_of("linear", 2), stack_of("scale", 1)
    stacks = stacked([*first.layers, *second.layers])
    averages = Averages(stacks, ALONE)
    samples = [samples_of(stacks[0], 1), samples_of(stacks[1], 2)]
    averages.measure_(samples)
    moves = averages.moves(samples, [0.5, 0.5, 0.9])
    assert [len(one.beta) for one in moves] == [2, 1] and moves[1].decay == [0.9]
    for side, found in zip("ag", averages.squares, strict=True):
        dense.assert_exact(found, torch.stack([square(getattr(own, side)) for one in samples for own in one]))


def test_rows_in_several_matrices_count_together(request):
    """A weight that is used twice, beside one that is used once, on a CPU and as on a device."""
    stack = stack_of("linear", 2)
    samples = samples_of(stack, 1)[:2]
    samples[1].a += [2 * t for t in samples[1].a]
    samples[1].g += [3 * t for t in samples[1].g]
    for fixture in (None, "as_on_a_device"):
        if fixture:
            request.getfixturevalue(fixture)
        averages = Averages([stack], ALONE)
        averages.measure_([samples])
        for side, found in zip("ag", averages.squares, strict=True):
            dense.assert_exact(found, torch.stack([square(getattr(own, side)) for own in samples]))
