"""The tangents of torch's functions for k directions at once, by rules.

`rule`: what a rule is. `affine`, `elementwise`, `norms`, `shapes`: rules. `others`: dropout and pooling; functions that
torch differentiates one by one; functions composed of others, and those without a derivative.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from kfac_triton.tangents import affine, elementwise, norms, others, shapes
from kfac_triton.tangents.others import COMPOSED, CONSTANTS
from kfac_triton.tangents.rule import KEY, Rule, functions

RULES: dict[Any, Rule] = {**others.RULES, **shapes.RULES, **norms.RULES, **elementwise.RULES, **affine.RULES}

OVERLOADS = {
    "default": (
        "linear", "addmm", "mm", "bmm", "matmul", "t", "tanh", "relu", "sigmoid", "gelu", "silu", "neg", "exp",
        "permute", "view", "reshape", "unsqueeze", "expand", "cat", "stack", "clone", "contiguous", "embedding",
        "layer_norm", "batch_norm", "group_norm", "conv1d", "conv2d", "conv3d", "dropout", "chunk",
    ),
    "Tensor": ("add", "sub", "mul", "div", "split"),
    "int": ("transpose", "softmax", "log_softmax"),
    "using_ints": ("flatten",),
    "Tensor_Scalar": ("pow",),
}  # fmt: skip


def _overloads() -> Iterator[tuple[Any, Rule]]:
    """What exported programs call."""
    for overload, names in OVERLOADS.items():
        for name in names:
            yield (
                getattr(getattr(torch.ops.aten, name), overload),
                next(RULES[f] for f in functions(name) if f in RULES),
            )


RULES |= dict(_overloads())

__all__ = ["COMPOSED", "CONSTANTS", "KEY", "RULES", "Rule"]
