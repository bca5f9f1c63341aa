"""Scales where layers jump or divide by data: right on the example and on blank inputs, or a warning."""

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from test_capture import Model, seeded, wide
from torch import nn
from torch.nn import functional as F

import tacit
from tacit.ir.ops.model import ModelOp

Tensor = torch.Tensor
PROMISED = 2.0**-8


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def frac_bits(secure: tacit.Secure) -> int:
    """Of what is looked at after a truncation; inputs may have more."""
    return min(n.type.frac for n in secure.plan.nodes if n.op.name in ("input", "relu", "trunc", "spline"))


def error(secure: tacit.Secure, model: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return float((secure(x) - model(x)).abs().max())


def promised(model: nn.Module, x: Tensor) -> float:
    """2^-8, of the largest number where that is below 1, and a 32nd of it where that is above 32."""
    with torch.no_grad():
        size = float(model(x).abs().max())
    return PROMISED * max(min(size, 1.0), size / 32)


@contextmanager
def doubts() -> Iterator[list[str]]:
    """The texts of the precision warnings inside."""
    told: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield told
    told += [str(one.message) for one in caught if one.category is tacit.PrecisionWarning]


# --- steps ---


def stumps(x: Tensor, beside: float) -> Model:
    """One threshold for each column, each so far beside a value of some row."""
    thresholds = x[:: len(x) // x.shape[1]].diagonal() + beside
    return seeded(Model(lambda m, x: (x > thresholds).float().sum(1, keepdim=True)))


def leaf_values(x: Tensor, beside: float) -> Model:
    t = x[::20].diagonal()[:10] + beside
    low, high = random(10, seed=3), random(10, seed=4)
    return seeded(Model(lambda m, x: torch.where(x[:, :10] <= t, low, high).sum(1, keepdim=True)))


def signs(x: Tensor, beside: float) -> Model:
    t = x[::20].diagonal() + beside
    return seeded(Model(lambda m, x: m.a(torch.sign(x - t)), a=nn.Linear(10, 3)))


def chosen_place(x: Tensor, beside: float) -> Model:
    """The index of the larger of two columns, as a number to compute with; in one row they are nearly alike."""
    x[7, 0], x[7, 1], x[7, 2:] = 0.5, 0.5 - beside, 0.1
    return seeded(Model(lambda m, x: m.a(F.one_hot(x.argmax(1), 10).float()), a=nn.Linear(10, 3)))


@pytest.mark.parametrize("family", [stumps, leaf_values, signs, chosen_place])
def test_thresholds_close_to_rows_of_the_example_do_not_flip(family: Callable[[Tensor, float], Model]) -> None:
    """Closer than the 12 bits of a first trial, in rows far behind the first sixteen."""
    x = random(200, 20 if family in (stumps, leaf_values) else 10)
    model = family(x, -1e-4)
    secure = tacit.compile(model, x, input_range=(0, 1))
    assert error(secure, model, x) <= PROMISED
    assert frac_bits(secure) > 12
    coarse = tacit.compile(model, x, input_range=(0, 1), frac_bits=9)
    assert error(coarse, model, x) > 0.1  # the case would show a flip


DRAWN = {
    "a layer": Model(lambda m, x: m.b(torch.sign(m.a(x))), a=nn.Linear(10, 12), b=nn.Linear(12, 3)),
    "a function": Model(lambda m, x: torch.where(torch.sigmoid(m.a(x)) > 0.5, x, -x), a=nn.Linear(10, 10)),
    "a product": Model(lambda m, x: torch.where(x * x > m.t, m.v, -m.v), t=random(10, seed=5), v=random(10, seed=6)),
    "classes": Model(lambda m, x: F.one_hot(m.a(x).argmax(1), 6).float(), a=nn.Linear(10, 6)),
}


@pytest.mark.parametrize("name", DRAWN)
def test_no_row_flips_in_any_run(name: str) -> None:
    """Truncations round up or down by chance, anew in each run; polynomials are off as well."""
    model, x = seeded(DRAWN[name]), random(150, 10)
    secure = tacit.compile(model, x, input_range=(0, 1))
    assert max(error(secure, model, x) for _ in range(12)) <= PROMISED


def test_a_warning_points_to_the_line_that_compiles() -> None:
    x = random(60, 6)
    near = x[30, 2] - 2e-7
    with pytest.warns(tacit.PrecisionWarning) as caught:
        tacit.compile(seeded(Model(lambda m, x: (x[:, 2:3] > near).float())), x, input_range=(0, 1))
    assert [one.filename for one in caught] == [__file__]


@pytest.mark.parametrize("family", [stumps, leaf_values, signs])
def test_a_threshold_that_no_scale_tells_from_the_data_is_named(family: Callable[[Tensor, float], Model]) -> None:
    x = random(200, 20 if family in (stumps, leaf_values) else 10)
    model = family(x, -3e-7)
    with doubts() as told:
        secure = tacit.compile(model, x, input_range=(0, 1))
    if error(secure, model, x) > PROMISED:
        assert len(told) == 1
    assert all("jumps where a value passes a threshold" in text and "module 'model'" in text for text in told)
    assert all("What helps: thresholds in the middle" in text for text in told)


def test_the_remedy_of_such_a_warning_works() -> None:
    x = random(60, 6)
    near, apart = x[30, 2] - 2e-7, x[:, 2].sort().values[29:31].mean()
    with doubts() as told:
        tacit.compile(seeded(Model(lambda m, x: (x[:, 2:3] > near).float())), x, input_range=(0, 1))
    with doubts() as none:
        tacit.compile(seeded(Model(lambda m, x: (x[:, 2:3] > apart).float())), x, input_range=(0, 1))
    assert len(told) == 1 and "2e-07 beside it" in told[0] and none == []


def test_a_threshold_at_values_of_the_data_is_exact() -> None:
    x = (random(50, 4) * 8).round() / 8
    model = seeded(Model(lambda m, x: (x > 0.5).float() + (x >= 0.25).float() - (x == 0.75).float()))
    secure = tacit.compile(model, x, input_range=(0, 1))
    assert error(secure, model, x) <= 2.0**-12 and frac_bits(secure) <= 12


# --- norms of blank inputs ---


def convolutions(norm: Callable[[], nn.Module], times: int, act: type[nn.Module] = nn.ReLU, pad: int = 0) -> nn.Module:
    layers: list[nn.Module] = []
    for i in range(times):
        layers += [nn.Conv2d(4 if i else 1, 4, 3, padding=pad), norm(), act()]
    return seeded(nn.Sequential(*layers, nn.Conv2d(4, 2, 1)))


def trained(model: nn.Module) -> nn.Module:
    """Scales and shifts of norms that are not 1 and 0."""
    for module in model.modules():
        if isinstance(module, (nn.InstanceNorm2d, nn.GroupNorm, nn.LayerNorm)) and module.bias is not None:
            nn.init.normal_(module.bias, std=0.5)
            nn.init.normal_(module.weight, 1.0, 0.3)
    return model


class Joined(nn.Module):
    """A U-Net of one level."""

    def __init__(self) -> None:
        super().__init__()
        self.down = convolutions(lambda: nn.InstanceNorm2d(4), 1, pad=1)[:3]  # type: ignore[index]
        self.inner = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.InstanceNorm2d(6), nn.ReLU())
        self.up, self.out = nn.ConvTranspose2d(6, 4, 2, 2), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        kept = self.down(x)
        found: Tensor = self.out(torch.cat([self.up(self.inner(F.max_pool2d(kept, 2))), kept], 1))
        return found


BLANK = {
    "instance norm": (lambda: convolutions(lambda: nn.InstanceNorm2d(4), 1), (1, 8, 8)),
    "instance norm twice": (lambda: convolutions(lambda: nn.InstanceNorm2d(4), 2), (1, 8, 8)),
    "instance norm twice, with padding": (lambda: convolutions(lambda: nn.InstanceNorm2d(4), 2, pad=1), (1, 8, 8)),
    "trained group norm twice": (
        lambda: trained(convolutions(lambda: nn.GroupNorm(2, 4), 2, nn.SiLU)), (1, 8, 8)
    ),
    "u-net": (lambda: seeded(Joined()), (1, 8, 8)),
    "layer norm": (lambda: seeded(nn.LayerNorm(16)), (16,)),
    "layer norm twice": (
        lambda: trained(seeded(nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16), nn.LayerNorm(16)))), (16,)
    ),
    "root mean square": (lambda: seeded(nn.RMSNorm(16, eps=1e-6)), (16,)),
    "silence": (
        lambda: seeded(nn.Sequential(nn.Conv1d(1, 4, 5), nn.GroupNorm(4, 4), nn.GELU(), nn.Conv1d(4, 2, 3))), (1, 24)
    ),
    "by hand": (
        lambda: seeded(
            Model(lambda m, x: (x - x.mean(1, True)) / torch.sqrt(x.var(1, correction=0, keepdim=True) + 1e-2))
        ),
        (16,),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BLANK)
