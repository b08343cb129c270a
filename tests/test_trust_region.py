"""kl_clip bounds the KL divergence of the step that is taken, momentum included: against dense quadratic forms in
float64, and against the divergence that a step really makes."""

from __future__ import annotations

import copy
import math

import dense
import pytest
import torch
import torch.nn.functional as F
from small import WHOLE, data, train_step
from torch import Tensor, nn

from kfac_triton import KFAC

# The factors of one batch for ever: an average of it alone, and inverses from the first step.
FIXED = {"rule": "kl", "fisher": "exact", "factor_decay": 0.0, "inverse_interval": 1, **WHOLE}


def network() -> nn.Sequential:
    return dense.random_model(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))


def damped_blocks(model: nn.Module, optimizer: KFAC, damping: float) -> list[tuple[tuple[Tensor, Tensor], Tensor]]:
    """((weight, bias), damped G (x) A) of every layer, by dense inverses."""
    found = []
    for name, factor in optimizer.factors().items():
        layer = model.get_submodule(name)
        A_inv, G_inv = dense.damped_inverses(factor["A"], factor["G"], damping)
        found.append(((layer.weight, layer.bias), torch.linalg.inv(torch.kron(G_inv, A_inv))))
    return found


def joint(tensors: tuple[Tensor, Tensor]) -> Tensor:
    weight, bias = (t.detach() for t in tensors)
    return torch.cat([weight, bias[:, None]], 1).flatten()


def frozen_factors(optimizer: KFAC) -> None:
    """Keeps the inverses of the steps so far."""
    for group in optimizer.param_groups:
        group["factor_interval"] = group["inverse_interval"] = 10**9


def gradients(model: nn.Module, optimizer: KFAC, seed: int, size: float = 1.0) -> None:
    """A gradient that is any batch's, so that directions differ from step to step."""
    x, y = dense.randn(12, 5, seed=seed), torch.arange(12) % 3
    optimizer.zero_grad()
    (size * F.cross_entropy(model(x), y)).backward()


@pytest.mark.parametrize("kl_clip", [1e-4, 1e2], ids=["held", "free"])
@pytest.mark.parametrize("momentum", [0.5, 0.95])
@pytest.mark.parametrize("alike", [True, False])
def test_the_recursion_is_the_quadratic_form(momentum, kl_clip, alike):
    """The numbers in the state against buf^T F buf, while F stays: of every layer, or their sum if groups are alike."""
    model = network()
    groups = [{"params": list(layer.parameters())} for layer in model if list(layer.parameters())]
    if not alike:
        groups.append({"params": [extra := nn.Parameter(torch.zeros(1))], "lr": 0.1})
        model.register_parameter("extra", extra)
    optimizer = KFAC(model, groups, lr=0.3, momentum=momentum, damping=1e-2, kl_clip=kl_clip, **FIXED)
    gradients(model, optimizer, 0)
    optimizer.step()
    blocks = damped_blocks(model, optimizer, 1e-2)
    frozen_factors(optimizer)
    for step in range(1, 12):
        gradients(model, optimizer, step)
        before = [joint(layer) for layer, _ in blocks]
        optimizer.step()
        total, taken, held = 0.0, 0.0, 0.0
        for (layer, block), at in zip(blocks, before, strict=True):
            buffer = joint(tuple(optimizer.state[p]["momentum_buffer"] for p in layer))
            form = buffer @ block @ buffer
            if not alike:
                dense.assert_exact(optimizer.state[layer[0]]["quadratic"], form, 1e-9)
            held += float(optimizer.state[layer[0]]["quadratic"])
            moved = joint(layer) - at
            taken = taken + float(moved @ block @ moved) / 2
            total = total + float(0.3**2 * form) / 2
        assert 0.3**2 * held / 2 == pytest.approx(total, rel=1e-9)
        assert taken == pytest.approx(min(total, kl_clip), rel=1e-9)
        assert (taken < total * 0.9) == (kl_clip == 1e-4)


