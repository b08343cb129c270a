"""Compiled models, whose graphs must stay whole and whose factors must be the eager ones; and the compiled step."""

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
from kfac_triton import compiled as compiled_step

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


# --------------------------------------------------------------------------------------------------- the compiled step


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> CompileCounterWithBackend:
    """torch.compile as the step calls it, with a backend that counts the graphs and needs no C++ compiler."""
    counter = CompileCounterWithBackend("aot_eager")
    real: Callable = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, **options: real(*args, **{**options, "backend": counter}))
    from torch._inductor import cpp_builder

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", lambda: "c++")
    return counter


HYPER = {"weight_decay": 0.1, "kl_clip": 1e-2, "fallback_lr": 1e-2}


def test_the_compiled_step_equals_the_eager_one(counter):
    expected = eager_run(**HYPER)
    actual = eager_run(**HYPER, compile=True)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-7)
    # The first step has no momentum to read yet; every step is the same graph.
    assert counter.frame_count == 1


def test_compilation_is_timed(counter):
    model = network()
    optimizer = kfac(model, compile=True)
    assert optimizer.compile_seconds == 0.0
    train(model, optimizer, 1)
    first = optimizer.compile_seconds
    assert first > 0.0
    train(model, optimizer, 3)
    assert optimizer.compile_seconds == first


@pytest.mark.parametrize("tensor", [False, True])
def test_changing_hyper_parameters_never_recompiles(counter, tensor):
    model, reference = network(), network()
    lr = torch.tensor(0.05) if tensor else 0.05
    optimizers = [kfac(model, compile=True, **HYPER, lr=lr), kfac(reference, **HYPER, lr=copy.deepcopy(lr))]
    for optimizer, net in zip(optimizers, (model, reference), strict=True):
        train(net, optimizer, 1)
    for step in range(1, 6):
        for optimizer, net in zip(optimizers, (model, reference), strict=True):
            group = optimizer.param_groups[0]
            group["lr"] = lr * 0.9**step if tensor else 0.05 * 0.9**step
            group["momentum"] = 0.9 - 0.01 * step
            group["damping"] = 0.1 / step
            group["weight_decay"] = 0.1 / step
            group["kl_clip"] = 1e-2 * step
            group["kl_annealing"] = step > 2
            with torch._dynamo.config.patch(error_on_recompile=True):
                train(net, optimizer, 1)
    assert counter.frame_count == 1
    torch.testing.assert_close(model.state_dict(), reference.state_dict(), rtol=1e-4, atol=1e-6)


def test_a_schedule_never_recompiles(counter):
    model = network()
    optimizer = kfac(model, compile=True)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=6)
    train(model, optimizer, 1)
    for _ in range(5):
        scheduler.step()
        with torch._dynamo.config.patch(error_on_recompile=True):
            train(model, optimizer, 1)
    assert counter.frame_count == 1


def test_many_optimizers_in_one_process_each_compile(counter, caplog):
    """torch gives up on a function after eight recompilations; every optimizer's step is a function of its own."""
    count = torch._dynamo.config.recompile_limit + 3
    for width in range(1, count + 1):
        torch.manual_seed(0)
        model = nn.Linear(6, width + 2)
        optimizer = kfac(model, compile=True)
        model(data()[0]).square().mean().backward()
        optimizer.step()
    assert counter.frame_count == count
    assert not [record for record in caplog.records if record.name == "kfac_triton"]


def test_ever_new_sets_of_gradients_end_in_eager_steps(counter, caplog, monkeypatch):
    """Experts and skipped layers make a graph of every set of parameters with a gradient."""
    monkeypatch.setattr(compiled_step, "MAX_GRAPHS", 2)
    models = network(), network()
    optimizers = [
        kfac(model, compile=compile, inverse_interval=1) for model, compile in zip(models, (True, False), strict=True)
    ]
    with caplog.at_level(logging.WARNING, "kfac_triton"):
        for first, last in ((0, 0), (0, 2), (2, 4), (0, 2), (2, 4)):
            for model, optimizer in zip(models, optimizers, strict=True):
                optimizer.zero_grad()
                F.cross_entropy(model(data()[0]), data()[1]).backward()
                for p in list(model.parameters())[first:last]:
                    p.grad = None
                optimizer.step()
    torch.testing.assert_close(models[0].state_dict(), models[1].state_dict(), rtol=1e-5, atol=1e-7)
    assert counter.frame_count == 2
    assert (
        [message for message in caplog.messages if "for other sets it runs eagerly" in message]
        == caplog.messages[:1]
        != []
    )


def test_a_skipped_step_of_a_compiled_optimizer(counter):
    """GradScaler's inf: the gate stands outside the graph on a CPU, and the scale inside it."""
    runs, graphs = [], []
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
            graphs.append(counter.frame_count)
        assert optimizer.param_groups[0]["step"] == 3
        runs.append(model.state_dict())
    torch.testing.assert_close(runs[1], runs[0], rtol=1e-5, atol=1e-7)
    # The first call may hand its graph to the backend twice, when dynamo restarts to make scalars tensors.
    assert graphs[:4] == [0] * 4 and len(set(graphs[4:])) == 1


@pytest.mark.slow
def test_inductor_compiles_the_step():
    expected = eager_run(**HYPER)
    actual = eager_run(**HYPER, compile=True)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


# ----------------------------------------------------------------------------------------- machines that can't compile


def warned_run(caplog) -> tuple[tuple[dict, dict], list[str]]:
    caplog.clear()
    with caplog.at_level(logging.WARNING, "kfac_triton"):
        result = eager_run(compile=True, **HYPER)
    return result, [record.message for record in caplog.records if record.name == "kfac_triton"]


def test_without_a_cpp_compiler_one_warning_and_eager_steps(monkeypatch, caplog):
    from torch._inductor import cpp_builder, exc

    def absent() -> str:
        raise exc.InvalidCxxCompiler

    expected = eager_run(**HYPER)
    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", absent)
    result, messages = warned_run(caplog)
    torch.testing.assert_close(result, expected, rtol=0, atol=0)
    assert len(messages) == 1 and "no C++ compiler" in messages[0] and "compile=False" in messages[0]


def test_with_compilation_disabled_one_warning_and_eager_steps(monkeypatch, caplog):
    expected = eager_run(**HYPER)
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
    result, messages = warned_run(caplog)
    torch.testing.assert_close(result, expected, rtol=0, atol=0)
    assert len(messages) == 1 and "TORCH_COMPILE_DISABLE" in messages[0]


def test_a_compiler_that_fails_halfway(monkeypatch, caplog):
    """Whatever goes wrong inside the backend: one warning with its reason, and the step happens once, eagerly."""
    real: Callable = torch.compile

    def broken(*_):
        raise RuntimeError("the linker has gone on strike")

    from torch._inductor import cpp_builder

    expected = eager_run(**HYPER)
    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", lambda: "c++")
    monkeypatch.setattr(torch, "compile", lambda *args, **options: real(*args, **{**options, "backend": broken}))
    result, messages = warned_run(caplog)
    torch.testing.assert_close(result, expected, rtol=0, atol=0)
    assert len(messages) == 1 and "gone on strike" in messages[0]


SCRIPT = """
    import logging, sys
    import torch
    from kfac_triton import KFAC
    logging.basicConfig(stream=sys.stdout, format="LOG %(levelname)s %(message)s")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
    optimizer = KFAC(model, likelihood="categorical")
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
    warnings = [line for line in lines if line.startswith("LOG") and "KFAC" in line]
    assert len(warnings) == 1 and "runs eagerly" in warnings[0], done.stdout
    assert lines[-1] == "STEPS 3"
