"""What the root received: references to the inputs of the user's forward passes, nothing more.

It works inside a compiled model, whose graph must not depend on a growing list: there the last inputs are noted and the
backward pass, which is never compiled together with its accumulation into `.grad`, moves them to the list.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

log = logging.getLogger("kfac_triton")

MAX_KEPT_BYTES = 2**31


class Autocast(NamedTuple):
    """The autocast state of a forward pass on one device type."""

    device_type: str
    enabled: bool
    dtype: torch.dtype


class Inputs(NamedTuple):
    """What one call of the root received, by reference, with the autocast states of that moment.

    `note` is whatever the keeper's `on_forward` returned for this pass.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    autocast: tuple[Autocast, ...]
    note: Any = None

    def tensors(self) -> list[Tensor]:
        return [leaf for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)]


class OwnPass:
    """Whether a pass of K-FAC's own is running, in which no optimizer keeps inputs."""

    running = False


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
                for flags in (child._forward_hooks_with_kwargs, child._forward_pre_hooks_with_kwargs):
                    flags.pop(key, None)


class RootInputs(Hooks):
    """Keeps the inputs of the training passes of `module` until they are taken.

    Only calls in training mode with gradients enabled count, and only those whose backward pass came: the gradient of
    the outputs says so, or in a compiled model, where outputs carry no hooks, the first gradient of a parameter.
    `on_outputs`, while it is there, may name a tensor in what the module returned and what is to receive its gradient.
    """

    on_outputs: Callable[[Inputs, Any], tuple[Tensor, Callable[[Tensor], None]] | None] | None = None

    def __init__(
        self,
        module: nn.Module,
        parameters: Iterable[nn.Parameter],
        device_types: Iterable[str],
        on_forward: Callable[[], Any] | None = None,
    ) -> None:
        super().__init__()
        self._on_forward = on_forward
        self._entered: Inputs | None = None
        self._compiled: Inputs | None = None
        self._untracked: list[Inputs] = []
        self._device_types = tuple(sorted(set(device_types)))
        self._kept: list[tuple[Inputs, tuple[int, ...]]] = []
        self._bytes = 0
        self._full = False
        self._watched: set[nn.Parameter] = set()
        self.handles += [
            module.register_forward_pre_hook(self._before_forward, prepend=True, with_kwargs=True),
            module.register_forward_hook(self._after_forward, with_kwargs=True),
        ]
        self.watch(parameters)

    def watch(self, parameters: Iterable[nn.Parameter]) -> None:
        """Notice backward passes by these parameters too."""
        for p in parameters:
            if p.requires_grad and p not in self._watched:
                self._watched.add(p)
                self.handles.append(p.register_post_accumulate_grad_hook(self._after_backward))

    def _before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._entered = None
        if self.inert or OwnPass.running or not module.training or not torch.is_grad_enabled():
            return
        autocast = tuple(
            Autocast(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
            for kind in self._device_types
        )
        note = None if self._on_forward is None else self._on_forward()
        if torch.compiler.is_compiling():
            self._compiled = Inputs(args, kwargs, autocast, note)
        else:
            self._entered = Inputs(args, kwargs, autocast, note)

    def _after_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], returned: Any) -> None:
        if torch.compiler.is_compiling() or self.inert or self._entered is None:
            return
        inputs, self._entered = self._entered, None
        watched = None if self.on_outputs is None else self.on_outputs(inputs, returned)
        if watched is not None:
            tensor, receive = watched
            tensor.register_hook(receive)
        tensors = list(_output_tensors(returned))
        for t in tensors:
            if t.grad_fn is not None:  # a hook on a leaf, a parameter among the outputs, would outlive the pass
                t.register_hook(lambda grad: self._keep(inputs))
        if not tensors:
            self._untracked.append(inputs)

    def _after_backward(self, parameter: Tensor) -> None:
        self._flush()

    def _flush(self) -> None:
        """Keeps the passes whose outputs tell nothing of their backward pass."""
        if self._compiled is not None:
            self._untracked.append(self._compiled)
            self._compiled = None
        for inputs in self._untracked:
            self._keep(inputs)
        self._untracked.clear()

    def _keep(self, inputs: Inputs) -> None:
        size = sum(t.nbytes for t in inputs.tensors())
        if any(kept is inputs for kept, _ in self._kept):
            return
        if self._kept and self._bytes + size > MAX_KEPT_BYTES:
            if not self._full:
                log.warning("a step's inputs exceed %d bytes; the later ones stay out of the factors", MAX_KEPT_BYTES)
            self._full = True
            return
        self._bytes += size
        self._kept.append((inputs, _versions(inputs)))

    def take(self) -> list[Inputs]:
        """The inputs of the passes since the last call, which are then forgotten.

        Raises:
            RuntimeError: a kept input was written to after its forward pass.
        """
        if not self._kept:
            self._flush()
        kept = self._kept
        self._untracked.clear()
        self.forget()
        for inputs, versions in kept:
            if _versions(inputs) != versions:
                raise RuntimeError(
                    "an input of the model was modified in place between its backward pass and step(); "
                    "pass a copy of it to the model, or move the write behind step()"
                )
        return [inputs for inputs, _ in kept]

    def forget(self) -> None:
        """Drop what was kept: the user cleared the gradients or skipped the step."""
        self._kept, self._bytes = [], 0

    def close(self) -> None:
        """Remove every hook."""
        super().close()
        self._untracked.clear()
        self._entered = self._compiled = None
        self.forget()


def _output_tensors(returned: Any) -> Iterator[Tensor]:
    """The tensors in what a model returned, also in the attributes of an object of no known kind."""
    for leaf in tree_leaves(returned):
        if isinstance(leaf, Tensor):
            yield leaf
        elif hasattr(leaf, "__dict__"):
            yield from (value for value in vars(leaf).values() if isinstance(value, Tensor))


def _versions(inputs: Inputs) -> tuple[int, ...]:
    return tuple(t._version for t in inputs.tensors() if not t.is_inference())
