"""Which operator takes its kernel: the rules, what overrules them, and what happens where a kernel does not compile."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import textwrap

import pytest
import torch

from kfac_triton import ops
from kfac_triton.kernels import _launch, dispatch, eigen_scale, fused_update, kron_matmul, newton_schulz, syrk

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture
def gpu(monkeypatch):
    """A CUDA device as the rules see it; sets the generation. Triton counts as installed."""
    monkeypatch.setattr(_launch, "triton", object())
    monkeypatch.delenv("KFAC_TRITON_BACKEND", raising=False)
    monkeypatch.setattr(torch.version, "hip", None)

    def is_of(major: int) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))

    is_of(9)
    return is_of


def test_what_overrules_the_rules(gpu, monkeypatch):
    for value, where_it_says_so, elsewhere in [("", True, False), ("triton", True, True), ("torch", False, False)]:
        monkeypatch.setenv("KFAC_TRITON_BACKEND", value)
        assert dispatch.takes_triton(True, CUDA) == where_it_says_so
        assert dispatch.takes_triton(False, CUDA) == elsewhere
        assert dispatch.takes_triton(False, CUDA, "triton")
        assert not dispatch.takes_triton(True, CUDA, "torch")


def test_mistakes(gpu, monkeypatch):
    with pytest.raises(ValueError, match="backend is 'cuda'; allowed: triton, torch, or None"):
        dispatch.takes_triton(True, CUDA, "cuda")
    monkeypatch.setenv("KFAC_TRITON_BACKEND", "cuda")
    with pytest.raises(ValueError, match="KFAC_TRITON_BACKEND is 'cuda'; allowed: triton, torch, or unset"):
        dispatch.takes_triton(True, CUDA)
    monkeypatch.setattr(_launch, "triton", None)
    monkeypatch.setenv("KFAC_TRITON_BACKEND", "triton")
    for device in (CUDA, CPU):
        with pytest.raises(ValueError, match="KFAC_TRITON_BACKEND is 'triton', and triton is not installed"):
            dispatch.takes_triton(True, device)
    with pytest.raises(ValueError, match="backend is 'triton', and triton is not installed"):
        dispatch.takes_triton(True, CPU, "triton")
    monkeypatch.setenv("KFAC_TRITON_BACKEND", "")
    assert not dispatch.takes_triton(True, CUDA)


def test_the_cpu_interprets_only_when_asked(gpu, monkeypatch):
    for interpreted in (True, False):
        monkeypatch.setattr(dispatch, "interpreted", lambda interpreted=interpreted: interpreted)
        assert not dispatch.takes_triton(True, CPU)
        monkeypatch.setenv("KFAC_TRITON_BACKEND", "triton")
        assert dispatch.takes_triton(True, CPU) == interpreted
        monkeypatch.delenv("KFAC_TRITON_BACKEND")
    with pytest.raises(ValueError, match="backend is 'triton' for CPU tensors; allowed: torch, or TRITON_INTERPRET=1"):
        dispatch.takes_triton(True, CPU, "triton")


def rule(n=4096, d=2048, count=1, aligned=True, precision="tf32x3", dtype=torch.float32):
    return dispatch.syrk(dtype, n, d, count, aligned, precision, CUDA)


def test_the_rule_of_syrk(gpu, monkeypatch):
    assert rule(d=4096) and rule(count=24, d=64) and rule(count=2, dtype=torch.bfloat16, precision="ieee")
    assert not rule(n=40, d=4096), "few rows"
    assert not rule(d=4096, aligned=False)
    assert not rule(d=4096, precision="ieee"), "no matrix units for strict float32"
    measured_slower = [(1024, torch.float32), (128, torch.float32), (4096, torch.bfloat16)]
    assert not any(rule(d=d, dtype=dtype, precision="ieee" if dtype != torch.float32 else "tf32x3")
                   for d, dtype in measured_slower), "where cuBLAS was measured to be faster"  # fmt: skip
    gpu(8)
    assert rule(d=1024), "on an A100 it was not"
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert rule(precision="ieee"), "AMD's matrix units take float32"


def test_the_other_rules(gpu):
    def conv(*given):
        return dispatch.conv_syrk(*given, CUDA)

    assert conv(16, True, "ieee", torch.bfloat16) and not conv(24, True, "ieee", torch.bfloat16)
    assert not conv(64, True, "tf32x3", torch.float32), "where unfolding was measured to be faster"
    gpu(8)
    assert conv(64, True, "tf32x3", torch.float32)
    assert not conv(3, False, "tf32x3", torch.float32) and not conv(24, True, "tf32x3", torch.float32)
    assert not conv(64, True, "ieee", torch.float32)
    gpu(9)
    assert dispatch.grouped(4, 512, 100) and not dispatch.grouped(3, 512, 100) and not dispatch.grouped(4, 513, 100)
    assert not dispatch.newton_schulz()
    assert dispatch.tf32_needs_descriptors(CUDA)
    gpu(8)
    assert not dispatch.tf32_needs_descriptors(CUDA)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_arithmetic_without_a_kernel_goes_to_torch(interpreter, monkeypatch, dtype):
    """Asked for Triton: float64 and diagonal factors still come out right, by torch."""
    used = []
    for module, name in ((syrk, "syrk"), (kron_matmul, "kron"), (eigen_scale, "eigen"), (newton_schulz, "newton")):
        monkeypatch.setattr(module, "launch", lambda *args, name=name, **options: used.append(name))
    monkeypatch.setattr(fused_update, "launch", lambda *args: used.append("update"))
    eye, scalar = torch.eye(4, dtype=dtype), torch.tensor(0.5, dtype=dtype)
    ops.syrk_([eye.clone()], [eye], [scalar], [scalar], backend="triton")
    ops.kron_matmul_([eye.clone()], [eye], [eye], [eye], backend="triton")
    ops.eigen_scale_([eye.clone()], [eye], [eye], [eye], [eye], [scalar], backend="triton")
    ops.newton_schulz_([eye.clone()], [eye], torch.zeros(1, dtype=dtype), backend="triton")
    cube = eye.unsqueeze(1)
    ops.fused_update_([cube.clone()], [], [cube], *[[scalar]] * 4, backend="triton")
    assert used == (["syrk", "kron", "eigen", "newton", "update"] if dtype == torch.float32 else [])
    diagonal, out = torch.full((4,), 2.0, dtype=dtype), eye.clone()
    ops.kron_matmul_([out], [diagonal], [eye], [eye], backend="triton")
    assert torch.equal(out, 2 * eye)


def test_an_error_of_the_device_is_not_the_compilers(monkeypatch):
    monkeypatch.setattr(_launch, "interpreted", lambda: False)
    for error in (torch.OutOfMemoryError("all of it"), torch.AcceleratorError("illegal address")):

        def fail(error=error):
            raise error

        with pytest.raises(type(error)):
            _launch.attempt("syrk", (1, 2), CPU, fail, lambda: pytest.fail("went on"))


def test_one_warning_for_a_kernel_that_does_not_compile(monkeypatch, caplog):
    monkeypatch.setattr(_launch, "interpreted", lambda: False)
    failed: set = set()
    monkeypatch.setattr(_launch, "_failed", lambda: failed)
    tried, served = [], []

    def fail():
        tried.append(1)
        raise RuntimeError("out of registers\nand so on")

    with caplog.at_level(logging.WARNING, "kfac_triton"):
        for shape in ((3, 4), (3, 4), (5, 6)):
            _launch.attempt("syrk", shape, CPU, fail, lambda: served.append(1))
    assert len(tried) == 2 and len(served) == 3
    assert [record.message for record in caplog.records] == [
        f"kernel syrk failed to compile for {shape} on cpu (RuntimeError: out of registers); torch's own operations "
        "serve there"
        for shape in ("(3, 4)", "(5, 6)")
    ]


TRAINS_ANYHOW = """
    import logging, torch
    logging.basicConfig(format="%(message)s")
    from kfac_triton import KFAC
    from kfac_triton.kernels import dispatch
    # The kernels are compiled here and there is no driver to compile them for: as on a GPU whose compiler fails.
    dispatch.takes_triton = lambda rule, device, backend=None: True
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(16, 4, 3), torch.nn.Flatten(), torch.nn.Linear(16, 5))
    optimizer = KFAC(model, likelihood="categorical", compile=False, inverse_interval=2)
    x, y = torch.randn(160, 16, 4, 4), torch.arange(160) % 5
    for _ in range(4):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
    print(float(loss))
"""


def test_training_goes_on_where_no_kernel_compiles():
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("kernels compile here")
    environment = {key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET",)}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(TRAINS_ANYHOW)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1.6
    for kernel in ("syrk", "conv_syrk", "kron_matmul", "fused_update", "newton_schulz"):
        lines = [line for line in done.stderr.splitlines() if line.startswith(f"kernel {kernel} failed to compile for")]
        assert lines and len(lines) == len(set(lines)), kernel
