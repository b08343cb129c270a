"""Steps by the quadratic model, against dense algebra and theory (E16 to E18), and what a closure may not notice."""

from __future__ import annotations

import copy
import io
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import dense
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_triton import KFAC, ops
from kfac_triton.capture.patches import kept_gradients
from kfac_triton.config import CALIBRATED_FROM
from kfac_triton.estimator import CurvatureEstimator
from kfac_triton.steps import proposal
from kfac_triton.steps.damping import Adaptation
from kfac_triton.structures import kronecker

F64 = torch.float64
EXACT = {"fisher": "exact", "factor_fraction": 1.0, "compile": False}
ADAPTIVE = {"lr": "adaptive", "momentum": "adaptive"}


def closure_of(model, optimizer, loss):
    def closure():
        optimizer.zero_grad()
        value = loss(model)
        value.backward()
        return value

    return closure


def flat(parameters) -> Tensor:
    return torch.cat([p.detach().flatten() for p in parameters])


# E16: on a quadratic objective.


def linear_regression():
    torch.manual_seed(0)
    model = nn.Linear(5, 3).double()
    X, Y = dense.randn(40, 5, seed=1), dense.randn(40, 3, seed=2)
    return model, X, lambda m: 0.5 * (m(X) - Y).square().sum(1).mean()


@pytest.mark.parametrize("damping", [0.0, "adaptive"])
def test_one_exact_step_reaches_the_minimum_of_a_quadratic(damping):
    model, loss = linear_regression()[::2]
    options = {"damping": damping, "initial_damping": 1e-24 if damping == "adaptive" else None}
    optimizer = KFAC(model, likelihood="gaussian", **ADAPTIVE, **options, **EXACT)
    closure = closure_of(model, optimizer, loss)
    optimizer.step(closure)
    told = optimizer.diagnostics()
    assert told["lr"] == pytest.approx(1.0, abs=1e-8)
    assert told["momentum"] == 0.0
    gradient = torch.autograd.grad(loss(model), list(model.parameters()))
    assert flat(gradient).abs().max() < 1e-8
    assert told["predicted_reduction"] == pytest.approx(float(loss(model).detach()) - told["loss"], rel=1e-8)


def test_the_reduction_ratio_is_one_on_a_quadratic():
    """With a wrong preconditioner, so that there is something left to reduce at every step."""
    model, loss = linear_regression()[::2]
    optimizer = KFAC(model, likelihood="gaussian", **ADAPTIVE, damping="adaptive", initial_damping=1e-12, **EXACT)
    optimizer.param_groups[0]["gamma"] = 1.0
    seen = []
    for _ in range(10):
        optimizer.step(closure_of(model, optimizer, loss))
        seen.append(optimizer.diagnostics()["rho"])
    assert [rho is not None for rho in seen] == [False] * 4 + [True] + [False] * 4 + [True]
    assert seen[4] == pytest.approx(1.0, abs=1e-6)
    optimizer.step(closure_of(model, optimizer, loss))
    assert optimizer.diagnostics()["fresh_rho"] is not None


def test_a_fixed_wrong_preconditioner_gives_conjugate_gradients(monkeypatch):
    """Six steps with any positive definite G_inv, A_inv: the iterates of preconditioned CG, in dense algebra."""
    model, X, loss = linear_regression()
    optimizer = KFAC(model, likelihood="gaussian", **ADAPTIVE, damping=0.0, **EXACT)
    start = copy.deepcopy(model.state_dict())
    optimizer.step(closure_of(model, optimizer, loss))
    model.load_state_dict(start)
    state = optimizer.state[model.weight]
    factor = [dense.randn(3 * d, d, seed=d) for d in (6, 3)]
    for name, x in zip(("A_inv", "G_inv"), factor, strict=True):
        state[name].copy_(x.T @ x / len(x))
    for p in model.parameters():
        optimizer.state[p]["momentum_buffer"].zero_()
    monkeypatch.setattr(CurvatureEstimator, "refresh_", lambda *args, **kwargs: None)

    Xa = torch.cat([X, torch.ones(40, 1, dtype=F64)], 1)
    H = torch.kron(torch.eye(3, dtype=F64), Xa.T @ Xa / 40)
    M = torch.kron(state["G_inv"], state["A_inv"])

    def joint() -> Tensor:
        return torch.cat([model.weight, model.bias[:, None]], 1).detach().flatten()

    model.zero_grad()
    loss(model).backward()
    w = joint()
    residual = -torch.cat([model.weight.grad, model.bias.grad[:, None]], 1).flatten()
    z = M @ residual
    direction = z.clone()
    for _ in range(6):
        alpha = (residual @ z) / (direction @ H @ direction)
        w = w + alpha * direction
        new = residual - alpha * H @ direction
        new_z = M @ new
        direction = new_z + (new @ new_z) / (residual @ z) * direction
        residual, z = new, new_z
        optimizer.step(closure_of(model, optimizer, loss))
        dense.assert_exact(joint(), w, 1e-8)


