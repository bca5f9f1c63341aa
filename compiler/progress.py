"""Signs of life for what takes over a second, on a terminal's stderr alone; and the package's log."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

T = TypeVar("T")
log = logging.getLogger("tacit")
_PATIENCE = 1.0
_showing = threading.Lock()  # one display at a time: what waits inside a wait is silent


@contextmanager
def waiting(label: str) -> Iterator[None]:
    """A spinner that appears after a second and is gone at the end."""
    with _display(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()) as shown:
        if shown is not None:
            shown.add_task(label)
        yield


def track(items: Iterable[T], label: str, *, total: int | None = None) -> Iterator[T]:
    """The items one by one; a bar appears as soon as they have taken a second. `total` where they have no length."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with _display(*columns) as shown:
        if shown is None:
            yield from items
            return
        task = shown.add_task(label, total=len(items) if isinstance(items, Sized) else total)
        for item in items:
            yield item
            shown.advance(task)


@contextmanager
def _display(*columns: ProgressColumn) -> Iterator[Progress | None]:
    """What is shown from a second on; None where nobody would see it, or something else is shown already."""
    if not _is_terminal(sys.stderr) or not _showing.acquire(blocking=False):
        yield None
        return
    # What is printed meanwhile goes above the display, unless it goes into a file: there it has to stay.
    shown = Progress(
        *columns,
        console=Console(file=_Screen(sys.stderr)),  # type: ignore[arg-type]
        transient=True,
        refresh_per_second=5,
        redirect_stdout=_is_terminal(sys.stdout),
    )
    turn, over = threading.Lock(), threading.Event()

    def appear() -> None:
        with turn:
            if not over.is_set():
                shown.start()

    timer = threading.Timer(_PATIENCE, appear)
    timer.daemon = True
    timer.start()
    try:
        yield shown
    finally:
        timer.cancel()
        with turn:
            over.set()
            shown.stop()
        _showing.release()


def _is_terminal(stream: Any) -> bool:
    """Whatever an application has put in its place: nothing, a closed file, an object that can only be written to."""
    try:
        return bool(stream.isatty())
    except (AttributeError, OSError, ValueError):
        return False


class _Screen:
    """A stream, but one that has gone away spoils nothing: nobody looks at it any more."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with suppress(Exception):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(Exception):
            self._stream.flush()


class _ToStderr(logging.StreamHandler[Any]):
    """To what stderr is at that moment; a record that cannot be written there is dropped, and nothing fails for it."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        pass


def configure_log() -> None:
    """TACIT_LOG=DEBUG, INFO, WARNING or ERROR sends the log of that level to stderr; otherwise applications decide."""
    log.addHandler(logging.NullHandler())
    level = os.environ.get("TACIT_LOG", "").upper()
    if not level:
        return
    handler = _ToStderr()
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    log.addHandler(handler)
    known = level in ("DEBUG", "INFO", "WARNING", "ERROR")
    log.setLevel(level if known else "INFO")
    if not known:
        log.warning("TACIT_LOG has to be DEBUG, INFO, WARNING or ERROR, not %r", level)
