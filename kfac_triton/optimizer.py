"""KFAC: the optimizer. Groups, state, intervals, the step, checkpoints."""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from kfac_triton import arguments, assembly, checkpoint, groups, schedules, tuned, validation
from kfac_triton.adaptive import AdaptiveStep
from kfac_triton.approximations import average, eigen, inverse_free, kronecker, tridiagonal
from kfac_triton.approximations import temporal as temporal_state
from kfac_triton.blocks.custom import LayerBlock
from kfac_triton.capture import Call
from kfac_triton.compiled import CompiledStep
from kfac_triton.curvature import Curvature
from kfac_triton.damping import factored_damping
from kfac_triton.distributed import Ranks
from kfac_triton.likelihoods import Likelihood
from kfac_triton.membership import Members
from kfac_triton.objective import Objective
from kfac_triton.proposal import Occasion
from kfac_triton.schedules import Schedule
from kfac_triton.step_plan import Gradients

log = logging.getLogger("kfac_triton")


class KFAC(torch.optim.Optimizer):
    """Natural gradient with Kronecker-factored curvature (Martens & Grosse 2015).

    For every weight W (d_out, d_in[+1], the bias as last column) the Fisher of the mean nll over loss terms is held as
    G (x) A, running averages of the second moments of the layer's output gradients and inputs, and the step is

        V = (G + gamma / pi I)^-1 grad (A + pi gamma I)^-1,   gamma = sqrt(damping)
        buf <- momentum buf + nu V,   W <- W - tau lr buf,   nu and tau at most 1, from kl_clip

    The factors come from a pass of K-FAC's own inside `step()`, over a part of the inputs that the model saw since the
    last step; the loss, its graph, `.grad`, BatchNorm's statistics and the random streams are left alone.

    Args:
        model: the network, or what torch.compile or DistributedDataParallel made of one.
        params: parameters or groups, as for torch.optim; by default all that require grad.
        lr: step length on V. A number or a 0-d tensor; V has the units of the parameters, so 1 is a full Newton step.
            "adaptive": from the quadratic model with exact Fisher products (Martens & Grosse 2015, section 6.4); the
            group's lr, 1 by default, multiplies it. A `kfac_triton.schedules.Schedule` sets the group's lr each step.
        momentum: of the preconditioned steps; "adaptive": from the same model (section 7); beyond the paper it
            is at most 1 in size, which batches of a few examples need.
        damping: added to eigenvalues of the Fisher of the mean nll, so it has that scale; or a `Schedule` of it.
            "adaptive": by the ratio of actual to predicted reduction every 5 steps, and a gamma of its own for the
            factors, searched for every 20 steps (sections 6.5 and 6.6); beyond the paper, the ratio on the next batch
            has a veto, without which small batches diverge. `step` then needs a closure.
        initial_damping: where an adaptive damping starts (the paper: 150). None: the first step is tried and taken back
            at smaller or larger dampings; the start is a sixteenth of what gained most.
        weight_decay: l2 coefficient; it enters the gradient before preconditioning.
        likelihood: of the model's outputs: "categorical", "bernoulli", "gaussian" or a `Likelihood`. Not needed for
            fisher="empirical".
        loss_scale: your loss = loss_scale * mean nll over loss terms; for MSELoss on (N, C) with "gaussian" it is 2/C,
            for BCEWithLogitsLoss on (N, C) 1/C, for a sum over L terms L. The objective, loss + weight_decay |w|^2 / 2,
            is divided by it before preconditioning, so that lr, damping and kl_clip have the scale of the mean nll
            whatever the reduction. AdamW, for parameters without a block, takes the gradient as it is.
        output: from what the model returned to the tensor of outputs; default: the tensor itself, or its `.logits`.
        mask: (inputs, outputs) -> bool tensor of the loss terms that count, shape of the outputs less the likelihood's
            axis. `inputs` is the model's only argument, the tuple of several, or the dictionary of keyword arguments.
        fisher: "mc": targets sampled from the model. "exact": every output direction (the generalised Gauss-Newton
            matrix). "empirical": the gradients of your own loss, from modules of type Linear and Conv1d to Conv3d.
        fisher_pass: how "mc" and "exact" compute their gradients. "replay": K-FAC runs the model again on a part of the
            kept inputs. "piggyback": uses of weights are recorded in your own forward pass, and the gradients go back
            through your own graph, for the whole batch. "auto": replay, and piggyback where a program calls parts of
            the model one after the other, which no replay can repeat. Compiled code can only be replayed.
        approximation: "kronecker", block-diagonal. "tridiagonal": neighbours in a chain of linear layers are coupled
            (section 4.3); more memory and time in `kfac_triton.chain`. "eigen": block-diagonal, with the eigenvalues
            measured in the factors' eigenbases (EKFAC), damped as the factors are; dearer refreshes and steps, in
            `kfac_triton.approximations.eigen`. "inverse_free": roots of the inverses that follow the statistics by
            products alone, in bfloat16 under bfloat16 parameters, in `kfac_triton.approximations.inverse_free`.
        weight_sharing: "expand": a row for every position of a shared weight. "reduce": one for every example. By
            layer: {pattern of the layers' names, as in `factors()`: one of both}, "expand" for what none fits.
        temporal: of the weights of RNN, LSTM and GRU. "independent": gradients at different times are uncorrelated.
            "chain_symmetric", "chain": each depends on the one before (Martens, Ba & Johnson 2018, options 1 and 2);
            cost in `kfac_triton.approximations.temporal`.
        spatial: of convolutions. "correlated": second moments of whole patches. "uncorrelated": of single pixels, and
            different places of a patch share their means alone (Grosse & Martens 2016); cheaper for wide kernels.
        norm: the block of a norm's scale and shift: "full", or its "diagonal".
        blocks: {type of module: LayerBlock} for layers of your own that no known function stands for.
        factor_decay: beta of the running averages, min(1 - 1/k, factor_decay) at the k-th update.
        factor_interval, inverse_interval: steps between refreshes. In its first interval the inverse is refreshed at
            steps 1, 2, 4, 8, ... too.
        factor_fraction: the share of the batch (its first axis) for the statistics, never below min(N, 64) examples; of
            sequences, never below as many as have 512 loss terms, nor below 8. In the k-th update at least 1/k. Whole
            batches, after one warning, where a part would be something else (the rule is in `kfac_triton.parts`).
        quadratic_fraction: the share of the batch for the adaptive modes' products with the exact Fisher. Less than all
            makes cheaper and less certain steps.
        max_factor_dim: a wider side of a weight gets up to four blocks of that width, and a wider one yet a diagonal.
        kl_clip: bound on the KL divergence (nats of the mean nll) of every step, momentum included: V is scaled down to
            lr^2 sum <V, grad> / 2 <= kl_clip (Wu et al. 2017, section 3) before it enters the momentum, and a step with
            momentum to the same bound (`kfac_triton.trust_region`). None: no bound, for which damping must be tuned
            first, and a huge gradient makes a huge step; one with entries beyond 2^64 counts as one of that size. By
            default 1e-3, and None with lr="adaptive", which takes no bound.
        kl_annealing: the largest lr so far stands in the bound for lr, so that a schedule of lr shortens the steps that
            the bound holds as it does the others. Without it such a step is as long at a small lr as at a large one.
        fallback_lr: AdamW's learning rate for parameters without a block, at this lr: it follows lr's scheduler.
            Default lr / 10, and 1e-3 with lr="adaptive".
        precision: of the products V = G_inv grad A_inv: "ieee", or "bf16", operands rounded and sums in float32, which
            some CPUs do faster. "auto": "ieee"; with damping="adaptive", on a CPU with such instructions, "bf16" from
            one search for gamma to the next, where that keeps 95 % of what the quadratic model promises.
        seed: of the sampled targets.
        check_loss_scale: adaptive modes with one of the three likelihoods by name compare loss_scale with the loss in
            the first step that has a closure, and refuse one that is wrong. False: they take it as it is.
        compile: compile the step. Without a C++ compiler: one warning, then eager.
        tuned_for: from `load_tuned`: what the other arguments were tuned for. Another model or device: a warning.
        process_group: the `ProcessGroup` whose ranks share factors. Default: that of the model's
            DistributedDataParallel, now or when it first calls the model; without one the factors are this process's.

    Raises:
        TypeError: `model` is no module.
        NotImplementedError: its parameters are sharded.
        ValueError: an argument is out of its range; the message says which and what is allowed.
    """

    _step_supports_amp_scaling = True
    _curvature: Curvature | None = None
    _module: nn.Module | None = None
    _ranks: Ranks | None = None
    _names: tuple[str | None, ...] = ()
    _loaded: dict[str, Any] | None = None
    _uncounted: Tensor | None = None
    _adaptive: AdaptiveStep | None = None
    _last: dict[str, Any] | None = None
    _forward_only = True
    _unseen = False
    _scaled = False  # whether the last step had a GradScaler
    _skipped = 0

    def __init__(
        self,
        model: nn.Module,
        params: ParamsT | None = None,
        *,
        lr: float | Tensor | Schedule | str = 1e-2,
        momentum: float | str = 0.9,
        damping: float | Schedule | str = 1e-3,
        initial_damping: float | None = None,
        weight_decay: float = 0.0,
        likelihood: str | Likelihood | None = None,
        loss_scale: float = 1.0,
        output: Callable[[Any], Tensor] | None = None,
        mask: Callable[[Any, Tensor], Tensor] | None = None,
        fisher: str = "mc",
        fisher_pass: str = "auto",
        approximation: str = "kronecker",
        weight_sharing: str | Mapping[str, str] = "expand",
        temporal: str = "independent",
        spatial: str = "correlated",
        norm: str = "full",
        blocks: Mapping[type[nn.Module], LayerBlock] | None = None,
        factor_decay: float = 0.95,
        factor_interval: int = 1,
        inverse_interval: int = 10,
        factor_fraction: float = 0.125,
        quadratic_fraction: float = 1.0,
        max_factor_dim: int = 8192,
        kl_clip: float | str | None = "default",
        kl_annealing: bool = False,
        fallback_lr: float | None = None,
        precision: str = "auto",
        seed: int = 0,
        check_loss_scale: bool = True,
        compile: bool = True,
        tuned_for: Mapping[str, Any] | None = None,
        process_group: Any = None,
    ) -> None:
        ranks = Ranks(arguments.checked_model(model), process_group)
        self._needs_group = process_group is not None
        self._watch = groups.Watch()
        self._settings = arguments.settings(
            likelihood,
            loss_scale=loss_scale,
            output=output,
            mask=mask,
            fisher=fisher,
            fisher_pass=fisher_pass,
            approximation=approximation,
            weight_sharing=weight_sharing,
            temporal=temporal,
            spatial=spatial,
            norm=norm,
            blocks=dict(blocks) if isinstance(blocks, Mapping) else ({} if blocks is None else blocks),
            factor_fraction=factor_fraction,
            quadratic_fraction=quadratic_fraction,
            max_factor_dim=max_factor_dim,
            precision=precision,
            seed=seed,
            check_loss_scale=check_loss_scale,
            compile=compile,
        )
        defaults = {
            **arguments.adaptive_groups(
                lr,
                momentum,
                damping,
                initial_damping=initial_damping,
                kl_clip=kl_clip,
                likelihood=likelihood,
                approximation=approximation,
            ),
            "weight_decay": weight_decay,
            "kl_annealing": kl_annealing,
            "factor_decay": factor_decay,
            "factor_interval": factor_interval,
            "inverse_interval": inverse_interval,
            **arguments.COUNTERS,
        }
        schedules.take_out(defaults)
        groups.check(defaults)
        if defaults["adaptive_damping"]:
            defaults["gamma"] = math.sqrt(defaults["damping"] + weight_decay / loss_scale)
            defaults["bf16"] = False
        if defaults["adaptive_lr"] and fallback_lr is None:
            fallback_lr = arguments.DEFAULT_FALLBACK_LR
        defaults["fallback_ratio"] = arguments.fallback_ratio(fallback_lr, schedules.peak(defaults, "lr"))
        self._module = arguments.unwrapped(model)
        if tuned_for is not None:
            tuned.compare(tuned_for, self._module)
        if params is None:
            params = [p for p in self._module.parameters() if p.requires_grad]
        super().__init__(params, defaults)
        self._attach(self._module, ranks)

    @classmethod
    def paper(cls, model: nn.Module, params: ParamsT | None = None, **options: Any) -> KFAC:
        """The algorithm with the constants of Martens & Grosse (2015), and no learning rate to choose.

        Adaptive step length, momentum and damping; factors from a sampled target for an eighth of the batch, inverses
        every 20 steps, products with the exact Fisher on a quarter, l2 of 1e-5. The damping starts from what the first
        step finds, not from the 150 of the authors' autoencoders: `initial_damping=150.0` says so.

        Args:
            model, params: as for `KFAC`.
            options: `likelihood`, `loss_scale` and whatever else is to differ, by the names of `KFAC`.
        """
        constants = {
            "lr": "adaptive", "momentum": "adaptive", "damping": "adaptive", "weight_decay": 1e-5, "fisher": "mc",
            "factor_decay": 0.95, "factor_interval": 1, "factor_fraction": 0.125, "inverse_interval": 20,
            "quadratic_fraction": 0.25,
        }  # fmt: skip
        return cls(model, params, **{**constants, **options})

    def _attach(self, module: nn.Module, ranks: Ranks) -> None:
        self._module, self._ranks = module, ranks
        self._step_function = CompiledStep(self._settings.compile)
        self._members = Members(module, self._listed())
        itself = weakref.ref(self)  # the model's hooks must not keep the optimizer alive

        def due() -> int | None:
            optimizer = itself()
            return None if optimizer is None else optimizer._next_update()

        def follow() -> None:
            optimizer = itself()
            if optimizer is not None:
                with suppress(ValueError, NotImplementedError):  # step() raises it, not the user's pass
                    optimizer._attached()

        self._curvature = Curvature(module, self._settings, self._members.present, ranks, due, follow)
        self._curvature.record_passes(any(group["piggyback"] for group in self.param_groups))
        state = self._curvature.module_state
        parts = self._curvature.parts
        self._adaptive = None if self._settings.likelihood is None else AdaptiveStep(state, self._settings, parts)
        self._hooks = weakref.finalize(self, self._curvature.close)
        self._names = tuple(self._members.names.get(p) for p in self._listed())

    def attach(self, model: nn.Module, process_group: Any = None) -> None:
        """Binds a copied or unpickled optimizer to `model`, by the names of its parameters.

        Args:
            process_group: as for `KFAC`; a copy doesn't know the group that its original was given.

        Raises:
            ValueError: the model lacks one of the parameters, or has it in another shape, or the state is another's.
        """
        module = arguments.unwrapped(arguments.checked_model(model))
        if process_group is None and self._needs_group:
            if self._ranks is None:
                raise ValueError("the original was given a process_group; pass attach(model, process_group=...)")
            process_group = self._ranks.named
        ranks = Ranks(model, process_group)
        new = checkpoint.by_name(self._listed(), self._names, module)
        entries = [
            (name or f"parameter {i}", new.get(p, p), self.state.get(p, {}))
            for i, (p, name) in enumerate(zip(self._listed(), self._names, strict=True))
        ]
        validation.check_entries(entries, self._settings, module)
        self.close()
        checkpoint.rebind(self, new)
        self._attach(module, ranks)
        assert self._curvature is not None
        self._curvature.restore(self.state)

    def close(self) -> None:
        """Remove every hook from the model. The optimizer can't step again until `attach`."""
        if self._curvature is not None:
            self._hooks()
        self._curvature = None
        self._module = None

    def __enter__(self) -> KFAC:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _attached(self) -> Curvature:
        if self._curvature is None:
            raise RuntimeError(
                "this KFAC has no model: it was closed, copied or unpickled, which leaves the hooks behind. "
                "Call optimizer.attach(model)"
            )
        self._follow(self._curvature)
        return self._curvature

    def _listed(self) -> list[nn.Parameter]:
        """The parameters of all groups."""
        return [p for group in self.param_groups for p in group["params"]]

    def _parameters(self) -> list[nn.Parameter]:
        """Those that belong to the model."""
        return self._members.present

    def _follow(self, curvature: Curvature) -> None:
        """Takes in what the user changed in groups and model since the last call.

        Raises:
            ValueError: a new parameter is none of the model's.
        """
        before, module = self._members, curvature.module
        if before.current(self._listed()):
            return
        arguments.check_whole(module)
        replaced = before.replaced()
        if replaced:
            checkpoint.rebind(self, replaced)
            names = ", ".join(before.names[p] for p in replaced)
            log.warning("the model has new parameters in the place of %s; the optimizer goes on with those", names)
        members = Members(module, self._listed())
        known = {*before.listed, *replaced.values()}
        arguments.check_parameters([p for p in members.listed if p in members.names or p not in known], module)
        gone = [before.names[p] for p in members.listed if p in before.names and p not in members.names]
        if gone:
            log.info("no longer in the model, so the optimizer drops its state of them: %s", ", ".join(gone))
        self._members, self._names = members, tuple(members.names.get(p) for p in members.listed)
        curvature.extend(members.present, self.state, replaced, before.reshaped())
        checkpoint.follow(self, members.present)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch.optim; the new parameters must belong to the model."""
        if "kl_clip" in param_group and param_group["kl_clip"] is None:
            param_group["kl_clip"] = math.inf
        groups.check_names(param_group)
        schedules.take_out(param_group)
        if "fallback_lr" in param_group:
            lr = schedules.peak(param_group if "lr" in param_group else self.defaults, "lr")
            param_group["fallback_ratio"] = arguments.fallback_ratio(param_group.pop("fallback_lr"), lr)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            groups.check(group)
            if self._names:
                self._attached()
            elif self._module is not None:  # under construction
                arguments.check_parameters(self._listed(), self._module)
        except Exception:
            self.param_groups.pop()
            raise

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch.optim; inputs kept for a step that never came are forgotten too."""
        super().zero_grad(set_to_none)
        if self._curvature is not None:
            self._curvature.forget()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step, after running `closure` (zero_grad, loss, backward; returns the loss) where one is given.

        Adaptive modes call it again, some times in the first step and twice in every five, with `backward` doing
        nothing unless the closure cannot do without: gradients, buffers and random streams are afterwards as the first
        call left them.

        Raises:
            RuntimeError: there are gradients, but the model was not called; or the optimizer has no model; or
                damping="adaptive" got no closure, or one that does not run the model again; or an adaptive mode's
                gradients are also those of passes outside the closure.
            TypeError: an adaptive mode got a closure that returns no loss.
            ValueError: loss_scale is not the loss's.
        """
        curvature = self._attached()
        self._count_skipped()
        for group in self.param_groups:
            schedules.apply(group)
        self._watch.check(self.param_groups, self.defaults)
        for group in self.param_groups:
            if group["kl_annealing"]:
                group["peak_lr"] = schedules.larger(group["peak_lr"], group["lr"])
        adaptive = self._is_adaptive()
        if closure is None and self.param_groups[0]["adaptive_damping"] and not self._all_zero(self._parameters()):
            raise RuntimeError(
                'damping="adaptive" asks for the loss again after the step: pass a closure, '
                "optimizer.step(closure), that clears the gradients, computes the loss, calls backward and returns it"
            )
        loss, objective, earlier = None, None, curvature.passes.pending()
        if closure is not None:
            with torch.enable_grad():
                if adaptive:
                    objective = Objective(
                        closure, curvature.module_state, self._parameters(), curvature.ranks, self._forward_only
                    )
                    loss = objective.call()
                else:
                    loss = closure()
        parameters = [p for p in self._parameters() if p.grad is not None]
        if any(p.grad is not None and p.grad.is_sparse for p in parameters):
            raise ValueError("KFAC takes no sparse gradients; build the embedding with sparse=False")
        kept = curvature.passes.take()
        curvature.ranks.note(curvature.passes.wrapper, curvature.module)
        if objective is not None:
            _check_passes(earlier, kept)
        gradients = self._scaler_state(parameters)
        unscale, finite, _ = gradients
        if not parameters:
            curvature.forget()
            return loss
        if (adaptive or finite.device.type == "cpu") and not bool(finite):
            self._skip(curvature, objective)
            return loss
        groups = {id(p): group for group in self.param_groups for p in group["params"]}

        def group_of(p: nn.Parameter) -> dict[str, Any]:
            return groups[id(p)]

        look = not kept or finite.device.type == "cpu"  # on a GPU a look waits for it
        zero = look and self._all_zero(parameters)
        if zero and not (kept and curvature.blocks):
            curvature.forget()
            if not kept and not self.state:
                checkpoint.prepare(self, curvature, parameters)
            return loss
        if objective is not None and not math.isfinite(objective.first):
            self._skip(curvature, objective)
            return loss
        if not kept and not curvature.scripted:
            self._check_known(curvature, adaptive)
        trained = [p for p in parameters if p.requires_grad]
        due = any(group["step"] % group["factor_interval"] == 0 for group in map(group_of, trained))
        if (kept or curvature.scripted) and due and not (zero or curvature.passes.incomplete):
            if self._scaled and getattr(self, "grad_scale", None) is None:
                curvature.trust_loss_scale()  # unscaled before, by a scale that is gone
            curvature.update_factors(kept, self.state, trained, group_of, unscale)
        curvature.forget()
        for group in self.param_groups:
            group["piggyback"] = curvature.records_passes
        if adaptive:
            assert self._adaptive is not None
            self._check_repeatable(kept)
            occasion = Occasion(parameters, [call.inputs for call in kept], gradients, objective)
            self._last = self._adaptive.step(self, curvature, occasion)
            self._forward_only = objective is None or objective.forward_only
            curvature.passes.reset()  # compiled code cannot tell that K-FAC called the closure
            return loss
        curvature.update_inverses(self.state, group_of)
        known = self._settings.precision, self._settings.loss_scale
        self._step_function(*assembly.assemble(self, parameters, curvature.blocks, gradients, *known))
        for group in self.param_groups:
            group["step"] += 1
        self._uncounted = None if finite.device.type == "cpu" else finite
        return loss

    def _skip(self, curvature: Curvature, objective: Objective | None) -> None:
        """No step, since a gradient or the loss is not finite; the last step is taken back where it led there."""
        curvature.forget()
        if objective is not None and self.param_groups[0]["adaptive_damping"]:
            assert self._adaptive is not None
            self._adaptive.take_back(self, objective)
            self._forward_only = objective.forward_only
        self._note_skipped()

    def _note_skipped(self) -> None:
        """Counts a skipped step, and warns of the first; a GradScaler skips steps to find its scale."""
        if self._skipped == 0 and not self._scaled:
            log.warning(
                "a gradient or the loss is not finite, so this step is skipped. Later ones are skipped in silence; "
                'optimizer.diagnostics()["skipped"] counts them'
            )
        self._skipped += 1

    def _is_adaptive(self) -> bool:
        first = self.param_groups[0]
        return bool(first["adaptive_lr"] or first["adaptive_momentum"] or first["adaptive_damping"])

    def _count_skipped(self) -> None:
        """Takes back the count of a step that the device skipped, when its answer no longer has to be waited for."""
        if self._uncounted is not None and not bool(self._uncounted):
            for group in self.param_groups:
                group["step"] -= 1
            self._note_skipped()
        self._uncounted = None

    def state_dict(self) -> dict[str, Any]:
        """As torch.optim."""
        self._count_skipped()
        if self._curvature is not None:
            self._follow(self._curvature)
        return super().state_dict()

    def _scaler_state(self, parameters: list[nn.Parameter]) -> Gradients:
        """What a GradScaler did to the gradients, whether every one is finite, and how large."""
        grads = [p.grad for p in parameters if p.grad is not None and p.grad.numel()]
        device = parameters[0].device if parameters else torch.device("cpu")
        finite, largest = torch.ones((), dtype=torch.bool, device=device), torch.zeros((), device=device)
        if grads:
            wide = torch.float64 if any(g.dtype == torch.float64 for g in grads) else torch.float32
            norms = torch.stack(torch._foreach_norm(grads, 2, dtype=wide))
            # A sum of squares may overflow where no gradient does; the largest entry is dear on a CPU, which asks first
            if device.type != "cpu" or not bool(torch.isfinite(norms).all()):
                entries = torch.stack(torch._foreach_norm(grads, math.inf, dtype=wide))
                norms = torch.where(torch.isfinite(norms), norms, entries)
            finite, largest = torch.isfinite(norms).all(), norms.max()
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        self._scaled = found_inf is not None
        if found_inf is not None:
            if scale is None and self._settings.fisher == "empirical":
                raise RuntimeError(
                    'fisher="empirical" cannot learn the GradScaler\'s scale after scaler.unscale_(optimizer); '
                    'leave that call out, or use fisher="mc", which does not depend on it'
                )
            finite = finite & (found_inf.to(device) == 0)
        unscale = torch.ones((), dtype=torch.float64, device=device)
        if scale is not None:
            unscale = unscale / scale.to(device)
        return Gradients(unscale, finite, largest)

    @staticmethod
    def _all_zero(parameters: list[nn.Parameter]) -> bool:
        """Whether there are gradients and all are zero, as torch.distributed.checkpoint makes them."""
        grads = [p.grad for p in parameters if p.grad is not None]
        return bool(grads) and not any(bool(grad.any()) for grad in grads)

    def _check_repeatable(self, kept: list[Call]) -> None:
        for call in kept:
            call.check_unwritten()
            if call.ancestors:
                raise RuntimeError(
                    "an adaptive lr, momentum or damping needs a loss of one call, model(inputs), but parts of the "
                    "model are called one after the other. Call them in the forward method of one module, or give lr, "
                    "momentum and damping as numbers"
                )

    def _next_update(self) -> int | None:
        """The number of the factor update that the next step makes, if it makes one."""
        due = [g["step"] for g in self.param_groups if g["step"] % g["factor_interval"] == 0]
        return max(due, default=None)

    def _check_known(self, curvature: Curvature, adaptive: bool) -> None:
        """Raises where no call was seen and there are no factors to use instead."""
        if adaptive or not curvature.blocks:
            raise RuntimeError(
                f"there are gradients, but K-FAC saw no call of its model, a {type(self._module).__name__}, or of a "
                "part of it. If another copy of the model is trained, pass that one to KFAC. If its weights are used "
                "without calling a module, call the model, or a module that holds them. If torch.func computed the "
                "gradients, call model(inputs) and loss.backward() instead"
            )
        if not self._unseen:
            log.warning(
                "there are gradients, but K-FAC saw no call of its model since the last step; it uses the factors it "
                "has. Gradients from torch.func, or written into .grad, do not update the factors"
            )
        self._unseen = True

    @property
    def settings(self) -> dict[str, Any]:
        """The constructor's arguments that belong to no parameter group."""
        return dict(vars(self._settings))

    @property
    def compile_seconds(self) -> float:
        """Wall time spent so far in steps that compiled a graph."""
        return self._step_function.seconds

    def factors(self) -> dict[str, dict[str, Tensor]]:
        """{name of the weight, less ".weight": {"A": (d_in[+1], d_in[+1]), "G": (d_out, d_out)}}, copies.

        float32, or float64 under a float64 model; the bias is the last row and column of A. torch.kron(G, A) is the
        block of the Fisher of the mean nll, for the weight's rows with the bias as last column. A grouped convolution
        has a leading axis of groups; a diagonal side is its diagonal (d,), one of blocks has zeros between them. Of
        scales and shifts A is the block, for both behind one another, and G (1, 1); of an embedding or a positional
        parameter A is for the rows of the table and G for its columns. With approximation="inverse_free" they are
        worked out from the inverses, which costs two inversions each.
        """
        curvature = self._attached()
        found = {}
        for weight, block in curvature.blocks.items():
            state = self.state[weight]
            if not state["factor_updates"] > 0:
                continue
            if "A" in state:
                A, G = (average.settled(state, name) for name in "AG")
            else:
                damping = factored_damping(self._group_of(weight))
                A, G = (inverse_free.implied(state, name, damping) for name in "AG")
            shapes = kronecker.shapes(block.layout, weight.shape)
            A, G = (kronecker.written_out(F, shape) for F, shape in zip((A, G), shapes, strict=True))
            name = curvature.names[weight].removesuffix(".weight")
            found[name] = {"A": block.layout.in_weight_order(A, weight.shape), "G": G}
        return found

    def _group_of(self, parameter: nn.Parameter) -> dict[str, Any]:
        return next(group for group in self.param_groups if any(p is parameter for p in group["params"]))

    def coverage(self) -> dict[str, str]:
        """{parameter name: block name}, "fallback" where AdamW updates it. Before the first step, what is expected."""
        return self._attached().coverage(self._parameters())

    def memory_usage(self) -> dict[str, int]:
        """Bytes of the state: factors, inverses, momentum, fallback, rows, total. An estimate before the first step.

        "rows" wait for the next product that updates a factor, where a pass brings few; the estimate is their most.
        With fisher="empirical" also "sums", what the taps collect between two steps.
        """
        curvature = self._attached()
        blocks = curvature.known_blocks(self._parameters())
        sizes_of = inverse_free.memory if self._settings.approximation == "inverse_free" else kronecker.memory
        held = [sizes_of(weight, block.layout) for weight, block in blocks.items()]
        if curvature.observed:
            rows = sum(average.memory_held(self.state[weight]) for weight in blocks)
        else:
            own_pass = self._settings.fisher != "empirical" and self._settings.approximation != "inverse_free"
            rows = sum(kronecker.memory_of_rows(weight, block.layout) for weight, block in blocks.items() if own_pass)
        cross, links = 0, 0
        if self._settings.approximation == "eigen":
            links = sum(eigen.memory(weight, block.layout) for weight, block in blocks.items())
        if self._settings.approximation == "tridiagonal":
            cross, links = tridiagonal.memory([(weight, block.layout) for weight, block in blocks.items()])
        if self._settings.temporal != "independent":
            symmetric = self._settings.temporal == "chain_symmetric"
            more = [
                temporal_state.memory(weight, block.layout, symmetric=symmetric) for weight, block in blocks.items()
            ]
            cross, links = (sum(column) for column in zip(*more, strict=True)) if more else (0, 0)
        covered = {*blocks, *(block.bias for block in blocks.values())}
        sizes = {p: p.numel() * p.element_size() for p in self._parameters()}
        moving = [g for g in self.param_groups if g["momentum"] != 0 or g["adaptive_damping"]]
        momentum = {id(p) for g in moving for p in g["params"]}
        usage = {
            "factors": sum(factors for factors, _ in held) + cross,
            "inverses": sum(inverses for _, inverses in held) + links,
            "momentum": sum(size for p, size in sizes.items() if p in covered and id(p) in momentum),
            "fallback": sum(2 * size for p, size in sizes.items() if p not in covered),
            "rows": rows,
        }
        usage |= curvature.memory_of_sums()
        return {**usage, "total": sum(usage.values())}

    def diagnostics(self) -> dict[str, Any]:
        """Numbers of the last step for a logger; empty before the first. They are computed here, when asked for.

        "damping" and "gamma" of the first group in that step, and "factors": {name: {"A": ..., "G": ...}}, each with a
        "trace" and a "condition" (largest over smallest eigenvalue, inf where that is not positive). An adaptive run
        adds "loss" (None without a closure), "predicted_reduction" M(delta), "lr" alpha and "momentum" mu; in every
        fifth step "reduction" and "rho" on its own batch, in the one after it "fresh_rho", the same step's ratio on
        the next batch (None in the others). "predicted_reduction" is None in a step without a model. "skipped" counts
        the steps that this optimizer did not take, since a gradient or the loss was not finite.
        """
        factors = self.factors()
        if not factors:
            return {}
        first = self.param_groups[0]
        told = self._last or {"damping": first["damping"], "gamma": factored_damping(first) ** 0.5}
        told = {**told, "skipped": self._skipped}
        numbers: dict[str, Any] = {name: None if value is None else float(value) for name, value in told.items()}
        numbers["factors"] = {
            name: {side: factor_diagnostics(F) for side, F in pair.items()} for name, pair in factors.items()
        }
        return numbers

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch.optim; the factors keep their precision under low-precision parameters.

        Raises:
            ValueError: the state is damaged, or of another model, approximation or optimizer; nothing was changed.
        """
        if self._curvature is not None:
            self._follow(self._curvature)
        with self.register_load_state_dict_pre_hook(_note_loaded):
            try:
                super().load_state_dict(state_dict)
            finally:
                self._loaded = None

    def __getstate__(self) -> dict[str, Any]:
        own = {"_settings": self._settings, "_names": self._names, "_needs_group": self._needs_group}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # a checkpoint from before a number was there
            if group.get("step"):  # it was calibrated once for all
                group.setdefault("calibrated_least", 1)
                group.setdefault("calibrated_most", len(self._listed()))
            for name, value in validation.YOUNGER.items():
                group.setdefault(name, value)
        self._watch = groups.Watch()
        if self._loaded is not None:
            checkpoint.restore_dtypes(self, self._loaded)
            self._uncounted = None
        if self._curvature is not None:
            self._curvature.record_passes(any(group["piggyback"] for group in self.param_groups))
            self._curvature.restore(self.state)


def _check_passes(earlier: list[Call], kept: list[Call]) -> None:
    """Raises RuntimeError where gradients are also those of passes that were there before the closure ran."""
    outside = sum(call in earlier for call in kept)
    if outside:
        raise RuntimeError(
            f"{outside} of the {len(kept)} passes that made these gradients ran before the closure, whose loss is that "
            "of the others alone. Adaptive modes need one loss and its gradient: clear the gradients in the closure, "
            "and accumulate over micro-batches inside it, returning the sum of their losses"
        )


def _note_loaded(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    """The last of the hooks before loading: notes what comes in before torch casts it to the parameters' dtypes."""
    assert isinstance(optimizer, KFAC)
    validation.check(optimizer, state_dict, optimizer._settings, optimizer._module, optimizer._names)
    optimizer._loaded = state_dict


def factor_diagnostics(F: Tensor) -> dict[str, float]:
    """Trace and condition of a factor, over all its groups."""
    diagonal = F.dim() == 1 or F.shape[-1] != F.shape[-2]
    eigenvalues = (F if diagonal else torch.linalg.eigvalsh(F.double())).double().flatten()
    least, most = float(eigenvalues.min()), float(eigenvalues.max())
    return {"trace": float(eigenvalues.sum()), "condition": most / least if least > 0 else math.inf}
