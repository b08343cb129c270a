"""Runs that are poisoned for a few steps: nothing but finite numbers in parameters and state, and afterwards training
goes on as if the poison had not been."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_triton import KFAC

BEFORE, POISONED, AFTER = 10, 3, 60

INPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "NaN inputs": lambda x: torch.full_like(x, math.nan),
    "a NaN example": lambda x: x.index_fill(0, torch.tensor([3]), math.nan),
    "infinite inputs": lambda x: torch.full_like(x, math.inf),
    "inputs of 1e20": lambda x: x * 1e20,
    "inputs of 3e38": lambda x: x.sign() * 3e38,
    "an example of 1e15": lambda x: torch.cat([x[:1] * 1e15, x[1:]]),
    "inputs times 1000": lambda x: x * 1e3,
    "zero inputs": torch.zeros_like,
    "constant inputs": torch.ones_like,
    "duplicates": lambda x: x[:1].expand_as(x).contiguous(),
    "denormal inputs": lambda x: x * 1e-40,
}
LOSSES = {
    "a NaN loss": math.nan,
    "an infinite loss": math.inf,
    "loss times 1e20": 1e20,
    "loss times 3e38": 3e38,
    "loss times 1000": 1e3,
    "loss times 1e-30": 1e-30,
    "zero loss": 0.0,
}
POISONS = [*INPUTS, *LOSSES]
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
Setting = tuple[str, str, str]  # approximation, or "paper"; fisher; dtype
SETTINGS: list[Setting] = [
    (approximation, fisher, dtype)
    for approximation in ("kronecker", "eigen", "inverse_free", "tridiagonal", "paper")
    for fisher in ("mc", "exact", "empirical")
    for dtype in DTYPES
    if (approximation, fisher) != ("tridiagonal", "empirical")  # refused
    and (approximation != "paper" or dtype == "float32")
]


def problem(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """512 examples of three classes that overlap, so that there is a loss to come to rest at."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, 6, generator=generator)
    scores = x @ torch.randn(6, 3, generator=generator) + 4 * torch.randn(512, 3, generator=generator)
    return x.to(dtype), scores.argmax(1)


def make(setting: Setting, seed: int, **options: Any) -> tuple[nn.Module, KFAC]:
    approximation, fisher, dtype = setting
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).to(DTYPES[dtype])
    options = {"likelihood": "categorical", "fisher": fisher, "compile": False, "seed": seed, **options}
    if approximation == "paper":
        return model, KFAC.paper(model, **options)
    return model, KFAC(model, lr=0.03, approximation=approximation, **options)


def final_loss(setting: Setting, poison: str | None, **options: Any) -> float:
    """The loss after a run, with sampled targets and for "paper" the mean of three: one is 7 % off by those alone."""
    seeds = 3 if setting[0] == "paper" or setting[1] == "mc" else 1
    losses = [loss_of_a_run(setting, poison, seed, **options) for seed in range(seeds)]
    return sum(losses) / len(losses)


def loss_of_a_run(setting: Setting, poison: str | None, seed: int, **options: Any) -> float:
    """After BEFORE clean steps, POISONED ones with a poison, and AFTER clean ones; nan if anything is not finite."""
    model, optimizer = make(setting, seed, **options)
    x, y = problem(DTYPES[setting[2]])

    def step(poison: str | None) -> None:
        inputs = INPUTS.get(poison or "", lambda x: x)(x)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(inputs).to(torch.promote_types(inputs.dtype, torch.float32)), y)
            loss = loss * LOSSES.get(poison or "", 1.0)
            loss.backward()
            return loss

        if setting[0] == "paper":
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()

    for now in [None] * BEFORE + [poison] * (POISONED if poison else 0) + [None] * AFTER:
        step(now)
    written = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    finite = all(bool(torch.isfinite(t).all()) for t in (*model.parameters(), *written))
    with torch.no_grad():
        return float(F.cross_entropy(model(x).double(), y)) if finite else math.nan


@functools.cache
def undisturbed(setting: Setting) -> float:
    return final_loss(setting, None)


def recovers(setting: Setting, poison: str, **options: Any) -> bool:
    return final_loss(setting, poison, **options) < 1.1 * undisturbed(setting)


def _name(value: str | Setting) -> str:
    return value if isinstance(value, str) else " ".join(value)


QUICK = [(SETTINGS[(5 * i) % len(SETTINGS)], poison) for i, poison in enumerate(POISONS)]


@pytest.mark.parametrize(("setting", "poison"), QUICK, ids=_name)
def test_one_setting_for_each_poison(setting, poison):
    assert recovers(setting, poison)


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS, ids=_name)
def test_every_setting_and_poison(setting):
    assert [poison for poison in POISONS if not recovers(setting, poison)] == []


@pytest.mark.slow
@pytest.mark.parametrize("poison", ["inputs of 3e38", "inputs times 1000", "loss times 3e38", "a NaN loss"])
@pytest.mark.parametrize("approximation", ["kronecker", "eigen"])
def test_of_compiled_steps(approximation, poison):
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        pytest.skip("no C++ compiler")
    assert recovers((approximation, "mc", "float32"), poison, compile=True)
