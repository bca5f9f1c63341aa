"""A residual network in the style of those for CIFAR: batch norms are folded, ranges of deep layers are measured.

python examples/resnet.py [DEPTH]
"""

import sys
from itertools import pairwise

import torch
import torch.nn.functional as F
from data import load
from torch import nn
from training import trained

import tacit

Tensor = torch.Tensor
SHOWN, IMAGES = 64, 16


class Block(nn.Module):
    """Two convolutions and a way around them."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.around = nn.Conv2d(inputs, outputs, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.around(x))


class ResNet(nn.Module):
    """A convolution, blocks of 8, 16 and 32 channels, an average and a linear layer: 8, 14, 20, ... layers in all."""

    def __init__(self, depth: int = 8) -> None:
        super().__init__()
        self.first, blocks = nn.Conv2d(1, 8, 3, 2, 1), (depth - 2) // 6
        widths = [8] * (blocks + 1) + [16] * blocks + [32] * blocks
        self.blocks = nn.Sequential(*(Block(a, b, 1 if a == b else 2) for a, b in pairwise(widths)))
        self.fc = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.first(x)))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


def main() -> None:
    digits, depth = load(), int(sys.argv[1]) if len(sys.argv) > 1 else 8
    model = trained(ResNet, digits, depth=depth)
    secure = tacit.compile(model, digits.train_images[:SHOWN], reveal="argmax", input_range=(0, 1), name="resnet")
    cost = secure.plan.cost(batch=IMAGES)
    print(f"ranges {secure.plan.ranges}, {cost.rounds} rounds, for {IMAGES} images:")
    print(f"{cost.online_bytes:,} bytes online, {cost.offline_bytes:,} offline")
    images, labels = digits.test_images[:IMAGES], digits.test_labels[:IMAGES]
    classes = secure(images)
    with torch.no_grad():
        plain = model(images).argmax(1)
    print(f"right {int((classes == labels).sum())}/{IMAGES}, as in plaintext {int((classes == plain).sum())}/{IMAGES}")
    secure.reference(images, check=True)
    print("no value left the range that the plan states for it")


if __name__ == "__main__":
    main()
