"""The step below the interval branches: precondition, trust region, momentum, weights; and AdamW for the rest.

Pure functions over lists of tensors, compiled as one graph (`compiled`) or run eagerly. What changes from step to step
enters as 0-d tensors, so that a scheduler never recompiles; what decides the graph stands in a `Plan`. Where kernels
serve (a fused plan) two operators do it: the products with <V, grad> at their end, and the update in one pass.

    V = G_inv grad A_inv, or its like in eigenbases,    grad = (grad_W + weight_decay W) / loss_scale
    buf <- momentum buf + nu V,  W <- W - tau lr buf

with the bounds nu and tau of `trust_region`, in which the largest lr so far stands for lr where kl_annealing is on. The
gradient of the whole network is divided by its size, a power of two, before the products and the sums, so that nothing
overflows: 1 but for huge gradients.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kfac_triton import adamw, chain, ops, temporal_chain, trust_region
from kfac_triton.blocks.layout import BLOCKS, DIAGONAL
from kfac_triton.step_plan import Blocks, Fallback, Hyper, Plan, Scalar
from kfac_triton.trust_region import Share


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
    nu, tau = _bounds_(plan, hyper, blocks, grads, _dots(plan, V, grads, blocks.weights) if plan.trust_region else [])
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
        _move_(plan, hyper, group, W, buffers, directions, nu[region], tau[region])


def _fused_step_(plan: Plan, hyper: Hyper, blocks: Blocks) -> None:
    if not plan.layers:
        return
    apart = plan.chain or not all(
        layer.factored for layer in plan.layers
    )  # what kron_matmul_ does not end in <V, grad>
    dots = blocks.A_inv[0].new_empty(len(plan.layers), 2) if plan.trust_region and not apart else None
    grads, V = precondition(plan, hyper, blocks, dots)
    pairs: list[tuple[Tensor, ...]] = []
    if dots is not None:
        sums = dots.sum(dim=1)
        pairs = [tuple(dots[i]) if layer.split else (sums[i],) for i, layer in enumerate(plan.layers)]
    elif plan.trust_region:
        pairs = _dots(plan, V, grads, blocks.weights)
    nu, tau = _bounds_(plan, hyper, blocks, grads, pairs)
    W, buffers, moves, groups, regions = [], [], [], [], []
    for i, layer in enumerate(plan.layers):
        own = [(blocks.weights[i], blocks.weight_buffers[i], layer.group)]
        if layer.bias_has_grad:
            own.append((blocks.biases[i], blocks.bias_buffers[i], layer.bias_group))
        for (parameter, buffer, group), v in zip(own, layer.layout.parts(V[i], blocks.weights[i].shape), strict=False):
            W.append(layer.layout.by_taps(parameter))
            buffers.append(layer.layout.by_taps(buffer) if plan.momentum else buffer)
            moves.append(v)
            groups.append(group)
            regions.append(layer.group)
    gated = [_gated(plan, hyper, group) for group in groups]
    zero = torch.zeros_like(hyper.unscale, dtype=torch.float32)
    ops.fused_update_(
        W,
        buffers if plan.momentum else [],
        moves,
        [nu[region] for region in regions],
        [tau[region] * lr for region, (lr, _) in zip(regions, gated, strict=True)],
        [torch.as_tensor(momentum) for _, momentum in gated],
        [zero] * len(W),  # weight decay is l2: it is in the gradient
    )


def precondition(
    plan: Plan, hyper: Hyper, blocks: Blocks, dots: Tensor | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """(grad, V) of every layer as joint matrices, for the gradient divided by loss_scale and its size; `dots`
    (layers, 2) gets <V, grad>, a bias apart."""
    share = 1 / (hyper.loss_scale * hyper.size)
    grads = [_joint_gradient(plan, hyper, blocks, i, share) for i in range(len(plan.layers))]
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


def _joint_gradient(plan: Plan, hyper: Hyper, blocks: Blocks, i: int, share: Tensor) -> Tensor:
    """share (grad + weight_decay * parameter) of weight and bias, as one matrix in the inverses' dtype; zero in a step
    that is skipped."""
    layer, dtype = plan.layers[i], blocks.A_inv[i].dtype

    def own(grad: Tensor, parameter: Tensor, group: int) -> Tensor:
        # one after the other: their product may be denormal, which code compiled for speed makes the process flush to 0
        scaled = (grad.to(dtype) * hyper.unscale.to(dtype) if plan.gated else grad.to(dtype)) * share
        if plan.weight_decay:
            scaled = scaled + parameter.to(dtype) * (share * hyper.weight_decay[group])
        return torch.where(hyper.finite, scaled, torch.zeros_like(scaled)) if plan.gated else scaled

    bias = None
    if layer.bias_has_grad:
        bias = own(blocks.bias_grads[i], blocks.biases[i], layer.bias_group)
    return layer.layout.join(own(blocks.weight_grads[i], blocks.weights[i], layer.group), bias)


def _aligned_like(grad: Tensor) -> Tensor:
    """Space of grad's shape whose rows start at multiples of 16 elements: a joint bias makes most widths odd, and the
    products of the `mnist` autoencoder took 63 ms with those, 54 ms with these (medians, two cores)."""
    width = grad.shape[-1]
    return grad.new_empty(*grad.shape[:-1], ops.padded_width(width))[..., :width]


def _dots(plan: Plan, V: list[Tensor], grads: list[Tensor], weights: list[Tensor]) -> list[tuple[Tensor, ...]]:
    """<V, grad> of every layer: one number, or two where the bias counts apart, its last."""
    found: list[tuple[Tensor, ...]] = []
    for layer, v, grad, W in zip(plan.layers, V, grads, weights, strict=True):
        product = v * grad
        if layer.split:
            at = product.shape[-1] - layer.layout.bias_columns(W.shape)
            found.append((product[..., :at].sum(), product[..., at:].sum()))
        else:
            found.append((product.sum(),))
    return found


def _overlaps(plan: Plan, blocks: Blocks, grads: list[Tensor]) -> list[tuple[Tensor, ...]]:
    """<buf, grad> of every layer, as `_dots`."""
    found: list[tuple[Tensor, ...]] = []
    for i, (layer, grad) in enumerate(zip(plan.layers, grads, strict=True)):
        buffers = [blocks.weight_buffers[i], *([blocks.bias_buffers[i]] if layer.bias_has_grad else [])]
        parts = layer.layout.parts(grad, blocks.weights[i].shape)
        own = [(layer.layout.by_taps(buf) * part).sum() for buf, part in zip(buffers, parts, strict=False)]
        found.append(tuple(own) if layer.split else (torch.stack(own).sum(),))
    return found


def _bounds_(
    plan: Plan, hyper: Hyper, blocks: Blocks, grads: list[Tensor], dots: Sequence[tuple[Tensor, ...]]
) -> tuple[list[Tensor], list[Tensor]]:
    """(nu times the gradient's size, tau) by group: one bound on the whole model's step, which each group's kl_clip may
    set its own way. Writes the quadratics."""
    size = hyper.size.double()
    one = torch.ones_like(size)
    kl_clip = [torch.as_tensor(clip).double() for clip in hyper.kl_clip]
    if not plan.trust_region:
        return [size.clamp(max=trust_region.MOST)] * len(kl_clip), [one] * len(kl_clip)
    owners = [
        (group, layer.group)
        for layer, own in zip(plan.layers, dots, strict=True)
        for group, _ in zip((layer.group, layer.bias_group), own, strict=False)
    ]
    overlaps = _overlaps(plan, blocks, grads) if plan.momentum else []
    numbers: dict[tuple[int, int], list[int]] = {}
    for number, owner in enumerate(owners):
        numbers.setdefault(owner, []).append(number)
    shares = [
        Share(
            torch.as_tensor(hyper.bounded_lr[group]).double().clamp(min=trust_region.LEAST_LR),
            torch.as_tensor(_gated(plan, hyper, group)[1]).double(),
            region,
            *(_taken(values, own) for values in (_flat(dots), _flat(overlaps), blocks.quadratics)),
        )
        for (group, region), own in numbers.items()
    ]
    nu = trust_region.bounds_of_gradient(shares, kl_clip, size)
    if not plan.momentum or not shares:
        return nu, [one] * len(kl_clip)
    tau, quadratics = trust_region.bounds_of_step(shares, nu, kl_clip)
    written = [blocks.quadratics[number] for own in numbers.values() for number in own]
    torch._foreach_copy_(written, [q for share in quadratics for q in share.unbind()])
    return nu, tau


def _flat(pairs: Sequence[tuple[Tensor, ...]]) -> list[Tensor]:
    return [number for pair in pairs for number in pair]


def _taken(values: Sequence[Tensor], numbers: Sequence[int]) -> Tensor:
    """Those of the values, (n,) float64; none where there are none."""
    return torch.stack([values[i] for i in numbers]).double() if values else torch.empty(0)


def _move_(
    plan: Plan,
    hyper: Hyper,
    group: int,
    parameters: list[Tensor],
    buffers: list[Tensor],
    V: list[Tensor],
    nu: Tensor,
    tau: Tensor,
) -> None:
    directions = list(torch._foreach_mul(V, nu))
    lr, momentum = _gated(plan, hyper, group)
    if plan.momentum:
        torch._foreach_mul_(buffers, momentum)
        torch._foreach_add_(buffers, directions)
        directions = buffers
    torch._foreach_sub_(parameters, torch._foreach_mul(directions, lr * tau))


def _gated(plan: Plan, hyper: Hyper, group: int) -> tuple[Scalar, Scalar]:
    """lr and momentum of a group, as a skipped step has them: 0 and 1."""
    lr, momentum = hyper.lr[group], hyper.momentum[group]
    if not plan.gated:
        return lr, momentum
    return torch.where(hyper.finite, lr, 0.0), torch.where(hyper.finite, momentum, 1.0)


def adamw_(plan: Plan, hyper: Hyper, group: int, fallback: Fallback, i: int) -> None:
    """The AdamW update of one parameter."""
    grad, step = fallback.grads[i], fallback.steps[i]
    passed = torch.ones_like(step, dtype=torch.float64)
    if plan.gated:
        grad = grad * hyper.unscale.to(grad.dtype)
        grad = torch.where(hyper.finite, grad, torch.zeros_like(grad))
        passed = hyper.finite.double()
    decay = hyper.weight_decay[group] if plan.weight_decay else None
    averages = fallback.exp_avgs[i], fallback.exp_avg_sqs[i]
    adamw.adamw_(fallback.parameters[i], grad, *averages, step, hyper.fallback_lr[group], decay, passed)
