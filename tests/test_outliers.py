"""Statistics that are far larger than those before stay out of the factors, until they last."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F
from small import WHOLE, data, mlp, second_moment, train_step
from torch import Tensor, nn

from kfac_triton import KFAC


def largest(optimizer: KFAC, side: str = "A") -> float:
    return float(optimizer.factors()["0"][side].abs().max())


@pytest.mark.parametrize("approximation", ["kronecker", "eigen", "inverse_free", "tridiagonal"])
def test_one_batch_of_huge_inputs_leaves_the_factors(approximation, caplog):
    x, y = data()
    model = mlp()
    optimizer = KFAC(model, approximation=approximation, **WHOLE)
    for _ in range(5):
        train_step(optimizer, model, x, y)
    before = largest(optimizer)
    with caplog.at_level(logging.WARNING, "kfac_triton"):
        for _ in range(2):
            train_step(optimizer, model, 1e4 * x, y)
    assert largest(optimizer) < 2 * before
    assert [record.getMessage() for record in caplog.records if "0.weight" in record.getMessage()] == [
        "0.weight: a Fisher pass gave numbers far larger than those before; its factors skipped that pass"
    ]


def test_a_batch_ten_times_as_large_counts_as_it_is():
    x, y = data()
    model = mlp()
    optimizer = KFAC(model, lr=0.0, **WHOLE)
    for size in (1.0, 3.0, 9.0):
        train_step(optimizer, model, size * x, y)
    wanted = sum(second_moment(size * x) for size in (1.0, 3.0, 9.0)) / 3
    torch.testing.assert_close(optimizer.factors()["0"]["A"], wanted)


def test_a_change_that_lasts_is_let_in():
    """Inputs a thousand times larger from the sixth step on; a million times in the second moments."""
    x, y = data()
    model = mlp()
    optimizer = KFAC(model, lr=0.0, **WHOLE)
    for step in range(5 + 15):
        train_step(optimizer, model, x if step < 5 else 1e3 * x, y)
    assert largest(optimizer) > 0.2 * float(second_moment(1e3 * x).max())


def test_gradients_of_few_examples_are_no_outliers():
    """A confident model is wrong about one example in 64: its gradient is hundreds of times the others' together."""
    x, _ = data(64)
    model = nn.Sequential(nn.Linear(6, 3, bias=False))
    with torch.no_grad():
        model[0].weight.zero_()
    optimizer = KFAC(model, fisher="empirical", lr=0.0, **WHOLE)
    margin = 6.0 * F.one_hot(torch.zeros(64, dtype=torch.long), 3)

    def confident(z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(z + margin, y)

    sizes = []
    for step in range(6):
        labels = torch.zeros(64, dtype=torch.long)
        labels[0] = int(step == 5)
        train_step(optimizer, model, x, labels, confident)
        sizes.append(float(optimizer.factors()["0"]["G"].trace()))
    assert sizes[5] > 100 * sizes[4]  # it counts with a sixth
    assert int(optimizer.state[model[0].weight]["factor_updates"]) == 6


def test_what_is_usual_is_saved():
    x, y = data()
    model = mlp()
    optimizer = KFAC(model, **WHOLE)
    for _ in range(3):
        train_step(optimizer, model, x, y)
    twin = mlp()
    twin.load_state_dict(model.state_dict())
    other = KFAC(twin, **WHOLE)
    other.load_state_dict(optimizer.state_dict())
    for m, o in ((model, optimizer), (twin, other)):
        train_step(o, m, 1e4 * x, y)
        train_step(o, m, x, y)
    torch.testing.assert_close(other.factors(), optimizer.factors(), rtol=0, atol=0)


def test_of_scales_and_patches():
    """A norm's moments are of gradients; a convolution's patches may stay unwritten."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.LayerNorm(16), nn.Linear(16, 3))
    optimizer = KFAC(model, lr=0.0, **WHOLE)
    x, y = torch.randn(32, 1, 4, 4), torch.arange(32) % 3
    for size in (1.0, 1.0, 1e4):
        train_step(optimizer, model, size * x, y)
    updates = {name: int(optimizer.state[model.get_submodule(name).weight]["factor_updates"]) for name in "023"}
    assert updates == {"0": 2, "2": 3, "3": 3}
