"""torch.distributed.checkpoint: save, load into a fresh optimizer, and go on to the bit.

It asks a fresh optimizer for its state by a step with zero gradients, and loads in place: whatever the state does not
have yet would be lost without a word.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from small import closure_step, data, mlp, train_step
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from kfac_triton import KFAC
from kfac_triton.schedules import Cosine, StepWise, WarmUp

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

Fresh = Callable[[], tuple[nn.Module, KFAC]]


def convolutional() -> nn.Module:
    """Convolutions with and without groups, norms, a fallback, a side in blocks."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 4, 3), nn.BatchNorm1d(4), nn.PReLU(4), nn.Conv1d(4, 4, 2, groups=2),
        nn.Flatten(), nn.Linear(12, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3, bias=False),
    )  # fmt: skip


class Tagger(nn.Module):
    """An embedding and a recurrent layer; the inputs are made into words."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.rnn, self.head = nn.Embedding(5, 4), nn.RNN(4, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.rnn(self.words((x.abs() * 2).long().clamp(max=4)))[0][:, -1])


def fresh(build: Callable[[], nn.Module] = mlp, form: type[KFAC] | Callable[..., KFAC] = KFAC, **options: Any) -> Fresh:
    def both() -> tuple[nn.Module, KFAC]:
        model = build()
        return model, form(model, likelihood="categorical", compile=False, **options)

    return both


def trained(pair: tuple[nn.Module, KFAC], steps: int, n: int) -> list[float]:
    model, optimizer = pair
    step = closure_step if optimizer.param_groups[0]["adaptive_damping"] else train_step
    return [step(optimizer, model, *data(n, seed=i % 3)) for i in range(steps)]


def assert_same(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    """Losses, weights, state and groups, to the bit."""
    groups = [run["optimizer"].pop("param_groups") for run in (actual, expected)]
    assert groups[0] == groups[1]
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def through_checkpoint(before: Fresh, path: Path, n: int, **options: bool) -> tuple[Any, Any]:
    """What the run and the one resumed from its checkpoint become: losses, weights and state."""
    flat = StateDictOptions(**options)
    first = before()
    trained(first, 5, n)
    model_state, state = get_state_dict(*first, options=flat)
    dcp.save({"model": model_state, "optimizer": state}, checkpoint_id=str(path))
    straight = trained(first, 4, n)

    second = before()
    model_state, state = get_state_dict(*second, options=flat)
    both = {"model": model_state, "optimizer": state}
    dcp.load(both, checkpoint_id=str(path))
    set_state_dict(*second, model_state_dict=both["model"], optim_state_dict=both["optimizer"], options=flat)
    resumed = trained(second, 4, n)
    return [
        {"losses": losses, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
        for losses, (model, optimizer) in ((straight, first), (resumed, second))
    ]


CASES: dict[str, Fresh] = {
    "plain": fresh(),
    "no momentum": fresh(momentum=0.0),
    "eigen": fresh(approximation="eigen"),
    "tridiagonal": fresh(approximation="tridiagonal"),
    "inverse_free": fresh(approximation="inverse_free"),
    "exact": fresh(fisher="exact", lr=torch.tensor(0.02)),
    "empirical": fresh(fisher="empirical"),
    "convolutional": fresh(convolutional, max_factor_dim=6),
    "uncorrelated": fresh(convolutional, spatial="uncorrelated"),
    "recurrent": fresh(Tagger, temporal="chain"),
    "symmetric": fresh(Tagger, temporal="chain_symmetric"),
    "scheduled": fresh(lr=WarmUp(3, Cosine(0.03, 0.01, 9)), damping=StepWise(1e-2, 0.5, (2, 6))),
    "paper": fresh(form=KFAC.paper),
    "bfloat16": fresh(lambda: mlp().to(torch.bfloat16)),
    "paper, bfloat16": fresh(lambda: mlp().to(torch.bfloat16), form=KFAC.paper),
}


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("n", [128, 1200], ids=["rows wait", "whole products"])
@pytest.mark.parametrize("case", CASES)
def test_a_distributed_checkpoint_goes_on_to_the_bit(case, n, flatten, tmp_path):
    """With few rows they wait in the state for a later product; with many the place for them stays empty."""
    with torch.autocast("cpu", torch.bfloat16, enabled="bfloat16" in case):
        straight, resumed = through_checkpoint(CASES[case], tmp_path, n, flatten_optimizer_state_dict=flatten)
    assert_same(resumed, straight)


def test_groups_of_their_own(tmp_path):
    def both() -> tuple[nn.Module, KFAC]:
        model = mlp()
        groups = [{"params": model[0].parameters(), "lr": 0.02, "name": "body"}, {"params": model[2].parameters()}]
        return model, KFAC(model, groups, likelihood="categorical", compile=False)

    straight, resumed = through_checkpoint(both, tmp_path, 128)
    assert_same(resumed, straight)


def test_a_full_state_dict_goes_on_to_the_bit(tmp_path):
    straight, resumed = through_checkpoint(fresh(), tmp_path, 128, full_state_dict=True)
    assert_same(resumed, straight)


def test_a_checkpoint_of_a_run_that_did_not_begin(tmp_path):
    """Its state holds no data: what is resumed from it is a fresh run."""
    pair = fresh()()
    model_state, state = get_state_dict(*pair)
    dcp.save({"model": model_state, "optimizer": state}, checkpoint_id=str(tmp_path))
    again = fresh()()
    model_state, state = get_state_dict(*again)
    dcp.load({"model": model_state, "optimizer": state}, checkpoint_id=str(tmp_path))
    set_state_dict(*again, model_state_dict=model_state, optim_state_dict=state)
    assert again[1].factors() == {}
    untouched = fresh()()
    assert trained(again, 4, 128) == trained(untouched, 4, 128) == trained(pair, 4, 128)
    torch.testing.assert_close(again[1].state_dict(), untouched[1].state_dict(), rtol=0, atol=0)


def test_a_block_without_data_does_not_move_its_weight():
    """The inverses that appeared are zeros; a first pass that is spoiled must find none, so that AdamW steps in."""
    states = []
    for appeared in (False, True):
        torch.manual_seed(0)
        model = nn.Linear(6, 3)
        optimizer = KFAC(model, likelihood="gaussian", compile=False)
        if appeared:
            _, state = get_state_dict(model, optimizer)
            set_state_dict(model, optimizer, model_state_dict=model.state_dict(), optim_state_dict=state)
        for i, scale in enumerate((1e25, 1.0, 1.0)):
            optimizer.zero_grad()
            (model(data(seed=i)[0] * scale) / scale).square().mean().backward()
            optimizer.step()
        states.append({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "losses": []})
    assert_same(*states)


class Functional(nn.Module):
    """A weight that no module's type promises a block for."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(3, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight)


