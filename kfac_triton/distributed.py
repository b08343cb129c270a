"""The only file that calls torch.distributed: data-parallel ranks share one set of factors.

Every rank runs its own Fisher pass on its own part of the batch; the running averages, equal before, are averaged after
each update, so they stay equal, and so do the inverses that every rank computes from them.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def active() -> bool:
    """Whether there are other ranks."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """This process's rank; 0 alone."""
    return dist.get_rank() if active() else 0


def average_(tensors: list[Tensor]) -> None:
    """Replaces every tensor by its mean over the ranks, which must all call this with tensors of the same shapes."""
    if not active():
        return
    sent = [t.contiguous() for t in tensors]  # collectives take no rows that lie apart
    handles = [dist.all_reduce(t, async_op=True) for t in sent]
    for t, summed, handle in zip(tensors, sent, handles, strict=True):
        handle.wait()
        summed.div_(dist.get_world_size())
        if summed is not t:
            t.copy_(summed)


def common(flags: list[bool], device: torch.device) -> list[bool]:
    """Which of the flags hold on all ranks; every rank calls this with as many."""
    if not active():
        return flags
    votes = torch.tensor(flags, device=device)
    all_agree_(votes)
    agreed: list[bool] = votes.tolist()
    return agreed


def all_agree_(flags: Tensor) -> None:
    """Replaces every bool by whether it holds on all ranks."""
    if active():
        votes = flags.float()
        dist.all_reduce(votes, op=dist.ReduceOp.MIN)
        flags.copy_(votes > 0)
