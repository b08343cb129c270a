"""Attention and recurrent layers made of functions that a mode sees, one by one."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from kfac_triton.operations import recurrent


def attention_body() -> Callable[..., Any]:
    """`F.multi_head_attention_forward` that asks no function mode first, so that modes see the functions inside."""
    body = F.multi_head_attention_forward
    names = {**vars(F), "has_torch_function": lambda *_: False}
    twin = FunctionType(body.__code__, names, body.__name__, body.__defaults__, body.__closure__)
    twin.__kwdefaults__ = body.__kwdefaults__
    return twin


def _attention_by_formula(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options: Any,
) -> Tensor:
    """`F.scaled_dot_product_attention` without fused kernels."""
    if attn_mask is not None and attn_mask.dtype == torch.bool:  # the operator below would add it as numbers
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, -torch.inf)
    out: Tensor = torch._scaled_dot_product_attention_math(
        query, key, value, attn_mask, dropout_p, is_causal, **options
    )[0]
    return out


class Unrolled(TorchFunctionMode):
    """In here recurrent layers run step by step, and attention without fused kernels, as forward-mode derivatives need.

    `torch.nn.attention.sdpa_kernel` would choose the kernel for the whole process.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in recurrent.KINDS:
            return recurrent.unrolled(func, args, kwargs)[0]
        if func is F.multi_head_attention_forward:
            with self:
                return attention_body()(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            return _attention_by_formula(*args, **kwargs)
        return func(*args, **kwargs)
