"""Exported, traced and scripted models: K-FAC where the functions are seen, AdamW by name where they are hidden."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F
from small import WHOLE, closure_step, data, mlp, train_step
from torch import Tensor, nn

from kfac_triton import KFAC

FORMS = {"plain": (KFAC, train_step), "paper": (KFAC.paper, closure_step)}
ANY_N = ({0: torch.export.Dim("n", min=2)},)
MADE = {
    "exported": lambda m, x: torch.export.export(m, (x,), dynamic_shapes=ANY_N).module(),
    "exported for one batch size": lambda m, x: torch.export.export(m, (x,)).module(),
    "decomposed": lambda m, x: torch.export.export(m, (x,), dynamic_shapes=ANY_N).run_decompositions().module(),
    "symbolic trace": lambda m, x: torch.fx.symbolic_trace(m),
}
HIDDEN = {
    "traced": lambda m, x: torch.jit.trace(m, x),
    "scripted": lambda m, x: torch.jit.script(m),
}
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("made", MADE)
def test_programs_train_as_their_model(made, form):
    make, step = FORMS[form]
    x, y = data(200)
    whole = {"factor_fraction": 1.0, **({"quadratic_fraction": 1.0} if form == "paper" else {})}
    ends = []
    for program in (False, True):
        m = mlp()
        m = MADE[made](m, x) if program else m
        o = make(m, likelihood="categorical", compile=False, **whole)
        ends.append([step(o, m, x, y) for _ in range(15)])
        assert set(o.coverage().values()) == {"linear"}
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-4, atol=1e-5)
    assert ends[1][-1] < ends[1][0]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("made", HIDDEN)
def test_scripts_train_by_adamw_with_a_warning(made, form, caplog):
    make, step = FORMS[form]
    x, y = data(200)
    m = HIDDEN[made](nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)), x)
    o = make(m, likelihood="categorical", compile=False, fallback_lr=1e-2)
    with caplog.at_level(logging.WARNING, "kfac_triton"):
        losses = [step(o, m, x, y) for _ in range(15)]
    assert losses[-1] < losses[0]
    assert set(o.coverage().values()) == {"fallback"}
    assert all(a is b for a, b in zip(m.parameters(), o.param_groups[0]["params"], strict=True))
    assert len(caplog.messages) == 1 and "0.weight (inside a ScriptModule)" in caplog.messages[0]
    o.close()


@pytest.mark.parametrize("form", FORMS)
def test_a_script_inside_a_model(form):
    """Its buffers are left alone too, by K-FAC's own pass and by the quadratic model."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.script = torch.jit.script(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8)))
            self.head = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.script(x)))

    make, _ = FORMS[form]
    x, y = data(200)
    m, other = Net(), Net()
    o = make(m, likelihood="categorical", compile=False)

    def closure() -> Tensor:
        o.zero_grad()
        loss = F.cross_entropy(m(x), y)
        loss.backward()
        return loss

    losses = []
    for _ in range(10):
        other.load_state_dict(m.state_dict())
        other(x)
        losses.append(float(o.step(closure).detach()))
        torch.testing.assert_close(dict(m.named_buffers()), dict(other.named_buffers()))
    assert losses[-1] < losses[0]
    assert o.coverage()["script.0.weight"] == "fallback" and o.coverage()["head.weight"] == "linear"


class Many(nn.Module):
    """One of every kind of layer that exported programs call by an operator of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.places = nn.Embedding(10, 8), nn.Parameter(0.1 * torch.randn(5, 8))
        self.a, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)
        self.conv, self.batch, self.group = nn.Conv1d(8, 8, 3, padding=1), nn.BatchNorm1d(8), nn.GroupNorm(2, 8)
        self.same, self.instance = nn.Conv1d(8, 8, 3, padding="same"), nn.InstanceNorm1d(8, affine=True)
        self.back, self.rms = nn.ConvTranspose1d(8, 8, 3, padding=1), nn.RMSNorm(8)
        self.matrix, self.scale = nn.Parameter(0.3 * torch.randn(8, 8)), nn.Parameter(torch.ones(8))
        self.lstm, self.gru = nn.LSTM(8, 8, batch_first=True), nn.GRU(8, 8)
        self.cell, self.head = nn.LSTMCell(8, 8), nn.Linear(8, 3)

    def forward(self, words: Tensor) -> Tensor:
        h = self.norm(torch.relu(self.a(self.table(words) + self.places)))
        h = self.group(self.batch(self.conv(h.transpose(1, 2))))
        h = self.rms(self.back(self.instance(self.same(h))).transpose(1, 2))
        h = self.gru(self.lstm((h @ self.matrix) * self.scale)[0].transpose(0, 1))[0]
        return self.head(self.cell(h.mean(0))[0] + self.table.weight[words[:, 0]])


def test_every_operator_of_an_exported_program_gives_the_factors_of_its_function():
    words = torch.randint(10, (16, 5), generator=torch.Generator().manual_seed(0))
    y = torch.randint(3, (16,), generator=torch.Generator().manual_seed(1))
    m = Many()
    program = torch.export.export(Many(), (words,)).module()
    found = []
    for net in (m, program):
        o = KFAC(net, **{**WHOLE, "fisher": "exact", "lr": 0.0})
        train_step(o, net, words, y)
        found.append((o.coverage(), o.factors()))
    assert found[0][0] == found[1][0] and "fallback" not in found[0][0].values()
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_convolutions_of_decomposed_programs(dims):
    kinds = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}, {
        1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d
    }  # fmt: skip
    torch.manual_seed(0)
    m = nn.Sequential(kinds[0][dims](2, 4, 3, 2, groups=2), nn.Tanh(), kinds[1][dims](4, 3, 3, 2), nn.Flatten(2))
    x = torch.randn(4, 2, *(5,) * dims)
    program = torch.export.export(m, (x,)).run_decompositions().module()
    found = []
    for net in (m, program):
        o = KFAC(net, likelihood="gaussian", factor_fraction=1.0, lr=0.0, compile=False)
        train_step(o, net, x, torch.zeros(()), lambda z, y: z.square().mean())
        found.append((o.coverage(), o.factors()))
    assert found[0][0] == found[1][0] and set(found[0][0].values()) == {"conv"}
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-4, atol=1e-6)
