"""Schedules: their values, their place in groups and checkpoints."""

from __future__ import annotations

import copy
import io
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from kfac_triton import KFAC, schedules
from kfac_triton.schedules import Constant, Cosine, Exponential, Linear, StepWise, WarmUp

EVERY = [
    Constant(0.3),
    Exponential(1.0, 1e-2, 10),
    Exponential(1e-2, 1.0, 10),
    Cosine(1.0, 0.1, 10),
    Linear(1.0, 0.0, 10),
    StepWise(1.0, 0.1, (3, 5)),
    StepWise(1.0, 10.0, [2]),
    WarmUp(4, Cosine(1.0, 0.0, 10)),
    WarmUp(2, WarmUp(2, Constant(1.0))),
]


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        (Constant(0.3), {0: 0.3, 1000: 0.3}),
        (Linear(1.0, 0.2, 4), {0: 1.0, 1: 0.8, 2: 0.6, 4: 0.2, 9: 0.2}),
        (Exponential(1.0, 1e-2, 10), {0: 1.0, 5: 0.1, 10: 0.01, 11: 0.01}),
        (Cosine(1.0, 0.2, 10), {0: 1.0, 5: 0.6, 10: 0.2, 99: 0.2}),
        (StepWise(1.0, 0.1, (3, 5)), {0: 1.0, 2: 1.0, 3: 0.1, 4: 0.1, 5: 0.01, 9: 0.01}),
        (StepWise(2.0, 0.1, ()), {0: 2.0, 9: 2.0}),
        (WarmUp(4, Exponential(1.0, 1e-2, 2)), {0: 0.25, 3: 1.0, 4: 1.0, 5: 0.1, 6: 0.01}),
    ],
    ids=str,
)
def test_values(schedule, values):
    assert {step: schedule(step) for step in values} == pytest.approx(values)


@pytest.mark.parametrize("schedule", EVERY, ids=str)
def test_the_peak_is_the_largest_value(schedule):
    assert schedule.peak == pytest.approx(max(schedule(step) for step in range(40)))


@pytest.mark.parametrize("schedule", EVERY, ids=str)
def test_a_schedule_is_plain_numbers_in_a_checkpoint(schedule):
    file = io.BytesIO()
    torch.save(schedule.as_numbers(), file)
    file.seek(0)
    assert schedules.restored(torch.load(file, weights_only=True)) == schedule


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Constant(-1.0), "value must be a number >= 0; got -1.0"),
        (lambda: Constant(math.nan), "value must be a number"),
        (lambda: Exponential(1.0, 0.0, 5), "end must be a number > 0; got 0.0"),
        (lambda: Exponential(1.0, 0.1, 0), "steps must be an integer >= 1; got 0"),
        (lambda: Cosine(1.0, math.inf, 5), "end must be a number"),
        (lambda: Cosine("1", 0.0, 5), "start must be a number"),
        (lambda: StepWise(1.0, 0.0, (3,)), "factor must be a number > 0"),
        (lambda: StepWise(1.0, 0.1, (5, 3)), r"milestones must rise; got \(5, 3\)"),
        (lambda: StepWise(1.0, 0.1, (0,)), "milestones must be an integer >= 1"),
        (lambda: WarmUp(5, 0.1), "then must be a Schedule; got 0.1"),
    ],
)
def test_what_cannot_be_is_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def step(model: nn.Module, optimizer: KFAC, times: int = 1) -> list[tuple[float, float]]:
    seen = []
    for _ in range(times):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(torch.ones(4, 3)), torch.zeros(4, 2)).backward()
        optimizer.step()
        seen.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["damping"]))
    return seen


def scheduled(model: nn.Module, **options) -> KFAC:
    defaults = {"lr": WarmUp(2, Cosine(0.1, 0.0, 6)), "damping": Exponential(1.0, 0.01, 4), "likelihood": "gaussian"}
    return KFAC(model, compile=False, **{**defaults, **options})


def test_the_groups_hold_the_value_of_the_step():
    optimizer = scheduled(model := nn.Linear(3, 2))
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["damping"]) == (0.05, 1.0)
    lr, damping = WarmUp(2, Cosine(0.1, 0.0, 6)), Exponential(1.0, 0.01, 4)
    assert step(model, optimizer, 9) == [(lr(k), damping(k)) for k in range(9)]


def test_a_scheduled_run_is_the_one_that_sets_the_numbers():
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    twin = nn.Linear(3, 2)
    twin.load_state_dict(model.state_dict())
    step(model, scheduled(model), 5)
    by_hand = scheduled(twin, lr=0.05, damping=1.0)
    for k in range(5):
        by_hand.param_groups[0]["lr"] = WarmUp(2, Cosine(0.1, 0.0, 6))(k)
        by_hand.param_groups[0]["damping"] = Exponential(1.0, 0.01, 4)(k)
        step(twin, by_hand)
    assert torch.equal(model.weight, twin.weight)


