"""What a party keeps on disk: its shares of the weights, the session's keys, dealt material, and the ledger.

    STATE/model/        plan.txt, model.json, shares.safetensors (P0, P1)
    STATE/session/      session.json (nonce, keys), opened.safetensors (P0, P1: W - B; P2: its masks B),
                        material/NONCE-ID-BATCH (P0, P1); reserved and resumed (P0)
    STATE/ledger        one line for each batch consumed: session nonce, batch id, what for

Files have mode 0600 in folders of mode 0700 and are not encrypted beyond that: a key for them would lie beside them.
Material is seeds plus corrections: the keys of the session, and what P2 sent. Whoever reads P0's and P1's folders
together knows everything; whoever reads one of them learns no more than that party.

A batch is written to the ledger, and the disk has it, before anything of its material is used. A crash can lose
material (written down, not used), never use it twice. Files of one model or session say which they belong to: where
some of them were restored from elsewhere, the rest does not fit, and what they were of is dropped.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from tacit.ir.errors import DeploymentError, PlanError, ProtocolError
from tacit.ir.files import sync_folder
from tacit.ir.plan import Plan
from tacit.runtime.net.files import open_file, open_folder, read_file, write_file
from tacit.runtime.net.flow import Payload
from tacit.runtime.net.ledger import SESSION_BATCH, Ledger

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


class Store:
    """The folder of one party, locked while it runs; raises DeploymentError if another process or user has it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        open_folder(folder)
        self._lock = open_file(folder / "lock", os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.ledger = Ledger(folder / "ledger")
        except BlockingIOError:
            os.close(self._lock)
            raise DeploymentError(f"{folder} belongs to a party that is running") from None
        except BaseException:
            os.close(self._lock)
            raise
        sync_folder(folder)  # the ledger's name, before a line of it counts

    def close(self) -> None:
        if self._lock >= 0:
            self.ledger.close()
            os.close(self._lock)
            self._lock = -1

    # --- the model ---

    def save_model(self, model: Model) -> None:
        target = self._fresh("model.new")
        write_file(target / "plan.txt", str(model.plan).encode())
        write_file(target / "shares.safetensors", _with_tag(model.shares, model.push))
        write_file(target / "model.json", json.dumps({"push": model.push, "plan": model.plan.digest}).encode())
        self._replace(target, "model")

    def load_model(self) -> Model | None:
        """Nothing where there is no model, or one that is damaged: it is then pushed anew."""
        place = self.folder / "model"
        try:
            found = json.loads(read_file(place / "model.json"))
            plan = Plan.parse(read_file(place / "plan.txt").decode()).verify()
            shares = _of_tag(read_file(place / "shares.safetensors"), found["push"])
            return Model(str(found["push"]), plan, shares) if found["plan"] == plan.digest else None
        except (OSError, ValueError, KeyError, TypeError, PlanError, SafetensorError):
            return None

    # --- the session ---

    def save_session(self, session: SessionRecord) -> None:
        """The ledger has its first line before it counts."""
        self.ledger.open_session(session.nonce)
        target = self._fresh("session.new")
        (target / "material").mkdir(mode=0o700)
        keys = {str(peer): key.hex() for peer, key in session.keys.items()}
        write_file(target / "opened.safetensors", _with_tag(session.opened, session.nonce))
        write_file(
            target / "session.json",
            json.dumps({"nonce": session.nonce, "push": session.push, "keys": keys}).encode(),
        )
        self._replace(target, "session")

    def load_session(self) -> SessionRecord | None:
        """Nothing where there is none, or one that is damaged or whose ledger was lost: it is then renewed."""
        place = self.folder / "session"
        try:
            found = json.loads(read_file(place / "session.json"))
            keys = {int(peer): bytes.fromhex(key) for peer, key in found["keys"].items()}
            opened = _of_tag(read_file(place / "opened.safetensors"), found["nonce"])
            record = SessionRecord(str(found["nonce"]), str(found["push"]), keys, opened)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError):
            return None
        return record if SESSION_BATCH in self.ledger.used(record.nonce) else None

    def reserve(self, beyond: int) -> int:
        """Durably reserve batch ids at P0: all below the returned bound are its to give out."""
        bound = beyond + _RESERVE
        write_file(self.folder / "session" / "reserved", str(bound).encode())
        return bound

    def reserved(self) -> int:
        """The bound; 1 where nothing was reserved so far. Raises ProtocolError where the file is damaged."""
        return (self._numbers("reserved", 1) or [1])[0]

    def note_resumed(self, consumed: Sequence[int]) -> None:
        """P0: how many batches P0, P1 and P2 had consumed when they last went on with the session."""
        write_file(self.folder / "session" / "resumed", " ".join(map(str, consumed)).encode())

    def resumed(self) -> list[int]:
        """Raises ProtocolError where the file is damaged."""
        return self._numbers("resumed", 3) or [0, 0, 0]

    def _numbers(self, name: str, count: int) -> list[int]:
        path = self.folder / "session" / name
        try:
            found = read_file(path).decode("ascii", "replace").split(" ")
        except FileNotFoundError:
            return []
        if len(found) != count or not all(re.fullmatch(r"\d{1,10}", number) for number in found):
            raise ProtocolError(f"{path} is damaged")
        return [int(number) for number in found]

    # --- material; by session in its name, as a job of the one before may still be at work ---

    def put_material(self, nonce: str, batch_id: int, batch: int, messages: Mapping[int, list[Payload]]) -> int:
        """Keep what P2 sent for a batch; returns the bytes of the file. Raises ProtocolError without a session."""
        raw = _pack(messages)
        try:
            write_file(self._material(nonce, batch_id, batch), raw)
        except FileNotFoundError:
            raise ProtocolError(f"session {nonce[:8]} has ended") from None
        return len(raw)

    def take_material(self, nonce: str, batch_id: int, batch: int) -> dict[int, list[Payload]]:
        """Read it and remove it; raises ProtocolError where it is lost or damaged."""
        path = self._material(nonce, batch_id, batch)
        try:
            raw = read_file(path)
            path.unlink()
        except OSError:
            raise ProtocolError(f"the material of batch {batch_id} is lost") from None
        return _unpack(raw, batch_id)

    def stock(self, nonce: str) -> dict[int, tuple[int, int]]:
        """What lies in the store, by batch id: elements, bytes on disk."""
        out = {}
        for path in (self.folder / "session" / "material").glob(f"{nonce}-*-*"):
            batch_id, batch = path.name.split("-")[1:]
            if batch_id.isdigit() and batch.isdigit():
                out[int(batch_id)] = int(batch), path.stat().st_size
        return out

    def drop_material(self, nonce: str, batch_id: int, batch: int) -> None:
        self._material(nonce, batch_id, batch).unlink(missing_ok=True)

    def _material(self, nonce: str, batch_id: int, batch: int) -> Path:
        return self.folder / "session" / "material" / f"{nonce}-{batch_id}-{batch}"

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
        sync_folder(self.folder)
        shutil.rmtree(old, ignore_errors=True)


def _with_tag(tensors: Mapping[str, Tensor], tag: str) -> bytes:
    """Tensors that say what they belong to."""
    return save_tensors({k: v.contiguous() for k, v in tensors.items()}, {"of": tag})


def _of_tag(raw: bytes, tag: str) -> dict[str, Tensor]:
    """The tensors, if they belong there; raises SafetensorError, ValueError or KeyError."""
    found = load_tensors(raw)
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    if header["__metadata__"]["of"] != tag:
        raise ValueError("tensors of another model or session")
    return found


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
