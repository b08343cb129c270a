"""Shared fixtures: where Triton's kernels run in the tests.

With no GPU the kernels run in Triton's interpreter, which must be asked for before their module is imported. Nothing
else sees it: on the CPU the operators never reach a kernel. With a GPU, set TRITON_INTERPRET=1 to run the interpreted
tests too.

Side by side (pytest -n), the workers share the cores, which torch must be told before it is imported.
"""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Callable, Iterator

if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    share = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, share)))

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C works here and in processes begun here, also where the tests run in a shell's background, deaf to it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def tf32(x: np.ndarray) -> np.ndarray:
    """float32 rounded to the ten bits of fraction that an NVIDIA matrix unit keeps."""
    bits = x.astype(np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x0FFF + ((bits >> 13) & 1)) & 0xFFFFE000).astype(np.uint32).view(np.float32)


def bf16_pairs(x: np.ndarray, y: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """The six largest products of x and y in three bfloat16 pieces each, the smallest ones first."""

    def pieces(a: np.ndarray) -> list[np.ndarray]:
        found = []
        for _ in range(3):
            found.append(torch.from_numpy(np.ascontiguousarray(a)).bfloat16().float().numpy())
            a = a - found[-1]
        return found

    p, q = pieces(x), pieces(y)
    return [(p[i], q[total - i]) for total in (2, 1, 0) for i in range(total + 1)]


def repaired_dot(original: Callable[..., object]) -> Callable[..., object]:
    """The interpreter's dot made to follow the hardware: it multiplies the bit patterns of bfloat16 as if they were
    integers, and takes every `input_precision` for "ieee".
    """
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    def values(handle: TensorHandle) -> np.ndarray:
        if handle.dtype.scalar == tl.bfloat16:
            return (handle.data.astype(np.uint32) << 16).view(np.float32)
        return handle.data

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        precision = str(input_precision).upper().rpartition(".")[2]
        rounded = a.dtype.scalar == tl.float32 and precision != "IEEE"
        if a.dtype.scalar != tl.bfloat16 and not rounded:
            return original(self, a, b, d, input_precision, max_num_imprecise_acc)
        x, y = values(a), values(b)
        if not rounded:
            product = x @ y
        elif precision == "TF32X3":
            product = tf32(x - tf32(x)) @ tf32(y) + tf32(x) @ tf32(y - tf32(y)) + tf32(x) @ tf32(y)
        elif precision == "BF16X6":
            product = sum(p @ q for p, q in bf16_pairs(x, y))
        else:
            product = tf32(x) @ tf32(y)
        return TensorHandle(d.data + product.astype(d.data.dtype), d.dtype.scalar)

    return create_dot


@pytest.fixture(scope="session")
def interpreter() -> Iterator[type]:
    """Triton's interpreter with its dot repaired; the class that a test may patch further."""
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("kernels are compiled in this process; TRITON_INTERPRET=1 interprets them")
    from triton.runtime.interpreter import InterpreterBuilder, interpreter_builder

    original = InterpreterBuilder.create_dot
    InterpreterBuilder.create_dot = repaired_dot(original)
    with pytest.MonkeyPatch.context() as patch:
        allowed = ("tf32", "tf32x3", "ieee", "bf16x6")
        options = dataclasses.replace(interpreter_builder.options, allowed_dot_input_precisions=allowed)
        patch.setattr(interpreter_builder, "options", options)
        yield InterpreterBuilder
    InterpreterBuilder.create_dot = original


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def kernel_device(request: pytest.FixtureRequest) -> str:
    """The device of a test that launches a kernel: the interpreter's CPU, or a GPU."""
    if request.param == "cpu":
        request.getfixturevalue("interpreter")
    elif not torch.cuda.is_available():
        pytest.skip("no CUDA or ROCm device")
    elif os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("TRITON_INTERPRET=1: kernels are interpreted in this process")
    return request.param


@pytest.fixture(params=["forwards", "backwards", "scattered"])
def program_order(request: pytest.FixtureRequest, interpreter: type, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs the programs of a grid in another order, as a GPU may."""
    set_grid_idx = interpreter.set_grid_idx

    def place(self, x, y, z):
        count = self.grid_dim[0]
        if request.param == "backwards":
            x = count - 1 - x
        elif request.param == "scattered":
            x = int(np.random.default_rng(count).permutation(count)[x])
        set_grid_idx(self, x, y, z)

    monkeypatch.setattr(interpreter, "set_grid_idx", place)
    return request.param


@pytest.fixture
def strays(interpreter: type, monkeypatch: pytest.MonkeyPatch) -> Callable[[torch.Tensor, torch.Tensor], int]:
    """(around, view) -> how many addresses in `around`, beside its view `view`, interpreted kernels have touched.

    A read out of bounds may change no result; only this shows it.
    """
    seen: list[np.ndarray] = []
    load, store = interpreter.create_masked_load, interpreter.create_masked_store

    def create_masked_load(self, ptrs, mask, *rest):
        seen.append(np.atleast_1d(ptrs.data)[np.atleast_1d(mask.data).astype(bool)])
        return load(self, ptrs, mask, *rest)

    def create_masked_store(self, ptrs, value, mask, *rest):
        seen.append(np.atleast_1d(ptrs.data)[np.atleast_1d(mask.data).astype(bool)])
        return store(self, ptrs, value, mask, *rest)

    monkeypatch.setattr(interpreter, "create_masked_load", create_masked_load)
    monkeypatch.setattr(interpreter, "create_masked_store", create_masked_store)

    def count(around: torch.Tensor, view: torch.Tensor) -> int:
        touched = np.unique(np.concatenate(seen).astype(np.int64))
        touched = touched[(touched >= around.data_ptr()) & (touched < around.data_ptr() + around.nbytes)]
        assert touched.size, "the tensor was not touched at all"
        elements = torch.arange(around.numel()).as_strided(view.shape, view.stride(), view.storage_offset())
        return int((~np.isin(touched, around.data_ptr() + elements.numpy() * around.element_size())).sum())

    return count


@pytest.fixture(params=["at once", "rows wait", "padded", "for kernels"])
def matrix_memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Narrow matrices are held as wide ones are: their rows wait, and start at multiples of 16 elements; or as kernels
    want them, with zeros around both dimensions."""
    if request.param == "for kernels":
        request.getfixturevalue("interpreter")
        monkeypatch.setenv("KFAC_TRITON_BACKEND", "triton")
    from kfac_triton import joint
    from kfac_triton.structures import buffered, factor

    monkeypatch.setattr(buffered, "NARROWEST", 1 if request.param == "rows wait" else 128)
    for module in (joint, factor):
        monkeypatch.setattr(module, "ALIGNED", 1 if request.param == "padded" else 128)
    return request.param


@pytest.fixture
def as_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU is served as a GPU is: nothing is read on the host, and the numbers of a step are tensors."""
    from kfac_triton import averages, estimator, numbers, updates
    from kfac_triton.linalg import factors
    from kfac_triton.steps import capped, fixed, hyper, motion, runner
    from kfac_triton.structures import inverse_free, inversion, kronecker

    for module in (
        averages,
        capped,
        estimator,
        factors,
        fixed,
        hyper,
        inverse_free,
        inversion,
        kronecker,
        motion,
        numbers,
        runner,
        updates,
    ):
        monkeypatch.setattr(module, "on_host", lambda device: False)
