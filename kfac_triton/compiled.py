"""The step as a graph: compiled once for each plan where that is possible."""

from __future__ import annotations

import logging
import os
import time
import types
from collections.abc import Callable

import torch

from kfac_triton import ops
from kfac_triton.step_plan import Blocks, Fallback, Hyper, Plan
from kfac_triton.update import step_

log = logging.getLogger("kfac_triton")

MAX_GRAPHS = 8  # sets of parameters with a gradient, as with experts or skipped layers; each costs a compilation


class CompiledStep:
    """`step_`, compiled once for each plan where that is possible, else eager after one warning.

    `seconds` is the wall time of the calls in which a graph was compiled.
    """

    def __init__(self, compile: bool) -> None:
        self.compile = compile
        self.seconds = 0.0
        self._many = False
        self._steps: dict[Plan, Callable[[Hyper, Blocks, Fallback], None]] = {}

    def __call__(self, plan: Plan, hyper: Hyper, blocks: Blocks, fallback: Fallback) -> None:
        if not self.compile:
            step_(plan, hyper, blocks, fallback)
        elif plan in self._steps:
            self._steps[plan](hyper, blocks, fallback)
        elif len(self._steps) == MAX_GRAPHS:
            self._warn_many()
            step_(plan, hyper, blocks, fallback)
        else:
            self._first(plan, hyper, blocks, fallback)

    def _warn_many(self) -> None:
        if not self._many:
            log.warning(
                "KFAC compiled %d graphs of its step, one for each set of parameters with a gradient; "
                "for other sets it runs eagerly",
                MAX_GRAPHS,
            )
        self._many = True

    def _first(self, plan: Plan, hyper: Hyper, blocks: Blocks, fallback: Fallback) -> None:
        reason = _why_not(blocks, fallback)
        started = time.perf_counter()
        if reason is None:
            ops.load()
            step = _compiled(plan)
            try:
                step(hyper, blocks, fallback)
            except torch._dynamo.exc.TorchDynamoException as error:
                lines = [line.strip() for line in str(error).splitlines() if line.strip()]
                reason = f"{type(error).__name__}: {' '.join(lines[:2])}"
            else:
                self._steps[plan] = step
        if reason is None:
            self.seconds += time.perf_counter() - started
            return
        log.warning("KFAC's step runs eagerly, since it cannot be compiled here (%s); compile=False says so", reason)
        self.compile = False
        step_(plan, hyper, blocks, fallback)


def _compiled(plan: Plan) -> Callable[[Hyper, Blocks, Fallback], None]:
    """A graph of its own: torch counts recompilations by code object, and every plan of every optimizer is its own."""

    def step(hyper: Hyper, blocks: Blocks, fallback: Fallback) -> None:
        step_(plan, hyper, blocks, fallback)

    own = types.FunctionType(
        step.__code__.replace(), step.__globals__, step.__name__, step.__defaults__, step.__closure__
    )
    compiled: Callable[[Hyper, Blocks, Fallback], None] = torch.compile(own, fullgraph=True, dynamic=False)
    return compiled


def _why_not(blocks: Blocks, fallback: Fallback) -> str | None:
    """A reason why compilation is bound to fail, found without trying."""
    if os.environ.get("TORCH_COMPILE_DISABLE") == "1" or torch._dynamo.config.disable:
        return "TORCH_COMPILE_DISABLE is set"
    tensors = blocks.weights or fallback.parameters
    if tensors and tensors[0].device.type == "cpu":
        from torch._inductor import cpp_builder, exc

        try:
            cpp_builder.get_cpp_compiler()
        except exc.InvalidCxxCompiler:
            return "no C++ compiler found"
    return None
