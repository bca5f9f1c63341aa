"""Streams of batches: the same answers, one read ahead, material for two, and failures that lose nothing."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from models import images, seeded
from torch import nn

import tacit
from tacit.runtime.session import Dealt, Session

Tensor = torch.Tensor


@pytest.fixture
def secure() -> tacit.Secure:
    return tacit.compile(seeded(nn.Sequential(nn.Linear(6, 5), nn.ReLU())), images(4, 6), input_range=(-1, 1))


def test_a_stream_gives_the_answers_of_single_runs(secure: tacit.Secure) -> None:
    batches = [images(n, 6) for n in (5, 1, 7, 7, 2)]
    answers = list(secure.stream(batches))
    assert [len(y) for y in answers] == [len(x) for x in batches]
    for x, y in zip(batches, answers, strict=True):
        # Two runs differ by the rounding of their truncations at most.
        assert (y - secure(x)).abs().max() < 2**-9
        assert (y - secure.reference(x)).abs().max() < 2**-9
    assert secure.last_run is not None
    assert secure.last_run.offline_bytes > 0


def test_several_inputs_come_as_tuples() -> None:
    class Sum(nn.Module):
        def forward(self, left: Tensor, right: Tensor) -> Tensor:
            return left + right

    x = images(3, 6)
    both = tacit.compile(Sum().eval(), (x, x), input_range=(-1, 1))
    (answer,) = both.stream([(x, -x)])
    assert answer.abs().max() == 0


def test_one_batch_is_read_ahead_and_material_kept_for_two(
    secure: tacit.Secure, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, dealt, used, most = 0, 0, 0, 0
    deal, infer = Session._deal, Session.infer

    def counted_deal(self: Session, *args: object, **options: object) -> Dealt:
        nonlocal dealt, most
        dealt += 1
        most = max(most, dealt - used)
        return deal(self, *args, **options)  # type: ignore[arg-type]

    def counted_infer(self: Session, *args: object, **options: object) -> object:
        nonlocal used
        out = infer(self, *args, **options)  # type: ignore[arg-type]
        used += 1
        return out

    def source() -> Iterator[Tensor]:
        nonlocal read
        for _ in range(8):
            read += 1
            yield images(2, 6)

    monkeypatch.setattr(Session, "_deal", counted_deal)
    monkeypatch.setattr(Session, "infer", counted_infer)
    for count, _ in enumerate(secure.stream(source()), 1):
        assert read <= count + 1
    assert (read, dealt, used) == (8, 8, 8)
    assert most <= 2


def test_an_unfit_batch_is_refused_after_the_answers_before_it(secure: tacit.Secure) -> None:
    stream = secure.stream([images(2, 6), images(2, 6), images(2, 6) + 5])
    assert len(next(stream)) == len(next(stream)) == 2
    with pytest.raises(tacit.InputError, match="outside the range"):
        next(stream)
    assert len(secure(images(2, 6))) == 2


def test_a_failure_in_dealing_reaches_the_caller(secure: tacit.Secure, monkeypatch: pytest.MonkeyPatch) -> None:
    deal, count = Session._deal, 0

    def failing(self: Session, *args: object, **options: object) -> Dealt:
        nonlocal count
        count += 1
        if count == 3:
            raise OSError("no material")
        return deal(self, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Session, "_deal", failing)
    answers = []

    def collect() -> None:
        for answer in secure.stream([images(2, 6)] * 5):
            answers.append(answer)

    with pytest.raises(OSError, match="no material"):
        collect()
    monkeypatch.undo()
    assert len(answers) == 2
    assert len(secure(images(2, 6))) == 2


def test_a_stream_that_is_given_up_leaves_no_thread(secure: tacit.Secure) -> None:
    list(secure.stream(images(2, 6) for _ in range(3)))
    before = threading.active_count()
    for _ in range(3):
        stream = secure.stream(images(2, 6) for _ in range(100))
        next(stream)
        stream.close()  # type: ignore[attr-defined]
    until = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < until:
        time.sleep(0.01)
    assert threading.active_count() <= before
    assert len(secure(images(2, 6))) == 2


def test_memory_does_not_grow_with_the_batches() -> None:
    """Each batch has some 20 MB of material: a leak of one in ten would show."""
    network = seeded(nn.Sequential(nn.Linear(100, 400), nn.ReLU(), nn.Linear(400, 10)))
    secure = tacit.compile(network, images(4, 100), input_range=(-1, 1))
    x = images(200, 100)

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    sizes = [resident() for _ in secure.stream(x for _ in range(50))]
    assert sizes[-1] - sizes[9] < 40e6
