"""syrk_ against dense float64 algebra: the reference, its form without host decisions, and the Triton kernel."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kfac_triton import ops
from kfac_triton.kernels import _symmetric, syrk
from kfac_triton.kernels._launch import jit, tl
from kfac_triton.kernels.tiles import Choice, Tile

# Error allowed, relative to the largest entry: half inputs are taken as they were rounded, and summed in float32.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-6, torch.float16: 2e-6, torch.float64: 1e-13}
TIMES_TORCH = 3.0  # the error may be at most so many times that of torch's own float32 product

SMALL = Tile(32, 32, 4, 3)
# (n, d): below, at and beside multiples of the tile; two tiles a side at least once with and once without a remainder.
SIZES = [(70, 40), (64, 64), (33, 31), (1, 32), (40, 97)]


def launch(F, X, alpha, beta, bias, tile=SMALL, parts=1, precision="ieee") -> None:
    syrk.launch([syrk.Entry(F, X, alpha, beta, bias)], choice=Choice(tile, parts), precision=precision)


def split(*args) -> None:
    launch(*args, parts=3)


@pytest.fixture(params=["reference", "without_sync", "triton", "split"])
def update(request):
    """Each implementation, for CPU tensors; the kernel also with its sum in three parts."""
    if request.param in ("triton", "split"):
        request.getfixturevalue("interpreter")
        return launch if request.param == "triton" else split
    return getattr(syrk, request.param)


def expected(F: Tensor, X: Tensor, alpha: float, beta: float, bias: bool) -> Tensor:
    """The definition, in float64, with the ones column written out."""
    Xa = X.double()
    if bias:
        Xa = torch.cat([Xa, torch.ones_like(Xa[..., :1])], -1)
    old = torch.zeros_like(F, dtype=torch.float64) if beta == 0 else beta * F.double()
    return old if alpha == 0 else old + alpha * Xa.mT @ Xa


def scalars(alpha: float, beta: float, device: str = "cpu") -> tuple[Tensor, Tensor]:
    return torch.tensor(alpha, dtype=torch.float64, device=device), torch.tensor(beta, device=device)


def make(n: int, d: int, bias: bool, dtype: torch.dtype = torch.float32, batch: tuple[int, ...] = (), device="cpu"):
    torch.manual_seed(n * 1000 + d)
    D = d + bias
    F = torch.randn(*batch, D, D, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    X = torch.randn(*batch, n, d) + 0.5
    return (F + F.mT).to(device), X.to(dtype).to(device)


def check(F: Tensor, E: Tensor, tolerance: float) -> None:
    assert torch.equal(F, F.mT), "not symmetric bit for bit"
    error = (F.double() - E).abs().max().item()
    assert error <= tolerance * max(E.abs().max().item(), 1e-30), error


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize(("n", "d"), SIZES)
def test_kernel_matches_float64(kernel_device, n, d, parts, dtype, bias):
    F, X = make(n, d, bias, dtype, device=kernel_device)
    E = expected(F, X, 0.3, 0.7, bias)
    launch(F, X, *scalars(0.3, 0.7, kernel_device), bias, parts=parts)
    check(F, E, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", range(3))
def test_every_shipped_tile(kernel_device, size, dtype):
    tile = syrk.TILES["float32" if dtype == torch.float32 else "half"][size]
    F, X = make(150, 2 * tile.block + 9, True, dtype, device=kernel_device)
    E = expected(F, X, 0.3, 0.7, True)
    precision = "tf32x3" if torch.version.hip is None else None
    launch(F, X, *scalars(0.3, 0.7, kernel_device), True, tile, precision=precision)
    check(F, E, TOLERANCE[dtype])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("n", "d"), [(0, 40), (1, 1), (0, 1), (2, 1), (37, 1)])
def test_smallest_sizes(update, n, d, bias):
    F, X = make(n, d, bias)
    E = expected(F, X, 0.3, 0.7, bias)
    update(F, X, *scalars(0.3, 0.7), bias)
    check(F, E, TOLERANCE[torch.float32])


@pytest.mark.parametrize("bias", [False, True])
def test_batch(update, bias):
    F, X = make(45, 37, bias, batch=(3,))
    E = expected(F, X, 0.3, 0.7, bias)
    update(F, X, *scalars(0.3, 0.7), bias)
    check(F, E, TOLERANCE[torch.float32])


STRIDED = {
    "transposed": lambda: torch.randn(40, 70).mT,
    "every other column": lambda: torch.randn(70, 80)[:, ::2],
    "columns of a wider matrix": lambda: torch.randn(70, 100)[:, 30:70],
    "one row repeated": lambda: torch.randn(1, 40).expand(70, 40),
    "channels of images": lambda: torch.randn(3, 40, 7, 5).flatten(2).mT,
    "groups of channels": lambda: torch.randn(70, 3, 40).transpose(0, 1),
}


@pytest.mark.parametrize("layout", STRIDED)
def test_any_strides(update, layout):
    torch.manual_seed(0)
    X = STRIDED[layout]()
    F = torch.zeros(*X.shape[:-2], 41, 41)
    E = expected(F, X, 0.3, 0.7, True)
    update(F, X, *scalars(0.3, 0.7), True)
    check(F, E, TOLERANCE[torch.float32])


@pytest.mark.parametrize("bias", [False, True])
def test_nothing_beyond_the_arguments_is_read_or_written(update, bias):
    """NaN before, after and beside F and X: none may enter F, and none of those around F may change."""
    n, d = 45, 40
    D = d + bias
    around_X = torch.full((n + 80, d + 50), torch.nan)
    around_F = torch.full((3, D + 80, D + 50), torch.nan)
    X, F = around_X[40 : 40 + n, 7 : 7 + d], around_F[1, 40 : 40 + D, 7 : 7 + D]
    for view, values in zip((F, X), make(n, d, bias), strict=True):
        view.copy_(values)
    E = expected(F, X, 0.3, 0.7, bias)
    update(F, X, *scalars(0.3, 0.7), bias)
    check(F, E, TOLERANCE[torch.float32])
    F.fill_(torch.nan)
    assert around_F.isnan().all()


@pytest.mark.parametrize("bias", [False, True])
def test_no_address_beyond_the_arguments(strays, bias):
    n, d = 45, 40
    D = d + bias
    around_X, around_F = torch.zeros(n + 80, d + 50), torch.zeros(D + 80, D + 50)
    X, F = around_X[40 : 40 + n, 7 : 7 + d], around_F[40 : 40 + D, 7 : 7 + D]
    launch(F, X, *scalars(0.3, 0.7), bias, parts=2)
    assert strays(around_X, X) == 0
    assert strays(around_F, F) == 0


@pytest.mark.parametrize("batch", [(), (2,)])
@pytest.mark.parametrize("n", [0, 45])
def test_beta_zero_never_reads_F(update, n, batch):
    F, X = make(n, 40, True, batch=batch)
    F.fill_(torch.nan)
    E = expected(F, X, 0.3, 0.0, True)
    update(F, X, *scalars(0.3, 0.0), True)
    check(F, E, TOLERANCE[torch.float32])


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_alpha_zero_ignores_the_product(update, poison):
    F, X = make(45, 40, True)
    X[3, 2] = poison
    before = F.clone()
    update(F, X, *scalars(0.0, 1.0), True)
    assert torch.equal(F, before)
    update(F, X, *scalars(0.0, 0.5), True)
    assert torch.equal(F, before * 0.5)
    F.fill_(torch.nan)
    update(F, X, *scalars(0.0, 0.0), True)
    assert torch.equal(F, torch.zeros_like(F))


def test_a_non_finite_row_shows(update):
    """With alpha at work NaN must come through: hiding it is not this operator's decision."""
    F, X = make(45, 40, True)
    X[3, 2] = torch.nan
    update(F, X, *scalars(0.3, 0.7), True)
    assert F[2].isnan().all() and F[:, 2].isnan().all() and F.isnan().sum() == 2 * 41 - 1


