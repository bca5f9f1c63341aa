"""The article's story, end to end: train, compile, classify the test set encrypted among three parties.

A server trains on its private images; a client has test images. The weights are shared by the owner, the images by the
client; nobody but the client learns an answer, and in the first part only how many of a batch are right.
"""

import time

import torch
from data import Digits, load
from rich.console import Console
from rich.progress import track
from training import trained

import tacit
from tacit import networks

BATCH = 200
CHECKED = 1000
console = Console()


def main() -> None:
    digits = load()
    console.print(
        f"[bold]{digits.name}[/]: {len(digits.train_images)} training images, {len(digits.test_images)} test images"
    )
    for network in (networks.MLP, networks.LeNet):
        classify(network, digits)


def classify(network: type[torch.nn.Module], digits: Digits) -> None:
    """Everything for one network: the count of correct answers, all classes, the check against the oracle."""
    model = trained(network, digits)
    name = network.__name__.lower()
    example = digits.train_images[:BATCH]
    console.rule(f"{network.__name__}: only the number of correct predictions is opened")
    counting = tacit.compile(model, example, reveal="correct", input_range=(0, 1), name=name)
    print(counting.plan)
    console.print("First use compiles the kernels (cached on disk afterwards) and shares the weights ...")
    begin = time.perf_counter()
    counting(digits.test_images[:1], digits.test_labels[:1])
    console.print(f"... ready after {time.perf_counter() - begin:.1f} s")
    count_correct(counting, digits)
    console.rule(f"{network.__name__}: the client learns the class of each of {len(digits.test_images)} images")
    classes = tacit.compile(model, example, reveal="argmax", input_range=(0, 1), name=name)
    compare_classes(classes, model, digits)


def count_correct(secure: tacit.Secure, digits: Digits, batches: int = 8) -> None:
    """What the article printed, batch after batch."""
    correct = total = 0
    for images, labels in zip(digits.test_images.split(BATCH)[:batches], digits.test_labels.split(BATCH), strict=False):
        correct += int(secure(images, labels))
        total += len(images)
        print(f"Test set: Accuracy: {correct}/{total} ({100 * correct / total:.0f}%)")


def compare_classes(secure: tacit.Secure, model: torch.nn.Module, digits: Digits) -> None:
    """All test images encrypted, the first of them also against the clear oracle, and one image alone."""
    found, online, offline = [], 0.0, 0.0
    for images in track(digits.test_images.split(BATCH), "encrypted inference", console=console, transient=True):
        found.append(secure(images))
        assert secure.last_run is not None
        online += secure.last_run.online_seconds
        offline += secure.last_run.offline_seconds
    classes, count = torch.cat(found), len(digits.test_images)
    with torch.no_grad():
        plain = torch.cat([model(images).argmax(1) for images in digits.test_images.split(1000)])
    same, right = int((classes == plain).sum()), int((classes == digits.test_labels).sum())
    print(f"Test set: Accuracy: {right}/{count} ({100 * right / count:.2f}%)")
    print(f"Same class as the float model: {same}/{count} ({100 * same / count:.2f}%)")
    for images in track(
        digits.test_images[:CHECKED].split(BATCH), "against the oracle", console=console, transient=True
    ):
        secure.check(images)
    print(f"Bit for bit equal to the clear oracle at every line: {min(CHECKED, count)} images")
    report(secure, count, online, offline, digits)


def report(secure: tacit.Secure, count: int, online: float, offline: float, digits: Digits) -> None:
    """Time, bytes and rounds, as measured."""
    cost = secure.plan.cost(batch=BATCH)
    print(
        f"Time per image, batch {BATCH}: {1e3 * (online + offline) / count:.2f} ms "
        f"(offline {1e3 * offline / count:.2f} + online {1e3 * online / count:.2f}), three parties in one process"
    )
    secure(digits.test_images[:1])
    run = secure.last_run
    assert run is not None
    print(f"Time of one image alone: {1e3 * (run.online_seconds + run.offline_seconds):.1f} ms")
    print(
        f"Rounds: {cost.rounds}; bytes per image: {cost.online_bytes // BATCH:,} online, "
        f"{cost.offline_bytes // BATCH:,} offline; once per session: {cost.session_bytes:,}"
    )
    console.print()


if __name__ == "__main__":
    main()
