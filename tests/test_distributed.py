"""Two ranks with half of the batch each take the step that one process takes with all of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from kfac_triton import KFAC

WORLD = 2
STEPS = 3


def train(rank: int, world: int, parallel: bool) -> dict[str, torch.Tensor]:
    """A deep tanh net in float64; the exact Fisher draws nothing, so ranks and one process see the same curvature."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    inputs, targets = torch.randn(12, 5).double(), torch.randint(3, (12,))
    model = nn.parallel.DistributedDataParallel(net) if parallel else net
    optimizer = KFAC(
        model, likelihood="categorical", fisher="exact", lr=0.3, damping=1e-2, factor_fraction=1.0, compile=False
    )
    for _ in range(STEPS):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs[rank::world]), targets[rank::world]).backward()
        optimizer.step()
    return net.state_dict()


def train_adaptively(rank: int, world: int, parallel: bool) -> dict[str, torch.Tensor]:
    """Step length, momentum and damping from the whole batch's loss and model, over a check and a judgement of it."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    inputs, targets = torch.randn(12, 5).double(), torch.randint(3, (12,))
    model = nn.parallel.DistributedDataParallel(net) if parallel else net
    optimizer = KFAC.paper(model, likelihood="categorical", fisher="exact", factor_fraction=1.0, compile=False)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs[rank::world]), targets[rank::world])
        loss.backward()
        return loss

    for _ in range(7):
        optimizer.step(closure)
    damping = torch.tensor(optimizer.param_groups[0]["damping"], dtype=torch.float64)
    return {**net.state_dict(), "damping": damping}


class Experts(nn.Module):
    """The first layer, then one of two experts: that of the rank."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank, self.first = rank, nn.Linear(5, 4)
        self.experts = nn.ModuleList(nn.Linear(4, 3) for _ in range(WORLD))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.experts[self.rank](self.first(x).tanh())


def train_experts(rank: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    net = Experts(rank)
    model = nn.parallel.DistributedDataParallel(net, find_unused_parameters=True)
    optimizer = KFAC(model, likelihood="categorical", damping=1e-2, compile=False)
    for _ in range(STEPS):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(torch.randn(6, 5)), torch.randint(3, (6,))).backward()
        optimizer.step()
    blocks = {name for name, block in optimizer.coverage().items() if block != "fallback"}
    assert blocks == {"first.weight", "first.bias"}  # no other weight was seen by all ranks
    return net.state_dict()


def worker(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    torch.save(train(rank, WORLD, parallel=True), f"{folder}/{rank}.pt")
    torch.save(train_adaptively(rank, WORLD, parallel=True), f"{folder}/adaptive{rank}.pt")
    torch.save(train_experts(rank), f"{folder}/experts{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_equal_one_process(tmp_path: Path) -> None:
    ranks = [subprocess.Popen([sys.executable, __file__, str(rank), str(tmp_path)]) for rank in range(WORLD)]
    assert [rank.wait(timeout=120) for rank in ranks] == [0] * WORLD
    for stem, alone, tolerance in (
        ("", train(0, 1, parallel=False), 1e-10),
        ("adaptive", train_adaptively(0, 1, parallel=False), 1e-6),
    ):
        for rank in range(WORLD):
            together = torch.load(tmp_path / f"{stem}{rank}.pt", weights_only=True)
            for name, expected in alone.items():
                torch.testing.assert_close(together[name], expected, rtol=tolerance, atol=tolerance / 100)
    # Ranks that see other weights each: what only one saw falls back, and the ranks stay together.
    experts = [torch.load(tmp_path / f"experts{rank}.pt", weights_only=True) for rank in range(WORLD)]
    torch.testing.assert_close(experts[1], experts[0], rtol=0, atol=0)


if __name__ == "__main__":
    worker(int(sys.argv[1]), sys.argv[2])
