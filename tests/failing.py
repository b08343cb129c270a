"""Storages whose writes fail: for workers that are killed and disks that are full."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

from optuna.storages import BaseStorage

WRITES = (
    "create_new_study", "set_study_user_attr", "create_new_trial", "set_trial_param", "set_trial_state_values",
    "set_trial_intermediate_value", "set_trial_user_attr",
)  # fmt: skip


class Killed(BaseException):
    """SIGKILL: whoever was at work does nothing more."""


class Failing:
    """A storage that takes so many `writes`; the next, or all others unless `once`, raise `error`, and it is `lost`."""

    def __init__(
        self, storage: BaseStorage, writes: int, error: Callable[[], BaseException], *, once: bool = False
    ) -> None:
        self.storage, self.left, self.error, self.once, self.lost = storage, writes, error, once, False

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.storage, name)
        if name not in WRITES:
            return found

        def write(*arguments: Any, **options: Any) -> Any:
            self.left -= 1
            if self.left == -1 or (self.left < 0 and not self.once):
                self.lost = True
                raise self.error()
            return found(*arguments, **options)

        return write


def full() -> OSError:
    return OSError(errno.ENOSPC, "No space left on device")
