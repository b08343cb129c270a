"""Owners that hold nothing that could be written to, so that the identity of what they hold tells of every change."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from operator import is_
from typing import Any

from kfac_triton.capture.copies import PLAIN, plain
from kfac_triton.capture.owners import INTERNAL, Owner, restore


class Still:
    """What these dictionaries held when this was made; the first ones are `owners`, the others tables of parameters.

    A comparison runs in C over all of them, which costs a tenth of a copy of each.
    """

    def __init__(self, owners: Sequence[Any], tables: Sequence[dict[str, Any]]) -> None:
        self._all: list[dict[str, Any]] = [*owners, *tables]
        self._owners = len(owners)
        self._before = [dict(one) for one in self._all]
        self._keys, self._values = self._held()

    def unchanged(self) -> bool:
        """Whether they hold the same, to the identity."""
        keys, values = self._held()
        return keys == self._keys and all(map(is_, values, self._values))

    def owners(self) -> list[tuple[Owner, dict[str, Any]]]:
        """Every owner and what it held."""
        return list(zip(self._all[: self._owners], self._before, strict=False))

    def restore(self) -> None:
        """Gives all of them back what they held."""
        for one, before in zip(self._all, self._before, strict=True):
            restore(one, before)

    def _held(self) -> tuple[list[str], list[Any]]:
        return list(chain.from_iterable(self._all)), list(chain.from_iterable(map(dict.values, self._all)))


def still(owner: Owner) -> bool:
    """Whether nothing that an owner holds could be written to, what every module has left out."""
    return isinstance(owner, dict) and all(
        [type(value) in PLAIN or plain(value) for name, value in owner.items() if name not in INTERNAL]
    )
