"""One compiled model called by many threads at once: every call is right, and none disturbs another."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn

import tacit
from tacit.ir.cost import P0, P1
from tacit.ir.errors import ProtocolError
from tacit.runtime.channel import NETWORKS, LinkModel
from tacit.runtime.session import Session

Tensor = torch.Tensor
WITHIN = 2**-7


def models() -> list[tuple[tacit.Secure, nn.Module, tuple[int, ...]]]:
    """Three of different shape, the last with an answer of integers."""
    torch.manual_seed(0)
    linear = nn.Sequential(nn.Linear(6, 4)).eval()
    deep = nn.Sequential(nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    image = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 5)).eval()
    out = []
    for model, shape in ((linear, (6,)), (deep, (9,)), (image, (1, 6, 6))):
        out.append((tacit.compile(model, torch.rand(4, *shape), input_range=(0, 1)), model, shape))
    return out


def work(secure: tacit.Secure, model: nn.Module, shape: tuple[int, ...], calls: int, seed: int) -> Counter[str]:
    """How the calls of one thread ended."""
    generator, ended = torch.Generator().manual_seed(seed), Counter[str]()
    for i in range(calls):
        x = torch.rand((1 + i % 3, *shape), generator=generator)
        try:
            with torch.no_grad():
                right = (secure(x) - model(x)).abs().max() < WITHIN
        except Exception as error:
            ended[type(error).__name__] += 1
        else:
            ended["right" if right else "wrong"] += 1
    return ended


def stream(secure: tacit.Secure, model: nn.Module, shape: tuple[int, ...], batches: int) -> Counter[str]:
    xs = [torch.rand((2, *shape), generator=torch.Generator().manual_seed(i)) for i in range(batches)]
    with torch.no_grad():
        right = [bool((y - model(x)).abs().max() < WITHIN) for x, y in zip(xs, secure.stream(xs), strict=True)]
    return Counter("right" if fine else "wrong" for fine in right)


def openings(session: Session) -> list[tuple[object, ...]]:
    """What P1 sent P0 in this session, message by message; two that are alike were under the same masks."""
    recorded = session.network.transcript or []
    return [tuple(map(bytes, (t.numpy().tobytes() for t in ts))) for link, ts in recorded if link == (P1, P0)]


def at_once(jobs: list[Callable[[], Counter[str]]]) -> Counter[str]:
    with ThreadPoolExecutor(len(jobs)) as pool:
        return sum((found.result() for found in [pool.submit(job) for job in jobs]), Counter[str]())


def called(
    known: list[tuple[tacit.Secure, nn.Module, tuple[int, ...]]], threads: int, calls: int, batches: int
) -> list[Callable[[], Counter[str]]]:
    """Threads that call all models one after the other, and a stream of one of them."""
    jobs: list[Callable[[], Counter[str]]] = [
        lambda i=i: sum((work(*one, calls // len(known), 100 * i + k) for k, one in enumerate(known)), Counter())
        for i in range(threads)
    ]
    return [*jobs, lambda: stream(*known[1], batches)]


def exercised(threads: int, calls: int, batches: int) -> None:
    """All are right, and nothing is opened twice alike."""
    known = models()
    for secure, _, _ in known:
        secure.session().network.transcript = []
    ended = at_once(called(known, threads, calls, batches))
    assert ended == Counter(right=threads * (calls // len(known)) * len(known) + batches)
    for secure, _, _ in known:
        sent = openings(secure.session())
        assert len(sent) > threads and len(set(sent)) == len(sent)


def test_threads_and_a_stream_beside_them_are_all_right() -> None:
    exercised(threads=6, calls=30, batches=20)


@pytest.mark.slow
def test_eight_threads_of_five_hundred_calls_and_a_stream() -> None:
    exercised(threads=8, calls=501, batches=200)


def test_large_batches_of_several_threads() -> None:
    """Parties in threads of their own rather than by turns."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 10)).eval()
    x = torch.rand(400, 784)
    secure = tacit.compile(model, x[:4], input_range=(0, 1))
    assert not secure.plan.cost(batch=400).little

    def one() -> Counter[str]:
        with torch.no_grad():
            return Counter(right=int((secure(x) - model(x)).abs().max() < WITHIN))

    assert at_once([one] * 4) == Counter(right=4)


