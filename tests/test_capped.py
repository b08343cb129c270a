"""rule="cap": momentum before the inverse, a bound in KL divergence, and one for each layer in AdamW's unit."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import dense
import pytest
import torch
import torch.nn.functional as F
from small import WHOLE, data, mlp, train_step
from torch import Tensor, nn

from kfac_triton import KFAC

X, Y = data(64)
EXACT: dict[str, Any] = {**WHOLE, "rule": "cap", "fisher": "exact", "inverse_interval": 1}


def deep() -> nn.Sequential:
    """Three layers, two of one shape; the last has no bias."""
    torch.manual_seed(0)
    layers = [nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3, bias=False)]
    return nn.Sequential(*layers).double()


class Definition:
    """The rule by loops over layers and dense matrices, in float64."""

    def __init__(self, model: nn.Sequential) -> None:
        self.layers = {name: layer for name, layer in model.named_children() if isinstance(layer, nn.Linear)}
        self.m: dict[str, Tensor] = {}
        self.v: dict[str, Tensor] = {}
        self.usual: dict[str, float] = {}
        self.steps: dict[str, int] = {}
        self.row: dict[str, int] = {}

    def joint(self, layer: nn.Linear, gradient: bool) -> Tensor:
        """(d_out, d_in[+1]) of the weight and, as last column, the bias."""
        pair = [p for p in (layer.weight, layer.bias) if p is not None]
        found = [torch.zeros_like(p) if p.grad is None else p.grad if gradient else p.detach() for p in pair]
        return torch.cat([t.reshape(len(t), -1) for t in found], 1)

    def gradient(self, name: str, weights: Tensor, decay: float, scale: float) -> Tensor:
        """Of the objective at these weights, in units of the mean nll, bounded."""
        g = (self.joint(self.layers[name], True) + decay * weights) / scale
        norm, usual = float(g.norm()), self.usual.get(name, 0.0)
        self.steps[name] = self.steps.get(name, 0) + 1
        if norm > 0:
            row = self.row.get(name, 0)
            counted = min(norm, 2 * 2**row * usual) if usual else norm
            self.row[name] = row + 1 if usual and norm > 2 * usual else 0
            weight = max(0.05, 1 / self.steps[name]) if usual else 1.0
            self.usual[name] = usual + weight * (counted - usual)
        return g * min(1.0, 2 * usual / norm) if usual and norm else g

    def moves(
        self, before: dict[str, Tensor], factors: dict, *, damping: float, momentum: float, kl_clip: float,
        peak: float, lr: dict[str, float],
        decay: float = 0.0, scale: float = 1.0,
    ) -> dict[str, Tensor]:  # fmt: skip
        """What each joint matrix moves by; `before`: the matrices before the step; `lr` of weight and bias."""
        V, u, divergence = {}, {}, 0.0
        for name in [n for n, layer in self.layers.items() if layer.weight.grad is not None]:
            g = self.gradient(name, before[name], decay, scale)
            m = self.m[name] = momentum * self.m.get(name, 0 * g) + (1 - momentum) * g
            v = self.v[name] = 0.999 * self.v.get(name, 0 * g) + 0.001 * g * g
            t = self.steps[name]
            mean = m / (1 - momentum**t)
            A_inv, G_inv = dense.damped_inverses(**factors[name], damping=damping)
            V[name] = G_inv @ mean @ A_inv
            u[name] = mean * math.sqrt(1 - 0.999**t) / (v.sqrt() + 1e-8)
            divergence += float((V[name] * mean).sum())
        nu = min(1.0, math.sqrt(2 * kl_clip / divergence))
        found = {}
        for name, step in V.items():
            share = min(nu / peak, float(u[name].norm() / step.norm()))
            lrs = torch.tensor([lr["weight"]] * 6 + [lr["bias"]] * (step.shape[1] - 6), dtype=torch.float64)
            found[name] = -share * step * lrs
        return found


RUNS: dict[str, dict[str, Any]] = {
    "both bounds": {},
    "KL bound alone": {"lr": 1e3},
    "cap alone": {"kl_clip": None},
    "no momentum": {"momentum": 0.0},
    "weight decay": {"weight_decay": 0.1},
    "loss scale": {"loss_scale": 3.0},
    "much damping": {"damping": 10.0},
    "warm-up": {},
    "decaying lr": {},
    "two groups": {},
    "a huge gradient": {},
    "a layer that rests": {},
    "silent for a while": {},
}


@pytest.mark.parametrize("device", ["host", "as on a device"])
@pytest.mark.parametrize("name", RUNS)
def test_steps_are_those_of_the_definition(name, device, request):
    if device != "host":
        request.getfixturevalue("as_on_a_device")
    model, options = deep(), {"lr": 0.03, "momentum": 0.9, "damping": 1e-3, "kl_clip": 1e-2, **RUNS[name]}
    x, definition = X.double(), Definition(model)
    biases = [p for n, p in model.named_parameters() if n.endswith("bias")]
    weights = [p for n, p in model.named_parameters() if n.endswith("weight")]
    groups = [{"params": weights}, {"params": biases, "lr": 0.01}] if name == "two groups" else None
    optimizer = KFAC(model, groups, check_loss_scale=False, **{**EXACT, **options})
    peak = 0.0
    for step in range(12):
        if name in ("warm-up", "decaying lr"):
            lr = 0.03 * ((step + 1) / 12 if name == "warm-up" else 1 - step / 12)
            optimizer.param_groups[0]["lr"] = lr
        else:
            lr = options["lr"]
        peak = max(peak, lr)
        optimizer.zero_grad()
        loss = options.get("loss_scale", 1.0) * F.cross_entropy(model(x), Y)
        (loss * (1e6 if name == "a huge gradient" and step in (3, 4, 5, 8) else 1.0)).backward()
        if name == "a layer that rests" and step in (3, 4, 7):
            model[2].weight.grad = model[2].bias.grad = None
        if name == "silent for a while" and step in (0, 1, 5):
            model[2].weight.grad.zero_(), model[2].bias.grad.zero_()
        before = {n: definition.joint(layer, False) for n, layer in definition.layers.items()}
        optimizer.step()
        clip = options["kl_clip"]
        moves = definition.moves(
            before, optimizer.factors(), damping=options["damping"], momentum=options["momentum"], peak=peak,
            kl_clip=math.inf if clip is None else clip, decay=options.get("weight_decay", 0.0),
            scale=options.get("loss_scale", 1.0), lr={"weight": lr, "bias": 0.01 if groups else lr},
        )  # fmt: skip
        for layer_name, layer in definition.layers.items():
            after = definition.joint(layer, False)
            wanted = before[layer_name] + moves.get(layer_name, 0.0)
            torch.testing.assert_close(after, wanted, rtol=1e-7, atol=1e-10)
        assert float(moves["0"].norm()) > 0


class Images(nn.Module):
    """Convolutions, one of them no view of its matrix; a norm; a scale without a block."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(1, 4, 3), nn.LayerNorm(4)
        self.up, self.head = nn.ConvTranspose1d(4, 4, 2, groups=2), nn.Linear(20, 3)
        self.scale = nn.Parameter(torch.ones(5))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.norm(self.conv(x[:, None]).mT).mT)
        return self.head((torch.tanh(self.up(h)) * torch.exp(self.scale)).flatten(1))


