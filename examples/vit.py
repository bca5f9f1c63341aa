"""A small vision transformer: attention, GELU, softmax, layer norms; ranges are measured on training images.

python examples/vit.py
"""

import torch
from data import load
from torch import nn
from training import trained

import tacit

Tensor = torch.Tensor
WIDTH, HEADS, BLOCKS, PATCH, EPOCHS = 32, 4, 2, 7, 8
CALIBRATED_ON, IMAGES = 512, 16


class SmallViT(nn.Module):
    """16 patches of 7 x 7 pixels, two pre-norm blocks of four heads, the average of the patches, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, WIDTH, PATCH, PATCH)
        self.places = nn.Parameter(torch.zeros(1, (28 // PATCH) ** 2, WIDTH))
        block = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True}
        self.blocks = nn.Sequential(
            *(nn.TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH, **block) for _ in range(BLOCKS))
        )
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.places
        return self.head(self.norm(self.blocks(x)).mean(1))


def main() -> None:
    digits = load()
    model = trained(SmallViT, digits, epochs=EPOCHS)
    seen = digits.train_images[:CALIBRATED_ON]
    secure = tacit.compile(model, seen[:64], calibration=seen, reveal="argmax", input_range=(0, 1), name="vit")
    cost = secure.plan.cost(batch=IMAGES)
    print(
        f"{cost.rounds} rounds, {cost.online_bytes:,} bytes online, {cost.offline_bytes:,} offline for {IMAGES} images"
    )
    images, labels = digits.test_images[:IMAGES], digits.test_labels[:IMAGES]
    classes = secure(images)
    with torch.no_grad():
        plain = model(images).argmax(1)
    print(f"right {int((classes == labels).sum())}/{IMAGES}, as in plaintext {int((classes == plain).sum())}/{IMAGES}")
    # A range that was measured has room for several times what the training images showed.
    secure.reference(images, check=True)
    print("no value left the range that the plan states for it")


if __name__ == "__main__":
    main()
