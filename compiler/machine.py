"""What a process took of this machine, and how fast it is: a few small networks run once, the features of their work
fitted to the time it took.

That result is kept in the user's cache folder under the processor's name and the version of Tacit's code.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import resource
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from tacit.driver import compile as compile_model
from tacit.ir.files import write_whole
from tacit.ir.predict import FINDERS, Features, Machine, Pace, totals
from tacit.progress import track
from tacit.runtime.channel import LinkModel
from tacit.secure import Secure

# What takes as long for an element in both ways, but for what a second core gains; and what each way adds.
WORK = {
    "offline": ("products", "weights", "unfolded", "ring", "small"),
    "online": ("products", "weights", "unfolded", "opened", "small", "local"),
}
OVERHEAD = {"offline": ("phase", "items"), "online": ("phase", "round", "items", "lines")}
_ROUNDS, _RUNS = 3, 4  # of all networks, and of each in a round
_LATENCY = 1e-3
_MANY = 512  # rows that are not little any more for that network


def peak_memory() -> int:
    """The most memory that this process has had resident, in bytes.

    By the kernel's account of its address space: getrusage, on Linux, counts what the process that started this one
    had, too.
    """
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def machine() -> Machine:
    """This machine, from the cache, or measured now (about a quarter of a minute)."""
    path = cache_file()
    found = _read(path)
    if found is None:
        found = measure()
        with suppress(OSError):  # where it cannot be kept, it is measured again
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, json.dumps(asdict(found)).encode())
    return found


def cached() -> Machine | None:
    """This machine, where it was measured before."""
    return _read(cache_file())


def cache_file() -> Path:
    """Where the measurement of this processor, with these threads and this code, is kept."""
    told = f"{processor()} {os.cpu_count()} {torch.__version__} {np.__version__} {_code()}"
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tacit"
    return root / f"machine-{hashlib.sha256(told.encode()).hexdigest()[:16]}.json"


def processor() -> str:
    """The name of the processor, as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _code() -> str:
    """A digest of what runs during an inference: another version may be faster."""
    here = Path(__file__).parent
    sources = sorted(
        [*(here / "runtime").glob("*.py"), *(here / "ir" / "ops").glob("*.py"), here / "ir" / "predict.py"]
    )
    return hashlib.sha256(b"".join(path.read_bytes() for path in [*sources, Path(__file__)])).hexdigest()


def _read(path: Path) -> Machine | None:
    try:
        found = json.loads(path.read_text())
        return Machine(str(found["name"]), *(_pace(found[mode]) for mode in ("turns", "threads")))
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None


def _pace(found: dict[str, dict[str, float]]) -> Pace:
    return Pace(*({str(k): float(v) for k, v in found[phase].items()} for phase in ("offline", "online")))


def measure() -> Machine:
    """Run the networks and fit; nothing is kept."""
    subjects = list(_subjects())
    for _ in track(range(_ROUNDS), "measuring this machine, once"):  # a moment's other work spoils no network alone
        for subject in subjects:
            subject.times += _times(subject.secure, subject.x)
    points = {
        phase: [
            Point(subject.little, totals(subject.secure.plan, len(subject.x))[i], _quartile(subject.times, i))
            for subject in subjects
        ]
        for i, phase in enumerate(("online", "offline"))
    }
    for subject in subjects:
        subject.secure.session().close()
    online, offline = (fit(points[phase], WORK[phase], OVERHEAD[phase]) for phase in ("online", "offline"))
    turns, threads = (
        Pace(offline[little] | dealing, online[little] | waking)
        for little, (dealing, waking) in ((True, _wake(1)), (False, _wake(_MANY)))
    )
    return Machine(processor(), turns, threads)


@dataclass
class _Subject:
    secure: Secure
    x: torch.Tensor
    little: bool
    times: list[tuple[float, float]]  # online, offline


def _subjects() -> Iterator[_Subject]:
    for model, shape, reveal, batches in _networks():
        torch.manual_seed(0)
        x = torch.rand(4, *shape)
        with torch.no_grad():
            model(x)  # gives lazy layers their sizes
        secure = compile_model(model.eval(), x, reveal=reveal, input_range=(0, 1), frac_bits=12, name="probe")
        for batch in batches:
            yield _Subject(secure, x[torch.arange(batch) % len(x)], secure.plan.cost(batch=batch).little, [])


def _wake(batch: int) -> tuple[Features, Features]:
    """How much longer than work and latency dealing and rounds take where links are emulated."""
    x = torch.rand(batch, 128)
    secure = compile_model(_stack(128, 4).eval(), x, input_range=(0, 1), frac_bits=12, name="probe")
    plain: list[tuple[float, float]] = []
    late: list[tuple[float, float]] = []
    for link, times in ((None, plain), (LinkModel(_LATENCY, math.inf), late)):
        secure.session(link)
        for _ in range(_ROUNDS):
            times += _times(secure, x)
    secure.session().close()
    online, offline = (_quartile(late, i) - _quartile(plain, i) for i in range(2))
    rounds, items = secure.plan.schedule.rounds, len(secure.plan.requirements())
    dealing = max(0.0, offline - _LATENCY) / items
    return {"wake": dealing}, {"wake": max(0.0, online - rounds * _LATENCY) / rounds}


