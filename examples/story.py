"""The article's story, role by role: private training data, private test images, and only a count is ever opened.

    python examples/story.py

"Encrypted classification with PySyft & PyTorch" (2019) in today's terms: alice and bob are P0 and P1, who hold shares;
the crypto provider is P2, who deals randomness. The notebook story.ipynb walks through the same steps.
"""

from collections.abc import Iterator

import torch
from data import Digits, load
from training import trained

import tacit
from tacit import networks

Tensor = torch.Tensor
BATCH, BATCHES = 200, 8


def server(digits: Digits) -> tuple[tacit.Plan, tacit.Secure]:
    """Trains on its private images and compiles. The plan is public; the weights, inside `secure`, stay with it."""
    model = trained(networks.MLP, digits)
    secure = tacit.compile(model, digits.train_images[:BATCH], reveal="correct", input_range=(0, 1), name="mlp")
    return secure.plan, secure


def client(plan: tacit.Plan, digits: Digits) -> Iterator[tuple[Tensor, Tensor]]:
    """Reads what the plan will reveal before it shares anything, then brings its private images with their classes."""
    assert plan.reveal == "correct", "this client agrees to a count, to nothing more"
    yield from zip(digits.test_images.split(BATCH)[:BATCHES], digits.test_labels.split(BATCH), strict=False)


def parties(secure: tacit.Secure, batches: Iterator[tuple[Tensor, Tensor]]) -> Iterator[tuple[int, int]]:
    """P0, P1 and P2, here as threads: weights, images, classes and comparisons are shared; one number is opened."""
    for images, labels in batches:
        yield int(secure(images, labels)), len(images)


def main() -> None:
    digits = load()
    plan, secure = server(digits)
    print(plan)
    correct = total = 0
    for right, size in parties(secure, client(plan, digits)):
        correct, total = correct + right, total + size
        print(f"Test set: Accuracy: {correct}/{total} ({100 * correct / total:.0f}%)")
    run = secure.last_run
    assert run is not None
    seconds = run.offline_seconds + run.online_seconds
    print(f"{1e3 * seconds / BATCH:.2f} ms per image, {run.rounds} rounds, {run.online_bytes // BATCH:,} bytes online")


if __name__ == "__main__":
    main()
