"""Shapes of the kernels' launches: a grid for the shipped files, those of a file, those of a model's own steps."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from kfac_triton import ops
from kfac_triton.tuning.errors import Mistake
from kfac_triton.tuning.task import Task

# What the numbers of a shape are, by kernel; `count` is of equal matrices in one launch.
AXES = {
    "syrk": ("count", "rows", "d"),
    "conv_syrk": ("count", "positions", "d"),
    "kron_matmul": ("count", "rows", "columns", "terms"),
}
DTYPES = ("float32", "bfloat16", "float16")


class Shape(NamedTuple):
    """One launch; `dtype` is that of its data, as torch names it."""

    kernel: str
    dtype: str
    size: tuple[int, ...]


def standard() -> list[Shape]:
    """A grid of powers of two that leaves no common shape further than the optimizer looks for an entry."""
    found = []
    for dtype in DTYPES:
        for count in (1, 8, 64):
            for rows in (2**8, 2**11, 2**14, 2**17):
                found += [Shape("syrk", dtype, (count, rows, 2**d)) for d in range(5, 13)]
        for rows in (2**11, 2**14, 2**17):
            found += [Shape("conv_syrk", dtype, (1, rows, 2**d)) for d in range(6, 13)]
    for count in (4, 16, 64):
        for rows in (32, 128, 512):
            for columns in (32, 128, 512):
                found += [Shape("kron_matmul", "float32", (count, rows, columns, terms)) for terms in {rows, columns}]
    return sorted(set(found))


def of(spec: str) -> list[Shape]:
    """`standard`, a JSON file of shapes, or a task, whose model then takes steps.

    Raises:
        Mistake: the file is no list of shapes, or the task is none.
    """
    if spec == "standard":
        return standard()
    path = Path(spec)
    if path.suffix == ".json":
        return read(path)
    from kfac_triton.tuning.problems import find_task

    return of_task(find_task(spec))


def read(path: Path) -> list[Shape]:
    """Shapes of a file: [{"kernel": "syrk", "dtype": "float32", "size": [1, 4096, 1024]}, ...].

    Raises:
        Mistake: it is not such a list.
    """
    try:
        held = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise Mistake(f"--shapes {path}: {error}") from None
    if not isinstance(held, list) or not held:
        raise Mistake(f'--shapes {path}: a list of {{"kernel", "dtype", "size"}}')
    return [_checked(path, i, entry) for i, entry in enumerate(held)]


def _checked(path: Path, i: int, entry: Any) -> Shape:
    kernel = entry.get("kernel") if isinstance(entry, dict) else None
    if kernel not in AXES:
        raise Mistake(f"--shapes {path}: entry {i} has the kernel {kernel!r}; allowed: {', '.join(AXES)}")
    dtype, size = entry.get("dtype", "float32"), entry.get("size")
    if dtype not in DTYPES:
        raise Mistake(f"--shapes {path}: entry {i} has the dtype {dtype!r}; allowed: {', '.join(DTYPES)}")
    numbers = isinstance(size, list) and all(isinstance(n, int) and n > 0 for n in size)
    if not numbers or len(size) != len(AXES[kernel]):
        raise Mistake(f"--shapes {path}: entry {i} has the size {size!r}; allowed: [{', '.join(AXES[kernel])}]")
    return Shape(kernel, dtype, tuple(size))


def of_task(task: Task, steps: int = 2) -> list[Shape]:
    """What the optimizer launches in the first steps of a task, with K-FAC's defaults."""
    from kfac_triton import KFAC

    torch.manual_seed(0)
    model = task.model()
    optimizer = KFAC(model, likelihood=task.likelihood, factor_fraction=1.0, compile=False)
    with recorded() as found:
        for _, (inputs, targets) in zip(range(steps), task.batches(0), strict=False):
            optimizer.zero_grad()
            task.loss(model(inputs), targets).backward()
            optimizer.step()
    optimizer.close()
    return sorted(set(found))


@contextmanager
def recorded() -> Iterator[list[Shape]]:
    """Collects the shapes of every call of the operators while it is entered."""
    from kfac_triton.kernels import conv_syrk, kron_matmul, syrk
    from kfac_triton.kernels._launch import buckets

    found: list[Shape] = []

    def on_syrk(
        F: Sequence[Tensor], X: Sequence[Tensor], alpha: Any, beta: Any, *, bias: Any = None, **options: Any
    ) -> None:
        flags = [False] * len(F) if bias is None else bias
        for bucket in buckets(syrk.entries(F, X, alpha, beta, flags), syrk._key):
            f, x = bucket[0].F, bucket[0].X
            count = len(bucket) * (f.shape[0] if f.ndim > 2 else 1)
            rows = x.shape[-2] * (x.shape[-3] if x.ndim > f.ndim else 1)
            found.append(Shape("syrk", _name(x.dtype), (count, rows, x.shape[-1])))
        originals["syrk_"](F, X, alpha, beta, bias=bias, **options)

    def on_conv(F: Sequence[Tensor], P: Sequence[ops.Patches], *scalars: Any, **options: Any) -> None:
        for f, patches in zip(F, P, strict=True):
            window = conv_syrk.window_of(patches.window)
            d = window.kernel[0] * window.kernel[1] * patches.image.shape[1] // patches.groups
            count = f.shape[0] if f.ndim > 2 else 1
            found.append(Shape("conv_syrk", _name(patches.image.dtype), (count, patches.count(), d)))
        originals["conv_syrk_"](F, P, *scalars, **options)

    def on_kron(
        out: Sequence[Tensor], G_inv: Sequence[Tensor], V: Sequence[Tensor], A_inv: Sequence[Tensor], **options: Any
    ) -> None:
        for bucket in buckets(kron_matmul.layers(out, G_inv, V, A_inv), kron_matmul._key):
            o = bucket[0].out
            count, (M, N) = len(bucket) * (o.shape[0] if o.ndim > 2 else 1), o.shape[-2:]
            found.extend(Shape("kron_matmul", "float32", (count, M, N, terms)) for terms in (M, N))
        originals["kron_matmul_"](out, G_inv, V, A_inv, **options)

    replaced: dict[str, Any] = {"syrk_": on_syrk, "conv_syrk_": on_conv, "kron_matmul_": on_kron}
    ops.load()
    originals = {name: getattr(ops, name) for name in replaced}
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(ops, "fuses", lambda device: True))  # memory as on a GPU
        for name, function in replaced.items():
            stack.enter_context(mock.patch.object(ops, name, function))
        yield found


def _name(dtype: torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    return "float32" if name == "float64" else name