# A step against the dense minimum of the model.


class Mixed(nn.Module):
    """A convolution, batch statistics, a tied weight and a parameter without a block."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(1, 2, 3), nn.BatchNorm1d(2)
        self.rest, self.inner, self.head = nn.PReLU(2), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.rest(self.norm(self.conv(x[:, None])))).flatten(1)
        return self.head(torch.tanh(self.inner(torch.tanh(self.inner(x)))))


NETWORKS = {
    "mlp": lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)),
    "mixed": Mixed,
    "bare layer": lambda: nn.Sequential(nn.PReLU(6), nn.Linear(6, 3)),
}
LOSSES = {
    "gaussian": (lambda z, y: 0.5 * (z - y).square().sum(1).mean(), dense.randn(9, 3, seed=5)),
    "categorical": (F.cross_entropy, torch.arange(9) % 3),
    "bernoulli": (
        lambda z, y: F.binary_cross_entropy_with_logits(z, y, reduction="sum") / 9, (dense.randn(9, 3) > 0).double()
    ),
}  # fmt: skip
FREE = {"both": ADAPTIVE, "lr": {"lr": "adaptive", "momentum": 0.5}, "momentum": {"lr": 0.2, "momentum": "adaptive"}}


@pytest.mark.parametrize("most", [proposal.MAX_MOMENTUM, 0.05])
@pytest.mark.parametrize("free", FREE)
@pytest.mark.parametrize("likelihood", LOSSES)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_step_is_the_dense_minimum_of_the_model(name, likelihood, free, most, monkeypatch):
    """Delta by dense inverses, F by a dense Jacobian, the 2 x 2 system solved by torch.linalg; three steps.

    The momentum is bounded: by 1, which is met where the step length is too short for the model; or by so little that
    both meet it.
    """
    monkeypatch.setattr(proposal, "MAX_MOMENTUM", most)
    scale, damping, eta = 0.7, 0.3, 0.05
    torch.manual_seed(0)
    model = NETWORKS[name]().double()
    x = dense.randn(9, 6, seed=4)
    nll, y = LOSSES[likelihood]
    options = {"kl_clip": None, "loss_scale": scale, "weight_decay": eta, "fallback_lr": 1e-2, **FREE[free]}
    optimizer = KFAC(model, likelihood=likelihood, damping=damping, inverse_interval=1, **options, **EXACT)
    last: dict[nn.Parameter, Tensor] = {}
    for _ in range(3):
        before = {p: p.detach().clone() for p in model.parameters()}
        at_start = copy.deepcopy(model)
        loss = scale * nll(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        raw = {p: p.grad.clone() for p in model.parameters()}
        optimizer.step()
        moved = {p: p.detach() - before[p] for p in model.parameters()}

        natural, decayed = {}, dict(raw)
        for module_name, factor in optimizer.factors().items():
            module = model.get_submodule(module_name)
            W, b = module.weight, module.bias
            for p in (W, b):
                decayed[p] = raw[p] + eta * before[p]
            if module_name == "norm":  # a block of its own, damped whole
                A = factor["A"] + damping * torch.eye(4, dtype=F64)
                V = torch.linalg.solve(A, torch.cat([decayed[W], decayed[b]]))
                natural[W], natural[b] = -V[: len(W)], -V[len(W) :]
                continue
            A_inv, G_inv = dense.damped_inverses(factor["A"], factor["G"], damping)
            V = G_inv @ torch.cat([decayed[W].flatten(1), decayed[b][:, None]], 1) @ A_inv
            natural[W], natural[b] = -V[:, :-1].reshape(W.shape), -V[:, -1]
        rest = {p: moved[p] for p in model.parameters() if p not in natural}
        directions = [natural, last, rest]
        twin = dict(zip(model.parameters(), at_start.parameters(), strict=True))
        F_ = dense.gram(at_start, x, [{twin[p]: v for p, v in d.items()} for d in directions], likelihood)
        H = scale * F_
        for i, u in enumerate(directions):
            for j, v in enumerate(directions):
                for p in u.keys() & v.keys() & natural.keys():
                    H[i, j] += (scale * damping + eta) * (u[p] * v[p]).sum()
        slope = torch.stack(
            [sum((decayed[p] * v[p]).sum() for p in v) + torch.zeros((), dtype=F64) for v in directions]
        )
        fixed_lr = 0.2 / scale  # of a gradient that was not divided by loss_scale
        w = torch.tensor([fixed_lr if free == "momentum" else 0.0, 0.5 if free == "lr" else 0.0, 1.0], dtype=F64)
        unknown = {"both": [0, 1], "lr": [0], "momentum": [1]}[free]
        unknown = [i for i in unknown if H[i, i] > 0]
        if unknown:
            w[unknown] = torch.linalg.solve(H[unknown][:, unknown], -(slope + H @ w)[unknown])
        if 1 in unknown and w[1].abs() > most:  # then the minimum within the bound lies on it
            w[1] = w[1].sign() * most
            w[0] = -(slope[0] + H[0, 1] * w[1] + H[0, 2]) / H[0, 0] if free == "both" else fixed_lr
        expected = {p: sum(c * d[p] for c, d in zip(w, directions, strict=True) if p in d) for p in moved}
        dense.assert_exact(flat(moved.values()), flat(expected.values()), 1e-8)
        told = optimizer.diagnostics()
        assert told["predicted_reduction"] == pytest.approx(float(w @ H @ w / 2 + slope @ w), rel=1e-8)
        last = {p: moved[p] for p in natural}


def test_lr_is_a_multiplier_of_the_adaptive_length():
    def first_step(**options):
        model, loss = linear_regression()[::2]
        before = flat(model.parameters())
        groups = [{"params": [model.weight]}, {"params": [model.bias]}]
        optimizer = KFAC(model, groups, likelihood="gaussian", **ADAPTIVE, damping=0.1, **EXACT)
        for group, lr in zip(optimizer.param_groups, options["lrs"], strict=True):
            group["lr"] = lr
        closure_of(model, optimizer, loss)()
        optimizer.step()
        return flat(model.parameters()) - before, optimizer.diagnostics()

    whole, told = first_step(lrs=[1.0, 1.0])
    half, half_told = first_step(lrs=[0.5, 0.5])
    dense.assert_exact(half, whole / 2)
    assert half_told["lr"] == pytest.approx(told["lr"] / 2)
    assert half_told["predicted_reduction"] == pytest.approx(0.75 * told["predicted_reduction"])
    frozen, _ = first_step(lrs=[1.0, 0.0])
    assert frozen[:15].all()
    assert not frozen[15:].any()
    assert not first_step(lrs=[0.0, 0.0])[0].any()


# E18: damping, and the closure that is called again.


def network(dropout: float = 0.3) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.PReLU(8), nn.Dropout(dropout), nn.Linear(8, 3)
    )  # fmt: skip


def batch(step: int) -> tuple[Tensor, Tensor]:
    return dense.randn(20, 6, seed=step).float(), torch.arange(20) % 3


def adaptive(model: nn.Module, **options) -> KFAC:
    defaults = {
        **ADAPTIVE,
        "damping": "adaptive",
        "initial_damping": 1.0,
        "compile": False,
        "likelihood": "categorical",
    }
    return KFAC(model, **{**defaults, **options})


def train(model: nn.Module, optimizer: KFAC, steps: range) -> list[dict]:
    told = []
    for step in steps:
        x, y = batch(step)
        torch.manual_seed(100 + step)
        optimizer.step(closure_of(model, optimizer, lambda m: F.cross_entropy(m(x), y)))  # noqa: B023
        told.append(optimizer.diagnostics())
    return told


def test_without_a_closure_adaptive_damping_says_what_it_needs():
    model = network()
    optimizer = adaptive(model)
    F.cross_entropy(model(batch(0)[0]), batch(0)[1]).backward()
    with pytest.raises(RuntimeError, match=r'damping="adaptive" asks for the loss again.*optimizer.step\(closure\)'):
        optimizer.step()


def test_a_closure_must_return_the_loss():
    model = network()
    optimizer = adaptive(model)
    with pytest.raises(TypeError, match=r"closure must return the loss.*NoneType"):
        optimizer.step(lambda: F.cross_entropy(model(batch(0)[0]), batch(0)[1]).backward())


def first_reduction(damping: float) -> float:
    """The change of the loss in a first step at this damping."""
    model = network(dropout=0.0)
    x, y = batch(0)
    (told,) = train(model, adaptive(model, initial_damping=damping), range(1))
    with torch.no_grad():
        return float(F.cross_entropy(model(x), y)) - told["loss"]


def test_the_first_step_finds_its_damping():
    """A power of four from where the search begins; better than the paper's; later steps know nothing of the trials."""
    model = network(dropout=0.0)
    optimizer = adaptive(model, initial_damping=None)
    torch.manual_seed(100)
    (told,) = train(model, optimizer, range(1))
    steps = math.log(CALIBRATED_FROM / told["damping"], 4)
    assert steps == pytest.approx(round(steps))
    assert steps >= 1
    assert told["damping"] == optimizer.param_groups[0]["damping"]
    assert first_reduction(told["damping"]) < first_reduction(150.0)
    twin = network(dropout=0.0)
    given = adaptive(twin, initial_damping=told["damping"])
    train(twin, given, range(1))
    torch.testing.assert_close(model.state_dict(), twin.state_dict())
    train(model, optimizer, range(1, 8))
    train(twin, given, range(1, 8))
    torch.testing.assert_close(model.state_dict(), twin.state_dict())


