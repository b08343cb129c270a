"""newton_schulz_ against inverses in float64, from starts near and far: the reference and the Triton kernel."""

from __future__ import annotations

import pytest
import torch
from stacks import Bench, stack_of
from torch import Tensor

from kfac_triton import ops
from kfac_triton.kernels import newton_schulz
from kfac_triton.kernels.tiles import Tile
from kfac_triton.linalg import factors


def spd(d: int, batch: tuple[int, ...] = (), least: float = 1e-2, seed: int = 0) -> Tensor:
    """Eigenvalues from `least` to 1, evenly in the logarithm."""
    torch.manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(*batch, d, d, dtype=torch.float64))[0]
    M = (Q * torch.logspace(0, torch.tensor(least).log10().item(), d, dtype=torch.float64)) @ Q.mT
    return ((M + M.mT) / 2).float()


def start(M: Tensor, change: float, scale: float = 1.0) -> Tensor:
    """The inverse of a matrix that differs from M by `change` of its size, times `scale`."""
    other = torch.linalg.inv(M.double() + change * spd(M.shape[-1], M.shape[:-2], seed=1).double())
    return (scale * (other + other.mT) / 2).float().contiguous()


@pytest.fixture(params=["reference", "triton"])
def invert(request):
    if request.param == "triton":
        request.getfixturevalue("interpreter")
        return lambda pairs, residual: newton_schulz.launch(pairs, residual, tile=Tile(32, 32, 4, 3))
    return newton_schulz.reference


def error(X: Tensor, M: Tensor) -> float:
    E = torch.linalg.inv(M.double())
    return ((X.double() - E).norm() / E.norm()).item()


@pytest.mark.parametrize("batch", [(), (2,)])
@pytest.mark.parametrize(("d", "change", "scale"), [(40, 0.1, 1.0), (33, 0.5, 1e4), (32, 0.0, 1e-3), (1, 0.3, 1.0)])
def test_from_an_earlier_inverse(invert, d, change, scale, batch):
    M = spd(d, batch)
    X = start(M, change, scale)
    residual = torch.full((1,), torch.nan)
    invert([(X, M)], residual)
    assert torch.equal(X, X.mT), "not symmetric bit for bit"
    assert residual.item() < 1e-4 and error(X, M) < 1e-5
    left = torch.linalg.matrix_norm(torch.eye(d) - (M.double() @ X.double())).square().sum().sqrt()
    assert abs(residual.item() - left.item()) < 1e-4


def test_a_stiff_matrix(invert):
    """Condition 1e3, where one TF32 product would stall at 4e-2: as exact as float32 allows."""
    M = spd(40, least=1e-3)
    X = start(M, 0.05)
    residual = torch.empty(1)
    invert([(X, M)], residual)
    cholesky = torch.cholesky_inverse(torch.linalg.cholesky(M))
    assert residual.item() < 5e-3
    assert error(X, M) < 10 * error(cholesky, M)


@pytest.mark.parametrize("bad", ["far", "negative", "nan"])
def test_a_start_from_which_nothing_converges_shows(invert, bad):
    M = spd(40)
    X = {
        "far": start(M, 0.0) @ torch.diag(torch.linspace(-1, 40, 40)),
        "negative": 2 * torch.ones(40, 40) - torch.eye(40),
        "nan": torch.full((40, 40), torch.nan),
    }[bad]
    X = ((X + X.mT) / 2).contiguous()
    residual = torch.zeros(1)
    invert([(X, M)], residual)
    assert not residual.item() <= factors.CONVERGED


def test_one_that_fails_leaves_the_others_alone(interpreter):
    M = [spd(40), spd(40, seed=3), spd(33)]
    X = [start(M[0], 0.1), torch.full((40, 40), torch.nan), start(M[2], 0.1)]
    residual = torch.zeros(3)
    ops.newton_schulz_(X, M, residual, backend="triton")
    assert residual[0] < 1e-3 and residual[2] < 1e-3 and not residual[1] <= factors.CONVERGED
    assert error(X[0], M[0]) < 1e-4 and error(X[2], M[2]) < 1e-4


def test_an_empty_batch(interpreter):
    X, residual = torch.empty(0, 5, 5), torch.full((1,), torch.nan)
    newton_schulz.launch([(X, X.clone())], residual)
    assert residual.item() == 0


