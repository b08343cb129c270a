"""The step below the interval branches: precondition, trust region, momentum, weights; and AdamW for the rest.

Pure functions over lists of tensors, compiled as one graph (`compiled`) or run eagerly. What changes from step to step
enters as 0-d tensors, so that a scheduler never recompiles; what decides the graph stands in a `Plan`. Where kernels
serve (a fused plan) two operators do it: the products with <V, grad> at their end, and the update in one pass.

    V = G_inv (grad_W + weight_decay W) A_inv, or its like in eigenbases
    nu = min(1, sqrt(2 kl_clip / sum over parameters of lr^2 <V, grad>))         (Wu et al. 2017, section 3)
        with the largest lr so far in place of lr where kl_annealing is on
    buf <- momentum buf + nu V,  W <- W - lr buf
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from kfac_triton import chain, ops, temporal_chain
from kfac_triton.blocks.layout import BLOCKS, DIAGONAL, Layout
from kfac_triton.chain import Link
from kfac_triton.temporal_chain import Transform

ADAM_BETA1, ADAM_BETA2, ADAM_EPS = 0.9, 0.999, 1e-8

Scalar = float | Tensor


@dataclass(frozen=True)
class LayerPlan:
    """One block: `group` and `bias_group` index the hyper-parameters; the bias may have no gradient. `in_bases`: it has
    eigenbases in the place of inverses; `in_time`: a transform for a chain of times."""

    layout: Layout
    group: int
    bias_group: int
    bias_has_grad: bool
    in_bases: bool = False
    in_time: bool = False

    @property
    def in_blocks(self) -> bool:
        """Whether a side has several dense blocks, which no operator multiplies with."""
        return not self.in_time and BLOCKS in (self.layout.A, self.layout.G)

    @property
    def factored(self) -> bool:
        """Whether it is a product with two inverses."""
        return not (self.in_bases or self.in_time or self.in_blocks)


@dataclass(frozen=True)
class Plan:
    """What decides the graph of a step. `chain`: the layers, in their order, are linked by a tridiagonal inverse;
    `bf16`: the products with the inverses are of bfloat16 numbers; `fused`: kernels serve, and dense inverses come with
    the zeros around them."""

    layers: tuple[LayerPlan, ...]
    fallback_groups: tuple[int, ...]
    trust_region: bool
    momentum: bool
    weight_decay: bool
    gated: bool
    chain: bool = False
    bf16: bool = False
    fused: bool = False


@dataclass(eq=False, repr=False)
class Hyper:
    """Hyper-parameters by group. `bounded_lr` is the one whose step kl_clip bounds. `finite` (0-d bool) gates the whole
    step on the device, `unscale` multiplies the gradients; both count only in a gated plan."""

    lr: list[Scalar]
    bounded_lr: list[Scalar]
    momentum: list[Scalar]
    weight_decay: list[Scalar]
    kl_clip: list[Scalar]
    fallback_lr: list[Scalar]
    finite: Tensor
    unscale: Tensor


@dataclass(eq=False, repr=False)
class Blocks:
    """Tensors of the blocks, by layer; an absent bias (or its momentum) is an empty tensor. Of a layer in eigenbases,
    A_inv and G_inv are Q_A and Q_G; of any other, its spectrum and damping are empty. `transforms`: of the layers in
    time alone."""

    weights: list[Tensor] = field(default_factory=list)
    weight_grads: list[Tensor] = field(default_factory=list)
    weight_buffers: list[Tensor] = field(default_factory=list)
    biases: list[Tensor] = field(default_factory=list)
    bias_grads: list[Tensor] = field(default_factory=list)
    bias_buffers: list[Tensor] = field(default_factory=list)
    A_inv: list[Tensor] = field(default_factory=list)
    G_inv: list[Tensor] = field(default_factory=list)
    spectra: list[Tensor] = field(default_factory=list)
    dampings: list[Tensor] = field(default_factory=list)
    transforms: list[Transform] = field(default_factory=list)
    links: list[Link] = field(default_factory=list)


@dataclass(eq=False, repr=False)
class Fallback:
    """Tensors of the AdamW update, by parameter; `steps` are 0-d counters on the parameters' device."""

    parameters: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    exp_avgs: list[Tensor] = field(default_factory=list)
    exp_avg_sqs: list[Tensor] = field(default_factory=list)
    steps: list[Tensor] = field(default_factory=list)


