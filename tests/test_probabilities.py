"""Probabilities where a likelihood takes logits are named, once; logits never are."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from small import closure_step, data, mlp, train_step
from torch import Tensor, nn

from kfac_triton import KFAC, Bernoulli, Categorical

X, Y = data(256)
ONE_HOT = F.one_hot(Y, 3).float()


def messages(caplog, last: nn.Module, likelihood, loss, targets=Y, step=train_step, dtype=torch.float32, **options):
    """What three steps of a network that ends in `last` warn of."""
    model = nn.Sequential(mlp(), last).to(dtype)
    form = KFAC.paper if step is closure_step else KFAC
    optimizer = form(model, likelihood=likelihood, compile=False, **options)
    caplog.clear()
    for _ in range(3):
        step(optimizer, model, X.to(dtype), targets, loss)
    return caplog.messages


def log_loss(p: Tensor, y: Tensor) -> Tensor:
    return F.nll_loss((p + 1e-6).log(), y)


class Clamped(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        return torch.sigmoid(z).clamp(1e-4, 1 - 1e-4)


@pytest.mark.parametrize("step", [train_step, closure_step])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("loss", [F.cross_entropy, log_loss])
def test_a_softmax_before_a_categorical_likelihood(caplog, loss, dtype, step):
    found = messages(caplog, nn.Softmax(1), "categorical", loss, step=step, dtype=dtype, **unchecked(step))
    assert len(found) == 1
    assert "probabilities" in found[0] and "pass logits, without the softmax" in found[0] and "Categorical" in found[0]


def unchecked(step) -> dict[str, bool]:
    return {"check_loss_scale": False} if step is closure_step else {}


@pytest.mark.parametrize("step", [train_step, closure_step])
@pytest.mark.parametrize("last", [nn.Sigmoid(), nn.Softmax(1), Clamped()])
def test_a_sigmoid_before_a_bernoulli_likelihood(caplog, last, step):
    def loss(p: Tensor, y: Tensor) -> Tensor:
        return 3 * F.binary_cross_entropy(p, y)

    found = messages(caplog, last, "bernoulli", loss, ONE_HOT, step, **unchecked(step))
    assert len(found) == 1
    assert "probabilities" in found[0] and "without the softmax or sigmoid" in found[0] and "Bernoulli" in found[0]


class Small(nn.Module):
    """Logits that all lie in (0, 1), as those of a fresh network may."""

    def forward(self, z: Tensor) -> Tensor:
        return 0.5 + 0.1 * torch.tanh(z)


LOGITS = [
    (nn.Identity(), "categorical", F.cross_entropy, Y),
    (nn.LogSoftmax(1), "categorical", F.nll_loss, Y),
    (Small(), "categorical", F.cross_entropy, Y),
    (Small(), "bernoulli", F.binary_cross_entropy_with_logits, ONE_HOT),
    (nn.LogSigmoid(), "bernoulli", F.binary_cross_entropy_with_logits, ONE_HOT),
    (nn.Sigmoid(), "gaussian", F.mse_loss, ONE_HOT),
    (nn.Softmax(1), "gaussian", F.mse_loss, ONE_HOT),
]


@pytest.mark.parametrize("case", range(len(LOGITS)))
def test_logits_are_not_named(caplog, case):
    last, likelihood, loss, targets = LOGITS[case]
    scale = {"categorical": 1.0, "bernoulli": 1 / 3, "gaussian": 2 / 3}[likelihood]  # of means over (N, 3)
    assert messages(caplog, last, likelihood, loss, targets, loss_scale=scale) == []


def test_the_logits_named_by_output_are_what_counts(caplog):
    """Log-probabilities are logits."""
    assert messages(caplog, nn.Softmax(1), "categorical", log_loss, output=lambda p: (p + 1e-6).log()) == []


def test_the_axis_is_the_likelihoods():
    """Probabilities over channels, (N, C, H, W), are not probabilities over the width."""
    p = torch.rand(2, 3, 4, 5).softmax(1)
    assert Categorical(dim=1).looks_like_probabilities(p)
    assert not Categorical().looks_like_probabilities(p)
    assert not Categorical().looks_like_probabilities(p[:0])
    assert not Bernoulli().looks_like_probabilities(p)


def test_only_the_first_pass_is_looked_at(monkeypatch):
    looked = []
    monkeypatch.setattr(Categorical, "looks_like_probabilities", lambda self, z: looked.append(len(z)))
    model = mlp()
    optimizer = KFAC(model, likelihood="categorical", compile=False)
    for _ in range(3):
        train_step(optimizer, model, X, Y)
    assert len(looked) == 1