def test_the_papers_constants():
    model = network()
    optimizer = KFAC.paper(model, likelihood="categorical")
    (group,) = optimizer.param_groups
    assert group["adaptive_lr"] and group["adaptive_momentum"] and group["adaptive_damping"]
    assert (group["weight_decay"], group["inverse_interval"], group["factor_interval"]) == (1e-5, 20, 1)
    assert group["factor_decay"] == 0.95
    assert optimizer.settings["factor_fraction"] == 1 / 8
    assert optimizer.settings["quadratic_fraction"] == 1 / 4
    assert optimizer.settings["fisher"] == "mc"
    other = KFAC.paper(network(), likelihood="categorical", initial_damping=150.0, inverse_interval=5, compile=False)
    assert (other.param_groups[0]["inverse_interval"], other.param_groups[0]["calibrate_damping"]) == (5, False)
    with pytest.raises(ValueError, match="likelihood is needed"):
        KFAC.paper(network())


def test_the_papers_optimizer_trains():
    """Twenty points of random classes, learnt by heart."""
    model, (x, y) = network(dropout=0.0), batch(0)
    optimizer = KFAC.paper(model, likelihood="categorical", compile=False)
    losses = [
        float(optimizer.step(closure_of(model, optimizer, lambda m: F.cross_entropy(m(x), y)))) for _ in range(40)
    ]
    assert losses[-1] < losses[0] / 10


