"""Every use of a known weight in the functions of one pass of K-FAC's own.

It follows weights by identity, so that functional code, packed projections and tied weights need no module type.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from kfac_triton.blocks import conv, embedding, linear, norm, recurrent
from kfac_triton.blocks.custom import CustomUse, LayerBlock
from kfac_triton.blocks.use import Part, Use, part_of
from kfac_triton.capture.paths import DERIVATIVES, Call, UnseenUses, nodes_of
from kfac_triton.capture.tensors import packed

MATCHERS: dict[Any, Callable[..., Use | list[Use] | None]] = {
    **linear.MATCHERS,
    **conv.MATCHERS,
    **embedding.MATCHERS,
    **norm.MATCHERS,
}


@dataclass(eq=False, repr=False)
class Recorded:
    """A use and the place in the graph where its gradient dy appears; `shape` is dy's, as the operation returned it."""

    use: Use
    edge: GradientEdge | None
    shape: torch.Size

    def g(self, dy: Tensor) -> Tensor:
        return self.use.g(self._as_returned(dy))

    def g_by_images(self, dy: Tensor) -> Tensor:
        return self.use.g_by_images(self._as_returned(dy))

    def _as_returned(self, dy: Tensor) -> Tensor:
        return packed(dy) if dy.is_nested else dy.reshape(self.shape)


@dataclass(eq=False, repr=False)
class Uses:
    """What one pass saw: the uses of every weight, and the parameters used by something no block covers."""

    recorded: dict[nn.Parameter, list[Recorded]] = field(default_factory=dict)
    unsupported: dict[nn.Parameter, str] = field(default_factory=dict)


def attention_body() -> Callable[..., Any]:
    """`F.multi_head_attention_forward` that asks no function mode first, so that modes see the functions inside."""
    body = F.multi_head_attention_forward
    names = {**vars(F), "has_torch_function": lambda *_: False}
    twin = FunctionType(body.__code__, names, body.__name__, body.__defaults__, body.__closure__)
    twin.__kwdefaults__ = body.__kwdefaults__
    return twin


def _attention_by_formula(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options: Any,
) -> Tensor:
    """`F.scaled_dot_product_attention` without fused kernels."""
    if attn_mask is not None and attn_mask.dtype == torch.bool:  # the operator below would add it as numbers
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, -torch.inf)
    out: Tensor = torch._scaled_dot_product_attention_math(
        query, key, value, attn_mask, dropout_p, is_causal, **options
    )[0]
    return out