@pytest.mark.parametrize("bias", [False, True])
def test_program_order_does_not_matter(program_order, bias):
    F, X = make(45, 100, bias)
    E = expected(F, X, 0.3, 0.7, bias)
    launch(F, X, *scalars(0.3, 0.7), bias, parts=2)
    check(F, E, TOLERANCE[torch.float32])


def test_tf32x3_is_symmetric_and_as_exact_as_float32(kernel_device):
    """Its cross terms are added in an order that differs between (i, j) and (j, i), even within a diagonal tile."""
    F, X = make(500, 90, True, device=kernel_device)
    E, own = expected(F, X, 0.3, 0.7, True), F.clone()
    launch(F, X, *scalars(0.3, 0.7, kernel_device), True, Tile(128, 32, 8, 3), precision="tf32x3")
    syrk.without_sync(own, X, *scalars(0.3, 0.7, kernel_device), True)
    check(F, E, TIMES_TORCH * (own.double() - E).abs().max().item() / E.abs().max().item())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device")
def test_operator_on_a_gpu():
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for d in (40, 1000):
            F, X = make(300, d, True, dtype, device="cuda")
            E = expected(F, X, 0.25, 0.75, True)  # numbers that float32 holds
            ops.syrk_([F], [X], *([s] for s in scalars(0.25, 0.75, "cuda")), bias=[True])
            check(F, E, TOLERANCE[dtype])