@pytest.mark.parametrize("step", [0, 3, 4, 5])
def test_asking_for_the_loss_again_leaves_no_trace(step):
    """At the first step, which checks loss_scale, at one without a check and at two with: all as after one pass."""
    model = network()
    optimizer = adaptive(model)
    train(model, optimizer, range(step))
    twin = copy.deepcopy(model)
    x, y = batch(50)
    calls = []

    def closure():
        optimizer.zero_grad(set_to_none=False)
        calls.append(1)
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    torch.manual_seed(7)
    optimizer.step(closure)
    stream = torch.get_rng_state()
    torch.manual_seed(7)
    F.cross_entropy(twin(x), y).backward()
    assert len(calls) == {0: 3, 3: 1, 4: 2, 5: 2}[step]
    assert torch.equal(stream, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), twin.buffers(), strict=True))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    assert optimizer._attached().source.passes.pending() == []


def test_the_loss_is_asked_for_again_without_its_backward_pass():
    """One backward pass a step, whatever the closure does with the gradients, and the same step as with all of them."""
    passes, asked = [], []

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            passes.append(1)
            return grad

    def run(needs_gradients: bool) -> tuple[nn.Module, bool, list[int], list[int]]:
        passes.clear(), asked.clear()
        model = network()
        optimizer = adaptive(model)
        for step in range(11):
            x, y = batch(step)

            def closure():
                asked.append(1)
                optimizer.zero_grad()
                loss = Watched.apply(F.cross_entropy(model(x), y))  # noqa: B023
                loss.backward()
                if needs_gradients:
                    model[0].weight.grad.mul_(1.0)
                return loss

            torch.manual_seed(100 + step)
            optimizer.step(closure)
        return model, optimizer._forward_only, list(passes), list(asked)

    lean, stays, once, calls = run(needs_gradients=False)
    assert (stays, len(once), len(calls)) == (True, 11, 11 + 2 + 2 * 2)
    whole, stays, again, calls = run(needs_gradients=True)
    assert (stays, len(again), len(calls)) == (False, 11 + 2 + 2 * 2, 11 + 1 + 2 + 2 * 2)
    torch.testing.assert_close(lean.state_dict(), whole.state_dict())


def test_a_closure_that_fails_fails():
    model = network()
    optimizer = adaptive(model)
    x, y = batch(0)
    calls = []

    def closure():
        calls.append(1)
        if len(calls) > 1:
            raise OverflowError("the second call")
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    before = torch.Tensor.backward, torch.autograd.backward
    with pytest.raises(OverflowError, match="the second call"):
        optimizer.step(closure)
    assert (torch.Tensor.backward, torch.autograd.backward) == before


