"""Who takes part in a step, and the step itself: layers by their curvature, all other parameters by AdamW."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kfac_triton.curvature import State
from kfac_triton.estimator import CurvatureEstimator
from kfac_triton.joint import Joint, wide_dtype
from kfac_triton.numbers import on_host
from kfac_triton.steps import capped, fixed
from kfac_triton.steps.adamw import adamw_
from kfac_triton.steps.bounds import size_of
from kfac_triton.steps.fixed import Scales
from kfac_triton.steps.hyper import Hyper
from kfac_triton.steps.memory import Memory
from kfac_triton.steps.motion import Motion, Part, views_of

MOST_MOTIONS = 8  # sets of parameters with a gradient whose lists are kept, as with experts or skipped layers

Groups = Sequence[Mapping[str, Any]]


def _largest(flat: Tensor) -> Any:
    """A bound on the entries: not finite or zero only if one of them, or all, are so.

    A CPU takes the norm, which is cheaper, where its square has neither overflowed nor vanished.
    """
    if on_host(flat.device):
        square = torch.dot(flat, flat).item()
        return math.sqrt(square) if 0.0 < square < math.inf else torch.linalg.vector_norm(flat, torch.inf).item()
    return torch.linalg.vector_norm(flat, torch.inf)


def _shown(memory: Memory) -> dict[str, Callable[[], Joint]]:
    """By name, what the state of a parameter shows of the memory; the first call may make it."""
    found: dict[str, Callable[[], Joint]] = {"momentum_buffer": memory.momentum}
    return found if memory.S is None else {**found, "square_buffer": memory.squares}


class Gradients(NamedTuple):
    """What is known of all gradients together: what undoes a GradScaler's scale, whether every one is finite, and their
    largest entry. Python's numbers on a CPU, 0-d tensors elsewhere, but `unscale` only with a GradScaler."""

    unscale: Any
    finite: Any
    largest: Any


