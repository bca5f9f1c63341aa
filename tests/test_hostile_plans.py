"""Plans from strangers: whatever the text or an attribute says, it is a plan or a PlanError, in bounded time."""

from __future__ import annotations

import dataclasses
import hashlib
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import samples, single
from net_harness import Trio, compiled, images
from torch import nn

import tacit
from tacit.ir.errors import PlanError, ProtocolError, RefusedError, TacitError
from tacit.ir.op import Level, inferred
from tacit.ir.plan import Node, Plan
from tacit.ir.text import MAX_LINE, MAX_LINES
from tacit.ir.types import Batch, Type
from tacit.runtime.net import pushing
from tacit.runtime.net.client import Client
from tacit.runtime.net.deployment import Limits, load_identity
from tacit.runtime.net.pushing import read_plan

GOLDEN = Path(__file__).parent / "golden"
LONG = MAX_LINE - 100


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """By processor time: others use this machine too."""
    begin = time.process_time()
    yield
    assert time.process_time() - begin < seconds


@pytest.fixture(scope="module")
def text() -> str:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(8, 3)).eval()
    return str(tacit.compile(model, images(4).repeat(1, 1, 2, 2), input_range=(0, 1), reveal="argmax").plan)


def refused(text: str, *, reason: str | None = None) -> str:
    with within(0.5), pytest.raises(PlanError, match=reason) as caught:
        Plan.parse(text)
    assert len(str(caught.value)) < 1 << 14  # what is quoted is shortened
    return str(caught.value)


def in_line(text: str, i: int, line: str) -> str:
    lines = text.rstrip("\n").split("\n")
    return "\n".join([*lines[:i], line, *lines[i + 1 :]]) + "\n"


# --- the text ---

