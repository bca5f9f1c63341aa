"""Parties that die, hang, reset or send garbage: named errors within the deadline, and service goes on by itself."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from forked import Forked
from net_harness import Processes, Trio, close_to, compiled, images
from net_proxy import Proxy, in_front_of, through

import tacit
from tacit.ir.cost import P0, P1, P2, ROLES
from tacit.ir.errors import PartyError, TacitError
from tacit.runtime.net.deployment import Limits, StoreSettings

LIMITS = Limits(
    request_seconds=8.0, frame_seconds=4.0, heartbeat_seconds=0.4, silence_seconds=4.0, handshake_seconds=4.0
)
MARGIN = 2.0  # seconds that an error may come after the deadline, on a busy machine
STORE = StoreSettings(low_water=2, target=4, batches=(1,))

# Before a party starts: die by SIGKILL at the n-th passage of a place around consuming material and the ledger.
KILLED_AT = """
import os, signal
from tacit.runtime.net import engine, store
left = [{n}]
def die():
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
def before(owner, name):
    original = getattr(owner, name)
    def call(*args, **kwargs):
        die()
        return original(*args, **kwargs)
    setattr(owner, name, call)
def after(owner, name):
    original = getattr(owner, name)
    def call(*args, **kwargs):
        found = original(*args, **kwargs)
        die()
        return found
    setattr(owner, name, call)
