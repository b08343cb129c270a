"""What the types of a module's layers promise before it was ever seen to run: coverage and memory are estimated so."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import nn

from kfac_triton.operations.custom import LayerBlock

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NORMS = (
    nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm,
    nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d,
)  # fmt: skip


class Expected(NamedTuple):
    """How a layer will use its weight and bias; as in `Layout`."""

    operation: str
    weight: Any
    bias: Any = None
    transposed: bool = False
    groups: int = 1


def expected_uses(model: nn.Module, blocks: Mapping[type[nn.Module], LayerBlock]) -> Iterator[Expected]:
    """The uses of weights that every layer of a known type, or of a type with a block, will make."""
    for layer in model.modules():
        block = blocks.get(type(layer))
        if block is not None:
            bias = None if block.bias is None else getattr(layer, block.bias, None)
            yield Expected("custom", getattr(layer, block.weight), bias, block.transposed)
            continue
        yield from (use for use in _uses_of(layer) if use.weight is not None)


def _uses_of(layer: Any) -> Iterator[Expected]:
    if isinstance(layer, nn.Linear):
        yield Expected("linear", layer.weight, layer.bias)
    elif isinstance(layer, CONVOLUTIONS + TRANSPOSED):
        yield Expected("conv", layer.weight, layer.bias, isinstance(layer, TRANSPOSED), layer.groups)
    elif isinstance(layer, nn.Embedding):
        yield Expected("embedding", layer.weight, None, True)
    elif isinstance(layer, NORMS):
        yield Expected("scale", layer.weight, getattr(layer, "bias", None))
    elif isinstance(layer, nn.RNNBase):
        for names in layer.all_weights:
            own = dict(zip(_stems(layer), names, strict=True))
            yield Expected("recurrent", own["w_ih"], own.get("b_ih"))
            yield Expected("recurrent", own["w_hh"], own.get("b_hh"))
            yield Expected("recurrent", own.get("w_hr"))
    elif isinstance(layer, nn.RNNCellBase):
        yield Expected("recurrent", layer.weight_ih, layer.bias_ih)
        yield Expected("recurrent", layer.weight_hh, layer.bias_hh)
    elif isinstance(layer, nn.MultiheadAttention):
        yield Expected("linear", layer.in_proj_weight, layer.in_proj_bias)
        for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
            yield Expected("linear", getattr(layer, name))
    elif type(layer).__name__ == "Conv1D" and hasattr(layer, "nf"):  # of the transformers library: x @ weight + bias
        yield Expected("linear", layer.weight, layer.bias, True)


def _stems(layer: nn.RNNBase) -> list[str]:
    """What stands in a row of `all_weights`."""
    return ["w_ih", "w_hh", *(["b_ih", "b_hh"] if layer.bias else []), *(["w_hr"] if layer.proj_size else [])]
