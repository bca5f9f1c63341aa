"""The ledger of one party: one line for each batch consumed, on disk before anything of the batch is used.

    NONCE BATCH LABEL\n        session nonce, batch id, what for

The first line of a session is that of batch 0. A session whose first line is not there has lost its ledger, and with it
the knowledge of what was used.
"""

from __future__ import annotations

import bisect
import os
import re
import threading
from contextlib import suppress
from pathlib import Path

from tacit.ir.errors import ProtocolError
from tacit.runtime.net.files import open_file, read_file

SESSION_BATCH = 0  # the session's own part: batches of requests begin at 1
_LINE = re.compile(rb"([0-9a-f]{32}) (\d{1,10}) [\w.-]{1,64}")
_LEDGER_STEP = 1 << 16  # bytes by which its file grows


class Ids:
    """A set of batch ids as disjoint intervals: of a constant size, as they are used in nearly ascending order."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []  # inclusive
        self._count = 0

    def add(self, value: int) -> bool:
        """Whether it was not there before."""
        i = bisect.bisect_right(self._starts, value)
        if i and value <= self._ends[i - 1]:
            return False
        self._count += 1
        joins_left = i > 0 and self._ends[i - 1] == value - 1
        joins_right = i < len(self._starts) and self._starts[i] == value + 1
        if joins_left and joins_right:
            self._ends[i - 1] = self._ends.pop(i)
            self._starts.pop(i)
        elif joins_left:
            self._ends[i - 1] = value
        elif joins_right:
            self._starts[i] = value
        else:
            self._starts.insert(i, value)
            self._ends.insert(i, value)
        return True

    def __contains__(self, value: int) -> bool:
        i = bisect.bisect_right(self._starts, value)
        return i > 0 and value <= self._ends[i - 1]

    @property
    def highest(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __len__(self) -> int:
        return self._count


class Ledger:
    """Which batches were consumed. `consume` returns once the disk has it; callers side by side share one write.

    The file is longer than what it says, zeros to its end: a line that is written over them changes no length, and the
    disk has it in a fraction of the time that it takes to append one.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Condition()
        self._waiting: list[bytes] = []
        self._written = self._asked = 0
        self._writing = self._closed = False
        self._broken = ""
        self._used: dict[str, Ids] = {}
        self._file = open_file(path, os.O_RDWR | os.O_CREAT)
        try:
            self._load()
        except BaseException:
            os.close(self._file)
            raise

    def _load(self) -> None:
        """What the file says. One that says anything else is left as it is: what it held cannot be known."""
        raw = read_file(self._path).rstrip(b"\0")
        # A line cut short was never followed by a use.
        self._end = self._length = raw.rfind(b"\n") + 1
        for number, line in enumerate(raw[: self._end].split(b"\n")[:-1], 1):
            if b"\0" in line:
                continue  # the disk had a write in part when the machine stopped: nobody was told that it has it
            if (found := _LINE.fullmatch(line)) is None:
                raise ProtocolError(f"{self._path}, line {number} is damaged: it names no session and batch")
            nonce, batch_id = found[1].decode(), int(found[2])
            if not self._used.setdefault(nonce, Ids()).add(batch_id):
                raise ProtocolError(f"{self._path}, line {number} holds batch {batch_id} of session {nonce[:8]} twice")
        os.ftruncate(self._file, self._end)

    def open_session(self, nonce: str) -> None:
        """The first line of a session: batch 0, which is the session's own part. Without it the file was lost."""
        self.consume(nonce, SESSION_BATCH, "session")

    def consume(self, nonce: str, batch_id: int, label: str) -> None:
        """Mark a batch consumed, durably; raises ProtocolError if it was before."""
        with self._lock:
            if self._broken or self._closed:
                raise ProtocolError(self._broken or "the ledger was closed")
            if not self._used.setdefault(nonce, Ids()).add(batch_id):
                raise ProtocolError(f"batch {batch_id} of this session was used before")
            self._waiting.append(f"{nonce} {batch_id} {label}\n".encode())
            self._asked += 1
            ticket = self._asked
            while self._written < ticket:
                if self._broken:
                    raise ProtocolError(self._broken)
                if self._writing:
                    self._lock.wait()
                    continue
                self._flush()

    def _flush(self) -> None:
        """Called with the lock, which is given up while the disk writes."""
        lines, self._waiting = self._waiting, []
        last, self._writing = self._asked, True
        self._lock.release()
        try:
            self._write(b"".join(lines))
        except (OSError, ProtocolError) as error:  # what was written is unknown: nothing is used from here on
            self._broken = f"the ledger cannot be written ({getattr(error, 'strerror', None) or error})"
        finally:
            self._lock.acquire()
            self._written = last if not self._broken else self._written
            self._writing = False
            self._lock.notify_all()

    def _write(self, raw: bytes) -> None:
        while self._end + len(raw) > self._length:
            self._length += os.pwrite(self._file, bytes(_LEDGER_STEP), self._length)
        if os.pwrite(self._file, raw, self._end) != len(raw):
            raise ProtocolError("the ledger's disk is full")
        os.fdatasync(self._file)
        self._end += len(raw)

    def used(self, nonce: str) -> Ids:
        with self._lock:
            return self._used.setdefault(nonce, Ids())

    def close(self) -> None:
        """Nothing is consumed from here on; whoever was before that still has its line written."""
        with self._lock:
            self._closed = True
            while self._writing or (self._waiting and not self._broken):
                self._lock.wait()
            if self._file < 0:
                return
            with suppress(OSError):
                os.ftruncate(self._file, self._end)
            os.close(self._file)
            self._file = -1
