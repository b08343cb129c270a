"""Where modules keep what a forward pass may write to: attributes, buffers, parameters, slots."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, MutableMapping
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

INTERNAL = frozenset(vars(nn.Module())) | {"_compiled_call_impl"}  # attributes that every module has

Owner = MutableMapping[str, Any]


class Slots(MutableMapping[str, Any]):
    """The attributes of a module in the `__slots__` of its classes."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        declared = [getattr(kind, "__slots__", ()) for kind in type(module).__mro__]
        names = [name for one in declared for name in ((one,) if isinstance(one, str) else one)]
        self._names = [name for name in names if name not in ("__dict__", "__weakref__")]

    def __getitem__(self, name: str) -> Any:
        try:
            return getattr(self._module, name)
        except AttributeError:
            raise KeyError(name) from None

    def __setitem__(self, name: str, value: Any) -> None:
        object.__setattr__(self._module, name, value)

    def __delitem__(self, name: str) -> None:
        object.__delattr__(self._module, name)

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._names if hasattr(self._module, name))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def slots_of(modules: Iterable[nn.Module]) -> list[Slots]:
    """The slots of the modules that have some."""
    slotted = (m for m in modules if any(vars(kind).get("__slots__") for kind in type(m).__mro__))
    return [Slots(m) for m in slotted]


def dictionaries(modules: Iterable[nn.Module]) -> list[Owner]:
    """The attributes and buffers of modules, in dictionaries."""
    found: list[Owner] = []
    for m in modules:
        found.append(vars(m))
        if isinstance(m._buffers, dict):  # a scripted module keeps them elsewhere
            found.append(m._buffers)
    return found


def running_statistics(modules: Iterable[nn.Module]) -> set[int]:
    """The ids of the buffers whose values change no output in training: averages kept for evaluation."""
    return {id(m._buffers) for m in modules if isinstance(m, _NormBase) and m.momentum is not None}


def restore(owner: Owner, before: Owner) -> None:
    """Gives an owner back what it held, to the identity."""
    owner.update(before)
    if len(owner) != len(before):
        for name in owner.keys() - before.keys():
            del owner[name]
