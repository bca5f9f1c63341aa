"""What margins of measured ranges cost, and what they are good for: a residual network, measured on two images.

python examples/margins.py [DEPTH]
"""

import sys
import time
import warnings

import torch
from data import Digits, load
from resnet import ResNet
from training import trained

import tacit
from tacit.runtime.overflow import limit, magnitude
from tacit.runtime.reference import interpret

Tensor = torch.Tensor
MARGINS, SHOWN, BATCH, ASKED = (2, 4, 16, 256), 2, 16, 2000


def rows_that_left(secure: tacit.Secure, images: Tensor) -> int:
    """Images on which some value leaves the range that its line states, by the clear oracle."""
    count = 0
    for part in images.split(500):
        values = interpret(secure.plan, secure.weights, {"x": part.double()})
        left = torch.zeros(len(part), dtype=torch.bool)
        for node in secure.plan.nodes:
            if node.margin:
                left |= (magnitude(node, values) > limit(node)).reshape(len(part), -1).any(1)
        count += int(left.sum())
    return count


def row(secure: tacit.Secure, name: str, digits: Digits, plain: Tensor) -> str:
    cost, images = secure.plan.cost(), digits.test_images[:ASKED]
    secure(images[:BATCH])
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        secure(images[:BATCH])
        seconds.append(time.perf_counter() - begin)
    same = int((torch.cat([secure.reference(part) for part in images.split(500)]) == plain).sum())
    figures = (
        f"{cost.rounds} | {cost.online_bytes:,} + {cost.offline_bytes:,} | {1e3 * sorted(seconds)[2] / BATCH:.1f} | "
        f"{rows_that_left(secure, images)} of {len(images):,} | {same:,}"
    )
    return f"| {name} | {figures} |"


def main() -> None:
    digits, depth = load(), int(sys.argv[1]) if len(sys.argv) > 1 else 20
    model = trained(ResNet, digits, depth=depth)
    with torch.no_grad():
        plain = torch.cat([model(part).argmax(1) for part in digits.test_images[:ASKED].split(500)])
    print(
        f"ResNet of {depth} layers, ranges measured on {SHOWN} images; bytes of one image, times in batches of {BATCH}:"
    )
    print("| margin | rounds | bytes online + offline | ms an image | images that left a range | class as in float |")
    print("|---|---|---|---|---|---|")
    for margin in (*MARGINS, (4, 16)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", tacit.RangeWarning)  # two images are few: that is the point
            shown = digits.train_images[:SHOWN]
            secure = tacit.compile(model, shown, reveal="argmax", input_range=(0, 1), ranges="measured", margin=margin)
        name = f"{margin} x" if isinstance(margin, int) else "4 to 16 x, as cheap as it is (default)"
        print(row(secure, name, digits, plain), flush=True)


if __name__ == "__main__":
    main()
