"""What a forked process has to do before anything else: let go of what it may not share with the process it came from.

A fork copies keys, counters and the state of connections, and locks that other threads hold at that moment, which
nobody in the child will ever release.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from types import MethodType

_renewals: list[Callable[[], Callable[[], None] | None]] = []


def in_child(renew: Callable[[], None]) -> None:
    """Call this in every process that is forked from now on; a method, as long as its object lives."""
    _renewals.append(weakref.WeakMethod(renew) if isinstance(renew, MethodType) else lambda: renew)


def _renew() -> None:
    alive = [(kept, renew) for kept in _renewals if (renew := kept()) is not None]
    _renewals[:] = [kept for kept, _ in alive]
    for _, renew in alive:
        renew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)
