"""The memory of steps: allocated once for the layers as they are, and written in place."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kfac_triton.joint import Joint, Stack, space
from kfac_triton.structures.base import Structure

SCRATCH = 2**18  # elements of a chunk of a stack, if it holds more than one matrix


class Memory:
    """For the layers of `structures`: J, V and, from the first step with momentum on, M; and what a product needs.

    `fuses`: kernels serve all layers. `rows`: J, V and, where it is `moving` from the start, M beside one another,
    (2 or 3, elements), as products with several of them want them. For a step that is proposed (`proposing`) there is
    D, too, and for one that is `capped` S, the mean squares of the gradients.

    `quadratics` (2, layers): the quadratic form of the momentum; the second row is of biases in other groups than their
    weights. Of capped steps, (layers,): `usual`, the usual norm of a layer's gradient, `steps`, how many it took, and
    `bounded`, how many of the last in a row had a gradient that was too long.
    """

    def __init__(
        self, structures: Sequence[Structure], *, moving: bool = False, proposing: bool = False, capped: bool = False
    ) -> None:
        self.structures = structures
        self.stacks = [structure.stack for structure in structures]
        self.rows = space(self.stacks, 3 if moving or proposing or capped else 2)
        joints = [Joint(self.stacks, flats) for flats in zip(*self.rows, strict=True)]
        self.J, self.V, self.M = joints[0], joints[1], joints[2] if len(joints) == 3 else None
        if proposing:
            self.D = Joint(self.stacks)
        self.S = Joint(self.stacks) if capped else None
        self.scratch = scratch(self.stacks)
        self.device = self.stacks[0].device
        self.fuses = all([stack.fuses for stack in self.stacks])
        count = sum(len(stack.layers) for stack in self.stacks)
        self.quadratics = torch.zeros(2, count, dtype=self.V.flats[0].dtype, device=self.device)
        self.usual = torch.zeros_like(self.quadratics[0])
        self.steps, self.bounded = torch.zeros(2, count, device=self.device)

    def moments(self, at: int) -> dict[str, Tensor]:
        """What the state of a weight holds of the numbers of capped steps."""
        return {"gradient_norm": self.usual[at], "moment_steps": self.steps[at], "bounded_steps": self.bounded[at]}

    def products(self) -> list[Tensor]:
        """<V, J> and <M, J> over all layers, (2,), for each dtype of them."""
        if len(self.rows[0]) == 3:
            return [torch.mv(rows[1:], rows[0]) for rows in self.rows]
        flats = zip(self.V.flats, self.momentum().flats, self.J.flats, strict=True)
        return [torch.stack([torch.dot(V, J), torch.dot(M, J)]) for V, M, J in flats]

    def momentum(self) -> Joint:
        """M, which is zero when it is first asked for."""
        if self.M is None:
            self.M = Joint(self.stacks)
        return self.M

    def squares(self) -> Joint:
        """S, of capped steps."""
        assert self.S is not None
        return self.S


def scratch(stacks: Sequence[Stack]) -> list[Tensor]:
    """Room for the product of one inverse and the gradients of some layers, by stack: all stacks take turns in it."""
    sizes = _scratch_sizes(stacks)
    room = {dtype: torch.zeros(size, dtype=dtype, device=stacks[0].device) for dtype, size in sizes.items()}
    shapes = [_scratch_shape(stack) for stack in stacks]
    return [
        room[stack.dtype][: math.prod(shape)].view(shape)[:, : stack.dims[1], : stack.dims[0]]
        for stack, shape in zip(stacks, shapes, strict=True)
    ]


def scratch_nbytes(stacks: Sequence[Stack]) -> int:
    """Bytes of `scratch`."""
    return sum(size * dtype.itemsize for dtype, size in _scratch_sizes(stacks).items())


def _scratch_sizes(stacks: Sequence[Stack]) -> dict[torch.dtype, int]:
    sizes = {stack.dtype: 0 for stack in stacks}
    for stack in stacks:
        sizes[stack.dtype] = max(sizes[stack.dtype], math.prod(_scratch_shape(stack)))
    return sizes


def _scratch_shape(stack: Stack) -> tuple[int, int, int]:
    (d_in, d_out), count = stack.dims, len(stack.layers) * stack.groups
    return (max(1, min(count, SCRATCH // (d_in * d_out))), *stack.memory_shape)
