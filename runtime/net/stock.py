"""What P0 knows of the store: which batches all three have, and which batch ids are still to be given out."""

from __future__ import annotations

import threading
from collections import deque

from tacit.ir.errors import ProtocolError
from tacit.runtime.net.engine import Engine, Session

MAX_IDS = 1 << 32


class Stock:
    """Batches dealt ahead by elements, and the batch ids of a session. The ids come from durable reservations."""

    def __init__(self, engine: Engine, session: Session) -> None:
        self._engine = engine
        self._ready: dict[int, deque[int]] = {}
        self._sizes: dict[int, int] = {}  # bytes on disk at P1, by batch id
        self._next = self._bound = max(engine.store.reserved(), engine.store.ledger.used(session.nonce).highest + 1)
        self._lock = threading.Lock()

    def new_id(self) -> int:
        with self._lock:
            if self._next + 1 >= MAX_IDS:
                raise ProtocolError("this session has used up its batches; the owner has to push again")
            if self._next >= self._bound:
                self._bound = self._engine.store.reserve(self._next)
            self._next += 1
            return self._next - 1

    def add(self, batch_id: int, batch: int, size: int) -> None:
        with self._lock:
            self._ready.setdefault(batch, deque()).append(batch_id)
            self._sizes[batch_id] = size
        self._show(batch)

    def take(self, batch: int) -> int | None:
        with self._lock:
            ready = self._ready.get(batch)
            if not ready:
                return None
            found = ready.popleft()
            self._sizes.pop(found, None)
        self._show(batch)
        return found

    def level(self, batch: int) -> int:
        return len(self._ready.get(batch, ()))

    @property
    def levels(self) -> dict[int, int]:
        return {batch: len(ready) for batch, ready in self._ready.items() if ready}

    @property
    def bytes(self) -> int:
        with self._lock:
            return sum(self._sizes.values())

    def _show(self, batch: int) -> None:
        self._engine.metrics.store.labels(str(batch)).set(self.level(batch))
