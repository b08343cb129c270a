"""Which of a program's passes enter the factors: those that made the gradients of the step, and no others.

Each program returns the inputs that must count; the first layer's factor A is then their second moment.
"""

from __future__ import annotations

import copy
import logging
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small import WHOLE, data, mlp, second_moment, train_step
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kfac_triton import KFAC
from kfac_triton.capture import backward as backward_passes

Program = Callable[[nn.Module, Callable[..., Tensor], Tensor, Tensor], Tensor]


def backward(model: Callable[..., Tensor], x: Tensor, y: Tensor) -> None:
    F.cross_entropy(model(x), y).backward()


# --------------------------------------------------------------------------------------------------- the table of cases


def plain(m, call, x, y):
    backward(call, x, y)
    return x


def accumulated(m, call, x, y):
    for i in range(4):
        backward(call, (i + 1) * x, y)
    return torch.cat([x, 2 * x, 3 * x, 4 * x])


def accumulated_and_clipped_between(m, call, x, y):
    backward(call, x, y)
    nn.utils.clip_grad_norm_(m.parameters(), 0.1)
    backward(call, 2 * x, y)
    return torch.cat([x, 2 * x])


def discarded(clear: Callable[[nn.Module], Any]) -> Program:
    def program(m, call, x, y):
        backward(call, 100 * x, y)
        clear(m)
        backward(call, x, y)
        return x

    return program


def clear_each(how: Callable[[nn.Parameter], Any]) -> Callable[[nn.Module], None]:
    def clear(m: nn.Module) -> None:
        for p in m.parameters():
            how(p)

    return clear


def two_discarded_and_two_kept(m, call, x, y):
    backward(call, 100 * x, y)
    backward(call, 90 * x, y)
    m.zero_grad()
    backward(call, x, y)
    backward(call, 2 * x, y)
    return torch.cat([x, 2 * x])


def attack(m, call, x, y):
    adversarial = x
    for _ in range(5):
        adversarial = adversarial.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(call(adversarial), y), adversarial)
        adversarial = adversarial + 0.1 * gradient.sign()
    backward(call, adversarial.detach(), y)
    return adversarial.detach()


def backward_into_the_input(m, call, x, y):
    z = (10 * x).requires_grad_()
    F.cross_entropy(call(z), y).backward(inputs=[z])
    backward(call, x, y)
    return x


def monitored_gradients(m, call, x, y):
    backward(call, x, y)
    torch.autograd.grad(F.cross_entropy(call(10 * x), y), list(m.parameters()))
    return x


def output_that_no_loss_used(m, call, x, y):
    z = call(x)
    call(10 * x)
    F.cross_entropy(z, y).backward()
    return x


def two_views_in_one_loss(m, call, x, y):
    (F.cross_entropy(call(x), y) + F.cross_entropy(call(2 * x), y)).backward()
    return torch.cat([x, 2 * x])


def two_losses_of_one_pass(m, call, x, y):
    z = call(x)
    F.cross_entropy(z, y).backward(retain_graph=True)
    z.square().mean().backward()
    return x


def two_losses_and_the_first_cleared(m, call, x, y):
    z = call(x)
    F.cross_entropy(z, y).backward(retain_graph=True)
    m.zero_grad()
    z.square().mean().backward()
    return x


def jacobian(m, call, x, y):
    torch.autograd.functional.jacobian(call, 10 * x[:2])
    backward(call, x, y)
    return x


def per_sample_gradients(m, call, x, y):
    parameters = {k: v.detach() for k, v in m.named_parameters()}

    def loss(p, a, b):
        return F.cross_entropy(torch.func.functional_call(m, p, (a[None],)), b[None])

    torch.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, 10 * x, y)
    backward(call, x, y)
    torch.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, 10 * x, y)
    return x


def gradient_with_a_graph(m, call, x, y):
    F.cross_entropy(call(x), y).backward(create_graph=True)
    sum(p.grad.square().sum() for p in m.parameters()).detach()
    for p in m.parameters():
        p.grad = p.grad.detach()
    return x


