"""Benchmarks: one network among virtual parties, beside plaintext PyTorch in the same run."""

from __future__ import annotations

import itertools
import os
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tacit import networks
from tacit.driver import compile as compile_model
from tacit.ir.cost import ROLES
from tacit.ir.errors import CompileError, RangeWarning
from tacit.machine import peak_memory
from tacit.progress import track
from tacit.runtime.channel import NETWORKS
from tacit.runtime.timeline import Profile
from tacit.secure import Secure
from tacit.vision import import_torchvision

Tensor = torch.Tensor
_WARM_UP = 2


@dataclass(frozen=True)
class Subject:
    """A network to measure: how it is made, the shape of one input, and the largest input value."""

    make: Callable[[], torch.nn.Module]
    shape: tuple[int, ...]
    low: float = 0.0
    high: float = 1.0


def _torchvision(name: str) -> Callable[[], torch.nn.Module]:
    return lambda: getattr(import_torchvision().models, name)(weights=None)


def _resnet18_cifar() -> torch.nn.Module:
    """ResNet-18 for 32 x 32 images: a first convolution of 3 x 3 without stride, no first pool."""
    model: torch.nn.Module = import_torchvision().models.resnet18(weights=None, num_classes=10)
    model.conv1 = torch.nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    model.maxpool = torch.nn.Identity()
    return model


_IMAGE = (3, 224, 224)
MODELS: dict[str, Subject] = {
    "mlp": Subject(networks.MLP, (1, 28, 28)),
    "lenet": Subject(networks.LeNet, (1, 28, 28)),
    "a": Subject(networks.NetworkA, (1, 28, 28)),
    "b": Subject(networks.NetworkB, (1, 28, 28)),
    "c": Subject(networks.LeNet, (1, 28, 28)),
    "d": Subject(networks.NetworkD, (1, 28, 28)),
    "alexnet": Subject(_torchvision("alexnet"), _IMAGE, -1.0, 1.0),
    "vgg16": Subject(_torchvision("vgg16"), _IMAGE, -1.0, 1.0),
    "resnet18": Subject(_torchvision("resnet18"), _IMAGE, -1.0, 1.0),
    "resnet18-cifar": Subject(_resnet18_cifar, (3, 32, 32), -1.0, 1.0),
}


@dataclass(frozen=True)
class Measured:
    """Medians over the runs, per batch, in seconds and bytes; `spread_s` is the range of the total.

    `total_s` is offline plus online, all three parties, the client's sharing and the reveal; compiling and
    sharing the weights are not in it. `stream_s` is the time from answer to answer where a stream of batches deals
    each while the one before it is online. `peak_rss_bytes` is the whole process: all parties, compiler, plaintext.
    """

    model: str
    batch: int
    network: str
    protocol: str
    reveal: str
    runs: int
    plaintext_s: float
    total_s: float
    online_s: float
    offline_s: float
    stream_s: float
    spread_s: tuple[float, float]
    compile_s: float
    rounds: int
    online_bytes: int
    offline_bytes: int
    peak_rss_bytes: int
    per_op: tuple[dict[str, Any], ...] = ()

    @property
    def ratio(self) -> float:
        return self.total_s / self.plaintext_s


def bench(
    model: str,
    *,
    batch: int = 1,
    network: str = "virtual",
    protocol: str = "fused",
    reveal: str = "argmax",
    runs: int = 7,
    per_op: bool = False,
) -> Measured:
    """Measure one model; raises CompileError for unknown names. Random weights: they do not change the work."""
    if model not in MODELS:
        raise CompileError(f"there is no benchmark model '{model}'; there are {', '.join(MODELS)}")
    if network not in NETWORKS:
        raise CompileError(f"network has to be one of {', '.join(NETWORKS)}, not '{network}'")
    subject = MODELS[model]
    torch.manual_seed(0)
    plain = subject.make().eval()
    x = subject.low + torch.rand(batch, *subject.shape) * (subject.high - subject.low)
    begin = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RangeWarning)  # nobody will ask a model with random weights
        secure = compile_model(
            plain,
            x[:8],
            reveal=reveal,
            protocol=protocol,
            input_range=(subject.low, subject.high),
            name=model.replace("-", "_"),
        )
    compile_s = time.perf_counter() - begin
    secure.session(NETWORKS[network])
    plaintext, times = interleaved(plain, secure, x, runs)
    streamed = _streamed(secure, x, runs)
    profile = _profile(secure, x) if per_op else ()
    run = secure.last_run
    assert run is not None
    totals = [offline + online for offline, online in times]
    return Measured(
        model,
        batch,
        network,
        protocol,
        reveal,
        runs,
        statistics.median(plaintext),
        statistics.median(totals),
        statistics.median(online for _, online in times),
        statistics.median(offline for offline, _ in times),
        streamed,
        (min(totals), max(totals)),
        compile_s,
        run.rounds,
        run.online_bytes,
        run.offline_bytes,
        peak_memory(),
        profile,
    )


