"""P2 learns that somebody asks, and never who: however a client leaves and whatever it does wrong."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from net_harness import Trio, close_to, compiled, images
from prometheus_client import generate_latest
from test_net_refusals import admitted

import tacit
from tacit.ir.cost import P0, P1, P2
from tacit.ir.errors import PartyError, TacitError
from tacit.runtime.net.causes import Cause, Code, Declined, Fault, Stopped, cause_of
from tacit.runtime.net.client import Client
from tacit.runtime.net.deployment import Limits, StoreSettings
from tacit.runtime.net.frames import FrameError, Kind
from tacit.runtime.net.link import Link
from tacit.runtime.net.metrics import Log
from tacit.runtime.net.server import PartyServer

WHO = "client2"
LIMITS = Limits(heartbeat_seconds=0.5, in_flight=3)
WITHIN = 0.2  # seconds that a client gives a request that is to be late


class View:
    """What P2 is sent and logs, who logs the client's name, and the numbers that clients draw."""

    def __init__(self) -> None:
        self.frames: list[bytes] = []
        self.controls: list[dict[str, Any]] = []
        self.numbers: set[int] = set()
        self.logs: dict[str, list[str]] = {"P0": [], "P1": [], "P2": []}

    def sent(self, link: Link, kind: Kind, content: bytes, request: int) -> None:
        if link.role == P2 and isinstance(link._handler, PartyServer):
            self.frames.append(request.to_bytes(8, "big") + content)
            if kind in (Kind.CAST, Kind.CALL, Kind.REPLY, Kind.REFUSE):
                self.controls.append(json.loads(content))
        elif kind is Kind.CAST and not isinstance(link._handler, PartyServer):
            self.numbers.add(request)

    def told(self, what: str) -> list[dict[str, Any]]:
        return [body for body in self.controls if body.get("what") == what]

    def assert_names_nobody(self, trio: Trio) -> None:
        member = next(m for m in trio.deployment.members if m.name == WHO)
        needles = [WHO.encode(), member.sha256.encode(), bytes.fromhex(member.sha256)]
        for number in self.numbers:
            needles += [str(number).encode(), f"{number:x}".encode(), number.to_bytes(8, "big")]
        metrics = generate_latest(trio.servers[P2].metrics.registry)
        seen = b"\n".join([*self.frames, *(line.encode() for line in self.logs["P2"]), metrics])
        assert not [needle for needle in needles if needle in seen]
        # Nor the time that it gave itself, nor anything else that it chose but the size of its batch.
        shapes = {"start": {"batch", "stored", "seconds"}, "begin": {"batch"}, "abort": {"code", "party", "fault"}}
        for what, fields in shapes.items():
            assert all(body.keys() <= {"what", *fields} for body in self.told(what))
        assert {body["seconds"] for body in self.told("start")} <= {LIMITS.request_seconds}


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trio]:
    folder = tmp_path_factory.mktemp("asker")
    compiled(folder)
    found = Trio(folder, limits=LIMITS, store=StoreSettings(low_water=0, target=0))
    found.push()
    yield found
    found.close()


@pytest.fixture
def view(monkeypatch: pytest.MonkeyPatch) -> View:
    found, send = View(), Link._send

    def record_send(self: Link, kind: Kind, parts: Any, request: int = 0, *rest: Any) -> None:
        found.sent(self, kind, b"".join(parts), request)
        send(self, kind, parts, request, *rest)

    def record_log(self: Log, event: str, **fields: Any) -> None:
        found.logs[self._role].append(json.dumps({"event": event} | fields))

    monkeypatch.setattr(Link, "_send", record_send)
    monkeypatch.setattr(Log, "__call__", record_log)
    return found


class Moment:
    """Does something just before the n-th data frame of a request leaves, whoever sends it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, self._due, self._act = 0, 0, lambda: None
        self._lock, send = threading.Lock(), Link.send

        def counted(link: Link, *args: Any) -> None:
            with self._lock:
                self.count += 1
                act = self._act if self.count == self._due else (lambda: None)
            act()
            send(link, *args)

        monkeypatch.setattr(Link, "send", counted)

    def set(self, due: int, act: Callable[[], None]) -> None:
        with self._lock:
            self.count, self._due, self._act = 0, due, act


def settled(trio: Trio) -> None:
    deadline = time.monotonic() + 10
    servers = trio.servers.values()
    while any(s.engine.busy or len(s.lobby) for s in servers):
        assert time.monotonic() < deadline, [(s.engine.busy, len(s.lobby)) for s in servers]
        time.sleep(0.002)


def cut(trio: Trio, remote: tacit.Remote, rank: int) -> None:
    """End the client's connection, and go on once the party has noticed."""
    links = trio.servers[rank]._links
    mine = [link for link in links if link.peer.name == WHO]
    remote._client._links[rank].close("cut")
    for link in mine:
        link.join(2.0)


