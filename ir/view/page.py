"""The report of a plan: one page of HTML that needs no network, no server and nothing but a browser.

Everything on it is derived from the plan, which is public; what a name in a plan may hold is escaped.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files

from tacit.ir.cost import P0, P1, P2
from tacit.ir.op import Op
from tacit.ir.plan import Plan, PlanCost
from tacit.ir.predict import Prediction
from tacit.ir.types import RING_BITS
from tacit.ir.view.drawing import svg
from tacit.ir.view.layers import headroom, layer_of, layers
from tacit.ir.view.leakage import NETWORK, View, leakage

# No address is ever fetched: the page says so itself, and the browser enforces it.
_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
)
_SECTIONS = (
    ("leakage", "Who sees what"),
    ("accuracy", "Accuracy"),
    ("graph-section", "Graph"),
    ("layers", "Layers"),
    ("plan", "Plan"),
    ("randomness", "Randomness"),
    ("ranges", "Ranges"),
    ("ops", "Ops"),
)
_LINE = re.compile(
    r"^  %(?P<name>\w+)(?P<gap>\s*: )(?P<type>[^=]*)(?P<equals>= )(?P<op>[\w.]+)(?P<rest>[^#]*)(?P<figures>#.*)?$"
)


def page(
    plan: Plan,
    *,
    batch: int = 1,
    prediction: Prediction | None = None,
    measured: Mapping[str, float] | None = None,
    accuracy: Sequence[tuple[str, str]] = (),
) -> str:
    """The whole page, for a plan of the protocol level.

    prediction: seconds by line (see `ir.predict`). measured: seconds of a real run, under the names "offline" and
    "online", shown beside the prediction. accuracy: what was found on a data set, and of what.
    """
    cost = plan.cost(batch=batch)
    body = [
        _top(plan, cost, prediction, measured, bool(accuracy)),
        "<main id='main'>",
        _leakage(plan),
        _accuracy(accuracy),
        _graph(plan),
        _layers(plan, batch, prediction),
        _text(plan),
        _randomness(plan, batch),
        _ranges(plan),
        _ops(plan),
        f"<footer>Plan {escape(plan.name)}, SHA-256 <span class=mono>{plan.digest}</span>. All figures are "
        f"derived from "
        f"the plan for a batch of {batch}; times are predictions unless they say otherwise.</footer></main>",
        "<div id=tip role=tooltip hidden></div>",
    ]
    return (
        "<!DOCTYPE html><html lang=en><head><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width, initial-scale=1'>"
        f'<meta http-equiv=Content-Security-Policy content="{_POLICY}">'
        f"<title>{escape(plan.name)}: secure inference plan</title><style>{_file('page.css')}</style></head>"
        f"<body><a class=skip href='#main'>Skip to the report</a>{''.join(body)}<script>"
        f"{_file('page.js')}</script></body></html>"
    )


def framed(html: str) -> str:
    """The page inside a notebook: in a frame of its own, so that neither's styles reach the other."""
    return (
        f'<iframe srcdoc="{escape(html)}" sandbox="allow-scripts" title="Report of a plan" '
        'style="width:100%;height:760px;border:1px solid #8884;border-radius:8px"></iframe>'
    )


def _file(name: str) -> str:
    return files("tacit.ir.view").joinpath(name).read_text(encoding="utf-8")


def _section(key: str, intro: str, content: str) -> str:
    return (
        f"<section id={key} aria-labelledby={key}-h><h2 id={key}-h>{dict(_SECTIONS)[key]}</h2>"
        f"{intro}{content}</section>"
    )


def _top(
    plan: Plan,
    cost: PlanCost,
    prediction: Prediction | None,
    measured: Mapping[str, float] | None,
    accuracy: bool,
) -> str:
    tags = (
        f"reveals {plan.reveal}",
        f"{plan.protocol} protocol",
        f"ranges {plan.ranges}",
        "three parties, semi-honest",
    )
    tiles = [
        (str(cost.rounds), "rounds"),
        (size_text(cost.online_bytes), f"online, batch {cost.batch}"),
        (size_text(cost.offline_bytes), f"offline, batch {cost.batch}"),
        (size_text(cost.session_bytes), "once per session"),
    ]
    if prediction is not None:
        where = "" if prediction.network == "virtual" else f" on {prediction.network}"
        tiles.append((time_text(prediction.total_s), f"predicted{where}: {time_text(prediction.online_s)} online"))
    if measured is not None:
        tiles.append((time_text(sum(measured.values())), f"measured: {time_text(measured['online'])} online"))
    return (
        f"<header class=top><h1>{escape(plan.name)}</h1><div>"
        f"{''.join(f'<span class=tag>{escape(t)}</span>' for t in tags)}</div>"
        f"<div class=tiles>"
        f"{''.join(f'<div class=tile><b>{escape(a)}</b><span>{escape(b)}</span></div>' for a, b in tiles)}</div>"
        "</header><nav aria-label=Sections><ul>"
        + "".join(f"<li><a href='#{key}'>{title}</a></li>" for key, title in _SECTIONS if accuracy or key != "accuracy")
        + "</ul></nav>"
    )


