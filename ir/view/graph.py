"""The plan as a graph: for networkx, for Graphviz."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import networkx as nx

from tacit.ir.plan import Node, Plan


def to_networkx(plan: Plan) -> nx.DiGraph[str]:
    """Lines as nodes, from operand to user; costs are those of a batch of 1.

    Node attributes: op, type, margin (0: proved), path, session, start, rounds, online_bytes, offline_bytes. Edge
    attributes: operands, the places at which the value is used. Graph attributes: name, digest, protocol, reveal,
    ranges, result.
    """
    graph: nx.DiGraph[str] = nx.DiGraph(
        name=plan.name,
        digest=plan.digest,
        protocol=plan.protocol,
        reveal=plan.reveal,
        ranges=plan.ranges,
        result=plan.result,
    )
    for node, row in zip(plan.nodes, plan.cost().per_op, strict=True):
        graph.add_node(
            node.name,
            op=node.op.name,
            type=str(node.type),
            margin=node.margin,
            path=node.path,
            session=node.op.session,
            start=row.start,
            rounds=row.cost.rounds,
            online_bytes=row.cost.online_bytes,
            offline_bytes=row.cost.offline_bytes,
        )
    for node in plan.nodes:
        for arg in dict.fromkeys(node.args):
            graph.add_edge(arg, node.name, operands=tuple(i for i, a in enumerate(node.args) if a == arg))
    return graph


def to_dot(plan: Plan) -> str:
    """Graphviz: clusters for PyTorch's modules, dashed boxes for what belongs to the session."""
    lines = [f"digraph {_quoted(plan.name)} {{", '  rankdir=LR; node [shape=box, fontname="sans-serif"];']
    lines += _cluster(list(plan.nodes), (), "  ")
    for node in plan.nodes:
        lines += [f"  {_quoted(arg)} -> {_quoted(node.name)};" for arg in dict.fromkeys(node.args)]
    return "\n".join([*lines, "}", ""])


def _cluster(nodes: Sequence[Node], prefix: tuple[str, ...], indent: str) -> Iterator[str]:
    """The nodes of one module, those of its children each in a box of their own."""
    inner: dict[str, list[Node]] = {}
    for node in nodes:
        path = tuple(node.path.split(".")) if node.path else ()
        if len(path) > len(prefix):
            inner.setdefault(path[len(prefix)], []).append(node)
            continue
        style = ", style=dashed" if node.op.session else ""
        label = _quoted(f"%{node.name} {node.op.name}\n{node.type}")
        yield f"{indent}{_quoted(node.name)} [label={label}{style}];"
    for child, members in inner.items():
        path = (*prefix, child)
        yield f"{indent}subgraph {_quoted('cluster_' + '.'.join(path))} {{"
        yield f"{indent}  label={_quoted('.'.join(path))};"
        yield from _cluster(members, path, indent + "  ")
        yield f"{indent}}}"


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
