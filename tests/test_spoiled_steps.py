"""Adaptive steps where something is spoiled: the quadratic model, the first step, a batch, a step that was taken."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from small import closure_step, data, mlp, train_step
from torch import Tensor, nn

from kfac_triton import KFAC
from kfac_triton.steps import quadratic
from kfac_triton.steps.damping import CALIBRATION_STEPS

X, Y = data(256)
MODES = {
    "all": {"lr": "adaptive", "momentum": "adaptive", "damping": "adaptive"},
    "lr": {"lr": "adaptive"},
    "momentum": {"lr": 0.1, "momentum": "adaptive"},
    "damping": {"lr": 0.1, "damping": "adaptive"},
}


def paper(model: nn.Module, **options) -> KFAC:
    return KFAC.paper(model, **{"likelihood": "categorical", "compile": False, **options})


def damping(optimizer: KFAC) -> float:
    return optimizer.param_groups[0]["damping"]


def copied(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def unchanged(model: nn.Module, before: list[Tensor]) -> bool:
    return all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


# A quadratic model that is not finite, or cannot be computed.


class Distances(nn.Module):
    """Distances of a point to itself are zero, where the second derivative of cdist is NaN."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.b(torch.cdist(h, h[:8].detach()))


@pytest.mark.parametrize("mode", MODES)
def test_no_silent_standstill_where_the_quadratic_model_is_missing(mode, caplog):
    torch.manual_seed(0)
    model = Distances()
    optimizer = KFAC(model, likelihood="categorical", compile=False, **MODES[mode])
    start = damping(optimizer)
    losses = [closure_step(optimizer, model, X, Y) for _ in range(30)]
    assert losses[-1] < losses[0] - 0.1
    assert damping(optimizer) == start
    assert counted_step(optimizer, model) == 1
    (message,) = caplog.messages
    assert "is not finite" in message
    told = optimizer.diagnostics()
    assert told["predicted_reduction"] is None and told["lr"] > 0
    assert told["momentum"] == (0.9 if mode in ("lr", "damping") else 0)


def test_without_a_closure_too(caplog):
    torch.manual_seed(0)
    model = Distances()
    optimizer = KFAC(model, likelihood="categorical", compile=False, lr="adaptive")
    losses = [train_step(optimizer, model, X, Y) for _ in range(30)]
    assert losses[-1] < losses[0] - 0.1
    assert len(caplog.messages) == 1


@pytest.mark.parametrize("scale", [1.0, 7.0])
@pytest.mark.parametrize("mode", ["all", "lr", "damping"])
def test_a_step_without_the_model_is_as_long_as_the_trust_region_allows(mode, scale, monkeypatch):
    """One layer, the exact Fisher and little damping: <V, grad> is V^T F V, and the KL divergence is the bound."""
    monkeypatch.setattr(
        quadratic.FisherProducts, "stacked_gram", lambda *args, **more: torch.full((2, 2), math.nan).double()
    )
    torch.manual_seed(0)
    model = nn.Linear(6, 3).double()
    options = {**MODES[mode], "momentum": 0.5}
    if mode == "damping":
        options["lr"] = 100.0
    if "damping" in options:
        options["initial_damping"] = 1e-9
    else:
        options["damping"] = 1e-9
    exact = {"fisher": "exact", "factor_fraction": 1.0, "compile": False}
    optimizer = KFAC(model, likelihood="categorical", loss_scale=scale, check_loss_scale=False, **options, **exact)
    before = model(X.double()).detach().log_softmax(1)
    closure_step(optimizer, model, X.double(), Y, lambda z, y: scale * F.cross_entropy(z, y))
    after = model(X.double()).detach().log_softmax(1)
    divergence = float((before.exp() * (before - after)).sum(1).mean())
    assert divergence == pytest.approx(1e-3, rel=0.1)


def test_a_step_without_the_model_is_no_longer_than_newtons(monkeypatch):
    """Where the whole step V is within the trust region, it is that: the minimum of a quadratic loss."""
    monkeypatch.setattr(
        quadratic.FisherProducts, "stacked_gram", lambda *args, **more: torch.full((2, 2), math.nan).double()
    )
    torch.manual_seed(0)
    model, x = nn.Linear(6, 3).double(), X.double()
    target = model(x).detach() + 1e-3 * torch.randn(256, 3, dtype=torch.float64)
    exact = {"fisher": "exact", "factor_fraction": 1.0, "compile": False}
    optimizer = KFAC(model, likelihood="gaussian", loss_scale=2 / 3, lr="adaptive", damping=0.0, **exact)
    closure_step(optimizer, model, x, target, F.mse_loss)
    gradients = torch.autograd.grad(F.mse_loss(model(x), target), list(model.parameters()))
    assert max(float(g.abs().max()) for g in gradients) < 1e-12
    assert optimizer.diagnostics()["lr"] == pytest.approx(1.0)


