"""The rule of all running averages of the curvature: how far each moves, and which samples stay out.

    F <- beta F + (1 - beta) new,    beta = min(1 - 1/k, decay) at the k-th update

A flat mean over the first 1 / (1 - decay) updates, an exponential one after; nothing but data enters it (Martens &
Grosse 2015, section 5). A sample that is not finite, or far larger than those before, stays out: one batch that is a
thousand times larger would stand in the averages for hundreds of updates, and hold its layer still. A lasting change is
let in after some updates, since what is usual moves towards it with each of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kfac_triton.distributed import Ranks
from kfac_triton.joint import Stack
from kfac_triton.late import LateRead
from kfac_triton.layer import Layer
from kfac_triton.numbers import Numbers, library, numbers, on_host, shared
from kfac_triton.sample import Sample
from kfac_triton.structures.base import Moves

# Times the usual size of a batch's second moments, beyond which it stays out. Under a confident model the gradients of
# few examples make up most of the Fisher: one in 64 whose class had a probability of 4e-4 is no outlier yet.
OUTLIER, OUTLIER_GRADIENTS = 1e2, 1e5
# Times the usual size, what an outlier counts for in what is usual.
LASTING = 20.0

NAMES = ("factor_updates", "A_size", "G_size")


class _Counts(NamedTuple):
    """Numbers (layers,) of the samples of one update: whether there is one, whether it has terms and rows, how many of
    each, and the largest beta; `divisors` (2, layers): terms and rows, at least 1. `alike`: every layer has one, alone
    among ranks, and all numbers are the same."""

    given: Numbers
    present: Numbers
    terms: Numbers
    rows: Numbers
    decays: Numbers
    divisors: Numbers
    alike: bool


class Averages:
    """Numbers by layer: `updates` (layers,) and the usual `sizes` (2, layers) of A and G, in fixed memory."""

    def __init__(self, stacks: Sequence[Stack], ranks: Ranks) -> None:
        self._ranks = ranks
        self._stacks = stacks
        self._layers: list[Layer] = [layer for stack in stacks for layer in stack.layers]
        self._refused: LateRead | None = None
        if not stacks:
            return
        count, device = len(self._layers), stacks[0].device
        dtype = torch.float64 if any(stack.dtype == torch.float64 for stack in stacks) else torch.float32
        self.updates = torch.zeros(count, dtype=torch.float32, device=device)
        self.sizes = torch.zeros(2, count, dtype=dtype, device=device)
        self.squares = torch.zeros(2, count, dtype=dtype, device=device)
        self._places: tuple[Any, Tensor, Tensor] = (None, self.squares, self.squares)
        scales = [layer.layout.operation == "scale" for layer in self._layers]
        limits = [[OUTLIER_GRADIENTS if scale else OUTLIER for scale in scales], [OUTLIER_GRADIENTS] * count]
        self._limits = shared(torch.tensor(limits, dtype=torch.float64, device=device))
        self._one = shared(torch.ones(count, dtype=torch.float64, device=device))  # in whose precision betas are made
        self._counts: tuple[Any, _Counts] | None = None

    def tensors(self, i: int) -> dict[str, Tensor]:
        """What the state of a layer holds of them."""
        return dict(zip(NAMES, (self.updates[i], self.sizes[0, i], self.sizes[1, i]), strict=True))

    def restore(self, stored: Sequence[Mapping[str, Any]]) -> None:
        """Takes over stored states, in the order of the layers."""
        for i, own in enumerate(stored):
            for name, t in self.tensors(i).items():
                if name in own:
                    t.copy_(torch.as_tensor(own[name]))

    def updated(self, numbers: slice) -> list[bool]:
        """Which layers have had an update; on a device those that have had one at all are taken for such."""
        if on_host(self.updates.device):
            found: list[bool] = (shared(self.updates)[numbers] > 0).tolist()
            return found
        return [True] * (numbers.stop - numbers.start)

    def measure_(self, samples: Sequence[Sequence[Sample | None]]) -> None:
        """Writes the sums of squares of the rows of all samples, by stack; of sums themselves, their norms."""
        count = len(self._layers)
        parts: list[Tensor] = []
        places: list[int] = []
        sums: list[bool] = []
        for stack, own in zip(self._stacks, samples, strict=True):
            for number, one in enumerate(own, stack.first):
                for place, side in zip((number, count + number), () if one is None else one.written(), strict=False):
                    parts += side
                    places += [place] * len(side)
                    sums += [one is not None and one.sums is not None] * len(side)
        if not parts:
            return
        norms = self._norms(parts)
        squares = norms.square()
        if any(sums):
            squares = torch.where(torch.tensor(sums).to(norms.device, non_blocking=True), norms, squares)
        if on_host(self.updates.device):
            with np.errstate(over="ignore"):
                shared(self.squares).reshape(-1)[:] = np.bincount(places, shared(squares), 2 * count)
        else:
            self._add_up_(squares, places)

    def _norms(self, rows: list[Tensor]) -> Tensor:
        """(len(rows),): in the precision of the numbers, or in that of the rows where these have more."""
        wide = torch.float64 in {t.dtype for t in rows}
        return torch.stack(torch._foreach_norm(rows, 2, dtype=torch.float64 if wide else self.squares.dtype))

    def _add_up_(self, squares: Tensor, places: list[int]) -> None:
        """The same without a loop or an order that is left to chance."""
        if self._places[0] != places:
            columns = [places[:i].count(place) for i, place in enumerate(places)]
            width = max(columns) + 1
            index = [place * width + column for place, column in zip(places, columns, strict=True)]
            table = squares.new_zeros(2 * len(self._layers), width)
            self._places = places, torch.tensor(index).to(squares.device, non_blocking=True), table
        _, where, table = self._places
        table.view(-1).index_copy_(0, where, squares.to(table.dtype))
        torch.sum(table, 1, out=self.squares.view(-1))

    def moves(self, samples: Sequence[Sequence[Sample | None]], decay: Sequence[float]) -> list[Moves]:
        """How the averages of each stack move, by the samples of each and the `squares` of their rows; counts them."""
        counts = self._counted([own for stack in samples for own in stack], decay)
        host = on_host(self.updates.device)
        usual = self._usual_moves(counts) if host and counts.alike else None
        if usual is not None:
            vectors, uniform = usual
        else:
            vectors = self._checked_moves(library(self.updates.device), counts)
            uniform = _uniform(vectors) if host else None
        dtypes = set() if host else {stack.dtype for stack in self._stacks}
        by_dtype = {dtype: self._in(dtype, vectors) for dtype in dtypes}
        return [self._of_stack(stack, by_dtype.get(stack.dtype, vectors), decay, uniform) for stack in self._stacks]

    @staticmethod
    def _in(dtype: torch.dtype, vectors: tuple[Numbers, ...]) -> tuple[Numbers, ...]:
        """The numbers of a move in that dtype, for all stacks at once."""
        *numbers, ok = vectors
        return (*torch.stack(numbers).to(dtype).unbind(), ok)

    def advance_(self, rows: list[Tensor], terms: float, count: float, decay: float) -> tuple[float, ...] | None:
        """Counts an update of every layer by `rows`, the a of all and then the g: (beta, alpha_A, alpha_G) for all.

        None, and nothing is counted, where a sample is not usual or the layers have histories of their own. `terms`
        and `count` are those of every sample; on a CPU alone.
        """
        shared(self.squares).reshape(-1)[:] = shared(self._norms(rows).square())
        return self._advanced(terms, count, decay)

    def _advanced(self, terms: float, count: float, decay: float) -> tuple[float, ...] | None:
        updates, sizes, new = shared(self.updates), shared(self.sizes), shared(self.squares).copy()
        new[0] /= terms
        new[1] /= count
        k = float(updates[0]) + 1
        # a comparison with what is no number is false
        if k == 1 or not ((new < self._limits * sizes).all() and (updates == updates[0]).all()):
            return None
        beta = min(1 - 1 / k, decay)
        share = 1 - beta
        new *= share
        sizes *= beta
        sizes += new
        updates += 1
        return beta, share / terms, share / count

    def _usual_moves(self, counts: _Counts) -> tuple[tuple[Numbers, ...], Any] | None:
        """The same as `_checked_moves` where every layer has a good sample, the same history and as many rows; else
        None."""
        found = self._advanced(float(counts.terms[0]), float(counts.rows[0]), float(counts.decays[0]))
        if found is None:
            return None
        beta, *alphas = found
        vectors = tuple([np.full(len(counts.given), number) for number in (beta, 1 - beta, *alphas)])
        return (*vectors, counts.given), found

    def _checked_moves(self, xp: Any, counts: _Counts) -> tuple[Numbers, ...]:
        """(beta, share, alpha_A, alpha_G, ok) by layer."""
        given, decays = counts.given, counts.decays
        updates, sizes, squares = shared(self.updates), shared(self.sizes), shared(self.squares)
        new = squares / counts.divisors
        finite = new < math.inf  # no square is negative, and no comparison with NaN is true
        known = sizes * 1.0
        outlier = (known > 0) & (new > self._limits * known)
        beta = xp.minimum(1 - 1 / (updates + self._one), decays)
        counted = xp.where(outlier, LASTING * known, new)
        usual = xp.where(known > 0, beta * known + (1 - beta) * counted, counted)
        sizes[...] = xp.where(finite & given, usual, known)
        good = (finite & ~outlier).all(0)
        ok = self._agreed(counts.present & good)
        self._refused = self._note(given & ~good, finite.all(0))
        updates += ok
        beta = xp.where(ok, xp.minimum(1 - self._one / updates.clip(1.0, None), decays), 1.0)
        share = 1 - beta
        alphas = share / counts.divisors
        return beta, share, alphas[0], alphas[1], ok

    def _counted(self, samples: Sequence[Sample | None], decay: Sequence[float]) -> _Counts:
        """The counts of samples, kept while they are the same numbers."""
        terms = [0 if own is None else own.terms for own in samples]
        rows = [0 if own is None else own.rows for own in samples]
        key = terms, rows, list(decay), [own is None for own in samples]
        on_device = any([isinstance(n, Tensor) for n in (*terms, *rows)])
        if on_device or self._counts is None or self._counts[0] != key:
            self._counts = key, self._made(*key, alike=not on_device and all([len(set(n)) == 1 for n in key]))
        found: _Counts = self._counts[1]
        return found

    def _made(
        self, terms: list[Any], rows: list[Any], decay: list[float], missing: list[bool], *, alike: bool
    ) -> _Counts:
        device = self.updates.device
        given = shared(~torch.tensor(missing).to(device, non_blocking=True))
        L, n, decays = (numbers(values, device) for values in (terms, rows, decay))
        divisors = library(device).stack([L, n]).clip(1.0, None)
        alone = not self._ranks.active and not missing[0] and bool(alike) and terms[0] > 0 and rows[0] > 0
        return _Counts(given, given & (L > 0) & (n > 0), L, n, decays, divisors, alike and alone)

    def _agreed(self, ok: Numbers) -> Numbers:
        """Which samples are good on all ranks."""
        if not self._ranks.active:
            return ok
        flags = torch.as_tensor(ok)
        self._ranks.all_agree_(flags)
        return shared(flags)

    def _of_stack(
        self, stack: Stack, vectors: tuple[Numbers, ...], decay: Sequence[float],
        uniform: tuple[float, float, float] | None,
    ) -> Moves:  # fmt: skip
        own = tuple([vector[stack.numbers] for vector in vectors])
        if uniform is None and on_host(self.updates.device):
            uniform = _uniform(own)
        return Moves(own[:4], own[4], decay[stack.numbers], uniform, stack)

    def _note(self, refused: Numbers, finite: Numbers) -> LateRead | None:
        if on_host(self.updates.device) and not refused.any():
            return None
        return LateRead(torch.stack([torch.as_tensor(refused), torch.as_tensor(finite)]))

    def report(self, tell: Callable[[Layer, bool], None]) -> None:
        """Calls `tell(layer, finite)` for every sample of the last update that was not finite, or far too large.

        On a device it is known late: asked before the next update, it waits for none of the work after the last.
        """
        if self._refused is None:
            return
        refused, finite = self._refused.values()
        self._refused = None
        for layer, out, fine in zip(self._layers, refused, finite, strict=True):
            if out:
                tell(layer, fine)


def _uniform(vectors: tuple[Numbers, ...]) -> tuple[float, float, float] | None:
    """(beta, alpha_A, alpha_G) where all layers have the same."""
    beta, _, alpha_A, alpha_G, ok = vectors
    found = float(beta[0]), float(alpha_A[0]), float(alpha_G[0])
    same = ok.all() and (beta == beta[0]).all() and (alpha_A == alpha_A[0]).all() and (alpha_G == alpha_G[0]).all()
    return found if same else None
