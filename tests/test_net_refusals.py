"""What is refused: certificates, roles, handshakes, frames; always with a reason, and with no effect on others."""

from __future__ import annotations

import json
import os
import random
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from net_harness import Place, Trio, close_to, compiled, images

import tacit
from tacit.ir.cost import P0, P1, ROLES
from tacit.ir.errors import PartyError, RefusedError, TacitError
from tacit.runtime.net import certificates
from tacit.runtime.net.certificates import init_deployment
from tacit.runtime.net.deployment import Identity, Limits, load_deployment, load_identity
from tacit.runtime.net.flow import Flow
from tacit.runtime.net.frames import HEADER, VERSION, Fields, FrameError, Header, Kind, Phase, decode, encode
from tacit.runtime.net.wire import Wire, context

QUICK = Limits(handshake_seconds=3.0, frame_seconds=1.5, heartbeat_seconds=0.5, silence_seconds=4.0)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trio]:
    """Four clients: two good, the third's certificate has expired, the fourth's is not pinned at the parties."""
    folder = tmp_path_factory.mktemp("refusals")
    compiled(folder)
    issue = certificates.issue

    def expired(name: str, *args: Any) -> Any:
        return issue(name, *args, days=-2 if name == "client3" else 365)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(certificates, "issue", expired)
        trio = Trio.__new__(Trio)
        Place.__init__(trio, folder, clients=4, limits=QUICK)
    whole = trio.deployment
    trio.deployment = replace(whole, members=tuple(m for m in whole.members if m.name != "client4"))
    trio.servers = {}
    for rank in range(3):
        trio.start(rank)
    trio.push()
    yield trio
    trio.close()


@contextmanager
def works(place: Trio) -> Iterator[None]:
    """Before, during and after what happens inside, another client is served on the same connection."""
    stop, failures = threading.Event(), list[TacitError]()
    with place.connect("client2") as remote:
        assert close_to(remote.predict(images(2)), images(2))

        def keep_asking() -> None:
            while not stop.is_set():
                try:
                    assert close_to(remote.predict(images(2)), images(2))
                except TacitError as error:
                    failures.append(error)

        thread = threading.Thread(target=keep_asking)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
        assert not failures
        assert close_to(remote.predict(images(2)), images(2))


def refusals(place: Trio, rank: int) -> float:
    figures = place.status(rank)["figures"]
    return sum(v for k, v in figures.items() if k.startswith("tacit_refusals_total"))


class Raw:
    """A TLS connection on which anything can be said."""

    def __init__(self, place: Place, who: str, rank: int) -> None:
        full = load_deployment(place.file)
        identity = load_identity(full, place.folder / who)
        address = full.party(rank).address
        assert address is not None
        self.deadline = time.monotonic() + 20
        sock = socket.create_connection(address, timeout=5)
        self.wire = Wire(sock, context(full, identity, server=False), server=False, deadline=self.deadline)
        self.serial = 0

    def send(self, kind: Kind, body: dict[str, Any] | None = None, *, request: int = 0, raw: bytes = b"") -> bytes:
        content = raw if body is None else encode(body)
        frame = Header(kind, self.serial, len(content), request).pack() + content
        self.serial += 1
        self.write(frame)
        return frame

    def write(self, raw: bytes) -> None:
        self.wire.write([raw], self.deadline)

    def receive(self) -> tuple[Kind, dict[str, Any]]:
        while True:
            raw = bytearray(HEADER.size)
            self.wire.read(memoryview(raw), self.deadline)
            kind, _, _, _, _, length = HEADER.unpack(raw)
            content = bytearray(length)
            self.wire.read(memoryview(content), self.deadline)
            if kind != Kind.PING:
                return Kind(kind), json.loads(content) if content else {}

    def refused(self) -> str:
        """The reason of the REFUSE that comes, after which the connection ends."""
        kind, body = self.receive()
        assert kind is Kind.REFUSE, (kind, body)
        with pytest.raises(PartyError):
            self.receive()
        self.wire.close()
        return str(body["reason"])

    def ended(self) -> bool:
        """Whether the other side ends the connection."""
        try:
            while True:
                self.receive()
        except PartyError as error:
            self.wire.close()
            return "deadline" not in str(error)


def hello(role: str, to: str, **changes: Any) -> dict[str, Any]:
    said = {"version": VERSION, "role": role, "to": to, "purpose": "client", "plan": "", "push": "", "session": ""}
    return said | changes


def admitted(place: Place, who: str = "client", rank: int = P0) -> Raw:
    raw = Raw(place, who, rank)
    try:
        raw.send(Kind.HELLO, hello("client", ROLES[rank]))
        assert raw.receive()[0] is Kind.HELLO
        raw.send(Kind.ACCEPT)
    except BaseException:
        raw.wire.close()
        raise
    return raw


