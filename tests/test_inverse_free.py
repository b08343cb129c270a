"""approximation="inverse_free": roots against exact inverses in float64, in bfloat16, and in an optimizer's life."""

from __future__ import annotations

import dense
import pytest
import torch
import torch.nn.functional as F
from stacks import F64, Bench, held_bytes, stack_of
from torch import Tensor, nn

from kfac_triton import KFAC
from kfac_triton.sample import Sample
from kfac_triton.structures.base import Moves


def spd(d: int, seed: int) -> Tensor:
    X = dense.randn(3 * d, d, seed=seed)
    return X.T @ X / (3 * d)


def root_of_inverse(F: Tensor, d: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(F)
    return vectors * (values + d).rsqrt() @ vectors.T


def moved(b: float, damping: float = 0.1) -> tuple[dict, dict[str, tuple[Tensor, Tensor, Tensor]]]:
    """A state after one update from the roots of exact inverses, and by side (old factor, new one, damping)."""
    bench = Bench(stack_of("linear without bias", 1), "inverse_free")
    structure, stack = bench.structure, bench.stack
    old, new = {"A": spd(4, 1), "G": spd(3, 2)}, {"A": spd(4, 3), "G": spd(3, 4)}
    means = {name: (1 - b) * old[name].diagonal().mean() + b * new[name].diagonal().mean() for name in "AG"}
    pi = (means["A"] / means["G"]).sqrt()
    strengths = {"A": pi * damping**0.5, "G": damping**0.5 / pi}
    for i, name in enumerate("AG"):
        structure.means[i, 0] = old[name].diagonal().mean()
        structure.roots[i][0].copy_(root_of_inverse(old[name], strengths[name]))
    structure.ready[0] = True
    rows = [torch.linalg.cholesky(new[name]).T for name in "AG"]
    own = Sample(stack.layers[0], [rows[0]], [rows[1]], 1.0, 1.0, ones=False)
    numbers = [torch.tensor([value], dtype=F64) for value in (1 - b, b, b, b)]
    structure.update_([own], None, Moves(numbers, torch.tensor([True]), [1 - b], None, stack), [damping])
    return structure.tensors(0), {name: (old[name], new[name], strengths[name]) for name in "AG"}


def test_one_update_is_the_inverse_of_the_running_average_to_second_order():
    """K K^T against (beta A + (1 - beta) A_new + d I)^-1: halving b quarters the error."""
    errors = {}
    for b in (0.04, 0.02, 0.01):
        state, sides = moved(b)
        for name, (old, new, d) in sides.items():
            wanted = torch.linalg.inv((1 - b) * old + b * new + d * torch.eye(len(old), dtype=F64))
            errors[name, b] = float((state[f"{name}_inv"] - wanted).abs().max())
    for name in "AG":
        for b in (0.04, 0.02):
            assert 3.4 < errors[name, b] / errors[name, b / 2] < 4.6
        assert errors[name, 0.01] < 5e-3


def test_the_roots_come_to_rest_at_the_damped_inverse():
    """Other statistics first, and then the same again and again."""
    model, x = dense.random_model(nn.Linear(5, 4)), dense.randn(30, 5)
    options = {"likelihood": "gaussian", "fisher": "exact", "factor_fraction": 1.0, "compile": False, "lr": 0.0}
    free = KFAC(model, approximation="inverse_free", factor_decay=0.7, damping=0.05, **options)
    factors = dense.kfac_factors(model, x)["0"]
    wanted = dense.damped_inverses(factors["A"], factors["G"], 0.05)
    errors = {}
    for step in range(80):
        free.zero_grad()
        model(x if step else 3 * x).sum().backward()
        free.step()
        state = free.state[model[0].weight]
        errors[step] = max(dense.relative_error(state[f"{n}_inv"], w) for n, w in zip("AG", wanted, strict=True))
    assert errors[0] > errors[10] > errors[40] > errors[79] and errors[79] < 1e-6
    for side in "AG":
        dense.assert_exact(free.factors()["0"][side], factors[side], 1e-5)


def test_the_first_data_put_the_roots_in_their_place_at_once():
    """From the root of a scaled identity to the damped inverse within the first update, to the last digits."""
    model = dense.random_model(nn.Linear(5, 4))
    x = dense.randn(30, 5) * torch.tensor([3.0, 1.0, 1.0, 0.5, 0.3], dtype=F64)
    options = {"likelihood": "gaussian", "fisher": "exact", "factor_fraction": 1.0, "compile": False, "lr": 0.0}
    optimizer = KFAC(model, approximation="inverse_free", damping=0.05, **options)
    model(x).sum().backward()
    optimizer.step()
    factors = dense.kfac_factors(model, x)["0"]
    state = optimizer.state[model[0].weight]
    for side, wanted in zip("AG", dense.damped_inverses(factors["A"], factors["G"], 0.05), strict=True):
        dense.assert_exact(state[f"{side}_inv"], wanted)


def classifier(dtype=torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, groups=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 20), nn.LayerNorm(20), nn.Tanh(),
        nn.Linear(20, 3)
    ).to(dtype)  # fmt: skip


