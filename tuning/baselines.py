"""The optimizers of a race: how each is built from its hyper-parameters, and what it does untuned.

A schedule belongs to the run, not to the optimizer: `apply_schedule` multiplies the initial lr (and K-FAC's damping)
of every parameter group by a factor of the share of seconds that is spent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from kfac_triton.config import COUNTERS
from kfac_triton.tuning.errors import Mistake
from kfac_triton.tuning.schedules import factor
from kfac_triton.tuning.task import Task

Hyper = Mapping[str, Any]
Build = Callable[[nn.Module, Task, Hyper, bool], torch.optim.Optimizer]
Follow = Callable[[torch.optim.Optimizer, Hyper], Callable[[float], None]]


def by_share(optimizer: torch.optim.Optimizer, hyper: Hyper) -> Callable[[float], None]:
    """`apply_schedule` from a fresh optimizer's values; "horizon" is the share of the seconds at which it ends."""
    initial, horizon = initial_values(optimizer), hyper.get("horizon", 1.0)
    return lambda progress: apply_schedule(optimizer, initial, hyper, min(progress / horizon, 1.0))


def apply_schedule(
    optimizer: torch.optim.Optimizer, initial: list[dict[str, Any]], hyper: Hyper, progress: float
) -> None:
    """Sets lr, and damping where it is scheduled, in all groups; `initial` is from `initial_values`."""
    scale = factor(hyper.get("schedule", "constant"), progress, hyper.get("warmup", 0.0))
    damping_scale = hyper.get("damping_end", 1.0) ** progress
    for group, start in zip(optimizer.param_groups, initial, strict=True):
        group["lr"] = start["lr"] * scale
        if start["damping"] is not None:
            group["damping"] = start["damping"] * damping_scale


