"""The refresh of many stacks: on a CPU, narrow factors of one width share a factorisation, whatever side or stack they
are of.

What surrounds a factorisation, a dozen small operations, is so done once a width. Wide factors would be copied for it,
see `factors.TOGETHER`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeGuard

import numpy as np
import torch
from torch import Tensor

from kfac_triton import ops
from kfac_triton.linalg import batched, factors
from kfac_triton.linalg.batched import Damped
from kfac_triton.numbers import on_host, shared
from kfac_triton.structures.base import Structure
from kfac_triton.structures.factor import Dense, Factor
from kfac_triton.structures.kronecker import Kronecker


class Due(NamedTuple):
    """What `Structure.refresh_` of one structure is to be called with; the layers have had an update."""

    structure: Structure
    members: Sequence[int]
    damping: Sequence[float]

    def pick(self, whole: Tensor) -> Tensor:
        """What of a tensor (layers, ...) belongs to the members."""
        return whole if len(self.members) == len(whole) else whole[list(self.members)]


def refresh_(due: Sequence[Due]) -> list[list[bool]]:
    """`Structure.refresh_` of each, but for rounding; what that returns."""
    done = _renew_together_(due)
    return [
        [True] * len(one.members) if id(one) in done else one.structure.refresh_(one.members, one.damping)
        for one in due
    ]


def _renew_together_(due: Sequence[Due]) -> set[int]:
    """Renews the inverses of those that share factorisations, if all of these succeed; the ids of those renewed."""
    plain = [(one, own) for one, own in ((one, one.structure) for one in due) if _shares(own)]
    together = [(one, own.A, own.G) for one, own in plain if own.stack.dtype == plain[0][1].stack.dtype]
    if not together:
        return set()
    values = []
    for one, A, G in together:
        one.structure.settle_()
        values.append((one.pick(A.values), one.pick(G.values)))
    a, g = (np.concatenate([_means(F) for F in column]) for column in zip(*values, strict=True))
    damping = np.array([one.damping[i] for one, _, _ in together for i in one.members])
    _, A, G = together[0]
    strengths = factors.strengths(np, a, g, damping, A.shape, G.shape, torch.finfo(A.values.dtype).tiny)
    places = np.cumsum([0, *(len(one.members) for one, _, _ in together)]).tolist()
    found = batched.inverses(
        [
            Damped(F, *(t[start:stop] for t in side))
            for pair, start, stop in zip(values, places, places[1:], strict=False)
            for F, side in zip(pair, strengths, strict=True)
        ]
    )
    return _kept_(together, found)


def _kept_(together: Sequence[tuple[Due, Factor, Factor]], found: Sequence[Tensor | None]) -> set[int]:
    """Writes the inverses of layers that have both; the ids of those due."""
    into: list[Tensor] = []
    inverses: list[Tensor] = []
    done = set()
    for (one, A, G), A_inv, G_inv in zip(together, found[::2], found[1::2], strict=True):
        if A_inv is None or G_inv is None:
            continue
        done.add(id(one))
        for F, inverse in ((A, A_inv), (G, G_inv)):
            if len(one.members) == len(F.inverse):
                into.append(F.inverse)
                inverses.append(inverse)
            else:
                into += [F.inverse[i] for i in one.members]
                inverses += inverse.unbind()
        for i in one.members:
            one.structure.ready[i] = True
    if into:
        torch._foreach_copy_(into, inverses)
    return done


def _shares(structure: Structure) -> TypeGuard[Kronecker]:
    """Whether it is two narrow dense factors a layer, damped by the rule for all."""
    stack = structure.stack
    return (
        type(structure) is Kronecker
        and isinstance(structure.A, Dense)
        and isinstance(structure.G, Dense)
        and stack.groups == 1
        and max(stack.dims) <= factors.TOGETHER
        and not stack.layers[0].layout.undivided
        and on_host(stack.device)
        and not ops.iterates(stack.device)
    )


def _means(F: Tensor) -> np.ndarray:
    """tr F / dim F of each."""
    means: np.ndarray = shared(F).diagonal(axis1=-2, axis2=-1).sum(-1) / F.shape[-1]
    return means
