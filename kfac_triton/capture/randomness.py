"""The random numbers of K-FAC's own passes: global generators are touched only where a pass draws from them."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kfac_triton.capture.patches import ALONE


class TorchGenerators(NamedTuple):
    """The states of torch's global generators, on the CPU and on the device of the parameters."""

    cpu: Tensor
    cuda: Tensor | None
    device: torch.device

    @classmethod
    def now(cls, device: torch.device) -> TorchGenerators:
        cuda = None
        if device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
            cuda = torch.cuda.get_rng_state(device)
        return cls(torch.default_generator.get_state(), cuda, device)

    def moved(self) -> bool:
        """Whether a number was drawn since."""
        now = TorchGenerators.now(self.device)
        if not torch.equal(self.cpu, now.cpu):
            return True
        return self.cuda is not None and now.cuda is not None and not torch.equal(self.cuda, now.cuda)

    def restore(self) -> None:
        torch.default_generator.set_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, self.device)


class OtherGenerators(NamedTuple):
    """The states of Python's and numpy's global generators."""

    python: Any
    numpy: Any

    @classmethod
    def now(cls) -> OtherGenerators:
        return cls(random.getstate(), np.random.get_state(legacy=True))

    def moved(self) -> bool:
        """Whether a number was drawn since."""
        now = OtherGenerators.now()
        same = self.python == now.python and self.numpy[2:] == now.numpy[2:]
        return not (same and np.array_equal(self.numpy[1], now.numpy[1]))

    def restore(self) -> None:
        random.setstate(self.python)
        np.random.set_state(self.numpy)


class TorchDraws:
    """Torch's global generators in one pass of K-FAC's own: at its start as `begin` leaves them, and after `close` as
    they were.

    They are touched when the pass first draws, or, with `surely`, at once; from there on this pass is the only one.
    """

    def __init__(self, device: torch.device, begin: Callable[[], None], *, surely: bool) -> None:
        self.drew = False
        self._device, self._begin, self._surely = device, begin, surely
        self._before: TorchGenerators | None = None
        self._begun: TorchGenerators | None = None

    def start(self) -> None:
        """The pass begins, perhaps again."""
        if self._surely or self._before is not None:
            self.draw()

    def draw(self) -> None:
        """The pass draws its first number."""
        if self._before is None:
            ALONE.acquire()
            self._before = TorchGenerators.now(self._device)
        self._begin()
        self._begun = TorchGenerators.now(self._device)

    def close(self) -> None:
        """The pass is over."""
        if self._before is not None:
            self.drew = self._begun is not None and self._begun.moved()
            self._before.restore()
            self._before = None
            ALONE.release()


class FirstDraw(TorchDispatchMode):
    """Calls `draws.draw()` before the first operation in here that draws from a global generator."""

    def __init__(self, draws: TorchDraws) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._draws, self._begun = draws, False

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Compiled code stays compiled in here."""
        return True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not self._begun and torch.Tag.nondeterministic_seeded in func.tags and _draws(func, args, kwargs):
            self._begun = True
            self._draws.draw()
        return func(*args, **kwargs)


def _draws(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call of a random operation draws from a global generator: attention without dropout does not."""
    given = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)} | dict(kwargs)
    return given.get("generator") is None and given.get("dropout_p", 1.0) != 0