def test_blank_and_faint_inputs_through_norms(name: str) -> None:
    make, shape = BLANK[name]
    model, usual = make(), noise(2, *shape, seed=5)
    secure = tacit.compile(model, usual)  # a warning would be an error
    blank = [torch.zeros(1, *shape), torch.ones(1, *shape), torch.full((1, *shape), 0.37)]
    x = torch.cat([*blank, 1 + 1e-3 * usual, 1e-3 * usual, usual])
    assert error(secure, model, x) <= 2 * PROMISED
    first, second = secure(x[:3]), secure(x[:3])
    assert float((first - second).abs().max()) <= PROMISED  # from run to run
    secure.check(x[:2])


def test_a_norm_that_no_scale_reaches_is_named_with_its_gain() -> None:
    """Rounding in front of the first norm, which the second makes as large as the signal."""
    layers = [nn.Conv2d(1, 4, 3), nn.SiLU(), nn.Conv2d(4, 4, 3), nn.InstanceNorm2d(4, eps=1e-6), nn.ReLU()]
    model = seeded(nn.Sequential(*layers, nn.Conv2d(4, 4, 3), nn.InstanceNorm2d(4, eps=1e-6)))
    with doubts() as told:
        secure = tacit.compile(model, noise(2, 1, 10, 10))
    assert error(secure, model, torch.zeros(1, 1, 10, 10)) > PROMISED
    assert len(told) == 1 and "model.normalise" in told[0] and "module '" in told[0]
    assert "multiplies what differs in a blank or faint one by" in told[0] and "a larger eps" in told[0]
    for module in model:
        if isinstance(module, nn.InstanceNorm2d):
            module.eps = 0.1
    with doubts() as none:
        tacit.compile(model, noise(2, 1, 10, 10))
    assert none == []


