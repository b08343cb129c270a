"""Steps of other packages under the same clock: SOAP, ASDL's K-FAC, kfac-jax's K-FAC.

Each adapter gives a `Lane`: whole steps on the same model, batches and intervals, with the lr, momentum and damping of
our own. What differs is theirs: ASDL takes the empirical Fisher (no pass of its own) of the whole batch; kfac-jax
samples targets for the whole batch, in one jitted step; SOAP refreshes its bases every inverse interval.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from kfac_triton.benchmarks.step import DAMPING, KL_CLIP, LR, MOMENTUM, Lane, StepOptions, hyper_of, synchronise
from kfac_triton.likelihoods import Bernoulli, Categorical, Gaussian, as_likelihood
from kfac_triton.tuning.baselines import build_soap
from kfac_triton.tuning.task import Task, one_line
from kfac_triton.tuning.trainer import moved, train_step

AVERAGE = 0.05  # what the newest factors count in theirs, as 1 - factor_decay in ours


class Unsuitable(Exception):
    """The rival does not do this task; the text says why."""


@dataclass(frozen=True)
class Rival:
    """`module` is imported, `mark` is a name in it that other packages of that name lack, `pip` installs it."""

    name: str
    module: str
    mark: str
    pip: str
    make: Callable[[Task, StepOptions, list[Any], torch.device], Lane]

    def installed(self) -> bool:
        try:
            return hasattr(importlib.import_module(self.module), self.mark)
        except ImportError:
            return False
        except Exception:
            return True  # its adapter fails in the same way, and a line says how


def rival_lanes(
    task: Task, options: StepOptions, batches: list[Any], device: torch.device
) -> tuple[list[Lane], list[str]]:
    """The rivals that take a step here, and a line on each that does not; one line names all that are not installed.

    Those among the optimizers already are no rivals.
    """
    before_import(torch.get_num_threads())
    lanes: list[Lane] = []
    asked = [rival for rival in RIVALS if rival.name.lower() not in options.optimizers]
    here = [rival for rival in asked if rival.installed()]
    absent = [f"{rival.name} ({rival.pip})" for rival in asked if rival not in here]
    lines = [f"rivals that are not installed: {', '.join(absent)}"] if absent else []
    for rival in here:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of hooks and functions that torch has since replaced
                lane = rival.make(task, options, batches, device)
                lane.warm_up(options.steps)
        except Unsuitable as reason:
            lines.append(f"{rival.name} is left out: {reason}")
        except Exception as error:
            lines.append(f"{rival.name} is left out, it failed with {one_line(error)}")
        else:
            lanes.append(lane)
    return lanes, lines


def soap(task: Task, options: StepOptions, batches: list[Any], device: torch.device) -> Lane:
    model, stream = _model(task, device), cycle(batches)
    hyper = {**hyper_of("soap", options), "precondition_frequency": options.inverse_interval}
    optimizer = build_soap(model, task, hyper, False)
    return Lane("SOAP", lambda: train_step(task, model, optimizer, stream, device), lambda: synchronise(device))


def asdl(task: Task, options: StepOptions, batches: list[Any], device: torch.device) -> Lane:
    """Its K-FAC before torch's SGD. Its loss is called with reduction="sum" where it updates the factors."""
    from asdl import KfacGradientMaker, PreconditioningConfig

    without_nvtx()
    model, stream = _model(task, device), (moved(batch, device) for batch in cycle(batches))
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM)
    config = PreconditioningConfig(
        preconditioner_upd_interval=options.inverse_interval,
        curvature_upd_interval=options.factor_interval,
        data_size=_rows(batches[0][0]),
        damping=DAMPING,
        ema_decay=AVERAGE,
    )
    maker = KfacGradientMaker(model, config, fisher_type="fisher_emp")

    def loss(outputs: Any, targets: Any, reduction: str = "mean") -> Tensor:
        return task.loss(outputs, targets) * (config.data_size if reduction == "sum" else 1)

    def step() -> None:
        inputs, targets = next(stream)
        optimizer.zero_grad(set_to_none=True)
        outputs = maker.setup_model_call(model, inputs)
        maker.setup_loss_call(loss, outputs, targets)
        maker.forward_and_backward()
        optimizer.step()

    return Lane("ASDL", step, lambda: synchronise(device))


def without_nvtx() -> None:
    """ASDL marks ranges for NVIDIA's profiler, which raises in a torch without CUDA; there the marks do nothing."""
    nvtx: Any = torch.cuda.nvtx
    try:
        nvtx.range_push("")
        nvtx.range_pop()
    except RuntimeError:
        nvtx.range_push = nvtx.range_pop = lambda *_: 0


