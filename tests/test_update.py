"""The step against a plain re-statement of the contract's "Update", and the fallback against torch's AdamW.

The re-statement takes the factors that the optimizer reports, and nothing else of it.
"""

from __future__ import annotations

import itertools
import math
from copy import deepcopy

import dense
import pytest
import torch
from torch import nn

from kfac_triton import KFAC
from kfac_triton.operations import layout
from kfac_triton.schedules import Cosine, Exponential, Schedule, WarmUp

# Layers of the model below, by the names of their parameters; widths all differ.
LAYERS = {"0": ("0.weight", "0.bias"), "2": ("2.weight", "2.bias"), "4": ("4.weight", None)}
OPTIONS = {
    "likelihood": "categorical",
    "fisher": "mc",
    "compile": False,
    "factor_fraction": 1.0,
    "kl_clip": None,
    "rule": "kl",
}


def model_and_batches():
    model = dense.random_model(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3, bias=False))
    return model, [(dense.randn(12, 5, seed=s), torch.arange(12) % 3) for s in range(5)]


def plain_step(p, grad, buf, quadratic, factors, h):
    """nu = min(1, sqrt(2 kl_clip / sum lr^2 <V, grad>)); buf <- momentum buf + nu V; W <- W - tau lr buf.

    `p`, `grad`, `buf`, `quadratic`: numbers by parameter name; `h(name)`: its hyper-parameters; "bounded_lr" is the lr
    in nu and tau. Writes p, buf and quadratic.
    """
    V, l2 = {}, {}
    for layer, (weight, bias) in LAYERS.items():
        names = [n for n in (weight, bias) if n is not None]
        l2 |= {n: grad[n] + h(n)["weight_decay"] * p[n] for n in names}
        joint = l2[weight] if bias is None else torch.cat([l2[weight], l2[bias][:, None]], 1)
        A_inv, G_inv = dense.damped_inverses(factors[layer]["A"], factors[layer]["G"], h(weight)["damping"])
        joint = G_inv @ joint @ A_inv
        V[weight] = joint if bias is None else joint[:, :-1]
        V |= {} if bias is None else {bias: joint[:, -1]}
    owner = {n: names[0] for names in LAYERS.values() for n in names if n is not None}
    size = sum(float(h(n)["bounded_lr"]) ** 2 * float((v * l2[n]).sum()) for n, v in V.items())
    clip = {n: math.inf if h(owner[n])["kl_clip"] is None else h(owner[n])["kl_clip"] for n in V}
    nu = {n: min(1.0, math.sqrt(2 * clip[n] / size)) for n in V}
    tau = dict.fromkeys(V, 1.0)
    if min(clip.values()) < math.inf and any(h(n)["momentum"] for n in V):
        length = quadratic_of_buffers(V, l2, buf, quadratic, nu, h)
        tau = {n: min(1.0, math.sqrt(2 * clip[n] / length)) for n in V}
    for n, v in V.items():
        buf[n] = h(n)["momentum"] * buf[n] + nu[n] * v
        p[n] = p[n] - tau[n] * float(h(n)["lr"]) * buf[n]


def quadratic_of_buffers(V, l2, buf, quadratic, nu, h):
    """sum lr^2 buf^T F buf of the buffers to come; moves `quadratic`, the buf^T F buf of every parameter."""
    products = {n: (float((v * l2[n]).sum()), float((buf[n] * l2[n]).sum())) for n, v in V.items()}
    old, cross, new, old_t = (0.0,) * 4
    for n, (t, c) in products.items():
        lr, mu = float(h(n)["bounded_lr"]), h(n)["momentum"]
        old, old_t = old + (lr * mu) ** 2 * quadratic[n], old_t + (lr * mu) ** 2 * t
        cross, new = cross + lr**2 * mu * nu[n] * c, new + (lr * nu[n]) ** 2 * t
    least = cross**2 / new
    for n, (t, c) in products.items():
        mu = h(n)["momentum"]
        before = quadratic[n] + (max(0.0, least - old) / old_t * t if old_t else 0.0)
        quadratic[n] = mu**2 * before + 2 * mu * nu[n] * c + nu[n] ** 2 * t
    return max(old, least) + 2 * cross + new


