"""Property tests without a time limit for an example; an option that rewrites the golden files: review the diff."""

import pytest
from hypothesis import settings

# An example's duration says nothing of the code on a machine that does other work beside it.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rewrite-golden", action="store_true", help="write tests/golden anew")
