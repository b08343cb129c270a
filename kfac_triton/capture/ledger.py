"""Which forward passes made the gradients that the parameters hold now.

A pass is an outermost call of a module that owns parameters: of the root, or of whatever part of it the program calls.
A hook on its outputs fires when a backward pass reaches it. If that backward pass accumulates into parameters, the call
is pending from its end on, until these gradients are cleared. So passes for gradients of an input alone do not count,
nor do batches whose gradients were thrown away. Training or evaluation mode makes no difference.

Compiled code runs no hook on its outputs. It notes its calls, and the first gradient that a backward pass accumulates
asks the autograd engine which of them it runs through.
"""

from __future__ import annotations

import functools
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

from kfac_triton.capture.backward import BackwardPasses
from kfac_triton.capture.calls import Call, Listener, ancestors_of
from kfac_triton.capture.compiled_calls import (
    CompiledCall,
    containers_copied,
    no_calls,
    outputs_of,
    ran_through,
    released,
)
from kfac_triton.capture.hearing import Hearing
from kfac_triton.capture.inputs import Autocast, Hooks, Inputs
from kfac_triton.capture.patches import own_pass_running
from kfac_triton.capture.state import ModuleState
from kfac_triton.capture.traced import TracedPass
from kfac_triton.distributed import wrapper_in_forward

MOST_MADE = 64  # calls whose outputs are known, before those that are gone are looked for


class _Here(threading.local):
    """The calls that are open in this thread, and the record of the outermost one."""

    def __init__(self) -> None:
        self.open: list[nn.Module] = []
        self.call: Call | None = None
        self.made: dict[int, weakref.ref[Call]] = {}  # by the sequence numbers of the nodes of their outputs

    def note_made(self, node: Node, call: Call) -> None:
        """The call has made the tensor at this node. A WeakValueDictionary would be three Python calls."""
        if len(self.made) >= MOST_MADE:
            self.made = {number: one for number, one in self.made.items() if one() is not None}
        self.made[node._sequence_nr()] = weakref.ref(call)


