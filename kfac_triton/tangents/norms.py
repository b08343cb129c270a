"""Tangents of normalisations y = w (x - mean) / sqrt(var + eps) + b, and of softmax."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from kfac_triton.tangents.rule import KEY, Moved, Rule, functions, negatives, tangents


def _wide(t: Tensor) -> Tensor:
    return t.float() if t.dtype.itemsize < 4 else t


def _normalised(x: Tensor, dx: Any, dims: tuple[int, ...], eps: float, *, centred: bool = True) -> tuple[Tensor, Any]:
    """x over its standard deviation, or root mean square, along dims, with its tangents."""
    x = _wide(x)
    mean = x.mean(dims, keepdim=True) if centred else None
    x = x if mean is None else x - mean
    scale = (x.square().mean(dims, keepdim=True) + eps).rsqrt()
    x = x * scale
    if dx is None:
        return x, None
    dx = _wide(dx) * scale
    parallel = (x * dx).mean(dims, keepdim=True)
    return x, dx - dx.mean(dims, keepdim=True) - x * parallel if centred else dx - x * parallel


def _scaled(x: Tensor, dx: Any, shape: tuple[int, ...], w: Any, b: Any) -> Any:
    """The tangents of x w + b, where w and b are viewed as `shape`."""
    dw, db = tangents(w), tangents(b)
    parts = []
    if dx is not None:
        parts.append(dx if w is None else dx * w.view(shape))
    if dw is not None:
        parts.append(x * dw.view(dw.shape[0], *_at_most(x, shape)))
    if db is not None:
        parts.append(db.view(db.shape[0], *_at_most(x, shape)))
    return sum(parts[1:], parts[0]).expand(-1, *x.shape)


def _at_most(x: Tensor, shape: tuple[int, ...]) -> tuple[int, ...]:
    return (1,) * (x.dim() - len(shape)) + shape


def _layer_norm(
    x: Tensor, shape: Any, w: Any = None, b: Any = None, eps: float = 1e-5, cudnn_enable: bool = True
) -> Moved:
    z = torch.layer_norm(x, shape, w, b, eps, cudnn_enable)
    xhat, dx = _normalised(x, tangents(x), tuple(range(-len(shape), 0)), eps)
    return z, _scaled(xhat, dx, tuple(shape), w, b)


def _rms_norm(x: Tensor, shape: Any, w: Any = None, eps: float | None = None) -> Moved:
    z = torch.rms_norm(x, shape, w, eps)
    small = torch.finfo(_wide(x).dtype).eps if eps is None else eps
    xhat, dx = _normalised(x, tangents(x), tuple(range(-len(shape), 0)), small, centred=False)
    return z, _scaled(xhat, dx, tuple(shape), w, None)


def _group_norm(
    x: Tensor, groups: int, w: Any = None, b: Any = None, eps: float = 1e-5, cudnn_enabled: bool = True
) -> Moved:
    z = torch.group_norm(x, groups, w, b, eps, cudnn_enabled)
    dx = tangents(x)
    split = None if dx is None else dx.reshape(len(dx), len(x), groups, -1)
    xhat, split = _normalised(x.reshape(len(x), groups, -1), split, (-1,), eps)
    dx = None if dx is None else split.reshape(dx.shape)
    return z, _scaled(xhat.reshape(x.shape), dx, _channels(x), w, b)


def _batch_norm(
    x: Tensor, w: Any, b: Any, running_mean: Any, running_var: Any, training: bool, momentum: float, eps: float,
    cudnn_enabled: bool,
) -> Moved:  # fmt: skip
    shape, dx = _channels(x), tangents(x)
    if tangents(running_mean) is not None or tangents(running_var) is not None:
        raise NotImplementedError("running statistics move")
    if training:
        xhat, dx = _normalised(x, dx, tuple(d - x.dim() for d in range(x.dim()) if d != 1), eps)
    else:
        scale = (_wide(running_var) + eps).rsqrt().view(shape)
        xhat = (_wide(x) - running_mean.view(shape)) * scale
        dx = None if dx is None else dx * scale
    dz = _scaled(xhat, dx, shape, w, b)
    return torch.batch_norm(x, w, b, running_mean, running_var, training, momentum, eps, cudnn_enabled), dz


def _channels(x: Tensor) -> tuple[int, ...]:
    return (-1, *(1,) * (x.dim() - 2))


def _softmax(x: Tensor, dim: int, dtype: Any = None, *, function: Any = torch.softmax) -> Moved:
    z = function(x, dim, dtype)
    (axis,) = negatives(dim, max(x.dim(), 1))
    moved = getattr(x, KEY) * z
    return z, moved - z * moved.sum(axis, keepdim=True)


def _safe_softmax(x: Tensor, dim: int, dtype: Any = None) -> Moved:
    """Where all of a row are -inf, it is 0, not NaN."""
    return _softmax(x, dim, dtype, function=torch._safe_softmax)


def _log_softmax(x: Tensor, dim: int, dtype: Any = None) -> Moved:
    z = torch.log_softmax(x, dim, dtype)
    (axis,) = negatives(dim, max(x.dim(), 1))
    dx = getattr(x, KEY).to(z.dtype)
    return z, dx - (dx * z.exp()).sum(axis, keepdim=True)


def _rules() -> Iterator[tuple[Any, Rule]]:
    for rule, follows, *names in (
        (_layer_norm, 3, "layer_norm"),
        (_rms_norm, 2, "rms_norm"),
        (_group_norm, 3, "group_norm"),
        (_batch_norm, 3, "batch_norm"),
        (_softmax, 1, "softmax"),
        (_safe_softmax, 1, "_safe_softmax"),
        (_log_softmax, 1, "log_softmax"),
    ):
        yield from ((f, Rule(rule, follows)) for f in functions(*names))


RULES = dict(_rules())
