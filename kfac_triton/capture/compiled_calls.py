"""Calls of modules inside compiled code.

Compiled code runs no hook on its outputs, and no Python but the side effects that dynamo traced.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

# How many calls before one backward pass are told apart. Each holds its outputs until the next step.
REMEMBERED = 8
OWN_FOLDER = str(Path(__file__).parent.parent)


class CompiledCall:
    """What a call in compiled code leaves behind, as a side effect that dynamo can trace."""

    def __init__(self, module: Any, args: Any, kwargs: Any, autocast: Any, note: Any) -> None:
        self.module, self.args, self.kwargs = module, args, kwargs
        self.autocast, self.note = autocast, note
        self.returned: Any = None
        self.call: Any = None  # the ledger's own record, once a backward pass has run through this call


def no_calls() -> tuple[CompiledCall, ...]:
    """Places for the last calls; their number is fixed, since dynamo would compile anew for another."""
    return tuple(CompiledCall(None, (), {}, (), None) for _ in range(REMEMBERED))


def containers_copied(value: Any) -> Any:
    """The dictionaries and lists in arguments copied, in a way that compiled code can follow."""
    if type(value) is dict:
        return {name: containers_copied(item) for name, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)([containers_copied(item) for item in value])
    return value


def ran_through(calls: Sequence[CompiledCall], *, alone: bool) -> list[CompiledCall]:
    """Those calls that the current backward pass runs through; `alone`: no call outside of compiled code is known to.

    Where the loss itself is an output of compiled code, the engine does not list its node: there it is the newest call
    whose saved tensors are released.
    """
    made = [call for call in calls if call.module is not None]
    nodes = {id(call): [z.grad_fn for z in outputs_of(call.returned) if z.grad_fn is not None] for call in made}
    listed = [call for call in made if any(map(torch._C._will_engine_execute_node, nodes[id(call)]))]
    return listed or released(calls) or (made[-1:] if alone else [])


def released(calls: Sequence[CompiledCall]) -> list[CompiledCall]:
    """The newest call that a backward pass has run through, which releases its saved tensors."""
    nodes = [(call, [z.grad_fn for z in outputs_of(call.returned)]) for call in calls if call.call is None]
    return [call for call, own in nodes if any(map(_released, own))][-1:]


def _released(node: Any) -> bool:
    try:
        node.saved_tensors  # noqa: B018
    except RuntimeError:
        return True
    except AttributeError:  # a node of torch's own
        return False
    return False


def outputs_of(returned: Any) -> Iterator[Tensor]:
    """The tensors in what a module returned, also in the attributes of an object of no known kind."""
    if isinstance(returned, Tensor):
        yield returned
        return
    for leaf in tree_leaves(returned):
        if isinstance(leaf, Tensor):
            yield leaf
        elif hasattr(leaf, "__dict__"):
            yield from (value for value in vars(leaf).values() if isinstance(value, Tensor))


def compiled_parts(root: nn.Module) -> set[nn.Module]:
    """The modules below `root` that are compiled by themselves, with all inside them."""
    by_itself = (m for m in root.modules() if m._compiled_call_impl is not None or hasattr(m, "_orig_mod"))
    return {part for module in by_itself for part in module.modules()}


def forget_compiled_code() -> None:
    """Makes dynamo compile the user's functions anew, so that hooks which were just added are part of them.

    Dynamo shares compiled code between modules of one type and does not look at their hooks: without this a module
    would run the code of another that had none.
    """
    convert_frame = sys.modules.get("torch._dynamo.convert_frame")
    if convert_frame is None:
        return
    for reference in list(convert_frame.input_codes.seen):
        code = reference()
        if code is not None and not code.co_filename.startswith(OWN_FOLDER):
            torch._C._dynamo.eval_frame.reset_code(code)
