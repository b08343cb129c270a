"""Compiled models, whose graphs must stay whole and whose factors must be the eager ones; and K-FAC's own graphs."""

from __future__ import annotations

import copy
import logging
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from kfac_triton import KFAC

# "exact" differs from "mc" in K-FAC's own pass alone, which is never compiled.
FISHERS = ["mc", "empirical"]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Tanh()),
        nn.Sequential(nn.Linear(5, 4), nn.ReLU(inplace=True)),
        nn.Linear(4, 3),
    )


def data(seed: int = 1, n: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 6, generator=generator), torch.randint(3, (n,), generator=generator)


def kfac(model: nn.Module, **options) -> KFAC:
    defaults = {"likelihood": "categorical", "factor_fraction": 1.0, "lr": 0.05, "damping": 0.1, "compile": False}
    return KFAC(model, **{**defaults, **options})


def train(model: nn.Module, optimizer: KFAC, steps: int = 4, start: int = 0) -> None:
    for step in range(start, steps):
        x, y = data(step)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def eager_run(**options) -> tuple[dict, dict]:
    model = network()
    optimizer = kfac(model, **options)
    train(model, optimizer)
    return optimizer.factors(), model.state_dict()


def renamed(tensors: dict) -> dict:
    """Without what torch.compile adds to the names of the modules inside."""
    return {name.replace("_orig_mod.", "").replace("._orig_mod", ""): value for name, value in tensors.items()}


def graphs() -> int:
    """Compiled graphs; torch may call a backend more than once for the same one, so a backend's counter tells less."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def graphs_of_the_first_step(model: nn.Module, optimizer: KFAC) -> int:
    """Runs four steps."""
    train(model, optimizer, 1)
    first = graphs()
    train(model, optimizer, 4, start=1)
    return first


def graph_breaks() -> int:
    return sum(torch._dynamo.utils.counters["graph_break"].values())


# ----------------------------------------------------------------------------------------------------- compiled models


@pytest.mark.parametrize("order", ["compiled, then KFAC", "KFAC, then compiled", "in place"])
@pytest.mark.parametrize("fisher", FISHERS)
def test_a_compiled_model_is_one_graph_with_the_eager_factors(fisher, order):
    factors, weights = eager_run(fisher=fisher)
    model = network()
    if order == "compiled, then KFAC":
        called = torch.compile(model, fullgraph=True, backend="aot_eager")
        optimizer = kfac(called, fisher=fisher)
    elif order == "in place":
        model.compile(fullgraph=True, backend="aot_eager")
        called = model
        optimizer = kfac(model, fisher=fisher)
    else:
        optimizer = kfac(model, fisher=fisher)
        called = torch.compile(model, fullgraph=True, backend="aot_eager")
    first = graphs_of_the_first_step(called, optimizer)
    torch.testing.assert_close(optimizer.factors(), factors, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(model.state_dict(), weights, rtol=1e-5, atol=1e-7)
    # One graph over four steps: no break, no recompilation, and none for K-FAC's own passes.
    assert first == graphs() == 1
    assert graph_breaks() == 0


@pytest.mark.parametrize("how", ["wrapped", "in place"])
@pytest.mark.parametrize("fisher", FISHERS)
def test_blocks_compiled_one_by_one(fisher, how):
    factors, weights = eager_run(fisher=fisher)
    model = network()
    for i in range(2):
        if how == "wrapped":
            model[i] = torch.compile(model[i], fullgraph=True, backend="aot_eager")
        else:
            model[i].compile(fullgraph=True, backend="aot_eager")
    optimizer = kfac(model, fisher=fisher)
    first = graphs_of_the_first_step(model, optimizer)
    torch.testing.assert_close(renamed(optimizer.factors()), factors, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(renamed(model.state_dict()), dict(weights), rtol=1e-5, atol=1e-7)
    assert first == graphs() == 2
    assert graph_breaks() == 0


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@pytest.mark.parametrize("passes", ["one by one", "before one backward"])
def test_accumulation_in_a_compiled_model(fisher, passes):
    """Two micro-batches of one size: the factors of both, as in eager mode."""
    x, y = data()

    def factors(compiled: bool) -> dict:
        model = network()
        optimizer = kfac(model, fisher=fisher)
        called = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        losses = []
        for rows in (slice(0, 6), slice(6, 12)):
            loss = F.cross_entropy(called(x[rows]), y[rows]) / 2
            if passes == "one by one":
                loss.backward()
            losses.append(loss)
        if passes == "before one backward":
            sum(losses).backward()
        optimizer.step()
        return optimizer.factors()

    torch.testing.assert_close(factors(True), factors(False), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("fisher", FISHERS)
def test_evaluation_of_a_compiled_model_touches_nothing(fisher):
    runs = []
    for evaluate in (False, True):
        model = network()
        optimizer = kfac(model, fisher=fisher)
        called = torch.compile(model, fullgraph=True, backend="aot_eager") if evaluate else model
        for step in range(2):
            optimizer.zero_grad()
            x, y = data(step)
            F.cross_entropy(called(x), y).backward()
            if evaluate:
                with torch.no_grad():
                    called(3 * x)
                model.eval()
                called(3 * x)
                model.train()
            optimizer.step()
        runs.append((optimizer.factors(), model.state_dict()))
    torch.testing.assert_close(runs[1], runs[0], rtol=1e-5, atol=1e-7)


def test_dropout_and_autocast_in_a_compiled_model():
    """A mask of the user's stream in the graph; float32 factors under bfloat16."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.3), nn.Linear(5, 3))
    optimizer = kfac(model)
    counter = CompileCounterWithBackend("aot_eager")
    called = torch.compile(model, fullgraph=True, backend=counter)
    for step in range(3):
        x, y = data(step)
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = F.cross_entropy(called(x).float(), y)
        loss.backward()
        optimizer.step()
    assert counter.frame_count == 1
    assert {f.dtype for sides in optimizer.factors().values() for f in sides.values()} == {torch.float32}
    # Not float32's own numbers: the pass ran under the autocast that the compiled graph saw.
    a = torch.cat([x, torch.ones(12, 1)], 1)
    assert optimizer.factors()["0"]["A"].shape == (a.T @ a).shape


