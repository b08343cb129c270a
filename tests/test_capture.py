"""What K-FAC sees of the user's model, and what it must leave alone while looking."""

from __future__ import annotations

import copy
import logging
import math
import weakref
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_triton import KFAC, Categorical

FISHERS = ["mc", "exact", "empirical"]


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def data(n: int = 12, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 6, generator=generator), torch.randint(3, (n,), generator=generator)


def kfac(model: nn.Module, **options) -> KFAC:
    defaults = {"likelihood": "categorical", "factor_fraction": 1.0, "lr": 0.05, "damping": 0.1, "compile": False}
    return KFAC(model, **{**defaults, **options})


def backward(model: nn.Module, x: Tensor, y: Tensor) -> None:
    F.cross_entropy(model(x), y).backward()


def factors_of(model: nn.Module, x: Tensor, y: Tensor, **options) -> dict[str, dict[str, Tensor]]:
    optimizer = kfac(model, **options)
    backward(model, x, y)
    optimizer.step()
    return optimizer.factors()


def assert_same(actual, expected) -> None:
    """Bitwise, for nested dictionaries and lists."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------ what stays as it was


class Stateful(nn.Module):
    """Everything that a forward pass may write to: running statistics, power iterations, random streams."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 5)
        self.norm = nn.BatchNorm1d(5)
        self.dropout = nn.Dropout(0.5)
        self.spectral = nn.utils.spectral_norm(nn.Linear(5, 5))
        self.second = nn.Linear(5, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.second(self.dropout(torch.relu(self.norm(self.spectral(self.first(x))))))


@pytest.mark.parametrize("fisher", FISHERS)
def test_the_factor_pass_leaves_buffers_gradients_and_random_streams_alone(fisher):
    model = Stateful()
    optimizer = kfac(model, fisher=fisher, lr=0.0, fallback_lr=None)
    backward(model, *data())
    buffers = copy.deepcopy(dict(model.named_buffers()))
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    identities = {name: p.grad for name, p in model.named_parameters()}
    torch_state, seed = torch.get_rng_state(), torch.initial_seed()
    optimizer.step()
    assert "first" in optimizer.factors()
    assert float(model.calls) == 1 and int(model.norm.num_batches_tracked) == 1
    assert_same(dict(model.named_buffers()), buffers)
    assert_same({name: p.grad for name, p in model.named_parameters() if p.grad is not None}, grads)
    assert all(p.grad is identities[name] for name, p in model.named_parameters())
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert torch.initial_seed() == seed
    assert model.training and torch.is_grad_enabled()
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("fisher", FISHERS)
def test_the_users_dropout_draws_what_it_would_without_kfac(fisher):
    """The same masks with factor updates every step, and with none after the first."""
    losses = []
    for interval in (1, 10):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.5), nn.Linear(5, 3))
        optimizer = kfac(model, fisher=fisher, lr=0.0, factor_interval=interval)
        torch.manual_seed(3)
        run = []
        for step in range(3):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(data(seed=step)[0]), data(seed=step)[1])
            loss.backward()
            optimizer.step()
            run.append(loss.item())
        losses.append(run)
    assert losses[0] == losses[1]


def test_the_fisher_pass_drops_out_by_its_own_counter_based_stream():
    """Its masks depend on the seed and the update, never on the user's random state."""
    runs = []
    for user_seed, seed in ((1, 0), (2, 0), (1, 5)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.5), nn.Linear(5, 3))
        optimizer = kfac(model, lr=0.0, seed=seed)
        for step in range(2):
            optimizer.zero_grad()
            backward(model, *data(seed=step))
            torch.manual_seed(user_seed)
            optimizer.step()
        runs.append(optimizer.factors())
    assert_same(runs[0], runs[1])
    assert not torch.equal(runs[0]["2"]["A"], runs[2]["2"]["A"])


def test_every_update_samples_anew():
    """The same batch and the same weights again: A stays, G is the mean over other targets."""
    model = network()
    optimizer = kfac(model, lr=0.0)
    runs = []
    for _ in range(2):
        optimizer.zero_grad()
        backward(model, *data())
        optimizer.step()
        runs.append(copy.deepcopy(optimizer.factors()["2"]))
    torch.testing.assert_close(runs[1]["A"], runs[0]["A"], rtol=1e-6, atol=1e-7)
    assert (runs[1]["G"] - runs[0]["G"]).abs().max() > 1e-3


