"""Passes of the model level: drop what changes nothing, fold batch norm, put max pool before ReLU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from tacit.ir.ops.affine import BatchNorm, Convolving, Linear
from tacit.ir.ops.arithmetic import Add, Mul
from tacit.ir.ops.layer import Layer
from tacit.ir.ops.model import Argmax, NoOp
from tacit.ir.ops.moves import Reshape
from tacit.ir.ops.pooling import MaxPool2d
from tacit.ir.ops.roles import Weight
from tacit.ir.ops.softmax import Softmax
from tacit.ir.plan import Node, Plan
from tacit.ir.types import Type
from tacit.passes.draft import Draft

Tensor = torch.Tensor


def drop_no_ops(draft: Draft) -> Draft:
    """Remove dropout in evaluation, copies, and reshapes to the shape a value already has.

    A weight that the model has under two names, as a table that is its head as well, is shared once.
    """
    plan = draft.plan
    aliases, first = {}, dict[tuple[object, ...], str]()
    for node in plan.nodes:
        if isinstance(node.op, Weight):
            value = draft.weights[node.op.label]
            key = (value.data_ptr(), value.shape, value.stride(), value.dtype)
            if value.numel() and first.setdefault(key, node.name) != node.name:
                aliases[node.name] = first[key]
        same = isinstance(node.op, Reshape) and plan.node(node.args[0]).type == node.type
        if isinstance(node.op, NoOp) or same:
            aliases[node.name] = node.args[0]
    return draft.with_(_without(plan, aliases))


def drop_softmax_before_argmax(draft: Draft) -> Draft:
    """Remove softmax and log_softmax whose only use is an argmax: both are increasing."""
    plan = draft.plan
    aliases = {
        node.name: node.args[0]
        for node in plan.find(Softmax)
        if node.name != plan.result
        and isinstance(node.op, Softmax)
        and node.op.dim == 1  # over the classes, as the argmax
        and all(isinstance(user.op, Argmax) for user in plan.users(node.name))
    }
    return draft.with_(_without(plan, aliases))


def _without(plan: Plan, aliases: Mapping[str, str]) -> Plan:
    """The plan with lines replaced by one of their operands."""

    def final(name: str) -> str:
        while name in aliases:
            name = aliases[name]
        return name

    nodes = [replace(n, args=tuple(map(final, n.args))) for n in plan.nodes if n.name not in aliases]
    return plan.with_nodes(nodes, result=final(plan.result))


def fold_batch_norm(draft: Draft) -> Draft:
    """Fold batch norm into the convolution or linear layer before it; where there is none, make it x * a + b.

    Folding needs the layer to have no other use. It saves a product, an opening and a truncation.
    """
    plan, weights = draft.plan, dict(draft.weights)
    while found := plan.find(BatchNorm):
        node = found[0]
        _, *labels = (_label(plan, arg) for arg in node.args)
        gamma, beta, mean, variance = (weights[label].double() for label in labels)
        factor = gamma / torch.sqrt(variance + node.op.eps)  # type: ignore[attr-defined]
        layer = plan.node(node.args[0])
        if _channels_come_from(layer) and len(plan.users(layer.name)) == 1:
            plan = _fold(plan, node, layer, weights, factor, beta - mean * factor)
        else:
            plan = _scale_and_shift(plan, node, weights, factor, beta - mean * factor)
    used = {n.op.label for n in plan.nodes if isinstance(n.op, Weight)}
    return draft.with_(plan, {label: value for label, value in weights.items() if label in used})


def _channels_come_from(layer: Node) -> bool:
    """Whether dimension 1, which batch norm scales, is the one that the layer's weight produces."""
    return isinstance(layer.op, Convolving) or (isinstance(layer.op, Linear) and len(layer.type.shape) == 2)


def _label(plan: Plan, name: str) -> str:
    op = plan.node(name).op
    return op.label if isinstance(op, Weight) else ""


def _fold(plan: Plan, node: Node, layer: Node, weights: dict[str, Tensor], factor: Tensor, shift: Tensor) -> Plan:
    """W' = factor W, b' = factor b + shift, under labels of their own: the originals may have other uses."""
    assert isinstance(layer.op, (Convolving, Linear))
    old = weights[_label(plan, layer.args[1])]
    bias = weights[_label(plan, layer.args[2])] if len(layer.args) > 2 else torch.zeros_like(shift)
    folded = {
        f"{layer.path or layer.name}.folded_weight": layer.op.scaled(old, factor),
        f"{layer.path or layer.name}.folded_bias": bias * factor + shift,
    }
    new = [_weight_node(plan, label, value, weights) for label, value in folded.items()]
    merged = replace(layer, name=node.name, args=(layer.args[0], *(n.name for n in new)), type=node.type)
    return _replaced(plan, {layer.name: [], node.name: [*new, merged]})


def _scale_and_shift(plan: Plan, node: Node, weights: dict[str, Tensor], factor: Tensor, shift: Tensor) -> Plan:
    spatial = len(node.type.shape) - 2
    prefix = node.path or node.name
    values = {f"{prefix}.factor": factor, f"{prefix}.shift": shift}
    scale, offset = (
        _weight_node(plan, label, value.reshape(-1, *[1] * spatial), weights) for label, value in values.items()
    )
    product = replace(node, name=f"{node.name}_scaled", op=Mul(), args=(node.args[0], scale.name))
    total = replace(node, op=Add(), args=(product.name, offset.name))
    return _replaced(plan, {node.name: [scale, offset, product, total]})


def _weight_node(plan: Plan, label: str, value: Tensor, weights: dict[str, Tensor]) -> Node:
    label = label.replace(" ", "_")
    while label in weights:
        label += "_"
    weights[label] = value
    name = "w_" + "".join(c if c.isalnum() else "_" for c in label)
    return Node(name, Weight(label), (), Type("real", tuple(value.shape)))


def _replaced(plan: Plan, new: Mapping[str, list[Node]]) -> Plan:
    nodes = [piece for node in plan.nodes for piece in new.get(node.name, [node])]
    live = {plan.result}
    for node in reversed(nodes):
        live.update(node.args if node.name in live or not isinstance(node.op, Weight) else ())
    return plan.with_nodes(n for n in nodes if not isinstance(n.op, Weight) or n.name in live)


def move_max_pool_before_relu(draft: Draft) -> Draft:
    """ReLU then max pool becomes max pool then ReLU, where the ReLU has no other use; likewise for clamps.

    They are increasing, so they commute with a maximum; a window of n then needs one ReLU instead of n.
    """
    plan = draft.plan
    for pool in plan.find(MaxPool2d):
        relu = plan.node(pool.args[0])
        if (
            isinstance(relu.op, Layer)
            and relu.op.increasing
            and len(plan.users(relu.name)) == 1
            and relu.name != plan.result
        ):
            source = plan.node(relu.args[0])
            first = replace(pool, name=relu.name, args=(source.name,))
            second = replace(relu, name=pool.name, args=(relu.name,), type=pool.type)
            plan = plan.with_nodes({relu.name: first, pool.name: second}.get(n.name, n) for n in plan.nodes)
    return draft.with_(plan)
