"""How often a step makes the host wait for a GPU, counted on a CPU that is served as one.

A wait is, inside `step()` and through torch's Python functions or its dispatcher:

- a number that Python reads: item, tolist, numpy, cpu, bool, int, float, or an index of a tensor;
- an operator that `kfac_triton.benchmarks.counts` takes for one: nonzero, equal, masked_select, unique, a mask as
  index, factorisations that raise, cholesky_inverse, eigh;
- numbers of Python's that torch.tensor or torch.as_tensor puts on a `device`, or a list as index. They are copied from
  memory that is not pinned, which waits for the device unless the copy is `non_blocking`.

A `LateRead` that an earlier step made is none. What one operator of K-FAC's kernels does itself is not counted.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small import data, mlp
from test_device_numbers import Images
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kfac_triton import KFAC
from kfac_triton.benchmarks.counts import waits
from kfac_triton.late import LateRead

READS = {"item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "__array__", "__contains__"}
MAKERS = {"tensor", "as_tensor", "asarray"}


class Waits:
    """Counts waits while `counting()`; `places` says what each was, and where in K-FAC's code."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.places: list[str] = []
        self.late = self.step = 0
        self._reads_late = False
        begin, values = LateRead.__init__, LateRead.values

        def noted_begin(read: LateRead, t: Tensor) -> None:
            read.made_in = self.step  # type: ignore[attr-defined]
            begin(read, t)

        def noted_values(read: LateRead) -> Any:
            self._reads_late = read.made_in < self.step  # type: ignore[attr-defined]
            self.late += self._reads_late
            found = values(read)
            self._reads_late = False
            return found

        monkeypatch.setattr(LateRead, "__init__", noted_begin)
        monkeypatch.setattr(LateRead, "values", noted_values)

    def note(self, what: str) -> None:
        if not self._reads_late:
            frames = [f for f in traceback.extract_stack() if "/kfac_triton/" in f.filename]
            self.places.append(f"{what} in {frames[-1].filename}:{frames[-1].lineno}" if frames else what)

    @contextmanager
    def counting(self) -> Iterator[None]:
        self.places, self.late = [], 0
        self.step += 1
        with _Functions(self), _Dispatched(self):
            yield


class _Functions(TorchFunctionMode):
    def __init__(self, counter: Waits) -> None:
        super().__init__()
        self._counter = counter

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if name in READS:
            self._counter.note(name)
        elif name in MAKERS and not isinstance(args[0], Tensor) and (kwargs.get("device") is not None or _holds(args)):
            self._counter.note(f"{name} on a device")
        elif name in ("__getitem__", "__setitem__"):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any([isinstance(i, list) or (isinstance(i, Tensor) and i.dtype == torch.bool) for i in index]):
                self._counter.note(f"{name} with a list or a mask")
        with _not_within(self._counter, name in READS):
            return func(*args, **kwargs)


def _holds(args: Any) -> bool:
    """Whether there are tensors in what a tensor is made of; each is read."""
    return any([isinstance(leaf, Tensor) for leaf in tree_leaves(args)])


class _Dispatched(TorchDispatchMode):
    def __init__(self, counter: Waits) -> None:
        super().__init__()
        self._counter = counter

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "kfac_triton":
            with torch._C.DisableTorchFunction():
                return func(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        if waits(func, args, kwargs or {}, result):
            self._counter.note(str(func))
        return result


@contextmanager
def _not_within(counter: Waits, counted: bool) -> Iterator[None]:
    """What a counted function dispatches is no wait of its own."""
    before, counter._reads_late = counter._reads_late, counter._reads_late or counted
    yield
    counter._reads_late = before


PLAIN: dict[str, dict[str, Any]] = {
    "momentum": {},
    "no momentum": {"momentum": 0.0},
    "no bound": {"kl_clip": None},
    "weight decay and annealing": {"weight_decay": 1e-2, "kl_annealing": True},
    "groups": {},
    "exact": {"fisher": "exact"},
    "mask": {"mask": lambda inputs, outputs: inputs[:, 0] > 0},
    "whole batches": {"factor_fraction": 1.0},
    "GradScaler": {},
    "inverse_free": {"approximation": "inverse_free"},
    "schedule": {},
}
# at most so many in a step with factors due, and in one with inverses due besides, by layer
OTHERS: dict[str, tuple[dict[str, Any], int, int]] = {
    # of each side: whether it is finite, before a library that reads itself whether it converged; and once whether
    # there are eigenvalues to carry over
    "eigen": ({"approximation": "eigen"}, 0, 5),
    # a pair of factors of which one is no dense matrix is inverted by itself: whether a side has a factorisation, what
    # torch.cholesky_inverse reads, and whether the inverse is finite
    "diagonals": ({"max_factor_dim": 3}, 0, 6),
    # of both sides of the link between two layers: whether each has a factorisation, eigenvalues, and a basis
    "tridiagonal": ({"approximation": "tridiagonal"}, 0, 3),
    # compiled code does not tell the host which taps it passed
    "empirical": ({"fisher": "empirical"}, 1, 0),
}
INTERVALS = {"factor_interval": 2, "inverse_interval": 6}
WARM = 18  # steps, from which inverses are due at multiples of 6 only


class Training:
    """A model and its optimizer after `WARM` steps: the next steps have inverses and factors due, nothing, factors."""

    def __init__(self, make: type, counter: Waits, name: str, options: dict[str, Any]) -> None:
        torch.manual_seed(0)
        self.model: nn.Module = make()
        self.x, self.y = data()
        groups = [
            {"params": [p for p in self.model.parameters() if (p.dim() > 1) == wide], "lr": lr}
            for wide, lr in ((True, 0.1), (False, 0.03))
        ]
        options = {"likelihood": "categorical", "compile": False, **INTERVALS, "lr": 0.1, **options}
        self.optimizer = KFAC(self.model, groups if name == "groups" else None, **options)
        self.counter, self.name = counter, name
        for _ in range(WARM):
            self.places()

    def places(self) -> list[str]:
        """The waits of the next step."""
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(self.x), self.y).backward()
        if self.name == "GradScaler":  # what scaler.step(optimizer) sets
            self.optimizer.grad_scale, self.optimizer.found_inf = torch.tensor(1.0), torch.tensor(0.0)
        if self.name == "schedule":
            self.optimizer.param_groups[0]["lr"] *= 0.99
        with self.counter.counting():
            self.optimizer.step()
        return self.counter.places


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch, as_on_a_device: None) -> Waits:
    return Waits(monkeypatch)


