"""Processes of the command line that start in milliseconds: forked from one of theirs that has Tacit loaded.

Each is a process of its own, with its own memory and threads, and may be stopped and killed; what they are forked from
(multiprocessing's fork server) is a fresh interpreter, which runs no thread and has opened nothing.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

from tacit.cli import main

_context = get_context("forkserver")
_context.set_forkserver_preload(["forked"])


class Forked:
    """`tacit ARGUMENTS` as a process, in the manner of subprocess.Popen; `wrapper` is Python to run before it.

    What it writes to standard output is appended to the file `out`, what it writes to standard error to `err`.
    """

    def __init__(self, arguments: Sequence[object], out: Path, err: Path | None = None, wrapper: str = "") -> None:
        words = [str(argument) for argument in arguments]
        self._process = _context.Process(target=_run, args=(words, out, err or out, wrapper))
        with pytest.MonkeyPatch.context() as patch:  # the server, begun by the first of them, finds our modules
            patch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
            self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, or minus the signal that ended it; raises subprocess.TimeoutExpired."""
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("tacit", timeout or 0.0)
        return self.returncode

    def send_signal(self, number: signal.Signals) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _run(arguments: list[str], out: Path, err: Path, wrapper: str) -> None:
    for number, path in ((1, out), (2, err)):
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        os.dup2(file, number)
        os.close(file)
    torch.set_num_threads(1)
    sys.argv = ["tacit", *arguments]
    exec(wrapper, {"__name__": "__main__"})
    main()
