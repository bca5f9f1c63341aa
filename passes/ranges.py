"""Ranges as a pass: chosen together with the scale, where that is free."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from tacit.ir.errors import CompileError, PrecisionWarning, RangeWarning
from tacit.ir.ops.spline import FixedSpline
from tacit.passes.bound import TooWide, bounded
from tacit.passes.draft import LEAST_FRAC_BITS, Draft
from tacit.passes.quantise import default_error, expand_to_fixed_point, fuse_truncation_into_relu
from tacit.passes.scale import warned
from tacit.passes.seen import Looks
from tacit.passes.trial import CLOSE, PROMISED, misses

# From so many inputs on that somebody chose, measured ranges are no surprise.
_ENOUGH = 64
# How far polynomials may be off where finer ones would have too many pieces.
_COARSEST = 2.0**-8
_FINEST = 2.0**-16


def bound_ranges(draft: Draft) -> Draft:
    """Give every value its range and width: `bound.bounded`.

    A scale that was chosen for accuracy gives way where values do not fit the ring at it, and so does the accuracy of
    polynomials: the least that helps, and a warning if the answers are then not as accurate as promised. What the
    caller chose does not, but the error says which scale would do.
    """
    try:
        fitting = bounded(draft)
    except TooWide as error:
        found = _with_fewer(draft, error.excess)
        if found is None:
            raise
        if not draft.searched:
            raise CompileError(f"{error}\n  - frac_bits={found.frac_bits}; it is {draft.frac_bits}") from None
    except CompileError:
        found = _with_coarser(draft) if draft.searched else None
        if found is None:
            raise
    else:
        return _fine_enough(fitting)
    return _with_doubt(found)


def _with_fewer(draft: Draft, excess: int) -> Draft | None:
    """With as many fractional bits less as it takes; None where that leaves too few."""
    model, frac = draft.model, draft.frac_bits or 0
    while model is not None:
        frac -= max(1, -(-excess // 2))  # a product takes the bits of both factors
        if frac < LEAST_FRAC_BITS:
            break
        try:
            return _anew(model, frac_bits=frac)
        except TooWide as error:
            excess = error.excess
        except CompileError:
            break
    return None


def _with_coarser(draft: Draft) -> Draft | None:
    """With polynomials as much further from their functions as it takes to have few enough of them."""
    model = draft.model
    error = default_error(draft.frac_bits or 0) if draft.max_error is None else draft.max_error
    while model is not None and (error := 4 * error) <= _COARSEST:
        try:
            return _anew(model, max_error=error)
        except CompileError:
            continue
    return None


def _anew(model: Draft, **changes: Any) -> Draft:
    """Written in fixed point and bounded, with some settings changed."""
    return bounded(fuse_truncation_into_relu(expand_to_fixed_point(replace(model, **{"looks": Looks(), **changes}))))


def _fine_enough(draft: Draft) -> Draft:
    """In a large network, whose scale was told from one trial with functions in the place of polynomials: a few more
    bits, or polynomials closer to them, where the worst rows need it; or a warning."""
    model = draft.model
    if model is None or not model.large or model.close or not draft.searched:
        return draft
    if not (model.finer or any(isinstance(node.op, FixedSpline) for node in draft.plan.nodes)):
        return draft
    missed = misses(model, written=draft)
    while missed.max() > CLOSE and (changes := _finer(model, float(missed.max()))):
        try:
            finer = _anew(model, looks=draft.looks, ranges=draft.ranges, **changes)
        except CompileError:
            break
        assert finer.model is not None
        again = misses(finer.model, written=finer)
        if again.max() >= missed.max():
            break
        draft, model, missed = finer, finer.model, again
    return draft if draft.doubts else replace(draft, doubts=warned(model, missed, {}, approximated=True).doubts)


def _finer(model: Draft, missed: float) -> dict[str, Any]:
    """What has to change for the answers to become close enough, by as much as that is missed; nothing where no change
    is left that could help."""
    frac = model.frac_bits or 0
    if misses(model).max() > CLOSE:
        return {"frac_bits": frac + 1} if frac < model.most else {}
    error = default_error(frac) if model.max_error is None else model.max_error
    error /= 2.0 ** math.ceil(math.log2(missed / CLOSE))
    return {"max_error": error} if model.free and error >= _FINEST else {}


def _with_doubt(draft: Draft) -> Draft:
    assert draft.model is not None
    missed = misses(draft.model, written=draft) > PROMISED
    if not bool(missed.any()):
        return draft
    error = default_error(draft.frac_bits or 0) if draft.max_error is None else draft.max_error
    told = PrecisionWarning(
        f"{int(missed.sum())} of {len(missed)} inputs that were tried are not within the promised 2^-8 of the float "
        f"model: {draft.frac_bits} fractional bits, and polynomials within {error:.2g}, are the most with which all "
        "values fit the ring. What helps: a narrower input_range, or values of ordinary size (norms between layers, "
        "smaller weights)"
    )
    return replace(draft, doubts=(*draft.doubts, told))


def told_of_ranges(draft: Draft) -> tuple[Warning, ...]:
    """A warning if ranges were measured, and on few inputs; for the finished draft."""
    lines = [node for node in draft.plan.nodes if node.margin]
    example, shown, drawn = draft.rows
    if not lines or example + shown >= _ENOUGH:
        return ()
    margins = sorted({node.margin for node in lines})
    room = f"{margins[0]}" if len(margins) == 1 else f"{margins[0]} to {margins[-1]}"
    given = f"{example} of the example" + (f", {shown} of the calibration data" if shown else "")
    return (
        RangeWarning(
            f"the ranges of {len(lines)} values are measured, not proved: "
            f"{example + shown + drawn} inputs stand behind them ({given}, {drawn} random and blank ones), and there "
            f"is room for values {room} times as large. An input on which some are larger still may get a wrong "
            f"answer. What helps: calibration=x with {_ENOUGH} typical inputs or more, a narrower input_range, a "
            "larger margin; secure.reference(x, check=True) tells whether an input keeps to them"
        ),
    )
