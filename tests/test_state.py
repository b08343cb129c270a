"""State: resuming bit for bit, what a checkpoint may hold, copies, and states that belong to another model."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as dcp

from kfac_triton import KFAC


def network(seed: int = 0) -> nn.Sequential:
    """A block of every kind, a fallback, dropout and running statistics."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 2, 3), nn.Flatten(), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3),
        nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3, bias=False),
    )  # fmt: skip


def data(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(80, 6, generator=generator), torch.randint(3, (80,), generator=generator)


def kfac(model: nn.Module, **options) -> KFAC:
    defaults = {
        "likelihood": "categorical", "lr": 0.05, "damping": 0.1, "momentum": 0.9, "weight_decay": 0.01,
        "factor_interval": 3, "inverse_interval": 5, "compile": False,
    }  # fmt: skip
    return KFAC(model, **{**defaults, **options})


def train(model: nn.Module, optimizer: KFAC, steps: range) -> None:
    dtype = next(model.parameters()).dtype
    for step in steps:
        x, y = data(step)
        optimizer.zero_grad()
        torch.manual_seed(100 + step)
        F.cross_entropy(model(x.to(dtype)), y).backward()
        optimizer.step()


def saved_and_loaded(content: object) -> object:
    file = io.BytesIO()
    torch.save(content, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def tracked(model: nn.Module, optimizer: KFAC) -> dict:
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}


def assert_same(actual, expected) -> None:
    """Bitwise, dtypes included, for nested dictionaries and lists."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def leaves(value: object) -> list[object]:
    if isinstance(value, dict):
        return [leaf for item in value.values() for leaf in leaves(item)]
    if isinstance(value, (list, tuple)):
        return [leaf for item in value for leaf in leaves(item)]
    return [value]


# ------------------------------------------------------------------------------------------------------------ resuming


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"fisher": "exact"},
        {"fisher": "empirical"},
        {"momentum": 0.0, "kl_clip": 1e-3, "weight_sharing": "reduce"},
        {"max_factor_dim": 6},
        {"lr": torch.tensor(0.05)},
    ],
    ids=str,
)
def test_resuming_is_bit_equal(options):
    """7 steps, a checkpoint, a fresh process's model and optimizer, 7 more: as 14 undisturbed ones."""
    model = network()
    optimizer = kfac(model, **options)
    train(model, optimizer, range(7))
    checkpoint = saved_and_loaded(tracked(model, optimizer))
    train(model, optimizer, range(7, 14))

    resumed = network(seed=5)
    again = kfac(resumed, **{**options, "lr": 7.0})
    resumed.load_state_dict(checkpoint["model"])
    again.load_state_dict(checkpoint["optimizer"])
    train(resumed, again, range(7, 14))
    assert_same(tracked(resumed, again), tracked(model, optimizer))


@pytest.mark.parametrize("used", [False, True])
def test_loading_replaces_whatever_was_there(used):
    """Into an optimizer that never stepped, and into one that did."""
    model = network()
    optimizer = kfac(model)
    train(model, optimizer, range(4))
    checkpoint = copy.deepcopy(tracked(model, optimizer))
    if used:
        train(model, optimizer, range(20, 25))
    else:
        model = network(seed=9)
        optimizer = kfac(model)
    model.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    assert_same(tracked(model, optimizer), checkpoint)
    assert set(optimizer.factors()) == {"1", "3", "6", "8"}
    assert optimizer.coverage()["1.weight"] == "conv" and optimizer.coverage()["3.weight"] == "scale"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_factors_keep_their_precision(dtype):
    """Optimizer.load_state_dict casts every tensor to its parameter's dtype."""

    def build(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)

    model = build(0)
    optimizer = kfac(model)
    train(model, optimizer, range(4))
    checkpoint = saved_and_loaded(tracked(model, optimizer))
    expected = copy.deepcopy(tracked(model, optimizer))
    resumed = build(1)
    again = kfac(resumed)
    resumed.load_state_dict(checkpoint["model"])
    again.load_state_dict(checkpoint["optimizer"])
    assert_same(tracked(resumed, again), expected)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert {f.dtype for sides in again.factors().values() for f in sides.values()} == {wide}
    train(model, optimizer, range(4, 8))
    train(resumed, again, range(4, 8))
    assert_same(tracked(resumed, again), tracked(model, optimizer))


def test_loading_changes_neither_the_dictionary_nor_shares_its_tensors():
    model = network()
    optimizer = kfac(model)
    train(model, optimizer, range(4))
    state = copy.deepcopy(optimizer.state_dict())
    kept = copy.deepcopy(state)
    fresh = network()
    again = kfac(fresh)
    again.load_state_dict(state)
    train(fresh, again, range(4, 8))
    assert_same(state, kept)


def test_a_state_dict_holds_tensors_and_plain_numbers():
    model = network()
    optimizer = kfac(model, kl_clip=0.01)
    train(model, optimizer, range(3))
    state = optimizer.state_dict()
    assert set(state) == {"state", "param_groups"}
    kinds = {type(leaf) for leaf in leaves(state)}
    assert kinds <= {Tensor, int, float, type(None), bool}
    assert all(isinstance(key, nn.Parameter) for key in optimizer.state)
    inverses = [name for entry in state["state"].values() for name in entry if name.endswith("_inv")]
    assert len(inverses) == 8


def test_a_state_of_named_parameters():
    """Saved with names and loaded without, and the other way round."""
    model = network()
    named = kfac(model, params=model.named_parameters())
    train(model, named, range(4))
    other = network()
    plain = kfac(other)
    plain.load_state_dict(copy.deepcopy(named.state_dict()))
    assert_same(plain.state_dict()["state"], named.state_dict()["state"])
    third = network()
    back = kfac(third, params=third.named_parameters())
    back.load_state_dict(copy.deepcopy(plain.state_dict()))
    assert_same(back.state_dict()["state"], named.state_dict()["state"])


def test_groups_and_added_groups_resume():
    def build() -> tuple[nn.Module, KFAC]:
        model = network()
        optimizer = kfac(model, params=[{"params": model[1].parameters(), "lr": 0.01, "factor_interval": 2}])
        optimizer.add_param_group({"params": [*model[6].parameters(), *model[8].parameters()], "damping": 0.5})
        return model, optimizer

    model, optimizer = build()
    train(model, optimizer, range(3))
    checkpoint = saved_and_loaded(tracked(model, optimizer))
    train(model, optimizer, range(3, 9))
    resumed, again = build()
    resumed.load_state_dict(checkpoint["model"])
    again.load_state_dict(checkpoint["optimizer"])
    train(resumed, again, range(3, 9))
    assert_same(tracked(resumed, again), tracked(model, optimizer))


# -------------------------------------------------------------------------------------------- states of something else


def stepped(model: nn.Module, **options) -> KFAC:
    optimizer = kfac(model, **options)
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    model(x).square().sum().backward()
    optimizer.step()
    return optimizer


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3, bias=False)), "groups of"),
        (lambda: nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3)), "of shape"),
        (lambda: nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 2)), "of shape"),
    ],
    ids=["fewer parameters", "another width", "another head"],
)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_state_of_another_model_is_refused(other, message, momentum):
    torch.manual_seed(0)
    optimizer = stepped(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3)), momentum=momentum)
    before = copy.deepcopy(optimizer.state_dict())
    foreign = stepped(other(), momentum=momentum).state_dict()
    with pytest.raises(ValueError, match=rf"{message}.*another model's"):
        optimizer.load_state_dict(foreign)
    assert_same(optimizer.state_dict(), before)