def cancel(remote: tacit.Remote) -> None:
    """The client gives up, and says so."""
    for number, (flow, links) in list(remote._client._flows.items()):
        remote._client._cancel(number, links)
        time.sleep(0.01)
        flow.fail(PartyError("given up"))


def depths(trio: Trio, moment: Moment) -> int:
    with trio.connect(WHO) as remote:
        remote.predict(images(1))
        settled(trio)
        moment.set(0, lambda: None)
        remote.predict(images(1))
        settled(trio)
        return moment.count


@pytest.mark.parametrize("how", ["cut at P0", "cut at P1", "cut at both", "cancel"])
def test_a_client_that_leaves_at_any_depth(trio: Trio, view: View, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    moment = Moment(monkeypatch)
    total, failed = depths(trio, moment), 0
    assert total > 10
    with trio.connect(WHO) as remote:

        def act() -> None:
            if how == "cancel":
                cancel(remote)
            for rank in {"cut at P0": (P0,), "cut at P1": (P1,), "cut at both": (P0, P1)}.get(how, ()):
                cut(trio, remote, rank)

        for due in range(1, total + 1):
            moment.set(due, act)
            try:
                remote.predict(images(1))
            except TacitError:
                failed += 1
            settled(trio)
        moment.set(0, act)
        assert close_to(remote.predict(images(1)), images(1))
    settled(trio)
    assert failed > total / 2
    code = Code.CANCELLED if how == "cancel" else Code.GONE
    assert {body["code"] for body in view.told("abort")} >= {code}
    assert any('"request failed"' in line for line in view.logs["P2"])
    view.assert_names_nobody(trio)
    # Whoever talks to the client may say who it was.
    talking = view.logs["P0"] + view.logs["P1"]
    assert any('"request failed"' in line and WHO in line for line in talking)


def test_a_client_whose_time_is_up(trio: Trio, view: View, monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not say so either: the parties' own clocks have to."""
    moment = Moment(monkeypatch)
    monkeypatch.setattr(Client, "_cancel", staticmethod(lambda number, links: None))
    total = depths(trio, moment)
    with trio.connect(WHO) as remote:
        remote.predict(images(1))
        for due in range(2, total, 4):
            settled(trio)
            moment.set(due, lambda: time.sleep(1.5 * WITHIN))
            with pytest.raises(PartyError, match=r"P[012]"):
                remote.predict(images(1), timeout=WITHIN)
    settled(trio)
    assert {body["code"] for body in view.told("abort")} >= {Code.LATE}
    view.assert_names_nobody(trio)


def test_a_client_that_misbehaves(trio: Trio, view: View) -> None:
    """No share, one of the wrong size, of another batch, too many requests: P2 hears of none of them."""
    begun = len(view.told("start"))
    ask = {"what": "request", "batch": 1, "seconds": 5.0, "seed": "00" * 16}
    view.numbers |= {770_001, 770_002, 770_003, *range(771_000, 771_020)}
    at_p0, at_p1 = admitted(trio, WHO, P0), admitted(trio, WHO, P1)
    at_p0.send(Kind.CAST, ask, request=770_001)
    at_p0.send(Kind.CAST, ask, request=770_002)
    at_p1.send(Kind.CAST, {"what": "share", "batch": 2, "seconds": 5.0}, request=770_002)
    at_p1.send(Kind.DATA, request=770_002, raw=bytes(72))
    kind, body = at_p0.receive()
    assert kind is Kind.CAST and body["reason"] == "P0 was told of a batch of 1, P1 of one of 2"
    at_p0.send(Kind.CAST, ask, request=770_003)
    at_p1.send(Kind.CAST, {"what": "share", "batch": 1, "seconds": 5.0}, request=770_003)
    at_p1.send(Kind.DATA, request=770_003, raw=bytes(72))
    assert at_p1.refused() == "a share of 72 bytes where the plan provides for 36"
    for number in range(771_000, 771_020):
        at_p0.send(Kind.CAST, ask, request=number)
    assert "its quota" in at_p0.receive()[1]["reason"]
    at_p0.wire.close()
    settled(trio)
    assert len(view.told("start")) == begun
    view.assert_names_nobody(trio)
    assert any(WHO in line for line in view.logs["P1"]) and any(WHO in line for line in view.logs["P0"])


def test_the_start_of_a_request_names_the_client_to_p1_alone(trio: Trio, view: View) -> None:
    with trio.connect(WHO) as remote:
        remote.predict(images(2), timeout=7.5)
    settled(trio)
    assert len(view.told("start")) == 1
    view.assert_names_nobody(trio)


# --- what parties may tell one another ---


def test_only_codes_of_the_list_are_read() -> None:
    for cause in (
        Cause(Code.GONE),
        Cause(Code.LOST, P2),
        *(Cause(Code.FAILED, rank, fault) for rank in (P0, P1, P2) for fault in Fault),
    ):
        assert Cause.read(cause.body()) == cause
    for body in (
        "client2 left",
        {},
        {"code": "client2 left"},
        {"code": "gone", "reason": "client2 left"},
        {"code": "gone", "party": "P1"},
        {"code": "lost"},
        {"code": "lost", "party": "client"},
        {"code": "failed", "party": "P1"},
        {"code": "failed", "party": "P1", "fault": "client2"},
        {"code": ["gone"]},
    ):
        with pytest.raises(FrameError):
            Cause.read(body)


def test_what_is_told_of_an_error_is_never_its_text() -> None:
    text = "client2 sent 0.125"
    for error in (
        Stopped(Cause(Code.GONE), text),
        Stopped(Cause(Code.LATE, 3), text),
        Declined(Cause(Code.NO_SESSION), text),
        PartyError(text),
        FrameError(text),
        OSError(text),
        ValueError(text),
    ):
        cause = cause_of(error, P1)
        assert Cause.read(cause.body()) == cause
        assert "client" not in json.dumps(cause.body()) and "client" not in str(cause)


def test_a_text_from_another_party_ends_the_link(trio: Trio, view: View) -> None:
    link = trio.servers[P1].engine.links[P2]
    link.cast("abort", 5, reason="client2 disconnected")
    link.join(5.0)
    assert not link.open
    deadline = time.monotonic() + 10
    while any(trio.servers[a].engine.links.get(b) in (None, link) for a, b in ((P1, P2), (P2, P1))):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert any("it sent" in line and "'code'" in line for line in view.logs["P2"])


def test_a_call_between_parties_fails_with_a_code(trio: Trio, view: View, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise ValueError("client2 asked for 0.125")

    monkeypatch.setattr(trio.servers[P1], "_answer_party", broken)
    with pytest.raises(Declined, match=r"^P1: P1 failed \(internal error; its log says more\)$"):
        trio.servers[P2].engine.links[P1].call("busy", 5.0)
    assert {"error": {"code": "failed", "party": "P1", "fault": "internal"}} in view.controls
    assert not any("0.125" in line for line in view.logs["P1"])  # not even in the log: an error of ours may hold values


def test_clients_with_the_same_number_get_their_own_answers(
    trio: Trio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests are told apart by client and number: two clients that draw alike at once do not mix."""
    import tacit.runtime.net.client as client

    class Fixed:
        @staticmethod
        def urandom(size: int) -> bytes:
            return bytes(7) + b"\x07" if size == 8 else drawn(size)

    drawn = client.os.urandom
    met = threading.Barrier(2)
    arrive = trio.servers[P1].lobby.arrive

    def together(*args: Any) -> Any:
        found = arrive(*args)
        met.wait(5)  # both are at P1 under that number
        return found

    with trio.connect("client") as one, trio.connect(WHO) as two:
        inputs = [images(2, 5), images(2, 6)]
        for remote, x in zip((one, two), inputs, strict=True):
            remote.predict(x)
        settled(trio)
        monkeypatch.setattr(client, "os", Fixed)
        monkeypatch.setattr(trio.servers[P1].lobby, "arrive", together)
        answers: dict[int, Any] = {}

        def ask(i: int) -> None:
            answers[i] = (one, two)[i].predict(inputs[i])

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert answers.keys() == {0, 1}
    assert all(close_to(answers[i], inputs[i]) for i in range(2))
