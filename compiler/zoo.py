"""torchvision's classification models, compiled at full image size: what each takes, costs, or still lacks."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tacit.driver import compile as compile_model
from tacit.ir.errors import CompileError, RangeWarning
from tacit.machine import peak_memory
from tacit.progress import waiting
from tacit.secure import Secure
from tacit.vision import import_torchvision

Tensor = torch.Tensor
_SIZES = {"inception_v3": 299}


@dataclass(frozen=True)
class Row:
    """One model: parameters, seconds of `tacit.compile`, and the cost of one image; `error` where it is refused.

    cpu_seconds: of all cores together, which depends little on what else a machine is doing; an idle one takes less.
    """

    model: str
    parameters: int
    seconds: float
    cpu_seconds: float
    rounds: int = 0
    online_bytes: int = 0
    offline_bytes: int = 0
    peak_bytes: int = 0  # of the whole process so far
    error: str = ""


def names() -> list[str]:
    """All classification models of torchvision."""
    models = import_torchvision().models
    found: list[str] = models.list_models(module=models)
    return found


def build(name: str) -> tuple[torch.nn.Module, Tensor]:
    """The model with random weights, and two images at the size it is made for.

    The statistics of its batch norms are those of two random images: values then are of the size they have in a
    trained model, where those of an untrained one grow without bound from layer to layer.
    """
    models = import_torchvision().models
    if name not in names():
        raise CompileError(f"torchvision has no classification model '{name}'")
    torch.manual_seed(0)
    options: dict[str, Any] = {"init_weights": True} if name in ("googlenet", "inception_v3") else {}
    model: torch.nn.Module = models.get_model(name, weights=None, **options).eval()
    size = _SIZES.get(name, 224)
    images = torch.randn(2, 3, size, size).clamp(-3, 3)
    norms = [m for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
    with torch.no_grad():
        if norms:
            model(images)
    return model.eval(), images


def compile_one(name: str) -> tuple[Row, Secure | None]:
    """Compile a model by default options from two images."""
    with waiting(f"compiling {name}"):
        return _compiled(name)


def _compiled(name: str) -> tuple[Row, Secure | None]:
    model, images = build(name)
    parameters = sum(p.numel() for p in model.parameters())
    begin, cpu = time.perf_counter(), time.process_time()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RangeWarning)  # nobody will ask a model with random weights
            secure = compile_model(model, images, name=name)
    except CompileError as error:
        return Row(name, parameters, time.perf_counter() - begin, time.process_time() - cpu, error=str(error)), None
    seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
    cost = secure.plan.cost()
    peak = peak_memory()
    return Row(name, parameters, seconds, cpu, cost.rounds, cost.online_bytes, cost.offline_bytes, peak), secure


def table(rows: Sequence[Row]) -> str:
    """A table in Markdown."""
    lines = [
        "| model | parameters | compile CPU s | rounds | online MB | offline MB |",
        "|---|---|---|---|---|---|",
    ]
    lines += [line(row) for row in rows]
    return "\n".join(lines)


def line(row: Row) -> str:
    if row.error:
        return (
            f"| {row.model} | {row.parameters / 1e6:.1f} M | {row.cpu_seconds:.1f} | {row.error.splitlines()[0]} | | |"
        )
    figures = f"{row.rounds} | {row.online_bytes / 1e6:,.0f} | {row.offline_bytes / 1e6:,.0f}"
    return f"| {row.model} | {row.parameters / 1e6:.1f} M | {row.cpu_seconds:.1f} | {figures} |"
