"""An optimizer that is bound to a model: parameters followed in it, hooks, checkpoints, copies."""

from __future__ import annotations

import logging
import math
import weakref
from contextlib import suppress
from typing import Any, TypeVar

import torch
from torch import nn

from kfac_triton import checkpoint, config, groups, schedules, validation
from kfac_triton.config import Settings
from kfac_triton.distributed import Ranks
from kfac_triton.estimator import CurvatureEstimator
from kfac_triton.fisher.source import Source
from kfac_triton.late import LateRead
from kfac_triton.membership import Members
from kfac_triton.steps.adaptive import AdaptiveStep
from kfac_triton.steps.runner import Runner

log = logging.getLogger("kfac_triton")

Self = TypeVar("Self", bound="BoundOptimizer")


class BoundOptimizer(torch.optim.Optimizer):
    """What torch's protocol asks of an optimizer, for one that knows its model.

    Until `_attach`, and after `close`, there is no model.
    """

    _settings: Settings
    _watch: groups.Watch
    _members: Members
    _runner: Runner
    _estimator: CurvatureEstimator | None = None
    _adaptive: AdaptiveStep | None = None
    _module: nn.Module | None = None
    _ranks: Ranks | None = None
    _needs_group = False
    _names: tuple[str | None, ...] = ()
    _loaded: dict[str, Any] | None = None
    _uncounted: LateRead | None = None  # whether a device took the last step
    _skipped = 0
    _scaled = False  # whether the last step had a GradScaler

    def _attach(self, module: nn.Module, ranks: Ranks) -> None:
        self._module, self._ranks = module, ranks
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

        def state() -> Any:
            optimizer = itself()
            assert optimizer is not None
            return optimizer.state

        parameters = self._members.present
        source = Source(module, self._settings, parameters, ranks, due, follow)
        source.record_passes(any(group["piggyback"] for group in self.param_groups))
        self._estimator = CurvatureEstimator(source, state)
        self._estimator.regroup(self.param_groups)
        device = parameters[0].device if parameters else torch.device("cpu")
        self._runner = Runner(
            self._estimator, state, device, adaptive=self._is_adaptive(), capped=self._settings.rule == "cap"
        )
        self._adaptive = None
        if self._settings.likelihood is not None:
            self._adaptive = AdaptiveStep(source.module_state, self._settings, source.parts)
        self._hooks = weakref.finalize(self, source.close)
        self._names = tuple(self._members.names.get(p) for p in self._listed())

    def attach(self, model: nn.Module, process_group: Any = None) -> None:
        """Binds a copied or unpickled optimizer to `model`, by the names of its parameters.

        Args:
            process_group: as for `KFAC`; a copy doesn't know the group that its original was given.

        Raises:
            ValueError: the model lacks one of the parameters, or has it in another shape, or the state is another's.
        """
        module = config.unwrapped(config.checked_model(model))
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
        validation.check_entries(entries, self._settings, module, adaptive=self._is_adaptive())
        self.close()
        checkpoint.rebind(self, new)
        self._attach(module, ranks)
        assert self._estimator is not None
        self._estimator.restore()

    def close(self) -> None:
        """Remove every hook from the model. The optimizer can't step again until `attach`."""
        if self._estimator is not None:
            self._hooks()
        self._estimator = None
        self._module = None

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _attached(self) -> CurvatureEstimator:
        if self._estimator is None:
            raise RuntimeError(
                "this KFAC has no model: it was closed, copied or unpickled, which leaves the hooks behind. "
                "Call optimizer.attach(model)"
            )
        self._follow(self._estimator)
        return self._estimator

    def _listed(self) -> list[nn.Parameter]:
        """The parameters of all groups."""
        return [p for group in self.param_groups for p in group["params"]]

    def _parameters(self) -> list[nn.Parameter]:
        """Those that belong to the model."""
        return self._members.present

    def _follow(self, estimator: CurvatureEstimator) -> None:
        """Takes in what the user changed in groups and model since the last call.

        Raises:
            ValueError: a new parameter is none of the model's.
        """
        before, module = self._members, estimator.source.module
        if before.current(self._listed()):
            return
        config.check_whole(module)
        replaced = before.replaced()
        if replaced:
            checkpoint.rebind(self, replaced)
            names = ", ".join(before.names[p] for p in replaced)
            log.warning("the model has new parameters in the place of %s; the optimizer goes on with those", names)
        members = Members(module, self._listed())
        known = {*before.listed, *replaced.values()}
        config.check_parameters([p for p in members.listed if p in members.names or p not in known], module)
        gone = [before.names[p] for p in members.listed if p in before.names and p not in members.names]
        if gone:
            log.info("no longer in the model, so the optimizer drops its state of them: %s", ", ".join(gone))
        self._members, self._names = members, tuple(members.names.get(p) for p in members.listed)
        checkpoint.follow(self, members.present)
        estimator.extend(members.present, self.param_groups, replaced, before.reshaped())
        if members.present:
            self._runner.serve(members.present[0].device)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch.optim; the new parameters must belong to the model."""
        if "kl_clip" in param_group and param_group["kl_clip"] is None:
            param_group["kl_clip"] = math.inf
        groups.check_names(param_group)
        schedules.take_out(param_group)
        if "fallback_lr" in param_group:
            lr = schedules.peak(param_group if "lr" in param_group else self.defaults, "lr")
            param_group["fallback_ratio"] = config.fallback_ratio(param_group.pop("fallback_lr"), lr)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            groups.check(group)
            if self._names:
                self._attached()
            elif self._module is not None:  # under construction
                config.check_parameters(self._listed(), self._module)
        except Exception:
            self.param_groups.pop()
            raise

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch.optim; inputs kept for a step that never came are forgotten too."""
        graph = None if self._estimator is None else self._estimator.source.passes.graph
        if graph is not None:
            graph.clear()
            return
        super().zero_grad(set_to_none)
        if self._estimator is not None:
            self._estimator.source.forget()

    def state_dict(self) -> dict[str, Any]:
        """As torch.optim."""
        self._count_skipped()
        if self._estimator is not None:
            self._follow(self._estimator)
        found = super().state_dict()
        if self._estimator is not None:
            keys = [key for group in found["param_groups"] for key in group["params"]]
            for key, p in zip(keys, self._listed(), strict=True):
                rows = self._estimator.empty_rows(p)
                if rows:
                    found["state"][key] = {**found["state"][key], **rows}
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch.optim; the factors keep their precision under low-precision parameters.

        Raises:
            ValueError: the state is damaged, or of another model, approximation or optimizer; nothing was changed.
        """
        if self._estimator is not None:
            self._follow(self._estimator)
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
        if self._estimator is not None:
            self._estimator.source.record_passes(any(group["piggyback"] for group in self.param_groups))
            self._estimator.regroup(self.param_groups)
            self._estimator.restore()

    def _note_skipped(self) -> None:
        """Counts a skipped step, and warns of the first; a GradScaler skips steps to find its scale."""
        if self._skipped == 0 and not self._scaled:
            log.warning(
                "a gradient or the loss is not finite, so this step is skipped. Later ones are skipped in silence; "
                'optimizer.diagnostics()["skipped"] counts them'
            )
        self._skipped += 1

    def _is_adaptive(self) -> bool:
        return config.adapts(self.param_groups[0])

    def _count_skipped(self) -> None:
        """Takes back the count of a step that the device skipped, when its answer no longer has to be waited for."""
        if self._uncounted is not None and not self._uncounted.values():
            for group in self.param_groups:
                group["step"] -= 1
            self._note_skipped()
        self._uncounted = None

    def _next_update(self) -> int | None:
        """The number of the factor update that the next step makes, if it makes one."""
        due = [g["step"] for g in self.param_groups if g["step"] % g["factor_interval"] == 0]
        return max(due, default=None)


def _note_loaded(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    """The last of the hooks before loading: notes what comes in before torch casts it to the parameters' dtypes."""
    assert isinstance(optimizer, BoundOptimizer)
    validation.check(optimizer, state_dict, optimizer._settings, optimizer._module, optimizer._names)
    optimizer._loaded = state_dict
