"""One dimension of the weights of a stack: its second moments, their running average, and what multiplies with their
damped inverse. How the moments are held depends on the form (see `blocks.layout`)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kfac_triton import ops
from kfac_triton.joint import ALIGNED, Stack
from kfac_triton.linalg import factors, uncorrelated
from kfac_triton.linalg.factors import Shape
from kfac_triton.operations.layout import BLOCKS, DENSE, DIAGONAL, UNCORRELATED
from kfac_triton.structures import buffered
from kfac_triton.structures.base import Room
from kfac_triton.structures.buffered import BufferedRows

Number = float | Tensor


class Factor(ABC):
    """`values` (layers[, groups], *form): running averages. `inverse`: of the damped values, in the form that
    `multiply` wants. `shape`: what one of them stands for."""

    buffer: BufferedRows | None = None
    rows_wait = False  # whether thin rows may wait for others

    def __init__(self, stack: Stack, side: str, *, averaged: bool = True) -> None:
        layout, weight = stack.layers[0].layout, stack.layers[0].weight
        d_in, d_out = stack.dims
        self.side, self.stack = side, stack
        self.shape = (
            Shape(d_in, layout.A, layout.taps(weight.shape), layout.bias) if side == "A" else Shape(d_out, layout.G)
        )
        which = "AG".index(side)
        self.values, self.values_whole = self._space(layout.factor_shapes(weight.shape)[which] if averaged else (0,))
        self.inverse, self.inverse_whole = self._space(layout.inverse_shapes(weight.shape)[which])

    def _space(self, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Zeros for all layers of the stack, and with what lies around them; square matrices start their rows where
        products want them."""
        k, stack = len(self.stack.layers), self.stack
        square = len(shape) > 1 and not self.shape.diagonal  # a diagonal may have an axis of groups
        padded = square and (stack.fuses or shape[-1] >= ALIGNED)
        width = ops.padded_width(shape[-1]) if padded else shape[-1]
        size = (k, *shape[:-2], width, width) if square else (k, *shape)
        whole = torch.zeros(size, dtype=stack.dtype, device=stack.device)
        return (whole[..., : shape[-1], : shape[-1]] if square else whole), whole

    @abstractmethod
    def multiply(self, M: Tensor) -> Tensor:
        """inverse @ M for matrices M (layers[, groups], d, n)."""

    def mean(self) -> Tensor:
        """tr / dim of every factor (layers[, groups]); the diagonal blocks of one factor count together."""
        return factors.mean_diagonal(self.values, self.shape)

    def tensors(self, member: int) -> dict[str, Any]:
        """What a checkpoint holds of the factor of one layer."""
        held: dict[str, Any] = {self.side: self.values[member]}
        if self.buffer is not None:
            names = (f"{self.side}_rows", f"{self.side}_weights", f"{self.side}_kept")
            parts = (self.buffer.rows, self.buffer.weights, self.buffer.kept)
            held |= {name: t[member] for name, t in zip(names, parts, strict=True)}
            held[f"{self.side}_waiting"] = self.buffer.waiting
        return held

    def restore(self, stored: Sequence[Mapping[str, Any]]) -> None:
        """Takes over what `tensors` gave for every layer; nothing of a layer whose state does not hold it.

        Rows go on waiting where equally many of all layers do, and are added to the averages elsewhere.
        """
        waiting = [int(own.get(f"{self.side}_waiting", 0)) for own in stored]
        for member, own in enumerate(stored):
            if self.side in own:
                self.values[member].copy_(own[self.side])
        if self.rows_wait and min(waiting, default=0) > 0 and len(set(waiting)) == 1:
            self.buffer = self._restored_rows(slice(None), stored)
            return
        for member, own in enumerate(stored):
            if waiting[member]:
                self._restored_rows(slice(member, member + 1), [own]).settle_()

    def _restored_rows(self, members: slice, stored: Sequence[Mapping[str, Any]]) -> BufferedRows:
        buffer = BufferedRows(self.values[members])
        for i, own in enumerate(stored):
            for name in ("rows", "weights", "kept"):
                getattr(buffer, name)[i].copy_(own[f"{self.side}_{name}"])
        buffer.waiting = int(stored[0][f"{self.side}_waiting"])
        return buffer

    def rows_nbytes(self) -> int:
        """Bytes of the rows that wait; of imagined ones, their most."""
        if self.buffer is None and self.rows_wait and self.stack.imagined:
            return len(self.values) * buffered.CAPACITY * (self.shape.d + 1) * self.values.itemsize
        return 0 if self.buffer is None else self.buffer.nbytes

    def room_nbytes(self) -> int:
        """Bytes of the room for the rows of one update."""
        return 0

    def empty_rows(self) -> dict[str, Any]:
        """What `tensors` would hold if rows had waited once, where they may: no rows."""
        if not self.rows_wait or self.buffer is not None:
            return {}
        none = BufferedRows(self.values[:1])
        held = {"rows": none.rows[0], "weights": none.weights[0], "kept": none.kept[0], "waiting": 0}
        return {f"{self.side}_{name}": value for name, value in held.items()}

    def keeps(self, room: Room) -> bool:
        """Whether the next rows, as many, would come to the same room, and wait for no others."""
        return False

    def settle_(self) -> None:
        """Brings `values` up to date with every update so far."""
        if self.buffer is not None:
            self.buffer.settle_()

    def current(self, member: int) -> Tensor:
        """A copy of one average, up to date."""
        if self.buffer is not None:
            return self.buffer.settled(member)
        return self.values[member].clone(memory_format=torch.contiguous_format)

    def written_out(self, member: int) -> Tensor:
        """A copy of one factor as it stands for all its rows: dense, or the diagonal."""
        return self.current(member)


