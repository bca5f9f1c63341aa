"""The text of a plan: one grammar, a printer and a parser, parse(print(p)) == p.

    plan     = "plan" name "{" header "\\n" line* "  return %" name "\\n" "}" "\\n" "seal" sha256
    line     = "%" name ":" type ["~" margin "x"] "=" op ["%" name ("," "%" name)*] [","] [key "=" value ("," ...)]
               ["@" path]
    comment  = "#" ...            derived columns: dropped by the parser, printed anew from the plan

A name that comes from the model may hold what the grammar has other uses for. Such characters, and others that are no
letters of any script, are written as ~ and two hexadecimal digits for each byte of their UTF-8.

The four hexadecimal digits that end each line are a checksum of the line, so that an edited line can
be pointed at; the seal is the SHA-256 of everything above it. They guard against accidents and
careless edits. Against a malicious editor the parties compare the digest of the whole text.

A text may come from a stranger: reading takes time in proportion to it, lines and numbers are bounded,
and whatever does not fit is a PlanError.
"""

import dataclasses
import hashlib
import math
import re
import typing
from collections.abc import Iterable
from functools import cache
from typing import Any

from tacit.ir.errors import PlanError, drawn, number, shortened
from tacit.ir.op import Level, Op
from tacit.ir.plan import Node, NodeCost, Plan
from tacit.ir.types import Type

_HEADER = ("level", "protocol", "reveal", "ranges")
_LONG_CALL, _LONG_LINE = 120, 260
MAX_LINES, MAX_LINE = 1 << 16, 1 << 16  # lines, and characters of one
_MAX_DIGITS = 40  # of a whole number: more than any ring or shape asks for
# What a line begins with. Possessive: what one part took, the next cannot ask back, so a line is read once.
_BEGIN = re.compile(
    r"%(?P<name>\w++)\s*+:\s*+(?P<type>\w++<[^>]*+>)\s*+(?:~(?P<margin>\d++)x\s*+)?=\s*+(?P<op>[\w.]++)"
)
_TITLE = re.compile(r"plan ([\w.]++) \{  ")
_FORBIDDEN = re.compile(r"[^\w.\-;:()\[\]{}]")
_ESCAPES = re.compile(r"(?:~[0-9A-F]{2})++")
_LONE = "surrogatepass"  # Python's texts may hold halves of characters
_RINGS = re.compile(r"[\d^+]++")


def print_plan(plan: Plan) -> str:
    """The canonical text."""
    header = ", ".join(f"{key}={_header_value(plan, key)}" for key in _HEADER)
    left = [f"plan {plan.name} {{  {header}, ring={_rings(plan)}", *_aligned(plan), f"  return %{plan.result}", "}"]
    title, *figures = _figures(plan)
    width = _width(left, _LONG_LINE)
    lines = [f"{left[0]:<{width}}  # {title}"]
    for line, figure in zip(left[1:-2], figures, strict=True):
        lines.append(f"{line:<{width}}  # {figure}  {_check(line)}")
    lines += left[-2:]
    body = "\n".join(lines)
    text = f"{body}\nseal {_seal(body)}\n"
    _lines(text)  # what cannot be read is not written
    return text


def node_text(node: Node) -> str:
    """One line, unaligned, without derived columns."""
    return f"  %{node.name} : {_stated(node)} = {_call(node)}" + (f"  @{_escaped(node.path)}" if node.path else "")


def parse_plan(text: str) -> Plan:
    """The inverse of `print_plan`; raises PlanError with the line at fault drawn."""
    lines = _lines(text)
    if len(lines) < 4 or not lines[-1].startswith("seal ") or lines[-2] != "}":
        raise PlanError("this is not a whole plan: it ends with '}' and a seal line")
    name, header = _parse_header(lines)
    result = re.fullmatch(r"  return %(\w++)", lines[-3])
    if not result:
        raise drawn(lines, len(lines) - 3, "expected 'return %name'")
    nodes = tuple(_parse_line(lines, i) for i in range(1, len(lines) - 3))
    plan = Plan(name, nodes, result.group(1), Level(header["level"]), header["protocol"], header["reveal"])
    _verify_drawn(plan, lines)
    _verify_seal(plan, lines)
    return plan


def _lines(text: str) -> list[str]:
    count = text.count("\n")
    if count > MAX_LINES:
        raise PlanError(f"a plan has at most {MAX_LINES} lines, this one has {count}")
    lines = text.rstrip("\n").split("\n")
    for i, line in enumerate(lines):
        if len(line) > MAX_LINE:
            raise drawn(lines, i, f"a line has at most {MAX_LINE} characters, this one has {len(line)}")
    return lines


