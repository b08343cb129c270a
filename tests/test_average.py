"""Running averages whose products wait: the same as products taken at once, whatever comes in whatever order."""

from __future__ import annotations

import dense
import pytest
import torch
from stacks import F64, stack_of
from torch import Tensor, nn

from kfac_triton import KFAC
from kfac_triton.structures import buffered, factor
from kfac_triton.structures.buffered import BufferedRows
from kfac_triton.structures.factor import Dense

D = 5  # the width of the factor A of "linear", whose last column is the homogeneous 1
Update = tuple[Tensor, float, float]


@pytest.fixture(autouse=True)
def narrow_ones_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffered, "NARROWEST", 1)


def fresh(count: int = 1) -> Dense:
    """The factors A of a stack of layers, (count, D, D)."""
    made = factor.factor(stack_of("linear", count), "A")
    assert isinstance(made, Dense)
    return made


def rows(n: int, seed: int, width: int = D) -> Tensor:
    return dense.randn(n, width, seed=seed)


def waiting(F: Dense) -> int:
    return 0 if F.buffer is None else F.buffer.waiting


def update(F: Dense, X: Tensor, alpha: float, beta: float, *, at_once: bool = False, by_layer: bool = False) -> None:
    """One update of all layers with the same rows; `by_layer`: by numbers for each, as a device has them."""
    ones = X.shape[1] < D
    room = F.room(len(X), ones=ones, at_once=at_once)
    for part in room.parts:
        part.copy_(X)
    if by_layer:
        numbers = [torch.full((len(F.values),), value, dtype=F64) for value in (alpha, beta)]
        F.add_(room.rows, *numbers, torch.full((len(F.values),), alpha != 0))
    else:
        F.add_(room.rows, alpha, beta, None)


def by_definition(updates: list[Update]) -> Tensor:
    F = torch.zeros(D, D, dtype=F64)
    for X, alpha, beta in updates:
        Xa = torch.cat([X, X.new_ones(len(X), D - X.shape[1])], dim=1)
        F = beta * F + alpha * sum((torch.outer(x, x) for x in Xa), start=torch.zeros(D, D, dtype=F64))
    return F


# Rows of each update; 256 wait at most, and more than 128 never do.
SIZES = {
    "few": [3, 1, 7],
    "up to the brim": [100, 100, 56],
    "over the brim": [100, 100, 57, 120, 128],
    "a thick one between": [40, 129, 40],
    "the same and another number": [6, 6, 4, 6],
}


