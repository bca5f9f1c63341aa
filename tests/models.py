"""Small models for the suites, each with one thing of interest."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

Tensor = torch.Tensor


def seeded(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights and running statistics, the same in every run; in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in list(model.named_parameters()) + list(model.named_buffers()):
            if value.is_floating_point():
                fresh = torch.randn(value.shape, generator=generator) * 0.3
                value.copy_(fresh.abs() + 0.5 if "running_var" in name else fresh)
    return model.eval()


def images(n: int, *shape: int, seed: int = 1) -> Tensor:
    return torch.rand((n, *shape), generator=torch.Generator().manual_seed(seed)) * 2 - 1


class Residual(nn.Module):
    """A residual block with batch norms, an average pool and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(4)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(x + self.bn2(self.conv2(x)))
        return self.fc(self.pool(x).flatten(1))


class Branches(nn.Module):
    """Two convolutions of one input: independent messages, which share their rounds."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(1, 2, 3)
        self.right = nn.Conv2d(1, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.left(x)) + F.relu(self.right(x))


class ReluUsedTwice(nn.Module):
    """The ReLU before the pool has another use: swapping them would be wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.conv(x))
        return F.max_pool2d(y, 2).flatten(1) + F.avg_pool2d(y, 2).flatten(1)


class Constants(nn.Module):
    """Additions and multiplications with scalars and tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.rand(3, 1, 1) + 0.5)
        self.register_buffer("shift", torch.rand(3, 1, 1))
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        x = (x * 0.3 + 2) / 4 - 0.25
        x = 3 - x * self.scale + self.shift
        return (2 * x) * self.gain - (-x)


class NormFirst(nn.Module):
    """Batch norms with no layer to fold into: first in line, after a sum, in one dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.BatchNorm2d(2)
        self.conv = nn.Conv2d(2, 2, 1)
        self.after_sum = nn.BatchNorm2d(2, affine=False)
        self.fc = nn.Linear(18, 6)
        self.last = nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = self.after_sum(x + self.conv(x))
        return self.last(self.fc(x.flatten(1)))


class UsedTwice(nn.Module):
    """A convolution whose output feeds a batch norm and something else: folding would be wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)
        self.bn = nn.BatchNorm2d(2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.bn(y) + y


class Hidden(nn.Module):
    """An unsupported op inside a submodule."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class TwoOutputs(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x * 2, x * 3


class DependsOnValues(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if bool((x.sum() > 0).item()) else x * 3


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.fc(x) + y
