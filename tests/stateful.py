"""Networks with a state of every kind, for tests of what K-FAC's own passes leave behind."""

from __future__ import annotations

import random
from collections import deque
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from small import WHOLE, closure_step, data, train_step
from torch import Tensor, nn

from kfac_triton import KFAC

FORMS = ["plain", "paper"]


def optimizer_of(form: str, model: nn.Module, *args: Any, **options: Any) -> KFAC:
    if form == "paper":
        return KFAC.paper(model, *args, likelihood="categorical", compile=False, **options)
    return KFAC(model, *args, **{**WHOLE, **options})


def step(form: str, *args: Any) -> float:
    return (closure_step if form == "paper" else train_step)(*args)


def generators() -> list[Any]:
    numpy = np.random.get_state()
    return [torch.get_rng_state().tolist(), random.getstate(), numpy[1].tolist(), numpy[2:]]


def trained(form: str, seed: int, model: nn.Module, steps: int = 12) -> list[Tensor]:
    x, y = data(seed=seed)
    optimizer = optimizer_of(form, model, **({"lr": 0.03} if form == "plain" else {}))
    for _ in range(steps):
        step(form, optimizer, model, x, y)
    return [p.detach().clone() for p in model.parameters()]


class Holder:
    """A plain object that holds a state."""

    def __init__(self, value: Any) -> None:
        self.value = value


class Stateful(nn.Module):
    """A network with a state v: v <- v / 2 + tanh(a(x)), which enters the second layer.

    With `noise`, K-FAC's own passes, which draw other numbers, would leave another state than the user's.
    """

    noise: ClassVar[float] = 0.0

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)
        self.begin(torch.zeros(128, 8))

    def begin(self, v: Tensor) -> None:
        raise NotImplementedError

    def read(self) -> Tensor:
        raise NotImplementedError

    def write(self, v: Tensor) -> None:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        v = 0.5 * self.read().detach() + F.dropout(torch.tanh(self.a(x)), self.noise)
        self.write(v)
        return self.b(v)


class Attribute(Stateful):
    def begin(self, v: Tensor) -> None:
        self.v = v

    def read(self) -> Tensor:
        return self.v

    def write(self, v: Tensor) -> None:
        self.v = v


class Appearing(Attribute):
    """The attribute appears in the first pass, and another disappears."""

    def begin(self, v: Tensor) -> None:
        self.young = True

    def read(self) -> Tensor:
        return self.__dict__.get("v", torch.zeros(128, 8))

    def write(self, v: Tensor) -> None:
        self.v = v
        self.__dict__.pop("young", None)


class InPlace(Attribute):
    def write(self, v: Tensor) -> None:
        self.v.copy_(v.detach())


class ByData(Attribute):
    """No version counter tells of this write."""

    def write(self, v: Tensor) -> None:
        self.v.data.copy_(v.detach())


class WithItsGraph(Attribute):
    """A membrane as spiking neurons have it: in place, and part of the graph."""

    def write(self, v: Tensor) -> None:
        self.v.detach_()
        self.v.mul_(0).add_(v)


class OfTwoViews(Stateful):
    """Written through one view, read through the other, also in the same pass."""

    def begin(self, v: Tensor) -> None:
        self.both = torch.stack([v, v])
        self.second = self.both[1]

    def read(self) -> Tensor:
        return self.both[1]

    def write(self, v: Tensor) -> None:
        self.second.copy_(v.detach())

    def forward(self, x: Tensor) -> Tensor:
        v = 0.5 * self.read().detach() + F.dropout(torch.tanh(self.a(x)), self.noise)
        self.write(v)
        return self.b(self.read().clone() + (v - v.detach()))


class InList(Stateful):
    def begin(self, v: Tensor) -> None:
        self.states = [v]

    def read(self) -> Tensor:
        return self.states[-1]

    def write(self, v: Tensor) -> None:
        self.states.append(v.detach())


class InNested(Stateful):
    def begin(self, v: Tensor) -> None:
        self.cache = {"layers": [{"v": v, "calls": 0}]}

    def read(self) -> Tensor:
        return self.cache["layers"][0]["v"]

    def write(self, v: Tensor) -> None:
        layer = self.cache["layers"][0]
        layer["calls"] += 1
        layer["v"].copy_(v.detach() if layer["calls"] < 100 else 0 * v)


class InDeque(Stateful):
    def begin(self, v: Tensor) -> None:
        self.states = deque([v], maxlen=2)

    def read(self) -> Tensor:
        return self.states[-1]

    def write(self, v: Tensor) -> None:
        self.states.append(v.detach())


