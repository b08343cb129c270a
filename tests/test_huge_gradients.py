"""Gradients that are finite and huge: no NaN is written, no parameter destroyed in any mode, and training goes on."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from small import closure_step, data, mlp, train_step
from torch import Tensor, nn

from kfac_triton import KFAC
from kfac_triton.steps.adamw import adamw_
from kfac_triton.steps.bounds import size_of

SCALES = [1e20, 1e30, 3e38]
POISONED = (8, 9, 10)


def check(model: nn.Module, optimizer: KFAC, most: float = 1e2) -> None:
    assert all(p.isfinite().all() and p.abs().max() < most for p in model.parameters())
    for state in optimizer.state.values():
        assert all(torch.isfinite(value).all() for value in state.values() if isinstance(value, Tensor))


def losses_of(optimizer: KFAC, model: nn.Module, scale: float, step=train_step, steps: int = 40) -> list[float]:
    """The loss of every step, those in POISONED multiplied by `scale`."""
    x, y = data(256)
    x = x.to(next(model.parameters()).dtype)

    def loss(z: Tensor, y: Tensor, i: int) -> Tensor:
        return F.cross_entropy(z.float() if z.dtype == torch.bfloat16 else z, y) * (scale if i in POISONED else 1.0)

    return [step(optimizer, model, x, y, lambda z, y, i=i: loss(z, y, i)) for i in range(steps)]


class Images(nn.Module):
    """Convolutions on the six inputs; a learned scale that has no block."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.scale, self.head = nn.Conv1d(1, 4, 3), nn.Parameter(torch.ones(4)), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((torch.tanh(self.conv(x[:, None])) * torch.exp(self.scale)[:, None]).flatten(1))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.RNN(2, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x.unflatten(1, (3, 2)))[0][:, -1])


MODES = {
    "kronecker": (mlp, {}),
    "without momentum": (mlp, {"momentum": 0.0}),
    "eigen": (mlp, {"approximation": "eigen"}),
    "inverse free": (mlp, {"approximation": "inverse_free"}),
    "tridiagonal": (mlp, {"approximation": "tridiagonal"}),
    "exact": (mlp, {"fisher": "exact"}),
    "reduce": (mlp, {"weight_sharing": "reduce"}),
    "blocks": (mlp, {"max_factor_dim": 4}),
    "diagonal": (mlp, {"max_factor_dim": 1}),
    "weight decay": (mlp, {"weight_decay": 1e-3}),
    "rounded": (mlp, {"precision": "bf16"}),
    "convolution and fallback": (Images, {}),
    "uncorrelated pixels": (Images, {"spatial": "uncorrelated"}),
    "chain in time": (Recurrent, {"temporal": "chain"}),
    "symmetric chain in time": (Recurrent, {"temporal": "chain_symmetric"}),
}


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("mode", MODES)
def test_of_a_loss_that_is_huge_for_three_steps(mode, scale):
    make, options = MODES[mode]
    torch.manual_seed(0)
    model = make()
    optimizer = KFAC(model, likelihood="categorical", lr=0.1, compile=False, **options)
    losses = losses_of(optimizer, model, scale)
    check(model, optimizer, 1e3)
    assert losses[-1] < 0.7 * losses[7] or mode == "chain in time"  # which does not train such short sequences at all


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e20, 1e37])
def test_of_other_parameters(scale, dtype):
    model = mlp().to(dtype)
    optimizer = KFAC(model, likelihood="categorical", lr=0.1, compile=False)
    losses = losses_of(optimizer, model, scale)
    check(model, optimizer)
    assert losses[-1] < 0.7 * losses[7]


def test_of_double_precision_beyond_single():
    model = mlp().double()
    optimizer = KFAC(model, likelihood="categorical", lr=0.1, compile=False)
    losses = losses_of(optimizer, model, 1e300)
    check(model, optimizer)
    assert losses[-1] < 0.7 * losses[7]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("approximation", ["kronecker", "eigen", "inverse_free"])
def test_of_the_empirical_fisher(approximation, scale):
    """The factors of such a batch are not finite, and stay out."""
    model = mlp()
    optimizer = KFAC(model, fisher="empirical", approximation=approximation, lr=0.1, compile=False)
    losses = losses_of(optimizer, model, scale)
    check(model, optimizer)
    assert losses[-1] < losses[7]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(
    ("options", "step"),
    [
        ({"lr": "adaptive", "momentum": "adaptive", "damping": "adaptive"}, closure_step),
        ({"lr": 0.3, "damping": "adaptive"}, closure_step),
        ({"lr": "adaptive", "momentum": "adaptive", "damping": 0.1}, closure_step),
        ({"lr": "adaptive", "momentum": "adaptive", "damping": 0.1}, train_step),
    ],
    ids=["all", "damping", "length", "length without a closure"],
)
def test_of_adaptive_steps(options, step, scale):
    model = mlp()
    optimizer = KFAC(model, likelihood="categorical", compile=False, **options)
    losses = losses_of(optimizer, model, scale, step)
    check(model, optimizer)
    assert losses[-1] < 0.7 * losses[7]


