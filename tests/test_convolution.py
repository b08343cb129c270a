"""Convolutions: the factors against patches made by loops, and against dense blocks where theory calls them exact."""

from __future__ import annotations

import itertools

import dense
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_triton import KFAC, Gaussian


class Readout(nn.Module):
    """tanh, then three outputs from everything in an example; fixed, so that the convolution's g are all different."""

    def forward(self, y: Tensor) -> Tensor:
        flat = torch.tanh(y).flatten(1)
        return flat @ dense.randn(flat.shape[1], 3, seed=7)


class Unbatched(nn.Module):
    """A convolution called without a batch axis."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.squeeze(0)).unsqueeze(0)


def tuple_of(value, axes):
    return (value,) * axes if isinstance(value, int) else tuple(value)


def conv_arguments(conv):
    """What `dense.patches` needs to know of a module."""
    padding = conv.padding if isinstance(conv.padding, str) else tuple_of(conv.padding, len(conv.kernel_size))
    return conv.kernel_size, conv.stride, padding, conv.dilation, conv.padding_mode


def expected_factors(rows, y, groups, bias):
    """A and G from patches (N, positions, C d) and outputs y (N, C_out, *spatial), by loops over groups and outputs."""
    N, positions = rows.shape[:2]
    z = Readout()(y)
    A, G = [], []
    for a, channels in zip(rows.chunk(groups, -1), range(groups), strict=True):
        a = a.flatten(0, 1)
        a = torch.cat([a, a.new_ones(len(a), 1)], 1) if bias else a
        A.append(a.T @ a / N)
        sums = 0
        for c in range(z.shape[1]):
            (dy,) = torch.autograd.grad(z[:, c].sum(), y, retain_graph=True)
            g = dy.chunk(groups, 1)[channels].flatten(2).transpose(1, 2).flatten(0, 1)
            sums = sums + g.T @ g
        G.append(sums / (N * positions))
    return {"A": torch.stack(A) if groups > 1 else A[0], "G": torch.stack(G) if groups > 1 else G[0]}


def check(conv, x, unbatched=False):
    """Compares the factors of one convolution in front of `Readout`; first the oracle's patches with torch itself."""
    rows = dense.patches(x, *conv_arguments(conv))
    y = conv(x)
    weight = conv.weight.flatten(1).chunk(conv.groups)
    by_patches = torch.cat([r @ w.T for r, w in zip(rows.chunk(conv.groups, -1), weight, strict=True)], -1)
    by_patches = by_patches if conv.bias is None else by_patches + conv.bias
    dense.assert_exact(by_patches.transpose(1, 2).reshape(y.shape), y)
    expected = expected_factors(rows, y, conv.groups, conv.bias is not None)
    model = nn.Sequential(Unbatched(conv) if unbatched else conv, Readout())
    (factors,) = dense.kfac_factors(model, x).values()
    dense.assert_factors_equal({"conv": factors}, {"conv": expected})
    if conv.bias is not None:
        corner = factors["A"][..., -1, -1]
        torch.testing.assert_close(corner, torch.full_like(corner, rows.shape[1]))  # the number of positions


def conv_of(axes, C_in, C_out, *args, **options):
    (conv,) = dense.random_model((nn.Conv1d if axes == 1 else nn.Conv2d)(C_in, C_out, *args, **options))
    return conv


# E23. Sizes: 7 x 6 is odd and even and not square, so that strides leave a remainder and axes cannot be exchanged.
SPATIAL = {1: (7,), 2: (7, 6)}
KERNELS = {1: [1, 2, 3], 2: [1, 3, (2, 3)]}
STRIDES = {1: [1, 2], 2: [1, (2, 3)]}
PADDINGS = {1: [0, 1, "same", "valid"], 2: [0, (2, 1), "same", "valid"]}
DILATIONS = {1: [1, 2], 2: [1, (2, 1)]}


def grid():
    for axes in (1, 2):
        for case in itertools.product(KERNELS[axes], STRIDES[axes], PADDINGS[axes], DILATIONS[axes]):
            if not (case[2] == "same" and case[1] != 1):  # torch refuses "same" with a stride
                yield pytest.param(axes, *case, id=f"{axes}d-{case}")


