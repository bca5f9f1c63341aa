"""A plan layer by layer: what each PyTorch module costs, as rows that a data frame takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tacit.ir.plan import Node, NodeCost, Plan
from tacit.ir.types import RING_BITS, shape_text

# In Z_2^64, values leave two bits to differences and truncations; what lives in a smaller ring was found to fit it.
_ROOM = {RING_BITS: 2}


def layer_of(node: Node) -> str:
    """The module a line comes from; a line of no module (a function called in the outermost forward) is its own."""
    return node.path or f"%{node.name}"


def headroom(node: Node) -> int:
    """How often the value of a line could double before it left what the protocols take in its ring."""
    return max(0, node.type.ring - _ROOM.get(node.type.ring, 0) - node.type.width)


def layers(plan: Plan, *, batch: int = 1, seconds: Mapping[str, float] | None = None) -> list[dict[str, Any]]:
    """One row for each layer, in the order of execution; `pandas.DataFrame(plan.layers())` is a table.

    layer: the module, or %line where there is none. ops, lines: what it became. shape, frac_bits, width: of its last
    line. start, end: the first and last round in which it is active, 0 for none; rounds: how many its lines take.
    online_bytes, offline_bytes: of all parties for one inference of the batch; session_bytes: once per session.
    headroom: the fewest doublings left, within its ring, on any of its lines. seconds: only where given by line.
    """
    costs = {row.name: row for row in plan.cost(batch=batch).per_op}
    grouped: dict[str, list[Node]] = {}
    for node in plan.nodes:
        grouped.setdefault(layer_of(node), []).append(node)
    rows = [_row(layer, nodes, costs, seconds) for layer, nodes in grouped.items()]
    # A module's weights stand first in the plan: what counts is where it runs.
    order = {node.name: i for i, node in enumerate(plan.nodes)}
    places = {layer: max(order[n.name] for n in nodes) for layer, nodes in grouped.items()}
    return sorted(rows, key=lambda row: min(_online(grouped[row["layer"]], order), default=places[row["layer"]]))


def _online(nodes: list[Node], order: Mapping[str, int]) -> list[int]:
    return [order[node.name] for node in nodes if not node.op.session]


def _row(
    layer: str, nodes: list[Node], costs: Mapping[str, NodeCost], seconds: Mapping[str, float] | None
) -> dict[str, Any]:
    online = [node for node in nodes if not node.op.session]
    found = [costs[node.name] for node in online]
    active = [row for row in found if row.cost.rounds]
    last = (online or nodes)[-1].type
    row = {
        "layer": layer,
        "ops": ", ".join(dict.fromkeys(node.op.name for node in online or nodes)),
        "lines": len(nodes),
        "shape": shape_text(last.shape),
        "frac_bits": last.frac,
        "width": last.width,
        "start": min((r.start + 1 for r in active), default=0),
        "end": max((r.start + r.cost.rounds for r in active), default=0),
        "rounds": sum(r.cost.rounds for r in active),
        "online_bytes": sum(r.cost.online_bytes for r in found),
        "offline_bytes": sum(r.cost.offline_bytes for r in found),
        "session_bytes": sum(costs[node.name].total_bytes for node in nodes if node.op.session),
        "headroom": min((headroom(node) for node in nodes if node.type.kind == "secret"), default=RING_BITS),
    }
    if seconds is not None:
        row["seconds"] = sum(seconds.get(node.name, 0.0) for node in nodes)
    return row
