"""The quadratic model of the objective along a few directions, from exact products with the Fisher.

    M(w) = w^T (scale F + D) w / 2 + b^T w          (Martens & Grosse 2015, sections 6.4 and 7)
    F_ij = v_i^T F v_j,  D_ij = sum over covered parameters (scale lambda + eta) <v_i, v_j>,  b_i = <grad, v_i>

F is the Fisher of the mean nll over loss terms, `scale` the user's loss_scale, lambda the damping, eta the l2 weight
decay, and covered what has a block: other parameters move as AdamW says, and are not for the model to damp. With B B^T
the Fisher of the outputs, v_i^T F v_j = sum over terms <B^T J v_i, B^T J v_j> / L, so each direction costs one
forward-mode product J v and no backward pass.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, jvp, vmap

from kfac_triton.capture import Inputs, ModuleState, Opening, Replay, Unrolled, alone, bare_pass, uncheckpointed
from kfac_triton.capture.tangents import moving
from kfac_triton.fisher.parts import Parts, first_line
from kfac_triton.fisher.sampled import counted_terms, tensor_of_outputs
from kfac_triton.likelihoods import Likelihood

log = logging.getLogger("kfac_triton")

Direction = dict[nn.Parameter, Tensor]
Values = Sequence[Tensor]
Outputs = Callable[[Values], Tensor]
Begin = Callable[[], Outputs]  # puts the module where the pass begins; the outputs, once, as a function of parameters
Directions = Sequence[Tensor]  # v of every direction, for each parameter (k, *p.shape)
Products = tuple[Tensor, Tensor]  # the outputs z, and J v of every direction (k, *z)

MIN_EXAMPLES = 128  # with fewer, one hard example outside the part makes a step many times too long
ADJOINT = 0.05  # of |J v|: a larger error of <u, J v>, u of unit variance, is no rounding error


def _by_rules(begin: Begin, values: Values, directions: Directions) -> Products:
    """The outputs z, and J v of every direction, in one eager pass of the module with its own parameters, `values`.

    Raises:
        NotImplementedError: for a function without a rule.
    """
    outputs = begin()
    with moving(values, directions) as tangents:
        z = outputs(values)
        return z.detach(), tangents.of(z)


def _all_at_once(begin: Begin, values: Values, directions: Directions) -> Products:
    """The same by torch's own forward mode, for all directions at once."""
    outputs = begin()

    def both(*v: Tensor) -> Any:
        return jvp(outputs, (tuple(values),), (v,))

    out_dims: Any = (None, 0)
    found: Products = vmap(both, out_dims=out_dims, randomness="same")(*directions)
    return found


def _one_by_one(begin: Begin, values: Values, directions: Directions) -> Products:
    """The same in a pass for each direction, free of what vmap forbids, such as writing to a buffer."""
    products = []
    for v in zip(*directions, strict=True):
        outputs = begin()
        with forward_ad.dual_level():
            z = outputs(tuple(forward_ad.make_dual(*pair) for pair in zip(values, v, strict=True)))
            primal, tangent = forward_ad.unpack_dual(z)
        products.append(torch.zeros_like(primal) if tangent is None else tangent)
    return primal, torch.stack(products)


def _by_double_backward(begin: Begin, values: Values, directions: Directions) -> Products:
    """The same with J v as the gradient of u -> <J^T u, v>, for functions without forward-mode derivatives.

    Raises:
        NotImplementedError: J v is not that, since an operation has no second derivative. Torch may say nothing and
            leave its part out; but <u, J v> = <J^T u, v> for any u.
    """
    with torch.enable_grad():
        leaves = tuple(value.clone().requires_grad_() for value in values)
        z = begin()(leaves)
        u = torch.randn_like(z, requires_grad=True)
        pulled = torch.autograd.grad(z, leaves, u, create_graph=True, allow_unused=True, materialize_grads=True)
    moved = [(g, i) for i, g in enumerate(pulled) if g.requires_grad]
    products = []
    for v in zip(*directions, strict=True):
        with_u = torch.autograd.grad(
            [g for g, _ in moved], u, [v[i] for _, i in moved], retain_graph=True, materialize_grads=True
        )
        products.append(with_u[0])
        expected = [(g.detach().double() * t.double()).sum() for g, t in zip(pulled, v, strict=True)]
        lengths = [g.detach().double().norm() * t.double().norm() for g, t in zip(pulled, v, strict=True)]
        rounding = 100 * torch.finfo(z.dtype).eps * torch.stack(lengths).sum()
        error = (torch.stack(expected).sum() - (u.detach().double() * products[-1].double()).sum()).abs()
        if bool(error > ADJOINT * products[-1].double().norm() + rounding):
            raise NotImplementedError("an operation of the model has no second derivative")
    return z.detach(), torch.stack(products)


def _by_differences(begin: Begin, values: Values, directions: Directions) -> Products:
    """The same with J v from the outputs on both sides, (z(w + h v) - z(w - h v)) / 2h, for everything else.

    h |v| = eps^(1/3) |w|, where the errors of rounding and of the third derivative are alike: about 1e-4 in float32.
    """

    def at(v: Values, h: float) -> Tensor:
        outputs = begin()
        with torch.enable_grad():
            return outputs(tuple(w + h * d for w, d in zip(values, v, strict=True))).detach()

    width = torch.finfo(values[0].dtype).eps ** (1 / 3) * (_length(values) or 1.0)
    products = []
    for v in zip(*directions, strict=True):
        h = width / (_length(v) or 1.0)
        products.append((at(v, h) - at(v, -h)) / (2 * h))
    return at(values, 0.0), torch.stack(products)


