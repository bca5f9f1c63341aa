"""Scales as they are tried out: how far the answers of a fixed-point network are from the float model's."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace

import torch

from tacit.ir.errors import CompileError
from tacit.ir.ops.model import Argmax, AsReal, CountCorrect, ModelOp, NoOp
from tacit.ir.ops.moves import Move
from tacit.ir.ops.nonlinear import Trunc
from tacit.ir.ops.spline import FixedFunction
from tacit.ir.plan import Node, Plan
from tacit.passes.bound import WIDEST_MEASURED, bounded
from tacit.passes.draft import LEAST_FRAC_BITS, MOST_FRAC_BITS, Draft, Values
from tacit.passes.observed import note, watch
from tacit.passes.quantise import expand_to_fixed_point, fuse_truncation_into_relu
from tacit.passes.seen import Looks

Tensor = torch.Tensor
# Logits are to be within 2^-8 of the float model's; where the largest is below 1, within 2^-8 of it, and where it is
# above 32, within 2^-13 of it. Other inputs than the probes will come, so the error seen on them is held to a quarter.
# An input whose logits are larger than of any that was shown may be off by as much more.
TOLERANCE, PROMISED = 2.0**-10, 4.0
_LEAST_LOGIT = 2.0**-12
# A trial of the scale itself may show twice what was extrapolated: half of the promise.
CLOSE = 2.0
# Rows near a step are tried with so many draws of the truncations, as far as that many batches are affordable.
_CLOSE_ROWS, DRAWS, _BATCHES = 16, 16, 4
# How many times as much a blank input has to be amplified for it to be looked at bit by bit.
_SENSITIVE = 4.0


def misses(draft: Draft, *, approximated: bool = False, written: Draft | None = None) -> Tensor:
    """For a draft of the model level with its scale: each probe's error, in units of what is wanted; edges last.

    approximated: with the polynomials that stand for functions, where ranges can be found for them. written: the same
    draft in fixed point, if there is one already.
    """
    real = answering(draft)
    fixed = in_fixed_point(real, approximated) if written is None else _up_to(written, real.plan.result)
    chance = 0 if draft.close else None
    error, size = _errors(real, fixed, draft.probes, seed=chance)
    usual = draft.usual or float(size.max())

    def wanted(size: Tensor) -> Tensor:
        return wanted_of(size, usual) * (size / max(usual, _LEAST_LOGIT)).clamp(min=1.0)

    if draft.close:
        _draw_again(draft, real, fixed, error)
    error /= wanted(size)
    if not count(draft.edges):
        return error
    off, size = _errors(real, fixed, draft.edges, seed=0 if draft.faithful else chance)
    bound = wanted(size)
    if draft.faithful:  # estimates round more: an edge that is accurate in them is, bit for bit, as well
        rows = (off > CLOSE * bound).nonzero().flatten()
        off[rows], _ = _errors(real, fixed, chosen(draft.edges, rows), faithful=True)
    return torch.cat([error, off / bound])


def wanted_of(size: Tensor, usual: float) -> Tensor:
    """How far rows may be off whose largest numbers these are: a quarter of what is promised. usual: the largest
    number of all rows."""
    least = min(1.0, max(usual, _LEAST_LOGIT)) if usual < 32 else usual / 32
    return TOLERANCE * (size / 32).clamp(min=least)


def _errors(
    real: Draft, fixed: Draft, rows: Values, *, faithful: bool = False, seed: int | None = None
) -> tuple[Tensor, Tensor]:
    """Of each row, by how much it is off in fixed point, and its largest number."""
    unit = 2.0 ** -fixed.plan.node(fixed.plan.result).type.frac
    if not count(rows):
        return torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.float64)
    exact = look(real, rows, faithful=faithful).answers
    visit = watch(fixed)
    parts = [fixed.estimate(some, visit, faithful=faithful, seed=seed) for some in real.chunks(rows)]
    note(fixed, rows)
    found = torch.cat([_by_row(part, some) for part, some in zip(parts, real.chunks(rows), strict=True)]) * unit
    return _difference(found, exact), torch.where(exact.isfinite(), exact.abs(), 0.0).amax(1)


def _draw_again(draft: Draft, real: Draft, fixed: Draft, error: Tensor) -> None:
    """Replaces the errors of rows near a step by their largest under many draws of the truncations."""
    rows = torch.tensor(draft.close)
    for seed in range(1, max(2, min(DRAWS, _BATCHES * draft.affordable // len(rows)))):
        found, _ = _errors(real, fixed, chosen(draft.probes, rows), seed=seed)
        error[rows] = torch.maximum(error[rows], found)


def _up_to(fixed: Draft, name: str) -> Draft:
    """A draft in fixed point up to the value of this line of the model level."""
    lines = [node.name for node in fixed.plan.nodes if node.origin == name]
    return fixed.with_(_ending_at(fixed.plan, lines[-1]))


def in_fixed_point(draft: Draft, approximated: bool, *, fused: bool = True) -> Draft:
    """The draft in fixed point; with the polynomials that stand for functions, where they are asked for and fit.

    Where ranges are measured, the edges widen them: that they may leave those of the plan is another matter.
    """
    fixed = expand_to_fixed_point(draft)
    fixed = fuse_truncation_into_relu(fixed) if fused else fixed  # not, where every layer is to have its own line
    if not approximated or not fixed.plan.find(FixedFunction):
        return fixed
    if count(draft.edges):
        fixed = replace(fixed, calibration=(*fixed.calibration, draft.edges), looks=Looks())
    try:
        return bounded(fixed)
    except CompileError:
        return fixed


def fits(draft: Draft) -> bool:
    """Whether ranges can be found for all values: more bits are of no use in a network that then is refused."""
    try:
        bounded(fuse_truncation_into_relu(expand_to_fixed_point(draft)))
    except CompileError:
        return False
    return True


def _difference(found: Tensor, exact: Tensor) -> Tensor:
    """The largest of each row. A function may be undefined at a probe; range analysis names it."""
    return torch.where(exact.isfinite(), (found - exact).abs(), 0.0).amax(1)


def unsure(draft: Draft) -> Tensor:
    """The edges of which PyTorch itself does not know the answer: it differs between float32 and float64.

    No scale brings these closer to the float model, whose own rounding is amplified there.
    """
    if not draft.faithful:
        return torch.zeros(count(draft.edges), dtype=torch.bool)
    real, first = answering(draft), torch.zeros(1, dtype=torch.int64)
    asked = {label: torch.cat([x, draft.probes[label][first]]) for label, x in draft.edges.items()}
    single = torch.cat([look(real, draft.edges).answers, look(real, draft.probes).answers[first]])

    def differ(some: Tensor, others: Tensor) -> Tensor:
        size = torch.where(others.isfinite(), others.abs(), 0.0).amax(1)
        return _difference(some, others) > PROMISED * TOLERANCE * size.clamp(1.0)

    told = draft.floats(asked)
    if told is None or told.shape != single.shape or differ(told, single)[-1]:  # a class, or in another order
        return differ(single, look(real, asked, faithful=True).answers)[:-1]
    found = differ(told, single)[:-1]  # PyTorch's own kernels round otherwise: where they agree, both know
    rows = found.nonzero().flatten()
    if len(rows):
        found[rows] = differ(told[rows], look(real, chosen(draft.edges, rows), faithful=True).answers)
    return found


def edges_are_amplified(draft: Draft) -> bool:
    """Whether some layer divides by data of which there is far less in a blank or faint input than in the others."""
    real = answering(draft)
    if not count(draft.edges) or not look(real, draft.probes).gains:
        return False
    usual, blank = look(real, draft.probes).gains, look(real, draft.edges).gains
    return any(blank[name] > _SENSITIVE * usual[name] for name in blank)


def usual_size(draft: Draft) -> float:
    """The largest number that the network answers to what was shown; to anything, where that was blank."""
    sizes = look(answering(draft), draft.probes).answers.abs().nan_to_num(posinf=0.0).amax(1)
    return float(sizes[: max(shown(draft), 1)].max() if varies(draft) else sizes.max())


def shown(draft: Draft) -> int:
    """How many of the probes somebody chose; they are the first ones."""
    return min(draft.rows[0] + draft.rows[1], count(draft.probes))


def varies(draft: Draft) -> bool:
    """Whether anything but blank inputs was shown."""
    rows = shown(draft)
    return any(_varied(x[:rows].reshape(rows, -1)) for x in draft.probes.values())


def _varied(rows: Tensor) -> bool:
    return bool((rows.amax(1) > rows.amin(1)).any()) or (len(rows) > 1 and bool((rows[0] != rows).any()))


def most_frac_bits(draft: Draft, tried: int) -> int:
    """With how many fractional bits all values fit the ring, by what the probes show and the least margin.

    tried: with how many the network is looked at. Lines of layers that divide by data do not count: these see to it
    themselves that they fit.
    """
    largest = look(answering(draft), draft.probes).largest
    coarse, fine = (
        expand_to_fixed_point(draft.with_(draft.plan, frac_bits=bits), outline=True).plan for bits in (tried, tried + 1)
    )
    most, again = MOST_FRAC_BITS, _counted(fine)
    dividing = {n.name for n in draft.plan.nodes if isinstance(n.op, ModelOp) and n.op.amplifies()}
    counting = largest.keys() - dividing
    for key, node in _counted(coarse).items():
        grown = again[key].type.frac - node.type.frac if key in again else 0
        if node.origin in counting and node.type.batched and grown > 0:
            width = math.log2(max(largest[node.origin] * draft.margin[0], 1.0)) + node.type.frac + 1
            most = min(most, math.floor(tried + (WIDEST_MEASURED - width) / grown))
    return max(LEAST_FRAC_BITS, most)


def _counted(plan: Plan) -> dict[tuple[str, type, int], Node]:
    """Lines by what they stem from, their kind and a number: alike at different scales. Truncations, of which there may
    be one more at another scale, are narrower than what they read."""
    count: Counter[tuple[str, type]] = Counter()
    found = {}
    for node in plan.nodes:
        if not isinstance(node.op, Trunc):
            kind = node.origin, type(node.op)
            found[*kind, count[kind]] = node
            count[kind] += 1
    return found


@dataclass(frozen=True)
class Look:
    """What the network in floats shows on some inputs.

    answers: (N, all numbers of the result). largest: magnitude of each line. gains: of each layer that divides by data,
    the largest factor.
    """

    answers: Tensor
    largest: dict[str, float]
    gains: dict[str, float]


def look(real: Draft, rows: Values, *, faithful: bool = False) -> Look:
    """The same inputs are looked at once."""
    key = (real.plan.result, faithful, *(id(x) for x in rows.values()))
    if key not in real.answers:
        real.answers[key] = _look(real, rows, faithful), rows  # kept, so that no others come to lie at their place
    found: Look = real.answers[key][0]
    return found


def _look(real: Draft, rows: Values, faithful: bool) -> Look:
    layers = [node for node in real.plan.nodes if isinstance(node.op, ModelOp) and node.op.amplifies()]
    users: dict[str, list[Node]] = {}
    for node in layers:
        users.setdefault(node.args[-1], []).append(node)
    gains: dict[str, float] = {}
    largest: dict[str, float] = {}
    kept: dict[str, Tensor] = {}

    def visit(node: Node, value: Tensor) -> None:
        if node.type.batched and value.is_floating_point():
            low, high = (float(end) for end in torch.aminmax(value))
            size = max(-low, high)
            largest[node.name] = max(largest.get(node.name, 0.0), size if math.isfinite(size) else 0.0)
        if node.name in users:
            kept[node.name] = value
        for layer in users.get(node.name, ()):
            assert isinstance(layer.op, ModelOp)
            gain = layer.op.gain(*(kept.get(arg, value) for arg in layer.args)).nan_to_num(0.0, posinf=0.0)
            gains[layer.name] = max(gains.get(layer.name, 0.0), float(gain.max()))

    answers = []
    for some in real.chunks(rows):
        kept.clear()
        answers.append(_by_row(real.estimate(some, visit, faithful=faithful), some))
    return Look(torch.cat(answers), largest, gains)


def answering(draft: Draft) -> Draft:
    """The draft up to the value whose accuracy counts: the result, or what is compared where that is an argmax."""
    last = draft.plan.node(draft.plan.result)
    while isinstance(last.op, (CountCorrect, AsReal, NoOp, Move)):
        last = draft.plan.node(last.args[0])
    return draft.with_(_ending_at(draft.plan, last.args[0] if isinstance(last.op, Argmax) else draft.plan.result))


def close_rows(draft: Draft) -> tuple[int, ...]:
    """The probes with a value nearest to where a layer jumps, but not on it, relative to the values there."""
    real, found = answering(draft), []
    layers = [node for node in real.plan.nodes if isinstance(node.op, ModelOp) and node.op.jumps()]
    wanted = {arg for node in layers for arg in node.args}
    for some in draft.chunks(draft.probes):
        kept: dict[str, Tensor] = {}

        def visit(node: Node, value: Tensor, kept: dict[str, Tensor] = kept) -> None:
            if node.name in wanted:
                kept[node.name] = value

        real.estimate(some, visit)
        least = torch.full((count(some),), torch.inf, dtype=torch.float64)
        for node in layers:
            assert isinstance(node.op, ModelOp)
            margin = node.op.margin(*(kept[arg] for arg in node.args)).double().reshape(count(some), -1)
            largest = max(float(kept[node.args[0]].abs().nan_to_num().max()), 2.0**-30)
            least = torch.minimum(least, torch.where(margin > 0, margin, torch.inf).amin(1) / largest)
        found.append(least)
    order = torch.cat(found).sort(stable=True)
    return tuple(int(row) for row in order.indices[:_CLOSE_ROWS][order.values[:_CLOSE_ROWS].isfinite()])


def _ending_at(plan: Plan, name: str) -> Plan:
    end = plan.index[name] + 1
    return plan.with_nodes(plan.nodes[:end], result=name)


def _by_row(answer: Tensor, inputs: Values) -> Tensor:
    return answer.double().reshape(count(inputs), -1)


def count(inputs: Values) -> int:
    return len(next(iter(inputs.values()))) if inputs else 0


def chosen(values: Values, rows: Tensor) -> Values:
    return {label: x[rows] for label, x in values.items()}