def test_where_float_itself_does_not_know_its_answer_a_warning_says_so() -> None:
    """Five norms in a row multiply the rounding of float32 until it is all there is."""
    model = convolutions(lambda: nn.InstanceNorm2d(4, eps=1e-7), 5, pad=1)
    x = torch.zeros(1, 1, 12, 12)
    with torch.no_grad():
        single, double = model(x), copy.deepcopy(model).double()(x.double())
    assert float((single - double).abs().max()) > PROMISED
    with doubts() as told:
        tacit.compile(model, noise(2, 1, 12, 12))
    assert len(told) == 1 and "that of float32" in told[0]


def test_no_warning_where_float_knows_its_answer() -> None:
    """The same five norms, with an eps that blank inputs are not far below."""
    with doubts() as none:
        tacit.compile(convolutions(lambda: nn.InstanceNorm2d(4, eps=0.1), 5, pad=1), noise(2, 1, 12, 12))
    assert none == []


# What must be warned of, with what the warning says; and the same, close to it, that keeps the promise.
PAIRS: dict[str, tuple[str, Callable[[], nn.Module], Callable[[], nn.Module]]] = {
    "a product of small values": (
        "values of ordinary size there (a norm before this layer)",
        lambda: Model(lambda m, x: (x * 1e-4) * (x * 1e-4) * 1e8),
        lambda: Model(lambda m, x: (x * 1e-1) * (x * 1e-1) * 1e2),
    ),
    "the end of a function": (
        "the polynomials that stand for it are as far off",
        lambda: Model(lambda m, x: torch.sigmoid(x - 12) * 1e5),
        lambda: Model(lambda m, x: torch.sigmoid(x - 4) * 1e2),
    ),
    "two functions of which one undoes the other": (
        "the polynomials that stand for it are as far off",
        lambda: Model(lambda m, x: torch.exp(x * 3) * torch.exp(-x * 3 - 9) * 8000),
        lambda: Model(lambda m, x: torch.exp(x * 3) * torch.exp(-x * 3)),
    ),
    "values that fill the ring": ("with 4 fractional bits", lambda: wide(32.0), lambda: wide(3.0)),
}


