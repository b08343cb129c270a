"""kron_matmul_ against dense float64 algebra: the reference and the Triton kernel."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kfac_triton import ops
from kfac_triton.kernels import _grouped, kron_matmul
from kfac_triton.kernels._launch import buckets
from kfac_triton.kernels.tiles import Tile

# Error allowed, relative to the largest entry, by the factors' dtype.
TOLERANCE = {torch.float32: 3e-6, torch.float64: 1e-13}
# The error may be at most this many times that of torch's own float32 product.
TIMES_TORCH = 3.0

SMALL = Tile(32, 32, 4, 3)
# (d_out, d_in): below, at and beside multiples of the tile; one output; more rows than columns and the reverse.
SIZES = [(70, 40), (64, 64), (1, 33), (31, 1), (10, 97)]


def launch(out, G_inv, V, A_inv, tile=SMALL, precision="ieee", dots=None, splits=()) -> None:
    """The kernel, bucket by bucket as the operator has it."""
    layers = kron_matmul.layers(out, G_inv, V, A_inv, dots, splits)
    for bucket in buckets(layers, kron_matmul._key):
        kron_matmul.launch(bucket, tile=tile, precision=precision)


@pytest.fixture(params=["reference", "triton"])
def precondition(request):
    """Each implementation for dense layers, for CPU tensors."""
    if request.param == "triton":
        request.getfixturevalue("interpreter")
        return launch
    return kron_matmul.reference


def layer(d_out: int, d_in: int, batch=(), dtype=torch.float32, G_diagonal=False, A_diagonal=False, device="cpu"):
    """(out, G_inv, V, A_inv) with NaN in out."""
    torch.manual_seed(d_out * 1000 + d_in)
    G = torch.randn(*batch, d_out, *([] if G_diagonal else [d_out]), dtype=dtype, device=device)
    A = torch.randn(*batch, d_in, *([] if A_diagonal else [d_in]), dtype=dtype, device=device)
    V = torch.randn(*batch, d_out, d_in, dtype=dtype, device=device)
    return torch.full_like(V, torch.nan), G, V, A


def expected(G: Tensor, V: Tensor, A: Tensor) -> Tensor:
    G, A = (torch.diag_embed(M.double()) if M.ndim < V.ndim else M.double() for M in (G, A))
    return G @ V.double() @ A


def check(layers, tolerance: float | None = None) -> None:
    for out, G, V, A in layers:
        E = expected(G, V, A)
        error = (out.double() - E).abs().max().item()
        assert error <= (tolerance or TOLERANCE[out.dtype]) * E.abs().max().item(), error


def columns(layers) -> list[list[Tensor]]:
    return [list(column) for column in zip(*layers, strict=True)]


@pytest.mark.parametrize(("d_out", "d_in"), SIZES)
def test_kernel_matches_float64(kernel_device, d_out, d_in):
    layers = [layer(d_out, d_in, device=kernel_device)]
    launch(*columns(layers))
    check(layers)


@pytest.mark.parametrize("size", range(3))
def test_every_shipped_tile(kernel_device, size):
    tile = kron_matmul.TILES[size]
    layers = [layer(tile.block + 9, tile.block - 5, device=kernel_device)]
    launch(*columns(layers), tile, "tf32x3" if torch.version.hip is None else None)
    check(layers)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_gradient_of_another_dtype(precondition, dtype):
    out, G, V, A = layer(40, 35)
    layers = [(out, G, V.to(dtype), A)]
    precondition(*columns(layers))
    check(layers)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rounded_products(dtype):
    """bf16 rounds what float32 layers are made of, and neither float64 ones nor diagonal factors."""
    out, G, V, A = layer(40, 35)
    layers = [(out, G, V.to(dtype), A), layer(40, 35, dtype=torch.float64), layer(40, 35, G_diagonal=True)]
    kron_matmul.reference(*columns(layers), bf16=True)
    check(layers[:1], tolerance=2**-7)
    check(layers[1:])
    with pytest.raises(AssertionError):
        check(layers[:1], tolerance=2**-12)


def test_layers_of_several_shapes(precondition):
    shapes = [(40, 35), (35, 40), (40, 35), (3, 50), (40, 35)]
    layers = [layer(*shape) for shape in shapes] + [layer(20, 18, batch=(3,))]
    for i, (_, G, V, _) in enumerate(layers):  # equal shapes must still be told apart
        G *= i + 1
        V += i
    out, G, V, A = layers[0]
    layers.append((out.clone(), G, V.mT.contiguous().mT, A))  # as must equal shapes with other strides
    precondition(*columns(layers))
    check(layers)


def test_equal_layers_share_two_launches(interpreter, monkeypatch):
    launches = []

    def counted(out, *args, **options):
        launches.append(len(out))
        _grouped.grouped(out, *args, **options)

    monkeypatch.setattr(kron_matmul, "grouped", counted)
    layers = [layer(40, 35), layer(9, 8), layer(40, 35), layer(40, 35)]
    launch(*columns(layers))
    assert launches == [3, 3, 1, 1]


STRIDED = {
    "out transposed": lambda o, G, V, A: (torch.full((35, 40), torch.nan).mT, G, V, A),
    "V transposed": lambda o, G, V, A: (o, G, V.mT.contiguous().mT, A),
    "V without its last column": lambda o, G, V, A: (o, G, torch.cat([V, V[:, :1]], 1)[:, :-1], A),
    "factors transposed": lambda o, G, V, A: (o, G.mT, V, A.mT),
    "factors inside larger ones": lambda o, G, V, A: (
        o,
        torch.randn(64, 64)[:40, :40],
        V,
        torch.randn(64, 64)[3:38, 5:40],
    ),
    "an odd address": lambda o, G, V, A: (o, G, torch.randn(40 * 35 + 1)[1:].view(40, 35), A),
}


@pytest.mark.parametrize("layout", STRIDED)
def test_any_strides(precondition, layout):
    layers = [STRIDED[layout](*layer(40, 35))]
    precondition(*columns(layers))
    check(layers)


def test_nothing_beyond_the_arguments_is_read_or_written(precondition):
    """NaN around every argument: none may enter out, and none of those around out may change."""
    around = [torch.full((160, 150), torch.nan) for _ in range(4)]
    values = layer(40, 35)
    inside = [memory[50 : 50 + t.shape[0], 9 : 9 + t.shape[1]] for memory, t in zip(around, values, strict=True)]
    for view, t in zip(inside, values, strict=True):
        view.copy_(t)
    precondition(*columns([inside]))
    check([inside])
    inside[0].fill_(torch.nan)
    assert around[0].isnan().all()


def test_no_address_beyond_the_arguments(strays):
    values = layer(40, 35)
    around = [torch.zeros(160, 150) for _ in values]
    inside = [memory[50 : 50 + t.shape[0], 9 : 9 + t.shape[1]] for memory, t in zip(around, values, strict=True)]
    launch(*columns([inside]))
    for memory, view in zip(around, inside, strict=True):
        assert strays(memory, view) == 0


@pytest.mark.parametrize("batch", [(), (3,)])
@pytest.mark.parametrize("diagonal", [(True, False), (False, True), (True, True)])
def test_diagonal_factors(batch, diagonal):
    """One axis less is a diagonal, also where a batch makes a diagonal look like a matrix: (3, 3) beside (3, 3, 3)."""
    layers = [layer(7, 5, batch, torch.float64, *diagonal), layer(3, 3, batch, torch.float64, *diagonal)]
    ops.kron_matmul_(*columns(layers))
    check(layers)


def test_float64_beside_float32():
    layers = [layer(40, 35), layer(50, 20, dtype=torch.float64), layer(8, 9)]
    ops.kron_matmul_(*columns(layers))
    check(layers)


def test_program_order_does_not_matter(program_order):
    layers = [layer(40, 70), layer(40, 70)]
    launch(*columns(layers))
    check(layers)


def test_error_against_torch(kernel_device):
    """tf32x3, the precision on NVIDIA, must be as exact as float32."""
    layers = [layer(100, 150, device=kernel_device)]
    _, G, V, A = layers[0]
    own = (G @ (V @ A)).double()
    E = expected(G, V, A)
    launch(*columns(layers), Tile(128, 64, 8, 3), "tf32x3")
    check(layers, TIMES_TORCH * (own - E).abs().max().item() / E.abs().max().item())


def test_autocast_does_not_round(precondition):
    layers = [layer(40, 35)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        precondition(*columns(layers))
    check(layers)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device")
def test_operator_on_a_gpu():
    layers = [layer(40, 35, device="cuda") for _ in range(5)]
    layers += [layer(900, 700, device="cuda"), layer(40, 35, (2,), torch.float64, True, device="cuda")]
    ops.kron_matmul_(*columns(layers))
    check(layers)


@pytest.mark.parametrize("axis", [0, 1])
def test_offsets_beyond_32_bits(interpreter, axis):
    """V spread over memory that is reserved and not used, as rows or as columns."""
    half, stride = 2**31, 2**30 + 4
    try:
        memory = torch.empty(2 * half + 64, dtype=torch.float16)
    except RuntimeError:
        pytest.skip("the machine does not reserve that much memory")
    shape, strides = ((3, 2), (stride, 1)) if axis == 0 else ((2, 3), (1, stride))
    V = memory.as_strided(shape, strides, half)
    V.copy_(torch.arange(1.0, 7.0).view(shape))
    out, G, _, A = layer(*shape)
    layers = [(out, G, V, A)]
    launch(*columns(layers), Tile(16, 16, 4, 2))
    check(layers)


@pytest.mark.parametrize("batch", [(), (2,)])
def test_dots(precondition, batch):
    """<out, V> before a column and from it on, for layers of several shapes; the same bits again."""
    layers = [layer(40, 35, batch), layer(9, 70, batch), layer(40, 35, batch)]
    for i, (_, G, V, _) in enumerate(layers):
        G *= i + 1
        V += i
    splits = [34, 70, 34]
    dots, again = torch.full((2, 3, 2), torch.nan).unbind()
    precondition(*columns(layers), dots=dots, splits=splits)
    check(layers)
    for (_, G, V, A), split, (before, behind) in zip(layers, splits, dots.tolist(), strict=True):
        terms = expected(G, V, A) * V.double()
        scale = 1e-5 * terms.abs().sum().item()
        assert abs(before - terms[..., :split].sum().item()) <= scale
        assert abs(behind - terms[..., split:].sum().item()) <= scale
    precondition(*columns(layers), dots=again, splits=splits)
    assert torch.equal(dots, again)


def test_dots_of_other_dtypes():
    layers = [layer(7, 5), layer(6, 5, dtype=torch.float64), layer(4, 3, G_diagonal=True)]
    dots = torch.empty(3, 2, dtype=torch.float64)
    ops.kron_matmul_(*columns(layers), dots=dots)
    check(layers)
    for (_, G, V, A), (before, behind) in zip(layers, dots.tolist(), strict=True):
        assert abs(before - (expected(G, V, A) * V.double()).sum().item()) < 1e-4
        assert behind == 0


def test_empty_matrices_have_no_dot(interpreter):
    out, G, V, A = (torch.empty(shape) for shape in ((0, 5), (0, 0), (0, 5), (5, 5)))
    dots = torch.full((1, 2), torch.nan)
    launch([out], [G], [V], [A], dots=dots)
    assert not dots.any()


def test_out_at_an_address_of_V(precondition):
    first, second = layer(5, 5), layer(5, 5)
    with pytest.raises(ValueError, match=r"out\[1\] starts at the address of an entry of V"):
        precondition([first[0], first[2]], [first[1], second[1]], [first[2], second[2]], [first[3], second[3]])


@settings(max_examples=30, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=4),
    batch=st.sampled_from([(), (1,), (3,)]),
    dtype=st.sampled_from([*TOLERANCE]),
    diagonal=st.tuples(st.booleans(), st.booleans()),
)
def test_operator_on_ragged_sizes(shapes, batch, dtype, diagonal):
    layers = [layer(*shape, batch, dtype, *diagonal) for shape in shapes]
    ops.kron_matmul_(*columns(layers))
    check(layers)
