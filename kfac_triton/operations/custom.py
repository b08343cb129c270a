"""A block for a layer of the user's own: how the calls of a module become rows a and g of one weight."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kfac_triton.operations.use import Use


class LayerBlock(ABC):
    """Tells K-FAC about a module whose weight no function that it knows multiplies with.

    The module must apply a linear map: for outputs y of a call with `inputs`, and dy = dL/dy, the gradient of the
    weight as a matrix (d_out, d_in) is

        grad_W = sum over rows of g a^T,    a = self.a(module, inputs) (n, d_in),    g = self.g(module, dy) (n, d_out)

    and the bias's, if there is one, the sum of g. From such rows come A = sum a a^T / L and G = sum g g^T / n (Martens
    & Grosse 2015, section 3). `check` compares them with autograd's gradients: call it in a test of your own.

        class Masked(nn.Module):
            def forward(self, x):
                return torch.einsum("ni,oi->no", x * self.mask, self.weight)

        class MaskedBlock(LayerBlock):
            bias = None
            def a(self, module, inputs):
                return inputs[0] * module.mask
            def g(self, module, dy):
                return dy

        optimizer = KFAC(model, blocks={Masked: MaskedBlock()}, likelihood="categorical")

    The key is the module's exact type. Rows of one example must stand together for weight_sharing="reduce".

    Attributes:
        weight, bias: names of the module's parameters; `bias` None where there is none in the block.
        transposed: the weight is stored (d_in, d_out), as in x @ weight.
    """

    weight: str = "weight"
    bias: str | None = "bias"
    transposed: bool = False

    @abstractmethod
    def a(self, module: Any, inputs: tuple[Any, ...]) -> Tensor:
        """The rows a (n, d_in) of one call, without the homogeneous coordinate of the bias."""

    @abstractmethod
    def g(self, module: Any, dy: Tensor) -> Tensor:
        """The rows g (n, d_out), in the order of a, from the gradient of what `output` returned."""

    def output(self, returned: Any) -> Tensor:
        """The tensor y in what the module returned; by default that itself."""
        y: Tensor = returned
        return y

    def check(self, module: nn.Module, *inputs: Any, tolerance: float = 1e-4) -> None:
        """Compares the rows' sums with autograd's gradients, for a random dy.

        Raises:
            ValueError: they differ by more than `tolerance`, relative to the largest entry.
        """
        with torch.enable_grad():
            y = self.output(module(*inputs))
        dy = torch.randn_like(y)
        named = (
            [self.weight] if self.bias is None or getattr(module, self.bias, None) is None else [self.weight, self.bias]
        )
        found = torch.autograd.grad(y, [getattr(module, name) for name in named], dy)
        with torch.no_grad():
            a, g = self.a(module, inputs), self.g(module, dy)
            weight = g.mT @ a
            sums = [weight.t() if self.transposed else weight, g.sum(dim=0)]
        for name, wanted, own in zip(named, found, sums, strict=False):
            if own.numel() != wanted.numel():
                raise ValueError(f"the rows give a gradient of {tuple(own.shape)} for {name}, {tuple(wanted.shape)}")
            error = float((own.reshape(wanted.shape) - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30))
            if not error <= tolerance:
                raise ValueError(
                    f"the rows' gradient of {name} differs from autograd's by {error:.1e} of its largest entry"
                )


@dataclass(eq=False, repr=False)
class CustomUse(Use):
    """One call of a layer with a block of the user's own."""

    operation = "custom"
    block: Any = None
    layer: Any = None
    inputs: tuple[Any, ...] = ()

    def a(self) -> Tensor:
        rows: Tensor = self.block.a(self.layer, self.inputs)
        return rows

    def g(self, dy: Tensor) -> Tensor:
        rows: Tensor = self.block.g(self.layer, dy)
        return rows