# --- certificates ---


def test_an_expired_certificate(place: Trio) -> None:
    with works(place), place.connect("client3") as remote, pytest.raises(PartyError, match="certificate expired"):
        remote.predict(images(1))


def test_a_certificate_that_is_not_pinned(place: Trio) -> None:
    before = refusals(place, P0)
    reason = "P0 refused: the certificate is not pinned in the deployment"
    with works(place), place.connect("client4") as remote, pytest.raises(RefusedError, match=reason):
        remote.predict(images(1))
    assert refusals(place, P0) > before


def test_a_certificate_of_another_authority(place: Trio, tmp_path: Path) -> None:
    init_deployment(tmp_path / "other", [("127.0.0.1", 1)] * 3)
    full = load_deployment(place.file)
    stranger = Identity(tmp_path / "other" / "client", full.members[-1])
    tls = context(full, stranger, server=False)
    address = full.party(P0).address
    assert address is not None
    with works(place):
        sock = socket.create_connection(address, timeout=5)
        wire = Wire(sock, tls, server=False, deadline=time.monotonic() + 5)
        with pytest.raises(PartyError, match=r"unknown ca|decrypt error|bad certificate"):
            wire.read(memoryview(bytearray(1)), time.monotonic() + 5)
        wire.close()


def test_a_caller_without_a_certificate_or_with_old_tls(place: Trio) -> None:
    address = place.deployment.party(P0).address
    assert address is not None
    for old in (False, True):
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        tls.check_hostname, tls.verify_mode = False, ssl.CERT_NONE
        if old:
            tls.maximum_version = ssl.TLSVersion.TLSv1_2
        sock = socket.create_connection(address, timeout=5)
        with pytest.raises((ssl.SSLError, ConnectionError)), tls.wrap_socket(sock) as wrapped:
            wrapped.recv(1)


def caller(place: Trio, who: str = "client") -> ssl.SSLContext:
    """A context that shows a good certificate; what else it does is the test's affair."""
    identity = load_identity(place.deployment, place.folder / who)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    tls.check_hostname = False
    tls.load_verify_locations(cadata=place.deployment.authority)
    tls.load_cert_chain(identity.certificate, identity.key)
    return tls


@pytest.mark.parametrize("rank", range(3))
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_good_certificate_over_old_tls(place: Trio, rank: int, version: ssl.TLSVersion) -> None:
    address, tls = place.deployment.party(rank).address, caller(place)
    assert address is not None
    tls.maximum_version = version
    with socket.create_connection(address, timeout=5) as sock:
        if version is ssl.TLSVersion.TLSv1_3:
            with tls.wrap_socket(sock) as wrapped:
                assert wrapped.version() == "TLSv1.3"
            return
        with pytest.raises((ssl.SSLError, ConnectionError), match=r"PROTOCOL_VERSION|protocol version|reset"):
            tls.wrap_socket(sock)


@pytest.mark.parametrize("rank", range(3))
def test_sessions_of_tls_are_not_resumed(place: Trio, rank: int) -> None:
    """No ticket comes, and one that a caller has all the same buys nothing: each connection proves its key again."""
    address, tls = place.deployment.party(rank).address, caller(place)
    assert address is not None
    sessions = []
    for attempt in range(2):
        sock = socket.create_connection(address, timeout=5)
        with tls.wrap_socket(sock, session=sessions[-1] if sessions else None) as wrapped:
            wrapped.settimeout(0.3)
            with suppress(TimeoutError):  # a ticket would come with the first bytes
                wrapped.recv(1)
            assert not wrapped.session_reused, f"attempt {attempt}"
            assert wrapped.session is not None and not wrapped.session.has_ticket
            sessions.append(wrapped.session)


def test_a_party_that_shows_anothers_certificate_is_not_believed(place: Trio) -> None:
    """P1 answers at P0's address: the caller refuses, and P1 is told."""
    full = load_deployment(place.file)
    at_p1 = replace(full.party(P0), address=full.party(P1).address)
    crossed = replace(full, members=tuple(at_p1 if m.role == P0 else m for m in full.members))
    before = refusals(place, P1)
    file = place.folder / "crossed.toml"
    file.write_text(crossed.text())
    reason = "P0 was called, but the certificate shown is that of P1"
    with tacit.connect(file, place.folder / "client") as remote, pytest.raises(RefusedError, match=reason):
        remote.predict(images(1))
    deadline = time.monotonic() + 5
    while refusals(place, P1) == before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert refusals(place, P1) > before


# --- handshakes ---


