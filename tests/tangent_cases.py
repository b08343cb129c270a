"""Calls of every torch function whose tangents have a rule, with the shapes of their arguments, all of which move; and
the tangents of networks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import dense
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_triton.capture.tangents import moving

A = torch.ops.aten
F64 = torch.float64
K = 2  # directions of networks


def case(function: Callable[..., Any], *shapes: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    return function, shapes


M, V, T3, IMAGE = (4, 5), (5,), (2, 3, 4), (2, 4, 6, 6)
MASK = torch.tensor([[True, False, True, False, True]] * 4)
PLACES = torch.tensor([[0, 2], [1, 1], [3, 0]])

UNARY = (
    "tanh",
    "sigmoid",
    "relu",
    "exp",
    "expm1",
    "exp2",
    "sin",
    "cos",
    "abs",
    "neg",
    "negative",
    "erf",
    "square",
    "clamp_min",
    "tan",
    "atan",
    "sinh",
    "cosh",
    "asinh",
    "erfc",
    "sinc",
    "nan_to_num",
    "positive",
    "clone",
)
POSITIVE = ("log", "log1p", "log2", "log10", "sqrt", "rsqrt", "reciprocal", "lgamma", "digamma", "acosh")
UNIT = ("asin", "acos", "atanh", "erfinv", "logit")
ACTIVATIONS = (
    "relu",
    "gelu",
    "silu",
    "mish",
    "elu",
    "selu",
    "celu",
    "leaky_relu",
    "softplus",
    "hardtanh",
    "relu6",
    "hardswish",
    "hardsigmoid",
    "logsigmoid",
    "softshrink",
    "hardshrink",
    "softsign",
    "tanhshrink",
    "glu",
)

CASES: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    **{n: case(lambda x, n=n: getattr(torch, n)(x, *((0.1,) if n == "clamp_min" else ())), M) for n in UNARY},
    **{n: case(lambda x, n=n: getattr(torch, n)(x.abs() + 1.5), M) for n in POSITIVE},
    **{n: case(lambda x, n=n: getattr(torch, n)(x.sigmoid() * 0.8 + 0.1), M) for n in UNIT},
    **{f"F.{n}": case(lambda x, n=n: getattr(F, n)(x), (4, 6)) for n in ACTIVATIONS},
    "gelu by tanh": case(lambda x: F.gelu(x, approximate="tanh"), M),
    "elu with alpha": case(lambda x: F.elu(x, 0.7), M),
    "celu with alpha": case(lambda x: F.celu(x, 0.5), M),
    "leaky relu with a slope": case(lambda x: F.leaky_relu(x, 0.3), M),
    "softplus with beta": case(lambda x: F.softplus(x, 2.0, 0.5), M),
    "prelu": case(lambda x, a: F.prelu(x, a), T3, (3,)),
    "softmin": case(lambda x: F.softmin(x, 1), M),
    "clamp": case(lambda x: x.clamp(-0.5, 0.5) + x.clip(max=0.3) + torch.clamp_max(x, 0.1), M),
    # two arguments
    "linear": case(F.linear, M, (3, 5), (3,)),
    "linear without bias": case(F.linear, M, (3, 5)),
    "linear by name": case(lambda x, W, b: F.linear(x, weight=W, bias=b), M, (3, 5), (3,)),
    "linear of a sequence": case(F.linear, T3, (3, 4), (3,)),
    "linear of a vector": case(F.linear, (4,), (3, 4), (3,)),
    "linear, fixed inputs": case(lambda W, b: F.linear(dense.randn(4, 5), W, b), (3, 5), (3,)),
    "linear, fixed weight": case(lambda x, b: F.linear(x, dense.randn(3, 5), b), M, (3,)),
    "linear, all but its inputs fixed": case(lambda x: F.linear(x, dense.randn(3, 5), dense.randn(3)), M),
    "linear, all but its bias fixed": case(lambda b: F.linear(dense.randn(4, 5), dense.randn(3, 5), b), (3,)),
    "linear, all but its weight fixed": case(lambda W: F.linear(dense.randn(2, 4, 5), W), (3, 5)),
    "linear, transposed view": case(lambda x, W: F.linear(x, W.t()), M, (5, 3)),
    **{
        f"matmul {a} {b}": case(torch.matmul, a, b)
        for a, b in [
            ((4, 5), (5, 3)),
            ((5,), (5,)),
            ((5,), (5, 3)),
            ((4, 5), (5,)),
            ((2, 4, 5), (5, 3)),
            ((2, 4, 5), (5,)),
            ((2, 4, 5), (2, 5, 3)),
            ((5,), (2, 5, 3)),
            ((4, 5), (2, 5, 3)),
            ((2, 1, 4, 5), (3, 5, 2)),
        ]
    },
    "operator @": case(lambda x, y: x @ y, M, (5, 3)),
    "fixed @ moving": case(lambda y: dense.randn(2, 4, 5) @ y, (5, 3)),
    "fixed weight @ moving": case(lambda x: x @ dense.randn(2, 5, 3), (5,)),
    "mm bmm mv": case(lambda x, y, v: torch.mm(x, y), M, (5, 3), (5,)),
    "mv": case(torch.mv, M, V),
    "bmm": case(torch.bmm, T3, (2, 4, 5)),
    "addmm": case(lambda b, x, y: torch.addmm(b, x, y, beta=0.5, alpha=2.0), (3,), M, (5, 3)),
    "addmm, all but the sum fixed": case(lambda b: torch.addmm(b, dense.randn(4, 5), dense.randn(5, 3)), (3,)),
    "addmm of vectors": case(lambda b, x, y: torch.addmm(b, x, y), (3,), M, (5, 3)),
    "addmm, two fixed": case(lambda x: torch.addmm(dense.randn(3), x, dense.randn(5, 3)), M),
    "addmv": case(torch.addmv, (4,), M, V),
    "baddbmm": case(torch.baddbmm, (1, 5), T3, (2, 4, 5)),
    "addbmm addr": case(lambda a, x, y: torch.addbmm(a, x, y), (3, 5), T3, (2, 4, 5)),
    "addr": case(torch.addr, (4, 5), (4,), (5,)),
    **{
        f"einsum {eq}": case(lambda x, y, eq=eq: torch.einsum(eq, x, y), a, b)
        for eq, a, b in [
            ("ij,jk->ik", M, (5, 3)),
            ("bij, bjk -> bik", T3, (2, 4, 5)),
            ("...i,ij->...j", T3, (4, 5)),
            ("ij,ij->", M, M),
            ("kij,j->ki", T3, (4,)),
        ]
    },
    "tensordot": case(lambda x, y: torch.tensordot(x, y, 1), M, (5, 3)),
    "embedding": case(lambda w: F.embedding(PLACES, w), (4, 5)),
    "embedding with padding": case(lambda w: F.embedding(PLACES, w, padding_idx=0), (4, 5)),
    "conv1d": case(lambda x, w, b: F.conv1d(x, w, b, 2, 1), (2, 4, 7), (3, 4, 3), (3,)),
    "conv2d": case(lambda x, w, b: F.conv2d(x, w, b, padding="same", dilation=2), IMAGE, (3, 4, 3, 3), (3,)),
    "conv2d in groups": case(lambda x, w, b: F.conv2d(x, w, b, groups=2), IMAGE, (6, 2, 3, 3), (6,)),
    "conv2d by channel": case(lambda x, w: F.conv2d(x, w, groups=4), IMAGE, (4, 1, 3, 3)),
    "conv2d, one image": case(F.conv2d, IMAGE[1:], (3, 4, 3, 3), (3,)),
    "conv2d, fixed inputs": case(lambda w, b: F.conv2d(dense.randn(*IMAGE), w, b), (3, 4, 3, 3), (3,)),
    "conv2d, fixed weight": case(lambda x: F.conv2d(x, dense.randn(3, 4, 3, 3)), IMAGE),
    "conv2d, all but its bias fixed": case(lambda b: F.conv2d(dense.randn(*IMAGE), dense.randn(3, 4, 3, 3), b), (3,)),
    "conv3d": case(F.conv3d, (1, 2, 4, 4, 4), (3, 2, 2, 2, 2), (3,)),
    "conv_transpose1d": case(lambda x, w, b: F.conv_transpose1d(x, w, b, 2), (2, 4, 5), (4, 3, 3), (3,)),
    "conv_transpose2d": case(lambda x, w, b: F.conv_transpose2d(x, w, b, 2, 1, 1, groups=2), IMAGE, (4, 3, 3, 3), (6,)),
    "conv_transpose2d, one image": case(F.conv_transpose2d, IMAGE[1:], (4, 3, 3, 3), (3,)),
    "conv_transpose3d": case(F.conv_transpose3d, (1, 2, 3, 3, 3), (2, 3, 2, 2, 2), (3,)),
    "add": case(lambda x, y: x + y, M, V),
    "add alpha": case(lambda x, y: torch.add(x, y, alpha=3), V, M),
    "add numbers": case(lambda x: 2 + x + 1.5, M),
    "add fixed": case(lambda x: x + dense.randn(2, 4, 5), M),
    "sub": case(lambda x, y: x - y, V, M),
    "subtract alpha": case(lambda x, y: torch.subtract(x, y, alpha=3), V, M),
    "rsub": case(lambda x: 1 - x, M),
    "rsub of two": case(lambda x, y: torch.rsub(x, y, alpha=2), M, V),
    "mul": case(lambda x, y: x * y * 2, M, V),
    "mul fixed": case(lambda x: dense.randn(2, 4, 5) * x, M),
    "multiply": case(torch.multiply, (4, 1), V),
    "div": case(lambda x, y: x / (y.abs() + 1), M, V),
    "divide": case(lambda x, y: torch.divide(x, y) + torch.true_divide(x, y), V, M),
    "div by and of numbers": case(lambda x: 2 / (x / 3), M),
    "pow": case(lambda x: x**3 + x.pow(2) + torch.pow(x, 1) + x**0, M),
    "pow of a number": case(lambda x: 2.0**x + torch.pow(3.0, x), M),
    "pow by a fixed tensor": case(lambda x: x ** torch.tensor([0.0, 1.0, 2.0, 3.0, 1.0]), M),
    "float_power": case(lambda x: torch.float_power(x, 2), M),
    "where": case(lambda x, y: torch.where(MASK, x, y) + x.where(MASK, y), M, V),
    "where, fixed": case(lambda x: torch.where(MASK, x, 0.0) + torch.where(MASK, dense.randn(1), x), M),
    "masked_fill": case(lambda x: x.masked_fill(MASK, 2.0), V),
    "maximum": case(lambda x, y: torch.maximum(x, y) + torch.minimum(x, y) * 2, M, V),
    "maximum of one": case(lambda x: torch.maximum(x, x * 1.0) + torch.minimum(torch.zeros(5, dtype=F64), x), M),
    "two by torch": case(
        lambda x, y: torch.atan2(x, y) + torch.hypot(x, y) + torch.logaddexp(x, y) + torch.logaddexp2(x, y), M, V
    ),
    "lerp addcmul addcdiv xlogy": case(
        lambda x, y: (
            torch.lerp(x, y, 0.3) + torch.addcmul(x, x, y) + torch.addcdiv(x, x, y.exp()) + torch.xlogy(x, y.exp())
        ),
        M,
        M,
    ),
    # normalisations and softmax
    "layer_norm": case(lambda x, w, b: F.layer_norm(x, (3, 4), w, b, 0.1), T3, (3, 4), (3, 4)),
    "layer_norm, fixed inputs": case(lambda w, b: F.layer_norm(dense.randn(*T3), (4,), w, b), (4,), (4,)),
    "layer_norm, plain": case(lambda x: F.layer_norm(x, (4,)), T3),
    "native_layer_norm": case(lambda x, w, b: torch.native_layer_norm(x, (4,), w, b, 0.1)[0], T3, (4,), (4,)),
    "rms_norm": case(lambda x, w: F.rms_norm(x, (4,), w) + F.rms_norm(x, (4,), w, 0.1), T3, (4,)),
    "group_norm": case(lambda x, w, b: F.group_norm(x, 2, w, b, 0.1), IMAGE, (4,), (4,)),
    "group_norm, plain": case(lambda x: F.group_norm(x, 2), (3, 4)),
    "batch_norm": case(lambda x, w, b: F.batch_norm(x, None, None, w, b, True), IMAGE, (4,), (4,)),
    "batch_norm of rows": case(lambda x, w, b: F.batch_norm(x, None, None, w, b, True, 0.1, 0.2), M, V, V),
    "batch_norm, fixed inputs": case(
        lambda w, b: F.batch_norm(dense.randn(*IMAGE), None, None, w, b, True), (4,), (4,)
    ),
    "batch_norm in evaluation": case(
        lambda x, w, b: F.batch_norm(x, dense.randn(4), dense.randn(4) ** 2, w, b), IMAGE, (4,), (4,)
    ),
    "instance_norm": case(lambda x, w, b: F.instance_norm(x, weight=w, bias=b), IMAGE, (4,), (4,)),
    "softmax": case(lambda x: torch.softmax(x, 0) + x.softmax(-1) + F.softmax(x, dim=1), M),
    "safe softmax": case(lambda x: torch._safe_softmax(x.masked_fill(MASK, -math.inf), -1), M),
    "log_softmax": case(lambda x: torch.log_softmax(x, 0) + F.log_softmax(x, dim=-1), M),
    # shapes
    "view": case(lambda x: x.view(2, -1).reshape(-1) + torch.flatten(x).ravel(), T3),
    "flatten": case(lambda x: x.flatten(start_dim=1) + torch.flatten(x, 1, -1), T3),
    "unflatten": case(lambda x: x.unflatten(0, (2, 2)), M),
    "view_as": case(lambda x: x.view_as(torch.zeros(6, 4)) + x.reshape_as(torch.zeros(6, 4)), T3),
    "permute": case(lambda x: x.permute(2, 0, 1) + x.permute((-1, 0, 1)) + torch.permute(x, (2, 0, 1)), T3),
    "transpose": case(lambda x: x.transpose(0, 1) @ x.transpose(-2, -1).mT.transpose(1, 0).mT, T3),
    "T": case(lambda x: x.T + x.t() + torch.t(x), M),
    "unsqueeze": case(lambda x: x.unsqueeze(1).unsqueeze(-1), M),
    "squeeze": case(lambda x: x.squeeze() + x.squeeze(1) + torch.squeeze(x, -2), (4, 1)),
    "expand": case(lambda x: x.expand(2, -1, 5) + x.expand((2, 4, 5)) + x.expand_as(torch.zeros(2, 4, 5)), (4, 1)),
    "cat": case(lambda x, y: torch.cat([x, y, torch.ones(2, 5, dtype=F64)]) * 2, M, (1, 5)),
    "concat": case(lambda x, y: torch.concat((x, y), dim=-1) + torch.concatenate([x, y], dim=1), M, (4, 1)),
    "stack": case(lambda x, y: torch.stack([x, y, torch.ones(4, 5)], dim=1) + torch.stack((x, x, y), -2), M, M),
    "chunk": case(lambda x: [c * c for c in x.chunk(2, dim=1)], M),
    "split": case(lambda x: [*x.split(2), *torch.split(x, [2, 3], 1), *x.split_with_sizes([1, 4], -1)], M),
    "tensor_split": case(lambda x: x.tensor_split(3, 1), M),
    "unbind": case(lambda x: [*x.unbind(), *torch.unbind(x, -1), *x], T3),
    **{
        f"index {i}": case(lambda x, index=index: x[index], (3, 4, 5))
        for i, index in enumerate(
            [
                0,
                slice(1, 3),
                (slice(None), 1),
                (..., 2),
                (None, 1, slice(0, 4, 2)),
                torch.tensor([2, 0, 0]),
                [0, 2],
                (slice(None), torch.tensor([0, 3])),
                (torch.tensor([0, 1]), torch.tensor([1, 3])),
                (torch.tensor([0, 1]), slice(None), torch.tensor([1, 3])),
                (0, slice(None), torch.tensor([1, 3])),
                torch.tensor([True, False, True]),
                (slice(None), torch.tensor([True, False, True, True])),
                True,
                (torch.tensor([0, 1]), None, torch.tensor([1, 3])),
                (torch.tensor(0), slice(None), torch.tensor([1])),
                (torch.tensor([[0], [1]]), torch.tensor([1, 3])),
                (..., None, torch.tensor([1, 3])),
                (),
                (slice(None), 1, torch.tensor([1, 3])),
                (torch.tensor([0, 1]), slice(None), 1),
            ]
        )
    },
    "moved axes": case(lambda x: [x.movedim(0, -1), x.moveaxis(0, 1), x.swapaxes(0, 1), x.swapdims(0, -1)], T3),
    "turned": case(lambda x: [x.flip(1), x.roll(1, 0), x.fliplr(), x.flipud(), torch.rot90(x)], M),
    "repeated": case(lambda x: [x.repeat(2, 1), x.tile(2, 2), x.repeat_interleave(2, 1)], M),
    "picked": case(
        lambda x: [
            x.select(1, 2),
            x.narrow(0, 1, 2),
            x.index_select(1, torch.tensor([0, 3])),
            x.diagonal(),
            x.tril(),
            x.triu(1),
            x.gather(1, PLACES),
            x.take_along_dim(PLACES[:1], 1),
            x.unfold(1, 2, 1),
            x.masked_select(MASK),
        ],
        M,
    ),
    "diag": case(lambda x: [torch.diag(x), torch.diag_embed(x)], V),
    "trace": case(torch.trace, M),
    "images": case(
        lambda x: [F.pixel_shuffle(x, 2), F.pixel_unshuffle(x, 2), F.unfold(x, 2), F.channel_shuffle(x, 2)], IMAGE
    ),
    "fold": case(lambda x: F.fold(x, (4, 4), 2), (1, 4, 9)),
    "resized": case(
        lambda x: [F.interpolate(x, scale_factor=2, mode=m) for m in ("nearest", "bilinear", "bicubic")], IMAGE
    ),
    "resized lines": case(lambda x: [F.interpolate(x, scale_factor=2, mode=m) for m in ("nearest", "linear")], T3),
    "resized volumes": case(
        lambda x: [F.interpolate(x, scale_factor=2, mode=m) for m in ("nearest", "trilinear")], (1, 2, 3, 3, 3)
    ),
    "pad": case(lambda x: [F.pad(x, (1, 2), value=3.0), F.pad(x, (1, 0), "reflect"), F.pad(x, (1, 1), "circular")], T3),
    "pad images": case(lambda x: [F.pad(x, (1, 0, 1, 1), m) for m in ("reflect", "replicate", "constant")], IMAGE),
    "constant_pad_nd": case(lambda x: torch.constant_pad_nd(x, (1, 1), 2.0), M),
    "casts": case(lambda x: [x.to(F64), x.double(), x.type_as(torch.zeros(1, dtype=F64)), x.contiguous(), x.cpu()], M),
    # sums and choices
    "sum": case(lambda x: [x.sum(), x.sum(1), torch.sum(x, dim=(0, -1)), x.sum(-1, keepdim=True)], T3),
    "mean": case(lambda x: [x.mean(), x.mean(1), torch.mean(x, dim=(0, -1), keepdim=True), x.mean([1, 2])], T3),
    "sum of a number": case(lambda x: x.sum().sum() + x.sum().mean(), M),
    "nansum cumsum": case(lambda x: [x.nansum(), x.cumsum(1), x.cumprod(1), x.logcumsumexp(0), x.diff()], M),
    "moments": case(lambda x: [x.var(), x.std(1), torch.var_mean(x, 1)[0], torch.std_mean(x)[0]], M),
    "prod": case(lambda x: [x.prod(), x.prod(1)], M),
    "norms": case(lambda x: [x.norm(), torch.norm(x, dim=1), torch.linalg.vector_norm(x, 3), F.normalize(x)], M),
    "norm of matrices": case(lambda x: torch.linalg.norm(x), M),
    "logsumexp": case(lambda x: x.logsumexp(1), M),
    "largest": case(lambda x: [x.amax(1), x.amin(), x.max(), x.min(), x.max(1)[0], x.min(1).values], M),
    "sorted": case(lambda x: [x.sort(1)[0], x.topk(2)[0], x.median(1)[0]], M),
    "max_pool1d": case(lambda x: F.max_pool1d(x, 2), T3),
    "max_pool2d": case(lambda x: [F.max_pool2d(x, 3, 2, 1), F.max_pool2d(x[0], 2)], IMAGE),
    "max_pool3d": case(lambda x: F.max_pool3d(x, 2), (1, 2, 4, 4, 4)),
    "max_pool with indices": case(
        lambda x: [
            F.max_pool2d(x, 2, return_indices=True)[0],
            F.max_pool2d_with_indices(x, 2)[0],
            F.max_pool1d_with_indices(x[0], 2)[0],
            F.max_pool3d_with_indices(x, 2)[0],
            F.adaptive_max_pool2d(x, 2, return_indices=True)[0],
        ],
        IMAGE,
    ),
    "avg_pool": case(lambda x: [F.avg_pool2d(x, 2), F.adaptive_avg_pool2d(x, 1), F.adaptive_avg_pool2d(x, 2)], IMAGE),
    "avg_pool of lines": case(lambda x: [F.avg_pool1d(x, 2), F.adaptive_avg_pool1d(x, 2)], T3),
    "avg_pool of volumes": case(lambda x: [F.avg_pool3d(x, 2), F.adaptive_avg_pool3d(x, 1)], (1, 2, 4, 4, 4)),
    "adaptive_max_pool": case(lambda x: F.adaptive_max_pool2d(x, 2), IMAGE),
    "adaptive_max_pool of lines": case(lambda x: F.adaptive_max_pool1d(x, 2), T3),
    "adaptive_max_pool of volumes": case(lambda x: F.adaptive_max_pool3d(x, 1), (1, 2, 4, 4, 4)),
    "products": case(lambda x, y: [torch.dot(x, y), torch.outer(x, y), torch.inner(x, y), torch.kron(x, y)], V, V),
    "distances": case(lambda x, y: [torch.dist(x, y), F.pairwise_distance(x, y)], M, M),
    "cosine_similarity": case(F.cosine_similarity, M, M),
    "cross": case(lambda x, y: torch.linalg.cross(x, y), (4, 3), (4, 3)),
    "bilinear": case(F.bilinear, M, (4, 3), (2, 5, 3), (2,)),
    "scattered": case(
        lambda x, y: [
            x.index_add(0, torch.tensor([0, 2]), y[:2]),
            x.index_copy(0, torch.tensor([1, 2]), y[:2]),
            x.index_fill(0, torch.tensor([1]), 2.0),
            x.scatter(1, PLACES, y[:3, :2]),
            x.scatter_add(1, PLACES, y[:3, :2]),
            x.masked_scatter(MASK, y),
        ],
        M,
        M,
    ),
    "losses": case(lambda x, y: [F.mse_loss(x, y), F.l1_loss(x, y), F.smooth_l1_loss(x, y), F.huber_loss(x, y)], M, M),
    "cross_entropy": case(
        lambda x: [
            F.nll_loss(x, torch.tensor([0, 1, 2, 0])),
            F.binary_cross_entropy(x.sigmoid(), torch.ones(4, 5, dtype=F64)),
        ],
        M,
    ),
    # attention
    "attention": case(F.scaled_dot_product_attention, (2, 2, 3, 4), (2, 2, 5, 4), (2, 2, 5, 4)),
    "causal attention": case(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3), T3, T3, T3
    ),
    "attention of groups": case(
        lambda q, k: F.scaled_dot_product_attention(q, k, k, enable_gqa=True), (2, 4, 3, 4), (2, 2, 3, 4)
    ),
    "attention with a bias": case(lambda q, m: F.scaled_dot_product_attention(q, q, q, m), T3, (3, 3)),
    "attention with a mask": case(
        lambda q: F.scaled_dot_product_attention(q, q, q, torch.tensor([[True] * 3, [False] * 3, [True, False, True]])),
        T3,
    ),
    # by the names that exported programs call
    "aten linear": case(
        lambda x, w, b, v: [
            A.linear.default(x, w, b),
            A.addmm.default(b, x, A.t.default(w)),
            A.mm.default(x, A.permute.default(w, [1, 0])),
            A.matmul.default(x, v),
        ],
        M,
        (3, 5),
        (3,),
        V,
    ),
    "aten elementwise": case(
        lambda x, y: [
            *(getattr(A, n).default(x) for n in ("tanh", "relu", "sigmoid", "gelu", "silu", "neg", "exp")),
            *(getattr(A, n).Tensor(x, y) for n in ("add", "sub", "mul", "div")),
            A.pow.Tensor_Scalar(x, 3),
            A.gelu.default(x, approximate="tanh"),
            A.add.Tensor(x, y, alpha=2),
        ],
        M,
        V,
    ),
    "aten shapes": case(
        lambda x, y: [
            A.view.default(x, [4, 6]),
            A.reshape.default(x, [-1]),
            A.unsqueeze.default(x, 1),
            A.expand.default(x, [2, 2, 3, 4]),
            A.cat.default([x, y], 1),
            A.stack.default([x, y], -1),
            A.clone.default(x),
            A.contiguous.default(x),
            A.transpose.int(x, 0, 2),
            A.flatten.using_ints(x, 1),
            *A.chunk.default(x, 2, 1),
            *A.split.Tensor(x, 2, 2),
        ],
        T3,
        T3,
    ),
    "aten norms": case(
        lambda x, w: [
            A.layer_norm.default(x, [4], w, w, 0.1),
            A.group_norm.default(x.transpose(1, 2), 2, w, w, 0.1),
            A.batch_norm.default(x.transpose(1, 2), w, w, None, None, True, 0.1, 0.1, False),
            A.softmax.int(x, 1),
            A.log_softmax.int(x, -1),
            A.dropout.default(x, 0.5, False),
            A.bmm.default(x, x.mT),
            A.scaled_dot_product_attention.default(x, x, x, None, 0.0, True),
        ],
        T3,
        (4,),
    ),
    "aten convolutions": case(
        lambda x, w, b, e: [
            A.conv2d.default(x, w, b, [1, 1], [1, 1]),
            A.conv1d.default(x.flatten(2), w[:, :, 0], b),
            A.conv3d.default(x[:, :, None], w[:, :, None], b),
            A.embedding.default(e, PLACES),
        ],
        IMAGE,
        (3, 4, 3, 3),
        (3,),
        (4, 2),
    ),
    # without a derivative
    "constants": case(
        lambda x: x * (x > 0) + x.argmax() + torch.zeros_like(x) + x.floor() + x.sign() * x + x.detach() * x, M
    ),
}


def directions(model: nn.Module, k: int = K) -> list[Tensor]:
    return [dense.randn(k, *p.shape, seed=i).to(p.dtype) for i, p in enumerate(model.parameters())]


def by_rules(model: nn.Module, x: Tensor, ds: list[Tensor]) -> tuple[Tensor, Tensor]:
    with torch.no_grad(), moving(list(model.parameters()), ds) as tangents:
        z = model(x)
        return z.detach(), tangents.of(z)
