"""The search, on settings whose outcome is known: resuming, divergence, pruning, edges, equal numbers."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from failing import Failing, Killed, full
from optuna.storages import InMemoryStorage
from torch import nn

from kfac_triton.tuning import Task, trainer
from kfac_triton.tuning import study as study_of
from kfac_triton.tuning.baselines import ENTRANTS, Entrant, build_sgd
from kfac_triton.tuning.errors import Mistake
from kfac_triton.tuning.schedules import SHAPES, factor
from kfac_triton.tuning.space import SPACES, Choice, Range, Space
from kfac_triton.tuning.storage import JournalFileBackend
from kfac_triton.tuning.study import Outcome, Search, best, search
from kfac_triton.tuning.trainer import Budget, Point, Run, train

NARROW = Space({"lr": Range(0.01, 0.1)}, {"lr": 0.0999})
SPACE = Space({"lr": Range(1e-3, 1.0), "kind": Choice(("a", "b"))}, {"lr": 0.03, "kind": "a"})


def pretend(value: Callable[[dict[str, Any]], float], asked: list[dict[str, Any]]) -> Callable[..., Run]:
    """A runner that "trains" in no time and ends with `value(setting)`; nan diverges."""

    def run(setting: dict[str, Any], stop: Callable[[Point], bool]) -> Run:
        asked.append(setting)
        final, made = value(setting), Run(seconds=1.0, steps=10)
        if math.isnan(final):
            made.ended, made.reason = "diverged", "the loss was nan at step 3"
            return made
        for i in range(5):
            made.points.append(Point(i / 4, 3 * i, 100.0 if i == 0 else final, None))
            if stop(made.points[-1]):
                made.ended, made.reason = "pruned", "clearly behind"
                break
        return made

    return run


def searched(
    folder: Path, value: Callable[[dict[str, Any]], float], trials: int = 12, space: Space = SPACE
) -> tuple[Outcome, list[dict[str, Any]]]:
    asked: list[dict[str, Any]] = []
    outcome = Search("sgd", space, folder / "study.journal", 0, trials, pretend(value, asked)).complete(
        None, lambda: True
    )
    assert outcome is not None
    return outcome, asked


def bowl(setting: dict[str, Any]) -> float:
    return 1 + abs(math.log10(setting["lr"]) + 1) + (setting["kind"] == "a")


def test_the_first_setting_is_the_declared_one_and_the_best_is_found(tmp_path: Path) -> None:
    outcome, asked = searched(tmp_path, bowl)
    assert asked[0] == SPACE.first and len(asked) == len(outcome.trials) == 12
    assert outcome.best is not None and outcome.value == pytest.approx(min(bowl(setting) for setting in asked))
    assert outcome.seconds == 12.0


def test_a_stopped_search_goes_on_with_the_settings_it_would_have_tried(tmp_path: Path) -> None:
    whole, asked = searched(tmp_path / "whole", bowl)
    again: list[dict[str, Any]] = []
    left = iter([True, True, True, True, True, False])
    first = Search("sgd", SPACE, tmp_path / "part.journal", 0, 12, pretend(bowl, again))
    assert first.complete(None, lambda: next(left)) is None and len(again) == 5
    resumed = Search("sgd", SPACE, tmp_path / "part.journal", 0, 12, pretend(bowl, again)).complete(None, lambda: True)
    assert again == asked
    assert resumed is not None and resumed.best == whole.best


def test_a_setting_that_was_interrupted_is_tried_again(tmp_path: Path) -> None:
    asked: list[dict[str, Any]] = []

    def interrupted(setting: dict[str, Any]) -> float:
        if len(asked) == 3:
            raise KeyboardInterrupt
        return bowl(setting)

    with pytest.raises(KeyboardInterrupt):
        Search("sgd", SPACE, tmp_path / "j", 0, 6, pretend(interrupted, asked)).complete(None, lambda: True)
    after: list[dict[str, Any]] = []
    outcome = Search("sgd", SPACE, tmp_path / "j", 0, 6, pretend(bowl, after)).complete(None, lambda: True)
    assert after[0] == asked[2] and len(after) == 4
    assert outcome is not None and [row.number for row in outcome.trials] == list(range(6))


def test_a_setting_that_diverges_is_kept_as_infinitely_bad(tmp_path: Path) -> None:
    outcome, _ = searched(tmp_path, lambda setting: math.nan if setting["lr"] > 0.02 else bowl(setting))
    lost = [row for row in outcome.trials if row.ended == "diverged"]
    assert lost and all(row.value == math.inf and "nan" in row.reason for row in lost)
    assert outcome.best is not None and outcome.best["lr"] <= 0.02


def test_when_everything_diverges_there_is_no_winner(tmp_path: Path) -> None:
    outcome, asked = searched(tmp_path, lambda setting: math.nan)
    assert outcome.best is None and outcome.value == math.inf and len(asked) == 12


def test_a_setting_far_behind_at_half_time_is_stopped_there(tmp_path: Path) -> None:
    outcome, _ = searched(tmp_path, lambda setting: 1.0 if setting == SPACE.first else 3.5)
    assert [row.ended for row in outcome.trials] == ["done"] + ["pruned"] * 11
    assert outcome.best == SPACE.first
    kept, _ = searched(tmp_path / "near", lambda setting: 1.0 if setting == SPACE.first else 2.9)
    assert all(row.ended == "done" for row in kept.trials)


def test_a_winner_at_an_edge_widens_the_range_for_the_last_quarter(tmp_path: Path) -> None:
    outcome, asked = searched(tmp_path, lambda setting: 10 - math.log10(setting["lr"]), space=NARROW)
    assert all(0.01 <= setting["lr"] <= 0.1 for setting in asked[:9])
    assert asked[9]["lr"] > 0.1, "the first setting after a widening lies past the old edge"
    assert outcome.best is not None and outcome.best["lr"] > 0.1
    assert outcome.widened == {"lr": "0.01 to 0.316228 (log)"}
    assert len(asked) == 12, "no optimizer gets more settings than another"


def test_a_winner_in_the_middle_leaves_the_range_alone(tmp_path: Path) -> None:
    outcome, asked = searched(tmp_path, lambda setting: 1 + abs(math.log10(setting["lr"] / 0.03)), space=NARROW)
    assert outcome.widened == {} and outcome.edges == {}
    assert all(0.01 <= setting["lr"] <= 0.1 for setting in asked)


def test_a_range_of_momenta_is_drawn_by_its_distance_to_one() -> None:
    momentum = Range(0.9, 0.999, below_one=True, ceiling=0.9999)
    assert momentum.value(0.5) == pytest.approx(0.99)
    assert momentum.position(0.99) == pytest.approx(0.5)
    assert momentum.edge(0.9989) == "high" and momentum.edge(0.99) is None
    assert momentum.widened("high").high == pytest.approx(0.9999)
    assert Range(1e-3, 1.0, ceiling=1.0).widened("high").high == 1.0


def test_an_edge_beyond_which_nothing_lies_is_no_edge() -> None:
    space = Space({"end": Range(1e-3, 1.0, ceiling=1.0)}, {"end": 0.1})
    assert space.edges({"end": 1.0}) == {} and space.edges({"end": 1e-3}) == {"end": "low"}


@pytest.mark.parametrize("name", SPACES)
def test_the_first_settings_lie_inside_their_space_and_off_its_edges(name: str) -> None:
    space = SPACES[name]
    for start in space.starts:
        assert set(start) == set(space.parameters)
        for parameter, value in start.items():
            allowed = space.parameters[parameter]
            if isinstance(allowed, Choice):
                assert value in allowed.values
            else:
                assert allowed.edge(value) is None


@pytest.mark.parametrize("shape", SHAPES)
def test_a_schedule_starts_at_one_and_never_rises(shape: str) -> None:
    values = [factor(shape, i / 50) for i in range(51)]
    assert values[0] == 1.0 and values == sorted(values, reverse=True)
    assert values[-1] == {"constant": 1.0, "linear": 0.0, "exponential": 0.01}.get(shape, pytest.approx(0, abs=1e-12))
    assert factor(shape, 0.05, warmup=0.1) == 0.5


class Clock:
    """Seconds that pass only where somebody says so; in the place of the module `time`."""

    def __init__(self) -> None:
        self.now = 100.0

    def go(self, seconds: float) -> None:
        self.now += seconds

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Time in the trainer."""
    made = Clock()
    monkeypatch.setattr(trainer, "time", made)
    return made