PLACES: dict[str, Callable[[str], tuple[int, str]]] = {
    "before the path": lambda run: (1, f"  %w0 : secret<3x4, f14, b16> = weight label=a{run}@x y"),
    "in the path": lambda run: (1, f"  %w0 : secret<3x4, f14, b16> = weight label=a @x{run}y z"),
    "as a value": lambda run: (1, f"  %w0 : secret<3x4, f14, b16> = weight label={run}"),
    "as an attribute": lambda run: (1, f"  %w0 : secret<3x4, f14, b16> = weight {run}=1"),
    "as an operand": lambda run: (1, f"  %w0 : secret<3x4, f14, b16> = add %a, %{run}"),
    "as an op": lambda run: (1, f"  %w0 : secret<3x4, f14, b16> = {run}"),
    "in a type": lambda run: (1, f"  %w0 : secret<{run}, f14, b16> = weight label=a"),
    "in a scale": lambda run: (1, f"  %w0 : secret<3x4, f{run}, b16> = weight label=a"),
    "as a kind": lambda run: (1, f"  %w0 : {run}<3x4, f14, b16> = weight label=a"),
    "as a name": lambda run: (1, f"  %{run} = secret"),
    "as a line": lambda run: (1, run),
    "as the title": lambda run: (0, f"plan {run} {{  level=protocol"),
    "in the header": lambda run: (0, f"plan x {{  level=protocol, {run}, ring=2^64"),
    "as the rings": lambda run: (
        0,
        f"plan x {{  level=protocol, protocol=fused, reveal=logits, ranges=proved, ring={run}",
    ),
    "as the result": lambda run: (-3, f"  return %{run}!"),
    "as the seal": lambda run: (-1, f"seal {run}"),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_line_is_read_in_time_in_proportion_to_it(text: str, place: str) -> None:
    count = text.count("\n")
    for unit in (
        " ",
        "a",
        "1",
        "9",
        ",",
        "=",
        "x",
        "%",
        "@",
        ".",
        "<",
        ">",
        "1x",
        "N",
        ", ring=1",
        "%a,",
        " @",
        "\t",
        "٣",
    ):
        i, line = PLACES[place](unit * (LONG // len(unit)))
        refused(in_line(text, i % count, line))


def test_twice_the_spaces_take_twice_the_time_at_most(text: str) -> None:
    """A run of spaces before what does not fit: a few milliseconds, at 16,000 and at 64,000."""
    for count in (16_000, 64_000):
        with within(0.1):
            refused(in_line(text, 1, "  %w0 : secret<3x4, f14, b16> = weight label=a" + " " * count + "@x y"))


def test_lines_are_bounded_in_length_and_number(text: str) -> None:
    error = refused(in_line(text, 2, " " * (1 << 24)), reason=f"a line has at most {MAX_LINE} characters")
    assert "   3 | " in error
    refused(in_line(text, 1, "x" * (MAX_LINE + 1)), reason="a line has at most")
    refused("\n" * (1 << 24), reason=f"a plan has at most {MAX_LINES} lines")
    refused("x\n" * (1 << 22), reason=f"a plan has at most {MAX_LINES} lines")
    with pytest.raises(PlanError) as caught:
        Plan.parse(in_line(text, 2, "nothing"))
    assert caught.value.line == 3


@pytest.mark.parametrize(
    "type_",
    [
        "secret<99999999999x99999999999, f14, b16>",
        f"secret<{'9' * 5000}, f14, b16>",
        f"secret<{'9' * 5000}N, f14, b16>",
        "secret<Nx1099511627777, f14, b16>",
        f"secret<{'x'.join('1' * 33)}, f14, b16>",
        f"secret<{'x'.join('1' * 20000)}, f14, b16>",
        f"secret<4, f{'9' * 5000}, b16>",
        f"secret<4, f14, b{'9' * 5000}>",
        f"secret<4, f14, b16, r{'9' * 5000}>",
        "secret<4, f14, b65>",
        "secret<4, f14, b0>",
        "secret<0, f14, b16>",
        "secret<0N, f14, b16>",
        "secret<, f14, b16>",
    ],
)
def test_types_are_bounded(text: str, type_: str) -> None:
    with within(0.2), pytest.raises(PlanError):
        Type.parse(type_)
    refused(in_line(text, 1, f"  %w0 : {type_} = weight label=a"))


@pytest.mark.parametrize(
    "value", ["1" + "0" * 5000, "0x10", "nan", "-" + "9" * 41, "", "1" * 60000, "x".join("1" * 30000)]
)
def test_numbers_are_bounded(text: str, value: str) -> None:
    lines = text.split("\n")
    for op, key in (
        ("trunc", "bits"),
        ("relu", "window"),
        ("input", "low"),
        ("avg_pool2d", "kernel"),
        ("reshape", "shape"),
    ):
        i = next((i for i, line in enumerate(lines) if f" = {op} " in line), 2)
        refused(in_line(text, i, f"  %q : secret<Nx3, f14, b16> = {op} %input, {key}={value}"))


NAMES = ("a@b", "@", "a=b", "a,b", "%a", "a b", "a#b", "a\tb", "a\nb", "a~b", "~40", "'\"", "\u202e", "\x00", "{;}/|\\")


def test_a_path_comes_back_whatever_it_holds(text: str) -> None:
    plan = Plan.parse(text)
    for path in (*NAMES, "é", "a:b", "x<y>", "@@", "a" * 3000):
        named = plan.with_nodes([dataclasses.replace(node, path=path) for node in plan.nodes])
        assert Plan.parse(str(named)) == named


def test_a_label_comes_back_whatever_it_holds(text: str) -> None:
    plan = Plan.parse(text)
    for label in NAMES:
        nodes = [
            dataclasses.replace(n, op=dataclasses.replace(n.op, label=f"{label}.{i}")) if n.op.declares else n  # type: ignore[call-arg]
            for i, n in enumerate(plan.nodes)
        ]
        named = plan.with_nodes(nodes)
        assert Plan.parse(str(named)) == named
        assert len(str(named).splitlines()) == len(text.splitlines())


@pytest.mark.parametrize("name", ["a~", "a~4", "a~4g", "a~40~ff", "a~FF", "~C3b", "a~41"])
def test_an_escape_that_nothing_is_written_as_is_refused(text: str, name: str) -> None:
    plan = Plan.parse(text)
    i, node = next((i, node) for i, node in enumerate(plan.nodes) if node.op.declares)
    label = node.op.label  # type: ignore[attr-defined]
    refused(text.replace(f"label={label}", f"label={name}", 1))
    refused(in_line(text, i + 1, text.splitlines()[i + 1].split("  #")[0].rstrip() + f"  @{name}"))


# --- attributes ---


def plans() -> list[Plan]:
    found = []
    for file in sorted(GOLDEN.glob("*.txt")):
        if (content := file.read_text()).startswith("plan ") and "\nseal " in content:
            found.append(Plan.parse(content))
    return found


VALUES = (0, -1, 1, 63, 64, 65, 10**9, -(10**9), 10**18, 1 << 64, 10**5000)


def changed(value: Any) -> Iterator[Any]:
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, int):
        yield from VALUES
    elif isinstance(value, float):
        yield from (0.0, -1.0, 1e308, float("inf"), float("-inf"), float("nan"))
    elif isinstance(value, str):
        yield from ("", "nothing", "x" * 70_000)
    elif isinstance(value, tuple):
        yield from ((), value + value, value[:-1], value * 1000)
        yield from (value[:i] + (v,) + value[i + 1 :] for i in range(min(2, len(value))) for v in changed(value[i]))


def changes(node: Node) -> Iterator[Node]:
    """The line with one thing of it changed."""
    for field in dataclasses.fields(node.op):  # type: ignore[arg-type]
        for value in changed(getattr(node.op, field.name)):
            yield dataclasses.replace(node, op=dataclasses.replace(node.op, **{field.name: value}))  # type: ignore[type-var]
    for key in ("frac", "width", "ring"):
        for value in VALUES:
            made = object.__new__(Type)  # as it could not be read
            made.__dict__.update(node.type.__dict__ | {key: value})
            try:
                made.__post_init__()
            except PlanError:
                continue
            yield dataclasses.replace(node, type=made)
    for shape in ((Batch(), 10**9), (10**9,), (Batch(10**9),), (*node.type.shape, 1), node.type.shape[1:] or (1,)):
        yield dataclasses.replace(node, type=dataclasses.replace(node.type, shape=shape))
    for args in ((), node.args + node.args, node.args[::-1], (*node.args, "nothing")):
        yield dataclasses.replace(node, args=args)


@contextmanager
def alarmed(seconds: int) -> Iterator[None]:
    """A change that takes for ever fails rather than hangs."""

    def late(*_: object) -> None:
        raise AssertionError("no end in bounded time")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_an_absurd_attribute_is_refused_or_means_something() -> None:
    """Every attribute, type and operand of every line of the golden plans; what is accepted has a cost and a text."""
    tried, accepted = 0, 0
    for plan in plans():
        for i, node in enumerate(plan.nodes):
            for other in changes(node):
                tried += 1
                made = plan.with_nodes([*plan.nodes[:i], other, *plan.nodes[i + 1 :]])
                with alarmed(20):
                    try:
                        made.verify()
                        if made.level is Level.PROTOCOL:
                            made.cost(batch=1)
                            made.requirements(batch=1)
                        accepted += 1
                    except PlanError:
                        pass
    assert tried > 3000
    assert accepted < tried / 2


def test_a_number_of_bits_is_one() -> None:
    """Before anything is computed with it: a shift by more takes memory without end."""
    tried = 0
    for level in (Level.FIXED, Level.PROTOCOL):
        for _, sample in samples(level):
            for name in ("bits", "drop", "frac", "of", "truncate", "window"):
                if name not in vars(sample.op):
                    continue
                for value in (-1, 65, 10**12, 10**5000):
                    tried += 1
                    with within(0.2), pytest.raises(PlanError, match=f"{name} is"):
                        inferred(dataclasses.replace(sample.op, **{name: value}), sample.args)  # type: ignore[type-var]
    assert tried > 100


# --- what a party and a client do with them ---


def test_a_plan_that_asks_for_too_much_is_refused_with_its_line(text: str) -> None:
    assert read_plan(text, Limits()).digest == hashlib.sha256(text.encode()).hexdigest()
    with pytest.raises(ProtocolError, match=r"the plan, line \d+: %\w+ has \d+ elements, value_elements is 10$"):
        read_plan(text, Limits(value_elements=10))
    for most in (1, 1000):
        with pytest.raises(
            ProtocolError, match=rf"the plan, line \d+: up to %\w+ it sends \d+ bytes, batch_bytes is {most}$"
        ):
            read_plan(text, Limits(batch_bytes=most))
    with pytest.raises(ProtocolError, match="the plan is not valid, line 2: "):
        read_plan(in_line(text, 1, "nothing"), Limits())
    with pytest.raises(ProtocolError, match="not at the protocol level"):
        read_plan(str(single(samples(Level.FIXED)[0][1], Level.FIXED)), Limits())


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trio]:
    folder = tmp_path_factory.mktemp("hostile")
    secure = compiled(folder)
    trio = Trio(folder, plan=secure.plan.digest, limits=Limits(value_elements=54))
    trio.push()
    yield trio
    trio.close()


def test_a_party_reads_nothing_of_a_plan_that_is_not_the_pinned_one(
    place: Trio, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    monkeypatch.setattr(pushing, "read_plan", lambda text, limits: read.append(text))
    for text in ("", "plan x {  level=protocol,", " " * (1 << 20), "\ud800", "\U0001f600"):
        with pytest.raises(RefusedError, match=r"plan digest [0-9a-f]{16}\.\.\., the deployment has"):
            place.ask("owner", 0, "offer", plan=text, push="01" * 16, seed="02" * 16)
    assert not read


def test_a_client_reads_nothing_of_a_plan_that_is_not_the_announced_one(
    place: Trio, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tacit.runtime.net import client

    read: list[str] = []
    model = place.servers[0].engine.model
    assert model is not None
    monkeypatch.setattr(client, "read_plan", lambda text, limits: read.append(text))
    monkeypatch.setattr(place.servers[0], "answer", lambda link, fields: {"plan": "x"})
    asker = Client(place.deployment, load_identity(place.deployment, place.folder / "client"))
    with pytest.raises(ProtocolError, match="P0 sent another plan than the one it announced"):
        asker.plan  # noqa: B018
    asker.close()
    assert not read


def test_nothing_is_allocated_for_a_plan_beyond_the_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled(tmp_path)
    place = Trio(tmp_path, limits=Limits(value_elements=53))
    warmed: list[int] = []
    monkeypatch.setattr(pushing, "warm_up", lambda plan, rank: warmed.append(rank))
    try:
        with pytest.raises(TacitError, match=r"P\d: the plan, line 2: %w0 has 54 elements, value_elements is 53"):
            place.push()
    finally:
        place.close()
    assert not warmed
