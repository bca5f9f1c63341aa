"""The mutants still fit the code that they take a condition from; `make mutants` runs the suite on each of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from mutants import MUTANTS
from mutants.mutant import Edit, Mutant, NotApplied, Rebind, Wrap, applied
from mutants.run import BROKEN, CAUGHT, EQUIVALENT, SURVIVED, Result, chosen, files, summary

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_a_mutant_applies_to_the_code_as_it_is(mutant: Mutant) -> None:
    assert bool(mutant.tests) != bool(mutant.proof), "tests that notice it, or why there is nothing to notice"
    texts = {change.path: (ROOT / change.path).read_text() for change in mutant.changes}
    for change in mutant.changes:
        texts[change.path] = applied(texts[change.path], change)
    assert mutant.proof or files(ROOT, mutant.tests), "no such tests"


def test_names_are_their_own() -> None:
    names = [m.name for m in MUTANTS]
    assert len(set(names)) == len(names) > 40
    assert [m.name for m in chosen(MUTANTS, ["constant-r*"])] == ["constant-rho", "constant-rho-of-knots"]


def test_the_last_line_counts_and_names() -> None:
    known, wire = MUTANTS[0], next(m for m in MUTANTS if m.proof)
    results = [Result(known, verdict, "", 1.0) for verdict in (CAUGHT, CAUGHT, SURVIVED, BROKEN)]
    line = summary([*results, Result(wire, EQUIVALENT, wire.proof, 0.0)])
    assert line.startswith(f"5 mutants: 2 caught, 1 survived ({known.name}), 1 not applied ({known.name})")
    assert line.endswith(f"1 with nothing to catch ({wire.name})")


SOURCE = "X = 1\n\n\nclass A:\n    @staticmethod\n    def f(a, b):\n        return a + b\n\n\ndef g():\n    return X\n"


def test_a_wrapped_function_is_called_through_the_mutant() -> None:
    wrap = Wrap("m.py", "A.f", "def mutant(plain, a, b):\n    return plain(a, b) * X")
    space: dict[str, object] = {}
    exec(applied(applied(SOURCE, wrap), Rebind("m.py", "X", "10")), space)
    assert space["A"].f(1, 2) == 30 and space["g"]() == 10  # type: ignore[attr-defined, operator]


@pytest.mark.parametrize(
    "change",
    [
        Wrap("m.py", "A.h", "def mutant(plain, a, b):\n    return 0"),
        Wrap("m.py", "B.f", "def mutant(plain, a, b):\n    return 0"),
        Wrap("m.py", "A.f", "def mutant(plain, a, c):\n    return 0"),
        Edit("m.py", "A.f", "a - b", "b"),
        Edit("m.py", "A.f", "a", "b"),
        Edit("m.py", "g", "return X", "return X"),
        Rebind("m.py", "Y", "2"),
    ],
)
def test_a_change_that_fits_nothing_says_so(change: Wrap | Edit | Rebind) -> None:
    with pytest.raises(NotApplied):
        applied(SOURCE, change)