def test_a_step_is_the_same_whatever_the_size_where_the_bound_holds_it():
    """The direction of a gradient counts, and the bound; entries of 1e37 beside those of 1."""
    ends = []
    for scale in (1.0, 2.0**120):
        model = mlp()
        x, y = data()
        options = {"lr": 1.0, "rule": "kl", "kl_clip": 1e-6, "damping": 1e-2, "momentum": 0.0}
        optimizer = KFAC(model, likelihood="categorical", compile=False, **options)
        train_step(optimizer, model, x, y, lambda z, y, c=scale: c * F.cross_entropy(z, y))
        ends.append(model.state_dict())
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_without_a_bound_a_step_stays_finite(momentum):
    """It is as long as the gradient says up to entries of 2^64, and no longer beyond."""
    lengths = []
    for scale in (1.0, 1e10, 1e30, 3e38):
        model = mlp()
        before = model[0].weight.detach().clone()
        x, y = data()
        options = {"lr": 0.1, "momentum": momentum, "rule": "kl", "kl_clip": None}
        optimizer = KFAC(model, likelihood="categorical", compile=False, **options)
        train_step(optimizer, model, x, y, lambda z, y, c=scale: c * F.cross_entropy(z, y))
        check(model, optimizer, math.inf)
        lengths.append(float((model[0].weight.detach() - before).double().norm()))
    assert lengths[1] == pytest.approx(1e10 * lengths[0], rel=1e-3)
    assert 1e15 * lengths[0] < lengths[2] < 1e22 * lengths[0] and lengths[3] < 4 * lengths[2]


@pytest.mark.parametrize("kl_clip", [1e-3, None])
def test_at_an_lr_of_zero_the_momentum_stays_finite(kl_clip):
    """The first step of a warm-up."""
    model = mlp()
    x, y = data()
    optimizer = KFAC(model, likelihood="categorical", lr=0.0, momentum=0.9, kl_clip=kl_clip, compile=False)
    train_step(optimizer, model, x, y, lambda z, y: 3e38 * F.cross_entropy(z, y))
    check(model, optimizer)


def test_of_a_group_without_a_bound_beside_one_with():
    """Its step is as long as its gradient says, within what stays finite, and its momentum too."""
    model = mlp()
    groups = [{"params": model[0].parameters(), "kl_clip": None}, {"params": model[2].parameters()}]
    optimizer = KFAC(model, groups, likelihood="categorical", lr=0.1, compile=False)
    x, y = data()
    for scale in (1.0, 3e38, 3e38):
        train_step(optimizer, model, x, y, lambda z, y, c=scale: c * F.cross_entropy(z, y))
        check(model, optimizer, math.inf)


def test_under_a_scaler_that_multiplies_it_beyond():
    """The gradient is finite only because of the scale that is undone."""
    model = mlp()
    x, y = data()
    optimizer = KFAC(model, likelihood="categorical", lr=0.1, compile=False)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    for i in range(20):
        optimizer.zero_grad()
        scaler.scale(F.cross_entropy(model(x), y) * (1e33 if i in POISONED else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
    check(model, optimizer)


def test_sizes_are_powers_of_two_that_leave_ordinary_gradients_alone():
    """As a number on the host and as a tensor, where the step is skipped on the device if it is not finite."""
    for largest, size in ((0.0, 1.0), (1e-30, 1.0), (65536.0, 1.0), (65537.0, 2.0), (1e30, 2.0**84), (3e38, 2.0**112)):
        assert size_of(largest) == float(size_of(torch.tensor(largest))) == size
    for largest in (1e300, torch.tensor(1e300, dtype=torch.float64)):
        assert float(size_of(largest)) == 2.0 ** math.ceil(math.log2(1e300 / 2**16))


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("scale", SCALES)
def test_a_model_that_has_no_block(scale, compile):
    """AdamW for all: what is far beyond the gradients before it counts as no larger than they were."""

    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.shift = nn.Parameter(torch.ones(6)), nn.Parameter(torch.zeros(6))

        def forward(self, x: Tensor) -> Tensor:
            return (x * torch.cos(self.scale) + torch.sin(self.shift) * x.flip(1))[:, :3]

    model = Scale()
    optimizer = KFAC(model, likelihood="categorical", lr=0.3, compile=compile)
    losses = losses_of(optimizer, model, scale, steps=60)
    check(model, optimizer)
    clean = losses_of(KFAC(twin := Scale(), likelihood="categorical", lr=0.3, compile=False), twin, 1.0, steps=60)
    assert losses[-1] < 1.1 * clean[-1] < 0.9 * clean[0]


def test_adamw_is_not_stopped_for_thousands_of_steps():
    """An entry of 1e20 would stand in the second moment for 80 000 steps. The gradients before it are zero at first."""
    parameter, moments, step = torch.zeros(4), [torch.zeros(4), torch.zeros(4)], torch.zeros(())
    one = torch.ones((), dtype=torch.float64)
    for i in range(30):
        grad = torch.zeros(4) if i < 3 else torch.ones(4)
        grad[0] = 1e20 if i == 10 else grad[0]
        adamw_(parameter, grad, *moments, step, 0.1, None, one)
        assert torch.isfinite(parameter).all()
    assert parameter[1] < -1.5  # 27 steps of nearly 0.1, some of them a third as long


def test_ordinary_gradients_take_torchs_adamw():
    """Heavy tails too."""
    mine, theirs = torch.zeros(5), nn.Parameter(torch.zeros(5))
    reference = torch.optim.AdamW([theirs], lr=0.1, weight_decay=0.01)
    moments, step, one = [torch.zeros(5), torch.zeros(5)], torch.zeros(()), torch.ones((), dtype=torch.float64)
    for i in range(20):
        grad = torch.randn(5, generator=torch.Generator().manual_seed(i)) * (8 if i == 10 else 1)
        theirs.grad = grad.clone()
        reference.step()
        adamw_(mine, grad, *moments, step, 0.1, 0.01, one)
    torch.testing.assert_close(mine, theirs.detach(), rtol=1e-5, atol=1e-7)
