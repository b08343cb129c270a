"""Everything that K-FAC changes in torch while it runs: per thread, and only while a thread asks for it.

What remains process-wide is torch's own: its global random number generators, and its level of forward-mode
differentiation. K-FAC's passes that need one of these, and closures of adaptive steps that draw random numbers, exclude
each other by `ALONE`. A thread of the user's that draws from torch's global generator while K-FAC replays a model that
draws from it too may see other numbers than alone; one that uses forward-mode differentiation during an adaptive step
is refused by torch. Before torch 2.14 the same lock guards the compiler's stance.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from operator import attrgetter
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from kfac_triton.capture.owners import modules_of
from kfac_triton.capture.per_thread import PerThread

ALONE = threading.RLock()
_grad = attrgetter("grad")


class _Thread(threading.local):
    """Whether a pass of K-FAC's own runs in this thread. Compiled code must not read it: it would keep the value."""

    own_pass = False


_THREAD = _Thread()


def own_pass_running() -> bool:
    """Whether a pass of K-FAC's own runs in this thread; in it no hook notes anything."""
    return _THREAD.own_pass


class own_pass:
    """In here `own_pass_running()`."""

    def __enter__(self) -> None:
        self._before, _THREAD.own_pass = _THREAD.own_pass, True

    def __exit__(self, *error: object) -> None:
        _THREAD.own_pass = self._before


_BACKWARD = PerThread(torch.autograd, "backward")
_ZERO_GRADS = (PerThread(torch.optim.Optimizer, "zero_grad"), PerThread(nn.Module, "zero_grad"))
_REENTRANT_CHECKPOINT = PerThread(torch.utils.checkpoint.CheckpointFunction, "apply")
_CHECKPOINTS = [
    PerThread(torch.utils.checkpoint, name)
    for name in ("_checkpoint_without_reentrant_generator", "_checkpoint_without_reentrant_generator_impl")
    if hasattr(torch.utils.checkpoint, name)  # one or both, by torch's version
]


@contextmanager
def alone() -> Iterator[None]:
    """In here no other thread is in a pass that needs what torch has once for the whole process."""
    with ALONE:
        yield


def eager() -> AbstractContextManager[Any]:
    """In here compiled code runs uncompiled."""
    frames = sys.modules.get("torch._dynamo.eval_frame")
    if frames is None:  # nothing is compiled in this process
        return nullcontext()
    if hasattr(frames, "_use_eager_on_nested_compile"):
        within: AbstractContextManager[Any] = frames._use_eager_on_nested_compile()
        return within
    return _eager_alone()


@contextmanager
def _eager_alone() -> Iterator[None]:
    with ALONE, torch.compiler.set_stance("force_eager"):
        yield


def without_reentrant_checkpoints() -> AbstractContextManager[None]:
    """In here activation checkpoints of the re-entrant kind, which know no partial backward pass, are passed over."""
    return _REENTRANT_CHECKPOINT.replaced_by(_run_only)