def test_padded_rows_stay_zero_outside(interpreter):
    M = ops.padded(spd(33))
    X = ops.padded(start(M, 0.1))
    residual = torch.zeros(1)
    ops.newton_schulz_([X], [M], residual, backend="triton")
    assert error(X, M) < 1e-5
    assert not ops.whole(X)[33:].any() and not ops.whole(X)[:, 33:].any()


def test_program_order_does_not_matter(program_order):
    M = spd(70)
    X = start(M, 0.1)
    residual = torch.empty(1)
    newton_schulz.launch([(X, M)], residual, tile=Tile(32, 32, 4, 3))
    assert error(X, M) < 1e-5


def test_offsets_beyond_32_bits(interpreter):
    """X spread over memory that is reserved and not used; an offset that wraps around lands before it, still inside."""
    half, stride = 2**31, 2**30 + 4
    try:
        memory = torch.empty(2 * half + 64)
    except RuntimeError:
        pytest.skip("the machine does not reserve that much memory")
    M = spd(3, least=0.1)
    X = memory.as_strided((3, 3), (stride, 1), half)
    X.copy_(start(M, 0.1))
    residual = torch.empty(1)
    newton_schulz.launch([(X, M)], residual, tile=Tile(16, 16, 4, 2))
    assert error(X, M) < 1e-5


@pytest.mark.parametrize("groups", [1, 2])
def test_damped_inverses_by_iteration_are_those_by_cholesky(interpreter, monkeypatch, groups):
    """From the inverses before, with damping of another size; a side without any takes Cholesky."""
    batch = (groups,) if groups > 1 else ()
    A, G = 30 * spd(20, batch), 1e-3 * spd(12, batch, seed=2)
    last = factors.damped_inverses(A * 1.2, G * 0.9, 1e-3)
    wanted = factors.damped_inverses(A, G, 3e-3)
    used = []
    newton = ops.newton_schulz_
    monkeypatch.setattr(ops, "newton_schulz_", lambda X, M, residual: (used.append(len(X)), newton(X, M, residual)))
    monkeypatch.setenv("KFAC_TRITON_BACKEND", "triton")
    shapes = factors.Shape(20), factors.Shape(12)
    pairs = [factors.Pair(A, G, 3e-3, *shapes, last=last), factors.Pair(A, G, 3e-3, *shapes)]
    for found in factors.all_damped_inverses(pairs):
        for inverse, E in zip(found, wanted, strict=True):
            torch.testing.assert_close(inverse, E, rtol=1e-4, atol=1e-4 * E.abs().max().item())
    assert used == [2]


def test_what_does_not_converge_is_inverted_by_cholesky(interpreter, monkeypatch):
    A, G = spd(20), spd(12, seed=2)
    wanted = factors.damped_inverses(A, G, 1e-3)
    monkeypatch.setenv("KFAC_TRITON_BACKEND", "triton")
    last = (torch.full_like(A, torch.nan), -torch.ones_like(G))
    (found,) = factors.all_damped_inverses([factors.Pair(A, G, 1e-3, factors.Shape(20), factors.Shape(12), last=last)])
    for inverse, E in zip(found, wanted, strict=True):
        assert torch.equal(inverse, E)


def test_a_stack_takes_the_iteration_from_its_last_inverses(interpreter, monkeypatch):
    """Its first ones come from Cholesky; a layer for which the iteration does not converge goes back to that."""
    bench = Bench(stack_of("linear", 2, dtype=torch.float32))
    structure = bench.structure
    for i in range(2):
        structure.A.values[i].copy_(spd(5, seed=i))
        structure.G.values[i].copy_(spd(3, seed=2 + i))
    monkeypatch.setenv("KFAC_TRITON_BACKEND", "triton")
    used = []
    newton = ops.newton_schulz_
    monkeypatch.setattr(ops, "newton_schulz_", lambda X, M, residual: (used.append(len(X)), newton(X, M, residual)))
    assert structure.refresh_([0, 1], [1e-3, 1e-3]) == [True, True] and used == []
    structure.A.values.mul_(1.2)
    structure.A.inverse[1].fill_(torch.nan)
    assert structure.refresh_([0, 1], [2e-3, 3e-3]) == [True, True] and used == [4]
    for i, damping in enumerate((2e-3, 3e-3)):
        wanted = factors.damped_inverses(structure.A.values[i].double(), structure.G.values[i].double(), damping)
        for inverse, E in zip((structure.A.inverse[i], structure.G.inverse[i]), wanted, strict=True):
            torch.testing.assert_close(inverse.double(), E, rtol=1e-3, atol=1e-4 * E.abs().max().item())
