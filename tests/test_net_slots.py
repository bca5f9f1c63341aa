"""Who holds slots, batches and memory: a request without its share nothing, one client never everything."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from net_harness import Trio, close_to, compiled, images
from test_net_refusals import Raw, admitted

from tacit.ir.cost import P0, P1, P2
from tacit.ir.errors import RefusedError
from tacit.runtime.net.coordinator import Coordinator
from tacit.runtime.net.deployment import Limits, StoreSettings
from tacit.runtime.net.engine import Job
from tacit.runtime.net.frames import HEADER, Kind
from tacit.runtime.net.lobby import Visit
from tacit.runtime.net.turns import Shares, Turns

LIMITS = Limits(in_flight=2, heartbeat_seconds=0.2, silence_seconds=3.0, client_bytes=200, per_client=16)
SHARE = {1: 36, 2: 72, 3: 108}  # bytes, by batch


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trio]:
    folder = tmp_path_factory.mktemp("slots")
    compiled(folder)
    found = Trio(folder, limits=LIMITS, store=StoreSettings(low_water=0, target=0))
    found.push()
    yield found
    found.close()


def until(done: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def coordinator(trio: Trio) -> Coordinator:
    found = trio.servers[P0].coordinator
    assert found is not None
    return found


def nothing_left(trio: Trio) -> bool:
    waiting = len(coordinator(trio)._shares) + len(coordinator(trio)._turns)
    return not waiting and not any(s.engine.busy or len(s.lobby) or s.engine._flows for s in trio.servers.values())


def ask(raw: Raw, number: int, batch: int = 1, seconds: float = 5.0) -> None:
    body = {"what": "request", "batch": batch, "seconds": seconds, "seed": "00" * 16}
    raw.send(Kind.CAST, body, request=number)


def share(raw: Raw, number: int, batch: int = 1, seconds: float = 5.0, *, data: bool = True) -> None:
    raw.send(Kind.CAST, {"what": "share", "batch": batch, "seconds": seconds}, request=number)
    if data:
        raw.send(Kind.DATA, request=number, raw=bytes(SHARE[batch]))


def lines(trio: Trio) -> int:
    return len(trio.ledger("P0"))


def test_requests_without_a_share_hold_nothing(trio: Trio) -> None:
    """Sixteen of one client, which keeps its connection alive: others are served at once, and nothing is consumed."""
    with trio.connect("client2") as other:
        other.predict(images(1))
        until(lambda: nothing_left(trio))
        used, raw = lines(trio), admitted(trio)
        for number in range(16):
            ask(raw, number, seconds=2.0)
        until(lambda: len(coordinator(trio)._shares) == 16)
        raw.send(Kind.PING)
        for seed in range(5):
            begin = time.monotonic()
            assert close_to(other.predict(images(1, seed)), images(1, seed))
            assert time.monotonic() - begin < 1.0
        assert len(coordinator(trio)._shares) == 16
        until(lambda: lines(trio) == used + 5)
        ask(raw, 16)
        assert raw.receive()[1]["reason"] == "client client has 16 requests under way, its quota"
        # At their deadline they are let go, and the client is told.
        reasons = set()
        for _ in range(16):
            raw.send(Kind.PING)
            reasons.add(raw.receive()[1]["reason"])
        assert reasons == {"the share did not come to P1 in time"}
        raw.wire.close()
        until(lambda: nothing_left(trio))
        assert lines(trio) == used + 5


@pytest.mark.parametrize("first", ["share", "request"])
def test_share_and_request_come_in_either_order(trio: Trio, first: str) -> None:
    used, at_p0, at_p1 = lines(trio), admitted(trio), admitted(trio, rank=P1)
    if first == "share":
        share(at_p1, 5)
        until(lambda: len(coordinator(trio)._shares._early) == 1)
        assert lines(trio) == used
        ask(at_p0, 5)
    else:
        ask(at_p0, 5)
        until(lambda: len(coordinator(trio)._shares) == 1)
        share(at_p1, 5, data=False)
        until(lambda: len(trio.servers[P1].lobby) == 1)
        assert lines(trio) == used
        at_p1.send(Kind.DATA, request=5, raw=bytes(SHARE[1]))
    for raw in (at_p0, at_p1):
        assert answer(raw)
    until(lambda: nothing_left(trio))
    assert lines(trio) == used + 1
    assert not coordinator(trio)._shares._early
    for raw in (at_p0, at_p1):
        raw.wire.close()


def answer(raw: Raw) -> bool:
    """Whether the next frame that is no heartbeat is data."""
    while True:
        head = bytearray(HEADER.size)
        raw.wire.read(memoryview(head), raw.deadline)
        kind, *_, length = HEADER.unpack(head)
        raw.wire.read(memoryview(bytearray(length)), raw.deadline)
        if kind != Kind.PING:
            return bool(kind == Kind.DATA)


@pytest.mark.parametrize("where", ["before the share", "before the request", "refused"])
def test_what_is_taken_back_leaves_nothing(trio: Trio, where: str) -> None:
    used, at_p0, at_p1 = lines(trio), admitted(trio), admitted(trio, rank=P1)
    if where == "before the share":
        ask(at_p0, 6)
        until(lambda: len(coordinator(trio)._shares) == 1)
        at_p0.send(Kind.CAST, {"what": "cancel"}, request=6)
        until(lambda: nothing_left(trio))
        share(at_p1, 6)
        until(lambda: len(trio.servers[P1].lobby) == 1)
        at_p1.send(Kind.CAST, {"what": "cancel"}, request=6)
    elif where == "before the request":
        share(at_p1, 6)
        until(lambda: len(coordinator(trio)._shares._early) == 1)
        at_p1.send(Kind.CAST, {"what": "cancel"}, request=6)
        until(lambda: len(trio.servers[P1].lobby) == 0)
        ask(at_p0, 6)  # P0 was told of the share: it starts, and P1 says that it is gone, or P2, whom P1 told before
        told, reason = at_p0.receive()[1]["reason"].split(": ")
        assert told in ("P1", "P2") and reason in ("the one who asked is gone", "the request was cancelled")
    else:
        ask(at_p0, 6, batch=5000)
        assert at_p0.receive()[1]["refused"]
        share(at_p1, 6)
        until(lambda: len(trio.servers[P1].lobby) == 1)
        at_p1.wire.close()
    until(lambda: nothing_left(trio))
    assert lines(trio) <= used + 1
    for raw in (at_p0, at_p1):
        raw.wire.close()
    with trio.connect("client2") as other:
        assert close_to(other.predict(images(1)), images(1))
    until(lambda: nothing_left(trio))


def test_what_p1_holds_for_one_client_is_bounded_in_bytes(trio: Trio) -> None:
    raw = admitted(trio, rank=P1)
    share(raw, 1, batch=2)
    share(raw, 2, batch=3, data=False)  # announced is held: it may come at any time
    share(raw, 3)
    reason = "client client has shares of 180 bytes under way, 36 more are beyond client_bytes, 200"
    assert raw.receive()[1] == {"what": "error", "reason": reason, "refused": True}
    with trio.connect("client2") as other:  # another client's account
        assert close_to(other.predict(images(3)), images(3))
    raw.send(Kind.CAST, {"what": "cancel"}, request=1)
    share(raw, 4, batch=2)
    until(lambda: len(trio.servers[P1].lobby.held()) == 1)  # the refused share was read past
    raw.wire.close()
    until(lambda: nothing_left(trio))


def test_a_share_that_was_refused_takes_no_memory(trio: Trio, monkeypatch: pytest.MonkeyPatch) -> None:
    raw, made = admitted(trio, rank=P1), list[int]()
    share(raw, 1, batch=3)
    until(lambda: len(trio.servers[P1].lobby.held()) == 1)
    empty = np.empty
    monkeypatch.setattr(np, "empty", lambda size, *rest: made.append(size) or empty(size, *rest))
    share(raw, 2, batch=3)
    assert raw.receive()[1]["refused"]
    share(raw, 3, batch=2)
    until(lambda: len(trio.servers[P1].lobby.held()) == 2)
    assert SHARE[3] not in made and SHARE[2] in made
    raw.wire.close()
    until(lambda: nothing_left(trio))


def test_p0_hears_again_of_shares_on_a_new_link(trio: Trio) -> None:
    """P1's word is as good as its link: on a new one it says all again, and P0 believes no word of an old one."""
    used, at_p0, at_p1 = lines(trio), admitted(trio), admitted(trio, rank=P1)
    share(at_p1, 8)
    until(lambda: len(coordinator(trio)._shares._early) == 1)
    link = trio.servers[P0].engine.links[P1]
    link.close("cut")
    until(lambda: trio.servers[P0].engine.links.get(P1) not in (None, link) and coordinator(trio).ready)
    ask(at_p0, 8)
    assert answer(at_p0) and answer(at_p1)
    until(lambda: nothing_left(trio))
    assert lines(trio) == used + 1
    for raw in (at_p0, at_p1):
        raw.wire.close()