def test_a_steady_direction_takes_bounded_steps():
    """With momentum 0.9 the step may not be ten times the bounded one: the divergence is 100 times the bound then."""
    torch.manual_seed(0)
    x, y = torch.randn(256, 6), torch.zeros(256, dtype=torch.long)
    model, bound = nn.Linear(6, 3), 1e-3
    optimizer = KFAC(model, lr=1.0, damping=1e-4, kl_clip=bound, rule="kl", fisher="exact", **WHOLE)
    made = []
    for _ in range(30):
        before = model(x).detach().log_softmax(1)
        train_step(optimizer, model, x, y)
        after = model(x).detach().log_softmax(1)
        made.append(float((before.exp() * (before - after)).sum(1).mean()))
    assert max(made) < 3 * bound
    assert max(made[3:12]) > 0.3 * bound  # and no step is much shorter than the bound allows


@pytest.mark.parametrize("approximation", ["eigen", "inverse_free", "tridiagonal"])
@pytest.mark.parametrize("fisher", ["exact", "mc", "empirical"])
def test_of_every_approximation(approximation, fisher):
    if approximation == "tridiagonal" and fisher == "empirical":
        pytest.skip("refused")
    torch.manual_seed(0)
    x, y = torch.randn(256, 6), torch.zeros(256, dtype=torch.long)
    model, bound = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)), 1e-3
    options = {"fisher": fisher, "approximation": approximation, **WHOLE}
    optimizer = KFAC(model, lr=1.0, damping=1e-3, kl_clip=bound, **options)
    made = []
    for _ in range(30):
        before = model(x).detach().log_softmax(1)
        train_step(optimizer, model, x, y)
        after = model(x).detach().log_softmax(1)
        made.append(float((before.exp() * (before - after)).sum(1).mean()))
    assert max(made) < 8 * bound  # two layers move the outputs the same way, which no block knows


def test_another_fisher_raises_what_is_known_of_the_buffer():
    """Inputs grow eightfold between two steps along one direction, which by the recursion alone would be 64 times too
    long in the new Fisher."""
    model = dense.random_model(nn.Linear(4, 3, bias=False))
    options = {**FIXED, "likelihood": "gaussian", "factor_decay": 0.0}
    optimizer = KFAC(model, lr=0.1, momentum=0.9, damping=1e-16, kl_clip=1e2, **options)
    x = dense.randn(20, 4)

    def step(scale: float) -> None:
        optimizer.zero_grad()
        z = model(scale * x)
        z.backward((scale * x @ torch.ones(4, 3, dtype=x.dtype)) / 20)  # F V for V all ones
        optimizer.step()

    step(1.0)
    step(8.0)
    buffer = optimizer.state[model[0].weight]["momentum_buffer"]
    torch.testing.assert_close(buffer, torch.full_like(buffer, 1.9), rtol=1e-4, atol=0)
    A = (8 * x).T @ (8 * x) / 20
    form = sum(row @ A @ row for row in buffer)
    torch.testing.assert_close(optimizer.state[model[0].weight]["quadratic"], form, rtol=1e-3, atol=0)


def weights_and_biases(model: nn.Module) -> list[dict]:
    weights, biases = ([p for p in model.parameters() if p.dim() == d] for d in (2, 1))
    return [{"params": weights}, {"params": biases}]


def by_layer(model: nn.Module) -> list[dict]:
    return [{"params": model[0].parameters(), "lr": 0.5}, {"params": model[2].parameters(), "lr": 0.05}]


def test_weights_and_biases_in_two_groups_are_bounded_as_in_one():
    ends = []
    for split in (False, True):
        model = network()
        params = weights_and_biases(model) if split else None
        optimizer = KFAC(model, params, lr=0.5, momentum=0.9, damping=1e-2, kl_clip=1e-4, **FIXED)
        for step in range(8):
            gradients(model, optimizer, step)
            optimizer.step()
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    dense.assert_exact(ends[1], ends[0], 1e-9)


