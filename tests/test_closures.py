"""What adaptive steps ask of a closure: it runs the model again, on the same batch, and returns the whole loss."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from small import closure_step, data, mlp
from torch import Tensor, nn

from kfac_triton import KFAC, Categorical, Likelihood
from kfac_triton.capture import watched_calls

X, Y = data(256)


def paper(model: nn.Module, **options) -> KFAC:
    return KFAC.paper(model, **{"likelihood": "categorical", "compile": False, **options})


def loss_outside(model, optimizer):
    """The model runs before the step; the closure differentiates the same graph each time."""
    value = F.cross_entropy(model(X), Y)

    def closure():
        optimizer.zero_grad()
        value.backward(retain_graph=True)
        return value

    return closure


def loss_kept(model, optimizer):
    """The first call runs the model; later ones return what it found."""
    kept = []

    def closure():
        if not kept:
            optimizer.zero_grad()
            kept.append(F.cross_entropy(model(X), Y))
            kept[0].backward()
        return kept[0]

    return closure


def loss_of_a_number(model, optimizer):
    closure = loss_kept(model, optimizer)
    return lambda: float(closure().detach())


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("start", [None, 1.0])
@pytest.mark.parametrize("make", [loss_outside, loss_kept, loss_of_a_number])
def test_a_closure_that_does_not_run_the_model_is_refused(make, start, compiled):
    """In the first step where it calibrates the damping, else where it first judges it."""
    model = mlp()
    optimizer = paper(model, initial_damping=start)
    called = torch.compile(model, backend="eager") if compiled else model
    with pytest.raises(RuntimeError, match=rf"the closure {make.__name__}\S* returned the same loss.*call the model"):
        for _ in range(6):
            optimizer.step(make(called, optimizer))


@pytest.mark.parametrize("adaptive", ["lr", "momentum"])
def test_a_closure_that_is_called_once_need_not_run_the_model_again(adaptive):
    """A fixed damping asks for the loss after no step."""
    model = mlp()
    options = {"lr": 0.1, "momentum": 0.9, adaptive: "adaptive"}
    optimizer = KFAC(model, likelihood="categorical", compile=False, **options)
    losses = [float(optimizer.step(loss_outside(model, optimizer)).detach()) for _ in range(20)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("compiled", [False, True])
def test_a_loss_that_moves_by_less_than_its_rounding_is_no_fault_of_the_closure(compiled):
    model = mlp()
    optimizer = paper(model)
    called = torch.compile(model, backend="eager") if compiled else model
    seen = {closure_step(optimizer, called, X, Y, lambda z, y: F.cross_entropy(z, y) + 1e9) for _ in range(12)}
    assert len(seen) == 1


def test_calls_of_parts_are_calls_of_the_model():
    model = nn.ModuleDict({"encoder": mlp(), "head": nn.Linear(3, 2)})
    compiled = torch.compile(model["encoder"], backend="eager")
    compiled(X)
    with watched_calls(model) as called:
        torch.relu(X)
        assert called == []
        model["head"](torch.ones(1, 3))
        assert called == [model["head"]]
        called.clear()
        compiled(X)
        assert model["encoder"] in called
    called.clear()
    model["head"](torch.ones(1, 3))
    compiled(X)
    assert called == []


@pytest.mark.parametrize("error", [OverflowError, KeyError, torch.OutOfMemoryError, AssertionError])
def test_an_error_of_a_repeated_call_names_the_closure(error):
    """The error keeps its type, so that what catches it still does; Python 3.10 has no notes to add to it."""
    model, calls = mlp(), []
    optimizer = paper(model)

    def closure():
        calls.append(1)
        if len(calls) > 1:
            raise error("not twice")
        optimizer.zero_grad()
        loss = F.cross_entropy(model(X), Y)
        loss.backward()
        return loss

    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises((error, RuntimeError)) as raised:
        optimizer.step(closure)
    told = "\n".join([str(raised.value), *getattr(raised.value, "__notes__", [])])
    assert "not twice" in told
    assert re.search(r"K-FAC called the closure \S*closure again", told)
    assert hasattr(raised.value, "__notes__") == (type(raised.value) is error)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_a_loader_that_runs_out_inside_the_closure_does_not_end_the_users_loop():
    model = mlp()
    optimizer = paper(model)
    batches = iter([(X, Y)])

    def closure():
        x, y = next(batches)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    with pytest.raises(RuntimeError, match=r"called the closure \S*closure again.*StopIteration") as raised:
        optimizer.step(closure)
    assert isinstance(raised.value.__cause__, StopIteration)


def test_the_first_call_of_a_closure_fails_as_it_does():
    def closure():
        raise KeyError("mine")

    with pytest.raises(KeyError) as raised:
        paper(mlp()).step(closure)
    assert not getattr(raised.value, "__notes__", [])


def test_closures_are_called_with_gradients_on():
    model = mlp()
    optimizer = paper(model)

    def loss(z: Tensor, y: Tensor) -> Tensor:
        assert torch.is_grad_enabled() and z.requires_grad
        return F.cross_entropy(z, y)

    losses = [closure_step(optimizer, model, X, Y, loss) for _ in range(12)]
    assert losses[-1] < losses[0]


# The loss of a closure is that of all passes whose gradients the step has.


@pytest.mark.parametrize("outside", [1, 3])
@pytest.mark.parametrize("adaptive", [{"lr": "adaptive"}, {"damping": "adaptive"}])
def test_accumulation_outside_the_closure_is_named(outside, adaptive):
    model = mlp()
    optimizer = KFAC(model, likelihood="categorical", compile=False, **adaptive)
    parts = [(x, y) for x, y in zip(X.split(64), Y.split(64), strict=True)][: outside + 1]
    optimizer.zero_grad()
    for x, y in parts[:-1]:
        (F.cross_entropy(model(x), y) / len(parts)).backward()

    def closure():
        x, y = parts[-1]
        loss = F.cross_entropy(model(x), y) / len(parts)
        loss.backward()
        return loss

    message = rf"{outside} of the {outside + 1} passes .* ran before the closure.*accumulate .* inside it"
    with pytest.raises(RuntimeError, match=message):
        optimizer.step(closure)


def test_passes_whose_gradients_the_closure_clears_do_not_count():
    model = mlp()
    optimizer = paper(model)
    for _ in range(6):
        F.cross_entropy(model(X), Y).backward()
        closure_step(optimizer, model, X, Y)
    assert optimizer.param_groups[0]["step"] == 6


def test_accumulation_outside_the_closure_is_fine_without_a_model_of_the_loss():
    model = mlp()
    optimizer = KFAC(model, likelihood="categorical", compile=False)
    optimizer.zero_grad()
    F.cross_entropy(model(X), Y).backward()

    def closure():
        loss = F.cross_entropy(model(X), Y)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert optimizer.param_groups[0]["step"] == 1


# loss_scale is compared with the loss where the Fisher of the outputs is known to be the loss's Hessian.


class Heteroscedastic(Likelihood):
    """Outputs (mean, log variance): the Hessian of the nll is not its Fisher where residuals are not typical."""

    def nll(self, outputs: Tensor, targets: Tensor) -> Tensor:
        mean, log_variance = outputs[..., 0], outputs[..., 1]
        return (0.5 * (log_variance + (targets - mean) ** 2 * torch.exp(-log_variance))).mean()

    def sampled_gradient(self, z: Tensor, generator: torch.Generator) -> Tensor:
        noise = torch.randn(z.shape[:-1], generator=generator, dtype=z.dtype)
        return torch.stack([-noise * torch.exp(-0.5 * z[..., 1]), 0.5 * (1 - noise * noise)], -1)

    def fisher_column(self, z: Tensor, c: int) -> Tensor:
        column = torch.zeros_like(z)
        column[..., c] = torch.exp(-0.5 * z[..., 1]) if c == 0 else 0.5**0.5
        return column


def test_a_likelihood_of_ones_own_with_the_true_scale():
    torch.manual_seed(0)
    x = torch.randn(256, 3)
    y = 2 * x[:, 0] + torch.randn(256) * torch.exp(x[:, 1])
    model, likelihood = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 2)), Heteroscedastic()
    optimizer = paper(model, likelihood=likelihood)
    losses = [closure_step(optimizer, model, x, y, likelihood.nll) for _ in range(40)]
    assert losses[-1] < losses[0] - 1


class Smoothed(Categorical):
    """A loss of its own: the Hessian of the focal loss is not the categorical Fisher."""

    def nll(self, outputs: Tensor, targets: Tensor) -> Tensor:
        log_p = F.log_softmax(outputs, -1).gather(1, targets[:, None])[:, 0]
        return -((1 - log_p.exp()) ** 2 * log_p).mean()


@pytest.mark.parametrize("likelihood", ["categorical", Categorical()])
def test_a_wrong_scale_is_refused_unless_the_check_is_off(likelihood):
    def loss(z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(z, y, reduction="sum")

    with pytest.raises(ValueError, match=r"Likely loss_scale=256 .*check_loss_scale=False"):
        closure_step(paper(model := mlp(), likelihood=likelihood), model, X, Y, loss)
    optimizer = paper(model := mlp(), likelihood=likelihood, check_loss_scale=False)
    assert optimizer.settings["check_loss_scale"] is False
    closure_step(optimizer, model, X, Y, loss)


def test_a_subclass_with_a_loss_of_its_own_is_not_checked():
    optimizer, likelihood = paper(model := mlp(), likelihood=Smoothed()), Smoothed()
    losses = [closure_step(optimizer, model, X, Y, likelihood.nll) for _ in range(20)]
    assert losses[-1] < losses[0] / 2