@pytest.mark.parametrize("axis", ["rows", "columns"])
def test_offsets_beyond_32_bits(interpreter, axis):
    """X spread over memory that is reserved and not used; an offset that wraps around lands before X, still inside."""
    half = 2**31
    try:
        memory = torch.empty(2 * half + 64, dtype=torch.float16)
    except RuntimeError:
        pytest.skip("the machine does not reserve that much memory")
    stride = 2**30 + 4
    X = memory.as_strided((3, 2) if axis == "rows" else (2, 3), (stride, 1) if axis == "rows" else (1, stride), half)
    X.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]).view(X.shape))
    F = torch.zeros(X.shape[1], X.shape[1])
    launch(F, X, *scalars(1.0, 0.0), False, Tile(16, 16, 4, 2))
    check(F, expected(F, X, 1.0, 0.0, False), 0.0)


@pytest.mark.parametrize("n", [5, 200])
@pytest.mark.parametrize("batch", [(), (2,)])
def test_reference_across_blocks(n, batch):
    """More than two of the reference's blocks a side, the last one ragged."""
    d = 2 * syrk.REFERENCE_BLOCK + 19
    F, X = make(n, d, True, batch=batch)
    E = expected(F, X, 0.3, 0.7, True)
    syrk.reference(F, X, *scalars(0.3, 0.7), True)
    check(F, E, TOLERANCE[torch.float32])


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(0, 70),
    d=st.integers(1, 70),
    batch=st.sampled_from([(), (1,), (3,)]),
    bias=st.booleans(),
    dtype=st.sampled_from([*TOLERANCE]),
    alpha=st.sampled_from([0.0, 0.05, 1.0]),
    beta=st.sampled_from([0.0, 0.95, 1.0]),
)
def test_operator_on_ragged_sizes(n, d, batch, bias, dtype, alpha, beta):
    F, X = make(n, d, bias, dtype, batch)
    E = expected(F, X, alpha, beta, bias)
    ops.syrk_([F], [X], *([s.double()] for s in scalars(alpha, beta)), bias=[bias])
    check(F, E, TOLERANCE[dtype] if dtype != torch.float64 else 1e-7)  # beta was rounded to float32


def test_mixed_dtypes(update):
    """float64 rows go into a float32 average."""
    F, X = make(45, 40, True)
    E = expected(F, X, 0.3, 0.7, True)
    update(F, X.double(), *scalars(0.3, 0.7), True)
    check(F, E, TOLERANCE[torch.float32])