@pytest.mark.parametrize("kl_annealing", [False, True])
def test_layers_with_an_lr_of_their_own_and_annealing(kl_annealing):
    """The step's divergence by the blocks is the bound; annealed, that times the square of lr over its largest."""
    model = network()
    options = {"momentum": 0.9, "damping": 1e-2, "kl_clip": 1e-5, "kl_annealing": kl_annealing}
    optimizer = KFAC(model, by_layer(model), lr=0.5, **options, **FIXED)
    gradients(model, optimizer, 0)
    optimizer.step()
    blocks = damped_blocks(model, optimizer, 1e-2)
    frozen_factors(optimizer)
    for step in range(1, 8):
        if step == 4:
            for group in optimizer.param_groups:
                group["lr"] /= 10
        gradients(model, optimizer, 0)
        before = [joint(layer) for layer, _ in blocks]
        optimizer.step()
        moved = [joint(layer) - at for (layer, _), at in zip(blocks, before, strict=True)]
        taken = sum(float(d @ block @ d) / 2 for d, (_, block) in zip(moved, blocks, strict=True))
        shorter = 0.01 if kl_annealing and step >= 4 else 1.0
        assert taken == pytest.approx(1e-5 * shorter, rel=1e-6)


def test_without_momentum_there_is_nothing_to_remember():
    model = network()
    optimizer = KFAC(model, lr=0.3, momentum=0.0, damping=1e-2, kl_clip=1e-4, **FIXED)
    gradients(model, optimizer, 0)
    optimizer.step()
    assert not any("quadratic" in state for state in optimizer.state.values())


def test_a_bound_that_is_set_later_holds_once_the_old_momentum_has_decayed():
    """The length of the buffer is known only along the gradients since; a checkpoint from before lacks it likewise."""
    model = network()
    optimizer = KFAC(model, lr=0.3, momentum=0.9, damping=1e-2, kl_clip=None, **FIXED)
    for _ in range(6):
        gradients(model, optimizer, 0)
        optimizer.step()
    blocks = damped_blocks(model, optimizer, 1e-2)
    frozen_factors(optimizer)
    optimizer.param_groups[0]["kl_clip"] = 1e-4
    taken = []
    for _ in range(40):
        gradients(model, optimizer, 0)
        before = [joint(layer) for layer, _ in blocks]
        optimizer.step()
        moved = [joint(layer) - at for (layer, _), at in zip(blocks, before, strict=True)]
        taken.append(sum(float(d @ block @ d) / 2 for d, (_, block) in zip(moved, blocks, strict=True)))
    assert taken[-1] == pytest.approx(1e-4, rel=0.1) and max(taken[1:]) < taken[0]


def test_a_step_that_the_scaler_skips_changes_no_number():
    model = network().float()
    optimizer = KFAC(model, lr=0.3, momentum=0.9, damping=1e-2, kl_clip=1e-4, **FIXED)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for step in range(4):
        x, y = dense.randn(12, 5, seed=step).float(), torch.arange(12) % 3
        optimizer.zero_grad()
        scaler.scale(F.cross_entropy(model(x), y)).backward()
        before = copy.deepcopy(list(optimizer.state.values()))
        if step == 2:
            model[0].weight.grad[0, 0] = math.inf
        scaler.step(optimizer)
        scaler.update()
        if step == 2:
            numbers = ("quadratic", "momentum_buffer")
            for own, then in zip(optimizer.state.values(), before, strict=True):
                assert all(torch.equal(own[name], then[name]) for name in numbers if name in own)
    assert optimizer.state[model[0].weight]["quadratic"] > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_resuming_is_equal_to_the_bit(dtype):
    x, y = data()
    model = network().to(dtype)
    x = x[:, :5].to(dtype)
    options = {"lr": 0.3, "momentum": 0.9, "damping": 1e-2, "kl_clip": 1e-4, **WHOLE}
    optimizer = KFAC(model, **options)
    for _ in range(4):
        train_step(optimizer, model, x, y)
    twin = copy.deepcopy(model)
    other = KFAC(twin, **options)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(4):
        assert train_step(other, twin, x, y) == train_step(optimizer, model, x, y)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)
