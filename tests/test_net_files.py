"""Deployment files, identities, the ledger and the store: what is written, with which mode, and what is refused."""

from __future__ import annotations

import os
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from net_harness import compiled, free_ports, images, written
from typer.testing import CliRunner

import tacit
from tacit.cli import app
from tacit.ir.cost import CLIENT, OWNER, P0, P1, P2
from tacit.ir.errors import DeploymentError, ProtocolError
from tacit.runtime.net.certificates import init_deployment
from tacit.runtime.net.deployment import Deployment, load_deployment, load_identity, parse_place
from tacit.runtime.net.frames import Fields, FrameError
from tacit.runtime.net.ledger import Ids, Ledger
from tacit.runtime.net.store import Model, SessionRecord, Store

NONCE = "ab" * 16
PLACES = [("127.0.0.1", 7600), ("127.0.0.1", 7601), ("::1", 7602)]


# --- deployments ---


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "deployment"
    init_deployment(folder, PLACES, clients=2, metrics=[("127.0.0.1", 9000), None, None])
    return folder


def test_init_writes_a_file_that_reads_back_and_private_keys(made: Path) -> None:
    found = load_deployment(made / "deployment.toml")
    assert Deployment.parse(found.text()) == found
    assert [(m.name, m.role) for m in found.members] == [
        ("P0", P0),
        ("P1", P1),
        ("P2", P2),
        ("client", CLIENT),
        ("owner", OWNER),
        ("client2", CLIENT),
    ]
    assert found.party(P2).address == ("::1", 7602)
    for member in found.members:
        assert load_identity(found, made / member.name).member == member
        assert (made / member.name).stat().st_mode & 0o777 == 0o700
        assert (made / member.name / "key.pem").stat().st_mode & 0o777 == 0o600
    assert "PRIVATE KEY" not in (made / "deployment.toml").read_text()
    assert {p.name for p in made.rglob("*") if p.is_file()} == {"deployment.toml", "cert.pem", "key.pem"}


def test_init_does_not_overwrite(made: Path) -> None:
    with pytest.raises(DeploymentError, match="exists already"):
        init_deployment(made, PLACES)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("format = 1", "format = 2", "format = 1"),
        ('role = "P2"', 'role = "P1"', "exactly one member P1"),
        ('role = "P2"', 'role = "P3"', "role has to be one of P0, P1, P2, client, owner"),
        ('network = "virtual"', 'network = "moon"', "network has to be one of"),
        ("batch = 1024", "batch = -1", "'batch' has to be a number like 1024"),
        ("batch = 1024", 'batch = "1024"', "'batch' has to be a number like 1024"),
        ("batch = 1024", "batches_of = 1", "unknown limit 'batches_of'"),
        ("127.0.0.1:7600", "127.0.0.1", "is not an address"),
        ("[limits]", "[limit]", "'limits' is missing"),
        ("format = 1", "format = ", "is not TOML"),
        ('name = "client"', 'name = "P0"', "two members have the same name"),
        ('plan = ""', 'plan = ""\nextra = 1', "unknown entries: extra"),
        ('name = "client"', 'name = "client"\nport = 3', "member 'client' has unknown entries: port"),
    ],
)
def test_a_deployment_that_is_wrong_says_where(made: Path, old: str, new: str, reason: str) -> None:
    text = (made / "deployment.toml").read_text()
    assert old in text
    with pytest.raises(DeploymentError, match=reason):
        Deployment.parse(text.replace(old, new))


def test_a_fingerprint_that_is_none(made: Path) -> None:
    found = load_deployment(made / "deployment.toml")
    text = found.text().replace(found.members[0].sha256, "abc")
    with pytest.raises(DeploymentError, match="sha256 has to be 64 hexadecimal digits"):
        Deployment.parse(text)


def test_a_key_that_others_can_read_is_refused(made: Path) -> None:
    found = load_deployment(made / "deployment.toml")
    key = made / "client2" / "key.pem"
    key.chmod(0o640)
    try:
        with pytest.raises(DeploymentError, match="has mode 0640: a key is for its owner alone"):
            load_identity(found, made / "client2")
    finally:
        key.chmod(0o600)
    with pytest.raises(DeploymentError, match="does not exist"):
        load_identity(found, made)
    with pytest.raises(DeploymentError, match="is not pinned"):
        load_identity(replace(found, members=found.members[:3]), made / "client")
    with pytest.raises(DeploymentError, match="cannot be read: No such file"):
        load_deployment(made / "none.toml")


@pytest.mark.parametrize("text", ["", "host", "host:", ":1", "host:99999", "a b:1", "[::1:1", "::1:1"])
def test_addresses(text: str) -> None:
    with pytest.raises(DeploymentError, match="is not an address"):
        parse_place(text)


