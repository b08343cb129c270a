"""conv_syrk_ against patches made by loops in float64: the reference by unfolding, and the Triton kernel."""

from __future__ import annotations

import dense
import pytest
import torch
from torch import Tensor

from kfac_triton import ops
from kfac_triton.kernels import conv_syrk
from kfac_triton.kernels.conv_syrk import Window
from kfac_triton.kernels.tiles import Choice, Tile

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-6, torch.float16: 2e-6}
SMALL = Tile(32, 32, 4, 3)

# (image, groups, window): a common layer; strides, dilation and uneven padding; padding wider than the image's edge;
# one tap; three channels; a filter as large as the image; more groups than one; a single row, as a 1-d convolution.
CASES = {
    "3x3": ((2, 16, 7, 6), 1, Window((3, 3), (1, 1), (1, 1, 1, 1))),
    "strided": ((2, 8, 9, 8), 1, Window((3, 2), (2, 3), (0, 1, 2, 1), (1, 2))),
    "wide padding": ((1, 8, 3, 3), 1, Window((3, 3), (1, 1), (2, 2, 2, 2))),
    "1x1": ((3, 24, 4, 4), 1, Window((1, 1), (2, 2))),
    "three channels": ((2, 3, 6, 6), 1, Window((3, 3))),
    "one position": ((5, 4, 3, 3), 1, Window((3, 3))),
    "groups": ((2, 16, 5, 5), 2, Window((3, 3), (1, 1), (1, 1, 1, 1))),
    "1-d": ((2, 8, 1, 20), 1, Window((1, 5), (1, 2), (2, 2, 0, 0))),
}


def scalars(alpha: float, beta: float, device: str = "cpu") -> tuple[Tensor, Tensor]:
    return torch.tensor(alpha, dtype=torch.float64, device=device), torch.tensor(beta, device=device)


def make(case: str, bias: bool, dtype: torch.dtype = torch.float32, device: str = "cpu"):
    torch.manual_seed(0)
    shape, groups, window = CASES[case]
    D = window.kernel[0] * window.kernel[1] * shape[1] // groups + bias
    F = torch.randn(*((groups,) if groups > 1 else ()), D, D)
    return (F + F.mT).to(device), (torch.randn(shape) + 0.5).to(dtype).to(device), window, groups


