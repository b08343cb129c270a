"""The user's closure as a function of where the parameters are, asked again without leaving a trace."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from kfac_triton import distributed
from kfac_triton.capture import Streams, own_pass, watched_calls


class Objective:
    """`first`: the loss that the closure returned in this step, the mean over all ranks.

    `forward_only`: the closure is asked again without its backward passes, which take two thirds of its time; false
    once it has failed so, and for data-parallel ranks, whose wrapper waits for them.
    """

    def __init__(
        self,
        closure: Callable[[], Any],
        returned: Any,
        module: nn.Module,
        parameters: list[nn.Parameter],
        streams: Streams,
        forward_only: bool = True,
    ) -> None:
        self.streams = streams
        self.forward_only = forward_only and not distributed.active()
        self._closure, self._module, self._parameters = closure, module, parameters
        self._device = parameters[0].device
        self.first = self._mean(returned)

    def loss(self, *, moved: bool = False) -> float:
        """The loss where the parameters are now, with the random numbers of the first call, the mean over all ranks.

        Gradients, buffers, the random streams and what was kept for the factors are as before afterwards.
        `moved`: the parameters are elsewhere than in the first call, so that the closure must run the model again.

        Raises:
            RuntimeError: `moved`, but the closure returned the loss of its first call without running the model.
        """
        loss = self._loss()
        if moved and loss == self.first:
            with watched_calls(self._module) as called:
                self._loss()
            if not called:
                raise RuntimeError(
                    f"{self._name} returned the same loss, {loss:g}, after the parameters had moved, and did not call "
                    "the model. K-FAC calls the closure again to see what a step does to the loss: call the model and "
                    "compute the loss inside the closure"
                )
        return loss

    def _loss(self) -> float:
        if self.forward_only:
            try:
                with no_backward():
                    return self._mean(self._asked_again())
            except Exception:  # whatever a closure does with gradients that are not there
                self.forward_only = False
        try:
            return self._mean(self._asked_again())
        except Exception as error:
            sentence = (
                f"K-FAC called {self._name} again, to see what a step does to the loss. The closure must give the loss "
                "of the same batch every time it is called: draw the batch outside"
            )
            # A StopIteration would end a loop of the user's in silence; Python 3.10 has no notes.
            if isinstance(error, StopIteration) or not hasattr(error, "add_note"):
                raise RuntimeError(f"{sentence}. It raised {type(error).__name__}: {error}") from error
            error.add_note(sentence)
            raise

    @property
    def _name(self) -> str:
        return f"the closure {getattr(self._closure, '__qualname__', repr(self._closure))}"

    def _asked_again(self) -> Any:
        grads = [p.grad for p in self._parameters]
        buffers = [(buffer, buffer.clone()) for buffer in self._module.buffers()]
        try:
            for p in self._parameters:
                p.grad = None
            with own_pass(self._device), torch.enable_grad():
                self.streams.restore(self._device)
                return self._closure()
        finally:
            for p, grad in zip(self._parameters, grads, strict=True):
                p.grad = grad
            for buffer, before in buffers:
                buffer.copy_(before)

    @property
    def resolution(self) -> float:
        """Changes of the loss that may be rounding errors."""
        double = self._parameters[0].dtype == torch.float64
        return 10 * abs(self.first) * torch.finfo(torch.float64 if double else torch.float32).eps

    def _mean(self, returned: Any) -> float:
        mean = torch.tensor(number(returned), dtype=torch.float64, device=self._device)
        distributed.average_([mean])
        return float(mean)


class _Backward:
    """Torch's two backward functions, which belong to the whole process, and the threads that do without them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._without: set[int] = set()
        self._patches: list[Any] = []

    def leave_out(self, thread: int) -> None:
        with self._lock:
            if not self._without:
                self._patches = [
                    mock.patch.object(owner, "backward", self._in_other_threads(owner.backward))
                    for owner in (torch.Tensor, torch.autograd)
                ]
                for patch in self._patches:
                    patch.start()
            self._without.add(thread)

    def give_back(self, thread: int) -> None:
        with self._lock:
            self._without.discard(thread)
            if not self._without:
                for patch in self._patches:
                    patch.stop()

    def _in_other_threads(self, backward: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(backward)
        def maybe(*args: Any, **kwargs: Any) -> None:
            if threading.get_ident() not in self._without:
                backward(*args, **kwargs)

        return maybe


_BACKWARD = _Backward()


@contextmanager
def no_backward() -> Iterator[None]:
    """In here Tensor.backward and autograd.backward do nothing in this thread; in others they are as ever.

    Forward passes are those of training, graph and all, so that compiled code and random numbers are the same.
    """
    here = threading.get_ident()
    _BACKWARD.leave_out(here)
    try:
        yield
    finally:
        _BACKWARD.give_back(here)


def number(loss: Any) -> float:
    """The loss that a closure returned.

    Raises:
        TypeError: it is no number.
    """
    if isinstance(loss, (int, float)) or (isinstance(loss, Tensor) and loss.numel() == 1):
        return float(loss.detach() if isinstance(loss, Tensor) else loss)
    raise TypeError(f"the closure must return the loss, a 0-d tensor or a number; got {type(loss).__name__}")


def move_(delta: Mapping[nn.Parameter, Tensor], scale: float = 1.0) -> None:
    """parameter <- parameter + scale * delta."""
    for p, d in delta.items():
        p.add_(d.to(p.dtype), alpha=scale)


@contextmanager
def moved(delta: Mapping[nn.Parameter, Tensor], scale: float = 1.0) -> Iterator[None]:
    """In here the parameters are `scale` delta further; afterwards where they were, to the bit."""
    before = {p: p.clone() for p in delta}
    try:
        move_(delta, scale)
        yield
    finally:
        for p, value in before.items():
            p.copy_(value)