def test_autocast_does_not_round(update):
    F, X = make(45, 40, True)
    E = expected(F, X, 0.3, 0.7, True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        update(F, X, *scalars(0.3, 0.7), True)
    check(F, E, TOLERANCE[torch.float32])


def test_interpreter_repair(interpreter):
    """What the interpreted tests rest on: bfloat16 dots are right, TF32 rounds, several products together do not."""
    errors = {}
    for dtype, precision in [(torch.bfloat16, "ieee"), *((torch.float32, p) for p in ("tf32", "tf32x3", "bf16x6"))]:
        F, X = make(64, 64, False, dtype)
        E = expected(F, X, 1.0, 0.0, False)
        launch(F, X, *scalars(1.0, 0.0), False, Tile(64, 64, 4, 3), precision=precision)
        errors[dtype, precision] = ((F.double() - E).abs().max() / E.abs().max()).item()
    assert errors[torch.bfloat16, "ieee"] < 1e-6
    assert 1e-5 < errors[torch.float32, "tf32"] < 1e-3
    assert errors[torch.float32, "tf32x3"] < 1e-6
    assert errors[torch.float32, "bf16x6"] < 1e-6


def test_the_sum_in_parts_is_the_sum_whatever_the_order(program_order):
    """Parts in other orders of the programs, and more parts than steps: the same bits."""
    F, X = make(100, 40, True)
    once, again = F.clone(), F.clone()
    launch(once, X, *scalars(0.3, 0.7), True, parts=5)
    launch(again, X, *scalars(0.3, 0.7), True, parts=5)
    assert torch.equal(once, again)
    check(once, expected(F, X, 0.3, 0.7, True), TOLERANCE[torch.float32])
    launch(again.copy_(F), X, *scalars(0.3, 0.7), True, parts=32)
    check(again, expected(F, X, 0.3, 0.7, True), TOLERANCE[torch.float32])


def test_unwritten_parts_are_not_read(interpreter, monkeypatch):
    """The workspace comes as it is; alpha = 0 leaves it so."""
    monkeypatch.setattr(syrk, "workspace_for", lambda *args: _symmetric.workspace_for(*args).fill_(torch.nan))
    F, X = make(150, 70, True)
    before = F.clone()
    launch(F, X, *scalars(0.0, 0.5), True, parts=3)
    assert torch.equal(F, before * 0.5)
    launch(F.copy_(before), X, *scalars(0.3, 0.7), True, parts=3)
    check(F, expected(before, X, 0.3, 0.7, True), TOLERANCE[torch.float32])


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("batch", [(), (2,)])
def test_images(update, batch, channels_last):
    """An axis of images before the rows: gradients of a convolution as they lie in memory."""
    torch.manual_seed(0)
    images = torch.randn(*batch, 3, 35, 40) if channels_last else torch.randn(*batch, 3, 40, 36).mT
    F = torch.randn(*batch, 41, 41)
    F = F + F.mT
    E = expected(F, images.flatten(-3, -2), 0.3, 0.7, True)
    update(F, images, *scalars(0.3, 0.7), True)
    check(F, E, TOLERANCE[torch.float32])


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("order", ["rows", "columns"])
def test_descriptors(interpreter, order, dtype, parts):
    """Loads by the TMA unit: ragged in the other direction than the one that must be whole."""
    F, X = make(72, 48, True, dtype) if order == "rows" else make(40, 33, True, dtype)
    X = X if order == "rows" else X.mT.contiguous().mT
    E = expected(F, X, 0.3, 0.7, True)
    assert syrk.takes_descriptors(X.unsqueeze(0))
    launch(F, X, *scalars(0.3, 0.7), True, Tile(32, 32, 4, 3, True), parts)
    check(F, E, TOLERANCE[dtype])


def test_many_averages_in_one_call(kernel_device):
    """Buckets of equal shapes, each with scalars of its own; nothing is left out and nothing mixed up."""
    entries = []
    for i, (n, d, bias, dtype) in enumerate([(70, 40, True, torch.float32), (33, 31, False, torch.bfloat16)] * 3):
        F, X = make(n, d, bias, dtype, device=kernel_device)
        entries.append((F * (i + 1), X + i, *scalars(0.1 * i, 0.2 * i, kernel_device), bias))
    wanted = [expected(F, X, float(a), float(b), bias) for F, X, a, b, bias in entries]
    *lists, bias = map(list, zip(*entries, strict=True))
    ops.syrk_(*lists, bias=bias, backend="triton")
    for (F, *_), E in zip(entries, wanted, strict=True):
        check(F, E, 3e-6)


def test_one_average_twice_is_refused():
    F, X = make(6, 5, False)
    a, b = scalars(0.3, 0.7)
    with pytest.raises(ValueError, match=r"F\[1\] starts at the address of F\[0\]; allowed: each once in a call"):
        ops.syrk_([F, F], [X, X], [a, a], [b, b])


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("bias", [False, True])
def test_no_element_is_written_twice_or_read_once_written(interpreter, monkeypatch, bias, parts):
    """What a rectangular tile with mirrored stores breaks: it would decay the elements around the diagonal twice."""
    F, X = make(100, 100, bias)
    written: list[np.ndarray] = []
    load, store = interpreter.create_masked_load, interpreter.create_masked_store

    def within(ptrs, mask):
        addresses = np.atleast_1d(ptrs.data)[np.atleast_1d(mask.data).astype(bool)].astype(np.int64).ravel()
        return addresses[(addresses >= F.data_ptr()) & (addresses < F.data_ptr() + F.nbytes)]

    def create_masked_load(self, ptrs, mask, *rest):
        if written:
            assert not np.isin(within(ptrs, mask), np.concatenate(written)).any(), "reads what was written"
        return load(self, ptrs, mask, *rest)

    def create_masked_store(self, ptrs, value, mask, *rest):
        written.append(within(ptrs, mask))
        return store(self, ptrs, value, mask, *rest)

    monkeypatch.setattr(interpreter, "create_masked_load", create_masked_load)
    monkeypatch.setattr(interpreter, "create_masked_store", create_masked_store)
    launch(F, X, *scalars(0.3, 0.7), bias, parts=parts)
    every = np.concatenate(written)
    assert len(every) == len(np.unique(every)) == F.numel()


def test_padded_averages_keep_their_zeros(update):
    F, X = make(45, 40, True)
    E = expected(F, X, 0.3, 0.7, True)
    F = ops.padded(F)
    assert F.stride() == (48, 1) and ops.padded(F) is F
    update(F, X, *scalars(0.3, 0.7), True)
    check(F, E, TOLERANCE[torch.float32])
    around = ops.whole(F)
    assert not around[41:].any() and not around[:, 41:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_against_torch(kernel_device, dtype):
    """At most a few times that of torch's own product in the same dtype, for sums of many terms."""
    F, X = make(700, 70, False, dtype, device=kernel_device)
    E = expected(F, X, 1.0, 0.0, False)
    own = (X.mT @ X).double()
    precision = "tf32x3" if dtype == torch.float32 and torch.version.hip is None else None
    launch(F, X, *scalars(1.0, 0.0, kernel_device), False, Tile(64, 32, 4, 3), 2, precision)
    assert (F.double() - E).abs().max() <= TIMES_TORCH * (own - E).abs().max()


@jit
def triangle_probe(rows, columns, indices, COUNT: tl.constexpr):
    """Writes the row and column of each index."""
    at = tl.arange(0, COUNT)
    i, j = _symmetric.triangle(tl.load(indices + at))
    tl.store(rows + at, i)
    tl.store(columns + at, j)


@pytest.mark.parametrize("error", [-2e-7, 0.0, 2e-7])
def test_triangle_far_out(interpreter, monkeypatch, error):
    """First and last tiles of rows where float32 no longer holds 8 index + 1, and a GPU's root is not rounded right."""
    root = interpreter.create_sqrt
    monkeypatch.setattr(
        interpreter, "create_sqrt", lambda self, x: type(x)(root(self, x).data * np.float32(1 + error), x.dtype)
    )
    i = torch.cat([torch.arange(16), torch.arange(16000, 16016)]).int()
    expected_rows, expected_columns = torch.cat([i, i]), torch.cat([torch.zeros_like(i), i])
    rows, columns = torch.empty(64, dtype=torch.int32), torch.empty(64, dtype=torch.int32)
    triangle_probe[(1,)](rows, columns, expected_rows * (expected_rows + 1) // 2 + expected_columns, COUNT=64)
    assert torch.equal(rows, expected_rows) and torch.equal(columns, expected_columns)
