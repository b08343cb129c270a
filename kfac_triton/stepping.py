"""The step of the optimizer: what counts, what is due, and who takes it."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kfac_triton import checkpoint, schedules
from kfac_triton.binding import BoundOptimizer
from kfac_triton.capture import Call
from kfac_triton.estimator import CurvatureEstimator
from kfac_triton.fisher.graphs import Closure
from kfac_triton.fisher.source import Source
from kfac_triton.late import LateRead
from kfac_triton.steps.objective import Objective
from kfac_triton.steps.proposal import Occasion
from kfac_triton.steps.runner import Gradients

log = logging.getLogger("kfac_triton")


class Stepping(BoundOptimizer):
    """An optimizer that is bound to a model and takes steps."""

    _step_supports_amp_scaling = True
    _last: dict[str, Any] | None = None  # the numbers of an adaptive step
    _forward_only = True  # whether the closure's loss is known to need no backward pass
    _unseen = False  # whether gradients from nowhere were reported

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
        estimator = self._attached()
        source, runner, adaptive = estimator.source, self._runner, self._is_adaptive()
        self._count_skipped()
        self._take_numbers()
        earlier = source.passes.pending()
        loss, objective, graph = self._run(closure, estimator, earlier)
        parameters = [p for p in self._parameters() if p.grad is not None]
        if any([p.grad.is_sparse for p in parameters]):  # type: ignore[union-attr]
            raise ValueError("KFAC takes no sparse gradients; build the embedding with sparse=False")
        kept = source.passes.take() if graph is None else [Call(graph.inputs, {})]
        source.ranks.note(source.passes.wrapper, source.module)
        if objective is not None:
            _check_passes(earlier, kept)
        gradients = self._gathered(parameters)
        host = not isinstance(gradients.finite, Tensor)
        if not parameters:
            source.forget()
            return loss
        if (host or adaptive) and not bool(gradients.finite):
            self._skip(source, objective)
            return loss
        zero = gradients.largest == 0 if host else not kept and self._all_zero(parameters)  # a look waits for a GPU
        if zero and not (kept and estimator.layers):
            source.forget()
            if not kept and not self.state:
                checkpoint.prepare(self, estimator, parameters)
            return loss
        if objective is not None and not math.isfinite(objective.first):
            self._skip(source, objective)
            return loss
        if not kept and not source.scripted:
            self._check_known(estimator, adaptive)
        if (kept or source.scripted) and not (zero or source.passes.incomplete):
            self._update_factors(estimator, kept, parameters, gradients, graph)
        source.forget()
        for group in self.param_groups:
            group["piggyback"] = source.records_passes
        if adaptive:
            self._adaptive_step(estimator, kept, parameters, gradients, objective)
            return loss
        estimator.refresh_(self.param_groups)
        gradients = self._gathered(parameters) if runner.stale else gradients
        scales = runner.scales(gradients, self._settings.loss_scale)
        runner.step(scales, bf16=self._settings.precision == "bf16")
        for group in self.param_groups:
            group["step"] += 1
            if group["kl_annealing"]:
                group["peak_lr"] = schedules.larger(group["peak_lr"], group["lr"])
        self._uncounted = None if host else LateRead(gradients.finite)
        return loss

    def _run(
        self, closure: Callable[[], Any] | None, estimator: CurvatureEstimator, earlier: list[Call]
    ) -> tuple[Any, Objective | None, Closure | None]:
        """Runs the closure: its loss, the objective of an adaptive step, and the graph that ran in the closure's place.

        `earlier`: passes whose gradients were there before.
        """
        source = estimator.source
        if closure is None:
            if self.param_groups[0]["adaptive_damping"] and not self._all_zero(self._parameters()):
                raise RuntimeError(
                    'damping="adaptive" asks for the loss again after the step: pass a closure, '
                    "optimizer.step(closure), that clears the gradients, computes the loss, calls backward and "
                    "returns it"
                )
            self._follow_graphs(estimator)
            return None, None, None
        if self._follow_graphs(estimator) and not earlier:
            graph = source.run_closure(closure, self._next_update())
            if graph is not None:
                return graph.loss, None, graph
        with torch.enable_grad():
            if not self._is_adaptive():
                return closure(), None, None
            objective = Objective(closure, source.module_state, self._parameters(), source.ranks, self._forward_only)
            return objective.call(), objective, None

    def _follow_graphs(self, estimator: CurvatureEstimator) -> bool:
        """Looks whether passes may be graphs now; returns whether a closure may be one."""
        source, groups = estimator.source, self.param_groups
        if source.graphs is None or not estimator.layers:
            return False
        if self._is_adaptive():
            source.graphs.refuse("lr, momentum or damping is adaptive")
        if len({(group["step"], group["factor_interval"]) for group in groups}) > 1:
            source.graphs.refuse("parameter groups have factor updates of their own")
        may = source.follow_layers(estimator.layers.values(), (estimator.version, estimator.grouping))
        return may and self._settings.compile == "step" and getattr(self, "found_inf", None) is None

    def _take_numbers(self) -> None:
        """Applies schedules, and takes in what changed in the groups."""
        for group in self.param_groups:
            schedules.apply(group)
        self._watch.check(self.param_groups, self.defaults)

    def _gathered(self, parameters: list[nn.Parameter]) -> Gradients:
        """The gradients, gathered, and what is known of them and of a GradScaler."""
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        self._scaled = found_inf is not None
        if found_inf is not None and scale is None and self._settings.fisher == "empirical":
            raise RuntimeError(
                'fisher="empirical" cannot learn the GradScaler\'s scale after scaler.unscale_(optimizer); '
                'leave that call out, or use fisher="mc", which does not depend on it'
            )
        return self._runner.gradients(parameters, self.param_groups, scale, found_inf)

    def _update_factors(
        self,
        estimator: CurvatureEstimator,
        kept: list[Call],
        parameters: list[nn.Parameter],
        gradients: Gradients,
        graph: Closure | None,
    ) -> None:
        """Moves the factors of the parameters whose group is due."""
        numbers = estimator.group_numbers
        trained = [p for p in parameters if p.requires_grad]
        owners = [self.param_groups[i] for i in dict.fromkeys([numbers[id(p)] for p in trained])]
        due = [group for group in owners if group["step"] % group["factor_interval"] == 0]
        if not due:
            return
        if self._scaled and getattr(self, "grad_scale", None) is None:
            estimator.source.trust_loss_scale()  # unscaled before, by a scale that is gone
        update, terms = max(group["step"] for group in due), max(group["terms_per_example"] for group in due)
        observed = estimator.source.observe(kept, trained, update, terms, gradients.unscale, graph)
        if observed is None:
            return
        for group in due:
            group["terms_per_example"] = observed.terms_per_example
        estimator.update_(observed, self.param_groups)

    def _adaptive_step(
        self,
        estimator: CurvatureEstimator,
        kept: list[Call],
        parameters: list[nn.Parameter],
        gradients: Gradients,
        objective: Objective | None,
    ) -> None:
        assert self._adaptive is not None
        self._check_repeatable(kept)
        scales = self._runner.scales(gradients, self._settings.loss_scale)
        occasion = Occasion(parameters, [call.inputs for call in kept], scales, objective)
        self._last = self._adaptive.step(self, self._runner, occasion)
        self._forward_only = objective is None or objective.forward_only
        estimator.source.passes.reset()  # compiled code cannot tell that K-FAC called the closure

    def _skip(self, source: Source, objective: Objective | None) -> None:
        """No step, since a gradient or the loss is not finite; the last step is taken back where it led there."""
        source.forget()
        if objective is not None and self.param_groups[0]["adaptive_damping"]:
            assert self._adaptive is not None
            self._adaptive.take_back(self, self._runner, objective)
            self._forward_only = objective.forward_only
        self._note_skipped()

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

    def _check_known(self, estimator: CurvatureEstimator, adaptive: bool) -> None:
        """Raises where no call was seen and there are no factors to use instead."""
        if adaptive or not estimator.layers:
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


def _check_passes(earlier: list[Call], kept: list[Call]) -> None:
    """Raises RuntimeError where gradients are also those of passes that were there before the closure ran."""
    outside = sum(call in earlier for call in kept)
    if outside:
        raise RuntimeError(
            f"{outside} of the {len(kept)} passes that made these gradients ran before the closure, whose loss is that "
            "of the others alone. Adaptive modes need one loss and its gradient: clear the gradients in the closure, "
            "and accumulate over micro-batches inside it, returning the sum of their losses"
        )
