"""A convolutional network: what each layer costs, encrypted classes, the report and a trace to look at.

python examples/lenet.py [FOLDER]        # report.html and trace.json go there; default: the working directory
"""

import sys
from pathlib import Path

import torch
from data import load
from training import trained

import tacit
from tacit import networks
from tacit.ir.view.page import page

IMAGES = 128


def main(folder: Path) -> None:
    digits = load()
    model = trained(networks.LeNet, digits)
    secure = tacit.compile(model, digits.train_images[:IMAGES], reveal="argmax", input_range=(0, 1), name="lenet")
    for row in secure.plan.layers(batch=IMAGES):
        sent = row["online_bytes"] + row["offline_bytes"]
        figures = f"{row['rounds']:>2} rounds {sent:>12,} bytes, {row['headroom']} bits left"
        print(f"{row['layer']:<8} {row['ops']:<12} {figures}")
    images, labels = digits.test_images[:IMAGES], digits.test_labels[:IMAGES]
    classes = secure(images)
    with torch.no_grad():
        plain = model(images).argmax(1)
    print(f"right {int((classes == labels).sum())}/{IMAGES}, as in plaintext {int((classes == plain).sum())}/{IMAGES}")
    secure.check(images[:8])
    print("8 images again: every line equals the clear oracle, bit for bit")
    (folder / "report.html").write_text(page(secure.plan, batch=IMAGES), encoding="utf-8")
    secure.trace(images[:8], folder / "trace.json")
    print(f"written {folder / 'report.html'} (any browser), {folder / 'trace.json'} (ui.perfetto.dev)")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
