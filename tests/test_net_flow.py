"""Flows: what has arrived, who goes on with it, what is refused before its bytes are read; and the log."""

from __future__ import annotations

import json
import threading
import time

import pytest
import torch

from tacit.ir.cost import CLIENT, P1, P2
from tacit.ir.errors import PartyError
from tacit.ir.op import Spec
from tacit.runtime.net import metrics
from tacit.runtime.net.flow import Flow
from tacit.runtime.net.frames import FrameError, Phase
from tacit.runtime.net.metrics import Log


def waiting_flow(calls: list[str]) -> tuple[Flow, bool]:
    flow = Flow(1, 1, {(Phase.ONLINE, P1): 8, (Phase.ONLINE, P2): 4}, time.monotonic() + 60, 60)
    awaited = {P1: (Spec((1,), torch.int64),), P2: (Spec((4,), torch.uint8),), CLIENT: (Spec((0,), torch.int64),)}
    return flow, flow.there(Phase.ONLINE, awaited, lambda: calls.append(threading.current_thread().name))


def test_a_program_goes_on_in_the_thread_that_brings_the_last_message() -> None:
    calls: list[str] = []
    flow, there = waiting_flow(calls)
    assert not there
    for source, size, name in ((P2, 4, "first"), (P1, 8, "second")):
        assert calls == []
        room = flow.room(source, Phase.ONLINE, size)
        thread = threading.Thread(target=flow.put, args=(source, Phase.ONLINE, 1, room), name=name)
        thread.start()
        thread.join()
    assert calls == ["second"]
    assert flow.there(Phase.ONLINE, {P1: (Spec((1,), torch.int64),)}, calls.clear)
    assert flow.take(P1, Phase.ONLINE, 8)[1].nbytes == 8
    assert calls == ["second"]


def test_a_program_that_waits_is_told_of_a_failure_once_and_of_a_wrong_size_at_once() -> None:
    calls: list[str] = []
    flow, _ = waiting_flow(calls)
    with pytest.raises(FrameError, match="4 bytes where the plan provides for 8"):
        flow.room(P1, Phase.ONLINE, 4)
    flow.put(P2, Phase.ONLINE, 1, flow.room(P2, Phase.ONLINE, 4))
    flow.late()
    assert len(calls) == 1
    with pytest.raises(PartyError, match="P1 did not answer within 60 s"):
        flow.take(P1, Phase.ONLINE, 8)
    flow.fail(PartyError("later"))
    assert len(calls) == 1


def test_a_flood_of_one_event_is_cut_short_and_counted(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(metrics.time, "time", lambda: now[0])
    log = Log("P0")
    for _ in range(50):
        log("refused", what="handshake")
    log("stopped")
    now[0] += 1
    log("refused", what="handshake")
    log("refused", what="handshake")
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [line["event"] for line in lines] == 20 * ["refused"] + ["stopped"] + 2 * ["refused"]
    assert [line.get("suppressed") for line in lines[-2:]] == [30, None]