STEP = 2.0**-7  # seconds of a batch, where a clock is given


def quadratic(clock: Clock | None = None, **changes: Any) -> Task:
    """A linear regression; its loss is its metric."""

    def batches(seed: int) -> Any:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(5):
            if clock is not None:
                clock.go(STEP)
            inputs = torch.randn(16, 3, generator=generator)
            yield inputs, inputs.sum(1, keepdim=True)

    made: dict[str, Any] = {
        "model": lambda: nn.Linear(3, 1),
        "batches": batches,
        "loss": nn.functional.mse_loss,
        "likelihood": "gaussian",
        "name": "quadratic",
    }
    return Task(**(made | changes))


def test_a_run_is_judged_at_the_start_on_the_way_and_at_the_end(clock: Clock) -> None:
    run = train(quadratic(clock), ENTRANTS["sgd-default"], {}, 1, Budget(24.5 * STEP, evaluations=4))
    assert run.ended == "done" and run.steps == 25 and run.seconds == 25 * STEP
    assert [point.step for point in run.points] == [0, 7, 13, 19, 25]
    assert [point.seconds for point in run.points] == [STEP * point.step for point in run.points]
    assert run.ms_per_step == run.median_step_ms == 1e3 * STEP
    assert run.final == run.points[-1].train < run.points[0].train


