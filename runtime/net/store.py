"""What a party keeps on disk: its shares of the weights, the session's keys, dealt material, and the ledger.

    STATE/model/        plan.txt, model.json, shares.safetensors (P0, P1)
    STATE/session/      session.json (nonce, keys), opened.safetensors (P0, P1), reserved (P0), material/ID-BATCH
    STATE/ledger        one line for each batch consumed: session nonce, batch id, what for

Files have mode 0600 in folders of mode 0700 and are not encrypted beyond that: a key for them would lie beside them.
Material is seeds plus corrections: the keys of the session, and what P2 sent. Whoever reads P0's and P1's folders
together knows everything; whoever reads one of them learns no more than that party.

A batch is written to the ledger, and the disk has it, before anything of its material is used. A crash can lose
material (written down, not used), never use it twice.
"""

from __future__ import annotations

import bisect
import fcntl
import hashlib
import json
import os
import shutil
import struct
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from tacit.ir.errors import DeploymentError, PlanError, ProtocolError
from tacit.ir.plan import Plan
from tacit.runtime.net.flow import Payload

Tensor = torch.Tensor
_RESERVE = 256  # batch ids that P0 reserves at a time: at most that many are skipped by a restart


@dataclass(frozen=True)
class Model:
    """A pushed model: its plan, and at P0 and P1 shares of its weights by label."""

    push: str
    plan: Plan
    shares: Mapping[str, Tensor]


@dataclass(frozen=True)
class SessionRecord:
    """What makes a session: its nonce, the model it is for, this party's keys by peer, the opened masked weights."""

    nonce: str
    push: str
    keys: Mapping[int, bytes]
    opened: Mapping[str, Tensor]


_LEDGER_STEP = 1 << 16  # bytes by which its file grows


