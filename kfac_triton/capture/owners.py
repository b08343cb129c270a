"""Where modules keep what a forward pass may write to: attributes, buffers, parameters, slots."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, MutableMapping
from itertools import chain
from operator import attrgetter, is_, itemgetter
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

INTERNAL = frozenset(vars(nn.Module())) | {"_compiled_call_impl"}  # attributes that every module has

Owner = MutableMapping[str, Any]

_attributes_of, _tables_of = attrgetter("__dict__"), itemgetter("_modules", "_buffers", "_parameters")


def modules_of(root: nn.Module) -> list[nn.Module]:
    """`root.modules()` in one Python call instead of several for every module."""
    found: dict[int, nn.Module] = {}
    ahead: list[nn.Module | None] = [root]
    while ahead:
        module = ahead.pop()
        if module is not None and id(module) not in found:
            found[id(module)] = module
            ahead.extend(reversed([*module._modules.values()]))
    return list(found.values())


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


class Tree:
    """The modules below a root and where they keep things, looked up anew only where that changed.

    `owners`: attributes and buffers, in dictionaries, and slots. `parameters`: the tables of parameters. `scripted`:
    modules that keep buffers and parameters elsewhere.
    """

    def __init__(self, root: nn.Module) -> None:
        self._root = root
        self._slots: dict[nn.Module, list[Slots]] = {}
        self._tables: list[Any] = []
        self._children: list[Any] = []
        self._ordinary = False
        self.modules: list[nn.Module] = []
        self.refresh()

    def refresh(self) -> bool:
        """Looks whether it is the same still; returns whether it is."""
        if self._ordinary and self._same():
            return True
        modules = modules_of(self._root)
        tables = [table for m in modules for table in (m.__dict__, m._buffers, m._parameters)]
        self._children = [child for m in modules for child in m._modules.values()]
        if len(tables) == len(self._tables) and all(map(is_, tables, self._tables)):
            return True
        self._tables, self.modules = tables, modules
        self._ordinary = all([isinstance(vars(m).get(n), dict) for m in modules for n in ("_buffers", "_parameters")])
        self._look()
        return False

    def _same(self) -> bool:
        """Whether no module keeps things elsewhere or has another child, in a few calls for all of them."""
        attributes = list(map(_attributes_of, self.modules))
        modules, buffers, parameters = zip(*map(_tables_of, attributes), strict=True)
        children = list(chain.from_iterable([own.values() for own in modules]))
        return (
            all(map(is_, chain.from_iterable(zip(attributes, buffers, parameters, strict=True)), self._tables))
            and len(children) == len(self._children)
            and all(map(is_, children, self._children))
        )

    def _look(self) -> None:
        modules = self.modules
        self.owners: list[Owner] = [
            table for m in modules for table in (vars(m), m._buffers) if isinstance(table, dict)
        ]
        for m in modules:
            if m not in self._slots:
                self._slots[m] = slots_of([m])
            self.owners += self._slots[m]
        self.parameters = [m._parameters for m in modules if isinstance(m._parameters, dict)]
        self.scripted = [m for m in modules if not isinstance(m._buffers, dict)]
        self._norms = [m for m in modules if isinstance(m, _NormBase)]

    def below(self, module: nn.Module) -> list[Owner]:
        """The owners that belong to a module and to those in it."""
        own = {id(x) for m in modules_of(module) for x in (vars(m), m._buffers, *self._slots.get(m, ()))}
        return [owner for owner in self.owners if id(owner) in own]

    def running_statistics(self) -> set[int]:
        """The ids of the buffers whose values change no output in training: averages kept for evaluation."""
        return {id(m._buffers) for m in self._norms if m.momentum is not None}


def restore(owner: Owner, before: Owner) -> None:
    """Gives an owner back what it held, to the identity."""
    owner.update(before)
    if len(owner) != len(before):
        for name in owner.keys() - before.keys():
            del owner[name]
