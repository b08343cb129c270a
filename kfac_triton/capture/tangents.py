"""Forward-mode differentiation by rules of torch functions: one eager pass for k directions.

Every torch function that the pass calls comes by here. A tensor that moves has its tangents (k, *shape) as an
attribute. A function of moving tensors needs a rule, is composed of functions with rules, or has no derivative; any
other raises, so that no product is wrong in silence.

Moving tensors are leaves that require gradients, and functions run without recording a graph. So what is computed from
one where no function mode looks, in an autograd function, a scripted module, an extension or another thread, has a
place in torch's own graph: that is how it is noticed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from kfac_triton.operations import recurrent
from kfac_triton.tangents import COMPOSED, CONSTANTS, KEY, RULES

PASS = "_kfac_pass"  # the attribute that says in which pass a tensor got its tangents
PLAIN = (Tensor, nn.Parameter)
CONTAINERS = (tuple, list, dict)
PYTHON = ("torch.nn.functional", "torch.functional")  # whose functions call others that modes see
METHODS = ("__pow__", "pow", "__rpow__", "__rsub__", "__rdiv__", "__rtruediv__", "__rmatmul__", "norm", "split")

_set_grad_enabled = torch._C._set_grad_enabled


@contextmanager
def moving(parameters: Sequence[Tensor], directions: Sequence[Tensor]) -> Iterator[Tangents]:
    """In here the parameters move along `directions`, one (k, *p.shape) for each.

    Where the model disables gradients nothing moves, as in a backward pass.

    Raises:
        NotImplementedError: for a function without a rule.
    """
    mode = Tangents(directions[0].shape[0])
    cached = torch.is_autocast_cache_enabled()
    try:
        for p, d in zip(parameters, directions, strict=True):
            if p.__class__ not in PLAIN or not p.requires_grad or not p.is_leaf or d.shape != (mode.k, *p.shape):
                raise NotImplementedError("a parameter is no plain tensor that requires gradients")
            setattr(p, KEY, d)
            setattr(p, PASS, mode.token)
        # The cache would keep a cast of every leaf that requires gradients, past writes to it.
        torch.set_autocast_cache_enabled(False)
        with torch.enable_grad(), mode:
            yield mode
    finally:
        torch.set_autocast_cache_enabled(cached)
        for p in parameters:
            p.__dict__.pop(KEY, None)
            p.__dict__.pop(PASS, None)


class Tangents(TorchFunctionMode):
    """One pass along k directions."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k
        self.token = object()

    def of(self, z: Tensor) -> Tensor:
        """The tangents (k, *z.shape) of a tensor of this pass."""
        return getattr(z, KEY) if self._count([z]) else z.new_zeros((self.k, *z.shape))

    def mark(self, z: Tensor, dz: Tensor) -> None:
        """From now on z moves along dz."""
        if z.__class__ not in PLAIN or not z.is_floating_point() or dz.shape[1:] != z.shape or dz.shape[0] != self.k:
            raise NotImplementedError(f"a tensor {tuple(z.shape)} of {z.dtype} has no tangents {tuple(dz.shape)}")
        setattr(z, KEY, dz if dz.dtype is z.dtype else dz.to(z.dtype))
        setattr(z, PASS, self.token)
        z.requires_grad_()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is _set_grad_enabled or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        _set_grad_enabled(False)
        try:
            count, this = 0, self.token
            for a in args:
                token = getattr(a, PASS, None)
                if token is this:
                    count += 1
                elif token is not None or a.__class__ in CONTAINERS or getattr(a, "requires_grad", False):
                    count += self._count([a])
            named = [name for name, a in kwargs.items() if self._count([a])] if kwargs else None
            if not count and not named:
                return func(*args, **kwargs)
            rule = RULES.get(func)
            if rule is None:
                return self._without_rule(func, args, kwargs)
            if rule.follows < count or kwargs or types:
                self._check(func, types, kwargs, named or (), rule.names, count <= rule.follows)
            z, dz = rule.apply(*args, **kwargs)
            if z.__class__ is not Tensor or dz is None or dz.dtype is not z.dtype or dz.shape[1:] != z.shape:
                return self._marked(z, dz)
            if dz.dtype.is_complex:
                raise NotImplementedError(f"{_name(func)} makes complex numbers")
            setattr(z, KEY, dz)
            setattr(z, PASS, this)
            return z.requires_grad_()
        finally:
            _set_grad_enabled(True)

    def _marked(self, z: Any, dz: Any) -> Any:
        """z, of whatever structure, with tangents of the same structure."""
        if isinstance(z, Tensor) and dz is not None:
            self.mark(z, dz)
        elif dz is not None:
            for one, d in zip(z, dz, strict=True):
                self._marked(one, d)
        return z

    def _count(self, values: Iterable[Any]) -> int:
        """How many tensors in there move."""
        count = 0
        for a in values:
            if isinstance(a, (tuple, list)):
                count += self._count(a)
            elif isinstance(a, dict):
                count += self._count(a.values())
            elif isinstance(a, Tensor):
                count += self._moves(a)
        return count

    def _moves(self, t: Tensor) -> bool:
        if getattr(t, PASS, None) is self.token:
            return True
        if hasattr(t, PASS):  # the model keeps it from an earlier pass
            delattr(t, PASS)
            delattr(t, KEY)
            t.requires_grad_(False)
        elif t.grad_fn is not None:
            raise NotImplementedError(f"{t.grad_fn.name()} was called where no function mode looks")
        return False

    def _check(
        self, func: Any, types: Any, kwargs: Mapping[str, Any], named: Iterable[str], names: frozenset[str], few: bool
    ) -> None:
        if not few or any(name not in names for name in named):
            raise NotImplementedError(f"an argument of {_name(func)} moves that its rule does not follow")
        if "out" in kwargs:
            raise NotImplementedError(f"{_name(func)} writes to a tensor that was made before")
        if any(kind not in PLAIN for kind in types):
            raise NotImplementedError(f"an argument of {_name(func)} is no plain tensor")

    def _without_rule(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """What a function without a rule returns for moving arguments, if that can be known."""
        if func in CONSTANTS and "out" not in kwargs:
            return func(*args, **kwargs)
        body = _composition(func)
        if body is None:
            raise NotImplementedError(f"{_name(func)} has no rule for tangents")
        _set_grad_enabled(True)
        with self:
            return body(*args, **kwargs)


@functools.cache
def _composition(func: Any) -> Callable[..., Any] | None:
    """A function that computes the same by functions that modes see; None where none is known."""
    if func in COMPOSED:
        return COMPOSED[func]
    if func in recurrent.KINDS:
        return lambda *args, **kwargs: recurrent.unrolled(func, args, kwargs)[0]
    home = func.__globals__["__name__"] if isinstance(func, FunctionType) else ""
    known = home in PYTHON or (home == "torch._tensor" and func.__name__ in METHODS)
    return _unasking(func) if known else None


def _unasking(func: FunctionType) -> Callable[..., Any]:
    """A function written in Python as it is where no function mode is, though those that it calls see one."""
    asks = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
    names = {**func.__globals__, **dict.fromkeys(asks, lambda *_: False)}
    twin = FunctionType(func.__code__, names, func.__name__, func.__defaults__, func.__closure__)
    twin.__kwdefaults__ = func.__kwdefaults__
    return twin


def _name(func: Any) -> str:
    return str(getattr(func, "__name__", func))