def test_evaluation_is_off_the_clock(clock: Clock) -> None:
    def slow(model: nn.Module) -> float:
        clock.go(0.25)
        return 1.0

    run = train(quadratic(clock, evaluate=slow), ENTRANTS["sgd-default"], {}, 1, Budget(6 * STEP, evaluations=3))
    assert len(run.points) == 4 and run.evaluation_seconds == 4 * 0.25
    assert run.seconds == 6 * STEP


def test_a_run_that_explodes_ends_at_once() -> None:
    hyper = {"lr": 1e3, "momentum": 0.9}
    run = train(quadratic(), Entrant("sgd", build_sgd), hyper, 1, Budget(1000.0, evaluations=1000))
    assert run.ended == "diverged" and run.final == math.inf and run.steps < 100


def test_the_same_seed_starts_the_same_and_another_does_not() -> None:
    def first(seed: int) -> float:
        return train(quadratic(), ENTRANTS["sgd-default"], {}, seed, Budget(0.01, evaluations=1)).points[0].train

    assert first(1) == first(1) != first(2)


def test_a_schedule_reaches_the_groups_and_damping_too() -> None:
    from kfac_triton.tuning.baselines import apply_schedule, initial_values

    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.4)
    optimizer.param_groups[0]["damping"] = 2.0
    start = initial_values(optimizer)
    apply_schedule(optimizer, start, {"schedule": "linear", "damping_end": 0.01}, 0.5)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.2)
    assert optimizer.param_groups[0]["damping"] == pytest.approx(0.2)


@pytest.mark.parametrize("name", ["sgd", "adamw", "kfac"])
def test_every_tuned_optimizer_is_searched_end_to_end(tmp_path: Path, name: str) -> None:
    outcome = search(quadratic(), name, trials=2, budget=Budget(0.05), journal=tmp_path / "j")
    assert outcome is not None and len(outcome.trials) == 2
    assert set(outcome.space) == set(SPACES[name].parameters)
    winner = best(outcome.trials)
    assert winner is not None and winner.setting == outcome.best


# ---------------------------------------------------------------------------------------- killed workers and full disks

KNOWN = Space({**SPACE.parameters, "end": Range(0.1, 1.0)}, {"lr": 0.03, "kind": "a", "end": 0.5}, others=(
    {"lr": 0.25, "kind": "b", "end": 0.125},
))  # fmt: skip


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("error", [Killed, full])
def test_a_search_that_ends_at_any_write_goes_on_with_its_known_settings_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Callable[[], BaseException], again: bool
) -> None:
    def searched(storage: object) -> Outcome | None:
        monkeypatch.setattr(study_of, "open_journal", lambda path: storage)
        return Search("sgd", KNOWN, tmp_path / "j", 0, 4, pretend(bowl, [])).complete(None, lambda: True)

    for writes in range(1000):
        storage = InMemoryStorage()
        if again:
            with pytest.raises((Killed, OSError)):
                searched(Failing(storage, 6, error))  # in the middle of the first setting
        failing = Failing(storage, writes, error)
        with contextlib.suppress(Killed, OSError):
            searched(failing)
        outcome = searched(storage)
        assert outcome is not None
        settings = [row.setting for row in outcome.trials]
        assert len(settings) == 4 and all(settings.count(start) == 1 for start in KNOWN.starts)
        if not failing.lost:
            break
    assert writes > 25


def test_a_disk_that_is_full_is_a_line_and_the_search_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    append = JournalFileBackend.append_logs

    def append_logs(self: JournalFileBackend, logs: list[dict[str, Any]]) -> None:
        if tmp_path.joinpath("study.journal").stat().st_size > 3000:
            with tmp_path.joinpath("study.journal").open("ab") as file:
                file.write(b'{"op_code":4,"wor')
            raise full()
        append(self, logs)

    with monkeypatch.context() as patch:
        patch.setattr(JournalFileBackend, "append_logs", append_logs)
        with pytest.raises(Mistake, match=r"journal cannot be written: No space left on device; make room, and the"):
            searched(tmp_path, bowl, trials=6)
    _, asked = searched(tmp_path, bowl, trials=6)
    assert 0 < len(asked) < 6
