"""What a forward pass received: containers copied, since forward and loader may change them; tensors by reference."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map, tree_unflatten

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class Received:
    """Arguments of a call at the moment it begins; `copied`: with copies of the tensors, as it may write to them."""

    __slots__ = ("_contents", "_copies", "_leaves", "_objects", "_structure", "_versions")

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any], *, copied: bool) -> None:
        self._structure: TreeSpec | None = None
        self._leaves: list[Any] = list(args)
        self._objects: list[Any] = []
        if kwargs or not _plain(args):
            self._leaves, self._structure = tree_flatten((args, kwargs))
            self._objects = [x for x in self._leaves if not isinstance(x, Tensor) and hasattr(x, "__dict__")]
        self._versions = _versions(self._leaves)
        self._contents = _contents(self._objects) if self._objects else []
        self._copies = [_fresh(leaf) for leaf in self._leaves] if copied else None

    def written(self) -> bool:
        """Whether a tensor among them was written to since."""
        return _versions(self._leaves) != self._versions

    def lost(self, written: bool) -> bool:
        """Whether there is no copy of a tensor that was `written` to: objects of no known kind are not copied."""
        changed = bool(self._objects) and _contents(self._objects) != self._contents
        return changed or (written and self._copies is None)

    def arguments(self, *, copies: bool = False) -> Arguments:
        """(args, kwargs) in containers of their own; with `copies`, the tensors as they were."""
        leaves = self._copies if copies and self._copies is not None else self._leaves
        if self._structure is None:
            return tuple(leaves), {}
        args, kwargs = tree_unflatten(leaves, self._structure)
        return args, kwargs


def fresh(arguments: Arguments) -> Arguments:
    """Arguments in containers of their own, with copies of the tensors, which require gradients as these do."""
    args, kwargs = arguments
    if not kwargs and _plain(args):
        return tuple([_fresh(a) for a in args]), {}
    copied: Arguments = tree_map(_fresh, arguments)
    return copied


def _plain(args: tuple[Any, ...]) -> bool:
    """Whether they are tensors, of no other class."""
    return {Tensor}.issuperset(map(type, args))


def _fresh(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    copied = leaf.detach().clone()
    if not leaf.requires_grad:
        return copied
    copied.requires_grad_()
    return copied if leaf.is_leaf else copied.clone()  # forward may write to what is no leaf


def _versions(leaves: list[Any]) -> list[int]:
    return [leaf._version for leaf in leaves if isinstance(leaf, Tensor) and not leaf.is_inference()]


def _contents(objects: list[Any]) -> list[tuple[str, int, int]]:
    """Name, identity and version of the tensors in the attributes of objects."""
    held = [(name, value) for one in objects for name, value in vars(one).items() if isinstance(value, Tensor)]
    return [(name, id(value), -1 if value.is_inference() else value._version) for name, value in held]
