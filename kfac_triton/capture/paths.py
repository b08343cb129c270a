"""Uses of weights that no function call shows: inside derivatives, autograd.Functions and scripted code.

A weight is described by its recorded uses only if every path from the outputs to it, in the autograd graph, runs
through one of them. An inner backward pass (forces, `torch.func`, a gradient penalty) adds paths of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge

DERIVATIVES = frozenset({torch.autograd.grad, torch.autograd.backward, Tensor.backward, torch._make_dual})


class Call(NamedTuple):
    """The nodes of one recorded call: of what it returned, and in `ends` of its inputs, where the graph goes on.

    `weights`: the ids of the parameters whose use inside it is recorded.
    """

    nodes: tuple[Node, ...]
    ends: Collection[Node | None]
    weights: Collection[int]


# A Call from a tuple of its three fields without a Python call, which every layer would make.
call_from: Callable[[tuple[tuple[Node, ...], Collection[Node | None], Collection[int]]], Call] = partial(
    tuple.__new__, Call
)


def nodes_of(tensors: Iterable[Tensor]) -> tuple[Node, ...]:
    """The nodes that made these tensors, and the memory that views among them lie in."""
    found: dict[Node, None] = {}
    for t in tensors:
        if t.requires_grad:
            for one in (t, t._base if t._is_view() else None):
                if one is not None and one.grad_fn is not None:
                    found[one.grad_fn] = None
    return tuple(found)


class UnseenUses:
    """The parameters that outputs depend on past every recorded use, each with what uses it there.

    Walking the graph costs a few percent of a small network's step, so the answer is kept while the graph looks the
    same: as many nodes, recorded calls and derivatives, and the same parameters.
    """

    def __init__(self) -> None:
        self._graph: tuple[Any, ...] = ()
        self._found: dict[nn.Parameter, str] = {}

    def of(
        self, root: Node | None, parameters: Collection[nn.Parameter], calls: Sequence[Call], derivatives: int
    ) -> dict[nn.Parameter, str]:
        """`root`: the node of the outputs. `derivatives`: how many were taken in the pass that made them."""
        if root is None:
            return {}
        nodes = root._sequence_nr() - (calls[0].nodes[0] if calls else root)._sequence_nr()
        graph = (nodes, len(calls), derivatives, tuple(map(id, parameters)))
        if graph != self._graph or not calls:
            self._graph = graph
            self._found = {
                p: "a derivative" if derivatives else f"{node}, which no function call shows"
                for p, node in unrecorded(root, parameters, {n: call for call in calls for n in call.nodes}).items()
            }
        return self._found


def unrecorded(root: Node, parameters: Iterable[nn.Parameter], calls: Mapping[Node, Call]) -> dict[nn.Parameter, str]:
    """The parameters that `root` reaches past every recorded call, each with the name of the node that uses it."""
    leaves = {get_gradient_edge(p).node: p for p in parameters if p.requires_grad}
    found: dict[nn.Parameter, str] = {}
    seen: set[Any] = {None}
    ahead: list[Node] = [root]
    while ahead:
        node = ahead.pop()
        if node in seen:
            continue
        seen.add(node)
        call = calls.get(node)
        for user, reached in _edges(node) if call is None else _beyond(node, call, calls):
            parameter = leaves.get(reached)
            if parameter is None:
                ahead.append(reached)
            elif call is None or id(parameter) not in call.weights:
                found.setdefault(parameter, user.name())
    return found


def _edges(node: Node) -> list[tuple[Node, Node]]:
    return [(node, reached) for reached, _ in node.next_functions if reached is not None]


def _beyond(start: Node, call: Call, calls: Mapping[Node, Call]) -> list[tuple[Node, Node]]:
    """The edges out of a call: to the nodes of its inputs, to other calls, and to leaves."""
    out: list[tuple[Node, Node]] = []
    seen, ahead = {start}, [start]
    while ahead:
        for user, reached in _edges(ahead.pop()):
            inside = reached.next_functions and reached not in call.ends and reached not in calls
            if not inside:
                out.append((user, reached))
            elif reached not in seen:
                seen.add(reached)
                ahead.append(reached)
    return out
