"""Signs of life for what takes over a second, on a terminal's stderr alone; and the package's log."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import Progress

T = TypeVar("T")
log = logging.getLogger("tacit")
_PATIENCE = 1.0
_showing = threading.Lock()  # one display at a time: what waits inside a wait is silent


@contextmanager
def waiting(label: str) -> Iterator[None]:
    """A spinner that appears after a second and is gone at the end."""
    if not sys.stderr.isatty() or not _showing.acquire(blocking=False):
        yield
        return
    status = Console(stderr=True).status(label, refresh_per_second=5)
    turn, over = threading.Lock(), threading.Event()

    def appear() -> None:
        with turn:
            if not over.is_set():
                status.start()

    timer = threading.Timer(_PATIENCE, appear)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        with turn:
            over.set()
            status.stop()
        _showing.release()


def track(items: Sequence[T], label: str) -> Iterable[T]:
    """The items one by one; a bar appears as soon as they have taken a second."""
    if not sys.stderr.isatty() or not _showing.acquire(blocking=False):
        yield from items
        return
    bar = Progress(console=Console(stderr=True), transient=True, refresh_per_second=5)
    task, begin = bar.add_task(label, total=len(items)), time.monotonic()
    try:
        for item in items:
            yield item
            bar.advance(task)
            if time.monotonic() - begin > _PATIENCE:
                bar.start()
    finally:
        bar.stop()
        _showing.release()


def configure_log() -> None:
    """TACIT_LOG=DEBUG, INFO, WARNING or ERROR sends the log of that level to stderr; otherwise applications decide."""
    log.addHandler(logging.NullHandler())
    level = os.environ.get("TACIT_LOG", "").upper()
    if not level:
        return
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    log.addHandler(handler)
    known = level in ("DEBUG", "INFO", "WARNING", "ERROR")
    log.setLevel(level if known else "INFO")
    if not known:
        log.warning("TACIT_LOG has to be DEBUG, INFO, WARNING or ERROR, not %r", level)
