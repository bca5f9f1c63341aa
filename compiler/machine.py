"""How fast this machine is: a few small networks run once, the features of their work fitted to the time it took.

The result is kept in the user's cache folder under the processor's name and the version of Tacit's code.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
from pathlib import Path

import numpy as np
import torch
from torch import nn

from tacit.driver import compile as compile_model
from tacit.ir.predict import FINDERS, Features, Machine, totals
from tacit.progress import track
from tacit.runtime.channel import LinkModel
from tacit.secure import Secure

OFFLINE = ("phase", "turns", "threads", "products", "weights", "unfolded", "ring", "small")
ONLINE = ("phase", "round", "messages", "items", "lines", "products", "weights", "unfolded", "opened", "small", "local")
_RUNS, _WARM_UP = 9, 2
_LATENCY = 1e-3


def machine() -> Machine:
    """This machine, from the cache, or measured now (about a quarter of a minute)."""
    path = cache_file()
    found = _read(path)
    if found is None:
        found = measure()
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(f".{os.getpid()}.new")
        fresh.write_text(json.dumps({"name": found.name, "offline": found.offline, "online": found.online}))
        fresh.replace(path)
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
        parts = [{str(k): float(v) for k, v in found[phase].items()} for phase in ("offline", "online")]
        return Machine(str(found["name"]), parts[0], parts[1])
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None


def measure() -> Machine:
    """Run the networks and fit; nothing is kept."""
    offline: list[tuple[Features, float]] = []
    online: list[tuple[Features, float]] = []
    for model, shape, reveal, batches in track(_networks(), "measuring this machine, once"):
        torch.manual_seed(0)
        x = torch.rand(4, *shape)
        with torch.no_grad():
            model(x)  # gives lazy layers their sizes
        secure = compile_model(model.eval(), x, reveal=reveal, input_range=(0, 1), frac_bits=12, name="probe")
        for batch in batches:
            times = _times(secure, x[torch.arange(batch) % len(x)])
            work, dealt = totals(secure.plan, batch)
            online.append((work, times[1]))
            offline.append((dealt, times[0]))
        secure.session().close()
    dealing, waking = _wake()
    return Machine(processor(), fit(offline, OFFLINE) | dealing, fit(online, ONLINE) | waking)


def _wake() -> tuple[Features, Features]:
    """How much longer than work and latency dealing and rounds take where links are emulated."""
    x = torch.rand(1, 128)
    secure = compile_model(_stack(128, 4).eval(), x, input_range=(0, 1), frac_bits=12, name="probe")
    plain = _times(secure, x)
    secure.session().close()
    secure.session(LinkModel(_LATENCY, math.inf))
    late = _times(secure, x)
    secure.session().close()
    rounds, items = secure.plan.schedule.rounds, len(secure.plan.requirements())
    dealing = max(0.0, late[0] - plain[0] - _LATENCY) / items
    return {"wake": dealing}, {"wake": max(0.0, late[1] - plain[1] - rounds * _LATENCY) / rounds}


def _times(secure: Secure, x: torch.Tensor) -> tuple[float, float]:
    """Offline and online seconds: of several runs the lower quartile, for other work on the machine only adds."""
    found = []
    for _ in range(_WARM_UP + _RUNS):
        secure(x)
        assert secure.last_run is not None
        found.append((secure.last_run.offline_seconds, secure.last_run.online_seconds))
    kept = found[_WARM_UP:]
    return _quartile([a for a, _ in kept]), _quartile([b for _, b in kept])


def _quartile(times: list[float]) -> float:
    return sorted(times)[len(times) // 4]


def fit(points: list[tuple[Features, float]], keys: tuple[str, ...]) -> dict[str, float]:
    """Coefficients not below zero that make the sum of squared relative errors least (Lawson and Hanson's NNLS)."""
    rows = np.array([[features.get(key, 0.0) / seconds for key in keys] for features, seconds in points])
    scale = np.maximum(rows.max(axis=0), 1e-30)
    solved = _nnls(rows / scale, np.ones(len(points)))
    return {key: float(value) for key, value in zip(keys, solved / scale, strict=True)}


def _nnls(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Non-negative least squares by coordinate descent: few unknowns, so exactness costs nothing."""
    gram, target = a.T @ a, a.T @ b
    x = np.zeros(a.shape[1])
    for _ in range(20_000):
        before = x.copy()
        for i in range(len(x)):
            if gram[i, i] > 0:
                x[i] = max(0.0, x[i] + (target[i] - gram[i] @ x) / gram[i, i])
        if np.abs(x - before).max() < 1e-12:
            break
    return x


_Network = tuple[nn.Module, tuple[int, ...], str, tuple[int, ...]]


def _networks() -> list[_Network]:
    """Each leans on another feature: products of one row and of many, convolutions, comparisons, rounds, moves."""
    moves = nn.Sequential(nn.Flatten(), nn.Unflatten(1, (4, 64)), nn.Flatten())
    return [
        (nn.Linear(1024, 512), (1024,), "logits", (1, 64, 256)),
        (_stack(128, 4), (128,), "logits", (1, 16, 128)),
        (_perceptron(600, 300), (600,), "argmax", (1, 8, 64, 256)),
        (nn.Conv2d(4, 16, 5), (4, 20, 20), "logits", (1, 48)),
        (_convolutions(12, 24, 200), (1, 24, 24), "argmax", (1, 4, 32, 96)),
        (_convolutions(24, 32, 300), (1, 32, 32), "argmax", (1, 8, 64)),
        (moves, (256,), "logits", (1, 64)),
    ]


def _stack(width: int, depth: int) -> nn.Module:
    return nn.Sequential(*(layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.ReLU())))


def _perceptron(inputs: int, hidden: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, 10))


def _convolutions(first: int, second: int, hidden: int) -> nn.Module:
    body = nn.Sequential(nn.Conv2d(1, first, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(first, second, 3), nn.ReLU())
    return nn.Sequential(body, nn.MaxPool2d(2), nn.Flatten(), nn.LazyLinear(hidden), nn.ReLU(), nn.Linear(hidden, 10))


def find(measure: bool) -> Machine | None:
    """What plans ask for this machine's speed."""
    return machine() if measure else cached()


FINDERS.append(find)
