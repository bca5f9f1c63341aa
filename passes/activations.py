"""Activations that a model writes out by hand are taken for what they are."""

from __future__ import annotations

import math
from dataclasses import replace

from tacit.ir.ops.approximated import Function
from tacit.ir.ops.arithmetic import Add, AddScalar, MulScalar
from tacit.ir.ops.products import Times
from tacit.ir.plan import Node, Plan
from tacit.passes.draft import Draft

_NEAR = 1e-4  # constants are written with so few digits
_CUBIC, _SCALE = 0.044715, math.sqrt(2 / math.pi)


def recognise_gelu(draft: Draft) -> Draft:
    """0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) becomes one function of x: GPT-2's form of GELU."""
    plan = draft.plan
    found = {node.name: x for node in plan.find(Times) if (x := _gelu_of(plan, node)) is not None}
    if not found:
        return draft
    gelu = Function("gelu_tanh")
    nodes = [replace(n, op=gelu, args=(found[n.name],)) if n.name in found else n for n in plan.nodes]
    return draft.with_(plan.with_nodes(nodes).without_dead_lines())


def _gelu_of(plan: Plan, node: Node) -> str | None:
    for half, other in (node.args, node.args[::-1]):
        x = _scaled(plan, half, 0.5)
        one = plan.node(other)
        if x is None or not isinstance(one.op, AddScalar) or one.op.value != 1.0:
            continue
        tanh = plan.node(one.args[0])
        if not isinstance(tanh.op, Function) or tanh.op.function != "tanh":
            continue
        inner = _scaled(plan, tanh.args[0], _SCALE)
        if inner is not None and _is_cubic(plan, plan.node(inner), x):
            return x
    return None


def _is_cubic(plan: Plan, node: Node, x: str) -> bool:
    """Whether the line is x + 0.044715 x^3."""
    if not isinstance(node.op, Add) or x not in node.args:
        return False
    cube = _scaled(plan, node.args[1 - node.args.index(x)], _CUBIC)
    return cube is not None and plan.node(cube).op == Function("integer_power", (3.0,)) and plan.node(cube).args == (x,)


def _scaled(plan: Plan, name: str, factor: float) -> str | None:
    """Of what the line is this multiple."""
    node = plan.node(name)
    if isinstance(node.op, MulScalar) and abs(node.op.value / factor - 1) < _NEAR:
        return node.args[0]
    return None
