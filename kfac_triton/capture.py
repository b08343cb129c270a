"""The only file that knows hooks and function modes: what enters the root, and every use of a known weight.

`RootInputs` keeps references to the inputs of the user's forward passes, nothing more; it works inside a compiled
model, whose graph must not depend on a growing list: there the last inputs are noted and the backward pass, which is
never compiled together with its accumulation into `.grad`, moves them to the list. `UseRecorder` is active in K-FAC's
own pass alone; it follows weights by identity, so that functional code, packed projections and tied weights need no
module type.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, cast
from unittest import mock

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from kfac_triton.blocks import conv, embedding, linear, norm, recurrent
from kfac_triton.blocks.custom import CustomUse, LayerBlock
from kfac_triton.blocks.use import Part, Use, part_of

log = logging.getLogger("kfac_triton")

MATCHERS: dict[Any, Callable[..., Use | list[Use] | None]] = {
    **linear.MATCHERS,
    **conv.MATCHERS,
    **embedding.MATCHERS,
    **norm.MATCHERS,
}
MAX_KEPT_BYTES = 2**31


class Autocast(NamedTuple):
    """The autocast state of a forward pass on one device type."""

    device_type: str
    enabled: bool
    dtype: torch.dtype


class Inputs(NamedTuple):
    """What one call of the root received, by reference, with the autocast states of that moment.

    `note` is whatever the keeper's `on_forward` returned for this pass.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    autocast: tuple[Autocast, ...]
    note: Any = None

    def tensors(self) -> list[Tensor]:
        return [leaf for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)]


class _OwnPass:
    """Whether a pass of K-FAC's own is running, in which no optimizer keeps inputs."""

    running = False