@pytest.mark.parametrize("scale", [1e20, 1e25, 1e30])
@pytest.mark.parametrize("mode", MODES)
def test_huge_finite_gradients_leave_the_run_as_it_was(mode, scale):
    model = mlp()
    optimizer = KFAC(model, likelihood="categorical", compile=False, check_loss_scale=False, **MODES[mode])
    losses = []
    for step in range(40):
        spoiled = step in (8, 9, 10)
        factor, before = scale if spoiled else 1.0, copied(model)
        losses.append(closure_step(optimizer, model, X, Y, lambda z, y, c=factor: c * F.cross_entropy(z, y)))
        assert all(p.isfinite().all() and p.abs().max() < 100 for p in model.parameters())
        assert spoiled or not unchanged(model, before)
    assert min(losses[11:]) < losses[7]  # lr="adaptive" alone, without damping, is not monotonic
    assert damping(optimizer) < 10


# The calibration of the damping.


SPOILED = {
    "nan": (lambda x: x * math.nan, F.cross_entropy),
    "an infinite loss": (lambda x: x, lambda z, y: F.cross_entropy(z, y) * math.inf),
    "an infinite loss, finite gradients": (lambda x: x, lambda z, y: F.cross_entropy(z, y) + math.inf),
    "zeros": (lambda x: 0 * x, F.cross_entropy),
    "one example": (lambda x: x[:1].expand_as(x), F.cross_entropy),
    "a huge loss": (lambda x: x, lambda z, y: 1e25 * F.cross_entropy(z, y)),
    "the gradient of another loss": (
        lambda x: x, lambda z, y: 2 * F.cross_entropy(z.detach(), y) - F.cross_entropy(z, y)
    ),
}  # fmt: skip


def undisturbed() -> tuple[float, float]:
    """Damping and loss after 40 steps on the whole data."""
    optimizer = paper(model := mlp())
    losses = [closure_step(optimizer, model, X, Y) for _ in range(41)]
    return damping(optimizer), losses[-1]


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("name", SPOILED)
def test_a_spoiled_first_step_does_not_decide_the_run(name, steps):
    inputs, loss = SPOILED[name]
    optimizer = paper(model := mlp(), check_loss_scale=False)
    for _ in range(steps):
        closure_step(optimizer, model, inputs(X), Y, loss)
        assert damping(optimizer) <= 0.6
    losses = [closure_step(optimizer, model, X, Y) for _ in range(41)]
    usual, reached = undisturbed()
    assert usual / 16 < damping(optimizer) < usual * 16
    assert losses[-1] < max(10 * reached, 0.03) and losses[-1] < losses[0] / 20


def test_weights_that_are_frozen_at_first_do_not_decide_the_run():
    model = mlp()
    optimizer = paper(model)
    weights = (model[0].weight, model[2].weight)
    for p in weights:
        p.requires_grad_(False)
    for _ in range(12):
        closure_step(optimizer, model, X, Y)
        assert damping(optimizer) == 0.6
    for p in weights:
        p.requires_grad_(True)
    losses = [closure_step(optimizer, model, X, Y) for _ in range(40)]
    assert losses[-1] < 0.1 * losses[0]


def counted_step(optimizer: KFAC, model: nn.Module) -> int:
    """How often a step calls its closure."""
    calls = []
    closure_step(optimizer, model, X, Y, lambda z, y: (calls.append(1), F.cross_entropy(z, y))[1])
    return len(calls)


def test_the_damping_is_calibrated_anew_where_blocks_gain_or_lose_gradients():
    """Once for the smallest and once for the largest set; sets that come and go do not ask again and again."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer = paper(model)
    first, second, head = model[0], model[2], model[4]

    def calls(*trained: nn.Module) -> int:
        """The most that two steps ask for the loss: a check of one step's ratio asks at most twice."""
        for layer in (first, second, head):
            layer.requires_grad_(layer in trained)
        return max(counted_step(optimizer, model) for _ in range(2))

    assert calls(second, head) > 2
    assert calls(second, head) <= 2
    assert calls(first, second, head) > 2
    assert calls(head) > 2
    for trained in ((head,), (second, head), (first, second, head), (first, head)):
        assert calls(*trained) <= 2
    losses = [closure_step(optimizer, model, X, Y) for _ in range(30)]
    assert losses[-1] < 0.1