def test_a_block_that_was_not_expected_is_not_lost_in_silence(tmp_path):
    """A fresh optimizer cannot know of it; one that took a step on a batch can."""
    pair = fresh(Functional)()
    trained(pair, 5, 128)
    model_state, state = get_state_dict(*pair)
    dcp.save({"model": model_state, "optimizer": state}, checkpoint_id=str(tmp_path))
    again = fresh(Functional)()
    model_state, state = get_state_dict(*again)
    both = {"model": model_state, "optimizer": state}
    with pytest.raises(dcp.CheckpointException, match="Missing key in checkpoint state_dict"):
        dcp.load(both, checkpoint_id=str(tmp_path))
    trained(again, 1, 128)
    model_state, state = get_state_dict(*again)
    both = {"model": model_state, "optimizer": state}
    dcp.load(both, checkpoint_id=str(tmp_path))
    set_state_dict(*again, model_state_dict=both["model"], optim_state_dict=both["optimizer"])
    assert trained(again, 4, 128) == trained(pair, 4, 128)


def test_a_state_that_appeared_is_what_training_makes():
    """Name by name, shape by shape: nothing that is saved has no place to be loaded into."""
    for case in (
        "plain",
        "eigen",
        "tridiagonal",
        "inverse_free",
        "convolutional",
        "recurrent",
        "paper",
        "paper, bfloat16",
    ):
        model, optimizer = CASES[case]()
        with torch.autocast("cpu", torch.bfloat16, enabled="bfloat16" in case):
            trained((model, optimizer), 3, 128)
        other, empty = CASES[case]()
        _, state = get_state_dict(other, empty)
        names = dict(zip(range(99), (name for name, _ in other.named_parameters()), strict=False))
        for key, entry in copy.deepcopy(optimizer.state_dict()["state"]).items():
            appeared = state["state"][names[key]]
            assert entry.keys() == appeared.keys(), (case, names[key])
            for name, value in entry.items():
                if isinstance(value, torch.Tensor):
                    assert (value.shape, value.dtype) == (appeared[name].shape, appeared[name].dtype), name
