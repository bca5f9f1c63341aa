"""Stop with a plain message where the installed package and the checkout hold different files."""

from pathlib import Path

import pytest

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
    try:
        import tacit
    except ImportError as error:
        raise pytest.UsageError(f"the package tacit cannot be imported ({error}); {REMEDY}") from None
    installed = Path(str(tacit.__file__)).parent
    for folder, package in FOLDERS.items():
        here = {path.name for path in (HERE / folder).glob("*.py")}
        there = {path.name for path in (installed / package).glob("*.py")}
        if here != there:
            names = ", ".join(sorted(here ^ there))
            raise pytest.UsageError(f"{folder}/ and the installed package differ in {names}; {REMEDY}")
