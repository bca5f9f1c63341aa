"""Every layer against the float model; everything unsupported ends in one message that says what to do."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tacit
from tacit.ir.ops.roles import Input

Tensor = torch.Tensor
CLOSE = 2.0**-8  # what the compiler promises for logits
DYNAMIC = torch.export.Dim.DYNAMIC


class Model(nn.Module):
    """A forward written as a function of the model and its input."""

    def __init__(self, forward: Callable[[Model, Tensor], Tensor], **members: object) -> None:
        super().__init__()
        self._forward = forward
        for name, member in members.items():
            setattr(self, name, nn.Parameter(member) if isinstance(member, Tensor) else member)

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self, x)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def seeded(module: nn.Module) -> nn.Module:
    """Evaluation mode, all parameters and statistics random."""
    generator = torch.Generator().manual_seed(1)
    for name, value in [*module.named_parameters(), *module.named_buffers()]:
        if value.is_floating_point():
            with torch.no_grad():
                value.uniform_(0.5, 1.5, generator=generator) if "var" in name else value.uniform_(
                    -0.5, 0.5, generator=generator
                )
    return module.eval()


def exact(model: nn.Module, x: Tensor) -> Tensor:
    """The model's answer in float64."""
    with torch.no_grad():
        answer: Tensor = model.double()(x.double())
        model.float()
    return answer


def agrees(model: nn.Module, x: Tensor, **options: object) -> tacit.Secure:
    """The oracle and a checked secure run are both close to the model in float64, shape and all."""
    model = seeded(model)
    secure = tacit.compile(model, x, input_range=(-1, 1), **options)  # type: ignore[arg-type]
    expected = exact(model, x)
    for answer in (secure.reference(x), secure.check(x)):
        if expected.is_floating_point():
            assert answer.dtype == torch.float32
            torch.testing.assert_close(answer.double(), expected.double(), atol=CLOSE, rtol=0)
        else:
            assert torch.equal(answer, expected)
    return secure


def ops(secure: tacit.Secure) -> list[str]:
    return [node.op.name for node in secure.plan.nodes]


# --- supported layers ---

IMAGE = random(2, 4, 7, 6)
LAYERS: dict[str, nn.Module] = {
    "conv": nn.Conv2d(4, 3, 3),
    "conv without bias": nn.Conv2d(4, 3, 3, bias=False),
    "conv, stride and padding": nn.Conv2d(4, 3, 3, stride=2, padding=1),
    "conv, uneven everything": nn.Conv2d(4, 3, (3, 2), stride=(1, 2), padding=(2, 0), dilation=(2, 1)),
    "conv in groups": nn.Conv2d(4, 6, 3, groups=2),
    "depthwise conv": nn.Conv2d(4, 4, 3, groups=4, padding=1),
    "conv same": nn.Conv2d(4, 3, (3, 5), padding="same", dilation=(2, 1)),
    "conv valid": nn.Conv2d(4, 3, 3, padding="valid"),
    "pointwise conv": nn.Conv2d(4, 3, 1),
    "batch norm": nn.BatchNorm2d(4),
    "batch norm without affine": nn.BatchNorm2d(4, affine=False),
    "batch norm behind conv": nn.Sequential(nn.Conv2d(4, 3, 3), nn.BatchNorm2d(3)),
    "batch norm behind conv without bias": nn.Sequential(nn.Conv2d(4, 3, 3, bias=False), nn.BatchNorm2d(3), nn.ReLU()),
    "batch norm first": nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 3)),
    "batch norm twice": nn.Sequential(nn.Conv2d(4, 3, 3), nn.BatchNorm2d(3), nn.BatchNorm2d(3)),
    "relu": nn.ReLU(),
    "relu in place": nn.Sequential(nn.Conv2d(4, 3, 3), nn.ReLU(inplace=True)),
    "relu twice": nn.Sequential(nn.Conv2d(4, 3, 1), nn.ReLU(), nn.ReLU()),
    "max pool": nn.MaxPool2d(2),
    "max pool with padding": nn.MaxPool2d(3, stride=2, padding=1),
    "max pool with dilation": nn.MaxPool2d(2, stride=1, dilation=(3, 2)),
    "max pool, ceil mode": nn.MaxPool2d(2, ceil_mode=True),
    "max pool, all at once": nn.MaxPool2d((3, 2), stride=(2, 3), padding=1, dilation=2, ceil_mode=True),
    "max pool behind relu": nn.Sequential(nn.Conv2d(4, 3, 3), nn.ReLU(), nn.MaxPool2d(2)),
    "average pool": nn.AvgPool2d(2),
    "average pool of nine": nn.AvgPool2d(3, stride=1),
    "average pool with padding": nn.AvgPool2d(3, stride=2, padding=1),
    "average pool without padding in the count": nn.AvgPool2d(3, stride=2, padding=1, count_include_pad=False),
    "average pool, ceil mode": nn.AvgPool2d((2, 4), ceil_mode=True),
    "average pool, all at once": nn.AvgPool2d(3, stride=2, padding=1, ceil_mode=True, count_include_pad=False),
    "average pool with a divisor": nn.AvgPool2d(2, divisor_override=3),
    "average pool behind conv": nn.Sequential(nn.Conv2d(4, 3, 3), nn.AvgPool2d(2), nn.Conv2d(3, 2, 1)),
    "adaptive pool to one": nn.AdaptiveAvgPool2d(1),
    "adaptive pool, uneven": nn.AdaptiveAvgPool2d((3, 4)),
    "adaptive pool of one dimension": nn.AdaptiveAvgPool2d((None, 2)),
    "flatten and linear": nn.Sequential(nn.Flatten(), nn.Linear(168, 3)),
    "unflatten": nn.Sequential(
        nn.Flatten(), nn.Linear(168, 12), nn.ReLU(), nn.Unflatten(1, (3, 2, 2)), nn.Conv2d(3, 2, 2)
    ),
    "dropout": nn.Sequential(nn.Dropout2d(0.5), nn.Conv2d(4, 3, 3), nn.Dropout(0.9)),
    "identity": nn.Identity(),
}