def test_backward_passes_of_other_threads_go_on():
    """Two threads inside, entering and leaving in turn; a third trains all the while and loses nothing."""
    before = torch.Tensor.backward, torch.autograd.backward
    inside, leave = threading.Event(), threading.Event()

    def stay() -> None:
        with kept_gradients(backward=False):
            inside.set()
            assert leave.wait(10)

    def gradient() -> Tensor | None:
        weight = torch.ones((), requires_grad=True)
        (3 * weight).backward()
        torch.autograd.backward([2 * weight])
        return weight.grad

    other = threading.Thread(target=stay)
    with kept_gradients(backward=False):
        other.start()
        assert inside.wait(10)
        assert gradient() is None
        with ThreadPoolExecutor(1) as third:
            assert third.submit(gradient).result() == 5
    assert gradient() == 5
    leave.set()
    other.join()
    assert gradient() == 5
    assert (torch.Tensor.backward, torch.autograd.backward) == before


@pytest.mark.parametrize(("loss_of_rounding", "kept"), [(0.0, True), (1.0, False)])
def test_products_are_rounded_while_the_model_promises_as_much(monkeypatch, loss_of_rounding, kept):
    monkeypatch.setattr(ops, "multiplies_bf16_faster", lambda device, width: True)
    monkeypatch.setattr(ops, "ROUNDED", 0)
    exact = ops.kron_matmul_

    def rounded(out, G_inv, V, A_inv, *, bf16=False, **more):
        exact(out, G_inv, V, A_inv)
        if bf16:
            for o in out:
                o.add_(torch.randn_like(o), alpha=loss_of_rounding * float(o.norm()))

    monkeypatch.setattr(ops, "kron_matmul_", rounded)
    model, twin = network(dropout=0.0), network(dropout=0.0)
    optimizer, given = adaptive(model), adaptive(twin, precision="ieee")
    train(model, optimizer, range(21))
    train(twin, given, range(21))
    assert optimizer.param_groups[0]["bf16"] is kept
    torch.testing.assert_close(model.state_dict(), twin.state_dict(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("kept", "rounded"), [(0.951, True), (0.949, False)])
def test_rounded_products_keep_95_percent_of_the_promise(monkeypatch, kept, rounded):
    monkeypatch.setattr(ops, "multiplies_bf16_faster", lambda device, width: True)
    monkeypatch.setattr(ops, "ROUNDED", 0)
    propose = proposal.Proposer.propose

    def less(self, groups, *rest):
        found = propose(self, groups, *rest)
        return replace(found, predicted=found.predicted * (kept if groups[0]["bf16"] else 1.0))

    exact = ops.kron_matmul_
    monkeypatch.setattr(ops, "kron_matmul_", lambda *args, bf16=False, **more: exact(*args))
    monkeypatch.setattr(proposal.Proposer, "propose", less)
    model = network(dropout=0.0)
    optimizer = adaptive(model)
    train(model, optimizer, range(1))
    assert optimizer.param_groups[0]["bf16"] is rounded


def test_narrow_products_are_rounded_only_where_that_is_asked_for(monkeypatch):
    """Of two layers with inputs as wide, only the one that is wide on both sides is worth it."""
    multiplied: list[tuple[int, bool]] = []
    exact = kronecker.Multiplier.__call__

    def noted(self, grad, out, number, scratch, *, bf16):
        multiplied.append((min(scratch.shape[1:]), bf16))
        exact(self, grad, out, number, scratch, bf16=bf16)

    monkeypatch.setattr(kronecker.Multiplier, "__call__", noted)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    for width, precision, expected in (
        (ops.ROUNDED, "auto", {(ops.ROUNDED, False), (ops.ROUNDED, True), (8, False)}),
        (ops.ROUNDED - 1, "auto", {(ops.ROUNDED - 1, False), (8, False)}),
        (8, "bf16", {(8, True)}),
    ):
        multiplied.clear()
        model = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 8))
        optimizer = adaptive(model, precision=precision)
        x, y = torch.randn(32, width), torch.arange(32) % 8
        optimizer.step(closure_of(model, optimizer, lambda m, x=x, y=y: F.cross_entropy(m(x), y)))
        assert set(multiplied) == expected