@pytest.mark.parametrize("fisher", FISHERS)
def test_the_users_graph_survives_the_step(fisher):
    """One linear layer, whose backward pass needs its input alone: as with torch.optim, it may run again."""
    torch.manual_seed(0)
    model = nn.Linear(6, 3)
    optimizer = kfac(model, fisher=fisher)
    x, y = data()
    loss = F.cross_entropy(model(x), y)
    loss.backward(retain_graph=True)
    first = model.weight.grad.clone()
    optimizer.step()
    optimizer.zero_grad()
    loss.backward()
    assert_same(model.weight.grad, first)


def test_autograd_notices_that_the_step_wrote_the_weights():
    """As torch.optim: a graph that needs an old weight must refuse, never use the new one in silence."""
    model = network()
    optimizer = kfac(model)
    x, y = data()
    loss = F.cross_entropy(model(x), y)
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("fisher", FISHERS)
def test_user_hooks_and_graph_see_nothing_of_the_factor_update_without_a_step(fisher):
    """lr = 0 and no decay: a step with its factor update changes no parameter, bitwise."""
    model = network()
    before = copy.deepcopy(model.state_dict())
    optimizer = kfac(model, fisher=fisher, lr=0.0)
    for step in range(3):
        optimizer.zero_grad()
        backward(model, *data(seed=step))
        optimizer.step()
    assert_same(model.state_dict(), before)


# ----------------------------------------------------------------------------------------------------------- the hooks


def hooks_of(model: nn.Module) -> int:
    names = (
        "_forward_pre_hooks",
        "_forward_hooks",
        "_backward_hooks",
        "_backward_pre_hooks",
        "_forward_hooks_with_kwargs",
    )
    modules = sum(len(getattr(m, name)) for m in model.modules() for name in names)
    return modules + sum(len(p._post_accumulate_grad_hooks or ()) for p in model.parameters())


@pytest.mark.parametrize("fisher", FISHERS)
def test_close_removes_every_hook(fisher):
    model = network()
    optimizer = kfac(model, fisher=fisher)
    backward(model, *data())
    optimizer.step()
    assert hooks_of(model) > 0
    optimizer.close()
    assert hooks_of(model) == 0
    optimizer.close()
    backward(model, *data())
    with pytest.raises(RuntimeError, match=r"attach\(model\)"):
        optimizer.step()
    with pytest.raises(RuntimeError, match=r"attach\(model\)"):
        optimizer.factors()


def test_the_context_manager_closes_also_after_an_error():
    model = network()
    with pytest.raises(ZeroDivisionError), kfac(model) as optimizer:
        assert isinstance(optimizer, KFAC) and hooks_of(model) > 0
        1 / 0
    assert hooks_of(model) == 0


def test_hooks_of_added_groups_are_removed_too():
    model = network()
    optimizer = kfac(model, params=list(model[0].parameters()))
    optimizer.add_param_group({"params": list(model[2].parameters())})
    optimizer.close()
    assert hooks_of(model) == 0


@pytest.mark.parametrize("fisher", ["mc", "empirical"])
def test_a_copy_of_the_model_keeps_none_of_its_inputs(fisher):
    """An averaged or frozen copy of a trained model is common: its passes must not pile up anywhere."""
    model = network()
    kfac(model, fisher=fisher)
    twin = copy.deepcopy(model)
    x = torch.randn(4, 6)
    alive = weakref.ref(x)
    twin(x)
    del x
    assert alive() is None


def test_inputs_are_released_by_the_step():
    """After the step no reference to the batch stays behind."""
    model = network()
    optimizer = kfac(model)
    x, y = data()
    backward(model, x, y)
    alive = weakref.ref(x)
    optimizer.step()
    del x
    assert alive() is None


def test_inputs_of_passes_without_backward_do_not_pile_up():
    """A frozen critic called in training mode for years of steps: what never trains must not fill the memory."""
    model = network()
    optimizer = kfac(model)
    alive = []
    for step in range(3):
        idle = torch.randn(4, 6)
        model(idle)
        alive.append(weakref.ref(idle))
        del idle
        optimizer.zero_grad()
        x, y = data(seed=step)
        backward(model, x, y)
        optimizer.step()
    assert sum(ref() is not None for ref in alive) == 0


# ----------------------------------------------------------------------------------------------- inputs of every shape


