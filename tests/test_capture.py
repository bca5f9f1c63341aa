"""What the front end takes, and how it says no."""

from __future__ import annotations

import re

import models
import pytest
import torch
from models import images, seeded
from torch import nn

import tacit

Tensor = torch.Tensor


def conv(*args: object, **kwargs: object) -> nn.Module:
    return nn.Conv2d(*args, **kwargs)  # type: ignore[arg-type]


LAYERS = {
    "linear": (nn.Linear(6, 4), (6,)),
    "linear_without_bias": (nn.Linear(6, 4, bias=False), (6,)),
    "linear_on_sequences": (nn.Linear(6, 4), (3, 6)),
    "conv2d": (conv(2, 3, 3), (2, 6, 5)),
    "conv2d_stride_padding_dilation": (conv(2, 3, 3, stride=2, padding=(1, 2), dilation=2), (2, 8, 7)),
    "conv2d_groups": (conv(4, 6, 3, groups=2, bias=False), (4, 5, 5)),
    "conv2d_depthwise": (conv(4, 4, 3, groups=4), (4, 5, 5)),
    "conv2d_same": (conv(2, 3, 3, padding="same"), (2, 5, 5)),
    "conv2d_valid": (conv(2, 3, 3, padding="valid"), (2, 5, 5)),
    "batch_norm_folded": (nn.Sequential(conv(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU()), (2, 5, 5)),
    "batch_norm_alone": (models.NormFirst(), (2, 3, 3)),
    "batch_norm_of_a_shared_layer": (models.UsedTwice(), (1, 5, 5)),
    "relu": (nn.Sequential(nn.Linear(6, 9), nn.ReLU(inplace=True)), (6,)),
    "relu_on_the_input": (nn.ReLU(), (6,)),
    "max_pool2d": (nn.MaxPool2d(2), (2, 6, 5)),
    "max_pool2d_padding_dilation_ceil": (nn.MaxPool2d(3, 2, 1, 2, ceil_mode=True), (2, 9, 8)),
    "max_pool2d_of_products": (nn.Sequential(conv(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2)), (1, 8, 8)),
    "avg_pool2d": (nn.AvgPool2d(2), (2, 6, 6)),
    "avg_pool2d_padding_ceil": (nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False), (2, 6, 7)),
    "avg_pool2d_divisor": (nn.AvgPool2d(2, divisor_override=3), (2, 6, 6)),
    "adaptive_avg_pool2d": (nn.AdaptiveAvgPool2d(1), (2, 6, 5)),
    "adaptive_avg_pool2d_uneven": (nn.AdaptiveAvgPool2d((3, 2)), (2, 7, 5)),
    "adaptive_avg_pool2d_after_product": (
        nn.Sequential(conv(1, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 3)),
        (1, 5, 5),
    ),
    "flatten": (nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), (3, 2, 2)),
    "unflatten": (nn.Sequential(nn.Linear(12, 12), nn.Unflatten(1, (3, 2, 2)), conv(3, 2, 2)), (12,)),
    "residual": (models.Residual(), (3, 6, 6)),
    "branches": (models.Branches(), (1, 5, 5)),
    "relu_used_twice": (models.ReluUsedTwice(), (1, 6, 6)),
    "constants": (models.Constants(), (3, 4, 4)),
    "dropout": (nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.5), nn.ReLU(), nn.Dropout(), nn.Linear(5, 3)), (6,)),
}


@pytest.mark.parametrize("protocol", ["fused", "securenn"])
@pytest.mark.parametrize("name", LAYERS)
def test_layer_is_exact_against_the_oracle_and_close_to_float(name: str, protocol: str) -> None:
    model, shape = LAYERS[name]
    model = seeded(model)
    x = images(3, *shape)
    secure = tacit.compile(model, x, input_range=(-1, 1), protocol=protocol)
    expected = model(x.clone()).detach()
    assert (secure.check(x) - expected).abs().max() < 2**-8
    assert (secure.reference(x) - expected).abs().max() < 2**-8
    assert secure(x).shape == expected.shape
    assert secure(x).dtype == expected.dtype


