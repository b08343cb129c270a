"""Every use of a known weight in the functions of one pass of K-FAC's own.

It follows weights by identity, so that functional code, packed projections and tied weights need no module type.

A small network's step costs what Python costs. So a function without a known weight takes one Python call here, and a
plain linear layer four; whatever goes by identity is found by `id`, since torch hashes tensors in Python.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from kfac_triton.capture.paths import DERIVATIVES, Call, UnseenUses, call_from, nodes_of
from kfac_triton.capture.recorded import DEFAULTS, Recorded, Uses, edge_from
from kfac_triton.capture.tensors import packed, tensors_in
from kfac_triton.capture.unrolled import attention_body
from kfac_triton.operations import conv, embedding, linear, norm, recurrent
from kfac_triton.operations.linear import LinearUse
from kfac_triton.operations.use import Part, Use, part_from, part_of

MATCHERS: dict[Any, Callable[..., Use | list[Use] | None]] = {
    **linear.MATCHERS,
    **conv.MATCHERS,
    **embedding.MATCHERS,
    **norm.MATCHERS,
}
SPECIAL = frozenset({*DERIVATIVES, *recurrent.KINDS, F.multi_head_attention_forward})


class UseRecorder(TorchFunctionMode):
    """Records every use of `parameters` in the functions called while it is active and gradients are enabled.

    It is also what matchers ask which parameter an argument is.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__()
        self.uses = Uses()
        self._known = {id(p): p for p in parameters}
        # by the node that added a number to one; an in-place successor is another
        self._moved: dict[Node, nn.Parameter] = {}
        self._examples_second = 0
        self._claimed: Counter[int] = Counter()
        self._calls: list[Call] = []
        self._derivatives = 0

    def __call__(self, t: Any) -> Part | None:
        """Which part of a known parameter t is; None where it is none, or no block of whole rows."""
        known = self._known.get(id(t))
        if known is not None:
            return part_from((known, 0, known.shape[0] if known.dim() else 1, False))
        parameter = self.owner(t)
        return None if parameter is None else part_of(parameter, t)

    def owner(self, t: Any) -> nn.Parameter | None:
        """The known parameter that t is, is a view of, was cast from, or exceeds by a number."""
        return self._owner(t) if isinstance(t, Tensor) else None

    @contextmanager
    def claimed(self, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
        """What uses these parameters in here is left to the block of a module."""
        self._claimed.update(map(id, parameters))
        try:
            yield
        finally:
            self._claimed -= Counter(map(id, parameters))

    def calls(self) -> int:
        """How many calls with uses were recorded so far."""
        return len(self._calls)

    def record(self, use: Use, out: Tensor, inputs: Any, since: int) -> None:
        """Notes the use that a module makes of its weight; recorded calls `since` are calls inside that module."""
        inside = self._calls[since:]
        del self._calls[since:]
        described = _described([use]).union(*[call.weights for call in inside])
        self._record([use], out, nodes_of(tensors_in(inputs)), described)

    def add_unseen(self, unseen: UnseenUses, z: Tensor) -> None:
        """Counts the parameters that the outputs z depend on past every recorded use among the unsupported."""
        self.uses.unsupported = {**unseen_uses([self], unseen, z.grad_fn), **self.uses.unsupported}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__wrapped__", func) in SPECIAL:
            return self._special(func, args, kwargs)
        if not torch.is_grad_enabled():
            return func(*args, **kwargs)
        known = self._known
        for t in (*args, *kwargs.values()) if kwargs else args:
            if id(t) in known:
                break
            if isinstance(t, Tensor):
                if t.requires_grad:  # what has no graph is no view or cast of a parameter
                    base = t if not t._is_view() or t._base is None else t._base
                    node = base.grad_fn
                    made = id(base) in known or type(node).__name__ == "ToCopyBackward0" or node in self._moved
                    if made and self._owner(t) is not None:
                        break
            elif isinstance(t, (tuple, list, dict)) and self._told_apart(tensors_in(t))[0]:
                break
        else:
            return func(*args, **kwargs)
        if func is F.linear and len(args) == 3 and t is args[1] and id(t) in known and not kwargs:
            return self._linear(*args)
        return self._with_owners(func, args, kwargs)

    def _special(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Derivatives, and what runs as the functions that it is made of."""
        if func is F.multi_head_attention_forward:
            return self._attention(func, args, kwargs)
        if func in recurrent.KINDS:
            return self._recurrent(func, args, kwargs)
        self._derivatives += 1
        return self._with_owners(func, args, kwargs)

    def _linear(self, x: Tensor, weight: nn.Parameter, bias: Tensor | None) -> Any:
        """`F.linear` with a known weight and an x that is made of none: `_with_owners` in few calls."""
        known_bias = None if bias is None else self._known.get(id(bias))
        if (
            type(x) is not Tensor
            or x.is_nested
            or weight.dim() != 2
            or (bias is not None and known_bias is None)
            or self._claimed
        ):
            return self._with_owners(F.linear, (x, weight, bias), {})
        out = F.linear(x, weight, bias)
        node = out.grad_fn
        if node is None:
            return out
        ends: tuple[Node | None, ...] = ()
        if x.requires_grad:
            ends = (x.grad_fn, x._base.grad_fn) if x._is_view() and x._base is not None else (x.grad_fn,)
        base = out._base if out._is_view() and out._base is not None else out  # as in `_record`
        below = base.grad_fn or node
        self._calls.append(call_from(((node, below), ends, (id(weight), id(bias)))))
        use = LinearUse(
            part_from((weight, 0, weight.shape[0], False)),
            None if known_bias is None else part_from((known_bias, 0, known_bias.shape[0], False)),
            x.data,  # x.detach() without an operator
        )
        if self._examples_second:
            use.batch_axis, use.examples = 1, self._examples_second
        recorded = Recorded(use, edge_from((below, base.output_nr, *DEFAULTS)), out.shape)
        lists = self.uses.recorded.lists
        if id(weight) in lists:
            lists[id(weight)][1].append(recorded)
        else:
            lists[id(weight)] = (weight, [recorded])
        return out

    def _with_owners(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call that may use known parameters."""
        tensors = tensors_in((args, kwargs))
        owners, others = self._told_apart(tensors) if torch.is_grad_enabled() else ([], [])
        if not owners:
            return func(*args, **kwargs)
        moved = embedding.moved_by_a_number(func, args, kwargs)
        if moved is not None and moved.shape == owners[0].shape and moved.stride() == owners[0].stride():
            out = func(*args, **kwargs)
            if out.grad_fn is not None:
                self._moved[out.grad_fn] = owners[0]
            return out
        uses = self._matched(func, args, kwargs, tensors) if func in MATCHERS else []
        inputs = nodes_of(others) if uses else ()
        out = func(*args, **kwargs)
        if uses and out.grad_fn is not None:
            described = _described(uses)
            self._record(uses, out, inputs, described)
            owners = [p for p in owners if id(p) not in described]
        elif all([not t.requires_grad or self._owner(t) is not None for t in tensors_in(out)]):
            return out
        for parameter in owners:
            self.uses.unsupported.setdefault(parameter, getattr(func, "__name__", str(func)))
        return out

    def _told_apart(self, tensors: Sequence[Tensor]) -> tuple[list[nn.Parameter], list[Tensor]]:
        """The known parameters behind these tensors, but for those left to a block; and the tensors behind which there
        is none."""
        owners: dict[int, nn.Parameter] = {}
        others: list[Tensor] = []
        for t in tensors:
            known = self._known.get(id(t))
            owner = self._owner(t) if known is None else known
            if owner is None:
                others.append(t)
            elif not self._claimed or not self._claimed.get(id(owner)):
                owners[id(owner)] = owner
        return list(owners.values()), others

    def _matched(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: Sequence[Tensor]
    ) -> list[Use]:
        """The uses that the call will make; none of scales on jagged tensors, whose rows have no axis of examples."""
        nested = [t for t in tensors if t.is_nested]
        if nested:
            args, kwargs = tree_map(packed, (args, kwargs))
            if any(t.is_nested for t in tensors_in((args, kwargs))):  # of the strided layout, without rows
                return []
        found = MATCHERS[func](self, *args, **kwargs)
        uses = found if isinstance(found, list) else [] if found is None else [found]
        return [use for use in uses if use.operation != "scale"] if nested else uses

    def _attention(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Re-enters packed attention, so that the projections inside are seen; it puts positions before examples."""
        query = args[0] if args else kwargs["query"]
        outside, self._examples_second = self._examples_second, query.shape[1] if query.dim() == 3 else 0
        try:
            with self:
                return attention_body()(*args, **kwargs)
        finally:
            self._examples_second = outside

    def _recurrent(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs a recurrent layer step by step, and records the uses of its weights."""
        known, others = self._told_apart(tensors_in((args, kwargs))) if torch.is_grad_enabled() else ([], [])
        inputs = nodes_of(others) if known else ()
        out, notes = recurrent.unrolled(func, args, kwargs)
        described: frozenset[int] = frozenset()
        for note in notes if known else ():
            weight = self(note.weight)
            if weight is None or not weight.whole or (note.outputs.grad_fn is None and not note.outputs.requires_grad):
                continue
            even = note.steps[0] == note.steps[-1] and len(note.steps) > 1
            use = recurrent.RecurrentUse(
                weight,
                self(note.bias),
                note.x.detach(),
                batch_axis=int(even),
                examples=note.steps[0] if even else 0,
                steps=note.steps,
            )
            recorded = Recorded(use, get_gradient_edge(note.outputs), note.outputs.shape)
            self.uses.recorded.append(weight.parameter, recorded)
            described |= _described([use])
        nodes = nodes_of(tensors_in(out))
        if nodes:
            self._calls.append(Call(nodes, inputs, described))
        return out

    def _record(self, uses: Sequence[Use], out: Tensor, inputs: Collection[Node], described: Collection[int]) -> None:
        self._calls.append(Call(nodes_of([out]), inputs, described))
        # An operation may return a full view of its result; an in-place successor moves the view's place in the graph,
        # never the base's.
        base = out._base if out._is_view() and out._base is not None else out
        edge = get_gradient_edge(base)
        for use in uses:
            if self._examples_second:
                use.batch_axis, use.examples = 1, self._examples_second
            self.uses.recorded.append(use.weight.parameter, Recorded(use, edge, out.shape))

    def _owner(self, t: Tensor) -> nn.Parameter | None:
        """The known parameter that t is, is a view of, was cast from, or exceeds by a number."""
        known = self._known.get(id(t))
        if known is not None or not t.requires_grad or t.grad_fn is None:
            return known
        base = t._base if t._is_view() and t._base is not None else t
        owner = self._known.get(id(base))
        return owner if owner is not None else self._made_from(base)

    def _made_from(self, t: Tensor) -> nn.Parameter | None:
        """The known parameter that t was cast from, or exceeds by a number, or both."""
        node = t.grad_fn
        if node is not None and type(node).__name__ == "ToCopyBackward0":
            node = node.next_functions[0][0]
            source = getattr(node, "variable", None)
            if source is not None:
                return self._known.get(id(source))
        return None if node is None else self._moved.get(node)


def _described(uses: Iterable[Use]) -> frozenset[int]:
    return frozenset([id(part.parameter) for use in uses for part in (use.weight, use.bias) if part is not None])


def unseen_uses(recorders: Sequence[UseRecorder], unseen: UnseenUses, root: Node | None) -> dict[nn.Parameter, str]:
    """The parameters that the outputs of these passes, the first one's at `root`, depend on past every recorded use."""
    calls = [call for recorder in reversed(recorders) for call in recorder._calls]
    return unseen.of(root, recorders[0]._known.values(), calls, sum(recorder._derivatives for recorder in recorders))
