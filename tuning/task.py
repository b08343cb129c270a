"""A task: everything a race or a search has to know about a training problem, and nothing about optimizers."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from kfac_triton.likelihoods import as_likelihood
from kfac_triton.tuning.errors import Mistake

Batches = Callable[[int], Iterator[tuple[Any, Any]]]
Metric = Callable[[nn.Module], float]


@dataclass(frozen=True)
class Task:
    """A training problem.

    model       () -> nn.Module; called after `torch.manual_seed(seed)`, so a seed fixes the initial weights
    batches     (seed) -> iterator of (inputs, targets); one that ends is called again with another seed
    loss        (outputs, targets) -> 0-d Tensor
    likelihood  what K-FAC needs: "categorical", "bernoulli", "gaussian" or a Likelihood
    evaluate    (model) -> float, smaller is better; default: the mean loss of eight batches of a reserved seed
    target      the value of `evaluate` to reach; default: what the tuned baselines end with

    Keyword-only: `name`; `metric`, what `evaluate` measures, in words; `test`, the same on held-out data; `loss_scale`
    as in `KFAC`; `data`, the provenance of each data set (name, source, digest, size).
    """

    model: Callable[[], nn.Module]
    batches: Batches
    loss: Callable[[Any, Any], Tensor]
    likelihood: Any
    evaluate: Metric | None = None
    target: float | None = None
    name: str = field(default="", kw_only=True)
    metric: str = field(default="mean training loss", kw_only=True)
    test: Metric | None = field(default=None, kw_only=True)
    loss_scale: float = field(default=1.0, kw_only=True)
    data: tuple[dict[str, Any], ...] = field(default=(), kw_only=True)


def load_user_task(spec: str) -> Task:
    """The task of `path/to/file.py:factory` or `package.module:factory`.

    Raises:
        Mistake: the file or module is missing or does not import, the factory is missing, fails or returns no `Task`.
    """
    source, _, factory_name = spec.rpartition(":")
    if not source or not factory_name.isidentifier():
        raise Mistake(f"task {spec!r}: write path/to/file.py:factory or package.module:factory")
    module = _load_file(spec, Path(source)) if source.endswith(".py") else _load_module(spec, source)
    factory = getattr(module, factory_name, None)
    if not callable(factory):
        raise Mistake(
            f"task {spec!r}: {source} has no callable {factory_name!r}; it defines {_public_callables(module)}"
        )
    try:
        task = factory()
    except Exception as error:
        raise Mistake(f"task {spec!r}: {factory_name}() failed: {one_line(error)}") from error
    if not isinstance(task, Task):
        raise Mistake(
            f"task {spec!r}: {factory_name}() returned {type(task).__name__}; return kfac_triton.tuning.Task(...)"
        )
    try:
        as_likelihood(task.likelihood)
    except ValueError as error:
        raise Mistake(f"task {spec!r}: {error}") from error
    named = replace(task, name=task.name or spec)
    return named if named.data else replace(named, data=(_source_provenance(spec, module),))


def one_line(error: BaseException) -> str:
    """The type and the first line of the text of an exception."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def _load_file(spec: str, path: Path) -> ModuleType:
    if not path.is_file():
        raise Mistake(f"task {spec!r}: there is no file {path}")
    name = f"kfac_task_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]}"
    found = importlib.util.spec_from_file_location(name, path)
    if found is None or found.loader is None:
        raise Mistake(f"task {spec!r}: {path} is no Python file")
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module  # dataclasses and pickle look their module up by name
    folder = str(path.resolve().parent)
    sys.path.append(folder)
    try:
        found.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise Mistake(f"task {spec!r}: {path} does not import: {one_line(error)}") from error
    finally:
        sys.path.remove(folder)
    return module


def _load_module(spec: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise Mistake(f"task {spec!r}: module {name!r} does not import: {one_line(error)}") from error


def _public_callables(module: ModuleType) -> str:
    own = [
        name
        for name, value in vars(module).items()
        if callable(value) and not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
    ]
    return ", ".join(sorted(own)) or "no functions"


def _source_provenance(spec: str, module: ModuleType) -> dict[str, Any]:
    path = getattr(module, "__file__", None)
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest() if path else ""
    return {"name": spec, "source": "the user's task; the digest is of its file", "digest": digest, "size": "unknown"}