class InArray(Stateful):
    def begin(self, v: Tensor) -> None:
        self.array = v.numpy().copy()

    def read(self) -> Tensor:
        return torch.from_numpy(self.array.copy())

    def write(self, v: Tensor) -> None:
        self.array[:] = v.detach().numpy()


class InObject(Stateful):
    def begin(self, v: Tensor) -> None:
        self.holders = [Holder(v)]

    def read(self) -> Tensor:
        return self.holders[0].value

    def write(self, v: Tensor) -> None:
        self.holders[0].value = v.detach()


class InSlots(Stateful):
    __slots__ = ("inside",)

    def begin(self, v: Tensor) -> None:
        object.__setattr__(self, "inside", v)

    def read(self) -> Tensor:
        return self.inside

    def write(self, v: Tensor) -> None:
        object.__setattr__(self, "inside", v.detach())


class InSubmodule(Stateful):
    def begin(self, v: Tensor) -> None:
        self.memory = nn.Module()
        self.memory.v = v

    def read(self) -> Tensor:
        return self.memory.v

    def write(self, v: Tensor) -> None:
        self.memory.v = v.detach()


class InBuffer(Stateful):
    def begin(self, v: Tensor) -> None:
        self.register_buffer("v", v)

    def read(self) -> Tensor:
        return self.v

    def write(self, v: Tensor) -> None:
        self.v.copy_(v.detach())


class InReboundBuffer(InBuffer):
    def write(self, v: Tensor) -> None:
        self.v = v.detach()


class InUntrained(Stateful):
    """An exponential average in a parameter that no optimizer has, updated in forward."""

    def begin(self, v: Tensor) -> None:
        self.v = nn.Parameter(v, requires_grad=False)

    def read(self) -> Tensor:
        return self.v

    def write(self, v: Tensor) -> None:
        with torch.no_grad():
            self.v.copy_(v)


class InUntrainedData(InUntrained):
    def write(self, v: Tensor) -> None:
        self.v.data.mul_(0).add_(v.detach())


class Counted(Attribute):
    """A call counter that decides what happens."""

    calls: Any = 0

    def read(self) -> Tensor:
        return self.v * self.calls

    def write(self, v: Tensor) -> None:
        self.v, self.calls = v.detach(), self.calls + 1


class Drawing(Attribute):
    """Generators of its own."""

    def begin(self, v: Tensor) -> None:
        super().begin(v)
        self.torch = torch.Generator().manual_seed(1)
        self.python, self.numpy = random.Random(2), np.random.default_rng(3)

    def read(self) -> Tensor:
        drawn = torch.rand(1, generator=self.torch) + self.python.random() + float(self.numpy.random())
        return self.v + drawn


STATEFUL = [
    Attribute, Appearing, InPlace, ByData, WithItsGraph, OfTwoViews, InList, InNested, InDeque, InArray, InObject,
    InSlots, InSubmodule, InBuffer, InReboundBuffer, InUntrained, InUntrainedData, Counted, Drawing,
]  # fmt: skip


def contents(value: Any) -> Any:
    """What an attribute holds, in values that compare."""
    if isinstance(value, Tensor):
        return value.detach().tolist()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, torch.Generator):
        return value.get_state().tolist()
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, np.random.Generator):
        return value.bit_generator.state
    if isinstance(value, dict):
        return {name: contents(one) for name, one in value.items()}
    if isinstance(value, (list, tuple, deque)):
        return [contents(one) for one in value]
    return contents(vars(value)) if isinstance(value, Holder) else value


def state_of(model: nn.Module) -> Any:
    """Everything that modules hold besides trained parameters."""
    internal = vars(nn.Module()).keys() - {"training"} | {"_is_torch_compile"}
    found = []
    for m in model.modules():
        found.append({name: contents(value) for name, value in vars(m).items() if name not in internal})
        found.append({name: contents(value) for name, value in m._buffers.items()})
        found.append({name: contents(p) for name, p in m._parameters.items() if not p.requires_grad})
        found.append(contents(getattr(m, "inside", None)))
    return found


def passes_with_the_weights_of(model: nn.Module, twin: nn.Module, x: Tensor) -> None:
    """One forward pass of the twin, which has the same state, takes over the trained weights and draws the same."""
    generator = torch.get_rng_state()
    with torch.no_grad():
        for p, own in zip(model.parameters(), twin.parameters(), strict=True):
            if p.requires_grad:
                own.copy_(p)
    twin(x)
    torch.set_rng_state(generator)
