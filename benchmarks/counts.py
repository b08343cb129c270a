"""What a step costs whatever the clock does: dispatched operators, Python calls, launches and waits, by stage.

A step is run twice, under a dispatch mode and under Python's profiler, since each would count the other.

operators      what torch dispatches below autograd; an operator of this package is one, whatever it does inside
Python calls   "call" events of the profiler: functions, resumed generators and, before Python 3.12, comprehensions;
               of the calling thread, so on a GPU without the backward pass, which runs in a thread of its own
launches       operators with a tensor on the device that compute or copy. Not: views, which the schema or the tag
               "inplace_view" shows, and the few of `NO_LAUNCH`. A composite operator of torch counts as one launch
waits          operators whose result the host needs: those with the tag "data_dependent_output" (`item`, `bool`,
               `equal`) or "dynamic_output_shape" (`nonzero`, `unique`), an index by a mask, those of `READS_INSIDE`,
               and blocking copies from a GPU to the host. On a CPU also `tolist` and `cpu`, which copy nothing there

On a CPU every tensor stands for one on a device, so a read of what always lies on the host counts as well, and the
code takes the branches that it takes on a CPU. Compiled graphs hide their operators: count an eager step.
"""

from __future__ import annotations

import gc
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

COLUMNS = ("operators", "python_calls", "launches", "waits")
OUTSIDE, OTHER = "before step()", "other"

# The stage of an operator or a call: that of the innermost of these on the Python stack, each a module of kfac_triton
# or a function in it; OTHER without one, OUTSIDE below no step().
STAGES = {
    "fisher": "own pass",
    "estimator.update_": "factors",
    "estimator.refresh_": "inverses",
    "steps.quadratic": "quadratic model",
    "steps": "update",
}
ORDER = (OUTSIDE, "own pass", "factors", "inverses", "quadratic model", "update", OTHER)

NO_LAUNCH = {
    "aten::empty", "aten::empty_like", "aten::empty_strided", "aten::empty_permuted", "aten::new_empty",
    "aten::new_empty_strided", "aten::_unsafe_view", "aten::is_same_size", "aten::_local_scalar_dense",
}  # fmt: skip
# ATen reads the status of the factorisation, below what a dispatch mode sees.
READS_INSIDE = {"aten::_linalg_check_errors", "aten::cholesky_inverse", "aten::_linalg_eigh", "aten::_linalg_svd"}
READS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
READING_METHODS = ("tolist", "cpu")
MASKS = (torch.bool, torch.uint8)
HARNESS = (__name__, "kfac_triton.tuning.trainer")  # calls of these are not the step's


@dataclass
class Tally:
    """Counts of a step, a stage of it, or several steps together."""

    operators: int = 0
    python_calls: int = 0
    launches: int = 0
    waits: int = 0

    def __add__(self, other: Tally) -> Tally:
        return Tally(*(getattr(self, name) + getattr(other, name) for name in COLUMNS))


Stages = dict[str, Tally]


def added(one: Stages, other: Stages) -> Stages:
    """The counts of both, in the order of a step."""
    names = sorted({*one, *other}, key=ORDER.index)
    return {name: one.get(name, Tally()) + other.get(name, Tally()) for name in names}


def count_operators(run: Callable[[], Any], step: CodeType, device: torch.device) -> Stages:
    """Operators, launches and waits of `run()`, by stage of the optimizer's `step`."""
    mode = Operators(step, device)
    with mode:
        run()
    return dict(mode.stages)


def count_calls(run: Callable[[], Any], step: CodeType, device: torch.device) -> Stages:
    """Python calls of `run()`, by stage of `step`, and on a CPU the waits that a dispatch mode does not see."""
    stages: defaultdict[str, Tally] = defaultdict(Tally)

    def note(frame: FrameType, event: str, called: Any) -> None:
        if event == "call" and frame.f_globals.get("__name__") not in HARNESS:
            stages[stage_of(frame, step)].python_calls += 1
        elif event == "c_call" and device.type == "cpu" and _is_reading(called):
            stages[stage_of(frame, step)].waits += 1

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(before)
    return dict(stages)


@contextmanager
def still() -> Iterator[None]:
    """Without the garbage collector, whose finalisers would count for whatever step they fall into."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def stage_of(frame: FrameType | None, step: CodeType) -> str:
    """The stage of `STAGES` for code that runs in `frame`."""
    stage = None
    while frame is not None:
        if frame.f_code is step:
            return stage or OTHER
        if stage is None:
            stage = _named(frame)
        frame = frame.f_back
    return OUTSIDE


def _named(frame: FrameType) -> str | None:
    package, _, rest = str(frame.f_globals.get("__name__", "")).partition(".")
    if package != "kfac_triton":
        return None
    names = (f"{rest}.{frame.f_code.co_name}", rest, rest.partition(".")[0])
    return next((STAGES[name] for name in names if name in STAGES), None)


class Operators(TorchDispatchMode):
    """Counts by stage while it is on."""

    def __init__(self, step: CodeType, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.step, self.device = step, device
        self.thread = threading.get_ident()
        self.stages: defaultdict[str, Tally] = defaultdict(Tally)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        tally = self.stages[self._stage()]
        tally.operators += 1
        here = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)]
        if any(t.device.type == self.device.type for t in here):
            tally.launches += launches(func)
            tally.waits += waits(func, args, kwargs, result)
        return result

    def _stage(self) -> str:
        stage = stage_of(sys._getframe(), self.step)
        if stage == OUTSIDE and threading.get_ident() != self.thread:  # autograd's thread of a GPU
            stage = stage_of(sys._current_frames().get(self.thread), self.step)
        return stage


def launches(func: Any) -> bool:
    """Whether the operator starts work on the device."""
    return not (func.is_view or torch.Tag.inplace_view in func.tags or func._schema.name in NO_LAUNCH)


def waits(func: Any, args: Any, kwargs: Any, result: Any) -> bool:
    """Whether the host waits for the device in the operator."""
    name = func._schema.name
    if name in INDEXING:
        return any(isinstance(index, Tensor) and index.dtype in MASKS for index in args[1])
    if name == "aten::copy_":
        into, source, *non_blocking = args
        return _comes_down(source, into) and not any(non_blocking)
    if name == "aten::_to_copy":
        return _comes_down(args[0], result) and not kwargs.get("non_blocking")
    return name in READS_INSIDE or bool(READS & set(func.tags))


def _comes_down(source: Tensor, into: Tensor) -> bool:
    return source.device.type != "cpu" and into.device.type == "cpu"


def _is_reading(called: Any) -> bool:
    return getattr(called, "__name__", "") in READING_METHODS and isinstance(getattr(called, "__self__", None), Tensor)
