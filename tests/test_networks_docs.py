"""docs/networks.md: its example, word for word, its list of blocks, and what it says is not covered."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from kfac_triton import KFAC
from kfac_triton.operations.layout import OPERATIONS
from kfac_triton.tuning.problems import BUILT_IN

DOCUMENT = (Path(__file__).parents[1] / "docs" / "networks.md").read_text()


def test_a_block_from_outside_the_package():
    """The example defines a layer and its block, checks it, and trains."""
    (example,) = re.findall(r"```python\n(.*?)```", DOCUMENT, re.S)
    known: dict = {}
    exec(example, known)
    model, optimizer = known["model"], known["optimizer"]
    torch.manual_seed(0)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        x = torch.randn(64, 6)
        loss = nn.functional.cross_entropy(model(x), (x[:, 1] > 0).long())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert optimizer.coverage() == {
        "0.weight": "linear", "0.bias": "linear", "2.weight": "custom", "2.bias": "custom"
    }  # fmt: skip
    assert "2" in optimizer.factors()


def test_every_block_is_in_the_list():
    listed = DOCUMENT.partition("## Arguments")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", listed, re.M)) == set(OPERATIONS)


MEMORY = DOCUMENT.partition("## Memory")[2].partition("\n## ")[0]


@pytest.mark.parametrize("row", re.findall(r"^\| `(\S+)` \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|", MEMORY, re.M))
def test_the_memory_of_a_task_is_what_the_table_says(row):
    name, *said = row
    task = BUILT_IN[name](None, torch.device("cpu"))
    if name.startswith("char") and task.data[0]["name"] != "tinyshakespeare":
        pytest.skip("the table is of tiny Shakespeare's letters: tinyshakespeare/input.txt in $KFAC_DATA")
    model = task.model()
    optimizer = KFAC(model, likelihood=task.likelihood, compile=False)
    for (x, y), _ in zip(task.batches(0), range(3), strict=False):
        optimizer.zero_grad()
        task.loss(model(x), y).backward()
        optimizer.step()
    usage = optimizer.memory_usage()
    parameters = sum(p.nbytes for p in model.parameters())
    assert 2 * parameters <= usage["momentum"] <= 2.2 * parameters and usage["fallback"] == 0
    held = (parameters, usage["factors"], usage["inverses"], usage["rows"])
    assert [round(size / 1024) for size in held] == [int(number) for number in said]


class Summed(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("ni,io->no", x, self.w)


class Bagged(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.table, self.head = nn.EmbeddingBag(5, 4, **options), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.table((x > 0).long()))


class Frequent(Bagged):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(5, 4, scale_grad_by_freq=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.table((x[:, 0] > 0).long()))


class Both(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Bilinear(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (Summed, "w"), (Bagged, "table.weight"), (Frequent, "table.weight"), (Both, "layer.weight"),
        (lambda: nn.Sequential(nn.Linear(4, 3), nn.PReLU()), "1.weight"),
    ],
)  # fmt: skip
def test_what_is_not_covered_falls_back(make, name):
    model = make()
    optimizer = KFAC(model, likelihood="categorical", compile=False)
    model(torch.randn(8, 4)).square().sum().backward()
    optimizer.step()
    assert optimizer.coverage()[name] == "fallback"
