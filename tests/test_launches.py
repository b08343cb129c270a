"""How many kernels a step launches, on the autoencoder of the task `curves`: counted, without a GPU.

Counted are the operators of torch that `step()` dispatches, below autograd, and that compute or copy: see `launches` in
`kfac_triton.benchmarks.counts`. Views and bare allocations launch nothing. A composite operator, as a factorisation,
and one over a list of tensors, as `_foreach_mul_`, count as one, though a GPU may take several for tensors of many
shapes. K-FAC's own operators count by the kernels that Triton launches in them. Every tensor stands for one on the
device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from kfac_triton import KFAC
from kfac_triton.benchmarks.counts import launches
from kfac_triton.tuning.problems import CURVES_WIDTHS, autoencoder

WARM = 18  # steps; inverses are due at multiples of 6 only from here on
DUE = ("inverses and factors", "neither", "factors")  # in the steps after those


class Launches(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.namespace == "aten" and launches(func)
        return func(*args, **(kwargs or {}))


def counts(rule: str, of_kernels: Callable[[], int] = lambda: 0) -> dict[str, int]:
    """Launches in one step of each kind; `of_kernels`: those of Triton's kernels so far."""
    torch.manual_seed(0)
    model, x = autoencoder(CURVES_WIDTHS), torch.rand(512, CURVES_WIDTHS[0])
    options = {"likelihood": "bernoulli", "compile": False, "lr": 1e-3, "rule": rule}
    optimizer = KFAC(model, factor_interval=2, inverse_interval=6, **options)
    found = []
    for _ in range(WARM + len(DUE)):
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(model(x), x, reduction="sum").div(len(x)).backward()
        before = of_kernels()
        with Launches() as mode:
            optimizer.step()
        found.append(mode.count + of_kernels() - before)
    return dict(zip(DUE, found[WARM:], strict=True))


def check(found: dict[str, int], factors: int, neither: int, both: int) -> None:
    assert found["factors"] <= factors
    assert found["neither"] <= neither
    assert found["inverses and factors"] <= both


@pytest.mark.parametrize(("rule", "bounds"), [("kl", (150, 32, 380)), ("cap", (150, 50, 390))])
def test_launches_where_the_host_holds_the_numbers(rule, bounds):
    """At most 150 with factors due, 48 of them of K-FAC's own pass."""
    check(counts(rule), *bounds)


@pytest.mark.parametrize(("rule", "bounds"), [("kl", (380, 105, 1140)), ("cap", (510, 240, 1270))])
def test_launches_where_a_device_holds_the_numbers(rule, bounds, as_on_a_device):
    """Formulas on a few numbers, which nothing may wait for, are most of what a step without factors launches."""
    check(counts(rule), *bounds)


@pytest.mark.parametrize(("rule", "bounds"), [("kl", (250, 128, 960)), ("cap", (390, 270, 1100))])
def test_launches_with_kernels(rule, bounds, as_on_a_device, interpreter, monkeypatch):
    """72 of them are kernels with factors due, 48 without. They compute nothing here; how many there are depends on no
    value."""
    from triton.runtime.interpreter import GridExecutor

    launched: list[str] = []
    monkeypatch.setenv("KFAC_TRITON_BACKEND", "triton")
    monkeypatch.setattr("kfac_triton.ops.iterates", lambda device: False)  # which a GPU does not by itself
    monkeypatch.setattr(GridExecutor, "__call__", lambda self, *args, **kwargs: launched.append(self.fn.__name__))
    check(counts(rule, lambda: len(launched)), *bounds)