def _rings(plan: Plan) -> str:
    """The rings that values live in, as in 2^32+2^64."""
    return "+".join(f"2^{bits}" for bits in sorted({node.type.ring for node in plan.nodes}))


def _header_value(plan: Plan, key: str) -> str:
    value = getattr(plan, key)
    return value.value if isinstance(value, Level) else str(value)


def _aligned(plan: Plan) -> list[str]:
    rows = [(f"%{n.name}", _stated(n), _call(n), f"@{_escaped(n.path)}" if n.path else "") for n in plan.nodes]
    widths = [_width((row[i] for row in rows), _LONG_CALL) for i in range(4)]
    return [
        f"  {a:<{widths[0]}} : {b:<{widths[1]}} = {c:<{widths[2]}}  {d:<{widths[3]}}".rstrip() for a, b, c, d in rows
    ]


def _width(cells: Iterable[str], limit: int) -> int:
    """Of a column; cells longer than the limit stick out, and do not push the others about."""
    return max((len(cell) for cell in cells if len(cell) <= limit), default=0)


def _figures(plan: Plan) -> list[str]:
    if plan.level is not Level.PROTOCOL:
        return ["", *("" for _ in plan.nodes)]
    cost = plan.cost(batch=1)
    title = f"{'rounds':>7} {'online':>11} {'offline':>11}   bytes at N=1"
    return [title, *(_figure(row) for row in cost.per_op)]


def _figure(row: NodeCost) -> str:
    if row.session:
        once = row.cost.online_bytes + row.cost.offline_bytes
        return f"{'session':>7} {once:>11,} {'':>11}"
    rounds = row.cost.rounds
    span = "" if rounds == 0 else f"{row.start + 1}" if rounds == 1 else f"{row.start + 1}-{row.start + rounds}"
    figures = [f"{b:>11,}" if b else " " * 11 for b in (row.cost.online_bytes, row.cost.offline_bytes)]
    return f"{span:>7} {figures[0]} {figures[1]}"


def _stated(node: Node) -> str:
    """The type, and the margin of a range that was measured."""
    return f"{node.type} ~{node.margin}x" if node.margin else str(node.type)


def _call(node: Node) -> str:
    parts = [f"%{arg}" for arg in node.args]
    for field in dataclasses.fields(node.op):  # type: ignore[arg-type]
        value = getattr(node.op, field.name)
        if field.default is dataclasses.MISSING or value != field.default:
            parts.append(f"{field.name}={_value_text(value)}")
    return f"{node.op.name} {', '.join(parts)}".rstrip()


