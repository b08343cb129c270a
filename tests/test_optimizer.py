"""KFAC as a torch.optim.Optimizer: the update's equation, groups, schedulers, closures, no-ops, memory, coverage."""

from __future__ import annotations

import copy
import gc
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_triton import KFAC
from kfac_triton.operations import layout


def network(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)


def data(n: int = 12, seed: int = 1, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 6, generator=generator, dtype=dtype), torch.randint(3, (n,), generator=generator)


def kfac(model: nn.Module, **options) -> KFAC:
    defaults = {"likelihood": "categorical", "factor_fraction": 1.0, "lr": 0.05, "damping": 0.1}
    defaults |= {"rule": "kl", "kl_clip": None, "compile": False}
    return KFAC(model, **{**defaults, **options})


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


def run(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, scheduler=None) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(model, *data(seed=step)).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def assert_same(actual, expected) -> None:
    """Bitwise, for nested dictionaries and lists."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


# ---------------------------------------------------------------------------------------------------------- the update


class ByHand:
    """The equations of the contract over the optimizer's own factors, in float64.

    V = G_inv (grad + weight_decay W) A_inv, nu = min(1, sqrt(2 kl_clip / (lr^2 sum <V, grad>))),
    q = momentum^2 q + 2 momentum nu <buf, grad> + nu^2 <V, grad>, tau = min(1, sqrt(2 kl_clip / (lr^2 sum q))),
    buf <- momentum buf + nu V, W <- W - tau lr buf.
    """

    def __init__(self, model: nn.Sequential) -> None:
        self.W = {name: self.joint(model[int(name)], grad=False) for name in "02"}
        self.buf = {name: torch.zeros_like(W) for name, W in self.W.items()}
        self.q = 0.0

    @staticmethod
    def joint(layer: nn.Linear, grad: bool) -> Tensor:
        weight, bias = (layer.weight.grad, layer.bias.grad) if grad else (layer.weight, layer.bias)
        return torch.cat([weight.detach(), bias.detach()[:, None]], dim=1).clone()

    def step(self, model: nn.Sequential, optimizer: KFAC) -> None:
        group = optimizer.param_groups[0]
        V, grads = {}, {}
        for name, factor in optimizer.factors().items():
            A, G = factor["A"], factor["G"]
            pi = math.sqrt((A.trace() / len(A)) / (G.trace() / len(G)))
            gamma = math.sqrt(group["damping"])
            grads[name] = self.joint(model[int(name)], grad=True) + group["weight_decay"] * self.W[name]
            left = torch.linalg.inv(G + gamma / pi * torch.eye(len(G), dtype=G.dtype))
            V[name] = left @ grads[name] @ torch.linalg.inv(A + pi * gamma * torch.eye(len(A), dtype=A.dtype))
        lr = float(group["lr"])
        squared = lr**2 * sum(float((V[name] * grads[name]).sum()) for name in V)
        nu = min(1.0, math.sqrt(2 * group["kl_clip"] / squared)) if lr > 0 else 1.0
        momentum, tau = group["momentum"], 1.0
        if group["kl_clip"] < math.inf and momentum > 0 and lr > 0:
            cross = sum(float((self.buf[name] * grads[name]).sum()) for name in V)
            least = cross**2 / (squared / lr**2)  # Cauchy-Schwarz: F may have changed since q was computed
            self.q = momentum**2 * max(self.q, least) + 2 * momentum * nu * cross + nu**2 * squared / lr**2
            tau = min(1.0, math.sqrt(2 * group["kl_clip"] / (lr**2 * self.q)))
        for name, v in V.items():
            self.buf[name] = momentum * self.buf[name] + nu * v
            self.W[name] = self.W[name] - tau * lr * self.buf[name]

    def check(self, model: nn.Sequential) -> None:
        for name, W in self.W.items():
            torch.testing.assert_close(self.joint(model[int(name)], grad=False), W, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.0},
        {"weight_decay": 0.1},
        {"kl_clip": 1e-3},
        {"kl_clip": 1e-3, "weight_decay": 0.1, "momentum": 0.5, "fisher": "exact"},
        {"lr": torch.tensor(0.05)},
    ],
    ids=str,
)
def test_the_update_is_the_contracts_equation(options):
    model = network()
    optimizer = kfac(model, inverse_interval=1, **options)
    reference = ByHand(model)
    for step in range(4):
        optimizer.zero_grad()
        loss_of(model, *data(seed=step)).backward()
        optimizer.step()
        reference.step(model, optimizer)
        reference.check(model)


@pytest.mark.parametrize("inverse_interval", [1, 4])
def test_inverses_are_refreshed_when_they_are_due(inverse_interval):
    """Every interval, and at steps 1, 2, 4, ... of the first one."""
    model = network()
    optimizer = kfac(model, inverse_interval=inverse_interval)
    changed, last = [], None
    for step in range(10):
        run(model, optimizer, 1)
        now = optimizer.state[model[0].weight]["A_inv"].clone()
        if last is None or not torch.equal(now, last):
            changed.append(step)
        last = now
    assert changed == (list(range(10)) if inverse_interval == 1 else [0, 1, 2, 4, 8])


def test_factors_are_refreshed_when_they_are_due():
    model = network()
    optimizer = kfac(model, factor_interval=3, lr=0.0)
    changed, last = [], None
    for step in range(8):
        optimizer.zero_grad()
        loss_of(model, *data(seed=step)).backward()
        optimizer.step()
        now = optimizer.factors()["0"]["A"].clone()
        if last is None or not torch.equal(now, last):
            changed.append(step)
        last = now
    assert changed == [0, 3, 6]


def test_gradients_are_never_written_into():
    model = network()
    optimizer = kfac(model, weight_decay=0.1, kl_clip=1e-3)
    loss_of(model, *data()).backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    optimizer.step()
    assert_same({name: p.grad for name, p in model.named_parameters()}, grads)


def test_training_goes_the_right_way():
    model = network()
    optimizer = kfac(model, lr=0.3)
    x, y = data(32)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = loss_of(model, x, y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.25 * losses[0]


def test_it_can_be_printed():
    text = repr(kfac(network()))
    assert "KFAC" in text and "damping: 0.1" in text


# ------------------------------------------------------------------------------------------------------------ closures


@pytest.mark.parametrize("fisher", ["mc", "exact", "empirical"])
def test_step_with_a_closure_equals_the_plain_loop(fisher):
    plain, closed = network(), network()
    optimizers = [kfac(m, fisher=fisher) for m in (plain, closed)]
    calls = []
    for step in range(3):
        x, y = data(seed=step)
        optimizers[0].zero_grad()
        expected = loss_of(plain, x, y)
        expected.backward()
        assert optimizers[0].step() is None

        def closure(x=x, y=y):
            assert torch.is_grad_enabled()
            calls.append(1)
            optimizers[1].zero_grad()
            loss = loss_of(closed, x, y)
            loss.backward()
            return loss

        with torch.no_grad():
            returned = optimizers[1].step(closure)
        assert_same(returned.detach(), expected.detach())
    assert len(calls) == 3
    assert_same(closed.state_dict(), plain.state_dict())
    assert_same(optimizers[1].factors(), optimizers[0].factors())


def test_a_closure_without_gradients_is_a_no_op():
    model = network()
    optimizer = kfac(model)
    before = copy.deepcopy(model.state_dict())
    assert optimizer.step(lambda: torch.tensor(7.0)) == 7.0
    assert_same(model.state_dict(), before)
    assert optimizer.param_groups[0]["step"] == 0


# ----------------------------------------------------------------------------------------------- schedulers and groups


@pytest.mark.parametrize("tensor", [False, True])
def test_lambda_lr(tensor):
    """lr follows the schedule, a tensor stays one, and the update reads it."""
    model = network()
    optimizer = kfac(
        model, lr=torch.tensor(0.1, dtype=torch.float64) if tensor else 0.1, momentum=0.0, inverse_interval=1
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (step + 1) / 4)
    reference = ByHand(model)
    for step in range(4):
        assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.1 * (step + 1) / 4)
        assert isinstance(optimizer.param_groups[0]["lr"], Tensor) == tensor
        optimizer.zero_grad()
        loss_of(model, *data(seed=step)).backward()
        optimizer.step()
        reference.step(model, optimizer)
        reference.check(model)
        scheduler.step()


def test_one_cycle_lr_cycles_the_momentum():
    model = network()
    optimizer = kfac(model, inverse_interval=1)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=6, cycle_momentum=True)
    reference = ByHand(model)
    momenta = []
    for step in range(5):
        momenta.append(optimizer.param_groups[0]["momentum"])
        optimizer.zero_grad()
        loss_of(model, *data(seed=step)).backward()
        optimizer.step()
        reference.step(model, optimizer)
        reference.check(model)
        scheduler.step()
    assert max(momenta) - min(momenta) > 0.05


def test_hyper_parameters_change_while_training():
    """What a user writes into a group counts from the next step."""
    model = network()
    optimizer = kfac(model, inverse_interval=1)
    reference = ByHand(model)
    changes = [{}, {"damping": 1.0}, {"weight_decay": 0.2}, {"kl_clip": 1e-4}, {"momentum": 0.3, "lr": 0.01}]
    for step, change in enumerate(changes):
        optimizer.param_groups[0].update(change)
        optimizer.zero_grad()
        loss_of(model, *data(seed=step)).backward()
        optimizer.step()
        reference.step(model, optimizer)
        reference.check(model)


def test_the_fallback_follows_the_schedule_of_lr():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.PReLU(5), nn.Linear(5, 3)).double()
    optimizer = kfac(model, lr=0.1, fallback_lr=0.02, inverse_interval=1)
    before = model[1].weight.detach().clone()
    run(model, optimizer, 1)
    first = (model[1].weight.detach() - before).abs().max()
    # AdamW's first step has the length of its learning rate.
    assert float(first) == pytest.approx(0.02, rel=1e-4)
    optimizer.param_groups[0]["lr"] = 0.0
    before = model[1].weight.detach().clone()
    run(model, optimizer, 1)
    assert_same(model[1].weight.detach(), before)


def test_weights_and_biases_in_groups_of_their_own():
    """V is joint; lr and weight decay are each parameter's own (a bias group without decay is common)."""
    decay, still = 0.1, 0.0
    joint, split = network(), network()
    weights, biases = ([p for p in split.parameters() if p.dim() == d] for d in (2, 1))
    optimizers = [
        kfac(joint, weight_decay=0.0, momentum=0.0, inverse_interval=1),
        kfac(split, params=[{"params": weights, "lr": 0.05}, {"params": biases, "lr": still}], momentum=0.0),
    ]
    bias = split[0].bias.detach().clone()
    run(joint, optimizers[0], 1)
    run(split, optimizers[1], 1)
    assert_same(split[0].bias.detach(), bias)
    torch.testing.assert_close(split[0].weight, joint[0].weight, rtol=1e-12, atol=0)
    assert "bias" not in optimizers[1].factors() and optimizers[1].factors()["0"]["A"].shape == (7, 7)
    # Decay of one group enters the joint gradient's columns of that group alone.
    model = network()
    optimizer = kfac(
        model,
        params=[
            {"params": model[0].weight, "weight_decay": decay},
            {"params": [model[0].bias, *model[2].parameters()]},
        ],
        inverse_interval=1,
    )
    reference = ByHand(model)
    x, y = data()
    loss_of(model, x, y).backward()
    optimizer.step()
    # The same by hand: no decay at all, but decay * W added to the weight's gradient.
    by_hand = network()
    loss_of(by_hand, x, y).backward()
    by_hand[0].weight.grad += decay * by_hand[0].weight.detach()
    reference.step(by_hand, optimizer)
    group = optimizer.param_groups[0]
    assert group["weight_decay"] == decay
    group["weight_decay"] = 0.0
    reference = ByHand(by_hand)
    reference.step(by_hand, optimizer)
    reference.check(model)


