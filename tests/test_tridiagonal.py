"""The tridiagonal approximation in the optimizer: its moments, its step, the chains it takes or refuses."""

from __future__ import annotations

import copy
import io

import dense
import pytest
import torch
from torch import Tensor, nn

from kfac_triton import KFAC

F64 = torch.float64
TRI = {"approximation": "tridiagonal", "fisher": "exact", "factor_fraction": 1.0, "compile": False, "kl_clip": None}


def chain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 3), nn.Tanh(), nn.LayerNorm(3), nn.Linear(3, 5, bias=False), nn.Tanh(), nn.Linear(5, 2)
    ).double()  # fmt: skip


def rows_of(model: nn.Sequential, x: Tensor) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Inputs with the homogeneous coordinate, and the gradients of the summed nll for every output (gaussian)."""
    linear = [m for m in model if isinstance(m, nn.Linear)]
    inputs, outputs, h = [], [], x
    for m in model:
        if m in linear:
            inputs.append(h if m.bias is None else torch.cat([h, torch.ones(len(h), 1, dtype=F64)], 1))
        h = m(h)
        if m in linear:
            outputs.append(h)
    g = [torch.autograd.grad(h[:, c].sum(), outputs, retain_graph=True) for c in range(h.shape[1])]
    return [a.detach() for a in inputs], [[by_c[i] for by_c in g] for i in range(len(linear))]


def joint(layer: nn.Linear, attribute: str) -> Tensor:
    """Weight and bias (or their gradients) as one matrix."""
    parts = [p if attribute == "value" else p.grad for p in (layer.weight, layer.bias) if p is not None]
    return torch.cat([parts[0], *(b[:, None] for b in parts[1:])], 1).detach().clone()


def test_a_step_is_that_of_the_dense_tridiagonal_inverse():
    """From rows by hand: A_ij, G_ij, factored damping on the diagonal alone, Xi^T Lambda Xi."""
    model, x, y = chain(), dense.randn(9, 4), dense.randn(9, 2, seed=2)
    damping = 0.3
    optimizer = KFAC(model, likelihood="gaussian", lr=1.0, momentum=0.0, damping=damping, **TRI)
    a, g = rows_of(model, x)
    (0.5 * (model(x) - y).square().sum(1).mean()).backward()
    linear = [m for m in model if isinstance(m, nn.Linear)]
    before, grads = [joint(m, "value") for m in linear], [joint(m, "grad") for m in linear]
    optimizer.step()
    A = [[u.T @ v / 9 for v in a] for u in a]
    G = [[sum(u.T @ v for u, v in zip(left, right, strict=True)) / 9 for right in g] for left in g]
    for i in range(3):
        pi = ((A[i][i].trace() / len(A[i][i])) / (G[i][i].trace() / len(G[i][i]))).sqrt()
        A[i][i] = A[i][i] + pi * damping**0.5 * torch.eye(len(A[i][i]), dtype=F64)
        G[i][i] = G[i][i] + damping**0.5 / pi * torch.eye(len(G[i][i]), dtype=F64)
    sizes = [v.numel() for v in grads]
    Xi, Lambda = torch.eye(sum(sizes), dtype=F64), []
    for i in range(3):
        Sigma = torch.kron(G[i][i], A[i][i])
        if i < 2:
            after = torch.kron(G[i + 1][i + 1], A[i + 1][i + 1])
            Psi = torch.kron(G[i][i + 1], A[i][i + 1]) @ torch.linalg.inv(after)
            start = sum(sizes[: i + 1])
            Xi[start - sizes[i] : start, start : start + sizes[i + 1]] = -Psi
            Sigma = Sigma - Psi @ after @ Psi.T
        Lambda.append(torch.linalg.inv(Sigma))
    V = Xi.T @ torch.block_diag(*Lambda) @ Xi @ torch.cat([v.flatten() for v in grads])
    for m, start, v in zip(linear, before, V.split(sizes), strict=True):
        dense.assert_exact(start - joint(m, "value"), v.reshape(start.shape), 1e-8)
    plain = KFAC(twin := chain(), likelihood="gaussian", lr=1.0, momentum=0.0, damping=damping,
                 **{**TRI, "approximation": "kronecker"})  # fmt: skip
    (0.5 * (twin(x) - y).square().sum(1).mean()).backward()
    plain.step()
    assert dense.relative_error(twin[0].weight.detach(), model[0].weight.detach()) > dense.DIFFERENT


def train(model: nn.Module, optimizer: KFAC, steps: range) -> None:
    dtype = next(model.parameters()).dtype
    for step in steps:
        x, y = dense.randn(12, 4, seed=step).to(dtype), dense.randn(12, 2, seed=step + 50).to(dtype)

        def closure():
            optimizer.zero_grad()
            loss = 0.5 * (model(x) - y).square().sum(1).mean()  # noqa: B023
            loss.backward()
            return loss

        optimizer.step(closure)


@pytest.mark.parametrize("options", [{"inverse_interval": 3}, {"lr": "adaptive", "damping": "adaptive"}], ids=str)
def test_moments_average_and_a_checkpoint_resumes_bit_equal(options):
    def made() -> tuple[nn.Module, KFAC]:
        model = chain().float()
        return model, KFAC(model, likelihood="gaussian", **{**TRI, "fisher": "mc", **options})

    model, optimizer = made()
    train(model, optimizer, range(8))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    stored = torch.load(file, weights_only=True)
    train(model, optimizer, range(8, 23))
    again, resumed = made()
    again.load_state_dict(stored["model"])
    resumed.load_state_dict(stored["optimizer"])
    train(again, resumed, range(8, 23))
    torch.testing.assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert all(p.isfinite().all() for p in model.parameters())


def test_cross_moments_follow_the_rule_of_the_factors():
    """A flat mean over the first updates: of the products of neighbouring rows in every batch."""
    model = chain()
    optimizer = KFAC(model, likelihood="gaussian", lr=0.0, fallback_lr=None, **TRI)
    xs = [dense.randn(6, 4, seed=seed) for seed in range(3)]
    expected_A, expected_G = [], []
    for x in xs:
        a, g = rows_of(model, x)
        expected_A.append(a[0].T @ a[1] / 6)
        expected_G.append(sum(u.T @ v for u, v in zip(g[0], g[1], strict=True)) / 6)
        optimizer.zero_grad()
        (0.5 * model(x).square().sum(1).mean()).backward()
        optimizer.step()
    state = optimizer.state[model[0].weight]
    dense.assert_exact(state["A_next"], torch.stack(expected_A).mean(0))
    dense.assert_exact(state["G_next"], torch.stack(expected_G).mean(0))


def test_memory_is_what_the_state_holds():
    model = chain().float()
    optimizer = KFAC(model, likelihood="gaussian", **TRI)
    estimate = optimizer.memory_usage()
    train(model, optimizer, range(1))
    held = {"factors": 0, "inverses": 0}
    for state in optimizer.state.values():
        for name, t in state.items():
            kind = "factors" if name in ("A", "G", "A_next", "G_next") else "inverses"
            if name in ("A", "G", "A_next", "G_next", "A_inv", "G_inv") or name.startswith("link_"):
                held[kind] += t.nbytes
    for usage in (estimate, optimizer.memory_usage()):
        assert {kind: usage[kind] for kind in held} == held


def test_asking_for_graphs_changes_no_step():
    models = [chain(), chain()]
    for model, compiled in zip(models, (False, True), strict=True):
        optimizer = KFAC(model, likelihood="gaussian", lr=0.1, **{**TRI, "compile": compiled})
        train(model, optimizer, range(4))
    torch.testing.assert_close(models[0].state_dict(), models[1].state_dict())


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 3), nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        return self.last(h + torch.tanh(self.second(h)))


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) + self.right(x)


class Repeated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.last = nn.Linear(4, 3), nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.again(torch.tanh(self.again(self.first(x))))))


NO_CHAINS = {
    "a residual": (Residual, {}, "first.weight feeds more than the layer behind it.*around second.weight"),
    "branches": (Branches, {}, "left.weight feeds more than the layer behind it.*around right.weight"),
    "a layer twice": (Repeated, {}, "again.weight is used more than once"),
    "a convolution": (
        lambda: nn.Sequential(nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 2, 3), nn.Flatten(), nn.Linear(4, 2)), {},
        "1.weight belongs to a convolution",
    ),
    "a wide side": (chain, {"max_factor_dim": 4}, "0.weight has a side wider than max_factor_dim"),
    "positions": (
        lambda: nn.Sequential(nn.Unflatten(1, (2, 2)), nn.Linear(2, 3), nn.Flatten(), nn.Linear(6, 2)), {},
        "3.weight has 5 rows where the first layer has 10",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NO_CHAINS)
def test_a_network_that_is_no_chain_is_refused_with_the_reason(name):
    build, options, said = NO_CHAINS[name]
    torch.manual_seed(0)
    model = build().double()
    before = copy.deepcopy(model.state_dict())
    optimizer = KFAC(model, likelihood="gaussian", **{**TRI, **options})
    model(dense.randn(5, 4)).sum().backward()
    with pytest.raises(ValueError, match=f'approximation="tridiagonal" needs a chain.*{said}.*"kronecker" takes any'):
        optimizer.step()
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_a_layer_without_a_gradient_is_named_as_the_reason():
    model = chain()
    optimizer = KFAC(model, likelihood="gaussian", **TRI)
    train(model, optimizer, range(2))
    model(dense.randn(5, 4)).sum().backward()
    model[3].weight.grad = None
    with pytest.raises(RuntimeError, match=r"needs a gradient for every layer of its chain.*3.weight has none"):
        optimizer.step()


@pytest.mark.parametrize("options", [{"fisher": "empirical"}, {"weight_sharing": "reduce"}], ids=str)
def test_what_it_does_not_go_with(options):
    with pytest.raises(ValueError, match=r'approximation must be "kronecker" with .*; got "tridiagonal"'):
        KFAC(chain(), likelihood="gaussian", **{**TRI, **options})