def test_a_gradient_that_is_never_the_losss_is_not_calibrated_for_ever(caplog):
    model = mlp()
    optimizer = paper(model, check_loss_scale=False)
    calls = []
    for _ in range(CALIBRATION_STEPS + 5):
        asked = []
        loss = SPOILED["the gradient of another loss"][1]
        closure_step(optimizer, model, X, Y, lambda z, y: (asked.append(1), loss(z, y))[1])  # noqa: B023
        calls.append(len(asked))
    assert min(calls[:CALIBRATION_STEPS]) > 10
    assert max(calls[CALIBRATION_STEPS:]) <= 3
    assert "does not hold at any damping" in caplog.messages[0] and len(caplog.messages) == 1


def test_the_calibration_belongs_to_the_checkpoint():
    """Resumed, neither a calibrated run nor one from before the numbers were saved calibrates again."""
    optimizer = paper(model := mlp())
    closure_step(optimizer, model, X, Y)
    for older in (False, True):
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        stored = torch.load(file, weights_only=True)
        for group in stored["param_groups"] if older else ():
            for name in ("calibrated_least", "calibrated_most", "calibration_failures"):
                del group[name]
        resumed = paper(twin := copy.deepcopy(model))
        resumed.load_state_dict(stored)
        assert counted_step(resumed, twin) <= 2
    fresh = paper(twin := mlp())
    fresh.load_state_dict(paper(mlp()).state_dict())
    assert counted_step(fresh, twin) > 6


class Gated(nn.Module):
    """A constant until the gate opens; perhaps beside a parameter without a block."""

    def __init__(self, bias: bool, rest: bool) -> None:
        super().__init__()
        self.net, self.gate = nn.Linear(6, 3, bias=bias), 0.0
        self.rest = nn.PReLU() if rest else torch.zeros_like

    def forward(self, x: Tensor) -> Tensor:
        return self.gate * self.net(x) + self.rest(x[:, :3])


@pytest.mark.parametrize("rest", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 1e-9])
def test_outputs_that_are_constant_leave_the_damping(bias, rest, weight_decay, caplog):
    """No gradient, a Fisher of zero, no promise that could be judged; then the model wakes up, and calibrates."""
    optimizer = paper(model := Gated(bias, rest), weight_decay=weight_decay)
    for _ in range(16):
        assert counted_step(optimizer, model) <= 3
        assert weight_decay or damping(optimizer) == 0.6
    assert caplog.messages == []
    model.gate = 1.0
    assert counted_step(optimizer, model) > 4
    losses = [closure_step(optimizer, model, X, Y) for _ in range(40)]
    assert losses[-1] < 0.3 * losses[0]


# Batches that are not finite, and steps that lead there.


@pytest.mark.parametrize("spoil", ["inputs", "loss", "gradient", "infinite loss", "finite gradients"])
def test_batches_that_are_not_finite_are_skipped_and_logged_once(spoil, caplog):
    """Parameters, damping and momentum stay, to the bit, also where the step before was good."""
    optimizer = paper(model := mlp())
    for _ in range(10):
        closure_step(optimizer, model, X, Y)
    before, numbers = copied(model), copy.deepcopy(optimizer.state_dict()["param_groups"])
    buffer = optimizer.state[model[0].weight]["momentum_buffer"].clone()
    losses = {
        "loss": lambda z, y: F.cross_entropy(z, y) * math.nan,
        "gradient": lambda z, y: F.cross_entropy(z, y) + (z * 0).abs().sqrt().sum(),
        "infinite loss": lambda z, y: F.cross_entropy(z, y) * math.inf,
        "finite gradients": lambda z, y: F.cross_entropy(z, y) + math.inf,
    }
    for _ in range(50):
        x = X * math.nan if spoil == "inputs" else X
        closure_step(optimizer, model, x, Y, losses.get(spoil, F.cross_entropy))
    assert unchanged(model, before)
    assert torch.equal(optimizer.state[model[0].weight]["momentum_buffer"], buffer)
    assert optimizer.state_dict()["param_groups"] == numbers
    assert optimizer.diagnostics()["skipped"] == 50
    (message,) = caplog.messages
    assert "finite" in message
    assert closure_step(optimizer, model, X, Y) < 1
    assert not unchanged(model, before)


