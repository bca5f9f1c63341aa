"""A party whose folder, or some files of it, come from a backup: noticed, or harmless; never a batch used twice."""

from __future__ import annotations

import os
import shutil
from collections import defaultdict
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from net_harness import Trio, close_to, compiled, images
from safetensors.torch import save as save_tensors

from tacit.ir.cost import P0, P1, P2, ROLES
from tacit.ir.errors import DeploymentError, ProtocolError
from tacit.runtime.net import resuming
from tacit.runtime.net.deployment import Limits, StoreSettings
from tacit.runtime.net.engine import Engine
from tacit.runtime.net.frames import CONTROL_BYTES, Fields, encode
from tacit.runtime.net.metrics import Log
from tacit.runtime.net.stock import MAX_IDS
from tacit.runtime.net.store import Store

EVENTS: list[tuple[str, str, dict[str, Any]]] = []


class Used:
    """Which batches each party has gone online with, over all its lives."""

    def __init__(self) -> None:
        self.runs: dict[tuple[int, str, int], int] = defaultdict(int)

    def note(self, engine: Engine, request: int) -> None:
        assert engine.session is not None
        self.runs[engine.rank, engine.session.nonce, request & ((1 << 32) - 1)] += 1

    def twice(self) -> list[tuple[int, str, int]]:
        return [key for key, count in self.runs.items() if count > 1]


@pytest.fixture(scope="module")
def used() -> Iterator[Used]:
    """Seen where material is taken: no ledger is asked."""
    found, material, log = Used(), Engine._material, Log.__call__

    def taken(engine: Engine, job: Any, *rest: Any) -> Any:
        found.note(engine, job.request)
        return material(engine, job, *rest)

    def logged(self: Log, event: str, **fields: Any) -> None:
        EVENTS.append((self._role, event, fields))
        log(self, event, **fields)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "_material", taken)
        patch.setattr(Log, "__call__", logged)
        yield found


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, used: Used) -> Iterator[Trio]:
    folder = tmp_path_factory.mktemp("restore")
    compiled(folder)
    trio = Trio(folder, limits=Limits(in_flight=2), store=StoreSettings(low_water=0, target=0), recorded=True)
    trio.push()
    yield trio
    trio.close()


def state(place: Trio, rank: int) -> Path:
    return place.folder / ROLES[rank] / "state"


def ask(place: Trio, count: int, batch: int = 1) -> None:
    with place.connect() as remote:
        for seed in range(count):
            assert close_to(remote.predict(images(batch, seed)), images(batch, seed))


def restart(place: Trio, *ranks: int) -> None:
    for rank in ranks:
        place.start(rank)
    place.wait_serving()


def fresh(place: Trio) -> str:
    """A session of its own for the case: some requests, batches in the store; returns its nonce."""
    place.push()
    ask(place, 2)
    place.ask("owner", P0, "deal", count=3, batch=2)
    return str(place.status(P0)["session"])


def back_up(place: Trio, *ranks: int) -> None:
    for rank in ranks:
        shutil.rmtree(place.folder / f"backup{rank}", ignore_errors=True)
        shutil.copytree(state(place, rank), place.folder / f"backup{rank}")


def restore(place: Trio, rank: int, names: tuple[str, ...]) -> None:
    for name in names:
        here, there = state(place, rank) / name, place.folder / f"backup{rank}" / name
        if here.is_dir():
            shutil.rmtree(here)
        else:
            here.unlink(missing_ok=True)
        if there.is_dir():
            shutil.copytree(there, here)
        elif there.exists():
            shutil.copy(there, here)


WHOLE = ("ledger", "session", "model")
SOME = [("ledger",), ("session",), ("session/reserved",), ("session/resumed",), ("session/material",)]
SOME += [("ledger", "session/reserved"), ("ledger", "session/material"), ("ledger", "session/resumed")]
QUICK = [(P0, WHOLE), (P1, WHOLE), (P2, WHOLE), (P0, ("session/reserved",)), (P0, ("ledger", "session/material"))]
REST = [case for case in product((P0, P1, P2), SOME) if case not in QUICK]


