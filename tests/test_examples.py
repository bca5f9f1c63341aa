"""Every example runs, says what it should, and is short."""

from __future__ import annotations

import ast
import json
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
from few_digits import few

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
SAYS = {
    "story.py": ["Test set: Accuracy: ", "/1600 (", "16 rounds"],
    "lenet.py": ["conv2", "bit for bit", "trace.json"],
    "plans.py": ["the text is the plan: True", "fused, reveal argmax", "What the textbook protocol costs"],
    "resnet.py": ["as in plaintext 16/16", "no value left the range"],
    "margins.py": ["| 256 x |", "(default) |"],
    "vit.py": ["as in plaintext 16/16", "no value left the range"],
    "three_parties.py": ["The parties have stopped", "Same class as the float model: 2000/2000"],
    "demo.py": ["LeNet: only the number of correct predictions is opened", "Same class as the float model: "],
}
LONG = {"resnet.py", "margins.py", "vit.py", "three_parties.py", "demo.py"}
OTHERS = {"data.py", "training.py"}  # what the examples share


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in LONG else name for name in SAYS]
)
def test_an_example_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name])
    if name not in LONG:
        monkeypatch.setattr("data.load", few)
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    told = capsys.readouterr().out
    small = "MNIST is not at hand" in told  # there are fewer images then
    for words in SAYS[name]:
        assert words in told or (small and words.startswith("/"))


def test_all_examples_are_run_and_short() -> None:
    scripts = {path.name: len(path.read_text().splitlines()) for path in EXAMPLES.glob("*.py")}
    assert scripts.keys() - OTHERS - {"custom_layer.py"} == SAYS.keys()  # that one has a test of its own
    assert not {name: lines for name, lines in scripts.items() if lines >= 80}


def test_examples_take_torchvision_from_the_one_place_that_repairs_it() -> None:
    plain = re.compile(r"^\s*(import|from) (torchvision|timm|transformers|peft)\b", re.MULTILINE)
    assert not [path.name for path in EXAMPLES.glob("*.py") if plain.search(path.read_text())]


def test_the_notebook_runs_cell_by_cell(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """As a kernel does: statements run, and the value of a last expression is displayed."""
    notebook = json.loads((EXAMPLES / "story.ipynb").read_text())
    assert (notebook["nbformat"], notebook["metadata"]["kernelspec"]["name"]) == (4, "python3")
    assert not [cell for cell in notebook["cells"] if cell.get("outputs")]  # nothing stale is kept
    monkeypatch.setattr("data.load", few)
    scope: dict[str, Any] = {}
    displayed = []
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            tree = ast.parse("".join(cell["source"]))
            last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
            exec(compile(tree, "cell", "exec"), scope)
            if isinstance(last, ast.Expr):
                displayed.append(eval(compile(ast.Expression(last.value), "cell", "eval"), scope))
    told = capsys.readouterr().out
    assert "/1600 (" in told or "MNIST is not at hand" in told
    assert "ms per image" in told
    assert [value._repr_html_()[:7] for value in displayed if value is not None] == ["<iframe"]
