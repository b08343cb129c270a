"""Counting what a step costs: the rules operator by operator, and counts that are exact, by stage and by kind."""

from __future__ import annotations

import importlib
import inspect
import threading
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kfac_triton.benchmarks import step_counts
from kfac_triton.benchmarks.counts import (
    OTHER,
    OUTSIDE,
    STAGES,
    Operators,
    Tally,
    added,
    count_calls,
    count_operators,
    waits,
)
from kfac_triton.benchmarks.step import StepOptions, hyper_of, kept_batches
from kfac_triton.benchmarks.step_counts import StepCount
from kfac_triton.tuning.baselines import find_entrant
from kfac_triton.tuning.problems import find_task
from kfac_triton.tuning.trainer import step_on

CPU = torch.device("cpu")
OPTIONS = StepOptions(("kfac",), factor_interval=2, inverse_interval=4, batch=16, compile=False)


def counted(run: Callable[[], Any]) -> Tally:
    """Everything that `run` costs."""
    code = counted.__code__  # of no frame that `run` is in, but for this one
    stages = added(count_operators(run, code, CPU), count_calls(run, code, CPU))
    assert set(stages) <= {OTHER}
    return sum(stages.values(), Tally())


@pytest.mark.parametrize(
    ("run", "operators", "launches", "waits"),
    [
        (lambda t: t + 1, 1, 1, 0),
        (lambda t: t.add_(1), 1, 1, 0),
        (lambda t: t.clone(), 1, 1, 0),
        (lambda t: torch.zeros(3), 1, 1, 0),
        (lambda t: torch._foreach_add_([t, t], 1), 1, 1, 0),
        (lambda t: t.view(6), 1, 0, 0),
        (lambda t: t[0], 1, 0, 0),
        (lambda t: t.T, 1, 0, 0),
        (lambda t: t.split(1), 1, 0, 0),
        (lambda t: t.squeeze_(), 1, 0, 0),
        (lambda t: t.detach(), 1, 0, 0),
        (lambda t: torch.empty(3), 1, 0, 0),
        (lambda t: torch.empty_like(t), 1, 0, 0),
        (lambda t: t.shape, 0, 0, 0),
        (lambda t: t.sum().item(), 2, 1, 1),
        (lambda t: bool(t.any()), 2, 1, 1),
        (lambda t: float(t.max()), 2, 1, 1),
        (lambda t: torch.equal(t, t), 1, 1, 1),
        (lambda t: t.nonzero(), 1, 1, 1),
        (lambda t: t[t > 0], 2, 2, 1),
        (lambda t: t[torch.tensor([0, 1])], 2, 1, 0),
        (lambda t: t.tolist(), 0, 0, 1),
        (lambda t: t.cpu(), 0, 0, 1),
        (lambda t: torch.linalg.cholesky_ex(t @ t.T + torch.eye(2)).L, 5, 4, 0),
        (lambda t: torch.linalg.cholesky(t @ t.T + torch.eye(2)), 6, 5, 1),
    ],
)
def test_what_launches_and_what_waits(run: Callable[[Tensor], Any], operators: int, launches: int, waits: int) -> None:
    t = torch.rand(2, 3)
    tally = counted(lambda: run(t))
    assert (tally.operators, tally.launches, tally.waits) == (operators, launches, waits)


def test_copies_from_a_device_wait_and_copies_to_it_do_not() -> None:
    device, host = torch.empty(2, device="meta"), torch.empty(2)
    cast, copy = torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default
    assert waits(cast, (device,), {}, host) and waits(copy, (host, device), {}, host)
    assert not waits(cast, (device,), {"non_blocking": True}, host) and not waits(copy, (host, device, True), {}, host)
    assert not waits(cast, (host,), {}, device) and not waits(copy, (device, host), {}, device)
    assert not waits(cast, (device,), {}, device) and not waits(cast, (host,), {}, host)


def test_what_lies_on_the_host_alone_neither_launches_nor_waits() -> None:
    here, there = torch.ones(2), torch.ones(2, device="meta")

    def run() -> None:
        here.sum().item()
        there.sum()

    (tally,) = count_operators(run, run.__code__, torch.device("meta")).values()
    assert (tally.operators, tally.launches, tally.waits) == (3, 1, 0)


def test_python_calls_are_those_of_functions() -> None:
    def inner() -> int:
        return len([])

    def outer() -> int:
        return inner() + inner()

    assert counted(outer).python_calls == 3


def test_a_thread_of_autograd_counts_for_what_the_caller_is_doing() -> None:
    stages: list[str] = []

    def step() -> None:
        thread = threading.Thread(target=lambda: stages.append(mode._stage()))
        thread.start()
        thread.join()

    mode = Operators(step.__code__, CPU)
    step()
    assert stages == [OTHER] and mode._stage() == OUTSIDE


def test_every_stage_names_code_that_is_there() -> None:
    """A module or function of another name would count as "other" without a word."""
    for key in STAGES:
        try:
            importlib.import_module(f"kfac_triton.{key}")
        except ModuleNotFoundError:
            name, _, function = key.rpartition(".")
            source = inspect.getsource(importlib.import_module(f"kfac_triton.{name}"))
            assert f"def {function}(" in source, key


# ------------------------------------------------------------------------------------------------------- whole steps


def count(task: Any, name: str = "kfac", options: StepOptions = OPTIONS) -> dict[str, StepCount]:
    """{kind of step: its counts}."""
    task = find_task(task) if isinstance(task, str) else task
    return {one.kind: one for one in step_counts.count_steps(task, name, options, kept_batches(task, options), CPU)}


