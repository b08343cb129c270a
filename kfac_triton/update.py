"""The step below the interval branches: precondition, trust region, momentum, weights; and AdamW for the rest.

Pure functions over lists of tensors, compiled as one graph (`compiled`) or run eagerly. What changes from step to step
enters as 0-d tensors, so that a scheduler never recompiles; what decides the graph stands in a `Plan`.

    V = G_inv (grad_W + weight_decay W) A_inv
    nu = min(1, sqrt(2 kl_clip / sum over parameters of lr^2 <V, grad>))         (Wu et al. 2017, section 3)
    buf <- momentum buf + nu V,  W <- W - lr buf
"""

from __future__ import annotations

import logging
import os
import time
import types
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kfac_triton import chain, ops
from kfac_triton.blocks.layout import Layout
from kfac_triton.chain import Link

log = logging.getLogger("kfac_triton")

MAX_GRAPHS = 8  # sets of parameters with a gradient, as with experts or skipped layers; each costs a compilation
ROW_ALIGNMENT = 16  # elements: 64 bytes of float32
ADAM_BETA1, ADAM_BETA2, ADAM_EPS = 0.9, 0.999, 1e-8

Scalar = float | Tensor


@dataclass(frozen=True)
class LayerPlan:
    """One block: `group` and `bias_group` index the hyper-parameters; the bias may have no gradient."""

    layout: Layout
    group: int
    bias_group: int
    bias_has_grad: bool


@dataclass(frozen=True)
class Plan:
    """What decides the graph of a step. `chain`: the layers, in their order, are linked by a tridiagonal inverse;
    `bf16`: the products with the inverses are of bfloat16 numbers."""

    layers: tuple[LayerPlan, ...]
    fallback_groups: tuple[int, ...]
    trust_region: bool
    momentum: bool
    weight_decay: bool
    gated: bool
    chain: bool = False
    bf16: bool = False


@dataclass
class Hyper:
    """Hyper-parameters by group. `finite` (0-d bool) gates the whole step on the device, `unscale` multiplies the
    gradients; both count only in a gated plan."""

    lr: list[Scalar]
    momentum: list[Scalar]
    weight_decay: list[Scalar]
    kl_clip: list[Scalar]
    fallback_lr: list[Scalar]
    finite: Tensor
    unscale: Tensor


@dataclass
class Blocks:
    """Tensors of the blocks, by layer; an absent bias (or its momentum) is an empty tensor."""

    weights: list[Tensor] = field(default_factory=list)
    weight_grads: list[Tensor] = field(default_factory=list)
    weight_buffers: list[Tensor] = field(default_factory=list)
    biases: list[Tensor] = field(default_factory=list)
    bias_grads: list[Tensor] = field(default_factory=list)
    bias_buffers: list[Tensor] = field(default_factory=list)
    A_inv: list[Tensor] = field(default_factory=list)
    G_inv: list[Tensor] = field(default_factory=list)
    links: list[Link] = field(default_factory=list)


@dataclass
class Fallback:
    """Tensors of the AdamW update, by parameter; `steps` are 0-d counters on the parameters' device."""

    parameters: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    exp_avgs: list[Tensor] = field(default_factory=list)
    exp_avg_sqs: list[Tensor] = field(default_factory=list)
    steps: list[Tensor] = field(default_factory=list)


def step_(plan: Plan, hyper: Hyper, blocks: Blocks, fallback: Fallback) -> None:
    """One step on every parameter of the plan, in place."""
    grads, V = precondition(plan, hyper, blocks)
    nu = _trust_region(plan, hyper, V, grads) if plan.trust_region else None
    for i, layer in enumerate(plan.layers):
        V_weight, V_bias = layer.layout.split(V[i], blocks.weights[i].shape)
        scale = None if nu is None else nu[layer.group]
        _move_(plan, hyper, layer.group, blocks.weights[i], blocks.weight_buffers[i], V_weight, scale)
        if V_bias is not None and layer.bias_has_grad:
            _move_(plan, hyper, layer.bias_group, blocks.biases[i], blocks.bias_buffers[i], V_bias, scale)
    for i, group in enumerate(plan.fallback_groups):
        adamw_(plan, hyper, group, fallback, i)


