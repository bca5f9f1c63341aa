"""The leakage statement of a plan: who sees what, why that tells nothing, what is public, under which assumptions.

What each party is sent is read off the plan's own costs, which a test holds against the wire. What that is, and why it
tells nothing, the subprotocols of each op state (`Subprotocol.seen`); a test holds that none is sent a byte of which
nothing is said. The suite measures the rest: views are uniform, published attacks fail.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from tacit.ir.cost import CLIENT, OWNER, P0, P1, P2, ROLES, Link, Randomness
from tacit.ir.op import Level
from tacit.ir.ops.roles import Input, Reveal, Weight
from tacit.ir.plan import Node, Plan
from tacit.ir.seen import Seen

PHASES = ("session", "offline", "online")
NETWORK = "network"


@dataclass(frozen=True)
class Received:
    """What one role is sent by another in one phase of one inference (or once per session), and by which ops."""

    phase: str
    source: str
    size: int
    ops: tuple[str, ...]


@dataclass(frozen=True)
class Statement:
    """Something that a role sees, why it tells nothing more, and the ops that cause it (none: every plan has it)."""

    what: str
    why: str
    ops: tuple[str, ...] = ()


@dataclass(frozen=True)
class View:
    """One party or role, or whoever watches the links: messages, and what they are."""

    role: str
    received: tuple[Received, ...]
    statements: tuple[Statement, ...]


@dataclass(frozen=True)
class Leakage:
    """The whole statement."""

    views: tuple[View, ...]
    disclosed: tuple[str, ...]
    assumptions: tuple[str, ...]


def leakage(plan: Plan) -> Leakage:
    """The statement for a plan of the protocol level."""
    if plan.level is not Level.PROTOCOL:
        raise ValueError("only a plan of the protocol level says who sees what")
    caused: dict[tuple[int, Seen], dict[str, None]] = {}
    for node in plan.nodes:
        for rank, statements in node.op.seen(*(t.at(1) for t in plan.arg_types(node))).items():
            for seen in statements:
                caused.setdefault((rank, seen), {})[node.op.name] = None
    messages = _messages(plan)
    received = {rank: tuple(_received(messages, rank)) for rank in range(len(ROLES))}
    own = {P0: _server, P1: _server, P2: _dealer, CLIENT: _client, OWNER: _owner}
    views = [
        View(
            role,
            received[rank],
            (
                *own[rank](plan, rank, received[rank]),
                *(Statement(seen.what, seen.why, tuple(ops)) for (to, seen), ops in caused.items() if to == rank),
            ),
        )
        for rank, role in enumerate(ROLES)
    ]
    return Leakage((*views, _network(plan, messages)), _disclosed(plan), _assumptions(plan))


_Messages = list[tuple[str, Link, int, tuple[str, ...]]]


def _messages(plan: Plan) -> _Messages:
    """Phase, link, bytes for a batch of 1, and the ops that send them; by phase and link."""
    sizes: Counter[tuple[str, Link]] = Counter()
    ops: dict[tuple[str, Link], dict[str, None]] = {}
    for row in plan.cost().per_op:
        for phase, traffic in (("online", row.cost.online), ("offline", row.cost.offline)):
            for link, size in traffic.items():
                if size:
                    key = ("session" if row.session else phase, link)
                    sizes[key] += size
                    ops.setdefault(key, {})[row.op] = None
    order = sorted(sizes, key=lambda key: (PHASES.index(key[0]), key[1]))
    return [(phase, link, sizes[phase, link], tuple(ops[phase, link])) for phase, link in order]


def _received(messages: _Messages, rank: int) -> Iterator[Received]:
    for phase, (source, target), size, ops in messages:
        if target == rank:
            yield Received(phase, ROLES[source], size, ops)


def _server(plan: Plan, rank: int, received: tuple[Received, ...]) -> tuple[Statement, ...]:
    peer = ROLES[P1 if rank == P0 else P0]
    return (
        Statement(
            "One additive share of every weight, input and value in between, uniform in the ring of its line.",
            f"A single share is uniform and independent of the value; the other one stays with {peer}.",
        ),
    )


def _dealer(plan: Plan, rank: int, received: tuple[Received, ...]) -> tuple[Statement, ...]:
    drawing = [node for node in plan.nodes if any(P2 in item.holders for item in _randomness(plan, node))]
    if not drawing:
        return (Statement("Nothing: this plan needs no dealt randomness.", "It is sent nothing, and sends nothing."),)
    why = (
        "They are random, and nobody sends it an input, a weight or an answer, nor what P0 and P1 open to one another."
    )
    if not any(r.phase == "online" for r in received):
        why += " This plan sends it no message while an inference runs: it deals, and that is all."
    ops = tuple(dict.fromkeys(node.op.name for node in drawing))
    return (
        Statement(
            "The masks and correlations that it draws itself, from streams that it shares with P0 and with P1.",
            why,
            ops,
        ),
    )


def _randomness(plan: Plan, node: Node) -> tuple[Randomness, ...]:
    return node.op.randomness(*(t.at(1) for t in plan.arg_types(node)))


def _client(plan: Plan, rank: int, received: tuple[Received, ...]) -> tuple[Statement, ...]:
    labels = [node.op.label for node in plan.nodes if isinstance(node.op, Input) and node.op.owner == ROLES[CLIENT]]
    answers = [plan.node(node.args[0]) for node in plan.nodes if isinstance(node.op, Reveal)]
    return (
        Statement(f"Its own inputs ({', '.join(labels)}).", "It knows them.", (Input.name,)),
        *(
            Statement(
                f"The answer, %{node.name}: {node.op.answer}.",
                "That is what this plan is for; it was agreed upon as "
                f"reveal={plan.reveal}, and nobody else learns it.",
                (node.op.name, Reveal.name),
            )
            for node in answers
        ),
    )


def _owner(plan: Plan, rank: int, received: tuple[Received, ...]) -> tuple[Statement, ...]:
    why = "It shares them once per session and then takes no part"
    told = "." if received else ". No party sends it anything: it learns neither inputs nor answers."
    return (Statement("Its own weights.", why + told, (Weight.name,)),)


def _network(plan: Plan, messages: _Messages) -> View:
    """Whoever watches all links between separate hosts."""
    return View(
        NETWORK,
        tuple(Received(phase, f"{ROLES[a]} to {ROLES[b]}", size, ops) for phase, (a, b), size, ops in messages),
        (
            Statement(
                "Who talks to whom and when, and the number and size of messages, all encrypted (TLS 1.3).",
                f"{plan.schedule.rounds} rounds and their bytes follow from the plan and the batch alone, never from a "
                "value: they tell that an inference runs, of which plan, and of how many inputs.",
            ),
        ),
    )


def _disclosed(plan: Plan) -> tuple[str, ...]:
    online = [node for node in plan.nodes if not node.op.session]
    scales = sorted({node.type.frac for node in plan.nodes if node.type.kind == "secret"})
    windows = [int(node.op.window) for node in online if getattr(node.op, "window", 0)]  # type: ignore[attr-defined]
    weights = [node for node in plan.nodes if isinstance(node.op, Weight)]
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
    if measured := [node for node in plan.nodes if node.margin]:
        out.append(
            f"Which {len(measured)} widths were measured rather than proved, and with which margin: those tell the "
            "magnitude of what the inputs showed on which they were measured."
        )
    out += dict.fromkeys(node.op.discloses() for node in plan.nodes if node.op.discloses())
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
    if margins := sorted({node.margin for node in plan.nodes if node.margin}):
        lines = "; ".join(
            f"{margin} times as large for {', '.join(f'%{n.name}' for n in plan.nodes if n.margin == margin)}"
            for margin in margins
        )
        out.append(
            "Some ranges are measured: an input on which values leave them may get a wrong answer (not a leak to "
            "another party; the client may see an answer that is no answer of the model). They have room for values so "
            f"many times as large as those that were seen: {lines}."
        )
    return tuple(out)
