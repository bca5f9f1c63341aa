"""Everything of a networked deployment on one machine: three parties, an owner and a client, each for itself.

    python examples/three_parties.py            # real digits; trains the network first, or reads it from the cache

The parties are processes that talk TLS over loopback. The owner shares the weights once; the client sends shares of
images and alone learns their classes. The same commands, with other addresses, spread over three hosts: see the README.
"""

import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from data import Digits, load
from training import trained

import tacit
from tacit import networks
from tacit.runtime.net.local import LocalParties

BATCH, BATCHES, IN_FLIGHT = 200, 10, 4


def main() -> None:
    digits = load()
    model = trained(networks.MLP, digits)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        compiled = tacit.compile(model, digits.train_images[:BATCH], reveal="argmax", input_range=(0, 1), name="mlp")
        compiled.save(folder / "mlp")
        print(f"Deployment in {folder / 'deployment'}: a private authority, one certificate for each member")
        with LocalParties(folder / "deployment") as parties:
            print("P0, P1 and P2 are running")
            sent = tacit.push(parties.file, parties.folder / "owner", folder / "mlp")
            print(f"The owner has shared its weights: {sent:,} bytes to P1, a key to P0, nothing to P2")
            with tacit.connect(parties.file, parties.folder / "client") as client:
                classify(client, model, digits)
        print("The parties have stopped")


def classify(client: tacit.Remote, model: torch.nn.Module, digits: Digits) -> None:
    """One image alone, then batches with several in flight."""
    client.predict(digits.test_images[:1])
    image = client.predict(digits.test_images[:1])
    run = client.last_run
    assert run is not None
    print(f"One image: class {int(image[0])}, {1e3 * run.seconds:.1f} ms, {run.rounds} rounds")
    parts = digits.test_images.split(BATCH)[:BATCHES]
    begin = time.perf_counter()
    with ThreadPoolExecutor(IN_FLIGHT) as pool:
        classes = torch.cat(list(pool.map(client.predict, parts)))
    seconds = time.perf_counter() - begin
    with torch.no_grad():
        plain = torch.cat([model(part).argmax(1) for part in parts])
    right = int((classes == digits.test_labels[: len(classes)]).sum())
    print(f"Test set: Accuracy: {right}/{len(classes)} ({100 * right / len(classes):.2f}%)")
    print(f"Same class as the float model: {int((classes == plain).sum())}/{len(classes)}")
    print(f"{1e3 * seconds / len(classes):.2f} ms per image, batches of {BATCH}, {IN_FLIGHT} in flight")


if __name__ == "__main__":
    main()