def _accuracy(found: Sequence[tuple[str, str]]) -> str:
    if not found:
        return ""
    rows = [f"<tr><td>{escape(what)}</td><td>{escape(value)}</td></tr>" for what, value in found]
    intro = "<p class=soft>On a data set, in the clear, beside the float model.</p>"
    return _section("accuracy", intro, _table("<th>what</th><th>found</th>", rows, "Accuracy"))


# --- who sees what ---


_ROLES = {
    "P0": "server, holds one share",
    "P1": "server, holds the other share",
    "P2": "dealer and helper",
    "client": "brings inputs, learns the answer",
    "owner": "brings the weights",
    "network": "whoever watches the links between hosts",
}


def _leakage(plan: Plan) -> str:
    found = leakage(plan)
    claim = (
        "<p class=claim>No party learns an input, a weight or a value in between; the client alone learns the answer. "
        "Below: what each of them sees, why that tells nothing more, which ops cause it, what the plan itself makes "
        "public, and what has to hold.</p>"
    )
    cards = "".join(_view(view) for view in found.views)
    lists = "".join(
        f"<div class=card><h3>{title}</h3><ul>{_items(items)}</ul></div>"
        for title, items in (("What the plan itself discloses", found.disclosed), ("Assumptions", found.assumptions))
    )
    return _section("leakage", claim, f"<div class=views>{cards}</div><div class=two>{lists}</div>")


def _view(view: View) -> str:
    rows = "".join(
        f"<tr><td>{r.phase}</td><td>{r.source}</td><td class=n>{size_text(r.size)}</td>"
        f"<td class=mono>{escape(', '.join(r.ops))}</td></tr>"
        for r in view.received
    )
    table = (
        f"<details><summary>Messages {'that pass' if view.role == NETWORK else 'it is sent'}, at a batch of 1"
        f"</summary><table><thead><tr><th>phase</th><th>from</th>"
        f"<th class=n>size</th><th>by</th></tr></thead><tbody>{rows}</tbody></table></details>"
        if rows
        else "<p class=soft>It is sent no message.</p>"
    )
    statements = "".join(
        f"<li>{escape(s.what)}<p class=why>{escape(s.why)}</p>"
        + (f"<p class=by>{escape(', '.join(s.ops))}</p>" if s.ops else "")
        + "</li>"
        for s in view.statements
    )
    return (
        f"<div class=card><h3>{view.role} <span>{_ROLES[view.role]}</span></h3><ul class=sees>{statements}</ul>"
        f"{table}</div>"
    )


def _items(lines: Iterable[str]) -> str:
    return "".join(f"<li>{escape(line)}</li>" for line in lines)


# --- graph, layers ---


def _graph(plan: Plan) -> str:
    buttons = (
        ("out", "&minus;", "Zoom out"),
        ("in", "+", "Zoom in"),
        ("fit", "Fit", "Fit"),
        ("full", "100%", "Full size"),
    )
    tools = "".join(
        f"<button type=button data-zoom={key} aria-label='{told}'>{sign}</button>" for key, sign, told in buttons
    )
    key = (
        "<span class='key soft'><i style='background:var(--local-bg);border:1px solid var(--soft)'></i>local"
        "<i style='background:var(--talk)'></i>one or two rounds<i style='background:var(--compare)'></i>comparisons"
        "<i style='background:var(--edge)'></i>input, answer</span>"
    )
    return _section(
        "graph-section",
        "",
        f"<div class=tools>{tools}<span id=scale class=soft></span>{key}</div>"
        f"<div id=stage tabindex=0 role=group aria-label='Graph; plus and minus zoom, 0 fits, arrows scroll'>"
        f"{svg(plan)}</div>"
        "<small>Boxes lead to their line of the plan. Frames are PyTorch modules. Weights and their masks are "
        "left out.</small>",
    )


