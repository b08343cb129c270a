"""The built-in tasks: their networks, their scale, and that a seed fixes them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from kfac_triton import KFAC
from kfac_triton.tuning import datasets, problems, trainer
from kfac_triton.tuning.baselines import apply_schedule, find_entrant, in_force, initial_values
from kfac_triton.tuning.problems import CURVES_WIDTHS, FACES_WIDTHS, MNIST_WIDTHS, autoencoder, find_task
from kfac_triton.tuning.space import SPACES
from kfac_triton.tuning.trainer import GROWN, GROWN_AT, Budget, endless, grown, train, train_step


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small wait for threads longer than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def few_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """CURVES with 600 + 100 images, so that no test pays for 30,000."""
    monkeypatch.setattr(problems, "load_curves", lambda: datasets.load_curves(600, 100))


def linears(model: nn.Module) -> list[nn.Linear]:
    return [layer for layer in model.modules() if isinstance(layer, nn.Linear)]


@pytest.mark.parametrize("widths", [CURVES_WIDTHS, MNIST_WIDTHS, FACES_WIDTHS])
def test_an_autoencoder_is_mirrored_with_a_linear_code(widths: tuple[int, ...]) -> None:
    model = autoencoder(widths)
    sizes = [layer.in_features for layer in linears(model)] + [linears(model)[-1].out_features]
    assert sizes == [*widths, *reversed(widths[:-1])]
    layers = list(model)
    code = 2 * (len(widths) - 2)
    assert layers[code].out_features == widths[-1]
    assert isinstance(layers[code + 1], nn.Linear) and isinstance(layers[-1], nn.Linear)
    assert sum(isinstance(layer, nn.Sigmoid) for layer in layers) == len(sizes) - 3


def test_the_initial_weights_are_sparse_and_fixed_by_the_seed() -> None:
    def initial(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return linears(autoencoder(CURVES_WIDTHS))[1].weight.detach()

    weight = initial(3)
    assert (weight != 0).sum(1).tolist() == [15] * 200
    assert float(weight[weight != 0].std()) == pytest.approx(1.0, abs=0.05)
    assert torch.equal(weight, initial(3)) and not torch.equal(weight, initial(4))


def test_the_loss_is_the_bernoulli_nll_of_an_example(few_curves: None) -> None:
    task = find_task("curves")
    outputs, targets = torch.randn(5, 784, dtype=torch.float64), torch.rand(5, 784, dtype=torch.float64)
    p = outputs.sigmoid()
    nll = -(targets * p.log() + (1 - targets) * (1 - p).log()).sum(1)
    assert float(task.loss(outputs, targets)) == pytest.approx(float(nll.mean()), rel=1e-12)


def test_faces_have_linear_outputs_and_the_gaussian_nll(monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = torch.randn(30, 625)
    none = torch.zeros(0, dtype=torch.int64)
    drawn = datasets.Dataset(pictures[:20], pictures[20:], none, none, {"name": "faces"})
    monkeypatch.setattr(problems, "load_faces", lambda data: drawn)
    task = find_task("faces")
    outputs = torch.randn(20, 625)
    assert task.likelihood == "gaussian" and task.evaluate is not None and task.test is not None
    expected = 0.5 * (outputs - pictures[:20]).square().sum(1).mean()
    assert float(task.loss(outputs, pictures[:20])) == pytest.approx(float(expected), rel=1e-6)
    shift = nn.Module()
    shift.forward = lambda x: x + 0.1  # type: ignore[method-assign]
    assert task.evaluate(shift) == pytest.approx(6.25, rel=1e-4) == task.test(shift)


def test_the_momentum_of_sutskever() -> None:
    """1/2 in the first 250 updates, 3/4 in the next, then 5/6, 7/8, ... and never above its end."""
    weight = nn.Parameter(torch.ones(1))
    optimizer = find_entrant("nesterov").build(
        nn.ParameterList([weight]), find_task("digits"), {"lr": 0.0, "mu_max": 0.8}, False
    )
    weight.grad = torch.ones(1)
    used = []
    for _ in range(1001):
        optimizer.step()
        used.append(optimizer.param_groups[0]["momentum"])
    assert [used[k] for k in (0, 249, 250, 499, 500, 1000)] == [0.5, 0.5, 0.75, 0.75, 0.8, 0.8]
    plain = find_entrant("nesterov").build(
        nn.ParameterList([weight]), find_task("digits"), {"lr": 0.1, "mu_max": 0.0}, False
    )
    plain.step()
    plain.step()
    assert float(weight) == pytest.approx(0.8)


def test_batches_grow() -> None:
    """One of the task's batches at first, 40 from the 500th step on; none is left out and none comes twice."""
    stream = ((torch.tensor([i]), {"target": torch.tensor([i, i])}) for i in itertools.count())
    batches = list(itertools.islice(grown(stream), GROWN_AT + 1))
    sizes = [len(inputs) for inputs, _ in batches]
    assert sizes[:90] == [1] * 90 and sizes[-2:] == [GROWN, GROWN] and sizes == sorted(sizes)
    assert torch.equal(torch.cat([inputs for inputs, _ in batches]), torch.arange(sum(sizes)))
    assert all(len(targets["target"]) == 2 * len(inputs) for inputs, targets in batches)


