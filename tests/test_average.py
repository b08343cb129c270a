"""Running averages whose products wait: the same as products taken at once, whatever comes in whatever order."""

from __future__ import annotations

import copy

import dense
import pytest
import torch
from torch import Tensor, nn

from kfac_triton import KFAC
from kfac_triton.approximations import average

F64 = torch.float64
D = 5


def fresh(dtype=F64) -> dict:
    return {"A": torch.zeros(D, D, dtype=dtype)}


def rows(n: int, seed: int, width: int = D) -> Tensor:
    return dense.randn(n, width, seed=seed)


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=F64)


def update(state: dict, X: Tensor | list[Tensor], alpha: float, beta: float, at_once: bool = False) -> None:
    held = X if isinstance(X, list) else [X]
    bias = held[0].shape[1] < D
    average.update_([average.Update(state, "A", held, scalar(alpha), scalar(beta), bias, False)], at_once=at_once)


def by_definition(updates: list[tuple[Tensor, float, float]]) -> Tensor:
    F = torch.zeros(D, D, dtype=F64)
    for X, alpha, beta in updates:
        Xa = torch.cat([X, X.new_ones(len(X), D - X.shape[1])], dim=1)
        F = beta * F + alpha * sum(torch.outer(x, x) for x in Xa)
    return F


# Rows of each update; 256 wait at most, and more than 128 never do.
SIZES = {
    "few": [3, 1, 7],
    "up to the brim": [100, 100, 56],
    "over the brim": [100, 100, 57, 120, 128],
    "a thick one between": [40, 129, 40],
    "none": [5, 0, 5],
}


@pytest.mark.parametrize("width", [D, D - 1], ids=["no bias", "bias"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_the_average_is_that_of_the_definition(sizes, width):
    updates = [(rows(n, i, width), 0.3 / (i + 1), 0.0 if i == 0 else 0.9 - 0.2 * i) for i, n in enumerate(sizes)]
    state, at_once = fresh(), fresh()
    for i, (X, alpha, beta) in enumerate(updates, start=1):
        update(state, X, alpha, beta)
        update(at_once, X, alpha, beta, at_once=True)
        dense.assert_exact(average.settled(state, "A"), by_definition(updates[:i]))
    average.settle_([(state, "A")])
    dense.assert_exact(state["A"], by_definition(updates))
    dense.assert_exact(at_once["A"], by_definition(updates))
    assert torch.equal(state["A"], state["A"].T)


def test_thin_products_wait_and_thick_ones_do_not():
    state = fresh()
    update(state, rows(64, 1), 1.0, 0.5)
    assert not state["A"].any()
    assert state["A_waiting"] == 64
    for n, waiting in ((64, 128), (128, 256), (1, 1), (129, 0)):
        update(state, rows(n, 2), 1.0, 0.5)
        assert state["A_waiting"] == waiting
    update(state, rows(3, 3), 1.0, 0.5, at_once=True)
    assert state["A_waiting"] == 0


def test_matrices_of_several_passes_are_one_update():
    state = fresh()
    update(state, [rows(4, 1), rows(6, 2)], 0.25, 0.5)
    dense.assert_exact(average.settled(state, "A"), by_definition([(torch.cat([rows(4, 1), rows(6, 2)]), 0.25, 0.5)]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("first", [True, False], ids=["first", "in between"])
def test_a_refused_update_leaves_nothing(first, bad):
    """alpha = 0 and beta = 1, as the device decides about rows that are not finite."""
    updates = [(rows(4, i), 0.5, 0.5) for i in range(3)]
    state = fresh()
    for i, (X, alpha, beta) in enumerate(updates):
        if i == (0 if first else 2):
            update(state, rows(4, 9).fill_(bad), 0.0, 1.0)
        update(state, X, alpha, beta)
    dense.assert_exact(average.settled(state, "A"), by_definition(updates))


def test_an_average_that_forgets_at_once_keeps_the_last_update():
    """beta = 0 reads nothing of what was there, even where that had overflowed."""
    state = fresh()
    state["A"].fill_(float("inf"))
    update(state, rows(4, 1), 1.0, 0.5)
    update(state, rows(4, 2), 1.0, 0.0)
    dense.assert_exact(average.settled(state, "A"), by_definition([(rows(4, 2), 1.0, 0.0)]))


def test_reading_the_average_leaves_the_state_alone():
    state = fresh()
    update(state, rows(4, 1), 1.0, 0.5)
    before = copy.deepcopy(state)
    average.settled(state, "A").zero_()
    assert state.keys() == before.keys()
    assert all(torch.equal(torch.as_tensor(state[key]), torch.as_tensor(before[key])) for key in state)


def run(steps: int, look: bool, **options) -> tuple[nn.Module, KFAC]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, D), nn.Tanh(), nn.Linear(D, 3))
    optimizer = KFAC(model, likelihood="categorical", lr=0.1, inverse_interval=7, compile=False, **options)
    for step in range(steps):
        optimizer.zero_grad()
        y = torch.arange(20) % 3
        nn.functional.cross_entropy(model(rows(20, step, 6).float()), y).backward()
        optimizer.step()
        if look:
            optimizer.factors()
            optimizer.state_dict()
    return model, optimizer


def test_looking_at_factors_and_state_changes_no_bit_of_the_run():
    looked, _ = run(13, look=True)
    alone, optimizer = run(13, look=False)
    assert optimizer.state[alone[0].weight]["A_waiting"] > 0
    assert all(torch.equal(p, q) for p, q in zip(looked.parameters(), alone.parameters(), strict=True))


def test_inverses_are_those_of_the_average_with_all_its_rows():
    """At step 8 of 15 the inverses are refreshed while rows wait (interval 7: at steps 0, 1, 2, 4, 7, 14)."""
    model, optimizer = run(8, look=False)
    for name, weight in (("0", model[0].weight), ("2", model[2].weight)):
        state, factors = optimizer.state[weight], optimizer.factors()[name]
        assert state["A_waiting"] == state["G_waiting"] == 0
        pair = dense.damped_inverses(factors["A"].double(), factors["G"].double(), 1e-3)
        for inverse, expected in zip(("A_inv", "G_inv"), pair, strict=True):
            assert dense.relative_error(state[inverse].double(), expected) < 1e-4