# --- fields of control frames ---


@pytest.mark.parametrize("wrong", [None, True, 1.0, "1", -1, 11, [1], {}, float("nan"), 10**30])
def test_fields_refuse_by_name(wrong: object) -> None:
    with pytest.raises(FrameError, match="'x' has to be a whole number from 0 to 10"):
        Fields({"x": wrong}).integer("x", 0, 10)
    for read in (lambda f: f.hexadecimal("x", 2), lambda f: f.flag("x") if wrong is not True else f.text("x")):
        with pytest.raises(FrameError, match="'x' has to be"):
            read(Fields({"x": wrong}))


# --- batch ids and the ledger ---


@given(st.lists(st.integers(0, 40)))
def test_ids_are_a_set(values: list[int]) -> None:
    ids, seen = Ids(), set[int]()
    for value in values:
        assert ids.add(value) == (value not in seen)
        seen.add(value)
    assert {v for v in range(42) if v in ids} == seen
    assert ids.highest == max(seen, default=0)
    assert len(ids._starts) == sum(v - 1 not in seen for v in seen)


def test_the_ledger_lets_nothing_through_twice(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger")
    ledger.consume(NONCE, 7, "1")
    with pytest.raises(ProtocolError, match="batch 7 of this session was used before"):
        ledger.consume(NONCE, 7, "1")
    ledger.consume("cd" * 16, 7, "1")  # another session's batch 7 has other keys
    ledger.close()
    again = Ledger(tmp_path / "ledger")
    with pytest.raises(ProtocolError, match="was used before"):
        again.consume(NONCE, 7, "1")
    again.close()


def test_the_disk_has_a_batch_before_consume_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger, synced = Ledger(tmp_path / "ledger"), list[bytes]()
    real = os.fdatasync

    def sync(file: int) -> None:
        real(file)
        synced.append((tmp_path / "ledger").read_bytes())

    monkeypatch.setattr(os, "fdatasync", sync)
    for batch_id in range(5):
        ledger.consume(NONCE, batch_id, "1")
        assert f"{NONCE} {batch_id} 1\n".encode() in synced[-1]
    ledger.close()


def test_callers_side_by_side_each_have_theirs_on_disk(tmp_path: Path) -> None:
    ledger, missing = Ledger(tmp_path / "ledger"), list[int]()

    def consume(first: int) -> None:
        for batch_id in range(first, first + 50):
            ledger.consume(NONCE, batch_id, "1")
            if f"{NONCE} {batch_id} 1\n" not in written(tmp_path / "ledger"):
                missing.append(batch_id)

    threads = [threading.Thread(target=consume, args=(50 * i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ledger.close()
    assert not missing
    assert len((tmp_path / "ledger").read_text().splitlines()) == 300


def test_a_line_cut_short_is_dropped_and_a_full_disk_stops_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ledger").write_text(f"{NONCE} 1 1\n{NONCE} 2")
    ledger = Ledger(tmp_path / "ledger")
    assert 1 in ledger.used(NONCE)
    assert 2 not in ledger.used(NONCE)
    ledger.consume(NONCE, 2, "1")
    assert written(tmp_path / "ledger") == f"{NONCE} 1 1\n{NONCE} 2 1\n"
    monkeypatch.setattr(os, "fdatasync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    for batch_id in (3, 4):
        with pytest.raises(ProtocolError, match="the ledger cannot be written"):
            ledger.consume(NONCE, batch_id, "1")
    ledger.close()


def test_a_ledger_grows_in_steps_and_is_as_long_as_it_says_once_it_is_closed(tmp_path: Path) -> None:
    path, lines = tmp_path / "ledger", 2000  # more than one step
    for session in (NONCE, "cd" * 16):
        ledger = Ledger(path)
        for batch_id in range(lines):
            ledger.consume(session, batch_id, "1")
        assert path.stat().st_size > len(written(path))
        ledger.close()
        assert path.read_text() == written(path)
    assert len(path.read_text().splitlines()) == 2 * lines
    again = Ledger(path)
    assert all(i in again.used(NONCE) and i in again.used("cd" * 16) for i in range(lines))
    assert lines not in again.used(NONCE)
    again.close()


def test_a_ledger_with_a_batch_twice_is_not_accepted(tmp_path: Path) -> None:
    (tmp_path / "ledger").write_text(f"{NONCE} 1 1\n{NONCE} 1 1\n")
    with pytest.raises(ProtocolError, match="holds batch 1 of session abababab twice"):
        Ledger(tmp_path / "ledger")


# --- the store ---


def test_the_store_keeps_models_sessions_and_material(tmp_path: Path) -> None:
    secure = compiled(tmp_path)
    store = Store(tmp_path / "state")
    assert store.load_model() is None
    assert store.load_session() is None
    shares = {k: torch.randint(-(2**62), 2**62, v.shape) for k, v in secure.weights.items()}
    store.save_model(Model("01" * 16, secure.plan, shares))
    store.save_session(SessionRecord(NONCE, "01" * 16, {P1: b"k" * 16, P2: b"l" * 16}, {"m0": torch.ones(2, 2).long()}))
    messages = {P2: [np.arange(5, dtype=np.uint8), np.zeros(0, np.uint8), np.full(70000, 7, np.uint8)]}
    store.put_material(NONCE, 9, 4, messages)
    store.put_material(NONCE, 10, 4, messages)
    assert store.reserve(5) > 5
    with pytest.raises(DeploymentError, match="belongs to a party that is running"):
        Store(tmp_path / "state")
    store.close()

    again = Store(tmp_path / "state")
    model, session = again.load_model(), again.load_session()
    assert model is not None and session is not None
    assert model.plan.digest == secure.plan.digest
    assert all(torch.equal(model.shares[k], shares[k]) for k in shares)
    assert (session.nonce, session.keys) == (NONCE, {P1: b"k" * 16, P2: b"l" * 16})
    assert {i: batch for i, (batch, _) in again.stock(NONCE).items()} == {9: 4, 10: 4}
    assert again.reserved() > 5
    found = again.take_material(NONCE, 9, 4)
    assert [m.tobytes() for m in found[P2]] == [m.tobytes() for m in messages[P2]]
    with pytest.raises(ProtocolError, match="the material of batch 9 is lost"):
        again.take_material(NONCE, 9, 4)
    path = tmp_path / f"state/session/material/{NONCE}-10-4"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(ProtocolError, match="the material of batch 10 is damaged"):
        again.take_material(NONCE, 10, 4)
    again.save_session(SessionRecord("cd" * 16, "01" * 16, {}, {}))
    assert again.stock("cd" * 16) == {}
    assert again.reserved() == 1
    (tmp_path / "state/model/shares.safetensors").write_bytes(b"broken")
    assert again.load_model() is None
    again.close()
    for path in (tmp_path / "state").rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600), path


# --- the command line ---


def command(*args: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(a) for a in args])
    return result.exit_code, result.stdout, result.stderr


def test_commands_fail_with_one_message(tmp_path: Path) -> None:
    compiled(tmp_path)
    np.save(tmp_path / "x.npy", images(1).numpy())
    ports = free_ports(3)
    places = [part for port in ports for part in ("--address", f"127.0.0.1:{port}")]
    folder = tmp_path / "deployment"
    code, out, _ = command("deploy", "init", folder, *places)
    assert code == 0
    assert f"P1       P1      {folder / 'P1'}  127.0.0.1:{ports[1]}" in out
    options = ["--deployment", folder / "deployment.toml", "--identity"]
    for what, reason in (
        (["deploy", "init", folder], "exists already"),
        (["deploy", "init", tmp_path / "new", "--address", "a:1"], "once for each of P0, P1 and P2, not 1 times"),
        (["party", "P1", *options, folder / "P0"], "is the identity of P0, not of P1"),
        (["party", "P0", *options, tmp_path], "does not exist"),
        (["owner", "push", tmp_path / "model", *options, folder / "owner"], "P0 cannot be reached at 127.0.0.1:"),
        (["owner", "push", tmp_path / "model", *options, folder / "client"], "may not push a model"),
        (["client", "predict", tmp_path / "x.npy", *options, folder / "client"], "P0 cannot be reached"),
        (["client", "predict", tmp_path / "x.npy", *options, folder / "owner"], "may not send requests"),
        (["deal", *options, folder / "P2"], "P0 cannot be reached"),
    ):
        code, out, err = command(*what)
        assert code == 1, what
        assert out == "" and err.startswith("tacit: ") and reason in err and len(err.splitlines()) == 1, (what, err)
    code, out, _ = command("status", *options, folder / "owner")
    assert code == 1
    assert out.count("cannot be reached") == 3


def test_connect_is_lazy_and_says_what_is_wrong(tmp_path: Path) -> None:
    init_deployment(tmp_path / "deployment", [("127.0.0.1", port) for port in free_ports(3)])
    with (
        tacit.connect(tmp_path / "deployment/deployment.toml", tmp_path / "deployment/client") as remote,
        pytest.raises(tacit.PartyError, match="P0 cannot be reached"),
    ):
        remote.predict(images(1))
