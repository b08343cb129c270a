"""eigen_scale_ against the dense inverse of G (x) A + damping I in float64: the reference and the Triton kernel."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kfac_triton import ops
from kfac_triton.kernels import eigen_scale
from kfac_triton.kernels._grouped import TILES
from kfac_triton.kernels.tiles import Tile

SMALL = Tile(32, 32, 4, 3)
SIZES = [(20, 35), (1, 33), (64, 32), (40, 1)]


def spd(d: int, batch: tuple[int, ...], seed: int) -> Tensor:
    torch.manual_seed(seed)
    X = torch.randn(*batch, 2 * d + 1, d, dtype=torch.float64)
    return X.mT @ X / X.shape[-2]


def make(d_out: int, d_in: int, damping: float = 0.125, batch=(), dtype=torch.float32, device="cpu"):
    """An entry of every list with NaN in out, and the answer by a dense solve."""
    A, G = spd(d_in, batch, 1), spd(d_out, batch, 2)
    V = torch.randn(*batch, d_out, d_in, dtype=torch.float64)
    lambda_A, Q_A = torch.linalg.eigh(A)
    lambda_G, Q_G = torch.linalg.eigh(G)
    fisher = torch.stack(
        [torch.kron(g, a) for g, a in zip(G.view(-1, d_out, d_out), A.view(-1, d_in, d_in), strict=True)]
    )
    fisher += damping * torch.eye(d_in * d_out, dtype=torch.float64)
    E = torch.linalg.solve(fisher, V.reshape(len(fisher), -1, 1)).view(V.shape)
    S = lambda_G.unsqueeze(-1) * lambda_A.unsqueeze(-2)
    tensors = [torch.full_like(V, torch.nan), Q_G, V, Q_A, S, torch.tensor(damping).double()]
    return eigen_scale.Layer(*(t.to(device, dtype) for t in tensors)), E


def check(layer: eigen_scale.Layer, E: Tensor, tolerance: float = 5e-6) -> None:
    error = (layer.out.double().cpu() - E).abs().max().item()
    assert error <= tolerance * E.abs().max().item(), error


@pytest.fixture(params=["reference", "triton"])
def apply(request):
    if request.param == "triton":
        request.getfixturevalue("interpreter")
        return lambda layer: eigen_scale.launch([layer], tile=SMALL, precision="ieee")
    return eigen_scale.reference


@pytest.mark.parametrize("batch", [(), (2,)])
@pytest.mark.parametrize("size", SIZES)
def test_against_the_dense_inverse(apply, size, batch):
    layer, E = make(*size, batch=batch)
    apply(layer)
    check(layer, E)


def test_eigenvalues_of_any_kind(apply):
    """S need not be an outer product."""
    layer, _ = make(20, 35)
    S = torch.rand(20, 35) * 3
    apply(layer._replace(S=S))
    Q_G, V, Q_A = (t.double() for t in layer[1:4])
    check(layer, Q_G @ ((Q_G.mT @ V @ Q_A) / (S.double() + 0.125)) @ Q_A.mT)


def test_float64():
    layer, E = make(7, 5, dtype=torch.float64)
    ops.eigen_scale_(*([t] for t in layer))
    check(layer, E, 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_gradient_of_another_dtype(apply, dtype):
    layer, _ = make(20, 35)
    V = layer.V.to(dtype)
    wide = eigen_scale.Layer(*(t.double() for t in layer._replace(V=V)))
    eigen_scale.reference(wide)
    layer = layer._replace(V=V)
    apply(layer)
    check(layer, wide.out)


@pytest.mark.parametrize("tile", TILES)
def test_every_shipped_tile(kernel_device, tile):
    layer, E = make(20, 35, device=kernel_device)
    eigen_scale.launch([layer], tile=tile)
    check(layer, E)


def test_several_layers_with_dampings_of_their_own(kernel_device):
    made = [make(20, 35, 0.125, device=kernel_device), make(9, 8, 0.25, device=kernel_device)]
    made += [make(20, 35, 0.5, device=kernel_device)]
    ops.eigen_scale_(*(list(column) for column in zip(*(layer for layer, _ in made), strict=True)), backend="triton")
    for layer, E in made:
        check(layer, E)


def test_program_order_does_not_matter(program_order):
    layer, E = make(20, 70)
    eigen_scale.launch([layer], tile=SMALL, precision="ieee")
    check(layer, E)


def test_nothing_beyond_the_arguments_is_read_or_written(apply):
    """NaN around every matrix."""
    layer, E = make(20, 35)
    around = [torch.full((60, 60), torch.nan) for _ in layer[:5]]
    inside = []
    for memory, t in zip(around, layer[:5], strict=True):
        view = memory[tuple(slice(9, 9 + size) for size in t.shape)]
        inside.append(view.copy_(t))
    layer = eigen_scale.Layer(*inside, layer.damping)
    apply(layer)
    check(layer, E)
    layer.out.fill_(torch.nan)
    assert around[0].isnan().all()


def test_an_empty_layer(apply):
    layer = eigen_scale.Layer(*(torch.empty(s) for s in ((0, 5), (0, 0), (0, 5), (5, 5), (0, 5), ())))
    apply(layer)
    assert layer.out.shape == (0, 5)


def test_error_against_torch(kernel_device):
    """At most a few times that of the reference in the same float32, against the reference in float64."""
    layer, _ = make(60, 90, device=kernel_device)
    exact = eigen_scale.Layer(*(t.double() for t in layer))
    own = layer._replace(out=torch.empty_like(layer.out))
    eigen_scale.reference(exact)
    eigen_scale.reference(own)
    eigen_scale.launch([layer], tile=Tile(64, 32, 4, 3), precision=None if torch.version.hip else "tf32x3")
    error, torchs = ((t.out.double() - exact.out).abs().max().item() for t in (layer, own))
    assert error <= 4 * torchs


def test_out_at_an_address_of_V():
    layer, _ = make(5, 5)
    with pytest.raises(ValueError, match=r"out\[0\] starts at the address of an entry of V"):
        ops.eigen_scale_(*([t] for t in layer._replace(V=layer.out[:])))