def kfac_jax(task: Task, options: StepOptions, batches: list[Any], device: torch.device) -> Lane:
    """Its optimizer with a fixed lr, momentum and damping, on a chain of linear layers."""
    import jax
    import jax.numpy as jnp
    import kfac_jax as package

    layers, parameters = chain_of(_model(task, device), jnp)
    optimizer = package.Optimizer(
        value_and_grad_func=jax.value_and_grad(jax_loss(task, layers, jax, package)),
        l2_reg=0.0,
        learning_rate_schedule=lambda *_, **__: LR,
        momentum_schedule=lambda *_, **__: MOMENTUM,
        damping_schedule=lambda *_, **__: DAMPING,
        norm_constraint=KL_CLIP,
        estimation_mode="fisher_gradients",
        curvature_ema=1 - AVERAGE,
        curvature_update_period=options.factor_interval,
        inverse_update_period=options.inverse_interval,
        num_burnin_steps=0,
    )
    arrays = [tuple(jnp.asarray(part.cpu().numpy()) for part in batch) for batch in batches]
    stream, key = cycle(arrays), jax.random.PRNGKey(0)
    now = [parameters, optimizer.init(parameters, key, arrays[0])]

    def step() -> None:
        now[0], now[1], _ = optimizer.step(now[0], now[1], key, batch=next(stream))

    return Lane("kfac-jax", step, lambda: jax.block_until_ready(now[0]))


def before_import(threads: int) -> None:
    """Bounds the threads of XLA, which reads these when jax is imported."""
    os.environ.setdefault("NPROC", str(threads))
    if threads == 1:
        os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")


def chain_of(model: nn.Module, jnp: Any) -> tuple[list[str], list[tuple[Any, Any]]]:
    """The layers of a chain, "linear" or an activation's name, and (weight (d_in, d_out), bias) of the linear ones.

    Raises: Unsuitable: it is no chain.
    """
    names: list[str] = []
    parameters: list[tuple[Any, Any]] = []
    for layer in model if isinstance(model, nn.Sequential) else [model]:
        if isinstance(layer, nn.Linear) and layer.bias is not None:
            weight, bias = (p.detach().cpu().numpy() for p in (layer.weight, layer.bias))
            names.append("linear")
            parameters.append((jnp.asarray(weight.T.copy()), jnp.asarray(bias.copy())))
        elif isinstance(layer, (nn.Tanh, nn.Sigmoid, nn.ReLU)):
            names.append(type(layer).__name__.lower())
        else:
            raise Unsuitable(f"it takes chains of nn.Linear with tanh, sigmoid or ReLU here, no {type(layer).__name__}")
    return names, parameters


def jax_loss(task: Task, layers: list[str], jax: ModuleType, package: ModuleType) -> Callable[[Any, Any], Any]:
    """The mean nll of the task's likelihood as a function of (parameters, batch), registered with kfac-jax.

    Raises: Unsuitable: a likelihood of the user's own.
    """
    likelihood = as_likelihood(task.likelihood)
    jnp = jax.numpy
    if not isinstance(likelihood, (Bernoulli, Categorical, Gaussian)):
        raise Unsuitable(f"it has no {type(likelihood).__name__} likelihood")

    def loss(parameters: Any, batch: Any) -> Any:
        z, targets = batch
        linear = iter(parameters)
        for name in layers:
            if name == "linear":
                weight, bias = next(linear)
                z = z @ weight + bias
            else:
                z = {"tanh": jnp.tanh, "sigmoid": jax.nn.sigmoid, "relu": jax.nn.relu}[name](z)
        if isinstance(likelihood, Bernoulli):
            package.register_multi_bernoulli_predictive_distribution(z, targets)
            nll = jnp.sum(jax.nn.softplus(z) - targets * z)
        elif isinstance(likelihood, Gaussian):
            package.register_normal_predictive_distribution(z, targets)
            nll = 0.5 * jnp.sum((z - targets) ** 2)
        else:
            package.register_categorical_predictive_distribution(z, targets)
            nll = -jnp.sum(jnp.take_along_axis(jax.nn.log_softmax(z), targets[:, None], axis=1))
        return nll / len(z)

    return loss


def _model(task: Task, device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    return task.model().to(device)


def _rows(inputs: Any) -> int:
    return len(inputs) if isinstance(inputs, Tensor) else 1


RIVALS = (
    Rival("SOAP", "pytorch_optimizer", "SOAP", "pip install pytorch_optimizer", soap),
    Rival("ASDL", "asdl", "KfacGradientMaker", "pip install --pre asdfghjkl", asdl),
    Rival("kfac-jax", "kfac_jax", "Optimizer", "pip install jax==0.8.3 jaxlib==0.8.3 kfac-jax==0.0.8", kfac_jax),
)