def _times(secure: Secure, x: torch.Tensor) -> list[tuple[float, float]]:
    """Online and offline seconds of several runs, after one that warms up."""
    found = []
    for _ in range(1 + _RUNS):
        secure(x)
        assert secure.last_run is not None
        found.append((secure.last_run.online_seconds, secure.last_run.offline_seconds))
    return found[1:]


def _quartile(times: Sequence[tuple[float, float]], i: int) -> float:
    """The lower one: other work on the machine only adds."""
    return sorted(found[i] for found in times)[len(times) // 4]


@dataclass(frozen=True)
class Point:
    """What one batch of one network took."""

    little: bool
    features: Features
    seconds: float


def fit(points: Sequence[Point], work: Sequence[str], overhead: Sequence[str]) -> dict[bool, dict[str, float]]:
    """Coefficients where parties take turns (True) and where they compete (False).

    They are not below zero, and the sum of squared relative errors is least (Lawson and Hanson's NNLS), for the best of
    many factors between the work of both ways.
    """
    best = (math.inf, 1.0, np.zeros(0))
    for factor in np.linspace(0.3, 1.5, 61):
        rows = np.array([_row(point, work, overhead, factor) for point in points])
        scale = np.maximum(rows.max(axis=0), 1e-30)
        solved = _nnls(rows / scale, np.ones(len(points)))
        error = float(np.square(rows / scale @ solved - 1).sum())
        best = min(best, (error, float(factor), solved / scale), key=lambda found: found[0])
    _, factor, found = best
    own = found[len(work) :].reshape(2, len(overhead))
    return {
        little: dict(zip(work, (found[: len(work)] * (1 if little else factor)).tolist(), strict=True))
        | dict(zip(overhead, own[0 if little else 1].tolist(), strict=True))
        for little in (True, False)
    }


def _row(point: Point, work: Sequence[str], overhead: Sequence[str], factor: float) -> list[float]:
    shared = [point.features.get(key, 0.0) * (1 if point.little else factor) for key in work]
    own = [point.features.get(key, 0.0) for key in overhead]
    none = [0.0] * len(overhead)
    return [value / point.seconds for value in (*shared, *(own + none if point.little else none + own))]


def _nnls(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Non-negative least squares by active sets (Lawson and Hanson 1974), for a few unknowns."""
    x, used = np.zeros(a.shape[1]), np.zeros(a.shape[1], dtype=bool)
    for _ in range(3 * a.shape[1]):
        gain = np.where(used, -np.inf, a.T @ (b - a @ x))
        if gain.max() < 1e-10:
            break
        used[gain.argmax()] = True
        while True:
            z = np.zeros_like(x)
            z[used] = np.linalg.lstsq(a[:, used], b, rcond=None)[0]
            below = used & (z <= 0)
            if not below.any():
                break
            x = x + (z - x) * (x[below] / (x[below] - z[below])).min()
            used &= x > 1e-14
            x[~used] = 0.0
        x = z
    return x


_Network = tuple[nn.Module, tuple[int, ...], str, tuple[int, ...]]


def _networks() -> list[_Network]:
    """Each leans on another feature: products of one row and of many, convolutions, comparisons, rounds, moves.

    Of each, some batches are little and some are not (`PlanCost.little`).
    """
    moves = nn.Sequential(nn.Flatten(), nn.Unflatten(1, (4, 64)), nn.Flatten())
    return [
        (nn.Linear(1024, 512), (1024,), "logits", (1, 64, 200, 1024)),
        (_stack(128, 4), (128,), "logits", (1, 16, 128, 512, 1024)),
        (_perceptron(600, 300), (600,), "argmax", (1, 8, 64, 200, 512, 1024)),
        (nn.Conv2d(4, 16, 5), (4, 20, 20), "logits", (1, 48, 192)),
        (_convolutions(12, 24, 200), (1, 24, 24), "argmax", (1, 4, 16, 48, 128)),
        (_convolutions(24, 32, 300), (1, 32, 32), "argmax", (1, 4, 16, 48)),
        (_block(16), (16, 48, 48), "logits", (1, 4, 16)),
        (moves, (256,), "logits", (1, 64, 8192)),
    ]


def _stack(width: int, depth: int) -> nn.Module:
    return nn.Sequential(*(layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.ReLU())))


def _block(width: int) -> nn.Module:
    """Large tensors, which leave the processor's caches."""
    layers = [nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def _perceptron(inputs: int, hidden: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, 10))


def _convolutions(first: int, second: int, hidden: int) -> nn.Module:
    body = nn.Sequential(nn.Conv2d(1, first, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(first, second, 3), nn.ReLU())
    return nn.Sequential(body, nn.MaxPool2d(2), nn.Flatten(), nn.LazyLinear(hidden), nn.ReLU(), nn.Linear(hidden, 10))


def find(measure: bool) -> Machine | None:
    """What plans ask for this machine's speed."""
    return machine() if measure else cached()


FINDERS.append(find)