def test_the_precision_of_a_step(monkeypatch):
    """Asked for, products are rounded in steps of any kind; else only where the adaptive step found that it may."""
    asked, rounded = [], []
    multiply_, exact = kronecker.Multiplier.__call__, ops.kron_matmul_
    monkeypatch.setattr(
        kronecker.Multiplier, "__call__", lambda *args, bf16: (asked.append(bf16), multiply_(*args, bf16=bf16))[1]
    )
    monkeypatch.setattr(
        ops, "kron_matmul_", lambda *args, bf16=False, **more: (rounded.append(bf16), exact(*args, bf16=bf16))[1]
    )
    monkeypatch.setattr(ops, "multiplies_bf16_faster", lambda device, width: False)
    for options, expected in (
        ({"precision": "bf16"}, True), ({"precision": "ieee"}, False), ({}, False),
        ({"precision": "bf16", **ADAPTIVE}, True), ({"precision": "ieee", **ADAPTIVE}, False), (ADAPTIVE, False),
    ):  # fmt: skip
        asked.clear(), rounded.clear()
        model = network()
        train(model, KFAC(model, likelihood="categorical", compile=False, **options), range(2))
        assert set(asked) == {expected}, options
        assert set(rounded) == ({True} if expected else set()), "on a CPU exact products are torch's"


def test_the_ratio_is_that_of_the_same_batch_and_mask():
    """rho of the fifth step, recomputed by hand from the parameters before and after it."""
    model = network()
    optimizer = adaptive(model, weight_decay=0.1)
    train(model, optimizer, range(4))
    x, y = batch(4)

    def objective(m: nn.Module) -> float:
        torch.manual_seed(104)
        decay = sum(0.05 * p.double().square().sum() for layer in (m[0], m[1], m[4]) for p in layer.parameters())
        return float(F.cross_entropy(m(x), y).double() + decay)

    before = objective(copy.deepcopy(model))
    (told,) = train(model, optimizer, range(4, 5))
    change = objective(copy.deepcopy(model)) - before
    assert told["reduction"] == pytest.approx(change, rel=1e-3)
    assert told["rho"] == pytest.approx(change / told["predicted_reduction"], rel=1e-3)


def test_damping_and_gamma_follow_in_the_groups():
    model = network()
    optimizer = adaptive(model, initial_damping=0.01)
    dampings, gammas = [], []
    for told in train(model, optimizer, range(41)):
        dampings.append(told["damping"])
        gammas.append(told["gamma"])
    for k in range(40):
        ratio = dampings[k + 1] / dampings[k]
        allowed = [1.0, 0.95**5, 0.95**-5] if k % 5 == 4 else [1.0]  # after the fifth step, judged on the sixth batch
        assert any(ratio == pytest.approx(a, rel=1e-12) for a in allowed)
        gamma_ratio = gammas[k + 1] / gammas[k]
        assert gamma_ratio == 1.0 or k % 20 == 19
    assert len(set(dampings)) > 1
    assert len(set(gammas)) > 1


@pytest.mark.parametrize("momentum", ["adaptive", 0.5, 0.0])
def test_the_ratio_on_the_next_batch(momentum):
    """Recomputed by hand: the fifth step's change of the sixth batch's objective, over what the model promised."""
    model = network(dropout=0.3)
    optimizer = adaptive(model, weight_decay=0.1, momentum=momentum)
    told = train(model, optimizer, range(4))
    start = copy.deepcopy(model)
    told = train(model, optimizer, range(4, 5))[0]
    # parameters without a block are judged where they are now
    for here, there in zip(start.modules(), model.modules(), strict=True):
        if isinstance(here, nn.PReLU):
            here.load_state_dict(there.state_dict())
    x, y = batch(5)

    def objective(m: nn.Module) -> float:
        torch.manual_seed(105)
        decay = sum(0.05 * p.double().square().sum() for layer in (m[0], m[1], m[4]) for p in layer.parameters())
        return float(F.cross_entropy(m(x), y).double() + decay)

    change = objective(copy.deepcopy(model)) - objective(start)
    found = train(model, optimizer, range(5, 6))[0]["fresh_rho"]
    assert found == pytest.approx(change / told["predicted_reduction"], rel=1e-2)
    assert optimizer.diagnostics()["fresh_rho"] == found
    assert train(model, optimizer, range(6, 7))[0]["fresh_rho"] is None


def test_the_next_batch_has_a_veto_in_the_run():
    """Small batches of random classes: what a step gains on its own batch, it often loses on the next."""
    model = network(dropout=0.0)
    optimizer = adaptive(model, initial_damping=0.01)
    told = train(model, optimizer, range(61))
    vetoes = 0
    for step in range(5, 61, 5):
        rho, fresh = told[step - 1]["rho"], told[step]["fresh_rho"]
        before, after = told[step - 1]["damping"], told[step]["damping"]
        assert after == pytest.approx(Adaptation().next_damping(before, rho, fresh), rel=1e-12)
        vetoes += after != pytest.approx(Adaptation().next_damping(before, rho), rel=1e-12)
    assert vetoes > 3


