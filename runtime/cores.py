"""On how many cores torch computes in a thread: on one, wherever parties work.

torch's own threads spin while they wait for one another: beside the parties they cost milliseconds. And they do not
survive a fork: the thread that goes on in the child would wait for them for ever, or crash.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
from threadpoolctl import ThreadpoolController

from tacit.runtime.forks import in_child


@cache
def _setter() -> Callable[[int], None]:
    """Sets the number for the calling thread alone.

    torch.set_num_threads sets it for all threads that start later, too: they would keep whatever some other thread
    had set for a moment. OpenMP's own call does not; which library torch uses is found by trying.
    """
    before = torch.get_num_threads()
    for library in ThreadpoolController().lib_controllers:
        if library.user_api != "openmp":
            continue
        library.set_num_threads(before + 1)
        found = torch.get_num_threads() == before + 1
        library.set_num_threads(before)
        if found:
            setter: Callable[[int], None] = library.set_num_threads
            return setter
    return torch.set_num_threads


def take_one_core() -> None:
    """From now on, in this thread."""
    torch.get_num_threads()  # torch takes a thread's setting from its own the first time that it is asked in one
    _setter()(1)


@cache
def survive_forks() -> None:
    """In a forked process, the thread that was forked computes on one core from then on; others are not concerned."""
    in_child(take_one_core)


@contextmanager
def on_one_core() -> Iterator[None]:
    before, setter = torch.get_num_threads(), _setter()
    setter(1)
    try:
        yield
    finally:
        setter(before)