def gradient_penalty(m, call, x, y):
    loss = F.cross_entropy(call(x), y)
    grads = torch.autograd.grad(loss, list(m.parameters()), create_graph=True)
    (loss + sum(g.square().sum() for g in grads)).backward()
    return x


def no_grad_before(m, call, x, y):
    with torch.no_grad():
        call(10 * x)
    backward(call, x, y)
    return x


def eval_mode(m, call, x, y):
    m.eval()
    backward(call, x, y)
    return x


def sharpness_aware(m, call, x, y):
    """SAM: the gradient of a first pass moves the weights and is then cleared."""
    backward(call, 3 * x, y)
    steps = {p: 0.05 * p.grad for p in m.parameters()}
    with torch.no_grad():
        for p, step in steps.items():
            p.add_(step)
    m.zero_grad()
    backward(call, x, y)
    with torch.no_grad():
        for p, step in steps.items():
            p.sub_(step)
    return x


def assigned_gradients(m, call, x, y):
    parameters = list(m.parameters())
    grads = torch.autograd.grad(F.cross_entropy(call(x), y), parameters)
    for p, grad in zip(parameters, grads, strict=True):
        p.grad = grad
    return x


def forward_that_raised(m, call, x, y):
    with pytest.raises(RuntimeError):
        call(x[:, :3])
    backward(call, x, y)
    return x


def interrupted_forward(m, call, x, y):
    """Ctrl-C in a notebook, the next cell goes on; no hook sees it."""

    def interrupt(module, args):
        raise KeyboardInterrupt

    handle = m[2].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        call(10 * x)
    handle.remove()
    backward(call, x, y)
    return x


def backward_that_raised(m, call, x, y):
    z = call(10 * x)

    def fail(gradient):
        raise ValueError("in backward")

    z.register_hook(fail)
    with pytest.raises(ValueError, match="in backward"):
        F.cross_entropy(z, y).backward()
    m.zero_grad()
    backward(call, x, y)
    return x


def running_statistics(m, call, x, y):
    torch.optim.swa_utils.update_bn([10 * x], m)
    backward(call, x, y)
    return x


EAGER: dict[str, Program] = {
    "plain": plain,
    "accumulated": accumulated,
    "accumulated, clipped between": accumulated_and_clipped_between,
    "discarded by model.zero_grad": discarded(lambda m: m.zero_grad()),
    "discarded by model.zero_grad(set_to_none=False)": discarded(lambda m: m.zero_grad(set_to_none=False)),
    "discarded by grad = None": discarded(clear_each(lambda p: setattr(p, "grad", None))),
    "discarded by grad.zero_": discarded(clear_each(lambda p: p.grad.zero_())),
    "discarded by grad.data.zero_": discarded(clear_each(lambda p: p.grad.data.zero_())),
    "two discarded, two kept": two_discarded_and_two_kept,
    "attack on the input": attack,
    "backward into the input": backward_into_the_input,
    "gradients for a monitor": monitored_gradients,
    "an output without a loss": output_that_no_loss_used,
    "two views": two_views_in_one_loss,
    "two losses": two_losses_of_one_pass,
    "two losses, the first cleared": two_losses_and_the_first_cleared,
    "jacobian": jacobian,
    "per-sample gradients": per_sample_gradients,
    "create_graph": gradient_with_a_graph,
    "gradient penalty": gradient_penalty,
    "no_grad before": no_grad_before,
    "eval mode": eval_mode,
    "SAM": sharpness_aware,
    "assigned gradients": assigned_gradients,
    "a forward pass that raised": forward_that_raised,
    "an interrupted forward pass": interrupted_forward,
    "a backward pass that raised": backward_that_raised,
    "update_bn": running_statistics,
}
NOT_COMPILED = ("two losses", "two losses, the first cleared", "jacobian", "per-sample gradients", "create_graph")
COMPILED = [
    name
    for name in EAGER
    if name not in (*NOT_COMPILED, "gradient penalty", "an interrupted forward pass", "a forward pass that raised")
]


