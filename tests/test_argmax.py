"""Argmax by wins: what P2 sees is one distribution for any logits, also those that left every range."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from harness import fixed_keys, samples, single
from scipy.stats import chisquare
from test_joint_view_p2 import assert_pairs
from test_leakage import ALPHA, uniform
from torch import nn

import tacit
from tacit.ir.cost import P0, P1, P2
from tacit.ir.digits import Digits, prime_for
from tacit.ir.errors import PlanError
from tacit.ir.op import Level, Sample
from tacit.ir.ops.wins import ArgmaxByWins
from tacit.ir.plan import Plan
from tacit.ir.types import Batch, Type
from tacit.runtime import field
from tacit.runtime.session import Session

Tensor = torch.Tensor


def sent_to_p2(session: Session, rank: int) -> list[Tensor]:
    return [t for link, message in session.network.transcript or [] for t in message if link == (rank, P2)]


@pytest.mark.parametrize("name", ["argmax_by_wins-1", "argmax_by_wins-2", "argmax_by_wins-3"])
def test_p2_sees_exactly_one_zero_whatever_the_logits_are(name: str) -> None:
    """Also far outside every range: one class beats all others, at a uniform place, among uniform other entries."""
    sample = dict(samples(Level.PROTOCOL))[name]
    plan, rows = single(sample), 3000
    classes, width = sample.args[0].at(1).dims[1], sample.args[0].width
    p, positions = prime_for(classes), Digits(sample.op.window - 1).positions  # type: ignore[attr-defined]
    generator = torch.Generator().manual_seed(5)
    everywhere = torch.randint(-(2**63), 2**63 - 1, (rows, classes), generator=generator)
    steps = (torch.arange(classes) << (width - 1)).expand(rows, classes)  # beating one another in a circle, if wrapped
    ties = torch.zeros(rows, classes, dtype=torch.int64)
    inside = everywhere >> (64 - width)
    one = torch.randint(-(2**63), 2**63 - 1, (1, classes), generator=generator).expand(rows, classes).contiguous()
    for logits in (everywhere, one, steps, -steps, ties, inside, inside + (1 << (width - 1))):
        session = Session(plan, {}, keys=fixed_keys(23))
        session.network.transcript = []
        session.infer(session.deal(rows), {"x0": logits})
        session.close()
        sent = {rank: sent_to_p2(session, rank) for rank in (P0, P1)}
        # The last message to P2: the wins. Those before it are the comparisons.
        entries = [field.unpack(sent[rank][-1], classes, p) for rank in (P0, P1)]
        assert len(sent[P0]) == 2 and field.unpack(sent[P0][0], positions, prime_for(positions)).shape[0] == positions
        total = (entries[0] + entries[1]) % p
        assert bool(((total == 0).sum(0) == 1).all())
        assert chisquare((total == 0).sum(1)).pvalue > ALPHA
        assert uniform(total[total > 0] - 1, p - 1) and all(uniform(entry, p) for entry in entries)
        others = total.numpy().astype(int)
        assert_pairs(others, np.roll(others, 1, 0), p, "neighbouring classes")
        assert_pairs(others[:, :-1], others[:, 1:], p, "neighbouring rows")


@pytest.mark.parametrize("reveal", ["argmax", "correct"])
def test_a_calibrated_model_shows_p2_the_same_of_every_image(reveal: str) -> None:
    """Measured on ordinary images and asked others, logits leave their range: P2 finds one zero in every row."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(256, 32), nn.ReLU(), nn.Linear(32, 10)).eval()
    pattern = torch.tensor([1.0, -1.0] * 128).view(1, 1, 16, 16)
    with torch.no_grad():
        model[1].weight.copy_(pattern.view(1, 256) * torch.rand(32, 1))
    usual, rows, p = torch.rand(64, 1, 16, 16) * 2 - 1, 400, prime_for(10)
    secure = tacit.compile(
        model, usual, input_range=(-1, 1), reveal=reveal, ranges="measured", margin=2, calibration=usual
    )
    assert secure.plan.ranges == "measured" and secure.plan.find(ArgmaxByWins)
    left = 0
    like = pattern * torch.linspace(0.5, 1, rows).view(rows, 1, 1, 1)
    for images in (usual[:1].expand(rows, 1, 16, 16), torch.rand(rows, 1, 16, 16), like):
        session = secure.session()
        session.network.transcript = []
        answer = secure(images, *([torch.zeros(rows, dtype=torch.int64)] if reveal == "correct" else []))
        shape = field.packed_shape(10, rows, p)
        sent = [
            [
                t
                for link, ts in session.network.transcript
                for t in ts
                if link == (rank, P2) and tuple(t.shape) == shape[0]
            ]
            for rank in (P0, P1)
        ]
        assert len(sent[0]) == len(sent[1]) == 1
        zero = (field.unpack(sent[0][0], 10, p) + field.unpack(sent[1][0], 10, p)) % p == 0
        assert bool((zero.sum(0) == 1).all()) and chisquare(zero.sum(1)).pvalue > ALPHA
        with torch.no_grad():
            left += int((answer != model(images).argmax(1)).sum()) if reveal == "argmax" else 0
    assert reveal == "correct" or left > 50, "logits were to leave their range"


