"""approximation="eigen", EKFAC, against the dense Fisher and dense solves in float64, and in an optimizer's life."""

from __future__ import annotations

import dense
import pytest
import torch
from small import data, mlp, train_step
from stacks import F64, Bench, stack_of
from torch import Tensor, nn

from kfac_triton import KFAC


def network(dtype=F64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(16, 5, bias=False), nn.Tanh(), nn.Linear(5, 3)
    ).to(dtype)  # fmt: skip


def optimizer_of(model: nn.Module, **options) -> KFAC:
    given = {
        "likelihood": "categorical",
        "rule": "kl",
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


# ---------------------------------------------------------------------------------- the eigenvalues are corrected (E11)


def ekfac(optimizer: KFAC, weight: Tensor) -> Tensor:
    """The dense matrix that the bases and eigenvalues stand for, in the order of the layer's matrix."""
    state = optimizer.state[weight]
    Q = torch.kron(state["Q_G"], state["Q_A"])
    return Q * state["spectrum"].flatten() @ Q.T


def exact_blocks(model: nn.Module, x: Tensor, likelihood: str) -> tuple[KFAC, dict[str, tuple[Tensor, Tensor]]]:
    """An optimizer that has seen x, and of every linear layer what EKFAC and the Kronecker factors stand for."""
    optimizer = KFAC(model.train(), likelihood=likelihood, fisher="exact", approximation="eigen", lr=0.0,
                     factor_fraction=1.0, compile=False)  # fmt: skip
    model(x).sum().backward()
    optimizer.step()
    factors = optimizer.factors()
    linear = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    return optimizer, {name: (ekfac(optimizer, m.weight), dense.kron(factors[name])) for name, m in linear.items()}


@pytest.mark.parametrize("case", ["deep linear", "one example"])
def test_corrected_eigenvalues_change_nothing_where_the_factors_are_exact(case):
    if case == "deep linear":
        model, x, likelihood = dense.random_model(nn.Linear(4, 3), nn.Linear(3, 3), nn.Linear(3, 2)), 6, "gaussian"
    else:
        model, x, likelihood = dense.random_model(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)), 1, "categorical"
    x = dense.randn(x, 4)
    _, blocks = exact_blocks(model, x, likelihood)
    for name, (corrected, product) in blocks.items():
        block = dense.fisher_block(model, x, f"{name}.weight", f"{name}.bias", likelihood=likelihood)
        assert dense.relative_error(corrected, block) <= dense.EXACT
        assert dense.relative_error(product, block) <= dense.EXACT


@pytest.mark.parametrize("shape", [(9, 4), (5, 6, 4)], ids=["vectors", "sequences"])
@pytest.mark.parametrize("likelihood", ["gaussian", "categorical"])
def test_they_are_nearer_to_the_fisher_and_have_its_trace(likelihood, shape):
    """In Frobenius norm, for every layer of a nonlinear network; the trace is the Fisher's own, which kron's is not."""
    pool = nn.Identity() if len(shape) == 2 else Mean()
    model = dense.random_model(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), pool, nn.Linear(4, 3))
    x = dense.randn(*shape)
    _, blocks = exact_blocks(model, x, likelihood)
    nearer = []
    for name, (corrected, product) in blocks.items():
        block = dense.fisher_block(model, x, f"{name}.weight", f"{name}.bias", likelihood=likelihood)
        errors = [float(torch.linalg.matrix_norm(block - F)) for F in (corrected, product)]
        assert errors[0] <= errors[1] + 1e-12
        nearer.append(errors[0] < 0.99 * errors[1])
        dense.assert_exact(corrected.trace(), block.trace())
    assert any(nearer)
    first = next(iter(blocks))
    assert dense.relative_error(
        blocks[first][1], dense.fisher_block(model, x, f"{first}.weight", f"{first}.bias", likelihood=likelihood)
    ) > (dense.DIFFERENT)


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def test_new_bases_take_the_eigenvalues_along_as_the_diagonal_that_they_have_there():
    bench = Bench(stack_of("linear without bias", 1), "eigen")
    structure = bench.structure

    def refreshed(seed: int) -> None:
        for F, d in ((structure.A, 4), (structure.G, 3)):
            X = dense.randn(9, d, seed=seed + d)
            F.values[0].copy_(X.T @ X)
        assert structure.refresh_([0], [0.1]) == [True]

    refreshed(1)
    dense.assert_exact(structure.spectrum[0].sum(), structure.A.values[0].trace() * structure.G.values[0].trace())
    structure.spectrum[0], structure.spectrum_updates[0] = torch.rand(3, 4, dtype=F64), 1.0
    Q = torch.kron(structure.Q_G[0], structure.Q_A[0])
    F = Q * structure.spectrum[0].flatten() @ Q.T
    refreshed(2)
    Q = torch.kron(structure.Q_G[0], structure.Q_A[0])
    dense.assert_exact(structure.spectrum[0].flatten(), (Q.T @ F @ Q).diagonal())


def test_eigenvalues_are_refreshed_between_the_bases():
    model = network()
    optimizer = optimizer_of(model, inverse_interval=10)
    train(model, optimizer, range(3))
    state = optimizer.state[model[3].weight]
    Q, S = state["Q_A"].clone(), state["spectrum"].clone()
    train(model, optimizer, range(3, 4))
    assert torch.equal(state["Q_A"], Q) and not torch.equal(state["spectrum"], S)


