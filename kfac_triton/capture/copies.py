"""Copies of what attributes hold, made so that a later write can be seen and undone."""

from __future__ import annotations

import copy
import random
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

PLAIN = frozenset(
    {int, float, bool, str, bytes, complex, type(None), torch.dtype, torch.device, torch.Size, torch.layout, type}
)
MOST_ITEMS = 1000  # of a container whose items are copied too
MOST_DEPTH = 2  # of objects in objects
ARRAYS = (np.ndarray,)
GENERATORS = (random.Random, np.random.Generator, np.random.RandomState, torch.Generator)


class _Plain:
    pass


class Copies:
    """Copies of values: containers with their items, tensors and arrays of up to `limit` bytes, generators.

    Values that are the same object or share memory do so among the copies too. Memory in `kept()` (see `storage_of`),
    that of parameters, is never copied, so that a view of a weight stays one. An object of an ordinary Python class
    stays the same object; `objects` has the copies of its attributes.
    """

    def __init__(self, kept: Callable[[], set[int | None]], limit: float) -> None:
        self.objects: dict[int, tuple[dict[str, Any], dict[str, Any]]] = {}
        self.limit = limit
        self._kept = kept
        self._copies: dict[int, tuple[Any, Any]] = {}  # id(value) -> (value, copy); holding both keeps the ids valid
        self._originals: dict[int, tuple[Tensor, int]] = {}  # id(copy of a tensor) -> (tensor, the copy's version)
        self._storages: dict[int | None, torch.UntypedStorage] = {}

    def of(self, value: Any, depth: int = 0) -> Any:
        """The copy of a value, or the value itself where it needs none or allows none."""
        if plain(value):
            return value
        made = self._copies.get(id(value))
        if made is None:
            made = self._copies[id(value)] = (value, self._copy(value, depth))
        return made[1]

    def attribute(self, value: Any) -> Any:
        """The same, also of a parameter that requires no gradient."""
        if not isinstance(value, nn.Parameter) or value.requires_grad:
            return self.of(value)
        if id(value) not in self._copies:
            copied = nn.Parameter(value.detach().clone(), requires_grad=False)
            self._copies[id(value)] = (value, copied)
            self._originals[id(copied)] = (value, copied._version)
        return self._copies[id(value)][1]

    def unchanged(self, value: Any, copied: Any) -> bool:
        """Whether `value`, of which `copied` was made, has the same content now; compares the elements of tensors."""

        def same(now: Tensor, then: Tensor) -> bool:
            original, version = self._originals[id(then)]
            return original is now and (_equal(now, then) if then is not now else _version(now) == version)

        def attributes_of(one: Any) -> dict[str, Any] | None:
            return self.objects[id(one)][1] if id(one) in self.objects else None

        return _alike(value, copied, same, attributes_of)

    def untouched(self, copied: Any, value: Any, attributes_of: Callable[[Any], dict[str, Any] | None]) -> bool:
        """Whether `copied`, made of `value`, is as it was made; `attributes_of`: what an object held at that time."""

        def same(now: Tensor, then: Tensor) -> bool:
            original, version = self._originals.get(id(now), (None, None))
            return original is then and _version(now) == version

        return _alike(copied, value, same, attributes_of)

    def _copy(self, value: Any, depth: int) -> Any:
        if isinstance(value, Tensor):
            return self._tensor(value)
        try:
            if isinstance(value, (list, dict, set, deque, bytearray)):
                return self._container(value, depth)
            if isinstance(value, tuple):
                return self._tuple(value, depth)
            if isinstance(value, ARRAYS):
                return value.copy() if value.nbytes <= self.limit else value
            if isinstance(value, GENERATORS):
                return value.clone_state() if isinstance(value, torch.Generator) else copy.deepcopy(value)
        except Exception:  # a class of the user's that cannot be copied
            return value
        if depth < MOST_DEPTH and ordinary(value) and id(value) not in self.objects:
            attributes, copied = vars(value), dict[str, Any]()
            self.objects[id(value)] = (attributes, copied)
            copied.update({name: self.of(held, depth + 1) for name, held in attributes.items()})
        return value

    def _container(self, value: Any, depth: int) -> Any:
        copied = copy.copy(value)
        self._copies[id(value)] = (value, copied)  # before its items, which may hold it
        if len(value) <= MOST_ITEMS and isinstance(value, (list, dict, deque)):
            for key, item in list(value.items() if isinstance(value, dict) else enumerate(value)):
                if type(item) not in PLAIN:
                    copied[key] = self.of(item, depth)
        return copied

    def _tuple(self, value: tuple[Any, ...], depth: int) -> Any:
        items = [self.of(item, depth) for item in value]
        if all(a is b for a, b in zip(items, value, strict=True)):
            return value
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)

    def _tensor(self, t: Tensor) -> Tensor:
        storage = storage_of(t)
        size = 0 if storage is None else t.untyped_storage().nbytes()
        elsewhere = type(t) is not Tensor or t.is_nested or storage is None or storage in self._kept()
        if elsewhere or min(size, t.nbytes) > self.limit:
            copied = t
        elif size > self.limit or t.is_conj() or t.is_neg() or t.is_quantized:
            copied = t.detach().clone()
        else:
            if storage not in self._storages:
                self._storages[storage] = t.untyped_storage().clone()
            place = (t.storage_offset(), t.size(), t.stride())
            copied = torch.empty(0, dtype=t.dtype, device=t.device).set_(self._storages[storage], *place)
        if copied is not t and t.requires_grad:
            copied.requires_grad_()
        self._originals[id(copied)] = (t, _version(copied))
        return copied


