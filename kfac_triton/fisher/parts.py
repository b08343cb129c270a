"""A part of a batch for K-FAC's own passes, and whole batches where a part would be something else.

A part is n of the N examples: rows start:start+n of every input. Whether that is right cannot be asked of the inputs
alone, so the inputs and the outputs decide together. A part is used only where

- every input is a dense tensor with N as its first axis, or has no axes (numbers, strings, 0-d tensors). Sparse and
  nested tensors, arrays and objects of one's own cannot be cut;
- no input is square, (N, N), beside one of another width, as an adjacency matrix is: its columns are examples too;
- no input numbers the segments of a batch (sorted integers with repetitions): a cut would split one;
- the outputs for N examples have a multiple k N as their first axis, those for n of them k n, and all other axes are
  the same. Outputs by graph, for inputs by node, fail this, and so do scores of every example against every other.

The values of outputs are not compared: batch normalisation and dropout make them differ between a part and the whole.
The shape of the whole batch's outputs comes from a pass over it that was made anyway, and else from one more pass, once
for each structure of the inputs. A model that raises on a part, whatever it raises, takes whole batches.
"""

from __future__ import annotations

import enum
import logging
import math
import numbers
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from kfac_triton.capture import Inputs, dense

log = logging.getLogger("kfac_triton")

T = TypeVar("T")
Forward = Callable[[Inputs], tuple[torch.Size, T]]  # a pass: the shape of the outputs, and whatever else it found

WITHOUT_AXES = (type(None), numbers.Number, str, bytes, enum.Enum, torch.dtype, torch.device)


class Parts:
    """Remembers, by the structure of the inputs, whether a part of a batch may stand for all of it."""

    def __init__(self) -> None:
        self._seen: dict[Hashable, tuple[int, torch.Size]] = {}  # N and the shape of the outputs of a whole batch
        self._multiples: dict[Hashable, int] = {}  # k, once the shapes agree
        self._whole: set[Hashable] = set()
        self._warned = False

    def run(
        self,
        whole: Inputs,
        forward: Forward[T],
        *,
        fraction: float,
        update: int,
        least: int,
    ) -> tuple[Inputs, T]:
        """`forward` on a part or on the whole batch: the inputs used, and what it returned beside the shape.

        `fraction` of the examples, never fewer than min(N, least), from a place that moves with `update`.
        """
        N = batch_size(whole)
        n = max(math.ceil(N * fraction), min(N, least)) if N is not None else 0
        key = _structure(whole)
        reason = None
        if fraction < 1 and key not in self._whole and (N is None or n < N):
            reason = self._indivisible(whole, N, key)
            if reason is None and N is not None:
                part = _cut(whole, update * n % (N - n + 1), n)
                try:
                    shape, found = forward(part)
                    if key not in self._multiples and self._unlike_seen(key, shape):
                        self._seen[key] = N, forward(whole)[0]
                    reason = self._misfit(key, shape, n)
                    if reason is None:
                        return part, found
                except Exception as error:
                    reason = f"the model fails on a part ({type(error).__name__}: {first_line(error)})"
        shape, found = forward(whole)
        if reason is not None:
            self._refuse(key, reason)
        elif N is not None:
            self._seen[key] = N, shape
        return whole, found

    def _indivisible(self, inputs: Inputs, N: int | None, key: Hashable) -> str | None:
        """Why the inputs cannot be cut into examples; None where they can."""
        leaves = tree_leaves((inputs.args, inputs.kwargs), is_leaf=lambda node: _is_list_of(N, node))
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                if not dense(leaf):
                    return f"an input is {'nested' if leaf.is_nested else leaf.layout}"
            elif not isinstance(leaf, WITHOUT_AXES) and not callable(leaf):
                return f"an input is of type {type(leaf).__name__}"
        tensors = [t for t in inputs.tensors() if t.dim()]
        if any(t.shape[0] != N for t in tensors):
            return "the inputs differ in their first axis"
        widths = {t.shape[1] for t in tensors if t.dim() > 1}
        if N in widths and len(widths) > 1:
            return "an input is square"
        if key not in self._multiples and any(map(_numbers_segments, tensors)):
            return "an input numbers the segments of the batch"
        return None

    def _unlike_seen(self, key: Hashable, shape: torch.Size) -> bool:
        """Whether no whole batch was seen yet whose outputs had the axes of this part's behind the first."""
        return key not in self._seen or self._seen[key][1][1:] != shape[1:]

    def _misfit(self, key: Hashable, shape: torch.Size, n: int) -> str | None:
        """Why the outputs of n examples are not a share of a whole batch's; None where they are, by their shape."""
        if key in self._multiples:
            fits = shape[0] == self._multiples[key] * n
        else:
            N, full = self._seen[key]
            fits = full[0] % N == 0 and shape == (full[0] // N * n, *full[1:])
            if fits:
                self._multiples[key] = full[0] // N
        if fits:
            return None
        N, full = self._seen[key]
        return f"the outputs have shape {tuple(full)} for {N} examples and {tuple(shape)} for {n}"

    def _refuse(self, key: Hashable, reason: str) -> None:
        self._whole.add(key)
        if not self._warned:
            log.warning(
                "K-FAC computes its statistics from whole batches, not from parts: %s. "
                "Set factor_fraction (and quadratic_fraction) to 1.0 to silence this warning",
                reason,
            )
        self._warned = True


def batch_size(inputs: Inputs) -> int | None:
    """N: the first axis of the first tensor that has axes; None where there is none."""
    for t in inputs.tensors():
        if t.dim():
            return t.size(0)  # strided nested tensors have no shape
    return None


def _structure(inputs: Inputs) -> Hashable:
    if not inputs.kwargs and set(map(type, inputs.args)) == {Tensor}:
        return tuple(map(Tensor.dim, inputs.args))  # as below without its Python calls
    leaves, spec = tree_flatten((inputs.args, inputs.kwargs))
    return spec, tuple(leaf.dim() if isinstance(leaf, Tensor) else type(leaf) for leaf in leaves)


def _cut(inputs: Inputs, start: int, n: int) -> Inputs:
    args, kwargs = tree_map(
        lambda leaf: leaf[start : start + n] if isinstance(leaf, Tensor) and leaf.dim() else leaf,
        (inputs.args, inputs.kwargs),
    )
    return inputs._replace(args=args, kwargs=kwargs)


def _is_list_of(N: int | None, node: Any) -> bool:
    """One entry for each example."""
    return isinstance(node, list) and len(node) == N


def _numbers_segments(t: Tensor) -> bool:
    if t.dim() != 1 or t.is_floating_point() or t.is_complex() or t.dtype == torch.bool:
        return False
    steps = t.diff()
    return bool((steps >= 0).all() & (steps > 0).any() & (steps == 0).any())


def first_line(error: Exception) -> str:
    """What an error says, without the details on further lines."""
    return str(error).split("\n", 1)[0]
