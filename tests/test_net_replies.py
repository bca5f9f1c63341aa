"""Calls and replies on a connection: a reply is bounded by the call that it answers, and comes once."""

from __future__ import annotations

import json
import statistics
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
from net_harness import Trio, close_to, compiled, images
from test_net_refusals import QUICK, Raw, admitted, hello, refusals

from tacit.ir.cost import OWNER, P0, P1, ROLES
from tacit.ir.errors import PartyError, TacitError
from tacit.runtime.net.deployment import Limits, Member, load_identity
from tacit.runtime.net.frames import CONTROL_BYTES, HEADER, PLAN_BYTES, Fields, FrameError, Header, Kind, decode, encode
from tacit.runtime.net.handshake import Hello, Peer, dial
from tacit.runtime.net.link import Caller, Link
from tacit.runtime.net.wire import Closed, context


class Other:
    """In the place of a wire: what this side sends is kept, what the other side says is put there by the test."""

    def __init__(self) -> None:
        self.sent: deque[Header] = deque()
        self._said, self._changed, self._stopped = bytearray(), threading.Condition(), False

    def say(self, raw: bytes) -> None:
        with self._changed:
            self._said += raw
            self._changed.notify_all()

    def wait(self, deadline: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._said or self._stopped, 10)
            if not self._said:
                raise Closed("it closed the connection")

    def read(self, view: memoryview, deadline: float) -> None:
        with self._changed:
            if not self._changed.wait_for(lambda: len(self._said) >= len(view) or self._stopped, 10):
                raise Closed("the frame was cut short")
            if len(self._said) < len(view):
                raise Closed("it closed the connection")
            view[:] = self._said[: len(view)]
            del self._said[: len(view)]

    def write(self, parts: Any, deadline: float) -> None:
        raw = b"".join(parts)
        self.sent.append(Header.parse(raw[: HEADER.size], int.from_bytes(raw[4:8], "big"), OWNER))

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    close = stop


class Answering(Caller):
    """Answers everything, and remembers why the connection ended."""

    reason = ""

    def answer(self, link: Link, fields: Fields) -> dict[str, Any]:
        return {"long": "x" * (1 << 17)} if fields.body.get("what") == "long" else {"fine": True}

    def closed(self, link: Link, reason: str) -> None:
        self.reason = reason


class Ends:
    """A link to a party (or from a member of that role), the test at its other end."""

    def __init__(self, role: int = P0, purpose: str = "control") -> None:
        self.other, self.handler, self.serial = Other(), Answering(), 1
        peer = Peer(Member(ROLES[role], role, ""), Hello(purpose))
        self.link = Link(self.other, peer, self.handler, Limits(), None, dialled=True)  # type: ignore[arg-type]
        self.link.start()
        self.outcomes: dict[str, Any] = {}
        self._threads: list[threading.Thread] = []

    def call(self, what: str, seconds: float = 10.0) -> int:
        """Begin a call in a thread; returns its number once it was sent."""

        def run() -> None:
            try:
                self.outcomes[what] = self.link.call(what, seconds).body
            except TacitError as error:
                self.outcomes[what] = str(error)

        before = len(self.other.sent)
        self._threads.append(threading.Thread(target=run))
        self._threads[-1].start()
        while len(self.other.sent) == before:
            time.sleep(0.001)
        return self.other.sent[-1].request

    def say(self, kind: Kind, number: int, body: bytes = b"{}", length: int | None = None) -> None:
        self.other.say(Header(kind, self.serial, len(body) if length is None else length, number).pack() + body)
        self.serial += 1

    def done(self) -> dict[str, Any]:
        for thread in self._threads:
            thread.join(10)
        return self.outcomes

    def ended(self) -> str:
        self.link.join(10)
        self.done()
        return self.handler.reason


def test_a_reply_that_answers_no_call_ends_the_connection() -> None:
    for body in (b"{}", b'{"a":1}'):
        ends = Ends()
        number = ends.call("status")
        ends.say(Kind.REPLY, number + 1, body)
        assert ends.ended() == f"it sent a reply to call {number + 1}, which waits for none"
        assert "disconnected: it sent a reply" in ends.outcomes["status"]


def test_a_second_reply_to_a_call_ends_the_connection() -> None:
    ends = Ends()
    number = ends.call("status")
    ends.say(Kind.REPLY, number, b'{"a":1}')
    assert ends.done() == {"status": {"a": 1}}
    ends.say(Kind.REPLY, number, b'{"a":2}')
    assert ends.ended() == f"it sent a reply to call {number}, which waits for none"
    assert ends.outcomes == {"status": {"a": 1}}