@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("how", ["wrapped", "in place", "blocks"])
def test_a_model_that_ran_compiled_before_kfac(fisher, how):
    """Compiled code ignores hooks that came after it; KFAC lets it be compiled anew."""
    x, y = data(0)
    reference = network()
    expected = kfac(reference, fisher=fisher)
    train(reference, expected, 1)
    model = network()
    called: nn.Module = model
    if how == "wrapped":
        called = torch.compile(model, backend="aot_eager")
    elif how == "in place":
        model.compile(backend="aot_eager")
    else:
        model[0].compile(backend="aot_eager")
    F.cross_entropy(called(x), y).backward()
    optimizer = kfac(called, fisher=fisher)
    optimizer.zero_grad()
    F.cross_entropy(called(x), y).backward()
    optimizer.step()
    torch.testing.assert_close(renamed(optimizer.factors()), renamed(expected.factors()), rtol=1e-5, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("fisher", ["mc", "empirical"])
def test_inductor_gives_the_eager_factors(fisher):
    factors, weights = eager_run(fisher=fisher)
    model = network()
    called = torch.compile(model, fullgraph=True)
    optimizer = kfac(called, fisher=fisher, compile=True)
    train(called, optimizer)
    torch.testing.assert_close(optimizer.factors(), factors, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(model.state_dict(), weights, rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------------------------------------- graphs of our own


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> CompileCounterWithBackend:
    """torch.compile as K-FAC calls it, with a backend that counts the graphs and needs no C++ compiler."""
    counter = CompileCounterWithBackend("aot_eager")
    real: Callable = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, **options: real(*args, **{**options, "backend": counter}))
    from torch._inductor import cpp_builder

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", lambda: "c++")
    return counter


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "kfac_triton" and r.levelno >= logging.WARNING]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.layer(x).mean(1))


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3, stride=2),
        nn.Flatten(), nn.Linear(16, 3),
    )  # fmt: skip


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (network, (6,)), "cnn": (convolutional, (2, 6, 6)), "transformer": (Attention, (4, 8)),
}  # fmt: skip
HYPER = {"weight_decay": 0.1, "kl_clip": 1e-2, "momentum": 0.8, "fallback_lr": 1e-2}


