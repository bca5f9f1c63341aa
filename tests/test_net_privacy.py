"""What the network shows: nothing in the clear in any capture or log, and nothing at P2 that depends on the inputs."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from net_harness import PARTIES, Place, Processes, Trio, close_to, compiled, images, small_model
from net_proxy import Proxy, in_front_of, through
from scipy.stats import chi2_contingency

import tacit
from tacit.ir.cost import CLIENT, OWNER, P0, P1, P2, ROLES
from tacit.runtime import ring
from tacit.runtime.net.deployment import StoreSettings, load_deployment
from tacit.runtime.net.flow import Flow
from tacit.runtime.net.opening import agree
from tacit.runtime.net.store import Model

LEAST = 8  # bytes of a tensor that would be recognised in a capture


def needles(values: torch.Tensor, frac: int) -> list[bytes]:
    """How a tensor could show itself: as floats and as ring integers, row by row."""
    found = []
    for form in (values.float(), values.double(), ring.encode(values.double(), frac)):
        raw = form.contiguous().numpy().tobytes()
        found += [raw[i : i + 2 * LEAST] for i in range(0, len(raw) - 2 * LEAST, 2 * LEAST)]
    return [n for n in found if len(set(n)) > 4]  # zeros are everywhere


def spoken(values: torch.Tensor) -> list[bytes]:
    """How numbers could stand in a text, to four decimals: cut off as the start of a longer figure, or rounded."""
    numbers = values.double().flatten().tolist()
    return [f"{form:.4f}".encode() for v in numbers for form in (v, math.trunc(v * 10_000) / 10_000)]


@pytest.fixture(scope="module")
def captured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Place, bytes, dict[str, torch.Tensor]]:
    """One whole run through recording proxies: parties, owner and client are processes of their own."""
    folder = tmp_path_factory.mktemp("captured")
    compiled(folder)
    place = Processes.__new__(Processes)
    Place.__init__(place, folder, store=StoreSettings(low_water=1, target=2))
    proxies: list[Proxy] = [in_front_of(place, rank) for rank in (P0, P1, P2)]
    behind = place.deployment
    for rank, proxy in enumerate(proxies):
        listening = behind.party(rank).address
        behind = through(behind, rank, proxy)
        behind = replace(
            behind, members=tuple(replace(m, listen=listening) if m.role == rank else m for m in behind.members)
        )
    place.file.write_text(behind.text())
    place.deployment = load_deployment(place.file)
    place.running = {}
    x = images(3, 5)
    np.save(folder / "x.npy", x.numpy())
    try:
        for role in PARTIES:
            place.start(role)
        place.wait_listening()
        said = place.command("owner", "owner", "push", folder / "model")
        said += place.command("client", "client", "predict", folder / "x.npy", "-o", folder / "y.npy")
    finally:
        place.close()
        for proxy in proxies:
            proxy.close()
    said += b"".join((folder / f"{role}.log").read_bytes() for role in PARTIES)
    y = torch.from_numpy(np.load(folder / "y.npy"))
    assert close_to(y, x)
    # How long a request took is told to four decimals, as values could be: the one figure that is left out by name.
    said, timings = re.subn(rb"(?m)^seconds +\d+\.\d{4}$", b"", said)
    assert timings == 1
    traffic = b"".join(bytes(proxy.recorded) for proxy in proxies)
    return place, traffic + said, {"x": x, "y": y}


def test_no_value_is_in_the_capture_or_the_logs(captured: tuple[Place, bytes, dict[str, torch.Tensor]]) -> None:
    place, everything, values = captured
    secure = tacit.load(place.folder / "model")
    assert len(everything) > 10_000
    for name, value in values.items():
        frac = secure.plan.node(secure.plan.result).type.frac if name == "y" else 13
        for needle in needles(value, frac):
            assert needle not in everything, name
        for figure in spoken(value):
            assert figure not in everything, name
    for label, weight in secure.weights.items():
        raw = weight.numpy().tobytes()
        for i in range(0, len(raw) - 16, 16):
            assert raw[i : i + 16] not in everything, label


def test_no_key_is_in_the_capture_or_the_logs(captured: tuple[Place, bytes, dict[str, torch.Tensor]]) -> None:
    import json

    place, everything, _ = captured
    for role in PARTIES:
        record = json.loads((place.folder / role / "state/session/session.json").read_bytes())
        for key in record["keys"].values():
            assert key.encode() not in everything
            assert bytes.fromhex(key) not in everything
        assert (place.folder / role / "key.pem").read_bytes().splitlines()[1] not in everything


def test_the_capture_would_show_what_is_in_the_clear(captured: tuple[Place, bytes, dict[str, torch.Tensor]]) -> None:
    """The needles do find the values where they are in the clear: in the client's own file."""
    place, _, values = captured
    assert any(n in (place.folder / "y.npy").read_bytes() for n in needles(values["y"], 13))
    assert any(n in (place.folder / "x.npy").read_bytes() for n in needles(values["x"], 13))
    for value in values.values():
        assert any(figure in repr(value.tolist()).encode() for figure in spoken(value))
        assert any(figure in repr(value).encode() for figure in spoken(value))


