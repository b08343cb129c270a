"""Tangents of functions that only move or pick entries, and of sums: what they do to x they do to each direction."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from kfac_triton.tangents.rule import KEY, MANY, Function, Moved, Rule, aligned, functions, negatives, tangents


def _sizes(sizes: tuple[Any, ...]) -> tuple[Any, ...]:
    """Sizes given one by one or as one sequence."""
    return tuple(sizes[0]) if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes


def _reshape(function: Function) -> Callable[..., Moved]:
    def rule(x: Tensor, *shape: Any, **named: Any) -> Moved:
        z = function(x, *shape, **named)
        if z.dtype is not x.dtype:
            raise NotImplementedError("a view is of another dtype")
        dx = getattr(x, KEY)
        return z, dx.reshape(len(dx), *z.shape)

    return rule


_view = _reshape(Tensor.view)


def _permute(x: Tensor, *dims: Any) -> Moved:
    dims, n = _sizes(dims), x.dim()
    return x.permute(dims), getattr(x, KEY).permute(0, *(d % n + 1 for d in dims))


def _transpose(x: Tensor, dim0: int, dim1: int) -> Moved:
    return x.transpose(dim0, dim1), getattr(x, KEY).transpose(*negatives((dim0, dim1), x.dim()))


def _reversed_axes(x: Tensor) -> Moved:
    """x.T, and x.t()."""
    n = x.dim()
    return x.permute(*reversed(range(n))), getattr(x, KEY).permute(0, *reversed(range(1, n + 1)))


def _matrix_transpose(x: Tensor) -> Moved:
    return x.mT, getattr(x, KEY).mT


def _unsqueeze(x: Tensor, dim: int) -> Moved:
    return x.unsqueeze(dim), getattr(x, KEY).unsqueeze(dim + 1 if dim >= 0 else dim)


def _expand(x: Tensor, *sizes: Any) -> Moved:
    z = x.expand(*sizes)
    return z, aligned(getattr(x, KEY), z.dim()).expand(-1, *z.shape)


def _as_other(function: Function, rule: Callable[..., Moved]) -> Callable[..., Moved]:
    """Functions that take no more than the shape, or the dtype, of their second argument."""

    def as_other(x: Tensor, other: Tensor) -> Moved:
        return (function(x, other), None) if tangents(x) is None else rule(x, other)

    return as_other


def _joined(function: Function) -> Callable[..., Moved]:
    """cat and stack; tensors that do not move have zeros for tangents."""

    def rule(tensors: Any, dim: int = 0) -> Moved:
        z = function(tensors, dim)
        ds = [tangents(t) for t in tensors]
        k = next(len(d) for d in ds if d is not None)
        still = [z.new_zeros(()).expand(k, *t.shape) for t in tensors]
        moved = [zero if d is None else d for zero, d in zip(still, ds, strict=True)]
        return z, function(moved, negatives(dim, z.dim())[0])

    return rule


def _pieces(x: Tensor, zs: Any, dim: int) -> Moved:
    """Tangents of the pieces zs that x is cut into."""
    (axis,) = negatives(dim, x.dim())
    return zs, torch.split(getattr(x, KEY), [z.shape[axis] for z in zs], axis)


def _chunk(x: Tensor, chunks: int, dim: int = 0) -> Moved:
    return _pieces(x, x.chunk(chunks, dim), dim)


def _split(x: Tensor, size: Any, dim: int = 0) -> Moved:
    return _pieces(x, torch.split(x, size, dim), dim)


def _tensor_split(x: Tensor, places: Any, dim: int = 0) -> Moved:
    return _pieces(x, x.tensor_split(places, dim), dim)


def _unbind(x: Tensor, dim: int = 0) -> Moved:
    (axis,) = negatives(dim, x.dim())
    return x.unbind(dim), getattr(x, KEY).unbind(axis)


def _getitem(x: Tensor, index: Any) -> Moved:
    """Indices apart from one another move their axes to the front: then every direction is indexed for itself."""
    dx, places = getattr(x, KEY), index if isinstance(index, tuple) else (index,)
    listed = [i for i, one in enumerate(places) if isinstance(one, (Tensor, list))]
    if len(listed) > 1 and listed[-1] - listed[0] >= len(listed):
        return x[index], torch.stack([d[index] for d in dx])
    behind = (slice(None), *places)
    return x[index], dx[behind]


def _each(function: Function) -> Callable[..., Moved]:
    """A function that is the same for the axes of x whatever stands before them, and counts axes from the end."""

    def rule(x: Tensor, *args: Any, **kwargs: Any) -> Moved:
        dz = [function(d, *args, **kwargs) for d in getattr(x, KEY)]
        return function(x, *args, **kwargs), torch.stack(dz)

    return rule


def _cast(function: Function) -> Callable[..., Moved]:
    def rule(x: Tensor, *args: Any, **kwargs: Any) -> Moved:
        z = function(x, *args, **kwargs)
        if z.is_complex():
            raise NotImplementedError("a cast is to complex numbers")
        return z, getattr(x, KEY).to(z) if z.is_floating_point() else None

    return rule


def _same(function: Function) -> Callable[..., Moved]:
    return lambda x, *args, **kwargs: (function(x, *args, **kwargs), getattr(x, KEY))


def _sum(function: Function) -> Callable[..., Moved]:
    """Sums and means."""

    def rule(x: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Moved:
        z = function(x, dim=dim, keepdim=keepdim, dtype=dtype) if dim is not None else function(x, dtype=dtype)
        dx = getattr(x, KEY)
        if x.dim() == 0:
            return z, dx
        return z, function(dx, dim=negatives(dim, x.dim()), keepdim=keepdim, dtype=dtype)

    return rule


EACH = (
    "squeeze", "movedim", "moveaxis", "flip", "roll", "repeat", "tile", "repeat_interleave", "select", "narrow",
    "index_select", "diagonal", "diag", "tril", "triu", "cumsum", "take_along_dim", "unfold", "rot90",
    "pixel_shuffle", "pixel_unshuffle", "im2col", "col2im", "fliplr", "flipud", "swapaxes", "swapdims", "gather",
    "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d",
    "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_linear1d", "upsample_bilinear2d",
    "upsample_bicubic2d", "upsample_trilinear3d", "trace", "nansum", "channel_shuffle",
)  # fmt: skip


def _rules() -> Iterator[tuple[Any, Rule]]:
    for f in (*functions("view", "reshape", "flatten", "ravel", "unflatten"), Tensor.unflatten):
        yield f, Rule(_reshape(f), 1)
    for f in functions(*EACH):
        yield f, Rule(_each(f), 1)
    for f in functions("cat", "concat", "stack", "concatenate"):
        yield f, Rule(_joined(f), MANY)
    for f in functions("to", "float", "double", "half", "bfloat16", "cpu", "cuda"):
        yield f, Rule(_cast(f), 1)
    for f in functions("contiguous", "clone", "alias", "positive"):
        yield f, Rule(_same(f), 1)
    for f in functions("sum", "mean"):
        yield f, Rule(_sum(f), 1)
    for rule, *names in (
        (_permute, "permute"),
        (_transpose, "transpose"),
        (_reversed_axes, "t"),
        (_unsqueeze, "unsqueeze"),
        (_expand, "expand"),
        (_chunk, "chunk"),
        (_split, "split_with_sizes"),
        (_tensor_split, "tensor_split"),
        (_unbind, "unbind"),
        (_getitem, "__getitem__"),
    ):
        yield from ((f, Rule(rule, 1)) for f in functions(*names))
    for f in functions("expand_as"):
        yield f, Rule(_as_other(f, lambda x, other: _expand(x, *other.shape)), 2)
    for f in functions("view_as", "reshape_as"):
        yield f, Rule(_as_other(f, lambda x, other: _view(x, *other.shape)), 2)
    for f in functions("type_as"):
        yield f, Rule(_as_other(f, _cast(f)), 2)
    for f in functions("split"):
        yield f, Rule(_split, 1)
    for name, rule in (("T", _reversed_axes), ("mT", _matrix_transpose)):
        yield getattr(Tensor, name).__get__, Rule(lambda x, *_, rule=rule: rule(x), 1)


RULES = dict(_rules())
