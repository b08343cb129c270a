"""Matrices of all layers in flat memory: those of one shape stand behind one another, so that one operator serves all.

Gradients, preconditioned gradients and momentum are such matrices (d_out, d_in[+1]), a bias as last column. The memory
is allocated once, and the parts of each matrix that belong to a weight or a bias are views of it, made once.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from kfac_triton import ops
from kfac_triton.layer import Layer
from kfac_triton.operations.layout import DENSE, UNCORRELATED

# Rows of wider matrices start at multiples of 16 elements: a joint bias makes most widths odd, and the products of the
# `mnist` autoencoder took 63 ms with those, 54 ms with these (medians, two cores). Narrow matrices stay contiguous,
# since only then torch multiplies all of a stack in one call.
ALIGNED = 128


@dataclass(frozen=True, eq=False)
class Stack:
    """Layers of one shape and form; `first` is the number of the first one among all layers. `imagined`: its memory is
    only counted, never allocated. `rows_wait`: thin rows may wait for others before a factor takes their product."""

    layers: tuple[Layer, ...]
    first: int
    imagined: bool = False
    rows_wait: bool = False

    @cached_property
    def numbers(self) -> slice:
        return slice(self.first, self.first + len(self.layers))

    @cached_property
    def groups(self) -> int:
        return self.layers[0].layout.groups

    @cached_property
    def lead(self) -> tuple[int, ...]:
        """The axes before those of a matrix: layers, and groups where there are several."""
        return (len(self.layers), *((self.groups,) if self.groups > 1 else ()))

    @cached_property
    def dims(self) -> tuple[int, int]:
        """(d_in[+1], d_out) of a matrix."""
        return self.layers[0].layout.dims(self.layers[0].weight.shape)

    @cached_property
    def dtype(self) -> torch.dtype:
        return wide_dtype(self.layers[0].weight)

    @cached_property
    def device(self) -> torch.device:
        return torch.device("meta") if self.imagined else self.layers[0].weight.device

    @cached_property
    def fuses(self) -> bool:
        """Whether kernels serve the layers."""
        return ops.fuses(self.layers[0].weight.device)

    @cached_property
    def dense(self) -> bool:
        """Whether both inverses are dense matrices."""
        layout = self.layers[0].layout
        return layout.A in (DENSE, UNCORRELATED) and layout.G == DENSE

    @cached_property
    def memory_shape(self) -> tuple[int, int]:
        """(d_out, d_in) with the zeros around a matrix: what kernels want, or what aligns its rows."""
        d_in, d_out = self.dims
        if self.fuses:
            return (
                (ops.padded_width(d_out), ops.padded_width(d_in)) if self.groups == 1 and self.dense else (d_out, d_in)
            )
        return d_out, ops.padded_width(d_in) if d_in >= ALIGNED else d_in


def wide_dtype(weight: Tensor) -> torch.dtype:
    """What factors, gradients and momentum of a weight are held in: float64 for a float64 weight, else float32."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def stacked(layers: Sequence[Layer], *, imagined: bool = False, rows_wait: bool = False) -> list[Stack]:
    """The layers by shape and form, in the order in which the first of each comes."""
    alike: dict[Hashable, list[Layer]] = {}
    for layer in layers:
        alike.setdefault(_form(layer), []).append(layer)
    stacks, first = [], 0
    for members in alike.values():
        on_cpu = members[0].weight.device.type == "cpu"  # a GPU's launches leave no time to win
        stacks.append(Stack(tuple(members), first, imagined, rows_wait and on_cpu))
        first += len(members)
    return stacks


def _form(layer: Layer) -> Hashable:
    layout, shape = layer.layout, layer.weight.shape
    pixels = (layout.taps(shape), layout.bias) if layout.A == UNCORRELATED else None
    forms = (layout.groups, layout.A, layout.G, layout.blocks_A, layout.blocks_G, layout.undivided)
    return layout.dims(shape), forms, pixels, layout.operation == "recurrent", wide_dtype(layer.weight)


def space(stacks: Sequence[Stack], copies: int) -> list[Tensor]:
    """Zeros for so many `Joint`s beside one another, (copies, elements), one tensor a dtype."""
    dtypes = dict.fromkeys(stack.dtype for stack in stacks)
    sizes = {dtype: sum(_elements(stack) for stack in stacks if stack.dtype == dtype) for dtype in dtypes}
    return [torch.zeros(copies, size, dtype=dtype, device=stacks[0].device) for dtype, size in sizes.items()]


def _elements(stack: Stack) -> int:
    return math.prod((*stack.lead, *stack.memory_shape))


class Joint:
    """One matrix a layer: `matrices` by stack (layers[, groups], d_out, d_in); `whole` has the zeros around them too;
    `flats` is all of the memory, one tensor a dtype: memory of its own, or what is given."""

    def __init__(self, stacks: Sequence[Stack], flats: Sequence[Tensor] | None = None) -> None:
        self.stacks = stacks
        self.flats = [t[0] for t in space(stacks, 1)] if flats is None else list(flats)
        self.whole: list[Tensor] = [torch.empty(0)] * len(stacks)
        for flat in self.flats:
            own = [i for i, stack in enumerate(stacks) if stack.dtype == flat.dtype]
            for i, part in zip(own, flat.split([_elements(stacks[i]) for i in own]), strict=True):
                self.whole[i] = part.view(*stacks[i].lead, *stacks[i].memory_shape)
        self.matrices = [
            whole[..., : stack.dims[1], : stack.dims[0]] for stack, whole in zip(stacks, self.whole, strict=True)
        ]

    @property
    def nbytes(self) -> int:
        return sum(flat.nbytes for flat in self.flats)

    def of(self, number: int, member: int) -> Tensor:
        """The matrix of one member of a stack."""
        return self.matrices[number][member]

    def of_weight(self, number: int, member: int) -> list[Tensor]:
        """The parts that belong to the pieces of the weight, see `Layout.views`."""
        layer = self.stacks[number].layers[member]
        return layer.layout.views(self.of(number, member), layer.weight.shape)

    def of_bias(self, number: int, member: int) -> Tensor:
        """The part that belongs to the bias of a layer that has one."""
        layer = self.stacks[number].layers[member]
        assert layer.bias is not None
        return layer.layout.bias_view(self.of(number, member), layer.weight.shape, layer.bias.shape)