def check(program: Program, wrap: Callable[[nn.Module], Callable[..., Tensor]], **options: Any) -> None:
    """Three steps of the program, each compared with the factor that its own passes give."""
    x, y = data(32)
    m = mlp()
    optimizer = KFAC(m, **{**WHOLE, **options})
    call = wrap(m)
    for k in range(3):
        optimizer.zero_grad()
        before = optimizer.factors().get("0", {}).get("A", torch.zeros(7, 7))
        rows = program(m, call, x, y)
        optimizer.step()
        found = optimizer.factors()["0"]["A"]
        torch.testing.assert_close(found, before * k / (k + 1) + second_moment(rows) / (k + 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", EAGER)
def test_what_counts(name):
    check(EAGER[name], lambda m: m)


@pytest.mark.parametrize("name", [name for name in EAGER if name != "assigned gradients"])
def test_what_counts_for_the_empirical_fisher(name):
    check(EAGER[name], lambda m: m, fisher="empirical")


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["plain", "accumulated", "discarded by grad.zero_", "two views", "eval mode"])
def test_what_counts_under_a_checkpoint(name, reentrant):
    def wrap(m: nn.Module) -> Callable[..., Tensor]:
        return lambda x: checkpoint(m, x.requires_grad_() if reentrant else x, use_reentrant=reentrant)

    program = EAGER[name]
    check(lambda m, call, x, y: program(m, call, x.clone(), y).detach(), wrap)


@pytest.mark.parametrize("how", ["wrapped", "in place"])
@pytest.mark.parametrize("name", COMPILED)
def test_what_counts_in_a_compiled_model(name, how):
    def wrap(m: nn.Module) -> Callable[..., Tensor]:
        if how == "wrapped":
            compiled: Callable[..., Tensor] = torch.compile(m, fullgraph=True, backend="aot_eager")
            return compiled
        m.compile(fullgraph=True, backend="aot_eager")
        return m

    check(EAGER[name], wrap)


@pytest.mark.parametrize("fisher", ["mc", "empirical"])
def test_a_discarded_batch_then_no_other(fisher):
    """All gradients are gone: a step without any does nothing."""
    x, y = data()
    m = mlp()
    optimizer = KFAC(m, **WHOLE, fisher=fisher)
    backward(m, x, y)
    m.zero_grad()
    assert optimizer._attached().source.passes.take() == []
    optimizer.step()
    assert optimizer.factors() == {} and optimizer.param_groups[0]["step"] == 0


@pytest.mark.parametrize("zero", ["zero_", "data.zero_"])
def test_gradients_that_are_zero_make_no_factors(zero):
    x, y = data()
    m = mlp()
    optimizer = KFAC(m, **WHOLE)
    backward(m, x, y)
    for p in m.parameters():
        (p.grad if zero == "zero_" else p.grad.data).zero_()
    optimizer.step()
    assert optimizer.factors() == {} and optimizer.param_groups[0]["step"] == 0


def test_the_loss_itself_compiled():
    x, y = data(32)
    m = mlp()
    optimizer = KFAC(m, **WHOLE)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def loss(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(m(x), y)

    loss(10 * x, y)
    loss(x, y).backward()
    optimizer.step()
    torch.testing.assert_close(optimizer.factors()["0"]["A"], second_moment(x))


def test_another_model_of_the_same_type_compiled_first():
    """Dynamo would run its code, which knows no hooks."""
    x, y = data(32)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    torch.compile(Net(), backend="aot_eager")(x)
    m = Net()
    optimizer = KFAC(m, **WHOLE)
    backward(torch.compile(m, backend="aot_eager"), x, y)
    optimizer.step()
    torch.testing.assert_close(optimizer.factors()["net.0"]["A"], second_moment(x))


def test_generator_and_discriminator():
    """The generator's loss runs through the discriminator, which throws the gradients of that away."""
    torch.manual_seed(0)
    G = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 6))
    D = nn.Sequential(nn.Linear(6, 16), nn.LeakyReLU(0.2), nn.Linear(16, 1))
    real = torch.randn(32, 6)
    options = {"factor_fraction": 1.0, "compile": False, "lr": 0.0, "fallback_lr": None}
    of_D = KFAC(D, likelihood="bernoulli", **options)
    of_G = KFAC(G, likelihood="gaussian", **options)
    loss = nn.BCEWithLogitsLoss()
    for _ in range(3):
        noise = torch.randn(32, 2)
        D.zero_grad()
        loss(D(real), torch.ones(32, 1)).backward()
        fake = G(noise)
        loss(D(fake.detach()), torch.zeros(32, 1)).backward()
        of_D.step()
        G.zero_grad()
        loss(D(fake), torch.ones(32, 1)).backward()
        of_G.step()
    of_D.param_groups[0]["factor_decay"] = of_G.param_groups[0]["factor_decay"] = 0.0
    D.zero_grad()
    loss(D(real), torch.ones(32, 1)).backward()
    loss(D(fake.detach()), torch.zeros(32, 1)).backward()
    of_D.step()
    G.zero_grad()
    loss(D(G(noise)), torch.ones(32, 1)).backward()
    of_G.step()
    torch.testing.assert_close(of_D.factors()["0"]["A"], second_moment(torch.cat([real, fake.detach()])))
    torch.testing.assert_close(of_G.factors()["0"]["A"], second_moment(noise))


