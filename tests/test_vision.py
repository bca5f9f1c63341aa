"""A torchvision whose operators do not load beside this torch can be imported all the same; others are left alone."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from test_cli import succeeds

import tacit
from tacit import vision

OPERATOR = "only_in_a_test"  # the real ones may be declared in this process already
WORKS = "import torchvision.part"
FAILS = f"""
import torch
import torchvision.part
if not hasattr(torch.ops.torchvision, "{OPERATOR}"):
    raise RuntimeError("operator torchvision::{OPERATOR} does not exist")
"""
BROKEN = "import torchvision.part; raise RuntimeError('another reason')"


def imported() -> dict[str, ModuleType]:
    return {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "torchvision"}


@pytest.fixture
def plant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for a package torchvision that stands before the installed one; both are as before afterwards."""
    for name in imported():
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(vision, "_WANTED", (OPERATOR,))
    monkeypatch.setattr(vision, "_declared", [])
    monkeypatch.syspath_prepend(tmp_path)
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "part.py").write_text("")
    yield package
    for name in imported():
        del sys.modules[name]


def test_one_that_works_is_left_alone(plant: Path) -> None:
    (plant / "__init__.py").write_text(WORKS)
    assert not vision.repair_torchvision()
    assert vision.import_torchvision() is sys.modules["torchvision"]
    assert not vision._declared and not hasattr(torch.ops.torchvision, OPERATOR)


def test_one_that_misses_its_operators_is_repaired_once(plant: Path) -> None:
    (plant / "__init__.py").write_text(FAILS)
    with pytest.raises(RuntimeError, match="does not exist"):
        importlib.import_module("torchvision")
    half = sys.modules["torchvision.part"]
    assert vision.repair_torchvision()
    assert not imported()
    module = vision.import_torchvision()
    assert Path(str(module.__file__)).parent == plant
    assert module.part is sys.modules["torchvision.part"] is not half
    assert not vision.repair_torchvision() and len(vision._declared) == 1
    with pytest.raises(NotImplementedError):  # it is declared, no more
        getattr(torch.ops.torchvision, OPERATOR)(torch.rand(2, 4), torch.rand(2), 0.5)


def test_another_failure_is_seen_by_whoever_imports_it(plant: Path) -> None:
    (plant / "__init__.py").write_text(BROKEN)
    assert not vision.repair_torchvision()
    assert not imported() and not vision._declared
    with pytest.raises(RuntimeError, match="another reason"):
        vision.import_torchvision()
    (plant / "__init__.py").write_text("import nothing_of_that_name")
    importlib.invalidate_caches()
    with pytest.raises(ModuleNotFoundError, match="nothing_of_that_name"):
        vision.import_torchvision()


def test_without_torchvision_nothing_happens(plant: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)  # type: ignore[arg-type]  # Python's way to say: not there
    assert not vision.repair_torchvision() and not vision._declared
    with pytest.raises(tacit.CompileError, match=r"pip install 'tacit\[examples\]'"):
        vision.import_torchvision()


@pytest.mark.parametrize("wrapped", [False, True])
def test_work_that_fails_for_it_is_done_once_more(plant: Path, wrapped: bool) -> None:
    """Also where a library says in an error of its own why it could not be imported."""
    (plant / "__init__.py").write_text(FAILS)
    calls = []

    def work() -> ModuleType:
        calls.append(1)
        try:
            return importlib.import_module("torchvision")
        except RuntimeError as error:
            if wrapped:
                raise ModuleNotFoundError("could not import the image models, see above") from error
            raise

    assert Path(str(vision.with_torchvision(work).__file__)).parent == plant
    assert len(calls) == 2


def test_work_that_fails_for_another_reason_is_not(plant: Path) -> None:
    (plant / "__init__.py").write_text(FAILS)
    calls = []

    def work() -> None:
        calls.append(1)
        raise RuntimeError("another reason")

    with pytest.raises(RuntimeError, match="another reason"):
        vision.with_torchvision(work)
    assert len(calls) == 1 and not vision._declared


def test_the_command_line_compiles_what_imports_it(plant: Path, tmp_path: Path) -> None:
    (plant / "__init__.py").write_text(FAILS)
    (tmp_path / "theirs.py").write_text("import torch, torchvision\ndef make(): return torch.nn.Linear(3, 2).eval()\n")
    succeeds("compile", f"{tmp_path / 'theirs.py'}:make", "--example", "1x3", "-o", tmp_path / "model")
    assert len(vision._declared) == 1


def test_image_models_of_transformers_can_be_imported_here() -> None:
    """The suite begins with the repair, in whichever process: no test imports torchvision first."""
    transformers = pytest.importorskip("transformers")
    assert issubclass(transformers.ViTModel, torch.nn.Module)
    assert issubclass(transformers.Swinv2Model, torch.nn.Module)
    assert transformers.AutoImageProcessor is not None
