"""Averages of parameters, growing batches, sparse initial weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from kfac_triton.averaging import averaged
from kfac_triton.batching import GrowingBatches
from kfac_triton.initialisation import sparse_


@pytest.mark.parametrize("decay", [0.0, 0.6, 0.99])
def test_the_average_is_a_mean_first_and_exponential_later(decay):
    """Against the closed form: weights (1 - xi_k) prod over later j of xi_j, with xi_k = min(1 - 1/k, decay)."""
    model = nn.Linear(2, 1).double()
    average, seen = averaged(model, decay), []
    for k in range(12):
        with torch.no_grad():
            model.weight.copy_(torch.tensor([[1.0 + k, (-2.0) ** k]]))
        average.update_parameters(model)
        seen.append(model.weight.detach().clone())
        xi = [min(1 - 1 / j, decay) for j in range(1, k + 2)]
        expected = torch.zeros(1, 2, dtype=torch.float64)
        for weight, value in zip(xi, seen, strict=True):
            expected = weight * expected + (1 - weight) * value
        torch.testing.assert_close(average.module.weight.detach(), expected, rtol=1e-12, atol=1e-12)
        if 1 - 1 / (k + 1) <= decay:
            torch.testing.assert_close(expected, torch.stack(seen).mean(0), rtol=1e-12, atol=1e-12)


def test_the_average_is_a_model_to_evaluate_with_and_survives_a_checkpoint():
    model = nn.Linear(2, 1)
    average = averaged(model)
    average.update_parameters(model)
    other = averaged(nn.Linear(2, 1))
    other.load_state_dict(average.state_dict())
    x = torch.ones(3, 2)
    assert torch.equal(other(x), model(x))
    assert int(other.n_averaged) == 1


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_a_decay_that_is_none_is_refused(decay):
    with pytest.raises(ValueError, match="decay must be"):
        averaged(nn.Linear(2, 1), decay)


def test_batches_grow_exponentially_to_the_whole():
    batches = GrowingBatches(60_000, steps=600)
    sizes = [batches.batch_size(k) for k in (1, 2, 250, 499, 500, 600)]
    growth = 60 ** (1 / 499)
    assert sizes == [1000, int(1000 * growth), int(1000 * growth**249), int(1000 * growth**498), 60_000, 60_000]
    assert GrowingBatches(60_000, steps=600, most=5000).batch_size(600) == 5000
    assert GrowingBatches(300, steps=5).batch_size(1) == 300  # never more than there is


def test_what_a_batch_holds_follows_from_its_number():
    whole = list(GrowingBatches(50, steps=6, first=5, full_at=6, seed=3))
    assert [len(b) for b in whole] == [5, 7, 12, 19, 31, 50]
    assert all(len(set(b)) == len(b) for b in whole)
    assert sorted(whole[-1]) == list(range(50))
    assert list(GrowingBatches(50, steps=6, first=5, full_at=6, seed=3, start=4)) == whole[4:]
    assert list(GrowingBatches(50, steps=6, first=5, full_at=6, seed=4)) != whole
    assert len(GrowingBatches(50, steps=6, start=4)) == 2


def test_a_loader_takes_them():
    data = TensorDataset(torch.arange(20.0))
    loader = DataLoader(data, batch_sampler=GrowingBatches(20, steps=3, first=2, full_at=3))
    assert [len(x) for (x,) in loader] == [2, 6, 20]


@pytest.mark.parametrize(
    ("name", "value"),
    [("size", 0), ("steps", 0), ("first", 0), ("full_at", 1), ("most", 0), ("seed", -1), ("start", -1), ("first", 2.5)],
)
def test_a_schedule_of_batches_that_cannot_be(name, value):
    with pytest.raises(ValueError, match=f"^{name} must be an integer >= ."):
        GrowingBatches(**{"size": 10, "steps": 3, name: value})


def test_every_unit_starts_with_a_few_weights():
    torch.manual_seed(0)
    model = sparse_(nn.Sequential(nn.Linear(40, 300), nn.Tanh(), nn.Conv2d(3, 200, 3), nn.Linear(8, 50)), std=2.0)
    for layer, expected in ((model[0], 15), (model[2], 15), (model[3], 8)):
        rows = layer.weight.detach().flatten(1)
        assert ((rows != 0).sum(1) == expected).all()
        assert not layer.bias.any()
        assert rows[rows != 0].std() == pytest.approx(2.0, rel=0.1)
        assert abs(rows[rows != 0].mean()) < 0.2
    assert model[0].weight.ne(0).any(0).all()  # no input is left out


def test_sparse_weights_follow_the_generator():
    first, second = (sparse_(nn.Linear(9, 4), 3, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first.weight, second.weight)
    with pytest.raises(ValueError, match="incoming must be"):
        sparse_(nn.Linear(2, 2), 0)
    with pytest.raises(ValueError, match="std must be"):
        sparse_(nn.Linear(2, 2), std=0.0)
