"""The operators as torch sees them: schemas, compilation, refusals, and life without Triton."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch
from torch import Tensor

from kfac_triton import ops
from kfac_triton.kernels import _launch, kron_matmul, syrk


def scalar(value: float = 0.5) -> Tensor:
    return torch.tensor(value)


def syrk_arguments(batch=(), bias=True, dtype=torch.float32):
    torch.manual_seed(0)
    return torch.eye(5).repeat(*batch, 1, 1), torch.randn(*batch, 6, 5 - bias).to(dtype), scalar(0.3), scalar(0.7), bias


def kron_arguments():
    torch.manual_seed(0)
    V = [torch.randn(3, 4), torch.randn(2, 3, 4)]
    G_inv, A_inv = [torch.randn(3, 3), torch.randn(2, 3)], [torch.randn(4), torch.randn(2, 4, 4)]
    return [torch.zeros_like(v) for v in V], G_inv, V, A_inv


@pytest.mark.parametrize("arguments", [syrk_arguments(), syrk_arguments((2,), False, torch.bfloat16)])
def test_opcheck_syrk(arguments):
    torch.library.opcheck(torch.ops.kfac_triton.syrk_.default, arguments)


def test_opcheck_kron_matmul():
    torch.library.opcheck(torch.ops.kfac_triton.kron_matmul_.default, kron_arguments())
    torch.library.opcheck(torch.ops.kfac_triton.kron_matmul_.default, (*kron_arguments(), True))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_without_a_graph_break(backend):
    """The written tensors are read again inside the graph, so a lost mutation would show."""

    def step(F, X, alpha, beta, out, G_inv, V, A_inv):
        ops.syrk_(F, X, alpha, beta, bias=True)
        ops.kron_matmul_(out, G_inv, V, A_inv)
        return F * 2, [o * 2 for o in out]

    F, X, alpha, beta, _ = syrk_arguments()
    eager = step(F.clone(), X, alpha, beta, *kron_arguments())
    out, *rest = kron_arguments()
    compiled = torch.compile(step, fullgraph=True, backend=backend)(F, X, alpha, beta, out, *rest)
    torch.testing.assert_close(compiled, eager, rtol=0, atol=0)
    torch.testing.assert_close((F * 2, [o * 2 for o in out]), eager, rtol=0, atol=0)


def test_a_new_alpha_does_not_recompile():
    counter = torch._dynamo.testing.CompileCounter()
    step = torch.compile(lambda F, X, a, b: ops.syrk_(F, X, a, b), fullgraph=True, backend=counter)
    for alpha in (0.1, 0.2, 1.0):
        step(torch.zeros(3, 3), torch.ones(4, 3), scalar(alpha), scalar(0.0))
    assert counter.frame_count == 1


F5, X4, V34 = torch.zeros(5, 5), torch.zeros(6, 4), torch.zeros(3, 4)

SYRK_MISTAKES = {
    "F has shape (5, 5); allowed: (4, 4), from X (6, 4) and bias=False": lambda: ops.syrk_(F5, X4, scalar(), scalar()),
    "F has shape (5, 5); allowed: (2, 5, 5)": lambda: ops.syrk_(F5, torch.zeros(2, 6, 5), scalar(), scalar()),
    "X has shape (4,); allowed: (n, d)": lambda: ops.syrk_(F5, torch.zeros(4), scalar(), scalar()),
    "X has shape (6, 0); allowed": lambda: ops.syrk_(
        torch.zeros(1, 1), torch.zeros(6, 0), scalar(), scalar(), bias=True
    ),
    "F has dtype torch.bfloat16": lambda: ops.syrk_(F5.bfloat16(), X4, scalar(), scalar(), bias=True),
    "X has dtype torch.int64": lambda: ops.syrk_(F5, X4.long(), scalar(), scalar(), bias=True),
    "F has column stride 2": lambda: ops.syrk_(torch.zeros(5, 10)[:, ::2], X4, scalar(), scalar(), bias=True),
    "X is on meta": lambda: ops.syrk_(F5, X4.to("meta"), scalar(), scalar(), bias=True),
    "alpha is 0.5; allowed: a 0-d tensor on cpu": lambda: ops.syrk_(F5, X4, 0.5, scalar(), bias=True),
    "beta is torch.int64 of shape ()": lambda: ops.syrk_(F5, X4, scalar(), torch.tensor(1), bias=True),
    "beta is torch.float32 of shape (1,)": lambda: ops.syrk_(F5, X4, scalar(), torch.ones(1), bias=True),
    "alpha is on meta": lambda: ops.syrk_(F5, X4, scalar().to("meta"), scalar(), bias=True),
}

KRON_MISTAKES = {
    "V has 2 entries; allowed: 1": ([V34], [torch.zeros(3, 3)], [V34, V34], [torch.zeros(4, 4)]),
    "V[0] has shape (4, 3); allowed: (3, 4)": ([V34], [torch.zeros(3, 3)], [V34.mT], [torch.zeros(4, 4)]),
    "G_inv[0] has shape (4, 4); allowed: (3, 3) or (3,)": ([V34], [torch.zeros(4, 4)], [V34], [torch.zeros(4, 4)]),
    "A_inv[0] has shape (3,); allowed: (4, 4) or (4,)": ([V34], [torch.zeros(3)], [V34], [torch.zeros(3)]),
    "out[0] has shape (4,)": ([V34[0]], [torch.zeros(3)], [V34], [torch.zeros(4)]),
    "out[0] has dtype torch.float16": ([V34.half()], [torch.zeros(3)], [V34.clone()], [torch.zeros(4)]),
    "G_inv[0] has dtype torch.float64": ([V34], [torch.zeros(3).double()], [V34.clone()], [torch.zeros(4)]),
    "A_inv[0] has dtype torch.bfloat16": ([V34], [torch.zeros(3)], [V34.clone()], [torch.zeros(4).bfloat16()]),
    "V[0] has dtype torch.int64": ([V34], [torch.zeros(3)], [V34.long()], [torch.zeros(4)]),
    "V[0] is on meta": ([V34], [torch.zeros(3)], [V34.to("meta")], [torch.zeros(4)]),
    "out[0] is V[0]": ([V34], [torch.zeros(3)], [V34], [torch.zeros(4)]),
}


@pytest.mark.parametrize("message", SYRK_MISTAKES)
def test_syrk_refuses(message):
    with pytest.raises(ValueError) as error:
        SYRK_MISTAKES[message]()
    assert message in str(error.value)


@pytest.mark.parametrize("message", KRON_MISTAKES)
def test_kron_matmul_refuses(message):
    with pytest.raises(ValueError) as error:
        ops.kron_matmul_(*KRON_MISTAKES[message])
    assert message in str(error.value)


def test_no_layers():
    ops.kron_matmul_([], [], [], [])


def test_the_backend_variable(monkeypatch):
    monkeypatch.setattr(_launch, "triton", object())
    for value, with_default, without in [("", True, False), ("triton", True, True), ("torch", False, False)]:
        monkeypatch.setenv("KFAC_TRITON_BACKEND", value)
        assert (_launch.prefers_triton(True), _launch.prefers_triton(False)) == (with_default, without)
    monkeypatch.setenv("KFAC_TRITON_BACKEND", "cuda")
    with pytest.raises(ValueError, match="KFAC_TRITON_BACKEND is 'cuda'; allowed: triton, torch"):
        _launch.prefers_triton(True)
    monkeypatch.setattr(_launch, "triton", None)
    monkeypatch.setenv("KFAC_TRITON_BACKEND", "triton")
    with pytest.raises(ValueError, match="triton is not installed"):
        _launch.prefers_triton(True)
    monkeypatch.setenv("KFAC_TRITON_BACKEND", "")
    assert not _launch.prefers_triton(True)


def test_the_tile_is_the_largest_that_fills_the_device():
    def choose(d: int, batch: int = 1) -> tuple[int, bool]:
        F, X = torch.empty(batch, d, d), torch.empty(batch, 8, d)
        tile, fills = syrk._choose(F, X)
        return tile.block, fills

    assert choose(64) == (32, False)
    assert choose(512) == (32, True)
    assert choose(1024) == (64, True)
    assert choose(2048) == (128, True)
    assert choose(64, batch=200) == (64, True)
    assert choose(8, batch=200) == (32, True)
    tile, _ = syrk._choose(torch.empty(2048, 2048), torch.empty(2048, 8).mT)
    assert tile.block == 64


def test_syrk_on_a_gpu_chooses(monkeypatch):
    """The rule behind the CUDA key, both ends replaced: float64 never goes to Triton, a small matrix goes to torch."""
    chosen = []
    monkeypatch.setattr(_launch, "triton", object())
    monkeypatch.delenv("KFAC_TRITON_BACKEND", raising=False)
    monkeypatch.setattr(syrk, "launch", lambda *args: chosen.append("triton"))
    monkeypatch.setattr(syrk, "without_sync", lambda *args: chosen.append("torch"))
    large, small = torch.empty(1024, 1024), torch.empty(64, 64)
    for F in (large, small, large.double()):
        syrk._on_gpu(F, F, scalar(), scalar(), False)
    monkeypatch.setenv("KFAC_TRITON_BACKEND", "triton")
    syrk._on_gpu(small, small, scalar(), scalar(), False)
    syrk._on_gpu(small.double(), small, scalar(), scalar(), False)
    monkeypatch.setenv("KFAC_TRITON_BACKEND", "torch")
    syrk._on_gpu(large, large, scalar(), scalar(), False)
    assert chosen == ["triton", "torch", "torch", "triton", "torch", "torch"]


def test_kron_matmul_on_a_gpu_chooses(monkeypatch):
    """Buckets of many small dense float32 layers go to Triton, everything else to torch, and nothing is left out."""
    chosen = {"triton": [], "torch": []}
    monkeypatch.setattr(_launch, "triton", object())
    monkeypatch.delenv("KFAC_TRITON_BACKEND", raising=False)
    monkeypatch.setattr(kron_matmul, "launch", lambda out, *_: chosen["triton"].extend(out))
    monkeypatch.setattr(kron_matmul, "reference", lambda out, *_: chosen["torch"].extend(out))

    def layers(count, d_out, d_in, dtype=torch.float32, G_axes=2):
        shapes = [(d_out, d_in), (d_out,) * G_axes, (d_out, d_in), (d_in, d_in)]
        return [tuple(torch.empty(shape, dtype=dtype) for shape in shapes) for _ in range(count)]

    grouped = layers(4, 8, 9)
    rest = layers(3, 9, 8) + layers(4, 600, 5) + layers(5, 8, 9, torch.float64) + layers(5, 8, 9, G_axes=1)
    kron_matmul._on_gpu(*(list(column) for column in zip(*grouped, *rest, strict=True)))
    assert {id(o) for o in chosen["triton"]} == {id(layer[0]) for layer in grouped}
    assert {id(o) for o in chosen["torch"]} == {id(layer[0]) for layer in rest}
    chosen["torch"].clear()
    kron_matmul._on_gpu(*(list(column) for column in zip(*grouped, strict=True)), bf16=True)
    assert {id(o) for o in chosen["torch"]} == {id(layer[0]) for layer in grouped}


WITHOUT_TRITON = """
    import sys

    sys.modules["triton"] = None
    import torch
    from kfac_triton import ops
    assert "kfac_triton.kernels.syrk" not in sys.modules, "the import loaded the kernels"

    # The first use is inside a compiled function, so the kernels are loaded while it is traced.
    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(F, X, alpha, beta, out, G_inv, V, A_inv):
        ops.syrk_(F, X, alpha, beta)
        ops.kron_matmul_(out, G_inv, V, A_inv)

    X, F, out = torch.randn(6, 3), torch.full((3, 3), torch.nan), [torch.empty(6, 3)]
    G_inv, A_inv = torch.randn(6, 6), torch.randn(3, 3)
    step(F, X, torch.tensor(2.0), torch.tensor(0.0), out, [G_inv], [X], [A_inv])
    torch.testing.assert_close(F, 2 * X.mT @ X)
    torch.testing.assert_close(out[0], G_inv @ X @ A_inv)
    assert "kfac_triton.kernels.syrk" in sys.modules and sys.modules["triton"] is None
    print("fine")
"""


def test_without_triton():
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(WITHOUT_TRITON)], capture_output=True, text=True)
    assert run.stdout == "fine\n", run.stderr
