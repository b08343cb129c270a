"""Joint gradients, preconditioned gradients and momentum of all layers, in memory that stays where it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kfac_triton.joint import Joint
from kfac_triton.layer import Layer
from kfac_triton.numbers import Numbers, as_tensor, library, on_host, places, shared
from kfac_triton.operations.layout import Layout
from kfac_triton.steps.hyper import Hyper
from kfac_triton.steps.memory import Memory
from kfac_triton.steps.products import Products
from kfac_triton.structures.tridiagonal import Chain


class Part(NamedTuple):
    """A parameter of a layer that takes part: where its layer stands, and the groups of its own and of the weight."""

    number: int
    member: int
    is_bias: bool
    group: int
    region: int


class Lists:
    """The parameters that share `group` and `region`, and views of J, V and M for each of them.

    A transposed convolution with groups is no view of its matrix, but its pieces are (see `Layout.views`).
    """

    def __init__(self, group: int, region: int) -> None:
        self.group, self.region = group, region
        self._plain: list[nn.Parameter] = []
        self._pieced: list[tuple[nn.Parameter, Layout]] = []
        self.J: list[Tensor] = []
        self.V: list[Tensor] = []
        self.M: list[Tensor] = []
        self.S: list[Tensor] = []

    def add(self, memory: Memory, p: nn.Parameter, part: Part) -> None:
        """Adds a parameter; those in pieces come last."""
        layer = memory.stacks[part.number].layers[part.member]
        views = [views_of(joint, part) for joint in (memory.J, memory.V)]
        at = len(self._plain) if len(views[0]) == 1 else len(self.J)
        if len(views[0]) == 1:
            self._plain.append(p)
        else:
            self._pieced.append((p, layer.layout))
        self.J[at:at], self.V[at:at] = views

    def add_momentum(self, memory: Memory, parts: Mapping[nn.Parameter, Part]) -> None:
        """Adds the views of M, and of S where there is one."""
        self.M = [view for p in self.owners() for view in views_of(memory.momentum(), parts[p])]
        if memory.S is not None:
            self.S = [view for p in self.owners() for view in views_of(memory.S, parts[p])]

    def owners(self) -> list[nn.Parameter]:
        """The parameters themselves."""
        return [*self._plain, *(p for p, _ in self._pieced)]

    def values(self) -> list[Tensor]:
        """The parameters, as J, V and M have them."""
        found: list[Tensor] = list(self._plain)
        for p, layout in self._pieced:
            found += layout.pieces(p.detach())
        return found

    def grads(self) -> list[Tensor]:
        """Their gradients."""
        found = [p.grad for p in self._plain]
        for p, layout in self._pieced:
            assert p.grad is not None
            found += layout.pieces(p.grad)
        return found  # type: ignore[return-value]


def views_of(joint: Joint, part: Part) -> list[Tensor]:
    """What of a joint matrix belongs to a parameter."""
    if part.is_bias:
        return [joint.of_bias(part.number, part.member)]
    return joint.of_weight(part.number, part.member)


class Motion:
    """The parameters that take part in a step, in lists that are made once for each set of them.

    Layers of the memory that are not among them keep their momentum and have no gradient.
    """

    def __init__(self, memory: Memory, parts: Mapping[nn.Parameter, Part]) -> None:
        self.memory, self.parts = memory, dict(parts)
        self.layers = sorted({(part.number, part.member) for part in parts.values()})
        self.whole = len(self.layers) == sum(len(stack.layers) for stack in memory.stacks)
        self.split = any(part.group != part.region for part in parts.values())
        by_key: dict[tuple[int, int], Lists] = {}
        for p, part in parts.items():
            key = part.group, part.region
            by_key.setdefault(key, Lists(*key)).add(memory, p, part)
        self.lists = list(by_key.values())
        weights = {(part.number, part.member): part for part in parts.values() if not part.is_bias}
        biases = {(part.number, part.member): part for part in parts.values() if part.is_bias}
        device = memory.device
        self.index = places([memory.stacks[number].first + member for number, member in self.layers], device)
        # by number: of every layer, and where biases have groups of their own then of every bias
        regions, own = [weights[key].region for key in self.layers], [weights[key].group for key in self.layers]
        of_biases = [biases.get(key, weights[key]).group for key in self.layers]
        self.regions = places(regions * 2 if self.split else regions, device)
        self.groups = places(own + of_biases if self.split else own, device)
        # a bias without a gradient stays, and so must what would be its momentum
        self._fixed_biases = [key for key in self.layers if key not in biases and self._layer(key).bias is not None]
        self._products = Products(memory.stacks)
        self._with_momentum = False
        self._views: dict[int, tuple[Joint, list[Tensor]]] = {}
        self._matrices: dict[int, tuple[Joint, list[Tensor]]] = {}
        self._directions: list[Tensor | None] | None = None
        self._copied = False
        self._numbers: tuple[int, tuple[Numbers, Numbers, Any]] | None = None

    def _layer(self, key: tuple[int, int]) -> Layer:
        return self.memory.stacks[key[0]].layers[key[1]]

    def with_momentum(self) -> Joint:
        """M, with views of it, and of S, in the lists."""
        M = self.memory.momentum()
        if not self._with_momentum:
            for own in self.lists:
                own.add_momentum(self.memory, self.parts)
            self._with_momentum = True
        return M

    def by_number(self, hyper: Hyper) -> tuple[Numbers, Numbers, Any]:
        """(bounded_lr, momentum, region) in the order of `dots`."""
        if self._numbers is None or self._numbers[0] != hyper.changes:
            own = self.groups
            self._numbers = hyper.changes, (hyper.bounded_lr[own], hyper.momentum[own], self.regions)
        return self._numbers[1]

    def by_layer(self, hyper: Hyper) -> tuple[Numbers, Numbers, Any]:
        """(momentum, bounded_lr, region) in the order of `products`, all of the weights' groups."""
        if self._numbers is None or self._numbers[0] != hyper.changes:
            region = self.regions[: len(self.layers)]
            self._numbers = hyper.changes, (hyper.momentum[region], hyper.bounded_lr[region], region)
        return self._numbers[1]

    @cached_property
    def owners(self) -> list[nn.Parameter]:
        """The parameters that take part, in the order of `directions`."""
        return [p for own in self.lists for p in own.owners()]

    def values(self) -> list[Tensor]:
        """The parameters that take part, or their pieces, in the order of `views`."""
        return [value for own in self.lists for value in own.values()]

    def views(self, joint: Joint) -> list[Tensor]:
        """What of a joint matrix belongs to each of `values`; made once for each joint."""
        if id(joint) not in self._views:
            found = [v for own in self.lists for p in own.owners() for v in views_of(joint, self.parts[p])]
            self._views[id(joint)] = joint, found
        return self._views[id(joint)][1]

    def directions(self) -> list[Tensor]:
        """V and M of every parameter that takes part, in its shape: (2, *shape)."""
        if self._directions is None:
            self._directions = [self._both(p) for p in self.owners]
            self._copied = any(both is None for both in self._directions)
        if not self._copied:
            return self._directions  # type: ignore[return-value]
        assert self.memory.M is not None
        return [
            torch.stack([torch.cat(views_of(joint, self.parts[p])) for joint in (self.memory.V, self.memory.M)])
            if both is None else both
            for p, both in zip(self.owners, self._directions, strict=True)
        ]  # fmt: skip

    def _both(self, p: nn.Parameter) -> Tensor | None:
        """V and M of a parameter as one view; None where neither has a view in the parameter's shape."""
        views = views_of(self.memory.V, self.parts[p])
        if len(views) > 1:
            return None
        (view,) = views
        rows = next(rows for rows in self.memory.rows if rows.dtype == view.dtype)
        strides = (rows.stride(0), *view.stride())
        return rows.as_strided((2, *view.shape), strides, view.storage_offset())

    def gather_(self) -> None:
        """J <- the gradients."""
        if len(self.lists) == 1:
            torch._foreach_copy_(self.lists[0].J, self.lists[0].grads())
            return
        torch._foreach_copy_(
            [view for own in self.lists for view in own.J], [grad for own in self.lists for grad in own.grads()]
        )

    def precondition_(
        self, source: Joint | None = None, *, bf16: bool = False, narrowest: int = 0, chain: Chain | None = None
    ) -> None:
        """V <- F^-1 J, or F^-1 of the `source`; with `bf16` in products of that precision, for matrices that are at
        least `narrowest` wide."""
        J, V = self.memory.J if source is None else source, self.memory.V
        if chain is not None:
            chain.apply_(J, V)
            return
        for number, structure in enumerate(self.memory.structures):
            rounded = bf16 and min(structure.stack.dims) >= narrowest
            structure.apply_(J, V, number, self.memory.scratch[number], bf16=rounded)

    def clear_fixed_biases_(self, joint: Joint) -> None:
        """Takes away what moves biases that have no gradient."""
        if self._fixed_biases:
            torch._foreach_zero_([joint.of_bias(*key) for key in self._fixed_biases])

    def decays(self, groups: Sequence[Mapping[str, Any]]) -> list[float]:
        """The weight decay of each of `values`."""
        return [groups[own.group]["weight_decay"] for own in self.lists for _ in own.J]

    def products(self, left: Joint, right: Joint) -> Numbers:
        """Inner products of the layers that take part, weight and bias together."""
        return self._products.of(left, right, self.index, split=False)

    def norms(self, joint: Joint) -> Numbers:
        """The norms of the layers that take part, weight and bias together."""
        if not self._one_by_one:
            return library(self.memory.device).sqrt(self.products(joint, joint))
        found = torch.stack(torch._foreach_norm(self._by_layer(joint)))
        return shared(found.double())[self.index]

    @cached_property
    def _one_by_one(self) -> bool:
        """Whether operators over a list of all layers are fewer than one for each stack, and take all of them alike."""
        memory = self.memory
        count = sum(len(stack.layers) for stack in memory.stacks)
        return on_host(memory.device) and len(memory.V.flats) == 1 and 2 * len(memory.stacks) > count

    def _by_layer(self, joint: Joint) -> list[Tensor]:
        """The matrices of all layers; made once for each joint."""
        if id(joint) not in self._matrices:
            self._matrices[id(joint)] = joint, [matrix for whole in joint.whole for matrix in whole.unbind()]
        return self._matrices[id(joint)][1]

    def scale_(self, joint: Joint, factors: Numbers) -> None:
        """Multiplies the matrix of every layer that takes part by its number."""
        memory = self.memory
        if self._one_by_one and self.whole:
            torch._foreach_mul_(self._by_layer(joint), factors.tolist())
            return
        if not self.whole:
            every = library(memory.device).ones_like(shared(memory.quadratics[0].double()))
            every[self.index] = factors
            factors = every
        for stack, whole in zip(memory.stacks, joint.whole, strict=True):
            own = as_tensor(factors[stack.numbers], stack.dtype, memory.device)
            whole.mul_(own.view(-1, *[1] * (whole.dim() - 1)))

    def dots(self) -> Numbers:
        """<V, J> of every layer that takes part; where a bias is in another group than its weight, of all weights and
        then of all biases."""
        return self._products.of(self.memory.V, self.memory.J, self.index, split=self.split)

    def overlaps(self) -> Numbers:
        """<M, J> in the same order."""
        assert self.memory.M is not None
        return self._products.of(self.memory.M, self.memory.J, self.index, split=self.split)
