"""The user's closure as a function of where the parameters are, asked again without leaving a trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from kfac_triton.capture import ModuleState, alone, backward_calls, closure_pass
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

    def loss(self) -> float:
        """The loss where the parameters are now, with the random numbers of the first call, the mean over all ranks.

        The closure starts in the model's state of the first call. Afterwards this state is as the first call left it,
        and so are the gradients, also those of parameters of other optimizers.
        """
        if self.forward_only:
            try:
                return self._mean(self._asked_again(backward=False))
            except Exception:  # whatever a closure does with gradients that are not there
                self.forward_only = False
        return self._mean(self._asked_again(backward=True))

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