def test_a_growing_run_trains_on_fewer_and_larger_batches(few_curves: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "GROWN", 3)
    monkeypatch.setattr(trainer, "GROWN_AT", 3)
    seen: list[int] = []
    task = find_task("curves")

    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        seen.append(len(outputs))
        return task.loss(outputs, targets)

    entrant = replace(find_entrant("adamw-default"), growing=True)
    train(replace(task, loss=loss, evaluate=lambda model: 1.0), entrant, {}, 1, Budget(1.0, 1, held_out=False))
    assert seen[0] == 512 and max(seen) == 3 * 512
    assert not find_entrant("kfac-paper").growing and find_entrant("kfac-growing").growing


def test_the_metric_is_the_squared_error_of_an_image(few_curves: None) -> None:
    task = find_task("curves")
    images = datasets.load_curves(600, 100)
    assert task.evaluate is not None and task.test is not None

    class Grey(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.zeros_like(x)

    expected = ((images.train.double() - 0.5) ** 2).sum(1).mean()
    assert task.evaluate(Grey()) == pytest.approx(float(expected), rel=1e-5)
    held_out = ((images.test.double() - 0.5) ** 2).sum(1).mean()
    assert task.test(Grey()) == pytest.approx(float(held_out), rel=1e-5)


def test_batches_are_fixed_by_the_seed_and_cover_an_epoch(few_curves: None) -> None:
    inputs = torch.arange(10.0)[:, None]
    batches = problems.shuffled(inputs, inputs, 4)

    def first(seed: int, count: int) -> list[list[float]]:
        stream = batches(seed)
        return [next(stream)[0].flatten().tolist() for _ in range(count)]

    assert first(1, 6) == first(1, 6) != first(2, 6)
    two = np.concatenate(first(1, 2))
    assert len(set(two)) == 8  # no row twice within an epoch
    targets = next(batches(1))
    assert targets[0] is targets[1]


@pytest.mark.parametrize("name", ["digits", "digits-autoencoder"])
def test_a_digits_task_trains(name: str) -> None:
    pytest.importorskip("sklearn")
    task = find_task(name)
    torch.manual_seed(0)
    model = task.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    assert task.evaluate is not None
    with torch.no_grad():
        before = task.evaluate(model)
    for _, (inputs, targets) in zip(range(30), task.batches(0), strict=False):
        optimizer.zero_grad()
        task.loss(model(inputs), targets).backward()
        optimizer.step()
    with torch.no_grad():
        assert task.evaluate(model) < 0.5 * before
    assert task.data[0]["digest"] and task.data[0]["size"] == "1438 + 359"


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(s, marks=pytest.mark.slow) for s in (2, 3, 4))])
def test_bare_defaults_beat_untuned_sgd_on_the_digits_autoencoder(seed: int) -> None:
    """Step for step, and by far: without the trust region of the defaults they stall beside SGD at the mean image."""
    pytest.importorskip("sklearn")
    task = find_task("digits-autoencoder")
    assert task.evaluate is not None
    ends = {}
    for name in ("sgd-default", "kfac-default"):
        torch.manual_seed(seed)
        model = task.model()
        optimizer = find_entrant(name).build(model, task, {}, False)
        with torch.no_grad():
            begin = task.evaluate(model)
        for _, (inputs, targets) in zip(range(250), task.batches(seed), strict=False):
            optimizer.zero_grad()
            task.loss(model(inputs), targets).backward()
            optimizer.step()
        with torch.no_grad():
            ends[name] = task.evaluate(model)
        assert ends[name] < begin
    assert ends["kfac-default"] < 0.6 * ends["sgd-default"]


@pytest.mark.parametrize("seed", range(3))
def test_the_papers_optimizer_needs_no_setting_on_the_digits_autoencoder(seed: int) -> None:
    """A hundred steps, through the trainer: at most half of the error that AdamW's first setting leaves."""
    pytest.importorskip("sklearn")
    task = find_task("digits-autoencoder")
    assert task.evaluate is not None
    ends = {}
    for name, hyper in (("adamw", SPACES["adamw"].first), ("kfac-paper", {})):
        torch.manual_seed(seed)
        model, batches = task.model(), endless(task, seed)
        optimizer = find_entrant(name).build(model, task, hyper, False)
        initial = initial_values(optimizer)
        for _ in range(100):
            apply_schedule(optimizer, initial, {}, 0.5)
            train_step(task, model, optimizer, batches, torch.device("cpu"))
        with torch.no_grad():
            ends[name] = task.evaluate(model)
    assert optimizer.param_groups[0]["damping"] < 150.0  # its own, which no schedule touches
    assert ends["kfac-paper"] < 0.5 * ends["adamw"]


def test_the_convolutional_task_takes_rows_of_pixels_and_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    images = datasets._generated_fashion.__wrapped__(1024, 64)
    monkeypatch.setattr(problems, "load_fashion", lambda folder: images)
    task = problems.find_task("fashion-cnn")
    torch.manual_seed(0)
    model = task.model()
    with KFAC(model, likelihood=task.likelihood, lr="adaptive", momentum="adaptive", compile=False) as optimizer:
        assert set(optimizer.coverage().values()) <= {"conv", "linear"}
        before, batches = task.evaluate(model), task.batches(0)
        for _ in range(8):
            optimizer.zero_grad()
            inputs, targets = next(batches)
            task.loss(model(inputs), targets).backward()
            optimizer.step()
    assert task.evaluate(model) < 0.8 * before


def test_hyper_parameters_in_force_are_what_was_chosen_and_the_defaults_but_no_counters() -> None:
    task = find_task("digits-autoencoder")
    found = in_force(find_entrant("kfac").build(task.model(), task, {"lr": 0.25}, False))
    assert found["lr"] == 0.25 and found["momentum"] == 0.9 and found["approximation"] == "kronecker"
    assert not found.keys() & {"params", "step", "terms_per_example", "peak_lr"}
