"""Going on with a session that all three have on disk: whether somebody lost what it had consumed, and what is left.

Each party consumes on its own account, so three ledgers need not be alike: where one died, or a link, it lacks
batches that were under way, and the two others have them. What can be said is this. P0 alone gives out batch ids,
each below a bound that it has on disk beforehand. So nobody has an id that is not below the bound, unless P0's folder
is older than that: P0 would give the same ids out again. And whoever has consumed fewer batches than each of the two
others, by more than may have been under way at once, counted from when they last went on together, has lost lines of
its ledger.

In both cases the session is not gone on with; a new one has other keys, so nothing of the old one can be used again.
A false alarm (a dead party was sent many short requests before it was missed) costs no more than that. Fewer lost
lines than are seen here are harmless: what P0 has given out it never gives out again, and of what is dealt ahead a
batch is left only where none of the three ledgers has it. Three folders restored to one moment cannot be told from
three that were not used since; only whoever restores them knows.
"""

from __future__ import annotations

from collections.abc import Mapping

from tacit.ir.cost import P0, P1, P2, ROLES
from tacit.ir.errors import ProtocolError
from tacit.runtime.net.causes import Cause, Code, Stopped
from tacit.runtime.net.deployment import Limits
from tacit.runtime.net.engine import Engine, Session
from tacit.runtime.net.frames import Fields
from tacit.runtime.net.link import Link
from tacit.runtime.net.stock import MAX_IDS, Stock

MAX_STOCK = 4096  # batches dealt ahead: their ids, and their sizes, fit one control frame
_MOST = 1 << 40  # bytes of one of them


def resume(engine: Engine, session: Session, links: Mapping[int, Link], limits: Limits) -> Stock:
    """P0: the batches that all three still have. Raises ProtocolError where the session has to be dropped."""
    mine, used = engine.store.stock(session.nonce), engine.store.ledger.used(session.nonce)
    ids = sorted(i for i in mine if i not in used)[:MAX_STOCK]
    answers = {rank: link.call("resume", limits.session_seconds, stock=ids) for rank, link in links.items()}
    counted = {P0: (max((used.highest, *mine)), len(used))}
    for rank, answer in answers.items():
        counted[rank] = answer.integer("highest", 0, MAX_IDS), answer.integer("consumed", 0, MAX_IDS)
    _check(engine, counted, limits.in_flight)
    stock, sizes = Stock(engine, session), {rank: _sizes(answer, len(ids)) for rank, answer in answers.items()}
    kept = {i: at_p1 for i, at_p1, at_p2 in zip(ids, sizes[P1], sizes[P2], strict=True) if at_p1 >= 0 and at_p2 >= 0}
    for batch_id, (batch, _) in mine.items():
        if batch_id in kept:
            stock.add(batch_id, batch, kept[batch_id])
        else:
            engine.store.drop_material(session.nonce, batch_id, batch)
    engine.store.note_resumed([counted[rank][1] for rank in (P0, P1, P2)])
    engine.metrics.sessions.labels("resumed").inc()
    engine.log("session resumed", session=session.nonce[:8], store=len(kept))
    return stock


def _check(engine: Engine, counted: Mapping[int, tuple[int, int]], under_way: int) -> None:
    """Whether all three have the ledgers that they had; raises ProtocolError."""
    bound, before = engine.store.reserved(), engine.store.resumed()
    for rank, (highest, _) in counted.items():
        if highest >= bound:
            raise ProtocolError(f"{ROLES[rank]} has batch {highest}, P0 has given out none from {bound} on")
    since = {rank: consumed - before[rank] for rank, (_, consumed) in counted.items()}
    for rank, count in since.items():
        least = min(others for other, others in since.items() if other != rank)
        if count < 0 or count + under_way < least:
            lost = -count if count < 0 else least - count
            raise ProtocolError(f"{ROLES[rank]} lacks {lost} consumed batches: its ledger was restored or lost")


def _sizes(answer: Fields, count: int) -> list[int]:
    found = answer.integers("sizes", -1, _MOST)
    if len(found) != count:
        raise ProtocolError("an answer for other batches than were asked for")
    return found


def resume_answer(engine: Engine, fields: Fields) -> dict[str, object]:
    """P1 and P2: what they have consumed, and the bytes of each of P0's batches that they can serve, -1 for all others.

    P1 lets go of what P0 no longer has.
    """
    session = engine.session
    if session is None:
        raise Stopped(Cause(Code.NO_SESSION, engine.rank))
    asked = fields.integers("stock", 0, MAX_IDS, MAX_STOCK)
    used, mine = engine.store.ledger.used(session.nonce), engine.store.stock(session.nonce)
    sizes = []
    for i in asked:
        there = i not in used and (engine.rank == P2 or i in mine)
        sizes.append(-1 if not there else mine[i][1] if i in mine else 0)
    kept = {i for i, size in zip(asked, sizes, strict=True) if size >= 0}
    for batch_id, (batch, _) in mine.items():
        if batch_id not in kept:
            engine.store.drop_material(session.nonce, batch_id, batch)
    return {"highest": used.highest, "consumed": len(used), "sizes": sizes}