class _Hooks:
    """Hooks that a copy of the model must not inherit: a copied or unpickled keeper is inert until swept away."""

    def __init__(self) -> None:
        self.handles: list[Any] = []
        self.inert = False

    def __reduce__(self) -> tuple[Any, ...]:
        return _inert, (type(self),)

    def close(self) -> None:
        """Remove every hook."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()


def _inert(kind: type[_Hooks]) -> _Hooks:
    hooks = kind.__new__(kind)
    _Hooks.__init__(hooks)
    hooks.inert = True
    return hooks


def sweep_inert(module: nn.Module) -> None:
    """Removes from a copied model the inert hooks of the optimizer of its original."""
    for child in module.modules():
        for hooks in (child._forward_pre_hooks, child._forward_hooks):
            for key in [k for k, hook in hooks.items() if getattr(getattr(hook, "__self__", None), "inert", False)]:
                del hooks[key]
                for flags in (child._forward_hooks_with_kwargs, child._forward_pre_hooks_with_kwargs):
                    flags.pop(key, None)


class RootInputs(_Hooks):
    """Keeps the inputs of the training passes of `module` until they are taken.

    Only calls in training mode with gradients enabled count, and only those whose backward pass came: the gradient of
    the outputs says so, or in a compiled model, where outputs carry no hooks, the first gradient of a parameter.
    """

    def __init__(
        self,
        module: nn.Module,
        parameters: Iterable[nn.Parameter],
        device_types: Iterable[str],
        on_forward: Callable[[], Any] | None = None,
    ) -> None:
        super().__init__()
        self._on_forward = on_forward
        self._entered: Inputs | None = None
        self._compiled: Inputs | None = None
        self._untracked: list[Inputs] = []
        self._device_types = tuple(sorted(set(device_types)))
        self._kept: list[tuple[Inputs, tuple[int, ...]]] = []
        self._bytes = 0
        self._full = False
        self._watched: set[nn.Parameter] = set()
        self.handles += [
            module.register_forward_pre_hook(self._before_forward, prepend=True, with_kwargs=True),
            module.register_forward_hook(self._after_forward, with_kwargs=True),
        ]
        self.watch(parameters)

    def watch(self, parameters: Iterable[nn.Parameter]) -> None:
        """Notice backward passes by these parameters too."""
        for p in parameters:
            if p.requires_grad and p not in self._watched:
                self._watched.add(p)
                self.handles.append(p.register_post_accumulate_grad_hook(self._after_backward))

    def _before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._entered = None
        if self.inert or _OwnPass.running or not module.training or not torch.is_grad_enabled():
            return
        autocast = tuple(
            Autocast(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
            for kind in self._device_types
        )
        note = None if self._on_forward is None else self._on_forward()
        if torch.compiler.is_compiling():
            self._compiled = Inputs(args, kwargs, autocast, note)
        else:
            self._entered = Inputs(args, kwargs, autocast, note)

    def _after_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], returned: Any) -> None:
        if torch.compiler.is_compiling() or self.inert or self._entered is None:
            return
        inputs, self._entered = self._entered, None
        tensors = list(_output_tensors(returned))
        for t in tensors:
            if t.grad_fn is not None:  # a hook on a leaf, a parameter among the outputs, would outlive the pass
                t.register_hook(lambda grad: self._keep(inputs))
        if not tensors:
            self._untracked.append(inputs)

    def _after_backward(self, parameter: Tensor) -> None:
        self._flush()

    def _flush(self) -> None:
        """Keeps the passes whose outputs tell nothing of their backward pass."""
        if self._compiled is not None:
            self._untracked.append(self._compiled)
            self._compiled = None
        for inputs in self._untracked:
            self._keep(inputs)
        self._untracked.clear()

    def _keep(self, inputs: Inputs) -> None:
        size = sum(t.nbytes for t in inputs.tensors())
        if any(kept is inputs for kept, _ in self._kept):
            return
        if self._kept and self._bytes + size > MAX_KEPT_BYTES:
            if not self._full:
                log.warning("a step's inputs exceed %d bytes; the later ones stay out of the factors", MAX_KEPT_BYTES)
            self._full = True
            return
        self._bytes += size
        self._kept.append((inputs, _versions(inputs)))

    def take(self) -> list[Inputs]:
        """The inputs of the passes since the last call, which are then forgotten.

        Raises:
            RuntimeError: a kept input was written to after its forward pass.
        """
        if not self._kept:
            self._flush()
        kept = self._kept
        self._untracked.clear()
        self.forget()
        for inputs, versions in kept:
            if _versions(inputs) != versions:
                raise RuntimeError(
                    "an input of the model was modified in place between its backward pass and step(); "
                    "pass a copy of it to the model, or move the write behind step()"
                )
        return [inputs for inputs, _ in kept]

    def forget(self) -> None:
        """Drop what was kept: the user cleared the gradients or skipped the step."""
        self._kept, self._bytes = [], 0

    def close(self) -> None:
        """Remove every hook."""
        super().close()
        self._untracked.clear()
        self._entered = self._compiled = None
        self.forget()


def _output_tensors(returned: Any) -> Iterator[Tensor]:
    """The tensors in what a model returned, also in the attributes of an object of no known kind."""
    for leaf in tree_leaves(returned):
        if isinstance(leaf, Tensor):
            yield leaf
        elif hasattr(leaf, "__dict__"):
            yield from (value for value in vars(leaf).values() if isinstance(value, Tensor))


def _versions(inputs: Inputs) -> tuple[int, ...]:
    return tuple(t._version for t in inputs.tensors() if not t.is_inference())


@dataclass(eq=False, repr=False)
class Recorded:
    """A use and the place in the graph where its gradient dy appears; `shape` is dy's, as the operation returned it."""

    use: Use
    edge: GradientEdge | None
    shape: torch.Size

    def g(self, dy: Tensor) -> Tensor:
        return self.use.g(dy.reshape(self.shape))

    def g_by_images(self, dy: Tensor) -> Tensor:
        return self.use.g_by_images(dy.reshape(self.shape))


@dataclass(eq=False, repr=False)
class Uses:
    """What one pass saw: the uses of every weight, and the parameters used by something no block covers."""

    recorded: dict[nn.Parameter, list[Recorded]] = field(default_factory=dict)
    unsupported: dict[nn.Parameter, str] = field(default_factory=dict)