def _layers(plan: Plan, batch: int, prediction: Prediction | None) -> str:
    rows = layers(plan, batch=batch, seconds=prediction.lines if prediction else None)
    rows = [row for row in rows if row["rounds"] or row["online_bytes"] or row["offline_bytes"] or row["session_bytes"]]
    most_rounds = max((row["rounds"] for row in rows), default=1) or 1
    most_bytes = max((row["online_bytes"] + row["offline_bytes"] for row in rows), default=1) or 1
    longest = max((row.get("seconds", 0.0) for row in rows), default=0.0) or 1.0
    out = []
    for row in rows:
        span = (
            ""
            if not row["rounds"]
            else f"{row['start']}" + (f"\u2013{row['end']}" if row["end"] > row["start"] else "")
        )
        sent = row["online_bytes"] + row["offline_bytes"]
        cells = [
            f"<td class='name mono'>{_broken(row['layer'])}</td><td class=mono>{escape(row['ops'])}</td>"
            f"<td class=n>{escape(span)}</td>",
            _bar([("rounds", row["rounds"] / most_rounds)], str(row["rounds"]) if row["rounds"] else ""),
            _bar(
                [("on", row["online_bytes"] / most_bytes), ("off", row["offline_bytes"] / most_bytes)],
                size_text(sent) if sent else "",
            ),
        ]
        if prediction is not None:
            seconds = row["seconds"]
            cells.append(_bar([("time", seconds / longest)], time_text(seconds) if seconds > 0.5e-6 else ""))
        out.append(
            f"<tr>{''.join(cells)}<td class=n>"
            f"{size_text(row['session_bytes']) if row['session_bytes'] else ''}</td></tr>"
        )
    time = "<th>time, predicted</th>" if prediction is not None else ""
    intro = (
        "<p class='key soft'>Of all parties together. Bytes:<i style='background:var(--on)'></i>online"
        "<i style='background:var(--off)'></i>offline. Independent layers may share rounds.</p>"
    )
    head = (
        f"<th>layer</th><th>ops</th><th class=n>in round</th><th>rounds</th><th>bytes</th>{time}<th class=n>"
        f"per session</th>"
    )
    return _section("layers", intro, _table(head, out, "Cost by layer"))


def _bar(parts: list[tuple[str, float]], told: str) -> str:
    bars = "".join(f"<i class={key} style='width:{max(1, round(90 * part))}px'></i>" for key, part in parts if part > 0)
    return f"<td><div class=bar>{bars}<span>{escape(told)}</span></div></td>"


def _broken(path: str) -> str:
    """The path of a module, which may go on in a new line after each of its dots."""
    return escape(path).replace(".", ".<wbr>")