class Unrolled(TorchFunctionMode):
    """In here recurrent layers run step by step, and attention without fused kernels, as forward-mode derivatives need.

    `torch.nn.attention.sdpa_kernel` would choose the kernel for the whole process.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in recurrent.KINDS:
            return recurrent.unrolled(func, args, kwargs)[0]
        if func is F.multi_head_attention_forward:
            with self:
                return attention_body()(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            return _attention_by_formula(*args, **kwargs)
        return func(*args, **kwargs)


class UseRecorder(TorchFunctionMode):
    """Records every use of `parameters` in the functions called while it is active and gradients are enabled.

    It is also what matchers ask which parameter an argument is.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__()
        self.uses = Uses()
        self._known = {id(p): p for p in parameters}
        self._moved: dict[
            Any, nn.Parameter
        ] = {}  # by the node that added a number to one; an in-place successor is another
        self._examples_second = 0
        self._claimed: Counter[nn.Parameter] = Counter()
        self._calls: dict[Node, Call] = {}
        self._derivatives = 0

    def __call__(self, t: Any) -> Part | None:
        """Which part of a known parameter t is; None where it is none, or no block of whole rows."""
        parameter = self.owner(t)
        return None if parameter is None else part_of(parameter, t)

    def owner(self, t: Any) -> nn.Parameter | None:
        """The known parameter that t is, is a view of, was cast from, or exceeds by a number."""
        return self._owner(t) if isinstance(t, Tensor) else None

    @contextmanager
    def claimed(self, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
        """What uses these parameters in here is left to the block of a module."""
        self._claimed.update(parameters)
        try:
            yield
        finally:
            self._claimed.subtract(parameters)

    def calls(self) -> int:
        """How many calls with uses were recorded so far."""
        return len(self._calls)

    def record(self, use: Use, out: Tensor, inputs: Any, since: int) -> None:
        """Notes the use that a module makes of its weight; recorded calls `since` are calls inside that module."""
        inside = [self._calls.pop(node) for node in list(self._calls)[since:]]
        self._record([use], out, nodes_of(_tensors(inputs)), frozenset().union(*(call.weights for call in inside)))

    def add_unseen(self, unseen: UnseenUses, z: Tensor) -> None:
        """Counts the parameters that the outputs z depend on past every recorded use among the unsupported."""
        self.uses.unsupported = {**unseen_uses([self], unseen, z.grad_fn), **self.uses.unsupported}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self._derivatives += getattr(func, "__wrapped__", func) in DERIVATIVES
        if func is F.multi_head_attention_forward:
            return self._attention(func, args, kwargs)
        owners = self._owners((args, kwargs)) if torch.is_grad_enabled() else ()
        owners = [p for p in owners if not self._claimed[p]]
        if func in recurrent.KINDS:
            return self._recurrent(func, args, kwargs, bool(owners))
        if not owners:
            return func(*args, **kwargs)
        moved = _moved_by_a_number(func, args, kwargs)
        if moved is not None and moved.shape == owners[0].shape and moved.stride() == owners[0].stride():
            out = func(*args, **kwargs)
            self._moved[out.grad_fn] = owners[0]
            return out
        uses = self._matched(func, args, kwargs)
        inputs = self._input_nodes((args, kwargs)) if uses else frozenset()
        out = func(*args, **kwargs)
        if uses and out.grad_fn is not None:
            self._record(uses, out, inputs)
            described = _described(uses)
            owners = [p for p in owners if id(p) not in described]
        elif all(not t.requires_grad or self._owner(t) is not None for t in _tensors(out)):
            return out
        for parameter in owners:
            self.uses.unsupported.setdefault(parameter, getattr(func, "__name__", str(func)))
        return out

    def _matched(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Use]:
        """The uses that the call will make; none of scales on jagged tensors, whose rows have no axis of examples."""
        matcher = MATCHERS.get(func)
        if matcher is None:
            return []
        nested = any(t.is_nested for t in _tensors((args, kwargs)))
        if nested:
            args, kwargs = tree_map(packed, (args, kwargs))
            if any(t.is_nested for t in _tensors((args, kwargs))):  # of the strided layout, without rows
                return []
        found = matcher(self, *args, **kwargs)
        uses = [found] if isinstance(found, Use) else found or []
        return [use for use in uses if not nested or use.operation != "scale"]

    def _attention(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Re-enters packed attention, so that the projections inside are seen; it puts positions before examples."""
        query = args[0] if args else kwargs["query"]
        outside, self._examples_second = self._examples_second, query.shape[1] if query.dim() == 3 else 0
        try:
            with self:
                return attention_body()(*args, **kwargs)
        finally:
            self._examples_second = outside

    def _recurrent(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], known: bool) -> Any:
        """Runs a recurrent layer step by step, and records the uses of its weights."""
        inputs = self._input_nodes((args, kwargs)) if known else frozenset()
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
            self.uses.recorded.setdefault(weight.parameter, []).append(recorded)
            described |= _described([use])
        self._calls |= dict.fromkeys(nodes_of(_tensors(out)), Call(inputs, described))
        return out

    def _input_nodes(self, value: Any) -> frozenset[Node]:
        return nodes_of(t for t in _tensors(value) if self._owner(t) is None)

    def _record(
        self, uses: Sequence[Use], out: Tensor, inputs: frozenset[Node], described: frozenset[int] = frozenset()
    ) -> None:
        self._calls |= dict.fromkeys(nodes_of([out]), Call(inputs, described | _described(uses)))
        # An operation may return a full view of its result; an in-place successor moves the view's place in the graph,
        # never the base's.
        base = out._base if out._is_view() and out._base is not None else out
        for use in uses:
            if self._examples_second:
                use = replace(use, batch_axis=1, examples=self._examples_second)
            recorded = Recorded(use, get_gradient_edge(base), out.shape)
            self.uses.recorded.setdefault(use.weight.parameter, []).append(recorded)

    def _owners(self, value: Any) -> list[nn.Parameter]:
        owners: dict[int, nn.Parameter] = {}
        for t in _tensors(value):
            owner = self._owner(t)
            if owner is not None:
                owners[id(owner)] = owner
        return list(owners.values())

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
        return self._moved.get(node)


def _described(uses: Iterable[Use]) -> frozenset[int]:
    return frozenset(id(part.parameter) for use in uses for part in (use.weight, use.bias) if part is not None)


def _moved_by_a_number(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The tensor whose gradient the result has, in 1 + w, as norms have it that hold the rest of their scale."""
    if len(args) != 2 or "out" in kwargs or func not in (*embedding.SUMS, *embedding.DIFFERENCES):
        return None
    left, right = args
    if isinstance(left, Tensor) and isinstance(right, (int, float)):
        return left
    swapped = isinstance(left, (int, float)) and isinstance(right, Tensor) and func in embedding.SUMS and not kwargs
    return right if swapped else None


def unseen_uses(recorders: Sequence[UseRecorder], unseen: UnseenUses, root: Node | None) -> dict[nn.Parameter, str]:
    """The parameters that the outputs of these passes, the first one's at `root`, depend on past every recorded use."""
    calls = {node: call for recorder in reversed(recorders) for node, call in recorder._calls.items()}
    return unseen.of(root, recorders[0]._known.values(), calls, sum(recorder._derivatives for recorder in recorders))


@contextmanager
def custom_layers(
    module: nn.Module, recorder: UseRecorder, blocks: Mapping[type[nn.Module], LayerBlock]
) -> Iterator[None]:
    """In here the calls of modules of these types are recorded as the uses that their blocks make of them."""
    if not blocks:
        yield
        return
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


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))