def _value_text(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return "x".join(_value_text(v) for v in value)
    if isinstance(value, float):
        return repr(value)
    return number(value) if isinstance(value, int) else _escaped(str(value))


def _escaped(text: str) -> str:
    """A text as an attribute or a path, without the characters that it may not hold."""
    return _FORBIDDEN.sub(lambda found: "".join(f"~{b:02X}" for b in found[0].encode("utf-8", _LONE)), text)


def _unescaped(text: str) -> str:
    """The inverse; raises ValueError where there is none."""
    if _FORBIDDEN.search(_ESCAPES.sub("", text)):
        raise ValueError(text)
    return _ESCAPES.sub(lambda found: bytes.fromhex(found[0].replace("~", "")).decode("utf-8", _LONE), text)


@cache
def _field_types(op: Any) -> dict[str, Any]:
    """By name, of a subclass of Op: by the class itself, as one that is defined anew may have other fields."""
    hints = typing.get_type_hints(op)
    return {field.name: hints[field.name] for field in dataclasses.fields(op)}


def _parse_value(kind: Any, text: str) -> Any:
    if kind is bool:
        if text not in ("true", "false"):
            raise ValueError(text)
        return text == "true"
    if kind in (int, float):
        return _number(kind, text)
    if typing.get_origin(kind) is tuple:
        element = typing.get_args(kind)[0]
        return tuple(_number(element, v) for v in text.split("x"))
    if not text:
        raise ValueError(text)
    return _unescaped(text)


def _number(kind: type[int] | type[float], text: str) -> int | float:
    value = kind(text) if len(text) <= _MAX_DIGITS else math.nan
    if value != value:
        raise ValueError(text)
    return value


def _parse_header(lines: list[str]) -> tuple[str, dict[str, str]]:
    line = lines[0].partition("#")[0].rstrip()
    title, (fields, _, rings) = _TITLE.match(line), line.rpartition(", ring=")
    if not title or len(fields) < title.end() or not _RINGS.fullmatch(rings):
        raise drawn(lines, 0, "expected 'plan NAME {  level=..., ring=2^64'")
    parts = [part.partition("=") for part in fields[title.end() :].split(", ")]
    header = {key: value for key, _, value in parts}
    if tuple(key for key, _, _ in parts) != _HEADER or header["level"] not in {level.value for level in Level}:
        raise drawn(lines, 0, f"the header gives {', '.join(_HEADER)}, in this order")
    if header["ranges"] not in ("none", "proved", "measured"):
        raise drawn(lines, 0, "ranges are proved or measured; plans of earlier versions have to be compiled again")
    return title.group(1), header


def _parse_line(lines: list[str], i: int) -> Node:
    # No attribute holds an @, a module's name may: the first one begins the path.
    line, _, path = lines[i].partition("#")[0].strip().partition("@")
    try:
        found = _BEGIN.match(line)
        if not found:
            raise PlanError("expected '%name : type = op %operand, ..., key=value  @path'")
        op_type = Op.registry.get(found["op"])
        if op_type is None:
            raise PlanError(Op.retired.get(found["op"], f"there is no op '{shortened(found['op'])}'"))
        args, attributes = _parse_operands(line[found.end() :], op_type)
        declared, margin = Type.parse(found["type"]), _margin(found["margin"])
        return Node(found["name"], op_type(**attributes), args, declared, _path(path), margin=margin)
    except PlanError as error:
        raise drawn(lines, i, str(error)) from None


def _margin(text: str | None) -> int:
    if text is not None and (len(text) > _MAX_DIGITS or not int(text)):
        raise PlanError(f"'~{shortened(text)}x' is not a margin, as in ~16x")
    return int(text or 0)


def _path(text: str) -> str:
    try:
        return _unescaped(text)
    except ValueError:
        raise PlanError(f"'{shortened(text)}' is not the path of a module") from None


def _parse_operands(text: str, op_type: type[Op]) -> tuple[tuple[str, ...], dict[str, Any]]:
    args, attributes, kinds = [], {}, _field_types(typing.cast(Any, op_type))  # for mypy, no type is hashable
    for item in filter(None, (part.strip() for part in text.split(","))):
        if operand := re.fullmatch(r"%(\w++)", item):
            args.append(operand.group(1))
            continue
        key, _, value = item.partition("=")
        if key not in kinds or key in attributes:
            known = ", ".join(kinds) or "none"
            raise PlanError(f"{op_type.name} has no attribute '{shortened(key)}'; it takes: {known}")
        try:
            attributes[key] = _parse_value(kinds[key], value)
        except ValueError:
            raise PlanError(f"'{shortened(value)}' is not a value for {key}") from None
    missing = [
        f.name
        for f in dataclasses.fields(op_type)  # type: ignore[arg-type]
        if f.default is dataclasses.MISSING and f.name not in attributes
    ]
    if missing:
        raise PlanError(f"{op_type.name} lacks {', '.join(missing)}")
    return tuple(args), attributes


def _verify_drawn(plan: Plan, lines: list[str]) -> None:
    """Verify, and draw the text itself around a failure rather than a reprint of it."""
    seen: dict[str, Type] = {}
    for count, node in enumerate(plan.nodes, 1):
        try:
            plan._verify_node(node, seen)
        except PlanError as error:
            raise drawn(lines, count, str(error)) from None
        seen[node.name] = node.type
    if plan.result not in plan.by_name:
        raise drawn(lines, len(lines) - 3, f"%{shortened(plan.result)} is not defined")


def _verify_seal(plan: Plan, lines: list[str]) -> None:
    canonical = str(plan).rstrip("\n").split("\n")
    if canonical == lines:
        return
    for i, (given, printed) in enumerate(zip(lines, canonical, strict=True)):
        if given != printed:
            message = f"this line was edited: its checksum or figures do not match (expected: {printed.strip()!r})"
            raise drawn(lines, i, message)


def _check(line: str) -> str:
    return hashlib.sha256(" ".join(line.split()).encode()).hexdigest()[:4]


def _seal(body: str) -> str:
    return hashlib.sha256(body.encode()).hexdigest()