def plain(value: Any) -> bool:
    """Whether nothing of a value can change, as of a tuple of numbers."""
    return type(value) in PLAIN or (type(value) is tuple and PLAIN.issuperset(map(type, value)))


def ordinary(value: Any) -> bool:
    """Whether a value is an object of a plain Python class, all of whose state is in its `__dict__`."""
    kind: Any = type(value)
    return (
        kind.__new__ is object.__new__
        and kind.__basicsize__ == _Plain.__basicsize__
        and not isinstance(value, (nn.Module, torch.optim.Optimizer))
        and not kind.__module__.startswith(("torch.", "threading"))
        and bool(getattr(value, "__dict__", None))
    )


def _alike(
    now: Any,
    then: Any,
    same: Callable[[Tensor, Tensor], bool],
    attributes_of: Callable[[Any], dict[str, Any] | None],
    visited: set[int] | None = None,
) -> bool:
    """Whether two values have the same content: `same` decides for tensors; generators never do."""
    visited = set() if visited is None else visited
    if type(now) is not type(then) or isinstance(now, GENERATORS):
        return False
    if id(now) in visited:
        return True
    visited.add(id(now))
    try:
        if isinstance(now, Tensor):
            return same(now, then)
        if isinstance(now, ARRAYS):
            return bool(np.array_equal(now, then))
        if isinstance(now, dict) and len(now) <= MOST_ITEMS:
            pairs = zip(now.values(), then.values(), strict=True)
            return list(now) == list(then) and all(_alike(a, b, same, attributes_of, visited) for a, b in pairs)
        if isinstance(now, (list, tuple, deque)) and len(now) <= MOST_ITEMS:
            pairs = zip(now, then, strict=True)
            return all(_alike(a, b, same, attributes_of, visited) for a, b in pairs)
        if now is then and ordinary(now):
            before = attributes_of(now)
            return before is None or _alike(vars(now), before, same, attributes_of, visited)
        return now is then or bool(now == then)
    except Exception:  # values that cannot be compared count as changed
        return False


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.detach(), b.detach())


def _version(t: Tensor) -> int:
    return -1 if t.is_inference() else t._version


def storage_of(t: Tensor) -> int | None:
    """What identifies the memory of a tensor; None where it is not one stretch of memory."""
    try:
        return int(t.untyped_storage()._cdata)
    except (RuntimeError, NotImplementedError):
        return None