def step_(plan: Plan, hyper: Hyper, blocks: Blocks, fallback: Fallback) -> None:
    """One step on every parameter of the plan, in place."""
    if plan.fused:
        _fused_step_(plan, hyper, blocks)
    else:
        _plain_step_(plan, hyper, blocks)
    for i, group in enumerate(plan.fallback_groups):
        adamw_(plan, hyper, group, fallback, i)


def _plain_step_(plan: Plan, hyper: Hyper, blocks: Blocks) -> None:
    grads, V = precondition(plan, hyper, blocks)
    nu = _trust_region(plan, hyper, _dots(plan, V, grads, blocks.weights)) if plan.trust_region else None
    moves: dict[tuple[int, int], list[tuple[Tensor, Tensor, Tensor]]] = {}
    for i, layer in enumerate(plan.layers):
        V_weight, V_bias = layer.layout.split(V[i], blocks.weights[i].shape)
        own = moves.setdefault((layer.group, layer.group), [])
        own.append((blocks.weights[i], blocks.weight_buffers[i], V_weight))
        if V_bias is not None and layer.bias_has_grad:
            own = moves.setdefault((layer.bias_group, layer.group), [])
            own.append((blocks.biases[i], blocks.bias_buffers[i], V_bias))
    for (group, region), tensors in moves.items():
        W, buffers, directions = (list(ts) for ts in zip(*tensors, strict=True))
        _move_(plan, hyper, group, W, buffers, directions, None if nu is None else nu[region])


def _fused_step_(plan: Plan, hyper: Hyper, blocks: Blocks) -> None:
    if not plan.layers:
        return
    apart = plan.chain or not all(
        layer.factored for layer in plan.layers
    )  # what kron_matmul_ does not end in <V, grad>
    dots = blocks.A_inv[0].new_empty(len(plan.layers), 2) if plan.trust_region and not apart else None
    grads, V = precondition(plan, hyper, blocks, dots)
    one = torch.ones_like(hyper.unscale, dtype=torch.float32)
    nu = [one] * len(hyper.lr)
    if plan.trust_region:
        pairs = (
            _dots(plan, V, grads, blocks.weights) if dots is None else [tuple(pair.unbind()) for pair in dots.unbind()]
        )
        nu = _trust_region(plan, hyper, pairs)
    W, buffers, moves, groups, scales = [], [], [], [], []
    for i, layer in enumerate(plan.layers):
        own = [(blocks.weights[i], blocks.weight_buffers[i], layer.group)]
        if layer.bias_has_grad:
            own.append((blocks.biases[i], blocks.bias_buffers[i], layer.bias_group))
        for (parameter, buffer, group), v in zip(own, layer.layout.parts(V[i], blocks.weights[i].shape), strict=False):
            W.append(layer.layout.by_taps(parameter))
            buffers.append(layer.layout.by_taps(buffer) if plan.momentum else buffer)
            moves.append(v)
            groups.append(group)
            scales.append(nu[layer.group])
    gated = [_gated(plan, hyper, group) for group in groups]
    ops.fused_update_(
        W,
        buffers if plan.momentum else [],
        moves,
        scales,
        [torch.as_tensor(lr) for lr, _ in gated],
        [torch.as_tensor(momentum) for _, momentum in gated],
        [torch.zeros_like(one)] * len(W),  # weight decay is l2: it is in the gradient
    )


