"""Ranges that are measured where proofs do not fit: margins, what the plan says of them, and warnings."""

from __future__ import annotations

import warnings

import pytest
import torch
from models import seeded
from test_capture import random
from torch import nn

import tacit
from tacit.ir.errors import PlanError
from tacit.ir.plan import Plan
from tacit.ir.view.leakage import leakage
from tacit.passes.bound import FREE_BITS

Tensor = torch.Tensor


def deep(layers: int = 12) -> nn.Module:
    """Proofs lose a bit or two in each layer."""
    torch.manual_seed(0)
    blocks = [layer for _ in range(layers) for layer in (nn.Linear(32, 32), nn.ReLU())]
    for layer in blocks[::2]:
        nn.init.kaiming_normal_(layer.weight)  # type: ignore[arg-type]
    return nn.Sequential(*blocks, nn.Linear(32, 4)).eval()


def told(model: nn.Module, x: Tensor, **options: object) -> tuple[tacit.Secure, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        secure = tacit.compile(model, x, **options)  # type: ignore[arg-type]
    assert {w.category for w in caught} <= {tacit.RangeWarning}
    return secure, [str(w.message) for w in caught]


def test_a_deep_network_compiles_from_one_row_and_says_what_stands_behind_it() -> None:
    model, x = deep(50), random(1, 32)
    secure, said = told(model, x)
    assert secure.plan.ranges == "measured" and "ranges=measured" in str(secure.plan)
    assert len(said) == 1 and "1 of the example" in said[0] and "calibration=x" in said[0]
    inputs = random(20, 32, seed=5)
    with torch.no_grad():
        expected = model(inputs)
    assert float((secure.check(inputs) - expected).abs().max()) < 2**-8 * float(expected.abs().max())
    secure.reference(inputs, check=True)
    with pytest.raises(tacit.CompileError, match='ranges="auto"'):
        tacit.compile(model, x, ranges="proved")


def test_the_warning_is_of_few_rows_alone() -> None:
    model, x, many = deep(50), random(2, 32), random(64, 32, seed=3)
    assert told(model, x)[1]
    assert not told(model, x, calibration=many)[1]
    assert not told(model, many)[1]
    secure, said = told(deep(3), x)  # proofs fit
    assert secure.plan.ranges == "proved" and not said
    secure, said = told(deep(3), x, calibration=many)  # also where there is calibration data
    assert secure.plan.ranges == "proved" and not said


@pytest.mark.parametrize("margin", [2, 16, 256])
def test_a_margin_is_room_for_so_many_times_what_was_seen(margin: int) -> None:
    model, x = deep(), random(64, 32)
    secure, _ = told(model, x, ranges="measured", margin=margin, input_range=(-1, 1))
    lines = [node for node in secure.plan.nodes if node.margin]
    assert lines and {node.margin for node in lines} == {margin}
    for node in lines:
        assert node.type.width + FREE_BITS <= node.type.ring
    bytes_of = {m: told(deep(30), x, ranges="measured", margin=m)[0].plan.cost().online_bytes for m in (2, 256)}
    assert bytes_of[2] < bytes_of[256]


def test_plan_report_and_statement_name_the_measured_lines() -> None:
    secure, _ = told(deep(50), random(2, 32), margin=(4, 16))
    lines = [node for node in secure.plan.nodes if node.margin]
    text = str(secure.plan)
    assert Plan.parse(text) == secure.plan and text.count(" ~16x ") + text.count(" ~8x ") + text.count(" ~4x ") == len(
        lines
    )
    statement = " ".join(leakage(secure.plan).assumptions)
    assert all(f"%{node.name}" in statement for node in lines) and "16 times as large" in statement
    html = secure.plan._repr_html_()
    assert f"but for {len(lines)} lines that were measured" in html


def test_a_margin_in_a_plan_is_verified() -> None:
    secure, _ = told(deep(50), random(2, 32))
    text = str(secure.plan)
    for wrong in ("~0x", "~1x", "~99999999x", "~x"):
        with pytest.raises(PlanError):
            Plan.parse(text.replace("~16x", wrong, 1))
    with pytest.raises(PlanError, match="proved or measured"):
        Plan.parse(text.replace("ranges=measured", "ranges=calibrated_2x"))
    with pytest.raises(PlanError):
        Plan.parse(text.replace("ranges=measured", "ranges=proved"))


@pytest.mark.parametrize("margin", [0, 1, 3, 2.5, "much", (16, 4), (4, 8, 16), True, 1 << 20, None])
def test_margins_are_powers_of_two(margin: object) -> None:
    with pytest.raises(tacit.CompileError, match="margin has to be a power of two"):
        tacit.compile(deep(1), random(2, 32), margin=margin)  # type: ignore[arg-type]


@pytest.mark.parametrize("ranges", ["calibrated", 1, None, ""])
def test_ranges_are_auto_proved_or_measured(ranges: object) -> None:
    with pytest.raises(tacit.CompileError, match="ranges has to be one of auto, proved, measured"):
        tacit.compile(deep(1), random(2, 32), ranges=ranges)  # type: ignore[arg-type]


def test_small_and_huge_weights_keep_their_digits() -> None:
    x = torch.rand(20, 12, generator=torch.Generator().manual_seed(0))
    for size in (1e-4, 1e-2, 1e4, 1e9):
        model = seeded(nn.Sequential(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 3)))
        with torch.no_grad():
            for value in model[2].parameters():  # type: ignore[union-attr]
                value.mul_(size)
        secure = tacit.compile(model, x, input_range=(0, 1))
        with torch.no_grad():
            wanted = model(x)
        assert float((secure(x) - wanted).abs().max()) < 2**-6 * float(wanted.abs().max())
