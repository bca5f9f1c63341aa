"""A mask that P2 drew for a weight hides that weight alone, for one session: W - B and W' - B tell W - W'."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from harness import fixed_keys, samples
from scipy.stats import chisquare
from test_conditional_views import keys_but_for

from tacit.ir.build import Builder
from tacit.ir.cost import P0, P1, P2
from tacit.ir.op import Level, Sample
from tacit.ir.ops.roles import Input, Mask, Reveal, Weight
from tacit.ir.plan import Plan
from tacit.runtime.crew import Crew
from tacit.runtime.prf import fresh_keys
from tacit.runtime.session import Session

Tensor = torch.Tensor
ALPHA = 1e-6


def masked_samples() -> list[tuple[str, Sample]]:
    """Every product with a weight whose mask the session keeps."""
    return [(n, s) for n, s in samples(Level.PROTOCOL) if [t.kind for t in s.args] == ["secret", "secret", "masked"]]


def lines(b: Builder, sample: Sample, tag: str) -> str:
    """A product with a weight of its own."""
    x, w, _ = sample.args
    x_line = b.declare(Input(f"x{tag}", 0.0, 0.0), x, name=f"x{tag}")
    w_line = b.declare(Weight(f"w{tag}"), w, name=f"w{tag}")
    return b.emit(sample.op, x_line, w_line, b.emit(Mask(), w_line, name=f"m{tag}"), name=f"out{tag}")


def plan_with(chosen: list[Sample]) -> Plan:
    """Every product twice, with weights of one shape."""
    b = Builder(Level.PROTOCOL)
    made = [lines(b, sample, f"{i}{twin}") for i, sample in enumerate(chosen) for twin in "ab"]
    result = b.emit(Reveal(), made[0], name="y")
    return Plan("weights", tuple(b.nodes), result, Level.PROTOCOL, "fused").verify()


def weights_of(plan: Plan) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    nodes = [n for n in plan.nodes if isinstance(n.op, Weight)]
    return {n.op.label: torch.randint(-(2**15), 2**15, n.type.dims, generator=generator) for n in nodes}  # type: ignore[attr-defined]


def sessions(plan: Plan, weights: dict[str, Tensor]) -> Iterator[Session]:
    """Two that the same parties opened for the same weights."""
    for keys in (fixed_keys(3), fixed_keys(4)):
        session = Session(plan, weights, keys=keys)
        yield session
        session.close()


@pytest.mark.parametrize("bits", [64, 32])
def test_every_weight_of_every_session_has_a_mask_of_its_own(bits: int) -> None:
    chosen = [s for _, s in masked_samples() if s.args[0].ring == bits]
    assert {s.op.name for s in chosen} >= {"linear", "conv2d", "mul"}
    plan = plan_with(chosen)
    weights = weights_of(plan)
    opened: list[tuple[Tensor, Tensor]] = []  # the weight, and W - B as P0 and P1 know it
    masks: list[Tensor] = []
    for session in sessions(plan, weights):
        for node in plan.nodes:
            if isinstance(node.op, Mask):
                f, b = session._shared[P0][node.name], session._shared[P2][node.name]
                w = weights[node.args[0]].to(f.dtype)
                assert torch.equal(f, session._shared[P1][node.name]) and torch.equal(f + b, w)
                opened.append((w, f))
                masks.append(b)
    assert_uniform(masks, "masks")
    assert_uniform([f for _, f in opened], "what is opened")
    for (w, f), (v, g) in itertools.combinations(opened, 2):
        if w.shape == v.shape:
            assert not bool((f - g == w - v).any()), "the difference of two weights"


def assert_uniform(values: list[Tensor], what: str) -> None:
    """Word by word distinct, also within one mask, and uniform byte by byte."""
    flat = torch.cat([v.contiguous().reshape(-1) for v in values])
    assert len(flat) > 250 and len(torch.unique(flat)) == len(flat), f"{what}: a word occurs twice"
    counts = np.bincount(flat.numpy().view(np.uint8), minlength=256)
    assert chisquare(counts).pvalue > ALPHA, what


def test_the_mask_of_a_weight_does_not_come_back_as_that_of_an_input() -> None:
    """A serves one product, B one session: with A = B, or A twice, P0 and P1 would subtract what they opened."""
    plan = plan_with([s for _, s in masked_samples() if s.args[0].ring == 64])
    session = Session(plan, weights_of(plan), keys=fixed_keys(5))
    kept = [session._shared[P2][n.name] for n in plan.nodes if isinstance(n.op, Mask)]
    drawn = []
    for _ in range(2):
        material = session.deal(3).material
        products = [n.name for n in plan.nodes if n.name.startswith("out")]
        drawn += [material[P0][name][0]["a"] + material[P1][name][0]["a"] for name in products]
    session.close()
    words = torch.cat([v.contiguous().reshape(-1) for v in (*kept, *drawn)])
    assert len(torch.unique(words)) == len(words)


def test_the_textbook_suite_masks_a_weight_anew_in_every_inference() -> None:
    """It opens W - B each time: two openings alike would have one B, which then is no fresh triple."""
    for name, sample in samples(Level.PROTOCOL):
        if name.startswith("securenn.") and len(sample.args) == 2 and not sample.args[1].batched:
            b = Builder(Level.PROTOCOL)
            x = b.declare(Input("x", 0.0, 0.0), sample.args[0], name="x")
            w = b.declare(Weight("w"), sample.args[1], name="w")
            y = b.emit(Reveal(), b.emit(sample.op, x, w, name="out"), name="y")
            plan = Plan("textbook", tuple(b.nodes), y, Level.PROTOCOL, "securenn").verify()
            session = Session(plan, weights_of(plan), keys=fresh_keys())
            dealt = [session.deal(2).material for _ in range(3)]
            session.close()
            words = torch.cat([(m[P0]["out"][0]["b"] + m[P1]["out"][0]["b"]).reshape(-1) for m in dealt])
            assert len(torch.unique(words)) == len(words), name


def opening(plan: Plan, weights: dict[str, Tensor], receiver: int, seed: int) -> list[Tensor]:
    """What a party is sent while a session opens, all its keys as ever and the others' by the seed."""
    found: list[tuple[tuple[int, int], list[Tensor]]] = []
    plain = Session._open

    def recorded(self: Session, crew: Crew) -> object:
        self.network.transcript = found
        return plain(self, crew)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Session, "_open", recorded)
        Session(plan, weights, keys=keys_but_for(receiver, seed)).close()
    return [t.clone() for (_, target), message in found for t in message if target == receiver]


@pytest.mark.parametrize("bits", [64, 32])
@pytest.mark.parametrize("receiver", [P0, P1])
def test_what_is_sent_when_a_session_opens_is_uniform_given_all_that_its_receiver_holds(
    receiver: int, bits: int
) -> None:
    """P1's shares of the weights, and what P0 and P1 open: each differs, uniformly, with keys that it does not have."""
    plan = plan_with([s for _, s in masked_samples() if s.args[0].ring == bits])
    weights = {label: torch.full_like(w, 3) for label, w in weights_of(plan).items()}
    first, second = (opening(plan, weights, receiver, seed) for seed in (5, 6))
    assert len(first) == len(second) >= len(weights)
    assert_uniform([a - b for a, b in zip(first, second, strict=True)], "messages")