@pytest.mark.parametrize("name", PAIRS)
def test_a_planted_model_warns_and_one_close_to_it_does_not(name: str) -> None:
    says, planted, near = PAIRS[name]
    x = random(64, 16)
    with doubts() as told:
        secure = tacit.compile(planted().eval(), x, calibration=x, input_range=(0, 1))
    assert len(told) == 1 and says in told[0]
    assert error(secure, planted().eval(), x) > promised(planted().eval(), x)
    with doubts() as none:
        secure = tacit.compile(near().eval(), x, calibration=x, input_range=(0, 1))
    assert none == [] and error(secure, near().eval(), x) <= promised(near().eval(), x)


class Deep(nn.Module):
    """A U-Net with two norms on each level: six in a row. PyTorch's kernels make much of nothing there."""

    def __init__(self) -> None:
        super().__init__()

        def twice(n: int) -> nn.Sequential:
            layers = [[nn.Conv2d(k, 2, 3, padding=1), nn.InstanceNorm2d(2), nn.LeakyReLU()] for k in (n, 2)]
            return nn.Sequential(*layers[0], *layers[1])

        self.down, self.inner, self.joined = twice(1), twice(2), twice(4)
        self.up, self.out = nn.ConvTranspose2d(2, 2, 2, 2), nn.Conv2d(2, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        kept = self.down(x)
        found: Tensor = self.out(self.joined(torch.cat([self.up(self.inner(F.max_pool2d(kept, 2))), kept], 1)))
        return found


def test_what_float_answers_is_asked_of_pytorch_itself() -> None:
    """In its own kernels, which round otherwise than the same formula of ours."""
    torch.manual_seed(1)
    model, black = Deep().eval(), torch.zeros(1, 1, 8, 8)
    with doubts() as told:
        secure = tacit.compile(model, random(2, 1, 8, 8), input_range=(0, 1))
    assert error(secure, model, black) > 0.1 and len(told) == 1 and "that of float32" in told[0]
    assert error(secure, copy.deepcopy(model).double(), black.double()) <= PROMISED
    assert float((secure(black) - secure(black)).abs().max()) <= PROMISED


def test_networks_that_no_blank_input_troubles_keep_their_scale() -> None:
    """A position table, or a bias for each feature, makes blank inputs ordinary ones to the norms behind it."""
    model = seeded(nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 4)))
    assert frac_bits(tacit.compile(model, noise(2, 8))) <= 13
    assert frac_bits(tacit.compile(model[2:].eval(), noise(2, 16))) <= 12  # type: ignore[index]


def test_a_warning_that_is_made_an_error_is_no_mistake_of_the_compiler() -> None:
    x = random(60, 6)
    near = x[30, 2] - 2e-7
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(tacit.PrecisionWarning, match=r"module 'model' \(model.comparison"):
            tacit.compile(seeded(Model(lambda m, x: (x[:, 2:3] > near).float())), x, input_range=(0, 1))


@pytest.mark.parametrize("op", [c for c in ModelOp.known if issubclass(c, ModelOp) and c.jumps()])
def test_the_margin_of_an_op_that_jumps_is_the_distance_to_where_it_does(op: type[ModelOp]) -> None:
    for sample in op.samples():
        operands = [torch.randn(t.at(6).dims, generator=torch.Generator().manual_seed(2)).double() for t in sample.args]
        margin = sample.op.margin(*operands)  # type: ignore[attr-defined]
        least = float(margin[margin > 0].min())
        before = sample.op.reference(None, *operands)
        moved = [operands[0] + least / 4 * torch.randn_like(operands[0]).clamp(-1, 1), *operands[1:]]
        assert torch.equal(before, sample.op.reference(None, *moved))


@pytest.mark.parametrize("wide", [False, True])
def test_polynomials_are_close_enough_in_large_networks_too(wide: bool) -> None:
    """What a polynomial is off may be eight times the rounding, and a factor multiplies both.

    wide: with more values than networks have that are tried out again and again.
    """
    model = Model(lambda m, x: 16 * torch.tanh(x)[:, :256]).eval()
    x = random(2, 600_000 if wide else 256)
    with doubts() as found:
        secure = tacit.compile(model, x, input_range=(-4, 4))
    assert not found
    others = random(4, x.shape[1], seed=5) * 4
    assert error(secure, model, others) < promised(model, others)
