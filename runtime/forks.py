"""What a forked process has to do before anything else: let go of what it may not share with the process it came from.

A fork copies keys, counters and the state of connections, and locks that other threads hold at that moment, which
nobody in the child will ever release.
"""

from __future__ import annotations

import itertools
import os
import weakref
from collections.abc import Callable
from types import MethodType

_renewals: dict[int, Callable[[], Callable[[], None] | None]] = {}
_numbers = itertools.count()


def in_child(renew: Callable[[], None]) -> None:
    """Call this in every process that is forked from now on; a method, as long as its object lives."""
    number = next(_numbers)
    if isinstance(renew, MethodType):
        _renewals[number] = weakref.WeakMethod(renew, lambda _: _renewals.pop(number, None))
    else:
        _renewals[number] = lambda: renew


def _renew() -> None:
    for kept in list(_renewals.values()):
        if (renew := kept()) is not None:
            renew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)
