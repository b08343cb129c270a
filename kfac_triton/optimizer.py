"""KFAC: what a user sees of the optimizer: its arguments, and what it tells of itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from kfac_triton import config, groups, inspection, schedules, tuned
from kfac_triton.distributed import Ranks
from kfac_triton.likelihoods import Likelihood
from kfac_triton.operations.custom import LayerBlock
from kfac_triton.schedules import Schedule
from kfac_triton.stepping import Stepping
from kfac_triton.steps.damping import factored_damping


class KFAC(Stepping):
    """Natural gradient with Kronecker-factored curvature (Martens & Grosse 2015).

    For every weight W (d_out, d_in[+1], the bias as last column) the Fisher of the mean nll over loss terms is held as
    G (x) A, running averages of the second moments of the layer's output gradients and inputs, and the step is

        m <- momentum m + (1 - momentum) grad,   V = (G + gamma / pi I)^-1 m (A + pi gamma I)^-1
        W <- W - lr min(nu, |u| / |V|) V,   gamma = sqrt(damping)

    where lr u is AdamW's step for the layer and nu <= 1 keeps the KL divergence of the step within kl_clip.
    The factors come from a pass of K-FAC's own inside `step()`, over a part of the inputs that the model saw since the
    last step; the loss, its graph, `.grad`, BatchNorm's statistics and the random streams are left alone.

    Args:
        model: the network, or what torch.compile or DistributedDataParallel made of one.
        params: parameters or groups, as for torch.optim; by default all that require grad.
        lr: in AdamW's unit: no layer moves further than AdamW would at this lr. A number or a 0-d tensor; a
            `kfac_triton.schedules.Schedule` sets it each step. "adaptive": from the quadratic model with exact Fisher
            products (Martens & Grosse 2015, section 6.4); the group's lr, 1 by default, multiplies it.
        momentum: of the gradient, or of the steps (see `rule`). "adaptive": from the same model (section 7); beyond the
            paper it is at most 1 in size, which batches of a few examples need.
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
            (section 4.3); memory and time in `kfac_triton.linalg.chain`. "eigen": block-diagonal, with the eigenvalues
            measured in the factors' eigenbases (EKFAC), damped as the factors are; dearer refreshes and steps, in
            `kfac_triton.structures.ekfac`. "inverse_free": roots of the inverses that follow the statistics by
            products alone, in bfloat16 under bfloat16 parameters, in `kfac_triton.structures.inverse_free`.
        rule: of steps whose lr, momentum and damping are numbers. "cap", the default: as above, with more on it in
            `kfac_triton.steps.capped`. "kl": buf <- momentum buf + nu V, W <- W - tau lr buf, with V of the gradient
            itself and nu and tau from kl_clip; lr is the share of V, 1 a full Newton step. A buffer less.
        weight_sharing: "expand": a row for every position of a shared weight. "reduce": one for every example. By
            layer: {pattern of the layers' names, as in `factors()`: one of both}, "expand" for what none fits.
        temporal: of the weights of RNN, LSTM and GRU. "independent": gradients at different times are uncorrelated.
            "chain_symmetric", "chain": each depends on the one before (Martens, Ba & Johnson 2018, options 1 and 2);
            cost in `kfac_triton.structures.temporal`.
        spatial: of convolutions. "correlated": second moments of whole patches. "uncorrelated": of single pixels, and
            different places of a patch share their means alone (Grosse & Martens 2016); cheaper for wide kernels.
        norm: the block of a norm's scale and shift: "full", or its "diagonal".
        blocks: {type of module: LayerBlock} for layers of your own that no known function stands for.
        factor_decay: beta of the running averages, min(1 - 1/k, factor_decay) at the k-th update.
        factor_interval, inverse_interval: steps between refreshes. In its first interval the inverse is refreshed at
            steps 1, 2, 4, 8, ... too.
        factor_fraction: the share of the batch (its first axis) for the statistics, never below min(N, 64) examples; of
            sequences, never below as many as have 512 loss terms, nor below 8. In the k-th update at least 1/k. Whole
            batches, after one warning, where a part would be something else (rule: `kfac_triton.fisher.parts`).
        quadratic_fraction: the share of the batch for the adaptive modes' products with the exact Fisher. Less than all
            makes cheaper and less certain steps.
        max_factor_dim: a wider side of a weight gets up to four blocks of that width, and a wider one yet a diagonal.
        kl_clip: bound on the KL divergence (nats of the mean nll) of every step, momentum included: V is scaled down to
            sum <V, m> / 2 <= kl_clip, or with rule="kl" lr^2 sum <V, grad> / 2 before it enters the momentum (Wu et al.
            2017, section 3), and then the step (`kfac_triton.steps.bounds`). None: no bound; without one a huge
            gradient makes a huge step under rule="kl". By default 1e-2, 1e-3 with rule="kl", and None with
            lr="adaptive", which takes no bound.
        kl_annealing: the largest lr so far stands in the bound for lr, so that a schedule of lr shortens the steps that
            the bound holds too. Without it lr does not change such a step. Always on with rule="cap".
        fallback_lr: AdamW's learning rate for parameters without a block, at this lr: it follows lr's scheduler.
            Default lr / 10, and 1e-3 with lr="adaptive".
        precision: of the products V = G_inv grad A_inv: "ieee", or "bf16", operands rounded and sums in float32, which
            some CPUs do faster. "auto": "ieee"; with damping="adaptive", on a CPU with such instructions, "bf16" from
            one search for gamma to the next, where that keeps 95 % of what the quadratic model promises.
        seed: of the sampled targets.
        check_loss_scale: adaptive modes with one of the three likelihoods by name compare loss_scale with the loss in
            the first step that has a closure, and refuse one that is wrong. False: they take it as it is.
        compile: "auto", False: nothing is compiled; on small networks the guards of compiled code cost about what it
            saves. True: the Fisher's pass is a graph, from the second factor update on. "step": with `step(closure)`
            the closure's forward and backward pass and the Fisher's are one graph; where `factor_fraction` takes less
            than the batch, the Fisher's is one of its own. Factors, inverses and the update run over all layers at once
            and are not compiled. The closure must call `optimizer.zero_grad()` first and the model once, and its loss
            comes back without a graph. The steps are those of `compile=False` up to rounding. What no graph can do
            (adaptive modes, fisher other than "mc", masks, random numbers as in dropout, several processes, layers
            other than linear, convolution, norm and attention, code that dynamo does not follow, shapes that keep
            changing) runs eagerly after one warning that says why.
        tuned_for: from `load_tuned`: what the other arguments were tuned for. Another model or device: a warning.
        process_group: the `ProcessGroup` whose ranks share factors. Default: that of the model's
            DistributedDataParallel, now or when it first calls the model; without one the factors are this process's.

    Raises:
        TypeError: `model` is no module.
        NotImplementedError: its parameters are sharded.
        ValueError: an argument is out of its range; the message says which and what is allowed.
    """

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
        rule: str | None = None,
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
        compile: bool | str = "auto",
        tuned_for: Mapping[str, Any] | None = None,
        process_group: Any = None,
    ) -> None:
        ranks = Ranks(config.checked_model(model), process_group)
        self._needs_group = process_group is not None
        self._watch = groups.Watch()
        adaptive = [n for n, v in (("lr", lr), ("momentum", momentum), ("damping", damping)) if isinstance(v, str)]
        self._settings = config.settings(
            likelihood,
            loss_scale=loss_scale,
            output=output,
            mask=mask,
            fisher=fisher,
            fisher_pass=fisher_pass,
            approximation=approximation,
            rule=groups.rule_of(rule, adaptive),
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
            **config.adaptive_groups(
                lr,
                momentum,
                damping,
                initial_damping=initial_damping,
                kl_clip=kl_clip,
                likelihood=likelihood,
                approximation=approximation,
                rule=self._settings.rule,
            ),
            "weight_decay": weight_decay,
            "kl_annealing": kl_annealing,
            "factor_decay": factor_decay,
            "factor_interval": factor_interval,
            "inverse_interval": inverse_interval,
            **config.COUNTERS,
        }
        schedules.take_out(defaults)
        groups.check(defaults)
        defaults["kl_annealing"] = kl_annealing or self._settings.rule == "cap"
        if defaults["adaptive_damping"]:
            defaults["gamma"] = math.sqrt(defaults["damping"] + weight_decay / loss_scale)
            defaults["bf16"] = False
        if defaults["adaptive_lr"] and fallback_lr is None:
            fallback_lr = config.DEFAULT_FALLBACK_LR
        defaults["fallback_ratio"] = config.fallback_ratio(fallback_lr, schedules.peak(defaults, "lr"))
        self._module = config.unwrapped(model)
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

    @property
    def settings(self) -> dict[str, Any]:
        """The constructor's arguments that belong to no parameter group."""
        return dict(vars(self._settings))

    @property
    def compile_seconds(self) -> float:
        """Wall time spent so far in steps that compiled a graph."""
        graphs = None if self._estimator is None else self._estimator.source.graphs
        return 0.0 if graphs is None else graphs.seconds

    def factors(self) -> dict[str, dict[str, Tensor]]:
        """{name of the weight, less ".weight": {"A": (d_in[+1], d_in[+1]), "G": (d_out, d_out)}}, copies.

        float32, or float64 under a float64 model; the bias is the last row and column of A. torch.kron(G, A) is the
        block of the Fisher of the mean nll, for the weight's rows with the bias as last column. A grouped convolution
        has a leading axis of groups; a diagonal side is its diagonal (d,), one of blocks has zeros between them. Of
        scales and shifts A is the block, for both behind one another, and G (1, 1); of an embedding or a positional
        parameter A is for the rows of the table and G for its columns. With approximation="inverse_free" they are
        worked out from the inverses, which costs two inversions each.
        """
        return inspection.factors(self._attached(), self.param_groups)

    def coverage(self) -> dict[str, str]:
        """{parameter name: block name}, "fallback" where AdamW updates it. Before the first step, what is expected."""
        return inspection.coverage(self._attached(), self._parameters())

    def memory_usage(self) -> dict[str, int]:
        """Bytes by purpose, and in "total" what stays from step to step. Before the first step, an estimate.

        "momentum": with rule="cap" the mean squares too. "fallback": AdamW's averages. "rows" wait for the next product
        that updates a factor. "gradients": two joint gradients; "proposal": a third, of adaptive modes. "scratch": room
        for a product. "sums": what taps collect for fisher="empirical". "pass", not in the total: rows and activations
        of K-FAC's last pass. The peak of training is that of SGD with momentum and, within 10 %, all of these.
        """
        return inspection.memory_usage(self._attached(), self._parameters(), self.param_groups)

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
            name: {side: inspection.factor_diagnostics(F) for side, F in pair.items()} for name, pair in factors.items()
        }
        return numbers
