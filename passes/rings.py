"""Rings: values whose ranges allow it live in Z_2^32, at half the bytes and half the arithmetic of Z_2^64."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import networkx as nx

from tacit.ir.ops.linear import Product
from tacit.ir.plan import Node, Plan
from tacit.ir.types import SMALL_RING_BITS, Type
from tacit.passes.bound import FREE_BITS, bounded
from tacit.passes.draft import Draft
from tacit.passes.forms import work
from tacit.passes.lower import lower_to_protocol
from tacit.passes.quantise import EXTRA_WEIGHT_BITS, expand_to_fixed_point, fuse_truncation_into_relu
from tacit.passes.trial import CLOSE, misses

# The suite whose protocols work in both rings.
_SUITE = "fused"


def choose_rings(draft: Draft) -> Draft:
    """Give every value Z_2^32 where its range and those of all values that share its ring fit, else Z_2^64.

    Truncations, alone or fused into a ReLU, bring a value from either ring into either; whatever else an op reads
    or gives is in one ring.
    """
    plan = draft.plan
    if plan.protocol == _SUITE:
        small: set[str] = set().union(*_fitting(plan))
        plan = plan.with_nodes(_placed(node) if node.name in small else node for node in plan.nodes)
    return draft.with_(plan)


def _shared_rings(plan: Plan) -> list[set[str]]:
    """The lines, in sets that have to share a ring."""
    graph: nx.Graph[str] = nx.Graph()
    graph.add_nodes_from(plan.by_name)
    graph.add_edges_from((node.name, arg) for node in plan.nodes if not node.op.changes_ring for arg in node.args)
    return list(nx.connected_components(graph))


def _fitting(plan: Plan) -> list[set[str]]:
    """Those that fit Z_2^32."""
    free = _free_bits(plan)
    return [part for part in _shared_rings(plan) if _least_ring(plan, part, free) <= SMALL_RING_BITS]


def _free_bits(plan: Plan) -> dict[str, int]:
    """How many bits of its ring a value leaves free: none where it is proved from proved ones."""
    found: dict[str, int] = {}
    for node in plan.nodes:
        measured = node.margin or any(found[arg] for arg in node.args)
        found[node.name] = FREE_BITS if measured else 0
    return found


def _least_ring(plan: Plan, part: set[str], free: Mapping[str, int]) -> float:
    """The bits of the smallest ring in which these values, and what reads them, work; infinite where an op has one."""
    bits = 1.0
    for name in part:
        node = plan.node(name)
        if node.type.kind != "masked":
            bits = max(bits, node.type.width + free[name])
        for op in (node.op, *(user.op for user in plan.users(name))):
            bits = bits if SMALL_RING_BITS in op.rings else math.inf
        for user in plan.users(name):
            bits = max(bits, user.op.least_ring(*plan.arg_types(user)) + free[name])
    return bits


def _placed(node: Node) -> Node:
    """The line in Z_2^32."""
    op = replace(node.op, ring=SMALL_RING_BITS) if node.op.changes_ring else node.op  # type: ignore[type-var]
    return replace(node, op=op, type=_in_small_ring(node.type))


def _in_small_ring(declared: Type) -> Type:
    return declared.with_(ring=SMALL_RING_BITS, width=min(declared.width, SMALL_RING_BITS))


@dataclass(frozen=True)
class _Spare:
    """Lines that would share Z_2^32 with smaller margins, and so many fewer bits in the weights of its products."""

    margins: Mapping[str, int]  # of measured lines
    bits: int
    lines: frozenset[str]
    origins: frozenset[str]  # of the products, at the model level
    work: int


def fit_small_ring(draft: Draft) -> Draft:
    """Values that miss Z_2^32 by a few bits get a smaller margin, where they are measured; then, fewer weight bits.

    A margin is cheap but where it costs the small ring: it shrinks there as far as it may. Weights have four bits more
    than activations, from which only rounding profits. They are given up for all such products, or else for those with
    the most work, as far as the logits of the probes stay accurate. The network is then written and bounded anew.
    """
    model, draft = draft.model, replace(draft, model=None)  # its weights are not needed any longer
    if model is None or draft.plan.protocol != _SUITE:
        return draft
    model = replace(model, ranges=draft.ranges)
    chosen = sorted(_candidates(draft), key=lambda spare: -spare.work)
    while chosen:
        margins = {name: margin for spare in chosen for name, margin in spare.margins.items()}
        again = replace(_spared(model, chosen), margins=margins)
        tried = bounded(fuse_truncation_into_relu(expand_to_fixed_point(again)))
        fitting: set[str] = set().union(*_fitting(lower_to_protocol(tried).plan))
        kept = [spare for spare in chosen if spare.lines <= fitting]
        if kept == chosen:
            kept = _accurate(model, chosen)
            if kept == chosen:
                return replace(tried, model=None)
        del tried  # its weights, before the next ones
        chosen = kept
    return draft


def _spared(model: Draft, chosen: list[_Spare]) -> Draft:
    return replace(model, spared={origin: spare.bits for spare in chosen for origin in spare.origins if spare.bits})


def _accurate(model: Draft, chosen: list[_Spare]) -> list[_Spare]:
    """Those with the most work, halved until the logits are accurate: cheaper than new bounds for each half.

    Allowed is the error as it is, or twice what `choose_scale` wants, which extrapolates.
    """
    free = [spare for spare in chosen if not spare.bits]
    dear = [spare for spare in chosen if spare.bits]
    missed = _missed(model, dear)
    limit = CLOSE if missed <= CLOSE else max(CLOSE, float(misses(model).max()))
    while missed > limit:
        dear = dear[: len(dear) // 2]
        missed = _missed(model, dear)
    return [spare for spare in chosen if spare in free or spare in dear]


def _missed(model: Draft, dear: list[_Spare]) -> float:
    return float(misses(_spared(model, dear)).max()) if dear else 0.0


def _candidates(draft: Draft) -> list[_Spare]:
    plan = lower_to_protocol(draft).plan
    free, found = _free_bits(plan), []
    least, wanted = draft.margin
    for part in _shared_rings(plan):
        excess = _least_ring(plan, part, free) - SMALL_RING_BITS
        products = [plan.node(name) for name in part if isinstance(plan.node(name).op, Product)]
        measured = [name for name in part if plan.node(name).margin]
        shrunk = min(excess, math.log2(wanted / least)) if measured else 0.0
        bits = excess - shrunk
        if excess > 0 and (bits <= 0 or (products and bits <= EXTRA_WEIGHT_BITS)):
            found.append(
                _Spare(
                    {name: wanted >> int(shrunk) for name in measured},
                    int(bits),
                    frozenset(part),
                    frozenset(node.origin for node in products),
                    sum(work(plan, node) for node in products),
                )
            )
    return found
