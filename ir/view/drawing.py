"""The graph of a plan as SVG: left to right in the order of execution, modules as frames."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

from tacit.ir.ops.roles import Input, Reveal
from tacit.ir.plan import Node, NodeCost, Plan

_W, _H, _GAP_X, _GAP_Y, _PAD = 148, 46, 34, 30, 11
_MOST_FRAMES = 3  # modules are nested no deeper than this


@dataclass(frozen=True)
class Place:
    """The column and the lane of a node."""

    column: int
    lane: int


def svg(plan: Plan) -> str:
    """The lines of one inference; weights and masks, which belong to the session, are left out."""
    nodes = [node for node in plan.nodes if not node.op.session]
    costs = {row.name: row for row in plan.cost().per_op}
    places = _places(nodes)
    depth = max((len(_modules(node)) for node in nodes), default=0)
    top = 24 + depth * (_PAD + 8)
    width = (max(p.column for p in places.values()) + 1) * (_W + _GAP_X) + 2 * 30
    height = top + (max(p.lane for p in places.values()) + 1) * (_H + _GAP_Y) + depth * _PAD + 10
    parts = [
        f'<svg id="graph" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" role="group" aria-label="Graph of plan {escape(plan.name)}">'
    ]
    parts += _frames(nodes, places, top, depth)
    shown = {node.name for node in nodes}
    for node in nodes:
        for arg in dict.fromkeys(a for a in node.args if a in shown):
            parts.append(_edge(places[arg], places[node.name], top))
    parts += [_box(node, costs[node.name], places[node.name], top) for node in nodes]
    return "".join([*parts, "</svg>"])


def _places(nodes: list[Node]) -> dict[str, Place]:
    """Columns by longest path; a node takes the lane of its first operand where that is free."""
    places: dict[str, Place] = {}
    taken: set[tuple[int, int]] = set()
    for node in nodes:
        before = [places[arg] for arg in node.args if arg in places]
        column = max((p.column + 1 for p in before), default=0)
        lane = min((p.lane for p in before), default=0)
        while (column, lane) in taken:
            lane += 1
        taken.add((column, lane))
        places[node.name] = Place(column, lane)
    return places


def _corner(place: Place, top: int) -> tuple[int, int]:
    return 30 + place.column * (_W + _GAP_X), top + place.lane * (_H + _GAP_Y)


def _modules(node: Node) -> list[str]:
    """The modules around the one a line comes from, outermost first."""
    parts = node.path.split(".")[:-1][:_MOST_FRAMES] if node.path else []
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _frames(nodes: list[Node], places: dict[str, Place], top: int, depth: int) -> list[str]:
    members: dict[str, list[Place]] = {}
    for node in nodes:
        for module in _modules(node):
            members.setdefault(module, []).append(places[node.name])
    out = []
    for module, inside in sorted(members.items(), key=lambda item: item[0].count(".")):
        level = module.count(".")
        pad = _PAD * max(1, depth - level) - 4
        left, _ = _corner(Place(min(p.column for p in inside), 0), top)
        right, _ = _corner(Place(max(p.column for p in inside), 0), top)
        _, first = _corner(Place(0, min(p.lane for p in inside)), top)
        _, last = _corner(Place(0, max(p.lane for p in inside)), top)
        y, rise = first - (_PAD + 8) * (depth - level), (_PAD + 8) * (depth - level)
        out.append(
            f'<rect class="frame f{level % 2}" x="{left - pad}" y="{y}" width="{right - left + _W + 2 * pad}" '
            f'height="{last - first + _H + rise + pad}" rx="8"/>'
            f'<text class="module" x="{left - pad + 8}" y="{y + 13}">{escape(module)}</text>'
        )
    return out


def _edge(source: Place, target: Place, top: int) -> str:
    (x0, y0), (x1, y1) = _corner(source, top), _corner(target, top)
    x0, y0, y1 = x0 + _W, y0 + _H // 2, y1 + _H // 2
    half = _GAP_X // 2
    if source.lane != target.lane:  # along the lane of the one that lies lower, then across the gap between columns
        a, b = (x1 - _GAP_X, x1) if source.lane > target.lane else (x0, x0 + _GAP_X)
        return f'<path class="edge" d="M{x0} {y0}H{a}C{a + half} {y0} {b - half} {y1} {b} {y1}H{x1}"/>'
    if target.column - source.column == 1:
        return f'<path class="edge" d="M{x0} {y0}H{x1}"/>'
    under = _H // 2 + 16  # around what lies between
    return f'<path class="edge" d="M{x0} {y0}C{x0 + 24} {y0 + under} {x0 + 24} {y0 + under} {x0 + 44} {y0 + under}' + (
        f'H{x1 - 44}C{x1 - 24} {y1 + under} {x1 - 24} {y1 + under} {x1} {y1}"/>'
    )


def kind_of(node: Node, rounds: int) -> str:
    """io, local, talk (a round or two) or compare (several): the colour of an op."""
    if isinstance(node.op, (Input, Reveal)):
        return "io"
    return "local" if not rounds else "talk" if rounds <= 2 else "compare"


def _box(node: Node, row: NodeCost, place: Place, top: int) -> str:
    x, y = _corner(place, top)
    told = f"%{node.name} = {node.op.name} : {node.type}" + (f" @{node.path}" if node.path else "")
    told += f"; rounds {row.cost.rounds}, {row.cost.online_bytes:,} B online, {row.cost.offline_bytes:,} B offline"
    shape = "x".join(str(d) for d in node.type.shape)
    return (
        f'<a href="#l-{escape(node.name)}" aria-label="{escape(told)}"><title>{escape(told)}</title>'
        f'<rect class="box {kind_of(node, row.cost.rounds)}" x="{x}" y="{y}" width="{_W}" height="{_H}" rx="6"/>'
        f'<text class="op" x="{x + 10}" y="{y + 19}">{escape(_short(node.op.name, 17))}</text>'
        f'<text class="sub" x="{x + 10}" y="{y + 36}">%{escape(_short(node.name, 6))} '
        f"{escape(_short(shape, 15))}</text>"
        "</a>"
    )


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "\u2026"
