"""A message is uniform given everything that its receiver holds: inputs, shares, and all streams that it draws from.

So two runs that agree in all of that, and differ in the keys of the others alone, differ uniformly in every message.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from harness import fixed_keys, single
from joint_view import PARTIES, Recorder, constant, record_several
from scipy.stats import chisquare
from test_joint_view import each, not_repeated, small, talking
from test_leakage import as_bytes, field_shapes, is_field

from tacit.ir.build import Builder
from tacit.ir.cost import P2, ROLES
from tacit.ir.op import Level, Sample
from tacit.ir.ops.roles import Input, Mask, Reveal, Weight
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
    batch = max(20, BYTES // plan.cost(batch=1).online_bytes)
    shapes = field_shapes(plan, batch, *(("s",) if receiver == P2 else ("bits", "rho")))
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


# --- nothing that is drawn comes back ---


def twice(sample: Sample) -> Plan:
    """The op on two lines, with the same operands."""
    b = Builder(Level.PROTOCOL)
    names: list[str] = []
    for i, declared in enumerate(sample.args):
        if declared.kind == "masked":
            names.append(b.emit(Mask(), names[-1], name=f"mask{i}"))
        else:
            op = Input(f"x{i}", 0.0, 0.0) if declared.batched else Weight(f"w{i}")
            names.append(b.declare(op, declared, name=f"operand{i}"))
    lines = [b.emit(sample.op, *names, name=name) for name in ("one", "other")]
    result = b.emit(Reveal(), lines[0], name="y")
    return Plan("twice", tuple(b.nodes), result, Level.PROTOCOL, sample.op.suite or "fused").verify()


def draws(recorder: Recorder, rank: int, line: str) -> list[Tensor]:
    return [value.reshape(-1) for name, value in recorder.draws[rank] if name == line and value.numel()]


def alike_too_often(a: Tensor, b: Tensor) -> bool:
    """Whether two draws agree in more places than draws from the same range by chance."""
    both = torch.cat([a, b])
    chance = 1 / max(2, int(both.max()) - int(both.min()) + 1) if a.dtype == torch.uint8 else 2.0**-31
    often = len(a) * chance
    return int((a == b).sum()) > often + 6 * (often * (1 - chance)) ** 0.5 + 2


@pytest.mark.parametrize(**each(small(talking())))
def test_what_a_party_draws_comes_back_on_no_other_line_and_in_no_other_inference(sample: Sample) -> None:
    """Also what P2 draws for itself: a rho that comes back relates the signs of two inferences."""
    plan = twice(sample)
    first, second = record_several(plan, 67, constant(plan, 67, 5), 2)
    for rank in PARTIES:
        found = [draws(run, rank, line) for run in (first, second) for line in ("one", "other")]
        assert found[0] or rank == P2
        for ours, theirs in itertools.combinations(found[:3], 2):
            for a, b in zip(ours, theirs, strict=True):
                assert not alike_too_often(a, b), f"{ROLES[rank]} draws {len(a)} values again"
