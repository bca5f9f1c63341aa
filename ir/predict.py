"""Time before anything runs: from rounds, bytes, and how fast this machine did a few known plans.

Work is described by a handful of features that every op has through the registry (randomness, messages, products); a
machine is a coefficient for each of them, fitted once. Networks are latency and rate: what the emulated links take.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tacit.ir.cost import CLIENT, OWNER, P0, P1, P2, RING, RING_BYTES, Cost, Link
from tacit.ir.errors import InputError
from tacit.ir.given import shown
from tacit.ir.ops.linear import Product
from tacit.ir.plan import Node, Plan
from tacit.ir.types import Type

Features = dict[str, float]


@dataclass(frozen=True)
class NetworkModel:
    """Round-trip time in seconds and rate in bytes a second, of every link in each direction."""

    name: str
    rtt_seconds: float
    bytes_per_second: float


LAN = NetworkModel("lan", 0.2e-3, 5e9 / 8)
WAN = NetworkModel("wan", 40e-3, 350e6 / 8)
VIRTUAL = NetworkModel("virtual", 0.0, math.inf)
_KNOWN = {model.name: model for model in (VIRTUAL, LAN, WAN)}
_TIMES = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
_RATES = {"kbit": 1e3 / 8, "mbit": 1e6 / 8, "gbit": 1e9 / 8}


def network_model(text: str) -> NetworkModel:
    """virtual, lan, wan, or as in rtt=40ms,rate=350Mbit; raises InputError."""
    if isinstance(text, str) and text in _KNOWN:
        return _KNOWN[text]
    form = r"rtt=(\d+(?:\.\d+)?)(us|ms|s),rate=(\d+(?:\.\d+)?)(kbit|mbit|gbit)"
    found = re.fullmatch(form, text.lower()) if isinstance(text, str) else None
    if not found or float(found[3]) == 0:
        raise InputError(f"network has to be {', '.join(_KNOWN)} or as in rtt=40ms,rate=350Mbit, not {shown(text)}")
    return NetworkModel(text, float(found[1]) * _TIMES[found[2]], float(found[3]) * _RATES[found[4]])


@dataclass(frozen=True)
class Pace:
    """Seconds for a unit of each feature, by phase.

    "phase" is a constant, "round" is for each round; "wake" is what each round, and each piece of dealt randomness,
    takes longer where links are emulated: parties are late in waking up.
    """

    offline: Mapping[str, float]
    online: Mapping[str, float]


@dataclass(frozen=True)
class Machine:
    """What this processor does with this version of Tacit: where parties take turns, and where they compete."""

    name: str
    turns: Pace
    threads: Pace


# Who knows the speed of this machine; the argument says whether it may be measured, where nobody has done so yet.
FINDERS: list[Callable[[bool], Machine | None]] = []


@dataclass(frozen=True)
class Prediction:
    """Seconds of one inference of a batch; `lines` splits them by line of the plan, work and network together."""

    network: str
    batch: int
    offline_s: float
    online_s: float
    lines: Mapping[str, float]

    @property
    def total_s(self) -> float:
        return self.offline_s + self.online_s


def predict(plan: Plan, machine: Machine, *, batch: int = 1, network: str = "virtual") -> Prediction:
    """Rounds take a latency each, bytes their time on the links, work what the machine takes for it."""
    model, latency = network_model(network), network_model(network).rtt_seconds / 2
    cost_of_all = plan.cost(batch=batch)
    costs = {row.name: row for row in cost_of_all.per_op}
    pace = machine.turns if cost_of_all.little else machine.threads
    lines: dict[str, float] = {}
    online = offline = sent = dealings = 0.0
    for node in plan.nodes:
        if node.op.session:
            continue
        work, dealt = work_of(plan, node, batch)
        cost = costs[node.name].cost
        computing, dealing = _time(pace.online, work), _time(pace.offline, dealt)
        wire = _wire_seconds(cost, model)
        offline += dealing
        dealings += dealt["items"]
        sent += max(cost.offline.values(), default=0) / model.bytes_per_second
        online += computing + wire
        lines[node.name] = computing + dealing + wire + cost.rounds * latency
    offline += pace.offline.get("phase", 0.0)
    online += pace.online.get("phase", 0.0) + plan.schedule.rounds * latency
    online += plan.schedule.rounds * pace.online.get("round", 0.0)
    if model is not VIRTUAL:
        online += plan.schedule.rounds * pace.online.get("wake", 0.0)
        offline += dealings * pace.offline.get("wake", 0.0)
    # Corrections flow one way while P2 goes on computing: the slower of both counts, and the last takes its latency.
    offline = max(offline, sent) + latency
    return Prediction(model.name, batch, offline, online, lines)


def _time(coefficients: Mapping[str, float], features: Features) -> float:
    return sum(coefficients.get(key, 0.0) * amount for key, amount in features.items())


def network_seconds(plan: Plan, *, batch: int = 1, network: str = "wan") -> float:
    """The network's part online: a latency for each round, and the bytes that follow one another over the rate."""
    model = network_model(network)
    wire = sum(_wire_seconds(row.cost, model) for row in plan.cost(batch=batch).per_op if not row.session)
    return plan.schedule.rounds * model.rtt_seconds / 2 + wire


