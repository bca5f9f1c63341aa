"""The layers beyond those of test_capture, each against PyTorch: the oracle, and a secure run equal to it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from test_capture import Model, agrees, random
from torch import nn

Tensor = torch.Tensor

ROWS, LINE, IMAGE, CUBE = random(3, 6), random(2, 4, 9), random(2, 4, 6, 5), random(2, 2, 5, 4, 4)

CONVOLUTIONS: dict[str, tuple[nn.Module, Tensor]] = {
    "conv1d": (nn.Conv1d(4, 3, 3, stride=2, padding=1), LINE),
    "conv1d in groups": (nn.Conv1d(4, 6, 2, dilation=3, groups=2, bias=False), LINE),
    "conv1d same, even kernel": (nn.Conv1d(4, 3, 4, padding="same"), LINE),
    "conv1d and batch norm": (nn.Sequential(nn.Conv1d(4, 3, 3), nn.BatchNorm1d(3), nn.ReLU()), LINE),
    "conv2d same, even kernel": (nn.Conv2d(4, 3, (2, 4), padding="same"), IMAGE),
    "conv2d, padding by reflection": (nn.Conv2d(4, 3, 3, padding=1, padding_mode="reflect"), IMAGE),
    "conv2d, padding by replication": (nn.Conv2d(4, 3, 3, padding=(1, 2), padding_mode="replicate"), IMAGE),
    "conv2d, circular padding": (nn.Conv2d(4, 3, 3, padding=1, padding_mode="circular"), IMAGE),
    "conv3d": (nn.Conv3d(2, 3, 3, padding=1), CUBE),
    "conv3d, uneven everything": (nn.Conv3d(2, 4, (2, 3, 1), (2, 1, 2), (1, 0, 1), (2, 1, 1), 2), CUBE),
    "conv3d and batch norm": (nn.Sequential(nn.Conv3d(2, 3, 2), nn.BatchNorm3d(3), nn.ReLU()), CUBE),
    "transposed conv1d": (nn.ConvTranspose1d(4, 3, 3, stride=2, padding=1, output_padding=1), LINE),
    "transposed conv2d": (nn.ConvTranspose2d(4, 3, 3), IMAGE),
    "transposed conv2d, stride": (nn.ConvTranspose2d(4, 3, 4, stride=2, padding=1), IMAGE),
    "transposed conv2d, uneven": (nn.ConvTranspose2d(4, 6, (3, 2), (3, 1), (0, 1), (1, 0), 2, dilation=(2, 1)), IMAGE),
    "transposed conv2d, gaps": (nn.ConvTranspose2d(4, 3, 1, stride=3, output_padding=2), IMAGE),
    "transposed conv3d": (nn.ConvTranspose3d(2, 3, 2, stride=2), CUBE),
    "transposed conv3d, uneven": (
        nn.ConvTranspose3d(2, 4, (3, 2, 2), (2, 1, 3), (1, 0, 1), (1, 0, 0), 2, dilation=(1, 2, 1)),
        CUBE,
    ),
    "transposed conv2d and batch norm": (
        nn.Sequential(nn.ConvTranspose2d(4, 6, 3, 2, groups=2, bias=False), nn.BatchNorm2d(6), nn.ReLU()),
        IMAGE,
    ),
    "instance norm with statistics": (nn.InstanceNorm2d(4, affine=True, track_running_stats=True), IMAGE),
    "batch norm 3d": (nn.BatchNorm3d(2), CUBE),
}

POOLS: dict[str, tuple[nn.Module, Tensor]] = {
    "max pool 1d": (nn.MaxPool1d(3, stride=2, padding=1), LINE),
    "max pool 3d": (nn.MaxPool3d((2, 3, 2), stride=(1, 2, 2), padding=(1, 1, 0)), CUBE),
    "adaptive max pool 1d": (nn.AdaptiveMaxPool1d(4), LINE),
    "adaptive max pool 2d": (nn.AdaptiveMaxPool2d((4, None)), IMAGE),
    "adaptive max pool 3d": (nn.AdaptiveMaxPool3d(2), CUBE),
    "average pool 1d": (nn.AvgPool1d(3, stride=2, padding=1), LINE),
    "average pool 1d, ceil mode": (nn.AvgPool1d(4, ceil_mode=True, count_include_pad=False), LINE),
    "average pool 3d": (nn.AvgPool3d(2, padding=1), CUBE),
    "average pool 3d, uneven": (nn.AvgPool3d((3, 2, 1), (2, 1, 2), (1, 1, 0), count_include_pad=False), CUBE),
    "average pool 3d, divisor": (nn.AvgPool3d(2, divisor_override=5), CUBE),
    "adaptive average pool 1d": (nn.AdaptiveAvgPool1d(4), LINE),
    "adaptive average pool 3d": (nn.AdaptiveAvgPool3d((2, 1, 3)), CUBE),
    "power average pool 1d": (nn.LPPool1d(4, 3, stride=2), LINE),
    "power average pool 2d": (nn.LPPool2d(2, 2), IMAGE),
    "power average pool 2d of order 1": (nn.LPPool2d(1, (2, 3)), IMAGE),
    "relu6 and max pool": (nn.Sequential(nn.Conv2d(4, 3, 3), nn.ReLU6(), nn.MaxPool2d(2)), IMAGE),
}

ACTIVATIONS: dict[str, nn.Module] = {
    "relu6": nn.ReLU6(),
    "relu6 behind linear": nn.Sequential(nn.Linear(6, 5), nn.ReLU6(), nn.Linear(5, 2)),
    "hardtanh": nn.Hardtanh(-0.4, 0.3),
    "hardtanh in place": nn.Sequential(nn.Linear(6, 5), nn.Hardtanh(inplace=True)),
    "hardsigmoid": nn.Hardsigmoid(),
    "leaky relu": nn.LeakyReLU(0.1),
    "leaky relu behind linear": nn.Sequential(nn.Linear(6, 5), nn.LeakyReLU(0.2), nn.Linear(5, 2)),
    "rrelu": nn.RReLU(),
    "prelu": nn.PReLU(),
    "prelu by channel": nn.Sequential(nn.Linear(6, 5), nn.PReLU(5)),
    "softshrink": nn.Softshrink(0.3),
    "hardshrink": nn.Hardshrink(0.3),
    "threshold": nn.Threshold(0.2, 0.5),
    "abs": Model(lambda m, x: x.abs()),
    "sign": Model(lambda m, x: x.sign() * 0.5 + F.relu(x).sign()),
    "clamp": Model(lambda m, x: x.clamp(-0.5, 0.25)),
    "clamp from below": Model(lambda m, x: x.clamp(min=0.25)),
    "clamp from above": Model(lambda m, x: m.fc(x).clamp(max=0.25), fc=nn.Linear(6, 6)),
    "clamp by tensors": Model(lambda m, x: torch.clamp(x, m.low, m.low + 0.5), low=random(6, seed=5) * 0.5),
    "maximum": Model(lambda m, x: torch.maximum(x, m.fc(x)), fc=nn.Linear(6, 6)),
    "minimum": Model(lambda m, x: torch.minimum(x, m.fc(x)), fc=nn.Linear(6, 6)),
    "maximum with a constant": Model(lambda m, x: torch.maximum(m.w, x), w=random(6, seed=5)),
    "amax": Model(lambda m, x: x.view(-1, 2, 3).amax(2)),
    "amin, dimensions kept": Model(lambda m, x: x.view(-1, 2, 3).amin((1, 2), keepdim=True)),
    "values of max": Model(lambda m, x: x.view(-1, 2, 3).max(1).values),
    "values of min": Model(lambda m, x: x.min(dim=-1, keepdim=True)[0]),
    "greater": Model(lambda m, x: (x > 0.1).float() + (x >= 0.2).float()),
    "less": Model(lambda m, x: (x < m.w).float() - (m.w <= x).float(), w=random(6, seed=5)),
    "equal": Model(lambda m, x: (F.relu(x) == 0).float() + (F.relu(x).ne(0)).float() * 2),
    "logic": Model(lambda m, x: ((x > 0) & ~(x > 0.5) | (x < -0.5) ^ (x < -0.25)).float()),
    "count": Model(lambda m, x: (x > 0).sum(1)),
    "where": Model(lambda m, x: torch.where(x > 0, x * 2, m.fc(x)), fc=nn.Linear(6, 6)),
    "where with scalars": Model(lambda m, x: torch.where(x > 0, 0.5, x) + torch.where(x > 0, x, -0.25)),
    "where between scalars": Model(lambda m, x: torch.where(x > 0, 0.5, -0.25)),
    "where by logic": Model(lambda m, x: torch.where((x > 0) & (x < 0.5), x, -x)),
    "where by a constant": Model(lambda m, x: torch.where(torch.tensor([True, False] * 3), x, 2 * x)),
    "masked": Model(lambda m, x: x.masked_fill(x < 0, 0.5)),
    "masked by a constant": Model(lambda m, x: x.masked_fill(torch.tensor([True, False] * 3), 0.5)),
    "relu by a mask": Model(lambda m, x: (x > 0) * x),
    "a comparison broadcast": Model(lambda m, x: torch.where(x[:, :1] > 0, x, 0.0)),
}

SHAPES: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
    "concatenation": (lambda x: torch.cat([x, x * 2, x[:, :1]], 1), IMAGE),
    "concatenation at two scales": (lambda x: torch.cat([x * 0.3, F.relu(x), x], -1), IMAGE),
    "concatenation with constants": (lambda x: torch.cat([x, x.new_ones(x.shape[0], 1, 5, 4)], 1), IMAGE[:, :, :5, :4]),
    "stack": (lambda x: torch.stack([x, x + 1], 1), IMAGE),
    "stack last": (lambda x: torch.stack([x, x + 1], -1), ROWS),
    "slices": (lambda x: x[:, 1:3, ::2, -2:], IMAGE),
    "narrow": (lambda x: x.narrow(2, 1, 3), IMAGE),
    "select": (lambda x: x[:, 1] + x.select(1, -1), IMAGE),
    "unbind": (lambda x: x.unbind(1)[2] - x.unbind(-1)[0].sum(2)[..., None, None][:, 0], IMAGE),
    "split": (lambda x: x.split(2, 2)[1] + x.split([1, 2, 3], 2)[1], IMAGE),
    "chunk": (lambda x: x.chunk(3, 1)[1], LINE),
    "tensor split": (lambda x: x.tensor_split(4, 2)[1] + x.tensor_split((2, 4), 2)[1], LINE),
    "roll": (lambda x: x.roll((1, -2), (2, 3)), IMAGE),
    "flip": (lambda x: x.flip(1, -1), IMAGE),
    "index": (lambda x: x[:, [2, 0, 0]], IMAGE),
    "index of a table": (lambda x: x[:, torch.tensor([[0, 1], [3, 2]])], ROWS),
    "index of two dimensions": (lambda x: x[:, :, [0, 1], [3, 2]], IMAGE),
    "index select": (lambda x: x.index_select(2, torch.tensor([4, 4, 1])), IMAGE),
    "repeat interleave": (lambda x: x.repeat_interleave(2, 1), ROWS),
    "expand": (lambda x: x[:, :1].expand(-1, 3, -1, 5), IMAGE),
    "repeat": (lambda x: x.repeat(1, 2, 1, 3), IMAGE),
    "permute": (lambda x: x.permute(0, 3, 1, 2), IMAGE),
    "transpose": (lambda x: x.transpose(1, -1) * 2, IMAGE),
    "movedim": (lambda x: x.movedim(1, 3), IMAGE),
    "channel shuffle by views": (lambda x: x.view(-1, 2, 2, 6, 5).transpose(1, 2).reshape(x.size(0), 4, 6, 5), IMAGE),
    "channel shuffle": (lambda x: F.channel_shuffle(x, 2), IMAGE),
    "pixel shuffle": (lambda x: F.pixel_shuffle(x, 2), IMAGE),
    "pixel unshuffle": (lambda x: F.pixel_unshuffle(x[..., :4], 2), IMAGE),
    "pad": (lambda x: F.pad(x, (1, 2, 0, 1)), IMAGE),
    "pad with a value": (lambda x: F.pad(x, (1, -1), value=0.5), IMAGE),
    "reflection": (lambda x: F.pad(x, (2, 1, 1, 3), mode="reflect"), IMAGE),
    "replication": (lambda x: F.pad(x, (2, 1, 1, 3), mode="replicate"), IMAGE),
    "circular": (lambda x: F.pad(x, (2, 1), mode="circular"), LINE),
    "sum": (lambda x: x.sum((1, 3)), IMAGE),
    "sum, dimension kept": (lambda x: x.sum(-1, keepdim=True), IMAGE),
    "mean": (lambda x: x.mean((-1, -2)), IMAGE),
    "mean of features": (lambda x: F.relu(x).mean(1) * 3, ROWS),
    "up-sampling, nearest": (lambda x: F.interpolate(x, scale_factor=2), IMAGE),
    "up-sampling, nearest of three": (lambda x: F.interpolate(x, size=(7, 8, 3)), CUBE),
    "up-sampling, nearest exact": (lambda x: F.interpolate(x, size=(9, 4), mode="nearest-exact"), IMAGE),
    "up-sampling, linear": (lambda x: F.interpolate(x, scale_factor=1.5, mode="linear"), LINE),
    "up-sampling, bilinear": (lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"), IMAGE),
    "up-sampling, bilinear, corners": (lambda x: F.interpolate(x, (11, 7), mode="bilinear", align_corners=True), IMAGE),
    "up-sampling, trilinear": (lambda x: F.interpolate(x, (7, 5, 8), mode="trilinear"), CUBE),
    "up-sampling, bicubic": (lambda x: F.interpolate(x, scale_factor=(1.7, 2.0), mode="bicubic"), IMAGE),
    "argmax of channels": (lambda x: x.argmax(1), IMAGE),
    "argmax, dimension kept": (lambda x: x.argmax(-1, keepdim=True), LINE),
    "argmin": (lambda x: x.argmin(1), ROWS),
    "to float": (lambda x: x.float() * 2, ROWS),
    "a view of one element": (lambda x: x.view(-1, 6, 1).squeeze(-1).squeeze(), ROWS),
    "unflatten": (lambda x: x.unflatten(1, (2, 3)).flatten(1) * 2, ROWS),
    "windows of an image": (
        lambda x: F.relu(x[..., :4].reshape(-1, 4, 3, 2, 2, 2).permute(0, 2, 4, 3, 5, 1).reshape(-1, 4, 4))
        .view(-1, 3, 2, 2, 2, 4).permute(0, 5, 1, 3, 2, 4).reshape(-1, 4, 6, 4),
        IMAGE,
    ),
}  # fmt: skip


# Operators without a layer: PyTorch writes them by others.
REWRITTEN: dict[str, tuple[nn.Module, Tensor]] = {
    "glu": (nn.GLU(), ROWS),
    "lstm cell": (Model(lambda m, x: m.cell(x)[0], cell=nn.LSTMCell(6, 4)), ROWS),
    "gru cell": (Model(lambda m, x: m.cell(x), cell=nn.GRUCell(6, 4)), ROWS),
    "patches": (nn.Unfold(2, stride=2), IMAGE),
    "triangle": (Model(lambda m, x: x.tril(1) + x.triu(-1)), IMAGE),
    "transpose of matrices": (Model(lambda m, x: x.mT @ x), LINE),
    "distance": (Model(lambda m, x: F.pairwise_distance(x[:, 0], x[:, 1])), LINE),
    "multiply and add": (Model(lambda m, x: torch.addcmul(x, x, m.w, value=0.5), w=random(6, seed=5)), ROWS),
    "interpolation": (Model(lambda m, x: torch.lerp(x, m.fc(x), 0.3), fc=nn.Linear(6, 6)), ROWS),
    "normalisation across channels": (nn.LocalResponseNorm(2), IMAGE),
}

POWERS: dict[str, Callable[[Tensor], Tensor]] = {
    "fourth": lambda x: x**4,
    "sixth": lambda x: x**6,
    "fifth": lambda x: x**5,
    "one and a half": lambda x: (x + 2) ** 1.5,
    "third root": lambda x: (x + 2) ** (1 / 3),
    "minus one and a half": lambda x: (x + 2) ** -1.5,
    "minus two": lambda x: (x + 2) ** -2,
    "hyperbolic": lambda x: torch.sinh(x) + torch.cosh(x) + torch.asinh(x) + torch.atan(x),
    "log of a sum of exponentials": lambda x: x.view(-1, 2, 3).logsumexp(2),
    "of all, dimensions kept": lambda x: x.view(-1, 2, 3).logsumexp((1, 2), keepdim=True),
    "sign of itself": lambda x: x.sign() * x.abs().relu(),
}


class Bilinear(nn.Module):
    """Of two inputs, with rows in between."""

    def __init__(self) -> None:
        super().__init__()
        self.both = nn.Bilinear(3, 2, 4)

    def forward(self, x: Tensor) -> Tensor:
        rows: Tensor = self.both(x.view(-1, 2, 3), x.view(-1, 2, 3)[..., 1:])
        return rows + self.both(x[:, :3], x[:, 4:])[:, None]


class Function(nn.Module):
    """A function of one tensor as a model."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_and_norms(name: str) -> None:
    secure = agrees(*CONVOLUTIONS[name])
    if "and batch norm" in name:
        assert "mul" not in [node.op.name for node in secure.plan.nodes]


@pytest.mark.parametrize("name", POOLS)
def test_pools(name: str) -> None:
    agrees(*POOLS[name])


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_and_choices(name: str) -> None:
    agrees(ACTIVATIONS[name], ROWS)


@pytest.mark.parametrize("name", ["relu6", "where", "prelu", "logic", "maximum"])
def test_the_textbook_suite_has_them_too(name: str) -> None:
    agrees(ACTIVATIONS[name], ROWS, protocol="securenn")


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_and_sums(name: str) -> None:
    function, x = SHAPES[name]
    agrees(Function(function), x)


@pytest.mark.parametrize("name", REWRITTEN)
def test_operators_that_pytorch_writes_by_others(name: str) -> None:
    agrees(*REWRITTEN[name])


@pytest.mark.parametrize("name", POWERS)
def test_powers_and_functions(name: str) -> None:
    agrees(Function(POWERS[name]), ROWS)


def test_a_bilinear_layer() -> None:
    agrees(Bilinear(), ROWS)


def test_an_even_power_is_never_negative() -> None:
    """So that its root is defined, as in a power average pool."""
    agrees(Function(lambda x: (x**4).sqrt() + (x.square() * 0.5).sqrt()), ROWS)
