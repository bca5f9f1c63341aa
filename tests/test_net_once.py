"""Nothing dealt is used twice, by what is sent: the oracle of the deaths, and that it notices parties that break it."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from net_harness import Trio, close_to, compiled, images

from tacit.ir.cost import P0, P1, P2
from tacit.ir.errors import ProtocolError, TacitError
from tacit.runtime.net.deployment import StoreSettings
from tacit.runtime.net.engine import Engine
from tacit.runtime.net.stock import Stock
from tacit.runtime.net.store import Ledger


def asked(folder: Path, spoil: Callable[[Trio], None] = lambda _: None, *, dealt: int = 0) -> Trio:
    """Three requests with different inputs, after which the parties have ended."""
    compiled(folder)
    trio = Trio(folder, store=StoreSettings(low_water=0, target=0), recorded=True)
    try:
        trio.push()
        if dealt:
            trio.ask("P2", P0, "deal", count=dealt, batch=1)
        with trio.connect() as remote:
            for seed in range(3):
                spoil(trio)
                with suppress(TacitError):
                    assert close_to(remote.predict(images(1, seed)), images(1, seed))
    finally:
        trio.close()
    return trio


def test_parties_that_keep_to_it(tmp_path: Path) -> None:
    trio = asked(tmp_path, dealt=2)  # two from the store, one dealt on demand
    trio.assert_nothing_used_twice()
    assert len(trio.ledger("P0")) == 3


def test_a_ledger_that_is_never_written_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ledger, "consume", lambda *_: None)
    with pytest.raises(AssertionError, match="P0 sent before its ledger had the batch"):
        asked(tmp_path).assert_nothing_used_twice()


@pytest.mark.parametrize("rank", [P0, P1, P2])
def test_a_ledger_that_is_written_after_the_use_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    consume, run = Ledger.consume, Engine._run
    later: list[Any] = []  # of one party; the next request may come before it has written the last

    def run_then_write(engine: Engine, *work: Any) -> None:
        if engine.rank != rank:
            return run(engine, *work)
        ledger = engine.store.ledger
        monkeypatch.setattr(ledger, "consume", lambda *line: later.append(line), raising=False)
        run(engine, *work)
        consume(ledger, *later.pop(0))

    monkeypatch.setattr(Engine, "_run", run_then_write)
    trio = asked(tmp_path)
    deadline = time.monotonic() + 10
    while len(trio.ledger(f"P{rank}")) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(trio.ledger("P0")) == len(trio.ledger("P1")) == len(trio.ledger("P2")) == 3
    with pytest.raises(AssertionError, match=f"P{rank} sent before its ledger had the batch"):
        trio.assert_nothing_used_twice()


def test_a_batch_that_serves_twice_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same id again, at parties that forgot it: their ledgers say it once, what they send gives them away."""
    consume = Ledger.consume

    def consume_again(ledger: Ledger, *line: Any) -> None:
        with suppress(ProtocolError):
            consume(ledger, *line)

    def forget(trio: Trio) -> None:
        for server in trio.servers.values():
            server.engine._ended.clear()

    monkeypatch.setattr(Ledger, "consume", consume_again)
    monkeypatch.setattr(Stock, "new_id", lambda _: 7)
    trio = asked(tmp_path, forget)
    assert len(trio.ledger("P0")) == 1
    with pytest.raises(AssertionError, match="P0 sent different contents under the same batch"):
        trio.assert_nothing_used_twice()
