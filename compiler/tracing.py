"""While PyTorch traces a model: one trace at a time, without a word on stderr."""

from __future__ import annotations

import io
import logging
import os
import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from functools import wraps
from typing import ParamSpec, TextIO, TypeVar

from tacit.progress import log
from tacit.runtime.forks import in_child

_T = TypeVar("_T")
_P = ParamSpec("_P")
# Fractions in a text that PyTorch or a user's code wrote may be weights.
FRACTIONS = re.compile(r"[-+]?\d*\.\d[\d.]*(?:e[-+]?\d+)?|\b\d+e[-+]?\d+")

_exporting = threading.RLock()


def _renew_lock() -> None:
    """In a forked process: a lock that another thread held is held for ever."""
    global _exporting
    _exporting = threading.RLock()


in_child(_renew_lock)


def one_at_a_time(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """torch.export changes PyTorch for all threads while it runs; so do filters of warnings and of logs."""

    @wraps(function)
    def alone(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        with _exporting:
            return function(*args, **kwargs)

    return alone


class _Ours(logging.Handler):
    """What PyTorch logs goes to our log, for those who ask for it: TACIT_LOG=DEBUG."""

    def emit(self, record: logging.LogRecord) -> None:
        tell(record.getMessage())


def tell(text: str) -> None:
    """A text of PyTorch's, for the log, without numbers that may be weights."""
    if log.isEnabledFor(logging.DEBUG):
        log.debug("torch says: %s", FRACTIONS.sub("#", text))


@contextmanager
def quiet() -> Iterator[None]:
    """What PyTorch warns of and logs while it traces is nothing that a user of the compiler can act on.

    Where TORCH_LOGS asks PyTorch for its logs, they are left alone. It asks whether stdout is a terminal, which a
    closed file does not answer: nobody reads that one in any case.
    """
    closed = getattr(sys.stdout, "closed", False)
    asked = "TORCH_LOGS" in os.environ
    loggers = [] if asked else [logger for logger in _torch_loggers() if logger.handlers]
    before = [(logger, logger.handlers) for logger in loggers]
    for logger in loggers:
        logger.handlers = [_Ours()]
    try:
        with warnings.catch_warnings(), redirect_stdout(None) if closed else nullcontext():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, handlers in before:
            logger.handlers = handlers


class _Held(io.TextIOBase):
    """A stderr that keeps what this thread writes, and passes on what others do."""

    def __init__(self, below: TextIO | None) -> None:
        self.below, self.text = below, ""
        self._thread = threading.get_ident()

    def write(self, text: str) -> int:
        if threading.get_ident() == self._thread:
            self.text += text
        elif self.below is not None:
            self.below.write(text)
        return len(text)


@contextmanager
def hushed() -> Iterator[None]:
    """What is printed on stderr goes to our log where the block fails: PyTorch then prints the graph that it has."""
    held = _Held(sys.stderr)
    sys.stderr = held
    try:
        yield
    except BaseException:
        tell(held.text)
        held.text = ""
        raise
    finally:
        sys.stderr = held.below
        if held.text and held.below is not None:
            with suppress(OSError, ValueError):  # a terminal that is gone, a closed file
                held.below.write(held.text)


def _torch_loggers() -> Iterator[logging.Logger]:
    for name, logger in list(logging.Logger.manager.loggerDict.items()):
        if name.partition(".")[0] == "torch" and isinstance(logger, logging.Logger):
            yield logger


@contextmanager
def listening(name: str, hear: Callable[[str], None]) -> Iterator[None]:
    """What a logger of PyTorch's says at level INFO and above goes to `hear` alone."""

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            hear(record.getMessage())

    logger = logging.getLogger(name)
    level, propagate, handlers = logger.level, logger.propagate, logger.handlers
    logger.setLevel(logging.INFO)
    logger.propagate, logger.handlers = False, [Listener()]
    try:
        yield
    finally:
        logger.setLevel(level)  # not the attribute: loggers remember which levels are enabled
        logger.propagate, logger.handlers = propagate, handlers
