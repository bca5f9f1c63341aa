"""What parties send, and what their ledgers say at that moment: the oracle that nothing dealt is ever used twice.

A ledger alone cannot tell: it refuses to hold a line twice, whatever was sent. So every message between parties is
written down before it leaves, with its digest and with whether the file of the ledger has the batch by then. The
records of a party are appended to one file, over all its lives; a death loses none of them.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import threading
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from tacit.ir.cost import P2, ROLES
from tacit.runtime.net.engine import AHEAD, IDS, Engine, session_of, tag_of
from tacit.runtime.net.frames import Phase, tensor_bytes
from tacit.runtime.net.link import Link
from tacit.runtime.net.server import PartyServer

FILE = "sent.jsonl"
# To be run before the command line of a party.
WRAPPER = "import net_recorder; net_recorder.record_all()\n"


class Recorder:
    """One life of one party."""

    def __init__(self, server: PartyServer, file: Path) -> None:
        self._ledger = server.store.folder / "ledger"
        self._out = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._runs: Counter[int] = Counter()
        self._sent: Counter[tuple[Any, ...]] = Counter()
        self._on_disk: set[tuple[int, int]] = set()
        self._read = 0  # bytes of the ledger
        self._lock = threading.Lock()

    def began(self, request: int) -> None:
        """A request runs, for the first time in this life or again: its messages are counted from the first."""
        with self._lock:
            self._runs[request] += 1

    def sends(self, target: int, request: int, phase: Phase, content: bytes) -> None:
        with self._lock:
            place = (request, phase, target)
            count = self._sent[place, self._runs[request]]
            self._sent[place, self._runs[request]] += 1
            record = {
                "session": session_of(request),
                "batch": request & IDS,
                "ahead": bool(request & AHEAD),
                "phase": phase.name,
                "target": ROLES[target],
                "message": count,
                "digest": hashlib.sha256(content).hexdigest()[:16],
                "on_disk": self._known(session_of(request), request & IDS),
            }
            os.write(self._out, json.dumps(record).encode() + b"\n")

    def _known(self, session: int, batch: int) -> bool:
        if (session, batch) not in self._on_disk:
            with self._ledger.open("rb") as ledger:
                ledger.seek(self._read)
                lines = ledger.read().split(b"\n")[:-1]  # what comes after the last end of a line is none yet
            self._read += sum(len(line) + 1 for line in lines)
            for nonce, number, *_ in (line.split() for line in lines if b"\0" not in line):
                self._on_disk.add((tag_of(nonce.decode()), int(number)))
        return (session, batch) in self._on_disk


_recorders: WeakKeyDictionary[Any, Recorder] = WeakKeyDictionary()
_installed = itertools.count()


def watch(server: PartyServer, file: Path) -> None:
    """Record what one party of this process sends."""
    _recorders[server] = _recorders[server.engine] = Recorder(server, file)
    if next(_installed):
        return
    send, start = Link.send, Engine.start

    def recorded_send(self: Link, request: int, phase: Phase, depth: int, message: Any) -> None:
        found = _recorders.get(self._handler)
        if found is not None and self.role <= P2:
            found.sends(self.role, request, phase, b"".join(tensor_bytes(message)))
        send(self, request, phase, depth, message)

    def recorded_start(self: Engine, job: Any) -> Any:
        found = _recorders.get(self)
        if found is not None:
            found.began(job.request)
        return start(self, job)

    Link.send, Engine.start = recorded_send, recorded_start


def record_all() -> None:
    """Record every party that this process makes, beside its folder of state."""
    made = PartyServer.__init__

    def init(self: PartyServer, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        watch(self, self.store.folder.parent / FILE)

    PartyServer.__init__ = init


def assert_used_once(role: str, file: Path) -> int:
    """(a) No message of a batch went out with two contents; (b) its line was on disk first. Returns the requests seen.

    A batch dealt ahead has no line yet, and batch 0 is the opening of the session: these fall under (a) alone.
    """
    contents: dict[tuple[Any, ...], set[str]] = defaultdict(set)
    requests = set()
    for record in map(json.loads, file.read_text().splitlines()):
        batch = (record["session"], record["batch"])
        place = (*batch, record["ahead"], record["phase"], record["target"], record["message"])
        contents[place].add(record["digest"])
        if record["batch"] and not record["ahead"]:
            requests.add(batch)
            assert record["on_disk"], f"{role} sent before its ledger had the batch: {record}"
    for place, digests in contents.items():
        assert len(digests) == 1, f"{role} sent different contents under the same batch: {place}"
    return len(requests)