def test_groups_with_intervals_of_their_own():
    model = network()
    optimizer = kfac(
        model,
        params=[{"params": model[0].parameters(), "factor_interval": 2}, {"params": model[2].parameters()}],
        lr=0.0,
    )
    run(model, optimizer, 5)
    updates = [int(optimizer.state[model[i].weight]["factor_updates"]) for i in (0, 2)]
    assert updates == [3, 5]


def test_a_frozen_group_that_is_due_alone():
    """Stale gradients on frozen parameters: nothing to update there, and nothing to raise about."""
    model = network()
    optimizer = kfac(
        model,
        params=[{"params": model[0].parameters()}, {"params": model[2].parameters(), "factor_interval": 2}],
        lr=0.0,
    )
    run(model, optimizer, 1)
    model[0].requires_grad_(False)
    model[2].zero_grad()
    loss_of(model, *data()).backward()
    assert model[0].weight.grad is not None
    optimizer.step()


def test_added_groups_train_and_have_factors():
    model = network()
    optimizer = kfac(model, params=model[2].parameters())
    run(model, optimizer, 2)
    before = model[0].weight.detach().clone()
    optimizer.add_param_group({"params": model[0].parameters(), "lr": 0.01, "kl_clip": None, "fallback_lr": 1e-3})
    run(model, optimizer, 2)
    assert set(optimizer.factors()) == {"0", "2"}
    assert not torch.equal(model[0].weight, before)
    assert optimizer.param_groups[1]["fallback_ratio"] == pytest.approx(0.1)
    assert optimizer.coverage() == dict.fromkeys(["2.weight", "2.bias", "0.weight", "0.bias"], "linear")


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_added_groups_have_the_same_factors_as_if_there_from_the_start(fisher):
    model, reference = network(), network()
    optimizer = kfac(model, params=model[2].parameters(), fisher=fisher, lr=0.0)
    optimizer.add_param_group({"params": model[0].parameters()})
    run(model, optimizer, 2)
    whole = kfac(reference, fisher=fisher, lr=0.0)
    run(reference, whole, 2)
    torch.testing.assert_close(optimizer.factors(), whole.factors(), rtol=1e-10, atol=0)


