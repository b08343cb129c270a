"""What a step costs the host, counted: dispatched operators and Python calls inside `step()`, CPU, eager.

Counts are exact, so the bounds are what was reached and a little room. A network of equal linear layers of width 16,
each behind a tanh; batch 64, Bernoulli likelihood.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from kfac_triton import KFAC

WIDTH, BATCH = 16, 64
WARM = 26  # steps before anything is counted: young factors refresh their inverses more often


class Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


class Run:
    """A network of `depth` layers, or of these widths, and its optimizer, some steps old."""

    def __init__(self, depth: int | list[int], *, paper: bool = False, warm: int = WARM, **options: Any) -> None:
        torch.manual_seed(0)
        widths = depth if isinstance(depth, list) else [WIDTH] * (depth + 1)
        layers = [layer for sizes in pairwise(widths) for layer in (nn.Linear(*sizes), nn.Tanh())]
        self.model = nn.Sequential(*layers[:-1])
        self.x, self.y = torch.rand(BATCH, widths[0]), torch.rand(BATCH, widths[-1]).round()
        make = KFAC.paper if paper else KFAC
        self.optimizer = make(self.model, likelihood="bernoulli", loss_scale=1 / widths[-1], compile=False, **options)
        self.paper = paper
        for _ in range(warm):
            self.step()()

    def closure(self) -> Tensor:
        self.optimizer.zero_grad()
        loss = nn.functional.binary_cross_entropy_with_logits(self.model(self.x), self.y)
        loss.backward()
        return loss

    def step(self) -> Callable[[], Any]:
        """The next step: of `paper` with its closure, else after forward and backward passes that do not count."""
        if self.paper:
            return lambda: self.optimizer.step(self.closure)
        self.closure()
        return self.optimizer.step

    def counts(self) -> tuple[int, int]:
        """(dispatched operators, Python calls) of one step each."""
        step = self.step()
        with Operators() as operators:
            step()
        calls = 0

        def on_event(frame: object, event: str, arg: object) -> None:
            nonlocal calls
            calls += event == "call"

        step = self.step()
        sys.setprofile(on_event)
        try:
            step()
        finally:
            sys.setprofile(None)
        return sum(operators.counts.values()), calls


DUE = {"factor_interval": 1, "inverse_interval": 1000}
NOT_DUE = {"factor_interval": 1000, "inverse_interval": 1000}


@pytest.mark.parametrize(
    ("options", "operators", "calls", "operators_a_layer", "calls_a_layer"),
    [(DUE, 300, 1800, 10, 45), (NOT_DUE, 60, 450, 0, 8)],
    ids=["factors due", "not due"],
)
def test_a_step_of_24_layers(options, operators, calls, operators_a_layer, calls_a_layer):
    few, more = Run(24, **options).counts(), Run(25, **options).counts()
    assert few[0] <= operators and few[1] <= calls
    assert more[0] - few[0] <= operators_a_layer and more[1] - few[1] <= calls_a_layer


def test_the_counts_are_of_steps_that_do_what_they_should():
    """The step that is due moves the factors, the other one does not; both move the weights."""
    for options, moves in ((DUE, True), (NOT_DUE, False)):
        run = Run(3, **options)
        before = run.optimizer.factors()["0"]["A"], run.model[0].weight.detach().clone()
        run.step()()
        assert torch.equal(run.optimizer.factors()["0"]["A"], before[0]) is not moves
        assert not torch.equal(run.model[0].weight, before[1])


def test_an_adaptive_step_with_its_closure():
    """Steps 26 and 27 adapt nothing; steps 24 and 25 judge the damping, for which they call the closure again."""
    operators, calls = Run(24, paper=True).counts()
    assert operators <= 950 and calls <= 2800
    operators, calls = Run(24, paper=True, warm=24).counts()
    assert operators <= 1500 and calls <= 5000


@pytest.mark.parametrize("layers", [24, [49, 64, 64, 32, 16, 32, 64, 64, 49]], ids=["alike", "of seven shapes"])
def test_refreshed_inverses_are_no_spike(layers):
    """With factors every step and inverses every ten: at most 2.5 times the operators of the median step."""
    run, counts = Run(layers, inverse_interval=10), []
    for _ in range(20):
        step = run.step()
        with Operators() as operators:
            step()
        counts.append(sum(operators.counts.values()))
    assert max(counts) > sorted(counts)[10], "there was a refresh"
    assert max(counts) <= 2.5 * sorted(counts)[10]
