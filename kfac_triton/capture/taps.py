"""x and dL/dy of layers in the user's own passes, as the empirical Fisher needs them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_triton.capture.inputs import Hooks
from kfac_triton.capture.ledger import transformed
from kfac_triton.capture.patches import own_pass_running
from kfac_triton.operations import conv, linear
from kfac_triton.operations.use import Part, Use


class _Tap(torch.autograd.Function):
    """The identity, whose backward pass hands dy on to `seen`. A copy, since what follows may work in place."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, seen: Callable[[Tensor, Tensor], None]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.seen = seen
        return y.clone()

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        ctx.seen(x, dys[0])
        return dys[0], None, None


TAPPED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class _Whole:
    """Tells matchers that a module's parameters are what they are."""

    def __call__(self, t: Any) -> Part | None:
        return Part(t, 0, t.shape[0]) if isinstance(t, nn.Parameter) else None

    def owner(self, t: Any) -> nn.Parameter | None:
        return t if isinstance(t, nn.Parameter) else None


class ModuleTaps(Hooks):
    """Taps in the user's own passes, for linear modules and convolutions whose weight is a parameter.

    `on_use(module)` is called in the forward pass and returns what receives (x, dy) in the backward pass, once for each
    use, also under activation checkpointing. Both may be traced by torch.compile. The output projection of attention is
    left out, since its module is never called.
    `own_calls` counts the calls of each weight's modules in passes of K-FAC's own, where there are no taps.
    """

    def __init__(
        self,
        module: nn.Module,
        parameters: Iterable[nn.Parameter],
        on_use: Callable[[nn.Module], Callable[[Tensor, Tensor], None]],
    ) -> None:
        super().__init__()
        self.weights: dict[nn.Parameter, nn.Module] = {}
        self.own_calls: Counter[nn.Parameter] = Counter()
        self._on_use = on_use
        known = set(parameters)
        unheard = {child.out_proj for child in module.modules() if isinstance(child, nn.MultiheadAttention)}
        elsewhere = {
            p for child in module.modules() if not isinstance(child, TAPPED) for p in child.parameters(recurse=False)
        }
        for child in module.modules():
            if child in unheard:
                continue
            if isinstance(child, TAPPED) and child.weight in known and child.weight not in elsewhere:
                self.weights.setdefault(cast(nn.Parameter, child.weight), child)
                self.handles.append(child.register_forward_hook(self._after_layer))

    def _live(self) -> bool:
        if self.inert or not torch.is_grad_enabled():
            return False
        # compiled code would keep the answers
        return torch.compiler.is_compiling() or not (own_pass_running() or transformed())

    def _after_layer(self, module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor | None:
        if not torch.compiler.is_compiling() and own_pass_running() and not self.inert and y.requires_grad:
            self.own_calls[cast(nn.Parameter, module.weight)] += 1
        if not self._live() or not y.requires_grad:
            return None
        tapped: Tensor = _Tap.apply(y, args[0], self._on_use(module))
        return tapped


def module_use(module: nn.Module, x: Tensor) -> Use:
    """The use that a call of a module of the types `TAPPED` with input x is."""
    whole = _Whole()
    if isinstance(module, nn.Linear):
        use = linear.MATCHERS[F.linear](whole, x, module.weight, module.bias)
    else:
        assert isinstance(module, TAPPED[1:])
        padding: Any = module.padding
        if module.padding_mode != "zeros":
            x, padding = F.pad(x, module._reversed_padding_repeated_twice, module.padding_mode), 0
        function = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}[
            next(kind for kind in TAPPED[1:] if isinstance(module, kind))
        ]
        use = conv.MATCHERS[function](
            whole, x, module.weight, module.bias, module.stride, padding, module.dilation, module.groups
        )
    assert use is not None
    return use
