"""Numbers that the host reads later than a device writes them, so that it does not wait for what comes after."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class LateRead:
    """A copy of a tensor on its way to the host, in pinned memory where it comes from a GPU."""

    def __init__(self, t: Tensor) -> None:
        self._event: Any = None
        if t.is_cuda:
            self._host = torch.empty(t.shape, dtype=t.dtype, pin_memory=True)
            self._host.copy_(t, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._host = t.clone()

    def values(self) -> Any:
        """The numbers as Python's, when all that the device did until the copy is done."""
        if self._event is not None:
            self._event.synchronize()
        return self._host.tolist()