class Run:
    """One run with a closure; `batches` gives the size of every batch."""

    def __init__(
        self, compile: bool | str, model: Callable[[], nn.Module] = network, shape: tuple[int, ...] = (6,), **options
    ):
        torch.manual_seed(0)
        self.model = model().double()
        self.shape, self.done, self.losses = shape, 0, []
        defaults = {"lr": 0.05, "damping": 0.1, "factor_interval": 2, "inverse_interval": 3, **HYPER}
        self.optimizer = KFAC(self.model, likelihood="categorical", compile=compile, **{**defaults, **options})
        self.scheduler = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.9)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.model(x), y)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def train(
        self,
        steps: int = 7,
        n: int = 12,
        between: Callable[[nn.Module, int], None] | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> Run:
        for _ in range(steps):
            generator = torch.Generator().manual_seed(self.done)
            x = torch.randn(n, *self.shape, generator=generator, dtype=dtype)
            y = torch.randint(3, (n,), generator=generator)
            if between is not None:
                between(self.model, self.done)

            def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
                self.optimizer.zero_grad()
                loss = self.loss(x, y)
                self.backward(loss)
                return loss

            self.losses.append(float(self.optimizer.step(closure).detach()))
            self.scheduler.step()
            self.done += 1
        return self

    def results(self) -> tuple:
        grads = {name: p.grad for name, p in self.model.named_parameters()}
        return self.losses, self.model.state_dict(), self.optimizer.factors(), grads


def assert_same(actual: Run, expected: Run) -> None:
    torch.testing.assert_close(actual.results(), expected.results(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("n", [12, 200])
@pytest.mark.parametrize("compile", [True, "step"])
@pytest.mark.parametrize("name", NETWORKS)
def test_graphs_take_the_steps_of_eager_code(counter, caplog, name, compile, n):
    """Of 200 examples an update takes 64, by a pass of its own; of 12 all, in the closure's own forward pass.

    Schedules never compile anything anew, nor do updates and steps without one.
    """
    make, shape = NETWORKS[name]
    runs = [Run(mode, make, shape).train(n=n) for mode in (False, compile)]
    assert_same(runs[1], runs[0])
    expected = {True: 1, "step": 2 if n == 12 else 3}[compile]
    assert graphs() == expected
    assert runs[1].optimizer.compile_seconds > 0.0
    assert runs[0].optimizer.compile_seconds == 0.0
    with torch._dynamo.config.patch(error_on_recompile=True):
        runs[1].train(4, n=n)
    assert graphs() == expected
    assert not said(caplog)


@pytest.mark.parametrize("compile", ["auto", False])
def test_nothing_is_compiled_unless_asked_for(counter, compile):
    run = Run(compile).train()
    assert run.optimizer.compile_seconds == 0.0
    assert counter.frame_count == 0


def test_compilation_is_timed(counter):
    run = Run("step").train(3)
    first = run.optimizer.compile_seconds
    assert first > 0.0
    assert run.train(4).optimizer.compile_seconds == first


@pytest.mark.parametrize("compile", [True, "step"])
def test_changing_hyper_parameters_never_recompiles(counter, compile):
    runs = [Run(False).train(3), Run(compile).train(3)]
    before = graphs()
    for step in range(1, 5):
        for run in runs:
            group = run.optimizer.param_groups[0]
            group["momentum"] = 0.9 - 0.01 * step
            group["damping"] = 0.1 / step
            group["weight_decay"] = 0.1 / step
            group["kl_clip"] = 1e-2 * step
            group["kl_annealing"] = step > 2
            with torch._dynamo.config.patch(error_on_recompile=True):
                run.train(1)
    assert graphs() == before
    assert_same(runs[1], runs[0])


@pytest.mark.parametrize("compile", [True, "step"])
def test_a_resumed_run_is_the_same_to_the_bit(counter, compile):
    whole = Run(compile).train(3)
    resumed = Run(compile)
    resumed.model.load_state_dict(copy.deepcopy(whole.model.state_dict()))
    resumed.optimizer.load_state_dict(copy.deepcopy(whole.optimizer.state_dict()))
    resumed.scheduler.load_state_dict(whole.scheduler.state_dict())
    resumed.done, resumed.losses = whole.done, list(whole.losses)
    torch.testing.assert_close(resumed.train(4).results(), whole.train(4).results(), rtol=0, atol=0)


class Flagged(nn.Module):
    """`twice` changes what forward computes; `count` is how often it ran, where that is counted."""

    def __init__(self, *, counts: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 5), nn.Linear(5, 3)
        self.twice, self.counts, self.count, self.dropout = False, counts, 0, dropout

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.dropout(torch.tanh(self.first(x)), self.dropout, self.training)
        if self.twice:
            hidden = 2 * hidden
        if self.counts:
            self.count += 1
            hidden = hidden * (2.0 if self.count > 4 else 1.0)
        return self.last(hidden)


@pytest.mark.parametrize("n", [12, 200])
@pytest.mark.parametrize("compile", [True, "step"])
def test_a_flag_in_forward_is_seen(counter, compile, n):
    """What export or make_fx would freeze."""

    def flip(model: nn.Module, step: int) -> None:
        model.twice = step >= 4

    runs = [Run(mode, Flagged).train(10, n=n, between=flip) for mode in (False, compile)]
    assert_same(runs[1], runs[0])


class Noisy(Run):
    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return super().loss(x + torch.randn_like(x), y)


def test_random_numbers_that_come_later_are_the_eager_ones(counter, caplog):
    """A graph would draw others: the step that first draws is eager already."""

    def dropping(model: nn.Module, step: int) -> None:
        model.dropout = 0.3 if step >= 4 else 0.0

    for make, between in ((lambda mode: Run(mode, Flagged), dropping), (Noisy, None)):
        expected, actual = make(False).train(between=between), make("step").train(between=between)
        torch.testing.assert_close(actual.results(), expected.results(), rtol=0, atol=0)
        assert "random" in said(caplog)[-1]


@pytest.mark.parametrize("compile", [True, "step"])
def test_a_parameter_that_is_exchanged_is_followed(counter, caplog, compile):
    def exchange(model: nn.Module, step: int) -> None:
        if step == 4:
            model[2].weight = nn.Parameter(2 * model[2].weight.detach())

    assert_same(Run(compile).train(between=exchange), Run(False).train(between=exchange))
    assert not [message for message in said(caplog) if "runs eagerly" in message]


@pytest.mark.parametrize("compile", [True, "step"])
def test_a_layer_that_is_frozen_later_stays(counter, compile):
    def freeze(model: nn.Module, step: int) -> None:
        model[0][0].requires_grad_(step < 3)

    assert_same(Run(compile).train(10, between=freeze), Run(False).train(10, between=freeze))


@pytest.mark.parametrize("n", [12, 200])
def test_reduced_rows_of_a_graph(counter, n):
    options = {"shape": (4, 8), "weight_sharing": "reduce"}
    runs = [Run(mode, Attention, **options).train(n=n) for mode in (False, "step")]
    assert_same(runs[1], runs[0])


@pytest.mark.parametrize("compile", [True, "step"])
def test_autocast_inside_a_closure(counter, compile):
    class Cast(Run):
        def loss(self, x: Tensor, y: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return F.cross_entropy(self.model(x).float(), y)

    results = []
    for mode in (False, compile):
        run = Cast(mode, shape=(6,))
        run.model.float()
        results.append(run.train(n=200, dtype=torch.float32).results())
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("compile", [True, "step"])
def test_shapes_that_keep_changing_end_in_eager_steps(counter, caplog, compile):
    runs = [Run(False, factor_interval=1), Run(compile, factor_interval=1)]
    for n in (12, 12, 11, 10, 9, 8, 7, 6):
        for run in runs:
            run.train(1, n=n)
    assert_same(runs[1], runs[0])
    assert len(said(caplog)) == 1
    assert "keep changing" in said(caplog)[0]
    assert graphs() == 4


class TwoCalls(Run):
    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return (super().loss(x[:6], y[:6]) + super().loss(x[6:], y[6:])) / 2


class Penalised(Run):
    """A penalty on the weights is none of the model's uses of them."""

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return super().loss(x, y) + 0.1 * sum(p.square().sum() for p in self.model.parameters())


class Clipped(Run):
    def backward(self, loss: Tensor) -> None:
        super().backward(loss)
        nn.utils.clip_grad_norm_(self.model.parameters(), 0.05)


def hooked() -> nn.Module:
    model = network()
    model[2].weight.register_hook(lambda grad: 2 * grad)
    return model


def embedded() -> nn.Module:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.last = nn.Embedding(4, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.table((x[:, 0] > 0).long()))

    return Table()


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        return self.last(2 * hidden if hidden.sum() > 0 else hidden)


REFUSED = {
    "two calls": (lambda mode: TwoCalls(mode), "several calls"),
    "hooks": (lambda mode: Run(mode, hooked), "hooks"),
    "dropout": (lambda mode: Run(mode, lambda: Flagged(dropout=0.3)), "random"),
    "a counter": (lambda mode: Run(mode, lambda: Flagged(counts=True)), "changes the model"),
    "an embedding": (lambda mode: Run(mode, embedded), "do not follow"),
    "a branch on data": (lambda mode: Run(mode, Branching), "Unsupported"),
    "exact": (lambda mode: Run(mode, fisher="exact"), "fisher"),
    "adaptive": (lambda mode: Run(mode, lr="adaptive", kl_clip=None), "adaptive"),
    "empirical": (lambda mode: Run(mode, fisher="empirical"), "empirical"),
    "groups": (lambda mode: grouped(mode), "groups"),
}


def grouped(mode: bool | str) -> Run:
    run = Run(mode)
    run.optimizer.param_groups[0]["params"] = list(run.model[0].parameters())
    rest = [p for part in run.model[1:] for p in part.parameters()]
    run.optimizer.add_param_group({"params": rest, "factor_interval": 3})
    return run


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_graph_can_do_runs_eagerly_after_one_warning(counter, caplog, case):
    make, reason = REFUSED[case]
    expected = make(False).train()
    caplog.clear()
    actual = make("step").train()
    torch.testing.assert_close(actual.results(), expected.results(), rtol=0, atol=0)
    messages = [message for message in said(caplog) if "runs eagerly" in message]
    assert len(messages) == 1
    assert reason in messages[0]


@pytest.mark.parametrize("extra", [Penalised, Clipped])
def test_what_a_closure_does_beside_the_model_is_in_the_graph(counter, caplog, extra):
    assert_same(extra("step").train(), extra(False).train())
    assert graphs() == 2
    assert not said(caplog)


def test_a_closure_that_clears_gradients_otherwise_runs_eagerly(counter, caplog):
    """Without zero_grad nobody can say whether gradients of before are to be added to."""

    def gradients(mode: bool | str) -> list[Tensor]:
        model = network()
        optimizer = kfac(model, compile=mode)
        x, y = data()

        def closure() -> Tensor:
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        for _ in range(3):
            optimizer.step(closure)
        return [p.grad for p in model.parameters()]

    expected = gradients(False)
    torch.testing.assert_close(gradients("step"), expected, rtol=0, atol=0)
    assert "zero_grad" in said(caplog)[0]


def test_gradients_from_before_the_closure_count(counter):
    """A pass outside of the closure, which does not clear them: that step is eager, later ones are not."""
    results = []
    for mode in (False, "step"):
        run = Run(mode).train(3)
        x = torch.ones(4, 6, dtype=torch.float64)
        run.model(x).sum().backward()
        run.train(3)
        results.append(run)
    assert_same(results[1], results[0])


@pytest.mark.parametrize("compile", [True, "step"])
def test_other_compiled_code_is_left_alone(counter, compile):
    """Dynamo's own note of a gradient that was None must not stand for None in the user's graphs."""
    Run(compile).train(4)

    def function(x: Tensor) -> tuple[Tensor, None, list]:
        return x + 1, None, [None, True, False]

    assert torch.compile(function, fullgraph=True)(torch.ones(2))[1:] == (None, [None, True, False])


def test_without_a_closure_the_fisher_pass_alone_is_a_graph(counter):
    results = []
    for mode in (False, "step"):
        model = network()
        optimizer = kfac(model, compile=mode)
        train(model, optimizer)
        results.append((model.state_dict(), optimizer.factors()))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-7)
    assert graphs() == 1


@pytest.mark.parametrize("compile", [True, "step"])
def test_a_compiled_model_compiles_nothing_more(counter, caplog, compile):
    model = network()
    called = torch.compile(model, fullgraph=True)
    optimizer = kfac(called, compile=compile)
    train(called, optimizer)
    expected = eager_run()
    torch.testing.assert_close((optimizer.factors(), model.state_dict()), expected, rtol=1e-5, atol=1e-7)
    assert graphs() == 1


def test_many_optimizers_in_one_process_each_compile(counter, caplog):
    """torch gives up on a function after eight recompilations; every optimizer's is a function of its own."""
    count = torch._dynamo.config.recompile_limit + 3
    for width in range(1, count + 1):
        torch.manual_seed(0)
        model = nn.Linear(6, width + 2)
        optimizer = kfac(model, compile=True)
        for _ in range(2):
            optimizer.zero_grad()
            F.cross_entropy(model(data()[0]), data()[1]).backward()
            optimizer.step()
    assert graphs() == count
    assert not said(caplog)


def test_sets_of_gradients_share_a_graph(counter):
    """Experts and skipped layers: gradients that are missing take their layers out of the update, not out of it."""
    models = network(), network()
    optimizers = [
        kfac(model, compile=mode, inverse_interval=1) for model, mode in zip(models, (True, False), strict=True)
    ]
    for first, last in ((0, 0), (0, 2), (4, 6), (0, 2), (0, 0)):
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            F.cross_entropy(model(data()[0]), data()[1]).backward()
            for p in list(model.parameters())[first:last]:
                p.grad = None
            optimizer.step()
    torch.testing.assert_close(models[0].state_dict(), models[1].state_dict(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(optimizers[0].factors(), optimizers[1].factors(), rtol=1e-5, atol=1e-7)
    assert graphs() == 1


def test_a_skipped_step_of_a_compiled_optimizer(counter):
    """GradScaler's inf."""
    runs = []
    for compile in (False, True):
        model = network()
        optimizer = kfac(model, compile=compile, **HYPER)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
        for step in range(4):
            optimizer.zero_grad()
            x, y = data(step)
            scaler.scale(F.cross_entropy(model(x), y)).backward()
            if step == 2:
                model[2].weight.grad[0, 0] = torch.inf
            scaler.step(optimizer)
            scaler.update()
        assert optimizer.param_groups[0]["step"] == 3
        runs.append(model.state_dict())
    torch.testing.assert_close(runs[1], runs[0], rtol=1e-5, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("compile", [True, "step"])
def test_inductor_takes_the_steps_of_eager_code(compile):
    assert_same(Run(compile).train(), Run(False).train())


# ----------------------------------------------------------------------------------------- machines that can't compile


def warned_run(caplog, compile: bool | str) -> tuple[Run, list[str]]:
    caplog.clear()
    run = Run(compile).train()
    return run, said(caplog)


@pytest.mark.parametrize("compile", [True, "step"])
def test_without_a_cpp_compiler_one_warning_and_eager_steps(monkeypatch, caplog, compile):
    from torch._inductor import cpp_builder, exc

    def absent() -> str:
        raise exc.InvalidCxxCompiler

    expected = Run(False).train()
    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", absent)
    run, messages = warned_run(caplog, compile)
    torch.testing.assert_close(run.results(), expected.results(), rtol=0, atol=0)
    assert len(messages) == 1
    assert "no C++ compiler" in messages[0]


@pytest.mark.parametrize("how", ["environment", "stance"])
@pytest.mark.parametrize("compile", [True, "step"])
def test_with_compilation_disabled_one_warning_and_eager_steps(counter, monkeypatch, caplog, compile, how):
    expected = Run(False).train()
    if how == "environment":
        monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
        run, messages = warned_run(caplog, compile)
    else:
        with torch.compiler.set_stance("force_eager"):
            run, messages = warned_run(caplog, compile)
    torch.testing.assert_close(run.results(), expected.results(), rtol=0, atol=0)
    assert len(messages) == 1
    assert ("TORCH_COMPILE_DISABLE" if how == "environment" else "switched off") in messages[0]


@pytest.mark.parametrize("compile", [True, "step"])
def test_a_compiler_that_fails_halfway(monkeypatch, caplog, compile):
    """Whatever goes wrong inside the backend: one warning with its reason, and the step happens once, eagerly."""
    real: Callable = torch.compile

    def broken(*_):
        raise RuntimeError("the linker has gone on strike")

    from torch._inductor import cpp_builder

    expected = Run(False).train()
    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", lambda: "c++")
    monkeypatch.setattr(torch, "compile", lambda *args, **options: real(*args, **{**options, "backend": broken}))
    run, messages = warned_run(caplog, compile)
    torch.testing.assert_close(run.results(), expected.results(), rtol=0, atol=0)
    assert len(messages) == 1
    assert "gone on strike" in messages[0]


SCRIPT = """
    import logging, sys
    import torch
    from kfac_triton import KFAC
    logging.basicConfig(stream=sys.stdout, format="LOG %(levelname)s %(message)s")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
    optimizer = KFAC(model, likelihood="categorical", compile=True)
    for _ in range(3):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(torch.ones(8, 6)), torch.zeros(8, dtype=torch.long)).backward()
        optimizer.step()
    print("STEPS", optimizer.param_groups[0]["step"])
"""


@pytest.mark.slow
@pytest.mark.parametrize("machine", ["no compiler", "a compiler that fails", "disabled"])
def test_a_process_that_cannot_compile(machine, tmp_path):
    fake = tmp_path / "bin" / "g++"
    fake.parent.mkdir()
    if machine == "a compiler that fails":
        # It answers questions about itself, and compiles nothing.
        fake.write_text(
            '#!/bin/sh\ncase "$1" in --version|-v) echo "g++ 13.0";; *) echo "no space left" >&2; exit 1;; esac\n'
        )
        fake.chmod(0o755)
    environment = {
        "no compiler": {"CXX": "/nonexistent", "PATH": str(fake.parent)},
        "a compiler that fails": {"CXX": str(fake)},
        "disabled": {"TORCH_COMPILE_DISABLE": "1"},
    }[machine]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT)],
        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), **environment},
        capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    warnings = [line for line in lines if line.startswith("LOG WARNING compile has no effect")]
    assert len(warnings) == 1 and "runs eagerly" in warnings[0], done.stdout
    assert lines[-1] == "STEPS 3"
