"""Inverses of many stacks at once, against dense float64 ones and those of each stack by itself."""

from __future__ import annotations

import math

import dense
import pytest
import torch
from stacks import Bench
from torch import Tensor, nn

from kfac_triton.joint import stacked
from kfac_triton.layer import Layer
from kfac_triton.linalg import batched, factors
from kfac_triton.operations.layout import Layout
from kfac_triton.structures import inversion
from kfac_triton.structures.inversion import Due
from kfac_triton.structures.kronecker import Kronecker

F64 = torch.float64
SHAPES = ((5, 4), (4, 3), (4, 3), (7, 5), (5, 7))  # of weights: widths that are of A here and of G there


def network(dtype: torch.dtype = F64) -> list[Kronecker]:
    """The structures of these weights, with random factors."""
    layers = [Layer(nn.Parameter(torch.zeros(*shape, dtype=dtype)), None, Layout("linear")) for shape in SHAPES]
    structures = [Bench(stack).structure for stack in stacked(layers)]
    for number, own in enumerate(structures):
        for k, F in enumerate((own.A, own.G)):
            n, d, _ = F.values.shape
            X = dense.randn(n, 3 * d, d, seed=2 * number + k)
            F.values.copy_(10.0 ** (number - k) * X.mT @ X / (3 * d))
    return structures


def due(structures: list[Kronecker]) -> list[Due]:
    """All layers, each with a damping of its own."""
    return [
        Due(own, range(len(own.ready)), [0.01 * (i + k + 1) for k in range(len(own.ready))])
        for i, own in enumerate(structures)
    ]


def definition(own: Kronecker, member: int, damping: float) -> tuple[Tensor, Tensor]:
    """(A + pi gamma I)^-1 and (G + gamma / pi I)^-1, float64."""
    A, G = own.A.values[member].double(), own.G.values[member].double()
    gamma, pi = math.sqrt(damping), math.sqrt(float(A.trace() / len(A) / (G.trace() / len(G))))
    damped = A + pi * gamma * torch.eye(len(A), dtype=F64), G + gamma / pi * torch.eye(len(G), dtype=F64)
    return torch.linalg.inv(damped[0]), torch.linalg.inv(damped[1])


@pytest.mark.parametrize(("dtype", "bound"), [(F64, 1e-12), (torch.float32, 1e-4)])
def test_inverses_are_those_of_the_damped_factors(dtype, bound):
    structures = network(dtype)
    asked = due(structures)
    assert inversion.refresh_(asked) == [[True] * len(own.ready) for own in structures]
    for own, (_, members, damping) in zip(structures, asked, strict=True):
        assert own.ready == [True] * len(members)
        for i in members:
            found = own.A.inverse[i].double(), own.G.inverse[i].double()
            torch.testing.assert_close(found, definition(own, i, damping[i]), rtol=bound, atol=bound)


def test_one_factorisation_a_width(monkeypatch):
    """For the sides of all stacks that have it; a stack with a wide side is by itself."""
    batches = []
    inverses_ = batched._inverses
    monkeypatch.setattr(batched, "_inverses", lambda F, *more: (batches.append(tuple(F.shape)), inverses_(F, *more))[1])
    inversion.refresh_(due(network()))
    widths = sorted(width for shape in SHAPES for width in shape)
    assert sorted(batches) == sorted((widths.count(w), w, w) for w in set(widths))
    batches.clear()
    monkeypatch.setattr(factors, "TOGETHER", 6)
    structures = network()
    inversion.refresh_(due(structures))
    assert sorted(batches) == [(1, 5, 5), (2, 3, 3), (3, 4, 4)]
    assert all(all(own.ready) for own in structures)


def test_layers_that_are_not_due_keep_theirs():
    structures = network()
    pair = next(own for own in structures if len(own.ready) == 2)
    asked = [one if one.structure is not pair else one._replace(members=[1]) for one in due(structures)]
    inversion.refresh_(asked)
    assert pair.ready == [False, True] and not pair.A.inverse[0].any() and not pair.G.inverse[0].any()
    damping = next(one.damping for one in asked if one.structure is pair)
    torch.testing.assert_close((pair.A.inverse[1], pair.G.inverse[1]), definition(pair, 1, damping[1]))


@pytest.mark.parametrize(("value", "found"), [(math.nan, False), (math.inf, False), (-2.0, True)])
def test_a_layer_without_an_inverse_leaves_all_others_theirs(value, found):
    """As where every stack is by itself: that layer keeps its last one, or gets that of more damping."""
    structures, alone = network(), network()
    for own in (structures, alone):
        for one in due(own):
            one.structure.refresh_(one.members, one.damping)
        own[1].A.values[0].diagonal()[-1:].fill_(value)
    last = structures[1].A.inverse[0].clone()
    for own in (*structures, *alone):
        own.G.values.mul_(1.5)
    expected = [one.structure.refresh_(one.members, one.damping) for one in due(alone)]
    assert inversion.refresh_(due(structures)) == expected
    assert expected[1] == [found, True]
    assert torch.equal(structures[1].A.inverse[0], last) is not found
    for own, other in zip(structures, alone, strict=True):
        torch.testing.assert_close((own.A.inverse, own.G.inverse), (other.A.inverse, other.G.inverse))


def test_rows_that_wait_are_added_first(monkeypatch):
    settled = []
    monkeypatch.setattr(Kronecker, "settle_", lambda self: settled.append(self))
    structures = network()
    inversion.refresh_(due(structures))
    assert settled == structures


def test_an_inverse_that_overflows_is_none():
    """Of a pivot that is there and whose reciprocal is not."""
    whole, tiny = torch.ones(1, 3), torch.tensor([[1.0, 1.0, 1e-40]])
    ones, zero = torch.ones(1).numpy(), torch.zeros(1).numpy()
    found = [batched.inverses([batched.Damped(torch.diag_embed(F), ones, ones, zero)])[0] for F in (whole, tiny)]
    torch.testing.assert_close(found[0], torch.eye(3)[None])
    assert found[1] is None
