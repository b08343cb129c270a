"""Training with every kernel, interpreted, against training with none: on a GPU the optimizer really calls them."""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn

from kfac_triton import KFAC
from kfac_triton.kernels import conv_syrk, eigen_scale, fused_update, kron_matmul, newton_schulz, syrk


def convolutional() -> nn.Module:
    """Patches left unwritten (16 channels), written ones (2 groups of 4), and a width that is no multiple of 16."""
    return nn.Sequential(
        nn.Conv2d(16, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 6, 3, stride=2, groups=2), nn.Tanh(),
        nn.Flatten(), nn.Linear(24, 7), nn.LayerNorm(7), nn.Linear(7, 5, bias=False),
    )  # fmt: skip


def linear() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.AvgPool1d(8), nn.Linear(50, 9), nn.Tanh(), nn.Linear(9, 5))


class Run:
    """Some steps of K-FAC on random images, kernels or torch."""

    def __init__(self, network, backend: str, monkeypatch, batch: int = 6, **options) -> None:
        self.batch = batch
        monkeypatch.setenv("KFAC_TRITON_BACKEND", backend)
        torch.manual_seed(0)
        self.model = network()
        options = {"likelihood": "categorical", "lr": 0.1, "inverse_interval": 2, "compile": False, **options}
        self.options = options
        self.optimizer = KFAC(self.model, **options)
        self.generator = torch.Generator().manual_seed(1)

    def steps(self, count: int, spoil: int = -1, huge: int = -1) -> None:
        for step in range(count):
            x = torch.randn(self.batch, 16, 5, 5, generator=self.generator)
            y = torch.randint(0, 5, (self.batch,), generator=self.generator)
            self.optimizer.zero_grad()
            nn.functional.cross_entropy(self.model(x), y).backward()
            if step == spoil:
                next(self.model.parameters()).grad[0] = torch.nan
            if step == huge:
                torch._foreach_mul_([p.grad for p in self.model.parameters()], 1e36)
            self.optimizer.step()


def check(run: Run, other: Run, tolerance: float = 1e-4) -> None:
    for p, q in zip(run.model.parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance / 5)
    for name, pair in run.optimizer.factors().items():
        for side, F in pair.items():
            E = other.optimizer.factors()[name][side]
            torch.testing.assert_close(F, E, rtol=tolerance, atol=tolerance * F.abs().max())


@pytest.fixture
def launches(interpreter, monkeypatch) -> set[str]:
    """Names of the kernels' families that were launched."""
    seen: set[str] = set()
    for module in (syrk, conv_syrk, kron_matmul, eigen_scale, fused_update, newton_schulz):

        def counted(*args, module=module, launch=module.launch, **options):
            seen.add(module.__name__.rpartition(".")[2])
            launch(*args, **options)

        monkeypatch.setattr(module, "launch", counted)
    return seen


def test_a_network_of_convolutions(launches, monkeypatch):
    options = {"weight_decay": 0.01, "momentum": 0.9, "inverse_interval": 1}
    runs = [Run(convolutional, backend, monkeypatch, **options) for backend in ("torch", "triton")]
    for run, backend in zip(runs, ("torch", "triton"), strict=True):
        monkeypatch.setenv("KFAC_TRITON_BACKEND", backend)
        assert not launches
        run.steps(2)
    check(*runs)
    assert launches == {"syrk", "conv_syrk", "kron_matmul", "fused_update", "newton_schulz"}


@pytest.mark.parametrize(
    "options",
    [
        {"momentum": 0.0, "kl_clip": None},
        {"fisher": "empirical"},
        {"weight_sharing": "reduce"},
        {"precision": "bf16", "rule": "kl"},
        {"max_factor_dim": 20},
        {"approximation": "tridiagonal"},
        {"approximation": "eigen", "batch": 96},
        {"compile": True},
    ],
    ids=lambda options: " ".join(map(str, options.items())),
)
def test_the_optimizers_options(launches, monkeypatch, options):
    """EKFAC takes a batch of full rank: what lies outside has eigenvectors by rounding alone. bfloat16 may round a
    number the other way, by 2^-7 of it at most.
    """
    runs = []
    for backend in ("torch", "triton"):
        runs.append(Run(linear, backend, monkeypatch, **options))
        runs[-1].steps(3)
    check(*runs, 2**-7 if options.get("precision") == "bf16" else 1e-4)
    assert {"syrk", "fused_update"} <= launches
    assert ("eigen_scale" in launches) == (options.get("approximation") == "eigen")


def test_groups_with_rates_of_their_own(launches, monkeypatch):
    """The bias's part of the trust region's sum is weighted with its own rate."""

    def grouped(run: Run) -> None:
        weights = [p for p in run.model.parameters() if p.dim() > 1]
        biases = [p for p in run.model.parameters() if p.dim() == 1]
        run.optimizer.close()
        groups = [{"params": weights}, {"params": biases, "lr": 3.0, "momentum": 0.5}]
        run.optimizer = KFAC(run.model, groups, **run.options)

    runs = []
    for backend in ("torch", "triton"):
        runs.append(Run(linear, backend, monkeypatch))
        grouped(runs[-1])
        runs[-1].steps(3)
    check(*runs)


def test_a_spoiled_gradient_skips_the_step(launches, monkeypatch):
    runs = []
    for backend in ("torch", "triton"):
        runs.append(Run(linear, backend, monkeypatch))
        runs[-1].steps(4, spoil=2)
    check(*runs)


def test_a_huge_gradient_takes_a_bounded_step(launches, monkeypatch):
    runs = []
    for backend in ("torch", "triton"):
        runs.append(Run(linear, backend, monkeypatch))
        runs[-1].steps(4, huge=2)
        assert all(p.abs().max() < 10 for p in runs[-1].model.parameters())
    check(*runs)


def test_resuming_is_equal_to_the_bit(launches, monkeypatch):
    """A loaded state has none of the zeros around its matrices; they come back."""
    run = Run(linear, "triton", monkeypatch)
    run.steps(3)
    file = io.BytesIO()
    torch.save({"model": run.model.state_dict(), "optimizer": run.optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = Run(linear, "triton", monkeypatch)
    other.model.load_state_dict(saved["model"])
    other.optimizer.load_state_dict(saved["optimizer"])
    other.generator.set_state(run.generator.get_state())
    for either in (run, other):
        either.steps(3)
    for p, q in zip(run.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_the_estimate_of_memory_counts_the_zeros(launches, monkeypatch):
    run = Run(linear, "triton", monkeypatch)
    estimate = run.optimizer.memory_usage()
    run.steps(1)
    state = run.optimizer.state
    held = sum(state[p][name].untyped_storage().nbytes() for p in state for name in "AG" if name in state[p])
    assert estimate["factors"] == held
