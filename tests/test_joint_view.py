"""What a party can compute from all that it holds is the same distribution whatever the inputs are.

A message may be uniform by itself and tell everything to a receiver that knows what masks it: P2's answer is masked by
a flip that P0 and P1 drew. So every test here looks at the joint view.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from harness import fixed_keys, samples, single
from joint_view import PARTIES, Part, Recorder, Relations, anywhere, constant, record, rows_of
from scipy.stats import chisquare

from tacit.ir.cost import COMMON, P0, P1, P2, ROLES
from tacit.ir.op import Level, Sample, Subprotocol
from tacit.ir.ops.comparison import Select
from tacit.ir.ops.securenn import ComputeMSB, ShareConvert
from tacit.ir.ops.spline import Piecewise
from tacit.ir.plan import Plan
from tacit.runtime import field, ring

Tensor = torch.Tensor
ALPHA = 1e-6
# Left out: its ranks are uniform only where all comparisons are right, which a test of their own looks at.
LEFT_OUT = ("argmax_by_rank",)


def talking() -> list[tuple[str, Sample]]:
    """Samples whose parties hear of something in an inference."""
    found = []
    for name, sample in samples(Level.PROTOCOL):
        op = sample.op
        if op.name not in LEFT_OUT and not op.declares and not op.session and P2 in op.roles:
            found += [(name, sample)] if op.parts(*(t.at(1) for t in sample.args)) else []
    return found


def asking(*kinds: type[Subprotocol]) -> list[tuple[str, Sample]]:
    """Samples that run one of these subprotocols."""
    return [(n, s) for n, s in talking() if any(isinstance(p, kinds) for p in s.op.parts(*(t.at(1) for t in s.args)))]


def each(found: list[tuple[str, Sample]]) -> dict[str, object]:
    return {"argnames": "sample", "argvalues": [s for _, s in found], "ids": [n for n, _ in found]}


def width_of(sample: Sample) -> int:
    return min(t.width for t in sample.args if t.kind == "secret")


def uniform(codes: Tensor | np.ndarray, cells: int) -> bool:
    counts = np.bincount(np.asarray(codes).reshape(-1), minlength=cells)
    return len(counts) == cells and bool(chisquare(counts).pvalue > ALPHA)


# --- no relation holds for one input that does not hold for another ---

# Primes. A relation that holds for one input is looked for in the rows of another: half of them break it.
ROWS, SOME = (401, 701, 1009, 1499, 2503, 4999), 211
MOST_BITS = 2500  # of two neighbours; else one element is looked at
SPARE = 64  # more rows than bits: a relation that is none holds in all of them with probability 2^-64
BY_CHANCE = SOME // 20  # rows with what is rare in every run: a digit that is seldom, say


def steps_of(recorder: Recorder) -> list[slice]:
    """Windows of consecutive subprotocols: what one is given was another's result."""
    count = min(len(recorder.parts[P0]), 6)
    return [slice(i, i + 3) for i in range(0, max(1, count - 2), 2)]


def seen(run: Recorder, rank: int, plan: Plan, batch: int, width: int) -> list[np.ndarray]:
    return [rows_of(run, rank, plan, batch, width, steps) for steps in steps_of(run)]


def small(found: list[tuple[str, Sample]]) -> list[tuple[str, Sample]]:
    """Three elements of what is done element by element; of the textbook suite's chains, whose steps repeat, one."""
    out = []
    for name, sample in found:
        args = tuple(t.with_(shape=(t.shape[0], 3)) if len(t.shape) == 2 else t for t in sample.args)
        alike = sample.op.infer(*sample.args).shape == sample.args[0].shape and args[-1].shape == args[0].shape
        if not name.startswith(("securenn.max", "securenn.arg")) or name == "securenn.argmax-1":
            out.append((name, dataclasses.replace(sample, args=args) if alike else sample))
    return out


@pytest.mark.parametrize(**each(small(talking())))
def test_the_same_relations_hold_in_a_view_whatever_the_inputs_are(sample: Sample) -> None:
    """Affine relations over GF(2) between all bits that a party holds of an element and of its neighbour.

    A constant rho is the relation `flip + beta + top bit of c = sign`; one rho for two comparisons relates both; a mask
    that is used twice relates what is opened.
    """
    plan, width = single(sample), width_of(sample)
    others = [anywhere(plan, SOME, width - 1), constant(plan, SOME, -(2 ** (width - 2)))]
    runs = [record(plan, SOME, inputs) for inputs in others]
    most = max(int(view.any(0).sum()) for rank in PARTIES for view in seen(runs[0], rank, plan, SOME, 2))
    neighbours = 2 if most < MOST_BITS else 1
    rows = next((n for n in ROWS if n > most + SPARE), ROWS[-1])
    zero = record(plan, rows, constant(plan, rows, 0))
    for rank in PARTIES:
        views = [seen(run, rank, plan, SOME, neighbours) for run in runs]
        for held, *theirs in zip(seen(zero, rank, plan, rows, neighbours), *views, strict=True):
            compare_relations(held, theirs, ROLES[rank])


def compare_relations(held: np.ndarray, others: list[np.ndarray], role: str) -> None:
    """What relates the bits of the one view relates those of the others."""
    moving = np.any([view.any(0) for view in (held, *others)], axis=0)
    if not moving.any():
        return  # P2 has no part in these steps
    found = Relations(held[:, moving])
    assert found.rank + SPARE < len(held), f"{len(held)} rows are too few for {moving.sum()} bits"
    for other in others:
        broken = found.broken(other[:, moving])
        assert broken <= BY_CHANCE, f"{role}: {broken} of {SOME} rows break a relation"