def _wire_seconds(cost: Cost, model: NetworkModel) -> float:
    """P0 and P1 send at the same time, to each other and to P2; what P2 sends comes after."""
    pairs = (((P0, P1), (P1, P0)), ((P0, P2), (P1, P2)), ((P2, P0), (P2, P1)), ((P0, CLIENT), (P1, CLIENT)))
    both = sum(max(cost.online[a], cost.online[b]) for a, b in pairs)
    outside = sum(cost.online[link] for link in ((CLIENT, P0), (CLIENT, P1), (OWNER, P1)))
    return (both + outside) / model.bytes_per_second


def work_of(plan: Plan, node: Node, batch: int) -> tuple[Features, Features]:
    """The features of one line, online and offline."""
    args = tuple(t.at(batch) for t in plan.arg_types(node))
    cost, items = node.op.cost(*args), node.op.randomness(*args)
    elements = math.prod(node.type.at(batch).dims)
    ring = sum(item.count for item in items if item.element == RING)
    small = sum(item.count for item in items) - ring
    online = _products(node, args, elements)
    offline = online | {"ring": ring, "small": small, "items": len(items)}
    online["lines"] = 1.0
    if cost.rounds:
        online |= {"opened": _opened(cost.online), "small": small, "messages": cost.rounds, "items": len(items)}
    else:
        online["local"] = elements
    return online, offline


def _opened(traffic: Mapping[Link, int]) -> float:
    return sum(traffic.get(link, 0) for link in ((P0, P1), (P1, P0), (CLIENT, P1))) / RING_BYTES


def _products(node: Node, args: tuple[Type, ...], elements: int) -> Features:
    """Multiply-adds, elements of the second factor, and of the first as the product reads it (unfolded).

    Of a weight, all dimensions but the first are summed over.
    """
    if not isinstance(node.op, Product):
        return {}
    factor = args[1]
    depth = max(1.0, factor.numel / factor.dims[0])
    unfolded = elements * depth / factor.dims[0]
    return {"products": elements * depth, "weights": factor.numel, "unfolded": unfolded}


def totals(plan: Plan, batch: int) -> tuple[Features, Features]:
    """The features of a whole inference, online and offline."""
    online, offline = Counter[str](), Counter[str]()
    for node in plan.nodes:
        if not node.op.session:
            work, dealt = work_of(plan, node, batch)
            online.update(work)
            offline.update(dealt)
    online["phase"] = offline["phase"] = 1
    online["round"] = plan.schedule.rounds
    return dict(online), dict(offline)
