"""Two ranks with half of the batch each take the step that one process takes with all of it.

Whose ranks share is a matter of the model: those of its DistributedDataParallel, or of a group that is named.
"""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from small import second_moment
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

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


class Caller(nn.Module):
    """A module that calls another, as a trainer's does."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


WRAPPED = ("later", "inside another", "compiled", "by hand")


def train_wrapped(rank: int, how: str) -> dict[str, torch.Tensor]:
    """As `train`, with an optimizer built before the model is wrapped, or with gradients averaged by hand."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    inputs, targets = torch.randn(12, 5).double(), torch.randint(3, (12,))
    optimizer = KFAC(
        net, likelihood="categorical", fisher="exact", lr=0.3, damping=1e-2, factor_fraction=1.0, compile=False,
        process_group=dist.group.WORLD if how == "by hand" else None,
    )  # fmt: skip
    called = {"inside another": Caller(net), "compiled": torch.compile(net, backend="eager")}.get(how, net)
    model = net if how == "by hand" else nn.parallel.DistributedDataParallel(called)
    for _ in range(STEPS):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs[rank::WORLD]), targets[rank::WORLD]).backward()
        if how == "by hand":
            for p in net.parameters():
                dist.all_reduce(p.grad)
                p.grad /= WORLD
        optimizer.step()
    return net.state_dict()


def train_alone(seed: int, form: str) -> dict[str, torch.Tensor]:
    """A model of its own; the larger the seed, the more steps."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    inputs, targets = torch.randn(12, 5), torch.randint(3, (12,))
    options = {} if form == "paper" else {"approximation": form}
    optimizer = (KFAC.paper if form == "paper" else KFAC)(net, likelihood="categorical", compile=False, **options)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(inputs), targets)
        loss.backward()
        return loss

    for _ in range(STEPS + 3 * seed):
        optimizer.step(closure)
    return net.state_dict()


ALONE = ("kronecker", "eigen", "inverse_free", "tridiagonal", "paper")


def train_sampled(rank: int, group: dist.ProcessGroup | None) -> dict[str, torch.Tensor]:
    """Sampled targets depend on the rank within the group."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    inputs, targets = torch.randn(12, 5), torch.randint(3, (12,))
    model = nn.parallel.DistributedDataParallel(net, process_group=group)
    optimizer = KFAC(model, likelihood="categorical", compile=False)
    for _ in range(STEPS):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs[rank::WORLD]), targets[rank::WORLD]).backward()
        optimizer.step()
    return net.state_dict()


def pair(rank: int, folder: str) -> None:
    """Two ranks that share, and then each alone beside the other."""
    torch.save(train(rank, WORLD, parallel=True), f"{folder}/{rank}.pt")
    torch.save(train_adaptively(rank, WORLD, parallel=True), f"{folder}/adaptive{rank}.pt")
    torch.save(train_experts(rank), f"{folder}/experts{rank}.pt")
    for how in WRAPPED:
        torch.save(train_wrapped(rank, how), f"{folder}/{how}{rank}.pt")
    torch.save(train_sampled(rank, None), f"{folder}/sampled{rank}.pt")
    for form in ALONE:
        torch.save(train_alone(rank, form), f"{folder}/{form}{rank}.pt")
    if rank == 1:
        train_alone(0, "kronecker")  # nobody answers


