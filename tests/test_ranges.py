"""Ranges: proved ones hold for every input, overflow is found, and the table of errors points at the layer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import models
import pytest
import torch
import torch.nn.functional as F
from models import seeded
from test_capture import Model, random
from test_plans import golden, rewrite  # noqa: F401  (a fixture)
from torch import nn
from typer.testing import CliRunner

import tacit
from tacit import cli
from tacit.driver import prepare
from tacit.ir.ops.linear import Product
from tacit.ir.ops.roles import Input, Weight
from tacit.passes import Draft, stages
from tacit.passes.bound import intervals
from tacit.runtime.reference import Oracle, interpret

Tensor = torch.Tensor

NETWORKS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "perceptron": (nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 9), nn.ReLU(), nn.Linear(9, 4)), (6,)),
    "residual": (models.Residual(), (3, 6, 6)),
    "convolutions": (
        nn.Sequential(nn.Conv2d(2, 3, 3, 2, 1), nn.ReLU6(), nn.MaxPool2d(2, 1, 1), nn.Conv2d(3, 4, (1, 2), groups=1),
                      nn.LeakyReLU(0.1), nn.AvgPool2d(2, ceil_mode=True), nn.Flatten(), nn.Linear(24, 3)),
        (2, 7, 6),
    ),
    "transposed": (nn.Sequential(nn.ConvTranspose2d(2, 3, 3, 2), nn.PReLU(3), nn.Conv2d(3, 2, 3)), (2, 3, 4)),
    "norms": (models.NormFirst(), (2, 3, 3)),
    "choices": (
        Model(lambda m, x: torch.where(m.a(x) > 0.1, m.b(x).clamp(-1, 0.5), torch.maximum(x, -2 * x)).sum(1, True),
              a=nn.Linear(6, 6), b=nn.Linear(6, 6)),
        (6,),
    ),
    "moves": (
        Model(lambda m, x: torch.cat([F.interpolate(m.c(x), (8, 8), mode="bilinear"), F.pad(x, (0, 4, 2, 2))], 1)
              .mean((1, 2)), c=nn.Conv2d(2, 2, 3, padding=1)),
        (2, 4, 4),
    ),
}  # fmt: skip
LOW, HIGH = -1.5, 1.0


class Extreme(Oracle):
    """Truncations that all round down, or all up."""

    def __init__(self, up: bool) -> None:
        super().__init__()
        self._up = up

    def offset(self, x: Tensor, bits: int) -> Tensor:
        return torch.tensor((1 << bits) - 1 if self._up else 0)


def drafts(model: nn.Module, shape: tuple[int, ...], **options: object) -> tuple[Draft, Draft]:
    """The simplified model, and the fixed-point network before its ranges are bounded."""
    start = prepare(seeded(model), random(2, *shape).clamp(LOW, HIGH), input_range=(LOW, HIGH), **options)  # type: ignore[arg-type]
    found = dict(stages(start))
    return found["choose_scale"], found["fuse_truncation_into_relu"]


def adversaries(draft: Draft, shape: tuple[int, ...]) -> Iterator[Tensor]:
    """Corners of the declared range, pushed by the sign of a gradient to where some value of some line is extreme."""
    generator = torch.Generator().manual_seed(0)
    label = draft.plan.find(Input)[0].op.label  # type: ignore[attr-defined]
    lines = [node.name for node in draft.plan.nodes if not isinstance(node.op, (Input, Weight))]
    for name in lines:
        for sign in (1.0, -1.0):
            x = torch.where(torch.rand((4, *shape), generator=generator) < 0.5, LOW, HIGH).double()
            goal: int | None = None
            for _ in range(4):
                x = x.detach().requires_grad_()
                value = interpret(draft.plan, draft.weights, {label: x})[name]
                if not value.requires_grad:
                    break
                flat = value.reshape(len(value), -1)
                goal = int(torch.randint(flat.shape[1], (1,), generator=generator)) if goal is None else goal
                (slope,) = torch.autograd.grad(sign * flat[:, goal].sum(), x)
                x = torch.where(slope > 0, HIGH, torch.where(slope < 0, LOW, x))
            yield x.detach()


@pytest.mark.parametrize("name", NETWORKS)
def test_no_input_inside_the_declared_range_leaves_a_proved_interval(name: str) -> None:
    model, shape = NETWORKS[name]
    real, fixed = drafts(model, shape)
    proved = {found.node.name: found.interval for found in intervals(fixed)}
    inputs = torch.cat(list(adversaries(real, shape)))
    first = next(node.name for node in fixed.plan.nodes if isinstance(node.op, Product))
    reached = 0.0
    for oracle in (Oracle(), Extreme(up=False), Extreme(up=True)):
        values: dict[str, Tensor] = {}
        for node in fixed.plan.nodes:
            if isinstance(node.op, Weight):
                values[node.name] = fixed.weights[node.op.label].long()
                continue
            if isinstance(node.op, Input):
                values[node.name] = torch.round(inputs * 2.0**node.type.frac).long()
            else:
                values[node.name] = node.op.reference(oracle, *(values[arg] for arg in node.args))
            value, bound = values[node.name].double(), proved[node.name]
            assert bool((value >= bound.low).all() and (value <= bound.high).all()), node.name
            if node.name == first:
                reached = max(reached, float((value / bound.high)[:, bound.high > 0].max()))
    # The search is no formality: where intervals are exact, which is at the first product, it gets to their ends.
    assert 0.99 < reached <= 1


def test_ranges_are_called_proved_where_calibration_did_not_narrow_them() -> None:
    model, x = seeded(nn.Linear(6, 2)), torch.cat([torch.full((1, 6), LOW), torch.full((1, 6), HIGH), random(4, 6)])
    assert "ranges=proved" in str(tacit.compile(model, x, input_range=(LOW, HIGH)).plan)
    with torch.no_grad():
        model.weight.fill_(0.3)
    same = tacit.compile(model, x, input_range=(LOW, HIGH), ranges="measured", calibration=random(64, 6))
    assert same.plan.ranges == "proved"  # what is measured is no narrower
    secure, _ = calibrated()
    assert "ranges=measured" in str(secure.plan)


# --- overflow ---


ALTERNATING = torch.tensor([1.0, -1.0] * 128)


def sums() -> nn.Module:
    """Small values on any ordinary input, and large ones on one that alternates as the weights do."""
    model = seeded(nn.Sequential(nn.Linear(256, 8), nn.ReLU(), nn.Linear(8, 2)))
    with torch.no_grad():
        model[0].weight.copy_(ALTERNATING)
    return model


def calibrated() -> tuple[tacit.Secure, Tensor]:
    """A network compiled for ordinary inputs, and one that is inside the declared range, but leaves those of values."""
    secure = tacit.compile(
        sums(), random(4, 256), input_range=(-64, 64), ranges="measured", margin=4, calibration=random(64, 256, seed=2)
    )
    return secure, 60 * ALTERNATING.expand(3, 256)


def test_the_oracle_finds_overflow_and_names_the_layer() -> None:
    secure, x = calibrated()
    secure.reference(x)
    secure.reference(random(5, 256), check=True)
    with pytest.raises(
        tacit.RangeError, match=r"module '0' .*linear.*of 24 values leave .*measured, with a margin of 4"
    ):
        secure.reference(x, check=True)


def test_overflow_is_found_where_the_ring_itself_wraps() -> None:
    """Products so large that what is left modulo 2^64 may look harmless."""
    secure, x = calibrated()
    secure._weights = {k: w.long() * 2**34 + 1 for k, w in secure._weights.items()}
    with pytest.raises(tacit.RangeError, match="module '0'"):
        secure.reference(x, check=True)


@pytest.mark.parametrize("name", ["perceptron", "residual", "choices"])
def test_proved_ranges_never_overflow(name: str) -> None:
    model, shape = NETWORKS[name]
    real, _ = drafts(model, shape)
    secure = tacit.compile(seeded(model), random(2, *shape).clamp(LOW, HIGH), input_range=(LOW, HIGH))
    inputs = torch.cat(list(adversaries(real, shape)))
    assert torch.equal(secure.reference(inputs, check=True), secure.reference(inputs))


def test_a_value_that_does_not_fit_is_told_with_layer_range_and_remedies(rewrite: bool) -> None:  # noqa: F811
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Sequential(nn.ReLU(), nn.Linear(6, 6)))
    for value in model.parameters():
        nn.init.constant_(value, 2.0**15)
    with pytest.raises(tacit.CompileError) as caught:
        tacit.compile(model.eval(), random(2, 6), input_range=(-4, 4), frac_bits=12, ranges="proved")
    golden("too_wide", str(caught.value).replace(str(Path(nn.__file__).parent), "torch/nn") + "\n", rewrite)


# --- diff ---


def test_diff_shows_every_layer_and_marks_the_first_bad_one() -> None:
    model, x = seeded(models.Residual()), random(4, 3, 6, 6)
    found = tacit.diff(model, x, input_range=(-1, 1))
    assert [row.op for row in found.layers] == [
        "conv2d", "relu", "conv2d", "add", "relu", "adaptive_avg_pool2d", "reshape", "linear",
    ]  # fmt: skip
    assert [row.module for row in found.layers][:2] == ["conv1", ""]
    assert found.first_bad is None
    assert all(0 <= row.mean_error <= row.largest_error < 2**-8 and row.headroom >= 0 for row in found.layers)
    rough = tacit.diff(model, x, input_range=(-1, 1), frac_bits=3)
    assert rough.first_bad is not None
    errors = [row.largest_error for row in rough.layers]
    assert rough.layers.index(rough.first_bad) == next(i for i, e in enumerate(errors) if e > 2**-8)


def test_the_errors_are_those_of_the_oracle() -> None:
    model, x = seeded(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))), random(7, 6)
    found = tacit.diff(model, x, input_range=(-1, 1), frac_bits=8)
    secure = tacit.compile(model, x, input_range=(-1, 1), frac_bits=8)
    with torch.no_grad():
        exact = model.double()(x.double())
    error = (secure.reference(x).double() - exact).abs()
    assert found.layers[-1].largest_error == pytest.approx(float(error.max()), abs=1e-6)
    assert found.layers[-1].mean_error == pytest.approx(float(error.mean()), abs=1e-6)


def test_diff_tells_of_overflow() -> None:
    x = 60 * ALTERNATING.expand(3, 256)
    seen = random(4, 256)
    found = tacit.diff(sums(), x, input_range=(-64, 64), ranges="measured", margin=4, calibration=seen)
    assert found.first_bad is not None
    assert found.first_bad.overflowed
    assert found.first_bad.module == "0"


def network() -> nn.Module:
    """For the command line."""
    return seeded(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)))


def test_the_commands_diff_and_show_ranges(tmp_path: Path) -> None:
    import numpy as np

    np.save(tmp_path / "x.npy", random(4, 6).numpy())
    target, x = f"{__file__}:network", str(tmp_path / "x.npy")
    shown = CliRunner().invoke(cli.app, ["diff", target, x, "--range", "-1", "1", "--frac-bits", "4"])
    assert shown.exit_code == 0
    assert "<- first over 0.0039" in shown.output
    assert "headroom" in shown.output
    built = CliRunner().invoke(
        cli.app, ["compile", target, "--example", "1x6", "--range", "-1", "1", "-o", str(tmp_path / "net")]
    )
    assert built.exit_code == 0
    ranges = CliRunner().invoke(cli.app, ["show", str(tmp_path / "net"), "--ranges"])
    assert ranges.exit_code == 0
    assert ranges.output.rstrip().endswith("ranges=proved")
    assert "linear" in ranges.output