def test_a_bad_group_is_not_added():
    model = network()
    optimizer = kfac(model, params=model[2].parameters())
    with pytest.raises(ValueError, match="damping must be a number >= 0"):
        optimizer.add_param_group({"params": model[0].parameters(), "damping": -1.0})
    with pytest.raises(ValueError, match="no parameter of model"):
        optimizer.add_param_group({"params": nn.Linear(2, 2).parameters()})
    assert len(optimizer.param_groups) == 1
    run(model, optimizer, 1)


def test_named_parameters():
    model, plain = network(), network()
    optimizer = kfac(model, params=model.named_parameters())
    assert optimizer.param_groups[0]["param_names"] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    run(model, optimizer, 2)
    run(plain, kfac(plain), 2)
    assert_same(model.state_dict(), plain.state_dict())


# -------------------------------------------------------------------------------------------------------------- no-ops


def trace(model: nn.Module, optimizer: KFAC) -> dict:
    return copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()})


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("grads", ["none", "zero"])
def test_a_fresh_optimizer_survives_a_step_without_a_pass(grads, compile):
    """torch.distributed.checkpoint does this to make the state appear; it is no step.

    Without gradients nothing changes at all. With zeros the state has entries, which hold no data and do not count.
    """
    model = network()
    optimizer = kfac(model, weight_decay=0.1, compile=compile)
    before = trace(model, optimizer)
    if grads == "zero":
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
    optimizer.step()
    after = trace(model, optimizer)
    assert after["model"].keys() == before["model"].keys() and optimizer.factors() == {}
    assert_same(after["model"], before["model"])
    assert_same(after["optimizer"]["param_groups"], before["optimizer"]["param_groups"])
    appeared = after["optimizer"]["state"].values()
    assert (grads == "zero") == bool(appeared)
    assert not any(t.any() for entry in appeared for t in entry.values() if isinstance(t, torch.Tensor))
    twin = network()
    run(model, optimizer, 3)
    run(twin, kfac(twin, weight_decay=0.1, compile=compile), 3)
    assert_same(model.state_dict(), twin.state_dict())


