"""A message is uniform given everything that its receiver holds: inputs, shares, and all streams that it draws from.

So two runs that agree in all of that, and differ in the keys of the others alone, differ uniformly in every message.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from harness import fixed_keys, single
from joint_view import PARTIES, constant
from scipy.stats import chisquare
from test_joint_view import LEFT_OUT, each, not_repeated, talking
from test_leakage import as_bytes, field_shapes, is_field

from tacit.ir.cost import P2, ROLES
from tacit.ir.op import Sample
from tacit.ir.plan import Plan
from tacit.runtime import field
from tacit.runtime.prf import Keys
from tacit.runtime.session import Session

Tensor = torch.Tensor
ALPHA = 1e-6
BYTES = 8000  # about so many of every link are looked at, if there are as many


def keys_but_for(receiver: int, seed: int) -> Keys:
    """All keys of the receiver as ever; the others', which it does not know, by the seed."""
    ours, others = fixed_keys(61), fixed_keys(seed)
    return {pair: ours[pair] if receiver in pair else others[pair] for pair in ours}


def received(plan: Plan, batch: int, receiver: int, seed: int) -> list[tuple[int, Tensor]]:
    """What a party is sent in one inference, dealing included."""
    weights = {n.op.label: torch.full(n.type.dims, 3) for n in plan.nodes if n.op.name == "weight"}  # type: ignore[attr-defined]
    session = Session(plan, weights, keys=keys_but_for(receiver, seed))
    session.network.transcript = []
    session.infer(session.deal(batch), constant(plan, batch, 5))
    session.close()
    found = session.network.transcript
    return [(source, t) for (source, target), message in found for t in message if target == receiver]


def residues(message: Tensor, shapes: dict[tuple[int, ...], tuple[int, int]]) -> tuple[Tensor, int]:
    """A message as numbers modulo p, or as bytes."""
    if is_field(message) and tuple(message.shape) in shapes:
        positions, p = shapes[tuple(message.shape)]
        return field.unpack(message, positions, p).reshape(-1).int(), p
    return as_bytes(message)[: message.nbytes // 8 * 8 or None].int(), 256


@pytest.mark.parametrize(**each(not_repeated(talking())))
@pytest.mark.parametrize("receiver", PARTIES)
def test_a_message_is_uniform_given_all_that_its_receiver_holds(sample: Sample, receiver: int) -> None:
    plan = single(sample)
    assert sample.op.name not in LEFT_OUT
    batch = max(20, BYTES // plan.cost(batch=1).online_bytes)
    shapes = field_shapes(plan, batch, kind="s" if receiver == P2 else "bits")
    differences: dict[tuple[int, int], list[Tensor]] = {}
    first, second = (received(plan, batch, receiver, seed) for seed in (71, 72))
    for (source, a), (again, b) in zip(first, second, strict=True):
        assert source == again and a.shape == b.shape
        (ours, modulus), (theirs, _) = residues(a, shapes), residues(b, shapes)
        apart = (ours - theirs) % modulus
        differences.setdefault((source, modulus), []).append(apart)
        often = len(apart) / modulus
        assert int((apart == 0).sum()) <= often + 6 * (often**0.5 + 1), f"{ROLES[source]} sends something unmasked"
    for (source, modulus), found in differences.items():
        counts = np.bincount(torch.cat(found).numpy(), minlength=modulus)
        if counts.sum() >= 20 * modulus:
            assert chisquare(counts).pvalue > ALPHA, f"{ROLES[source]} to {ROLES[receiver]}, modulo {modulus}"