@pytest.mark.parametrize("by_layer", [False, True], ids=["numbers", "tensors"])
@pytest.mark.parametrize("width", [D, D - 1], ids=["no bias", "bias"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_the_average_is_that_of_the_definition(sizes, width, by_layer):
    updates = [(rows(n, i, width), 0.3 / (i + 1), 0.0 if i == 0 else 0.9 - 0.2 * i) for i, n in enumerate(sizes)]
    late, at_once = fresh(2), fresh(2)
    for i, (X, alpha, beta) in enumerate(updates, start=1):
        update(late, X, alpha, beta, by_layer=by_layer)
        update(at_once, X, alpha, beta, at_once=True, by_layer=by_layer)
        assert waiting(at_once) == 0
        for member in range(2):
            dense.assert_exact(late.current(member), by_definition(updates[:i]))
            dense.assert_exact(at_once.current(member), by_definition(updates[:i]))
    late.settle_()
    for member in range(2):
        dense.assert_exact(late.values[member], by_definition(updates))
        assert torch.equal(late.values[member], late.values[member].T)
        assert torch.equal(at_once.written_out(member), at_once.written_out(member).T)


def test_layers_move_each_by_its_own_numbers():
    """In one product, one of them refused, whose rows may hold anything."""
    for at_once in (False, True):
        F, wanted = fresh(3), [[], [], []]
        for step in range(3):
            room = F.room(4, ones=False, at_once=at_once)
            alpha, beta = torch.tensor([0.3, 0.0, 0.5], dtype=F64), torch.tensor([0.2, 1.0, 0.9], dtype=F64)
            for i, part in enumerate(room.parts):
                part.copy_(rows(4, 10 * step + i).fill_(torch.nan) if i == 1 else rows(4, 10 * step + i))
                wanted[i].append((rows(4, 10 * step + i), float(alpha[i]), float(beta[i])))
            F.add_(room.rows, alpha, beta, torch.tensor([True, False, True]))
        for i in range(3):
            dense.assert_exact(F.current(i), by_definition(wanted[i]))
        assert not F.values[1].any()


def test_the_homogeneous_one_is_there_again_after_rows_were_written_over():
    """Of a refused layer, and of numbers by layer, which multiply the rows."""
    F = fresh(1)
    updates = [(rows(4, i, D - 1), 0.5, 0.5) for i in range(4)]
    for i, (X, alpha, beta) in enumerate(updates):
        update(F, X, alpha, beta, at_once=True, by_layer=i % 2 == 0)
        if i == 1:
            update(F, rows(4, 9, D - 1).fill_(torch.nan), 0.0, 1.0, at_once=True, by_layer=True)
    dense.assert_exact(F.current(0), by_definition(updates))


def test_thin_products_wait_and_thick_ones_do_not():
    F = fresh()
    update(F, rows(64, 1), 1.0, 0.5)
    assert not F.values.any() and waiting(F) == 64
    for n, expected in ((64, 128), (128, 256), (1, 1), (129, 0)):
        update(F, rows(n, 2), 1.0, 0.5)
        assert waiting(F) == expected
    update(F, rows(3, 3), 1.0, 0.5, at_once=True)
    assert waiting(F) == 0


def test_narrow_factors_do_not_wait(monkeypatch):
    monkeypatch.setattr(buffered, "NARROWEST", D + 1)
    F = fresh()
    update(F, rows(4, 1), 1.0, 0.5)
    assert F.buffer is None and F.values.any()
    monkeypatch.setattr(buffered, "NARROWEST", D)
    F = fresh()
    update(F, rows(4, 1), 1.0, 0.5)
    assert waiting(F) == 4


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("first", [True, False], ids=["first", "in between"])
def test_a_refused_update_leaves_nothing(first, at_once, bad):
    """alpha = 0 and beta = 1, as is decided about rows that are not finite."""
    updates = [(rows(4, i), 0.5, 0.5) for i in range(3)]
    F = fresh()
    for i, (X, alpha, beta) in enumerate(updates):
        if i == (0 if first else 2):
            update(F, rows(4, 9).fill_(bad), 0.0, 1.0, at_once=at_once, by_layer=True)
        update(F, X, alpha, beta, at_once=at_once)
    dense.assert_exact(F.current(0), by_definition(updates))


@pytest.mark.parametrize("by_layer", [False, True], ids=["numbers", "tensors"])
@pytest.mark.parametrize("at_once", [False, True])
def test_an_average_that_forgets_at_once_keeps_the_last_update(at_once, by_layer):
    """beta = 0 reads nothing of what was there, even where that had overflowed."""
    F = fresh()
    F.values.fill_(float("inf"))
    update(F, rows(4, 2), 1.0, 0.0, at_once=at_once, by_layer=by_layer)
    dense.assert_exact(F.current(0), by_definition([(rows(4, 2), 1.0, 0.0)]))


def test_reading_the_average_leaves_the_buffer_alone():
    F = fresh(2)
    update(F, rows(4, 1), 1.0, 0.5)
    before = {name: torch.as_tensor(value).clone() for name, value in F.tensors(1).items()}
    F.current(1).zero_(), F.written_out(1).zero_()
    after = F.tensors(1)
    assert after.keys() == before.keys()
    assert all(torch.equal(torch.as_tensor(after[key]), before[key]) for key in before)


def test_a_buffer_serves_memory_with_zeros_around_it():
    """Its products are written into views, and into nothing beside them."""
    whole = torch.zeros(2, 16, 16, dtype=F64)
    buffer = BufferedRows(whole[:, :D, :D])
    for step in range(3):
        buffer.room(7)[:].copy_(rows(7, step))
        buffer.weigh_(7, 0.5, torch.tensor([0.5, 0.25], dtype=F64))
    settled = [buffer.settled(i) for i in range(2)]
    buffer.settle_()
    for i, beta in enumerate((0.5, 0.25)):
        expected = by_definition([(rows(7, step), 0.5, beta) for step in range(3)])
        dense.assert_exact(whole[i, :D, :D], expected)
        dense.assert_exact(settled[i], expected)
    whole[:, :D, :D] = 0
    assert not whole.any()


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