@pytest.mark.parametrize("name", LAYERS)
def test_image_layers_agree_with_torch(name: str) -> None:
    agrees(LAYERS[name], IMAGE)


ROWS = random(3, 6)
FUNCTIONS: dict[str, Model] = {
    "linear": Model(lambda m, x: m.fc(x), fc=nn.Linear(6, 4)),
    "linear without bias": Model(lambda m, x: m.fc(x), fc=nn.Linear(6, 4, bias=False)),
    "linear twice the same": Model(lambda m, x: m.fc(m.fc(x).relu()), fc=nn.Linear(6, 6)),
    "linear on three dimensions": Model(lambda m, x: m.fc(x.view(-1, 2, 3)), fc=nn.Linear(3, 4)),
    "batch norm 1d": Model(lambda m, x: m.bn(m.fc(x)).relu(), fc=nn.Linear(6, 4), bn=nn.BatchNorm1d(4)),
    "batch norm of a branch": Model(
        lambda m, x: m.bn(y := m.fc(x)).relu() + y, fc=nn.Linear(6, 4), bn=nn.BatchNorm1d(4)
    ),
    "batch norm over the middle": Model(
        lambda m, x: m.bn(m.fc(x.view(-1, 3, 2))), fc=nn.Linear(2, 3), bn=nn.BatchNorm1d(3)
    ),
    "batch norm behind a sum": Model(lambda m, x: m.bn(m.fc(x) + x).relu(), fc=nn.Linear(6, 6), bn=nn.BatchNorm1d(6)),
    "view": Model(lambda m, x: x.view(-1, 2, 3).relu()),
    "view by the batch": Model(lambda m, x: x.view(x.size(0), 3, -1).relu()),
    "reshape by the shape": Model(lambda m, x: x.reshape(x.shape[0], 2, 3).flatten(1)),
    "squeeze and unsqueeze": Model(lambda m, x: x.unsqueeze(1).squeeze(1).unsqueeze(2).relu()),
    "residual": Model(lambda m, x: (m.fc(x) + x).relu(), fc=nn.Linear(6, 6)),
    "minus a constant": Model(lambda m, x: x - m.w, w=random(6)),
    "a constant minus": Model(lambda m, x: m.w - x, w=random(6)),
    "alpha": Model(lambda m, x: torch.sub(torch.add(x, m.w, alpha=2), x, alpha=3), w=random(6)),
    "a computed constant": Model(lambda m, x: x + torch.relu(m.w) * 2.5, w=random(6)),
    "a computed weight": Model(lambda m, x: F.linear(x, m.w * 2), w=random(4, 6)),
    "a literal tensor": Model(lambda m, x: x * torch.tensor(2.5)),
    "mean over the image": Model(lambda m, x: x.view(-1, 1, 2, 3).mean((2, 3))),
    "mean over the image, dimensions kept": Model(lambda m, x: x.view(-1, 1, 2, 3).mean((-1, -2), keepdim=True)),
    "a wider operand": Model(lambda m, x: x.view(-1, 6, 1) + x.view(-1, 1, 6)),
    "difference": Model(lambda m, x: m.fc(x) - x, fc=nn.Linear(6, 6)),
    "residual in place": Model(lambda m, x: m.fc(x).add_(x).relu_(), fc=nn.Linear(6, 6)),
    "double": Model(lambda m, x: x + x),
    "plus a scalar": Model(lambda m, x: 0.3 + x - 0.75),
    "from a scalar": Model(lambda m, x: 1 - x),
    "times a scalar": Model(lambda m, x: -0.3 * x * 2),
    "divided by a scalar": Model(lambda m, x: (x / 3).relu()),
    "negative": Model(lambda m, x: (-x).relu()),
    "plus a constant": Model(lambda m, x: x + m.w, w=random(6)),
    "constant plus": Model(lambda m, x: m.w + m.fc(x), w=random(6), fc=nn.Linear(6, 6)),
    "constant minus": Model(lambda m, x: x.neg() + m.w, w=random(6)),
    "times a constant": Model(lambda m, x: (x * m.w).relu(), w=random(6)),
    "times a constant, twice": Model(lambda m, x: m.w * (m.w * x), w=random(6)),
    "times one learnt number": Model(lambda m, x: x * m.w + m.w, w=torch.tensor(0.7)),
    "plus a list": Model(lambda m, x: x + torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])),
    "dropout": Model(lambda m, x: F.dropout(x, 0.5, m.training) + 1),
    "argmax": Model(lambda m, x: m.fc(x).argmax(1), fc=nn.Linear(6, 4)),
    "argmax of the last dimension": Model(lambda m, x: x.argmax(-1)),
    "argmax of softmax": Model(lambda m, x: F.softmax(m.fc(x), -1).argmax(1), fc=nn.Linear(6, 4)),
    "argmax of log softmax": Model(lambda m, x: torch.log_softmax(m.fc(x), 1).argmax(dim=1), fc=nn.Linear(6, 4)),
    "divided by a constant": Model(lambda m, x: x / m.w, w=random(6) + 2),
    "rows of half the length": Model(lambda m, x: x.reshape(-1, 3) * 2),
    "detach, clone, contiguous": Model(lambda m, x: x.detach().clone().contiguous().relu()),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_other_layers_agree_with_torch(name: str) -> None:
    agrees(FUNCTIONS[name], ROWS)


