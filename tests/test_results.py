"""What a model returns: containers of its own classes, dtypes, and what the plan says of both to those without them."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict, deque, namedtuple
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import pytest
import torch
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput

import tacit
from tacit.cli_shared import answer_object, save_answer
from tacit.ir import tree
from tacit.ir.ops.outputs import Pack
from tacit.ir.tree import Record
from tacit.structure import named_leaves

Tensor = torch.Tensor
ROWS = torch.rand(3, 6, generator=torch.Generator().manual_seed(1))
Moments = namedtuple("Moments", "mean logvar")


class Scored(NamedTuple):
    score: Tensor
    mask: Tensor
    label: Any = None


@dataclass
class Output:
    logits: Tensor
    aux: Any = None
    shown: Any = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.logits = self.logits * 2  # once, by the model: never again


@dataclass(frozen=True, slots=True)
class Inner:
    _first: Tensor
    rest: Any


class Returning(nn.Module):
    def __init__(self, function: Callable[[nn.Module, Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.function = nn.Linear(6, 4), function

    def forward(self, x: Tensor) -> Any:
        return self.function(self.fc, x)


def compiled(function: Callable[[Any, Tensor], Any], x: Tensor = ROWS) -> tuple[nn.Module, tacit.Secure]:
    model = Returning(function).eval()
    return model, tacit.compile(model, x, input_range=(-1, 1))


def alike(found: Any, expected: Any) -> None:
    """The same leaves: names, dtypes, values."""
    found, expected = named_leaves(found), named_leaves(expected)
    assert list(found) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value.detach(), atol=0.01, rtol=0)


RESULTS: dict[str, tuple[Callable[[Any, Tensor], Any], str]] = {
    "a named tuple": (lambda fc, x: Moments(fc(x), fc(x).exp()), "Moments(mean:Nx4;logvar:Nx4)"),
    "a typed one": (lambda fc, x: Scored(fc(x), x > 0.5), "Scored(score:Nx4;mask:Nx6:bool;label:None)"),
    "a dataclass": (lambda fc, x: Output(fc(x), (x, None)), "Output{logits:Nx4;aux:(Nx6;None);shown:None}"),
    "one in another": (
        lambda fc, x: [Inner(x, Moments(x, x))],
        "[Inner{_first:Nx6;rest:Moments(mean:Nx6;logvar:Nx6)}]",
    ),
    "Hugging Face's": (
        lambda fc, x: SequenceClassifierOutput(logits=fc(x), hidden_states=(x,)),
        "SequenceClassifierOutput{logits:Nx4;hidden_states:(Nx6)}",
    ),
    "an ordered dictionary": (lambda fc, x: OrderedDict(out=fc(x), aux={"a.b": x}), "{out:Nx4;aux:{a.b:Nx6}}"),
    "a registered class": (lambda fc, x: deque([fc(x), x]), "[Nx4;Nx6]"),
    "empty containers": (lambda fc, x: (fc(x), [], (), {}, None), "(Nx4;[];();{};None)"),
    "one tensor twice": (lambda fc, x: (x, x, fc(x)), "(Nx6;Nx6;Nx4)"),
    "a structure of PyTorch's": (lambda fc, x: fc(x).max(1), "max(values:N;indices:N:int64)"),
    "the smallest": (lambda fc, x: torch.min(x, 1, keepdim=True), "min(values:Nx1;indices:Nx1:int64)"),
    "dtypes": (
        lambda fc, x: (x > 0.5, x.argmax(1), x.double(), (x > 0.3).int()),
        "(Nx6:bool;N:int64;Nx6:float64;Nx6:int32)",
    ),
    "truth values": (lambda fc, x: x > 0.5, "Nx6:bool"),
    "signs": (lambda fc, x: torch.sign(x - 0.5), ""),
    "classes as floats": (lambda fc, x: fc(x).argmax(1).float(), "N:float32"),
    "classes": (lambda fc, x: fc(x).argmax(1), ""),
    "an input": (lambda fc, x: x, ""),
}


@pytest.mark.parametrize("case", RESULTS)
def test_results_come_as_the_model_returns_them(case: str, tmp_path: Path) -> None:
    function, text = RESULTS[case]
    model, secure = compiled(function)
    assert [node.op.tree for node in secure.plan.find(Pack)] == ([text] if text else [])  # type: ignore[attr-defined]
    expected = model(ROWS)
    for found in (secure.reference(ROWS), secure.check(ROWS), copy.deepcopy(secure)(ROWS)):
        assert type(found) is type(expected)
        alike(found, expected)
    secure.save(tmp_path)
    elsewhere = tacit.load(tmp_path)
    assert elsewhere.plan == secure.plan
    alike(elsewhere.reference(ROWS), expected)


def test_names_alone_make_answers_with_attributes() -> None:
    _, secure = compiled(lambda fc, x: Moments(fc(x), Output(x, (x,))))
    found = cast(tacit.Secure, pickle.loads(pickle.dumps(secure))).reference(ROWS)
    assert isinstance(found, tuple) and not isinstance(found, Moments)
    assert type(found).__name__ == "Moments" and found._fields == ("mean", "logvar")
    assert found.mean is found[0]
    assert isinstance(found.logvar, Record)
    assert found.logvar.logits is found.logvar["logits"]
    with pytest.raises(AttributeError, match="logit"):
        _ = found.logvar.logit
    again = pickle.loads(pickle.dumps(found))
    assert type(again) is type(found) and torch.equal(again.mean, found.mean)
    assert copy.deepcopy(found).logvar.logits.shape == (3, 6)


def test_float64_models_answer_in_float64(tmp_path: Path) -> None:
    model = nn.Linear(6, 4).double().eval()
    secure = tacit.compile(model, ROWS.double(), input_range=(-1, 1))
    secure.save(tmp_path)
    for found in (secure.check(ROWS.double()), tacit.load(tmp_path).reference(ROWS)):
        torch.testing.assert_close(found, model(ROWS.double()).detach(), atol=0.01, rtol=0)


def test_structures_of_exported_programs() -> None:
    dynamic = ({0: torch.export.Dim.DYNAMIC},)
    for function in (
        lambda fc, x: Moments(fc(x), [x]),
        lambda fc, x: OrderedDict(b=fc(x), a=x > 0.5),
        lambda fc, x: fc(x).sort(1),
    ):
        model = Returning(function).eval()
        program = torch.export.export(model, (ROWS,), dynamic_shapes=dynamic)
        found, expected = tacit.compile(program, ROWS, input_range=(-1, 1)).check(ROWS), model(ROWS)
        assert type(found) is type(expected)
        alike(found, expected)


def endless(fc: nn.Module, x: Tensor) -> Any:
    deep: list[Any] = [x]
    deep.append(deep)
    return deep


REFUSED: dict[str, tuple[Callable[[Any, Tensor], Any], str]] = {
    "a number": (lambda fc, x: (x, 3), r"result '1' .* number or a text \(int\)"),
    "a text in a dataclass": (lambda fc, x: Output(x, "shown"), "result 'aux' .* number or a text"),
    "the batch size": (lambda fc, x: {"y": x, "n": x.shape[0]}, r"'n' .* \(SymInt\)"),
    "a parameter": (lambda fc, x: (x, fc.weight), "'fc.weight' does not"),
    "a constant": (lambda fc, x: Moments(x, torch.ones(3)), "depends on the input"),
    "a set": (lambda fc, x: {x}, "result is of type set: return tensors"),
    "a module": (lambda fc, x: [x, fc], "'1' of the model is of type Linear: return tensors"),
    "numbers as keys": (lambda fc, x: {0: x}, "a key consists of letters"),
    "keys with spaces": (lambda fc, x: {"a b": x}, "a key consists of letters"),
    "nothing": (lambda fc, x: None, "returns no tensor"),
    "an endless list": (endless, "at most 64 levels"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_results_that_no_plan_can_have_are_refused_by_their_names(case: str) -> None:
    function, told = REFUSED[case]
    with pytest.raises(tacit.CompileError, match=told):
        compiled(function)


@pytest.mark.parametrize(
    "text",
    ["class(a:N)", "P(_a:N)", "P(def:N)", "P(a:N;a:N)", "{a:N;a:N}", "a.b{c:N}", "1P(a:N)", "P(a)", "P[a:N]", "P(ﬁ:N)",
     "N:complex64", "N:", "N:int64:bool", "(N", "N)", "()N", "(N,N)", "", "(" * 100 + "N" + ")" * 100],
)  # fmt: skip
def test_texts_that_are_no_structure_are_refused(text: str) -> None:
    with pytest.raises(tacit.PlanError):
        tree.parse(text)


@pytest.mark.parametrize("text", ["N", "(Nx3;{a:2Nx2x2})", "None", "P()", "A{b-c:N:bool;d:P(e:[None])}", "{}"])
def test_structures_are_written_as_they_are_read(text: str) -> None:
    assert tree.text_of(tree.parse(text)) == text


def test_answers_are_printed_and_saved_by_name(tmp_path: Path) -> None:
    answer = Moments(torch.ones(2), Record(mask=torch.tensor([True, False]), none=None))
    assert answer_object(answer) == {"mean": [1.0, 1.0], "logvar.mask": [True, False]}
    save_answer(tmp_path / "answer.npz", answer)
    with np.load(tmp_path / "answer.npz") as saved:
        assert sorted(saved) == ["logvar.mask", "mean"]
        assert saved["logvar.mask"].dtype == bool