@pytest.mark.parametrize(
    ("who", "rank", "said", "reason"),
    [
        (
            "client",
            P0,
            hello("P1", "P0", purpose="link"),
            "certificate is that of client, whose role is client, not P1",
        ),
        ("client", P0, hello("client", "P0", purpose="link"), "client may not speak as a party here"),
        ("P2", P1, hello("P0", "P1", purpose="link"), "certificate is that of P2, whose role is P2, not P0"),
        ("P1", P1, hello("P1", "P1", purpose="link"), "P1 may not speak as a party here"),
        ("owner", P0, hello("owner", "P0"), "owner may not send requests to P0"),
        ("client", 2, hello("client", "P2"), "client may not send requests to P2"),
        ("client", P0, hello("client", "P1"), "this is P0, not P1"),
        ("client", P0, hello("client", "P0", version=99), f"protocol version 99, this is {VERSION}"),
        ("client", P0, hello("client", "P0", plan="ab" * 32), "plan digest abababababababab..., here it is"),
        ("client", P0, hello("client", "P0", session="cd" * 16), "session cdcdcdcdcdcdcdcd..., here it is"),
        ("client", P0, hello("client", "P0", purpose="control2"), "unknown purpose 'control2'"),
        ("client", P0, hello("client", "P0", version="1"), "'version' has to be a whole number"),
        ("client", P0, {}, "'version' has to be a whole number"),
    ],
)
def test_handshakes(place: Trio, who: str, rank: int, said: dict[str, Any], reason: str) -> None:
    raw = Raw(place, who, rank)
    raw.send(Kind.HELLO, said)
    assert reason in raw.refused()


def test_a_frame_before_the_handshake(place: Trio) -> None:
    raw = Raw(place, "client", P0)
    raw.send(Kind.CALL, {"what": "status"})
    assert raw.refused() == "a CALL frame where HELLO is due"


# --- frames ---


def test_a_replayed_and_a_reordered_frame(place: Trio) -> None:
    with works(place):
        raw = admitted(place)
        frame = raw.send(Kind.CALL, {"what": "status"}, request=1)
        assert raw.receive()[0] is Kind.REPLY
        raw.write(frame)
        assert raw.refused() == "frame 2 where 3 is due: replayed, lost or out of order"
        raw = admitted(place)
        raw.serial += 1
        raw.send(Kind.CALL, {"what": "status"}, request=1)
        assert "replayed, lost or out of order" in raw.refused()


def test_frames_that_are_too_large_unknown_or_not_for_this_role(place: Trio) -> None:
    with works(place):
        for frame, reason in (
            (Header(Kind.CAST, 2, 1 << 40).pack(), "a CAST frame of 1099511627776 bytes, 65536 are allowed"),
            (Header(Kind.CALL, 2, 1 << 17).pack(), "a CALL frame of 131072 bytes"),
            (Header(Kind.DATA, 2, 1 << 40, 7).pack(), "data for request 7, which is not under way"),
            (HEADER.pack(77, 0, 0, 2, 0, 0), "a frame of unknown kind 77"),
            (HEADER.pack(Kind.DATA, 9, 0, 2, 0, 0), "a frame of unknown phase 9"),
            (Header(Kind.HELLO, 2, 2).pack() + b"{}", "a HELLO frame after the handshake"),
            (Header(Kind.CAST, 2, 2).pack() + b"[]", "a control frame that is not an object"),
            (Header(Kind.CAST, 2, 5).pack() + b"\xff\x80abc", "a control frame that is not JSON"),
            (Header(Kind.CAST, 2, 16).pack() + b'{"what":"start"}', "'start', which client may not ask for"),
        ):
            raw = admitted(place)
            raw.write(frame)
            assert reason in raw.refused()


def test_a_share_of_the_wrong_size(place: Trio) -> None:
    with works(place):
        raw = admitted(place, rank=P1)
        raw.send(Kind.CAST, {"what": "share", "batch": 2, "seconds": 5}, request=5)
        raw.send(Kind.DATA, request=5, raw=bytes(8))
        assert raw.refused() == "a share of 8 bytes where the plan provides for 72"


def test_a_batch_beyond_the_limit_is_refused_by_the_party_too(place: Trio) -> None:
    raw = admitted(place)
    raw.send(Kind.CAST, {"what": "request", "batch": 5000, "seconds": 5, "seed": "00" * 16}, request=5)
    kind, body = raw.receive()
    assert kind is Kind.CAST and body["reason"] == "a batch of 5000 is more than the 1024 allowed" and body["refused"]
    raw.wire.close()


def test_calls_that_nobody_waits_for_do_not_pile_up(place: Trio) -> None:
    with works(place):
        raw = admitted(place)
        with suppress(PartyError):
            for i in range(3000):
                raw.send(Kind.CALL, {"what": "plan"}, request=i)
        replies = 0
        try:
            while raw.receive()[0] is Kind.REPLY:
                replies += 1
        except PartyError:
            pass
        assert replies < 3000
        raw.wire.close()


