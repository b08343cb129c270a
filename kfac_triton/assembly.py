"""From groups, state and blocks to the lists of tensors of one step; creates momentum and AdamW state where missing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from kfac_triton import ops, trust_region
from kfac_triton.approximations import eigen, temporal, tridiagonal
from kfac_triton.blocks.layout import DENSE, UNCORRELATED
from kfac_triton.curvature import Block
from kfac_triton.step_plan import Blocks, Fallback, Gradients, Hyper, LayerPlan, Plan, Scalar


def assemble(
    optimizer: torch.optim.Optimizer,
    parameters: list[nn.Parameter],
    blocks: Mapping[nn.Parameter, Block],
    gradients: Gradients,
    precision: str = "ieee",
    loss_scale: float = 1.0,
) -> tuple[Plan, Hyper, Blocks, Fallback]:
    """The arguments of `update.step_` for the parameters that have gradients; the groups say what "auto" means."""
    groups = optimizer.param_groups
    group_of = {id(p): i for i, group in enumerate(groups) for p in group["params"]}
    with_grad = set(parameters)
    ready = {w: b for w, b in blocks.items() if w in with_grad and eigen.ready(optimizer.state[w])}
    momentum = any(group["momentum"] != 0 or group["adaptive_damping"] for group in groups)
    trust_region = any(group["kl_clip"] < float("inf") for group in groups)
    device = gradients.finite.device
    plans, tensors, taken = [], Blocks(), set()
    fused = ops.fuses(device) and all(_in_place(w, b) for w, b in ready.items())
    linked = any("chain" in optimizer.state[w] for w in ready)
    if linked:
        ready = _chained(optimizer, ready, blocks, tensors)
    for weight, block in ready.items():
        has_grad = block.bias is not None and block.bias in with_grad
        bias_group = group_of[id(block.bias)] if has_grad else group_of[id(weight)]
        in_bases, transform = eigen.stored(optimizer.state[weight]), temporal.stored(optimizer.state[weight])
        layer = LayerPlan(block.layout, group_of[id(weight)], bias_group, has_grad, in_bases, transform is not None)
        plans.append(layer)
        if transform is not None:
            tensors.transforms.append(transform)
        dense = block.layout.A in (DENSE, UNCORRELATED) and block.layout.G == DENSE
        whole = fused and not linked and dense
        _add_block(tensors, optimizer, weight, block.bias if has_grad else None, momentum, whole)
        if momentum and trust_region:
            owners = (weight, block.bias) if layer.split else (weight,)
            tensors.quadratics += [_quadratic(optimizer, p) for p in owners if p is not None]
        taken |= {weight, block.bias}
    rest = [p for p in parameters if p not in taken]
    fallback = Fallback()
    for p in rest:
        _add_fallback(fallback, optimizer, p)
    plan = Plan(
        tuple(plans),
        tuple(group_of[id(p)] for p in rest),
        trust_region=trust_region,
        momentum=momentum,
        weight_decay=any(group["weight_decay"] != 0 for group in groups),
        chain=bool(ready) and linked,
        bf16=precision == "bf16" or (precision == "auto" and bool(groups[0].get("bf16"))),
        fused=fused,
        gated=device.type != "cpu" or getattr(optimizer, "grad_scale", None) is not None,
    )
    return plan, _hyper(optimizer, parameters, gradients, loss_scale), tensors, fallback


def _chained(
    optimizer: torch.optim.Optimizer,
    ready: Mapping[nn.Parameter, Block],
    blocks: Mapping[nn.Parameter, Block],
    tensors: Blocks,
) -> dict[nn.Parameter, Block]:
    """The blocks in the chain's order, their links added to `tensors`; none before all of them have one."""
    ordered = tridiagonal.in_order(optimizer.state, ready)
    links = [tridiagonal.stored_link(optimizer.state[w]) for w in ordered[:-1]]
    if len(ready) < len(blocks) or any(link is None for link in links):
        return {}
    tensors.links += [link for link in links if link is not None]
    return {w: ready[w] for w in ordered}


