"""A compiled model in several processes: forked, spawned, copied. No two of them ever use the same mask."""

from __future__ import annotations

import copy
import hashlib
import io
import multiprocessing as mp
import os
import pickle
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_threads import WITHIN, at_once, called, models, openings, work
from torch import nn

import tacit
from tacit.ir.errors import ProtocolError

Tensor = torch.Tensor
pytestmark = pytest.mark.filterwarnings(
    # Python's own advice against forking a process with threads, which is what has to work here.
    "ignore:.*multi-threaded.*:DeprecationWarning"
)
_SECONDS = 60


def in_a_fork(function: Callable[[], Any]) -> Any:
    """What the function returns in a forked process; fails where that does not end."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            with os.fdopen(writer, "wb") as out:
                out.write(pickle.dumps(function()))
            os._exit(0)
        except BaseException as error:
            sys.stderr.write(f"in the fork: {error!r}\n")
            os._exit(1)
    os.close(writer)
    until = time.monotonic() + _SECONDS
    while os.waitpid(pid, os.WNOHANG) == (0, 0):
        if time.monotonic() > until:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            pytest.fail("a forked process hangs")
        time.sleep(0.01)
    with os.fdopen(reader, "rb") as found:
        raw = found.read()
    assert raw, "the forked process failed"
    return pickle.loads(raw)


def recorded(secure: tacit.Secure, x: Tensor) -> tuple[Tensor, list[tuple[object, ...]]]:
    """The answer, and what P1 opened to P0."""
    session = secure.session()
    session.network.transcript = []
    return secure(x), openings(session)


def test_a_fork_has_masks_of_its_own() -> None:
    """The difference of what is opened in two processes would be that of the clients' inputs."""
    secure, model, shape = models()[0]
    x = torch.rand(2, *shape)
    secure(x)
    (a, mine), (b, theirs), (c, others) = (
        recorded(secure, x),
        in_a_fork(lambda: recorded(secure, x)),
        in_a_fork(lambda: recorded(secure, x)),
    )
    for answer in (a, b, c):
        assert (answer - model(x)).abs().max() < WITHIN
    assert len(set(mine + theirs + others)) == len(mine) + len(theirs) + len(others)


