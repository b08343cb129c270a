"""Block-tridiagonal inverse of the Fisher for a chain of layers (Martens & Grosse 2015, section 4.3).

On top of the block-diagonal state of every weight: its place in the chain, `A_next` (d_in_i, d_in_i+1) and `G_next`
(d_out_i, d_out_i+1), running averages of the moments shared with the next layer, and the link that follows from them,
`link_...`, refreshed with the inverses. `kfac_triton.chain` has the mathematics, its memory and time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from kfac_triton import factors
from kfac_triton.approximations import kronecker
from kfac_triton.approximations.kronecker import Statistics
from kfac_triton.blocks.layout import DENSE, Layout
from kfac_triton.chain import Link, link
from kfac_triton.fisher import Seen

State = Mapping[Any, dict[str, Any]]
KINDS = {"conv": "a convolution", "recurrent": "a recurrent layer"}


def chain_of(seen: Seen, statistics: Mapping[nn.Parameter, Statistics], names: Mapping[nn.Parameter, str]) -> None:
    """Raises ValueError unless the weights, in their order, are a chain: each layer's output alone feeds the next."""

    def refuse(weight: nn.Parameter, why: str) -> NoReturn:
        raise ValueError(
            f'approximation="tridiagonal" needs a chain of linear layers, each feeding the next alone; {names[weight]} '
            f'{why}. approximation="kronecker" takes any network'
        )

    nodes: dict[nn.Parameter, Any] = {}
    first: int | None = None
    for weight, own in statistics.items():
        uses = seen.uses[weight]
        count = _rows(own)
        first = count if first is None else first
        if own.layout.operation != "linear":
            refuse(weight, f"belongs to {KINDS.get(own.layout.operation, 'another kind of layer')}")
        if DENSE != own.layout.A or DENSE != own.layout.G:
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


def _rows(statistics: Statistics) -> int:
    return sum(factors.rows_in(a, 2) for a in statistics.a)


def update_cross_moments(
    state: State, statistics: Mapping[nn.Parameter, Statistics], decay: float, usable: Mapping[nn.Parameter, Tensor]
) -> None:
    """Moves A_next and G_next towards the statistics, by the rule of the factors, which were moved before."""
    ordered = list(statistics)
    for place, weight in enumerate(ordered):
        own, stored = statistics[weight], state[weight]
        stored["chain"] = place
        if place + 1 == len(ordered):
            continue
        after = statistics[ordered[place + 1]]
        ok = usable[weight] & usable[ordered[place + 1]]
        beta, share = factors.average_weights(stored["factor_updates"].to(stored["A"].dtype), decay, ok)
        for name, left, right, count in (
            ("A_next", _with_ones(own), _with_ones(after), own.terms),
            ("G_next", own.g, after.g, own.rows),
        ):
            wide = stored["A"].dtype
            products = [x.to(wide).mT @ y.to(wide) for x, y in zip(left, right, strict=True)]
            moment = torch.stack(products).sum(dim=0)
            known = stored.get(name)
            known = torch.zeros_like(moment) if known is None or known.shape != moment.shape else known
            stored[name] = torch.where(ok, beta * known + share / count * moment, known)


def _with_ones(statistics: Statistics) -> list[Tensor]:
    rows = [a for a in statistics.a if isinstance(a, Tensor)]  # a chain has no convolutions
    if not statistics.ones:
        return rows
    return [torch.cat([a, a.new_ones(*a.shape[:-1], 1)], dim=-1) for a in rows]


def update_links(state: State, layouts: Mapping[nn.Parameter, Layout], damping: Mapping[nn.Parameter, float]) -> None:
    """Refreshes the links from the factors and inverses as they are; where one can't be had the last stays."""
    ordered = in_order(state, layouts)
    damped = {}
    for weight in ordered:
        stored = state[weight]
        if "A_inv" not in stored:
            return
        kronecker.settle([stored])
        damped[weight] = factors.damped_factors(stored["A"], stored["G"], damping[weight])
    for weight, after in pairwise(ordered):
        stored, following = state[weight], state[after]
        found = link(
            *damped[weight], stored["A_next"], stored["G_next"],
            damped[after][0], following["A_inv"], damped[after][1], following["G_inv"],
        )  # fmt: skip
        if found is not None:
            for name, value in found._asdict().items():
                stored[f"link_{name}"] = value


def in_order(state: State, weights: Mapping[nn.Parameter, Any]) -> list[nn.Parameter]:
    """The weights by their place in the chain."""
    return sorted(weights, key=lambda weight: int(state[weight]["chain"]))


def stored_link(stored: Mapping[str, Any]) -> Link | None:
    """The link from this layer to the next, where there is one."""
    if "link_psi_A" not in stored:
        return None
    return Link(*(stored[f"link_{name}"] for name in Link._fields))


def memory(layouts: Sequence[tuple[Tensor, Layout]]) -> tuple[int, int]:
    """Bytes beyond the block-diagonal state, of (cross moments, links), for the layers in their order."""
    sides = [layout.dims(weight.shape) for weight, layout in layouts]
    size = kronecker.factor_dtype(layouts[0][0]).itemsize if layouts else 0
    cross = sum(a * b + g * h for (a, g), (b, h) in pairwise(sides))
    bases = sum(a * a + g * g + a + g for a, g in sides[:-1])
    return size * cross, size * (cross + bases)