@pytest.mark.parametrize("interval", [1, 5])
@pytest.mark.parametrize("grads", ["none", "zero"])
def test_a_step_without_a_pass_is_a_no_op_in_mid_training(grads, interval):
    model = network()
    optimizer = kfac(model, weight_decay=0.1, factor_interval=interval)
    run(model, optimizer, 2)
    before = trace(model, optimizer)
    optimizer.zero_grad()
    if grads == "zero":
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
    optimizer.step()
    assert_same(trace(model, optimizer), before)


def test_zero_gradients_move_nothing_without_decay_and_momentum():
    model = network()
    optimizer = kfac(model, momentum=0.0)
    before = copy.deepcopy(model.state_dict())
    (0 * loss_of(model, *data())).backward()
    optimizer.step()
    assert_same(model.state_dict(), before)


def test_huge_finite_gradients_are_a_step():
    """float32 holds 1e25, and no norm of such gradients: only what is not finite itself may skip a step."""
    model = network(dtype=torch.float32)
    optimizer = kfac(model)
    (1e25 * loss_of(model, *data(dtype=torch.float32))).backward()
    optimizer.step()
    assert optimizer.param_groups[0]["step"] == 1


def test_sparse_gradients_are_refused():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(10, 4, sparse=True), nn.Flatten(), nn.Linear(8, 3))
    optimizer = kfac(model)
    F.cross_entropy(model(torch.randint(10, (5, 2))), torch.randint(3, (5,))).backward()
    with pytest.raises(ValueError, match="sparse=False"):
        optimizer.step()


