"""approximation="eigen" against dense solves with G (x) A + damping I in float64, and in an optimizer's life."""

from __future__ import annotations

import dense
import pytest
import torch
from torch import Tensor, nn

from kfac_triton import KFAC
from kfac_triton.approximations import eigen, kronecker
from kfac_triton.blocks.layout import Layout

F64 = torch.float64


def network(dtype=F64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(16, 5, bias=False), nn.Tanh(), nn.Linear(5, 3)
    ).to(dtype)  # fmt: skip


def optimizer_of(model: nn.Module, **options) -> KFAC:
    given = {
        "likelihood": "categorical",
        "lr": 0.1,
        "damping": 0.02,
        "compile": False,
        "inverse_interval": 1,
        **options,
    }
    return KFAC(model, approximation="eigen", **given)


def train(model: nn.Module, optimizer: KFAC, steps: range) -> None:
    for step in steps:
        x, y = dense.randn(12, 2, 4, 4, seed=step).to(next(model.parameters()).dtype), torch.arange(12) % 3
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def solved(A: Tensor, G: Tensor, grad: Tensor, damping: float) -> Tensor:
    fisher = torch.kron(G, A) + damping * torch.eye(len(A) * len(G), dtype=F64)
    return torch.linalg.solve(fisher, grad.flatten()).view(grad.shape)


def test_a_step_is_the_dense_solve():
    """Without momentum and bound W - W_before = -lr V for every block, the groups of a convolution among them."""
    model = network()
    optimizer = optimizer_of(model, momentum=0.0, kl_clip=None)
    train(model, optimizer, range(2))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, optimizer, range(2, 3))
    factors = optimizer.factors()
    for layer in ("3", "5"):
        weight = model.get_parameter(f"{layer}.weight")
        grad, moved = weight.grad, before[f"{layer}.weight"] - weight.detach()
        if layer == "5":
            bias = model.get_parameter("5.bias")
            grad = torch.cat([grad, bias.grad[:, None]], 1)
            moved = torch.cat([moved, (before["5.bias"] - bias.detach())[:, None]], 1)
        dense.assert_exact(moved, 0.1 * solved(factors[layer]["A"], factors[layer]["G"], grad, 0.02))
    conv = model[0]
    grad = torch.cat([conv.weight.grad.flatten(1), conv.bias.grad[:, None]], 1).chunk(2)
    moved = torch.cat(
        [(before["0.weight"] - conv.weight).flatten(1), (before["0.bias"] - conv.bias)[:, None]], 1
    ).chunk(2)
    for group in range(2):
        V = solved(factors["0"]["A"][group], factors["0"]["G"][group], grad[group], 0.02)
        dense.assert_exact(moved[group].detach(), 0.1 * V)


def test_a_diagonal_side_keeps_the_kronecker_form():
    model = network()
    optimizer = optimizer_of(model, max_factor_dim=10)
    train(model, optimizer, range(2))
    state = optimizer.state[model[3].weight]
    assert "A_inv" in state and "Q_A" not in state
    assert "Q_A" in optimizer.state[model[5].weight]
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_the_trust_region_bounds_the_step():
    """lr^2 <V, grad> / 2 is the bound, where it is less than without."""
    model, free = network(), network()
    train(model, optimizer_of(model, momentum=0.0, kl_clip=1e-5), range(1))
    train(free, optimizer_of(free, momentum=0.0, kl_clip=None), range(1))
    start = network()
    moved, wanted = ([q - p for p, q in zip(start.parameters(), m.parameters(), strict=True)] for m in (model, free))
    total = -0.1 * sum((d * p.grad).sum().item() for d, p in zip(wanted, free.parameters(), strict=True))
    nu = min(1.0, (2e-5 / total) ** 0.5)
    assert nu < 0.9
    for d, w in zip(moved, wanted, strict=True):
        torch.testing.assert_close(d, nu * w)


@pytest.mark.parametrize("compile", [False, True])
def test_training_goes_down_and_resumes_to_the_bit(compile):
    model = network(torch.float32)
    optimizer = optimizer_of(model, compile=compile, inverse_interval=2)
    train(model, optimizer, range(5))
    other = network(torch.float32)
    other.load_state_dict(model.state_dict())
    twin = optimizer_of(other, compile=compile, inverse_interval=2)
    twin.load_state_dict(optimizer.state_dict())
    for m, o in ((model, optimizer), (other, twin)):
        train(m, o, range(5, 9))
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def test_the_paper_takes_it_too():
    """The search for gamma tries bases with three dampings and keeps those of the best."""
    model = network(torch.float32)
    optimizer = KFAC.paper(model, likelihood="categorical", approximation="eigen")
    x, y = dense.randn(24, 2, 4, 4, seed=1).float(), torch.arange(24) % 3

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(8)]
    assert losses[-1] < 0.5 * losses[0]


def test_the_estimate_of_memory_is_what_is_held():
    model = network(torch.float32)
    optimizer = optimizer_of(model)
    estimate = optimizer.memory_usage()
    train(model, optimizer, range(1))
    held = sum(
        optimizer.state[m.weight][name].nbytes for m in (model[0], model[3], model[5]) for name in eigen.NAMES[:4]
    )
    assert estimate["inverses"] == held == optimizer.memory_usage()["inverses"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_factor_that_is_not_finite_leaves_the_last_bases(bad):
    state: dict = {}
    layout, weight = Layout("linear"), torch.zeros(3, 2)
    kronecker.initialise(state, weight, layout, -1)
    state["A"].copy_(torch.eye(2))
    state["G"].copy_(torch.eye(3))
    state["factor_updates"] += 1
    assert eigen.update_bases([kronecker.Refresh(state, layout, 0.1)]) == [True]
    before = state["lambda_A"].clone()
    state["A"][0, 0] = bad
    assert eigen.update_bases([kronecker.Refresh(state, layout, 0.2)]) == [False]
    assert torch.equal(state["lambda_A"], before) and float(state["eigen_damping"]) == pytest.approx(0.1)


def test_rounded_products_are_refused():
    with pytest.raises(ValueError, match='precision must be "auto" or "ieee" with approximation="eigen"; got "bf16"'):
        optimizer_of(network(), precision="bf16")


@pytest.mark.parametrize(("saved", "loaded"), [("eigen", "kronecker"), ("kronecker", "eigen")])
def test_a_checkpoint_of_another_approximation(saved, loaded):
    """The factors are the same; what was made of them for the other form is dropped and made anew in the next step."""
    model, other = network(), network()
    optimizer = KFAC(model, likelihood="categorical", approximation=saved, compile=False)
    train(model, optimizer, range(3))
    other.load_state_dict(model.state_dict())
    twin = KFAC(other, likelihood="categorical", approximation=loaded, compile=False)
    twin.load_state_dict(optimizer.state_dict())
    train(other, twin, range(3, 4))
    for layer in (other[0], other[3], other[5]):
        state = twin.state[layer.weight]
        assert eigen.stored(state) == (loaded == "eigen")
        assert ("A_inv" in state) == (loaded == "kronecker")
