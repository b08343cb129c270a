"""The surroundings of K-FAC's own pass: eager, with gradients, under the user's autocast, and without a trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.func import functional_call

from kfac_triton.capture.inputs import Autocast, Inputs, OwnPass


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
    with mock.patch.object(OwnPass, "running", True), torch.random.fork_rng(devices):
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
        reseed(device, seed)
        yield


def reseed(device: torch.device, seed: int | Streams) -> None:
    """Sets torch's global random streams to a seed, or to where they were."""
    if isinstance(seed, Streams):
        seed.restore(device)
        return
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


def called(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What the module returns for these arguments; its buffers stay as they were."""
    buffers = dict(module.named_buffers())
    copies = {name: buffer.clone() for name, buffer in buffers.items()}
    if not buffers or not any(isinstance(child, torch.jit.ScriptModule) for child in module.modules()):
        return functional_call(module, copies, args, kwargs) if buffers else module(*args, **kwargs)
    try:  # scripted modules take no other buffers than their own
        return module(*args, **kwargs)
    finally:
        with torch.no_grad():
            for name, buffer in buffers.items():
                buffer.copy_(copies[name])


@contextmanager
def gradients_kept(module: nn.Module) -> Iterator[None]:
    """In here backward passes that the model runs by itself leave the parameters' `.grad` alone."""
    before = [(p, p.grad) for p in module.parameters()]
    for p, _ in before:
        p.grad = None
    try:
        yield
    finally:
        for p, grad in before:
            p.grad = grad


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