@pytest.mark.parametrize("last", [nn.Identity(), nn.Softmax(1), nn.LogSoftmax(-1)])
@pytest.mark.parametrize("protocol", ["fused", "securenn"])
def test_argmax_with_and_without_softmax(last: nn.Module, protocol: str) -> None:
    model = seeded(nn.Sequential(nn.Linear(6, 7), last))
    x = images(50, 6)
    secure = tacit.compile(model, x, reveal="argmax", input_range=(-1, 1), protocol=protocol)
    assert torch.equal(secure.check(x), model(x).argmax(1))
    assert not [node for node in secure.plan.nodes if "softmax" in node.op.name]


def test_argmax_inside_the_model() -> None:
    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            return torch.argmax(self.fc(x).log_softmax(1), dim=1)

    model, x = seeded(Classifier()), images(20, 6)
    for reveal in ("logits", "argmax"):
        assert torch.equal(tacit.compile(model, x, reveal=reveal, input_range=(-1, 1))(x), model(x))


@pytest.mark.parametrize("protocol", ["fused", "securenn"])
def test_correct_counts_matches_alone(protocol: str) -> None:
    model, x = seeded(nn.Linear(6, 5)), images(40, 6)
    targets = torch.randint(0, 5, (40,), generator=torch.Generator().manual_seed(2))
    secure = tacit.compile(model, x, reveal="correct", input_range=(-1, 1), protocol=protocol)
    right = int((model(x).argmax(1) == targets).sum())
    assert 0 < right < 40
    assert int(secure.check(x, targets)) == right
    assert secure.plan.node(secure.plan.result).type.shape == (1,)


def test_several_inputs() -> None:
    model, x, y = seeded(models.TwoInputs()), images(4, 3), images(4, 2, seed=9)
    secure = tacit.compile(model, (x, y), input_range=[(-1, 1), (-2, 2)])
    assert (secure.check(x, y) - model(x, y)).abs().max() < 2**-8


def test_graph_module_and_exported_program_are_accepted() -> None:
    model, x = seeded(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))), images(4, 6)
    traced = torch.fx.symbolic_trace(model)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    for source in (traced, exported):
        secure = tacit.compile(source, x, input_range=(-1, 1))
        assert (secure.check(x) - model(x)).abs().max() < 2**-8


def test_exported_program_with_fixed_batch_is_refused() -> None:
    model, x = seeded(nn.Linear(6, 5)), images(4, 6)
    with pytest.raises(tacit.CompileError, match="symbolic batch"):
        tacit.compile(torch.export.export(model, (x,)), x)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_any_example_batch_gives_the_same_plan(batch: int) -> None:
    model = seeded(models.Residual())
    plans = {str(tacit.compile(model, images(n, 3, 6, 6), input_range=(-1, 1), frac_bits=13).plan) for n in (batch, 7)}
    assert len(plans) == 1


def test_results_do_not_depend_on_the_batch() -> None:
    """The same image alone, in company, and at another place: same class, and logits within rounding."""
    model, x = seeded(models.Residual()), images(9, 3, 6, 6)
    secure = tacit.compile(model, x, input_range=(-1, 1))
    whole = secure(x)
    alone = torch.cat([secure(x[i : i + 1]) for i in range(9)])
    assert (whole - alone).abs().max() < 2**-9
    assert (secure(x.flip(0)).flip(0) - whole).abs().max() < 2**-9


# --- refusals ---


def refused(model: nn.Module, x: Tensor, **options: object) -> str:
    with pytest.raises(tacit.CompileError) as caught:
        tacit.compile(model, x, **options)  # type: ignore[arg-type]
    return str(caught.value)


def test_unsupported_layer_is_drawn_with_module_line_and_remedy() -> None:
    message = refused(models.Hidden().eval(), images(2, 4))
    assert "module 'body.1'" in message
    assert re.search(r"\w+\.py:\d+", message)
    assert "aten.sigmoid.default" in message
    assert "^^^^" in message
    assert "max_pool2d" in message
    assert "ModelOp" in message


