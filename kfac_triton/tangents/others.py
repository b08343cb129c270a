"""Functions with noise or choices of places, functions composed of others, those that torch differentiates one by one,
and those without a derivative."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_map

from kfac_triton.tangents.rule import KEY, MANY, Function, Moved, Rule, functions, in_place, tangents


def _dropout(function: Function) -> Callable[..., Moved]:
    """The mask, and its scale, are what the function makes of ones, with the same random numbers."""

    def rule(x: Tensor, p: float, train: bool) -> Moved:
        if not train or p == 0:
            return x, getattr(x, KEY)
        mask = function(torch.ones_like(x), p, train)
        return x * mask, getattr(x, KEY) * mask

    return rule


def _max_pool(with_places: Function, axes: int, *, always: bool = False) -> Callable[..., Moved]:
    """`always`: the places of the largest entries are returned too."""

    def rule(x: Tensor, *args: Any, return_indices: bool = always, **kwargs: Any) -> Moved:
        z, places = with_places(x, *args, **kwargs)
        dz = _picked(getattr(x, KEY), places, axes)
        return ((z, places), (dz, None)) if return_indices else (z, dz)

    return rule


def _picked(dx: Tensor, places: Tensor, axes: int) -> Tensor:
    """The entries of dx at `places`, which count through the last axes."""
    flat = places.flatten(-axes).expand(len(dx), *places.shape[:-axes], -1)
    picked: Tensor = dx.flatten(-axes).gather(-1, flat).unflatten(-1, places.shape[-axes:])
    return picked


def _by_torch(function: Function) -> Callable[..., Moved]:
    """One function at a time by torch's own forward-mode derivative, which raises where there is none."""

    def along(i: int, args: Any) -> Any:
        def dual(a: Any) -> Any:
            d = tangents(a) if isinstance(a, Tensor) else None
            return a if d is None else forward_ad.make_dual(a, d[i].to(a.dtype))

        with forward_ad.dual_level():
            found = function(*tree_map(dual, args[0]), **tree_map(dual, args[1]))
            return tree_map(lambda t: forward_ad.unpack_dual(t).tangent, found)

    def rule(*args: Any, **kwargs: Any) -> Moved:
        if "out" in kwargs:
            raise NotImplementedError("a function writes to a tensor")
        z = function(*args, **kwargs)
        k = next(len(d) for d in map(tangents, _leaves(args)) if d is not None)
        found = [along(i, (args, kwargs)) for i in range(k)]
        if isinstance(z, Tensor):
            return z, None if found[0] is None else torch.stack(found)
        return z, [None if ds[0] is None else torch.stack(ds) for ds in zip(*found, strict=True)]

    return rule


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, (tuple, list)):
        for one in value:
            yield from _leaves(one)
    else:
        yield value


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`F.scaled_dot_product_attention` by its formula."""
    if enable_gqa:
        key, value = (t.repeat_interleave(query.size(-3) // t.size(-3), -3) for t in (key, value))
    scores = (query * (1 / math.sqrt(query.size(-1)) if scale is None else scale)) @ key.transpose(-2, -1)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -math.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    weights = torch._safe_softmax(scores, -1)
    weights = torch.dropout(weights, dropout_p, True) if dropout_p else weights
    return torch.matmul(weights, value)


COMPOSED: dict[Any, Callable[..., Any]] = {
    F.scaled_dot_product_attention: attention,
    torch.ops.aten.scaled_dot_product_attention.default: attention,
}

BY_TORCH = (
    "tan", "asin", "acos", "atan", "sinh", "cosh", "asinh", "acosh", "atanh", "atan2", "erfc", "erfinv", "lgamma",
    "digamma", "logit", "sinc", "logaddexp", "logaddexp2", "hypot", "xlogy", "lerp", "addcmul", "addcdiv", "prelu",
    "glu", "softshrink", "hardshrink", "softsign", "logsumexp", "prod", "var", "std", "norm", "linalg_vector_norm",
    "amax", "amin", "max", "min", "median", "topk", "sort", "cumprod", "logcumsumexp", "var_mean", "std_mean",
    "dot", "outer", "inner", "kron", "addbmm", "addr", "bilinear", "dist",
    "instance_norm", "native_layer_norm",
    "constant_pad_nd", "pad", "masked_select",
    "index_add", "index_copy", "index_fill", "scatter", "scatter_add", "masked_scatter", "diff", "mse_loss",
    "l1_loss", "smooth_l1_loss", "huber_loss", "binary_cross_entropy", "nll_loss_nd", "cosine_similarity",
    "pairwise_distance", "broadcast_tensors", "float_power", "nan_to_num", "diag_embed",
    "linalg_norm", "linalg_cross", "tensordot",
)  # fmt: skip

READ = ("shape", "dtype", "device", "ndim", "layout", "is_cuda", "is_cpu", "is_sparse", "is_nested", "is_quantized",
        "is_meta", "is_mps", "is_xpu", "is_mkldnn", "requires_grad", "itemsize", "nbytes")  # fmt: skip
WITHOUT_DERIVATIVE = (
    "size", "dim", "ndimension", "numel", "nelement", "stride", "storage_offset", "element_size", "get_device",
    "is_floating_point", "is_complex", "is_signed", "is_contiguous", "is_same_size", "is_inference", "result_type",
    "can_cast", "is_nonzero", "is_conj", "is_neg", "sym_size", "zeros_like", "ones_like", "empty_like", "full_like",
    "rand_like", "randn_like", "randint_like", "new_zeros", "new_ones", "new_full", "new_empty", "detach", "long",
    "int", "bool", "short", "byte", "char", "gt", "lt", "ge", "le", "eq", "ne", "greater", "less", "greater_equal",
    "less_equal", "not_equal", "__gt__", "__lt__", "__ge__", "__le__", "__eq__", "__ne__", "isnan", "isinf",
    "isfinite", "isposinf", "isneginf", "isclose", "argmax", "argmin", "argsort", "sign", "sgn", "floor", "ceil",
    "round", "trunc", "signbit", "any", "all", "logical_and", "logical_or", "logical_not", "logical_xor", "equal",
    "allclose", "nonzero", "count_nonzero", "bernoulli", "multinomial", "searchsorted", "bucketize", "heaviside",
)  # fmt: skip


def _rules() -> Iterator[tuple[Any, Rule]]:
    for f in functions(*BY_TORCH):
        yield f, Rule(_by_torch(f), MANY)
    for name in ("dropout", "feature_dropout"):
        for f in functions(name):
            yield f, Rule(_dropout(f), 1)
            yield from ((written, Rule(in_place(_dropout(f)), 1)) for written in functions(name + "_"))
    for axes in (1, 2, 3):
        largest, adaptive = f"max_pool{axes}d", f"adaptive_max_pool{axes}d"
        for name in (largest, adaptive):
            yield getattr(F, name), Rule(_max_pool(getattr(F, name + "_with_indices"), axes), 1)
        for f in functions(largest):
            yield f, Rule(_max_pool(getattr(F, largest + "_with_indices"), axes), 1)
        for f in functions(largest + "_with_indices", adaptive):
            yield f, Rule(_max_pool(f, axes, always=True), 1)


RULES = dict(_rules())
CONSTANTS = frozenset(functions(*WITHOUT_DERIVATIVE)) | {getattr(Tensor, name).__get__ for name in READ}
CONSTANTS |= {Tensor.__len__}
