"""The random numbers of K-FAC's own passes: global generators are touched only where a pass draws from them."""

from __future__ import annotations

import ctypes
import random
import struct
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
        if not torch.equal(self.cpu, torch.default_generator.get_state()):
            return True
        now = None if self.cuda is None else TorchGenerators.now(self.device).cuda
        return self.cuda is not None and now is not None and not torch.equal(self.cuda, now)

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
        """The same object again while nobody draws."""
        return _LAST_STATES.read()

    def moved(self) -> bool:
        """Whether a number was drawn since."""
        now = OtherGenerators.now()
        if now is self:
            return False
        same = self.python == now.python and self.numpy[2:] == now.numpy[2:]
        return not (same and np.array_equal(self.numpy[1], now.numpy[1]))

    def restore(self) -> None:
        random.setstate(self.python)
        np.random.set_state(self.numpy)


class _LastStates:
    """The states of Python's and numpy's global generators as they were last read, beside their bytes in memory.

    To read the states takes 50 us, to compare their bytes 1 us. Where the bytes are not where they were looked for, as
    under another Python or with another bit generator, every read is a full one.
    """

    def __init__(self) -> None:
        self._memory: _Memory | None = None
        self._looked = False
        self._last: tuple[tuple[Any, ...], OtherGenerators] | None = None

    def read(self) -> OtherGenerators:
        if not self._looked:
            self._looked, self._memory = True, _memory()
        memory, last = self._memory, self._last
        if memory is None or _bit_generator() is not memory.bits:
            return OtherGenerators(random.getstate(), np.random.get_state(legacy=True))
        found = memory.read()
        if last is None or last[0] != found:
            last = self._last = found, OtherGenerators(random.getstate(), np.random.get_state(legacy=True))
        return last[1]


_LAST_STATES = _LastStates()
_bit_generator: Any = getattr(np.random, "get_bit_generator", lambda: None)  # of numpy 1.24 and later
_HEADER = object.__basicsize__
_TWISTER = struct.Struct("625I")  # the words of a Mersenne twister and its position


class _Memory(NamedTuple):
    """Where both generators lie. `numpy` beside its twister `bits` keeps the second of two normal numbers."""

    python: random.Random
    numpy: np.random.RandomState
    bits: Any
    twister: int

    def read(self) -> tuple[Any, ...]:
        read = ctypes.string_at
        return (
            self.python.gauss_next,  # type: ignore[attr-defined]
            read(id(self.python) + _HEADER, _TWISTER.size),
            read(id(self.numpy) + _HEADER, np.random.RandomState.__basicsize__ - _HEADER),
            read(self.twister, _TWISTER.size),
        )


def _memory() -> _Memory | None:
    """None unless what lies there is what the generators say they hold, and what numpy keeps beside it shows too."""
    python: Any = getattr(random.getstate, "__self__", None)
    numpy: Any = getattr(np.random.get_state, "__self__", None)
    if type(python) is not random.Random or type(numpy) is not np.random.RandomState:
        return None
    bits = _bit_generator()
    twister: Any = random.Random.__base__
    if type(bits) is not np.random.MT19937 or twister.__basicsize__ < _HEADER + _TWISTER.size:
        return None
    position, *words = _TWISTER.unpack(ctypes.string_at(id(python) + _HEADER, _TWISTER.size))
    if (*words, position) != python.getstate()[1]:
        return None
    memory = _Memory(python, numpy, bits, int(bits.ctypes.state_address))
    state: Any = np.random.get_state(legacy=True)
    if _TWISTER.unpack(memory.read()[3]) != (*state[1].tolist(), state[2]):
        return None
    apart = np.random.RandomState(0)
    return memory if len({_drawn(apart, memory) for _ in range(2)}) == 2 else None


def _drawn(generator: np.random.RandomState, memory: _Memory) -> bytes:
    generator.normal()
    return memory._replace(numpy=generator).read()[2]  # type: ignore[no-any-return]


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