CAP: dict[str, Any] = {"likelihood": "categorical", "rule": "cap", "compile": False}


@pytest.mark.parametrize("make", [mlp, Images])
@pytest.mark.parametrize("approximation", ["kronecker", "eigen", "inverse_free"])
def test_a_resumed_run_is_bit_equal(make, approximation):
    torch.manual_seed(0)
    model = make()
    optimizer = KFAC(model, approximation=approximation, **CAP)
    for _ in range(7):
        train_step(optimizer, model, X, Y)
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    other = make()
    other.load_state_dict(weights)
    resumed = KFAC(other, approximation=approximation, **CAP)
    resumed.load_state_dict(state)
    for _ in range(7):
        train_step(optimizer, model, X, Y)
        train_step(resumed, other, X, Y)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(("one", "another"), [("cap", "kl"), ("kl", "cap")])
def test_a_state_of_the_other_rule_is_refused(one, another):
    model = mlp()
    optimizer = KFAC(model, **{**CAP, "rule": one})
    train_step(optimizer, model, X, Y)
    resumed = KFAC(mlp(), **{**CAP, "rule": another})
    with pytest.raises(ValueError, match=f'momentum of rule="{one}"'):
        resumed.load_state_dict(optimizer.state_dict())
    assert not resumed.state


def test_a_copy_and_an_attached_pickle_go_on_alike():
    model = mlp()
    optimizer = KFAC(model, **CAP)
    train_step(optimizer, model, X, Y)
    other, copied = copy.deepcopy((model, optimizer))
    copied.attach(other)
    for own, net in ((optimizer, model), (copied, other)):
        train_step(own, net, X, Y)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("scale", [10.0, 1e3, 1e10, 1e30])
