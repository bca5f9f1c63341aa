"""The layers that Tacit takes, with what they cost, as the registry has them: the table of the README.

`python -m tacit.catalogue README.md` writes it anew between the two markers.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from tacit.ir.build import Builder
from tacit.ir.errors import TacitError
from tacit.ir.files import write_whole
from tacit.ir.op import Level, Sample
from tacit.ir.ops.layer import Layer
from tacit.ir.ops.model import ModelOp
from tacit.ir.ops.roles import Input, Weight
from tacit.ir.plan import Plan
from tacit.ir.types import shape_text
from tacit.passes import Draft, run_pipeline
from tacit.runtime.reference import interpret

BEGIN = "<!-- layers: written by `python -m tacit.catalogue README.md` -->"
END = "<!-- end of layers -->"
_FRAC, _PROBES, _MOST_NAMES = 12, 4, 6


@dataclass(frozen=True)
class Entry:
    """A layer: its family (the file), what it is, PyTorch's operators, and the cost of an example, where it has one."""

    family: str
    told: str
    operators: tuple[str, ...]
    example: str = ""
    rounds: int | None = None
    online_bytes: int = 0
    offline_bytes: int = 0


def entries() -> Iterator[Entry]:
    """All layers, by family; the cost is that of the op's first sample at a batch of 1, input and reveal left out."""
    for layer in sorted(
        (one for one in Layer.known if one.__dict__.get("aten") and one.__module__.startswith("tacit.")),
        key=lambda one: one.__module__,
    ):
        operators = tuple(dict.fromkeys(_plain(target.split(".")[1]) for target in layer.aten))
        told = (inspect.getdoc(layer) or layer.__name__).split("\n\n")[0].replace("\n", " ")
        entry = Entry(layer.__module__.rsplit(".", 1)[-1], told.split(":")[0].rstrip("."), operators)
        yield _with_cost(entry, layer)


def _plain(name: str) -> str:
    """The operator without the underscore that stands for "in place"."""
    return name if name.endswith("__") else name.removesuffix("_")


def _with_cost(entry: Entry, layer: type[Layer]) -> Entry:
    if not issubclass(layer, ModelOp):
        return entry
    sample = layer.samples()[0]
    try:
        plan = compiled(sample)
    except TacitError:
        return entry  # it stands only beside others, as a softmax before an argmax does
    rows = [row for row in plan.cost().per_op if not row.session and row.op not in ("input", "reveal")]
    shape = shape_text(sample.args[0].shape)
    return Entry(
        entry.family,
        entry.told,
        entry.operators,
        shape,
        plan.schedule.rounds - 2,
        sum(row.cost.online_bytes for row in rows),
        sum(row.cost.offline_bytes for row in rows),
    )


def compiled(sample: Sample) -> Plan:
    """The protocol plan of one op alone, inputs from -1 to 1; raises TacitError where it cannot stand alone."""
    b, generator = Builder(Level.MODEL), torch.Generator().manual_seed(0)
    names, weights, probes = [], {}, {}
    for i, declared in enumerate(sample.args):
        if declared.batched:
            names.append(b.declare(Input(f"x{i}", -1.0, 1.0), declared, name=f"x{i}"))
            shape = declared.at(_PROBES).dims
            probes[f"x{i}"] = torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1
        else:
            names.append(b.declare(Weight(f"w{i}"), declared, name=f"w{i}"))
            weights[f"w{i}"] = torch.rand(declared.dims, generator=generator) + 0.25
    if not probes:
        raise TacitError("it has no input")
    result = b.emit(sample.op, *names, name="out")
    plan = Plan("layer", tuple(b.nodes), result, Level.MODEL)
    return run_pipeline(Draft(plan, weights, probes, interpret, frac_bits=_FRAC)).plan


def markdown() -> str:
    """The table."""
    lines = [
        "| family | layer | operators of PyTorch | example | rounds | bytes online + offline |",
        "|---|---|---|---|---|---|",
    ]
    for entry in entries():
        names = ", ".join(f"`{name}`" for name in entry.operators[:_MOST_NAMES])
        more = f" and {len(entry.operators) - _MOST_NAMES} more" if len(entry.operators) > _MOST_NAMES else ""
        cost = " | | |" if entry.rounds is None else (
            f" {entry.example} | {entry.rounds} | {entry.online_bytes:,} + {entry.offline_bytes:,} |"
        )  # fmt: skip
        lines.append(f"| {entry.family} | {_cell(entry.told)} | {names}{more} |{cost}")
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def rewritten(text: str) -> str:
    """The text with the table between its markers written anew; raises ValueError where they are missing."""
    before, found, rest = text.partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not found or not ended:
        raise ValueError(f"the text lacks '{BEGIN}' or '{END}'")
    return f"{before}{BEGIN}\n{markdown()}\n{END}{after}"


if __name__ == "__main__":
    for name in sys.argv[1:]:
        write_whole(name, rewritten(Path(name).read_text(encoding="utf-8")).encode())