def interleaved(
    plain: torch.nn.Module, secure: Secure, x: Tensor, runs: int
) -> tuple[list[float], list[tuple[float, float]]]:
    """Plaintext on all cores and encrypted, in turn, after a warm-up of both."""
    torch.set_num_threads(os.cpu_count() or 1)
    plaintext, encrypted = [], []
    for i in track(range(_WARM_UP + runs), "measuring, after two to warm up"):
        seconds = _plaintext(plain, x)
        secure(x)
        run = secure.last_run
        assert run is not None
        if i >= _WARM_UP:
            plaintext.append(seconds)
            encrypted.append((run.offline_seconds, run.online_seconds))
    return plaintext, encrypted


def _streamed(secure: Secure, x: Tensor, runs: int) -> float:
    """Median seconds from one answer to the next; before the first, nothing is dealt ahead."""
    times = [time.perf_counter() for _ in secure.stream(x for _ in range(runs + 1))]
    return statistics.median(later - earlier for earlier, later in itertools.pairwise(times))


def _plaintext(plain: torch.nn.Module, x: Tensor) -> float:
    """Median of a few float32 passes, with all cores."""
    seconds = []
    with torch.no_grad():
        for _ in range(5):
            begin = time.perf_counter()
            plain(x)
            seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def _profile(secure: Secure, x: Tensor) -> tuple[dict[str, Any], ...]:
    """Seconds of work by line, phase and party in one more run; waiting is not in it."""
    session = secure.session()
    session.profile = found = Profile()
    secure(x)
    session.profile = None
    out = []
    for node in secure.plan.nodes:
        seconds = {f"{ROLES[rank]} {phase}": s for (phase, name, rank), s in found.items() if name == node.name}
        if seconds:
            out.append({"line": node.name, "op": node.op.name, "module": node.path, "seconds": seconds})
    return tuple(out)


def text(found: Measured) -> str:
    """The figures for people: per image and per batch, then the time by line if it was asked for."""
    rows = [
        f"{found.model}, batch {found.batch}, {found.network} network, {found.protocol} protocol, "
        f"reveal {found.reveal}; medians of {found.runs} runs after {_WARM_UP} to warm up, "
        f"compiled in {found.compile_s:.1f} s",
        f"{'':<24} {'per batch':>14} {'per image':>14}",
    ]
    for label, seconds in (
        ("plaintext float32", found.plaintext_s),
        ("offline", found.offline_s),
        ("online", found.online_s),
        ("total", found.total_s),
        ("streamed", found.stream_s),
    ):
        rows.append(f"{label:<24} {1e3 * seconds:>11.3f} ms {1e3 * seconds / found.batch:>11.3f} ms")
    for label, size in (("online bytes", found.online_bytes), ("offline bytes", found.offline_bytes)):
        rows.append(f"{label:<24} {size:>14,} {size // found.batch:>14,}")
    low, high = found.spread_s
    rows += [
        f"total from {1e3 * low:.1f} to {1e3 * high:.1f} ms; {found.ratio:.1f} x plaintext, online "
        f"{found.online_s / found.plaintext_s:.1f} x; {found.rounds} rounds; peak memory "
        f"{found.peak_rss_bytes / 2**30:.2f} GiB (whole process)"
    ]
    for row in found.per_op:
        shares = ", ".join(f"{where} {1e3 * s:.2f} ms" for where, s in row["seconds"].items() if s > 1e-4)
        if shares:
            rows.append(f"%{row['line']:<6} {row['op']:<20} {row['module']:<22} {shares}")
    return "\n".join(rows)
