"""Random small networks of the supported layers: PyTorch, the oracle and a secure run agree."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_capture import CLOSE, exact, random, seeded
from torch import nn

import tacit

Tensor = torch.Tensor
Draw = st.DrawFn


class Side(nn.Module):
    """A branch beside its input: added, concatenated, the larger of both, or chosen by sign."""

    def __init__(self, body: nn.Module, how: str) -> None:
        super().__init__()
        self.body, self.how = body, how

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        if self.how == "add":
            return x + y
        if self.how == "cat":
            return torch.cat([x, y], 1)
        if self.how == "larger":
            return torch.maximum(x, y)
        return torch.where(x > 0.1, y, x * 0.5)


class Attend(nn.Module):
    """Attention among the pixels of an image, added to it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.query, self.value = nn.Linear(channels, 4), nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        pixels = x.flatten(2).transpose(1, 2)
        query = self.query(pixels)
        found = F.scaled_dot_product_attention(query, query, self.value(pixels))
        return x + found.transpose(1, 2).reshape(x.shape)


class Gate(nn.Module):
    """Squeeze and excitation: every channel times a number between 0 and 1."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.fc(x.mean((2, 3))))[:, :, None, None]


class Apply(nn.Module):
    """A function of one tensor, by name."""

    FUNCTIONS = {
        "flip": lambda x: x.flip(-1),
        "roll": lambda x: x.roll(1, 1),
        "halves": lambda x: torch.cat(x.chunk(2, 1)[::-1], 1),
        "clamp": lambda x: x.clamp(-0.7, 0.4),
        "abs": lambda x: x.abs(),
        "scale": lambda x: 0.3 - x * 0.75,
        "centre": lambda x: x - x.mean(1, keepdim=True),
        "swap": lambda x: x.transpose(-1, -2),
        "pad": lambda x: F.pad(x, (1, 0, 0, 2)),
        "up": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
        "every other": lambda x: x[:, :, ::2],
    }

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        return self.FUNCTIONS[self.name](x)  # type: ignore[no-untyped-call, no-any-return]

    def extra_repr(self) -> str:
        return self.name


ANYWHERE = ("flip", "roll", "halves", "clamp", "abs", "scale", "centre")
IMAGES = ("swap", "pad", "up", "every other")


@st.composite
def activations(draw: Draw, channels: int) -> nn.Module:
    kinds = [nn.ReLU(), nn.ReLU6(), nn.LeakyReLU(0.2), nn.PReLU(channels), nn.Hardtanh(-0.5, 0.8), nn.Hardsigmoid()]
    curved = [nn.Sigmoid(), nn.Tanh(), nn.SiLU(), nn.GELU(), nn.ELU(), nn.Softplus(), nn.Hardswish(), nn.Mish()]
    return draw(st.sampled_from(kinds + curved))


@st.composite
def image_layer(draw: Draw, shape: tuple[int, int, int]) -> nn.Module:
    """One layer for images of that shape."""
    c, h, w = shape
    kind = draw(st.sampled_from(("conv", "depthwise", "transposed", "norm", "max", "average", "act", "apply", "side",
                                 "group norm", "attention", "gate")))  # fmt: skip
    small = min(h, w) < 4
    if kind in ("conv", "depthwise") or (kind == "transposed" and h * w > 40):
        groups = c if kind == "depthwise" else 1
        outputs = c * draw(st.integers(1, 2)) if groups > 1 else draw(st.integers(1, 4))
        stride = 1 if small else draw(st.integers(1, 2))
        return nn.Conv2d(c, outputs, 3, stride, 1, groups=groups, bias=draw(st.booleans()))
    if kind == "transposed":
        return nn.ConvTranspose2d(c, draw(st.integers(1, 3)), 2, draw(st.integers(1, 2)))
    if kind == "norm":
        return nn.BatchNorm2d(c)
    if kind == "group norm":
        return nn.GroupNorm(1, c, eps=0.1)
    if kind in ("attention", "gate"):
        return Attend(c) if kind == "attention" and h * w <= 30 else Gate(c)
    if kind in ("max", "average") and not small:
        pool = nn.MaxPool2d if kind == "max" else nn.AvgPool2d
        return pool(2, draw(st.integers(1, 2)), draw(st.integers(0, 1)))
    if kind == "side":
        how = draw(st.sampled_from(("add", "cat", "larger", "choice")))
        return Side(nn.Conv2d(c, c, 3, padding=1), how)
    if kind == "apply":
        names = [n for n in (*ANYWHERE, *IMAGES) if (n != "halves" or c % 2 == 0) and (n != "up" or h * w < 30)]
        return Apply(draw(st.sampled_from(names)))
    return draw(activations(c))


@st.composite
def networks(draw: Draw) -> tuple[nn.Module, Tensor]:
    """A few image layers, then features and logits."""
    x = random(
        2, draw(st.integers(1, 3)), draw(st.integers(3, 7)), draw(st.integers(3, 7)), seed=draw(st.integers(0, 9))
    )
    layers: list[nn.Module] = []
    y = x
    for _ in range(draw(st.integers(1, 5))):
        layer = draw(image_layer((y.shape[1], y.shape[2], y.shape[3]))).eval()
        with torch.no_grad():
            y = layer(y)
        layers.append(layer)
        if y[0].numel() > 400:
            break
    layers += [nn.AdaptiveAvgPool2d(draw(st.integers(1, 2))), nn.Flatten()]
    with torch.no_grad():
        features = nn.Sequential(*layers[-2:])(y).shape[1]
    layers += [nn.Linear(features, 5), draw(activations(5)), nn.Linear(5, 3)]
    return seeded(nn.Sequential(*layers)), x


def agree(network: tuple[nn.Module, Tensor]) -> None:
    model, x = network
    secure = tacit.compile(model, x, input_range=(-1, 1))
    expected = exact(model, x)
    assert tacit.Plan.parse(str(secure.plan)) == secure.plan
    curved = any(node.op.name == "spline" for node in secure.plan.nodes)  # each within max_error
    close = max(CLOSE, 0.02 * float(expected.abs().max())) if curved else CLOSE
    torch.testing.assert_close(secure.check(x).double(), expected, atol=close, rtol=0)
    torch.testing.assert_close(secure.reference(x, check=True).double(), expected, atol=close, rtol=0)
    run, cost = secure.last_run, secure.plan.cost(batch=len(x))
    assert run is not None
    assert (run.rounds, run.online_bytes, run.offline_bytes) == (cost.rounds, cost.online_bytes, cost.offline_bytes)


QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large]


@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=QUIET)
@given(networks())
def test_a_few_random_networks(network: tuple[nn.Module, Tensor]) -> None:
    agree(network)


@pytest.mark.slow
@settings(max_examples=500, deadline=None, derandomize=True, suppress_health_check=QUIET)
@given(networks())
def test_five_hundred_random_networks(network: tuple[nn.Module, Tensor]) -> None:
    agree(network)
