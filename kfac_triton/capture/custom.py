"""The calls of layers with blocks of the user's own, as uses of their weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from kfac_triton.capture.uses import UseRecorder
from kfac_triton.operations.custom import CustomUse, LayerBlock


def custom_layers(
    module: nn.Module, recorder: UseRecorder, blocks: Mapping[type[nn.Module], LayerBlock]
) -> AbstractContextManager[None]:
    """In here the calls of modules of these types are recorded as the uses that their blocks make of them."""
    return _custom_layers(module, recorder, blocks) if blocks else nullcontext()


@contextmanager
def _custom_layers(
    module: nn.Module, recorder: UseRecorder, blocks: Mapping[type[nn.Module], LayerBlock]
) -> Iterator[None]:
    handles: list[Any] = []
    open_claims: list[tuple[Any, int]] = []

    def before(layer: nn.Module, args: tuple[Any, ...]) -> None:
        claim = recorder.claimed(list(layer.parameters(recurse=False)))
        claim.__enter__()
        open_claims.append((claim, recorder.calls()))

    def after(layer: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        claim, before_it = open_claims.pop()
        claim.__exit__(None, None, None)
        block = next(block for kind, block in blocks.items() if type(layer) is kind)
        weight = recorder(getattr(layer, block.weight))
        bias = None if block.bias is None else recorder(getattr(layer, block.bias, None))
        y = block.output(out)
        if weight is not None and torch.is_grad_enabled() and y.grad_fn is not None:
            inputs = tuple(a.detach() if isinstance(a, Tensor) else a for a in args)
            x = next((a for a in inputs if isinstance(a, Tensor)), y.detach())
            use = CustomUse(weight, bias, x, transposed=block.transposed, block=block, layer=layer, inputs=inputs)
            recorder.record(use, y, args, since=before_it)

    for layer in module.modules():
        if type(layer) in blocks:
            handles += [layer.register_forward_pre_hook(before), layer.register_forward_hook(after)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