def _run_only(original: Callable[..., Any], function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
    return function(*args)


def uncheckpointed(module: nn.Module) -> AbstractContextManager[Any]:
    """In here activations of a model with recurrent layers are kept, not computed again.

    What is computed again in a backward pass, where no function mode is active, would be torch's own layer and not its
    twin, and the wrong tensors would be found for it.
    """
    for child in modules_of(module):
        if isinstance(child, (nn.RNNBase, nn.RNNCellBase)):
            return _uncheckpointed()
    return nullcontext()


@contextmanager
def _uncheckpointed() -> Iterator[None]:
    with ExitStack() as stack:
        for checkpoint in _CHECKPOINTS:
            stack.enter_context(checkpoint.replaced_by(_no_checkpoint))
        yield


def _no_checkpoint(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Iterator[None]:
    """The two halves of what surrounds a function that is to be computed again: nothing."""
    yield


@contextmanager
def traced_gradients() -> Iterator[None]:
    """In here dynamo follows backward passes, and what it read of `.grad` there is no part of later graphs.

    Dynamo has one None, True and False for all graphs. Where it reads a gradient that is None, torch 2.14 notes on its
    None that it came from there, and every later graph of the process would read that gradient where it means None.
    """
    try:
        with torch._dynamo.config.patch(trace_autograd_ops=True):
            yield
    finally:
        for name in ("NONE", "TRUE", "FALSE"):
            constant = getattr(torch._dynamo.variables.constant, f"CONSTANT_VARIABLE_{name}", None)
            if constant is not None:
                constant.source = None


# ---------------------------------------------------------------------------------------------------------- gradients


class BackwardCalls:
    """The places in the graph where backward passes began; `leaves()`: the tensors whose `.grad` they may fill."""

    def __init__(self) -> None:
        self._roots: list[Any] = []

    def note(self, tensors: Any) -> None:
        for t in [tensors] if isinstance(tensors, Tensor) else tensors:
            node = t.grad_fn if isinstance(t, Tensor) else getattr(t, "node", None)
            self._roots.append(node)

    def leaves(self) -> list[Tensor]:
        found: dict[int, Tensor] = {}
        visited: set[Any] = set()
        frontier = [node for node in self._roots if node is not None]
        while frontier:
            node = frontier.pop()
            if node in visited:
                continue
            visited.add(node)
            leaf = getattr(node, "variable", None)
            if isinstance(leaf, Tensor):
                found[id(leaf)] = leaf
            frontier += [following for following, _ in node.next_functions if following is not None]
        return list(found.values())


@contextmanager
def backward_calls() -> Iterator[BackwardCalls]:
    """Notes the backward passes in here."""
    calls = BackwardCalls()

    def backward(original: Callable[..., None], tensors: Any, *args: Any, **kwargs: Any) -> None:
        calls.note(tensors)
        original(tensors, *args, **kwargs)

    with _BACKWARD.replaced_by(backward):
        yield calls


class kept_gradients:
    """In here `.grad` of `leaves`, and of whatever zero_grad() and backward() reach, begins as None; afterwards it is
    what it was. Without `backward`, backward passes do nothing.

    `seldom`: parameters of a model that is not known to call zero_grad(). Then this is not replaced, since for every
    exchanged method of `nn.Module` Python looks up all methods of all modules anew; a gradient that is missing
    afterwards is put back. `cleared`: zero_grad() was called, or a gradient of these was written to.
    """

    def __init__(
        self, leaves: Iterable[Tensor] = (), *, backward: bool = True, seldom: Sequence[Tensor] | None = None
    ) -> None:
        self.cleared = False
        self._leaves, self._run, self._seldom = leaves, backward, seldom
        self._before: dict[int, tuple[Tensor, Tensor | None]] = {}

    def __enter__(self) -> kept_gradients:
        self._keep(self._leaves)
        _BACKWARD.enter(self._backward)
        if self._seldom is None:
            for place in _ZERO_GRADS:
                place.enter(self._zero_grad)
        else:
            self._gradients = list(map(_grad, self._seldom))
            self._versions = [None if g is None else g._version for g in self._gradients]
        return self

    def __exit__(self, *error: object) -> None:
        _BACKWARD.leave()
        if self._seldom is None:
            for place in _ZERO_GRADS:
                place.leave()
        for t, grad in self._before.values():
            t.grad = grad
        if self._seldom is not None:
            self._put_back(self._seldom)

    def _put_back(self, parameters: Sequence[Tensor]) -> None:
        for p, grad, version in zip(parameters, self._gradients, self._versions, strict=True):
            if p.grad is not grad:
                self.cleared, p.grad = True, grad
            if grad is not None and grad._version != version:
                self.cleared = True

    def _keep(self, tensors: Iterable[Tensor]) -> None:
        for t in tensors:
            if id(t) not in self._before:
                with torch._C.DisableTorchFunction():  # a recorder of uses would take this for one
                    self._before[id(t)] = (t, t.grad)
                    t.grad = None

    def _backward(self, original: Callable[..., None], tensors: Any, *args: Any, **kwargs: Any) -> None:
        if self._run:
            calls = BackwardCalls()
            calls.note(tensors)
            self._keep(calls.leaves())
            original(tensors, *args, **kwargs)

    def _zero_grad(self, original: Callable[..., None], owner: Any, *args: Any, **kwargs: Any) -> None:
        self.cleared = True
        groups = owner.param_groups if isinstance(owner, torch.optim.Optimizer) else [{"params": owner.parameters()}]
        for group in groups:
            self._keep(group["params"])
        original(owner, *args, **kwargs)
