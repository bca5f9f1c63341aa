"""What is installed, and which way imports go."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"compiler": "tacit", "ir": "tacit.ir", "passes": "tacit.passes", "runtime": "tacit.runtime"}
# compiler -> passes -> ir <- runtime
MAY_IMPORT = {"ir": {"ir"}, "passes": {"ir", "passes"}, "runtime": {"ir", "runtime"}}


def test_every_folder_with_python_files_is_listed() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {}
    for folder, package in FOLDERS.items():
        for path in (ROOT / folder).rglob("*.py"):
            inner = path.parent.relative_to(ROOT / folder).parts
            found[".".join([package, *inner])] = str(path.parent.relative_to(ROOT))
    assert settings["packages"] == sorted(found)
    assert settings["package-dir"] == found


def imported(path: Path) -> set[str]:
    """Modules that a file imports when it runs; imports for type checkers alone do not count."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def test_imports_go_one_way() -> None:
    for folder, allowed in MAY_IMPORT.items():
        for path in (ROOT / folder).rglob("*.py"):
            for name in imported(path):
                if name.split(".")[0] == "tacit":
                    assert name.split(".")[1:2] and name.split(".")[1] in allowed, f"{path.name} imports {name}"


def test_files_can_be_read_in_a_sitting() -> None:
    long = {
        path.name: count
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*.py")
        if (count := len(path.read_text().splitlines())) > 650
    }
    assert not long
