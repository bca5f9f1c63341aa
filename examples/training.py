"""Training for the examples: Adam on negative log likelihood, the result cached."""

import hashlib
import inspect
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from data import Digits
from rich.progress import track
from safetensors.torch import load_file, save_file
from torch import nn

EPOCHS, BATCH, RATE = 3, 128, 1e-3


def trained(
    network: type[nn.Module], digits: Digits, *, epochs: int = EPOCHS, quiet: bool = False, **options: int
) -> nn.Module:
    """The network with its options, trained on these digits or read from the cache, in evaluation mode."""
    torch.manual_seed(0)
    model = network(**options)
    settings = f"{inspect.getsource(network)} {options} {digits.name} {epochs} {BATCH} {RATE} {torch.__version__}"
    key = hashlib.sha256(settings.encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "tacit"
    path = cache / f"{network.__name__.lower()}-{key}.safetensors"
    if path.exists():
        model.load_state_dict(load_file(path))
    else:
        _train(model, digits, epochs, quiet)
        cache.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.new")
        save_file(model.state_dict(), temporary)
        temporary.replace(path)
    return model.eval()


def _train(model: nn.Module, digits: Digits, epochs: int, quiet: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.reset_parameters()
    optimiser = torch.optim.Adam(model.parameters(), lr=RATE)
    steps = -(-len(digits.train_images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3 * RATE, total_steps=epochs * steps)
    model.train()
    for epoch in range(epochs):
        order = torch.randperm(len(digits.train_images), generator=generator).split(BATCH)
        label = f"training {type(model).__name__}, epoch {epoch + 1} of {epochs}"
        for chosen in track(order, label, disable=quiet, transient=True):
            loss = F.nll_loss(F.log_softmax(model(digits.train_images[chosen]), 1), digits.train_labels[chosen])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