def train(model: nn.Module, optimizer: KFAC, steps: range) -> list[float]:
    losses = []
    for step in steps:
        dtype = next(model.parameters()).dtype
        x = dense.randn(32, 1, 6, 6, seed=step % 4).to(dtype)
        y = (x.float().mean((1, 2, 3)) > 0).long() + (x.float()[:, 0, 0, 0] > 0).long()
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x).float(), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_trains_without_an_inverse(dtype, monkeypatch):
    """Nothing is decomposed, inverted or solved; under bfloat16 parameters the roots are bfloat16 too."""
    for name in ("cholesky_ex", "eigh", "inv", "solve", "svd", "cholesky"):
        monkeypatch.setattr(torch.linalg, name, lambda *a, **k: pytest.fail("an inverse"))
    model = classifier(dtype)
    optimizer = KFAC(
        model, likelihood="categorical", approximation="inverse_free", lr=0.05, damping=0.01, compile=False
    )
    losses = train(model, optimizer, range(40))
    assert losses[-1] < 0.6 * losses[0]
    blocks = [s for s in optimizer.state.values() if "A_root" in s]
    assert len(blocks) == 4 and all(s["A_root"].dtype == dtype and "A" not in s for s in blocks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_and_resuming(dtype):
    model = classifier(dtype)
    optimizer = KFAC(model, likelihood="categorical", approximation="inverse_free", lr=0.05, compile=False)
    estimate = optimizer.memory_usage()
    train(model, optimizer, range(3))
    held = {"factors": ("A_root", "G_root"), "inverses": ("A_inv", "G_inv")}
    for kind, names in held.items():
        found = held_bytes(s[name] for s in optimizer.state.values() for name in names if name in s)
        assert estimate[kind] == optimizer.memory_usage()[kind] == found
    twin = classifier(dtype)
    twin.load_state_dict(model.state_dict())
    again = KFAC(twin, likelihood="categorical", approximation="inverse_free", lr=0.05, compile=False)
    again.load_state_dict(optimizer.state_dict())
    assert train(twin, again, range(3, 6)) == train(model, optimizer, range(3, 6))


@pytest.mark.parametrize(("saved", "loaded"), [("inverse_free", "kronecker"), ("eigen", "inverse_free")])
def test_a_checkpoint_of_another_approximation_is_refused(saved, loaded):
    """Neither can go on from what the other holds; training goes on as if nothing had been loaded."""
    model, twin = classifier(), classifier()
    optimizer = KFAC(model, likelihood="categorical", approximation=saved, lr=0.05, compile=False)
    train(model, optimizer, range(3))
    other = KFAC(twin, likelihood="categorical", approximation=loaded, lr=0.05, compile=False)
    with pytest.raises(ValueError, match=f'of approximation="{saved}", this optimizer of "{loaded}"'):
        other.load_state_dict(optimizer.state_dict())
    losses = train(twin, other, range(6))
    assert all(torch.isfinite(p).all() for p in twin.parameters()) and losses[-1] < losses[0]
    state = other.state[twin[0].weight]
    assert ("A" in state) == (loaded == "kronecker") and ("A_root" in state) == (loaded == "inverse_free")


def test_what_it_does_not_take():
    with pytest.raises(ValueError, match=r'damping must be a number or a Schedule with approximation="inverse_free"'):
        KFAC(classifier(), likelihood="categorical", approximation="inverse_free", damping="adaptive")
    with pytest.raises(ValueError, match='spatial must be "correlated" with approximation="inverse_free"'):
        KFAC(classifier(), likelihood="categorical", approximation="inverse_free", spatial="uncorrelated")
