"""One party of a peer system, as a process of its own: `python party.py PEER FOLDER RANK`.

It runs in the peer's environment, so it imports nothing of Tacit: the standard library, NumPy, and beside it the file
PEER_engine.py, which holds all there is to know about the peer. FOLDER/job.json says what to do, FOLDER/arrays.npz
has the weights and the inputs; each party writes FOLDER/RANK.json.
"""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import struct
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any, Protocol

import numpy as np

NOT_INSTALLED = 69  # the exit status EX_UNAVAILABLE
_SENT = 200  # where Linux's struct tcp_info has tcpi_bytes_sent


class Engine(Protocol):
    """One party of a peer, made from (job, arrays, rank, folder, sent_bytes); making it shares the weights."""

    version: str

    def infer(self) -> np.ndarray[Any, Any] | None:
        """One batch, from the client's floats to the classes, which the first party alone gets."""

    def rounds(self) -> int:
        """One more inference; what the peer itself counts as rounds of this party."""

    def barrier(self) -> None:
        """Wait for the other parties."""

    def sent_bytes(self) -> int | None:
        """What this party has sent so far."""

    def serve(self) -> None:
        """For a rank above the parties: deal randomness."""


def sent_bytes() -> int | None:
    """Bytes sent over this process's open TCP sockets by the kernel's count, frames included; None outside Linux."""
    if not sys.platform.startswith("linux"):
        return None
    sent: dict[str, int] = {}
    for entry in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{entry}")
            if not target.startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(entry))) as opened:
                if opened.family not in (socket.AF_INET, socket.AF_INET6) or opened.type != socket.SOCK_STREAM:
                    continue
                info = opened.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _SENT + 8)
        except OSError:  # closed meanwhile
            continue
        if len(info) < _SENT + 8:  # a kernel before 4.19
            return None
        sent[target] = struct.unpack_from("Q", info, _SENT)[0]
    return sum(sent.values())


def measure(engine: Engine, *, warm_up: int, runs: int) -> dict[str, Any]:
    """Seconds of each run after the warm-up, the parties starting together, then bytes and rounds of one more."""
    seconds = []
    for i in range(warm_up + runs):
        engine.barrier()
        begin = time.perf_counter()
        classes = engine.infer()
        if i >= warm_up:
            seconds.append(time.perf_counter() - begin)
    engine.barrier()
    before = engine.sent_bytes()
    rounds = engine.rounds()
    engine.barrier()
    after = engine.sent_bytes()
    return {
        "version": engine.version,
        "seconds": seconds,
        "bytes": None if before is None or after is None else after - before,
        "rounds": rounds,
        "classes": None if classes is None else [int(c) for c in classes.reshape(-1)],
    }


def run(peer: str, folder: Path, rank: int) -> int:
    """This party's part; returns NOT_INSTALLED, or never: the process is ended from outside.

    Nobody leaves by itself, for others may still wait for its last message, and threads of torch.distributed and brpc
    abort now and then when their links are closed in order.
    """
    if importlib.util.find_spec(peer) is None:
        return NOT_INSTALLED
    job = json.loads((folder / "job.json").read_text())
    with np.load(folder / "arrays.npz", allow_pickle=False) as opened:
        arrays = dict(opened)
    module = importlib.import_module(f"{peer}_engine")
    engine: Engine = module.Engine(job, arrays, rank, folder, sent_bytes)
    if rank < job["parties"]:
        found = measure(engine, warm_up=job["warm_up"], runs=job["runs"])
        written = folder / f"{rank}.new"
        written.write_text(json.dumps(found))
        written.rename(folder / f"{rank}.json")
    else:
        engine.serve()
    while True:
        time.sleep(3600)


def _end_with_parent() -> None:
    """The one who started this party holds the other end of its standard input, and so lives."""
    sys.stdin.buffer.read()
    os._exit(1)


def main() -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        status = run(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
    except Exception as error:
        traceback.print_exc()
        reason = (str(error).strip().splitlines() or [""])[0]
        print(f"{type(error).__name__}: {reason}", file=sys.stderr, flush=True)  # the last line: the table shows it
        status = 1
    os._exit(status)


if __name__ == "__main__":
    main()