def test_step_hooks_run_in_order():
    model = network()
    optimizer = kfac(model)
    order: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: order.append("before"))
    optimizer.register_step_post_hook(lambda *_: order.append("after"))
    run(model, optimizer, 1)
    assert order == ["before", "after"]


# ------------------------------------------------------------------------------------------------- coverage and memory


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(6, 2, batch_first=True), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, None].expand(-1, 2, -1)
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3, bias=False)),
    "convolutions": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 3)), nn.Conv1d(2, 4, 2, groups=2), nn.BatchNorm1d(4), nn.Unflatten(2, (1, 2)),
        nn.Conv2d(4, 3, (1, 2), bias=False), nn.Flatten(), nn.LayerNorm(3), nn.Linear(3, 3),
    ),
    "attention": Attention,
    "bfloat16": lambda: nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3)).bfloat16(),
    "float64": lambda: nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3)).double(),
}  # fmt: skip


def measured(optimizer: KFAC) -> dict[str, int]:
    """Bytes of the tensors in the state, less the 0-d counters, of two gradients of what has a block, and of the room
    for products; what a pass holds is left out."""
    kinds = {
        "A": "factors", "G": "factors", "A_inv": "inverses", "G_inv": "inverses",
        "momentum_buffer": "momentum", "exp_avg": "fallback", "exp_avg_sq": "fallback",
        "A_rows": "rows", "G_rows": "rows", "A_weights": "rows", "G_weights": "rows",
    }  # fmt: skip
    usage = dict.fromkeys(["factors", "inverses", "rows", "momentum", "fallback"], 0)
    if optimizer.settings["fisher"] == "empirical":  # A, G and G as compiled code sums it; rows and passes of each
        factors = [state for state in optimizer.state.values() if "A" in state]
        usage["sums"] = sum(pair["A"].nbytes + 2 * pair["G"].nbytes + 2 * 8 for pair in factors)
    for state in optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.dim():
                usage[kinds[name]] += value.numel() * value.element_size()
    covered = {name for name, block in optimizer.coverage().items() if block != "fallback"}
    named = {name: p for name, p in optimizer._module.named_parameters() if name in covered}
    usage["gradients"] = 2 * sum(p.numel() * max(p.element_size(), 4) for p in named.values())
    usage["proposal"] = 0
    rooms = [t.untyped_storage() for t in optimizer._runner.memory.scratch]
    usage["scratch"] = sum({room.data_ptr(): room.nbytes() for room in rooms}.values())
    return {**usage, "total": sum(usage.values())}


