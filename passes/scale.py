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

from tacit.ir.errors import PrecisionWarning
from tacit.ir.ops.model import ModelOp
from tacit.passes.draft import MOST_FRAC_BITS, Draft, Values
from tacit.passes.precision import doubt
from tacit.passes.quantise import default_error
from tacit.passes.trial import (
    CLOSE,
    PROMISED,
    answering,
    chosen,
    close_rows,
    count,
    edges_are_amplified,
    fits,
    misses,
    most_frac_bits,
    shown,
    unsure,
    usual_size,
    varies,
)

Tensor = torch.Tensor
_TRIAL_FRAC, _LEAST_FRAC = 12, 8
# Truncations are drawn anew in each run. Where none makes a value jump with so many bits less, none will by far.
_SPARE = 2
# Nearly blank inputs are not what anybody showed: a warning of them is for those that are off by such a multiple.
_FAINT_ALLOWED = 4.0
# From so many bits on polynomials are the finer, the finer the scale is.
_FINER_FROM = 13
# Random inputs of the range may take so many bits more than those that were shown.
_MORE = 2
# By how much what is extrapolated from a few bits to many may be off.
_HOPELESS = 2.0
# Once a scale is found, later trials look at the rows that were worst.
_KEPT, _KEPT_LARGE = 16, 3


def choose_scale(draft: Draft) -> Draft:
    """Set `frac_bits` where the caller did not: the fewest with which all probes' answers are accurate enough.

    Where the promise is not kept on some probe, however many bits there are, the draft says so.
    """
    if draft.frac_bits is not None:
        return draft
    draft = replace(
        draft, searched=True, free=draft.max_error is None, usual=usual_size(draft), faithful=edges_are_amplified(draft)
    )
    unknown = unsure(draft)
    left, draft = chosen(draft.edges, unknown), _without(draft, unknown)
    jumps = any(isinstance(node.op, ModelOp) and node.op.jumps() for node in answering(draft).plan.nodes)
    draft = replace(draft, most=most_frac_bits(draft, _TRIAL_FRAC))
    tried = min(_TRIAL_FRAC, draft.most)
    trial = misses(_at(replace(draft, edges={}) if draft.faithful else draft, tried))
    if not jumps:
        draft, trial = _without_strange(draft, trial)
        if not draft.faithful:
            draft, trial, left = _without_hopeless(draft, trial, tried, left)
    least = _extrapolated(trial, tried, jumps)
    draft = replace(draft, close=close_rows(draft)) if jumps else _worst(draft, trial)
    if not (jumps or draft.faithful or least > draft.most):
        draft, found = _confirmed(draft, max(least, min(_LEAST_FRAC, draft.most)), tried)
        return warned(draft, found, left, approximated=draft.free and not draft.large)
    # Rows that nobody showed come as close to a step, or closer: no fewer bits than those of the trial, where they fit.
    least = max(least, _TRIAL_FRAC if jumps else _LEAST_FRAC)
    draft, found, left = _tried(draft, min(least, draft.most), jumps, left)
    found[count(draft.probes) :][torch.tensor([kind != "blank" for kind in draft.kinds], dtype=torch.bool)] /= (
        _FAINT_ALLOWED
    )
    draft = warned(draft, found, left, approximated=draft.free and (jumps or not draft.large))
    return replace(draft, edges={}, kinds=()) if draft.large else draft


def _confirmed(draft: Draft, least: int, tried: int) -> tuple[Draft, Tensor]:
    """With the bits that a trial told, or a few more; and by how much the probes miss then. Nothing is particular
    about the edges. tried: as in `choose_scale`. A large network is looked at once more with its ranges."""
    draft = _at(replace(draft, edges={}, kinds=()), least)
    if draft.large:
        return draft, torch.zeros(count(draft.probes))
    while draft.finer and (draft.frac_bits or 0) < tried and misses(draft).max() > CLOSE:
        # Lines with bits of their own were not truncated beside those of the trial, but are beside fewer.
        draft = _at(draft, (draft.frac_bits or 0) + 1)
    if not draft.free:
        return draft, torch.zeros(count(draft.probes))
    # What polynomials are off grows like rounding, where a layer multiplies it.
    found = misses(draft, approximated=True)
    return _with_finer(draft, found) if found.max() > CLOSE else (draft, found)


def warned(draft: Draft, found: Tensor, left: Values, *, approximated: bool) -> Draft:
    """With a warning where a probe misses the promise; `left` are edges that do, with any scale. approximated: whether
    that was seen with polynomials in the place of functions."""
    missed = count(left) + int((found > PROMISED).sum())
    if not missed:
        return draft
    row = _row(draft, int(found.argmax())) if found.max() > PROMISED else _row(replace(draft, edges=left), -1)
    told = doubt(answering(draft), row, missed, len(found) + count(left), approximated=approximated)
    return replace(draft, doubts=(*draft.doubts, PrecisionWarning(told)))


