"""Norms by the statistics of their own input: over all sizes of it, as layers and as models write them by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from test_capture import Model
from torch import nn
from torch.nn import functional as F

import tacit
from tacit.ir.ops.norms import Normalise, RootMeanSquare, UnitLength
from tacit.passes import stages

Tensor = torch.Tensor
PROMISED = 2.0**-8
EPS = (1e-3, 1e-6, 1e-12)
LOW, HIGH = -4.0, 4.0


def rows(*shape: int) -> Tensor:
    """Of all sizes that the range and float32 have, of zeros, and at the ends of the range."""
    x = torch.randn(8, *shape, generator=torch.Generator().manual_seed(1)).clamp(LOW, HIGH)
    sizes = torch.tensor([1, 0.1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 0.0]).view(-1, *[1] * len(shape))
    return torch.cat([x * sizes, torch.full((1, *shape), HIGH), torch.full((1, *shape), LOW)])


def centred(x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True)


# What a model writes, by eps; and the op that it is taken for.
Form = Callable[[Tensor, float], Tensor]
FORMS: dict[str, tuple[Form, type]] = {
    "rsqrt": (lambda x, e: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + e), RootMeanSquare),
    "quotient": (lambda x, e: x / torch.sqrt((x * x).mean(-1, keepdim=True) + e), RootMeanSquare),
    "reciprocal": (lambda x, e: (1 / torch.sqrt(x.square().mean(-1, keepdim=True) + e)) * x, RootMeanSquare),
    "sum": (lambda x, e: x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) / x.shape[-1] + e), RootMeanSquare),
    "length": (lambda x, e: x / (x.norm(dim=-1, keepdim=True) + e), UnitLength),
    "root of a sum": (lambda x, e: x / (torch.sqrt((x**2).sum(-1, keepdim=True)) + e), UnitLength),
    "normalize": (lambda x, e: F.normalize(x, dim=-1, eps=e), UnitLength),
    "variance": (lambda x, e: centred(x) / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + e), Normalise),
    "unbiased": (lambda x, e: centred(x) * torch.rsqrt(x.var(-1, keepdim=True) + e), Normalise),
    "deviation": (lambda x, e: centred(x) / (x.std(-1, keepdim=True) + e), Normalise),
    "squares": (lambda x, e: centred(x) / torch.sqrt(centred(x).pow(2).mean(-1, keepdim=True) + e), Normalise),
}


def close(model: nn.Module, x: Tensor, inputs: Tensor, worst: float = PROMISED) -> tacit.Secure:
    secure = tacit.compile(model.eval(), x, input_range=(LOW, HIGH))
    found = secure.check(inputs)
    with torch.no_grad():
        wanted = model(inputs)
    error = (found - wanted).abs().flatten(1).amax(1) / wanted.abs().flatten(1).amax(1).clamp(min=1)
    assert float(error.max()) < worst, error
    assert torch.equal(secure.reference(inputs, check=True), secure.reference(inputs))
    return secure


@pytest.mark.parametrize("eps", EPS)
@pytest.mark.parametrize("size", [8, 300])
@pytest.mark.parametrize("layer", [nn.RMSNorm, nn.LayerNorm])
def test_norms_of_rows_of_all_sizes(layer: Callable[..., nn.Module], size: int, eps: float) -> None:
    x = rows(size)
    close(layer(size, eps=eps), x[:2], x)


@pytest.mark.parametrize("eps", [1e-5, 1e-12])
def test_norms_of_images_of_all_sizes(eps: float) -> None:
    x = rows(4, 3, 5)
    close(nn.GroupNorm(2, 4, eps=eps), x[:2], x)


@pytest.mark.parametrize("eps", EPS)
@pytest.mark.parametrize("name", FORMS)
def test_norms_that_are_written_by_hand(name: str, eps: float) -> None:
    from tacit.driver import prepare

    form, op = FORMS[name]
    model, x = Model(lambda m, x: form(x, eps)).eval(), rows(24)
    draft = next(d for n, d in stages(prepare(model, x[:2], input_range=(LOW, HIGH))) if n == "recognise_norms")
    assert len(draft.plan.find(op)) == 1
    # A row of zeros has the root of 0 in it, whose quotient PyTorch does not know without an eps that it sees.
    close(model, x[:2], x)


def test_what_is_no_norm_is_left_as_it_is() -> None:
    from tacit.driver import prepare

    forms: list[Callable[[Model, Tensor], Tensor]] = [
        lambda m, x: x * torch.rsqrt((2 * x).pow(2).mean(-1, keepdim=True) + 1e-3),  # of other squares
        lambda m, x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3).detach().abs(),
        lambda m, x: x[:, :1] * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3),  # of a part
        lambda m, x: centred(x) / torch.sqrt((x + x.flip(1)).var(-1, keepdim=True) + 1e-3),
    ]
    for form in forms:
        model, x = Model(form).eval(), rows(24)
        draft = next(d for n, d in stages(prepare(model, x[:2], input_range=(LOW, HIGH))) if n == "recognise_norms")
        assert not draft.plan.find(RootMeanSquare) and not draft.plan.find(Normalise)


def test_norms_behind_layers_and_one_another() -> None:
    torch.manual_seed(0)
    x = rows(16)
    linear, norm = nn.Linear(16, 16, bias=False), nn.RMSNorm(16, eps=1e-6)
    close(nn.Sequential(linear, norm), x[:2], x)
    close(nn.Sequential(norm, linear, nn.RMSNorm(16, eps=1e-6)), x[:2], x)


def test_the_response_of_a_channel_relative_to_that_of_all() -> None:
    """ConvNeXtV2's global response normalisation: lengths divided by their mean."""

    def respond(m: Model, x: Tensor) -> Tensor:
        length = x.norm(p=2, dim=(2, 3), keepdim=True)
        return x + x * (length / (length.mean(1, keepdim=True) + 1e-6))

    x = rows(6, 3, 3)[:8]
    close(Model(respond), x[:2], x)


@pytest.mark.parametrize(
    ("function", "low", "high"),
    [(torch.log, 1e-4, 250.0), (torch.rsqrt, 1e-4, 100.0), (torch.reciprocal, 1e-3, 100.0), (torch.sqrt, 0.0, 250.0)],
)
def test_functions_get_the_bits_that_they_need_where_they_end(
    function: Callable[[Tensor], Tensor], low: float, high: float
) -> None:
    x = torch.cat([torch.logspace(-4, 2, 20).clamp(low, high)[None], low + torch.rand(3, 20) * (high - low)])
    model = Model(lambda m, x: function(x)).eval()
    secure = tacit.compile(model, x[1:3], input_range=(low, high))
    wanted = function(x)
    assert float(((secure(x) - wanted).abs() / wanted.abs().clamp(min=1)).max()) < PROMISED


def test_gelu_as_gpt2_writes_it_is_one_function() -> None:
    def gelu(m: Model, x: Tensor) -> Tensor:
        return 0.5 * x * (1.0 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * torch.pow(x, 3.0))))

    def other(m: Model, x: Tensor) -> Tensor:
        return 0.5 * x * (1.0 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.05 * torch.pow(x, 3.0))))

    x = torch.randn(4, 9, generator=torch.Generator().manual_seed(0)).clamp(LOW, HIGH)
    for form, count in ((gelu, 1), (other, 2)):
        secure = close(Model(form), x, x)
        assert len([n for n in secure.plan.nodes if n.op.name == "spline" and n.op.function != "square"]) == count  # type: ignore[attr-defined]