# -------------------------------------------------------------------------------- whatever part of the model is called


class Parts(nn.Module):
    """The network of `mlp` in pieces."""

    def __init__(self) -> None:
        super().__init__()
        net = mlp()
        self.encoder, self.decoder = nn.Sequential(net[0], net[1]), net[2]

    def both(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))


def parts(model: Parts, x: Tensor) -> Tensor:
    return model.decoder(model.encoder(x))


def layers(model: Parts, x: Tensor) -> Tensor:
    return model.decoder(torch.tanh(model.encoder[0](x)))


def method(model: Parts, x: Tensor) -> Tensor:
    return model.both(x)


@pytest.mark.parametrize("fisher", ["mc", "exact"])
@pytest.mark.parametrize("how", [parts, layers, method])
def test_parts_called_one_after_the_other_give_the_factors_of_the_whole(how, fisher):
    """In the first step parts are not yet known to be called so, but single layers are."""
    x, y = data(32)
    whole, model = mlp(), Parts()
    expected = KFAC(whole, **WHOLE, fisher=fisher, lr=0.0)
    optimizer = KFAC(model, **WHOLE, fisher=fisher, lr=0.0)
    for step in range(4):
        train_step(expected, whole, x, y)
        train_step(optimizer, lambda x: how(model, x), x, y)
        if how is layers and step == 0:
            assert set(optimizer.factors()) == {"encoder.0", "decoder"}
    found = optimizer.factors()
    for name, twin in (("encoder.0", "0"), ("decoder", "2")):
        torch.testing.assert_close(found[name]["A"], expected.factors()[twin]["A"])
        if fisher == "exact":
            torch.testing.assert_close(found[name]["G"], expected.factors()[twin]["G"])
    assert set(optimizer.coverage().values()) == {"linear"}


def test_piggyback_equals_replay_to_the_bit():
    """The same samples of the same batch, through the user's graph or through a pass of K-FAC's own."""
    x, y = data(32)
    runs = []
    for fisher_pass in ("replay", "piggyback"):
        model = mlp()
        optimizer = KFAC(model, **WHOLE, fisher_pass=fisher_pass)
        losses = [train_step(optimizer, model, x, y) for _ in range(5)]
        runs.append((losses, optimizer.factors(), [p.detach() for p in model.parameters()]))
    torch.testing.assert_close(runs[0], runs[1], rtol=0, atol=0)


