"""Traces: complete, nested, and adding up to the time that was measured."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from models import images, seeded
from torch import nn

import tacit
from tacit import networks
from tacit.ir.cost import ROLES
from tacit.runtime.channel import LinkModel

Event = dict[str, Any]


def read(path: Path) -> tuple[list[Event], dict[str, Any]]:
    found = json.loads(path.read_text())
    return found["traceEvents"], found["otherData"]


@pytest.fixture(scope="module")
def lenet() -> tacit.Secure:
    torch.manual_seed(0)
    x = torch.rand(2, 1, 28, 28)
    secure = tacit.compile(networks.LeNet().eval(), x, reveal="argmax", input_range=(0, 1), name="lenet")
    secure(x)  # kernels are compiled
    return secure


@pytest.mark.parametrize("batch", [2, 32])
def test_slices_add_up_to_the_measured_time(lenet: tacit.Secure, tmp_path: Path, batch: int) -> None:
    """Per party: ops, sends, waits and the executor between them fill the phase, and the executor is the least."""
    shares: dict[tuple[str, str], list[float]] = defaultdict(list)
    for _ in range(3):
        lenet.trace(torch.rand(batch, 1, 28, 28), tmp_path / "trace.json")
        events, told = read(tmp_path / "trace.json")
        run = lenet.last_run
        assert run is not None
        assert told["online_seconds"] == run.online_seconds
        phases = {(e["name"], e["tid"]): e for e in events if e.get("cat") == "phase"}
        for (name, rank), whole in phases.items():
            seconds = run.online_seconds if name == "online" else run.offline_seconds
            assert whole["dur"] == pytest.approx(1e6 * seconds, rel=1e-6)
            spent = defaultdict(float)
            for e in outermost(within(events, whole)):
                spent[e["cat"]] += e["dur"]
            assert 0.95 < sum(spent.values()) / (1e6 * seconds) < 1.05, (name, ROLES[rank], dict(spent), seconds)
            shares[name, ROLES[rank]].append(spent["executor"] / sum(spent.values()))
        assert len(phases) == 7
    # A loaded machine takes the core away between any two slices; without that it is some per cent.
    assert max(min(found) for found in shares.values()) < 0.3, dict(shares)


def outermost(events: list[Event]) -> list[Event]:
    """Without rounds, and without what lies inside an op that deals."""
    out: list[Event] = []
    for e in sorted((e for e in events if e["cat"] != "round"), key=lambda e: (e["ts"], -e["dur"])):
        if not out or e["ts"] >= out[-1]["ts"] + out[-1]["dur"] - 1e-3:
            out.append(e)
    return out


def test_slices_of_a_track_nest(lenet: tacit.Secure, tmp_path: Path) -> None:
    lenet.trace(torch.rand(4, 1, 28, 28), tmp_path / "trace.json")
    events, _ = read(tmp_path / "trace.json")
    for rank in range(4):
        around: list[Event] = []
        for e in sorted((e for e in events if e["ph"] == "X" and e["tid"] == rank), key=lambda e: (e["ts"], -e["dur"])):
            while around and e["ts"] >= around[-1]["ts"] + around[-1]["dur"] - 1e-3:
                around.pop()
            assert not around or e["ts"] + e["dur"] <= around[-1]["ts"] + around[-1]["dur"] + 1e-3
            around.append(e)


def within(events: list[Event], whole: Event) -> list[Event]:
    end = whole["ts"] + whole["dur"]
    return [
        e
        for e in events
        if e["ph"] == "X" and e["tid"] == whole["tid"] and e is not whole and whole["ts"] <= e["ts"] < end
    ]


def test_every_line_round_and_message_is_there(lenet: tacit.Secure, tmp_path: Path) -> None:
    answer = lenet.trace(torch.rand(3, 1, 28, 28), str(tmp_path / "trace.json"))
    assert answer.shape == (3,)
    events, told = read(tmp_path / "trace.json")
    run, plan = lenet.last_run, lenet.plan
    assert run is not None
    tracks = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert tracks == {0: "P0", 1: "P1", 2: "P2", 3: "client"}
    lines = {e["args"]["line"] for e in events if e.get("cat") == "op"}
    assert lines == {f"%{node.name}" for node in plan.nodes if not node.op.session}
    rounds = Counter(e["name"] for e in events if e.get("cat") == "round" and e["tid"] == 0)
    assert set(rounds) == {f"round {i + 1}" for i in range(run.rounds + 1)}
    starts = {e["id"]: e for e in events if e["ph"] == "s"}
    ends = {e["id"]: e for e in events if e["ph"] == "f"}
    assert starts.keys() == ends.keys()
    assert all(ends[i]["ts"] >= starts[i]["ts"] and ends[i]["args"] == starts[i]["args"] for i in starts)
    assert sum(e["args"]["bytes"] for e in starts.values()) == run.online_bytes + run.offline_bytes
    assert told["digest"] == plan.digest


def test_a_trace_of_an_emulated_network_shows_its_waits(tmp_path: Path) -> None:
    secure = tacit.compile(seeded(nn.Sequential(nn.Linear(6, 5), nn.ReLU())), images(2, 6), input_range=(-1, 1))
    secure(images(2, 6))
    secure.session(LinkModel(latency_seconds=0.01, bytes_per_second=1e9))
    x = images(4, 6)
    torch.testing.assert_close(secure.trace(x, tmp_path / "t.json"), secure.reference(x), atol=2**-8, rtol=0)
    events, _ = read(tmp_path / "t.json")
    # Whose turn it is when a message is due waits for it; the others' wait is that party's turn.
    waits = sum(e["dur"] for e in events if e.get("cat") == "wait" and "bytes" in e["args"])
    turns = sum(e["dur"] for e in events if e.get("cat") == "wait" and e["tid"] == 1)
    assert waits > 1e6 * 0.01 * 3 and turns > 1e6 * 0.01 * 3


def test_a_trace_needs_a_file_and_inputs_that_fit(lenet: tacit.Secure, tmp_path: Path) -> None:
    with pytest.raises(tacit.InputError, match="the file to write"):
        lenet.trace(torch.rand(1, 1, 28, 28))
    with pytest.raises(tacit.InputError):
        lenet.trace(torch.rand(1, 1, 28, 27), tmp_path / "t.json")
    assert not list(tmp_path.iterdir())