def test_a_loss_that_is_no_number_takes_the_last_step_back():
    """The seventh step leads where the eighth closure finds NaN: back to where the seventh began, with more damping."""
    model = network(dropout=0.0)
    optimizer = adaptive(model)
    train(model, optimizer, range(6))
    before = [p.detach().clone() for layer in (model[0], model[4]) for p in layer.parameters()]
    train(model, optimizer, range(6, 7))
    damping = optimizer.param_groups[0]["damping"]
    bad = model[0].weight.detach().clone()
    x, y = batch(7)

    def loss(m: nn.Module) -> Tensor:
        return F.cross_entropy(m(x), y) * (math.nan if torch.equal(m[0].weight, bad) else 1.0)

    optimizer.step(closure_of(model, optimizer, loss))
    after = [p.detach() for layer in (model[0], model[4]) for p in layer.parameters()]
    for p, q in zip(after, before, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    assert optimizer.param_groups[0]["damping"] == pytest.approx(damping / 0.95**5)
    assert optimizer.param_groups[0]["step"] == 7
    train(model, optimizer, range(8, 12))
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_into_nowhere_is_taken_back(bad):
    """The loss after the fifth step is no number: the parameters stay, the damping grows."""
    model = network(dropout=0.0)
    optimizer = adaptive(model)
    train(model, optimizer, range(4))
    before, damping = copy.deepcopy(model.state_dict()), optimizer.param_groups[0]["damping"]
    x, y = batch(4)
    called = []

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y) * (1.0 if not called else bad)
        called.append(1)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert len(called) == 2
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])
    assert optimizer.param_groups[0]["damping"] == pytest.approx(damping / 0.95**5)
    assert optimizer.diagnostics()["rho"] == -math.inf
    train(model, optimizer, range(5, 8))
    assert all(p.isfinite().all() for p in model.parameters())


def test_resuming_is_bit_equal():
    """Across a search for gamma and several checks of the damping."""
    model = network()
    optimizer = adaptive(model)
    train(model, optimizer, range(17))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    stored = torch.load(file, weights_only=True)
    train(model, optimizer, range(17, 26))
    again = network()
    resumed = adaptive(again, initial_damping=7.0)
    again.load_state_dict(stored["model"])
    resumed.load_state_dict(stored["optimizer"])
    train(again, resumed, range(17, 26))
    torch.testing.assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(resumed.state_dict(), optimizer.state_dict(), rtol=0, atol=0)


# loss_scale.

SCALED = {
    "sum": ("categorical", lambda z, y: F.cross_entropy(z, y, reduction="sum"), 1.0, 20),
    "mean over outputs": ("gaussian", lambda z, y: F.mse_loss(z, F.one_hot(y, 12).float()), 1.0, 2 / 12),
    "mean of bits": (
        "bernoulli", lambda z, y: F.binary_cross_entropy_with_logits(z, F.one_hot(y, 12).float()), 1.0, 1 / 12
    ),
    "a wrong scale": ("categorical", F.cross_entropy, 20.0, 1),
}  # fmt: skip


@pytest.mark.parametrize("name", SCALED)
def test_a_wrong_loss_scale_is_named_before_a_step(name):
    likelihood, loss, claimed, truth = SCALED[name]
    x, y = batch(1)
    for scale in (claimed, truth):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 12))
        before = copy.deepcopy(model.state_dict())
        optimizer = adaptive(model, likelihood=likelihood, loss_scale=scale, initial_damping=0.1)
        closure = closure_of(model, optimizer, lambda m: loss(m(x), y))
        if scale == truth:
            optimizer.step(closure)
            continue
        with pytest.raises(ValueError, match=rf"loss_scale={scale:g} does not fit.*Likely loss_scale=") as error:
            optimizer.step(closure)
        likely = float(str(error.value).split("Likely loss_scale=")[1].split()[0])
        assert likely == pytest.approx(truth, rel=0.02)
        torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


