"""Stacks of layers with random samples, without a model or a pass, and their second moments by definition in float64.

`FORMS` has a layout and the shape of a weight for every form of layer. A `Bench` gives samples to one structure as
`CurvatureEstimator` does.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from kfac_triton.averages import Averages
from kfac_triton.capture import Recorded
from kfac_triton.distributed import Ranks
from kfac_triton.fisher.sampled import SeenUse
from kfac_triton.joint import Stack, stacked
from kfac_triton.layer import Layer
from kfac_triton.operations.layout import BLOCKS, DIAGONAL, UNCORRELATED, Layout
from kfac_triton.operations.recurrent import RecurrentUse
from kfac_triton.operations.use import Part
from kfac_triton.ops import OneHot
from kfac_triton.sample import Sample
from kfac_triton.steps.memory import Memory
from kfac_triton.structures.base import Structure
from kfac_triton.structures.registry import structure_of

F64 = torch.float64
ALONE = Ranks(nn.Module())
FORMS: dict[str, tuple[Layout, tuple[int, ...]]] = {
    "linear": (Layout("linear", bias=True), (3, 4)),
    "linear without bias": (Layout("linear"), (3, 4)),
    "linear, inputs first": (Layout("linear", transposed=True, bias=True), (4, 3)),
    "conv": (Layout("conv", bias=True), (3, 2, 2, 2)),
    "conv in groups": (Layout("conv", groups=2, bias=True), (4, 2, 3)),
    "transposed conv": (Layout("conv", transposed=True, bias=True), (2, 3, 2, 2)),
    "transposed conv in groups": (Layout("conv", transposed=True, groups=2, bias=True), (4, 3, 2)),
    "embedding": (Layout("embedding", transposed=True, A=DIAGONAL), (6, 3)),
    "scale": (Layout("scale", bias=True), (4,)),
    "scale, diagonal": (Layout("scale", bias=True, A=DIAGONAL), (4,)),
    "blocks": (Layout("linear", bias=True, A=BLOCKS, G=BLOCKS, blocks_A=3, blocks_G=2), (5, 6)),
    "blocks of A": (Layout("linear", A=BLOCKS, blocks_A=2), (3, 5)),
    "diagonal G": (Layout("linear", bias=True, G=DIAGONAL), (5, 3)),
    "diagonal A and G": (Layout("linear", bias=True, A=DIAGONAL, G=DIAGONAL), (5, 3)),
    "diagonal A in groups": (Layout("conv", groups=2, bias=True, A=DIAGONAL), (4, 2, 3)),
    "pixels": (Layout("conv", bias=True, A=UNCORRELATED), (3, 2, 2, 2)),
    "pixels without bias": (Layout("conv", A=UNCORRELATED), (3, 2, 3)),
    "pixels in groups": (Layout("conv", groups=2, bias=True, A=UNCORRELATED), (4, 2, 3)),
    "recurrent": (Layout("recurrent", bias=True), (6, 3)),
}
STEPS = (3, 3, 2)  # rows of each step of a sequence


def layers_of(form: str, count: int, dtype: torch.dtype = F64) -> list[Layer]:
    layout, shape = FORMS[form]
    found = []
    for _ in range(count):
        weight = nn.Parameter(torch.zeros(shape, dtype=dtype))
        rows = shape[1] * layout.groups if layout.operation == "conv" and layout.transposed else shape[0]
        rows = shape[1] if layout.operation == "linear" and layout.transposed else rows
        found.append(Layer(weight, nn.Parameter(torch.zeros(rows, dtype=dtype)) if layout.bias else None, layout))
    return found


def stack_of(form: str, count: int, *, imagined: bool = False, dtype: torch.dtype = F64) -> Stack:
    (stack,) = stacked(layers_of(form, count, dtype), imagined=imagined, rows_wait=True)
    return stack


@dataclass
class Rows:
    """What a sample stands for, written out: matrices a ([groups,] n, width) with the homogeneous 1, and for each
    matrix in a, by direction, matrices g."""

    a: list[Tensor]
    g: list[list[Tensor]]
    terms: float
    count: int
    examples: list[int]

    def moments(self) -> tuple[Tensor, Tensor]:
        """sum a a^T / terms and sum g g^T / count, entry by entry of the dense matrices."""
        A = sum(torch.einsum("...ni,...nj->...ij", a, a) for a in self.a) / self.terms
        G = sum(torch.einsum("...ni,...nj->...ij", g, g) for by in self.g for g in by) / self.count
        return A, G

    def second_moments(self, Q_A: Tensor, Q_G: Tensor) -> Tensor:
        """Of the examples' gradients in the bases, over the loss terms; example by example."""
        total: Any = 0
        for a, by_direction, examples in zip(self.a, self.g, self.examples, strict=True):
            n = a.shape[-2]
            size = n // (examples or n)
            for g in by_direction:
                for first in range(0, n, size):
                    part = slice(first, first + size)
                    grad = torch.einsum("...ni,...nj->...ij", g[..., part, :], a[..., part, :])
                    total = total + (Q_G.mT @ grad @ Q_A) ** 2
        return total / self.terms


def randn(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=F64)


