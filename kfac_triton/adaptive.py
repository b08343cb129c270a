"""The step whose length, momentum and damping follow the quadratic model (Martens & Grosse 2015, algorithm 2).

    delta = alpha Delta + mu delta_0 + delta_fallback,   Delta = -V,   delta_0 the last step of the covered parameters

alpha and mu minimise M(delta) where they are adaptive and are the groups' numbers where they are not. Parameters
without a block move by AdamW; the model counts their movement in, at the coefficient 1.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from kfac_triton import assembly, distributed, update
from kfac_triton.arguments import Settings
from kfac_triton.capture import Inputs, Streams, changed_outputs, own_pass
from kfac_triton.curvature import Curvature
from kfac_triton.damping import Adaptation, factored_damping, reduction_ratio
from kfac_triton.fisher import tensor_of_outputs
from kfac_triton.quadratic import Direction, FisherProducts, minimise, within

Group = dict[str, Any]
Arguments = tuple[update.Plan, update.Hyper, update.Blocks, update.Fallback]

SCALE_LIMIT = 1.5  # of the true over the claimed loss_scale, or its inverse: beyond, an error
SHIFT, MOST_SHIFT = 0.1, 1e4  # of the outputs; ten times more while the loss hides it below VISIBLE of itself
VISIBLE = 1e-4


@dataclass(frozen=True)
class Proposal:
    """A step: delta = sum of coefficients (alpha, mu, 1) times directions; `predicted` is M(delta), 0-d float64.

    `decay` holds eta for the parameters whose weight decay is in the objective, those with a block.
    """

    delta: Direction
    coefficients: Tensor
    predicted: Tensor
    decay: dict[nn.Parameter, float]


@dataclass(frozen=True)
class Occasion:
    """What one call of step() brings: parameters with a gradient, the inputs seen, and with a closure its loss and the
    random streams as it found them."""

    parameters: list[nn.Parameter]
    kept: list[Inputs]
    unscale: Tensor
    finite: Tensor
    closure: Callable[[], Any] | None
    loss: Any
    streams: Streams | None


class AdaptiveStep:
    """Steps by the quadratic model. Holds no state but which way of computing J v works: numbers live in the groups."""

    def __init__(self, module: nn.Module, settings: Settings) -> None:
        assert settings.likelihood is not None
        self._module = module
        self._products = FisherProducts(
            module, settings.likelihood, settings.output, settings.mask, settings.quadratic_fraction
        )
        self._loss_scale = settings.loss_scale
        self._seed = settings.seed
        self._adaptation = Adaptation()

    def step(self, optimizer: torch.optim.Optimizer, curvature: Curvature, now: Occasion) -> dict[str, Any]:
        """One step; returns what `diagnostics` reports of it.

        Raises:
            ValueError: in the first step, with a closure: loss_scale does not fit the loss.
        """
        groups = optimizer.param_groups
        first, step = groups[0], groups[0]["step"]
        group_of = {p: group for group in groups for p in group["params"]}
        loss = None if now.closure is None else number(now.loss)
        if step == 0 and loss is not None:
            self._check_scale(now, loss)
        fresh_rho = self._judge_last_step(optimizer, curvature, now, loss)
        search = first["adaptive_damping"] and step % self._adaptation.gamma_interval == 0
        curvature.update_inverses(optimizer.state, group_of.__getitem__, all_of_them=search)
        arguments = assembly.assemble(optimizer, now.parameters, curvature.blocks, now.unscale, now.finite)
        fallback = fallback_direction(arguments)
        if step == 0 and first["calibrate_damping"]:
            assert loss is not None
            self._calibrate(optimizer, curvature, now, fallback, loss)
        if search:
            proposal = self._search(optimizer, curvature, now, fallback, group_of)
        else:
            proposal = self.propose(optimizer, arguments, fallback, now)
        report = {
            "loss": loss, "predicted_reduction": proposal.predicted, "lr": proposal.coefficients[0],
            "momentum": proposal.coefficients[1], "reduction": None, "rho": None, "fresh_rho": fresh_rho,
            "damping": first["damping"], "gamma": factored_damping(first) ** 0.5,
        }  # fmt: skip
        for group in groups:
            group["step"] += 1
        if not bool(torch.isfinite(proposal.predicted)):
            self._adapt(groups, -math.inf)
            return report
        check = first["adaptive_damping"] and (step + 1) % self._adaptation.interval == 0
        before = {p: p.clone() for p in proposal.delta} if check else {}
        move_(proposal.delta)
        for p in proposal.delta:
            if "momentum_buffer" in optimizer.state[p]:
                optimizer.state[p]["momentum_buffer"] = proposal.delta[p]
        if check:
            assert loss is not None
            predicted = float(proposal.predicted)
            reduction = self._loss(now) + decay_changes(proposal.decay, before, proposal.delta) - loss
            rho = reduction_ratio(reduction, predicted, self._resolution(loss, first))
            report |= {"reduction": reduction, "rho": rho}
            for group in groups:
                group["rho"], group["predicted"] = rho, predicted
            if not math.isfinite(reduction):
                for p, value in before.items():
                    p.copy_(value)
                self._reject(optimizer)
        return report

    def take_back(self, optimizer: torch.optim.Optimizer) -> None:
        """Undoes the last step of the covered parameters, after which nothing is finite any more."""
        for group in optimizer.param_groups:
            for p in group["params"]:
                if "momentum_buffer" in optimizer.state[p]:
                    p.sub_(optimizer.state[p]["momentum_buffer"].to(p.dtype))
        self._reject(optimizer)

    def _reject(self, optimizer: torch.optim.Optimizer) -> None:
        """More damping, and no momentum from a step that was taken back."""
        self._adapt(optimizer.param_groups, -math.inf)
        for group in optimizer.param_groups:
            group["rho"] = None
            for p in group["params"]:
                if "momentum_buffer" in optimizer.state[p]:
                    optimizer.state[p]["momentum_buffer"].zero_()

    def _judge_last_step(
        self, optimizer: torch.optim.Optimizer, curvature: Curvature, now: Occasion, loss: float | None
    ) -> float | None:
        """rho of the last step on this batch, to which it was not fitted; moves the damping now that both are known."""
        first = optimizer.param_groups[0]
        if not first["adaptive_damping"] or first["rho"] is None or loss is None:
            return None
        covered = {p for w, block in curvature.blocks.items() for p in (w, block.bias) if p is not None}
        last = {p: d for p in covered if (d := optimizer.state[p].get("momentum_buffer")) is not None}
        here = {p: p.clone() for p in last}
        move_(last, -1.0)
        decay = {p: g["weight_decay"] for g in optimizer.param_groups for p in g["params"] if p in last}
        change = loss - self._loss(now) + decay_changes(decay, cast(Direction, {p: p for p in last}), last)
        for p, value in here.items():
            p.copy_(value)
        fresh_rho = reduction_ratio(change, first["predicted"], self._resolution(loss, first))
        self._adapt(optimizer.param_groups, first["rho"], fresh_rho)
        for group in optimizer.param_groups:
            group["rho"] = None
        return fresh_rho

    @staticmethod
    def _resolution(loss: float, group: Group) -> float:
        """The rounding error of a loss, summed in the parameters' precision or wider."""
        dtype = group["params"][0].dtype
        return 10 * abs(loss) * torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps

    def _adapt(self, groups: list[Group], rho: float, fresh_rho: float = math.inf) -> None:
        for group in groups:
            if group["adaptive_damping"]:
                group["damping"] = self._adaptation.next_damping(group["damping"], rho, fresh_rho)

    def _calibrate(
        self, optimizer: torch.optim.Optimizer, curvature: Curvature, now: Occasion, fallback: Direction, loss: float
    ) -> None:
        """Finds the damping to start from, and gamma with it, by first steps that are taken back."""
        groups = optimizer.param_groups
        group_of = {p: group for group in groups for p in group["params"]}

        def reduction_at(damping: float) -> tuple[float, float]:
            for group in groups:
                group["damping"] = damping
                group["gamma"] = math.sqrt(damping + group["weight_decay"] / self._loss_scale)
            curvature.update_inverses(optimizer.state, group_of.__getitem__, all_of_them=True)
            arguments = assembly.assemble(optimizer, now.parameters, curvature.blocks, now.unscale, now.finite)
            proposal = self.propose(optimizer, arguments, fallback, now)
            before = {p: p.clone() for p in proposal.delta}
            move_(proposal.delta)
            reduction = self._loss(now) + decay_changes(proposal.decay, before, proposal.delta) - loss
            for p, value in before.items():
                p.copy_(value)
            return reduction, reduction_ratio(reduction, float(proposal.predicted))

        damping = self._adaptation.calibrated(groups[0]["damping"], reduction_at)
        for group in groups:
            group["damping"] = damping
            group["gamma"] = math.sqrt(damping + group["weight_decay"] / self._loss_scale)

    def _search(
        self,
        optimizer: torch.optim.Optimizer,
        curvature: Curvature,
        now: Occasion,
        fallback: Direction,
        group_of: dict[nn.Parameter, Group],
    ) -> Proposal:
        """The best of the proposals for three gammas; its gamma and inverses stay."""
        state, groups = optimizer.state, optimizer.param_groups
        found: list[tuple[float, float, Proposal, dict[nn.Parameter, dict[str, Tensor]]]] = []
        for gamma in dict.fromkeys(self._adaptation.gammas(groups[0]["gamma"], groups[0]["weight_decay"])):
            for group in groups:
                group["gamma"] = gamma
            curvature.update_inverses(state, group_of.__getitem__, all_of_them=True)
            arguments = assembly.assemble(optimizer, now.parameters, curvature.blocks, now.unscale, now.finite)
            proposal = self.propose(optimizer, arguments, fallback, now)
            inverses = {w: curvature.inverses(state[w]) for w in curvature.blocks}
            found.append((_ordered(proposal.predicted), gamma, proposal, inverses))
        _, gamma, proposal, inverses = min(found, key=lambda candidate: candidate[0])
        for group in groups:
            group["gamma"] = gamma
        for w, own in inverses.items():
            state[w].update(own)
        return proposal

    def _loss(self, now: Occasion) -> float:
        assert now.closure is not None
        assert now.streams is not None
        return loss_again(now.closure, self._module, now.parameters, now.streams)

    def _check_scale(self, now: Occasion, loss: float) -> None:
        """Compares the second difference of the loss under shifted outputs z + e u with that of the likelihood.

        With loss = c mean nll it is c e^2 sum u^T H u / L, H the Fisher of the outputs: their Hessian, since the
        likelihoods are exponential families in z. The network has no part in it, nor have penalties on parameters.

        Raises:
            ValueError: c is not loss_scale; the message names it.
        """
        likely = self._likely_scale(now, loss)
        if likely is not None and not 1 / SCALE_LIMIT < likely / self._loss_scale < SCALE_LIMIT:
            raise ValueError(
                f"loss_scale={self._loss_scale:g} does not fit the loss, which curves {likely / self._loss_scale:.3g} "
                "times as much as loss_scale * mean nll over loss terms: the step would be wrong by that factor. "
                f"Likely loss_scale={likely:.3g} (a sum over L terms: L; MSELoss on (N, C): 2/C; BCEWithLogitsLoss on "
                "(N, C): 1/C); or the likelihood is not the loss's"
            )

    def _likely_scale(self, now: Occasion, loss: float) -> float | None:
        """c, where loss = c mean nll over loss terms; None where the outputs are out of reach."""
        step, curved, terms, reached = SHIFT, 0.0, 0.0, True

        def shifted(inputs: Inputs, returned: Any) -> Any:
            nonlocal curved, terms, reached
            z = tensor_of_outputs(returned, self._products.output)
            generator = torch.Generator(z.device).manual_seed(self._seed)
            u = torch.randn(z.shape, dtype=z.dtype, device=z.device, generator=generator)
            found, count = self._products.output_gram(inputs, z.detach(), u.unsqueeze(0))
            curved, terms = curved + float(found), terms + float(count)
            changed = replaced(returned, z, z + step * u)
            reached = changed is not None
            return returned if changed is None else changed

        while abs(step) < MOST_SHIFT:
            curved, terms = 0.0, 0.0
            with changed_outputs(self._module, shifted):
                ahead = self._loss(now)
                step = -step
                behind = self._loss(now)
                step = -step
            if not reached or terms == 0 or curved == 0:
                return None
            difference = ahead + behind - 2 * loss
            if abs(difference) > VISIBLE * abs(loss):
                return difference / (step**2 * curved / terms)
            step *= 10
        return None

    def propose(
        self,
        optimizer: torch.optim.Optimizer,
        arguments: Arguments,
        fallback: Direction,
        now: Occasion,
    ) -> Proposal:
        """The step that the model of the kept inputs asks for, with the inverses as they are."""
        plan, hyper, blocks, tensors = arguments
        group_of = {p: group for group in optimizer.param_groups for p in group["params"]}
        first = optimizer.param_groups[0]
        longest = max(float(group["lr"]) for group in optimizer.param_groups)
        gradient, natural = _gradient_and_natural(*update.precondition(plan, hyper, blocks), plan, blocks)
        for p, grad in zip(tensors.parameters, tensors.grads, strict=True):
            gradient[cast(nn.Parameter, p)] = grad * hyper.unscale.to(grad)
        if longest:  # an adaptive alpha would undo a factor that all share
            for own, v in natural.items():
                v *= float(group_of[own]["lr"]) / longest
        last: Direction = {}
        if first["adaptive_momentum"] or first["momentum"] != 0:
            last = {p: optimizer.state[p]["momentum_buffer"] for p in natural}
        directions = [natural, last, fallback]
        fixed = [
            None if first["adaptive_lr"] else longest,
            None if first["adaptive_momentum"] else float(first["momentum"]),
            1.0,
        ]
        strength = {p: self._loss_scale * group_of[p]["damping"] + group_of[p]["weight_decay"] for p in natural}
        F = self._fisher(directions, now, first["step"])
        H = F + _gram(directions, strength)
        b = torch.stack([_inner(gradient, v, F) for v in directions])
        w, _ = minimise(H, b, fixed)
        if first["adaptive_lr"] and longest != 1.0:
            w[0] *= longest
        decay = {p: group_of[p]["weight_decay"] for p in natural if group_of[p]["weight_decay"]}
        if now.loss is not None:
            height = number(now.loss) + float(sum(eta * _dot(p, p) for p, eta in decay.items())) / 2
            w = within(w, H, b, height) if height > 0 else w
        return Proposal(_combined(directions, w), w, w @ H @ w / 2 + b @ w, decay)

    def _fisher(self, directions: list[Direction], now: Occasion, step: int) -> Tensor:
        """scale v_i^T F v_j, with zeros for directions that are empty."""
        present = [i for i, v in enumerate(directions) if v]
        seed = self._seed if now.streams is None else now.streams
        found = self._products.gram(now.kept, [directions[i] for i in present], seed, step)
        distributed.average_([found])
        F = found.new_zeros(len(directions), len(directions))
        index = torch.tensor(present, device=F.device)
        F[index.unsqueeze(1), index] = found
        return self._loss_scale * F