@pytest.mark.parametrize("make", [mlp, Images])
@pytest.mark.parametrize("name", PLAIN)
def test_a_plain_step_waits_for_nothing(name, make, counter):
    if name == "mask" and make is Images:
        pytest.skip("of both, the first will do")
    run = Training(make, counter, name, PLAIN[name])
    before = [p.detach().clone() for p in run.model.parameters()]
    for due in ("inverses and factors", "nothing", "factors"):
        assert run.places() == [], due
        assert counter.late == (1 if due == "nothing" else 2), "the step before was taken; the update before was good"
    assert not any(map(torch.equal, before, run.model.parameters()))


@pytest.mark.parametrize("make", [mlp, Images])
@pytest.mark.parametrize("name", OTHERS)
def test_what_waits_besides(name, make, counter):
    if name == "tridiagonal" and make is Images:
        pytest.skip("its layers are no chain")
    options, with_factors, with_inverses = OTHERS[name]
    run = Training(make, counter, name, options)
    layers = len(run.optimizer.factors())
    inverses, nothing, factors = (list(run.places()) for _ in range(3))
    assert nothing == []
    assert len(factors) <= with_factors, factors
    assert len(inverses) <= with_factors + with_inverses * layers, inverses


@pytest.mark.parametrize("name", ["momentum", "no momentum", "no bound", "groups", "GradScaler"])
def test_a_plain_step_with_kernels_waits_for_nothing(name, interpreter, monkeypatch, counter):
    monkeypatch.setenv("KFAC_TRITON_BACKEND", "triton")
    monkeypatch.setattr("kfac_triton.ops.iterates", lambda device: False)  # which a GPU does not
    run = Training(mlp, counter, name, PLAIN[name])
    for _ in range(3):
        assert run.places() == []


def test_each_kind_of_wait_is_counted(counter):
    """One of each, so that no step passes for want of a look."""
    t, mask = torch.arange(3.0), torch.tensor([True, False, True])
    kinds = {
        "item": t[0].item, "tolist": t.tolist, "numpy": t.numpy, "cpu": t.cpu, "bool": lambda: bool(t[0]),
        "float": lambda: float(t[0]), "int": lambda: int(t[0]), "nonzero": t.nonzero, "equal": lambda: t.equal(t),
        "mask": lambda: t[mask], "list": lambda: t[[0, 2]], "masked_select": lambda: t.masked_select(mask),
        "tensor": lambda: torch.tensor([1.0], device=t.device), "of tensors": lambda: torch.as_tensor([t[0], t[1]]),
        "cholesky": lambda: torch.linalg.cholesky(torch.eye(2)), "eigh": lambda: torch.linalg.eigh(torch.eye(2)),
        "in this step": lambda: LateRead(t).values(),
    }  # fmt: skip
    for kind, wait in kinds.items():
        with counter.counting():
            wait()
        assert counter.places, kind
    with counter.counting():
        read = LateRead(t)
        torch.linalg.cholesky_ex(torch.eye(2))
        t[torch.tensor([0, 2])] + torch.tensor([1.0]).to(t.device, non_blocking=True)
    assert counter.places == []
    with counter.counting():
        read.values()
    assert counter.places == [] and counter.late == 1
