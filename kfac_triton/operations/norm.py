"""Scales and shifts: those of LayerNorm, RMSNorm, GroupNorm, BatchNorm and InstanceNorm, and any other y = w * x (+ b).

w and b share one block, which needs no Kronecker product: a row is one example's gradient of them,

    a = (sum over positions of dy * x, sum over positions of dy)  (2 C,),    g = (1)

with x the normalised input, so that kron(G, A) = A = sum a a^T / L is their block of the Fisher, exactly. It is held
in full or as its diagonal.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kfac_triton.operations.use import ATEN, Resolve, Use, part_of


@dataclass(eq=False, repr=False)
class ScaleUse(Use):
    """`x` is what the scale multiplies; `shape` is how scale and shift are broadcast against the outputs."""

    operation = "scale"
    shape: tuple[int, ...] = ()

    def a(self) -> Tensor:
        raise NotImplementedError("the rows of a scale depend on the gradients; see `gradients`")

    def g(self, dy: Tensor) -> Tensor:
        return dy

    def gradients(self, dy: Tensor, examples: int, bias: bool) -> Tensor:
        """Every example's gradient of scale and shift, (N, C) or (N, 2 C)."""
        wide = torch.promote_types(dy.dtype, torch.float32)
        dy = dy.to(wide)
        scale = _by_example(dy * self.x.to(wide), self.shape, examples)
        if not bias:
            return scale
        shift = _by_example(dy, self.shape, examples) if self.bias is not None else torch.zeros_like(scale)
        return torch.cat([scale, shift], dim=1)


def _by_example(t: Tensor, shape: tuple[int, ...], examples: int) -> Tensor:
    """Sums t over the axes along which `shape` is broadcast, but for the examples': (N, C).

    The examples are the first axis of that size; one that is a multiple of it holds each example's positions together.
    """
    full = (1,) * (t.dim() - len(shape)) + shape
    free = [i for i in range(t.dim()) if full[i] == 1]
    axis = next((i for i in free if t.shape[i] == examples), None)
    if axis is None and free[:1] == [0] and t.shape[0] % max(examples, 1) == 0:
        t, full, axis = t.unflatten(0, (examples, -1)), (1, *full), 0
    if axis is None:  # no axis of examples: every position of the first free axis is one
        axis = free[0] if free else None
    if axis is None:
        return t.reshape(1, -1)
    over = [i for i in range(t.dim()) if full[i] == 1 and i != axis]
    summed = t.sum(dim=over, keepdim=True) if over else t
    return summed.movedim(axis, 0).reshape(summed.shape[axis], -1)


def _scale(resolve: Resolve, weight: Any, bias: Any, x: Tensor, shape: tuple[int, ...]) -> ScaleUse | None:
    part = resolve(weight)
    if part is None or not part.whole:
        return None
    return ScaleUse(part, resolve(bias), x.detach(), shape=shape)


def _channels(weight: Any, out_axes: int) -> tuple[int, ...]:
    """The shape of one number for each channel, the second axis of an input with so many."""
    return (*weight.shape, *(1,) * (out_axes - 2))