def run(params=None, steps=5, change=None, loss_scale=1.0, **options):
    """Steps of KFAC beside steps of `plain_step`; compares every parameter after each of them."""
    model, batches = model_and_batches()
    options = {"lr": 0.3, "inverse_interval": 1, **OPTIONS, **options}
    optimizer = KFAC(model, None if params is None else params(model), **options)
    parameters = dict(model.named_parameters())
    group_of = {id(q): group for group in optimizer.param_groups for q in group["params"]}

    largest = {}

    def hyper(name):
        group = dict(group_of[id(parameters[name])])
        bounded = largest[name] if group["kl_annealing"] else group["lr"]
        clip = None if math.isinf(group["kl_clip"]) else group["kl_clip"]
        return {**group, "kl_clip": clip, "bounded_lr": bounded}

    buf = {name: torch.zeros_like(p) for name, p in parameters.items()}
    quadratic = dict.fromkeys(parameters, 0.0)
    moved = 0.0
    for step, (x, y) in enumerate(itertools.islice(itertools.cycle(batches), steps)):
        if change is not None:
            change(optimizer, step)
        p = {name: q.detach().clone() for name, q in parameters.items()}
        optimizer.zero_grad()
        (loss_scale * nn.functional.cross_entropy(model(x), y)).backward()
        grad = {name: q.grad.clone() for name, q in parameters.items()}
        optimizer.step()
        for name, q in parameters.items():
            largest[name] = max(largest.get(name, 0.0), float(group_of[id(q)]["lr"]))
        before = {name: q.clone() for name, q in p.items()}
        plain_step(p, grad, buf, quadratic, optimizer.factors(), hyper)
        for name, q in parameters.items():
            dense.assert_exact(q.detach(), p[name])
            moved = max(moved, float((p[name] - before[name]).abs().max()))
    assert moved > 1e-3  # the comparison was about something
    return optimizer


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
@pytest.mark.parametrize("kl_clip", [None, 1e-2])  # 1e-2 is active, see test_the_trust_region_bounds_the_step
def test_steps_of_the_contract(momentum, weight_decay, kl_clip):
    run(momentum=momentum, weight_decay=weight_decay, kl_clip=kl_clip, damping=1e-2)


@pytest.mark.parametrize("damping", [1e-6, 1.0, 1e4])
def test_damping_from_weak_to_strong(damping):
    run(damping=damping, lr=0.3 * max(1.0, damping))


def weights_and_biases(model):
    weights = [p for p in model.parameters() if p.dim() == 2]
    biases = [p for p in model.parameters() if p.dim() == 1]
    return [{"params": biases, "lr": 0.7, "weight_decay": 0.0}, {"params": weights, "lr": 0.2, "weight_decay": 0.1}]


def first_and_rest(model):
    first, *rest = list(model.children())[::2]
    return [
        {"params": list(first.parameters()), "damping": 0.1, "momentum": 0.5, "kl_clip": 1e-3},
        {"params": [p for layer in rest for p in layer.parameters()], "damping": 1e-3, "momentum": 0.0, "lr": 0.1},
    ]


def every_parameter_its_own(model):
    lrs = itertools.cycle([0.1, 0.4, 0.2])
    return [{"params": [p], "lr": lr, "weight_decay": lr / 10} for p, lr in zip(model.parameters(), lrs, strict=False)]


@pytest.mark.parametrize("kl_clip", [None, 1e-2])
@pytest.mark.parametrize("params", [weights_and_biases, first_and_rest, every_parameter_its_own])
def test_groups_split_a_layer(params, kl_clip):
    """lr and weight_decay come from each parameter's group, damping and kl_clip from its weight's."""
    run(params=params, momentum=0.9, damping=1e-2, kl_clip=kl_clip)


def test_damping_and_trust_region_come_from_the_weights_group():
    """The biases' group says something else, which must not count."""

    def params(model):
        biases, weights = weights_and_biases(model)
        return [{**biases, "damping": 100.0, "kl_clip": 1e-9}, {**weights, "damping": 1e-2, "kl_clip": 1e-2}]

    run(params=params)


def test_hyper_parameters_may_change_from_step_to_step():
    """As schedulers do, through the groups."""

    def change(optimizer, step):
        for group in optimizer.param_groups:
            group.update(lr=0.3 / (step + 1), momentum=0.1 + 0.1 * step, damping=10.0**-step, weight_decay=0.01 * step)
            group["kl_clip"] = math.inf if step == 2 else 1e-2 * (step + 1)

    run(change=change)


