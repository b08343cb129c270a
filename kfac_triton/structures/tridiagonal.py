"""Block-tridiagonal inverse of the Fisher for a chain of layers (Martens & Grosse 2015, section 4.3).

On top of the block-diagonal state of every weight: its place in the `chain`, `A_next` (d_in_i, d_in_i+1) and `G_next`
(d_out_i, d_out_i+1), running averages of the moments shared with the next layer, and the link that follows from them,
`link_...`, refreshed with the inverses. `kfac_triton.linalg.chain` has the mathematics, its memory and time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kfac_triton.distributed import Ranks
from kfac_triton.joint import Joint
from kfac_triton.layer import Layer
from kfac_triton.linalg import factors
from kfac_triton.linalg.chain import Link, link, product
from kfac_triton.sample import Sample
from kfac_triton.structures.base import Moves
from kfac_triton.structures.kronecker import Kronecker


class Place(NamedTuple):
    """A layer of the chain: the number of its stack, the structure of that, and which member it is."""

    number: int
    structure: Kronecker
    member: int

    @property
    def layer(self) -> Layer:
        return self.structure.stack.layers[self.member]

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        return self.structure.A.values[self.member], self.structure.G.values[self.member]

    @property
    def inverses(self) -> tuple[Tensor, Tensor]:
        return self.structure.A.inverse[self.member], self.structure.G.inverse[self.member]


class Chain:
    """What links the layers at `places`, in their order. `linked`: all links are there."""

    def __init__(self, places: Sequence[Place], ranks: Ranks) -> None:
        self.places, self._ranks = places, ranks
        self.linked = len(places) == 1
        self._cross: list[dict[str, Tensor]] = []
        self._links: list[Link] = []
        for (A, G), (A_after, G_after) in pairwise(place.factors for place in places):
            cross = {"A_next": A.new_zeros(len(A), len(A_after)), "G_next": G.new_zeros(len(G), len(G_after))}
            self._cross.append(cross)
            shapes = (cross["A_next"].shape, cross["G_next"].shape, A.shape, G.shape, A.shape[:1], G.shape[:1])
            self._links.append(Link(*(A.new_zeros(shape) for shape in shapes)))

    def update_(self, samples: Sequence[Sample], moves: Sequence[Moves]) -> None:
        """Moves the cross moments by the rule of the factors; `moves` are those of each place's stack."""
        for i, cross in enumerate(self._cross):
            place, own, after = self.places[i], samples[i], samples[i + 1]
            ok = moves[i].ok[place.member] & moves[i + 1].ok[self.places[i + 1].member]
            beta, share = moves[i].beta[place.member], moves[i].share[place.member]
            for name, left, right, count in (
                ("A_next", _with_ones(own), _with_ones(after), own.terms), ("G_next", own.g, after.g, own.rows)
            ):  # fmt: skip
                known = cross[name]
                products = [x.to(known.dtype).mT @ y.to(known.dtype) for x, y in zip(left, right, strict=True)]
                moment = torch.stack(products).sum(dim=0)
                known.copy_(torch.where(ok, beta * known + share / count * moment, known))
        self._ranks.average_([t for cross in self._cross for t in cross.values()])

    def refresh_(self, damping: Sequence[float]) -> None:
        """Renews the links from factors and inverses as they are; where one cannot be had the last stays."""
        if not all(place.structure.ready[place.member] for place in self.places):
            return
        for place in self.places:
            place.structure.settle_()
        damped = [factors.damped_factors(*place.factors, d) for place, d in zip(self.places, damping, strict=True)]
        found = []
        for i, cross in enumerate(self._cross):
            (A, G), (A_inv, G_inv) = damped[i + 1], self.places[i + 1].inverses
            found.append(link(*damped[i], cross["A_next"], cross["G_next"], A, A_inv, G, G_inv))
        for known, new in zip(self._links, found, strict=True):
            if new is not None:
                for t, value in zip(known, new, strict=True):
                    t.copy_(value)
        self.linked |= all(new is not None for new in found)

    def renewed(self) -> list[Tensor]:
        """The tensors that `refresh_` writes."""
        return [t for own in self._links for t in own]

    def apply_(self, grad: Joint, out: Joint) -> None:
        """out <- F^-1 grad for all layers."""
        grads = [grad.of(place.number, place.member) for place in self.places]
        V = product(grads, self._links, *self.places[-1].inverses)
        for place, v in zip(self.places, V, strict=True):
            out.of(place.number, place.member).copy_(v)

    def tensors(self, place: int) -> dict[str, Any]:
        """What the state of the layer at a place holds besides its block-diagonal part."""
        held: dict[str, Any] = {"chain": place}
        if place < len(self._cross):
            held |= self._cross[place]
            if self.linked:
                held |= {f"link_{name}": t for name, t in self._links[place]._asdict().items()}
        return held

    def nbytes(self) -> dict[str, int]:
        """Bytes of the cross moments, which are "factors", and of the links, "inverses"."""
        return {
            "factors": sum(t.nbytes for cross in self._cross for t in cross.values()),
            "inverses": sum(t.nbytes for own in self._links for t in own),
        }

    def restore(self, stored: Sequence[Mapping[str, Any]]) -> None:
        """Takes over stored states, by place."""
        for cross, known, own in zip(self._cross, self._links, stored[:-1], strict=True):
            for name, t in (*cross.items(), *((f"link_{name}", t) for name, t in known._asdict().items())):
                if name in own:
                    t.copy_(own[name])
        self.linked = all("link_psi_A" in own for own in stored[:-1])


def _with_ones(own: Sample) -> list[Tensor]:
    rows = [a for a in own.a if isinstance(a, Tensor)]  # a chain has no convolutions
    if not own.ones:
        return rows
    return [torch.cat([a, a.new_ones(*a.shape[:-1], 1)], dim=-1) for a in rows]
