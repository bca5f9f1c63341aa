"""Models that are refused, each for one reason. The golden messages quote lines of this file."""

from __future__ import annotations

import torch
from torch import nn

Tensor = torch.Tensor


class Block(nn.Module):
    """Where the reason lies: a module inside a module."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.register_buffer("count", torch.zeros(6))


class UnsupportedOperator(Block):
    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(x)


class BranchOnAValue(Block):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x
        return -x


class NumberReadOff(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x * x.max().item()


class ElementsByAMask(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x[x > 0].sum()


class IndexFromTheInput(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc.weight[:, x.argmax(1)].t()


class Conditional(Block):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,))


class FixedBatch(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(2, -1)


class ConstantWithABatch(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.ones(2, 6)


class BatchInSecondPlace(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x.t().argmax(0)


class SumOverTheBatch(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


class BatchSplit(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(3, -1)


class PlaceInTheBatch(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.arange(x.size(0))[:, None]


class BufferWritten(Block):
    def forward(self, x: Tensor) -> Tensor:
        self.count.add_(1)
        return x * self.count


class RandomNoise(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand_like(x)


class HalfInside(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x.half().float()


class ComplexInside(Block):
    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.fft(x).real


class ConstantResult(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.count


class InfiniteScalar(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x / 0


class TopOfNone(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x.topk(0, 1).values.sum(1)


BLOCKS = (
    UnsupportedOperator,
    BranchOnAValue,
    NumberReadOff,
    ElementsByAMask,
    IndexFromTheInput,
    Conditional,
    FixedBatch,
    ConstantWithABatch,
    BatchInSecondPlace,
    SumOverTheBatch,
    BatchSplit,
    PlaceInTheBatch,
    BufferWritten,
    RandomNoise,
    HalfInside,
    ComplexInside,
    ConstantResult,
    InfiniteScalar,
    TopOfNone,
)


def inside(block: type[Block]) -> nn.Module:
    model = nn.Sequential()
    model.add_module("stem", nn.Linear(6, 6))
    model.add_module("block", nn.Sequential(nn.ReLU(), block()))
    return model.eval()


def training_layer() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.ReLU(), nn.Dropout())).eval()
    model[1][1].train()
    return model


def norm_of_the_batch() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6, track_running_stats=False)).eval()


def half_weights() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)).eval()
    model[1].half()
    return model


def complex_weights() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)).eval()
    model[1].weight = nn.Parameter(torch.zeros(6, 6, dtype=torch.complex64))
    return model


def nan_weights() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)).eval()
    model[1].weight.data[0, 0] = float("nan")
    return model


def quantised() -> nn.Module:
    from torch.ao.nn import quantized

    return nn.Sequential(nn.Linear(6, 6), quantized.ReLU6()).eval()


MODELS = (training_layer, norm_of_the_batch, half_weights, complex_weights, nan_weights, quantised)