def orders_recovered_by_p2(*, refresh: bool) -> int:
    """Of 40 rows of three logits, how many P2 puts in order from the wins: it dealt both shares of every rho."""
    n, classes = 40, 3
    plan = single(Sample(ArgmaxByWins(43), (Type("secret", (Batch(), classes), 28, 40),)))
    p, pairs = prime_for(classes), list(itertools.combinations(range(classes), 2))
    session = Session(plan, {}, keys=fixed_keys(31))
    dealt = session.deal(n)
    rho = [dealt.material[rank]["out"][1]["rho"].clone().int() for rank in (P0, P1)]
    if not refresh:
        for rank in (P0, P1):
            dealt.material[rank]["out"][2]["z"].zero_()
    x = torch.randint(-(2**37), 2**37, (n, classes), generator=torch.Generator().manual_seed(3))
    session.network.transcript = []
    session.infer(dealt, {"x0": x})
    session.close()
    sent = {rank: sent_to_p2(session, rank)[-1] for rank in (P0, P1)}
    v0, v1 = (field.unpack(sent[rank], classes, p).int() for rank in (P0, P1))
    right = 0
    for row in range(n):
        fits = set()
        for outcome in itertools.product((0, 1), repeat=len(pairs)):
            shares = []
            for rank in (P0, P1):
                wins = [-(classes - 1) * (rank == P0)] * classes
                for k, (a, b) in enumerate(pairs):
                    known = outcome[k] ^ int((rho[0][k, row] + rho[1][k, row]) % p)  # e xor flip
                    bit = int(rho[rank][k, row])
                    bit = (int(rank == P0) - bit) if known else bit
                    wins[a], wins[b] = wins[a] + bit, wins[b] + int(rank == P0) - bit
                shares.append(wins)
            for turn in range(classes):
                order = [(j - turn) % classes for j in range(classes)]
                # The factors cancel: what P0 sent times what P1 should have, and the other way round.
                alike = [
                    (int(v0[j, row]) * shares[1][c] - int(v1[j, row]) * shares[0][c]) % p for j, c in enumerate(order)
                ]
                if not any(alike):
                    fits.add(outcome)
        right += fits == {tuple(int(x[row, a] >= x[row, b]) for a, b in pairs)}
    return right


def test_without_a_refresh_p2_would_put_the_logits_in_order() -> None:
    assert orders_recovered_by_p2(refresh=False) >= 20  # of the others, several orders fit
    assert orders_recovered_by_p2(refresh=True) <= 4  # guesses, one in six


def test_the_order_of_wins_is_total_for_any_logits() -> None:
    """A ring of 8 bits, enumerated: what a truncation gives lies within 1.5 * 2^j for any value, mask and wrap."""
    ring = 8
    for j in range(2, ring + 1):
        bits = ring - j
        found = set()
        for x, r in itertools.product(range(1 << ring), repeat=2):
            c = (x + (1 << (ring - 2)) + r) % (1 << ring)
            wrap = (r >> (ring - 1)) * (1 - (c >> (ring - 1))) << j
            found.add((c >> bits) - (r >> bits) + wrap - (1 << (ring - 2 - bits)))
        assert max(found) - min(found) < 3 << (j - 1)
        assert max(found) - min(found) < 1 << (j + 1)  # a signed window of j + 2 bits holds every difference


def test_a_plan_that_shows_p2_ranks_is_refused() -> None:
    sample = dict(samples(Level.PROTOCOL))["argmax_by_wins-0"]
    text = str(single(sample)).replace("argmax_by_wins %x0, window=43", "argmax_by_rank %x0, window=41")
    with pytest.raises(PlanError, match="compile again"):
        Plan.parse(text)