@pytest.mark.parametrize("protocol", ["fused", "securenn"])
@pytest.mark.parametrize("last", [nn.Identity(), nn.Softmax(1), nn.LogSoftmax(1)])
def test_reveal_argmax_and_correct_need_no_softmax(protocol: str, last: nn.Module) -> None:
    model = seeded(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4), last))
    classes = exact(model, ROWS).argmax(1)
    found = tacit.compile(model, ROWS, reveal="argmax", protocol=protocol)
    assert torch.equal(found.check(ROWS), classes)
    counting = tacit.compile(model, ROWS, reveal="correct", protocol=protocol)
    targets = torch.cat([classes[:2], (classes[2:] + 1) % 4])
    assert int(counting.check(ROWS, targets)) == 2
    assert int(counting(ROWS, targets)) == 2


@pytest.mark.parametrize("protocol", ["fused", "securenn"])
def test_both_suites_agree_on_a_small_network(protocol: str) -> None:
    model = nn.Sequential(
        nn.Conv2d(4, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 3)
    )
    agrees(model, IMAGE, protocol=protocol)


def test_lines_of_a_suite_take_no_names_of_later_lines() -> None:
    model = Model(lambda m, x: m.fc(m.fc(x).clamp(-0.5, 0.8)).clamp(-0.5, 0.5) + x, fc=nn.Linear(6, 6))
    agrees(model, ROWS, protocol="securenn")


