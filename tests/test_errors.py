"""What the compiler refuses, and the golden text that it says: the module, the source line, the remedy."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import refused
import torch
from test_plans import golden, rewrite  # noqa: F401  (a fixture)
from torch import nn

import tacit

Tensor = torch.Tensor
ROWS = torch.rand(2, 6, generator=torch.Generator().manual_seed(0))


def told(model: object, x: object = ROWS) -> str:
    """The message, without what depends on the machine or on PyTorch's version."""
    with pytest.raises(tacit.CompileError) as caught:
        tacit.compile(model, x)  # type: ignore[arg-type]
    text = str(caught.value)
    text = text.replace(str(Path(refused.__file__).parent), "tests").replace(str(Path(torch.__file__).parent), "torch")
    text = re.sub(r"(torch/[\w/]+\.py):\d+", r"\1", text)
    text = re.sub(r"\nSupported: .*", "\nSupported: ...", text)
    text = re.sub(r"\nIt said: .*", "\nIt said: ...", text)
    return "\n".join(line.rstrip() for line in text.splitlines()) + "\n"


@pytest.mark.parametrize("block", refused.BLOCKS, ids=lambda block: block.__name__)
def test_what_a_module_does_is_refused_by_place_and_remedy(block: type[refused.Block], rewrite: bool) -> None:  # noqa: F811
    text = told(refused.inside(block))
    assert "block.1" in text
    assert re.search(r"tests/refused\.py:\d+", text) or block is refused.ConstantResult
    golden(f"error_{block.__name__}", text, rewrite)


@pytest.mark.parametrize("make", refused.MODELS, ids=lambda make: make.__name__)
def test_what_a_model_is_is_refused_by_module_and_remedy(make: object, rewrite: bool) -> None:  # noqa: F811
    text = told(make())  # type: ignore[operator]
    assert "'1" in text
    golden(f"error_{make.__name__}", text, rewrite)  # type: ignore[attr-defined]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.complex64, torch.uint32])
def test_inputs_of_other_types_are_refused(dtype: torch.dtype) -> None:
    assert "float" in told(nn.ReLU().eval(), ROWS.to(dtype))


def test_a_second_dynamic_dimension_is_refused(rewrite: bool) -> None:  # noqa: F811
    dynamic = torch.export.Dim.DYNAMIC
    program = torch.export.export(
        nn.Conv2d(1, 1, 3).eval(), (torch.rand(2, 1, 8, 8),), dynamic_shapes=({0: dynamic, 2: dynamic},)
    )
    text = told(program, torch.rand(2, 1, 8, 8))
    assert "dimension 2 of input 'input'" in text
    golden("error_dynamic_size", text, rewrite)