def _match_layer_norm(
    resolve: Resolve, input: Any, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> ScaleUse | None:  # fmt: skip
    x = F.layer_norm(input.detach(), normalized_shape, eps=eps)
    return _scale(resolve, weight, bias, x, tuple(normalized_shape))


def _match_rms_norm(
    resolve: Resolve, input: Any, normalized_shape: Any, weight: Any = None, eps: float | None = None
) -> ScaleUse | None:
    x = F.rms_norm(input.detach(), normalized_shape, eps=eps)
    return _scale(resolve, weight, None, x, tuple(normalized_shape))


def _match_group_norm(
    resolve: Resolve, input: Any, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> ScaleUse | None:  # fmt: skip
    x = F.group_norm(input.detach(), num_groups, eps=eps)
    return None if weight is None else _scale(resolve, weight, bias, x, _channels(weight, input.dim()))


def _match_batch_norm(
    resolve: Resolve, input: Any, running_mean: Any, running_var: Any, weight: Any = None, bias: Any = None,
    training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> ScaleUse | None:  # fmt: skip
    if weight is None:
        return None
    mean, variance = (None, None) if training else (running_mean, running_var)
    x = F.batch_norm(input.detach(), mean, variance, training=training, eps=eps)
    return _scale(resolve, weight, bias, x, _channels(weight, input.dim()))


def _match_instance_norm(
    resolve: Resolve, input: Any, running_mean: Any = None, running_var: Any = None, weight: Any = None,
    bias: Any = None, use_input_stats: bool = True, momentum: float = 0.1, eps: float = 1e-5,
) -> ScaleUse | None:  # fmt: skip
    if weight is None:
        return None
    mean, variance = (None, None) if use_input_stats else (running_mean, running_var)
    x = F.instance_norm(input.detach(), mean, variance, use_input_stats=use_input_stats, eps=eps)
    return _scale(resolve, weight, bias, x, _channels(weight, input.dim()))


def _match_torch_batch_norm(
    resolve: Resolve, input: Any, weight: Any, bias: Any, running_mean: Any, running_var: Any, training: bool,
    momentum: float, eps: float, cudnn_enabled: bool,
) -> ScaleUse | None:  # fmt: skip
    return _match_batch_norm(resolve, input, running_mean, running_var, weight, bias, training, momentum, eps)


def _match_torch_instance_norm(
    resolve: Resolve, input: Any, weight: Any, bias: Any, running_mean: Any, running_var: Any, use_input_stats: bool,
    momentum: float, eps: float, cudnn_enabled: bool,
) -> ScaleUse | None:  # fmt: skip
    return _match_instance_norm(resolve, input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)


def _match_multiply(resolve: Resolve, left: Any, right: Any, *, out: Any = None) -> ScaleUse | None:
    if out is not None or not isinstance(left, Tensor) or not isinstance(right, Tensor):
        return None
    ours = [(t, x) for t, x in ((left, right), (right, left)) if resolve.owner(t) is not None]
    if len(ours) != 1:
        return None
    weight, x = ours[0]
    parameter = resolve.owner(weight)
    if parameter is None or weight.numel() != parameter.numel() or not weight.is_contiguous():
        return None
    whole = part_of(parameter, parameter)
    by_example = weight.dim() == x.dim() > 0 and weight.shape[0] == x.shape[0] > 1
    fits = weight.dim() <= x.dim() and torch.broadcast_shapes(weight.shape, x.shape) == x.shape
    if whole is None or by_example or not fits:
        return None
    return ScaleUse(whole, None, x.detach(), shape=tuple(weight.shape))


def _match_multiply_in_place(resolve: Resolve, left: Any, right: Any) -> ScaleUse | None:
    return _match_multiply(resolve, left.detach().clone() if resolve.owner(left) is None else left, right)


MULTIPLICATIONS = (
    torch.mul, torch.multiply, Tensor.mul, Tensor.multiply, Tensor.__mul__, Tensor.__rmul__, ATEN.mul.Tensor,
)  # fmt: skip
MATCHERS: dict[Any, Callable[..., Use | None]] = {
    F.layer_norm: _match_layer_norm,
    torch.layer_norm: _match_layer_norm,
    F.rms_norm: _match_rms_norm,
    torch.rms_norm: _match_rms_norm,
    F.group_norm: _match_group_norm,
    torch.group_norm: _match_group_norm,
    F.batch_norm: _match_batch_norm,
    F.instance_norm: _match_instance_norm,
    torch.group_norm: _match_group_norm,
    torch.batch_norm: _match_torch_batch_norm,
    torch.instance_norm: _match_torch_instance_norm,
    ATEN.layer_norm.default: _match_layer_norm,
    ATEN.rms_norm.default: _match_rms_norm,
    ATEN.group_norm.default: _match_group_norm,
    ATEN.batch_norm.default: _match_torch_batch_norm,
    ATEN.instance_norm.default: _match_torch_instance_norm,
    ATEN.mul_.Tensor: _match_multiply_in_place,
    Tensor.mul_: _match_multiply_in_place,
    Tensor.__imul__: _match_multiply_in_place,
    **dict.fromkeys(MULTIPLICATIONS, _match_multiply),
}