def _table(head: str, rows: list[str], label: str) -> str:
    return (
        f"<div class=scroll tabindex=0 role=region aria-label='{label}'><table><thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


# --- plan, randomness, ranges, ops ---


def _text(plan: Plan) -> str:
    lines = "".join(_plan_line(line) for line in str(plan).rstrip("\n").split("\n"))
    intro = (
        "<p class=soft>Rest on an op, or move to it with the Tab key, for what it does. Everything right of # "
        "is derived.</p>"
    )
    return _section(
        "plan", intro, f"<div class='plan mono' tabindex=0 role=region aria-label='Text of the plan'>{lines}</div>"
    )


def _plan_line(line: str) -> str:
    found = _LINE.match(line)
    if not found:
        return f"<div>{escape(line)}</div>"
    rest = re.sub(r"%\w+", lambda m: f"<span class=v>{m[0]}</span>", escape(found["rest"]))
    rest = re.sub(r"@\S+", lambda m: f"<span class=p>{m[0]}</span>", rest)
    op = escape(found["op"])
    return (
        f"<div id='l-{found['name']}'>  <span class=v>%{found['name']}</span>{found['gap']}<span class=t>"
        f"{escape(found['type'])}"
        f"</span>{found['equals']}<button type=button data-op='{op}'>{op}</button>{rest}"
        f"<span class=c>{escape(found['figures'] or '')}</span></div>"
    )


def _randomness(plan: Plan, batch: int) -> str:
    grouped: dict[tuple[str, str, str], list[int]] = {}
    for need in plan.requirements(batch=batch):
        sums = grouped.setdefault((need.kind, need.item.element.name, need.item.source), [0, 0, 0, 0, 0])
        sent = sum(need.item.offline.values())
        for i, value in enumerate((need.count, *(need.item.bytes_of(p) for p in (P0, P1, P2)), sent)):
            sums[i] += value
    rows = [
        f"<tr><td class=name>{escape(kind)}</td><td>{escape(element)}</td><td>"
        f"{_SOURCES.get(source, escape(source))}</td>"
        f"<td class=n>{sums[0]:,}</td>{''.join(f'<td class=n>{size_text(v)}</td>' for v in sums[1:4])}"
        f"<td class=n>{size_text(sums[4]) if sums[4] else 'none'}</td></tr>"
        for (kind, element, source), sums in grouped.items()
    ]
    head = "<th>what</th><th>of</th><th>how it arises</th><th class=n>elements</th>" + "".join(
        f"<th class=n>{t}</th>" for t in ("at P0", "at P1", "at P2", "sent by P2")
    )
    intro = f"<p class=soft>What one inference of a batch of {batch} consumes, and never again.</p>"
    return _section("randomness", intro, _table(head, rows, "Randomness consumed"))


def _but_for(plan: Plan) -> str:
    count = sum(bool(node.margin) for node in plan.nodes)
    return (
        f", but for {count} lines that were measured: the last column says how many times what was seen fits"
        if count
        else ""
    )


_SOURCES = {
    "prf": "derived by all from pairwise keys",
    "dealt": "P0 derives, P2 corrects P1",
    "sent": "P2 sends both shares",
    "common": "derived by P0 and P1 alone",
}


def _ranges(plan: Plan) -> str:
    rows = []
    for node in plan.nodes:
        if node.type.kind != "secret":
            continue
        left, width = headroom(node), node.type.width
        reach = 15 / 16 * 2.0 ** (width - 1 - node.type.frac)
        step = f"2<sup>&minus;{node.type.frac}</sup>" if node.type.frac else "1"
        ring = node.type.ring
        tight = " class=tight" if left < 8 and ring == RING_BITS else ""  # what is in fewer bits was put there
        rows.append(
            f"<tr><td class=mono>%{escape(node.name)}</td><td class=mono>{escape(node.op.name)}</td><td "
            f"class='name mono'>"
            f"{_broken(layer_of(node) if node.path else '')}</td><td class=n>&plusmn;{reach:.4g}</td><td class=n>"
            f"{step}"
            f"</td><td class=n>{width}</td><td class=n>{ring}</td><td><span class=head><i{tight} "
            f"style='width:{100 * width / ring:.0f}%'></i></span>"
            f"</td><td class=n>{left}</td><td class=n>{f'{node.margin}&times;' if node.margin else ''}</td></tr>"
        )
    head = (
        "<th>line</th><th>op</th><th>module</th><th class=n>range</th><th class=n>step</th><th class=n>bits</th>"
        "<th class=n>of the ring's</th><th></th><th class=n>headroom</th><th class=n>measured</th>"
    )
    intro = (
        f"<p class=soft>Ranges are proved from the input's range and the weights{_but_for(plan)}. Headroom is how "
        "often a value could double before it had to live in a larger ring, or in Z_2^64 would not fit.</p>"
    )
    return _section("ranges", intro, _table(head, rows, "Ranges and headroom"))


def _ops(plan: Plan) -> str:
    used = sorted({node.op.name for node in plan.nodes})
    items = "".join(
        f"<dt class=mono>{escape(name)}</dt><dd id='h-{escape(name)}'>{escape(help_of(name))}</dd>" for name in used
    )
    return _section("ops", "", f"<dl class=ops>{items}</dl>")


def help_of(name: str) -> str:
    """The docstring of an op, paragraphs joined into lines."""
    text = (inspect.getdoc(Op.registry[name]) or "").replace("`", "")
    return "\n\n".join(" ".join(part.split()) for part in text.split("\n\n"))


# --- figures ---


def _scaled(value: float, units: tuple[tuple[float, str], ...], least: Callable[[float], str]) -> str:
    for size, unit in units:
        if value >= size:
            return f"{value / size:.3g} {unit}" if value / size < 1000 else f"{value / size:,.0f} {unit}"
    return least(value)


def size_text(size: int) -> str:
    """Bytes with a decimal unit, three digits."""
    return _scaled(size, ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")), lambda v: f"{v:.0f} B")


def time_text(seconds: float) -> str:
    """Seconds with a unit, three digits."""
    return _scaled(seconds, ((1.0, "s"), (1e-3, "ms")), lambda v: f"{1e6 * v:.0f} \u00b5s")