@pytest.mark.parametrize(("axes", "kernel", "stride", "padding", "dilation"), list(grid()))
def test_factors_against_patch_loops(axes, kernel, stride, padding, dilation):
    conv = conv_of(axes, 2, 3, kernel, stride=stride, padding=padding, dilation=dilation)
    check(conv, dense.randn(2, 2, *SPATIAL[axes]))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 4])  # 4: depthwise
@pytest.mark.parametrize("axes", [1, 2])
def test_groups_are_blocks_of_their_own(axes, groups, bias):
    check(conv_of(axes, 4, 8, 3, padding=1, groups=groups, bias=bias), dense.randn(2, 4, *SPATIAL[axes]))


@pytest.mark.parametrize("padding", [2, "same"])  # 2: more than the half kernel, so that the wrap shows
@pytest.mark.parametrize("padding_mode", ["circular", "reflect"])
@pytest.mark.parametrize("axes", [1, 2])
def test_padding_modes(axes, padding_mode, padding):
    check(conv_of(axes, 2, 3, 3, padding=padding, padding_mode=padding_mode), dense.randn(2, 2, *SPATIAL[axes]))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("axes", [1, 2])
def test_input_without_a_batch_axis(axes, groups):
    check(conv_of(axes, 2, 4, 3, padding=1, groups=groups), dense.randn(1, 2, *SPATIAL[axes]), unbatched=True)


@pytest.mark.parametrize("layout", ["channels_last", "every other example"])
def test_strides_of_the_input_do_not_matter(layout):
    x = dense.randn(4, 2, 7, 6)
    check(conv_of(2, 2, 3, 3), x.to(memory_format=torch.channels_last) if layout == "channels_last" else x[::2])


class BareParameter(nn.Module):
    def __init__(self, stride: object, padding: object, keywords: bool) -> None:
        super().__init__()
        conv = conv_of(2, 2, 3, (2, 3))
        self.w, self.b = conv.weight, conv.bias
        self.stride, self.padding, self.keywords = stride, padding, keywords

    def forward(self, x: Tensor) -> Tensor:
        if self.keywords:
            return F.conv2d(weight=self.w, bias=self.b, padding=self.padding, stride=self.stride, input=x)
        return F.conv2d(x, self.w, self.b, self.stride, self.padding)


@pytest.mark.parametrize("keywords", [True, False])
@pytest.mark.parametrize("padding", [1, (0, 1), "valid", (1,)], ids=str)
def test_functional_convolution_with_a_bare_parameter(padding, keywords):
    layer, x = BareParameter((2, 1), padding, keywords), dense.randn(2, 2, 7, 6)
    spelled = padding if isinstance(padding, str) else tuple_of(padding, 2) if padding != (1,) else (1, 1)
    rows = dense.patches(x, (2, 3), (2, 1), spelled, (1, 1))
    factors = dense.kfac_factors(nn.Sequential(layer, Readout()), x)
    dense.assert_factors_equal(factors, {"0.w": expected_factors(rows, layer(x), 1, True)})


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("options", [{"padding": "same"}, {"padding": 1, "padding_mode": "reflect"}], ids=str)
def test_reduce_sums_patches_and_averages_gradients(options, groups, fisher):
    conv, x = conv_of(2, 2, 4, 3, groups=groups, **options), dense.randn(3, 2, 5, 4)
    rows, y = dense.patches(x, *conv_arguments(conv)), conv(x)
    z = Readout()(y)
    if fisher == "exact":
        dys = [torch.autograd.grad(z[:, c].sum(), y, retain_graph=True)[0] for c in range(3)]
    else:
        dys = [torch.autograd.grad(0.5 * z.square().sum(), y)[0]]
    factors = dense.kfac_factors(
        nn.Sequential(conv, Readout()),
        x,
        fisher=fisher,
        weight_sharing="reduce",
        loss=lambda z: 0.5 * z.square().sum(-1).mean(),
    )["0"]
    for group in range(groups):
        a = torch.cat([rows.chunk(groups, -1)[group], rows.new_ones(3, 20, 1)], -1).sum(1)
        g = torch.cat([dy.chunk(groups, 1)[group].flatten(2).mean(-1) for dy in dys])
        A, G = (F if groups == 1 else F[group] for F in (factors["A"], factors["G"]))
        dense.assert_exact(A, a.T @ a / 3)
        dense.assert_exact(G, g.T @ g / 3)