def _tried(draft: Draft, least: int, jumps: bool, left: Values) -> tuple[Draft, Tensor, Values]:
    """From so many bits on: the first with which no probe misses by much; and by how much the probes miss then.

    jumps: rows that are close to a step also have to keep to their side with a few bits less. What polynomials are off
    counts as well, unless the caller has said how far they may be. left: edges that no scale helps, to which others may
    be added.
    """
    if draft.free and not jumps:  # what edges ask for is finer rounding; finer polynomials where these are not enough
        draft = replace(draft, max_error=default_error(least))
    frac, found = least, misses(_at(draft, least), approximated=draft.free and jumps)
    if not jumps:
        draft, found, left = _without_hopeless(draft, found, frac, left)
    while frac < draft.most and (found.max() > CLOSE or (jumps and not _spared(draft, frac))):
        frac = min(frac + (2 if found.max() > 2 * CLOSE else 1), draft.most)
        found = _again(_at(draft, frac), found, approximated=draft.free and jumps)
    draft = _at(draft, frac)
    if not draft.free or draft.large:
        return draft, found, left
    if jumps:
        return *(_with_finer(draft, found) if found.max() > CLOSE else (draft, found)), left
    if not draft.faithful:
        return draft, found, left
    rounded, found = float(found.max()), misses(draft, approximated=True)
    if found.max() > max(CLOSE, 1.5 * rounded):
        draft, found = _with_finer(draft, found)
    return draft, found, left


def _again(draft: Draft, before: Tensor, *, approximated: bool) -> Tensor:
    """By how much the probes miss with more bits; edges that were close before are taken to be as close."""
    probes = count(draft.probes)
    close = before[probes:] <= CLOSE
    found = misses(_without(draft, close), approximated=approximated)
    edges = before[probes:].clone()
    edges[~close] = found[probes:]
    return torch.cat([found[:probes], edges])


def _with_finer(draft: Draft, found: Tensor) -> tuple[Draft, Tensor]:
    """With the polynomials of its scale, and of scales with more bits, as long as these help; and what is missed.

    Where more bits do not fit, polynomials alone become finer.
    """
    bits = max(draft.frac_bits or 0, _FINER_FROM)
    if draft.max_error is None or default_error(bits) >= draft.max_error:  # as fine as that they are
        bits += 2
    while bits <= MOST_FRAC_BITS:
        finer = _at(replace(draft, max_error=default_error(bits)), max(draft.frac_bits or 0, min(bits, draft.most)))
        again = misses(finer, approximated=True) if fits(finer) else found
        if again.max() >= found.max():
            break
        draft, found, bits = finer, again, bits + 2
        if found.max() <= CLOSE:
            break
    return draft, found


def _spared(draft: Draft, frac: int) -> bool:
    """Whether no value jumps with a few bits less either: rounding, which is drawn anew in each run, is then a
    fraction of what would make it jump."""
    return bool(misses(_at(draft, frac - _SPARE), approximated=draft.free).max() <= CLOSE * 2**_SPARE)


def _without(draft: Draft, edges: Tensor) -> Draft:
    if not bool(edges.any()):
        return draft
    kinds = [kind for kind, drop in zip(draft.kinds, edges, strict=True) if not drop]
    return replace(draft, edges=chosen(draft.edges, ~edges), kinds=tuple(kinds))


def _extrapolated(trial: Tensor, tried: int, jumps: bool) -> int:
    """The bits with which the worst row would be accurate; half of the rows, where one that jumped tells nothing."""
    worst = float(trial.median() if jumps else trial.max())
    return tried + math.ceil(math.log2(max(worst, 2.0**-30)))


def _without_strange(draft: Draft, trial: Tensor) -> tuple[Draft, Tensor]:
    """Without random inputs that would take many more bits than what was shown.

    Deep networks amplify what is like none of the data that they were trained on: noise over the whole range would
    double what a plan costs, for answers that nobody asks for. Unless nothing but blank inputs was shown.
    """
    rows, chosen_ones = count(draft.probes), shown(draft)
    if not varies(draft):
        return draft, trial
    keep = (torch.arange(rows) < chosen_ones) | (trial[:rows] <= trial[:chosen_ones].max() * 2.0**_MORE)
    kept = torch.cat([keep, torch.ones(len(trial) - rows, dtype=torch.bool)])
    return replace(draft, probes=chosen(draft.probes, keep)), trial[kept]


def _without_hopeless(draft: Draft, found: Tensor, frac: int, left: Values) -> tuple[Draft, Tensor, Values]:
    """Without edges that miss, with so many bits, by more than all that fit would make up for; those join the others
    that are left out. What does not help them is not paid for."""
    probes = count(draft.probes)
    hopeless = found[probes:] > _HOPELESS * PROMISED * 2.0 ** (draft.most - frac)
    if not bool(hopeless.any()):
        return draft, found, left
    out = chosen(draft.edges, hopeless)
    left = {label: torch.cat([x, left[label]]) for label, x in out.items()} if count(left) else out
    return _without(draft, hopeless), torch.cat([found[:probes], found[probes:][~hopeless]]), left


def _at(draft: Draft, frac_bits: int) -> Draft:
    return draft.with_(draft.plan, frac_bits=frac_bits)


def _row(draft: Draft, row: int) -> Values:
    """One probe, counted through to the edges; -1 is the last."""
    rows = count(draft.probes)
    values, row = (draft.probes, row) if 0 <= row < rows else (draft.edges, row - rows if row >= 0 else row)
    return {label: x[[row]] for label, x in values.items()}


def _worst(draft: Draft, trial: Tensor) -> Draft:
    """With no more than so many probes, the worst of them; and all edges."""
    rows, kept = count(draft.probes), _KEPT_LARGE if draft.large else _KEPT
    if rows <= kept:
        return draft
    worst = trial[:rows].topk(kept).indices.sort().values
    return replace(draft, probes=chosen(draft.probes, worst))
