"""Every kind of network in every way of training it: the factors are those of plain training.

Compiled without a graph break, under autocast to bfloat16, in micro-batches, with activation checkpointing.
"""

from __future__ import annotations

from collections.abc import Callable

import dense
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kfac_triton import KFAC

N = 6


class Images(nn.Module):
    """Convolutions, grouped and transposed ones, and their norms."""

    def __init__(self):
        super().__init__()
        self.front = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(inplace=True))
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, stride=2, groups=4), nn.ConvTranspose2d(8, 4, 2), nn.Tanh())
        self.head = nn.Linear(4 * 3 * 3, 3)

    def forward(self, x: Tensor, run: Callable = lambda block, x: block(x)) -> Tensor:
        return self.head(run(self.body, run(self.front, x)).flatten(1))


class Steps(nn.Module):
    """A recurrent layer of two directions."""

    def __init__(self, make=nn.GRU):
        super().__init__()
        self.layer, self.head = make(4, 5, bidirectional=True, batch_first=True), nn.Linear(10, 3)

    def body(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x)[0][:, -1])

    def forward(self, x: Tensor, run: Callable = lambda block, x: block(x)) -> Tensor:
        return self.head(run(self.body, x))


class Attention(nn.Module):
    """A class token, positions, a block of a transformer."""

    def __init__(self):
        super().__init__()
        self.token, self.places = nn.Parameter(torch.randn(1, 1, 8)), nn.Parameter(torch.randn(1, 5, 8))
        self.block = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True, norm_first=True)
        self.norm, self.head = nn.RMSNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor, run: Callable = lambda block, x: block(x)) -> Tensor:
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.places
        return self.head(self.norm(run(self.block, x))[:, 0])


class Words(nn.Module):
    """A table that the last layer shares."""

    def __init__(self):
        super().__init__()
        self.table, self.places = nn.Embedding(7, 6), nn.Embedding(4, 6)
        self.inner, self.norm = nn.Linear(6, 6), nn.LayerNorm(6)
        self.head = nn.Linear(6, 7, bias=False)
        self.head.weight = self.table.weight

    def body(self, x: Tensor) -> Tensor:
        return self.norm(torch.tanh(self.inner(x)))

    def forward(self, tokens: Tensor, run: Callable = lambda block, x: block(x)) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        return self.head(run(self.body, self.table(tokens) + self.places(places)))


def sentences(dtype: torch.dtype) -> Tensor:
    return torch.arange(N * 4).view(N, 4) * 5 % 7


NETWORKS = {
    "images": (Images, lambda dtype: dense.randn(N, 2, 6, 6).to(dtype)),
    "steps": (Steps, lambda dtype: dense.randn(N, 5, 4).to(dtype)),
    "lstm": (lambda: Steps(nn.LSTM), lambda dtype: dense.randn(N, 5, 4).to(dtype)),
    "attention": (Attention, lambda dtype: dense.randn(N, 4, 8).to(dtype)),
    "words": (Words, sentences),
}
MODES = ("compiled", "autocast", "compiled autocast", "accumulated", "checkpointed", "checkpointed, re-entrant")


def trained(
    model: nn.Module, x: Tensor, forward: Callable[[Tensor], Tensor], *, parts: int = 1, bf16: bool = False
) -> dict[str, dict[str, Tensor]]:
    """The factors after a step on `parts` of the batch, exact so that no target is drawn."""
    optimizer = KFAC(model, likelihood="categorical", fisher="exact", lr=0.0, factor_fraction=1.0, compile=False)
    for part in x.chunk(parts):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            z = forward(part)
        F.cross_entropy(z.float().flatten(0, -2), torch.arange(z[..., 0].numel()) % 3).backward()
    optimizer.step()
    assert {name for name, block in optimizer.coverage().items() if block == "fallback"} == set()
    found = {
        name: {side: factor.clone() for side, factor in pair.items()} for name, pair in optimizer.factors().items()
    }
    optimizer.close()
    return found


@pytest.fixture
def without_onednn():
    with torch.backends.mkldnn.flags(enabled=False):
        yield


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("network", NETWORKS)
@torch._dynamo.config.patch(allow_rnn=True)
def test_factors_are_those_of_plain_training(network, mode, request):
    make, inputs = NETWORKS[network]
    torch.manual_seed(0)
    bf16 = "autocast" in mode
    if bf16 and network == "lstm":  # oneDNN has no LSTM of bfloat16 numbers on every CPU
        request.getfixturevalue("without_onednn")
    dtype = torch.float32 if bf16 else torch.float64
    model, x = make().to(dtype), inputs(dtype)
    plain = trained(model, x, model, bf16=mode == "compiled autocast")
    if "compiled" in mode:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        found = trained(compiled, x, compiled, bf16=bf16)
        assert not torch._dynamo.utils.counters["graph_break"]
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
        dense.assert_factors_equal(found, plain, 1e-6 if bf16 else dense.EXACT)
    elif mode == "autocast":
        dense.assert_factors_equal(trained(model, x, model, bf16=True), plain, 0.1)
    elif mode == "accumulated":
        found = trained(model, x, model, parts=3)
        # a tied table's pi is that of a whole batch, and a table of positions is used once in a batch
        apart = {"table", "places"} if network == "words" else set()
        dense.assert_factors_equal(
            *({name: pair for name, pair in each.items() if name not in apart} for each in (found, plain))
        )
    else:
        again = "re-entrant" in mode
        if again and x.is_floating_point():
            x = x.requires_grad_()
        found = trained(model, x, lambda x: model(x, lambda f, y: checkpoint(f, y, use_reentrant=again)))
        dense.assert_factors_equal(found, plain)
