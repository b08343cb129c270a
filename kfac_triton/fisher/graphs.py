"""Passes as graphs: what `torch.compile` makes of the Fisher's pass, or of a whole closure with it.

A graph holds the user's code as dynamo sees it, under dynamo's guards. It returns gradients and what the layers
received; what becomes of these stands outside, so it is the same as without a graph. Sampling is one opaque operator,
with a generator of its own, so a graph samples what the eager pass does. Where an update takes the whole batch, the
Fisher's backward pass in a closure's graph shares the closure's forward pass.
"""

from __future__ import annotations

import logging
import math
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kfac_triton.capture import (
    FOLLOWED,
    MATCHERS,
    Followed,
    Inputs,
    Ledger,
    NotTraceable,
    Recorded,
    TracedPass,
    TracedUse,
    attention_body,
    bare_pass,
    traced_gradients,
)
from kfac_triton.fisher.compiling import cannot_compile, compiled, graphs_so_far, why
from kfac_triton.fisher.parts import batch_size
from kfac_triton.fisher.sampled import FisherPass, Seen, SeenUse, least_examples, mixed_seed, tensor_of_outputs
from kfac_triton.likelihoods import Likelihood
from kfac_triton.operations.use import Part

log = logging.getLogger("kfac_triton")

MOST_COMPILED = 4  # graphs of one function: a forward pass that counts its calls would make one of each
LIKELIHOODS: weakref.WeakValueDictionary[int, Likelihood] = weakref.WeakValueDictionary()


def _sampled_gradient(z: Tensor, seed: Tensor, likelihood: int) -> Tensor:
    """d nll / dz at targets sampled with a generator of that seed; `likelihood`: the key of one in LIKELIHOODS."""
    generator = torch.Generator(z.device).manual_seed(int(seed))
    return LIKELIHOODS[likelihood].sampled_gradient(z, generator).contiguous()


sampled_gradient = torch.library.custom_op("kfac_triton::sampled_gradient", _sampled_gradient, mutates_args=())
sampled_gradient.register_fake(lambda z, seed, likelihood: torch.empty_like(z, memory_format=torch.contiguous_format))


class Closure(NamedTuple):
    """What the graph of a closure gave: the `inputs` of the call of the model; and where the Fisher's pass was part of
    it, the `uses` of weights and the `shape` of the outputs."""

    loss: Tensor
    inputs: Inputs
    uses: Sequence[TracedUse] | None
    shape: torch.Size | None


class _NoGraph(BaseException):
    """Leaves a pass that was to be a graph, past what handles the exceptions of models."""


