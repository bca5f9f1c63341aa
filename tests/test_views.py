"""Plans as tables and graphs: every figure is that of the plan."""

from __future__ import annotations

from functools import cache

import networkx as nx
import pytest
import torch
from models import Residual, images, seeded

import tacit
from tacit import networks
from tacit.ir.plan import Plan


@cache
def plan_of(name: str) -> Plan:
    if name == "residual":
        x = images(4, 3, 8, 8)
        return tacit.compile(seeded(Residual()), x, calibration=x, input_range=(-1, 1), name=name).plan
    torch.manual_seed(0)
    x = torch.rand(2, 1, 28, 28)
    return tacit.compile(networks.LeNet().eval(), x, reveal="argmax", input_range=(0, 1), name=name).plan


@pytest.mark.parametrize("name", ["residual", "lenet"])
@pytest.mark.parametrize("batch", [1, 3])
def test_layers_add_up_to_the_plan(name: str, batch: int) -> None:
    plan = plan_of(name)
    rows, cost = plan.layers(batch=batch), plan.cost(batch=batch)
    assert sum(row["online_bytes"] for row in rows) == cost.online_bytes
    assert sum(row["offline_bytes"] for row in rows) == cost.offline_bytes
    assert sum(row["session_bytes"] for row in rows) == cost.session_bytes
    assert sum(row["lines"] for row in rows) == len(plan.nodes)
    assert max(row["end"] for row in rows) == cost.rounds
    assert len({tuple(row) for row in rows}) == 1  # the same columns everywhere
    assert {row["layer"] for row in rows} >= {node.path for node in plan.nodes if node.path}


def test_layers_come_in_the_order_in_which_they_run() -> None:
    starts = [row["start"] for row in plan_of("lenet").layers() if row["start"]]
    assert starts == sorted(starts)
    named = [row["layer"] for row in plan_of("lenet").layers() if not row["layer"].startswith("%")]
    assert named == ["conv1", "conv2", "fc1", "fc2"]


def test_the_graph_for_networkx_is_that_of_the_plan() -> None:
    plan = plan_of("residual")
    graph = plan.to_networkx()
    assert list(graph) == [node.name for node in plan.nodes]
    assert nx.is_directed_acyclic_graph(graph)
    assert graph.graph["digest"] == plan.digest
    for node in plan.nodes:
        assert graph.nodes[node.name]["op"] == node.op.name
        assert set(graph.predecessors(node.name)) == set(node.args)
        for arg in node.args:
            assert {node.args[i] for i in graph.edges[arg, node.name]["operands"]} == {arg}
    online = [n for n, data in graph.nodes(data=True) if not data["session"]]
    assert sum(graph.nodes[n]["online_bytes"] for n in online) == plan.cost().online_bytes


def test_graphviz_gets_every_line_once_and_a_cluster_for_each_module() -> None:
    plan = plan_of("residual")
    dot = plan.to_dot()
    assert dot.count("[label=") == len(plan.nodes)
    assert dot.count(" -> ") == sum(len(set(node.args)) for node in plan.nodes)
    for path in {node.path for node in plan.nodes if node.path}:
        assert dot.count(f'subgraph "cluster_{path}" {{') == 1
    assert dot.count("{") == dot.count("}")
