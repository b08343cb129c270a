"""What a rule is, and how rules find the tangents of their arguments.

A rule of a torch function takes the arguments of the function and returns its value z and the tangents dz, one for each
of k directions: (k, *z.shape), or None where z has no derivative. For functions that return several tensors both are
tuples. A tensor that moves has its tangents as an attribute.

Rules do not write to tangents: those of different tensors may share memory where the tensors do not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

KEY = "_kfac_tangents"  # an attribute, so that a tensor's tangents live as long as the tensor
MANY = 1 << 30
PARAMETERS = frozenset(("input", "weight", "bias"))

_C: Any = torch._C
OWNERS: tuple[Any, ...] = (torch, Tensor, _C._VariableFunctions, _C.TensorBase, _C._nn, _C._linalg)

Function = Callable[..., Any]
Moved = tuple[Any, Any]  # z and dz


class Rule(NamedTuple):
    """`follows`: how many of the arguments may move; `names`: which keyword arguments may."""

    apply: Callable[..., Moved]
    follows: int
    names: frozenset[str] = frozenset()


def tangents(x: Any) -> Any:
    """The tangents of x (k, *x.shape); None where it does not move."""
    return getattr(x, KEY, None)


def functions(*names: str) -> Iterator[Function]:
    """Torch's functions and methods of these names, those written in Python left out: they are composed of others."""
    for name in names:
        for owner in OWNERS:
            function = getattr(owner, name, None)
            if callable(function) and not hasattr(function, "__code__"):
                yield function


def aligned(d: Tensor, n: int) -> Tensor:
    """Tangents d of a tensor that is broadcast to n axes: the new axes stand behind that of the directions."""
    missing = n + 1 - d.dim()
    return d if missing <= 0 else d.view(d.shape[0], *(1,) * missing, *d.shape[1:])


def broadcast(d: Tensor, z: Tensor) -> Tensor:
    """Tangents of what is broadcast to z."""
    d = aligned(d, z.dim())
    return d if d.shape[1:] == z.shape else d.expand(-1, *z.shape)


def total(dx: Tensor | None, dy: Tensor | None, z: Tensor) -> Tensor:
    """dx + dy, broadcast to z; at least one of them is there."""
    if dx is not None and dy is not None:
        n = z.dim()
        return aligned(dx, n) + aligned(dy, n)
    d = dx if dx is not None else dy
    assert d is not None
    return broadcast(d, z)


def negatives(dim: Any, n: int) -> tuple[int, ...]:
    """Axes of a tensor with n axes, counted from the end: its tangents have the same ones. None stands for all."""
    if dim is None or dim in ((), []):
        return tuple(range(-n, 0))
    return tuple(one - n if one >= 0 else one for one in ((dim,) if isinstance(dim, int) else dim))


def in_place(rule: Callable[..., Moved]) -> Callable[..., Moved]:
    """The rule of a function that writes its value into its first argument.

    Raises:
        NotImplementedError: that one is no tensor that moves, or another tensor may have its memory.
    """

    def written(x: Tensor, *args: Any, **kwargs: Any) -> Moved:
        if x.__class__ is not Tensor or not hasattr(x, KEY) or not _alone(x):
            raise NotImplementedError("a function writes to a tensor that others may share")
        z, dz = rule(x, *args, **kwargs)
        if z.shape != x.shape:
            raise NotImplementedError("a value is written to a tensor of another shape")
        return x.copy_(z), dz

    return written


def _alone(t: Tensor) -> bool:
    """Whether no other tensor has t's memory: t has one count of its storage, the wrapper made here the other."""
    storage = t.untyped_storage()
    return bool(_C._storage_Use_Count(storage._cdata) == 2)
