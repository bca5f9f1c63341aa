"""What the suites share: plans around a single op, operands at the edges of their types, deterministic keys."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence

import torch

from tacit.ir import ops as _ops  # noqa: F401  (fills the registry)
from tacit.ir.build import Builder
from tacit.ir.errors import PlanError
from tacit.ir.op import Level, Op, Sample, inferred
from tacit.ir.ops.roles import Input, Mask, Reveal, Weight
from tacit.ir.plan import Plan
from tacit.ir.types import Batch, Type
from tacit.runtime.prf import PAIRS, Keys
from tacit.runtime.session import Dealt, Run, Session, Trace

Tensor = torch.Tensor


def samples(level: Level) -> list[tuple[str, Sample]]:
    """Every sample of every op that may stand at this level, with a name for the test report."""
    out = []
    for name, op in sorted(Op.registry.items()):
        if level in op.levels:
            own = list(enumerate(op.samples()))
            out += [(f"{name}-{i}", sample) for i, sample in own]
            if level is Level.PROTOCOL:
                out += [(f"{name}-{i}-{rings}", small) for i, sample in own for rings, small in in_small_ring(sample)]
    return out


def in_small_ring(sample: Sample) -> list[tuple[str, Sample]]:
    """The sample with its operands, its result, or both in Z_2^32, as wide there as the op takes; none if it cannot."""
    out = []
    for ring, target in ((32, 32), (32, 64), (64, 32)):
        changes: dict[str, int] = {"ring": target} if sample.op.changes_ring else {}
        if ring not in sample.op.rings or target not in sample.op.rings or (ring != target and not changes):
            continue
        if hasattr(sample.op, "window"):
            changes["window"] = min(sample.op.window, ring)
        op = dataclasses.replace(sample.op, **changes)  # type: ignore[type-var]
        for width in (ring, ring - 1, ring - 2):
            args = tuple(_in_ring(t, ring, width) for t in sample.args)
            try:
                inferred(op, args)
                op.parts(*(t.at(1) for t in args))
            except PlanError:
                continue
            out.append((f"r{ring}" if ring == target else f"r{ring}to{target}", Sample(op, args)))
            break
    return out


def _in_ring(declared: Type, ring: int, width: int) -> Type:
    width = ring if declared.kind == "masked" else min(declared.width, width)
    return declared.with_(ring=ring, width=width)


def params(level: Level) -> dict[str, object]:
    """Arguments of pytest.mark.parametrize over all samples of a level."""
    found = samples(level)
    return {"argnames": "sample", "argvalues": [s for _, s in found], "ids": [n for n, _ in found]}


def single(sample: Sample, level: Level = Level.PROTOCOL, protocol: str = "fused") -> Plan:
    """A plan that feeds one op from inputs and weights, and reveals its result."""
    b = Builder(level)
    names: list[str] = []
    for i, declared in enumerate(sample.args):
        if declared.kind == "masked":
            names.append(b.emit(Mask(), names[-1], name=f"mask{i}"))
        elif sample.op.session or not declared.batched:
            names.append(b.declare(Weight(f"w{i}"), declared, name=f"w{i}"))
        else:
            names.append(b.declare(Input(f"x{i}", 0.0, 0.0), declared, name=f"x{i}"))
    result = names[0] if sample.op.declares else b.emit(sample.op, *names, name="out")
    if level is Level.PROTOCOL and sample.op.session:  # something has to be revealed in every plan
        result = b.declare(Input("other", 0.0, 0.0), Type("secret", (Batch(), 2), 0, 8), name="other")
    if level is Level.PROTOCOL and b.types[result].kind == "secret":
        result = b.emit(Reveal(), result, name="y")
    return Plan("single", tuple(b.nodes), result, level, sample.op.suite or protocol).verify()


def edges(declared: Type, shape: Sequence[int], seed: int) -> Tensor:
    """Ring integers all over what a width promises, the extremes and the neighbours of zero among them."""
    generator = torch.Generator().manual_seed(seed)
    most = 2 ** (declared.width - 1) * 15 // 16
    exponents = torch.rand(tuple(shape), generator=generator, dtype=torch.float64) * (declared.width - 1)
    signs = torch.randint(0, 2, tuple(shape), generator=generator) * 2 - 1
    values = (torch.exp2(exponents).to(torch.int64) * signs).clamp(-most, min(most, 2**63 - 1))
    special = torch.tensor([0, 1, -1, most, -most, most - 1, 2, -2])
    flat = values.view(-1)
    flat[: min(len(special), len(flat))] = special[: len(flat)]
    return values


def operands(plan: Plan, batch: int, seed: int = 1) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights and inputs of a plan by label, as ring integers."""
    weights, inputs = {}, {}
    for i, node in enumerate(plan.nodes):
        if isinstance(node.op, Weight):
            weights[node.op.label] = edges(node.type, node.type.dims, seed + i)
        elif isinstance(node.op, Input):
            inputs[node.op.label] = edges(node.type, node.type.at(batch).dims, seed + i)
    return weights, inputs


def fixed_keys(seed: int) -> Keys:
    """Keys for tests alone: the same in every run, different for every seed."""
    return {pair: hashlib.sha256(f"{seed} {pair}".encode()).digest()[:16] for pair in PAIRS}


def run_plan(plan: Plan, batch: int, seed: int = 1) -> tuple[Session, Dealt, Run, Trace, dict[str, Tensor]]:
    """Deal and infer once, laid open; also returns inputs and weights by label."""
    weights, inputs = operands(plan, batch, seed)
    session = Session(plan, weights, keys=fixed_keys(seed))
    dealt = session.deal(batch)
    _, run, trace = session.infer(dealt, inputs, trace=True)
    session.close()
    assert trace is not None
    return session, dealt, run, trace, weights | inputs


def clear_values(plan: Plan, brought: dict[str, Tensor], trace: Trace) -> dict[str, Tensor]:
    """The oracle on ring integers, under the offsets that the secure run recorded."""
    from tacit.runtime.reference import Oracle

    values: dict[str, Tensor] = {}
    for node in plan.nodes:
        if isinstance(node.op, (Input, Weight)):
            values[node.name] = brought[node.op.label]
        else:
            oracle = Oracle(iter(trace.offsets.get(node.name, ())))
            values[node.name] = node.op.reference(oracle, *(values[arg] for arg in node.args))
    return values