@pytest.mark.parametrize(
    "foreign",
    [
        lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        lambda model: torch.optim.AdamW(model.parameters(), lr=0.1),
    ],
)
def test_the_state_of_another_optimizer_is_refused(foreign):
    """Its groups lack damping and intervals: say so now, rather than fail in the next step."""
    model = nn.Linear(6, 3)
    other = foreign(model)
    model(torch.ones(4, 6)).sum().backward()
    other.step()
    optimizer = kfac(model)
    with pytest.raises(ValueError, match="damping"):
        optimizer.load_state_dict(other.state_dict())


@pytest.mark.parametrize("content", [{}, {"state": {}}, {"model": {}}])
def test_a_dictionary_that_is_no_state_is_refused(content):
    with pytest.raises(ValueError, match=r"'state' and 'param_groups'"):
        kfac(network()).load_state_dict(content)


# -------------------------------------------------------------------------------------------------- hooks and trainers


def test_load_state_dict_hooks():
    """A pre-hook may return another dictionary (renamed, rescaled): that is the one which counts."""
    model = network()
    optimizer = kfac(model)
    train(model, optimizer, range(4))
    weight = model[6].weight
    expected = 2 * optimizer.state[weight]["A"]
    order = []

    def double(_, state_dict):
        order.append("before")
        state_dict = copy.deepcopy(state_dict)
        state_dict["state"][4]["A"] *= 2
        return state_dict

    assert list(model.parameters())[4] is weight
    optimizer.register_load_state_dict_pre_hook(double)
    optimizer.register_load_state_dict_post_hook(lambda _: order.append("after"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert order == ["before", "after"]
    assert_same(optimizer.state[weight]["A"], expected)


def test_state_dict_hooks_and_keyword_arguments():
    """torch.distributed.checkpoint loads by keyword."""
    model = network()
    optimizer = kfac(model)
    train(model, optimizer, range(2))
    optimizer.register_state_dict_post_hook(lambda _, state: state["param_groups"][0].update(extra=1))
    state = optimizer.state_dict()
    assert state["param_groups"][0]["extra"] == 1
    optimizer.load_state_dict(state_dict=state)


def test_distributed_checkpoint_on_a_fresh_optimizer():
    """It steps once with zero gradients and lr 0, to make state appear: no step, no trace."""
    model = network()
    before = copy.deepcopy(model.state_dict())
    optimizer = kfac(model)
    state = dcp.get_optimizer_state_dict(model, optimizer)
    assert set(state) == {"state", "param_groups"}
    assert optimizer.param_groups[0]["step"] == 0 and optimizer.param_groups[0]["lr"] == 0.05
    assert_same(model.state_dict(), before)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_distributed_checkpoint_round_trip(momentum):
    model = network()
    optimizer = kfac(model, momentum=momentum)
    train(model, optimizer, range(4))
    state = saved_and_loaded(dcp.get_optimizer_state_dict(model, optimizer))
    assert "A_inv" in state["state"]["6.weight"]
    weights = copy.deepcopy(model.state_dict())
    train(model, optimizer, range(4, 8))
    resumed = network(seed=3)
    again = kfac(resumed, momentum=momentum)
    resumed.load_state_dict(weights)
    dcp.set_optimizer_state_dict(resumed, again, state)
    train(resumed, again, range(4, 8))
    assert_same(resumed.state_dict(), model.state_dict())
    assert_same(again.factors(), optimizer.factors())


# -------------------------------------------------------------------------------------------------------------- copies


def pickled(pair: tuple[nn.Module, KFAC]) -> tuple[nn.Module, KFAC]:
    return pickle.loads(pickle.dumps(pair))


def saved(pair: tuple[nn.Module, KFAC]) -> tuple[nn.Module, KFAC]:
    file = io.BytesIO()
    torch.save(pair, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


Copier = Callable[[tuple[nn.Module, KFAC]], tuple[nn.Module, KFAC]]


@pytest.mark.parametrize("fisher", ["mc", "empirical"])
@pytest.mark.parametrize("copier", [copy.deepcopy, pickled, saved])
def test_a_copy_needs_its_model_and_then_goes_on_as_the_original(copier: Copier, fisher):
    model = network()
    optimizer = kfac(model, fisher=fisher)
    train(model, optimizer, range(4))
    twin, other = copier((model, optimizer))
    train(model, optimizer, range(4, 8))
    assert other.param_groups[0]["params"][0] is next(twin.parameters())
    x, y = data(4)
    F.cross_entropy(twin(x), y).backward()
    for use in (other.step, other.factors, other.coverage, other.memory_usage):
        with pytest.raises(RuntimeError, match=r"copied or unpickled.*attach\(model\)"):
            use()
    assert len(other.state_dict()["state"]) > 0 and "KFAC" in repr(other)
    twin.load_state_dict({k: v for k, v in twin.state_dict().items() if "running" not in k}, strict=False)
    twin, other = copier((model, optimizer))
    other.attach(twin)
    train(model, optimizer, range(8, 12))
    train(twin, other, range(8, 12))
    assert_same(tracked(twin, other), tracked(model, optimizer))


def test_an_attached_copy_counts_every_batch_once():
    """The copied model carries the hooks of its original; they must not count beside the new ones."""
    model = network()
    optimizer = kfac(model, fisher="empirical", factor_interval=1)
    train(model, optimizer, range(3))
    twin, other = copy.deepcopy((model, optimizer))
    other.attach(twin)
    train(twin, other, range(3, 4))
    calls = {id(m): len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()}
    copied = {id(m): len(m._forward_hooks) + len(m._forward_pre_hooks) for m in twin.modules()}
    assert sorted(copied.values()) == sorted(calls.values())
    other.close()
    assert not any(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in twin.modules())


def test_attach_finds_parameters_by_name_in_another_model():
    """The copy alone, without its model: its parameters are those of the same names."""
    model = network()
    optimizer = kfac(model)
    train(model, optimizer, range(4))
    other = pickle.loads(pickle.dumps(optimizer))
    twin = network(seed=8)
    twin.load_state_dict(model.state_dict())
    other.attach(twin)
    assert all(a is b for a, b in zip(other.param_groups[0]["params"], twin.parameters(), strict=True))
    train(model, optimizer, range(4, 8))
    train(twin, other, range(4, 8))
    assert_same(tracked(twin, other), tracked(model, optimizer))


def test_attach_after_close_goes_on():
    runs = []
    for interrupted in (False, True):
        model = network()
        optimizer = kfac(model)
        train(model, optimizer, range(4))
        if interrupted:
            optimizer.close()
            optimizer.attach(model)
        train(model, optimizer, range(4, 8))
        runs.append(copy.deepcopy(tracked(model, optimizer)))
    assert_same(runs[1], runs[0])


@pytest.mark.parametrize(
    ("other", "error", "message"),
    [
        (lambda: nn.Sequential(nn.Linear(6, 3)), ValueError, r"holds 1.weight .*the model has none"),
        (lambda: network().parameters(), TypeError, "model must be a torch.nn.Module"),
    ],
)
def test_attaching_another_model_is_refused_and_changes_nothing(other, error, message):
    model = network()
    optimizer = kfac(model)
    train(model, optimizer, range(2))
    with pytest.raises(error, match=message):
        optimizer.attach(other())
    train(model, optimizer, range(2, 4))
    assert optimizer.param_groups[0]["step"] == 4


def test_attach_refuses_another_shape():
    optimizer = kfac(nn.Sequential(nn.Linear(6, 3)))
    with pytest.raises(ValueError, match=r"0.weight of shape \(3, 6\); the model has shape \(4, 6\)"):
        optimizer.attach(nn.Sequential(nn.Linear(6, 4)))


def test_the_state_of_a_parameter_that_changes_its_kind():
    """A weight whose first pass was spoiled takes AdamW steps, then gets a block: no AdamW tensors stay behind."""
    torch.manual_seed(0)
    model = nn.Linear(6, 3)
    optimizer = KFAC(model, likelihood="gaussian", compile=False)
    x = torch.randn(8, 6)
    for scale in (1e25, 1.0):
        optimizer.zero_grad()
        batch = x * scale
        (model(batch) * (1e-25 if scale > 1 else 1.0)).mean().backward()
        optimizer.step()
        names = {name for name in optimizer.state[model.weight] if name in ("momentum_buffer", "exp_avg", "exp_avg_sq")}
        assert names == ({"exp_avg", "exp_avg_sq"} if scale > 1 else {"momentum_buffer"})
    assert torch.isfinite(model.weight).all()


class FlatProjection(nn.Module):
    """A convolution's weight used as a linear map of patches, as some vision transformers do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.proj = nn.Conv2d(1, 3, (2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.proj.weight.flatten(1), self.proj.bias)


def test_the_operation_of_a_block_is_part_of_the_state():
    """Not guessed from the weight's axes: the resumed factors go on instead of starting anew."""
    models = FlatProjection(), FlatProjection()
    optimizers = [kfac(model, factor_interval=1) for model in models]
    train(models[0], optimizers[0], range(2))
    models[1].load_state_dict(models[0].state_dict())
    optimizers[1].load_state_dict(optimizers[0].state_dict())
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, range(2, 4))
        assert optimizer.state[model.proj.weight]["factor_updates"] == 4
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))