class Dense(Factor):
    """(d, d). Rows of all layers can be added in one product, see `room`."""

    _rows: Tensor | None = None
    _written_over = False  # the column of ones too

    def __init__(self, stack: Stack, side: str, *, averaged: bool = True) -> None:
        super().__init__(stack, side, averaged=averaged)
        layout = stack.layers[0].layout
        stacks_rows = layout.A == layout.G == DENSE and stack.groups == 1
        self.rows_wait = averaged and stack.rows_wait and stacks_rows and self.shape.d >= buffered.NARROWEST
        self._rooms: dict[tuple[int, int], Room] = {}

    def multiply(self, M: Tensor) -> Tensor:
        return self.inverse @ M

    def written_out(self, member: int) -> Tensor:
        F = self.current(member)
        return F.tril() + F.tril(-1).mT  # batched products are symmetric but for rounding

    def room(self, count: int, *, ones: bool, at_once: bool) -> Room:
        """Where so many rows of every layer go; with `ones` the last column is there already.

        They may wait for later ones, but for `at_once`.
        """
        if self.rows_wait and not at_once and count <= buffered.CAPACITY // 2:
            if self._rows is not None:  # which was for more rows than can wait
                self._rows, self._rooms = None, {}
            self.buffer = self.buffer or BufferedRows(self.values)
            rows, written_over = self.buffer.room(count), True
        else:
            self.settle_()
            if self._rows is None or self._rows.shape[1] != count:
                self._rows = self.values.new_empty(len(self.values), count, self.shape.d)
                self._rooms, self._written_over = {}, True
            rows, written_over, self._written_over = self._rows, self._written_over, False
        key = rows.shape[1], rows.data_ptr()
        found = self._rooms.get(key)
        if found is None:
            data = rows[..., :-1] if ones else rows
            found = self._rooms[key] = Room(rows, data, data.unbind())
        if ones and written_over:
            found.rows[..., -1].fill_(1)
        return found

    def room_nbytes(self) -> int:
        return 0 if self._rows is None else self._rows.nbytes

    def keeps(self, room: Room) -> bool:
        return room.rows is self._rows and not self._written_over

    def add_(self, rows: Tensor, alpha: Number, beta: Number, ok: Tensor | None) -> None:
        """F <- beta F + alpha R^T R for the rows in `room`; numbers for all layers or one each, (layers,).

        `ok` (layers,): whose rows count, None for all; a row that does not count may hold anything.
        """
        if ok is not None:
            rows.masked_fill_(~ok[:, None, None], 0.0)
            self._written_over = True
        if rows is not self._rows:
            assert self.buffer is not None
            self.buffer.weigh_(rows.shape[1], alpha, beta)
        elif isinstance(alpha, Tensor) and isinstance(beta, Tensor):
            rows.mul_(alpha.sqrt()[:, None, None])
            self._written_over = True
            beta = beta[:, None, None]
            self.values.masked_fill_(beta == 0, 0.0).mul_(beta).baddbmm_(rows.mT, rows)  # 0 forgets what overflowed too
        else:
            assert not isinstance(alpha, Tensor) and not isinstance(beta, Tensor)
            self.values.baddbmm_(rows.mT, rows, beta=beta, alpha=alpha)


class BlockDiagonal(Factor):
    """(b, w, w): the diagonal blocks, zeros where the last one has no rows."""

    def multiply(self, M: Tensor) -> Tensor:
        k, (b, w) = len(M), self.inverse.shape[1:3]
        by_block = F.pad(M, (0, 0, 0, b * w - M.shape[-2])).unflatten(1, (b, w))
        product: Tensor = (self.inverse @ by_block).flatten(1, 2)
        return product[:, : M.shape[-2]].reshape(k, *M.shape[1:])

    def written_out(self, member: int) -> Tensor:
        whole: Tensor = torch.block_diag(*self.current(member))
        return whole[: self.shape.d, : self.shape.d]

    def mean(self) -> Tensor:
        return torch.stack([factors.mean_diagonal(values, self.shape) for values in self.values])


class Diagonal(Factor):
    """(d,)."""

    def multiply(self, M: Tensor) -> Tensor:
        return self.inverse.unsqueeze(-1) * M


class Pixels(Factor):
    """(C + 1, C + 1): moments of the pixels of an image, for all taps of a filter; the inverse is dense."""

    def multiply(self, M: Tensor) -> Tensor:
        return self.inverse @ M

    def written_out(self, member: int) -> Tensor:
        return uncorrelated.expanded(self.current(member), self.shape.taps, self.shape.bias)


FORMS: Mapping[str, type[Factor]] = {DENSE: Dense, BLOCKS: BlockDiagonal, DIAGONAL: Diagonal, UNCORRELATED: Pixels}


def factor(stack: Stack, side: str, *, averaged: bool = True) -> Factor:
    """The factor of one side of a stack, in the form that its layout asks for; only its inverse unless `averaged`."""
    return FORMS[getattr(stack.layers[0].layout, side)](stack, side, averaged=averaged)
