"""What the suite needs around it: the package of this checkout, a torchvision that can be imported, and speed."""

import gc
import os
from importlib.util import find_spec
from pathlib import Path

import pytest

# Before torch is imported. The tests have little tensors and run side by side: threads of torch would wait, and spin.
os.environ.setdefault("OMP_NUM_THREADS", "1")

HERE = Path(__file__).resolve().parent
FOLDERS = {
    "compiler": "",
    "compiler/peers": "peers",
    "ir": "ir",
    "ir/ops": "ir/ops",
    "ir/view": "ir/view",
    "passes": "passes",
    "runtime": "runtime",
    "runtime/net": "runtime/net",
}
REMEDY = "run `make test`, which reinstalls the project, or `pip install -e .`"


def pytest_configure(config: pytest.Config) -> None:
    _require_the_checkout()
    if not config.getoption("numprocesses", None):  # a process that only hands tests to others imports nothing
        from tacit.vision import repair_torchvision

        repair_torchvision()  # before a test imports what imports torchvision


def pytest_collection_finish() -> None:
    """Compiling makes many small objects, which live long: looking for cycles among them less often saves a tenth."""
    gc.freeze()
    gc.set_threshold(20_000)


def _require_the_checkout() -> None:
    """Stop with a plain message where the installed package and the checkout hold different files."""
    spec = find_spec("tacit")
    if spec is None or spec.origin is None:
        raise pytest.UsageError(f"the package tacit is not installed; {REMEDY}")
    installed = Path(spec.origin).parent
    for folder, package in FOLDERS.items():
        here = {path.name for path in (HERE / folder).glob("*.py")}
        there = {path.name for path in (installed / package).glob("*.py")}
        if here != there:
            names = ", ".join(sorted(here ^ there))
            raise pytest.UsageError(f"{folder}/ and the installed package differ in {names}; {REMEDY}")
