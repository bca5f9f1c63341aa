"""Functions as piecewise polynomials: the bound on a dense grid, the layers against PyTorch, custom functions."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from test_capture import Model, random, seeded
from torch import nn

import tacit
from tacit.approximation import curve, curves
from tacit.ir.errors import CompileError
from tacit.ir.functions import FUNCTIONS, register_function
from tacit.ir.ops.spline import FixedSpline
from tacit.ir.splines import Spline, fit

Tensor = torch.Tensor
PARAMETERS: dict[str, tuple[tuple[float, ...], ...]] = {
    "elu": ((1.0,), (0.3,)),
    "celu": ((2.0,),),
    "rsqrt_of_mean": ((16.0, 1e-5),),
    "rsqrt_of_mean_or_none": ((16.0, 1e-5, 0.0, 4.0),),
    "inverse_length": ((0.1, 2.0**-12),),
    "inverse_length_or_none": ((0.1, 2.0**-12, 4.0),),
    "integer_power": ((2.0,), (3.0,), (5.0,)),
    "power": ((1.5,), (1 / 3,)),
    "inverse_power": ((0.75,), (2.0,)),
}
RANGES = {
    "exp": ((-16.0, 0.0), (-4.0, 6.0)),
    "log": ((2.0**-8, 64.0),),
    "reciprocal": ((0.25, 200.0), (0.01, 4.0)),
    "rsqrt": ((0.01, 50.0),),
    "rsqrt_of_mean": ((0.0, 50.0),),
    "rsqrt_of_mean_or_none": ((0.0, 50.0),),
    "inverse_length": ((0.0, 50.0),),
    "inverse_length_or_none": ((0.0, 50.0),),
    "sqrt": ((0.0, 100.0),),
    "power": ((0.0, 9.0),),
    "inverse_power": ((0.2, 9.0),),
    "sinh": ((-4.0, 3.0),),
    "cosh": ((-4.0, 3.0),),
    "integer_power": ((-3.0, 3.0),),
    "sin": ((-7.0, 7.0),),
    "cos": ((-7.0, 7.0),),
}
CASES = [
    (name, parameters, low, high)
    for name in FUNCTIONS
    for parameters in PARAMETERS.get(name, ((),))
    for low, high in RANGES.get(name, ((-8.0, 8.0), (-100.0, 3.0)))
]
FRAC = 12


def worst(s: Spline, name: str, parameters: tuple[float, ...], *, relative: bool, frac: int = FRAC) -> float:
    """The largest error at a hundred thousand places, and around all knots, whichever segment the offset chooses."""
    x = torch.linspace(s.low, s.high, 100_000, dtype=torch.float64).round().long()
    near = [torch.arange(k - (2 << s.drop), k + (2 << s.drop), max(1, (1 << s.drop) // 64)) for k in s.knots]
    x = torch.cat([x, *near]).clamp(s.low, s.high)
    exact = FUNCTIONS[name].function(x.double() / 2.0**frac, *parameters)
    size = exact.abs() if relative else exact.abs().clamp(min=1)
    found = (s.at(x, torch.tensor(offset)).double() / 2.0**s.scale for offset in (0, (1 << s.drop) - 1))
    return max(float(((y - exact).abs() / size).max()) for y in found)


@pytest.mark.parametrize(("name", "parameters", "low", "high"), CASES)
def test_the_error_stays_within_its_bound(name: str, parameters: tuple[float, ...], low: float, high: float) -> None:
    for error in (2.0**-10, 2.0**-6):
        s = fit(name, parameters, round(low * 2**FRAC), round(high * 2**FRAC), FRAC, error=error)
        assert s.low <= low * 2**FRAC and s.high >= high * 2**FRAC
        assert worst(s, name, parameters, relative=False) <= error * 1.02
        assert len(s.knots) <= 40


@pytest.mark.parametrize("name", ["reciprocal", "rsqrt", "exp"])
def test_a_relative_bound_holds_over_many_octaves(name: str) -> None:
    low, high = (-(5 << 12), 3 << 12) if name == "exp" else (1 << 8, 1 << 22)
    s = fit(name, (), low, high, FRAC, error=2.0**-9, relative=True)
    assert worst(s, name, (), relative=True) <= 2.0**-9 * 1.02


@pytest.mark.parametrize("name", ["silu", "gelu", "mish", "hardswish", "sigmoid", "tanh", "softplus", "elu"])
@pytest.mark.parametrize("bits", [18, 26, 34, 42])
def test_a_bend_around_zero_is_seen_in_any_range(name: str, bits: int) -> None:
    """It is a millionth of a wide range: between two of a few hundred places in proportion to that."""
    reach, parameters = 1 << bits, PARAMETERS.get(name, ((),))[0]
    s = fit(name, parameters, -reach, reach, FRAC, error=2.0**-11)
    x = torch.cat([torch.arange(-(16 << FRAC), 16 << FRAC, 97), torch.linspace(-reach, reach, 1001).long()])
    exact = FUNCTIONS[name].function(x.double() / 2.0**FRAC, *parameters)
    found = s.at(x, torch.tensor(0)).double() / 2.0**s.scale
    assert float(((found - exact).abs() / exact.abs().clamp(min=1)).max()) <= 1.05 * 2.0**-11


def test_fewer_bytes_for_a_larger_error() -> None:
    sizes = [fit("gelu", (), -(8 << 12), 8 << 12, 12, error=2.0**-k).bytes_of_element(18) for k in (5, 8, 11, 14)]
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1] / 2


def test_bounds_of_a_spline_hold_and_are_reached() -> None:
    from tacit.ir.ranges import Interval

    for name in ("gelu", "tanh", "silu"):
        s = fit(name, (), -(8 << 12), 8 << 12, 12, error=2.0**-10)
        op = FixedSpline.of_spline(s, name, 12, 12)
        generator = torch.Generator().manual_seed(0)
        ends = torch.randint(s.low, s.high, (2, 300), generator=generator).double()
        low, high = ends.amin(0), ends.amax(0)
        found = op.bound(Interval(low, high))
        for i in range(300):
            x = torch.linspace(float(low[i]), float(high[i]), 500, dtype=torch.float64).round()
            y = FUNCTIONS[name].function(x / 4096) * 4096
            slack = 2.0**-10 * 8 * 4096 + 2
            assert found.low[i] <= y.min() + slack and found.high[i] >= y.max() - slack
            assert found.low[i] >= y.min() - 2 * slack and found.high[i] <= y.max() + 2 * slack


LAYERS: dict[str, nn.Module] = {
    "sigmoid": nn.Sigmoid(),
    "tanh": nn.Tanh(),
    "silu": nn.SiLU(inplace=True),
    "gelu": nn.GELU(),
    "gelu by tanh": nn.GELU("tanh"),
    "elu": nn.ELU(0.7),
    "selu": nn.SELU(),
    "celu": nn.CELU(0.5),
    "mish": nn.Mish(),
    "softplus": nn.Softplus(beta=2),
    "logsigmoid": nn.LogSigmoid(),
    "hardswish": nn.Hardswish(),
    "tanhshrink": nn.Tanhshrink(),
    "erf": Model(lambda m, x: torch.erf(x)),
    "exp": Model(lambda m, x: torch.exp(x * 2)),
    "log": Model(lambda m, x: torch.log(x.abs() + 0.1)),
    "log1p": Model(lambda m, x: torch.log1p(x.abs())),
    "log2": Model(lambda m, x: torch.log2(x.clamp(min=0.2))),
    "exp2 and expm1": Model(lambda m, x: torch.exp2(x) - torch.expm1(x)),
    "reciprocal": Model(lambda m, x: 1 / (x.abs() + 0.25)),
    "sqrt": Model(lambda m, x: torch.sqrt(x.abs())),
    "rsqrt": Model(lambda m, x: torch.rsqrt(x.clamp(min=0) + 0.1)),
    "square and cube": Model(lambda m, x: x**2 - x.pow(3) + x.square()),
    "fifth power": Model(lambda m, x: x**5),
    "sine": Model(lambda m, x: torch.sin(x) + torch.cos(3 * x)),
    "softsign": nn.Softsign(),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_against_pytorch(name: str) -> None:
    model, x = seeded(nn.Sequential(nn.Linear(6, 6), LAYERS[name])), random(5, 6)
    with torch.no_grad():
        expected = model(x)
    secure = tacit.compile(model, x, input_range=(-1, 1))
    assert tacit.Plan.parse(str(secure.plan)) == secure.plan
    assert (secure.check(x) - expected).abs().max() < 2**-7 * max(1.0, float(expected.abs().max()))
    secure.reference(x, check=True)


@pytest.mark.parametrize("name", ["sigmoid", "hardswish", "square and cube"])
def test_the_textbook_suite_has_them_too(name: str) -> None:
    model, x = seeded(nn.Sequential(nn.Linear(6, 6), LAYERS[name])), random(5, 6)
    secure = tacit.compile(model, x, input_range=(-1, 1), protocol="securenn")
    with torch.no_grad():
        assert (secure.check(x) - model(x)).abs().max() < 2**-7


def test_max_error_is_an_option_and_buys_accuracy() -> None:
    model, x = seeded(nn.Sequential(nn.Linear(6, 16), nn.GELU())), random(200, 6)
    with torch.no_grad():
        expected = model(x)
    plans = {e: tacit.compile(model, x, input_range=(-1, 1), frac_bits=16, max_error=2.0**-e) for e in (6, 14)}
    size = expected.abs().clamp(min=1)
    errors = {e: float(((secure.reference(x) - expected).abs() / size).max()) for e, secure in plans.items()}
    assert errors[14] < 2.0**-13 < errors[6] < 2.0**-6 + 2.0**-13
    assert plans[6].plan.cost().online_bytes < plans[14].plan.cost().online_bytes
    for wrong in (0.0, 0.5, "small"):
        with pytest.raises(CompileError, match="max_error"):
            tacit.compile(model, x, max_error=wrong)  # type: ignore[arg-type]


def test_any_number_of_segments_takes_three_rounds() -> None:
    model, x = seeded(nn.Sequential(nn.Linear(6, 4), nn.GELU())), random(3, 6)
    for error in (2.0**-5, 2.0**-16):
        secure = tacit.compile(model, x, frac_bits=12, max_error=error, input_range=(-4, 4))
        (node,) = secure.plan.find(FixedSpline)
        assert next(row for row in secure.plan.cost().per_op if row.name == node.name).cost.rounds == 4  # truncation


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda x: torch.log(x), "log is not defined everywhere in .-1.* above 0"),
        (lambda x: 1 / x, "reciprocal is not defined everywhere"),
        (lambda x: torch.sqrt(x - 0.5), "at or above 0"),
    ],
)
def test_a_function_outside_its_domain_is_told(function: object, said: str) -> None:
    with pytest.raises(CompileError, match=said):
        tacit.compile(Model(lambda m, x: function(x)).eval(), random(3, 6), input_range=(-1, 1))  # type: ignore[operator]


def test_what_a_plot_of_the_errors_shows() -> None:
    model, x = seeded(nn.Sequential(nn.Linear(6, 4), nn.GELU(), nn.Linear(4, 4), nn.Tanh())), random(3, 6)
    plan = tacit.compile(model, x, input_range=(-1, 1), max_error=2.0**-9).plan
    found = list(curves(plan))
    assert [c.function for c in found] == ["gelu", "tanh"]
    for c in found:
        assert len(c.x) == len(c.error) > 1000
        assert 2.0**-13 < float((c.error.abs() / c.exact.abs().clamp(min=1)).max()) <= 2.0**-9 * 1.01
    assert torch.equal(found[0].exact, F.gelu(found[0].x))
    assert math.isclose(float(found[0].x[0]), plan.find(FixedSpline)[0].op.low / 2.0 ** plan.find(FixedSpline)[0].op.of)  # type: ignore[attr-defined]
    few = curve(plan.find(FixedSpline)[0].op, points=10)  # type: ignore[arg-type]
    assert len(few.x) == 10


def test_the_example_of_a_layer_from_outside() -> None:
    import custom_layer

    assert custom_layer.main() < 2**-8
    with pytest.raises(CompileError, match="there is a function 'snake' already"):
        register_function("snake", torch.sin)


def test_a_name_without_a_function_is_told() -> None:
    with pytest.raises(CompileError, match="there is no function 'snark'; known: sigmoid"):
        fit("snark", (), 0, 1, 0, error=0.1)