@pytest.mark.parametrize("lr", [0.3, Exponential(0.4, 0.01, 5), WarmUp(2, Cosine(0.5, 0.0, 2))])
@pytest.mark.parametrize("params", [None, first_and_rest])
def test_an_annealed_bound_goes_by_the_largest_lr(params, lr):
    """Whoever schedules lr: a `Schedule`, or a loop that writes into the groups; down to an lr of 0."""

    def change(optimizer, step):
        if not isinstance(lr, Schedule):
            for group in optimizer.param_groups:
                group["lr"] = 0.5 * (0.1, 1.0, 0.3, 0.0, 0.7)[step]

    run(params=params, lr=lr, momentum=0.5, kl_clip=1e-3, kl_annealing=True, damping=1e-2, change=change)


def test_an_annealed_bound_shortens_steps_with_lr():
    """Two steps from one point that the bound holds, the second at a tenth of lr: as long as the first, or a tenth."""

    def length(kl_annealing):
        model, [(x, y), *_] = model_and_batches()
        options = {**OPTIONS, "fisher": "exact", "kl_clip": 1e-5, "momentum": 0.0, "damping": 1e-2}
        optimizer = KFAC(model, lr=1.0, kl_annealing=kl_annealing, **options)
        start, moved = [p.detach().clone() for p in model.parameters()], []
        for lr in (1.0, 0.1):
            optimizer.param_groups[0]["lr"] = lr
            with torch.no_grad():
                for p, at in zip(model.parameters(), start, strict=True):
                    p.copy_(at)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            steps = [(p - at).flatten() for p, at in zip(model.parameters(), start, strict=True)]
            moved.append(float(torch.cat(steps).norm()))
        return moved[1] / moved[0]

    assert length(kl_annealing=False) == pytest.approx(1.0)
    assert length(kl_annealing=True) == pytest.approx(0.1)


@pytest.mark.parametrize("kl_annealing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lr_as_a_tensor(dtype, kl_annealing):
    """It stays the tensor that it was, and writes into it count."""
    lr = torch.tensor(0.25, dtype=dtype)

    def change(optimizer, step):
        assert optimizer.param_groups[0]["lr"] is lr
        lr.fill_(0.25 / 2**step)

    run(lr=lr, change=change, kl_clip=1e-2, kl_annealing=kl_annealing)


@pytest.mark.parametrize("kl_clip", [None, 1e-3])
@pytest.mark.parametrize("lr", [0.0, torch.tensor(0.0)], ids=["number", "tensor"])
def test_lr_zero_moves_nothing_but_the_momentum(lr, kl_clip):
    """A warm-up starts there: no division by lr, and the momentum is V when lr comes."""
    model, ((x, y), *_) = model_and_batches()
    optimizer = KFAC(model, lr=lr, momentum=0.9, damping=1e-2, **{**OPTIONS, "kl_clip": kl_clip})
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    for p, q in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, q)
        buffer = optimizer.state[p]["momentum_buffer"]
        assert torch.isfinite(buffer).all()
        assert buffer.any()


def test_without_momentum_there_are_no_buffers():
    optimizer = run(momentum=0.0)
    assert not any("momentum_buffer" in state for state in optimizer.state.values())


# The trust region.


def displacements(params, kl_clip, batch):
    """(lr of each parameter, its gradient with l2, how far one step without momentum moves it)."""
    model = model_and_batches()[0]
    options = {**OPTIONS, "lr": 0.5, "momentum": 0.0, "damping": 1e-3, "kl_clip": kl_clip}
    optimizer = KFAC(model, None if params is None else params(model), **options)
    nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    groups = [group_of[id(p)] for p in model.parameters()]
    pairs = list(zip(model.parameters(), before, groups, strict=True))
    return [(g["lr"], p.grad + g["weight_decay"] * q, q - p.detach()) for p, q, g in pairs]


@pytest.mark.parametrize("params", [None, weights_and_biases])
@pytest.mark.parametrize(("kl_clip", "active"), [(1e-6, True), (1e-3, True), (1e3, False)])
def test_the_trust_region_bounds_the_step(kl_clip, active, params):
    """lr^2 nu^2 <V, grad> <= 2 kl_clip, with equality where it is active; nu is one number for the whole model."""
    batch = model_and_batches()[1][0]
    free, bounded = (displacements(params, delta, batch) for delta in (None, kl_clip))
    size = sum(lr * float((moved * grad).sum()) for lr, grad, moved in free)  # lr V is how far a parameter moves
    nu = float(bounded[0][2].flatten()[0] / free[0][2].flatten()[0])
    for (_, _, far), (_, _, near) in zip(free, bounded, strict=True):
        dense.assert_exact(near, nu * far, tolerance=1e-9)
    assert nu**2 * size <= 2 * kl_clip * (1 + 1e-9)
    if active:
        assert nu < 0.9
        assert math.isclose(nu**2 * size, 2 * kl_clip, rel_tol=1e-9)
    else:
        assert nu == 1.0


