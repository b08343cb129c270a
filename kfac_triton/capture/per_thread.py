"""A function of torch that single threads replace, while the others call what was there."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any


class PerThread:
    """A function of torch that single threads replace; the others call the original.

    The attribute of `owner` is exchanged while some thread is inside `replaced_by`, and only then.
    """

    def __init__(self, owner: Any, name: str) -> None:
        self._owner, self._name = owner, name
        self._lock, self._inside = threading.Lock(), 0
        self._thread = threading.local()
        self._original: Any = None
        self._installed: Any = None

    def replaced_by(self, replacement: Callable[..., Any]) -> AbstractContextManager[None]:
        """In here, in this thread, calls go to `replacement(original, *args, **kwargs)`."""
        return _Replacement(self, replacement)

    def enter(self, replacement: Callable[..., Any]) -> None:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._before = vars(self._owner).get(self._name)
                original = getattr(self._owner, self._name)
                if self._installed is None or original != self._original:
                    self._original, self._installed = original, self._dispatching(original)
                setattr(self._owner, self._name, self._installed)
        self._thread.__dict__.setdefault("stack", []).append(replacement)

    def leave(self) -> None:
        self._thread.__dict__["stack"].pop()
        with self._lock:
            self._inside -= 1
            if self._inside == 0 and vars(self._owner).get(self._name) is self._installed:
                if self._before is None:  # the attribute is inherited
                    delattr(self._owner, self._name)
                else:
                    setattr(self._owner, self._name, self._before)

    def _dispatching(self, original: Callable[..., Any]) -> Any:
        @functools.wraps(original)
        def dispatch(*args: Any, **kwargs: Any) -> Any:
            stack = self._thread.__dict__.get("stack")
            return stack[-1](original, *args, **kwargs) if stack else original(*args, **kwargs)

        inherited_by_class = isinstance(self._owner, type) and hasattr(original, "__self__")
        return staticmethod(dispatch) if inherited_by_class else dispatch


class _Replacement:
    """What `PerThread.replaced_by` returns; a generator would be twice as many Python calls in every pass."""

    def __init__(self, place: PerThread, replacement: Callable[..., Any]) -> None:
        self._place, self._replacement = place, replacement

    def __enter__(self) -> None:
        self._place.enter(self._replacement)

    def __exit__(self, *error: object) -> None:
        self._place.leave()
