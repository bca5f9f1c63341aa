"""Parties of a peer system as processes of its own environment: started, watched, and ended within a deadline."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from tacit.ir.errors import TacitError
from tacit.peers.party import NOT_INSTALLED

Array = np.ndarray[Any, Any]
PARTY = Path(__file__).with_name("party.py")
_POLL_SECONDS = 0.05
_REASON = 200  # characters of a peer's last words


class PeerError(TacitError):
    """A peer's run came to no result; the message is the reason, in one line."""


class NotInstalled(PeerError):
    """There is no such interpreter, or it has no such package."""


@dataclass(frozen=True)
class PeerRun:
    """What the parties reported: seconds of each run at the client, bytes and rounds of one batch, its classes.

    `bytes` is the sum over the parties, None where the kernel does not count; `rounds` that of the busiest party.
    """

    version: str
    seconds: tuple[float, ...]
    bytes: int | None
    rounds: int
    classes: tuple[int, ...]


def run_peer(
    python: Path, peer: str, job: Mapping[str, Any], arrays: Mapping[str, Array], *, processes: int, deadline_s: float
) -> PeerRun:
    """Run `job` among `processes` processes of `python`; raises PeerError, and leaves no process and no file behind."""
    if not os.access(python, os.X_OK):
        raise NotInstalled(f"there is no {python}")
    with tempfile.TemporaryDirectory(prefix="tacit-peers-") as name:
        folder = Path(name)  # mode 0700, and all files in it 0600
        ports = _free_ports(job["parties"])
        with _private(folder / "job.json") as out:
            out.write(json.dumps({**job, "ports": ports, "deadline_s": deadline_s}).encode())
        with _private(folder / "arrays.npz") as out:
            np.savez(out, allow_pickle=False, **arrays)
        reports = [folder / f"{rank}.json" for rank in range(job["parties"])]
        _run(python, peer, folder, processes, deadline_s, reports)
        return _collected(folder, job)


def _private(path: Path) -> IO[bytes]:
    """A new file that nobody else can read."""
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb")


def _free_ports(count: int) -> list[int]:
    """Ports that were free a moment ago; a party that finds its own taken fails, and its row says so."""
    with ExitStack() as opened:
        sockets = [opened.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _run(python: Path, peer: str, folder: Path, processes: int, deadline_s: float, reports: list[Path]) -> None:
    """Start the processes and wait for the reports; these, the first failure, and the deadline end them all."""
    end = time.monotonic() + deadline_s
    started: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(processes):
            started.append(_start(python, peer, folder, rank))
        while not all(report.exists() for report in reports):
            _require_alive(started, folder)
            if time.monotonic() > end:
                raise PeerError(f"no result within {deadline_s:g} s")
            time.sleep(_POLL_SECONDS)
    except OSError as error:
        raise PeerError(f"{python} cannot be run: {error.strerror}") from None
    finally:
        for process in started:
            _end(process)


def _start(python: Path, peer: str, folder: Path, rank: int) -> subprocess.Popen[bytes]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON") and not k.lower().endswith("_proxy")}
    with _private(folder / f"{rank}.err") as err:
        return subprocess.Popen(
            [python, PARTY, peer, folder, str(rank)],
            stdin=subprocess.PIPE,  # a party ends when this end of it is gone
            stdout=err,
            stderr=subprocess.STDOUT,
            env=kept | {"OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu", "PYTHONDONTWRITEBYTECODE": "1"},
            umask=0o077,
            start_new_session=True,
        )


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the process, and what it started if it still runs: its session is its own, its id not yet free again."""
    if process.returncode is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def _require_alive(started: list[subprocess.Popen[bytes]], folder: Path) -> None:
    """Raise for the first process that has ended: they stay until they are killed."""
    for rank, process in enumerate(started):
        code = process.poll()
        if code is None:
            continue
        if code == NOT_INSTALLED:
            raise NotInstalled("its package is not in that environment")
        words = (folder / f"{rank}.err").read_text(errors="replace").strip().splitlines()
        last = f": {words[-1].strip()[:_REASON]}" if words else ""
        raise PeerError(f"party {rank} ended with {f'signal {-code}' if code < 0 else f'status {code}'}{last}")


def _collected(folder: Path, job: Mapping[str, Any]) -> PeerRun:
    """The parties' reports as one, checked: they come from code that is not ours."""
    reports = [_report(folder / f"{rank}.json", job, rank) for rank in range(job["parties"])]
    first, counts = reports[0], [report["bytes"] for report in reports]
    return PeerRun(
        first["version"],
        tuple(first["seconds"]),
        None if None in counts else sum(counts),
        max(report["rounds"] for report in reports),
        tuple(first["classes"]),
    )


def _report(path: Path, job: Mapping[str, Any], rank: int) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
        seconds, classes, size = found["seconds"], found["classes"], found["bytes"]
        fine = (
            isinstance(found["version"], str)
            and len(seconds) == job["runs"]
            and all(isinstance(s, float) and 0 < s < float("inf") for s in seconds)
            and (size is None or _is_count(size))
            and _is_count(found["rounds"])
            and (rank > 0 or (len(classes) == job["batch"] and all(map(_is_count, classes))))
        )
    except (OSError, ValueError, KeyError, TypeError):
        fine = False
    if not fine:
        raise PeerError(f"party {rank} left no usable report")
    return dict(found)


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0
