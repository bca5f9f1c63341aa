"""The files of a party's state: whose they are, what is on disk when, and what a damaged or foreign one leads to."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from forked import Forked
from net_harness import free_ports, written

from tacit.ir.cost import P1, P2
from tacit.ir.errors import DeploymentError, ProtocolError, TacitError
from tacit.runtime.net import files
from tacit.runtime.net.certificates import init_deployment
from tacit.runtime.net.ledger import Ledger
from tacit.runtime.net.store import SessionRecord, Store

NONCE, OTHER = "ab" * 16, "cd" * 16


# --- the ledger ---


def test_closing_waits_for_what_is_being_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A `consume` that returns has its line in the file, whenever the ledger is closed; one that has none raises."""
    path, real = tmp_path / "ledger", os.fdatasync
    writing, go_on = threading.Event(), threading.Event()

    def slow(file: int) -> None:
        writing.set()
        go_on.wait(10)
        real(file)

    monkeypatch.setattr(os, "fdatasync", slow)
    ledger, outcomes = Ledger(path), dict[int, str]()

    def consume(batch_id: int) -> None:
        try:
            ledger.consume(NONCE, batch_id, "1")
            outcomes[batch_id] = "on disk"
        except ProtocolError as error:
            outcomes[batch_id] = str(error)

    first = threading.Thread(target=consume, args=(1,))
    first.start()
    writing.wait(10)
    second = threading.Thread(target=consume, args=(2,))  # waits for the first, with a line of its own
    second.start()
    while len(ledger._waiting) < 1:
        time.sleep(0.001)
    closing = threading.Thread(target=ledger.close)
    closing.start()
    time.sleep(0.05)
    assert closing.is_alive()  # the first is still being written
    go_on.set()
    for thread in (first, second, closing):
        thread.join(10)
        assert not thread.is_alive()
    with pytest.raises(ProtocolError, match="the ledger was closed"):
        ledger.consume(NONCE, 3, "1")
    ledger.close()
    assert outcomes == {1: "on disk", 2: "on disk"}
    assert path.read_text() == f"{NONCE} 1 1\n{NONCE} 2 1\n"


def test_closing_at_any_moment_loses_no_line_that_counts(tmp_path: Path) -> None:
    for turn in range(40):
        path = tmp_path / f"ledger{turn}"
        ledger, on_disk, reasons = Ledger(path), list[int](), set[str]()

        def consume(
            first: int, ledger: Ledger = ledger, on_disk: list[int] = on_disk, reasons: set[str] = reasons
        ) -> None:
            try:
                for batch_id in range(first, first + 1000):
                    ledger.consume(NONCE, batch_id, "1")
                    on_disk.append(batch_id)
            except TacitError as error:
                reasons.add(str(error))

        threads = [threading.Thread(target=consume, args=(1000 * i,)) for i in range(3)]
        for thread in threads:
            thread.start()
        while not on_disk:
            time.sleep(0)
        ledger.close()
        for thread in threads:
            thread.join(10)
        assert reasons == {"the ledger was closed"}
        assert {int(line.split()[1]) for line in path.read_text().splitlines()} >= set(on_disk)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"garbage", "line 2 is damaged"),
        (b"", "line 2 is damaged"),
        (f"{NONCE} x 1".encode(), "line 2 is damaged"),
        (f"{NONCE} -3 1".encode(), "line 2 is damaged"),
        (f"{NONCE} 99999999999 1".encode(), "line 2 is damaged"),
        (f"{NONCE} {'9' * 5000} 1".encode(), "line 2 is damaged"),
        (f"{NONCE} \u0663 1".encode(), "line 2 is damaged"),
        (f"{NONCE[:-1]} 3 1".encode(), "line 2 is damaged"),
        (f"{NONCE} 3".encode(), "line 2 is damaged"),
        (f"{NONCE} 3 1 1".encode(), "line 2 is damaged"),
        (b"\xff\xfe", "line 2 is damaged"),
        (f"{NONCE} 1 1".encode(), "line 2 holds batch 1 of session abababab twice"),
    ],
)
def test_a_ledger_that_says_something_else_is_refused_and_left_as_it_is(
    tmp_path: Path, line: bytes, reason: str
) -> None:
    path = tmp_path / "ledger"
    content = f"{NONCE} 1 1\n".encode() + line + f"\n{NONCE} 4 1\n{NONCE} 5".encode() + bytes(50)
    path.write_bytes(content)
    for _ in range(2):
        with pytest.raises(ProtocolError, match=rf"ledger, {reason}"):
            Ledger(path)
        assert path.read_bytes() == content
    with pytest.raises(ProtocolError, match=rf"ledger, {reason}"):
        Store(tmp_path)
    path.unlink()
    Store(tmp_path).close()  # the lock was given back


def test_a_session_begins_with_a_line_of_its_own(tmp_path: Path) -> None:
    store = Store(tmp_path / "state")
    store.save_session(SessionRecord(NONCE, "01" * 16, {}, {}))
    assert written(tmp_path / "state/ledger") == f"{NONCE} 0 session\n"
    assert store.load_session() is not None
    with pytest.raises(ProtocolError, match="batch 0 of this session was used before"):
        store.save_session(SessionRecord(NONCE, "01" * 16, {}, {}))
    store.close()


def test_the_line_is_on_disk_before_the_session_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, seen = Store(tmp_path / "state"), list[bool]()
    real = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if target.name == "session":
            seen.append(f"{NONCE} 0 session\n" in written(tmp_path / "state/ledger"))
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    store.save_session(SessionRecord(NONCE, "01" * 16, {}, {}))
    store.close()
    assert seen == [True]


