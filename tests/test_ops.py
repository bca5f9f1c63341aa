"""The generic suites: every op of the registry, over its samples."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
import torch
from harness import clear_values, operands, params, run_plan, samples, single

from tacit.ir.build import Builder
from tacit.ir.cost import P0, P1, P2
from tacit.ir.errors import CompileError, PlanError
from tacit.ir.op import Level, Op, Program, Sample, inferred
from tacit.ir.ops.model import ModelOp
from tacit.ir.ops.spline import FixedFunction
from tacit.ir.plan import Node, Plan
from tacit.ir.types import bits_for
from tacit.passes import Draft
from tacit.passes.lower import SUITES, hoist_weight_openings, lower_to_protocol, reveal_result
from tacit.runtime.party import _Running
from tacit.runtime.reference import interpret
from tacit.runtime.session import Session

BATCHES = (1, 7, 200)


def test_every_op_has_samples() -> None:
    named = {name for level in Level for name, _ in samples(level)}
    assert {name.split("-")[0] for name in named} == set(Op.registry)
    for name, op in Op.registry.items():
        small = {n for n, _ in samples(Level.PROTOCOL) if n.split("-")[0] == name and "-r" in n}
        assert bool(small) == (32 in op.rings and Level.PROTOCOL in op.levels), name


@pytest.mark.parametrize(**params(Level.PROTOCOL))
def test_secure_run_equals_oracle_bit_for_bit(sample: Sample) -> None:
    plan = single(sample)
    for batch in (1, 3, 40):
        _, _, _, trace, brought = run_plan(plan, batch)
        clear = clear_values(plan, brought, trace)
        for name, value in trace.values.items():
            assert value.dtype == plan.node(name).type.dtype
            assert torch.equal(value, clear[name].to(value.dtype)), f"%{name} at batch {batch}"


@pytest.mark.parametrize(**params(Level.PROTOCOL))
def test_declared_cost_equals_counted_cost(sample: Sample) -> None:
    plan = single(sample)
    for batch in BATCHES:
        session, dealt, run, _, _ = run_plan(plan, batch)
        cost = plan.cost(batch=batch)
        assert run.rounds == cost.rounds
        assert run.online_links == cost._links("online")
        assert dealt.meter.traffic == cost._links("offline")
        assert session.weight_meter.bytes == cost.session_bytes


@pytest.mark.parametrize(**params(Level.PROTOCOL))
def test_all_parties_take_as_many_steps_as_there_are_rounds(sample: Sample, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else what they send in one round is not what the others expect in it, once ops run side by side."""
    steps: Counter[tuple[str, int]] = Counter()
    advance = _Running.advance

    def counted(self: _Running, node: Node, program: Program, received: object) -> None:
        steps[node.name, self.rank] += received is not None
        advance(self, node, program, received)  # type: ignore[arg-type]

    monkeypatch.setattr(_Running, "advance", counted)
    plan = single(sample)
    run_plan(plan, 3)
    for entry in plan.cost(batch=3).per_op:
        for rank in set(plan.node(entry.name).op.roles) & {P0, P1, P2}:
            assert steps[entry.name, rank] == entry.cost.rounds, (entry.name, rank)


@pytest.mark.parametrize(**params(Level.PROTOCOL))
def test_dealer_deals_exactly_the_requirements(sample: Sample) -> None:
    plan = single(sample)
    for batch in BATCHES:
        _, dealt, _, _, _ = run_plan(plan, batch)
        declared = [requirement.item for requirement in plan.requirements(batch=batch)]
        for party, inventory in dealt.inventory.items():
            assert inventory == declared, f"party {party}"


@pytest.mark.parametrize(**params(Level.PROTOCOL))
def test_text_round_trip(sample: Sample) -> None:
    plan = single(sample)
    assert Plan.parse(str(plan)) == plan


@pytest.mark.parametrize(**params(Level.FIXED))
def test_text_round_trip_of_fixed_level(sample: Sample) -> None:
    plan = single(sample, Level.FIXED)
    assert Plan.parse(str(plan)) == plan


@pytest.mark.parametrize("level", [Level.FIXED, Level.PROTOCOL])
def test_bad_operands_are_rejected(level: Level) -> None:
    for name, sample in samples(level):
        wrong_kind = tuple(dataclasses.replace(t, kind="client") for t in sample.args)
        with pytest.raises(PlanError):
            pytest.fail(f"{name} accepted operands of the wrong kind: {sample.op.infer(*wrong_kind)}")
        plan = single(sample, level)
        if not sample.op.declares:
            last = plan.node("out")
            short = dataclasses.replace(last, args=last.args[:-1])
            with pytest.raises(PlanError, match="\\^"):
                plan.with_nodes(short if n is last else n for n in plan.nodes).verify()
            shifted = dataclasses.replace(last, type=last.type.with_(frac=last.type.frac + 1))
            with pytest.raises(PlanError, match="declared"):
                plan.with_nodes(shifted if n is last else n for n in plan.nodes).verify()


MISFITS = [(name, i, s) for name, op in sorted(Op.registry.items()) for i, s in enumerate(op.misfits())]


@pytest.mark.parametrize("sample", [s for *_, s in MISFITS], ids=[f"{name}-{i}" for name, i, _ in MISFITS])
def test_what_a_plan_may_not_say_is_refused(sample: Sample) -> None:
    """By the verifier, in memory and as text: nothing that is printed and sealed is ignored."""
    with pytest.raises(PlanError):
        sample.op.infer(*sample.args)
    good = single(dict(samples(Level.PROTOCOL))[f"{sample.op.name}-0"])
    same = type(sample.op)
    try:
        inferred(sample.op, good.arg_types(next(node for node in good.nodes if type(node.op) is same)))
        return  # it is the operands that do not fit
    except PlanError:
        pass
    plan = good.with_nodes(dataclasses.replace(n, op=sample.op) if type(n.op) is same else n for n in good.nodes)
    with pytest.raises(PlanError, match="\\^"):
        plan.verify()
    try:
        text = str(plan)
    except PlanError:  # it cannot even be written down
        return
    with pytest.raises(PlanError, match="\\^"):
        Plan.parse(text)


