"""On which modules and parameters the hooks of a ledger hang."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from kfac_triton.capture.compiled_calls import compiled_parts, forget_compiled_code


class Hearing:
    """Hooks on the modules of `root` with parameters, and on parameters.

    At first every module has them. Once a step has seen its calls, they stay where a call began and on the modules
    around that, until a parameter elsewhere gets a gradient. `compiles`: calls in compiled code were noted; `hides`:
    calls returned no tensor. Only then the hooks on parameters stay.
    """

    def __init__(
        self, root: nn.Module, before: Callable[..., None], after: Callable[..., None], accumulated: Callable[..., None]
    ) -> None:
        self._root = root
        self._before, self._after, self._accumulated = before, after, accumulated
        self.compiles = self.hides = False
        self._modules: dict[nn.Module, list[Any]] = {}
        self._parameters: dict[nn.Parameter, Any] = {}
        self._beginnings: set[nn.Module] = set()
        self._outside: list[nn.Parameter] = []
        self._unheard: set[nn.Parameter] = set()
        self._narrow = False

    def everything(self, parameters: Iterable[nn.Parameter]) -> None:
        """Hear every module of the root that takes hooks, which scripted ones do not."""
        self._narrow = False
        for module in self._root.modules():
            scripted = isinstance(module, torch.jit.ScriptModule)
            if not scripted and module not in self._modules and next(module.parameters(), None) is not None:
                self._modules[module] = [
                    module.register_forward_pre_hook(self._before, prepend=True, with_kwargs=True),
                    module.register_forward_hook(self._after, with_kwargs=True, always_call=True),
                ]
        self.gradients(parameters)
        forget_compiled_code()

    def gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Hear accumulated gradients: nothing else tells of compiled code and of outputs that are no tensors."""
        for p in parameters:
            if p.requires_grad and p not in self._parameters:
                self._parameters[p] = p.register_post_accumulate_grad_hook(self._accumulated)

    @property
    def on_parameters(self) -> bool:
        """Whether there are hooks on parameters."""
        return bool(self._parameters)

    def learn(self, beginnings: Iterable[nn.Module], parameters: Sequence[nn.Parameter]) -> bool:
        """A step saw calls of these modules. Returns whether others may have been called that were not heard."""
        called = set(beginnings)
        self._beginnings |= called
        unheard = [p for p in self._outside if p.grad is not None] if self._narrow else []
        missed = bool(unheard) or (self._narrow and not called and any(p.grad is not None for p in parameters))
        if missed:
            self._unheard.update(unheard)
            self.everything(parameters)
        elif called and not self._narrow:
            self._less(parameters)
        return missed

    def _less(self, parameters: Sequence[nn.Parameter]) -> None:
        """Hear only modules where a call began and those around them, if every gradient came from inside them.

        Compiled modules keep their hooks, which cost nothing there: dynamo would compile anew without them.
        """
        inside = {p for module in self._beginnings for p in module.parameters()}
        self._outside = [p for p in parameters if p not in inside]
        if not self._unheard <= inside:
            return
        compiled = set(self._root.modules()) if self.compiles else compiled_parts(self._root)
        for module in [m for m in self._modules if m not in compiled and self._beginnings.isdisjoint(m.modules())]:
            for handle in self._modules.pop(module):
                handle.remove()
        if not (self.compiles or self.hides):
            for handle in self._parameters.values():
                handle.remove()
            self._parameters.clear()
        self._narrow = True

    def close(self) -> None:
        """Remove every hook."""
        for handle in (*self._parameters.values(), *(handle for own in self._modules.values() for handle in own)):
            handle.remove()
        self._modules.clear()
        self._parameters.clear()
