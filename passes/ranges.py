"""Ranges as a pass: chosen together with the scale, where that is free."""

from __future__ import annotations

from dataclasses import replace

from tacit.ir.errors import CompileError, PrecisionWarning, RangeWarning
from tacit.passes.bound import TooWide, bounded
from tacit.passes.draft import LEAST_FRAC_BITS, Draft
from tacit.passes.quantise import expand_to_fixed_point, fuse_truncation_into_relu
from tacit.passes.trial import PROMISED, misses

# From so many inputs on that somebody chose, measured ranges are no surprise.
_ENOUGH = 64


def bound_ranges(draft: Draft) -> Draft:
    """Give every value its range and width: `bound.bounded`.

    A scale that was chosen for accuracy gives way where values do not fit the ring at it: the fewest bits less with
    which all do, and a warning if the answers are then not as accurate as promised. A scale that the caller chose
    does not, but the error says which one would.
    """
    try:
        return bounded(draft)
    except TooWide as error:
        found = _with_fewer(draft, error.excess)
        if found is None:
            raise
        if not draft.searched:
            raise CompileError(f"{error}\n  - frac_bits={found.frac_bits}; it is {draft.frac_bits}") from None
    return _with_doubt(found)


def _with_fewer(draft: Draft, excess: int) -> Draft | None:
    """With as many fractional bits less as it takes; None where that leaves too few."""
    model, frac = draft.model, draft.frac_bits or 0
    while model is not None:
        frac -= max(1, -(-excess // 2))  # a product takes the bits of both factors
        if frac < LEAST_FRAC_BITS:
            break
        try:
            return bounded(fuse_truncation_into_relu(expand_to_fixed_point(replace(model, frac_bits=frac, looks={}))))
        except TooWide as error:
            excess = error.excess
        except CompileError:
            break
    return None


def _with_doubt(draft: Draft) -> Draft:
    assert draft.model is not None
    missed = misses(draft.model) > PROMISED
    if not bool(missed.any()):
        return draft
    told = PrecisionWarning(
        f"{int(missed.sum())} of {len(missed)} inputs that were tried are not within the promised 2^-8 of the float "
        f"model: {draft.frac_bits} fractional bits are the most with which all values fit the ring. What helps: "
        "a narrower input_range, or values of ordinary size (norms between layers, smaller weights)"
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
