"""loss_scale counts in every mode: a loss of c mean nll with loss_scale=c is trained as the mean nll is; and the first
step warns where the gradient at the outputs shows another one."""

from __future__ import annotations

import logging

import dense
import pytest
import torch
import torch.nn.functional as F
from small import closure_step, data, mlp, train_step
from torch import Tensor, nn

from kfac_triton import KFAC, Bernoulli, Categorical, Gaussian
from kfac_triton.fisher.loss_scale import seen_in_gradient

# ------------------------------------------------------------------------------------------------------ it counts


def ends(scale: float, step=train_step, accumulate: int = 1, **options) -> Tensor:
    """The parameters after five steps on `scale` times the nll, in float64."""
    x, y = data()
    model = mlp().double()
    optimizer = KFAC(model, likelihood="categorical", loss_scale=scale, lr=0.3, compile=False, **options)
    for _ in range(5):
        if accumulate == 1:
            step(optimizer, model, x.double(), y, lambda z, y: scale * F.cross_entropy(z, y))
            continue
        optimizer.zero_grad()
        for part in range(accumulate):
            (scale * F.cross_entropy(model(x.double()[part::accumulate]), y[part::accumulate]) / accumulate).backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("scale", [1 / 64, 128.0])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"fisher": "exact", "momentum": 0.0},
        {"fisher": "empirical"},
        {"approximation": "eigen"},
        {"approximation": "inverse_free"},
        {"approximation": "tridiagonal"},
        {"kl_clip": None},
        {"kl_clip": 1e-4},
    ],
    ids=str,
)
def test_a_multiple_of_the_loss_with_its_loss_scale_makes_the_same_steps(options, scale):
    dense.assert_exact(ends(scale, **options), ends(1.0, **options), 1e-9)


@pytest.mark.parametrize("fisher", ["mc", "empirical"])
def test_of_an_accumulated_step(fisher):
    options = {"fisher": fisher, "factor_fraction": 1.0, "accumulate": 4}
    dense.assert_exact(ends(7.0, **options), ends(1.0, **options), 1e-9)


def test_weight_decay_is_part_of_the_loss_that_is_divided():
    dense.assert_exact(ends(10.0, weight_decay=0.3), ends(1.0, weight_decay=0.03), 1e-9)


@pytest.mark.parametrize("scale", [1 / 64, 128.0])
@pytest.mark.parametrize("momentum", [0.9, "adaptive"])
@pytest.mark.parametrize("lr", [0.3, "adaptive"])
def test_of_adaptive_steps(lr, momentum, scale):
    def run(scale: float) -> Tensor:
        x, y = data(256)
        model = mlp().double()
        options = {"lr": lr, "momentum": momentum, "damping": "adaptive", "weight_decay": 1e-3 * scale}
        optimizer = KFAC(model, likelihood="categorical", loss_scale=scale, compile=False, **options)
        for _ in range(6):
            closure_step(optimizer, model, x.double(), y, lambda z, y: scale * F.cross_entropy(z, y))
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    dense.assert_exact(run(scale), run(1.0), 1e-6)


def test_the_mean_over_outputs_is_that_of_the_gaussian():
    """MSELoss over C outputs is 2 / C of the nll."""
    found = []
    for loss, scale in ((F.mse_loss, 2 / 64), (lambda z, y: 0.5 * (z - y).square().sum(1).mean(), 1.0)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 64)).double()
        x, y = torch.randn(256, 10).double(), torch.randn(256, 64).double()
        optimizer = KFAC(model, likelihood="gaussian", loss_scale=scale, compile=False)
        for _ in range(5):
            train_step(optimizer, model, x, y, loss)
        found.append(model[0].weight.detach().clone())
    torch.testing.assert_close(found[0], found[1])


# ------------------------------------------------------------------------------------------- it shows in the gradient


def gradient(loss, *shape: int, dtype=torch.float32) -> tuple[Tensor, Tensor]:
    z = dense.randn(*shape).to(dtype).requires_grad_()
    loss(z).backward()
    return z.detach(), z.grad