class Graphs:
    """The graphs of one model.

    `reason`: why there are none any more. `seconds`: wall time of the calls that compiled. `parameters`: of the layers.
    """

    def __init__(self, ledger: Ledger, sampling: FisherPass) -> None:
        self.reason: str | None = None
        self.seconds = 0.0
        self.parameters: list[nn.Parameter] = []
        self.started = False
        self._ledger, self._sampling = ledger, sampling
        self._version: Any = None
        self._functions: dict[str, Callable[..., Any]] = {}
        self._compiled: dict[str, int] = {}
        LIKELIHOODS[id(sampling.likelihood)] = sampling.likelihood

    def begin(self, why_not: str | None) -> None:
        """The first pass that could be a graph comes."""
        self.started = True
        why_not = why_not or cannot_compile(self._sampling.state.device)
        if why_not is not None:
            self.refuse(why_not)

    def refuse(self, reason: str) -> None:
        """From now on everything runs eagerly."""
        if self.reason is None:
            log.warning("compile has no effect, the step runs eagerly: %s", reason)
        self.reason = reason

    def follow(self, version: Any, parameters: Sequence[nn.Parameter]) -> None:
        """The layers have these parameters; graphs are made anew for another `version` of them."""
        if version != self._version:
            self._version, self.parameters = version, list(parameters)
            self._functions.clear()

    def closure(self, closure: Callable[[], Any], cleared: Sequence[nn.Parameter], seed: int | None) -> Closure | None:
        """Runs a closure as a graph; None where it cannot be one, and then nothing has run.

        `cleared`: the parameters whose gradients `zero_grad` clears. `seed`: of the sampled targets; None: no rows are
        wanted.
        """
        name = "closure" if seed is None else "closure and rows"
        if name not in self._functions:
            followed = Followed(self._ledger.root, self.parameters, list(cleared), attention_body())
            self._functions[name] = compiled(self._of_closure(followed, due=seed is not None))
        # a gradient that is there, and cleared inside, would be what None stands for: see `traced_gradients`
        grads = [p.grad for p in cleared]
        for p in cleared:
            p.grad = None
        found = self._run(name, closure, torch.tensor(seed or 0))
        if found is None:
            for p, grad in zip(cleared, grads, strict=True):
                p.grad = grad
            return None
        loss, (args, kwargs, autocast, shape), uses = found
        return Closure(loss, Inputs(self._ledger.root, args, kwargs, autocast), uses, shape)

    def fisher(self, inputs: Inputs, trained: Sequence[nn.Parameter], update: int, terms: int) -> Seen | None:
        """What the Fisher's pass over `inputs` sees, as `FisherPass.run` gives it; None where it cannot be a graph."""
        sampling = self._sampling
        if not self._same_part_as_later(inputs, update, terms):
            return None
        name, root = "rows", self._ledger.root
        if name not in self._functions:
            followed = Followed(root, self.parameters, [], attention_body())
            self._functions[name] = compiled(self._of_fisher(followed))
        seed = mixed_seed(sampling.seed, update, 0)

        def forward(part: Inputs) -> tuple[torch.Size, Any]:
            found = self._run(name, *replay.start(part.args, part.kwargs), torch.tensor(seed))
            if found is None:
                raise _NoGraph
            return _terms_shape(sampling.likelihood, found[0]), found

        try:
            with bare_pass(sampling.state, inputs, seed, compiled=True) as replay:
                part, (shape, uses) = sampling.parts.run(
                    inputs, forward, fraction=sampling.fraction, update=update, least=least_examples(terms)
                )
        except _NoGraph:
            return None
        return self.seen(part, shape, uses, trained)

    def _same_part_as_later(self, inputs: Inputs, update: int, terms: int) -> bool:
        """Whether this update takes as many examples as all later ones, whose graph it can be."""
        examples = batch_size(inputs) or 0
        fraction, least = self._sampling.fraction, least_examples(terms)
        return _examples(examples, max(fraction, 1 / (update + 1)), least) == _examples(examples, fraction, least)

    def _run(self, name: str, *arguments: Any) -> Any:
        """Calls one of the functions; None, and no graphs any more, where it cannot be a graph."""
        before, started = graphs_so_far(), time.perf_counter()
        try:
            with traced_gradients():
                found = self._functions[name](*arguments)
        except (
            NotTraceable,
            torch._dynamo.exc.TorchDynamoException,
            torch._dynamo.exc.FailOnRecompileLimitHit,
        ) as error:
            self.refuse(why(error))
            return None
        if graphs_so_far() > before:
            self.seconds += time.perf_counter() - started
            self._compiled[name] = self._compiled.get(name, 0) + 1
            if self._compiled[name] == MOST_COMPILED:
                self.refuse(f"{MOST_COMPILED} graphs were compiled, since shapes or what the code reads keep changing")
        return found

    def _of_closure(self, followed: Followed, *, due: bool) -> Callable[..., Any]:
        """A closure, and the Fisher's pass where it is `due`: what becomes one graph."""
        ledger, sampling = self._ledger, self._sampling
        root, key = ledger.root, id(sampling.likelihood)

        def whole(closure: Callable[[], Any], seed: Tensor) -> Any:
            def direction(args: Any, kwargs: Any, returned: Any) -> tuple[Tensor, Tensor] | None:
                z = tensor_of_outputs(returned, sampling.output)
                if not due or not _takes_all(sampling, batch_size(Inputs(root, args, kwargs)), z):
                    return None
                return z, _direction(sampling.likelihood, z, seed, key)

            _only_compiled()
            traced = TracedPass(followed, direction)
            ledger.graph = traced
            with torch.enable_grad(), traced:
                loss = closure()
            ledger.graph = None
            return loss.detach(), traced.call, traced.uses

        return whole

    def _of_fisher(self, followed: Followed) -> Callable[..., Any]:
        """The Fisher's pass by itself."""
        ledger, sampling, key = self._ledger, self._sampling, id(self._sampling.likelihood)

        def rows(args: Any, kwargs: Any, seed: Tensor) -> Any:
            def direction(args: Any, kwargs: Any, returned: Any) -> tuple[Tensor, Tensor]:
                z = tensor_of_outputs(returned, sampling.output)
                return z, _direction(sampling.likelihood, z, seed, key)

            _only_compiled()
            traced = TracedPass(followed, direction)
            traced.clear()
            ledger.graph = traced
            with torch.enable_grad(), traced:
                traced.before(followed.root, args, kwargs, ())
                traced.after(followed.root(*args, **kwargs))
            ledger.graph = None
            call = traced.call
            assert call is not None
            return call[3], traced.uses

        return rows

    def seen(
        self, inputs: Inputs, shape: torch.Size, uses: Sequence[TracedUse], trained: Sequence[nn.Parameter]
    ) -> Seen:
        """What the pass of a graph saw, as `FisherPass` gives it."""
        terms = math.prod(_terms_shape(self._sampling.likelihood, shape)[:-1])
        examples = batch_size(inputs) or shape[0]
        seen = Seen(terms=terms, terms_per_example=max(terms // max(examples, 1), 1))
        resolve = _Whole(trained)
        for traced in uses:
            use = MATCHERS[FOLLOWED[traced.function]](resolve, *traced.args, **traced.kwargs)
            assert not isinstance(use, list)
            if use is not None:
                if traced.second:
                    use.batch_axis, use.examples = 1, traced.second
                recorded = Recorded(use, None, traced.shape)
                seen.uses.setdefault(use.weight.parameter, []).append(SeenUse(recorded, [traced.dy], 0, examples))
        return seen


def _only_compiled() -> None:
    if not torch.compiler.is_compiling():
        raise NotTraceable("the compiler is switched off")


def _terms_shape(likelihood: Likelihood, shape: torch.Size) -> torch.Size:
    """The shape (..., C) of the terms of outputs with this shape."""
    return likelihood.terms_last(torch.empty(shape, device="meta")).shape


def _examples(count: int, fraction: float, least: int) -> int:
    """How many of so many examples an update takes, see `Parts`."""
    return max(math.ceil(count * fraction), min(count, least))


def _takes_all(sampling: FisherPass, examples: int | None, z: Tensor) -> bool:
    """Whether every update takes the whole batch, so that it can share the user's own forward pass."""
    count = examples or z.shape[0]
    terms = sampling.likelihood.terms_last(z.detach())[..., 0].numel()
    return _examples(count, sampling.fraction, least_examples(max(terms // max(count, 1), 1))) == count


class _Whole:
    """Which known parameter an argument is: in a graph always a whole one."""

    def __init__(self, known: Iterable[nn.Parameter]) -> None:
        self._known = {id(p) for p in known}

    def __call__(self, t: Any) -> Part | None:
        p = self.owner(t)
        return None if p is None else Part(p, 0, p.shape[0] if p.dim() else 1)

    def owner(self, t: Any) -> nn.Parameter | None:
        return t if isinstance(t, nn.Parameter) and id(t) in self._known else None


def _direction(likelihood: Likelihood, z: Tensor, seed: Tensor, key: int) -> Tensor:
    """What to back-propagate from z: the gradient of the nll of sampled targets."""
    terms = likelihood.terms_last(z.detach())
    terms = terms.float() if terms.dtype.itemsize < 4 else terms
    return likelihood.terms_back(sampled_gradient(terms, seed, key), z).to(z.dtype)
