"""Long adaptive runs: small batches, networks of other kinds, and twenty thousand steps."""

from __future__ import annotations

import copy
import resource
from itertools import islice

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_triton import KFAC
from kfac_triton.tuning.problems import find_task
from kfac_triton.tuning.trainer import endless, train_step

pytestmark = pytest.mark.slow


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.body(x))


def resnet() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        Block(8), Block(8), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip


class Transformer(nn.Module):
    """The rows of an image as a sequence; dropout, pre-norm."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, batch_first=True, norm_first=True)
        self.embed, self.encoder = nn.Linear(8, 32), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.position = nn.Parameter(0.02 * torch.randn(8, 32))
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.encoder(self.embed(x.view(-1, 8, 8)) + self.position).mean(1)))


def trained(build, name: str, seed: int, steps: int, size: int) -> float:
    """The training loss at the end, in evaluation mode."""
    datasets = pytest.importorskip("sklearn.datasets")
    digits = datasets.load_digits()
    X, Y = torch.tensor(digits.data / 16, dtype=torch.float32)[:1500], torch.tensor(digits.target)[:1500]
    torch.manual_seed(seed)
    model, generator = build(), torch.Generator().manual_seed(seed)
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-3)
    optimizer = adamw if name == "adamw" else KFAC.paper(model, likelihood="categorical", compile=False)
    for _ in range(steps):
        rows = torch.randint(0, 1500, (size,), generator=generator)

        def closure():
            optimizer.zero_grad()
            loss = F.cross_entropy(model(X[rows]), Y[rows])  # noqa: B023
            loss.backward()
            return loss

        optimizer.step(closure)
    model.eval()
    with torch.no_grad():
        return float(F.cross_entropy(model(X), Y))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("size", [16, 64])
@pytest.mark.parametrize("build", [resnet, Transformer])
def test_small_batches_and_no_setting(build, size, seed):
    """300 steps: none of five seeds ends above AdamW at 1e-3.

    Judged on its own batch of 16 alone the damping vanishes, and the transformer ends above 1e4; with a momentum that
    is free one seed of either network ends above AdamW.
    """
    assert trained(build, "kfac", seed, 300, size) <= trained(build, "adamw", seed, 300, size)


def test_twenty_thousand_steps_and_a_resumed_run(caplog):
    """No NaN, no drift, no leak; from a checkpoint at step 15,003 on, bit-equal to the undisturbed run."""
    pytest.importorskip("sklearn")
    task = find_task("digits")
    torch.manual_seed(0)
    model = task.model()
    optimizer = KFAC.paper(model, likelihood=task.likelihood, loss_scale=task.loss_scale, compile=False)
    batches, device = endless(task, 0), torch.device("cpu")
    memory, stored = 0, {}
    for step in range(20_000):
        if step == 1000:
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if step == 15_003:
            stored = copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
        loss = train_step(task, model, optimizer, batches, device)
        assert torch.isfinite(loss), step
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 50e3  # kilobytes
    with torch.no_grad():
        assert task.evaluate(model) < 1e-2
    assert "no finite inverse" not in caplog.text
    again = task.model()
    resumed = KFAC.paper(again, likelihood=task.likelihood, loss_scale=task.loss_scale, compile=False)
    again.load_state_dict(stored["model"])
    resumed.load_state_dict(stored["optimizer"])
    rest = islice(endless(task, 0), 15_003, None)
    for _ in range(15_003, 20_000):
        train_step(task, again, resumed, rest, device)
    torch.testing.assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)