class Wrapped(nn.Module):
    """Logits in a tuple or behind `.logits`, as Hugging Face's models return them."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.net, self.kind = nn.Linear(6, 3), kind

    def forward(self, x: Tensor):
        z = self.net(x)
        return {"tuple": (None, z), "logits": SimpleNamespace(logits=z, other=1), "slice": (z,)}[self.kind]


@pytest.mark.parametrize("kind", ["tuple", "logits", "slice"])
def test_the_scale_is_checked_wherever_the_outputs_are(kind):
    """But for outputs that are computed from what the model returned: there is no place to shift them."""
    outputs = {"tuple": lambda r: r[1], "logits": lambda r: r.logits, "slice": lambda r: r[0][:, :2]}[kind]
    model, (x, y) = Wrapped(kind), batch(1)
    optimizer = adaptive(model, output=outputs)
    closure = closure_of(model, optimizer, lambda m: F.cross_entropy(outputs(m(x)), y % 2, reduction="sum"))
    if kind == "slice":
        optimizer.step(closure)
        return
    with pytest.raises(ValueError, match=r"Likely loss_scale=20 "):
        optimizer.step(closure)


def test_the_scale_of_accumulated_and_masked_terms():
    """Two batches of 20 terms of which every other counts: the mean over those that do has scale 1."""
    model = network(dropout=0.0)
    mask = lambda inputs, outputs: torch.arange(20) % 2 == 0  # noqa: E731
    for scale, fits in ((1.0, True), (2.0, False)):
        optimizer = adaptive(model, mask=mask, loss_scale=scale)

        def closure():
            optimizer.zero_grad()  # noqa: B023
            losses = [F.cross_entropy(model(x)[::2], y[::2]) / 2 for x, y in (batch(1), batch(2))]
            for loss in losses:
                loss.backward()
            return sum(losses).detach()

        if fits:
            optimizer.step(closure)
        else:
            with pytest.raises(ValueError, match=r"Likely loss_scale=(1|0\.99\d|1\.0\d*) "):
                optimizer.step(closure)
        optimizer.close()


def test_a_large_loss_does_not_hide_its_scale():
    """Squared errors of 1e6 in float32: the outputs are shifted further until the loss shows it."""
    model, (x, _) = nn.Linear(6, 3), batch(1)
    optimizer = adaptive(model, likelihood="gaussian")
    with pytest.raises(ValueError, match=r"Likely loss_scale=(2|1\.9\d|2\.0\d) "):
        optimizer.step(closure_of(model, optimizer, lambda m: (m(x) - 1e3).square().sum(1).mean()))


def test_diagnostics_before_the_first_step_and_of_a_fixed_run():
    model = network()
    assert adaptive(model).diagnostics() == {}
    fixed = KFAC(model, likelihood="categorical", compile=False)
    F.cross_entropy(model(batch(0)[0]), batch(0)[1]).backward()
    fixed.step()
    told = fixed.diagnostics()
    assert told["factors"]["0"]["A"]["trace"] == pytest.approx(float(fixed.factors()["0"]["A"].trace()), rel=1e-5)
    assert told["factors"]["0"]["G"]["condition"] >= 1


def test_no_step_promises_more_than_the_height_of_the_objective():
    """The part that the products see has small inputs, the rest large ones: most of the curvature is missed."""
    torch.manual_seed(0)
    model = nn.Linear(6, 3)
    x, y = dense.randn(600, 6).float(), dense.randn(600, 3, seed=2).float()
    x[:150] *= 1e-2
    optimizer = adaptive(
        model,
        likelihood="gaussian",
        quadratic_fraction=0.25,
        initial_damping=1e-6,
        factor_fraction=1.0,
        weight_decay=0.01,
    )
    closure = closure_of(model, optimizer, lambda m: 0.5 * (m(x) - y).square().sum(1).mean())
    decay = 0.005 * sum(float(p.detach().square().sum()) for p in model.parameters())
    optimizer.step(closure)
    told = optimizer.diagnostics()
    assert told["predicted_reduction"] == pytest.approx(-(told["loss"] + decay), rel=1e-4)


@pytest.mark.parametrize("factor", [1e3, 1e20, 3e38])
def test_a_sudden_loss_promises_little_more_than_steps_do(factor):
    """At most LEAP times what is usual, which at most doubles a step."""
    optimizer = adaptive(model := network(), initial_damping=1.0)
    x, y = batch(0)
    scale = 1.0
    closure = closure_of(model, optimizer, lambda m: scale * F.cross_entropy(m(x), y))
    for _ in range(10):
        optimizer.step(closure)
    usual = optimizer.param_groups[0]["promise"]
    before, scale = flat(model.parameters()), factor
    for step in range(3):
        optimizer.step(closure)
        promised = optimizer.diagnostics()["predicted_reduction"]
        assert 0 < -promised <= 1.001 * proposal.LEAP * usual * 2**step
    assert optimizer.param_groups[0]["promise"] <= 8 * usual
    assert (flat(model.parameters()) - before).norm() < 10 * before.norm()


def test_the_usual_promise():
    assert proposal.usual_promise(0.0, -3.0) == 3.0
    assert proposal.usual_promise(1.0, -1.5) == 1.5
    assert proposal.usual_promise(1.0, -1e30) == 2.0
    assert proposal.usual_promise(1.0, -1e-3) == 0.5
    assert proposal.usual_promise(1.0, -1e-9, resolution=1e-8) == 1.0
