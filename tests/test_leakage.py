"""What each party sees: uniform, and independent of what it must not learn. Known attacks are run."""

from __future__ import annotations

import itertools

import pytest
import torch
from harness import fixed_keys, params, samples, single
from scipy.stats import chisquare

from tacit.ir.cost import CLIENT, P0, P1, P2, ROLES
from tacit.ir.digits import Digits, prime_for
from tacit.ir.errors import ProtocolError
from tacit.ir.op import Level, Sample
from tacit.ir.ops.nonlinear import ReLU
from tacit.ir.plan import Plan
from tacit.ir.types import Batch, Type
from tacit.runtime import field, party
from tacit.runtime.prf import Stream, Streams
from tacit.runtime.session import Dealt, Session

Tensor = torch.Tensor
ALPHA = 1e-6


def uniform(values: Tensor, bound: int) -> bool:
    counts = torch.bincount(values.reshape(-1).long(), minlength=bound)
    return len(counts) == bound and bool(chisquare(counts).pvalue > ALPHA)


def as_bytes(message: Tensor) -> Tensor:
    return message.contiguous().view(-1).view(torch.uint8)


def constant_run(plan: Plan, batch: int, value: int, seed: int) -> tuple[Session, Dealt]:
    """One inference on inputs that are all `value`, every message recorded."""
    weights, inputs = {}, {}
    for node in plan.nodes:
        if node.op.name == "weight":
            weights[node.op.label] = torch.full(node.type.dims, value)  # type: ignore[attr-defined]
        elif node.op.name == "input":
            inputs[node.op.label] = torch.full(node.type.at(batch).dims, value)  # type: ignore[attr-defined]
    session = Session(plan, weights, keys=fixed_keys(seed))
    session.network.transcript = []
    dealt = session.deal(batch)
    session.infer(dealt, inputs)
    session.close()
    return session, dealt


def field_shapes(plan: Plan, batch: int, *kinds: str) -> dict[tuple[int, ...], tuple[int, int]]:
    """Wire shape of Z_p vectors -> (positions, p): blinded vectors (kind "s"), dealt digits ("bits"), bits ("rho")."""
    out: dict[tuple[int, ...], tuple[int, int]] = {}
    for requirement in plan.requirements(batch=batch):
        item = requirement.item
        if item.kind in kinds and item.element.name.startswith("Z_") and not item.element.name.startswith("Z_2^"):
            p = int(item.element.name.removeprefix("Z_"))
            out[field.packed_shape(item.shape[0], item.shape[1], p)[0]] = (item.shape[0], p)
    return out


def is_field(message: Tensor) -> bool:
    return message.dim() == 2 and message.dtype in (torch.uint8, torch.uint16)