class Named(nn.Module):
    """`network` with its inputs in a way of its own, given by `unpack`."""

    def __init__(self, unpack, pack=lambda z: z) -> None:
        super().__init__()
        self.net = network()
        self.unpack, self.pack = unpack, pack

    def forward(self, *args, **kwargs):
        return self.pack(self.net(self.unpack(*args, **kwargs)))


@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("fraction", [1.0, 0.125])
@pytest.mark.parametrize(
    ("unpack", "call"),
    [
        (lambda x: x, lambda model, x: model(x)),
        (lambda *, x: x, lambda model, x: model(x=x)),
        (lambda batch: batch["x"], lambda model, x: model({"x": x, "id": list(range(len(x)))})),
        (lambda pair: pair[0] + pair[1], lambda model, x: model((x / 4, x * 0.75))),
        (lambda a, b, *, scale: (a + b) * scale, lambda model, x: model(x / 4, x * 0.75, scale=torch.ones(()))),
    ],
    ids=["positional", "keyword", "dict", "tuple", "several"],
)
def test_inputs_by_any_convention(fisher, fraction, unpack, call):
    """128 rows: with fraction 1/8 the statistics take 64 of them."""
    x, y = data(128)
    expected = factors_of(network(), x, y, fisher=fisher, factor_fraction=fraction)
    model = Named(unpack)
    optimizer = kfac(model, fisher=fisher, factor_fraction=fraction)
    F.cross_entropy(call(model, x), y).backward()
    optimizer.step()
    actual = {name.removeprefix("net."): factor for name, factor in optimizer.factors().items()}
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("fisher", FISHERS)
def test_inputs_in_an_object_of_no_known_kind(fisher, sharing):
    """A dataclass hides its tensors, so its batch cannot be cut; its examples are examples all the same."""
    x, y = data()
    expected = factors_of(network(), x, y, fisher=fisher, weight_sharing=sharing)
    model = Named(lambda batch: batch.x)
    optimizer = kfac(model, fisher=fisher, weight_sharing=sharing)
    F.cross_entropy(model(SimpleNamespace(x=x)), y).backward()
    optimizer.step()
    actual = {name.removeprefix("net."): factor for name, factor in optimizer.factors().items()}
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize(
    ("pack", "output", "tensor"),
    [
        (lambda z: SimpleNamespace(logits=z, loss=None), None, lambda r: r.logits),
        (lambda z: (z, "extra"), lambda r: r[0], lambda r: r[0]),
        (lambda z: {"scores": z}, lambda r: r["scores"], lambda r: r["scores"]),
        (lambda z: SimpleNamespace(logits=None, scores=z), lambda r: r.scores, lambda r: r.scores),
    ],
    ids=["logits", "tuple", "dict", "output over logits"],
)
def test_outputs_by_any_convention(fisher, pack, output, tensor):
    x, y = data()
    expected = factors_of(network(), x, y, fisher=fisher)
    model = Named(lambda x: x, pack)
    optimizer = kfac(model, fisher=fisher, output=output)
    F.cross_entropy(tensor(model(x)), y).backward()
    optimizer.step()
    assert_same({name.removeprefix("net."): f for name, f in optimizer.factors().items()}, expected)


@pytest.mark.parametrize(
    ("pack", "tensor", "came"),
    [
        (lambda z: (z, z), lambda r: r[0], "tuple"),
        (lambda z: {"z": z}, lambda r: r["z"], "dict"),
        (lambda z: SimpleNamespace(logits=None, z=z), lambda r: r.z, "NoneType|SimpleNamespace"),
    ],
)
@pytest.mark.parametrize("fisher", FISHERS)
def test_an_output_that_is_no_tensor_is_refused(fisher, pack, tensor, came):
    model = Named(lambda x: x, pack)
    optimizer = kfac(model, fisher=fisher)
    x, y = data()
    with pytest.raises(TypeError, match=rf"(?s)({came}).*output="):
        F.cross_entropy(tensor(model(x)), y).backward()
        optimizer.step()


def test_an_output_of_integers_is_refused():
    model = network()
    optimizer = kfac(model, output=lambda z: z.argmax(-1))
    backward(model, *data())
    with pytest.raises(TypeError, match=r"torch.int64.*output="):
        optimizer.step()


def test_inputs_modified_before_the_step_are_refused():
    model = network()
    optimizer = kfac(model)
    x, y = data()
    backward(model, x, y)
    x.mul_(2)
    with pytest.raises(RuntimeError, match=r"in place.*copy"):
        optimizer.step()
    # The next batch is a fresh start.
    optimizer.zero_grad()
    backward(model, x, y)
    optimizer.step()
    assert optimizer.param_groups[0]["step"] == 1


