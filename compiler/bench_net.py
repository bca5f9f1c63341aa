"""Benchmarks over sockets: three party processes on this machine, TLS, one client, several requests in flight."""

from __future__ import annotations

import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from tacit.bench import MODELS
from tacit.driver import compile as compile_model
from tacit.ir.errors import CompileError, RangeWarning
from tacit.ir.predict import network_seconds
from tacit.progress import waiting
from tacit.remote import Remote, connect, push
from tacit.runtime.channel import NETWORKS
from tacit.runtime.net.deployment import Limits
from tacit.runtime.net.local import LocalParties

Tensor = torch.Tensor


@dataclass(frozen=True)
class NetMeasured:
    """Seconds of one request alone (median), by turns with virtual parties in this process, and of many in a pipeline.

    All include offline and online, sharing the input and revealing the answer. `expected_s` is what the
    network alone takes online: rounds x latency, and the bytes that follow one another over the rate.
    """

    model: str
    batch: int
    network: str
    runs: int
    alone_s: float
    virtual_s: float
    expected_s: float
    rounds: int
    pipelined_s: dict[int, float]


def bench_net(
    model: str, *, batch: int = 1, network: str = "virtual", runs: int = 15, in_flight: tuple[int, ...] = (1, 2, 4, 8)
) -> NetMeasured:
    """Measure one model with random weights; raises CompileError for unknown names."""
    if model not in MODELS:
        raise CompileError(f"there is no benchmark model '{model}'; there are {', '.join(MODELS)}")
    if network not in NETWORKS:
        raise CompileError(f"network has to be one of {', '.join(NETWORKS)}, not '{network}'")
    subject = MODELS[model]
    torch.manual_seed(0)
    x = subject.low + torch.rand(batch, *subject.shape) * (subject.high - subject.low)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RangeWarning)  # nobody will ask a model with random weights
        secure = compile_model(
            subject.make().eval(),
            x[:8],
            reveal="argmax",
            input_range=(subject.low, subject.high),
            name=model.replace("-", "_"),
        )
    limits = Limits(in_flight=max(in_flight), request_seconds=600.0, per_client=2 * max(in_flight))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        secure.save(folder / "model")
        with (
            waiting("measuring three processes"),
            LocalParties(folder / "deployment", network=network, limits=limits) as parties,
        ):
            push(parties.file, parties.folder / "owner", folder / "model")
            with connect(parties.file, parties.folder / "client") as remote:
                for _ in range(3):
                    remote.predict(x)
                    secure(x)
                time.sleep(1.0)  # the store fills
                pairs = [(_timed(remote.predict, x), _timed(secure, x)) for _ in range(runs)]
                pipelined = {n: _pipelined(remote, x, n, max(runs, 3 * n)) for n in in_flight}
    return NetMeasured(
        model,
        batch,
        network,
        runs,
        statistics.median(alone for alone, _ in pairs),
        statistics.median(virtual for _, virtual in pairs),
        network_seconds(secure.plan, batch=batch, network=network),
        secure.plan.schedule.rounds,
        pipelined,
    )


def _timed(predict: Callable[[Tensor], Tensor], x: Tensor) -> float:
    begin = time.perf_counter()
    predict(x)
    return time.perf_counter() - begin


def _pipelined(remote: Remote, x: Tensor, threads: int, requests: int) -> float:
    """Seconds for each of some requests, that many at a time."""
    with ThreadPoolExecutor(threads) as pool:
        begin = time.perf_counter()
        list(pool.map(lambda _: remote.predict(x), range(requests)))
        return (time.perf_counter() - begin) / requests


def text(found: NetMeasured) -> str:
    rows = [
        f"{found.model}, batch {found.batch}, {found.network} network, three processes over TLS; "
        f"medians of {found.runs} requests, {found.rounds} rounds",
        f"{'virtual parties':<24} {1e3 * found.virtual_s:>10.2f} ms",
        f"{'one request alone':<24} {1e3 * found.alone_s:>10.2f} ms  {found.alone_s / found.virtual_s:.2f} x virtual",
    ]
    if found.expected_s:
        ratio = found.alone_s / found.expected_s
        rows.append(f"{'the network alone':<24} {1e3 * found.expected_s:>10.2f} ms  measured is {ratio:.2f} x that")
    first = next(iter(found.pipelined_s.values()))
    for count, seconds in found.pipelined_s.items():
        rows.append(
            f"{f'{count} in flight':<24} {1e3 * seconds:>10.2f} ms a request, "
            f"{found.batch / seconds:,.0f} images/s, {first / seconds:.2f} x"
        )
    return "\n".join(rows)