@pytest.mark.parametrize(**params(Level.PROTOCOL))
def test_every_message_of_every_op_is_uniform(sample: Sample) -> None:
    """Whatever the inputs (here: all zero, or all at an extreme), each link carries uniform bytes or residues."""
    plan, batch = single(sample), 500
    for value in (0, -(2 ** (min(t.width for t in sample.args) - 2))):
        session, _ = constant_run(plan, batch, value, seed=11)
        by_target = {True: field_shapes(plan, batch, "s"), False: field_shapes(plan, batch, "bits", "rho")}
        links: dict[object, list[Tensor]] = {}
        for (source, target), tensors in session.network.transcript or []:
            shapes = by_target[target == P2]
            for tensor in tensors:
                if is_field(tensor) and tuple(tensor.shape) in shapes:
                    positions, p = shapes[tuple(tensor.shape)]
                    links.setdefault((source, target, p), []).append(field.unpack(tensor, positions, p).reshape(-1))
                else:
                    links.setdefault((source, target, 256), []).append(
                        as_bytes(tensor)[: tensor.nbytes // 8 * 8 or None]
                    )
        assert links
        for (source, target, bound), parts in links.items():  # type: ignore[misc]
            values = torch.cat(parts)
            if len(values) >= 20 * bound:
                assert uniform(values, bound), f"{ROLES[source]} -> {ROLES[target]}, modulo {bound}"


@pytest.mark.parametrize(**params(Level.PROTOCOL))
def test_no_party_opens_a_stream_twice(sample: Sample, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was drawn in dealing would else be drawn again online: two masks alike, and their difference is known."""
    opened: list[tuple[Streams, int, int, int]] = []
    plain = Streams.open

    def recorded(self: Streams, peer: int, batch: int, node: int) -> Stream:
        opened.append((self, peer, batch, node))  # a party has one `Streams`
        return plain(self, peer, batch, node)

    monkeypatch.setattr(Streams, "open", recorded)
    constant_run(single(sample), 2, 3, seed=1)
    assert opened
    assert len(set(opened)) == len(opened)


def recovered_by_p0(secret: int) -> bool:
    """ComputeMSB opens r = 2 a + x; if ShareConvert gave P0 a share that equals x, then r - x tells the input a."""
    plan, odd = single(dict(samples(Level.PROTOCOL))["securenn.relu-0"]), 2**64 - 1
    session, _ = constant_run(plan, 4, secret, seed=3)

    def words(source: int, target: int) -> list[tuple[int, ...]]:
        sent = [t for link, tensors in session.network.transcript or [] for t in tensors if link == (source, target)]
        return [tuple(v % 2**64 for v in t.flatten().tolist()) for t in sent if t.dtype == torch.int64]

    mine, theirs, dealt = words(P0, P1), words(P1, P0), words(P2, P0)
    guesses = ((a[0] + b[0] - x[0]) % odd for a in mine for b in theirs for x in dealt if len(a) == len(b) == len(x))
    return any(guess in (2 * secret % odd, 4 * secret % odd) for guess in guesses)


def test_a_stream_for_both_phases_would_give_p0_the_input(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not recovered_by_p0(123456789)
    monkeypatch.setattr(party, "_ONLINE", 0)
    assert recovered_by_p0(123456789)


@pytest.mark.parametrize(
    "name", ["relu-0", "relu-3", "max_pool2d-0", "argmax-2", "equal-0", "spline-0", "securenn.relu-0"]
)
def test_what_p2_can_combine_is_a_fair_bit_at_a_uniform_place(name: str) -> None:
    """P2 adds both vectors: at most one zero, with probability 1/2, anywhere; all else uniform on Z_p^*."""
    sample = dict(samples(Level.PROTOCOL))[name]
    plan, batch = single(sample), 800
    for value in (0, 5, -(2 ** (sample.args[0].width - 2))):
        session, _ = constant_run(plan, batch, value, seed=5)
        shapes = field_shapes(plan, batch, "s")
        vectors = {
            rank: [
                t
                for (source, target), tensors in session.network.transcript or []
                for t in tensors
                if (source, target) == (rank, P2) and is_field(t)
            ]
            for rank in (P0, P1)
        }
        assert vectors[P0] and len(vectors[P0]) == len(vectors[P1])
        for d0, d1 in zip(vectors[P0], vectors[P1], strict=True):
            positions, p = shapes[tuple(d0.shape)]
            total = (field.unpack(d0, positions, p).long() + field.unpack(d1, positions, p).long()) % p
            zero = total == 0
            assert int(zero.sum(0).max()) <= 1
            found = int(zero.any(0).sum())
            assert chisquare([found, zero.shape[1] - found]).pvalue > ALPHA
            assert chisquare(zero.sum(1)).pvalue > ALPHA
            assert uniform(total[total > 0] - 1, p - 1)


def test_the_bits_that_p2_sees_for_the_knots_of_a_spline_are_independent() -> None:
    """All knots are compared with the digits of one mask; with the same x, any two bits of P2 are four equal cases."""
    sample = dict(samples(Level.PROTOCOL))["spline-0"]
    plan, batch = single(sample), 2000
    for value in (0, 20000, -(2 ** (sample.args[0].width - 2))):
        session, _ = constant_run(plan, batch, value, seed=7)
        shapes = field_shapes(plan, batch, "s")
        sent: dict[int, list[Tensor]] = {P0: [], P1: []}
        for (source, target), tensors in session.network.transcript or []:
            if target == P2:
                sent[source] += tensors
        bits = []
        for d0, d1 in zip(sent[P0], sent[P1], strict=True):
            positions, p = shapes[tuple(d0.shape)]
            total = (field.unpack(d0, positions, p).long() + field.unpack(d1, positions, p).long()) % p
            bits.append((total == 0).any(0).long())
        assert len(bits) == len(sample.op.knots) > 2  # type: ignore[attr-defined]
        for a, b in itertools.combinations(bits, 2):
            assert uniform(2 * a + b, 4)


def test_p2_receives_nothing_but_blinded_vectors() -> None:
    """No opened value, and nothing from outside: only Z_p vectors, from P0 and P1."""
    for name, sample in samples(Level.PROTOCOL):
        if not name.startswith("securenn"):
            session, _ = constant_run(single(sample), 3, 1, seed=2)
            for (source, target), tensors in session.network.transcript or []:
                assert target != P2 or (source in (P0, P1) and all(map(is_field, tensors))), name


# --- the attack on PrivateCompare without refresh ---

WINDOW = 15
ATTACKED = Sample(ReLU(window=WINDOW), (Type("secret", (Batch(),), 0, WINDOW),))


def recovered(session: Session, dealt: Dealt, material: dict[str, Tensor]) -> list[int]:
    """P2's attack: it dealt both shares of the bits, so s d0 : s d1 tells c wherever s is all that hides d."""
    digits = Digits(WINDOW - 1)
    bits, positions, p = digits.bits, digits.positions, digits.p
    (d0,), (d1,) = (
        [
            t
            for (source, target), tensors in session.network.transcript or []
            for t in tensors
            if (source, target) == (rank, P2)
        ]
        for rank in (P0, P1)
    )
    v0, v1 = (field.unpack(d, positions, p).long() for d in (d0, d1))
    ones = torch.ones(positions, 1, dtype=torch.uint8)
    candidates = torch.arange(1 << bits)
    n, guesses = v0.shape[1], []
    for e in range(n):
        fits = []
        for beta in (0, 1):
            count = len(candidates)
            blank = torch.zeros(positions, count, dtype=torch.uint8)
            flip, still = torch.full((count,), beta, dtype=torch.uint8), torch.zeros(count, dtype=torch.uint8)
            shares = [material[f"bits{j}"][:, e : e + 1].expand(-1, count).contiguous() for j in (0, 1)]
            plain = [
                field.blind(
                    candidates, 0, digits, shares[j], ones.expand(-1, count).contiguous(), blank, flip, still, j
                ).long()
                for j in (0, 1)
            ]
            for shift in range(positions):
                seen0, seen1 = (torch.roll(v[:, e], -shift).unsqueeze(1) for v in (v0, v1))
                same = ((seen0 * plain[1] - seen1 * plain[0]) % p == 0).all(0)
                fits += candidates[same].tolist()
        guesses.append(fits[0] if len(set(fits)) == 1 else -1)
    return guesses


def attack(*, refresh: bool) -> tuple[list[int], list[int]]:
    """x recovered by P2, and the true x, over 20 elements."""
    plan, n = single(ATTACKED), 20
    truth = torch.arange(-n // 2, n // 2) * 37
    session = Session(plan, {}, keys=fixed_keys(3))
    dealt = session.deal(n)
    parts = [dealt.material[rank]["out"][0] for rank in (P0, P1)]
    known = {f"bits{j}": parts[j]["bits"].clone() for j in (0, 1)}
    r = (parts[0]["r"] + parts[1]["r"]).clone()
    if not refresh:
        for part in parts:  # the broken copy: what several published implementations do
            part["z"].zero_()
    session.network.transcript = []
    session.infer(dealt, {"x0": truth})
    session.close()
    low = recovered(session, dealt, known)
    mask = (1 << (WINDOW - 1)) - 1
    return [c - int(v) & mask if c >= 0 else -1 for c, v in zip(low, r & mask, strict=True)], [
        int(x) & mask for x in truth
    ]


def test_the_published_attack_breaks_a_copy_without_refresh() -> None:
    guessed, truth = attack(refresh=False)
    assert sum(g == t for g, t in zip(guessed, truth, strict=True)) >= 12  # the others fit several inputs


def test_the_published_attack_fails_against_ours() -> None:
    guessed, truth = attack(refresh=True)
    assert sum(g == t for g, t in zip(guessed, truth, strict=True)) <= 1


# --- fresh for every position and element; nothing twice ---


def relu_material(batch: int = 4000) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    session = Session(single(dict(samples(Level.PROTOCOL))["relu-0"]), {}, keys=fixed_keys(9))
    dealt = session.deal(batch)
    session.close()
    return dealt.material[P0]["out"][0], dealt.material[P1]["out"][0]


def test_blinding_is_fresh_for_every_position_and_element() -> None:
    ours, theirs = relu_material(200)
    positions = ours["s"].shape[0]
    p = prime_for(positions)
    for key in ("s", "z", "beta", "shift"):
        assert torch.equal(ours[key], theirs[key])
    assert uniform(ours["beta"], 2) and uniform(ours["shift"], positions)
    assert uniform(ours["s"] - 1, p - 1) and uniform(ours["z"], p)
    for key in ("s", "z"):
        assert len(torch.unique(ours[key], dim=1).T) == ours[key].shape[1], "two elements share their blinding"
        assert len(torch.unique(ours[key], dim=0)) == positions, "two positions share their blinding"


def test_p2_has_no_share_in_the_common_blinding() -> None:
    session = Session(single(dict(samples(Level.PROTOCOL))["relu-0"]), {}, keys=fixed_keys(9))
    dealt = session.deal(5)
    session.close()
    assert set(dealt.material[P2]["out"][0]) == {"flip"}


def test_no_mask_is_used_twice_within_or_across_inferences() -> None:
    plan = single(dict(samples(Level.PROTOCOL))["argmax-2"])
    session = Session(plan, {}, keys=fixed_keys(4))
    masks = []
    for _ in range(3):
        dealt = session.deal(50)
        masks += [
            part[key].reshape(-1)
            for part in dealt.material[P0]["out"]
            for key in part
            if key.endswith("r") or key.startswith("payload r")
        ]
    session.close()
    values = torch.cat(masks)
    assert len(values) > 1000 and len(torch.unique(values)) == len(values)


def test_material_is_consumed_before_it_is_used() -> None:
    """Also a run that fails half-way has used it up: a retry deals again."""
    plan = single(dict(samples(Level.PROTOCOL))["relu-0"])
    session = Session(plan, {})
    dealt = session.deal(4)
    session.infer(dealt, {"x0": torch.zeros(4, 37, dtype=torch.int64)})
    with pytest.raises(ProtocolError, match="used before"):
        session.infer(dealt, {"x0": torch.zeros(4, 37, dtype=torch.int64)})
    session.close()
    failing = Session(plan, {})
    dealt = failing.deal(4)
    with pytest.raises(RuntimeError):
        failing.infer(dealt, {"x0": torch.zeros(3, 37, dtype=torch.int64)})
    with pytest.raises(ProtocolError):
        failing.infer(dealt, {"x0": torch.zeros(4, 37, dtype=torch.int64)})
    failing.close()


def test_batches_and_nodes_draw_from_streams_of_their_own() -> None:
    plan = single(dict(samples(Level.PROTOCOL))["relu-0"])
    session = Session(plan, {}, keys=fixed_keys(6))
    first, second = session.deal(4), session.deal(4)
    session.close()
    assert first.batch_id != second.batch_id
    for a, b in itertools.product(
        *[
            [v for rank in (P0, P1) for v in d.material[rank]["out"][0].values() if v.dtype == torch.int64]
            for d in (first, second)
        ]
    ):
        assert not torch.equal(a, b)


def test_client_sees_refreshed_shares() -> None:
    """The client's two messages are uniform one by one and add up to the answer."""
    sample = dict(samples(Level.PROTOCOL))["reveal-0"]
    session, _ = constant_run(single(sample), 500, 7, seed=8)
    shares = [tensors[0] for (_, target), tensors in session.network.transcript or [] if target == CLIENT]
    assert len(shares) == 2 and bool((shares[0] + shares[1] == 7).all())
    assert all(uniform(as_bytes(share), 256) for share in shares)
