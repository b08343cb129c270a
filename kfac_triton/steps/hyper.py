"""The hyper-parameters of a step by group, as numbers on the parameters' device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kfac_triton import schedules
from kfac_triton.numbers import Numbers, numbers, on_host

NAMES = ("lr", "bounded_lr", "momentum", "weight_decay", "kl_clip", "fallback_lr")


class Hyper:
    """Numbers (groups,) under each of NAMES; renewed only where a group's numbers changed, so that a step in which none
    did copies nothing to a device.

    `bounded_lr` is the lr whose step kl_clip bounds, the largest so far where kl_annealing is on. `alike`: all groups
    have the same lr, bounded_lr, momentum and kl_clip. `host`: the same as the groups hold them; `changes` counts.
    """

    lr: Numbers
    bounded_lr: Numbers
    momentum: Numbers
    weight_decay: Numbers
    kl_clip: Numbers
    fallback_lr: Numbers

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._given: list[tuple[Any, ...]] = []
        self.host: dict[str, tuple[Any, ...]] = {}
        self.changes = 0
        self.alike = self.moving = self.bounded = self.decaying = False

    def fill_(self, groups: Sequence[Mapping[str, Any]]) -> bool:
        """Takes the numbers of the groups; whether they changed."""
        given = [
            (
                group["lr"],
                schedules.larger(group["peak_lr"], group["lr"]) if group["kl_annealing"] else group["lr"],
                group["momentum"],
                group["weight_decay"],
                group["kl_clip"],
                group["fallback_ratio"],
            )
            for group in groups
        ]
        if not any(isinstance(own[0], Tensor) for own in given) and given == self._given:
            return False
        self._given = given
        self.changes += 1
        rows = [(lr, bounded, mu, eta, clip, lr * ratio) for lr, bounded, mu, eta, clip, ratio in given]
        self.host = dict(zip(NAMES, zip(*rows, strict=True), strict=True))
        for name, values in self.host.items():
            setattr(self, name, numbers(values, self._device))
        first = given[0]
        self.alike = all(_same(own[0], first[0]) and _same(own[1], first[1]) for own in given) and all(
            own[2] == first[2] and own[4] == first[4] for own in given
        )
        self.moving = any(mu != 0 for _, _, mu, *_ in given)
        self.bounded = any(clip < float("inf") for *_, clip, _ in given)
        self.decaying = any(eta != 0 for _, _, _, eta, *_ in given)
        return True

    def first(self, name: str) -> Any:
        """The number of the first group: Python's, but for one that a device holds."""
        given = self.host[name][0]
        return getattr(self, name)[0] if isinstance(given, Tensor) and not on_host(self._device) else float(given)


def _same(a: Any, b: Any) -> bool:
    """Whether two numbers are the same, without reading one from a device."""
    return a is b or (not (isinstance(a, Tensor) or isinstance(b, Tensor)) and a == b)
