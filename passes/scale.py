"""The choice of a scale: the fewest fractional bits with which the answers are accurate enough, tried out.

Rounding is an error proportional to 2^-frac, so that one trial tells the scale. Two kinds of layers are different. One
that jumps (a comparison, an argmax) is exact or entirely wrong, and a division by data multiplies the rounding of blank
inputs a hundred times as much as that of others. There, scales are tried out until one is accurate; where none is, the
caller is warned.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from tacit.ir.errors import CompileError
from tacit.ir.ops.model import Argmax, AsReal, CountCorrect, ModelOp, NoOp
from tacit.ir.ops.moves import Move
from tacit.ir.plan import Node, Plan
from tacit.passes.bound import bound_ranges
from tacit.passes.draft import Draft, Values
from tacit.passes.precision import doubt
from tacit.passes.quantise import MOST_FRAC_BITS, default_error, expand_to_fixed_point, fuse_truncation_into_relu

Tensor = torch.Tensor
# Logits are to be within 2^-8 of the float model's; where the largest is below 1, within 2^-8 of it, and where it is
# above 32, within 2^-13 of it. Other inputs than the probes will come, so the error seen on them is held to a quarter.
_TOLERANCE, _LEAST_LOGIT, _PROMISED = 2.0**-10, 2.0**-8, 4.0
_TRIAL_FRAC, _LEAST_FRAC = 12, 8
# A trial of the scale itself may show twice what was extrapolated: half of the promise.
_CLOSE = 2.0
# How many times as much a blank input has to be amplified for it to be looked at bit by bit.
_SENSITIVE = 4.0
# Once a scale is found, later trials look at the rows that were worst.
_KEPT = 16


def choose_scale(draft: Draft) -> Draft:
    """Set `frac_bits` where the caller did not: the fewest with which all probes' answers are accurate enough.

    Where the promise is not kept on some probe, however many bits there are, the draft says so.
    """
    if draft.frac_bits is not None:
        return draft
    draft = replace(draft, faithful=_edges_are_amplified(draft))
    unsure = _unsure(draft)
    draft, left = replace(draft, edges=_chosen(draft.edges, ~unsure)), _chosen(draft.edges, unsure)
    jumps = any(isinstance(node.op, ModelOp) and node.op.jumps() for node in _answering(draft).plan.nodes)
    trial = misses(_at(draft, _TRIAL_FRAC))
    least = _extrapolated(trial[: _rows(draft.probes)] if draft.faithful else trial, jumps)
    draft = _worst(draft, trial, len(trial) if jumps else _KEPT)
    if not (jumps or draft.faithful or least > MOST_FRAC_BITS):
        return _at(draft, max(least, _LEAST_FRAC))
    least = min(max(least, _LEAST_FRAC), MOST_FRAC_BITS)
    if not jumps and draft.max_error is None:  # what edges ask for is finer rounding, not finer polynomials
        draft = replace(draft, max_error=default_error(least))
    frac, found = _tried(draft, least)
    if draft.faithful:
        found = misses(_at(draft, frac), approximated=True)
    missed = _rows(left) + int((found > _PROMISED).sum())
    if missed:
        row = _row(draft, int(found.argmax())) if found.max() > _PROMISED else _row(replace(draft, edges=left), -1)
        told = doubt(_answering(_at(draft, frac)), row, missed, len(found) + _rows(left))
        draft = replace(draft, doubts=(*draft.doubts, told))
    return _at(draft, frac)


def _tried(draft: Draft, least: int) -> tuple[int, Tensor]:
    """From so many bits on: the first with which no probe misses by much, of those with which all values fit the ring;
    and by how much the probes miss then. Less than so many bits, down to those of the trial, where none else fit."""
    fitting = (bits for bits in range(least, _TRIAL_FRAC - 1, -1) if _fits(_at(draft, bits)))
    frac = next(fitting, least)
    found = misses(_at(draft, frac))
    while found.max() > _CLOSE and frac < MOST_FRAC_BITS:
        more = min(frac + (2 if found.max() > 2 * _CLOSE else 1), MOST_FRAC_BITS)
        while more > frac and not _fits(_at(draft, more)):
            more -= 1
        if more == frac:
            break
        frac, found = more, misses(_at(draft, more))
    return frac, found


def _fits(draft: Draft) -> bool:
    """Whether ranges can be found for all values: more bits are of no use in a network that then is refused."""
    try:
        bound_ranges(fuse_truncation_into_relu(expand_to_fixed_point(draft)))
    except CompileError:
        return False
    return True


def misses(draft: Draft, *, approximated: bool = False) -> Tensor:
    """For a draft of the model level with its scale: each probe's error, in units of what is wanted; edges last.

    approximated: with the polynomials that stand for functions, where ranges can be found for them.
    """
    real = _answering(draft)
    fixed = expand_to_fixed_point(real)
    if approximated and _fits(real):
        fixed = bound_ranges(fixed)
    unit = 2.0 ** -fixed.plan.node(fixed.plan.result).type.frac
    errors, sizes = [], []
    for values, faithful in ((draft.probes, False), (draft.edges, draft.faithful)):
        for some in draft.chunks(values):
            exact = _by_row(real.estimate(some, faithful=faithful), some)
            found = _by_row(fixed.estimate(some, faithful=faithful), some) * unit
            defined = exact.isfinite()  # a function may be undefined at a probe; range analysis names it
            errors.append(torch.where(defined, (found - exact).abs(), 0.0).amax(1))
            sizes.append(torch.where(defined, exact.abs(), 0.0).amax(1))
    size = torch.cat(sizes)
    largest = float(size[: _rows(draft.probes)].max())
    wanted = min(1.0, max(largest, _LEAST_LOGIT)) if largest < 32 else largest / 32
    return torch.cat(errors) / (_TOLERANCE * (size / 32).clamp(min=wanted))


def _unsure(draft: Draft) -> Tensor:
    """The edges of which PyTorch itself does not know the answer: it differs between float32 and float64.

    No scale brings these closer to the float model, whose own rounding is amplified there.
    """
    rows = _rows(draft.edges)
    if not draft.faithful:
        return torch.zeros(rows, dtype=torch.bool)
    real, found = _answering(draft), []
    for some in draft.chunks(draft.edges):
        single, double = (_by_row(real.estimate(some, faithful=faithful), some) for faithful in (False, True))
        size = torch.where(double.isfinite(), double.abs(), 0.0).amax(1)
        error = torch.where(double.isfinite(), (single - double).abs(), 0.0).amax(1)
        found.append(error > _PROMISED * _TOLERANCE * size.clamp(1.0))
    return torch.cat(found)


def _extrapolated(trial: Tensor, jumps: bool) -> int:
    """The bits with which the worst row would be accurate; half of the rows, where one that jumped tells nothing."""
    worst = float(trial.median() if jumps else trial.max())
    return _TRIAL_FRAC + math.ceil(math.log2(max(worst, 2.0**-30)))


def _edges_are_amplified(draft: Draft) -> bool:
    """Whether some layer divides by data of which there is far less in a blank or faint input than in the others."""
    usual, blank = (_gains(draft, values) for values in (draft.probes, draft.edges))
    return any(blank[name] > _SENSITIVE * usual[name] for name in blank)


def _gains(draft: Draft, values: Values) -> dict[str, float]:
    """For each layer that divides by data: the largest factor that it has on these inputs."""
    real = _answering(draft)
    layers = [node for node in real.plan.nodes if isinstance(node.op, ModelOp) and node.op.amplifies()]
    users: dict[str, list[Node]] = {}
    for node in layers:
        users.setdefault(node.args[-1], []).append(node)
    found: dict[str, float] = {}
    kept: dict[str, Tensor] = {}

    def visit(node: Node, value: Tensor) -> None:
        if node.name in users:
            kept[node.name] = value
        for layer in users.get(node.name, ()):
            assert isinstance(layer.op, ModelOp)
            gain = layer.op.gain(*(kept.get(arg, value) for arg in layer.args)).nan_to_num(0.0, posinf=0.0)
            found[layer.name] = max(found.get(layer.name, 0.0), float(gain.max()))

    if layers:
        for some in draft.chunks(values):
            kept.clear()
            real.estimate(some, visit)
    return found


def _answering(draft: Draft) -> Draft:
    """The draft up to the value whose accuracy counts: the result, or what is compared where that is an argmax."""
    last = draft.plan.node(draft.plan.result)
    while isinstance(last.op, (CountCorrect, AsReal, NoOp, Move)):
        last = draft.plan.node(last.args[0])
    return draft.with_(_ending_at(draft.plan, last.args[0] if isinstance(last.op, Argmax) else draft.plan.result))


def _ending_at(plan: Plan, name: str) -> Plan:
    end = plan.index[name] + 1
    return plan.with_nodes(plan.nodes[:end], result=name)


def _at(draft: Draft, frac_bits: int) -> Draft:
    return draft.with_(draft.plan, frac_bits=frac_bits)


def _by_row(answer: Tensor, inputs: Values) -> Tensor:
    return answer.double().reshape(_rows(inputs), -1)


def _rows(inputs: Values) -> int:
    return len(next(iter(inputs.values()))) if inputs else 0


def _row(draft: Draft, row: int) -> Values:
    """One probe, counted through to the edges; -1 is the last."""
    count = _rows(draft.probes)
    values, row = (draft.probes, row) if 0 <= row < count else (draft.edges, row - count if row >= 0 else row)
    return {label: x[[row]] for label, x in values.items()}


def _chosen(values: Values, rows: Tensor) -> Values:
    return {label: x[rows] for label, x in values.items()}


def _worst(draft: Draft, trial: Tensor, count: int) -> Draft:
    """With no more than so many probes, the worst of them; and all edges."""
    rows = trial[: _rows(draft.probes)].topk(min(count, _rows(draft.probes))).indices.sort().values
    return replace(draft, probes=_chosen(draft.probes, rows))
