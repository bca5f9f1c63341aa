"""The article's story and more, measured: train, compile, classify the whole test set encrypted among three parties.

Here for the MLP and a LeNet: only the count of correct answers, then the class of every image, checked and timed.
story.py is the short version.
"""

import time

import torch
from data import Digits, load
from rich.console import Console
from rich.progress import track
from story import BATCH, client, parties
from training import trained

import tacit
from tacit import networks

CHECKED = 1000
console = Console()


def main() -> None:
    digits = load()
    counts = f"{len(digits.train_images)} training images, {len(digits.test_images)} test images"
    console.print(f"[bold]{digits.name}[/]: {counts}")
    for network in (networks.MLP, networks.LeNet):
        model = trained(network, digits)
        options = {"input_range": (0, 1), "name": network.__name__.lower()}
        console.rule(f"{network.__name__}: only the number of correct predictions is opened")
        count_correct(tacit.compile(model, digits.train_images[:BATCH], reveal="correct", **options), digits)
        console.rule(f"{network.__name__}: the client learns the class of each of {len(digits.test_images)} images")
        compare_classes(tacit.compile(model, digits.train_images[:BATCH], reveal="argmax", **options), model, digits)


def count_correct(secure: tacit.Secure, digits: Digits) -> None:
    """What the article printed, batch after batch."""
    print(secure.plan)
    console.print("First use compiles the kernels (cached on disk afterwards) and shares the weights ...")
    begin = time.perf_counter()
    secure(digits.test_images[:1], digits.test_labels[:1])
    console.print(f"... ready after {time.perf_counter() - begin:.1f} s")
    correct = total = 0
    for right, size in parties(secure, client(secure.plan, digits)):
        correct, total = correct + right, total + size
        print(f"Test set: Accuracy: {correct}/{total} ({100 * correct / total:.0f}%)")


def compare_classes(secure: tacit.Secure, model: torch.nn.Module, digits: Digits) -> None:
    """All test images encrypted, the first of them also against the clear oracle, and one image alone."""
    found, online, offline, count = [], 0.0, 0.0, len(digits.test_images)
    for images in track(digits.test_images.split(BATCH), "encrypted inference", console=console, transient=True):
        found.append(secure(images))
        online += secure.last_run.online_seconds
        offline += secure.last_run.offline_seconds
    classes = torch.cat(found)
    with torch.no_grad():
        plain = torch.cat([model(images).argmax(1) for images in digits.test_images.split(1000)])
    same, right = int((classes == plain).sum()), int((classes == digits.test_labels).sum())
    print(f"Test set: Accuracy: {right}/{count} ({100 * right / count:.2f}%)")
    print(f"Same class as the float model: {same}/{count} ({100 * same / count:.2f}%)")
    checked = digits.test_images[:CHECKED].split(BATCH)
    for images in track(checked, "against the oracle", console=console, transient=True):
        secure.check(images)
    print(f"Bit for bit equal to the clear oracle at every line: {min(CHECKED, count)} images")
    times = f"(offline {1e3 * offline / count:.2f} + online {1e3 * online / count:.2f}), three parties in one process"
    print(f"Time per image, batch {BATCH}: {1e3 * (online + offline) / count:.2f} ms {times}")
    secure(digits.test_images[:1])
    seconds = secure.last_run.online_seconds + secure.last_run.offline_seconds
    print(f"Time of one image alone: {1e3 * seconds:.1f} ms")
    cost = secure.plan.cost(batch=BATCH)
    sent = f"{cost.online_bytes // BATCH:,} online, {cost.offline_bytes // BATCH:,} offline"
    print(f"Rounds: {cost.rounds}; bytes per image: {sent}; once per session: {cost.session_bytes:,}\n")


if __name__ == "__main__":
    main()
