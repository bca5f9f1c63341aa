"""Ends: of the interpreter while calls go on, of commands by signals, of the streams that are written to."""

from __future__ import annotations

import io
import logging
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tacit
from tacit import progress
from tacit.runtime import crew

_SECONDS = 120
HEAD = """
import atexit, sys, threading, time, torch, tacit
from concurrent.futures import ThreadPoolExecutor
from torch import nn

torch.manual_seed(0)
conv = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
x = torch.rand(100, 3, 12, 12)
secure = tacit.compile(conv, x[:2], input_range=(0, 1), frac_bits=10)


def right(one, batch):
    assert (one(x[:batch]) - conv(x[:batch])).abs().max() < 0.1
    return batch
"""
DAEMONS = """
def again(work):
    while True:
        try:
            work()
        except BaseException:
            pass

for work in (
    lambda: secure(x),  # in threads
    lambda: secure(x[:1]),  # by turns
    lambda: list(secure.stream([x[:1], x] * 3)),
    lambda: tacit.compile(conv, x[:2]),
    lambda: secure.check(x[:20]),
):
    threading.Thread(target=again, args=(work,), daemon=True).start()
time.sleep(1)
"""
LATE = r"""
def report(*what):
    sys.stdout.write(" ".join(map(str, what)) + "\n")  # in one piece
    sys.stdout.flush()

def at_the_end():
    report("handler", right(secure, 1), right(secure, 100), right(tacit.Secure(secure.plan, secure.weights), 100))
    report("stream", len(list(secure.stream([x[:1], x, x]))))

atexit.register(at_the_end)
pool = ThreadPoolExecutor(1)
pool.submit(lambda: (time.sleep(0.3), report("pool", right(secure, 100))))
threading.Thread(target=lambda: (time.sleep(0.3), report("thread", right(secure, 100)))).start()
for answer in secure.stream([x[:1]] * 3):
    sys.exit(3)
"""


def run(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", HEAD + script], capture_output=True, text=True, timeout=_SECONDS)


def test_daemon_threads_in_calls_do_not_abort_the_end() -> None:
    ended = run(DAEMONS)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


def test_late_calls_are_answered() -> None:
    """Of threads that the interpreter waits for, of pools, of exit handlers."""
    ended = run(LATE)
    assert ended.stderr == "" and ended.returncode == 3
    assert set(ended.stdout.splitlines()) == {"handler 1 100 100", "stream 3", "pool 100", "thread 100"}


def test_without_threads_the_parties_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system gives no more, or the interpreter ends."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 10)).eval()
    x = torch.rand(400, 784)
    secure = tacit.compile(model, x[:3], input_range=(0, 1))
    start, given = threading.Thread.start, 2  # one less than a crew needs

    def refuse(thread: threading.Thread) -> None:
        nonlocal given
        if given == 0:
            raise RuntimeError("can't start new thread")
        given -= 1
        start(thread)

    monkeypatch.setattr(crew.threading.Thread, "start", refuse)
    for answer in (secure(x), secure.check(x), next(iter(secure.stream([x])))):
        assert (answer - model(x)).abs().max() < 2**-6
    assert not secure.session()._idle[0].has_threads


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_commands_obey_signals(tmp_path: Path, number: int, code: int) -> None:
    """Also while the model's own code runs; without a traceback or a file."""
    source = "import time\ntry:\n    print('there', flush=True)\n    time.sleep(600)\nfinally:\n    print('undone')\n"
    (tmp_path / "sleeps.py").write_text(source)
    command = ["compile", str(tmp_path / "sleeps.py:f"), "--example", "1x6", "-o", str(tmp_path / "o")]
    with subprocess.Popen(
        [sys.executable, "-c", "from tacit.cli import main; main()", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as started:
        assert started.stdout is not None and started.stdout.readline() == "there\n"
        started.send_signal(number)
        out, err = started.communicate(timeout=_SECONDS)
    assert (started.returncode, out, err) == (code, "undone\n", "tacit: interrupted\n")
    assert [path.name for path in tmp_path.iterdir() if path.name != "__pycache__"] == ["sleeps.py"]


# --- streams ---


class Redirect:
    """What some applications put in the place of stderr."""

    def write(self, text: str) -> int:
        return len(text)


class Gone(Redirect):
    """A terminal that has been closed."""

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        raise OSError(5, "Input/output error")

    def flush(self) -> None:
        raise OSError(5, "Input/output error")


def closed() -> io.StringIO:
    stream = io.StringIO()
    stream.close()
    return stream


@pytest.mark.parametrize("stream", [None, Redirect(), Gone(), closed()], ids=["none", "redirect", "gone", "closed"])
def test_streams_that_cannot_be_written_to(stream: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_PATIENCE", 0.0)
    monkeypatch.setenv("TACIT_LOG", "DEBUG")
    before = list(progress.log.handlers), progress.log.level
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(sys, "stdout", stream)
    try:
        progress.configure_log()
        torch.manual_seed(0)
        model, x = nn.Linear(6, 3).eval(), torch.rand(2, 6)
        secure = tacit.compile(model, x)
        secure.save(tmp_path / "m")
        secure = tacit.load(tmp_path / "m")
        answers = [secure(x), secure.check(x), *secure.stream([x])]
        secure.trace(x, tmp_path / "t.json")
        with progress.waiting("long enough to be shown"):
            progress.log.warning("told to nobody")
            os.sched_yield()
    finally:
        progress.log.handlers[:], progress.log.level = before
        logging.Logger.manager._clear_cache()  # type: ignore[attr-defined]
    assert all((answer - model(x)).abs().max() < 2**-6 for answer in answers)