def test_piggyback_leaves_the_users_gradients_alone():
    x, y = data(32)
    model, twin = mlp(), mlp()
    KFAC(model, **WHOLE, fisher_pass="piggyback")
    backward(model, x, y)
    backward(twin, x, y)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_a_cell_called_in_a_loop():
    """The rows of all its calls, behind the last output alone, against the same loop inside of one module."""

    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.step, self.head = nn.Linear(12, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.zeros(len(x), 6)
            for _ in range(4):
                h = torch.tanh(self.step(torch.cat([x, h], 1)))
            return self.head(h)

    x, y = data(32)
    whole, model = Cell(), Cell()
    expected = KFAC(whole, **WHOLE, fisher="exact", lr=0.0)
    train_step(expected, whole, x, y)
    optimizer = KFAC(model, **WHOLE, fisher="exact", lr=0.0)
    train_step(optimizer, lambda x: Cell.forward(model, x), x, y)
    torch.testing.assert_close(optimizer.factors(), expected.factors())


@pytest.mark.parametrize(("fisher", "n", "error"), [("exact", 32, 1e-6), ("mc", 8192, 0.1)])
def test_two_heads_on_one_trunk(fisher, n, error):
    """The loss is a sum over both heads: the trunk's block is the Fisher of the mean over all their loss terms.

    Sampled, each head has targets of its own, and the error is that of n of them.
    """

    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.trunk, self.left, self.right = nn.Linear(6, 4), nn.Linear(4, 3), nn.Linear(4, 3)

    x, y = data(n)
    model = Heads().double()
    x = x.double()
    optimizer = KFAC(model, **WHOLE, fisher=fisher, lr=0.0)
    h = model.trunk(x)
    (F.cross_entropy(model.left(h), y) + F.cross_entropy(model.right(h), y)).backward()
    optimizer.step()
    factors = optimizer.factors()["trunk"]
    G = torch.zeros(4, 4, dtype=torch.float64)
    for head in (model.left, model.right):
        p = torch.softmax(head(h), 1).detach()
        H = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
        G += (head.weight.T @ H @ head.weight).sum(0).detach()
    expected = torch.kron(G / n, second_moment(x) / 2)
    assert torch.linalg.norm(torch.kron(factors["G"], factors["A"]) - expected) < error * torch.linalg.norm(expected)


def test_a_resumed_run_of_parts_is_equal_to_the_bit():
    x, y = data(32)
    runs = []
    for interrupted in (False, True):
        model = Parts()
        optimizer = KFAC(model, **WHOLE)
        for step in range(6):
            if interrupted and step == 3:
                saved, weights = copy.deepcopy(optimizer.state_dict()), model.state_dict()
                model = Parts()
                model.load_state_dict(weights)
                optimizer = KFAC(model, **WHOLE)
                optimizer.load_state_dict(saved)
            train_step(optimizer, lambda x, model=model: parts(model, x), x, y)
        runs.append([p.detach() for p in model.parameters()])
    torch.testing.assert_close(runs[0], runs[1], rtol=0, atol=0)


def test_parts_that_cannot_be_followed_are_refused_by_name():
    x, y = data(32)
    for options in ({"fisher": "empirical"}, {"fisher_pass": "replay"}):
        model = Parts()
        optimizer = KFAC(model, **WHOLE, **options)
        backward(lambda x, model=model: parts(model, x), x, y)
        with pytest.raises(RuntimeError, match="one after the other"):
            optimizer.step()
    model = Parts()
    optimizer = KFAC(model, lr="adaptive", **WHOLE)
    backward(lambda x: parts(model, x), x, y)
    with pytest.raises(RuntimeError, match="one after the other"):
        optimizer.step()


def test_networks_that_take_turns():
    """Each step calls another part of the holder: every part gets its factors, and loses none."""
    x, y = data(32)
    model = nn.ModuleDict({"a": mlp(seed=1), "b": mlp(seed=2)})
    optimizer = KFAC(model, **WHOLE, lr=0.0)
    for step in range(8):
        train_step(optimizer, model["ab"[step % 2]], x * (1 + step % 2), y)
    torch.testing.assert_close(optimizer.factors()["a.0"]["A"], second_moment(x))
    torch.testing.assert_close(optimizer.factors()["b.0"]["A"], second_moment(2 * x))


def test_a_part_that_is_called_late_is_noticed():
    """Hooks stay where calls began; a gradient elsewhere brings the others back, and that step updates no factor."""
    x, y = data(32)
    model = nn.ModuleDict({"a": mlp(seed=1), "b": mlp(seed=2)})
    optimizer = KFAC(model, **WHOLE, lr=0.0)
    for _ in range(3):
        train_step(optimizer, model["a"], x, y)
    for _ in range(3):
        optimizer.zero_grad()
        (F.cross_entropy(model["a"](x), y) + F.cross_entropy(model["b"](x), y)).backward()
        optimizer.step()
    torch.testing.assert_close(optimizer.factors()["b.0"]["A"], second_moment(x) / 2)  # of twice as many loss terms


def test_layers_of_a_list():
    x, y = data(32)
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)])
    optimizer = KFAC(model, **WHOLE)

    def run(x: Tensor) -> Tensor:
        for layer in model:
            x = layer(torch.tanh(x))
        return x

    losses = [train_step(optimizer, run, x, y) for _ in range(10)]
    assert losses[-1] < losses[0] and set(optimizer.coverage().values()) == {"linear"}