class Ledger(Hooks):
    """Keeps the calls of `state.root` and its parts that made the present gradients of `parameters`.

    `wrapper`: the DistributedDataParallel whose forward pass made the last call. `changed()` calls `follow` if there
    are other parameters now. `on_outputs`, while it is there, may name a tensor in what a call returned and what is to
    receive its gradient. `graph`, while it is there, hears of calls in compiled code in the ledger's place.
    """

    on_outputs: Callable[[Inputs, Any], tuple[Tensor, Callable[[Tensor], None]] | None] | None = None
    graph: TracedPass | None = None

    def __init__(
        self,
        state: ModuleState,
        parameters: Sequence[nn.Parameter],
        device_types: Iterable[str],
        listener: Listener | None = None,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__()
        self.root, self._state = state.root, state
        self._device_types = tuple(sorted(set(device_types)))
        self._autocast: tuple[Autocast, ...] = ()
        self._listener = listener or Listener()
        self.backward = BackwardPasses(parameters, self._listener, changed)
        self._here = _Here()
        self._hidden: list[Call] = []  # calls that returned no tensor: any backward pass may be theirs
        self._compiled = no_calls()
        self._inside_compiled = 0
        self._inside_eager = False  # read by compiled code, to which a thread's own record is closed
        self.incomplete = False
        self.wrapper: nn.Module | None = None
        self._hearing = Hearing(self.root, self._before, self._after, self._accumulated)
        self._hearing.everything(parameters)

    def follow(self, parameters: Sequence[nn.Parameter]) -> None:
        """Look at the gradients of these parameters from now on, and hear modules that were added to the root."""
        self.backward.gradients.follow(parameters)
        self._hearing.everything(parameters)

    def close(self) -> None:
        """Remove every hook."""
        self._hearing.close()
        self.reset()

    @property
    def hears_gradients(self) -> bool:
        """Whether parameters have hooks of the ledger's."""
        return self._hearing.on_parameters

    @property
    def hides_outputs(self) -> bool:
        """Whether calls returned no tensor, or ran in compiled code: then these hooks stay."""
        return self._hearing.hides or self._hearing.compiles

    # ------------------------------------------------------------------------------------------------------- forward

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.inert:
            return
        if torch.compiler.is_compiling():
            self._before_compiled(module, args, kwargs)
            return
        here = self._here
        if here.open and here.open[0] is module and not _calls_itself(module):
            self._leave()
        if not here.open and self._begins(module):
            self.wrapper = wrapper_in_forward() or self.wrapper
            opening = self._state.opening(module, args, kwargs)
            inputs = Inputs(module, args, kwargs, self._autocast_here(), self._listener.begun(), opening)
            here.call = Call(inputs, ancestors_of(inputs.tensors(), here.made) if here.made else {})
            self._inside_eager = True
            self._listener.opened(here.call)
        here.open.append(module)

    def _begins(self, module: nn.Module) -> bool:
        """Whether an outermost call, which this is, may be a pass of the user's that trains."""
        if not torch.is_grad_enabled() or own_pass_running() or self._inside_compiled or transformed():
            return False
        return not self.backward.runs_again(module)

    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], returned: Any) -> None:
        if self.inert:
            return
        if torch.compiler.is_compiling():
            self._after_compiled(returned)
            return
        here = self._here
        while here.open and here.open.pop() is not module:  # those inside were left by an exception
            pass
        if here.open or here.call is None:
            return
        call, here.call = here.call, None
        self._inside_eager = False
        if returned is None and sys.exc_info()[0] is not None:
            self._listener.closed(call, None)
            return
        call.close(self._state)
        self._listener.returned(call.inputs, returned)
        watched = None if self.on_outputs is None else self.on_outputs(call.inputs, returned)
        if watched is not None:
            tensor, receive = watched
            tensor.register_hook(lambda gradient: None if self.backward.paused else receive(gradient))
        tensors = [returned] if isinstance(returned, Tensor) else list(outputs_of(returned))
        for z in tensors:
            node = z.grad_fn
            if node is not None:  # a leaf among the outputs, a parameter, has none
                here.note_made(node, call)
                node.register_prehook(functools.partial(self.backward.reached, call))
        if not tensors:
            self._hidden.append(call)
            self._hearing.hides = True
            self._hearing.gradients(self.backward.gradients.parameters)
        root = self._listener.closed(call, returned)
        if root is not None:
            root.register_hook(functools.partial(self._arrived, call, root.output_nr))

    def autocast(self) -> tuple[Autocast, ...]:
        """The autocast states of this moment."""
        return tuple(
            Autocast(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
            for kind in self._device_types
        )

    def _autocast_here(self) -> tuple[Autocast, ...]:
        """The same, as the last time where nothing changed; not for compiled code, which would keep that."""
        for kind, enabled, dtype in self._autocast:
            if torch.is_autocast_enabled(kind) is not enabled or torch.get_autocast_dtype(kind) is not dtype:
                self._autocast = ()
                break
        self._autocast = self._autocast or self.autocast()
        return self._autocast

    def _before_compiled(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.graph is not None:
            self.graph.before(module, args, kwargs, self.autocast())
            return
        if self._counts_compiled():
            self.wrapper = wrapper_in_forward() or self.wrapper
            received = containers_copied(args), containers_copied(kwargs)
            call = CompiledCall(module, *received, self.autocast(), self._listener.begun())
            self._compiled = (*self._compiled[1:], call)
        self._inside_compiled += 1

    def _counts_compiled(self) -> bool:
        """Whether a call in compiled code is an outermost one that may train."""
        outermost = self._inside_compiled == 0 and torch.is_grad_enabled() and not self._inside_eager
        return outermost and not torch.compiler.is_exporting()

    def _after_compiled(self, returned: Any) -> None:
        if self.graph is not None:
            self.graph.after(returned)
            return
        self._inside_compiled -= 1
        if self._counts_compiled():
            call = self._compiled[-1]
            call.returned = returned
            self._listener.returned(Inputs(call.module, call.args, call.kwargs), returned)

    # ------------------------------------------------------------------------------------------------------ backward

    def _arrived(self, call: Call, place: int, gradient: Tensor) -> None:
        if not self.backward.paused:
            self._listener.arrived(call, GradientEdge(torch._C._current_autograd_node(), place))

    def _accumulated(self, parameter: Tensor) -> None:
        """A parameter has received its gradient."""
        compiled = self._compiled[-1].module is not None
        if self.inert or own_pass_running() or not (compiled or self._hidden):
            return
        here = self.backward.here(parameter)
        here.calls += self._hidden
        self._hidden.clear()
        if compiled and not here.compiled_known:
            here.compiled_known = True
            here.calls += [_call_of(call) for call in ran_through(self._compiled, alone=not here.calls)]

    # ---------------------------------------------------------------------------------------------------------- step

    def take(self) -> list[Call]:
        """The calls that made the present gradients, which are then forgotten.

        `incomplete` says afterwards whether parts of the root may have been called that were not heard.
        """
        gradients = self.backward.gradients
        if gradients.cleared():
            self.backward.forget()
        calls = self.backward.pending
        if not calls and self._listener.assigned_gradients and not gradients.cleared():
            calls = self.backward.returned or [_call_of(call) for call in released(self._compiled)]
        self._hearing.compiles |= self._compiled[-1].module is not None
        self.reset()
        self.incomplete = self._hearing.learn((call.inputs.module for call in calls), gradients.parameters)
        return calls

    def pending(self) -> list[Call]:
        """The calls that made the present gradients so far."""
        return list(self.backward.pending)

    def reset(self) -> None:
        """Forget what is open: calls and backward passes that raised, and calls that no gradient came from."""
        self.backward.reset()
        self._hidden.clear()
        if self._compiled[-1].module is not None:
            self._compiled = no_calls()
        self._inside_compiled = 0
        self._leave()

    def _leave(self) -> None:
        """Close what a KeyboardInterrupt left open, which no hook sees."""
        here = self._here
        here.open.clear()
        if here.call is not None:
            self._listener.closed(here.call, None)
        here.call, self._inside_eager = None, False


def transformed() -> bool:
    """Whether a transform of torch.func runs, whose tensors are no examples."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def _call_of(compiled: CompiledCall) -> Call:
    """The record of a call in compiled code."""
    if compiled.call is None:
        inputs = Inputs(compiled.module, compiled.args, compiled.kwargs, compiled.autocast, compiled.note)
        compiled.call = Call(inputs, {})
    call: Call = compiled.call
    return call


def _calls_itself(module: nn.Module) -> bool:
    """Whether a call of this module, which has just begun, runs inside another one of the same module."""
    frame, calls = sys._getframe(), 0
    while frame is not None and calls < 2:
        calls += frame.f_code is nn.Module._call_impl.__code__ and frame.f_locals.get("self") is module
        frame = frame.f_back  # type: ignore[assignment]
    return calls == 2
