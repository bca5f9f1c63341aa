"""P2 dealt both shares of every digit, and knows every mask and every rho: what it adds up still tells it nothing.

Nor does it depend on a range: inputs far outside the window give wrong answers, and P2 the same view.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from harness import single
from joint_view import Part, Recorder, constant, record
from scipy.stats import chi2_contingency, chisquare
from test_joint_view import each, not_repeated, talking, width_of

from tacit.ir.cost import P0, P2
from tacit.ir.digits import prime_for
from tacit.ir.op import Sample, Subprotocol
from tacit.ir.ops.comparison import Select
from tacit.ir.ops.spline import Piecewise
from tacit.ir.plan import Plan
from tacit.runtime import field

Tensor = torch.Tensor
ALPHA = 1e-6
COMPARISONS = 4000  # of every part, at least


def comparing() -> list[tuple[str, Sample]]:
    """Samples in which P2 takes part online."""
    found = []
    for name, sample in not_repeated(talking()):
        parts = sample.op.parts(*(t.at(1) for t in sample.args))
        found += [(name, sample)] if any(item.kind == "s" for part in parts for item in part.randomness()) else []
    return found


def fits(counts: np.ndarray, expected: np.ndarray | None = None) -> bool:
    return bool(chisquare(counts, expected).pvalue > ALPHA)


def batch_for(sample: Sample) -> int:
    """So many rows that the smallest part has enough comparisons."""
    parts = sample.op.parts(*(t.at(1) for t in sample.args))
    least = min(item.shape[-1] for part in parts for item in part.randomness() if item.kind == "s")
    return -(-COMPARISONS // least)


def inputs(plan: Plan, batch: int, kind: str, width: int) -> dict[str, Tensor]:
    """One row for the whole batch: inside the window, at the ends of the ring, or anywhere in the ring."""
    if kind == "inside":
        return constant(plan, batch, -(2 ** (width - 2)))
    out = constant(plan, batch, 0)
    for i, (label, value) in enumerate(out.items()):
        ends = torch.tensor([2**63 - 1, -(2**63), 2**31 - 1, -(2**31), -(2**62)])
        row = ends[(torch.arange(value[0].numel()) + i) % len(ends)].view(value[0].shape)
        if kind == "anywhere":
            generator = torch.Generator().manual_seed(3 + i)
            row = torch.randint(-(2**63), 2**63 - 1, value[0].shape, generator=generator)
        out[label] = row.expand(value.shape).contiguous()
    return out


def totals(recorder: Recorder) -> list[Tensor]:
    """What P2 gets by adding up both vectors, comparison by comparison: (positions, n)."""
    return [total for part in recorder.parts[P2] for total in part.kernel("total")]


def assert_blinded(total: Tensor, p: int) -> None:
    """At most one zero, with probability 1/2, at a uniform place; all else uniform, also two together."""
    positions, n = total.shape
    zero = (total == 0).numpy()
    assert int(zero.sum(0).max()) <= 1
    bits = zero.any(0).astype(np.int64)
    assert fits(np.bincount(bits, minlength=2)), "a fair bit"
    fours = bits[: n // 4 * 4].reshape(-1, 4) @ np.array([8, 4, 2, 1])
    assert fits(np.bincount(fours, minlength=16)), "bits of neighbours"
    if positions > 1:
        assert fits(zero.sum(1)), "a uniform place"
        places = zero.argmax(0)[bits == 1]
        step = (places[1:] - places[:-1]) % positions
        assert fits(np.bincount(step, minlength=positions)), "places of neighbours"
    others = total.numpy().astype(np.int64)
    assert_pairs(others[:, :-1], others[:, 1:], p, "neighbouring comparisons")
    assert_pairs(others, np.roll(others, 1, 0), p, "neighbouring positions") if positions > 2 else None


def assert_pairs(a: np.ndarray, b: np.ndarray, p: int, what: str) -> None:
    """Two nonzero residues: uniform together. With one factor for both, their quotient would be that of small ones."""
    both = (a > 0) & (b > 0)
    assert fits(np.bincount((a[both] - 1) * (p - 1) + b[both] - 1, minlength=(p - 1) ** 2)), what


@pytest.mark.parametrize(**each(comparing()))
def test_p2_sees_a_fair_bit_at_a_uniform_place_for_every_input_of_the_ring(sample: Sample) -> None:
    plan, batch, width = single(sample), batch_for(sample), width_of(sample)
    for kind in ("inside", "ends", "anywhere"):
        recorder = record(plan, batch, inputs(plan, batch, kind, width))
        found = totals(recorder)
        assert found
        for total in found:
            assert_blinded(total, prime_for(len(total)))
        for part in recorder.parts[P2]:
            assert_apart(part.kernel("has_zero"))


def assert_apart(bits: list[Tensor]) -> None:
    """The bits of several comparisons of one value, as with all knots of a function: any two are four equal cases."""
    for a, b in itertools.combinations(bits, 2):
        assert fits(np.bincount((2 * a + b).numpy(), minlength=4)), "bits of two comparisons of one value"


def plain_entries(part: Part, index: int | None) -> tuple[Tensor, Tensor]:
    """What P0 sends for a comparison, turned back, and the same without factors and refresh, which P2 can work out."""
    m, made = part.material, part.part
    name = (lambda key: f"{key} {index}") if index is not None else (lambda key: key)
    c = part.sums[0].reshape(-1) - (made.spline.knots[index] if index is not None else 0)  # type: ignore[attr-defined]
    drop, digits = (made.spline if index is not None else made).drop, made.digits  # type: ignore[attr-defined]
    one, zero = torch.ones_like(m[name("s")]), torch.zeros_like(m[name("z")])
    still = torch.zeros_like(m[name("shift")])
    sent = field.blind(c, drop, digits, m["bits"], m[name("s")], m[name("z")], m[name("beta")], still, P0)
    return sent, field.blind(c, drop, digits, m["bits"], one, zero, m[name("beta")], still, P0)


@pytest.mark.parametrize(**each([(n, s) for n, s in comparing() if not n.startswith("securenn")]))
def test_a_vector_is_refreshed_against_what_p2_dealt(sample: Sample) -> None:
    """P0's vector is independent of its shares of the digits, which P2 dealt: one entry, and two entries together."""
    plan = single(sample)
    recorder = record(plan, batch_for(sample), constant(plan, batch_for(sample), 3))
    for part in recorder.parts[P0]:
        if isinstance(part.part, (Select, Piecewise)):
            knots = range(part.part.knots) if isinstance(part.part, Piecewise) else (None,)
            for index in knots:
                assert_refreshed(*plain_entries(part, index), part.part)


def assert_refreshed(sent: Tensor, plain: Tensor, part: Subprotocol) -> None:
    p = part.digits.p  # type: ignore[attr-defined]
    table = np.bincount((sent.long() * p + plain).reshape(-1).numpy(), minlength=p * p).reshape(p, p)
    table = table[:, table.sum(0) > 20 * p]
    assert chi2_contingency(table).pvalue > ALPHA, "an entry and the share behind it"
    for ours, theirs in ((sent[:-1], sent[1:]), (sent[:, :-1], sent[:, 1:])):
        if len(ours):
            assert fits(np.bincount((ours.long() * p + theirs).reshape(-1).numpy(), minlength=p * p)), "two entries"