def test_nan_in_every_third_batch():
    """The run goes as without these batches."""

    def run(*, spoiled: bool) -> tuple[nn.Module, float]:
        optimizer = KFAC.paper(model := nn.Linear(6, 3), likelihood="gaussian", compile=False)
        target = torch.tanh(X[:, :3])
        for step in range(60):
            if spoiled and step % 3 == 2:
                closure_step(optimizer, model, X, target * math.nan, lambda z, y: 0.5 * (z - y).square().sum(1).mean())
            closure_step(optimizer, model, X, target, lambda z, y: 0.5 * (z - y).square().sum(1).mean())
        return model, damping(optimizer)

    torch.manual_seed(0)
    spoiled, found = run(spoiled=True)
    torch.manual_seed(0)
    clean, expected = run(spoiled=False)
    torch.testing.assert_close(spoiled.state_dict(), clean.state_dict(), rtol=0, atol=0)
    assert found == expected


def test_a_fixed_run_counts_its_skipped_steps(caplog):
    optimizer = KFAC(model := mlp(), likelihood="categorical", compile=False)
    for step in range(6):
        train_step(optimizer, model, X * math.nan if step % 2 else X, Y)
    assert optimizer.diagnostics()["skipped"] == 3
    assert len(caplog.messages) == 1


@pytest.fixture(params=[False, True], ids=["denormals", "no denormals"])
def flushed(request) -> Iterator[None]:
    """Denormal numbers are as they are, or 0, as in a process that loaded code compiled for speed."""
    if not torch.set_flush_denormal(request.param):
        pytest.skip("this processor does not flush denormal numbers")
    yield
    torch.set_flush_denormal(False)


def test_steps_that_a_scaler_skips_are_no_news(caplog, flushed):
    """A GradScaler finds its scale by overflowing."""
    optimizer = KFAC(model := mlp(), likelihood="categorical", loss_scale=64.0, compile=False, lr="adaptive")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    skipped = 0
    for _ in range(12):
        optimizer.zero_grad()
        scaler.scale(64 * F.cross_entropy(model(X), Y)).backward()
        before = copied(model)
        scaler.step(optimizer)
        scaler.update()
        skipped += unchanged(model, before)
    assert 0 < skipped < 12
    assert optimizer.diagnostics()["skipped"] == skipped
    assert caplog.messages == []


class Cliff(nn.Module):
    """NaN as soon as the weights have moved by more than `reach`."""

    def __init__(self, reach: float) -> None:
        super().__init__()
        self.net, self.reach = mlp(), reach
        self.start = copied(self.net)

    def forward(self, x: Tensor) -> Tensor:
        moved = sum(
            float((p.detach() - q).square().sum()) for p, q in zip(self.net.parameters(), self.start, strict=True)
        )
        return self.net(x) * (1.0 if moved <= self.reach**2 else math.nan)


def test_a_run_of_rejected_steps_recovers(caplog):
    """Each step falls off a cliff until the damping is high enough; then the cliff is gone and the run goes on."""
    optimizer = paper(model := Cliff(math.inf))
    closure_step(optimizer, model, X, Y)
    model.start, model.reach = copied(model.net), 1e-3
    for _ in range(50):
        closure_step(optimizer, model, X, Y)
        moved = torch.cat([(p - q).flatten() for p, q in zip(model.net.parameters(), model.start, strict=True)])
    assert all(p.isfinite().all() for p in model.parameters())
    assert float(moved.detach().norm()) < 1.0
    assert [("taken back" in m, "is skipped" in m) for m in caplog.messages] == [(True, False), (False, True)]
    model.reach = math.inf
    losses = [closure_step(optimizer, model, X, Y) for _ in range(60)]
    assert losses[-1] < 0.1 * losses[0]


def test_weights_that_are_frozen_in_between_stay_where_they_are():
    """The last step of a frozen weight is none: nothing to take back, and nothing to judge."""
    optimizer = paper(model := mlp())
    for _ in range(4):
        closure_step(optimizer, model, X, Y)
    model[0].requires_grad_(False)
    frozen = copied(model[0])
    places = []

    def loss(z: Tensor, y: Tensor) -> Tensor:
        places.append(unchanged(model[0], frozen))
        return F.cross_entropy(z, y)

    for _ in range(12):
        closure_step(optimizer, model, X, Y, loss)
        closure_step(optimizer, model, X * math.nan, Y, loss)
    assert all(places) and len(places) > 24
    model[0].requires_grad_(True)
    losses = [closure_step(optimizer, model, X, Y) for _ in range(30)]
    assert min(losses[-5:]) < losses[0]  # so close to the minimum float32 makes single steps worse
    assert not unchanged(model[0], frozen)
