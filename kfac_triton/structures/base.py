"""What every approximation of a layer's block of the Fisher matrix offers, over a stack of layers of one shape."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kfac_triton.distributed import Ranks
from kfac_triton.joint import Joint, Stack
from kfac_triton.numbers import Numbers, as_tensor
from kfac_triton.sample import Sample

VECTORS = ("beta", "share", "alpha_A", "alpha_G")


class Moves:
    """How an update moves the averages of a stack, F <- beta F + alpha sum x x^T, by layer.

    `beta`, `share` = 1 - beta, `alpha_A` and `alpha_G`, which are share over the terms and over the rows, and `ok`:
    tensors (layers,). Where `ok` is false beta is 1 and the others are 0. `decay`: the most that beta can be.
    `uniform`: (beta, alpha_A, alpha_G) where all layers have the same and the host knows them.
    """

    def __init__(
        self, values: Sequence[Numbers], ok: Numbers, decay: Sequence[float],
        uniform: tuple[float, float, float] | None, stack: Stack,
    ) -> None:  # fmt: skip
        self.decay, self.uniform = decay, uniform
        self._values, self._ok, self._stack = values, ok, stack

    def __getattr__(self, name: str) -> Tensor:
        """A vector as a tensor; made when it is first asked for, since the usual update needs none of them."""
        if name == "ok":
            made = as_tensor(self._ok, torch.bool, self._stack.device)
        elif name in VECTORS:
            made = as_tensor(self._values[VECTORS.index(name)], self._stack.dtype, self._stack.device)
        else:
            raise AttributeError(name)
        setattr(self, name, made)
        return made


class Room(NamedTuple):
    """Where the rows of all layers of a stack go: `rows` (layers, n, d), `data` without a column of ones, and `parts`,
    `data` by layer."""

    rows: Tensor
    data: Tensor
    parts: tuple[Tensor, ...]


class Product(NamedTuple):
    """F <- beta F + alpha R^T R with F `values` (layers, d, d) and R `rows` (layers, n, d), of a `side`, 0 for A."""

    values: Tensor
    rows: Tensor
    side: int


class Structure(ABC):
    """Curvature of the layers of one stack. Its tensors are allocated once and written in place.

    Sequences have one entry for each layer of the stack; a damping is what adds to eigenvalues of the Fisher of the
    mean nll. `ready`: whether a layer has something to precondition with. Averages are those of all `ranks`.
    """

    name = ""

    def __init__(self, stack: Stack, ranks: Ranks) -> None:
        self.stack, self.ranks = stack, ranks
        self.ready = [False] * len(stack.layers)

    def room(self, counts: Sequence[int]) -> tuple[Room, Room] | None:
        """Where the rows a and g of all layers go, where they can be added in one product; else None.

        `counts`: how many plain rows each layer has, see `Sample.plain`; 0 without a sample.
        """
        return None

    def products(self, rows: tuple[Room, Room]) -> list[Product] | None:
        """The products that are all of `update_`, where new rows come to the same place each time; else None."""
        return None

    @abstractmethod
    def update_(
        self, samples: Sequence[Sample | None], rows: tuple[Room, Room] | None, moves: Moves, damping: Sequence[float]
    ) -> None:
        """Moves the averages of the layers that have a sample; `rows` are in the `room` for them."""

    @abstractmethod
    def refresh_(self, members: Sequence[int], damping: Sequence[float]) -> list[bool]:
        """Renews what `apply_` multiplies with; false for members whose last one stays since none was found."""

    @abstractmethod
    def renewed(self) -> list[Tensor]:
        """The tensors that `refresh_` writes."""

    @abstractmethod
    def apply_(self, grad: Joint, out: Joint, number: int, scratch: Tensor, *, bf16: bool) -> None:
        """out <- (F + damping)^-1 grad for the joint matrices of the stack with this number; `scratch` (n, d_out, d_in)
        is written over."""

    @abstractmethod
    def tensors(self, member: int) -> dict[str, Any]:
        """What the state of a layer holds, by name: views of the memory here, and numbers."""

    @abstractmethod
    def restore(self, stored: Sequence[Mapping[str, Any]]) -> None:
        """Takes over stored states, empty for layers that have none."""

    @abstractmethod
    def factors(self, member: int, damping: float) -> tuple[Tensor, Tensor]:
        """Copies of A and G as they stand for all rows of a side: dense, or its diagonal. `damping` is in force, for
        what holds no factors."""

    @abstractmethod
    def nbytes(self) -> dict[str, int]:
        """Bytes of "factors", of "inverses" or what stands in their place, and of the "rows" that wait."""

    def room_nbytes(self) -> int:
        """Bytes of what `room` gave."""
        return 0

    def settle_(self) -> None:  # noqa: B027  most have nothing that waits
        """Brings the factors up to date with every update so far."""

    def empty_rows(self) -> dict[str, Any]:
        """What a checkpoint holds for rows that do not wait now but may, so that it always has the same names."""
        return {}

    def shown(self) -> Any:
        """Changes whenever `tensors` would give other tensors or numbers."""
        return tuple(self.ready)
