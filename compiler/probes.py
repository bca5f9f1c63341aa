"""Inputs on which a scale is tried out, and on which ranges are measured."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from tacit.examples import inputs_of
from tacit.ir.ops.roles import Input
from tacit.ir.plan import Plan
from tacit.passes.draft import is_large

Tensor = torch.Tensor
# Inputs from all over the range; of calibration data, it takes more.
_PROBES, _CALIBRATED_PROBES = 16, 64
# The kinds of edges: all low, all high and zero; around a value above the middle; around zero.
_EDGES = ("blank", "blank", "blank", "faint", "dim")
# Those that are tried out where each takes long: high is as good as low, and such a network has biases in front of its
# norms once it is trained, so that no input is dim to it.
_FEW_EDGES = (0, 2, 3)
# The standard deviation of faint inputs: about a quarter of a step of 8 bits in an image from 0 to 1; in proportion for
# narrower ranges, and for those that are far wider than what is usual in front of a norm.
_DEVIATION, _USUAL_RANGE = 1e-3, 16.0


def probes(plan: Plan, examples: Mapping[str, Tensor], calibration: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inputs on which scales are tried out: the whole example, and calibration data or values all over the range."""
    shown = {label: x[: _few(plan, _CALIBRATED_PROBES)] for label, x in calibration.items()}
    return _joined(plan, examples, shown or _spread(plan))


def measured(
    plan: Plan, calibration: Mapping[str, Tensor], blank: Mapping[str, Tensor]
) -> tuple[Mapping[str, Tensor], ...]:
    """Inputs on which ranges are measured beside the probes: blank ones; what else there is of calibration data and, if
    there are any, values all over the range."""
    blank = {label: x[[kind == "blank" for kind in _EDGES]] for label, x in blank.items()}
    if not calibration:
        return (blank,)
    rest = {label: x[_few(plan, _CALIBRATED_PROBES) :] for label, x in calibration.items()}
    return blank, _joined(plan, rest, _spread(plan))


def _spread(plan: Plan) -> dict[str, Tensor]:
    """Inputs drawn from all over the range, always the same ones."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name, op in inputs_of(plan):
        shape = plan.node(name).type.at(1).dims[1:]
        low, high = op.ends(shape)
        x = torch.rand((_few(plan, _PROBES), *shape), generator=generator, dtype=torch.float64)
        x = low + x * (high - low)
        found[op.label] = x.round() if op.integers else x
    return found


def _few(plan: Plan, rows: int) -> int:
    """So many, or a quarter where each takes long."""
    return rows // 4 if is_large(plan) else rows


def edges(plan: Plan, examples: Mapping[str, Tensor], *, declared: bool) -> dict[str, Tensor]:
    """A blank input each of all low, all high and zero, a faint one and a dim one.

    Low and high are the ends of a declared range, or else those of the example.
    """
    generator = torch.Generator().manual_seed(1)
    chosen = {}
    for name, op in inputs_of(plan):
        shape = plan.node(name).type.at(1).dims
        low, high = op.ends(shape[1:])
        if not (declared or op.integers):
            least, most = torch.aminmax(examples[op.label])
            low, high = low.clamp(min=float(least)), high.clamp(max=float(most))
        zero, above = torch.zeros_like(low).clamp(low, high), low + 0.6 * (high - low)
        rows = [value[None].clone() for value in (low, high, zero, above, zero)]
        span = float((high - low).max()) or op.high - op.low
        deviation = min(_DEVIATION * max(1.0, span / _USUAL_RANGE), span / 1024)
        if op.integers:
            rows[3].round_()
        else:
            for faint in rows[3:]:
                faint += deviation * torch.randn(shape, generator=generator, dtype=torch.float64)
                faint.clamp_(op.low, op.high)
        chosen[op.label] = torch.cat(rows)
    return _with_targets(plan, chosen)


def tried_edges(plan: Plan, blank: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The edges on which scales are tried out, and the kinds of them."""
    kept = _FEW_EDGES if is_large(plan) else range(len(_EDGES))
    return {label: x[list(kept)] for label, x in blank.items()}, tuple(_EDGES[i] for i in kept)


def _joined(plan: Plan, *parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    labels = [op.label for _, op in inputs_of(plan)]
    return _with_targets(plan, {label: torch.cat([part[label].double() for part in parts]) for label in labels})


def _with_targets(plan: Plan, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """The values, and zeros for the targets of a count."""
    batch = len(next(iter(values.values())))
    labels = [node.op.label for node in plan.find(Input) if isinstance(node.op, Input) and node.op.label not in values]
    return {k: x.double() for k, x in values.items()} | {label: torch.zeros(batch).double() for label in labels}