# ------------------------------------------------------------------------------------------------- a part of the batch


class Counting(nn.Module):
    """Records the rows of every pass, where K-FAC's own pass does not put back what it finds."""

    seen: ClassVar[list[Tensor]] = []

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, x: Tensor, table: Tensor | None = None) -> Tensor:
        self.seen.append(x.detach().clone())
        return self.net(x) + (0 if table is None else table.sum())


@pytest.mark.parametrize(
    ("n", "fraction", "rows"), [(12, 0.125, 12), (100, 0.125, 64), (1024, 0.125, 128), (100, 1.0, 100)]
)
def test_the_share_of_the_batch(n, fraction, rows):
    """factor_fraction of it, never below min(N, 64), as one stretch that moves from update to update; in the k-th
    update at least 1/k."""
    model = Counting()
    optimizer = kfac(model, factor_fraction=fraction)
    stretches = []
    for k in range(1, 11):
        model.seen.clear()
        optimizer.zero_grad()
        x, y = data(n)
        backward(model, x, y)
        optimizer.step()
        own = model.seen[1]
        expected = max(rows, math.ceil(n / k))
        assert len(model.seen) == 2 and own.shape == (expected, 6)
        start = int((x == own[0]).all(dim=1).nonzero()[0])
        assert_same(own, x[start : start + expected])
        stretches += [start] if expected == rows else []
    assert (len(set(stretches)) > 1) == (rows < n)


@pytest.mark.parametrize("places, examples", [(1, 64), (16, 32), (64, 8), (512, 8)])
def test_of_sequences_512_terms_are_enough_but_8_sequences(places, examples):
    model = Counting()
    optimizer = kfac(model, factor_fraction=1e-3)
    x = torch.randn(96, places, 6)
    y = torch.randint(3, (96, places))
    for k in range(1, 15):
        model.seen.clear()
        optimizer.zero_grad()
        F.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
        optimizer.step()
        known = examples if k > 1 else 64
        assert len(model.seen[1]) == max(known, math.ceil(96 / k))
    assert len(model.seen[1]) == examples


def test_a_checkpoint_that_has_not_counted_terms_loads():
    model, other = Counting(), Counting()
    options = {"factor_fraction": 1e-3, "rule": "kl"}
    optimizer, loaded = kfac(model, **options), kfac(other, **options)
    x, y = torch.randn(96, 64, 6), torch.randint(3, (96, 64))
    for _ in range(13):
        F.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
        optimizer.step()
    saved = optimizer.state_dict()
    assert saved["param_groups"][0].pop("terms_per_example") == 64
    for name in ("kl_annealing", "peak_lr"):
        assert not saved["param_groups"][0].pop(name)
    loaded.load_state_dict(saved)
    for expected in (64, 8):
        other.seen.clear()
        F.cross_entropy(other(x).flatten(0, 1), y.flatten()).backward()
        loaded.step()
        assert len(other.seen[1]) == expected


def test_inputs_that_differ_in_their_first_axis_use_the_whole_batch(caplog):
    model = Counting()
    optimizer = kfac(model, factor_fraction=0.125)
    with caplog.at_level(logging.WARNING, "kfac_triton"):
        for step in range(3):
            optimizer.zero_grad()
            x, y = data(128, seed=step)
            F.cross_entropy(model(x, torch.zeros(7)), y).backward()
            optimizer.step()
            assert_same(model.seen[-1], x)
    assert len(caplog.messages) == 1 and "first axis" in caplog.messages[0] and "factor_fraction" in caplog.messages[0]


def test_a_model_that_takes_whole_batches_only(caplog):
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def forward(self, x: Tensor) -> Tensor:
            if x.shape[0] != 128:
                raise ValueError("128 rows and no others")
            return self.net(x)

    def factors_after_two_updates(model: nn.Module, **options: Any) -> dict[str, dict[str, Tensor]]:
        optimizer = kfac(model, **options)
        for _ in range(2):
            optimizer.zero_grad()
            backward(model, *data(128))
            optimizer.step()
        return optimizer.factors()

    expected = factors_after_two_updates(network())
    with caplog.at_level(logging.WARNING, "kfac_triton"):
        actual = factors_after_two_updates(Fixed(), factor_fraction=0.125)
    assert_same({name.removeprefix("net."): f for name, f in actual.items()}, expected)
    assert len(caplog.messages) == 1 and "128 rows and no others" in caplog.messages[0]


