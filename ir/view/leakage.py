"""The leakage statement of a plan: who sees what, why that tells nothing, what is public, under which assumptions.

What each party is sent is read off the plan's own costs, which a test holds against the wire; the reasons are those
that the subprotocols state, and the suite measures (views are uniform, published attacks fail).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from tacit.ir.cost import CLIENT, OWNER, P0, P1, P2, ROLES
from tacit.ir.op import Level
from tacit.ir.ops.roles import Input, Weight
from tacit.ir.plan import Plan

PHASES = ("session", "offline", "online")


@dataclass(frozen=True)
class Received:
    """What one role is sent by another in one phase of one inference (or once per session), and by which ops."""

    phase: str
    source: str
    size: int
    ops: tuple[str, ...]


@dataclass(frozen=True)
class View:
    """One party or role: messages it is sent, sentences on what they are, and why it learns nothing more."""

    role: str
    received: tuple[Received, ...]
    sees: tuple[str, ...]
    because: tuple[str, ...]


@dataclass(frozen=True)
class Leakage:
    """The whole statement."""

    views: tuple[View, ...]
    disclosed: tuple[str, ...]
    assumptions: tuple[str, ...]


_ANSWERS = {
    "logits": "the logits of each of its inputs",
    "argmax": "the class of each of its inputs, and no logits",
    "correct": "how many inputs of its batch are of the class it expected, and nothing on any single one",
}


def leakage(plan: Plan) -> Leakage:
    """The statement for a plan of the protocol level."""
    if plan.level is not Level.PROTOCOL:
        raise ValueError("only a plan of the protocol level says who sees what")
    received = {rank: _received(plan, rank) for rank in range(len(ROLES))}
    compares = any(r.phase == "online" for r in received[P2])
    views = (
        *(_server(plan, rank, received[rank], compares) for rank in (P0, P1)),
        _dealer(plan, received[P2]),
        _client(plan, received[CLIENT]),
        View(
            ROLES[OWNER],
            tuple(received[OWNER]),
            ("Its own weights; it shares them once per session and then takes no part.",),
            ("No party sends it anything: it learns neither inputs nor answers.",),
        ),
    )
    return Leakage(views, _disclosed(plan), _assumptions(plan))


def _received(plan: Plan, rank: int) -> list[Received]:
    """By phase and sender, for a batch of 1."""
    sizes: Counter[tuple[str, int]] = Counter()
    ops: dict[tuple[str, int], dict[str, None]] = {}
    for row in plan.cost().per_op:
        for phase, traffic in (("online", row.cost.online), ("offline", row.cost.offline)):
            for (source, target), size in traffic.items():
                if target == rank and size:
                    key = ("session" if row.session else phase, source)
                    sizes[key] += size
                    ops.setdefault(key, {})[row.op] = None
    order = sorted(sizes, key=lambda key: (PHASES.index(key[0]), key[1]))
    return [Received(phase, ROLES[source], sizes[phase, source], tuple(ops[phase, source])) for phase, source in order]


def _server(plan: Plan, rank: int, received: list[Received], compares: bool) -> View:
    peer = ROLES[P1 if rank == P0 else P0]
    sees = [
        "One additive share of every weight, input and value in between, uniform in the ring of its line.",
        f"Values that it opens with {peer}: each is a secret plus a mask drawn by P2 for this value alone.",
    ]
    because = [
        "A single share is uniform and independent of the value; the other one stays with " + peer + ".",
        "A mask is uniform in the whole ring and used once, so the opened sum is uniform whatever the secret is.",
    ]
    if rank == P1:
        sees.append("Corrections from P2, which make dealt shares fit together.")
        because.append("A correction is a value minus a stream that only P0 and P2 have: again uniform.")
    if compares and plan.protocol == "fused":
        sees.append("From P2, the bits with which comparisons end.")
        because.append("Each of these bits is hidden by a random bit that P2 dealt and neither server knows.")
    elif compares:
        sees.append("From P2, fresh shares of what comparisons find.")
        because.append("P2 draws them anew: one of them alone is uniform.")
    return View(ROLES[rank], tuple(received), tuple(sees), tuple(because))


def _dealer(plan: Plan, received: list[Received]) -> View:
    sees = ["The masks and correlations that it draws itself, from streams that it shares with P0 and with P1."]
    because = [
        "It is never sent an input, a weight, an answer, or anything that P0 and P1 open to one another.",
    ]
    if not any(r.phase == "online" for r in received):
        because.append("This plan sends it no message while an inference runs: it deals, and that is all.")
    elif plan.protocol == "fused":
        sees.append(
            "Blinded comparison vectors: for each comparison, one zero or none at some place, the rest uniform."
        )
        because.append(
            "P0 and P1 refresh the shares that P2 dealt, multiply every entry by a fresh uniform factor, rotate "
            "by a fresh "
            "uniform shift and flip the question by a fresh fair bit: P2 learns one fair bit, independent of the value."
        )
    else:
        sees.append(
            "The messages of the comparisons of this suite (PrivateCompare, and share conversions in SecureNN)."
        )
        because.append(
            "Each is either uniform in its ring under a mask that P2 does not know, or a blinded, shuffled vector that "
            "says one fair bit (SecureNN, Wagh, Gupta and Chandran, PETS 2019)."
        )
    for view in dict.fromkeys(node.op.seen_by_dealer for node in plan.nodes if node.op.seen_by_dealer):
        sees.append(view[0])
        because.append(view[1])
    return View(ROLES[P2], tuple(received), tuple(sees), tuple(because))


def _client(plan: Plan, received: list[Received]) -> View:
    answer = _ANSWERS.get(plan.reveal, f"what reveal={plan.reveal} opens")
    return View(
        ROLES[CLIENT],
        tuple(received),
        (f"Its own inputs, and the answer: {answer}.", f"Shares of %{plan.result} from P0 and P1."),
        (
            "The shares are refreshed by a common random value before they are sent, so they say no more than "
            "their sum.",
        ),
    )


def _disclosed(plan: Plan) -> tuple[str, ...]:
    online = [node for node in plan.nodes if not node.op.session]
    scales = sorted({node.type.frac for node in plan.nodes if node.type.kind == "secret"})
    windows = [int(node.op.window) for node in online if getattr(node.op, "window", 0)]  # type: ignore[attr-defined]
    weights = [node for node in plan.nodes if isinstance(node.op, Weight)]
    inputs = [node.op for node in plan.nodes if isinstance(node.op, Input)]
    out = [
        f"The architecture: {len(online)} lines, which op each of them is, its attributes, and every shape.",
        f"The names of {len({n.path for n in plan.nodes if n.path})} modules and {len(weights)} weights as "
        f"PyTorch has them.",
        f"The scales: {', '.join(f'f{s}' for s in scales)} fractional bits.",
        "The width of every value in bits. Widths follow from the weights and the input's range: each tells the "
        "magnitude of one tensor to a power of two, and that much about the model.",
    ]
    if windows:
        out.append(
            f"The windows of {len(windows)} lines of comparisons, {min(windows)} to {max(windows)} bits: from the "
            f"same widths."
        )
    out += [f"The range of input {op.label}: {op.low:g} to {op.high:g}." for op in inputs]
    out += [
        f"What is opened (reveal={plan.reveal}), the protocol suite ({plan.protocol}), how ranges were found "
        f"({plan.ranges}).",
        "At run time: who asks when, the size of the batch, and how long it takes. Rounds and bytes follow from "
        "the plan "
        "and the batch alone, never from a value.",
    ]
    return tuple(out)


def _assumptions(plan: Plan) -> tuple[str, ...]:
    out = [
        "P0, P1 and P2 follow the protocol (semi-honest), and no two of them pool what they see. Nothing is "
        "claimed against "
        "a party that deviates.",
        "The client and the owner may each be the same organisation as P0 or as P1; neither as P2.",
        "P0 and P1 talk over a link that P2 cannot read, and every link is encrypted (TLS 1.3 between hosts).",
        "AES in counter mode is a pseudorandom function; its keys come from the operating system of each host.",
        "What an answer itself tells is not hidden from the client: who may ask often enough can imitate a model.",
        "Dealt randomness is used once. Sessions and ledgers see to that, also after a crash; restoring a backup "
        "breaks it.",
    ]
    if plan.ranges != "proved":
        out.append(
            f"Ranges are {plan.ranges}: an input beyond what calibration covered may give a wrong answer (not a "
            f"leak to "
            "another party; the client may see an answer that is no answer of the model)."
        )
    return tuple(out)
