"""Tacit and other systems in one run: the same networks, weights and inputs, with encrypted argmax."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from tacit.bench import MODELS, interleaved
from tacit.driver import compile as compile_model
from tacit.ir.errors import CompileError
from tacit.peers import INTERPRETERS
from tacit.peers.launch import NotInstalled, PeerError, run_peer
from tacit.progress import waiting

Tensor = torch.Tensor
Array = np.ndarray[Any, Any]
_WARM_UP = 1
_EXPECTED_AGREEMENT = 0.98  # below it a system computes something else; rounding flips the closest calls only


@dataclass(frozen=True)
class System:
    """A peer in one of its settings; `includes` says what its time holds beside the online phase."""

    name: str
    peer: str
    setting: Mapping[str, str]
    parties: int
    processes: int
    includes: str


SYSTEMS = (
    System("CrypTen 2PC, TTP", "crypten", {"provider": "TTP"}, 2, 3, "dealing by a third process, on demand"),
    System("CrypTen 2PC, TFP", "crypten", {"provider": "TFP"}, 2, 2, "dealing by party 0, from whom nothing is hidden"),
    System("SPU ABY3 3PC", "spu", {"protocol": "ABY3"}, 3, 3, "everything: it has no offline phase"),
    System("SPU SEMI2K 2PC", "spu", {"protocol": "SEMI2K"}, 2, 2, "dealing by party 0, from whom nothing is hidden"),
)
TACIT, PLAINTEXT = "Tacit 3PC", "plaintext float32"
_OURS = "offline and online; parties are threads"

_CONVOLUTIONS = (["conv2d", "conv1"], ["relu"], ["max_pool2d", 2], ["conv2d", "conv2"], ["relu"], ["max_pool2d", 2])
# The networks for systems that cannot import them: layers in order, with the names of their weights.
LAYERS: dict[str, tuple[list[Any], ...]] = {
    "mlp": (["flatten"], ["linear", "fc1"], ["relu"], ["linear", "fc2"]),
    "a": (["flatten"], ["linear", "fc1"], ["relu"], ["linear", "fc2"], ["relu"], ["linear", "fc3"]),
    "b": (*_CONVOLUTIONS, ["flatten"], ["linear", "fc1"], ["relu"], ["linear", "fc2"]),
    "lenet": (*_CONVOLUTIONS, ["flatten"], ["linear", "fc1"], ["relu"], ["linear", "fc2"]),
}
BATCHES = {"mlp": (1, 200), "a": (1, 200), "b": (1, 128), "lenet": (1, 128)}


@dataclass(frozen=True)
class Row:
    """One system on one batch: medians, from the client's floats to its classes; None where nothing was measured.

    `ratio` is the time over Tacit's, `bytes_per_image` the sum over all parties, `agreement` the share of images
    whose class is that of plaintext float32, `problem` why there are no figures, or why they should not be used.
    """

    model: str
    batch: int
    system: str
    includes: str = ""
    version: str | None = None
    ms_per_image: float | None = None
    spread_ms: tuple[float, float] | None = None
    ratio: float | None = None
    rounds: int | None = None
    bytes_per_image: float | None = None
    agreement: float | None = None
    problem: str = ""


def compare(
    models: Sequence[str] = ("mlp", "lenet"),
    *,
    batches: Sequence[int] = (),
    runs: int = 5,
    interpreters: Mapping[str, Path] = INTERPRETERS,
    deadline_s: float = 600.0,
    report: Callable[[Row], None] = lambda row: None,
) -> list[Row]:
    """Every system on every model and batch; raises CompileError for unknown models, and for no trouble of a peer.

    A peer has `deadline_s` for each row; `report` is called with each row when it is there.
    """
    unknown = [model for model in models if model not in LAYERS]
    if unknown:
        raise CompileError(f"there is no '{unknown[0]}' to compare; there are {', '.join(LAYERS)}")
    rows = []
    for model in models:
        for batch in batches or BATCHES[model]:
            for row in _rows(model, batch, runs, interpreters, deadline_s):
                report(row)
                rows.append(row)
    return rows


def _rows(model: str, batch: int, runs: int, interpreters: Mapping[str, Path], deadline_s: float) -> Iterator[Row]:
    plain, x = network(model, batch)
    with torch.no_grad():
        classes = plain(x).argmax(1)
    plaintext, ours = _tacit(model, plain, x, classes, runs)
    assert ours.ms_per_image is not None
    yield replace(plaintext, ratio=(plaintext.ms_per_image or 0.0) / ours.ms_per_image)
    yield ours
    for system in SYSTEMS:
        row = _peer(system, model, plain, x, classes, runs, interpreters[system.peer], deadline_s)
        yield row if row.ms_per_image is None else replace(row, ratio=row.ms_per_image / ours.ms_per_image)


def network(model: str, batch: int) -> tuple[torch.nn.Module, Tensor]:
    """A network with random weights whose classes are all about as frequent, and a batch of images in patches.

    Noise through a network as initialised gives nearly the same class for all images, and agreement would say
    nothing; so the last layer is set to give every class the same mean and spread.
    """
    torch.manual_seed(0)
    plain = MODELS[model].make().eval()
    last = [layer for layer in plain.modules() if isinstance(layer, torch.nn.Linear)][-1]
    with torch.no_grad():
        logits = plain(_images(512))
        last.weight /= logits.std(0)[:, None]
        last.bias.copy_((last.bias - logits.mean(0)) / logits.std(0))
    return plain, _images(batch)


def _images(count: int) -> Tensor:
    return F.interpolate(torch.rand(count, 1, 7, 7), scale_factor=4)


def _tacit(model: str, plain: torch.nn.Module, x: Tensor, classes: Tensor, runs: int) -> tuple[Row, Row]:
    """Plaintext on all cores and Tacit's virtual parties, in turn."""
    secure = compile_model(plain, x[:8], reveal="argmax", input_range=(0, 1), name=model)
    seconds, times = interleaved(plain, secure, x, runs)
    agreement = (secure(x) == classes).double().mean().item()
    run = secure.last_run
    assert run is not None
    traffic = run.online_bytes + run.offline_bytes
    plaintext = _measured(Row(model, len(x), PLAINTEXT, "all cores", torch.__version__, agreement=1.0), seconds)
    ours = Row(model, len(x), TACIT, _OURS, ratio=1.0, rounds=run.rounds, bytes_per_image=traffic / len(x))
    return plaintext, _agreed(_measured(ours, [offline + online for offline, online in times]), agreement)