@pytest.mark.parametrize("what", ["status", "query", "resume", "open", "key", "deal", "busy", "offer", "commit"])
def test_only_a_plan_may_be_long_in_a_reply(what: str) -> None:
    ends = Ends()
    ends.say(Kind.REPLY, ends.call(what), length=CONTROL_BYTES + 1)  # refused before a byte of it is there
    assert ends.ended() == f"it sent a REPLY frame of {CONTROL_BYTES + 1} bytes, {CONTROL_BYTES} are allowed"


def test_a_plan_may_be_as_long_as_a_plan() -> None:
    ends = Ends()
    text = "%x : a \\ line\n" * 100_000 + 'é "end"'
    number = ends.call("plan")
    ends.say(Kind.REPLY, number, encode({"plan": text}))
    assert ends.done() == {"plan": {"plan": text}}
    ends.say(Kind.REPLY, ends.call("plan"), length=PLAN_BYTES + 1)
    assert ends.ended() == f"it sent a REPLY frame of {PLAN_BYTES + 1} bytes, {PLAN_BYTES} are allowed"


def test_a_late_reply_is_let_in_once_and_dropped() -> None:
    ends = Ends()
    number = ends.call("status", 0.05)
    assert ends.done() == {"status": "P0 did not answer within 0.05 s"}
    ends.say(Kind.REPLY, number, b'{"late":1}')
    second = ends.call("query")
    ends.say(Kind.REPLY, second, b'{"a":1}')
    assert ends.done()["query"] == {"a": 1}
    ends.say(Kind.REPLY, number, b'{"late":2}')
    assert "waits for none" in ends.ended()


def test_a_side_that_never_answers_is_let_go() -> None:
    ends = Ends()
    reasons = set()
    for _ in range(300):
        with pytest.raises(PartyError) as caught:
            ends.link.call("status", 0.0)
        reasons.add(str(caught.value))
    assert any("left 256 calls without an answer" in reason for reason in reasons)
    assert len(ends.link._calls) <= 300
    assert not ends.link.open


@pytest.mark.parametrize(
    ("role", "purpose", "body", "reason"),
    [
        (OWNER, "control", {"what": "offer", "plan": "x" * (1 << 17)}, ""),
        (OWNER, "control", {"what": "status", "plan": "x" * (1 << 17)}, "offers no plan"),
        (OWNER, "control", {"what": "offer", "plan": ["x"] * (1 << 16)}, "not an object of a few texts"),
        (OWNER, "client", {"what": "offer", "plan": "x" * (1 << 17)}, "65536 are allowed"),
        (P1, "control", {"what": "offer", "plan": "x" * (1 << 17)}, "65536 are allowed"),
        (P1, "link", {"what": "resume", "stock": [1] * (1 << 16)}, "65536 are allowed"),
    ],
)
def test_only_an_owner_that_pushes_may_call_at_length(
    role: int, purpose: str, body: dict[str, Any], reason: str
) -> None:
    ends = Ends(role, purpose)
    ends.say(Kind.CALL, 1, encode(body))
    if reason:
        assert reason in ends.ended()
    else:
        deadline = time.monotonic() + 10
        while not ends.other.sent:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        assert ends.other.sent[0].kind is Kind.REPLY
        ends.link.close("done")


def test_an_answer_that_no_reply_holds_is_an_error_not_a_broken_connection() -> None:
    ends = Ends()
    ends.say(Kind.CALL, 5, b'{"what":"long"}')
    deadline = time.monotonic() + 10
    while not ends.other.sent:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert ends.other.sent[0].length < 200
    assert ends.link.open
    ends.link.close("done")


# --- the bodies of long frames ---


def long_body(**fields: str) -> bytes:
    return encode({"what": "offer", "pad": "p" * CONTROL_BYTES} | fields)


@pytest.mark.parametrize(
    "text", ["", "a\nb", '"\\/\b\f\n\r\t', "é\u2028\U0001f600 \U0001f600", "\\u0041\\", "\x7f\x00"]
)
def test_texts_of_a_long_frame_come_back(text: str) -> None:
    assert decode(long_body(text=text))["text"] == text
    assert decode(long_body(text=text * 20_000))["text"] == text * 20_000


