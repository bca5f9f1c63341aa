"""What happens to calls in daemon threads when the interpreter ends: they stop, and do not return.

Python ends a daemon thread at the moment at which it next wants the interpreter. In the middle of PyTorch's native code
that aborts the whole process. So before it comes to that, an exception is raised in every thread that is in a call of
ours; on its way out it wakes whoever waits for that thread, and then the thread waits for ever.
"""

from __future__ import annotations

import atexit
import ctypes
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import ParamSpec, TypeVar

from tacit.runtime.forks import in_child

_P = ParamSpec("_P")
_T = TypeVar("_T")
_PATIENCE, _AGAIN, _POLL = 2.0, 0.25, 0.002  # seconds
_GRACE = 0.05  # for threads that are about to call again: of what they do in between we know nothing

_depth: dict[int, int] = {}  # of calls, by thread
_callers: set[int] = set()  # threads that have called, for the grace
_leaver: int | None = None  # the thread that ends the interpreter: what it calls in exit handlers is still answered
_lock = threading.Lock()


class Leaving(SystemExit):
    """The interpreter ends. Python says nothing of a thread that ends so."""


@contextmanager
def in_call(*, caller: bool = True) -> Iterator[None]:
    """A call that is stopped when the interpreter ends, unless that waits for this thread; may be nested.

    `caller`: whether the thread may come back with another one of its own accord.
    """
    me = threading.get_ident()
    _park_if_leaving(me)
    with _lock:
        _depth[me] = _depth.get(me, 0) + 1
        if caller:
            _callers.add(me)
    try:
        yield
    finally:
        with _lock:
            _depth[me] -= 1
            last = not _depth[me]
            if last:
                del _depth[me]
        if last:
            _park_if_leaving(me)


def stops_at_exit(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """`in_call`, around a function."""

    @wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        with in_call():
            return function(*args, **kwargs)

    return call


def each(items: Iterator[_T]) -> Iterator[_T]:
    """The items; getting one is a call, what is done with it is not."""
    while True:
        with in_call():
            try:
                item = next(items)
            except StopIteration:
                return
        yield item


def _park_if_leaving(me: int) -> None:
    while _leaver not in (None, me):
        _callers.discard(me)
        try:
            threading.Event().wait()
        except BaseException:  # that of `_leave`, which came late
            continue


def _leave() -> None:
    """Stop all calls of other threads; for the exit handlers of Python, which come after its waiting for threads."""
    global _leaver
    me = _leaver = threading.get_ident()
    tell = sys.unraisablehook
    sys.unraisablehook = lambda told: None if told.exc_type is Leaving else tell(told)  # where it could not be raised
    begin = time.monotonic()
    again = begin
    while (passed := time.monotonic() - begin) < _PATIENCE:
        with _lock:
            others = _depth.keys() - {me}
            if others and time.monotonic() >= again:  # once more, as some code swallows whatever it is
                again += _AGAIN
                for ident in others:
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(ident), ctypes.py_object(Leaving))
        alive = {thread.ident for thread in threading.enumerate()}
        if not others and (passed > _GRACE or not (_callers & alive) - {me}):
            return
        time.sleep(_POLL)


def _only_this_thread() -> None:
    """In a forked process there is no other."""
    global _lock, _leaver
    _lock, _leaver = threading.Lock(), None
    for known in (*_depth.keys() | _callers,):
        if known != threading.get_ident():
            _depth.pop(known, None)
            _callers.discard(known)


in_child(_only_this_thread)
atexit.register(_leave)
