"""The bounds of a step and the numbers they are made of: dense quadratic forms, and NumPy as torch."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kfac_triton import numbers
from kfac_triton.steps.bounds import LEAST_LR, LONGEST, MOST, Shares, bounds, size_of
from kfac_triton.steps.hyper import Hyper

F64 = torch.float64
CPU = torch.device("cpu")
ONE = torch.ones((), dtype=F64)
REGION = [0, 0, 1, 0]


class Quadratic:
    """Four blocks with dense Fishers that stay, and the momentum of steps on random gradients."""

    def __init__(self, d: int = 5) -> None:
        generator = torch.Generator().manual_seed(0)
        X = torch.randn(4, 3 * d, d, generator=generator, dtype=F64)
        self.F = X.mT @ X / d
        self.buffer = torch.zeros(4, d, dtype=F64)
        self.generator, self.q = generator, torch.zeros(4, dtype=F64)

    def gradient(self) -> tuple[Tensor, Tensor]:
        grad = torch.randn(self.buffer.shape, generator=self.generator, dtype=F64)
        return grad, torch.linalg.solve(self.F, grad)

    def form(self, v: Tensor) -> Tensor:
        """v^T F v by block."""
        return torch.einsum("ki,kij,kj->k", v, self.F, v)


def as_arrays(*values: Any) -> tuple[Any, ...]:
    return tuple(np.array(value, dtype=np.float64) for value in values)


def test_the_recursion_is_the_quadratic_form_of_the_momentum():
    """While F stays: q and tau against v^T F v of the momentum, with two groups that differ in everything."""
    problem = Quadratic()
    lr, mu = torch.tensor([0.3, 0.3, 0.05, 0.3], dtype=F64), torch.tensor([0.9, 0.9, 0.5, 0.9], dtype=F64)
    clip = torch.tensor([1e-3, 1e-2], dtype=F64)
    for _ in range(6):
        grad, V = problem.gradient()
        dots, overlaps = (V * grad).sum(1), (problem.buffer * grad).sum(1)
        nu, tau = bounds(torch, Shares(lr, mu, REGION, dots, overlaps, problem.q), clip, ONE)
        wanted = torch.sqrt(2 * clip / (lr**2 * problem.form(V)).sum()).clamp(max=1.0)
        torch.testing.assert_close(nu, wanted)
        problem.buffer = mu[:, None] * problem.buffer + nu[REGION][:, None] * V
        torch.testing.assert_close(problem.q, problem.form(problem.buffer))
        length = (lr**2 * problem.form(problem.buffer)).sum()
        torch.testing.assert_close(tau, torch.sqrt(2 * clip / length).clamp(max=1.0))
    assert (nu < 1).all() and tau.min() < 1


def test_where_the_fisher_has_grown_the_form_is_raised_to_what_it_is_at_least():
    """By Cauchy-Schwarz: the bound on the step still holds, and q in all is never negative."""
    problem = Quadratic()
    lr, mu, clip = torch.ones(4, dtype=F64), torch.full((4,), 0.9, dtype=F64), torch.full((2,), math.inf, dtype=F64)
    for step in range(8):
        if step == 4:
            problem.F = problem.F * 100
        grad, V = problem.gradient()
        grad, V = (grad, V) if step < 4 else (problem.F @ problem.buffer[..., None], problem.buffer[..., None])
        grad, V = grad.view(4, -1), V.view(4, -1)
        shares = Shares(lr, mu, REGION, (V * grad).sum(1), (problem.buffer * grad).sum(1), problem.q)
        nu, _ = bounds(torch, shares, clip, ONE)
        problem.buffer = mu[:, None] * problem.buffer + nu[REGION][:, None] * V
        assert problem.q.sum() >= 0
        if step >= 4:
            torch.testing.assert_close(problem.q.sum(), problem.form(problem.buffer).sum())


def inputs(seed: int, extreme: bool) -> dict[str, np.ndarray]:
    """Shares of four parameters; `extreme`: zeros, huge numbers and tiny ones among them."""
    rng = np.random.default_rng(seed)
    found = {
        "lr": rng.uniform(0, 1, 4), "momentum": rng.uniform(0, 1, 4), "dots": rng.exponential(size=4),
        "overlaps": rng.normal(size=4), "quadratics": rng.exponential(size=4), "kl_clip": rng.exponential(size=2) / 100,
    }  # fmt: skip
    if extreme:
        for name, values in found.items():
            size = 10.0 ** rng.uniform(-30, 30, values.shape) * (rng.uniform(size=values.shape) < 0.7)
            found[name] = values if name in ("momentum", "kl_clip") else values * size
        found["kl_clip"][0] = math.inf
    return found


@pytest.mark.parametrize("size", [1.0, 2.0**10, 2.0**60])
@pytest.mark.parametrize("moving", [False, True])
@pytest.mark.parametrize("extreme", [False, True])
def test_numpy_and_torch_give_the_same_numbers(extreme, moving, size):
    for seed in range(20):
        given = inputs(seed, extreme)
        results = []
        for xp, made in ((np, np.array), (torch, torch.tensor)):
            own = {name: made(value) for name, value in given.items()}
            clip = own.pop("kl_clip")
            if not moving:
                own |= {"overlaps": None, "quadratics": None}
            with np.errstate(all="raise", under="ignore"):
                nu, tau = bounds(xp, Shares(region=REGION, **own), clip, size if xp is np else torch.tensor(size))
            results.append([np.asarray(t) for t in (nu, tau, *((own["quadratics"],) if moving else ()))])
        for one, other in zip(*results, strict=True):
            assert one.dtype == other.dtype == np.float64 and np.isfinite(one).all()
            np.testing.assert_allclose(one, other, rtol=1e-12, atol=0)
        nu, tau = results[0][:2]
        assert (nu >= 0).all() and (nu <= min(size, MOST)).all() and (tau > 0).all() and (tau <= 1).all()
        if moving:
            q, lr = results[0][2], given["lr"].clip(LEAST_LR, None)
            assert (q <= LONGEST).all() and (extreme or (lr**2 * q).sum() >= 0)


def test_a_step_without_a_bound_is_as_long_as_its_gradient_says():
    one = as_arrays([0.1] * 2, [0.0] * 2, [1e6, 1e6])
    nu, tau = bounds(np, Shares(*one[:2], [0, 0], one[2]), np.array([math.inf]), 2.0**20)
    assert nu.tolist() == [2.0**20] and tau.tolist() == [1.0]
    nu, _ = bounds(np, Shares(*one[:2], [0, 0], one[2]), np.array([math.inf]), 2.0**90)
    assert nu.tolist() == [MOST]


def test_an_lr_of_zero_counts_as_the_least():
    lr, mu, dots = as_arrays([0.0], [0.0], [3.0])
    nu, _ = bounds(np, Shares(lr, mu, [0], dots), np.array([1e-24]), 1.0)
    assert nu[0] == pytest.approx(math.sqrt(2e-24 / 3) / LEAST_LR)


@pytest.mark.parametrize("largest", [0.0, 1e-30, 65535.0, 65536.0, 65537.0, 1e10, 3e38])
def test_size_is_the_same_on_the_host_and_on_a_device(largest):
    size = size_of(largest)
    assert size == float(size_of(torch.tensor(largest, dtype=torch.float32))) >= 1.0
    assert math.log2(size).is_integer() and largest / size <= 65536.0


# ------------------------------------------------------------------------------------------------------ the numbers


@pytest.fixture(params=["numpy", "torch"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What serves a CPU, or made to serve it as another device is served."""
    if request.param == "torch":
        monkeypatch.setattr(numbers, "on_host", lambda device: False)
    return np if request.param == "numpy" else torch