def by_loops(image: Tensor, window: Window, groups: int) -> Tensor:
    """Patches (groups, n, d) in float64: a filter's place by place, tap by tap, its channels innermost."""
    N, C, height, width = image.shape
    left, _, top, _ = window.padding
    down, across = window.outputs(height, width)
    rows = torch.zeros(N, down, across, *window.kernel, C, dtype=torch.float64)
    for i in range(down):
        for j in range(across):
            for p in range(window.kernel[0]):
                for q in range(window.kernel[1]):
                    y = i * window.stride[0] - top + p * window.dilation[0]
                    x = j * window.stride[1] - left + q * window.dilation[1]
                    if 0 <= y < height and 0 <= x < width:
                        rows[:, i, j, p, q] = image[:, :, y, x].double().cpu()
    by_group = rows.unflatten(-1, (groups, C // groups)).permute(5, 0, 1, 2, 3, 4, 6)
    return by_group.flatten(4).flatten(1, 3)


def expected(F: Tensor, P: Tensor, alpha: float, beta: float, bias: bool) -> Tensor:
    if bias:
        P = torch.cat([P, torch.ones_like(P[..., :1])], -1)
    E = (0 if beta == 0 else beta * F.double().cpu()) + (0 if alpha == 0 else alpha * (P.mT @ P))
    return E if F.ndim == 3 else E.reshape(F.shape)


def launch(F, image, alpha, beta, bias, window, tile=SMALL, parts=1, precision="ieee") -> None:
    entry = conv_syrk.Entry(F, image, alpha, beta, bias, window)
    conv_syrk.launch([entry], choice=Choice(tile, parts), precision=precision)


@pytest.fixture(params=["reference", "triton"])
def update(request):
    if request.param == "triton":
        request.getfixturevalue("interpreter")
        return launch
    return conv_syrk.reference


def check(F: Tensor, E: Tensor, tolerance: float = 2e-6) -> None:
    assert torch.equal(F, F.mT), "not symmetric bit for bit"
    error = (F.double().cpu() - E).abs().max().item()
    assert error <= tolerance * E.abs().max().item(), error


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_against_loops(update, case, bias):
    F, image, window, groups = make(case, bias)
    E = expected(F, by_loops(image, window, groups), 0.3, 0.7, bias)
    update(F, image, *scalars(0.3, 0.7), bias, window)
    check(F, E)


@pytest.mark.parametrize("memory", ["channels first", "channels last", "cut out"])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_dtypes_and_strides(kernel_device, dtype, memory):
    F, image, window, groups = make("3x3", True, dtype, kernel_device)
    E = expected(F, by_loops(image, window, groups), 0.3, 0.7, True)
    if memory == "channels last":
        image = image.contiguous(memory_format=torch.channels_last)
    elif memory == "cut out":
        around = torch.full((4, 20, 9, 9), torch.nan, dtype=dtype, device=kernel_device)
        around[1:3, 2:18, 1:8, 2:8] = image
        image = around[1:3, 2:18, 1:8, 2:8]
    launch(F, image, *scalars(0.3, 0.7, kernel_device), True, window, parts=2)
    check(F, E, TOLERANCE[dtype])


@pytest.mark.parametrize("kind", ["float32", "half"])
def test_every_shipped_tile(kernel_device, kind):
    dtype = torch.float32 if kind == "float32" else torch.bfloat16
    for tile in conv_syrk.TILES[kind]:
        F, image, window, groups = make("3x3", True, dtype, kernel_device)
        E = expected(F, by_loops(image, window, groups), 0.3, 0.7, True)
        precision = "tf32x3" if torch.version.hip is None else None
        launch(F, image, *scalars(0.3, 0.7, kernel_device), True, window, tile, precision=precision)
        check(F, E)


def test_nothing_beyond_the_image_is_read(interpreter):
    """A view with NaN on every side, and between its channels: padding is zeros and never what lies there."""
    around = torch.full((4, 7, 7, 24), torch.nan)
    image = around[1:3, 1:6, 1:6, 4:20].permute(0, 3, 1, 2)
    torch.manual_seed(0)
    image.copy_(torch.randn(2, 16, 5, 5))
    assert conv_syrk.channels_last(image).data_ptr() == image.data_ptr(), "the view would be copied"
    window = Window((3, 3), (1, 1), (1, 1, 1, 1))
    F = torch.zeros(145, 145)
    launch(F, image, *scalars(0.3, 0.0), True, window)
    check(F, expected(F, by_loops(image, window, 1), 0.3, 0.0, True))


def test_no_address_beyond_the_image(strays):
    around = torch.zeros(4, 7, 7, 24)
    inside = around[1:3, 1:6, 1:6, 4:20]
    around_F = torch.zeros(200, 200)
    F = around_F[20:165, 16:161]
    launch(F, inside.permute(0, 3, 1, 2), *scalars(0.3, 0.7), True, Window((3, 3), (2, 1), (1, 2, 0, 1)))
    assert strays(around, inside) == 0
    assert strays(around_F, F) == 0


def test_beta_zero_never_reads_F_and_alpha_zero_no_image(update):
    F, image, window, groups = make("strided", True)
    E = expected(F, by_loops(image, window, groups), 0.3, 0.0, True)
    F.fill_(torch.nan)
    update(F, image, *scalars(0.3, 0.0), True, window)
    check(F, E)
    before = F.clone()
    update(F, torch.full_like(image, torch.nan), *scalars(0.0, 0.5), True, window)
    assert torch.equal(F, before * 0.5)


def test_program_order_does_not_matter(program_order):
    F, image, window, groups = make("groups", True)
    E = expected(F, by_loops(image, window, groups), 0.3, 0.7, True)
    launch(F, image, *scalars(0.3, 0.7), True, window, parts=2)
    check(F, E)


def test_no_images(update):
    F, image, window, _ = make("3x3", True)
    before = F.clone()
    update(F, image[:0], *scalars(0.3, 0.5), True, window)
    torch.testing.assert_close(F, before * 0.5)


def test_offsets_beyond_32_bits(interpreter):
    """Images far apart in memory that is reserved and not used."""
    try:
        memory = torch.empty(2**32 + 64, dtype=torch.float16)
    except RuntimeError:
        pytest.skip("the machine does not reserve that much memory")
    image = memory.as_strided((3, 8, 1, 1), (2**31 - 8, 1, 8, 8))
    image.copy_(torch.arange(24.0).view(3, 8, 1, 1))
    F = torch.zeros(8, 8)
    launch(F, image, *scalars(1.0, 0.0), False, Window((1, 1)), Tile(16, 16, 4, 2))
    check(F, expected(F, by_loops(image, Window((1, 1)), 1), 1.0, 0.0, False))


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_the_operator_on_several_layers(kernel_device, backend):
    layers = [make(case, case != "1x1", device=kernel_device) for case in ("3x3", "1x1", "3x3", "groups")]
    F, images, windows, groups = zip(*layers, strict=True)
    bias = [True, False, True, True]
    a, b = scalars(0.3, 0.7, kernel_device)
    wanted = [
        expected(f, by_loops(x, w, g), 0.3, 0.7, c)
        for f, x, w, g, c in zip(F, images, windows, groups, bias, strict=True)
    ]
    F = [f.clone() for f in F]
    P = [ops.Patches(image, tuple(window.flat()), g) for image, window, g in zip(images, windows, groups, strict=True)]
    ops.conv_syrk_(F, P, [a] * 4, [b] * 4, bias=bias, backend=backend)
    for f, E in zip(F, wanted, strict=True):
        check(f, E)


def test_patches_in_the_order_of_the_weight(interpreter):
    """Channels innermost: W in that order times a patch is the convolution."""
    _, image, window, _ = make("strided", False)
    weight = dense.randn(5, 8, *window.kernel, seed=1).float()
    P = ops.Patches(image, tuple(window.flat()), 1)
    y = P.rows() @ weight.flatten(2).transpose(1, 2).flatten(1).T
    padded = torch.nn.functional.pad(image, window.padding)
    wanted = torch.nn.functional.conv2d(padded, weight, stride=window.stride, dilation=window.dilation)
    torch.testing.assert_close(y, wanted.flatten(2).transpose(1, 2).flatten(0, 1), atol=1e-4, rtol=1e-4)
    assert P.count() == len(y)