# E3: exact blocks.


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("options", [{}, {"padding": 1, "stride": 2}, {"padding": "same", "dilation": 2}], ids=str)
def test_one_convolution_with_a_term_at_every_pixel_is_exact(options, groups):
    model, x = dense.random_model(nn.Conv2d(2, 4, 3, groups=groups, **options)), dense.randn(3, 2, 7, 6)
    factors = dense.kfac_factors(model, x, likelihood=Gaussian(dim=1))["0"]
    expected = dense.fisher_block(model, x, "0.weight", "0.bias", dim=1)
    A, G = (factor.reshape(groups, *factor.shape[-2:]) for factor in (factors["A"], factors["G"]))
    blocks = [torch.kron(G[group], A[group]) for group in range(groups)]
    dense.assert_exact(torch.block_diag(*blocks), expected)


def test_convolution_with_pixelwise_layers_behind_is_exact():
    """1 x 1 convolutions keep the pixels apart."""
    model, x = dense.random_model(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 3, 1)), dense.randn(3, 2, 5, 6)
    errors = dense.block_errors(model, x, dense.kfac_factors(model, x, likelihood=Gaussian(dim=1)), dim=1)
    assert max(errors.values()) <= dense.EXACT, errors


def pooled(axes=2):
    if axes == 1:
        return dense.random_model(nn.Conv1d(2, 4, 3, padding=1), nn.AvgPool1d(6), nn.Flatten(), nn.Linear(4, 3))
    return dense.random_model(nn.Conv2d(2, 4, 3, padding=1), nn.AvgPool2d((5, 6)), nn.Flatten(), nn.Linear(4, 3))


@pytest.mark.parametrize("axes", [1, 2])
def test_linear_convolution_and_pooling_is_exact_with_reduce(axes):
    model, x = pooled(axes), dense.randn(4, 2, *(5, 6)[-axes:])
    errors = dense.block_errors(model, x, dense.kfac_factors(model, x, weight_sharing="reduce"))
    assert max(errors.values()) <= dense.EXACT, errors


def test_linear_convolution_and_pooling_is_not_exact_with_expand():
    """Negative control."""
    model, x = pooled(), dense.randn(4, 2, 5, 6)
    errors = dense.block_errors(model, x, dense.kfac_factors(model, x, weight_sharing="expand"))
    assert errors["0"] > dense.DIFFERENT, errors
    assert errors["3"] <= dense.EXACT, errors


def test_a_step_of_a_grouped_convolution_preconditions_each_group():
    """The update through groups: V of each group from its own factors, put back in the weight's own shape."""
    conv, x = conv_of(2, 4, 6, 3, groups=2), dense.randn(5, 4, 5, 5)
    model = nn.Sequential(conv, Readout())
    options = {"lr": 0.5, "momentum": 0.0, "damping": 0.1, "kl_clip": None, "likelihood": "gaussian", "fisher": "exact"}
    options["rule"] = "kl"
    optimizer = KFAC(model, compile=False, factor_fraction=1.0, **options)
    model(x).square().mean().backward()
    weight, bias = conv.weight.detach().clone(), conv.bias.detach().clone()
    gradient = torch.cat([conv.weight.grad.flatten(1), conv.bias.grad[:, None]], 1).chunk(2)
    optimizer.step()
    factors = optimizer.factors()["0"]
    V = []
    for group in range(2):
        A_inv, G_inv = dense.damped_inverses(factors["A"][group], factors["G"][group], 0.1)
        V.append(G_inv @ gradient[group] @ A_inv)
    V = torch.cat(V)
    dense.assert_exact(conv.weight.detach(), weight - 0.5 * V[:, :-1].reshape(weight.shape))
    dense.assert_exact(conv.bias.detach(), bias - 0.5 * V[:, -1])


def test_a_weight_whose_axes_lie_in_another_order():
    """Height and width swapped in memory: the same steps as with the usual order."""
    models = []
    for swap in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(2, 3, (2, 3)), Readout()).double()
        if swap:
            weight = model[0].weight.detach().transpose(2, 3).contiguous().transpose(2, 3)
            model[0].weight = nn.Parameter(weight)
        optimizer = KFAC(model, likelihood="gaussian", compile=False)
        for seed in range(3):
            optimizer.zero_grad()
            model(dense.randn(4, 2, 5, 5, seed=seed)).square().sum().backward()
            optimizer.step()
        models.append(model)
    torch.testing.assert_close(models[0][0].weight, models[1][0].weight)