def test_batch_norm_is_folded_where_its_layer_has_no_other_use() -> None:
    folded = agrees(LAYERS["batch norm behind conv"], IMAGE)
    assert [op for op in ops(folded) if op in ("conv2d", "mul")] == ["conv2d"]
    kept = agrees(FUNCTIONS["batch norm of a branch"], ROWS)
    assert [op for op in ops(kept) if op in ("linear", "mul")] == ["linear", "mul"]


def test_max_pool_goes_before_relu() -> None:
    found = ops(agrees(LAYERS["max pool behind relu"], IMAGE))
    assert found.index("max_pool2d") < found.index("relu")


def test_no_ops_leave_no_line() -> None:
    assert ops(agrees(nn.Sequential(nn.Dropout(), nn.Identity(), nn.ReLU()), ROWS)) == ["input", "relu", "reveal"]


@pytest.mark.parametrize("frac_bits", [6, 10, 14])
def test_precision_follows_frac_bits(frac_bits: int) -> None:
    model = seeded(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)))
    secure = tacit.compile(model, ROWS, frac_bits=frac_bits)
    error = (secure.check(ROWS).double() - exact(model, ROWS)).abs().max()
    assert error < 8 * 2.0**-frac_bits
    assert secure.plan.find(Input)[0].type.frac == frac_bits


def test_calibration_narrows_the_ranges() -> None:
    middle = [layer for _ in range(8) for layer in (nn.Linear(30, 30), nn.ReLU())]
    model = seeded(nn.Sequential(nn.Linear(6, 30), nn.ReLU(), *middle, nn.Linear(30, 2)))
    proved = tacit.compile(model, ROWS, frac_bits=12)
    shown = random(64, 6, seed=3)
    calibrated = tacit.compile(model, ROWS, frac_bits=12, ranges="measured", margin=2, calibration=shown)
    assert "ranges=proved" in str(proved.plan)
    assert "ranges=measured" in str(calibrated.plan)
    assert calibrated.plan.cost().online_bytes < proved.plan.cost().online_bytes
    torch.testing.assert_close(calibrated.check(ROWS).double(), exact(model, ROWS), atol=CLOSE, rtol=0)


class Block(nn.Module):
    """A residual block as in ResNet: two convolutions with batch norm, and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out)


def resnet() -> nn.Module:
    return nn.Sequential(Block(4, 4, 1), Block(4, 6, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))


def test_a_residual_network_agrees_with_torch_at_every_batch_size() -> None:
    model = resnet()
    secure = agrees(model, IMAGE)
    x = random(5, 4, 7, 6, seed=2)
    whole = secure.reference(x)
    torch.testing.assert_close(whole.double(), exact(model, x), atol=CLOSE, rtol=0)
    assert torch.equal(torch.cat([secure.reference(part) for part in x.split([1, 3, 1])]), whole)
    for part, expected in zip(x.split([1, 4]), whole.split([1, 4]), strict=True):
        torch.testing.assert_close(secure(part), expected, atol=CLOSE, rtol=0)


def test_the_plan_does_not_depend_on_the_batch_of_the_example() -> None:
    model = seeded(resnet())
    plans = {str(tacit.compile(model, x, input_range=(-1, 1), frac_bits=11).plan) for x in (IMAGE[:1], IMAGE)}
    assert len(plans) == 1


# --- other forms of a model ---


def test_a_graph_module_is_accepted() -> None:
    agrees(torch.fx.symbolic_trace(seeded(resnet())), IMAGE)


def test_an_exported_program_is_accepted() -> None:
    model = seeded(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)))
    for batch in (DYNAMIC, torch.export.Dim("batch", min=1, max=64)):
        program = torch.export.export(model, (ROWS,), dynamic_shapes=({0: batch},))
        torch.testing.assert_close(
            tacit.compile(program, ROWS).check(ROWS).double(), exact(model, ROWS), atol=CLOSE, rtol=0
        )


def test_an_exported_program_needs_a_dynamic_batch() -> None:
    program = torch.export.export(nn.Linear(6, 2).eval(), (ROWS,))
    with pytest.raises(tacit.CompileError, match="dynamic"):
        tacit.compile(program, ROWS)


@pytest.mark.parametrize("examples", [(ROWS, ROWS), (random(3, 5),)])
def test_examples_have_to_fit_an_exported_program(examples: tuple[Tensor, ...]) -> None:
    program = torch.export.export(nn.Linear(6, 2).eval(), (ROWS,), dynamic_shapes=({0: DYNAMIC},))
    with pytest.raises(tacit.CompileError):
        tacit.compile(program, examples)


def test_a_double_precision_model_is_accepted() -> None:
    model = seeded(nn.Linear(6, 2)).double()
    secure = tacit.compile(model, ROWS.double())
    answer = secure(ROWS.double())
    assert answer.dtype == torch.float64
    torch.testing.assert_close(answer, model(ROWS.double()), atol=CLOSE, rtol=0)


def test_names_of_inputs_and_parameters_do_not_collide_with_those_of_lines() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w0 = nn.Linear(6, 6)

        def forward(self, y: Tensor, w0: Tensor, m0: Tensor, targets: Tensor) -> Tensor:
            out: Tensor = self.w0(y).relu() + w0 + m0 + targets
            return out

    model = seeded(Named())
    secure = tacit.compile(model, (ROWS,) * 4, input_range=(-1, 1))
    torch.testing.assert_close(secure.check(*[ROWS] * 4), model(*[ROWS] * 4).detach(), atol=CLOSE, rtol=0)
    assert tacit.Plan.parse(str(secure.plan)) == secure.plan


# --- what is refused, and how ---


def refused(model: object, x: object = ROWS, **options: object) -> str:
    with pytest.raises(tacit.CompileError) as caught:
        tacit.compile(model, x, **options)  # type: ignore[arg-type]
    return str(caught.value)


class Head(nn.Module):
    """Something unsupported, two modules deep."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Sequential(nn.Linear(6, 6), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(self.gate[0](x))