def _length(v: Sequence[Tensor]) -> float:
    return float(torch.stack(torch._foreach_norm(list(v), 2, dtype=torch.float64)).norm())


WAYS = (_by_rules, _all_at_once, _one_by_one, _by_double_backward, _by_differences)


def use_batch_statistics(modules: Iterable[nn.Module]) -> None:
    """Normalisation layers in training use the batch's statistics as before, and no longer note them."""
    for m in modules:
        noting = vars(m).get("track_running_stats", False)  # a module without it would search its parameters
        if noting and m.training and not isinstance(m, torch.jit.ScriptModule):  # that one takes no changes
            m.track_running_stats = False  # type: ignore[assignment]


@dataclass(eq=False, repr=False)
class FisherProducts:
    """Products with the exact Fisher on kept inputs, through the bare module, which is left as it was.

    The first way that works is kept: all directions in one pass, by rules of the functions or by torch's forward mode,
    one pass each, two backward passes, differences.
    """

    state: ModuleState
    likelihood: Likelihood
    output: Callable[[Any], Tensor] | None = None
    mask: Callable[[Any, Tensor], Tensor] | None = None
    fraction: float = 1.0
    parts: Parts = field(default_factory=Parts)
    _way: int = field(default=0, init=False)

    def gram(
        self, kept: Sequence[Inputs], directions: Sequence[Direction], seed: int | Opening, update: int = 0
    ) -> Tensor:
        """F_ij = v_i^T F v_j (k, k), float64, for directions v_i; a parameter that one leaves out stands still in it.

        `fraction` of every batch is used, never fewer than min(N, 128) examples, from a place that moves with `update`;
        all of it where none can be cut out.
        `seed`: of the random numbers in the passes; with an opening they are those of the user's pass, which began
        there where its inputs do not say otherwise.
        """
        parameters = [p for p in self.state.root.parameters() if any(p in v for v in directions)]
        stacked = [torch.stack([v[p] if p in v else torch.zeros_like(p) for v in directions]) for p in parameters]
        return self.stacked_gram(kept, parameters, stacked, seed, update)

    def stacked_gram(
        self,
        kept: Sequence[Inputs],
        parameters: Sequence[nn.Parameter],
        directions: Directions,
        seed: int | Opening,
        update: int = 0,
    ) -> Tensor:
        """The same for the directions of every one of `parameters` in one tensor (k, *p.shape)."""
        k = directions[0].shape[0]
        total = torch.zeros(k, k, dtype=torch.float64, device=directions[0].device)
        terms: float | Tensor = 0.0
        for number, inputs in enumerate(kept):
            own = seed if isinstance(seed, Opening) else seed + number
            with (
                alone(),  # torch knows one level of forward-mode differentiation for all threads
                bare_pass(self.state, inputs, own) as replay,
                torch.no_grad(),
            ):
                part, (z, products) = self.parts.run(
                    inputs,
                    functools.partial(self._outputs_and_products, replay, parameters, directions),
                    fraction=self.fraction,
                    update=update,
                    least=MIN_EXAMPLES,
                )
                found, count = self.output_gram(part, z, products)
            total += found
            terms = terms + count
        return total / terms

    def output_gram(self, inputs: Inputs, z: Tensor, us: Tensor) -> tuple[Tensor, float | Tensor]:
        """(sum over the loss terms of u_i^T H u_j, the number of terms), H the Fisher of the outputs z, us (k, *z)."""
        terms = self._terms(z)
        as_they_are = terms.shape == z.shape and terms.stride() == z.stride() and terms.data_ptr() == z.data_ptr()
        directions = us if as_they_are else torch.stack([self._terms(u) for u in us])
        roots = self.likelihood.fisher_root_product(terms, directions)
        count: float | Tensor = terms[..., 0].numel()
        if self.mask is not None:
            counted = counted_terms(self.mask, inputs, z, terms)
            roots, count = roots * counted.unsqueeze(-1), counted.sum()
        flat = roots.flatten(1)
        return torch.mm(flat, flat.mT).double(), count

    def _terms(self, z: Tensor) -> Tensor:
        last = self.likelihood.terms_last(z)
        return last.float() if last.dtype.itemsize < 4 else last

    def _outputs_and_products(
        self, replay: Replay, parameters: Sequence[nn.Parameter], directions: Directions, inputs: Inputs
    ) -> tuple[torch.Size, Products]:
        """The shape of the loss terms, the outputs and J v, in the first way that works."""
        module = inputs.module

        def begin() -> Outputs:
            args, kwargs = replay.start(inputs.args, inputs.kwargs)
            use_batch_statistics(self.state.modules if module is self.state.root else module.modules())

            def outputs(values: Values) -> Tensor:
                if values is parameters:
                    return tensor_of_outputs(module(*args, **kwargs), self.output)
                names = {p: name for name, p in module.named_parameters()}
                replaced = {names[p]: value for p, value in zip(parameters, values, strict=True) if p in names}
                return tensor_of_outputs(functional_call(module, replaced, args, kwargs), self.output)

            return outputs

        failure = Exception()
        for number in range(self._way, len(WAYS)):
            try:
                if WAYS[number] is _by_rules:
                    z, products = _by_rules(begin, parameters, directions)
                else:
                    with uncheckpointed(self.state.root), Unrolled():
                        z, products = WAYS[number](begin, [p.detach() for p in parameters], directions)
            except Exception as error:  # torch lacks a derivative; or the model fails, then in the last way too
                failure = error
                continue
            if number > self._way:
                log.info("the quadratic model's products take another way: %s", first_line(failure))
            self._way = number
            return self._terms(z).shape, (z, products)
        raise failure
