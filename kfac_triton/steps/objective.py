"""The user's closure as a function of where the parameters are, asked again without leaving a trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from kfac_triton.capture import ModuleState, alone, backward_calls, closure_pass, watched_calls
from kfac_triton.distributed import Ranks


class Objective:
    """The closure of one step, whose first call `call` makes.

    `forward_only`: the closure is asked again without its backward passes, which take two thirds of its time; false
    once it has failed so, and for data-parallel ranks, whose wrapper waits for them.
    """

    def __init__(
        self,
        closure: Callable[[], Any],
        state: ModuleState,
        parameters: list[nn.Parameter],
        ranks: Ranks,
        forward_only: bool = True,
    ) -> None:
        self.ranks = ranks
        self.forward_only = forward_only and not ranks.active
        self._closure, self._state, self._parameters = closure, state, parameters
        self._device = parameters[0].device

    def call(self) -> Any:
        """The user's own call, which fills the gradients; what the closure returned.

        A closure that draws random numbers runs alone among those of all threads, so that they can be drawn again.
        """
        drawing = self._state.closure_draws and not self.ranks.active
        with alone() if drawing else nullcontext():
            self.opening = self._state.opening()
            with backward_calls() as self._backward_calls:
                self._returned = self._closure()
            self._state.closing(self.opening)
        self._state.closure_draws = bool(self.opening.drew)
        return self._returned

    @cached_property
    def first(self) -> float:
        """The loss that the first call returned, the mean over all ranks."""
        return self._mean(self._returned)

    def loss(self, *, moved: bool = False) -> float:
        """The loss where the parameters are now, with the random numbers of the first call, the mean over all ranks.

        The closure starts in the model's state of the first call. Afterwards this state is as the first call left it,
        and so are the gradients, also those of parameters of other optimizers.
        `moved`: the parameters are elsewhere than in the first call, so that the closure must run the model again.

        Raises:
            RuntimeError: `moved`, but the closure returned the loss of its first call without running the model.
        """
        loss = self._loss()
        if moved and loss == self.first:
            with watched_calls(self._state.root) as called:
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
                return self._mean(self._asked_again(backward=False))
            except Exception:  # whatever a closure does with gradients that are not there
                self.forward_only = False
        try:
            return self._mean(self._asked_again(backward=True))
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

    def _asked_again(self, *, backward: bool) -> Any:
        with closure_pass(self._state, self.opening, self._leaves, backward=backward):
            return self._closure()

    @cached_property
    def _leaves(self) -> list[Tensor]:
        """The tensors whose gradients the closure may clear or fill."""
        return [*self._parameters, *self._state.root.parameters(), *self._backward_calls.leaves()]

    @property
    def resolution(self) -> float:
        """Changes of the loss that may be rounding errors."""
        double = self._parameters[0].dtype == torch.float64
        return 10 * abs(self.first) * torch.finfo(torch.float64 if double else torch.float32).eps

    def _mean(self, returned: Any) -> float:
        mean = torch.tensor(number(returned), dtype=torch.float64, device=self._device)
        self.ranks.average_([mean])
        return float(mean)


def number(loss: Any) -> float:
    """The loss that a closure returned.

    Raises:
        TypeError: it is no number.
    """
    if isinstance(loss, (int, float)) or (isinstance(loss, Tensor) and loss.numel() == 1):
        return float(loss.detach() if isinstance(loss, Tensor) else loss)
    raise TypeError(f"the closure must return the loss, a 0-d tensor or a number; got {type(loss).__name__}")


def move_(parameters: Sequence[Tensor], delta: Sequence[Tensor], scale: float = 1.0) -> None:
    """parameter <- parameter + scale * delta."""
    if parameters:
        torch._foreach_add_(list(parameters), list(delta), alpha=scale)


@contextmanager
def moved(parameters: Sequence[Tensor], delta: Sequence[Tensor], scale: float = 1.0) -> Iterator[None]:
    """In here the parameters are `scale` delta further; afterwards where they were, to the bit."""
    before = [p.clone() for p in parameters]
    try:
        move_(parameters, delta, scale)
        yield
    finally:
        if parameters:
            torch._foreach_copy_(list(parameters), before)