def rows_of(layer: Layer, seed: int, *, matrices: int = 1, directions: int = 1, n: int = 6, examples: int = 0) -> Rows:
    """Random rows; those of a table are one-hot, and the inputs of a scale's are its gradients."""
    generator = torch.Generator().manual_seed(seed)
    layout, shape = layer.layout, layer.weight.shape
    d_in, d_out = layout.dims(shape)
    n = sum(STEPS) if layout.operation == "recurrent" else n
    lead = (layout.groups,) if layout.groups > 1 else ()
    if layout.A == UNCORRELATED:
        d_in = (d_in - int(layout.bias)) // layout.taps(shape) + 1
    a, g = [], []
    for _ in range(matrices):
        if layout.table:
            own = torch.eye(d_in, dtype=F64)[torch.randint(d_in, (n,), generator=generator)]
        else:
            own = randn(*lead, n, d_in, generator=generator) + 0.5
            if layout.A == UNCORRELATED or (layout.bias and layout.operation != "scale"):
                own[..., -1] = 1
        a.append(own)
        g.append([randn(*lead, n, d_out, generator=generator) for _ in range(directions)])
    return Rows(a, g, 5.0, n * matrices, [examples] * matrices)


def sample_of(layer: Layer, rows: Rows, *, ones: bool = True, images: bool = False) -> Sample:
    """The rows as a pass gives them. `ones`: the homogeneous 1 is still to be added. `images`: g has an axis of them"""
    layout = layer.layout
    lacks = ones and layout.bias and layout.operation != "scale" and layout.A != UNCORRELATED
    a: list[Any] = [own[..., :-1].contiguous() if lacks else own.clone() for own in rows.a]
    if layout.table:
        a = [OneHot(own.argmax(dim=-1), own.shape[-1]) for own in a]
    g = [own.clone() for by in rows.g for own in by]
    if images:
        g = [own.unflatten(-2, (2, -1)) for own in g]
    uses = []
    if layout.operation == "recurrent":
        for x, by in zip(rows.a, rows.g, strict=True):
            bias = None if layer.bias is None else Part(layer.bias, 0, len(layer.bias))
            use = RecurrentUse(Part(layer.weight, 0, len(layer.weight)), bias, x[:, :-1].contiguous(), steps=STEPS)
            uses.append(SeenUse(Recorded(use, None, torch.Size((len(x), by[0].shape[-1]))), list(by), 0, STEPS[0]))
    return Sample(layer, a, g, rows.terms, rows.count, ones=lacks, examples=list(rows.examples), uses=uses)


def spoiled(own: Sample) -> Sample:
    """The same sample with a number in its gradients that is not finite."""
    g = [t.clone() for t in own.g]
    g[0].view(-1)[1] = torch.nan
    uses = [replace(seen, dys=[torch.full_like(dy, torch.nan) for dy in seen.dys]) for seen in own.uses]
    return replace(own, g=g, uses=uses)


def sums_instead(own: Sample, rows: Rows) -> Sample:
    """The same sample as sums, in the form of its sides."""
    A, G = rows.moments()
    layout = own.layer.layout
    sums = [
        F.diagonal(dim1=-2, dim2=-1).clone() if form == DIAGONAL else F for F, form in ((A, layout.A), (G, layout.G))
    ]
    return replace(own, a=[], g=[], ones=False, sums=(sums[0] * rows.terms, sums[1] * rows.count))


class Bench:
    """One structure with the averages and the memory that go with it."""

    def __init__(self, stack: Stack, approximation: str = "kronecker", temporal: str = "independent") -> None:
        self.stack = stack
        self.structure: Structure = structure_of(stack, ALONE, approximation, temporal)
        self.averages = Averages([stack], ALONE)
        self.memory = Memory([self.structure])

    def update_(
        self, samples: Sequence[Sample | None], *, damping: Sequence[float], decay: float = 0.6, together: bool = True
    ) -> None:
        """One update; with `together` in one product where the structure has room for that."""
        samples = list(samples)
        counts = [0 if own is None else own.plain() for own in samples]
        room = self.structure.room(counts) if together else None
        if room is not None:
            rows = [getattr(own, name)[0] for name in "ag" for own in samples]
            torch._foreach_copy_([*room[0].parts, *room[1].parts], rows)
        self.averages.measure_([samples])
        (moves,) = self.averages.moves([samples], [decay] * len(samples))
        self.structure.update_(samples, room, moves, list(damping))

    def refresh_(self, damping: Sequence[float]) -> list[bool]:
        """Renews what `apply_` uses, of the members that have had an update."""
        members = [i for i in range(len(damping)) if self.averages.updates[i] > 0]
        return self.structure.refresh_(members, list(damping)) if members else []

    def apply(self, grad: Tensor) -> Tensor:
        """(F + damping)^-1 grad for all members."""
        self.memory.J.matrices[0].copy_(grad)
        self.structure.apply_(self.memory.J, self.memory.V, 0, self.memory.scratch[0], bf16=False)
        return self.memory.V.matrices[0].clone()

    def state(self, member: int) -> dict[str, Any]:
        return {**self.structure.tensors(member), **self.averages.tensors(member)}

    def restore(self, states: Sequence[dict[str, Any]]) -> None:
        self.structure.restore(states)
        self.averages.restore(states)


def held_bytes(tensors: Iterable[Any]) -> int:
    """Bytes of the memory behind tensors, each piece of it once; what is no tensor counts nothing."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if isinstance(t, Tensor)}
    return sum(storages.values())


def in_use(state: dict[str, Any]) -> dict[str, Any]:
    """Without the memory for rows where none waits."""
    empty = tuple(side for side in "AG" if not state.get(f"{side}_waiting", 0))
    ends = ("_rows", "_weights", "_kept", "_waiting")
    return {name: value for name, value in state.items() if not (name[0] in empty and name.endswith(ends))}