def _measured(row: Row, seconds: Sequence[float]) -> Row:
    each = [1e3 * s / row.batch for s in seconds]
    return replace(row, ms_per_image=statistics.median(each), spread_ms=(min(each), max(each)))


def _agreed(row: Row, agreement: float) -> Row:
    wrong = agreement < _EXPECTED_AGREEMENT
    problem = f"wrong classes: only {agreement:.1%} are those of plaintext" if wrong else row.problem
    return replace(row, agreement=agreement, problem=problem)


def _peer(
    system: System,
    model: str,
    plain: torch.nn.Module,
    x: Tensor,
    classes: Tensor,
    runs: int,
    python: Path,
    deadline_s: float,
) -> Row:
    row = Row(model, len(x), system.name, system.includes)
    job = {
        **system.setting,
        "parties": system.parties,
        "batch": len(x),
        "layers": LAYERS[model],
        "warm_up": _WARM_UP,
        "runs": runs,
    }
    arrays = {"x": x.numpy(), **{name: value.numpy() for name, value in plain.state_dict().items()}}
    try:
        with waiting(f"measuring {system.name}: {model}, batch {len(x)}"):
            found = run_peer(python, system.peer, job, arrays, processes=system.processes, deadline_s=deadline_s)
    except NotInstalled as error:
        return replace(row, problem=f"not installed ({error}): `make peers`, or --{system.peer} PYTHON")
    except PeerError as error:
        return replace(row, problem=str(error))
    row = replace(
        row,
        version=found.version,
        rounds=found.rounds,
        bytes_per_image=None if found.bytes is None else found.bytes / len(x),
    )
    agreement = float(np.mean(np.array(found.classes) == classes.numpy()))
    return _agreed(_measured(row, found.seconds), agreement)


HEADER = ["system", "ms/image", "from", "to", "/ Tacit", "rounds", "MB/image", "same class", "the time includes"]


def cells(row: Row) -> list[str]:
    """The row as the table shows it, under `HEADER`."""
    low, high = row.spread_ms or (None, None)
    return [
        row.system,
        _figure(row.ms_per_image),
        _figure(low),
        _figure(high),
        "" if row.ratio is None else f"{row.ratio:.3g} x",
        "" if row.rounds is None else str(row.rounds),
        "" if row.bytes_per_image is None else f"{row.bytes_per_image / 1e6:.3f}",
        "" if row.agreement is None else f"{row.agreement:.1%}",
        row.problem or row.includes,
    ]


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
