"""What is wrong with a task, found before any trial: in a model, a batch and a step of the default settings."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from torch import Tensor, nn

from kfac_triton.tuning.errors import Mistake
from kfac_triton.tuning.task import Task, one_line
from kfac_triton.tuning.trainer import evaluate, moved


def check(task: Task, device: torch.device) -> tuple[nn.Module, float]:
    """A fresh model of the task and its metric, after everything that a run will do has been done once.

    Raises:
        Mistake: which part is wrong, and how to mend it.
    """
    name = f"task {task.name!r}"
    model = _built(name, task, "first")
    if _built(name, task, "second") is model:
        raise Mistake(f"{name}: model() returned the same module twice; build a new one at every call")
    model = model.to(device)
    inputs, targets = (moved(part, device) for part in _first_batch(name, task))
    loss = _loss(name, task, model, inputs, targets)
    if not math.isfinite(float(loss)):
        raise Mistake(
            f"{name}: the loss of the untrained model on the first batch is {float(loss)}; check data and scale"
        )
    try:
        judged = evaluate(task, model, device)
    except Exception as error:
        raise Mistake(f"{name}: evaluate(model) failed: {one_line(error)}") from error
    if not math.isfinite(judged):
        raise Mistake(f"{name}: evaluate(model) is {judged} for the untrained model; return a finite number")
    _step(name, task, model, inputs, targets)
    return _built(name, task, "third").to(device), judged


def _built(name: str, task: Task, time: str) -> nn.Module:
    torch.manual_seed(0)
    try:
        model = task.model()
    except Exception as error:
        raise Mistake(
            f"{name}: the {time} call of model() failed: {one_line(error)}; every trial builds one"
        ) from error
    if not isinstance(model, nn.Module):
        raise Mistake(f"{name}: model() returned {type(model).__name__}; return a torch.nn.Module")
    return model


def _first_batch(name: str, task: Task) -> tuple[Any, Any]:
    try:
        batch = next(iter(task.batches(0)))
    except StopIteration:
        raise Mistake(f"{name}: batches(0) ends before its first batch; yield (inputs, targets)") from None
    except Exception as error:
        raise Mistake(f"{name}: batches(0) failed: {one_line(error)}") from error
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise Mistake(f"{name}: batches(0) yields {type(batch).__name__}; yield pairs (inputs, targets)")
    return batch[0], batch[1]


def _loss(name: str, task: Task, model: nn.Module, inputs: Any, targets: Any) -> Tensor:
    try:
        outputs = model(inputs)
    except Exception as error:
        raise Mistake(f"{name}: model(inputs) failed on the first batch: {one_line(error)}") from error
    try:
        loss = task.loss(outputs, targets)
    except Exception as error:
        raise Mistake(f"{name}: loss(outputs, targets) failed on the first batch: {one_line(error)}") from error
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        shape = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise Mistake(f"{name}: loss(outputs, targets) returned {shape}; return a scalar, as .mean() gives")
    return loss.detach()


def _step(name: str, task: Task, model: nn.Module, inputs: Any, targets: Any) -> None:
    from kfac_triton import KFAC

    quiet = logging.getLogger("kfac_triton")
    level = quiet.level
    quiet.setLevel(logging.ERROR)
    try:
        with KFAC(model, likelihood=task.likelihood, loss_scale=task.loss_scale, compile=False) as optimizer:
            task.loss(model(inputs), targets).backward()
            optimizer.step()
            loss = float(task.loss(model(inputs), targets).detach())
    except Exception as error:
        raise Mistake(f"{name}: a step with the default settings failed: {one_line(error)}") from error
    finally:
        quiet.setLevel(level)
    if not math.isfinite(loss):
        raise Mistake(f"{name}: after one step with the default settings the loss is {loss}; check data and likelihood")
