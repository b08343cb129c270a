"""What one call of the user's model received, and the base of everything that hangs hooks on it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from kfac_triton.capture.state import Opening


class Autocast(NamedTuple):
    """The autocast state of a forward pass on one device type."""

    device_type: str
    enabled: bool
    dtype: torch.dtype


class Inputs(NamedTuple):
    """What one call of `module` received, by reference, with the autocast states of that moment.

    `note` is whatever the ledger's listener noted when the call began; `opening` says where it began, None in compiled
    code.
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    autocast: tuple[Autocast, ...] = ()
    note: Any = None
    opening: Opening | None = None

    def tensors(self) -> list[Tensor]:
        if not self.kwargs and {Tensor}.issuperset(map(type, self.args)):
            return list(self.args)
        return [leaf for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)]


class Hooks:
    """Hooks that a copy of the model must not inherit: a copied or unpickled keeper is inert until swept away."""

    def __init__(self) -> None:
        self.handles: list[Any] = []
        self.inert = False

    def __reduce__(self) -> tuple[Any, ...]:
        return _inert, (type(self),)

    def close(self) -> None:
        """Remove every hook."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()


def _inert(kind: type[Hooks]) -> Hooks:
    hooks = kind.__new__(kind)
    Hooks.__init__(hooks)
    hooks.inert = True
    return hooks


def sweep_inert(module: nn.Module) -> None:
    """Removes from a copied model the inert hooks of the optimizer of its original."""
    for child in module.modules():
        for hooks in (child._forward_pre_hooks, child._forward_hooks):
            for key in [k for k, hook in hooks.items() if getattr(getattr(hook, "__self__", None), "inert", False)]:
                del hooks[key]
                for flags in (
                    child._forward_hooks_with_kwargs,
                    child._forward_hooks_always_called,
                    child._forward_pre_hooks_with_kwargs,
                ):
                    flags.pop(key, None)