def test_an_unsupported_layer_is_drawn_with_module_source_and_remedy() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU())
    model.add_module("head", Head())
    told = refused(model.eval())
    line = Head.forward.__code__.co_firstlineno + 1
    assert "module 'head'" in told
    assert f"test_capture.py:{line}" in told
    assert "'aten.special_bessel_j0.default' is not supported" in told
    supported = next(row for row in told.split("\n") if row.startswith("Supported: "))
    assert all(name in supported for name in ("linear", "conv2d", "relu", "max_pool2d", "batch_norm"))
    assert "ModelOp" in told
    drawing = told.split("\n")
    culprit = next(i for i, row in enumerate(drawing) if "|" in row and "torch.ops.aten.special_bessel_j0" in row)
    assert set(drawing[culprit + 1].split("|")[1].strip()) == {"^"}
    assert "torch.ops.aten.linear" in drawing[culprit - 1]


UNSUPPORTED: dict[str, tuple[Model, str]] = {
    "division by what may be 0": (Model(lambda m, x: x / x), "reciprocal is not defined everywhere in .-4, 4."),
    "logarithm of what may be 0": (Model(lambda m, x: torch.log(x)), "log is not defined everywhere"),
    "expand a constant": (Model(lambda m, x: x + m.w, w=random(5, 1, 6)), "broadcast"),
    "argmax of the batch": (Model(lambda m, x: x.argmax(0)), "argmax"),
    "batch moved": (Model(lambda m, x: x.unsqueeze(0)), "batch"),
    "batch split": (Model(lambda m, x: x.reshape(3, -1)), "batch"),
    "softmax over the batch": (Model(lambda m, x: F.softmax(x, 0).argmax(1)), "softmax"),
    "a constant result": (Model(lambda m, x: m.w, w=random(6)), "depends on the input"),
    "infinite scalar": (Model(lambda m, x: x * float("inf")), "inf"),
    "NaN scalar": (Model(lambda m, x: x + float("nan")), "(?i)nan"),
    "division by zero": (Model(lambda m, x: x / 0), "zero|inf"),
    "NaN weight": (Model(lambda m, x: x + m.w, w=torch.full((6,), float("nan"))), "'w' holds NaN"),
    "half weight": (Model(lambda m, x: x + m.w, w=random(6).half()), "float16"),
    "control flow": (Model(lambda m, x: x if x.sum() > 0 else -x), "control flow"),
    "fixed batch": (Model(lambda m, x: x + x.new_ones(3, 6)), "fixes the batch"),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_the_message_says_what_is_not_supported(name: str) -> None:
    model, told = UNSUPPORTED[name]
    with pytest.raises(tacit.CompileError, match=told):
        tacit.compile(model.eval(), ROWS)


def test_training_mode_is_refused_by_the_name_of_the_module() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Dropout()).eval()
    model[1].train()
    told = refused(model)
    assert "'1'" in told
    assert "model.eval()" in told


