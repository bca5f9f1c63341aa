"""Two plans beside one another, layer by layer: what a protocol, a scale, a window or a change of the model costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tacit.ir.plan import Plan, PlanCost
from tacit.ir.predict import Prediction
from tacit.ir.view.layers import layers
from tacit.ir.view.page import size_text, time_text
from tacit.tables import aligned

FIGURES = ("rounds", "online_bytes", "offline_bytes", "session_bytes", "width", "seconds")


@dataclass(frozen=True)
class LayerChange:
    """One layer in both plans; a figure is None where the layer is missing, and seconds where no network was given."""

    layer: str
    ops: tuple[str, str]
    before: Mapping[str, float | None]
    after: Mapping[str, float | None]

    @property
    def changed(self) -> bool:
        return any(self.before[key] != self.after[key] for key in FIGURES if key != "seconds")


@dataclass(frozen=True)
class PlanChange:
    """All layers, and the totals of both plans for one inference of a batch."""

    names: tuple[str, str]
    batch: int
    network: str | None
    layers: tuple[LayerChange, ...]
    before: Mapping[str, float | None]
    after: Mapping[str, float | None]


def compare_plans(before: Plan, after: Plan, *, batch: int = 1, network: str | None = None) -> PlanChange:
    """Layers are matched by module; where there is none, by the op and its turn."""
    costs = [plan.cost(batch=batch, network=network) for plan in (before, after)]
    rows = [_rows(plan, cost) for plan, cost in zip((before, after), costs, strict=True)]
    names = [*rows[1], *(name for name in rows[0] if name not in rows[1])]
    changes = [
        LayerChange(
            name,
            (rows[0].get(name, {}).get("ops", ""), rows[1].get(name, {}).get("ops", "")),
            {key: rows[0].get(name, {}).get(key) for key in FIGURES},
            {key: rows[1].get(name, {}).get(key) for key in FIGURES},
        )
        for name in names
    ]
    labels = (_label(before), _label(after))
    return PlanChange(labels, batch, network, tuple(changes), _totals(costs[0]), _totals(costs[1]))


def _label(plan: Plan) -> str:
    return f"{plan.name} ({plan.protocol}, reveal {plan.reveal}, {plan.digest[:8]})"


def _rows(plan: Plan, cost: PlanCost) -> dict[str, dict[str, Any]]:
    """Layers by a name that both plans have in common."""
    turns: Counter[str] = Counter()
    out = {}
    for row in layers(plan, batch=cost.batch, seconds=cost.prediction.lines if cost.prediction else None):
        name = row["layer"]
        if name.startswith("%"):
            op = row["ops"].split(".")[-1]
            turns[op] += 1
            name = f"{op} {turns[op]}"
        out[name] = row
    return out


def _totals(cost: PlanCost) -> dict[str, float | None]:
    found: dict[str, float | None] = {key: getattr(cost, key) for key in FIGURES[:4]}
    return found | {"seconds": cost.prediction.total_s if cost.prediction else None}


def comparison_text(found: PlanChange) -> str:
    """The layers that differ, and the totals."""
    keys = [key for key in FIGURES if key != "seconds" or found.network]
    header = ["layer", *(_TITLES[key] for key in keys)]
    rows = [header]
    for change in found.layers:
        if change.changed:
            rows.append([change.layer, *(_cell(key, change.before[key], change.after[key]) for key in keys)])
    same = len(found.layers) - len(rows) + 1
    totals = [_cell(key, found.before.get(key), found.after.get(key)) for key in keys]
    rows.append(["total", *totals])
    where = f", {found.network}" if found.network else ""
    lines = [
        f"{found.names[0]} -> {found.names[1]}, batch {found.batch}{where}",
        *aligned(rows, numbers=range(1, len(header))),
    ]
    return "\n".join([*lines, f"{same} more layers cost the same" if same else "every layer differs"])


_TITLES = {
    "rounds": "rounds", "online_bytes": "online", "offline_bytes": "offline",
    "session_bytes": "session", "width": "bits", "seconds": "time",
}  # fmt: skip


def _cell(key: str, before: float | None, after: float | None) -> str:
    if before == after:
        return "" if not before else _text(key, before)
    return f"{_text(key, before)} -> {_text(key, after)}"


def _text(key: str, value: float | None) -> str:
    if value is None:
        return "-"
    if key == "seconds":
        return time_text(value)
    return size_text(int(value)) if key.endswith("bytes") and value else str(int(value))


def prediction_text(found: Prediction) -> str:
    """One line for `tacit cost --network`."""
    return (
        f"predicted {time_text(found.total_s)} on {found.network}: {time_text(found.online_s)} online, "
        f"{time_text(found.offline_s)} offline"
    )