@pytest.mark.parametrize(
    "change",
    [
        lambda raw: raw[:-1],
        lambda raw: raw + b"}",
        lambda raw: raw.replace(b'"what"', b"what"),
        lambda raw: raw.replace(b'"offer"', b"7"),
        lambda raw: raw.replace(b'"offer"', b'{"a":"b"}'),
        lambda raw: raw.replace(b'"offer"', b'["a"]'),
        lambda raw: raw.replace(b'"offer"', b'"\\ud800"'),
        lambda raw: raw.replace(b'"offer"', b'"\\x"'),
        lambda raw: raw.replace(b'"offer"', b'"\n"'),
        lambda raw: raw.replace(b'"offer"', b'"\xff"'),
        lambda raw: b'{"k":"v",' * 9000 + raw,
        lambda raw: b"[" * len(raw),
    ],
)
def test_what_is_not_a_few_texts_is_refused(change: Any) -> None:
    with pytest.raises(FrameError, match="a long control frame that is not an object of a few texts"):
        decode(change(long_body()))


def test_reading_a_long_frame_holds_nobody_up() -> None:
    """The worst that 16 MiB may hold: others run on while it is read or refused."""
    bodies = [
        b'{"a":[' + b",".join([b"{}"] * (PLAN_BYTES // 3 - 10)) + b"]}",
        b'{"a":"' + b"\\n" * (PLAN_BYTES // 16) + b'"}',
        b'{"' + b'a":"b","' * (PLAN_BYTES // 9) + b"}",
    ]
    gaps, stop = [0.0], threading.Event()

    def tick() -> None:
        last = time.perf_counter()
        while not stop.is_set():
            time.sleep(0.001)
            now = time.perf_counter()
            gaps.append(now - last)
            last = now

    ticking = threading.Thread(target=tick)
    ticking.start()
    for body in bodies:
        with suppress(FrameError):
            decode(body)
    stop.set()
    ticking.join()
    assert max(gaps) < 0.25  # json.loads of the first takes twice that, and holds the interpreter


# --- at a party ---


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trio]:
    folder = tmp_path_factory.mktemp("replies")
    compiled(folder)
    trio = Trio(folder, limits=QUICK)
    trio.push()
    yield trio
    trio.close()


def test_unsolicited_replies_are_refused_counted_and_cost_others_nothing(place: Trio) -> None:
    with place.connect("client2") as remote:
        assert close_to(remote.predict(images(1)), images(1))

        def latency() -> float:
            begin = time.perf_counter()
            assert close_to(remote.predict(images(1)), images(1))
            return time.perf_counter() - begin

        quiet = statistics.median(latency() for _ in range(20))
        before, stop, refused = refusals(place, P0), threading.Event(), []

        def flood() -> None:
            while not stop.is_set():
                raw = admitted(place)
                raw.write(Header(Kind.REPLY, raw.serial, PLAN_BYTES, 7).pack() + b'{"a":[' + bytes(1 << 14))
                refused.append(raw.ended())
                time.sleep(0.02)

        flooding = threading.Thread(target=flood)
        flooding.start()
        loud = statistics.median(latency() for _ in range(20))
        stop.set()
        flooding.join()
    assert refused and all(refused)
    deadline = time.monotonic() + 5
    while refusals(place, P0) < before + len(refused) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert refusals(place, P0) >= before + len(refused)
    assert loud < 20 * quiet + 0.1


def test_a_client_is_told_why_and_a_long_call_of_its_own_is_refused(place: Trio) -> None:
    raw = admitted(place)
    raw.send(Kind.REPLY, {"a": 1}, request=1)
    assert raw.refused() == "a reply to call 1, which waits for none"
    raw = Raw(place, "owner", P0)
    raw.send(Kind.HELLO, hello("owner", "P0", purpose="control"))
    assert raw.receive()[0] is Kind.HELLO
    raw.send(Kind.ACCEPT)
    raw.send(Kind.CALL, {"what": "status", "pad": "x" * CONTROL_BYTES}, request=1)
    assert "offers no plan" in raw.refused()


def test_a_party_that_lies_about_a_call_is_let_go(place: Trio) -> None:
    """P2's key on a connection of its own to P0, as an asker: it gets an answer, and may not send one."""
    identity = load_identity(place.deployment, place.folder / "P2")
    tls = context(place.deployment, identity, server=False)
    wire, peer = dial(place.deployment, tls, identity.member, P0, Hello("control"))
    handler = Answering()
    link = Link(wire, peer, handler, QUICK, None, dialled=True)
    link.start()
    assert link.call("status", 5.0).body["party"] == "P0"
    link._send(Kind.REPLY, [json.dumps({"a": "x"}).encode()], 1)
    link.join(5)
    assert handler.reason == "it refused: a reply to call 1, which waits for none"