def precondition(
    plan: Plan, hyper: Hyper, blocks: Blocks, dots: Tensor | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """(grad + weight_decay W, V) of every layer as joint matrices; `dots` (layers, 2) gets <V, grad>, a bias apart."""
    grads = [_joint_gradient(plan, hyper, blocks, i) for i in range(len(plan.layers))]
    if plan.chain:
        return grads, chain.product(grads, blocks.links, blocks.A_inv[-1], blocks.G_inv[-1])
    shapes = [grad.shape for grad in grads]
    if plan.fused:
        sides = zip(plan.layers, grads, blocks.G_inv, blocks.A_inv, strict=True)
        grads = [grad if layer.in_blocks else _widened(grad, G, A) for layer, grad, G, A in sides]
    V = [_aligned_like(grad) for grad in grads]
    bias_columns = [layer.layout.bias_columns(W.shape) for layer, W in zip(plan.layers, blocks.weights, strict=True)]
    splits = [shape[-1] - columns for shape, columns in zip(shapes, bias_columns, strict=True)]
    factored = [i for i, layer in enumerate(plan.layers) if layer.factored]
    if factored:
        lists = [[ts[i] for i in factored] for ts in (V, blocks.G_inv, grads, blocks.A_inv)]
        ops.kron_matmul_(*lists, bf16=plan.bf16, dots=dots, splits=[splits[i] for i in factored])
    in_bases = [i for i, layer in enumerate(plan.layers) if layer.in_bases]
    if in_bases:
        lists = [V, blocks.G_inv, grads, blocks.A_inv, blocks.spectra, blocks.dampings]
        ops.eigen_scale_(*([ts[i] for i in in_bases] for ts in lists))
    in_time = (i for i, layer in enumerate(plan.layers) if layer.in_time)
    for i, transform in zip(in_time, blocks.transforms, strict=True):
        d_out, d_in = shapes[i][-2:]
        V[i][..., :d_out, :d_in] = temporal_chain.product(grads[i][..., :d_out, :d_in], transform)
    for i, layer in enumerate(plan.layers):
        if layer.in_blocks:
            U = _side_product(blocks.G_inv[i], grads[i], layer.layout.G)
            V[i].copy_(_side_product(blocks.A_inv[i], U.mT, layer.layout.A).mT)
    cut = [[t[..., : shape[-2], : shape[-1]] for t, shape in zip(ts, shapes, strict=True)] for ts in (grads, V)]
    return (cut[0], cut[1]) if plan.fused else (grads, V)


def _side_product(F_inv: Tensor, M: Tensor, form: str) -> Tensor:
    """F_inv M for a matrix M (d, n)."""
    if form == DIAGONAL:
        return F_inv.unsqueeze(-1) * M
    if form != BLOCKS:
        return F_inv @ M
    b, w = F_inv.shape[:2]
    by_block = F.pad(M, (0, 0, 0, b * w - len(M))).unflatten(0, (b, w))
    product: Tensor = (F_inv @ by_block).flatten(0, 1)
    return product[: len(M)]


def _widened(grad: Tensor, G_inv: Tensor, A_inv: Tensor) -> Tensor:
    """The gradient with zeros where its inverses have them."""
    return F.pad(grad, (0, A_inv.shape[-1] - grad.shape[-1], 0, G_inv.shape[-1] - grad.shape[-2]))


def _gradient(plan: Plan, hyper: Hyper, grad: Tensor, decay: Tensor | None = None) -> Tensor:
    """The gradient, without a GradScaler's scale, plus `decay`; zero in a step that is skipped."""
    if plan.gated:
        grad = grad * hyper.unscale.to(grad.dtype)
    if decay is not None:
        grad = grad + decay
    return torch.where(hyper.finite, grad, torch.zeros_like(grad)) if plan.gated else grad


def _decay(plan: Plan, hyper: Hyper, parameter: Tensor, group: int) -> Tensor | None:
    return parameter * hyper.weight_decay[group] if plan.weight_decay else None


def _joint_gradient(plan: Plan, hyper: Hyper, blocks: Blocks, i: int) -> Tensor:
    """grad + weight_decay * parameter of weight and bias, as one matrix in the inverses' dtype."""
    layer = plan.layers[i]
    weight = _gradient(plan, hyper, blocks.weight_grads[i], _decay(plan, hyper, blocks.weights[i], layer.group))
    bias = None
    if layer.bias_has_grad:
        bias = _gradient(plan, hyper, blocks.bias_grads[i], _decay(plan, hyper, blocks.biases[i], layer.bias_group))
    return layer.layout.join(weight, bias).to(blocks.A_inv[i].dtype)


def _aligned_like(grad: Tensor) -> Tensor:
    """Space of grad's shape whose rows start at multiples of 16 elements: a joint bias makes most widths odd, and the
    products of the `mnist` autoencoder took 63 ms with those, 54 ms with these (medians, two cores)."""
    width = grad.shape[-1]
    return grad.new_empty(*grad.shape[:-1], ops.padded_width(width))[..., :width]


def _dots(plan: Plan, V: list[Tensor], grads: list[Tensor], weights: list[Tensor]) -> list[tuple[Tensor, ...]]:
    """<V, grad> of every layer: one number, or two where the bias has a learning rate of its own, its last."""
    found: list[tuple[Tensor, ...]] = []
    for layer, v, grad, W in zip(plan.layers, V, grads, weights, strict=True):
        product = v * grad
        if layer.layout.bias and layer.bias_group != layer.group:
            at = product.shape[-1] - layer.layout.bias_columns(W.shape)
            found.append((product[..., :at].sum(), product[..., at:].sum()))
        else:
            found.append((product.sum(),))
    return found


def _trust_region(plan: Plan, hyper: Hyper, dots: Sequence[tuple[Tensor, ...]]) -> list[Tensor]:
    """nu by group: one bound on the whole model's step, which each group's kl_clip may set its own way."""
    total = dots[0][0].new_zeros(()) if dots else hyper.finite.new_zeros((), dtype=torch.float32)
    by_group: dict[int, list[Tensor]] = {}
    for layer, pair in zip(plan.layers, dots, strict=True):
        for dot, group in zip(pair, (layer.group, layer.bias_group), strict=False):
            by_group.setdefault(group, []).append(dot)
    for group, own in by_group.items():
        total = total + torch.stack(own).sum() * hyper.bounded_lr[group] ** 2
    total = total.clamp(min=torch.finfo(total.dtype).tiny)
    return [torch.sqrt(2 * kl_clip / total).clamp(max=1.0) for kl_clip in hyper.kl_clip]


def _move_(
    plan: Plan,
    hyper: Hyper,
    group: int,
    parameters: list[Tensor],
    buffers: list[Tensor],
    V: list[Tensor],
    nu: Tensor | None,
) -> None:
    directions = V if nu is None else list(torch._foreach_mul(V, nu))
    lr, momentum = _gated(plan, hyper, group)
    if plan.momentum:
        torch._foreach_mul_(buffers, momentum)
        torch._foreach_add_(buffers, directions)
        directions = buffers
    torch._foreach_sub_(parameters, torch._foreach_mul(directions, lr))


def _gated(plan: Plan, hyper: Hyper, group: int) -> tuple[Scalar, Scalar]:
    """lr and momentum of a group, as a skipped step has them: 0 and 1."""
    lr, momentum = hyper.lr[group], hyper.momentum[group]
    if not plan.gated:
        return lr, momentum
    return torch.where(hyper.finite, lr, 0.0), torch.where(hyper.finite, momentum, 1.0)


def adamw_(plan: Plan, hyper: Hyper, group: int, fallback: Fallback, i: int) -> None:
    """Loshchilov & Hutter (2019), algorithm 2, with the usual constants."""
    parameter, step = fallback.parameters[i], fallback.steps[i]
    grad = _gradient(plan, hyper, fallback.grads[i])
    lr, weight_decay = hyper.fallback_lr[group], hyper.weight_decay[group]
    if plan.gated:
        passed = hyper.finite.double()
        lr = torch.where(hyper.finite, lr, 0.0)
    else:
        passed = torch.ones_like(step, dtype=torch.float64)
    step.add_(passed)
    exp_avg, exp_avg_sq = fallback.exp_avgs[i], fallback.exp_avg_sqs[i]
    exp_avg.add_((grad - exp_avg) * ((1 - ADAM_BETA1) * passed))
    exp_avg_sq.add_((grad * grad - exp_avg_sq) * ((1 - ADAM_BETA2) * passed))
    count = step.double().clamp(min=1)
    corrected = exp_avg / (1 - ADAM_BETA1**count)
    root = (exp_avg_sq / (1 - ADAM_BETA2**count)).sqrt() + ADAM_EPS
    if plan.weight_decay:
        parameter.sub_(parameter * (lr * weight_decay))
    parameter.sub_(corrected / root * lr)
