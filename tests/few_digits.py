"""Digits for the suite: networks are trained on few of them in seconds; `make demo` and the slow tests take all."""

from dataclasses import replace

from data import Digits, load

TRAINED_ON = 3000
RIGHT = 0.85  # of the test images, after that


def few() -> Digits:
    """All test images, and the first few to train on."""
    digits = load()
    images, labels = digits.train_images[:TRAINED_ON], digits.train_labels[:TRAINED_ON]
    return replace(digits, name=f"{TRAINED_ON} of {digits.name}", train_images=images, train_labels=labels)