@pytest.mark.parametrize(("rank", "names"), [*QUICK, *(pytest.param(*c, marks=pytest.mark.slow) for c in REST)])
def test_what_is_restored_is_noticed_or_harmless(place: Trio, used: Used, rank: int, names: tuple[str, ...]) -> None:
    """From a backup taken while the session ran; three batches of the store and four new ones came after it."""
    session = fresh(place)
    back_up(place, rank)
    ask(place, 3, batch=2)
    ask(place, 4)
    place.stop(rank)
    EVENTS.clear()
    restore(place, rank, names)
    restart(place, rank)
    ask(place, 4)
    ask(place, 2, batch=2)
    assert not used.twice()
    place.assert_nothing_used_twice()
    if "ledger" in names:
        assert place.status(P0)["session"] != session
        reasons = [str(fields["reason"]) for role, event, fields in EVENTS if event == "session dropped"]
        assert any(ROLES[rank] in reason for reason in reasons), reasons


def test_a_party_that_only_restarts_goes_on(place: Trio, used: Used) -> None:
    session = fresh(place)
    for rank in (P0, P1, P2):
        ask(place, 3)
        place.stop(rank)
        restart(place, rank)
        assert place.status(P0)["session"] == session
    assert place.status(P0)["store"] == {"2": 3}
    ask(place, 3, batch=2)
    assert not used.twice()


@pytest.mark.parametrize(("rank", "change"), [(P0, "gone"), (P1, "empty"), (P2, "without its first line")])
def test_a_ledger_that_is_gone_drops_the_session(place: Trio, used: Used, rank: int, change: str) -> None:
    """Also one of before a session began with a line of its own."""
    session = fresh(place)
    place.stop(rank)
    ledger = state(place, rank) / "ledger"
    kept = [line for line in ledger.read_text().splitlines(keepends=True) if not line.startswith(f"{session} 0 ")]
    if change == "gone":
        ledger.unlink()
    else:
        ledger.write_text("" if change == "empty" else "".join(kept))
    restart(place, rank)
    assert place.status(P0)["session"] not in ("", session)
    ask(place, 2)
    assert not used.twice()


@pytest.mark.parametrize("content", [b"x", None])
def test_a_reservation_that_is_damaged_is_not_taken_for_none(place: Trio, content: bytes | None) -> None:
    """None: it is absent, although batches were consumed."""
    session = fresh(place)
    place.stop(P0)
    path = state(place, P0) / "session/reserved"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    EVENTS.clear()
    restart(place, P0)
    assert place.status(P0)["session"] not in ("", session)
    assert any(event == "session dropped" for _, event, _ in EVENTS)


def test_reserved_is_one_only_where_nothing_was_reserved(tmp_path: Path) -> None:
    store = Store(tmp_path / "state")
    (tmp_path / "state/session").mkdir(mode=0o700)
    assert store.reserved() == 1
    store.reserve(1)
    assert store.reserved() == 257
    for content in (b"", b"x", b"-1", b"1 2", b"1\n", b"99999999999999", b"\xff", "\u0661".encode()):
        (tmp_path / "state/session/reserved").write_bytes(content)
        with pytest.raises(ProtocolError, match="reserved is damaged"):
            store.reserved()
    (tmp_path / "state/session/resumed").write_text("1 2")
    with pytest.raises(ProtocolError, match="resumed is damaged"):
        store.resumed()
    store.close()


def test_masks_and_shares_of_another_session_or_push_are_not_taken(place: Trio) -> None:
    session = fresh(place)
    for name, tag in (("session/opened.safetensors", session), ("model/shares.safetensors", "")):
        place.stop(P1)
        path = state(place, P1) / name
        path.write_bytes(save_tensors({"m0": torch.zeros(6, 9)}, {"of": "ab" * 16}))
        place.start(P1)
        if tag:
            place.wait_serving()
            assert place.status(P0)["session"] not in ("", session)
        else:
            assert place.status(P1)["state"] == "waiting for a model"
    place.push()
    ask(place, 1)


# --- what a resumption asks and answers ---


