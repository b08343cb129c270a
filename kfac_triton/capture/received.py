"""What a forward pass received: containers copied, since forward and loader may change them; tensors by reference."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class Received:
    """Arguments of a call at the moment it begins; `copied`: with copies of the tensors, as it may write to them."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any], *, copied: bool) -> None:
        tensors_alone = not kwargs and all(type(a) is Tensor for a in args)
        self._structure: TreeSpec | None = None
        self._leaves: list[Any] = list(args)
        if not tensors_alone:
            self._leaves, self._structure = tree_flatten((args, kwargs))
        self._versions = _versions(self._leaves)
        self._copies = [fresh(leaf, copied=True) for leaf in self._leaves] if copied else None

    def written(self) -> bool:
        """Whether a tensor among them was written to since."""
        return _versions(self._leaves) != self._versions

    def arguments(self, *, copies: bool = False) -> Arguments:
        """(args, kwargs) in containers of their own; with `copies`, the tensors as they were."""
        leaves = self._copies if copies and self._copies is not None else self._leaves
        if self._structure is None:
            return tuple(leaves), {}
        args, kwargs = tree_unflatten(leaves, self._structure)
        return args, kwargs

    @property
    def copied(self) -> bool:
        return self._copies is not None


def fresh(leaf: Any, *, copied: bool) -> Any:
    """A tensor without the graph behind it, requiring a gradient as before; `copied`: in memory of its own."""
    if not isinstance(leaf, Tensor):
        return leaf
    detached = leaf.detach().clone() if copied else leaf.detach()
    return detached.requires_grad_(leaf.requires_grad) if leaf.requires_grad else detached


def _versions(leaves: list[Any]) -> list[int]:
    return [leaf._version for leaf in leaves if isinstance(leaf, Tensor) and not leaf.is_inference()]