# ------------------------------------------------------------------------------------------------------- what it costs


def test_kept_inputs_are_bounded(monkeypatch, caplog):
    """Micro-batches beyond the bound stay out of the factors, with one warning; the first is always kept."""
    monkeypatch.setattr(backward_passes, "MAX_KEPT_BYTES", 2 * 32 * 6 * 4)
    x, y = data(32)
    model = mlp()
    optimizer = KFAC(model, **WHOLE, lr=0.0)
    with caplog.at_level(logging.WARNING, "kfac_triton"):
        for k in range(5):
            (F.cross_entropy(model((k + 1) * x), y) / 2).backward()
        optimizer.step()
    torch.testing.assert_close(optimizer.factors()["0"]["A"], second_moment(torch.cat([x, 2 * x])))
    assert len(caplog.messages) == 1 and "exceed" in caplog.messages[0]


def test_the_hooks_of_a_known_root_are_few():
    """After the first step the root alone is heard."""
    x, y = data(32)
    model = mlp()
    optimizer = KFAC(model, **WHOLE)
    train_step(optimizer, model, x, y)
    heard = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert heard == [model]
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def python_calls(f: Callable[[], Any]) -> int:
    count = 0

    def profile(frame, event, argument):
        nonlocal count
        count += event == "call"

    sys.setprofile(profile)
    try:
        f()
    finally:
        sys.setprofile(None)
    return count


def test_the_hooks_add_a_bounded_number_of_python_calls():
    """To a forward and a backward pass, however deep the network."""
    x, y = torch.randn(16, 8), torch.randint(8, (16,))

    def added(depth: int) -> int:
        def network() -> nn.Module:
            return nn.Sequential(*(m for _ in range(depth) for m in (nn.Linear(8, 8), nn.Tanh())))

        model, bare = network(), network()
        optimizer = KFAC(model, **WHOLE)
        for _ in range(3):
            train_step(optimizer, model, x, y)
        model.zero_grad()
        backward(bare, x, y)
        bare.zero_grad()
        return python_calls(lambda: backward(model, x, y)) - python_calls(lambda: backward(bare, x, y))

    shallow, deep = added(4), added(24)
    assert deep <= 110 and deep - shallow <= 2


def measured(width: int, batch: int, rounds: int = 300) -> float:
    """The median time of forward, backward and SGD's update of 24 layers with K-FAC's hooks, relative to without."""
    x, y = torch.randn(batch, width), torch.randint(width, (batch,))

    def network() -> nn.Module:
        return nn.Sequential(*(m for _ in range(24) for m in (nn.Linear(width, width), nn.Tanh())))

    def step(model: nn.Module, sgd: torch.optim.Optimizer) -> None:
        sgd.zero_grad()
        backward(model, x, y)
        sgd.step()

    bare, model = network(), network()
    optimizer = KFAC(model, **WHOLE)
    train_step(optimizer, model, x, y)
    entrants = [(m, torch.optim.SGD(m.parameters(), lr=1e-3, momentum=0.9)) for m in (bare, model)]
    times: list[list[float]] = [[], []]
    for _ in range(rounds):
        for (m, sgd), own in zip(entrants, times, strict=True):
            begin = time.perf_counter()
            step(m, sgd)
            own.append(time.perf_counter() - begin)
        optimizer._attached().source.passes.take()
    without, with_hooks = (sorted(own)[rounds // 2] for own in times)
    return with_hooks / without


if __name__ == "__main__":
    torch.set_num_threads(1)
    for width, batch in ((64, 64), (512, 256)):
        print(
            f"24 layers of width {width}, batch {batch}: {measured(width, batch):.3f} times an SGD step without hooks"
        )
