"""One update of the factors of all layers: where the rows of samples go, and which products they enter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kfac_triton.averages import Averages
from kfac_triton.numbers import on_host
from kfac_triton.sample import Sample
from kfac_triton.structures.base import Moves, Product, Room, Structure
from kfac_triton.structures.tridiagonal import Chain

Rooms = Sequence[tuple[Room, Room] | None]


class Updates:
    """Moves the averages of `structures`, and those of `chain` where there is one, by samples of their layers."""

    def __init__(
        self, structures: Sequence[Structure], averages: Averages, chain: Chain | None, *, alone: bool
    ) -> None:
        self._structures, self._averages, self._chain = structures, averages, chain
        self._repeats = alone and chain is None and bool(structures) and on_host(structures[0].stack.device)
        self._usual: UsualUpdate | None = None

    def usual_(self, samples: Sequence[Sample], decay: float) -> bool:
        """The same as `move_` where that would do what it did last time; else nothing, and false.

        `samples`: of the layers that had one last time, in that order. `decay`: that of every layer.
        """
        return self._usual is not None and self._usual.move_(samples, decay)

    def move_(
        self,
        samples: Sequence[Sample],
        places: Sequence[tuple[int, int] | None],
        decay: Sequence[float],
        damping: Sequence[float],
    ) -> None:
        """`places`: stack and member of the layer of each sample, None where its group is not due. `decay`, `damping`:
        by layer."""
        by_stack: list[list[Sample | None]] = [[None] * len(one.ready) for one in self._structures]
        for own, place in zip(samples, places, strict=True):
            if place is not None:
                by_stack[place[0]][place[1]] = own
        counts = [[0 if one is None else one.plain() for one in own] for own in by_stack]
        rooms = [one.room(n) for one, n in zip(self._structures, counts, strict=True)]
        _put_rows(rooms, by_stack)
        self._averages.measure_(by_stack)
        moves = self._averages.moves(by_stack, decay)
        for structure, members, room, move in zip(self._structures, by_stack, rooms, moves, strict=True):
            structure.update_(members, room, move, damping[structure.stack.numbers])
        if self._chain is not None:
            _update_chain_(self._chain, by_stack, moves)
        self._usual = self._repeated(samples, by_stack, rooms)

    def _repeated(
        self, samples: Sequence[Sample], by_stack: Sequence[Sequence[Sample | None]], rooms: Rooms
    ) -> UsualUpdate | None:
        """The same update for rows to come, where nothing of it depends on the samples but their rows."""
        if not self._repeats or any([own is None for stack in by_stack for own in stack]):
            return None
        products: list[Product] = []
        for structure, room in zip(self._structures, rooms, strict=True):
            own = None if room is None else structure.products(room)
            if own is None:
                return None
            products += own
        whole = [own for stack in by_stack for own in stack if own is not None]
        if len({(own.terms, own.rows) for own in whole}) > 1 or not (whole[0].terms and whole[0].rows):
            return None
        parts = [part for side in (0, 1) for room in rooms if room is not None for part in room[side].parts]
        return UsualUpdate(self._averages, samples, [samples.index(own) for own in whole], parts, products)


class UsualUpdate:
    """An update that is repeated: every layer has one matrix of rows for each factor, of the same sizes as before.

    `order`: the places of the samples by layer. `parts`: where the rows go, the a of all layers and then the g.
    """

    def __init__(
        self,
        averages: Averages,
        samples: Sequence[Sample],
        order: Sequence[int],
        parts: Sequence[Tensor],
        products: Sequence[Product],
    ) -> None:
        self._averages, self._order, self._parts = averages, order, list(parts)
        self._key = _key(samples)
        self._counts = float(samples[0].terms), float(samples[0].rows)
        self._products = [(p.values, p.rows.mT, p.rows, p.side) for p in products]

    def move_(self, samples: Sequence[Sample], decay: float) -> bool:
        """Moves the averages; false, and nothing has moved, where a sample is of another kind or size, or unusual."""
        if _key(samples) != self._key:
            return False
        ordered = [samples[i] for i in self._order]
        rows: list[Any] = [own.a[0] for own in ordered] + [own.g[0] for own in ordered]
        torch._foreach_copy_(self._parts, rows)
        found = self._averages.advance_(rows, *self._counts, decay)
        if found is None:
            return False
        beta, *alphas = found
        for values, left, right, side in self._products:
            values.baddbmm_(left, right, beta=beta, alpha=alphas[side])
        return True


def _key(samples: Sequence[Sample]) -> list[Any]:
    """What must be the same for the same update."""
    return [
        (len(own.a), len(own.g), getattr(own.a[0], "shape", None), own.g[0].shape, own.ones, own.terms, own.rows)
        if own.sums is None else None
        for own in samples
    ]  # fmt: skip


def _put_rows(rooms: Rooms, samples: Sequence[Sequence[Sample | None]]) -> None:
    """Copies the rows of samples into the rooms of their stacks."""
    into: list[Tensor] = []
    rows: list[Any] = []
    for room, own in zip(rooms, samples, strict=True):
        if room is not None:
            into += [*room[0].parts, *room[1].parts]
            rows += [one.a[0] for one in own if one is not None]
            rows += [one.g[0] for one in own if one is not None]
    if into:
        torch._foreach_copy_(into, rows)


def _update_chain_(chain: Chain, samples: Sequence[Sequence[Sample | None]], moves: Sequence[Moves]) -> None:
    places = chain.places
    chained = [samples[place.number][place.member] for place in places]
    if all(own is not None for own in chained):
        chain.update_(chained, [moves[place.number] for place in places])  # type: ignore[arg-type]
