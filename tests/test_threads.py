"""Nothing that K-FAC does is process-wide: threads train as they would alone."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small import data, mlp
from stateful import (
    FORMS,
    optimizer_of,
    step,
    trained,
)
from torch import Tensor, nn

from kfac_triton.capture import patches

# ------------------------------------------------------------------------------------------------------------- threads


@pytest.fixture
def eager_switches() -> Iterator[None]:
    """Threads take turns after few instructions."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(6, 2, batch_first=True), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x[:, None], x[:, None], x[:, None], need_weights=False)[0][:, 0])


def built(kind: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    if kind == "mlp":
        return mlp(seed=seed, h=32)
    return Attention() if kind == "attention" else nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.5), nn.Linear(16, 3))


@pytest.mark.parametrize("kind", ["mlp", "attention"])
@pytest.mark.parametrize("form", FORMS)
def test_threads_train_as_they_would_alone(form, kind, eager_switches):
    expected = [trained(form, i, built(kind, i)) for i in range(3)]
    models, results = [built(kind, i) for i in range(3)], {}

    def work(i: int) -> None:
        results[i] = trained(form, i, models[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for i in range(3):
        assert all(torch.equal(a, b) for a, b in zip(results[i], expected[i], strict=True))


@pytest.mark.parametrize("form", FORMS)
def test_threads_with_dropout_all_arrive(form, eager_switches):
    models, arrived = [built("dropout", i) for i in range(3)], []

    def work(i: int) -> None:
        arrived.append(all(p.isfinite().all() for p in trained(form, i, models[i], steps=8)))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert arrived == [True] * 3


def test_with_a_process_wide_stance_threads_exclude_each_other(monkeypatch, eager_switches):
    """As before torch 2.14: afterwards the compiler has its own stance again, whoever left first."""
    frames = pytest.importorskip("torch._dynamo.eval_frame")
    monkeypatch.delattr(frames, "_use_eager_on_nested_compile", raising=False)
    models = [built("mlp", i) for i in range(3)]
    threads = [threading.Thread(target=trained, args=("plain", i, models[i])) for i in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert frames._stance.stance == "default"


PATCHED = [
    (torch.autograd, "backward"), (torch.optim.Optimizer, "zero_grad"), (nn.Module, "zero_grad"),
    (torch.utils.checkpoint.CheckpointFunction, "apply"), (F, "has_torch_function"),
]  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_a_thread_that_fails_harms_no_later_optimizer(form):
    """In K-FAC's own pass, with torch's functions exchanged for this thread."""

    class Failing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.drop = nn.Linear(6, 3), nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            z = self.drop(self.layer(x))
            if patches.own_pass_running():
                raise ZeroDivisionError("in K-FAC's own pass")
            return z

    def names() -> list[Any]:
        return [vars(owner).get(name) for owner, name in PATCHED]

    before, failed, x, y = names(), [], *data()
    expected = trained(form, 0, built("mlp", 0))

    def work() -> None:
        model = Failing()
        try:
            step(form, optimizer_of(form, model), model, x, y)
        except ZeroDivisionError as error:
            failed.append(error)
        assert not patches.own_pass_running()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert len(failed) == 1 and names() == before
    assert all(torch.equal(a, b) for a, b in zip(trained(form, 0, built("mlp", 0)), expected, strict=True))


def test_other_threads_see_nothing_of_k_facs_own_pass():
    """Compiled code stays compiled there, attention has its kernels, and checkpoints and backward passes work."""
    graphs: list[int] = []

    def backend(graph: Any, examples: Any) -> Callable[..., Any]:
        graphs.append(0)

        def run(*args: Any) -> Any:
            graphs[0] += 1
            return graph(*args)

        return run

    @torch.compile(backend=backend)
    def compiled(x: Tensor) -> Tensor:
        return 2 * x

    seen: list[Any] = []

    def look() -> None:
        compiled(torch.ones(()))
        w = torch.ones(3, requires_grad=True)
        torch.utils.checkpoint.checkpoint(torch.square, w, use_reentrant=True).sum().backward()
        kernels = torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled()
        seen.append((graphs[0], w.grad.tolist(), kernels, patches.own_pass_running()))

    class Looking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            if patches.own_pass_running():
                thread = threading.Thread(target=look)
                thread.start()
                thread.join()
            return self.layer(x)

    compiled(torch.ones(()))
    x, y = data()
    model = Looking()
    step("plain", optimizer_of("plain", model), model, x, y)
    step("paper", optimizer_of("paper", model), model, x, y)
    assert len(seen) > 3
    assert seen == [(graphs[0] - len(seen) + 1 + i, [2.0] * 3, (True, True), False) for i in range(len(seen))]


def test_draws_of_other_threads_are_their_own():
    """A thread that draws from torch's global generator while another thread trains a model that draws nothing."""
    numbers = {}
    for train in (False, True):
        torch.manual_seed(0)
        models = [mlp(seed=i) for i in range(2)]
        optimizers = [optimizer_of(form, model) for form, model in zip(FORMS, models, strict=True)]
        x, y = data()
        torch.manual_seed(7)
        drawn, stop, turns = [], threading.Event(), 0

        def draw(drawn: list[float] = drawn, stop: threading.Event = stop) -> None:
            while not stop.is_set():
                drawn.append(float(torch.rand(())))

        def with_draws(layer: nn.Module, args: Any, drawn: list[float] = drawn) -> None:
            thread = threading.Thread(target=lambda: drawn.append(float(torch.rand(()))))
            thread.start()
            thread.join()

        if train:
            for model in models:
                model[0].register_forward_pre_hook(with_draws)  # in the user's passes and in K-FAC's own
            for _ in range(6):
                for form, model, optimizer in zip(FORMS, models, optimizers, strict=True):
                    step(form, optimizer, model, x, y)
            turns = len(drawn)
        else:
            drawn += [float(torch.rand(())) for _ in range(200)]
        numbers[train] = drawn
        assert not train or 24 < turns <= 200
    assert numbers[True] == numbers[False][: len(numbers[True])]
