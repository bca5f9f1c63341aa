"""What a party can compute from all that it holds is the same distribution whatever the inputs are.

A message may be uniform by itself and tell everything to a receiver that knows what masks it: P2's answer is masked by
a flip that P0 and P1 drew. So every test here looks at the joint view.
"""

from __future__ import annotations

import dataclasses

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


def talking() -> list[tuple[str, Sample]]:
    """Samples whose parties hear of something in an inference."""
    found = []
    for name, sample in samples(Level.PROTOCOL):
        op = sample.op
        if not op.declares and not op.session and P2 in op.roles:
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


def not_repeated(found: list[tuple[str, Sample]]) -> list[tuple[str, Sample]]:
    """Of the textbook suite's chains, whose steps repeat, one."""
    chains = ("securenn.max", "securenn.arg")
    return [(n, s) for n, s in found if not n.startswith(chains) or n == "securenn.argmax-1"]


def small(found: list[tuple[str, Sample]]) -> list[tuple[str, Sample]]:
    """Three elements of what is done element by element."""
    out = []
    for name, sample in not_repeated(found):
        args = tuple(t.with_(shape=(t.shape[0], 3)) if len(t.shape) == 2 else t for t in sample.args)
        alike = sample.op.infer(*sample.args).shape == sample.args[0].shape and args[-1].shape == args[0].shape
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


# --- what P2's answers tell P0 and P1 ---

BATCH = 1009  # a prime: it is found in every shape
CELLS = 64


def columns(bits: Tensor, part: Subprotocol) -> Tensor:
    """Bits of one part as (BATCH, comparisons of one element): the batch first, whatever precedes it."""
    shape = (*(bits.shape[:1] if isinstance(part, Piecewise) else ()), *part.shape)  # type: ignore[attr-defined]
    return bits.reshape(shape).movedim(shape.index(BATCH), 0).reshape(BATCH, -1)


def computed(part: Part) -> Tensor:
    """What P0 or P1 gets from P2's answer with all that it holds: [x >= t] xor rho."""
    c, made = part.sums[0], part.part
    if isinstance(made, Piecewise):
        top = torch.stack([ring.bit(c - knot, made.window - 1) for knot in made.spline.knots])
        beta = torch.stack([part.material[f"beta {i}"] for i in range(made.knots)])
        return columns(top ^ beta ^ field.unpack_bits(part.got[-1][1], top.numel()).view(top.shape), made)
    top = ring.bit(c, made.window - 1)  # type: ignore[attr-defined]
    return columns(top ^ part.material["beta"] ^ field.unpack_bits(part.got[-1][1], top.numel()), made)


def dealt_rho(ours: Part, theirs: Part) -> Tensor:
    """The bits by which P2 masked its answers."""
    key = "gated" if isinstance(ours.part, Piecewise) else "rho"
    both = ours.material[key] + theirs.material[key]
    both = both % p if (p := getattr(ours.part, "p", 0)) else both & 1
    return columns(both[:, 0] if key == "gated" else both, ours.part)


def asked(recorder: Recorder, rank: int) -> list[Part]:
    """The parts of a party that P2 answers."""
    return [p for p in recorder.of(rank, Select) + recorder.of(rank, Piecewise) if p.got and p.got[-1][0] == P2]