def test_numbers_are_float64_and_take_tensors(library):
    assert numbers.library(CPU) is library
    for values in ([0.1, 2], [0.1, torch.tensor(2)], [torch.tensor(0.1, dtype=F64), torch.tensor(2.0)]):
        found = numbers.numbers(values, CPU)
        assert isinstance(found, np.ndarray if library is np else Tensor)
        assert str(found.dtype).endswith("float64") and [float(n) for n in found] == [0.1, 2.0]


def test_shared_numbers_are_the_tensors_memory(library):
    t = torch.zeros(3)
    held = numbers.shared(t)
    held[1] = 5
    assert t.tolist() == [0, 5, 0]
    back = numbers.as_tensor(held, torch.float32, CPU)
    assert back.dtype == torch.float32 and back.tolist() == [0, 5, 0]
    flags = numbers.as_tensor(held > 0, torch.bool, CPU)
    assert flags.dtype == torch.bool and flags.tolist() == [False, True, False]


GROUP = {"lr": 0.1, "peak_lr": 0.3, "kl_annealing": False, "momentum": 0.9, "weight_decay": 0.0, "kl_clip": 1e-3,
         "fallback_ratio": 0.5}  # fmt: skip


def test_hyper_parameters_are_renewed_only_where_they_changed():
    hyper, groups = Hyper(CPU), [dict(GROUP), {**GROUP, "kl_annealing": True, "weight_decay": 0.1, "momentum": 0.0}]
    assert hyper.fill_(groups) and not hyper.fill_(groups) and hyper.changes == 1
    assert hyper.bounded_lr.tolist() == [0.1, 0.3] and hyper.fallback_lr.tolist() == [0.05, 0.05]
    assert (hyper.alike, hyper.moving, hyper.bounded, hyper.decaying) == (False, True, True, True)
    groups[1] |= {"kl_annealing": False, "weight_decay": 0.0, "momentum": 0.9}
    assert hyper.fill_(groups) and (hyper.alike, hyper.decaying) == (True, False)
    groups[0]["kl_clip"] = groups[1]["kl_clip"] = math.inf
    assert hyper.fill_(groups) and not hyper.bounded and hyper.changes == 3


def test_an_lr_in_a_tensor_is_read_in_every_step():
    """It may be changed in place."""
    lr = torch.tensor(0.1)
    hyper, groups = Hyper(CPU), [{**GROUP, "lr": lr, "peak_lr": lr}]
    hyper.fill_(groups)
    lr.fill_(0.2)
    assert hyper.fill_(groups) and hyper.lr.tolist() == pytest.approx([0.2]) and hyper.alike
