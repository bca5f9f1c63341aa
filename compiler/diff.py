"""Float against fixed point, layer by layer: where a model loses precision, and where its ranges are tight."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from tacit.arguments import CONSTANTS
from tacit.driver import Model, prepare
from tacit.ir.errors import InputError
from tacit.ir.given import number_of, shown
from tacit.ir.op import Level
from tacit.ir.ops.roles import Input, Weight
from tacit.ir.plan import Node, Plan
from tacit.ir.view.layers import headroom as room
from tacit.passes import stages
from tacit.progress import waiting
from tacit.runtime.overflow import headroom, limit, magnitude
from tacit.runtime.reference import interpret
from tacit.secure import check_inputs
from tacit.tables import aligned

Tensor = torch.Tensor
TOLERANCE = 2.0**-8


@dataclass(frozen=True)
class Layer:
    """One layer: errors in the model's units, the largest value seen, what the line holds, and doublings in between."""

    line: str
    module: str
    op: str
    source: str
    largest_error: float
    mean_error: float
    largest_value: float
    reach: float
    headroom: int
    overflowed: bool


@dataclass(frozen=True)
class Diff:
    """All layers from first to last; `first_bad` is the first whose largest error is above the tolerance."""

    layers: tuple[Layer, ...]
    tolerance: float
    frac_bits: int
    ranges: str

    @property
    def first_bad(self) -> Layer | None:
        return next((row for row in self.layers if row.largest_error > self.tolerance or row.overflowed), None)


def diff(model: Model, *inputs: Any, tolerance: float = TOLERANCE, **options: Any) -> Diff:
    """Compile, then run the inputs in float64 and on the clear oracle, truncations rounded to nearest.

    The options are those of `tacit.compile`. With calibration=, that stands in for the example: ranges that are
    measured are measured without these inputs, which may then leave them. Each layer of the simplified model (batch
    norms folded) stands beside the line that its value became. Raises CompileError and InputError.
    """
    if not inputs:
        raise InputError("diff takes a model and inputs for it, as in tacit.diff(model, x)")
    for name in options.keys() - inspect.signature(prepare).parameters.keys():
        raise TypeError(f"diff() got an unexpected keyword argument '{name}'")
    allowed = number_of(tolerance)
    if allowed is None or not allowed >= 0:
        raise InputError(f"tolerance has to be a number of at least 0, not {shown(tolerance)}")
    with waiting("comparing with float"):
        return _diff(model, inputs, allowed, options)


def _diff(model: Model, inputs: tuple[Any, ...], tolerance: float, options: Mapping[str, Any]) -> Diff:
    given = options.get("calibration")
    example = given if given is not None else inputs if len(inputs) > 1 else inputs[0]
    draft = prepare(model, example, **options)
    float_plan, final = draft, draft
    for _, found in stages(draft):
        float_plan = found if found.plan.level is Level.MODEL else float_plan
        final = found
    named = {name: x for name, x in (options.get("kwargs") or {}).items() if not isinstance(x, CONSTANTS)}
    checked = check_inputs(final.plan, inputs, named)
    exact = interpret(float_plan.plan, float_plan.weights, checked)
    fixed = interpret(final.plan, final.weights, checked)
    became = _became(final.plan)
    rows = [
        _layer(node, became[node.name], exact[node.name], fixed)
        for node in float_plan.plan.nodes
        if node.name in became and not isinstance(node.op, (Input, Weight))
    ]
    return Diff(tuple(rows), tolerance, final.frac_bits or 0, final.plan.ranges)


def _became(plan: Plan) -> dict[str, Node]:
    """The line that holds the value of each line of the model level: the last that stems from it."""
    return {node.origin: node for node in plan.nodes if node.origin and node.type.kind == "secret"}


def _layer(node: Node, line: Node, exact: Tensor, fixed: dict[str, Tensor]) -> Layer:
    scale = 2.0**line.type.frac
    error = (fixed[line.name].double() / scale - exact.double()).abs()
    size = magnitude(line, fixed)
    largest = float(size.max())
    return Layer(
        line.name,
        node.path,
        node.op.name.removeprefix("model."),
        node.source,
        float(error.max()),
        float(error.mean()),
        largest / scale,
        limit(line) / scale,
        headroom(line, largest),
        largest > limit(line),
    )


def text(found: Diff) -> str:
    """The table; the first layer over the tolerance is marked."""
    header = ["module", "op", "line", "max error", "mean error", "largest", "range", "headroom"]
    rows = [
        [
            row.module,
            row.op,
            f"%{row.line}",
            f"{row.largest_error:.2e}",
            f"{row.mean_error:.2e}",
            f"{row.largest_value:.4g}",
            f"+-{row.reach:.4g}",
            "OVERFLOW" if row.overflowed else f"{row.headroom} bit{'' if row.headroom == 1 else 's'}",
        ]
        for row in found.layers
    ]
    lines = aligned([header, *rows], numbers=range(3, 8))
    bad = found.first_bad
    if bad is not None:
        place = found.layers.index(bad) + 1
        lines[place] += f"  <- first over {found.tolerance:.2g}{' at ' + bad.source if bad.source else ''}"
    return "\n".join([*lines, f"frac_bits={found.frac_bits}, ranges={found.ranges}, tolerance {found.tolerance:.2g}"])


def ranges_text(plan: Plan) -> str:
    """Every line of a plan with the range that it states, the bits that are left above it in its ring, and its margin
    where it was measured."""
    rows = [["line", "op", "range", "bits", "ring", "left", "margin", "module"]]
    for node in plan.nodes:
        if node.type.kind == "secret":
            reach, width = limit(node) / 2.0**node.type.frac, node.type.width
            rows.append(
                [
                    f"%{node.name}",
                    node.op.name,
                    f"+-{reach:.4g}",
                    str(width),
                    str(node.type.ring),
                    str(room(node)),
                    f"{node.margin}x" if node.margin else "",
                    node.path,
                ]
            )
    return "\n".join([*aligned(rows, numbers=range(2, 7)), f"ranges={plan.ranges}"])