@pytest.mark.parametrize("rank", [P1, P2])
def test_a_batch_of_the_store_that_one_ledger_has_is_not_given_out(place: Trio, used: Used, rank: int) -> None:
    session = fresh(place)
    dealt = sorted(place.servers[P0].store.stock(session))
    place.servers[rank].store.ledger.consume(session, dealt[0], "2")
    place.stop(P0)
    restart(place, P0)
    assert place.status(P0)["session"] == session
    assert place.status(P0)["store"] == {"2": 2}
    assert sorted(place.servers[P0].store.stock(session)) == dealt[1:]
    ask(place, 3, batch=2)
    assert not used.twice()


def counted(place: Trio, reserved: int, resumed: tuple[int, int, int], *found: tuple[int, int]) -> str:
    """What P0 says to three ledgers with those (highest, consumed)."""
    engine = place.servers[P0].engine
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Store, "reserved", lambda self: reserved)
        patch.setattr(Store, "resumed", lambda self: list(resumed))
        try:
            resuming._check(engine, dict(enumerate(found)), 2)
        except ProtocolError as error:
            return str(error)
    return ""


def test_which_ledgers_go_together(place: Trio) -> None:
    none = (0, 0, 0)
    assert counted(place, 257, none, (9, 10), (9, 10), (9, 10)) == ""
    assert counted(place, 257, none, (9, 10), (9, 8), (9, 10)) == ""  # two were under way when it died
    assert counted(place, 257, (40, 30, 40), (99, 60), (99, 50), (99, 60)) == ""  # so in five deaths
    assert counted(place, 257, none, (9, 10), (9, 3), (9, 3)) == ""  # P0 alone: it could not reach them
    for lost in range(3):
        for amount in (3, 9):
            found = [(9, 10)] * 3
            found[lost] = (9, 10 - amount)
            assert counted(place, 257, none, *found) == (
                f"{ROLES[lost]} lacks {amount} consumed batches: its ledger was restored or lost"
            )
        before = tuple(10 if rank == lost else 0 for rank in range(3))
        assert f"{ROLES[lost]} lacks 1 " in counted(place, 257, before, (9, 9), (9, 9), (9, 9))  # type: ignore[arg-type]
        found = [(256, 10)] * 3
        assert counted(place, 257, none, *found) == ""
        found[lost] = (257, 10)
        assert counted(place, 257, none, *found) == f"{ROLES[lost]} has batch 257, P0 has given out none from 257 on"


def test_a_resumption_of_a_full_store_fits_control_frames(place: Trio) -> None:
    ids = [MAX_IDS - 1 - i for i in range(resuming.MAX_STOCK)]
    assert len(encode({"what": "resume", "stock": ids})) <= CONTROL_BYTES
    engine = place.servers[P1].engine
    session = fresh(place)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Store, "stock", lambda self, nonce: dict.fromkeys(ids, (1, 10**12)))
        patch.setattr(Store, "drop_material", lambda *_: None)
        answer = resuming.resume_answer(engine, Fields({"stock": ids}))
    assert answer["sizes"] == [10**12] * len(ids)
    assert len(encode(answer)) <= CONTROL_BYTES
    assert place.status(P0)["session"] == session


def test_a_former_sessions_job_leaves_the_next_ones_material_alone(place: Trio) -> None:
    before = fresh(place)
    after = fresh(place)
    store = place.servers[P1].store
    batch_id, (batch, _) = min(store.stock(after).items())
    store.drop_material(before, batch_id, batch)
    with pytest.raises(ProtocolError, match="is lost"):
        store.take_material(before, batch_id, batch)
    store.put_material(before, batch_id, batch, {})
    assert min(store.stock(after)) == batch_id
    assert store.stock(after)[batch_id][1] > 0
    ask(place, 3, batch=2)


def test_a_state_that_cannot_be_read_safely_stops_the_party(place: Trio) -> None:
    place.stop(P1)
    path = state(place, P1) / "session/session.json"
    path.rename(place.folder / "elsewhere.json")
    path.symlink_to(place.folder / "elsewhere.json")
    with pytest.raises(DeploymentError, match=r"session.json is a symbolic link"):
        place.start(P1)
    path.unlink()
    os.rename(place.folder / "elsewhere.json", path)
    place.servers.pop(P1)
    restart(place, P1)
    ask(place, 1)
