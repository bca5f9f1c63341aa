"""Handwritten digits: MNIST where it is to be had, else the small set inside scikit-learn."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from tacit import CompileError
from tacit.vision import import_torchvision

Tensor = torch.Tensor


@dataclass(frozen=True)
class Digits:
    """Images N x 1 x 28 x 28 in [0, 1], float32; labels int64."""

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load() -> Digits:
    """MNIST from $TACIT_DATA or torchvision's download; else scikit-learn's digits, with a line that says so."""
    root = os.environ.get("TACIT_DATA")
    if root and (Path(root) / "MNIST" / "raw").is_dir():
        return _mnist(Path(root) / "MNIST" / "raw")
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "tacit"
    try:
        datasets = import_torchvision().datasets
        for train in (True, False):
            datasets.MNIST(root=str(cache), train=train, download=True)
        return _mnist(cache / "MNIST" / "raw")
    except (OSError, RuntimeError, CompileError) as error:
        print(
            f"MNIST is not at hand ($TACIT_DATA is not set, no download: {type(error).__name__}); "
            "using scikit-learn's handwritten digits, enlarged, instead."
        )
        return _sklearn()


def _mnist(raw: Path) -> Digits:
    images, labels = {}, {}
    for part in ("train", "t10k"):
        pixels = _idx(raw / f"{part}-images-idx3-ubyte", header=16).reshape(-1, 1, 28, 28)
        images[part] = torch.from_numpy(pixels.astype(np.float32) / 255)
        labels[part] = torch.from_numpy(_idx(raw / f"{part}-labels-idx1-ubyte", header=8).astype(np.int64))
    return Digits("MNIST", images["train"], labels["train"], images["t10k"], labels["t10k"])


def _idx(path: Path, header: int) -> np.ndarray:
    return np.frombuffer(path.read_bytes(), np.uint8, offset=header)


def _sklearn() -> Digits:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise SystemExit("the examples need torchvision or scikit-learn: pip install 'tacit[examples]'") from None
    found = load_digits()
    small = torch.from_numpy(found.images.astype(np.float32) / 16).unsqueeze(1)
    images = torch.nn.functional.interpolate(small, size=(28, 28), mode="bilinear").clamp(0, 1)
    labels = torch.from_numpy(found.target.astype(np.int64))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, test = order[:-400], order[-400:]
    return Digits("scikit-learn digits", images[train], labels[train], images[test], labels[test])