def _add_block(
    tensors: Blocks,
    optimizer: torch.optim.Optimizer,
    weight: nn.Parameter,
    bias: nn.Parameter | None,
    momentum: bool,
    whole: bool,
) -> None:
    """Adds a block's tensors; `whole`: its inverses with the zeros around them that kernels want."""
    state = optimizer.state[weight]
    in_bases = eigen.stored(state)
    for side, inverses in (("A", tensors.A_inv), ("G", tensors.G_inv)):
        name = f"Q_{side}" if in_bases else f"{side}_inv"
        if whole:
            state[name] = ops.padded(state[name])
        inverses.append(ops.whole(state[name]) if whole else state[name])
    around = (tensors.G_inv[-1].shape[-1], tensors.A_inv[-1].shape[-1])
    tensors.spectra.append(_spectrum(eigen.damped(state), around) if in_bases else weight.new_empty(0))
    tensors.dampings.append(state["eigen_damping"] if in_bases else weight.new_empty(0))
    for p, values, grads, buffers in (
        (weight, tensors.weights, tensors.weight_grads, tensors.weight_buffers),
        (bias, tensors.biases, tensors.bias_grads, tensors.bias_buffers),
    ):
        if p is None or p.grad is None:
            absent = weight.new_empty(0)
            values.append(absent)
            grads.append(absent)
            buffers.append(absent)
            continue
        values.append(p)
        grads.append(p.grad)
        buffers.append(_momentum_buffer(optimizer, p) if momentum else p.new_empty(0))


def _in_place(weight: nn.Parameter, block: Block) -> bool:
    """Whether the fused update can write the weight where it lies."""
    return block.layout.by_taps(weight).data_ptr() == weight.data_ptr()


def _spectrum(S: Tensor, shape: tuple[int, int]) -> Tensor:
    """The eigenvalues, and ones for the zeros around the eigenvectors."""
    d_out, d_in = S.shape[-2:]
    if (d_out, d_in) == shape:
        return S
    return torch.nn.functional.pad(S, (0, shape[1] - d_in, 0, shape[0] - d_out), value=1.0)


def _momentum_buffer(optimizer: torch.optim.Optimizer, p: nn.Parameter) -> Tensor:
    state = optimizer.state[p]
    if "momentum_buffer" not in state:
        for name in ("exp_avg", "exp_avg_sq", "fallback_step"):
            state.pop(name, None)
        state["momentum_buffer"] = torch.zeros_like(p, memory_format=torch.preserve_format)
    buffer: Tensor = state["momentum_buffer"]
    return buffer


def _quadratic(optimizer: torch.optim.Optimizer, p: nn.Parameter) -> Tensor:
    state = optimizer.state[p]
    if "quadratic" not in state:
        state["quadratic"] = torch.zeros((), dtype=torch.promote_types(p.dtype, torch.float32), device=p.device)
    quadratic: Tensor = state["quadratic"]
    return quadratic


def _add_fallback(fallback: Fallback, optimizer: torch.optim.Optimizer, p: nn.Parameter) -> None:
    state = optimizer.state[p]
    if "exp_avg" not in state:
        state.pop("momentum_buffer", None)
        state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        state["fallback_step"] = torch.zeros((), dtype=torch.float32, device=p.device)
    assert p.grad is not None
    fallback.parameters.append(p)
    fallback.grads.append(p.grad)
    fallback.exp_avgs.append(state["exp_avg"])
    fallback.exp_avg_sqs.append(state["exp_avg_sq"])
    fallback.steps.append(state["fallback_step"])


def _hyper(
    optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], gradients: Gradients, loss_scale: float
) -> Hyper:
    """0-d tensors, in double precision where a parameter is: a value that changes never changes the graph."""
    dtype = torch.float64 if any(p.dtype == torch.float64 for p in parameters) else torch.float32
    device = parameters[0].device

    def scalars(find: Callable[[dict[str, Any]], Any]) -> list[Scalar]:
        values: list[Scalar] = []
        for group in optimizer.param_groups:
            value = find(group)
            if isinstance(value, Tensor):
                values.append(value.detach().to(device, dtype))
            else:  # filled on the device: a copy from the host would wait for it
                values.append(torch.full((), value, dtype=dtype, device=device))
        return values

    return Hyper(
        scalars(itemgetter("lr")),
        scalars(lambda group: group["peak_lr" if group["kl_annealing"] else "lr"]),
        scalars(itemgetter("momentum")),
        scalars(itemgetter("weight_decay")),
        scalars(itemgetter("kl_clip")),
        scalars(lambda group: group["lr"] * group["fallback_ratio"]),
        gradients.finite,
        gradients.unscale,
        torch.full((), loss_scale, dtype=dtype, device=device),
        trust_region.size_of(gradients.largest * gradients.unscale / loss_scale, gradients.finite).to(dtype),
    )