def test_names_are_on_disk_before_the_first_batch_is_consumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file whose folder was never synced may be gone after a power cut, with all its lines."""
    synced, real, lines = list[Path](), os.fsync, list[int]()
    data, state = os.fdatasync, tmp_path / "state"

    def sync(file: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{file}")))
        real(file)

    def sync_data(file: int) -> None:
        if os.readlink(f"/proc/self/fd/{file}") == str(state / "ledger"):
            lines.append(len(synced))
        data(file)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "fdatasync", sync_data)
    store = Store(state)
    store.save_session(SessionRecord(NONCE, "01" * 16, {}, {}))
    store.reserve(1)
    store.put_material(NONCE, 1, 1, {P2: []})
    store.ledger.consume(NONCE, 1, "1")
    first, last = lines[0], lines[-1]
    assert {tmp_path, state} <= set(synced[:first])  # the folder's name, and those of the ledger and the lock
    assert {state, state / "session", state / "session/material"} <= set(synced[first:last])
    store.close()


# --- whose files they are ---


@pytest.mark.parametrize("name", ["ledger", "lock"])
@pytest.mark.parametrize("kind", ["link", "dangling link", "folder", "pipe"])
def test_only_a_file_is_taken_for_a_file(tmp_path: Path, name: str, kind: str) -> None:
    state, elsewhere = tmp_path / "state", tmp_path / "elsewhere"
    state.mkdir(mode=0o700)
    elsewhere.write_text("not ours")
    make: dict[str, Callable[[Path], object]] = {
        "link": lambda path: path.symlink_to(elsewhere),
        "dangling link": lambda path: path.symlink_to(tmp_path / "nothing"),
        "folder": lambda path: path.mkdir(),
        "pipe": os.mkfifo,
    }
    make[kind](state / name)
    reason = "is a symbolic link" if "link" in kind else "cannot be opened: Is a directory|is not a file"
    with pytest.raises(DeploymentError, match=f"{name} ({reason})"):
        Store(state)
    assert elsewhere.read_text() == "not ours"
    assert not (tmp_path / "nothing").exists()
    (state / name).rmdir() if kind == "folder" else (state / name).unlink()
    Store(state).close()


@pytest.mark.parametrize("name", ["session/session.json", "session/opened.safetensors", "session/reserved"])
def test_nothing_is_read_through_a_link(tmp_path: Path, name: str) -> None:
    store = Store(tmp_path / "state")
    store.save_session(SessionRecord(NONCE, "01" * 16, {P1: b"k" * 16}, {}))
    store.reserve(1)
    path = tmp_path / "state" / name
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DeploymentError, match=f"{name} is a symbolic link"):
        store.reserved() if name.endswith("reserved") else store.load_session()
    store.close()


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    store = Store(tmp_path / "state")
    store.save_session(SessionRecord(NONCE, "01" * 16, {}, {}))
    (tmp_path / "elsewhere").write_text("not ours")
    (tmp_path / "state/session/reserved.new").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DeploymentError, match="is a symbolic link"):
        store.reserve(1)
    assert (tmp_path / "elsewhere").read_text() == "not ours"
    store.close()


def test_a_state_folder_behind_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(mode=0o755)
    (tmp_path / "state").symlink_to(tmp_path / "real")
    with pytest.raises(DeploymentError, match="state is a symbolic link, where a folder"):
        Store(tmp_path / "state")
    assert (tmp_path / "real").stat().st_mode & 0o777 == 0o755
    (tmp_path / "file").write_text("")
    with pytest.raises(DeploymentError, match="file cannot be opened"):
        Store(tmp_path / "file")


def test_what_was_open_to_others_is_closed_to_them(tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir(mode=0o755)
    state.chmod(0o755)
    for name in ("ledger", "lock"):
        (state / name).touch()
        (state / name).chmod(0o666)
    Store(state).close()
    assert state.stat().st_mode & 0o777 == 0o700
    assert {(state / name).stat().st_mode & 0o777 for name in ("ledger", "lock")} == {0o600}


@pytest.mark.parametrize("name", [".", "ledger", "lock"])
def test_what_belongs_to_another_user_is_refused(tmp_path: Path, name: str) -> None:
    """In the system's place the test says whose it is: it cannot give files away."""
    state = tmp_path / "state"
    Store(state).close()
    found, modes, real = (state / name).stat(), list[int](), os.fstat

    def stat(opened: int) -> os.stat_result:
        seen = real(opened)
        return os.stat_result([*seen[:4], seen.st_uid + (seen.st_ino == found.st_ino), *seen[5:10]])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files.os, "fstat", stat)
        patch.setattr(files.os, "fchmod", lambda opened, mode: modes.append(mode))
        with pytest.raises(DeploymentError, match=f"belongs to user {os.geteuid() + 1}, not to the one who runs"):
            Store(state)
    assert not modes


# --- the process ---


def test_a_party_leaves_no_core_dump_and_lets_no_debugger_in(tmp_path: Path) -> None:
    init_deployment(tmp_path / "deployment", [("127.0.0.1", port) for port in free_ports(3)])
    asked = """
import ctypes, resource
from tacit.runtime.net import server
class Asked:
    def __init__(self, *_):
        print(ctypes.CDLL(None).prctl(3, 0, 0, 0, 0), resource.getrlimit(resource.RLIMIT_CORE))
        raise SystemExit(0)
server.PartyServer = Asked
"""
    options = ["--deployment", tmp_path / "deployment/deployment.toml", "--identity", tmp_path / "deployment/P1"]
    party = Forked(["party", "P1", *options], tmp_path / "out", tmp_path / "err", asked)
    party.wait(60)
    assert (tmp_path / "out").read_text() == "0 (0, 0)\n", (tmp_path / "err").read_text()