def replaced(returned: Any, z: Tensor, new: Tensor) -> Any | None:
    """What the model returned with `new` in the place of z; None where z does not stand in it."""
    if returned is z:
        return new
    if getattr(returned, "logits", None) is z:
        changed = copy.copy(returned)
        changed.logits = new
        return changed
    leaves, structure = tree_flatten(returned)
    if not any(leaf is z for leaf in leaves):
        return None
    return tree_unflatten([new if leaf is z else leaf for leaf in leaves], structure)


def fallback_direction(arguments: Arguments) -> Direction:
    """How AdamW moves the parameters without a block, which stay where they are; its averages move on."""
    plan, hyper, _, fallback = arguments
    moved: Direction = {}
    for i, (p, group) in enumerate(zip(fallback.parameters, plan.fallback_groups, strict=True)):
        before = p.clone()
        update.adamw_(plan, hyper, group, fallback, i)
        moved[cast(nn.Parameter, p)] = p - before
        p.copy_(before)
    return moved


def decay_changes(decay: dict[nn.Parameter, float], before: Direction, delta: Direction) -> float:
    """By how much eta |w|^2 / 2 changes from `before` along delta, over the parameters of `decay`."""
    changes = [eta * (_dot(before[p], delta[p]) + _dot(delta[p], delta[p]) / 2) for p, eta in decay.items() if eta]
    return float(torch.stack(changes).sum()) if changes else 0.0