def test_pairs_share_keys_that_the_third_does_not_have(tmp_path: Path) -> None:
    compiled(tmp_path)
    trio = Trio(tmp_path)
    try:
        trio.push()
        keys = {}
        for rank in (P0, P1, P2):
            session = trio.servers[rank].engine.session
            assert session is not None
            keys[rank] = dict(session.seats.keys)
        assert keys[P0][P1] == keys[P1][P0]
        assert keys[P0][P2] == keys[P2][P0]
        assert keys[P1][P2] == keys[P2][P1]
        assert len({keys[P0][P1], keys[P0][P2], keys[P1][P2], keys[P2][P2]}) == 4
        before = keys[P0][P1]
        trio.push()
        session = trio.servers[P0].engine.session
        assert session is not None
        assert session.seats.keys[P1] != before
    finally:
        trio.close()


def test_a_pairs_key_depends_on_everything_that_it_is_for() -> None:
    plan = tacit.compile(small_model(), images(2), input_range=(0, 1)).plan
    model = Model("ab" * 16, plan, {})
    base = agree(P0, P1, b"a" * 32, b"b" * 32, "00" * 16, model)
    others = [
        agree(P0, P2, b"a" * 32, b"b" * 32, "00" * 16, model),
        agree(P0, P1, b"c" * 32, b"b" * 32, "00" * 16, model),
        agree(P0, P1, b"a" * 32, b"c" * 32, "00" * 16, model),
        agree(P0, P1, b"a" * 32, b"b" * 32, "11" * 16, model),
        agree(P0, P1, b"a" * 32, b"b" * 32, "00" * 16, replace(model, push="cd" * 16)),
    ]
    assert len({base, *others}) == 6


def received_by_p2(trio: Trio, x: torch.Tensor, runs: int, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, bytes]]:
    """(sender, phase) and content of every message that reaches P2 in some requests with the input x."""
    found: list[tuple[Any, bytes]] = []
    engine, put = trio.servers[P2].engine, Flow.put

    def record(flow: Flow, source: int, phase: Any, depth: int, payload: Any) -> None:
        if any(flow is mine for mine in list(engine._flows.values())):
            found.append(((source, phase.name, payload.size), payload.tobytes()))
        put(flow, source, phase, depth, payload)

    with monkeypatch.context() as patch, trio.connect() as remote:
        patch.setattr(Flow, "put", record)
        for _ in range(runs):
            remote.predict(x)
    return found


def test_what_p2_receives_does_not_depend_on_the_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Same messages in number and size; the same distribution of their bytes; nothing at all from client and owner."""
    compiled(tmp_path)
    trio = Trio(tmp_path, store=StoreSettings(low_water=0, target=0))
    try:
        trio.push()
        zeros, ones = torch.zeros(200, 1, 3, 3), torch.ones(200, 1, 3, 3)
        views = [received_by_p2(trio, x, 6, monkeypatch) for x in (zeros, ones)]
    finally:
        trio.close()
    kinds = [sorted(kind for kind, _ in view) for view in views]
    assert kinds[0] == kinds[1]
    assert {source for source, _, _ in kinds[0]} <= {P0, P1}
    assert CLIENT not in {k[0] for k in kinds[0]} and OWNER not in {k[0] for k in kinds[0]}, ROLES
    counts = [np.bincount(np.frombuffer(b"".join(raw for _, raw in view), np.uint8), minlength=256) for view in views]
    assert min(c.sum() for c in counts) > 10_000
    used = (counts[0] + counts[1]) >= 10
    assert chi2_contingency(np.stack([c[used] for c in counts])).pvalue > 1e-6
