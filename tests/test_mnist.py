"""Trained networks on real digits: accuracy, exactness, independence of the batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import resnet
import torch
import vit
from data import Digits, load
from few_digits import RIGHT, TRAINED_ON, few
from training import trained

import tacit
from tacit import networks

Tensor = torch.Tensor
IMAGES = 1000


@pytest.fixture(scope="module", params=["few", pytest.param("all", marks=pytest.mark.slow)])
def digits(request: pytest.FixtureRequest) -> Digits:
    if request.param == "all":
        return load()
    found = few()
    return replace(found, test_images=found.test_images[:400], test_labels=found.test_labels[:400])


@pytest.fixture(scope="module", params=[networks.MLP, networks.LeNet], ids=["mlp", "lenet"])
def model(request: pytest.FixtureRequest, digits: Digits) -> torch.nn.Module:
    return trained(request.param, digits, quiet=True)


@pytest.fixture(scope="module")
def classifier(model: torch.nn.Module, digits: Digits) -> tacit.Secure:
    return tacit.compile(model, digits.train_images[:64], reveal="argmax", input_range=(0, 1))


def test_every_line_equals_the_oracle_on_many_images(
    classifier: tacit.Secure, model: torch.nn.Module, digits: Digits
) -> None:
    images = digits.test_images[:IMAGES]
    found = torch.cat([classifier.check(part) for part in images.split(200)])
    with torch.no_grad():
        plain = model(images).argmax(1)
    assert (found == plain).float().mean() >= 0.9995
    right = 0.95 if len(digits.train_images) > TRAINED_ON else RIGHT
    assert (found == digits.test_labels[:IMAGES]).float().mean() > right


def test_logits_are_within_a_256th_of_float(model: torch.nn.Module, digits: Digits) -> None:
    secure = tacit.compile(model, digits.train_images[:64], input_range=(0, 1))
    images = digits.test_images[:IMAGES]
    with torch.no_grad():
        plain = torch.cat([model(part) for part in images.split(200)])
    assert (secure(images[:200]) - plain[:200]).abs().max() < 2**-8
    assert (torch.cat([secure.reference(part) for part in images.split(200)]) - plain).abs().max() < 2**-8


def test_classes_depend_neither_on_the_batch_nor_on_the_randomness(classifier: tacit.Secure, digits: Digits) -> None:
    images = digits.test_images[:200]
    whole = classifier(images)
    assert torch.equal(whole, classifier(images))
    assert torch.equal(whole[:30], torch.cat([classifier(part) for part in images[:30].split(3)]))
    assert torch.equal(whole[:10], torch.cat([classifier(part) for part in images[:10].split(1)]))


def test_only_the_count_is_opened(model: torch.nn.Module, digits: Digits) -> None:
    counting = tacit.compile(model, digits.train_images[:64], reveal="correct", input_range=(0, 1))
    images, labels = digits.test_images[:200], digits.test_labels[:200]
    with torch.no_grad():
        right = int((model(images).argmax(1) == labels).sum())
    assert int(counting(images, labels)) == right


def test_comparisons_past_65536_elements(digits: Digits) -> None:
    """150 images are 75,000 comparisons in one ReLU of the MLP."""
    secure = tacit.compile(trained(networks.MLP, digits, quiet=True), digits.train_images[:8], input_range=(0, 1))
    images = digits.test_images[:150]
    assert (secure.check(images) - secure.reference(images)).abs().max() < 2**-8


@pytest.mark.slow
@pytest.mark.parametrize(
    ("network", "epochs", "options", "right"),
    [
        (resnet.ResNet, 3, {"depth": 8}, 0.98),
        (resnet.ResNet, 3, {"depth": 20}, 0.98),
        (resnet.ResNet, 2, {"depth": 56}, 0.98),
        (vit.SmallViT, vit.EPOCHS, {}, 0.97),
    ],
    ids=["resnet", "resnet20", "resnet56", "vit"],
)
def test_all_images_by_default_options(
    network: type[torch.nn.Module], epochs: int, options: dict[str, int], right: float
) -> None:
    """Class as in float32 for 99.9% of the test images; a secure run equals the oracle; no value leaves its range."""
    digits = load()
    model = trained(network, digits, epochs=epochs, quiet=True, **options)
    secure = tacit.compile(model, digits.train_images[:64], reveal="argmax", input_range=(0, 1))
    with torch.no_grad():
        plain = torch.cat([model(part).argmax(1) for part in digits.test_images.split(500)])
    found = torch.cat([secure(part) for part in digits.test_images.split(200)])
    assert (found == plain).float().mean() >= 0.999
    assert (found == digits.test_labels).float().mean() > right
    assert torch.equal(
        torch.cat([secure.check(part) for part in digits.test_images[:IMAGES].split(200)]), found[:IMAGES]
    )
    for part in digits.test_images.split(500):
        secure.reference(part, check=True)