def _ordered(predicted: Tensor) -> float:
    value = float(predicted)
    return value if math.isfinite(value) else math.inf


def _gradient_and_natural(
    grads: list[Tensor], V: list[Tensor], plan: update.Plan, blocks: update.Blocks
) -> tuple[Direction, Direction]:
    """grad + weight_decay W, and -V, by parameter."""
    gradient: Direction = {}
    natural: Direction = {}
    for i, layer in enumerate(plan.layers):
        for into, matrix, sign in ((gradient, grads[i], 1.0), (natural, V[i], -1.0)):
            weight, bias = layer.layout.split(matrix, blocks.weights[i].shape)
            into[cast(nn.Parameter, blocks.weights[i])] = weight * sign
            if bias is not None and layer.bias_has_grad:
                into[cast(nn.Parameter, blocks.biases[i])] = bias * sign
    return gradient, natural


def _gram(directions: list[Direction], strength: dict[nn.Parameter, float]) -> Tensor:
    """D_ij = sum over the parameters in `strength` of strength <v_i, v_j>."""
    k = len(directions)
    everywhere = {p for v in directions for p in v}
    D = torch.zeros(k, k, dtype=torch.float64, device=next(iter(everywhere)).device)
    for i in range(k):
        for j in range(i + 1):
            u, v = directions[i], directions[j]
            weighted = [eta * _dot(u[p], v[p]) for p, eta in strength.items() if p in u and p in v]
            if weighted:
                D[i, j] = D[j, i] = torch.stack(weighted).sum()
    return D


