"""The only file that calls torch.distributed: data-parallel ranks share one set of factors.

Every rank runs its own Fisher pass on its own part of the batch. The running averages start equal and are averaged
after each update, so they stay equal, and so do the inverses that every rank computes from them.

Which ranks share is a property of the model, not of the process: those of its DistributedDataParallel, or of the group
that the user names. Without either an optimizer is alone, whatever process groups exist.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Ranks:
    """The ranks that share factors: those of a process group, or this process alone.

    `named`: the group of the user's choice. Without it the group of the model's DistributedDataParallel, which may come
    to be after the optimizer: `note` then learns it from the forward pass.

    Raises:
        ValueError: `named` is no process group or lacks this process, or the model has several groups.
    """

    def __init__(self, model: nn.Module, named: Any = None) -> None:
        self.named = checked_group(named)
        self.group: Any = self.named if named is not None else _group_of(model)
        self._wrapper: nn.Module | None = None

    def note(self, wrapper: nn.Module | None, module: nn.Module) -> None:
        """Shares with the ranks of the wrapper whose forward pass called `module`, unless the user named a group."""
        if self.named is not None or wrapper is None or wrapper is self._wrapper:
            return
        self._wrapper = wrapper
        if any(child is module for child in wrapper.modules()):
            self.group = wrapper.process_group

    @property
    def active(self) -> bool:
        """Whether there are other ranks."""
        return self.group is not None and dist.get_world_size(self.group) > 1

    @property
    def rank(self) -> int:
        """This process's rank within the group; 0 alone."""
        return dist.get_rank(self.group) if self.active else 0

    def average_(self, tensors: list[Tensor]) -> None:
        """Replaces every tensor by its mean over the ranks, which all call this with tensors of the same shapes."""
        if not self.active:
            return
        sent = [t.contiguous() for t in tensors]  # collectives take no rows that lie apart
        handles = [dist.all_reduce(t, group=self.group, async_op=True) for t in sent]
        for t, summed, handle in zip(tensors, sent, handles, strict=True):
            handle.wait()
            summed.div_(dist.get_world_size(self.group))
            if summed is not t:
                t.copy_(summed)

    def common(self, flags: list[bool], device: torch.device) -> list[bool]:
        """Which of the flags hold on all ranks; every rank calls this with as many."""
        if not self.active:
            return flags
        votes = torch.tensor(flags, device=device)
        self.all_agree_(votes)
        agreed: list[bool] = votes.tolist()
        return agreed

    def all_agree_(self, flags: Tensor) -> None:
        """Replaces every bool by whether it holds on all ranks."""
        if self.active:
            votes = flags.float()
            dist.all_reduce(votes, op=dist.ReduceOp.MIN, group=self.group)
            flags.copy_(votes > 0)


def checked_group(group: Any) -> Any:
    """The process group itself, or None.

    Raises:
        ValueError: it is no process group, or this process is not in it.
    """
    if group is None:
        return None
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        left_out = dist.is_available() and group is dist.GroupMember.NON_GROUP_MEMBER
        came = "a group that this process is not in" if left_out else repr(group)
        raise ValueError(f"process_group must be a torch.distributed.ProcessGroup of this process or None; got {came}")
    return group


def _group_of(model: nn.Module) -> Any:
    """The process group of the DistributedDataParallel around or in the model, None without one."""
    groups = [m.process_group for m in model.modules() if isinstance(m, nn.parallel.DistributedDataParallel)]
    if any(group != groups[0] for group in groups):
        raise ValueError(
            "the model has parts in several process groups; name the one whose ranks share factors with process_group="
        )
    return groups[0] if groups else None


def wrapper_in_forward() -> nn.Module | None:
    """The DistributedDataParallel whose forward pass runs now, None without one."""
    wrapper: nn.Module | None = nn.parallel.DistributedDataParallel._active_ddp_module
    return wrapper