# ---------------------------------------------------------------------------------------------------- padded positions


def padded_batch() -> tuple[Tensor, Tensor, Tensor]:
    """x (4, 5, 6), y (4, 5), valid (4, 5): sequences of 5, 3, 1 and 4 positions; padding holds large numbers."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(4, 5, 6, generator=generator)
    y = torch.randint(3, (4, 5), generator=generator)
    valid = torch.arange(5) < torch.tensor([5, 3, 1, 4])[:, None]
    return torch.where(valid[..., None], x, 50.0), y.masked_fill(~valid, -100), valid


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
def test_masked_positions_are_as_if_they_were_not_there(fisher, activation):
    """With ReLU some positions pass no gradient to the first layer: they are rows all the same."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 2), activation(), nn.Linear(2, 3))

    x, y, valid = padded_batch()
    expected = factors_of(build(), x[valid], y[valid], fisher=fisher)
    model = build()
    optimizer = kfac(model, fisher=fisher, mask=lambda inputs, outputs: inputs[..., 0] != 50.0)
    F.cross_entropy(model(x).flatten(0, 1), y.flatten(), ignore_index=-100).backward()
    optimizer.step()
    torch.testing.assert_close(optimizer.factors(), expected, rtol=1e-5, atol=1e-6)


def test_sampled_targets_of_masked_positions_count_nothing():
    """mc over a long batch: G approaches the exact one of the valid rows, and A equals it."""
    x, y, valid = padded_batch()
    x, y, valid = x.repeat(300, 1, 1), y.repeat(300, 1), valid.repeat(300, 1)
    expected = factors_of(network(), x[valid], y[valid], fisher="exact")
    model = network()
    optimizer = kfac(model, mask=lambda inputs, outputs: inputs[..., 0] != 50.0)
    F.cross_entropy(model(x).flatten(0, 1), y.flatten(), ignore_index=-100).backward()
    optimizer.step()
    for name, factor in optimizer.factors().items():
        torch.testing.assert_close(factor["A"], expected[name]["A"], rtol=1e-4, atol=1e-5)
        # 3,900 sampled rows: a relative error of a few per cent.
        error = torch.linalg.norm(factor["G"] - expected[name]["G"]) / torch.linalg.norm(expected[name]["G"])
        assert float(error) < 0.1


def test_what_the_mask_receives():
    """The only argument itself, several as a tuple, keyword arguments as a dictionary; and the outputs."""
    received = []

    def mask(inputs, outputs):
        received.append((inputs, outputs))
        return torch.ones(outputs.shape[:-1], dtype=torch.bool)

    x, y = data()
    for unpack, call in (
        (lambda x: x, lambda m: m(x)),
        (lambda a, b: a + b, lambda m: m(x, 0 * x)),
        (lambda x: x, lambda m: m(x=x)),
    ):
        model = Named(unpack, lambda z: (z,))
        optimizer = kfac(model, mask=mask, output=lambda r: r[0])
        F.cross_entropy(call(model)[0], y).backward()
        optimizer.step()
    kinds = [type(inputs) for inputs, _ in received]
    assert kinds == [Tensor, tuple, dict]
    assert_same(received[2][0]["x"], x)
    assert all(outputs.shape == (12, 3) for _, outputs in received)


@pytest.mark.parametrize(
    "mask",
    [lambda i, z: torch.ones(z.shape[:-1]), lambda i, z: torch.ones(z.shape, dtype=torch.bool), lambda i, z: True],
)
def test_a_mask_of_another_kind_is_refused(mask):
    model = network()
    optimizer = kfac(model, mask=mask)
    backward(model, *data())
    with pytest.raises(ValueError, match=r"mask must return a bool tensor.*\(12,\); got"):
        optimizer.step()


def test_a_likelihood_on_another_axis():
    """(N, C, positions): one term for each position, as with the axis last."""
    x = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(0))
    expected = None
    for dim in (-1, 1):
        model = Named(lambda x: x, (lambda z: z.movedim(-1, 1)) if dim == 1 else (lambda z: z))
        optimizer = kfac(model, likelihood=Categorical(dim=dim), fisher="exact")
        model(x).square().sum().backward()
        optimizer.step()
        expected = expected or optimizer.factors()
        torch.testing.assert_close(optimizer.factors(), expected, rtol=1e-6, atol=1e-8)