def initial_values(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """What schedules multiply: each group's lr and, for a K-FAC that does not adapt it, damping."""
    return [
        {"lr": group["lr"], "damping": None if group.get("adaptive_damping") else group.get("damping")}
        for group in optimizer.param_groups
    ]


@dataclass(frozen=True)
class Entrant:
    """An optimizer of a race. `build(model, task, hyper, compile)`; `tuned`: it takes part in the search; `growing`: on
    batches that grow; `schedule(optimizer, hyper)` gives what is to be called before every step, with the share of the
    run's seconds that is spent."""

    name: str
    build: Build
    tuned: bool = True
    growing: bool = False
    schedule: Follow = by_share


def build_sgd(model: nn.Module, task: Task, hyper: Hyper, compile: bool) -> torch.optim.Optimizer:
    """SGD with Nesterov's momentum."""
    momentum = hyper["momentum"]
    return torch.optim.SGD(
        model.parameters(),
        lr=hyper["lr"],
        momentum=momentum,
        nesterov=momentum > 0,
        weight_decay=hyper.get("weight_decay", 0.0),
    )


class SutskeverMomentum(torch.optim.SGD):
    """SGD with Nesterov's momentum on the schedule of Sutskever et al. (2013, equation 5):
    mu_t = min(1 - 2^(-1 - log2(floor(t / 250) + 1)), mu_max) at update t = 0, 1, ..."""

    def __init__(self, params: Any, lr: float, mu_max: float) -> None:
        super().__init__(params, lr=lr, momentum=mu_max, nesterov=mu_max > 0)
        self.mu_max, self.updates = mu_max, 0

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["momentum"] = min(1 - 0.5 / (self.updates // 250 + 1), self.mu_max)
        self.updates += 1
        return super().step(closure)


def build_nesterov(model: nn.Module, task: Task, hyper: Hyper, compile: bool) -> torch.optim.Optimizer:
    return SutskeverMomentum(model.parameters(), hyper["lr"], hyper["mu_max"])


def build_adamw(model: nn.Module, task: Task, hyper: Hyper, compile: bool) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        model.parameters(),
        lr=hyper["lr"],
        betas=(hyper["beta1"], hyper["beta2"]),
        weight_decay=hyper.get("weight_decay", 0.0),
    )


def build_soap(model: nn.Module, task: Task, hyper: Hyper, compile: bool) -> torch.optim.Optimizer:
    """SOAP (Vyas et al. 2024) as pytorch_optimizer has it."""
    try:
        from pytorch_optimizer import SOAP
    except ImportError as error:
        raise Mistake("optimizer 'soap' comes with pytorch_optimizer: pip install 'kfac-triton[bench]'") from error
    own: torch.optim.Optimizer = SOAP(
        model.parameters(),
        lr=hyper["lr"],
        betas=(hyper["beta1"], hyper["beta2"]),
        weight_decay=hyper.get("weight_decay", 0.0),
        precondition_frequency=hyper["precondition_frequency"],
    )
    return own


def build_kfac(model: nn.Module, task: Task, hyper: Hyper, compile: bool) -> torch.optim.Optimizer:
    """K-FAC with sampled targets; every entry of `hyper` that is no schedule goes to its constructor."""
    from kfac_triton import KFAC

    own = {name: value for name, value in hyper.items() if name not in SCHEDULE_NAMES}
    return KFAC(model, likelihood=task.likelihood, loss_scale=task.loss_scale, compile=compile, **own)


def build_adaptive_kfac(model: nn.Module, task: Task, hyper: Hyper, compile: bool) -> torch.optim.Optimizer:
    """K-FAC whose step length and momentum come from the quadratic model; lr multiplies the one, damping is given."""
    return build_kfac(model, task, {**hyper, "lr": "adaptive", "momentum": "adaptive"}, compile)


def paper_kfac(**options: Any) -> Build:
    """K-FAC with the constants of its paper, the same for every task, but for `options`."""

    def build(model: nn.Module, task: Task, hyper: Hyper, compile: bool) -> torch.optim.Optimizer:
        from kfac_triton import KFAC

        return KFAC.paper(model, likelihood=task.likelihood, loss_scale=task.loss_scale, compile=compile, **options)

    return build


def build_default_sgd(model: nn.Module, task: Task, hyper: Hyper, compile: bool) -> torch.optim.Optimizer:
    """torch's own defaults: lr 1e-3, no momentum."""
    return torch.optim.SGD(model.parameters())


def build_default_adamw(model: nn.Module, task: Task, hyper: Hyper, compile: bool) -> torch.optim.Optimizer:
    """torch's own defaults: lr 1e-3, betas (0.9, 0.999), weight decay 0.01."""
    return torch.optim.AdamW(model.parameters())


SCHEDULE_NAMES = ("schedule", "warmup", "damping_end", "horizon")
ENTRANTS = {
    entrant.name: entrant
    for entrant in (
        Entrant("sgd", build_sgd),
        Entrant("nesterov", build_nesterov),
        Entrant("adamw", build_adamw),
        Entrant("soap", build_soap),
        Entrant("kfac", build_kfac),
        Entrant("kfac-adaptive", build_adaptive_kfac),
        Entrant("sgd-default", build_default_sgd, tuned=False),
        Entrant("adamw-default", build_default_adamw, tuned=False),
        Entrant("kfac-default", build_kfac, tuned=False),
        Entrant("kfac-paper", paper_kfac(), tuned=False),
        Entrant("kfac-growing", paper_kfac(), tuned=False, growing=True),
        Entrant("kfac-tridiagonal", paper_kfac(approximation="tridiagonal"), tuned=False),
        Entrant("kfac-paper-no-momentum", paper_kfac(momentum=0.0), tuned=False),
        Entrant("kfac-tridiagonal-no-momentum", paper_kfac(approximation="tridiagonal", momentum=0.0), tuned=False),
    )
}
BASELINES = ("sgd", "nesterov", "adamw", "soap")  # whose tuned results set the targets


def find_entrant(name: str) -> Entrant:
    """Raises: Mistake: no optimizer of that name."""
    if name not in ENTRANTS:
        raise Mistake(f"unknown optimizer {name!r}: one of {', '.join(ENTRANTS)}")
    return ENTRANTS[name]


def in_force(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Every hyper-parameter of a fresh optimizer, defaults included: its first group's and K-FAC's settings."""
    group = {
        name: value for name, value in optimizer.param_groups[0].items() if name != "params" and name not in COUNTERS
    }
    plain = (bool, int, float, str, tuple, type(None))
    every = {**group, **getattr(optimizer, "settings", {})}
    return {name: value if isinstance(value, plain) else repr(value) for name, value in every.items()}
