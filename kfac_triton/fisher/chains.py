"""Whether the layers that a pass saw are a chain, as the tridiagonal form needs them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from torch import nn

from kfac_triton.fisher.sampled import Seen
from kfac_triton.linalg import moments
from kfac_triton.operations.layout import DENSE
from kfac_triton.sample import Sample

KINDS = {"conv": "a convolution", "recurrent": "a recurrent layer"}


def check_chain(seen: Seen, samples: Mapping[nn.Parameter, Sample], names: Mapping[nn.Parameter, str]) -> None:
    """Raises ValueError unless the weights, in their order, are a chain: each layer's output alone feeds the next."""

    def refuse(weight: nn.Parameter, why: str) -> NoReturn:
        raise ValueError(
            f'approximation="tridiagonal" needs a chain of linear layers, each feeding the next alone; {names[weight]} '
            f'{why}. approximation="kronecker" takes any network'
        )

    nodes: dict[nn.Parameter, Any] = {}
    first: int | None = None
    for weight, own in samples.items():
        uses, layout = seen.uses[weight], own.layer.layout
        count = sum(moments.rows_in(a, 2) for a in own.a)
        first = count if first is None else first
        if layout.operation != "linear":
            refuse(weight, f"belongs to {KINDS.get(layout.operation, 'another kind of layer')}")
        if DENSE != layout.A or DENSE != layout.G:
            refuse(weight, "has a side wider than max_factor_dim")
        if any(use.batch == uses[0].batch for use in uses[1:]):
            refuse(weight, "is used more than once")
        if count != first:
            refuse(weight, f"has {count} rows where the first layer has {first}")
        edge = uses[0].recorded.edge
        nodes[weight] = None if edge is None else edge.node
    start = seen.roots[:1]
    for weight in reversed(nodes):
        met = _reached(start, stop=nodes[weight])
        passing = next((w for w, node in nodes.items() if node in met), None)
        if passing is not None:
            refuse(passing, f"feeds more than the layer behind it: a path to the outputs leads around {names[weight]}")
        start = [node for node, _ in nodes[weight].next_functions]


def _reached(start: Sequence[Any], stop: Any) -> set[Any]:
    """The nodes of the backward graph below `start`, not looking beyond `stop`."""
    met: set[Any] = set()
    frontier = list(start)
    while frontier:
        node = frontier.pop()
        if node is None or node in met or node is stop:
            continue
        met.add(node)
        frontier += [below for below, _ in node.next_functions]
    return met