def assert_independent(bits: Tensor, what: str) -> None:
    """(BATCH, k): fair, and so is every pattern of neighbouring comparisons and of neighbouring elements."""
    codes = pattern(bits)
    assert uniform(codes, CELLS), f"{what}: neighbouring bits of one element"
    down = pattern(bits[: BATCH // 6 * 6].t().reshape(-1, 6))
    assert uniform(down, CELLS), f"{what}: the same bit of neighbouring elements"
    for a in range(min(bits.shape[1], 12)):
        for b in range(a):
            assert uniform(2 * bits[:, a].long() + bits[:, b], 4), f"{what}: bits {a} and {b} of one element"


def pattern(bits: Tensor) -> Tensor:
    """Six bits of a row as a number, for every six of them; fewer where there are fewer, filled with the next rows'."""
    width = bits.shape[1] // 6 * 6
    flat = bits[:, :width].reshape(-1, 6) if width else bits.reshape(-1)[: bits.numel() // 6 * 6].view(-1, 6)
    return (flat.long() << torch.arange(6)).sum(1)


def assert_no_function_of(rho: Tensor, ours: Part, theirs: Part) -> None:
    """Where x is known, P0 and P1 know r = c - x: a rho that were one of its bits would tell them the sign."""
    shape = ours.part.shape  # type: ignore[attr-defined]
    r = (ours.material["r"] + theirs.material["r"]).view(shape).movedim(shape.index(BATCH), 0).reshape(BATCH, -1)
    n, size = r.numel(), r.element_size()
    bits = np.unpackbits(r.contiguous().numpy().view(np.uint8).reshape(n, size), axis=1)
    for slot in range(rho.shape[1] // r.shape[1]):  # one for each knot
        its = rho[:, slot * r.shape[1] : (slot + 1) * r.shape[1]].reshape(n, 1).numpy()
        differ = (bits ^ its).sum(0, dtype=np.int64)
        assert bool((abs(differ - n / 2) < 3 * n**0.5).all()), "rho and a bit of r"


@pytest.mark.parametrize(**each(small(asking(Select, Piecewise))))
def test_p2_answers_with_bits_that_tell_nothing_to_those_who_know_beta_and_c(sample: Sample) -> None:
    """Constant inputs of both signs: every comparison has one outcome, and what P0 and P1 compute is a fair bit."""
    plan, reach = single(sample), 2 ** (width_of(sample) - 2)
    for value in (min(7, reach - 1), -reach):
        recorder = record(plan, BATCH, constant(plan, BATCH, value))
        parts = [asked(recorder, rank) for rank in (P0, P1)]
        known = [torch.cat([computed(part) for part in found], 1) for found in parts if found]
        if not known:
            return  # a polynomial without knots
        assert torch.equal(*known)
        assert_independent(known[0], f"inputs of {value}")
        dealt = [dealt_rho(*pair) for pair in zip(*parts, strict=True)]
        assert_independent(torch.cat(dealt, 1), "rho")
        for rho, *pair in zip(dealt, *parts, strict=True):
            assert_no_function_of(rho, *pair)
        outcome = known[0] ^ torch.cat(dealt, 1)
        assert bool((outcome == outcome[0]).all()), "the outcome of a comparison of constants"


# --- results that claim to be fresh ---

ODD = 2**64 - 1


def converted(of: type[Subprotocol], key: int) -> tuple[Part, Part]:
    """P0's and P1's side of one subprotocol, on fixed shares, with all randomness fixed but what P0 and P1 share."""
    plan, keys = single(dict(samples(Level.PROTOCOL))["securenn.relu-0"]), fixed_keys(41)
    keys[P0, P1] = fixed_keys(key)[P0, P1]
    n = 20 * 37
    shares = {P0: torch.arange(n) * 977 - 5, P1: torch.arange(n) * -31 + 12}
    recorder = record(plan, 20, constant(plan, 20, 1), keys=keys, feed={of: shares})
    (ours,), (theirs,) = (recorder.of(rank, of) for rank in (P0, P1))
    return ours, theirs


@pytest.mark.parametrize("of", [ShareConvert, ComputeMSB])
def test_a_result_is_shared_afresh_whatever_p2_knows(of: type[Subprotocol]) -> None:
    """The result's shares are uniform over what P0 and P1 draw alike, given the operands and everything P2 has.

    That makes the subprotocol simulatable alone: without the last refresh a share is one of the few values that
    P2's own randomness leaves open.
    """
    runs = [converted(of, key) for key in range(43, 55)]
    first = runs[0][0]
    assert any(item.kind == "refresh" and item.source == COMMON for item in first.part.randomness())
    for side in (0, 1):
        results = torch.stack([run[side].result for run in runs])
        apart = torch.cat([(results[i] - results[j]) for i in range(len(runs)) for j in range(i)])
        assert int((apart == 0).sum()) == 0, "one share for two draws of P0 and P1"
        assert uniform(results.contiguous().view(torch.uint8), 256)
        assert uniform(apart.contiguous().view(torch.uint8), 256)
    add = ring.odd_add if of is ShareConvert else torch.add
    wholes = torch.stack([add(ours.result, theirs.result) for ours, theirs in runs])
    assert bool((wholes == wholes[0]).all()), "the same result from the same operands"
