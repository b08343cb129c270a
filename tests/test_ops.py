"""The operators as torch sees them: schemas, compilation, refusals, and life without Triton."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch
from torch import Tensor

from kfac_triton import ops


def scalar(value: float = 0.5) -> Tensor:
    return torch.tensor(value)


def syrk_arguments(batch=(), bias=True, dtype=torch.float32):
    torch.manual_seed(0)
    X = torch.randn(*batch, 6, 5 - bias).to(dtype)
    return [torch.eye(5).repeat(*batch, 1, 1)], [X], [scalar(0.3)], [scalar(0.7)], [bias]


def kron_arguments():
    torch.manual_seed(0)
    V = [torch.randn(3, 4), torch.randn(2, 3, 4)]
    G_inv, A_inv = [torch.randn(3, 3), torch.randn(2, 3)], [torch.randn(4), torch.randn(2, 4, 4)]
    return [torch.zeros_like(v) for v in V], G_inv, V, A_inv


@pytest.mark.parametrize("arguments", [syrk_arguments(), syrk_arguments((2,), False, torch.bfloat16)])
def test_opcheck_syrk(arguments):
    ops.load()
    torch.library.opcheck(torch.ops.kfac_triton.syrk_.default, arguments)


def spd(d: int) -> Tensor:
    torch.manual_seed(0)
    X = torch.randn(3 * d, d)
    return X.mT @ X / len(X) + 0.1 * torch.eye(d)


def arguments_of(name: str) -> tuple:
    """Arguments of an operator as its schema has them."""
    torch.manual_seed(0)
    if name == "kron_matmul_":
        return (*kron_arguments(), False, torch.zeros(2, 2), [3, 4])
    if name == "conv_syrk_":
        window = [3, 2, 1, 2, 1, 0, 1, 1, 1, 1]
        return [torch.eye(13)], [torch.randn(2, 2, 5, 6)], [scalar(0.3)], [scalar(0.7)], [True], window
    if name == "eigen_scale_":
        out, V = [torch.zeros(3, 4)], [torch.randn(3, 4)]
        return out, [torch.eye(3)], V, [torch.eye(4)], [torch.ones(3, 4)], [scalar()]
    if name == "fused_update_":
        W, buffer, V = (torch.randn(3, 2, 4) for _ in range(3))
        return [W], [buffer], [V], [scalar()], [scalar()], [scalar()], [scalar()]
    return [torch.linalg.inv(spd(5)).contiguous()], [1.1 * spd(5)], torch.zeros(1)


OPERATORS = ["kron_matmul_", "conv_syrk_", "eigen_scale_", "fused_update_", "newton_schulz_"]


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name):
    ops.load()
    torch.library.opcheck(getattr(torch.ops.kfac_triton, name).default, arguments_of(name))


def test_opcheck_bf16():
    ops.load()
    torch.library.opcheck(torch.ops.kfac_triton.kron_matmul_.default, (*kron_arguments(), True))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_without_a_graph_break(backend):
    """The written tensors are read again inside the graph, so a lost mutation would show."""

    def step(F, X, alpha, beta, out, G_inv, V, A_inv):
        ops.syrk_([F], [X], [alpha], [beta], bias=[True])
        ops.kron_matmul_(out, G_inv, V, A_inv)
        return F * 2, [o * 2 for o in out]

    (F,), (X,), (alpha,), (beta,), _ = syrk_arguments()
    eager = step(F.clone(), X, alpha, beta, *kron_arguments())
    out, *rest = kron_arguments()
    compiled = torch.compile(step, fullgraph=True, backend=backend)(F, X, alpha, beta, out, *rest)
    torch.testing.assert_close(compiled, eager, rtol=0, atol=0)
    torch.testing.assert_close((F * 2, [o * 2 for o in out]), eager, rtol=0, atol=0)


@pytest.mark.parametrize("name", OPERATORS[1:])
def test_the_others_compile_too(name):
    """Whatever tensor an operator writes is seen afterwards inside the graph, and outside."""
    ops.load()
    operator = getattr(torch.ops.kfac_triton, name)

    def step(arguments):
        operator(*arguments)
        return [t * 2 for t in arguments[0]]

    eager, compiled = arguments_of(name), arguments_of(name)
    expected = step(eager)
    torch.testing.assert_close(torch.compile(step, fullgraph=True, backend="aot_eager")(compiled), expected)
    torch.testing.assert_close(compiled[0], eager[0])
    if name == "newton_schulz_":
        torch.testing.assert_close(compiled[2], eager[2])


def test_a_new_alpha_does_not_recompile():
    counter = torch._dynamo.testing.CompileCounter()
    step = torch.compile(lambda F, X, a, b: ops.syrk_([F], [X], [a], [b]), fullgraph=True, backend=counter)
    for alpha in (0.1, 0.2, 1.0):
        step(torch.zeros(3, 3), torch.ones(4, 3), scalar(alpha), scalar(0.0))
    assert counter.frame_count == 1


F5, X4, V34 = torch.zeros(5, 5), torch.zeros(6, 4), torch.zeros(3, 4)


def syrk(F, X, alpha=None, beta=None, bias=False, **options):
    a, b = scalar() if alpha is None else alpha, scalar() if beta is None else beta
    return lambda: ops.syrk_([F], [X], [a], [b], bias=[bias], **options)


SYRK_MISTAKES = {
    "F[0] has shape (5, 5); allowed: (4, 4), from X (6, 4), bias=False": syrk(F5, X4),
    "F[0] has shape (5, 5); allowed: (2, 6, 6)": syrk(F5, torch.zeros(2, 6, 5), bias=True),
    "X[0] has shape (4,); allowed: (n, d)": syrk(F5, torch.zeros(4)),
    "X[0] has shape (6, 0); allowed": syrk(torch.zeros(1, 1), torch.zeros(6, 0), bias=True),
    "F[0] has dtype torch.bfloat16": syrk(F5.bfloat16(), X4, bias=True),
    "X[0] has dtype torch.int64": syrk(F5, X4.long(), bias=True),
    "F[0] has column stride 2": syrk(torch.zeros(5, 10)[:, ::2], X4, bias=True),
    "X[0] is on meta": syrk(F5, X4.to("meta"), bias=True),
    "alpha[0] is 0.5; allowed: a 0-d tensor on cpu": syrk(F5, X4, 0.5, bias=True),
    "beta[0] is torch.int64 of shape ()": syrk(F5, X4, beta=torch.tensor(1), bias=True),
    "beta[0] is torch.float32 of shape (1,)": syrk(F5, X4, beta=torch.ones(1), bias=True),
    "alpha[0] is on meta": syrk(F5, X4, scalar().to("meta"), bias=True),
    "X has 2 entries; allowed: 1, as F has": lambda: ops.syrk_([F5], [X4, X4], [scalar()], [scalar()]),
    "precision is 'fp8'; allowed: ieee, tf32, tf32x3, bf16x6": syrk(F5, X4, bias=True, precision="fp8"),
    "backend is 'cuda'; allowed: triton, torch, or None": syrk(F5, X4, bias=True, backend="cuda"),
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


IMAGE, W = torch.zeros(2, 4, 5, 5), torch.zeros(3, 1, 4)
WINDOW = (3, 3, 1, 1, 0, 0, 0, 0, 1, 1)


def update(W=W, buffer=(), V=W, lr=None):
    return lambda: ops.fused_update_(
        [W], buffer, [V], *[[scalar() if s is None else s] for s in (None, lr, None, None)]
    )


def eigen(**changed):
    given = {"out": V34, "Q_G": torch.zeros(3, 3), "V": V34.clone(), "Q_A": torch.zeros(4, 4)}
    given |= {"S": torch.ones(3, 4), "damping": scalar()} | changed
    return lambda: ops.eigen_scale_(*([value] for value in given.values()))


OTHER_MISTAKES = {
    "F[0] has shape (5, 5); allowed: (36, 36)": lambda: ops.conv_syrk_(
        [F5], [ops.Patches(IMAGE, WINDOW, 1)], [scalar()], [scalar()]
    ),
    "P[0] has an image of shape (2, 4, 5, 5), 3 groups and a window of 10 numbers; allowed: (N, C, H, W), a divisor of "
    "C, and ten": lambda: ops.conv_syrk_([F5], [ops.Patches(IMAGE, WINDOW, 3)], [scalar()], [scalar()]),
    "dots has shape (2, 2); allowed: (1, 2)": lambda: ops.kron_matmul_(
        [V34], [torch.zeros(3, 3)], [V34.clone()], [torch.zeros(4, 4)], dots=torch.zeros(2, 2)
    ),
    "splits has 2 entries; allowed: 1, as out has": lambda: ops.kron_matmul_(
        [V34], [torch.zeros(3, 3)], [V34.clone()], [torch.zeros(4, 4)], splits=[1, 2]
    ),
    "Q_A[0] has shape (4,); allowed: (4, 4)": eigen(Q_A=torch.zeros(4)),
    "S[0] has shape (4,); allowed: (3, 4)": eigen(S=torch.ones(4)),
    "damping[0] is 0.5; allowed: a 0-d tensor on cpu": eigen(damping=0.5),
    "W[0] has shape (3, 4); allowed: (rows, taps, channels)": update(V34, V=V34),
    "V[0] has shape (3, 1, 5); allowed: (3, 1, 4)": update(V=torch.zeros(3, 1, 5)),
    "buffer[0] has dtype torch.bfloat16; allowed: torch.float32": update(buffer=[W.bfloat16()]),
    "lr[0] is 0.1; allowed: a 0-d tensor on cpu": update(lr=0.1),
    "X[0] has shape (3, 4); allowed: (d, d) or (B, d, d)": lambda: ops.newton_schulz_([V34], [V34], torch.zeros(1)),
    "X[0] has column stride 5; allowed: 1": lambda: ops.newton_schulz_([spd(5).mT], [F5], torch.zeros(1)),
    "residual has shape (2,); allowed: (1,)": lambda: ops.newton_schulz_([F5], [F5.clone()], torch.zeros(2)),
}


@pytest.mark.parametrize("message", OTHER_MISTAKES)
def test_the_others_refuse(message):
    with pytest.raises(ValueError) as error:
        OTHER_MISTAKES[message]()
    assert message in str(error.value)


def test_nothing_to_do():
    """Empty lists are no mistake: a model may have no layer of a kind."""
    ops.syrk_([], [], [], [])
    ops.conv_syrk_([], [], [], [])
    ops.kron_matmul_([], [], [], [])
    ops.eigen_scale_([], [], [], [], [], [])
    ops.fused_update_([], [], [], [], [], [], [])
    ops.newton_schulz_([], [], torch.zeros(0))


@pytest.mark.parametrize("shape", [(16, 16), (17, 17), (3, 5, 5)])
def test_padded_matrices(shape):
    t = torch.randn(shape)
    found = ops.padded(t)
    assert torch.equal(found, t) and ops.padded(found) is found
    around = ops.whole(found)
    D = around.shape[-1]
    assert D % 16 == 0 and D - shape[-1] < 16 and around.is_contiguous()
    assert torch.equal(around[..., : shape[-1], : shape[-1]], t) and around.count_nonzero() == t.count_nonzero()


WITHOUT_TRITON = """
    import sys

    sys.modules["triton"] = None
    import torch
    from kfac_triton import ops
    assert "kfac_triton.kernels.syrk" not in sys.modules, "the import loaded the kernels"

    # The first use is inside a compiled function, so the kernels are loaded while it is traced.
    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(F, X, alpha, beta, out, G_inv, V, A_inv):
        ops.syrk_([F], [X], [alpha], [beta])
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