def test_three_huge_gradients_leave_no_trace(scale):
    """As good after thirty clean steps as a run without them: what enters m and v is bounded."""

    def trained(scale: float) -> float:
        model = mlp()
        optimizer = KFAC(model, **CAP)
        for step in range(60):
            factor = scale if step in (20, 23, 26) else 1.0
            train_step(optimizer, model, X, Y, lambda z, y, c=factor: c * F.cross_entropy(z, y))
        with torch.no_grad():
            return float(F.cross_entropy(model(X), Y))

    assert trained(scale) < 1.1 * trained(1.0) + 1e-3


def test_a_lasting_change_of_scale_is_let_in():
    """A layer whose gradient becomes a million times longer is bounded for some steps only."""
    model = mlp()
    optimizer = KFAC(model, **CAP, lr=0.0)
    for step in range(60):
        factor = 1e-6 if step < 30 else 1.0
        train_step(optimizer, model, X, Y, lambda z, y, c=factor: c * F.cross_entropy(z, y))
    usual = float(optimizer.state[model[2].weight]["gradient_norm"])
    joint = torch.cat([model[2].weight.grad, model[2].bias.grad[:, None]], 1)
    assert usual > 0.5 * float(joint.norm())


def test_the_bound_is_adamws_step_of_the_layer():
    """No layer moves further than lr times AdamW's step with the same averages, whatever the curvature says."""
    model = mlp().double()
    optimizer = KFAC(model, **{**CAP, "kl_clip": None, "damping": 1e-12}, lr=1e-2)
    x = 1e-3 * X.double()  # hardly any curvature
    for _ in range(10):
        before = [p.detach().clone() for p in model.parameters()]
        train_step(optimizer, model, x, Y)
        for layer, at in ((model[0], 0), (model[2], 2)):
            moved = torch.cat([(p - q).flatten() for p, q in zip(layer.parameters(), before[at:], strict=False)])
            assert 0 < float(moved.detach().norm()) <= 1e-2 * math.sqrt(moved.numel()) * 1.0001


def test_memory_usage_counts_the_squares():
    model = mlp()
    usages = []
    for rule in ("kl", "cap"):
        optimizer = KFAC(model, **{**CAP, "rule": rule})
        expected = optimizer.memory_usage()
        train_step(optimizer, model, X, Y)
        assert optimizer.memory_usage()["momentum"] == expected["momentum"]
        usages.append(expected["momentum"])
        optimizer.close()
    assert usages[1] == 2 * usages[0]


def test_unknown_rules_are_refused():
    with pytest.raises(ValueError, match="rule must be one of 'kl', 'cap'"):
        KFAC(mlp(), likelihood="categorical", rule="newton")