def three(rank: int, folder: str) -> None:
    """The first and the last of three ranks share, while the one between them trains by itself."""
    outer = dist.new_group([0, 2])
    if rank != 1:
        torch.save(train_sampled(rank // 2, outer), f"{folder}/outer{rank // 2}.pt")
        return
    torch.save(train_alone(1, "kronecker"), f"{folder}/between.pt")
    with pytest.raises(ValueError, match=r"process_group must be .*got a group that this process is not in"):
        KFAC(nn.Linear(2, 2), likelihood="categorical", process_group=outer)


def worker(scenario: str, rank: int, world: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/{scenario}", rank=rank, world_size=world)
    {"pair": pair, "three": three}[scenario](rank, folder)
    dist.destroy_process_group()


def launched(scenario: str, world: int, path: Path) -> Path:
    """Where all ranks of a scenario left what they trained."""
    arguments = [(scenario, str(rank), str(world), str(path)) for rank in range(world)]
    ranks = [subprocess.Popen([sys.executable, __file__, *given]) for given in arguments]
    assert [rank.wait(timeout=240) for rank in ranks] == [0] * world
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return launched("pair", WORLD, tmp_path_factory.mktemp("pair"))


def test_two_ranks_equal_one_process(folder: Path) -> None:
    for stem, alone, tolerance in (
        ("", train(0, 1, parallel=False), 1e-10),
        ("adaptive", train_adaptively(0, 1, parallel=False), 1e-6),
    ):
        for rank in range(WORLD):
            together = torch.load(folder / f"{stem}{rank}.pt", weights_only=True)
            for name, expected in alone.items():
                torch.testing.assert_close(together[name], expected, rtol=tolerance, atol=tolerance / 100)
    # Ranks that see other weights each: what only one saw falls back, and the ranks stay together.
    experts = [torch.load(folder / f"experts{rank}.pt", weights_only=True) for rank in range(WORLD)]
    torch.testing.assert_close(experts[1], experts[0], rtol=0, atol=0)


@pytest.mark.parametrize("how", WRAPPED)
def test_the_group_is_found_when_the_model_is_wrapped_later(folder: Path, how: str) -> None:
    """As trainers do, which build the optimizer from the bare model; or it is named."""
    alone = train(0, 1, parallel=False)
    for rank in range(WORLD):
        together = torch.load(folder / f"{how}{rank}.pt", weights_only=True)
        torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("form", ALONE)
def test_models_that_are_not_parallel_share_nothing(folder: Path, form: str) -> None:
    """Each rank's model as in a process by itself, though they take different numbers of steps side by side."""
    for rank in range(WORLD):
        beside = torch.load(folder / f"{form}{rank}.pt", weights_only=True)
        torch.testing.assert_close(beside, train_alone(rank, form), rtol=0, atol=0)


@pytest.mark.slow
def test_a_subgroup_shares_and_samples_by_the_rank_within(folder: Path, tmp_path: Path) -> None:
    """The ranks 0 and 2 of three are as 0 and 1 of two, to the bit; the one between them is as alone."""
    launched("three", 3, tmp_path)
    for rank in range(WORLD):
        pair = torch.load(folder / f"sampled{rank}.pt", weights_only=True)
        outer = torch.load(tmp_path / f"outer{rank}.pt", weights_only=True)
        torch.testing.assert_close(outer, pair, rtol=0, atol=0)
    between = torch.load(tmp_path / "between.pt", weights_only=True)
    torch.testing.assert_close(between, train_alone(1, "kronecker"), rtol=0, atol=0)


# --------------------------------------------------------------------------------------------- groups of one process


@pytest.fixture
def world() -> Iterator[dist.ProcessGroup]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("group", ["gloo", 0, nn.Linear(2, 2)])
def test_what_is_no_process_group(group: object) -> None:
    with pytest.raises(ValueError, match=r"process_group must be a torch.distributed.ProcessGroup .*got"):
        KFAC(nn.Linear(2, 2), likelihood="categorical", process_group=group)


def test_a_model_with_parts_in_two_groups_needs_a_name(world: dist.ProcessGroup) -> None:
    parallel = nn.parallel.DistributedDataParallel
    other = dist.new_group([0])
    model = nn.Sequential(parallel(nn.Linear(2, 2)), parallel(nn.Linear(2, 2), process_group=other))
    with pytest.raises(ValueError, match=r"parts in several process groups; name the one .* process_group="):
        KFAC(model, likelihood="categorical")
    KFAC(model, likelihood="categorical", process_group=other)


def test_a_copy_must_be_told_the_group_of_its_original(world: dist.ProcessGroup) -> None:
    model = nn.Linear(2, 2)
    optimizer = KFAC(model, likelihood="categorical", process_group=world, compile=False)
    twin, other = copy.deepcopy((model, optimizer))
    pickle.dumps(optimizer)
    with pytest.raises(ValueError, match=r"given a process_group; pass attach\(model, process_group=...\)"):
        other.attach(twin)
    other.attach(twin, process_group=world)
    optimizer.close()
    optimizer.attach(model)  # the same optimizer still knows


@pytest.mark.parametrize("use_orig_params", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_fully_sharded_models_are_refused(world: dist.ProcessGroup, use_orig_params: bool) -> None:
    """Whether the model, a part of it, or what is inside, and also where the model is sharded after the optimizer."""
    inner, later = nn.Linear(6, 3), nn.Linear(6, 3)
    optimizer = KFAC(later, likelihood="categorical", compile=False)
    options = {"use_orig_params": use_orig_params, "device_id": torch.device("cpu")}
    sharded = FullyShardedDataParallel(inner, **options)
    for model in (sharded, nn.Sequential(nn.Linear(6, 6), sharded), inner):
        with pytest.raises(NotImplementedError, match=r"FullyShardedDataParallel.*use DistributedDataParallel"):
            KFAC(model, likelihood="categorical", compile=False)
    wrapper = FullyShardedDataParallel(later, **options)
    nn.functional.cross_entropy(wrapper(torch.randn(4, 6)), torch.zeros(4, dtype=torch.long)).backward()
    with pytest.raises(NotImplementedError, match="FullyShardedDataParallel"):
        optimizer.step()


@pytest.mark.filterwarnings("ignore")
def test_fully_shard_is_refused(world: dist.ProcessGroup) -> None:
    model = nn.Sequential(nn.Linear(6, 3), nn.Linear(3, 3))
    fully_shard(model[1], mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(NotImplementedError, match=r"fully_shard \(1\)"):
        KFAC(model, likelihood="categorical")


def test_data_parallel_trains_the_model_inside() -> None:
    """Without several devices DataParallel calls its module; no ranks share anything."""
    torch.manual_seed(0)
    net = nn.Linear(6, 3)
    model = nn.DataParallel(net)
    optimizer = KFAC(model, likelihood="categorical", factor_fraction=1.0, compile=False)
    x = torch.randn(32, 6)
    nn.functional.cross_entropy(model(x), torch.zeros(32, dtype=torch.long)).backward()
    optimizer.step()
    torch.testing.assert_close(optimizer.factors()["weight"]["A"], second_moment(x))


if __name__ == "__main__":
    worker(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