def precondition(plan: Plan, hyper: Hyper, blocks: Blocks) -> tuple[list[Tensor], list[Tensor]]:
    """(grad + weight_decay W, V) of every layer as joint matrices."""
    grads = [_joint_gradient(plan, hyper, blocks, i) for i in range(len(plan.layers))]
    if plan.chain:
        return grads, chain.product(grads, blocks.links, blocks.A_inv[-1], blocks.G_inv[-1])
    V = [_aligned_like(grad) for grad in grads]
    if V:
        ops.kron_matmul_(V, blocks.G_inv, grads, blocks.A_inv, bf16=plan.bf16)
    return grads, V


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
    return grad.new_empty(*grad.shape[:-1], -(-width // ROW_ALIGNMENT) * ROW_ALIGNMENT)[..., :width]


def _trust_region(plan: Plan, hyper: Hyper, V: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """nu by group: one bound on the whole model's step, which each group's kl_clip may set its own way."""
    total = grads[0].new_zeros(()) if grads else hyper.finite.new_zeros((), dtype=torch.float32)
    for layer, v, grad in zip(plan.layers, V, grads, strict=True):
        product = v * grad
        if layer.layout.bias and layer.bias_group != layer.group:
            total = total + product[..., :-1].sum() * hyper.lr[layer.group] ** 2
            total = total + product[..., -1].sum() * hyper.lr[layer.bias_group] ** 2
        else:
            total = total + product.sum() * hyper.lr[layer.group] ** 2
    total = total.clamp(min=torch.finfo(total.dtype).tiny)
    return [torch.sqrt(2 * kl_clip / total).clamp(max=1.0) for kl_clip in hyper.kl_clip]


def _move_(
    plan: Plan, hyper: Hyper, group: int, parameter: Tensor, buffer: Tensor, V: Tensor, nu: Tensor | None
) -> None:
    direction = V if nu is None else V * nu
    lr, momentum = hyper.lr[group], hyper.momentum[group]
    if plan.gated:
        lr = torch.where(hyper.finite, lr, 0.0)
        momentum = torch.where(hyper.finite, momentum, 1.0)
    if plan.momentum:
        buffer.mul_(momentum).add_(direction)
        direction = buffer
    _add_scaled_(parameter, direction, lr, -1.0)


def _add_scaled_(parameter: Tensor, direction: Tensor, scale: Scalar, sign: float) -> None:
    if isinstance(scale, Tensor):
        parameter.add_(direction * scale, alpha=sign)
    else:
        parameter.add_(direction, alpha=sign * scale)


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


class CompiledStep:
    """`step_`, compiled once for each plan where that is possible, else eager after one warning.

    `seconds` is the wall time of the calls in which a graph was compiled.
    """

    def __init__(self, compile: bool) -> None:
        self.compile = compile
        self.seconds = 0.0
        self._many = False
        self._steps: dict[Plan, Callable[[Hyper, Blocks, Fallback], None]] = {}

    def __call__(self, plan: Plan, hyper: Hyper, blocks: Blocks, fallback: Fallback) -> None:
        if not self.compile:
            step_(plan, hyper, blocks, fallback)
        elif plan in self._steps:
            self._steps[plan](hyper, blocks, fallback)
        elif len(self._steps) == MAX_GRAPHS:
            self._warn_many()
            step_(plan, hyper, blocks, fallback)
        else:
            self._first(plan, hyper, blocks, fallback)

    def _warn_many(self) -> None:
        if not self._many:
            log.warning(
                "KFAC compiled %d graphs of its step, one for each set of parameters with a gradient; "
                "for other sets it runs eagerly",
                MAX_GRAPHS,
            )
        self._many = True

    def _first(self, plan: Plan, hyper: Hyper, blocks: Blocks, fallback: Fallback) -> None:
        reason = _why_not(blocks, fallback)
        started = time.perf_counter()
        if reason is None:
            ops.load()
            step = _compiled(plan)
            try:
                step(hyper, blocks, fallback)
            except torch._dynamo.exc.TorchDynamoException as error:
                lines = [line.strip() for line in str(error).splitlines() if line.strip()]
                reason = f"{type(error).__name__}: {' '.join(lines[:2])}"
            else:
                self._steps[plan] = step
        if reason is None:
            self.seconds += time.perf_counter() - started
            return
        log.warning("KFAC's step runs eagerly, since it cannot be compiled here (%s); compile=False says so", reason)
        self.compile = False
        step_(plan, hyper, blocks, fallback)


def _compiled(plan: Plan) -> Callable[[Hyper, Blocks, Fallback], None]:
    """A graph of its own: torch counts recompilations by code object, and every plan of every optimizer is its own."""

    def step(hyper: Hyper, blocks: Blocks, fallback: Fallback) -> None:
        step_(plan, hyper, blocks, fallback)

    own = types.FunctionType(
        step.__code__.replace(), step.__globals__, step.__name__, step.__defaults__, step.__closure__
    )
    compiled: Callable[[Hyper, Blocks, Fallback], None] = torch.compile(own, fullgraph=True, dynamic=False)
    return compiled


def _why_not(blocks: Blocks, fallback: Fallback) -> str | None:
    """A reason why compilation is bound to fail, found without trying."""
    if os.environ.get("TORCH_COMPILE_DISABLE") == "1" or torch._dynamo.config.disable:
        return "TORCH_COMPILE_DISABLE is set"
    tensors = blocks.weights or fallback.parameters
    if tensors and tensors[0].device.type == "cpu":
        from torch._inductor import cpp_builder, exc

        try:
            cpp_builder.get_cpp_compiler()
        except exc.InvalidCxxCompiler:
            return "no C++ compiler found"
    return None