def without_pass(usage: dict[str, int]) -> dict[str, int]:
    return {name: size for name, size in usage.items() if name != "pass"}


@pytest.mark.parametrize("fisher", ["mc", "empirical"])
@pytest.mark.parametrize(
    "options", [{}, {"momentum": 0.0}, {"max_factor_dim": 5}, {"weight_sharing": "reduce"}], ids=str
)
@pytest.mark.parametrize("name", MODELS)
def test_memory_usage_and_coverage_before_the_first_step(name, options, fisher):
    """The estimate is what the step then takes, byte by byte."""
    torch.manual_seed(0)
    model = MODELS[name]()
    optimizer = kfac(model, fisher=fisher, **options)
    usage, coverage = optimizer.memory_usage(), optimizer.coverage()
    x, y = data(dtype=next(model.parameters()).dtype)
    loss_of(model, x, y).backward()
    optimizer.step()
    assert without_pass(optimizer.memory_usage()) == measured(optimizer) == without_pass(usage)
    assert usage["pass"] == 0 < optimizer.memory_usage()["pass"]
    assert optimizer.coverage() == coverage
    assert list(coverage) == [name for name, _ in model.named_parameters()]


def test_memory_usage_of_a_part_of_the_model():
    """Only what the optimizer trains: a frozen or foreign backbone costs nothing."""
    model = network()
    optimizer = kfac(model, params=[model[2].weight])
    usage = optimizer.memory_usage()
    run(model, optimizer, 1)
    assert without_pass(usage) == without_pass(optimizer.memory_usage()) == measured(optimizer)
    assert optimizer.coverage() == {"2.weight": "linear"}


def test_a_wide_vocabulary_does_not_ask_for_a_wide_factor():
    """Linear(768, 50257): a dense G would take 10 GB, and its inverse as much again."""
    with torch.device("meta"):
        model = nn.Linear(768, 50257)
    optimizer = kfac(model)
    usage = optimizer.memory_usage()
    assert usage["factors"] + usage["inverses"] < 100e6
    assert usage["factors"] == 4 * (784**2 + 50257)  # rows start at multiples of 16 elements
    assert usage["momentum"] == 4 * 784 * 50257
    assert optimizer.coverage() == {"weight": "linear (diagonal G)", "bias": "linear (diagonal G)"}


def test_a_side_far_wider_than_max_factor_dim_holds_its_diagonal(monkeypatch):
    monkeypatch.setattr(layout, "MOST_BLOCKS", 1)
    model, dense = network(), network()
    optimizer, reference = kfac(model, fisher="exact", max_factor_dim=6), kfac(dense, fisher="exact")
    run(model, optimizer, 1)
    run(dense, reference, 1)
    actual, expected = optimizer.factors()["0"], reference.factors()["0"]
    torch.testing.assert_close(actual["A"], expected["A"].diagonal(), rtol=1e-12, atol=0)
    torch.testing.assert_close(actual["G"], expected["G"], rtol=1e-12, atol=0)
    assert optimizer.coverage()["0.weight"] == "linear (diagonal A)"
    assert optimizer.coverage()["2.weight"] == "linear"


def test_a_layer_made_later_joins_by_a_group_of_its_own():
    """In front of the others, too, so that the indices of biases in the state move."""
    model = network()
    optimizer = kfac(model)
    run(model, optimizer, 2)
    model.insert(0, nn.Linear(6, 6).double())
    optimizer.add_param_group({"params": model[0].parameters()})
    run(model, optimizer, 2)
    assert set(optimizer.coverage().values()) == {"linear"} and set(optimizer.factors()) == {"0", "1", "3"}
    resumed = kfac(model, params=[{"params": group["params"]} for group in optimizer.param_groups])
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.coverage() == optimizer.coverage()


def test_an_optimizer_that_nobody_holds_leaves_no_hook():
    model = network()
    optimizer = kfac(model, fisher="empirical")
    run(model, optimizer, 1)
    del optimizer
    gc.collect()
    hooks = [hook for m in model.modules() for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    assert hooks == [] and not any(p._post_accumulate_grad_hooks for p in model.parameters())
