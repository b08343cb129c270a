"""Joint matrices in flat memory: the parts of every layout are the right elements, and steps reach all of them."""

from __future__ import annotations

import dense
import pytest
import torch
from small import train_step
from stacks import ALONE, F64, FORMS, layers_of, stack_of
from torch import Tensor, nn

from kfac_triton import KFAC, joint
from kfac_triton.joint import Joint, stacked
from kfac_triton.layer import Layer
from kfac_triton.operations.layout import Layout
from kfac_triton.steps.memory import Memory
from kfac_triton.steps.motion import Lists, Part
from kfac_triton.structures.registry import structure_of


def numbered(layer: Layer) -> tuple[Tensor, Tensor | None]:
    """A weight and a bias of which every element is another number."""
    weight = torch.arange(1.0, layer.weight.numel() + 1, dtype=F64).view(layer.weight.shape)
    if layer.bias is None:
        return weight, None
    return weight, -torch.arange(1.0, layer.bias.numel() + 1, dtype=F64).view(layer.bias.shape)


def by_loops(layer: Layer, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The matrix of a layer as the words of `blocks.layout` have it, element by element; with an axis of groups."""
    layout, groups = layer.layout, layer.layout.groups
    d_in, d_out = layout.dims(weight.shape)
    M = torch.full((groups, d_out, d_in), torch.nan, dtype=F64)
    if layout.operation == "scale":
        M[0, 0, : weight.numel()] = weight
        M[0, 0, weight.numel() :] = bias
        return M
    flipped = layout.transposed or layout.table
    columns = d_in - int(layout.bias)
    for group in range(groups):
        for o in range(d_out):
            for i in range(columns):
                if layout.operation != "conv":
                    M[group, o, i] = weight[i, o] if flipped else weight[o, i]
                    continue
                taps = weight.flatten(2).shape[2]
                channels = columns // taps
                tap, channel = divmod(i, channels)
                at = (group * channels + channel, o) if flipped else (group * d_out + o, channel)
                M[group, o, i] = weight.flatten(2)[at][tap]
            if bias is not None:
                M[group, o, -1] = bias[group * d_out + o]
    return M


@pytest.fixture(params=["narrow", "aligned"])
def alignment(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joint, "ALIGNED", 1 if request.param == "aligned" else 128)


@pytest.mark.parametrize("form", FORMS)
def test_the_parts_of_a_matrix_are_views_with_the_right_elements(form, alignment):
    """Written through the views, and read from the matrix; and the other way round."""
    stack = stack_of(form, 2)
    matrices, layer = Joint([stack]), stack.layers[1]
    weight, bias = numbered(layer)
    views = matrices.of_weight(0, 1)
    torch._foreach_copy_(views, layer.layout.pieces(weight))
    if bias is not None:
        matrices.of_bias(0, 1).copy_(bias)
    M = matrices.of(0, 1)
    assert torch.equal(M.view(-1, *M.shape[-2:]), by_loops(layer, weight, bias))
    assert torch.equal(M.view_as(layer.layout.join(weight, bias)), layer.layout.join(weight, bias))
    assert not matrices.of(0, 0).any() and matrices.flats[0].count_nonzero() == M.numel()
    assert all(view.untyped_storage().data_ptr() == matrices.flats[0].data_ptr() for view in views)
    for view, piece in zip(views, layer.layout.pieces(weight), strict=True):
        assert view.shape == piece.shape


@pytest.mark.parametrize("form", FORMS)
def test_lists_have_every_element_of_a_parameter_once(form, alignment):
    """Parameters, J, V and M in the same order and the same shapes."""
    stack = stack_of(form, 3)
    memory = Memory([structure_of(stack, ALONE, "kronecker", "independent")])
    lists, parts = Lists(0, 0), {}
    for member in (2, 0):
        layer = stack.layers[member]
        for p in (layer.weight, layer.bias):
            if p is not None:
                parts[p] = Part(0, member, p is layer.bias, 0, 0)
                p.grad = dense.randn(*p.shape, seed=len(parts))
                lists.add(memory, p, parts[p])
    lists.add_momentum(memory, parts)
    torch._foreach_copy_(lists.J, lists.grads())
    torch._foreach_copy_(lists.M, lists.grads())
    for member in (2, 0):
        layer = stack.layers[member]
        wanted = layer.layout.join(layer.weight.grad, None if layer.bias is None else layer.bias.grad)
        for matrices in (memory.J, memory.M):
            assert torch.equal(matrices.of(0, member), wanted.view_as(matrices.of(0, member)))
    assert not memory.J.of(0, 1).any()
    with torch.no_grad():
        torch._foreach_add_(lists.values(), lists.J)
    for p in parts:
        assert torch.equal(p.detach(), p.grad), "the weights started at zero"


def test_layers_of_one_shape_and_form_stand_together_whatever_they_are():
    """A linear layer, one with its inputs first, and a convolution of one tap; a bias counts as a column."""
    plain = layers_of("linear", 2) + layers_of("linear, inputs first", 1)
    wide = Layer(nn.Parameter(torch.zeros(3, 5, dtype=F64)), None, Layout("linear"))
    other = layers_of("linear without bias", 1)
    single = Layer(nn.Parameter(torch.zeros(3, 5, dtype=torch.float32)), None, Layout("linear"))
    stacks = stacked([plain[0], other[0], plain[1], wide, single, plain[2]])
    assert [stack.layers for stack in stacks] == [(plain[0], plain[1], wide, plain[2]), (other[0],), (single,)]
    assert [stack.first for stack in stacks] == [0, 4, 5]
    matrices = Joint(stacks)
    assert [flat.dtype for flat in matrices.flats] == [F64, torch.float32]
    assert [m.dtype for m in matrices.matrices] == [F64, F64, torch.float32]
    assert matrices.nbytes == 4 * 15 * 8 + 12 * 8 + 15 * 4


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_transposed_convolution_steps_as_the_dense_solve_says(groups, momentum):
    """Three steps, from kept factors and gradients: V by the dense block of every group."""
    torch.manual_seed(0)
    conv = nn.ConvTranspose2d(4, 6, (2, 1), groups=groups)
    model = nn.Sequential(nn.Unflatten(1, (4, 3, 2)), conv, nn.Tanh(), nn.Flatten(), nn.Linear(48, 3)).double()
    optimizer = KFAC(model, likelihood="categorical", fisher="exact", factor_fraction=1.0, lr=0.1, rule="kl",
                     kl_clip=None, momentum=momentum, damping=0.03, inverse_interval=1, compile=False)  # fmt: skip
    x, y = dense.randn(20, 24), torch.arange(20) % 3
    buffer = 0.0
    for _ in range(3):
        before = joined(conv, groups)
        train_step(optimizer, model, x, y)
        pair = optimizer.factors()["1"]
        A, G = (F if groups > 1 else F[None] for F in (pair["A"], pair["G"]))
        grad = joined(conv, groups, of_gradients=True)
        V = []
        for group in range(groups):
            A_inv, G_inv = dense.damped_inverses(A[group], G[group], 0.03)
            V.append(G_inv @ grad[group] @ A_inv)
        buffer = momentum * buffer + torch.stack(V)
        dense.assert_exact(before - joined(conv, groups), 0.1 * buffer, 1e-8)
    state = optimizer.state[conv.weight]
    if momentum:
        held = state["momentum_buffer"]
        assert held.shape == conv.weight.shape
        dense.assert_exact(rows_of_conv(held, groups), buffer[..., :-1], 1e-8)


def rows_of_conv(weight: Tensor, groups: int) -> Tensor:
    """(groups, d_out, channels * taps), the channels outermost, as `factors` has A."""
    by_group = weight.detach().unflatten(0, (groups, -1))  # (groups, channels, d_out, height, width)
    return by_group.transpose(1, 2).flatten(2)


def joined(conv: nn.ConvTranspose2d, groups: int, *, of_gradients: bool = False) -> Tensor:
    weight, bias = (p.grad if of_gradients else p.detach() for p in (conv.weight, conv.bias))
    return torch.cat([rows_of_conv(weight, groups), bias.view(groups, -1, 1)], -1).clone()
