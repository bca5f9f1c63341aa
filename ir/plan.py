"""The plan: a straight-line typed program, its verifier, its schedule, its cost and requirements."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, lru_cache
from html import escape
from typing import TYPE_CHECKING, Any

import networkx as nx

from tacit.ir.cost import P0, P1, P2, ROLES, Cost, Link, Randomness
from tacit.ir.errors import CompileError, PlanError, drawn, number
from tacit.ir.given import batch_of
from tacit.ir.op import Level, Op, Subprotocol, inferred
from tacit.ir.types import Type

if TYPE_CHECKING:
    from tacit.ir.predict import Prediction


# Batch sizes for which a plan remembers its nodes.
_LITTLE = 5 << 20  # bytes of an inference, see `PlanCost.little`
_SIZES = 16
MOST_MARGIN = 1 << 16  # of a measured range


@dataclass(frozen=True)
class Node:
    """One line of a plan: `%name : type = op %arg, ..., attribute=value  @path`.

    margin: 0 where the width of its type is proved. Otherwise it was measured: that many times the largest magnitude
    seen fits it, and a value that is larger still may give a wrong answer. Printed behind the type, as in ~16x.
    """

    name: str
    op: Op
    args: tuple[str, ...]
    type: Type
    path: str = ""  # the PyTorch module it comes from
    source: str = field(default="", compare=False)  # file and line in the user's model; not printed
    origin: str = field(default="", compare=False)  # the line of the model level that it comes from; not printed
    margin: int = 0


def _declaration(op: Op) -> tuple[str, str]:
    """What an input or a weight is known by outside the plan."""
    return op.name, str(getattr(op, "label", ""))


@dataclass(frozen=True)
class SizedNode:
    """A node for a batch of a given size: its position in the plan, its types in numbers, its subprotocols."""

    node: Node
    index: int
    args: tuple[Type, ...]
    type: Type
    parts: tuple[Subprotocol, ...]


@dataclass(frozen=True)
class NodeCost:
    """What one node costs for a given batch; `start` is the round in which it begins."""

    name: str
    op: str
    path: str
    session: bool
    start: int
    cost: Cost

    @property
    def total_bytes(self) -> int:
        return self.cost.online_bytes + self.cost.offline_bytes


@dataclass(frozen=True)
class PlanCost:
    """Totals over all parties for one inference of a batch, and per op and per party."""

    batch: int
    rounds: int
    per_op: tuple[NodeCost, ...]
    prediction: Prediction | None = None  # seconds, where a network was given

    def _links(self, kind: str) -> Counter[Link]:
        out: Counter[Link] = Counter()
        for row in self.per_op:
            if kind == "session" and row.session:
                out += row.cost.online + row.cost.offline
            elif kind != "session" and not row.session:
                out += row.cost.online if kind == "online" else row.cost.offline
        return out

    @property
    def online_bytes(self) -> int:
        return sum(self._links("online").values())

    @property
    def little(self) -> bool:
        """Whether parties of one process take turns in one thread: handing the interpreter from thread to thread costs
        more than a second core gains (measured on two cores)."""
        return self.online_bytes + self.offline_bytes < _LITTLE

    @property
    def offline_bytes(self) -> int:
        return sum(self._links("offline").values())

    @property
    def session_bytes(self) -> int:
        """Paid once per session: sharing the weights and opening their masks."""
        return sum(self._links("session").values())

    @property
    def per_party(self) -> dict[str, dict[str, int]]:
        """Bytes that each party or role sends, by phase."""
        out = {role: {"online": 0, "offline": 0, "session": 0} for role in ROLES}
        for kind in ("online", "offline", "session"):
            for (sender, _), size in self._links(kind).items():
                out[ROLES[sender]][kind] += size
        return out


@dataclass(frozen=True)
class Requirement:
    """One tensor of randomness that one inference consumes, and the node that consumes it."""

    node: str
    item: Randomness

    @property
    def kind(self) -> str:
        return self.item.kind

    @property
    def shape(self) -> tuple[int, ...]:
        return self.item.shape

    @property
    def count(self) -> int:
        return self.item.count

    @property
    def bytes_per_party(self) -> dict[str, int]:
        return {ROLES[party]: self.item.bytes_of(party) for party in (P0, P1, P2)}


@dataclass(frozen=True)
class Schedule:
    """The round in which each node starts, and how many rounds there are."""

    start: Mapping[str, int]
    rounds: int

    def at(self, step: int) -> list[str]:
        return self.by_step.get(step, [])

    def part(self, names: Container[str]) -> Schedule:
        """The schedule of some lines alone, in the rounds that they have."""
        return Schedule({name: step for name, step in self.start.items() if name in names}, self.rounds)

    @cached_property
    def by_step(self) -> dict[int, list[str]]:
        out: dict[int, list[str]] = {}
        for name, step in self.start.items():
            out.setdefault(step, []).append(name)
        return out


@dataclass(frozen=True)
class Plan:
    """A typed straight-line program, public by construction: it holds no weights and no inputs."""

    name: str
    nodes: tuple[Node, ...]
    result: str
    level: Level = Level.PROTOCOL
    protocol: str = "fused"
    reveal: str = "logits"

    def __str__(self) -> str:
        return self._text

    def __getstate__(self) -> dict[str, Any]:
        """The fields alone: what follows from them is found again."""
        return {entry.name: getattr(self, entry.name) for entry in fields(self)}

    def __repr__(self) -> str:
        return f"<Plan {self.name}: {len(self.nodes)} nodes, {self.level.value} level, {self.digest[:12]}>"

    @cached_property
    def _text(self) -> str:
        from tacit.ir.text import print_plan

        return print_plan(self)

    @staticmethod
    def parse(text: str) -> Plan:
        """The plan that prints as `text`; raises PlanError, with the plan drawn around the line at fault."""
        from tacit.ir.text import parse_plan

        if not isinstance(text, str):
            raise PlanError(f"a plan is parsed from text, not from {type(text).__name__}")
        return parse_plan(text)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the canonical text, in hexadecimal."""
        return hashlib.sha256(str(self).encode()).hexdigest()

    @cached_property
    def ranges(self) -> str:
        """proved, or measured if some lines are; none of real numbers."""
        if self.level is Level.MODEL:
            return "none"
        return "measured" if any(node.margin for node in self.nodes) else "proved"

    @cached_property
    def by_name(self) -> dict[str, Node]:
        return {node.name: node for node in self.nodes}

    @cached_property
    def index(self) -> dict[str, int]:
        """The position of each node: the domain separator of its randomness."""
        return {node.name: i for i, node in enumerate(self.nodes)}

    def node(self, name: str) -> Node:
        return self.by_name[name]

    def arg_types(self, node: Node) -> tuple[Type, ...]:
        return (node.type,) if node.op.declares else tuple(self.by_name[arg].type for arg in node.args)

    def at(self, batch: int) -> Mapping[str, SizedNode]:
        """All nodes for a batch of that size, by name; the last few sizes are remembered."""
        return self._sized(batch_of(batch))

    @cached_property
    def _sized(self) -> Callable[[int], Mapping[str, SizedNode]]:
        def sized(batch: int) -> Mapping[str, SizedNode]:
            return {node.name: self._at(node, index, batch) for index, node in enumerate(self.nodes)}

        return lru_cache(maxsize=_SIZES)(sized)

    def _at(self, node: Node, index: int, batch: int) -> SizedNode:
        args = tuple(t.at(batch) for t in self.arg_types(node))
        return SizedNode(node, index, args, node.type.at(batch), node.op.parts(*args))

    def users(self, name: str) -> list[Node]:
        return self._users.get(name, [])

    @cached_property
    def uses(self) -> Mapping[str, int]:
        """How many operands of lines each value is that does not belong to the session."""
        return Counter(arg for node in self.nodes for arg in node.args if not self.by_name[arg].op.session)

    @cached_property
    def _users(self) -> dict[str, list[Node]]:
        out: dict[str, list[Node]] = {}
        for node in self.nodes:
            for arg in dict.fromkeys(node.args):
                out.setdefault(arg, []).append(node)
        return out

    def find(self, op: type[Op]) -> list[Node]:
        return [node for node in self.nodes if isinstance(node.op, op)]

    def with_nodes(self, nodes: Iterable[Node], **changes: object) -> Plan:
        return replace(self, nodes=tuple(nodes), **changes)  # type: ignore[arg-type]

    def without_dead_lines(self) -> Plan:
        """Without the lines that the result does not depend on; inputs stay, because the client brings them."""
        live = {self.result} | {node.name for node in self.nodes if node.op.declares and not node.op.session}
        for node in reversed(self.nodes):
            if node.name in live:
                live.update(node.args)
        return self.with_nodes(node for node in self.nodes if node.name in live)

    @cached_property
    def schedule(self) -> Schedule:
        """The rounds of one inference: independent messages share a round."""
        return self._schedule(session=False)

    @cached_property
    def session_schedule(self) -> Schedule:
        """The rounds of the once-per-session part."""
        return self._schedule(session=True)

    def _schedule(self, *, session: bool) -> Schedule:
        """As soon as possible: a node starts when the last of its operands is ready.

        The number of rounds is the weight of the critical path of the DAG.
        """
        graph: nx.DiGraph[str] = nx.DiGraph()
        rounds = {n.name: self._cost(n, 1).rounds for n in self.nodes if n.op.session == session}
        graph.add_nodes_from(rounds)
        for node in self.nodes:
            if node.name in rounds:
                graph.add_edges_from((arg, node.name) for arg in node.args if arg in rounds)
        start: dict[str, int] = {}
        for name in nx.lexicographical_topological_sort(graph, key=lambda n: self.index[n]):
            start[name] = max((start[p] + rounds[p] for p in graph.predecessors(name)), default=0)
        return Schedule(start, max((start[n] + rounds[n] for n in rounds), default=0))

    def _cost(self, node: Node, batch: int) -> Cost:
        return node.op.cost(*(t.at(batch) for t in self.arg_types(node)))

    def cost(self, *, batch: int = 1, network: str | None = None) -> PlanCost:
        """Rounds and bytes of one inference of a batch, exactly as they will be counted on the wire.

        network: virtual, lan, wan, or as in "rtt=40ms,rate=350Mbit": `prediction` then holds the seconds that a run
        will take on machines like this one, whose speed is measured at first use, once, and kept in the user's cache.
        Raises InputError for other networks, and for what is no batch.
        """
        batch, rows = batch_of(batch), []
        for node in self.nodes:
            schedule = self.session_schedule if node.op.session else self.schedule
            rows.append(
                NodeCost(
                    node.name,
                    node.op.name,
                    node.path,
                    node.op.session,
                    schedule.start[node.name],
                    self._cost(node, batch),
                )
            )
        return PlanCost(
            batch, self.schedule.rounds, tuple(rows), None if network is None else self.predict(batch, network)
        )

    def predict(self, batch: int, network: str, *, measure: bool = True) -> Prediction | None:
        """Seconds of one inference; None where the speed of this machine is unknown and is not to be measured."""
        from tacit.ir.predict import FINDERS, network_model, predict

        batch, _ = batch_of(batch), network_model(network)
        self.cost(batch=batch)  # what is refused is refused before anything is measured
        machine = next((found for find in FINDERS if (found := find(measure))), None)
        return predict(self, machine, batch=batch, network=network) if machine else None

    def layers(self, *, batch: int = 1) -> list[dict[str, Any]]:
        """Costs, shapes and ranges layer by layer, one dictionary each: what `pandas.DataFrame` takes."""
        from tacit.ir.view.layers import layers

        return layers(self, batch=batch)

    def _repr_html_(self) -> str:
        """What a notebook shows: the report, or the text at the levels before the protocol."""
        from tacit.ir.view.page import framed, page

        return (
            framed(page(self, prediction=self.predict(1, "virtual", measure=False)))
            if self.level is Level.PROTOCOL
            else f"<pre>{escape(str(self))}</pre>"
        )

    def to_networkx(self) -> nx.DiGraph[str]:
        """The lines as a graph, with types and costs as attributes."""
        from tacit.ir.view.graph import to_networkx

        return to_networkx(self)

    def to_dot(self) -> str:
        """The lines as a graph for Graphviz, modules as clusters."""
        from tacit.ir.view.graph import to_dot

        return to_dot(self)

    def requirements(self, *, batch: int = 1) -> tuple[Requirement, ...]:
        """The randomness that one inference of a batch consumes, in plan order; raises InputError for no batch."""
        batch = batch_of(batch)
        return tuple(
            Requirement(node.name, item)
            for node in self.nodes
            if not node.op.session
            for item in node.op.randomness(*(t.at(batch) for t in self.arg_types(node)))
        )

    def verify(self) -> Plan:
        """Check every claim again: names, allowed ops, types. Returns the plan, or raises PlanError."""
        seen: dict[str, Type] = {}
        for i, node in enumerate(self.nodes):
            try:
                self._verify_node(node, seen)
            except PlanError as error:
                raise self._drawn(i, str(error)) from None
            seen[node.name] = node.type
        if self.result not in seen:
            raise PlanError(f"plan {self.name} returns %{self.result}, which it does not define")
        return self

    def require_answer(self) -> Plan:
        """The plan, if it is one to run: its answer is revealed. Raises PlanError."""
        if self.level is not Level.PROTOCOL or self.node(self.result).type.kind != "client":
            raise PlanError(f"plan {self.name} reveals no answer: it is not the last stage of compiling")
        return self

    def _verify_node(self, node: Node, seen: Mapping[str, Type]) -> None:
        if node.name in seen:
            raise PlanError(f"%{node.name} is defined twice")
        for arg in node.args:
            if arg not in seen:
                raise PlanError(f"%{arg} is used before it is defined")
            if node.op.session and not self.by_name[arg].op.session:
                raise PlanError(f"{node.op.name} belongs to the session and cannot depend on %{arg}")
        if self.level not in node.op.levels:
            raise PlanError(f"{node.op.name} may not stand at the {self.level.value} level")
        if node.op.suite not in ("", self.protocol):
            raise PlanError(f"{node.op.name} belongs to the suite {node.op.suite}, the plan says {self.protocol}")
        if node.op.declares and self._declared.get(_declaration(node.op)) != node.name:
            raise PlanError(f"two lines are {' '.join(_declaration(node.op))}")
        operands = (node.type,) if node.op.declares else tuple(seen[arg] for arg in node.args)
        try:
            found = inferred(node.op, operands)
        except CompileError as error:  # a function that there is none of
            raise PlanError(str(error)) from None
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            # A plan may come from a stranger: its attributes need not even have the form that `infer` computes with.
            raise PlanError(f"{node.op.name} does not take {len(operands)} operands with these attributes") from error
        # Range analysis may claim a smaller width than the types alone give, never a larger one.
        if found.with_(width=node.type.width) != node.type or node.type.width > found.width:
            raise PlanError(f"%{node.name} is declared {node.type}, but {node.op.name} gives {found}")
        if node.margin and (node.type.kind != "secret" or node.op.declares or not 2 <= node.margin <= MOST_MARGIN):
            raise PlanError(f"%{node.name} says ~{number(node.margin)}x: secrets have margins, 2 to {MOST_MARGIN}")
        if node.type.kind == "client":
            self._verify_answer(node)

    def _verify_answer(self, node: Node) -> None:
        """A plan reveals one value, and it is what the header says."""
        if node.name != self.result:
            raise PlanError(f"%{node.name} is revealed, the answer is %{self.result}")
        told = self.by_name[node.args[0]].op.reveals
        if self.reveal not in ("logits", told):
            raise PlanError(f"the plan says reveal={self.reveal}, which is not what %{node.args[0]} is")

    @cached_property
    def _declared(self) -> Mapping[tuple[str, str], str]:
        """The first line of each input and weight."""
        return {_declaration(node.op): node.name for node in reversed(self.nodes) if node.op.declares}

    def _drawn(self, index: int, message: str) -> PlanError:
        from tacit.ir.text import node_text

        return drawn([node_text(node) for node in self.nodes], index, message)