def test_a_step_is_the_dense_solve():
    """Without momentum and bound W - W_before = -lr V for every block, the groups of a convolution among them."""
    model = network()
    optimizer = optimizer_of(model, momentum=0.0, kl_clip=None)
    train(model, optimizer, range(2))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, optimizer, range(2, 3))

    def solved(Q_A: Tensor, Q_G: Tensor, S: Tensor, A: Tensor, G: Tensor, grad: Tensor) -> Tensor:
        """F is damped by what factored damping adds to G (x) A: gamma / pi I (x) A + pi gamma G (x) I + gamma^2 I."""
        Q = torch.kron(Q_G, Q_A)
        gamma, pi = 0.02**0.5, (A.diagonal().mean() / G.diagonal().mean()).sqrt()
        damped = [M + d * torch.eye(len(M), dtype=F64) for M, d in ((G, gamma / pi), (A, pi * gamma))]
        F = Q * S.flatten() @ Q.T + torch.kron(*damped) - torch.kron(G, A)
        return torch.linalg.solve(F, grad.flatten()).view(grad.shape)

    names = ("Q_A", "Q_G", "spectrum")

    for layer in ("3", "5"):
        weight = model.get_parameter(f"{layer}.weight")
        grad, moved = weight.grad, before[f"{layer}.weight"] - weight.detach()
        if layer == "5":
            bias = model.get_parameter("5.bias")
            grad = torch.cat([grad, bias.grad[:, None]], 1)
            moved = torch.cat([moved, (before["5.bias"] - bias.detach())[:, None]], 1)
        state, factors = optimizer.state[weight], optimizer.factors()[layer]
        V = solved(*(state[name] for name in names), factors["A"], factors["G"], grad)
        dense.assert_exact(moved, 0.1 * V)
    conv, state = model[0], optimizer.state[model[0].weight]

    def by_tap(weight: Tensor, bias: Tensor) -> list[Tensor]:  # channels innermost, as in the state
        return torch.cat([weight.flatten(2).transpose(1, 2).flatten(1), bias[:, None]], 1).chunk(2)

    grad = by_tap(conv.weight.grad, conv.bias.grad)
    moved = by_tap(before["0.weight"] - conv.weight.detach(), before["0.bias"] - conv.bias.detach())
    for group in range(2):
        A, G = (state[name][group] for name in "AG")  # in the order of the joint matrix
        V = solved(*(state[name][group] for name in names), A, G, grad[group])
        dense.assert_exact(moved[group], 0.1 * V)


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


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
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
    names = ("Q_A", "Q_G", "spectrum", "spectrum", "damping_A", "damping_G")  # twice: the sum that is divided by too
    held = sum(optimizer.state[m.weight][name].nbytes for m in (model[0], model[3], model[5]) for name in names)
    assert estimate["inverses"] == held == optimizer.memory_usage()["inverses"]


@pytest.mark.parametrize("fisher", ["mc", "exact", "empirical"])
@pytest.mark.parametrize("size", [0.0, 1e-20, 1e-3])
def test_inputs_that_vanish_do_not_raise_the_loss(size, fisher):
    """Only the biases of the first layer matter then: most eigenvalues are zero, and the loss has a minimum near 1.085,
    which training comes to and stays at."""
    x, y = data(256)
    model = mlp()
    optimizer = KFAC(model, likelihood="categorical", fisher=fisher, approximation="eigen", lr=0.01, compile=False)
    losses = [train_step(optimizer, model, size * x, y) for _ in range(60)]
    least = float(torch.distributions.Categorical(torch.bincount(y).float()).entropy())
    assert max(losses[10:]) < losses[0]
    assert max(losses[-5:]) < 1.01 * least


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_factor_that_is_not_finite_leaves_the_last_bases(bad):
    """Of its own layer; the others of the stack get new ones."""
    structure = Bench(stack_of("linear without bias", 2), "eigen").structure
    structure.A.values.copy_(torch.eye(4))
    structure.G.values.copy_(torch.eye(3))
    assert structure.refresh_([0, 1], [0.1, 0.1]) == [True, True]
    before = [structure.spectrum[0].clone(), structure.Q_A[0].clone()]
    structure.A.values[0, 0, 0] = bad
    assert structure.refresh_([0, 1], [0.2, 0.2]) == [False, True]
    assert torch.equal(structure.spectrum[0], before[0]) and torch.equal(structure.Q_A[0], before[1])
    assert structure.eigen_damping.tolist() == pytest.approx([0.1, 0.2])


def test_rounded_products_are_refused():
    with pytest.raises(ValueError, match='precision must be "auto" or "ieee" with approximation="eigen"; got "bf16"'):
        optimizer_of(network(), precision="bf16")


@pytest.mark.parametrize(("saved", "loaded"), [("eigen", "kronecker"), ("kronecker", "eigen")])
def test_a_checkpoint_of_another_approximation_is_refused(saved, loaded):
    model, other = network(), network()
    optimizer = KFAC(model, likelihood="categorical", approximation=saved, compile=False)
    train(model, optimizer, range(3))
    twin = KFAC(other, likelihood="categorical", approximation=loaded, compile=False)
    with pytest.raises(ValueError, match=f'of approximation="{saved}", this optimizer of "{loaded}"'):
        twin.load_state_dict(optimizer.state_dict())
    assert not twin.state and twin.param_groups[0]["step"] == 0