CLASSES = torch.arange(24) % 5
BITS = (dense.randn(24, 5, seed=3) > 0).float()
SHOWN = {
    "mean": (Categorical(), lambda z: F.cross_entropy(z, CLASSES), (24, 5), 1.0),
    "sum": (Categorical(), lambda z: F.cross_entropy(z, CLASSES, reduction="sum"), (24, 5), 24.0),
    "confident": (Categorical(), lambda z: F.cross_entropy(30 * z, CLASSES), (24, 5), None),
    "two classes": (Categorical(), lambda z: 3 * F.cross_entropy(z, CLASSES % 2), (24, 2), 3.0),
    "a sequence": (Categorical(), lambda z: F.cross_entropy(z.flatten(0, 1), CLASSES), (4, 6, 5), 1.0),
    "an image": (Categorical(1), lambda z: F.cross_entropy(z, CLASSES.view(2, 3, 4)), (2, 5, 3, 4), 1.0),
    "one example": (Categorical(), lambda z: F.cross_entropy(z, torch.tensor(2)), (5,), 1.0),
    "slightly smoothed": (Categorical(), lambda z: F.cross_entropy(z, CLASSES, label_smoothing=1e-3), (24, 5), 1.0),
    "smoothed": (Categorical(), lambda z: F.cross_entropy(z, CLASSES, label_smoothing=0.1), (24, 5), None),
    "weighted": (Categorical(), lambda z: F.cross_entropy(z, CLASSES, torch.arange(1.0, 6.0)), (24, 5), None),
    "ignored": (Categorical(), lambda z: F.cross_entropy(z, CLASSES, ignore_index=0), (24, 5), None),
    "soft targets": (Categorical(), lambda z: F.cross_entropy(z, torch.full((24, 5), 0.2)), (24, 5), None),
    "with a penalty": (Categorical(), lambda z: F.cross_entropy(z, CLASSES) + z.square().mean(), (24, 5), None),
    "no gradient": (Categorical(), lambda z: 0 * z.sum(), (24, 5), None),
    "upwards": (Categorical(), lambda z: -F.cross_entropy(z, CLASSES), (24, 5), None),
    "bits": (Bernoulli(), lambda z: F.binary_cross_entropy_with_logits(z, BITS), (24, 5), 0.2),
    "summed bits": (Bernoulli(), lambda z: F.binary_cross_entropy_with_logits(z, BITS, reduction="sum"), (24, 5), 24.0),
    "a bit": (Bernoulli(), lambda z: F.binary_cross_entropy_with_logits(z, BITS[:, 0]), (24,), 1.0),
    "shares": (Bernoulli(), lambda z: F.binary_cross_entropy_with_logits(z, 0.3 * BITS), (24, 5), None),
    "squares": (Gaussian(), lambda z: F.mse_loss(z, BITS), (24, 5), None),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", SHOWN)
def test_the_scale_in_a_gradient(name, dtype):
    likelihood, loss, shape, scale = SHOWN[name]
    seen, axis = seen_in_gradient(likelihood, *gradient(lambda z: loss(z.float()), *shape, dtype=dtype))
    if scale is None:
        assert (seen, axis) == (None, None)
    else:
        assert seen == pytest.approx(scale, rel=0.01)
        assert axis in (likelihood.dim, likelihood.dim % len(shape))


def test_confident_outputs_show_it_too():
    """p - onehot cancels to a few digits."""
    z = 12 * F.one_hot(CLASSES, 5).float().requires_grad_()
    z.retain_grad()
    F.cross_entropy(z, CLASSES).backward()
    assert seen_in_gradient(Categorical(), z.detach(), z.grad)[0] == pytest.approx(1.0, rel=0.01)


def test_the_axis_of_the_classes():
    z, dz = gradient(lambda z: F.cross_entropy(z, CLASSES.view(2, 3, 4)), 2, 5, 3, 4)
    assert seen_in_gradient(Categorical(), z, dz) == (pytest.approx(1.0), 1)
    z, dz = gradient(lambda z: F.cross_entropy(z.flatten(0, 2), CLASSES), 2, 3, 4, 5)
    assert seen_in_gradient(Categorical(), z, dz) == (pytest.approx(1.0), 3)
    assert seen_in_gradient(Categorical(1), z, dz) == (pytest.approx(1.0), 3)


def test_terms_that_a_mask_leaves_out():
    counted = CLASSES > 0
    z, dz = gradient(lambda z: F.cross_entropy(z, CLASSES, ignore_index=0), 24, 5)
    assert seen_in_gradient(Categorical(), z, dz, counted) == (pytest.approx(1.0), 1)


# ---------------------------------------------------------------------------------------- the first step warns once


def warnings(caplog, model: nn.Module, optimizer: KFAC, *losses) -> list[str]:
    """What is logged in steps that each accumulate the gradients of all the losses."""
    with caplog.at_level(logging.WARNING, "kfac_triton"):
        for _ in range(3):
            optimizer.zero_grad()
            for loss in losses:
                loss(model).backward()
            optimizer.step()
    return [record.getMessage() for record in caplog.records]


def classifier(**options) -> tuple[nn.Module, KFAC]:
    model = mlp()
    return model, KFAC(model, **{"likelihood": "categorical", "compile": False, **options})


X, Y = data()


def nll(model: nn.Module, scale: float = 1.0) -> Tensor:
    return scale * F.cross_entropy(model(X), Y)


@pytest.mark.parametrize("fisher", ["mc", "exact", "empirical"])
def test_another_scale_is_named_once(caplog, fisher):
    (message,) = warnings(caplog, *classifier(fisher=fisher), lambda m: nll(m, 128.0))
    assert "loss_scale=1, but" in message and "Pass loss_scale=128 " in message


@pytest.mark.parametrize("fisher_pass", ["replay", "piggyback"])
def test_the_right_scale_is_silent(caplog, fisher_pass):
    options = {"fisher_pass": fisher_pass}
    assert not warnings(caplog, *classifier(loss_scale=128.0, **options), lambda m: nll(m, 128.0))
    assert not warnings(caplog, *classifier(**options), nll)


def test_penalties_on_parameters_do_not_count(caplog):
    assert not warnings(caplog, *classifier(), lambda m: nll(m) + 100 * sum(p.square().sum() for p in m.parameters()))


@pytest.mark.parametrize(("share", "told"), [(0.25, []), (1.0, ["Pass loss_scale=4 "])])
def test_passes_of_one_step_count_together(caplog, share, told):
    messages = warnings(caplog, *classifier(), *[lambda m: nll(m, share)] * 4)
    assert len(messages) == len(told) and all(text in m for text, m in zip(told, messages, strict=True))


def test_a_pass_that_was_cleared_does_not_count(caplog):
    model, optimizer = classifier()
    nll(model, 1000.0).backward()
    assert not warnings(caplog, model, optimizer, nll)


def test_a_scaler_is_taken_out(caplog):
    model, optimizer = classifier()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with caplog.at_level(logging.WARNING, "kfac_triton"):
        optimizer.zero_grad()
        scaler.scale(nll(model)).backward()
        scaler.step(optimizer)
    assert not caplog.records


def test_masked_terms(caplog):
    def ignoring(model: nn.Module) -> Tensor:
        return F.cross_entropy(model(X), torch.where(X[:, 0] > 0, Y, -100))

    assert not warnings(caplog, *classifier(mask=lambda x, z: x[:, 0] > 0), ignoring)
    assert not warnings(caplog, *classifier(), ignoring)  # nothing can be told of it


def test_another_axis_is_named_once(caplog):
    torch.manual_seed(0)
    model = nn.Conv2d(2, 5, 3, padding=1)
    optimizer = KFAC(model, likelihood="categorical", compile=False)
    x, y = torch.randn(4, 2, 3, 6), torch.randint(5, (4, 3, 6))
    (message,) = warnings(caplog, model, optimizer, lambda m: F.cross_entropy(m(x), y))
    assert "softmax over axis 1" in message and "Categorical(dim=1)" in message


def test_outputs_that_are_no_tensor(caplog):
    """A dictionary-like object with logits, and an `output` that finds them."""

    class Output:
        def __init__(self, logits: Tensor) -> None:
            self.logits = logits

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def forward(self, x: Tensor) -> Output:
            return Output(self.net(x))

    for output in (None, lambda returned: returned.logits):
        caplog.clear()
        model = Wrapped()
        optimizer = KFAC(model, likelihood="categorical", output=output, compile=False)
        messages = warnings(caplog, model, optimizer, lambda m: 50 * F.cross_entropy(m(X).logits, Y))
        assert len(messages) == 1 and "loss_scale=50" in messages[0]


def test_nothing_is_watched_after_the_first_step():
    model, optimizer = classifier()
    assert len(model(X)._backward_hooks) == 1
    train_step(optimizer, model, X, Y)
    assert not model(X)._backward_hooks