whole = store.Ledger._write
def torn(self, raw):
    die_now = left[0] == 1
    whole(self, raw[: len(raw) // 2] if die_now else raw)
    die()
place = "{place}"
if "taking" in place:
    engine._EXPANDED = 0  # or it would be in memory already
if place == "torn line":
    store.Ledger._write = torn
else:
    {{
        "before the ledger": lambda: before(store.Ledger, "consume"),
        "before the disk": lambda: before(store.os, "fdatasync"),
        "after the disk": lambda: after(store.Ledger, "_write"),
        "after the ledger": lambda: after(store.Ledger, "consume"),
        "before taking material": lambda: before(store.Store, "take_material"),
        "after taking material": lambda: after(store.Store, "take_material"),
        "before using it": lambda: before(engine.Relay, "run"),
        "after using it": lambda: after(engine.Relay, "run"),
        "storing material": lambda: after(store.Store, "put_material"),
        "reserving ids": lambda: after(store.Store, "reserve"),
    }}[place]()
"""
PLACES = {
    "before the ledger": (0, 1, 2),
    "before the disk": (0, 1, 2),
    "torn line": (0, 1, 2),
    "after the disk": (0, 1, 2),
    "after the ledger": (0, 1, 2),
    "before taking material": (0, 1),
    "after taking material": (0, 1),
    "before using it": (0, 1, 2),
    "after using it": (0, 1, 2),
    "storing material": (0, 1),
    "reserving ids": (0,),
}


class Load:
    """Clients that ask all the time; each request has to end in the right answer or a named error, in time."""

    def __init__(self, place: Processes, threads: int = 3) -> None:
        self.answered = 0
        self.failed: list[str] = []
        self.wrong: list[str] = []
        self._remotes = [place.connect("client"), place.connect("client2")]
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._ask, args=(i,)) for i in range(threads)]
        for thread in self._threads:
            thread.start()

    def _ask(self, i: int) -> None:
        seed = i
        while not self._stop.is_set():
            seed += 10
            x, begin = images(1, seed), time.monotonic()
            try:
                right = close_to(self._remotes[i % 2].predict(x), x)
                reason = "" if right else "a wrong answer"
            except TacitError as error:
                reason = ""
                with self._lock:
                    self.failed.append(str(error))
                if not any(role in str(error) for role in ("P0", "P1", "P2", "session", "plan", "model")):
                    reason = f"an error that names nobody: {error}"
                time.sleep(0.05)
            else:
                with self._lock:
                    self.answered += 1
            if time.monotonic() - begin > LIMITS.request_seconds + MARGIN:
                reason = f"no end within the deadline: {time.monotonic() - begin:.1f} s"
            if reason:
                with self._lock:
                    self.wrong.append(reason)

    def wait_for_answers(self, count: int, seconds: float) -> None:
        wanted, deadline = self.answered + count, time.monotonic() + seconds
        while self.answered < wanted:
            assert time.monotonic() < deadline, f"no service within {seconds} s; last: {self.failed[-3:]}"
            time.sleep(0.02)

    def close(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        for remote in self._remotes:
            remote.close()


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    folder = tmp_path_factory.mktemp("processes")
    compiled(folder)
    place = Processes(folder, limits=LIMITS, store=STORE, recorded=True)
    try:
        place.wait_listening()
        place.push()
        yield place
    finally:
        place.close()


def kill_and_recover(place: Processes, role: str, where: str, n: int) -> None:
    """One death at one place under load, and the restart."""
    load = Load(place)
    try:
        load.wait_for_answers(3, 60)
        place.kill(role)
        place.start(role, KILLED_AT.format(n=n, place=where))
        process = place.running[role]
        deadline = time.monotonic() + 120
        while process.poll() is None:
            assert time.monotonic() < deadline, f"{role} never came to '{where}'"
            time.sleep(0.02)
        assert process.returncode == -signal.SIGKILL
        place.start(role)
        load.wait_for_answers(5, 120)
    finally:
        load.close()
    assert not load.wrong
    place.assert_nothing_used_twice()


@pytest.mark.parametrize(
    ("role", "where"),
    [("P0", "after the disk"), ("P1", "after taking material"), ("P2", "torn line"), ("P1", "before the disk")],
)
def test_death_around_the_ledger(processes: Processes, role: str, where: str) -> None:
    kill_and_recover(processes, role, where, 3)


@pytest.mark.slow
@pytest.mark.parametrize("where", PLACES)
def test_death_at_every_place_at_every_party(processes: Processes, where: str) -> None:
    for rank in PLACES[where]:
        kill_and_recover(processes, ROLES[rank], where, 1 if where == "reserving ids" else 4)


@pytest.mark.slow
def test_sixty_random_deaths(processes: Processes) -> None:
    """Parties, clients and owners at random moments under load."""
    generator = random.Random(3)
    load = Load(processes)
    try:
        for who in generator.sample(["P0", "P1", "P2", "client", "owner"] * 12, 60):
            time.sleep(generator.random())
            if who in ROLES[:3]:
                processes.kill(who)
                processes.start(who)
            else:
                _kill_command(processes, who, generator)
            load.wait_for_answers(3, 120)
    finally:
        load.close()
    assert not load.wrong
    processes.assert_nothing_used_twice()


def _kill_command(place: Processes, who: str, generator: random.Random) -> None:
    """A client or an owner as a process of its own, killed somewhere in the middle."""
    np.save(place.folder / "x.npy", images(1).numpy())
    what = ["client", "predict", str(place.folder / "x.npy")]
    if who == "owner":
        what = ["owner", "push", str(place.folder / "model")]
    process = Forked([*what, *place.options(who)], place.folder / "command.log")
    time.sleep(generator.random())
    process.kill()
    process.wait()


def test_a_party_that_hangs_is_named_and_may_come_back(processes: Processes) -> None:
    with processes.connect() as remote:
        assert close_to(remote.predict(images(1)), images(1))
        for role in ("P2", "P1", "P0"):
            processes.running[role].send_signal(signal.SIGSTOP)
            begin = time.monotonic()
            with pytest.raises(PartyError, match=role):
                remote.predict(images(1))
            assert time.monotonic() - begin < LIMITS.request_seconds + MARGIN
            processes.running[role].send_signal(signal.SIGCONT)
            deadline = time.monotonic() + 20
            while True:
                try:
                    assert close_to(remote.predict(images(1)), images(1))
                    break
                except TacitError:
                    assert time.monotonic() < deadline
                    time.sleep(0.1)
    processes.assert_nothing_used_twice()


@pytest.mark.parametrize("leaving", [P0, P1, P2])
def test_draining_serves_what_was_accepted(tmp_path: Path, leaving: int) -> None:
    compiled(tmp_path)
    trio = Trio(tmp_path, network="wan", limits=Limits(in_flight=8), store=StoreSettings(low_water=0, target=0))
    outcomes: list[str] = []

    def ask(remote: tacit.Remote, seed: int) -> None:
        try:
            outcomes.append("answered" if close_to(remote.predict(images(1, seed)), images(1, seed)) else "wrong")
        except TacitError as error:
            outcomes.append(str(error))

    try:
        trio.push()
        with trio.connect() as remote:
            ask(remote, 0)
            threads = [threading.Thread(target=ask, args=(remote, i)) for i in range(6)]
            for thread in threads:
                thread.start()
            deadline = time.monotonic() + 10
            while trio.servers[leaving].engine.busy < 6:
                assert time.monotonic() < deadline
                time.sleep(0.001)
            drain = threading.Thread(target=trio.servers[leaving].drain)
            drain.start()
            time.sleep(0.05)
            ask(remote, 7)
            for thread in [*threads, drain]:
                thread.join()
        assert outcomes.count("answered") == 7, outcomes  # all that had been accepted
        assert sum(f"{ROLES[leaving]} is shutting down" in outcome for outcome in outcomes) == 1, outcomes
    finally:
        trio.close()


def test_sigterm_ends_a_party(processes: Processes) -> None:
    for role in ("P1", "P0"):
        processes.running[role].send_signal(signal.SIGTERM)
        assert processes.running[role].wait(20) == 0
        assert [line["event"] for line in processes.logs(role)][-1] == "stopped"
        processes.start(role)
        processes.wait_listening()
    processes.wait_serving()
    with processes.connect() as remote:
        assert close_to(remote.predict(images(1)), images(1))


@pytest.fixture(scope="module")
def crossing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Trio, Proxy]]:
    """P1 reaches P0 through a proxy."""
    folder = tmp_path_factory.mktemp("crossing")
    compiled(folder)
    trio = Trio(folder, limits=LIMITS, store=STORE, recorded=True)
    trio.stop(P1)
    proxy = in_front_of(trio, P0)
    trio.start(P1, through(trio.deployment, P0, proxy))
    trio.push()
    yield trio, proxy
    trio.close()
    proxy.close()


@pytest.mark.parametrize("mode", ["reset", "garbage", "half", "stall"])
def test_a_broken_link_ends_requests_with_a_name_and_heals(crossing: tuple[Trio, Proxy], mode: str) -> None:
    trio, proxy = crossing
    with trio.connect() as remote:
        remote.predict(images(1))
        link, failures, begin = trio.servers[P0].engine.links[P1], list[str](), time.monotonic()
        if mode == "reset":
            proxy.reset()
        else:
            proxy.mode = mode
        try:
            for _ in range(20):
                remote.predict(images(1))
                time.sleep(0.02)
        except TacitError as error:
            failures.append(str(error))
        assert all("P1" in reason or "P0" in reason for reason in failures)
        assert time.monotonic() - begin < LIMITS.request_seconds + MARGIN
        proxy.mode = "pass"
        deadline = time.monotonic() + 10
        while trio.servers[P0].engine.links.get(P1) in (None, link):  # the broken one is gone, another takes its place
            assert time.monotonic() < deadline
            time.sleep(0.05)
        trio.wait_serving()
        while True:
            try:
                assert close_to(remote.predict(images(2)), images(2))
                break
            except TacitError:
                assert time.monotonic() < deadline
                time.sleep(0.1)
    trio.assert_nothing_used_twice()
