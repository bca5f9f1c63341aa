"""Affine forms: they hold whatever they are made of, lose nothing of what is affine, and stay cheap."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from test_capture import Model, random
from test_ops import operands, params, single
from torch import nn

import tacit
from tacit.driver import prepare
from tacit.ir.forms import Form
from tacit.ir.op import Level, Sample
from tacit.ir.ops.linear import Product
from tacit.ir.ops.roles import Input, Weight
from tacit.ir.ranges import Interval
from tacit.ir.types import dim_at
from tacit.passes import Draft, stages
from tacit.passes import forms as forms_module
from tacit.passes.bound import intervals
from tacit.passes.forms import Forms
from tacit.runtime.reference import Oracle

Tensor = torch.Tensor
UNKNOWNS = 3


class Drawn(Oracle):
    """Truncations with offsets drawn anew."""

    def __init__(self) -> None:
        super().__init__(chance=torch.Generator().manual_seed(2))


def some_form(shape: torch.Size, bits: int, generator: torch.Generator) -> Form:
    def draw(*size: int) -> Tensor:
        reach = 1 << max(1, bits)
        return torch.randint(-reach, reach + 1, size, generator=generator).double()

    return Form(draw(*shape), draw(UNKNOWNS, *shape), draw(*shape).abs() / 2)


@pytest.mark.parametrize(**params(Level.FIXED))
def test_the_form_of_a_result_holds_for_the_same_unknowns(sample: Sample) -> None:
    """Each op on random members of random forms, at every corner of the unknowns and beside."""
    plan = single(sample, Level.FIXED)
    generator = torch.Generator().manual_seed(0)
    weights, _ = operands(plan, 40)
    args: dict[str, Form | Tensor] = {}
    constants: set[str] = set()
    for node in plan.nodes:
        if isinstance(node.op, Weight):
            constants.add(node.name)
            args[node.name] = (weights[node.op.label] >> max(0, node.type.width - 16)).double()
        elif isinstance(node.op, Input):
            bits = min(node.type.width, 30) - 5
            args[node.name] = some_form(torch.Size(node.type.at(1).dims[1:]), bits, generator)
    node = plan.node(plan.result)
    if any(dim_at(plan.node(name).type.shape[0], 1) != 1 for name in (*node.args, node.name) if name not in constants):
        return  # rows of a form are no batch
    found = node.op.form(*(args[arg] for arg in node.args))
    if found is None:
        assert not isinstance(node.op, Product) or all(isinstance(args[arg], Form) for arg in node.args)
        return
    corners = torch.tensor([*itertools.product((-1.0, 1.0), repeat=UNKNOWNS)], dtype=torch.float64)
    unknowns = torch.cat([corners, 2 * torch.rand(24, UNKNOWNS, generator=generator, dtype=torch.float64) - 1])
    values = []
    for arg in node.args:
        form = args[arg]
        if isinstance(form, Tensor):
            values.append(form.long())
            continue
        off = torch.randint(-1, 2, (len(unknowns), *form.radius.shape), generator=generator) * form.radius
        exact = form.centre + torch.einsum("ek,k...->e...", unknowns, form.terms) + off
        values.append(torch.where(off > 0, exact.floor(), exact.ceil()).long())  # an integer, no further off
    result = node.op.reference(Drawn(), *values).double()
    away = (result - found.centre - torch.einsum("ek,k...->e...", unknowns, found.terms)).abs()
    assert bool((away <= found.radius + 1.0 * (found.radius > 0) + 0.5).all()), float((away - found.radius).max())


def drafted(model: nn.Module, x: Tensor, **options: Any) -> Draft:
    draft = prepare(model, x, frac_bits=12, input_range=(-1, 1), **options)
    return next(found for name, found in stages(draft) if name == "fuse_truncation_into_relu")


def widest(draft: Draft) -> float:
    *_, last = intervals(draft)
    low, high = (end / 2.0**last.node.type.frac for end in last.interval.ends)
    return max(-low, high)


def plain(draft: Draft, monkeypatch: pytest.MonkeyPatch) -> float:
    """As `widest`, by intervals alone."""
    with monkeypatch.context() as patch:
        patch.setattr(Forms, "narrowed", lambda self, node, interval, operands: interval)
        return widest(draft)


def test_layers_without_a_kink_lose_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 20), nn.Linear(20, 20), nn.Linear(20, 3)).eval()
    draft = drafted(model, random(2, 6))
    with torch.no_grad():
        corners = model(torch.tensor([*itertools.product((-1.0, 1.0), repeat=6)]))
    exact = float(corners.abs().max())
    assert exact <= widest(draft) < 1.01 * exact
    assert plain(draft, monkeypatch) > 2 * exact


@pytest.mark.parametrize(
    ("name", "function", "factor"),
    [
        ("what is subtracted again", lambda m, x: m.a(x) - 0.9 * m.a(x), 5.0),
        ("a difference from the mean", lambda m, x: (y := m.a(x)) - y.mean(1, keepdim=True), 1.2),
        ("there and back", lambda m, x: torch.cat([x, -x], 1) @ torch.ones(16, 2) + m.a(x)[:, :2], 2.0),
    ],
)
def test_errors_of_one_origin_cancel(name: str, function: Any, factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    draft = drafted(Model(function, a=nn.Linear(8, 8)).eval(), random(2, 8))
    assert widest(draft) * factor < plain(draft, monkeypatch)


def test_a_bit_in_two_layers_with_relus(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    blocks = [layer for _ in range(8) for layer in (nn.Linear(32, 32), nn.ReLU())]
    draft = drafted(nn.Sequential(*blocks, nn.Linear(32, 4)).eval(), random(2, 32))
    assert widest(draft) * 16 < plain(draft, monkeypatch)


def test_no_input_leaves_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Corners of the input range that are good at it: the signs of gradients."""
    torch.manual_seed(1)
    blocks = [layer for _ in range(3) for layer in (nn.Linear(12, 12), nn.ReLU())]
    model = nn.Sequential(*blocks, nn.Linear(12, 2)).eval()
    secure = tacit.compile(model, random(2, 12), input_range=(-1, 1), ranges="proved")
    x = torch.rand(64, 12) * 2 - 1
    for _ in range(20):
        x = x.requires_grad_()
        (gradient,) = torch.autograd.grad(model(x).abs().sum(), x)
        x = (x.detach() + 0.3 * gradient.sign()).clamp(-1, 1)
    x = torch.cat([x, x.sign()])
    with torch.no_grad():
        expected = model(x)
    assert float((secure.reference(x, check=True) - expected).abs().max()) < 2**-8


def test_they_are_as_many_as_that_is_cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """None where each unknown would go through a large network; behind a pool, where the rest is small, some."""
    counts: dict[str, int] = {}
    narrowed = Forms.narrowed

    def counted(self: Forms, node: Any, interval: Interval, operands: Any) -> Interval:
        found = narrowed(self, node, interval, operands)
        counts[node.op.name] = self._unknowns
        return found

    monkeypatch.setattr(Forms, "narrowed", counted)
    model = nn.Sequential(
        nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU(), nn.AdaptiveMaxPool2d(1), nn.Flatten(),
        nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4),
    )  # fmt: skip
    draft = drafted(model.eval(), torch.zeros(2, 3, 64, 64))
    list(intervals(draft))
    assert counts["input"] == counts["fixed.conv2d"] == 0
    assert counts["fixed.linear"] >= 64
    work = sum(forms_module.work(draft.plan, node) for node in draft.plan.nodes if node.op.name == "fixed.linear")
    assert counts["fixed.linear"] * work < forms_module._CHEAP