def test_batch_norm_without_statistics_is_refused() -> None:
    assert "statistics" in refused(nn.BatchNorm2d(4, track_running_stats=False).eval(), IMAGE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.complex64, torch.uint16])
def test_inputs_of_other_types_are_refused(dtype: torch.dtype) -> None:
    assert "float" in refused(nn.ReLU().eval(), ROWS.to(dtype))


@pytest.mark.parametrize(
    "example", [random(6), random(0, 6), (), [[1.0, 2.0]], None, 3, torch.full((2, 6), float("nan"))]
)
def test_examples_are_float_tensors_with_a_batch(example: object) -> None:
    refused(nn.ReLU().eval(), example)


@pytest.mark.parametrize("model", [None, lambda x: x, nn.ReLU, "model"])
def test_a_model_is_a_module(model: object) -> None:
    assert "torch.nn.Module" in refused(model)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"reveal": "everything"}, "logits, argmax, correct"),
        ({"protocol": "magic"}, "fused, securenn"),
        ({"frac_bits": 0}, "1 to 20"),
        ({"frac_bits": 21}, "1 to 20"),
        ({"frac_bits": 8.5}, "frac_bits"),
        ({"input_range": (1, -1)}, "low < high"),
        ({"input_range": (0, float("inf"))}, "finite"),
        ({"input_range": (0, float("nan"))}, "finite"),
        ({"input_range": (0.5, 1)}, "outside"),
        ({"input_range": [(-1, 1), (-1, 1)]}, "2 input ranges for 1"),
        ({"input_range": 5}, "input_range"),
        ({"calibration": ()}, "calibration"),
        ({"calibration": (ROWS, ROWS)}, "calibration"),
        ({"name": "two words"}, "name"),
        ({"name": "two\nlines"}, "name"),
    ],
)
def test_unfit_options_are_refused(options: dict[str, object], told: str) -> None:
    assert told in refused(nn.ReLU().eval(), **options)


def test_reveal_needs_classes() -> None:
    assert "N x classes" in refused(nn.Conv2d(4, 3, 3).eval(), IMAGE, reveal="argmax")


def test_a_value_that_may_overflow_names_its_layer_and_the_remedies() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU())
    model.add_module("wide", nn.Linear(6, 6))
    with torch.no_grad():
        model[2].weight.mul_(2.0**56)
    told = refused(model.eval(), frac_bits=12)
    assert "'wide" in told
    assert any(remedy in told for remedy in ("input_range", "calibration", "frac_bits"))


def wide(factor: float) -> nn.Module:
    """Values grow from layer to layer, up to what the ring holds."""
    layers = [layer for _ in range(9) for layer in (nn.Linear(16, 16), nn.ReLU())]
    model = seeded(nn.Sequential(*layers, nn.Linear(16, 2)))
    with torch.no_grad():
        for layer in layers[::2]:
            layer.weight.mul_(factor)  # type: ignore[operator]
    return model


def test_a_deep_network_of_wide_ranges_is_refused_at_a_scale_that_does_not_fit() -> None:
    model, x = wide(16), random(64, 16)
    told = refused(model, x, frac_bits=12)
    assert "input_range" in told
    (fewer,) = re.findall(r"frac_bits=(\d+);", told)
    secure, wanted = tacit.compile(model, x, frac_bits=int(fewer), calibration=x), exact(model, x)
    assert float((secure.check(x).double() - wanted).abs().max()) < 0.05 * float(wanted.abs().max())
    with pytest.warns(tacit.PrecisionWarning, match="8 fractional bits"):  # what fits is chosen, and is not much
        found = tacit.compile(model, x, calibration=x)
    assert float((found.check(x).double() - wanted).abs().max()) < 0.05 * float(wanted.abs().max())


def test_a_range_beyond_the_ring_is_refused() -> None:
    assert "input_range" in refused(nn.ReLU().eval(), ROWS, input_range=(-1e30, 1e30))
