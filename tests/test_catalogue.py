"""The README's table of layers is that of the registry, and its costs are those of plans."""

from __future__ import annotations

from pathlib import Path

import pytest

from tacit.catalogue import BEGIN, END, compiled, entries, rewritten
from tacit.ir.ops.affine import Conv2d
from tacit.ir.ops.layer import Layer, layers

README = Path(__file__).resolve().parent.parent / "README.md"


def test_the_table_in_the_readme_is_current() -> None:
    text = README.read_text(encoding="utf-8")
    assert rewritten(text) == text, "run `python -m tacit.catalogue README.md`"


def test_every_layer_and_operator_is_listed() -> None:
    found = list(entries())
    # Other tests add layers from outside of the package, as examples/custom_layer.py does.
    own = [layer for layer in Layer.known if layer.__module__.startswith("tacit.")]
    assert len(found) == sum(bool(layer.__dict__.get("aten")) for layer in own)
    listed = {name for entry in found for name in entry.operators}
    captured = {target for target, layer in layers().items() if layer in own}
    assert {target.split(".")[1] for target in captured} <= listed | {f"{name}_" for name in listed}
    assert len(captured) >= 200
    assert len([entry for entry in found if entry.rounds is not None]) >= 20
    relu = next(entry for entry in found if entry.operators == ("relu",))
    assert relu.rounds == 3 and relu.online_bytes > 0


def test_the_example_of_a_layer_is_a_plan_of_its_own() -> None:
    plan = compiled(Conv2d.samples()[0])
    assert [node.op.name for node in plan.nodes if not node.op.session] == ["input", "conv2d", "add", "reveal"]


def test_a_text_without_markers_is_refused() -> None:
    for text in ("", BEGIN, END):
        with pytest.raises(ValueError, match="lacks"):
            rewritten(text)