def test_an_event_loop_gathers_calls() -> None:
    secure, model, shape = models()[0]

    async def all_of() -> list[Tensor]:
        xs = [torch.rand(2, *shape, generator=torch.Generator().manual_seed(i)) for i in range(12)]
        with torch.no_grad():
            wanted = [model(x) for x in xs]
        answers = await asyncio.gather(*(asyncio.to_thread(secure, x) for x in xs))
        return [y - w for y, w in zip(answers, wanted, strict=True)]

    assert all(difference.abs().max() < WITHIN for difference in asyncio.run(all_of()))


def test_a_call_that_fails_disturbs_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some fail before anything is shared, some in the middle of a run; all others are right, in the same session."""
    secure, model, shape = models()[1]
    session = secure.session()

    def unfit() -> Counter[str]:
        ended = Counter[str]()
        for _ in range(20):
            with pytest.raises(tacit.InputError):
                secure(torch.full((1, *shape), 7.0))
            dealt = session.deal(2)
            with pytest.raises(RuntimeError):
                session.infer(dealt, {"input": torch.zeros(3, *shape, dtype=torch.int64)})
            ended["refused"] += 1
        return ended

    jobs: list[Callable[[], Counter[str]]] = [lambda: work(secure, model, shape, 30, 1)] * 3
    assert at_once([*jobs, unfit]) == Counter(right=90, refused=20)
    assert secure.session() is session


def test_batch_numbers_are_each_given_out_once() -> None:
    secure, *_ = models()[0]
    session, found = secure.session(), []

    def numbers() -> Counter[str]:
        found.extend([session._number() for _ in range(2000)])
        return Counter()

    at_once([numbers] * 8)
    assert len(set(found)) == len(found) == 16000


def test_material_goes_to_one_of_those_who_ask_for_it_at_once() -> None:
    secure, _, shape = models()[0]
    session = secure.session()

    def use(dealt: Any) -> Counter[str]:
        try:
            session.infer(dealt, {"input": torch.zeros(1, *shape, dtype=torch.int64)})
        except ProtocolError:
            return Counter(refused=1)
        return Counter(used=1)

    for _ in range(10):
        dealt = session.deal(1)
        assert at_once([lambda dealt=dealt: use(dealt)] * 4) == Counter(used=1, refused=3)


def test_two_threads_gain_under_an_emulated_wan() -> None:
    """Their rounds wait at the same time: no lock is held around a call."""
    secure, _, shape = models()[1]
    secure(torch.rand(1, *shape))
    secure.session(NETWORKS["wan"])
    x, calls = torch.rand(1, *shape), 2

    def several() -> Counter[str]:
        for _ in range(calls):
            secure(x)
        return Counter(calls=calls)

    begin = time.perf_counter()
    several(), several()
    one_by_one = time.perf_counter() - begin
    begin = time.perf_counter()
    assert at_once([several] * 2) == Counter(calls=2 * calls)
    assert one_by_one / (time.perf_counter() - begin) > 1.3


def test_runs_share_the_rate_of_an_emulated_link() -> None:
    """Two at once do not send twice as much a second."""
    secure, _, shape = models()[2]
    secure(torch.rand(1, *shape))
    busiest = max(secure.last_run.online_links.values())  # type: ignore[union-attr]
    secure.session(LinkModel(latency_seconds=0.0, bytes_per_second=busiest / 0.1))

    def one() -> Counter[str]:
        secure(torch.rand(1, *shape))
        return Counter()

    begin = time.perf_counter()
    at_once([one] * 4)
    assert time.perf_counter() - begin > 0.4


def test_compiling_in_several_threads() -> None:
    torch.manual_seed(0)
    answers: list[Any] = []

    def one(i: int) -> None:
        model = nn.Sequential(nn.Linear(5, 3 + i), nn.ReLU(), nn.Linear(3 + i, 2)).eval()
        x = torch.rand(3, 5)
        try:
            with torch.no_grad():
                answers.append(float((tacit.compile(model, x)(x) - model(x)).abs().max()))
        except Exception as error:
            answers.append(error)

    threads = [threading.Thread(target=one, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 4 and all(isinstance(a, float) and a < WITHIN for a in answers), answers


def test_other_threads_keep_the_cores_that_torch_had() -> None:
    """A thread that starts while a run is under way computes on as many cores as before."""
    before, found = torch.get_num_threads(), []
    torch.set_num_threads(2)
    try:
        secure, _, shape = models()[1]
        secure.session(LinkModel(latency_seconds=0.02, bytes_per_second=1e9))
        running = threading.Thread(target=secure, args=(torch.rand(1, *shape),))
        running.start()
        for _ in range(5):
            thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
            thread.start()
            thread.join()
            time.sleep(0.01)
        running.join()
        assert found == [2] * 5 and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