class Runner:
    """Takes steps with the curvature of `estimator`; `state` gives the optimizer's. `adaptive`: the quadratic model
    proposes them; else they may be `capped`."""

    def __init__(
        self,
        estimator: CurvatureEstimator,
        state: Callable[[], State],
        device: torch.device,
        *,
        adaptive: bool,
        capped: bool,
    ) -> None:
        self.estimator, self.adaptive, self.capped = estimator, adaptive, capped
        self.serve(device)
        self.memory: Memory | None = None
        self._state = state
        self._version = (-1, -1)
        self._motions: dict[Any, tuple[Motion | None, list[nn.Parameter]]] = {}
        self._last: Any = None
        self._gathered: Any = None
        self._planned: tuple[Motion | None, list[nn.Parameter]] = (None, [])
        self._published: set[int] = set()
        self._exports: list[tuple[list[Tensor], list[Tensor]]] = []

    # ------------------------------------------------------------------------------------------------- who takes part

    def serve(self, device: torch.device) -> None:
        """The parameters are on this device now."""
        self.device, self.hyper = device, Hyper(device)

    def plan(self, parameters: Sequence[nn.Parameter]) -> tuple[Motion | None, list[nn.Parameter]]:
        """The layers that take part where these parameters have gradients, and the parameters that AdamW moves."""
        estimator = self.estimator
        version = estimator.version, estimator.grouping
        if version != self._version:
            self._renew(version)
        key = tuple(map(id, parameters)), estimator.readiness
        found = self._motions.get(key)
        if found is None:
            if len(self._motions) == MOST_MOTIONS:
                self._motions.clear()
            found = self._motions[key] = self._made(parameters)
        if key != self._last and self.memory is not None:
            for flat in self.memory.J.flats:
                flat.zero_()
        self._last = key
        return found

    def _renew(self, version: tuple[int, int]) -> None:
        """Memory for the layers as they are now; what the state holds of momentum goes into it."""
        if version[0] != self._version[0]:
            structures, state = self.estimator.structures, self._state()
            options = {"moving": self.hyper.moving, "proposing": self.adaptive, "capped": self.capped}
            self.memory = Memory(structures, **options) if structures else None
            self._published.clear()
            self._exports = []
            if self.memory is not None:
                self._restore(self.memory, state)
        self._motions.clear()
        self._version, self._last = version, None

    def _restore(self, memory: Memory, state: State) -> None:
        for layer in self.estimator.layers.values():
            number, member = self.estimator.place(layer.weight)
            at = memory.stacks[number].first + member
            for row, p in enumerate((layer.weight, layer.bias)):
                held = {} if p is None else state.get(p, {})
                for name, joint in _shown(memory).items():
                    if name in held:
                        views = views_of(joint(), Part(number, member, bool(row), 0, 0))
                        pieces = layer.layout.pieces(held[name]) if row == 0 else [held[name]]
                        torch._foreach_copy_(views, [piece.detach() for piece in pieces])
                if "quadratic" in held:
                    memory.quadratics[row, at] = held["quadratic"]
                if "gradient_norm" in held:
                    for name, moment in memory.moments(at).items():
                        moment.copy_(held[name])

    def _made(self, parameters: Sequence[nn.Parameter]) -> tuple[Motion | None, list[nn.Parameter]]:
        with_grad = {id(p) for p in parameters}
        group_of = self.estimator.group_numbers
        parts: dict[nn.Parameter, Part] = {}
        for layer in self.estimator.layers.values():
            weight, bias = layer.weight, layer.bias
            if id(weight) not in with_grad or not self.estimator.ready(weight):
                continue
            place, region = self.estimator.place(weight), group_of[id(weight)]
            parts[weight] = Part(*place, False, region, region)
            if bias is not None and id(bias) in with_grad:
                parts[bias] = Part(*place, True, group_of[id(bias)], region)
        if self.estimator.chain is not None and sum(not part.is_bias for part in parts.values()) < len(
            self.estimator.layers
        ):
            parts = {}  # a chain needs all of its layers
        taken = {id(p) for p in parts} | {
            id(layer.bias) for layer in self.estimator.layers.values() if layer.weight in parts
        }
        rest = [p for p in parameters if id(p) not in taken]
        return (Motion(self.memory, parts) if parts and self.memory is not None else None), rest

    # ------------------------------------------------------------------------------------------------- the gradients

    @property
    def stale(self) -> bool:
        """Whether the layers changed since the gradients were gathered."""
        return bool(self._gathered != self._key_of_layers())

    def _key_of_layers(self) -> Any:
        return self.estimator.version, self.estimator.readiness

    def gradients(
        self, parameters: Sequence[nn.Parameter], groups: Groups, scale: Tensor | None, found_inf: Tensor | None
    ) -> Gradients:
        """Gathers the gradients, and what is known of them; `scale` and `found_inf` are a GradScaler's."""
        self.hyper.fill_(groups)
        motion, rest = self._planned = self.plan(parameters)
        self._gathered = self._key_of_layers()
        entries: list[Any] = []
        if motion is not None:
            motion.gather_()
            entries += [_largest(flat) for flat in motion.memory.J.flats]
        others = [p.grad for p in rest if p.grad is not None and p.grad.numel()]
        if others:
            wide = torch.float64 if any([g.dtype == torch.float64 for g in others]) else torch.float32
            entries += torch._foreach_norm(others, torch.inf, dtype=wide)
        if on_host(self.device):
            numbers = [float(entry) for entry in entries]
            fine = all(map(math.isfinite, numbers)) and (found_inf is None or not bool(found_inf))
            return Gradients(1.0 if scale is None else 1.0 / float(scale), fine, max(numbers, default=0.0))
        entries = entries or [torch.zeros((), device=self.device)]
        largest = entries[0] if len(entries) == 1 else torch.stack([e.double() for e in entries]).max()
        finite = largest < math.inf  # no norm is negative, and no comparison with NaN is true
        if found_inf is not None:
            finite = finite & (found_inf.to(self.device) == 0)
        return Gradients(1.0 if scale is None else scale.to(self.device).double().reciprocal(), finite, largest)

    def scales(self, gradients: Gradients, loss_scale: float) -> Scales:
        """What multiplies the gradients in this step."""
        unscale, finite, largest = gradients
        if on_host(self.device):
            size = size_of(largest * unscale / loss_scale)
            return Scales(unscale, 1.0 / (loss_scale * size), size, None)
        size = size_of(largest.double() * (unscale / loss_scale)).nan_to_num(1.0)
        return Scales(unscale, size.reciprocal() / loss_scale, size, finite)

    # ------------------------------------------------------------------------------------------------- the step

    def step(self, scales: Scales, *, bf16: bool) -> None:
        """Moves every parameter whose gradient was gathered, for the layers as they are."""
        motion, rest = self._planned
        if motion is not None:
            move_ = capped.move_ if self.capped else fixed.move_
            move_(motion, self.hyper, scales, bf16=bf16, chain=self.estimator.chain)
            if self.hyper.moving or self.capped:
                self.publish(motion)
        self.fallback(rest, scales)

    def publish(self, motion: Motion) -> None:
        """Shows the momentum of the layers that take part in the optimizer's state."""
        motion.with_momentum()
        if id(motion) not in self._published:
            self._published.add(id(motion))
            self._publish(motion)
        self.show_momentum()

    def _publish(self, motion: Motion) -> None:
        state, memory = self._state(), motion.memory
        for p, part in motion.parts.items():
            held = state[p]
            for name in ("exp_avg", "exp_avg_sq", "fallback_step"):
                held.pop(name, None)
            stack = memory.stacks[part.number]
            at = stack.first + part.member
            for name, joint in _shown(memory).items():
                views = views_of(joint(), part)
                if len(views) == 1:
                    held[name] = views[0]
                else:  # the matrix has no view in the parameter's shape: a copy that follows
                    held[name] = torch.empty_like(p, dtype=wide_dtype(p), memory_format=torch.contiguous_format)
                    self._exports.append((stack.layers[part.member].layout.pieces(held[name]), views))
            if self.capped:
                if not part.is_bias:
                    held |= memory.moments(at)
            elif self.hyper.bounded and (not part.is_bias or part.group != part.region):
                held["quadratic"] = memory.quadratics[int(part.is_bias), at]

    def proposed(self) -> list[Tensor]:
        """D, in which proposals hold the step of the layers."""
        return [] if self.memory is None else self.memory.D.flats

    def remember_step(self, parameters: Sequence[nn.Parameter]) -> None:
        """M <- D, the step that was taken, and 0 for layers that took no part in it."""
        motion = self.plan(parameters)[0]
        if motion is None:
            self.forget_step()
            return
        memory = motion.memory
        assert memory.M is not None
        if motion.whole:
            torch._foreach_copy_(memory.M.flats, memory.D.flats)
        else:
            torch._foreach_zero_(memory.M.flats)
            torch._foreach_copy_(motion.views(memory.M), motion.views(memory.D))
        self.show_momentum()

    def forget_step(self) -> None:
        """M <- 0."""
        if self.memory is not None and self.memory.M is not None:
            torch._foreach_zero_(self.memory.M.flats)
            self.show_momentum()

    def show_momentum(self) -> None:
        """Brings copies of M in the state up to date."""
        for into, views in self._exports:
            torch._foreach_copy_(into, views)

    def fallback(self, parameters: Sequence[nn.Parameter], scales: Scales) -> None:
        """AdamW's step of each of these parameters."""
        hyper, group_of, state = self.hyper, self.estimator.group_numbers, self._state()
        for p in parameters:
            held, group, grad = state[p], group_of[id(p)], p.grad
            assert grad is not None
            if "exp_avg" not in held:
                held.pop("momentum_buffer", None)
                held["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
                held["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
                held["fallback_step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            passed = torch.ones((), dtype=torch.float64, device=p.device)
            if scales.finite is not None:
                unscale = scales.unscale.to(grad.dtype) if isinstance(scales.unscale, Tensor) else scales.unscale
                grad = torch.where(scales.finite, grad * unscale, torch.zeros_like(grad))
                passed = scales.finite.double()
            elif scales.unscale != 1.0:
                grad = grad * scales.unscale
            decay = hyper.weight_decay[group] if hyper.decaying else None
            averages = held["exp_avg"], held["exp_avg_sq"]
            adamw_(p, grad, *averages, held["fallback_step"], hyper.fallback_lr[group], decay, passed)