class Ids:
    """A set of batch ids as disjoint intervals: of a constant size, as they are used in nearly ascending order."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []  # inclusive

    def add(self, value: int) -> bool:
        """Whether it was not there before."""
        i = bisect.bisect_right(self._starts, value)
        if i and value <= self._ends[i - 1]:
            return False
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
        self._writing = False
        self._broken = ""
        self._used: dict[str, Ids] = {}
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        self._load()

    def _load(self) -> None:
        raw = self._path.read_bytes().rstrip(b"\0")
        # A line cut short was never followed by a use.
        self._end = self._length = raw.rfind(b"\n") + 1
        os.ftruncate(self._file, self._end)
        for line in raw[: self._end].decode().splitlines():
            if "\0" in line:
                continue  # the disk had a write in part when the machine stopped: nobody was told that it has it
            nonce, batch_id, *_ = line.split()
            if not self._used.setdefault(nonce, Ids()).add(int(batch_id)):
                raise ProtocolError(f"{self._path} holds batch {batch_id} of session {nonce[:8]} twice")

    def consume(self, nonce: str, batch_id: int, label: str) -> None:
        """Mark a batch consumed, durably; raises ProtocolError if it was before."""
        with self._lock:
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
        with suppress(OSError):
            os.ftruncate(self._file, self._end)
        os.close(self._file)


class Store:
    """The folder of one party, locked while it runs; raises DeploymentError if another process has it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)
        self._lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise DeploymentError(f"{folder} belongs to a party that is running") from None
        self.ledger = Ledger(folder / "ledger")

    def close(self) -> None:
        if self._lock >= 0:
            self.ledger.close()
            os.close(self._lock)
            self._lock = -1

    # --- the model ---

    def save_model(self, model: Model) -> None:
        target = self._fresh("model.new")
        _write(target / "plan.txt", str(model.plan).encode())
        _write(target / "shares.safetensors", save_tensors({k: v.contiguous() for k, v in model.shares.items()}))
        _write(target / "model.json", json.dumps({"push": model.push, "plan": model.plan.digest}).encode())
        self._replace(target, "model")

    def load_model(self) -> Model | None:
        """Nothing where there is no model, or one that is damaged: it is then pushed anew."""
        place = self.folder / "model"
        try:
            found = json.loads((place / "model.json").read_bytes())
            plan = Plan.parse((place / "plan.txt").read_text()).verify()
            shares = load_tensors((place / "shares.safetensors").read_bytes())
            return Model(str(found["push"]), plan, shares) if found["plan"] == plan.digest else None
        except (OSError, ValueError, KeyError, PlanError, SafetensorError):
            return None

    # --- the session ---

    def save_session(self, session: SessionRecord) -> None:
        target = self._fresh("session.new")
        (target / "material").mkdir(mode=0o700)
        keys = {str(peer): key.hex() for peer, key in session.keys.items()}
        _write(target / "opened.safetensors", save_tensors({k: v.contiguous() for k, v in session.opened.items()}))
        _write(
            target / "session.json",
            json.dumps({"nonce": session.nonce, "push": session.push, "keys": keys}).encode(),
        )
        self._replace(target, "session")

    def load_session(self) -> SessionRecord | None:
        place = self.folder / "session"
        try:
            found = json.loads((place / "session.json").read_bytes())
            keys = {int(peer): bytes.fromhex(key) for peer, key in found["keys"].items()}
            opened = load_tensors((place / "opened.safetensors").read_bytes())
            return SessionRecord(str(found["nonce"]), str(found["push"]), keys, opened)
        except (OSError, ValueError, KeyError, SafetensorError):
            return None

    def reserve(self, beyond: int) -> int:
        """Durably reserve batch ids at P0: all below the returned bound are its to give out."""
        bound = beyond + _RESERVE
        _write(self.folder / "session" / "reserved", str(bound).encode())
        return bound

    def reserved(self) -> int:
        try:
            return int((self.folder / "session" / "reserved").read_text())
        except (OSError, ValueError):
            return 1

    # --- material ---

    def put_material(self, batch_id: int, batch: int, messages: Mapping[int, list[Payload]]) -> int:
        """Keep what P2 sent for a batch; returns the bytes of the file."""
        raw = _pack(messages)
        _write(self._material(batch_id, batch), raw)
        return len(raw)

    def take_material(self, batch_id: int, batch: int) -> dict[int, list[Payload]]:
        """Read it and remove it; raises ProtocolError where it is lost or damaged."""
        path = self._material(batch_id, batch)
        try:
            raw = path.read_bytes()
            path.unlink()
        except OSError:
            raise ProtocolError(f"the material of batch {batch_id} is lost") from None
        return _unpack(raw, batch_id)

    def stock(self) -> dict[int, tuple[int, int]]:
        """What lies in the store, by batch id: elements, bytes on disk."""
        out = {}
        for path in (self.folder / "session" / "material").glob("*-*"):
            batch_id, _, batch = path.name.partition("-")
            if batch_id.isdigit() and batch.isdigit():
                out[int(batch_id)] = int(batch), path.stat().st_size
        return out

    def drop_material(self, batch_id: int, batch: int) -> None:
        self._material(batch_id, batch).unlink(missing_ok=True)

    def _material(self, batch_id: int, batch: int) -> Path:
        return self.folder / "session" / "material" / f"{batch_id}-{batch}"

    # --- files ---

    def _fresh(self, name: str) -> Path:
        target = self.folder / name
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(mode=0o700)
        return target

    def _replace(self, made: Path, name: str) -> None:
        """Put a finished folder in the place of the old one; a crash leaves either of them, or none."""
        old = self.folder / f"{name}.old"
        shutil.rmtree(old, ignore_errors=True)
        if (self.folder / name).exists():
            (self.folder / name).rename(old)
        made.rename(self.folder / name)
        _sync_folder(self.folder)
        shutil.rmtree(old, ignore_errors=True)


def _write(path: Path, raw: bytes) -> None:
    """In one step, on disk when it returns, for nobody but the owner of the process to read."""
    temporary = path.with_name(path.name + ".new")
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as out:
        out.write(raw)
        out.flush()
        os.fdatasync(out.fileno())
    os.replace(temporary, path)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


_MESSAGE = struct.Struct("!BQ")


def _pack(messages: Mapping[int, list[Payload]]) -> bytes:
    parts: list[bytes] = []
    for source, found in messages.items():
        for payload in found:
            parts += [_MESSAGE.pack(source, payload.size), payload.tobytes()]
    content = b"".join(parts)
    return hashlib.sha256(content).digest() + content


def _unpack(raw: bytes, batch_id: int) -> dict[int, list[Payload]]:
    content, out, offset = memoryview(raw)[32:], dict[int, list[Any]](), 0
    if hashlib.sha256(content).digest() != raw[:32]:
        raise ProtocolError(f"the material of batch {batch_id} is damaged")
    while offset < len(content):
        source, size = _MESSAGE.unpack_from(content, offset)
        offset += _MESSAGE.size
        out.setdefault(source, []).append(np.frombuffer(content[offset : offset + size], np.uint8).copy())
        offset += size
    return out