def test_a_p1_that_starts_anew_has_no_shares(tmp_path: Path) -> None:
    compiled(tmp_path)
    trio = Trio(tmp_path, limits=LIMITS, store=StoreSettings(low_water=0, target=0))
    try:
        trio.push()
        at_p0, at_p1 = admitted(trio), admitted(trio, rank=P1)
        share(at_p1, 9)
        ask(at_p0, 10, seconds=20.0)
        until(lambda: len(coordinator(trio)._shares) == 1 and len(coordinator(trio)._shares._early) == 1)
        trio.stop(P1)
        reason = at_p0.receive()[1]
        assert "P1 disconnected" in reason["reason"] and not reason["refused"]
        trio.start(P1)
        trio.wait_serving()
        ask(at_p0, 9, seconds=0.5)
        assert at_p0.receive()[1]["reason"] == "the share did not come to P1 in time"
        until(lambda: nothing_left(trio))
        at_p0.wire.close()
        at_p1.wire.close()
    finally:
        trio.close()


def test_one_client_never_has_all_slots(trio: Trio, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests of one client that hang in their slots: another client is served meanwhile."""
    started, go_on, run = threading.Semaphore(0), threading.Event(), trio.servers[P0].engine.run

    def hang(job: Job, flow: Any) -> str:
        if job.batch == 2:
            started.release()
            go_on.wait(10)
        return run(job, flow)

    monkeypatch.setattr(trio.servers[P0].engine, "run", hang)
    with trio.connect("client") as greedy, trio.connect("client2") as other:
        threads = [threading.Thread(target=greedy.predict, args=(images(2, seed),)) for seed in range(2)]
        for thread in threads:
            thread.start()
        assert started.acquire(timeout=5)
        until(lambda: len(coordinator(trio)._turns) == 1)
        assert close_to(other.predict(images(1), timeout=5.0), images(1))
        go_on.set()
        for thread in threads:
            thread.join()
    until(lambda: nothing_left(trio))


def visit(client: str, number: int) -> Visit:
    return Visit(client, number, link=None, batch=1, deadline=0.0)


def job(client: str, number: int) -> Job:
    return Job(number, 0, 1, False, 0.0, 1.0, visit(client, number))


def test_turns_go_round_and_slots_are_bounded() -> None:
    turns = Turns(limit=6, most=2)
    for number in range(4):
        turns.push("a", job("a", number))
    for number in range(4, 6):
        turns.push("b", job("b", number))
    with pytest.raises(RefusedError, match="P0 is busy: 6 requests are waiting"):
        turns.push("b", job("b", 6))
    taken = [turns.pop() for _ in range(5)]
    assert [found.request if found else None for found in taken] == [0, 4, 1, 5, None]
    assert turns.running == 4 and len(turns) == 2
    turns.done("b")
    assert turns.pop() is None  # b has a slot left and nothing to do, a has none left
    turns.done("a")
    found = turns.pop()
    assert found is not None and found.request == 2


def test_words_of_shares_are_few_and_of_their_link() -> None:
    shares, link, other = Shares(3), object(), object()
    for number in range(10):
        assert shares.came(("a", number), 1, link) is None
    assert shares.came(("b", 1), 2, link) is None
    assert shares.wait(("a", 6), job("a", 6), link) is None
    assert shares.wait(("a", 9), job("a", 9), link) == 1
    assert shares.wait(("b", 1), job("b", 1), other) is None
    assert shares.remove(visit("b", 1)) and not shares.remove(visit("b", 1))
    waiting = shares.came(("a", 6), 1, other)
    assert waiting is not None and waiting.request == 6 and len(shares) == 0
    assert sum(map(len, shares._early.values())) == 2


def test_a_request_that_waits_is_told_when_its_party_is_lost(trio: Trio) -> None:
    raw = admitted(trio)
    ask(raw, 11, seconds=20.0)
    until(lambda: len(coordinator(trio)._shares) == 1)
    trio.servers[P0].engine.links[P2].close("cut")
    said = raw.receive()[1]
    assert said["reason"] == "P2 disconnected: cut" and not said["refused"]
    raw.wire.close()
    until(lambda: nothing_left(trio) and coordinator(trio).ready)
    with trio.connect("client2") as other:
        assert close_to(other.predict(images(1)), images(1))