def test_one_member_does_not_take_all_connections(place: Trio) -> None:
    held = [admitted(place) for _ in range(QUICK.per_member)]
    try:
        with works(place):
            raw = Raw(place, "client", P0)
            raw.send(Kind.HELLO, hello("client", "P0"))
            assert raw.refused() == f"client has {QUICK.per_member} connections already"
    finally:
        for raw in held:
            raw.wire.close()
    deadline = time.monotonic() + 5
    while len(place.servers[P0]._links) > 4 and time.monotonic() < deadline:
        time.sleep(0.05)


def test_one_byte_a_second_before_during_and_after_the_handshake(place: Trio) -> None:
    address = place.deployment.party(P0).address
    assert address is not None
    with works(place):
        begin = time.monotonic()
        mute = socket.create_connection(address, timeout=5)
        raws = [Raw(place, "client", P0), admitted(place)]
        done = threading.Event()

        def drip(raw: Raw) -> None:
            with suppress(PartyError):
                while not done.wait(0.3):
                    raw.write(b"\x01")

        threads = [threading.Thread(target=drip, args=(raw,)) for raw in raws]
        for thread in threads:
            thread.start()
        assert mute.recv(1) == b""
        mute.close()
        done.wait(QUICK.handshake_seconds + 0.5)
        done.set()
        for thread in threads:
            thread.join()
        assert all(raw.ended() for raw in raws)
        assert time.monotonic() - begin < 3 * QUICK.handshake_seconds


def test_a_silent_client_is_let_go(place: Trio) -> None:
    raw = admitted(place)
    begin = time.monotonic()
    assert raw.ended()
    assert QUICK.silence_seconds / 2 < time.monotonic() - begin < 2 * QUICK.silence_seconds


# --- fuzz ---


def random_frames(generator: random.Random, count: int) -> Iterator[bytes]:
    """Noise, and well-formed frames with a few bytes changed, cut short or run on."""
    bodies = [b"", b"{}", b'{"what":"request","batch":1,"seconds":1,"seed":"' + b"0" * 32 + b'"}', b"[" * 2000, b"null"]
    for _ in range(count):
        if generator.random() < 0.3:
            yield generator.randbytes(generator.randrange(200))
            continue
        body = generator.choice(bodies)
        frame = bytearray(
            HEADER.pack(
                generator.randrange(10),
                generator.randrange(3),
                generator.randrange(4),
                generator.choice([0, 1, 2, generator.getrandbits(32)]),
                generator.choice([0, 1, generator.getrandbits(64)]),
                generator.choice([len(body), len(body), len(body) + 1, generator.getrandbits(64)]),
            )
            + body
        )
        for _ in range(generator.randrange(4)):
            frame[generator.randrange(len(frame))] = generator.getrandbits(8)
        yield bytes(frame[: generator.randrange(len(frame) + 1)] if generator.random() < 0.2 else frame)


def test_ten_thousand_frames_are_read_or_refused_by_name() -> None:
    """The parser raises nothing but FrameError, and never promises memory beyond its bounds."""
    generator = random.Random(1)
    read = 0
    for raw in random_frames(generator, 10_000):
        if len(raw) < HEADER.size:
            continue
        role = generator.randrange(5)
        flow = Flow(0, 1, {(Phase.ONLINE, role): 1000}, 0.0, 0.0)
        try:
            header = Header.parse(raw[: HEADER.size], generator.choice([0, 1, 2]), role)
            if header.kind is Kind.DATA:
                assert flow.room(role, header.phase, header.length).size <= 1000
            else:
                assert header.length <= 1 << 24
                fields = Fields(decode(raw[HEADER.size : HEADER.size + header.length]))
                fields.text("what", 32)
                fields.integer("batch", 1, 10)
                fields.number("seconds", 0.0, 10.0)
                fields.hexadecimal("seed", 16)
                read += 1
        except FrameError:
            pass
    assert read > 0


def test_a_live_party_survives_fuzzed_handshakes_and_frames(place: Trio) -> None:
    generator = random.Random(2)
    descriptors = len(os.listdir("/proc/self/fd"))
    with works(place):
        for i, frame in enumerate(random_frames(generator, 240)):
            raw = Raw(place, "client", i % 2) if i % 3 else admitted(place, "client", i % 2)
            with suppress(PartyError):
                raw.write(frame)
            raw.wire.close()
        for frame in random_frames(generator, 60):  # not even TLS
            address = place.deployment.party(P0).address
            assert address is not None
            with socket.create_connection(address, timeout=5) as sock, suppress(OSError):
                sock.sendall(frame)
    deadline = time.monotonic() + 10
    while (left := len(os.listdir("/proc/self/fd"))) > descriptors + 8 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left <= descriptors + 8