def test_two_runs_count_the_same() -> None:
    once = count("chain-3x4")
    assert list(once) == ["factors and inverses due", "factors due", "neither due"]
    assert [one.steps for one in once.values()] == [1, 1, 2]
    assert once == count("chain-3x4")


@pytest.mark.parametrize(
    ("name", "rule", "bounded"), [("sgd", "", 0), ("adamw", "", 0), ("kfac", "kl", 0), ("kfac", "cap", 4)]
)
def test_each_added_layer_costs_the_same(name: str, rule: str, bounded: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for `bounded` more operators where the rule "cap" multiplies a gradient that is longer than usual."""
    plain = step_counts.hyper_of
    if rule:
        monkeypatch.setattr(step_counts, "hyper_of", lambda *given: {**plain(*given), "rule": rule})
    chains = [count(f"chain-{layers}x4", name) for layers in (3, 4, 5, 6)]
    for kind in chains[0]:
        totals = [chain[kind].whole for chain in chains]
        for column in vars(totals[0]):
            numbers = [getattr(total, column) for total in totals]
            more = [after - before for before, after in pairwise(numbers)]
            assert max(more) - min(more) <= bounded
            assert min(more) > 0 or column == "waits"


def test_stages_add_up_and_hold_what_is_due() -> None:
    kinds = count("chain-3x4")
    both, factors, neither = kinds.values()
    for one in kinds.values():
        assert one.whole == one.alone + one.stages[OUTSIDE]
    assert both.stages["inverses"].operators > 0 == factors.stages["inverses"].operators
    assert factors.stages["factors"].operators > 0 and factors.stages["own pass"].operators > 0
    assert neither.stages["update"].operators > 0 == neither.stages["own pass"].operators
    assert "factors" not in neither.stages
    (sgd,) = count("chain-3x4", "sgd").values()
    assert sgd.kind == "every step" and set(sgd.stages) == {OUTSIDE, OTHER}


class Looking(nn.Module):
    """A layer whose forward pass does something more."""

    def __init__(self, layer: nn.Module, more: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.layer, self.more = layer, more

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        self.more(y.detach())
        return y


@pytest.mark.parametrize(
    ("more", "operators", "launches", "waits"),
    [(lambda y: y[0, 0].item(), 3, 0, 1), (lambda y: y.view(-1), 1, 0, 0), (lambda y: y.exp(), 1, 1, 0)],
)
def test_what_a_model_plants_is_counted(
    more: Callable[[Tensor], Any], operators: int, launches: int, waits: int
) -> None:
    task = find_task("chain-2x4")
    plain = replace(task, model=lambda: Looking(task.model(), lambda y: None))
    planted = replace(task, model=lambda: Looking(task.model(), more))
    (before,), (after,) = (count(one, "sgd").values() for one in (plain, planted))
    assert after.alone == before.alone
    gained = {name: getattr(after.whole, name) - number for name, number in vars(before.whole).items()}
    assert gained == {"operators": operators, "python_calls": 0, "launches": launches, "waits": waits}


def test_a_wait_in_step_is_counted_there(monkeypatch: pytest.MonkeyPatch) -> None:
    class Reading(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                for p in group["params"]:
                    p.grad.abs().max().item()
            return super().step(closure)

    entrant = replace(find_entrant("sgd"), build=lambda model, *_: Reading(model.parameters(), lr=1e-3))
    monkeypatch.setattr(step_counts, "find_entrant", lambda name: entrant)
    (one,) = count("chain-2x4").values()
    assert one.alone.waits == one.whole.waits == 4


def test_counting_leaves_training_as_it_is() -> None:
    task = find_task("chain-2x4")
    batches = kept_batches(task, OPTIONS)

    def trained(count: Callable[..., Any]) -> list[Tensor]:
        torch.manual_seed(0)
        model = task.model()
        optimizer = find_entrant("kfac").build(model, task, hyper_of("kfac", OPTIONS), False)
        for x, y in batches[:9]:
            count(lambda x=x, y=y: step_on(task, model, optimizer, x, y), step_on.__code__, CPU)
        return list(model.parameters())

    plain = trained(lambda run, *_: run())
    for way in (count_operators, count_calls):
        assert all(torch.equal(p, q) for p, q in zip(plain, trained(way), strict=True))


def test_adaptive_steps_count_their_closure_inside() -> None:
    options = replace(OPTIONS, optimizers=("kfac-paper",))
    kinds = count("chain-2x4", "kfac-paper", options)
    whole = sum((one.steps for one in kinds.values()), 0)
    assert whole == 20 and kinds["factors due"].stages["quadratic model"].operators > 0
    assert kinds["factors due"].lowest.operators < kinds["factors due"].highest.operators
    assert kinds["factors due"].stages[OUTSIDE].launches == 0


def test_a_chain_task_has_the_layers_of_its_name() -> None:
    task = find_task("chain-24x16")
    linear = [layer for layer in task.model() if isinstance(layer, nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in linear] == [(16, 16)] * 24
    small = [layer.out_features for layer in find_task("small-autoencoder").model() if isinstance(layer, nn.Linear)]
    assert small == [64, 64, 32, 16, 32, 64, 64, 49]
    x, y = next(task.batches(0))
    assert x.shape == y.shape == (64, 16) and set(y.unique().tolist()) == {0.0, 1.0}
    loss = task.loss(torch.zeros(64, 16), y)
    assert loss == pytest.approx(16 * F.softplus(torch.zeros(())).item())