def test_source_line_is_the_user_s() -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sin()

    assert re.search(r"test_capture\.py:\d+", refused(Odd().eval(), images(2, 4)))


@pytest.mark.parametrize(
    ("model", "shape", "options", "words"),
    [
        (nn.Sequential(nn.Linear(4, 4), nn.Dropout()).train(), (4,), {}, "training mode.*eval"),
        (nn.Sequential(nn.Linear(4, 4), nn.Softmax(1)).eval(), (4,), {}, "module '1'.*softmax.*reveal='argmax'"),
        (models.TwoOutputs().eval(), (4,), {}, "exactly one tensor"),
        (models.DependsOnValues().eval(), (4,), {}, "torch.export could not capture"),
        (nn.Linear(4, 4).double().half().eval(), (4,), {}, "torch.export|float"),
        (nn.Linear(4, 4).eval(), (4,), {"reveal": "all"}, "reveal.*logits, argmax, correct"),
        (nn.Linear(4, 4).eval(), (4,), {"protocol": "none"}, "protocol.*fused, securenn"),
        (nn.Linear(4, 4).eval(), (4,), {"input_range": (1, 0)}, "low < high"),
        (nn.Linear(4, 4).eval(), (4,), {"input_range": (0, 0.5)}, "outside input_range"),
        (nn.Linear(4, 4).eval(), (4,), {"input_range": [(-1, 1), (-1, 1)]}, "2 input ranges for 1"),
        (nn.Linear(4, 4).eval(), (4,), {"frac_bits": 0}, "frac_bits"),
        (nn.Linear(4, 4).eval(), (4,), {"frac_bits": 40}, "frac_bits"),
        (nn.Flatten(0).eval(), (4,), {}, "batch"),
        (nn.Conv2d(1, 1, 2, padding="same").eval(), (1, 4, 4), {}, "even kernel"),
    ],
)
def test_refusals_say_what_to_do(
    model: nn.Module, shape: tuple[int, ...], options: dict[str, object], words: str
) -> None:
    assert re.search(words, refused(model, images(2, *shape), **options), re.DOTALL)


def test_examples_that_are_no_examples() -> None:
    model = nn.Linear(4, 4).eval()
    for bad in (torch.zeros(2, 4, dtype=torch.int64), torch.zeros(4), torch.full((2, 4), torch.nan), torch.zeros(0, 4)):
        assert "example_inputs" in refused(model, bad)
    assert "torch.nn.Module" in refused(lambda x: x, images(2, 4))  # type: ignore[arg-type]


def test_weights_with_nan_are_refused_by_name() -> None:
    model = nn.Linear(4, 4).eval()
    with torch.no_grad():
        model.bias[0] = torch.nan
    assert "'bias' holds NaN" in refused(model, images(2, 4))


def test_a_value_that_cannot_fit_names_the_layer_and_the_remedies() -> None:
    layers: list[nn.Module] = []
    for _ in range(9):
        layers += [nn.Linear(64, 64), nn.ReLU()]
    model = nn.Sequential(*layers)
    with torch.no_grad():
        for value in model.parameters():
            value.fill_(1.0)
    message = refused(model.eval(), torch.ones(2, 64), frac_bits=16)
    assert re.search(
        r"module '\d+'.*takes \d+ bits.*input_range, calibration data, or fewer frac_bits", message, re.DOTALL
    )


def test_calibration_narrows_and_says_so() -> None:
    layers: list[nn.Module] = []
    for _ in range(6):
        layers += [nn.Linear(32, 32), nn.ReLU()]
    model, x = seeded(nn.Sequential(*layers)), images(64, 32)
    proved = tacit.compile(model, x, input_range=(-1, 1), frac_bits=12).plan
    calibrated = tacit.compile(model, x, input_range=(-1, 1), frac_bits=12, calibration=x)
    assert (proved.ranges, calibrated.plan.ranges) == ("proved", "calibrated")
    assert calibrated.plan.cost().online_bytes < proved.cost().online_bytes
    calibrated.check(x)