def test_a_header_that_lies_is_refused() -> None:
    plan = single(dict(samples(Level.PROTOCOL))["relu-0"])
    for changes in ({"reveal": "argmax"}, {"reveal": "correct"}, {"reveal": "nothing"}, {"protocol": "securenn"}):
        with pytest.raises(PlanError):
            dataclasses.replace(plan, **changes).verify()
    argmax = single(dict(samples(Level.PROTOCOL))["argmax-0"])
    assert dataclasses.replace(argmax, reveal="argmax").verify()


def test_a_plan_reveals_its_answer_alone() -> None:
    plan = single(dict(samples(Level.PROTOCOL))["relu-0"])
    answer = plan.node(plan.result)
    other = dataclasses.replace(answer, name="z", args=("x0",), type=plan.node("x0").type.with_(kind="client"))
    with pytest.raises(PlanError, match="the answer is"):
        plan.with_nodes([*plan.nodes, other]).verify()
    with pytest.raises(PlanError, match="reveals no answer"):
        Session(plan.with_nodes(plan.nodes[:-1], result="out"), {})


def test_labels_are_of_one_line_each() -> None:
    plan = single(dict(samples(Level.PROTOCOL))["add-0"])
    second = dataclasses.replace(plan.node("x1"), op=plan.node("x0").op)
    with pytest.raises(PlanError, match="two lines are input x0"):
        plan.with_nodes(second if n.name == "x1" else n for n in plan.nodes).verify()


@pytest.mark.parametrize(**params(Level.FIXED))
def test_bounds_hold_for_values_at_the_edges(sample: Sample) -> None:
    plan = single(sample, Level.FIXED)
    from tacit.ir.ops.roles import Input, Weight
    from tacit.ir.ranges import Interval
    from tacit.runtime.reference import Oracle

    weights, inputs = operands(plan, 40)
    values, bounds = {}, {}
    for node in plan.nodes:
        if isinstance(node.op, Weight):
            values[node.name] = weights[node.op.label] >> max(0, node.type.width - 20)
            bounds[node.name] = Interval.exactly(values[node.name])
        elif isinstance(node.op, Input):
            values[node.name] = inputs[node.op.label] >> max(0, node.type.width - 30)
            low, high = float(values[node.name].min()), float(values[node.name].max())
            bounds[node.name] = Interval.full(node.type.at(1).dims[1:], low, high)
        else:
            values[node.name] = node.op.reference(Oracle(), *(values[a] for a in node.args))
            bounds[node.name] = node.op.bound(*(bounds[a] for a in node.args))
    out, bound = values[plan.result].double(), bounds[plan.result]
    assert bool((out >= bound.low).all()) and bool((out <= bound.high).all())


@pytest.mark.parametrize("suite", sorted(SUITES))
def test_both_suites_implement_every_op_of_the_fixed_level(suite: str) -> None:
    """Lower each fixed-level op by the suite; the secure result equals the fixed-level meaning."""
    for name, sample in samples(Level.FIXED):
        if Level.PROTOCOL in sample.op.levels or getattr(sample.op, "drop", 0):
            continue
        if isinstance(sample.op, FixedFunction):  # range analysis replaces it
            continue
        fixed = single(sample, Level.FIXED, suite)
        draft = hoist_weight_openings(reveal_result(lower_to_protocol(Draft(fixed, {}, {}, interpret))))
        _, _, _, trace, brought = run_plan(draft.plan.verify(), 5)
        # The textbook ReLU truncates in a line of its own; the offsets are the same list.
        offsets = [t for line in trace.offsets.values() for t in line]
        clear = clear_values(fixed, brought, dataclasses.replace(trace, offsets={"out": offsets}))
        assert torch.equal(trace.values["out"], clear["out"]), name


@pytest.mark.parametrize(**params(Level.MODEL))
def test_model_op_infers_what_torch_computes(sample: Sample) -> None:
    if not isinstance(sample.op, ModelOp):
        return
    generator = torch.Generator().manual_seed(0)
    for batch in (2, 4):
        args = [torch.rand(t.at(batch).dims, generator=generator, dtype=torch.float64) for t in sample.args]
        result = sample.op.reference(None, *args)
        assert tuple(result.shape) == sample.op.infer(*sample.args).at(batch).dims


def test_builder_names_module_and_source_of_a_type_error() -> None:
    b = Builder(Level.MODEL)
    linear = next(s for n, s in samples(Level.MODEL) if n == "model.linear-0")
    names = [b.declare(Op.registry["weight"]("w"), t.at(1), name=f"v{i}") for i, t in enumerate(linear.args)]
    with b.at("encoder.fc", "model.py:7"), pytest.raises(CompileError, match=r"encoder.fc.*model.py:7"):
        b.emit(linear.op, names[2], names[1])


def test_widths_leave_a_sixteenth() -> None:
    for magnitude in (0, 1, 14, 15, 16, 2**20, 15 * 2**36, 2**61 - 1):
        width = bits_for(-magnitude, magnitude)
        assert magnitude <= 15 / 16 * 2 ** (width - 1)
        assert width == 1 or magnitude > 15 / 16 * 2 ** (width - 2) or magnitude == 0