def test_the_trust_region_does_not_hold_the_momentum_back():
    """nu scales V before it enters the buffer: with momentum and no new gradient the buffer still moves the weights."""
    model, ((x, y), *_) = model_and_batches()
    optimizer = KFAC(model, lr=0.5, momentum=0.8, damping=1e-3, **{**OPTIONS, "kl_clip": 1e-4})
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    buffers = [optimizer.state[p]["momentum_buffer"].clone() for p in model.parameters()]
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.zero_grad()
    (0.0 * model(x).sum()).backward()
    optimizer.step()
    for p, q, buffer in zip(model.parameters(), before, buffers, strict=True):
        dense.assert_exact(p.detach(), q - 0.5 * 0.8 * buffer)


# Layers with a part frozen, and sides with a diagonal.


@pytest.mark.parametrize("fixed", ["bias", "weight"])
def test_a_frozen_part_stays_and_the_rest_moves(fixed):
    model, ((x, y), *_) = model_and_batches()
    getattr(model[0], fixed).requires_grad_(False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = KFAC(model, lr=0.3, momentum=0.0, damping=1e-2, inverse_interval=1, **OPTIONS)
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == (name == f"0.{fixed}")
    factors = optimizer.factors()
    if fixed == "weight":
        assert "0" not in factors  # the bias alone has no block
    else:
        A_inv, G_inv = dense.damped_inverses(factors["0"]["A"], factors["0"]["G"], 1e-2)
        dense.assert_exact(model[0].weight.detach(), before["0.weight"] - 0.3 * G_inv @ model[0].weight.grad @ A_inv)


@pytest.mark.parametrize(("max_factor_dim", "diagonal"), [(5, "A"), (4, "AG")])
def test_diagonal_sides_precondition_as_diagonal_matrices(max_factor_dim, diagonal, monkeypatch):
    """Linear(5, 5) with a bias: A has 6 rows, G 5."""
    monkeypatch.setattr(layout, "MOST_BLOCKS", 1)
    model, x = dense.random_model(nn.Linear(5, 5), nn.Tanh()), dense.randn(12, 5)
    before = torch.cat([model[0].weight, model[0].bias[:, None]], 1).detach()
    options = {**OPTIONS, "max_factor_dim": max_factor_dim}
    optimizer = KFAC(model, lr=0.3, momentum=0.0, damping=1e-2, **options)
    nn.functional.cross_entropy(model(x), torch.arange(12) % 5).backward()
    optimizer.step()
    A, G = (optimizer.factors()["0"][side] for side in "AG")
    assert (A.dim(), G.dim()) == (1, 1 if "G" in diagonal else 2)
    A_inv, G_inv = dense.damped_inverses(torch.diag(A), torch.diag(G) if "G" in diagonal else G, 1e-2)
    V = G_inv @ torch.cat([model[0].weight.grad, model[0].bias.grad[:, None]], 1) @ A_inv
    dense.assert_exact(torch.cat([model[0].weight, model[0].bias[:, None]], 1).detach(), before - 0.3 * V)


# Intervals: which factors the inverses of a step come from.


@pytest.mark.parametrize(
    ("interval", "refreshed"),
    [
        (1, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]),
        (3, [0, 1, 2, 3, 6, 9]),
        (10, [0, 1, 2, 4, 8, 10]),  # in the first interval also at steps 1, 2, 4, 8
    ],
)
def test_inverses_are_refreshed_at_their_interval(interval, refreshed):
    """V of every step from the factors of the last refresh."""
    model, batches = dense.random_model(nn.Linear(5, 3)), [dense.randn(12, 5, seed=s) for s in range(12)]
    optimizer = KFAC(model, lr=0.1, momentum=0.0, damping=1e-2, inverse_interval=interval, **OPTIONS)
    inverses = None
    for step, x in enumerate(batches):
        before = torch.cat([model[0].weight, model[0].bias[:, None]], 1).detach().clone()
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), torch.arange(12) % 3).backward()
        optimizer.step()
        if step in refreshed:
            inverses = dense.damped_inverses(optimizer.factors()["0"]["A"], optimizer.factors()["0"]["G"], 1e-2)
        V = inverses[1] @ torch.cat([model[0].weight.grad, model[0].bias.grad[:, None]], 1) @ inverses[0]
        after = torch.cat([model[0].weight, model[0].bias[:, None]], 1).detach()
        dense.assert_exact(after, before - 0.1 * V)