# -------------------------------------------------------------------------------------- weights wherever they are used


class Functional(nn.Module):
    """The same network in functions of its own."""

    def __init__(self, how: str) -> None:
        super().__init__()
        net = network()
        self.W1, self.b1 = net[0].weight, net[0].bias
        self.W2, self.b2 = net[2].weight, net[2].bias
        if how == "stored transposed":
            self.W1 = nn.Parameter(self.W1.detach().t().clone())
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        first = {
            "linear": lambda: F.linear(x, self.W1, self.b1),
            "addmm": lambda: torch.addmm(self.b1, x, self.W1.t()),
            "stored transposed": lambda: torch.addmm(self.b1, x, self.W1),
            "chunks": lambda: torch.cat(
                [F.linear(x, self.W1[:2], self.b1[:2]), F.linear(x, self.W1[2:], self.b1[2:])], dim=-1
            ),
        }[self.how]()
        return F.linear(torch.tanh(first), self.W2, self.b2)


@pytest.mark.parametrize("how", ["linear", "addmm", "stored transposed", "chunks"])
def test_weights_are_followed_through_functions(how):
    x, y = data()
    expected = factors_of(network(), x, y, fisher="exact")
    model = Functional(how)
    optimizer = kfac(model, fisher="exact")
    backward(model, x, y)
    optimizer.step()
    assert set(optimizer.coverage().values()) == {"linear"}
    if how != "chunks":
        torch.testing.assert_close(optimizer.factors()["W1"], expected["0"], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(optimizer.factors()["W2"], expected["2"], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("cast", [True, False])
def test_rows_of_a_weight_are_its_rows_wherever_it_lies_in_memory(cast):
    """A weight in the middle of a flat buffer; one that was cast has memory of its own, and begins there at 0."""

    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            buffer = torch.randn(100, dtype=torch.float32 if cast else torch.float64)
            self.W = nn.Parameter(buffer[20:44].view(6, 4))

        def forward(self, x: Tensor) -> Tensor:
            W = self.W.double()
            return torch.cat([F.linear(x, W[:2]), F.linear(x, W[2:])], dim=-1)

    model, x = Halves(), torch.randn(8, 4, dtype=torch.float64)
    assert model.W.storage_offset() == 20
    optimizer = KFAC(model, likelihood="gaussian", fisher="exact", lr=0.0, compile=False, factor_fraction=1.0)
    model(x).square().sum().backward()
    optimizer.step()
    factors = {side: factor.double() for side, factor in optimizer.factors()["W"].items()}
    wanted = torch.kron(torch.eye(6, dtype=torch.float64), x.T @ x / 8)
    rounding = {"rtol": 1e-5, "atol": 1e-6} if cast else {"rtol": 1e-10, "atol": 1e-12}
    torch.testing.assert_close(torch.kron(factors["G"], factors["A"]), wanted, **rounding)


@pytest.mark.parametrize(
    "call",
    [lambda model, x: model.net(x), lambda model, x: model.encode(x)],
    ids=["a sub-module", "a method"],
)
def test_a_part_of_the_model_that_is_called_counts(call):
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def encode(self, x: Tensor) -> Tensor:
            return self.net(x)

        def forward(self, x: Tensor) -> Tensor:
            return self.encode(x)

    x, y = data()
    expected = factors_of(network(), x, y)
    model = Encoder()
    optimizer = kfac(model)
    F.cross_entropy(call(model, x), y).backward()
    optimizer.step()
    assert_same({name.removeprefix("net."): f for name, f in optimizer.factors().items()}, expected)


@pytest.mark.parametrize("fisher", FISHERS)
def test_training_in_eval_mode_counts(fisher):
    """Frozen running statistics and no dropout are a choice of training, too."""
    x, y = data()
    expected = factors_of(network(), x, y, fisher=fisher)
    assert_same(factors_of(network().eval(), x, y, fisher=fisher), expected)


def test_gradients_without_any_call_are_named():
    """A copy of the model made them; nothing says what its inputs were."""
    model = network()
    optimizer = kfac(model)
    twin = copy.deepcopy(model)
    x, y = data()
    backward(twin, x, y)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        p.grad = q.grad
    with pytest.raises(RuntimeError, match=r"saw no call of .*Sequential"):
        optimizer.step()
    assert optimizer.param_groups[0]["step"] == 0
    optimizer.zero_grad()
    backward(model, x, y)
    optimizer.step()
    assert optimizer.param_groups[0]["step"] == 1
