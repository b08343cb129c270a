"""The arguments of a step: what decides its graph, its hyper-parameters and its tensors, as `update` takes them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from kfac_triton.blocks.layout import BLOCKS, Layout
from kfac_triton.chain import Link
from kfac_triton.temporal_chain import Transform

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
    def split(self) -> bool:
        """Whether weight and bias count apart in the trust region, since they may have learning rates of their own."""
        return self.layout.bias and self.bias_group != self.group

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


class Gradients(NamedTuple):
    """What is known of all gradients together, 0-d on their device: what undoes a GradScaler's scale, whether every one
    is finite, and a bound on their entries."""

    unscale: Tensor
    finite: Tensor
    largest: Tensor


@dataclass(eq=False, repr=False)
class Hyper:
    """Hyper-parameters by group. `bounded_lr` is the one whose step kl_clip bounds. `unscale` undoes a GradScaler's
    scale; `finite` (0-d bool) gates the whole step on the device; both count only in a gated plan. The blocks' gradient
    is divided by `loss_scale` and by its own `size`."""

    lr: list[Scalar]
    bounded_lr: list[Scalar]
    momentum: list[Scalar]
    weight_decay: list[Scalar]
    kl_clip: list[Scalar]
    fallback_lr: list[Scalar]
    finite: Tensor
    unscale: Tensor
    loss_scale: Tensor
    size: Tensor


@dataclass(eq=False, repr=False)
class Blocks:
    """Tensors of the blocks, by layer; an absent bias (or its momentum) is an empty tensor. Of a layer in eigenbases,
    A_inv and G_inv are Q_A and Q_G; of any other, its spectrum and damping are empty. `transforms`: of the layers in
    time alone. `quadratics`: buf^T F buf of every layer, 0-d, of weight and bias apart where they are `split`."""

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
    quadratics: list[Tensor] = field(default_factory=list)


@dataclass(eq=False, repr=False)
class Fallback:
    """Tensors of the AdamW update, by parameter; `steps` are 0-d counters on the parameters' device."""

    parameters: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    exp_avgs: list[Tensor] = field(default_factory=list)
    exp_avg_sqs: list[Tensor] = field(default_factory=list)
    steps: list[Tensor] = field(default_factory=list)
