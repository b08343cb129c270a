"""A plain call of F.linear takes a short way through the recorder of uses, which sees what the general one sees."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from replayed import own_forward, recorded
from torch import Tensor, nn

from kfac_triton.capture import UseRecorder


class Calls(nn.Module):
    """`uses(linear, W, b, x)` with the function `linear`, in the model's forward pass."""

    def __init__(self, uses: Callable[..., Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.W = nn.Parameter(torch.randn(8, 8, dtype=torch.float64))
        self.b = nn.Parameter(torch.randn(8, dtype=torch.float64))
        self.uses, self.linear = uses, F.linear

    def forward(self, x: Tensor) -> Tensor:
        return self.uses(self.linear, self.W, self.b, x)


def the_long_way(x: Tensor, W: Tensor, b: Tensor | None = None) -> Tensor:
    """A keyword is no plain call."""
    return F.linear(x, W, bias=b)


def under_vmap(linear: Callable[..., Tensor], W: Tensor, b: Tensor, x: Tensor) -> Tensor:
    return torch.vmap(lambda row: linear(row, W, b))(x)


def in_a_derivative(linear: Callable[..., Tensor], W: Tensor, b: Tensor, x: Tensor) -> Tensor:
    z, pull = torch.func.vjp(lambda x: linear(x, W, b).sin(), x)
    return z + pull(torch.ones_like(z))[0]


def in_a_jacobian(linear: Callable[..., Tensor], W: Tensor, b: Tensor, x: Tensor) -> Tensor:
    return torch.func.jacfwd(lambda x: linear(x, W, b).sin())(x).sum((0, 1, 2)) + linear(x, W, b)


def per_example(linear: Callable[..., Tensor], W: Tensor, b: Tensor, x: Tensor) -> Tensor:
    gradients = torch.vmap(torch.func.grad(lambda row: linear(row, W, b).sin().sum()))(x)
    return gradients + linear(x, W, b)


CALLS: dict[str, Callable[..., Tensor]] = {
    "flat": lambda linear, W, b, x: linear(x.flatten(0, 1), W, b),
    "positions": lambda linear, W, b, x: linear(x, W, b),
    "one vector": lambda linear, W, b, x: linear(x[0, 0], W, b),
    "no bias": lambda linear, W, b, x: linear(x, W, None) + 1,
    "twice": lambda linear, W, b, x: linear(torch.tanh(linear(x, W, b)), W, None),
    "of a view of another": lambda linear, W, b, x: linear(linear(x, W, b).flatten(0, 1).t().t(), W, b),
    "written in place behind": lambda linear, W, b, x: linear(linear(x, W, b).tanh_(), W, b).mul_(2),
    "a vector": lambda linear, W, b, x: linear(x, b, None),
    "the transpose": lambda linear, W, b, x: linear(x, W.t(), None),
    "some rows of the weight": lambda linear, W, b, x: linear(x, W[:3], b[:3]),
    "a weight made of it": lambda linear, W, b, x: linear(x, W.double() * 2, b),
    "a bias made of it": lambda linear, W, b, x: linear(x, W, 2 * b),
    "input and weight": lambda linear, W, b, x: linear(W, W, b),
    "without gradients": lambda linear, W, b, x: linear(linear(x, W, b).detach(), W, b),
    "vmap": under_vmap,
    "vjp": in_a_derivative,
    "vmap of grad": per_example,
    "jacfwd": in_a_jacobian,
}


def everything_of(recorder: UseRecorder, z: Tensor) -> list[Any]:
    uses = recorded(recorder)
    edges = [one.edge for one in uses]
    dys = torch.autograd.grad(z.sin().sum(), edges, allow_unused=True) if edges else ()
    described = [
        (one.use.weight[1:], one.use.bias and one.use.bias[1:], one.shape, one.use.batch_axis, one.use.examples)
        for one in uses
    ]
    reached = [(one, dy) for one, dy in zip(uses, dys, strict=True) if dy is not None]
    rows = [rows for one, dy in reached for rows in (one.use.a(), one.g(dy))]
    unsupported = [(tuple(p.shape), why) for p, why in recorder.uses.unsupported.items()]
    ends = [(len(set(call.nodes)), len({*call.ends} - {None})) for call in recorder._calls]
    return [described, rows, unsupported, ends]


@pytest.mark.parametrize("asks", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_a_plain_linear_call_gives_what_the_general_way_gives(name, asks):
    """`asks`: whether the input requires a gradient."""
    x, found = torch.randn(4, 3, 8, dtype=torch.float64).requires_grad_(asks), []
    for function in (F.linear, the_long_way):
        model = Calls(CALLS[name])
        model.linear = function
        recorder, z = own_forward(model, x)()
        found.append(everything_of(recorder, z))
    torch.testing.assert_close(found[0][1], found[1][1], rtol=0, atol=0)
    assert found[0][::2] == found[1][::2] and found[0][3] == found[1][3]


def test_a_claimed_weight_is_left_to_its_block():
    model, x = Calls(CALLS["positions"]), torch.randn(4, 3, 8, dtype=torch.float64)
    recorder = UseRecorder(model.parameters())
    with recorder:
        with recorder.claimed([model.W]), recorder.claimed([model.W, model.b]):
            model(x)
        assert not recorded(recorder) and not recorder.uses.unsupported
        with recorder.claimed([model.b]):
            model(x)
        model(x)
    assert [one.use.bias is not None for one in recorded(recorder)] == [True, True]
