"""Opening a session: keys agreed pair by pair inside the TLS links, masks opened, everything on disk before it counts.

P0 draws a nonce and leads. Each pair's key comes from 32 random bytes of either side, exchanged on the link of exactly
those two: HKDF(theirs and mine, salt=nonce, info=pair, model). P2 never sees the P0-P1 link and cannot know k01.
"""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from tacit.ir.cost import P0, P1, P2, ROLES
from tacit.ir.errors import ProtocolError
from tacit.runtime.net.causes import Cause, Code, Stopped, not_connected
from tacit.runtime.net.engine import Engine, Session, tag_of
from tacit.runtime.net.flow import Flow, FlowChannel, budget, traffic
from tacit.runtime.net.frames import Fields, Phase
from tacit.runtime.net.link import Link
from tacit.runtime.net.seats import open_masks, weight_lines
from tacit.runtime.net.store import Model, SessionRecord
from tacit.runtime.prf import KEY_BYTES

CONTRIBUTION = 32


@dataclass
class _Opening:
    """A session that is being opened, at one party."""

    nonce: str
    mine: dict[int, bytes] = field(default_factory=dict)  # what this party contributes, by peer
    theirs: dict[int, bytes] = field(default_factory=dict)
    flow: Flow | None = None


def agree(low: int, high: int, low_part: bytes, high_part: bytes, nonce: str, model: Model) -> bytes:
    """The key of a pair."""
    info = f"tacit pair {ROLES[low]} {ROLES[high]} {model.push} {model.plan.digest}".encode()
    return HKDF(SHA256(), KEY_BYTES, salt=bytes.fromhex(nonce), info=info).derive(low_part + high_part)


class Opener:
    """Opens sessions with the two other parties; `lead` at P0, the other methods answer."""

    def __init__(self, engine: Engine, seconds: float) -> None:
        self._engine = engine
        self._seconds = seconds
        self._current: _Opening | None = None
        self._lock = threading.Lock()

    def lead(self) -> Session:
        """A new session; raises PartyError or RefusedError."""
        opening = self._begin(os.urandom(16).hex())
        with ThreadPoolExecutor(2) as pool:
            asked = {
                rank: pool.submit(
                    self._link(rank).call,
                    "open",
                    self._seconds,
                    session=opening.nonce,
                    push=self._model().push,
                    part=opening.mine[rank].hex(),
                )
                for rank in (P1, P2)
            }
            for rank, future in asked.items():
                opening.theirs[rank] = future.result().hexadecimal("part", CONTRIBUTION)
            done = [
                pool.submit(self._link(rank).call, "establish", self._seconds, session=opening.nonce)
                for rank in (P1, P2)
            ]
            session = self._establish(opening)
            for answer in done:
                answer.result()
        return session

    def answer_open(self, fields: Fields) -> dict[str, str]:
        """P1, P2: P0 opens a session. P1 then agrees with P2."""
        nonce, part = fields.hexadecimal("session", 16).hex(), fields.hexadecimal("part", CONTRIBUTION)
        if fields.text("push", 64) != self._model().push:
            raise Stopped(Cause(Code.OTHER_MODEL, self._engine.rank))
        opening = self._begin(nonce)
        opening.theirs[P0] = part
        if self._engine.rank == P1:
            answer = self._link(P2).call("key", self._seconds, session=nonce, part=opening.mine[P2].hex())
            opening.theirs[P2] = answer.hexadecimal("part", CONTRIBUTION)
        return {"part": opening.mine[P0].hex()}

    def answer_key(self, fields: Fields) -> dict[str, str]:
        """P2: P1 agrees on the key of the two."""
        opening = self._begin(fields.hexadecimal("session", 16).hex())
        opening.theirs[P1] = fields.hexadecimal("part", CONTRIBUTION)
        return {"part": opening.mine[P1].hex()}

    def answer_establish(self, fields: Fields) -> dict[str, str]:
        nonce, opening = fields.hexadecimal("session", 16).hex(), self._current
        if opening is None or opening.nonce != nonce:
            raise ProtocolError("that session was never opened")
        return {"session": self._establish(opening).nonce}

    def _begin(self, nonce: str) -> _Opening:
        """The opening with that nonce, made by whichever message comes first."""
        with self._lock:
            if self._current is not None and self._current.nonce == nonce:
                return self._current
            if self._current is not None and self._current.flow is not None:
                self._engine.end(self._current.flow.request)
            me = self._engine.rank
            opening = _Opening(nonce, {peer: os.urandom(CONTRIBUTION) for peer in (P0, P1, P2) if peer != me})
            book = traffic(self._model().plan, 1, session=True, only=lambda op: op != "weight")
            deadline = time.monotonic() + self._seconds
            opening.flow = Flow(tag_of(nonce), 1, budget(book, me), deadline, self._seconds)
            self._engine.adopt(opening.flow)
            self._current = opening
            return opening

    def _establish(self, opening: _Opening) -> Session:
        """The once-per-session part of the plan, then the session on disk."""
        engine, model, flow = self._engine, self._model(), opening.flow
        assert flow is not None
        me, keys = engine.rank, {}
        for peer, mine in opening.mine.items():
            theirs = opening.theirs.get(peer)
            if theirs is None:
                raise ProtocolError(f"no key was agreed with {ROLES[peer]}")
            low, high = sorted((me, peer))
            parts = (mine, theirs) if me == low else (theirs, mine)
            keys[peer] = agree(low, high, *parts, opening.nonce, model)
        if me == P2:
            keys[P2] = os.urandom(KEY_BYTES)
        try:
            online, offline = (
                FlowChannel(flow, me, phase, engine.send_to(flow)) for phase in (Phase.ONLINE, Phase.OFFLINE)
            )
            values = open_masks(model.plan, me, online, offline, keys, model.shares)
            engine.metrics.opened(online.meter, offline.meter)
        finally:
            engine.end(flow.request)
        lines = weight_lines(model.plan)
        opened = {k: v for k, v in values.items() if k not in lines and v is not None}
        record = SessionRecord(opening.nonce, model.push, keys, opened)
        engine.store.save_session(record)
        session = Session(record, model, me)
        engine.enter(session)
        self._current = None
        engine.metrics.sessions.labels("opened").inc()
        engine.log("session opened", session=session.nonce[:8], plan=model.plan.digest[:16])
        return session

    def _model(self) -> Model:
        if self._engine.model is None:
            raise Stopped(Cause(Code.NO_MODEL, self._engine.rank))
        return self._engine.model

    def _link(self, rank: int) -> Link:
        link = self._engine.links.get(rank)
        if link is None:
            raise not_connected(rank)
        return link