def _inner(u: Direction, v: Direction, like: Tensor) -> Tensor:
    products = [_dot(u[p], v[p]) for p in u if p in v]
    return torch.stack(products).sum() if products else like.new_zeros(())


def _dot(u: Tensor, v: Tensor) -> Tensor:
    """<u, v>, summed in float32 or wider, as float64."""
    wide = torch.float64 if u.dtype == torch.float64 else torch.float32
    return torch.dot(u.flatten().to(wide), v.flatten().to(wide)).double()


def _combined(directions: list[Direction], w: Tensor) -> Direction:
    total: Direction = {}
    for coefficient, direction in zip(w, directions, strict=True):
        for p, v in direction.items():
            part = v * coefficient.to(v.dtype)
            total[p] = total[p].add_(part) if p in total else part
    return total


def move_(delta: Direction, scale: float = 1.0) -> None:
    """parameter <- parameter + scale * delta."""
    for p, d in delta.items():
        p.add_(d.to(p.dtype), alpha=scale)


def loss_again(
    closure: Callable[[], Any], module: nn.Module, parameters: list[nn.Parameter], streams: Streams
) -> float:
    """The loss where the parameters are now, with the random numbers of `streams`.

    Gradients, buffers, the random streams and what was kept for the factors are as before afterwards.
    """
    grads = [p.grad for p in parameters]
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        for p in parameters:
            p.grad = None
        with own_pass(parameters[0].device), torch.enable_grad():
            streams.restore(parameters[0].device)
            loss = number(closure())
    finally:
        for p, grad in zip(parameters, grads, strict=True):
            p.grad = grad
        for buffer, before in buffers:
            buffer.copy_(before)
    mean = torch.tensor(loss, dtype=torch.float64, device=parameters[0].device)
    distributed.average_([mean])
    return float(mean)


def number(loss: Any) -> float:
    """The loss that a closure returned.

    Raises:
        TypeError: it is no number.
    """
    if isinstance(loss, (int, float)) or (isinstance(loss, Tensor) and loss.numel() == 1):
        return float(loss.detach() if isinstance(loss, Tensor) else loss)
    raise TypeError(f"the closure must return the loss, a 0-d tensor or a number; got {type(loss).__name__}")