@pytest.mark.parametrize("batch", [3, 400])
def test_a_fork_answers(batch: int) -> None:
    """By turns and in threads, whatever cores torch computed on before, and the oracle too."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 10)).eval()
    x = torch.rand(batch, 784)
    secure = tacit.compile(model, x[:3], input_range=(0, 1))
    with torch.no_grad():
        wanted = model(x)  # with torch's own threads
    assert (secure(x) - wanted).abs().max() < WITHIN

    def child() -> list[float]:
        answers = (secure(x), secure.check(x), secure.reference(x), next(iter(secure.stream([x]))))
        return [float((answer - wanted).abs().max()) for answer in answers]

    assert max(in_a_fork(child)) < WITHIN
    assert (secure(x) - wanted).abs().max() < WITHIN


def test_a_fork_in_the_middle_of_other_threads_calls() -> None:
    secure, model, shape = models()[1]
    stop, ended = threading.Event(), Counter[str]()

    def beside() -> None:
        while not stop.is_set():
            ended.update(work(secure, model, shape, 1, 5))

    threads = [threading.Thread(target=beside) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(5):
            assert in_a_fork(lambda: work(secure, model, shape, 3, 7)) == Counter(right=3)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert set(ended) == {"right"}


def test_a_session_stays_with_its_process() -> None:
    """Also what was dealt, and a stream that was begun: both processes would open under the same masks."""
    secure, _, shape = models()[0]
    session, x = secure.session(), torch.zeros(1, *shape, dtype=torch.int64)
    dealt, begun = session.deal(1), secure.stream([torch.rand(1, *shape)] * 5)
    next(begun)

    def refusals() -> list[str]:
        out = []
        for attempt in (
            lambda: session.deal(1),
            lambda: session.infer(dealt, {"input": x}),
            lambda: session.request({"input": x}),
            lambda: next(begun),
        ):
            try:
                attempt()
            except ProtocolError as error:
                out.append(str(error))
        return out

    found = in_a_fork(refusals)
    assert len(found) == 4 and all("belongs to the process that opened it" in reason for reason in found)
    session.infer(dealt, {"input": x})
    assert len(list(begun)) == 4


def test_copies_have_sessions_of_their_own(tmp_path: Path) -> None:
    import joblib

    secure, model, shape = models()[2]
    x = torch.rand(2, *shape)
    secure(x)
    buffer = io.BytesIO()
    torch.save(secure, buffer)
    buffer.seek(0)
    joblib.dump(secure, tmp_path / "model.joblib")
    copies = [
        copy.copy(secure),
        copy.deepcopy(secure),
        pickle.loads(pickle.dumps(secure)),
        torch.load(buffer, weights_only=False),
        joblib.load(tmp_path / "model.joblib"),
    ]
    sent: list[tuple[object, ...]] = []
    for one in (secure, *copies):
        assert one.plan == secure.plan and one.plan.digest == secure.plan.digest
        answer, opened = recorded(one, x)
        assert (answer - model(x)).abs().max() < WITHIN
        sent += opened
    assert len({id(one.session()) for one in (secure, *copies)}) == 6
    assert len(set(sent)) == len(sent)


def test_sessions_and_material_cannot_be_copied() -> None:
    secure, _, shape = models()[0]
    session, x = secure.session(), torch.zeros(1, *shape, dtype=torch.int64)
    for copier in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="copy the compiled model"):
            copier(session)
    dealt = session.deal(1)
    again = copy.copy(dealt)
    session.infer(dealt, {"input": x})
    with pytest.raises(ProtocolError, match="used before"):
        session.infer(again, {"input": x})
    with pytest.raises(ProtocolError, match="another session"):
        session.infer(copy.copy(secure).session().deal(1), {"input": x})


# --- workers ---

Known = list[tuple[tacit.Secure, nn.Module, tuple[int, ...]]]


def worker(job: tuple[Known, int, int, int]) -> tuple[Counter[str], list[bytes]]:
    """Threads that call all models, and a stream beside them; how the calls ended, and what P1 opened to P0."""
    torch.set_num_threads(1)
    known, threads, calls, batches = job
    for secure, _, _ in known:
        secure.session().network.transcript = []
    ended = at_once(called(known, threads, calls, batches))
    return ended, [digest(message) for secure, _, _ in known for message in openings(secure.session())]


def digest(message: tuple[object, ...]) -> bytes:
    return hashlib.sha256(repr(message).encode()).digest()


def in_workers(method: str, workers: int, threads: int, calls: int, batches: int) -> None:
    """What all processes open, this one included, is different everywhere: nothing is masked twice alike."""
    known = models()
    job = known, threads, calls, batches
    mine = worker((known, 1, 3, 2))
    with mp.get_context(method).Pool(workers) as pool:
        found = pool.map_async(worker, [job] * workers, chunksize=1).get(600)
    for ended, _ in found:
        assert ended == Counter(right=threads * (calls // len(known)) * len(known) + batches)
    sent = [message for _, messages in (mine, *found) for message in messages]
    assert len(sent) > workers * threads * calls and len(set(sent)) == len(sent)


def test_forked_workers() -> None:
    in_workers("fork", workers=3, threads=2, calls=6, batches=3)


def test_spawned_workers() -> None:
    in_workers("spawn", workers=1, threads=2, calls=6, batches=3)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_four_workers_of_eight_threads_of_five_hundred_calls(method: str) -> None:
    in_workers(method, workers=4, threads=8, calls=501, batches=200)


class Answers(torch.utils.data.Dataset[Tensor]):
    def __init__(self, secure: tacit.Secure, xs: Tensor) -> None:
        self.secure, self.xs = secure, xs

    def __len__(self) -> int:
        return len(self.xs)

    def __getitem__(self, i: int) -> Tensor:
        return self.secure(self.xs[i : i + 1])[0]


def test_the_workers_of_a_data_loader() -> None:
    secure, model, shape = models()[0]
    xs = torch.rand(12, *shape)
    secure(xs)
    loader = torch.utils.data.DataLoader(
        Answers(secure, xs), batch_size=4, num_workers=2, multiprocessing_context="fork"
    )
    assert (torch.cat(list(loader)) - model(xs)).abs().max() < WITHIN