# The fallback.


class Scaled(nn.Module):
    """A layer with a block, and two parameters of an operation that no block covers, of one axis and of none."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, 3)
        self.scale, self.shift = nn.Parameter(torch.randn(3)), nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        return self.linear(x) * torch.exp(self.scale) + torch.sin(self.shift) * x[:, :3]


FALLBACK = ("scale", "shift")


def adamw_beside(model, x, y, adamw, steps=6, change=None, **options):
    """Feeds the gradients of the fallback parameters to torch.optim.AdamW (`adamw`: its arguments) too."""
    optimizer = KFAC(model, likelihood="categorical", compile=False, **options)
    tolerance = dense.EXACT if x.dtype == torch.float64 else 1e-6
    copies = {name: nn.Parameter(p.detach().clone()) for name, p in model.named_parameters() if name in FALLBACK}
    theirs = torch.optim.AdamW(copies.values(), **adamw)
    start = {name: p.detach().clone() for name, p in copies.items()}
    for step in range(steps):
        if change is not None:
            change(optimizer, theirs, step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        for name, copy in copies.items():
            copy.grad = model.get_parameter(name).grad.clone()
        theirs.step()
        optimizer.step()
        for name, copy in copies.items():
            dense.assert_exact(model.get_parameter(name).detach(), copy.detach(), tolerance)
    assert {name for name, block in optimizer.coverage().items() if block == "fallback"} == set(FALLBACK)
    assert all(dense.relative_error(copy, start[name]) > 1e-3 for name, copy in copies.items())


def scaled(dtype=torch.float64):
    torch.manual_seed(0)
    return Scaled().to(dtype), dense.randn(12, 5).to(dtype), torch.arange(12) % 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_fallback_is_adamw_at_a_tenth_of_lr(weight_decay, dtype):
    model, x, y = scaled(dtype)
    adamw = {"lr": 0.03, "weight_decay": weight_decay}
    adamw_beside(model, x, y, adamw, lr=0.3, weight_decay=weight_decay)


def test_fallback_lr_is_its_own_and_follows_the_scheduler_of_lr():
    model, x, y = scaled()

    def change(optimizer, theirs, step):
        optimizer.param_groups[0]["lr"] = 0.3 / (1 + step)
        theirs.param_groups[0]["lr"] = 0.02 / (1 + step)

    adamw_beside(model, x, y, {"lr": 0.02, "weight_decay": 0.0}, change=change, lr=0.3, fallback_lr=0.02)


def test_fallback_knows_no_trust_region_and_no_momentum():
    """They belong to V alone."""
    model, x, y = scaled()
    adamw_beside(model, x, y, {"lr": 0.03, "weight_decay": 0.0}, lr=0.3, momentum=0.9, kl_clip=1e-8)


def test_a_model_without_any_block_is_trained_by_adamw_alone():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.shift = nn.Parameter(torch.ones(5)), nn.Parameter(torch.tensor(0.5))

        def forward(self, x):
            return x * torch.cos(self.scale) + torch.sin(self.shift) * x.flip(1)

    _, x, _ = scaled()
    adamw_beside(Scale().double(), x, torch.arange(12) % 5, {"lr": 0.03, "weight_decay": 0.0}, lr=0.3, kl_clip=1e-2)


# Steps whose numbers the device alone knows: whether the gradients are finite, the bounds, the averages.


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize(
    "options", [{"kl_clip": 1e-3}, {"kl_clip": None}, {"momentum": 0.0}, {"kl_annealing": True}], ids=str
)
def test_a_skipped_step_on_the_device_changes_nothing(options, bad, as_on_a_device):
    """Weight decay included, with gradients that are not finite; afterwards the step is not counted."""
    model, x, y = scaled()
    options = {"momentum": 0.9, **options}
    optimizer = KFAC(model, likelihood="categorical", lr=0.3, weight_decay=0.1, compile=False, **options)
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    for p in model.parameters():
        p.grad.fill_(bad)
    before = deepcopy((model.state_dict(), dict(optimizer.state)))
    optimizer.step()
    after = (model.state_dict(), dict(optimizer.state))
    torch.testing.assert_close(after[0], before[0], rtol=0, atol=0)
    for now, then in zip(after[1].values(), before[1].values(), strict=True):
        torch.testing.assert_close(now, then, rtol=0, atol=0)
    assert optimizer.state_dict()["param_groups"][0]["step"] == 2
    assert optimizer.state_dict()["param_groups"][0]["step"] == 2
    assert optimizer.diagnostics()["skipped"] == 1