class Sawtooth(schedules.Schedule):
    """A user's own: a plain class, with a list and a schedule among its attributes."""

    def __init__(self, heights: list[float], period: int, shape: schedules.Schedule) -> None:
        self.heights, self.period, self.shape = heights, period, shape

    def __call__(self, step: int) -> float:
        return self.heights[step // self.period % len(self.heights)] * self.shape(step)

    @property
    def peak(self) -> float:
        return max(self.heights) * self.shape.peak


@dataclass(frozen=True)
class Inverse(schedules.Schedule):
    start: float

    def __call__(self, step: int) -> float:
        return self.start / (step + 1)

    @property
    def peak(self) -> float:
        return self.start


class Cosine2(Cosine):
    """Derived from one of ours."""

    def __call__(self, step: int) -> float:
        return super().__call__(step) ** 2


OWN = [
    Sawtooth([0.1, 0.2], 2, Constant(0.5)),
    Inverse(0.1),
    Cosine2(0.5, 0.1, 6),
    WarmUp(3, Inverse(0.2)),
    Inverse(np.float64(0.1)),
]


@pytest.mark.parametrize("schedule", OWN, ids=lambda schedule: type(schedule).__name__)
def test_a_schedule_of_ones_own_goes_on_after_a_checkpoint(schedule):
    """Resumed by an optimizer that was built without it: its class is found, with the numbers that were saved."""
    optimizer = scheduled(model := nn.Linear(3, 2), lr=schedule)
    assert [lr for lr, _ in step(model, optimizer, 4)] == [schedule(k) for k in range(4)]
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    for lr in (Constant(7.0), type(schedule)(*vars(schedule).values())):
        resumed = scheduled(other := nn.Linear(3, 2), lr=lr)
        resumed.load_state_dict(state)
        assert [lr for lr, _ in step(other, resumed, 3)] == [schedule(k) for k in range(4, 7)]
    assert optimizer.param_groups[0]["fallback_ratio"] == 0.1


def test_a_schedule_whose_class_is_gone_is_refused():
    optimizer = scheduled(model := nn.Linear(3, 2), lr=Inverse(0.1))
    state = copy.deepcopy(optimizer.state_dict())
    state["param_groups"][0]["lr_schedule"]["kind"] = "elsewhere:Vanished"
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"the schedule 'elsewhere:Vanished' is not defined; import its class"):
        optimizer.load_state_dict(state)
    assert optimizer.state_dict() == before
    state["param_groups"][0]["lr_schedule"] = {"kind": "Linear", "start": 1.0}
    with pytest.raises(ValueError, match=r"Linear has other values than \{'start': 1.0\}"):
        optimizer.load_state_dict(state)
    # The module may have another name, as that of a script that was imported this time.
    state["param_groups"][0]["lr_schedule"] = {"kind": "__main__:Inverse", "start": 0.3}
    optimizer.load_state_dict(state)
    assert [lr for lr, _ in step(model, optimizer, 2)] == [0.3, 0.15]


def test_a_schedule_that_holds_code_is_refused():
    class ByFunction(Inverse):
        def __init__(self) -> None:
            object.__setattr__(self, "function", math.sin)

    with pytest.raises(ValueError, match=r"the schedule's function must be a number.*Put code into methods"):
        scheduled(nn.Linear(3, 2), lr=ByFunction())


def test_a_schedule_that_goes_wrong_is_refused_when_it_does():
    optimizer = scheduled(model := nn.Linear(3, 2), lr=Sawtooth([0.1, math.nan], 2, Constant(1.0)))
    step(model, optimizer, 2)
    with pytest.raises(ValueError, match=r"^lr must be a number >= 0.0; got nan"):
        step(model, optimizer)


def test_a_schedule_goes_on_after_a_checkpoint():
    optimizer = scheduled(model := nn.Linear(3, 2))
    step(model, optimizer, 4)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed = KFAC(other := nn.Linear(3, 2), likelihood="gaussian", compile=False)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert step(other, resumed, 3) == step(model, optimizer, 3)


def test_groups_of_their_own_schedules_and_the_fallback_follows_the_peak():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    groups = [{"params": model[0].parameters(), "lr": Constant(0.5)}, {"params": model[1].parameters()}]
    optimizer = scheduled(model, params=groups, fallback_lr=0.01)
    first, second = optimizer.param_groups
    assert (first["lr"], second["lr"]) == (0.5, 0.05)
    assert second["fallback_ratio"] == pytest.approx(0.01 / 0.1)  # of the peak, which the warm-up has yet to reach
    step(model, optimizer, 2)
    assert (first["lr"], second["lr"]) == (0.5, pytest.approx(0.1))