class Unrolled(TorchFunctionMode):
    """In here recurrent layers run step by step, which forward-mode derivatives need."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in recurrent.KINDS:
            return recurrent.unrolled(func, args, kwargs or {})[0]
        return func(*args, **(kwargs or {}))


class UseRecorder(TorchFunctionMode):
    """Records every use of `parameters` in the functions called while it is active and gradients are enabled.

    It is also what matchers ask which parameter an argument is.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__()
        self.uses = Uses()
        self._known = {id(p): p for p in parameters}
        self._examples_second = 0
        self._claimed: Counter[nn.Parameter] = Counter()

    def __call__(self, t: Any) -> Part | None:
        """Which part of a known parameter t is; None where it is none, or no block of whole rows."""
        parameter = self.owner(t)
        return None if parameter is None else part_of(parameter, t)

    def owner(self, t: Any) -> nn.Parameter | None:
        """The known parameter that t is, is a view of, or was cast from."""
        return self._owner(t) if isinstance(t, Tensor) else None

    @contextmanager
    def claimed(self, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
        """What uses these parameters in here is left to the block of a module."""
        self._claimed.update(parameters)
        try:
            yield
        finally:
            self._claimed.subtract(parameters)

    def record(self, use: Use, out: Tensor) -> None:
        """Notes a use whose outputs are `out`."""
        self._record([use], out)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            return self._attention(func, args, kwargs)
        owners = self._owners((args, kwargs)) if torch.is_grad_enabled() else ()
        owners = [p for p in owners if not self._claimed[p]]
        if func in recurrent.KINDS:
            return self._recurrent(func, args, kwargs, bool(owners))
        if not owners:
            return func(*args, **kwargs)
        matcher = MATCHERS.get(func)
        found = matcher(self, *args, **kwargs) if matcher is not None else None
        uses = [found] if isinstance(found, Use) else found or []
        out = func(*args, **kwargs)
        if uses and out.grad_fn is not None:
            self._record(uses, out)
            covered = {id(part.parameter) for use in uses for part in (use.weight, use.bias) if part is not None}
            owners = [p for p in owners if id(p) not in covered]
        elif all(not t.requires_grad or self._owner(t) is not None for t in _tensors(out)):
            return out
        for parameter in owners:
            self.uses.unsupported.setdefault(parameter, getattr(func, "__name__", str(func)))
        return out

    def _attention(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Re-enters packed attention, so that the projections inside are seen; it puts positions before examples."""
        query = args[0] if args else kwargs["query"]
        outside, self._examples_second = self._examples_second, query.shape[1] if query.dim() == 3 else 0
        try:
            with self, mock.patch.object(F, "has_torch_function", lambda *_: False):
                return func(*args, **kwargs)
        finally:
            self._examples_second = outside

    def _recurrent(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], known: bool) -> Any:
        """Runs a recurrent layer step by step, and records the uses of its weights."""
        out, notes = recurrent.unrolled(func, args, kwargs)
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
        return out

    def _record(self, uses: Sequence[Use], out: Tensor) -> None:
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
        """The known parameter that t is, is a view of, or was cast from."""
        known = self._known.get(id(t))
        if known is not None or not t.requires_grad or t.grad_fn is None:
            return known
        base = t._base if t._is_view() and t._base is not None else t
        owner = self._known.get(id(base))
        return owner if owner is not None else self._cast_from(base)

    def _cast_from(self, t: Tensor) -> nn.Parameter | None:
        if type(t.grad_fn).__name__ != "ToCopyBackward0" or t.grad_fn is None:
            return None
        source = getattr(t.grad_fn.next_functions[0][0], "variable", None)
        return self._known.get(id(source))


@contextmanager
def custom_layers(
    module: nn.Module, recorder: UseRecorder, blocks: Mapping[type[nn.Module], LayerBlock]
) -> Iterator[None]:
    """In here the calls of modules of these types are recorded as the uses that their blocks make of them."""
    if not blocks:
        yield
        return
    handles: list[Any] = []
    open_claims: list[tuple[nn.Module, Any]] = []

    def before(layer: nn.Module, args: tuple[Any, ...]) -> None:
        claim = recorder.claimed(list(layer.parameters(recurse=False)))
        claim.__enter__()
        open_claims.append((layer, claim))

    def after(layer: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        _, claim = open_claims.pop()
        claim.__exit__(None, None, None)
        block = next(block for kind, block in blocks.items() if type(layer) is kind)
        weight = recorder(getattr(layer, block.weight))
        bias = None if block.bias is None else recorder(getattr(layer, block.bias, None))
        y = block.output(out)
        if weight is not None and torch.is_grad_enabled() and y.grad_fn is not None:
            inputs = tuple(a.detach() if isinstance(a, Tensor) else a for a in args)
            x = next((a for a in inputs if isinstance(a, Tensor)), y.detach())
            use = CustomUse(weight, bias, x, transposed=block.transposed, block=block, layer=layer, inputs=inputs)
            recorder.record(use, y)

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


class ModuleTaps(_Hooks):
    """Taps in the user's own passes, for linear modules and convolutions whose weight is a parameter.

    `on_use(module)` is called in the forward pass and returns what receives (x, dy) in the backward pass, once for each
    use, also under activation checkpointing; `on_output(inputs, returned)` with what the root returned. All may be
    traced by torch.compile. The output projection of attention is left out, since its module is never called.
    `own_calls` counts the calls of each weight's modules in passes of K-FAC's own, where there are no taps.
    """

    def __init__(
        self,
        module: nn.Module,
        parameters: Iterable[nn.Parameter],
        on_use: Callable[[nn.Module], Callable[[Tensor, Tensor], None]],
        on_output: Callable[[Inputs, Any], None],
    ) -> None:
        super().__init__()
        self.weights: dict[nn.Parameter, nn.Module] = {}
        self.own_calls: Counter[nn.Parameter] = Counter()
        self._root = module
        self._on_use, self._on_output = on_use, on_output
        known = set(parameters)
        self.handles.append(module.register_forward_hook(self._after_root, with_kwargs=True))
        tapped = TAPPED
        unheard = {child.out_proj for child in module.modules() if isinstance(child, nn.MultiheadAttention)}
        elsewhere = {
            p for child in module.modules() if not isinstance(child, tapped) for p in child.parameters(recurse=False)
        }
        for child in module.modules():
            if child in unheard:
                continue
            if isinstance(child, tapped) and child.weight in known and child.weight not in elsewhere:
                self.weights.setdefault(cast(nn.Parameter, child.weight), child)
                self.handles.append(child.register_forward_hook(self._after_layer))

    def _live(self) -> bool:
        return not self.inert and not _OwnPass.running and self._root.training and torch.is_grad_enabled()

    def _after_root(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], returned: Any) -> None:
        if self._live():
            self._on_output(Inputs(args, kwargs, ()), returned)

    def _after_layer(self, module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor | None:
        if _OwnPass.running and not self.inert and y.requires_grad:
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


class Streams(NamedTuple):
    """The states of torch's global random streams, on the CPU and on the device of the parameters."""

    cpu: Tensor
    device: Tensor | None

    @classmethod
    def now(cls, device: torch.device) -> Streams:
        return cls(torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None)

    def restore(self, device: torch.device) -> None:
        torch.set_rng_state(self.cpu)
        if self.device is not None:
            torch.cuda.set_rng_state(self.device, device)


@contextmanager
def own_pass(device: torch.device) -> Iterator[None]:
    """No optimizer keeps inputs in here, and the user's random streams are where they were afterwards."""
    devices = [device] if device.type == "cuda" else []
    with mock.patch.object(_OwnPass, "running", True), torch.random.fork_rng(devices):
        yield


@contextmanager
def changed_outputs(module: nn.Module, change: Callable[[Inputs, Any], Any]) -> Iterator[None]:
    """In here the module returns change(inputs, what it returned), in compiled models too, which run eagerly."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], returned: Any) -> Any:
        return change(Inputs(args, kwargs, ()), returned)

    handle = module.register_forward_hook(hook, with_kwargs=True)
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        handle.remove()


@contextmanager
def bare_pass(inputs: Inputs, device: torch.device, seed: int | Streams) -> Iterator[None]:
    """The surroundings of K-FAC's own pass.

    Eager, gradients on, the autocast state of the user's pass, activation checkpointing of the re-entrant kind passed
    over (it knows no partial backward), and random numbers from `seed`: the user's streams stay where they were.
    """
    with (
        own_pass(device),
        torch.compiler.set_stance("force_eager"),
        torch.enable_grad(),
        mock.patch.object(torch.utils.checkpoint.CheckpointFunction, "apply", _run_without_checkpoint),
        _autocast(inputs.autocast),
    ):
        if isinstance(seed, Streams):
            seed.restore(device)
        else:
            torch.default_generator.manual_seed(seed)
            if device.type == "cuda":
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(seed)
        yield


@contextmanager
def uncheckpointed(module: nn.Module) -> Iterator[None]:
    """In here activations of a model with recurrent layers are kept, not computed again.

    What is computed again in a backward pass, where no function mode is active, would be torch's own layer and not its
    twin, and the wrong tensors would be found for it.
    """
    recurrent_layers = (nn.RNNBase, nn.RNNCellBase)
    if not any(isinstance(child, recurrent_layers) for child in module.modules()):
        yield
        return
    with ExitStack() as stack:
        for name in ("_checkpoint_without_reentrant_generator", "_checkpoint_without_reentrant_generator_impl"):
            if hasattr(torch.utils.checkpoint, name):  # one or the other, by torch's version
                stack.enter_context(mock.patch.object(torch.utils.checkpoint, name, _no_checkpoint))
        yield


def _no_checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Iterator[None]:
    """The two halves of what surrounds a function that is to be computed again: nothing."""
    yield


def _run_without_checkpoint(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
    return function(*args)


@contextmanager
def _autocast(states: tuple[Autocast, ...]) -> Iterator[None]:
    if not states:
        yield
        return
    state, rest = states[0], states[1:]
    with torch.autocast(state.device_type, dtype=state.dtype, enabled=state.enabled), _autocast(rest):
        yield
