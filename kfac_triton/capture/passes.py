"""The surroundings of K-FAC's own passes: eager, with gradients, under the user's autocast, and without a trace."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kfac_triton.capture.inputs import Autocast, Inputs
from kfac_triton.capture.patches import eager, kept_gradients, own_pass, without_reentrant_checkpoints
from kfac_triton.capture.received import Received
from kfac_triton.capture.replay import Replay, replayed
from kfac_triton.capture.state import ModuleState, Opening


class bare_pass:
    """The surroundings of a pass of K-FAC's own on `inputs`, which begins with `Replay.start`.

    Eager, gradients on, the autocast state of the user's pass, activation checkpointing of the re-entrant kind passed
    over. Random numbers are those of `seed`, or with an opening those of the user's pass, which begins there if
    `inputs` has no opening of its own. `compiled`: it is a graph, in which nothing draws from
    torch's generators.
    """

    def __init__(self, state: ModuleState, inputs: Inputs, seed: int | Opening, *, compiled: bool = False) -> None:
        opening, number = inputs.opening, None
        if isinstance(seed, Opening):
            opening = opening or seed
        else:
            number = seed
        self._state = state
        self._gradients = kept_gradients(seldom=None if state.clears_gradients else state.parameters)
        self._replayed = replayed(state, opening, number, draws=not compiled)
        self._around: tuple[AbstractContextManager[Any] | None, ...] = (
            own_pass(),
            None if compiled else eager(),
            torch.enable_grad(),
            without_reentrant_checkpoints(),
            self._gradients,
            _autocast(inputs.autocast),
            self._replayed,
        )

    def __enter__(self) -> Replay:
        self._entered: list[AbstractContextManager[Any]] = []
        replay: Any = None
        try:
            for one in self._around:
                if one is not None:
                    replay = one.__enter__()
                    self._entered.append(one)
        except BaseException:
            self._leave(*sys.exc_info())
            raise
        entered: Replay = replay
        return entered

    def __exit__(self, *error: Any) -> None:
        self._leave(*error)
        if error[0] is None:
            self._state.clears_gradients = self._gradients.cleared

    def _leave(self, *error: Any) -> None:
        """Leaves all that was entered, the last first, whatever one of them raises."""
        failed: BaseException | None = None
        for one in reversed(self._entered):
            try:
                one.__exit__(*error)
            except BaseException as raised:
                failed = raised
        if failed is not None:
            raise failed


@contextmanager
def closure_pass(state: ModuleState, opening: Opening, leaves: Iterable[Tensor], *, backward: bool) -> Iterator[None]:
    """The surroundings of another call of the user's closure, whose first call began at `opening`.

    `.grad` of `leaves`, and of what else the closure clears or fills, is None in the beginning. Without `backward`,
    backward passes do nothing.
    """
    with (
        own_pass(),
        torch.enable_grad(),
        kept_gradients(leaves, backward=backward),
        replayed(state, opening, None) as replay,
    ):
        replay.start()
        yield


@contextmanager
def changed_outputs(module: nn.Module, change: Callable[[Inputs, Any], Any]) -> Iterator[None]:
    """In here the module returns change(inputs, what it returned), in compiled models too, which run eagerly."""
    entered: list[Inputs] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entered.append(Inputs(module, *Received(args, kwargs, copied=False).arguments()))

    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], returned: Any) -> Any:
        return change(entered.pop(), returned)

    handles: list[Any] = [
        module.register_forward_pre_hook(before, prepend=True, with_kwargs=True),
        module.register_forward_hook(after, with_kwargs=True),
    ]
    try:
        with eager():
            yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def watched_calls(module: nn.Module) -> Iterator[list[nn.Module]]:
    """In here the list gains every part of `module` that is called, in compiled models too, which run eagerly."""
    called: list[nn.Module] = []
    handles = [part.register_forward_pre_hook(lambda part, args: called.append(part)) for part in module.modules()]
    try:
        with eager():
            yield called
    finally:
        for handle in handles:
            handle.remove()


def _autocast(states: tuple[Autocast, ...]) -> AbstractContextManager[Any] | None:
    """In here these are the autocast states; None where they are so anyway."""
    for kind, enabled, dtype in states:
        if torch.is_autocast_enabled(kind) != enabled or torch.get_autocast_dtype(kind) != dtype:
            return _autocast_set(states)
    return None


@contextmanager
def _autocast_set(states: tuple[Autocast, ...]) -> Iterator[None]:
    with ExitStack() as stack:
        for kind, enabled, dtype in states:
            stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled))
        yield
