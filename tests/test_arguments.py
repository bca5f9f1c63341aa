"""Arguments by position and by name, in dictionaries and dataclasses, and tensors whose numbers cannot be read."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from test_inputs import UNFIT
from torch import nn
from torch._subclasses import FakeTensorMode
from transformers import BatchEncoding

import tacit
from tacit.ir.ops.roles import Input

Tensor = torch.Tensor
A, B, C = torch.rand(3, 3, 4, generator=torch.Generator().manual_seed(1))
Pair = namedtuple("Pair", "left right")


class Optional(nn.Module):
    """Two arguments that may be left out, one by name alone."""

    def forward(self, x: Tensor, mask: Tensor | None = None, bias: Tensor | None = None, *, scale: float = 1.0) -> Any:
        x = x if mask is None else x * mask
        return (x if bias is None else x - 3 * bias) * scale


@dataclass
class Sample:
    second: Tensor
    first: Tensor


class Inside(nn.Module):
    """A dictionary or an object, and a pair."""

    def forward(self, named: Any, pair: Any) -> Tensor:
        first, second = (named["first"], named["second"]) if isinstance(named, dict) else (named.first, named.second)
        return cast(Tensor, first - 3 * second + 2 * pair[0] - pair[1])


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0)


def compiled(*example: Any, **options: Any) -> tacit.Secure:
    return tacit.compile(Optional().eval(), *example, input_range=(-1, 1), **options)


@pytest.fixture(scope="module")
def masked() -> tacit.Secure:
    return compiled((A, B))


@pytest.fixture(scope="module")
def biased() -> tacit.Secure:
    """The argument in between is left out."""
    return compiled({"bias": B, "x": A})


@pytest.fixture(scope="module")
def inside() -> tacit.Secure:
    return tacit.compile(Inside().eval(), ({"second": B, "first": A}, (C, A)), input_range=(-1, 1))


def labels(secure: tacit.Secure) -> list[str]:
    return [node.op.label for node in secure.plan.find(Input)]  # type: ignore[attr-defined]


# --- by name ---


def test_arguments_are_taken_by_name_everywhere(masked: tacit.Secure, tmp_path: Path) -> None:
    for found in (
        masked(x=A, mask=B),
        masked(A, mask=B),
        masked(mask=B, x=A),
        masked.check(A, mask=B),
        masked.reference(mask=B, x=A),
        masked.trace(str(tmp_path / "trace.json"), x=A, mask=B),
        *masked.stream([{"mask": B, "x": A}, (A, B), [A, B]]),
    ):
        close(found, A * B)


def test_an_argument_behind_a_gap_is_taken_by_name_alone(biased: tacit.Secure, tmp_path: Path) -> None:
    biased.save(tmp_path)
    elsewhere = tacit.load(tmp_path)
    assert labels(elsewhere) == ["x", "bias"]
    for secure in (biased, elsewhere):
        close(secure.reference(A, bias=B), A - 3 * B)
        close(secure.reference(bias=B, x=A), A - 3 * B)
        with pytest.raises(tacit.InputError, match="'bias' cannot be told by its position: give it by name"):
            secure(A, B)
        with pytest.raises(tacit.InputError, match="not None: leave it out"):
            secure(A, None, B)


def test_a_remote_model_takes_names_and_tells_them(biased: tacit.Secure) -> None:
    def infer(encoded: Any, timeout: Any) -> Any:
        answer, run, _ = biased.session().request(encoded, trace=False)
        return answer, run

    remote = tacit.Remote(cast(Any, SimpleNamespace(plan=biased.plan, infer=infer)))
    close(remote.predict(bias=B, x=A), A - 3 * B)
    close(remote.predict(A, bias=B, timeout=5), A - 3 * B)
    with pytest.raises(tacit.InputError, match="'bias' is missing"):
        remote.predict(x=A)


@pytest.mark.parametrize(
    ("args", "kwargs", "told"),
    [
        ((A,), {}, r"expected 2 inputs \(x, mask\), found 1"),
        ((), {}, "found 0"),
        ((A, B, C), {}, "found 3"),
        ((A,), {"x": B}, "'x' is given twice"),
        ((A, B), {"mask": B}, "'mask' is given twice"),
        ((), {"mask": B}, "'x' is missing"),
        ((A,), {"bias": B}, "no input 'bias'; the plan takes x, mask"),
        ((A,), {"mask": B, "scale": 2.0}, "no input 'scale'.*leave it out"),
        ((A,), {"mask": None}, "'mask' has to be a tensor, not None"),
        ((A,), {"mask": 0.5}, r"'mask' has to be a tensor, not float.*torch\.tensor"),
        ((A,), {"mask": B.numpy()}, r"'mask' has to be a tensor, not an array.*torch\.as_tensor"),
        (({"x": A, "foo": B},), {}, "foo, x inside"),
    ],
)
def test_missing_surplus_and_double_arguments_are_named(
    masked: tacit.Secure, args: Any, kwargs: Any, told: str
) -> None:
    with pytest.raises(tacit.InputError, match=told):
        masked(*args, **kwargs)


def test_examples_by_name_and_what_they_fix() -> None:
    fixed = compiled(A, kwargs={"bias": B, "scale": 2.0, "mask": None}, calibration={"bias": B, "x": A})
    close(fixed.check(A, bias=B), 2 * (A - 3 * B))
    with pytest.raises(tacit.InputError, match="no input 'scale'"):
        fixed(A, bias=B, scale=2.0)
    linear = tacit.compile(nn.Linear(4, 2).eval(), {"input": A}, input_range=(-1, 1), reveal="correct")
    targets = torch.tensor([0, 1, 1])
    assert linear(input=A, targets=targets) == linear.reference(A, targets=targets) == linear.reference(A, targets)


@pytest.mark.parametrize(
    ("example", "kwargs", "told"),
    [
        (A, {"foo": B}, "unexpected keyword argument 'foo'"),
        ((A, B), {"mask": B}, "multiple values for argument 'mask'"),
        ((A, None, B), None, "by name"),
        ((A, 2.0), None, "by name"),
        ((A, B.tolist()), None, r"argument 2\[0\].*torch\.tensor"),
        ({"x": A, "bias": B.numpy()}, None, "'bias' has to be a tensor, not an array"),
    ],
)
def test_examples_that_do_not_fit_forward_are_refused(example: Any, kwargs: Any, told: str) -> None:
    with pytest.raises(tacit.CompileError, match=told):
        compiled(example, kwargs=kwargs)


def test_names_behind_two_asterisks_are_refused() -> None:
    class Rest(nn.Module):
        def forward(self, x: Tensor, **rest: Tensor) -> Tensor:
            return x - rest["a"]

    with pytest.raises(tacit.CompileError, match=r"no parameter 'a' of its own.*write it as a parameter"):
        tacit.compile(Rest().eval(), {"x": A, "a": B})


def test_a_dictionary_that_names_no_parameters_is_an_argument() -> None:
    class Lone(nn.Module):
        def forward(self, batch: dict[str, Tensor]) -> Tensor:
            return batch["x"] - 2 * batch["y"]

    secure = tacit.compile(Lone().eval(), {"y": B, "x": A}, input_range=(-1, 1))
    close(secure.check({"y": B, "x": A}), A - 2 * B)
    close(secure.reference(batch={"x": A, "y": B}), A - 2 * B)


def test_what_a_tokeniser_returns_is_an_example_and_an_input() -> None:
    class Encoder(nn.Module):
        def forward(self, ids: Tensor, past: Tensor | None = None, attention_mask: Tensor | None = None) -> Tensor:
            assert attention_mask is not None
            return 2 * ids - attention_mask

    encoding = BatchEncoding({"attention_mask": B, "ids": A})
    secure = tacit.compile(Encoder().eval(), encoding, input_range=(-1, 1))
    for found in (secure(**encoding), secure(encoding), secure.reference(A, attention_mask=B)):
        close(found, 2 * A - B)


# --- structures ---


def test_structures_are_matched_by_their_names(inside: tacit.Secure) -> None:
    expected = A - 3 * B + 2 * C - A
    for named in ({"first": A, "second": B}, OrderedDict(second=B, first=A), Sample(B, A)):
        for pair in ((C, A), [C, A], Pair(C, A)):
            close(inside.reference(named, pair), expected)
    close(inside(pair=[C, A], named={"second": B, "first": A}), expected)
    close(inside.reference(A, B, C, A), expected)  # one by one, as files on the command line


@pytest.mark.parametrize(
    "args",
    [({"first": A, "third": B}, (C, A)), ({"first": A}, (C, A)), ((A, B), (C, A)), ({"first": A, "second": B}, (C,))],
)
def test_structures_that_differ_are_refused(inside: tacit.Secure, args: Any) -> None:
    with pytest.raises(tacit.InputError, match="named_first, named_second"):
        inside(*args)


def test_a_model_is_handed_its_own_containers() -> None:
    class Own(nn.Module):
        def forward(self, sample: Sample, pair: Pair, encoding: BatchEncoding) -> Tensor:
            return cast(Tensor, sample.first - sample.second * 3 + pair.left - 2 * encoding.ids)

    example = (Sample(B, A), Pair(C, A), BatchEncoding({"ids": B}))
    model = Own().eval()
    secure = tacit.compile(model, example, input_range=(-1, 1))
    assert not model._forward_hooks and not model._forward_pre_hooks
    assert labels(secure) == ["sample_first", "sample_second", "pair_left", "pair_right", "encoding_ids"]
    expected = A - 3 * B + C - 2 * B
    close(secure.check(*example), expected)
    close(secure.reference(sample=example[0], encoding={"ids": B}, pair=example[1]), expected)


def test_one_named_tuple_is_one_argument() -> None:
    class One(nn.Module):
        def forward(self, pair: Pair) -> Tensor:
            return cast(Tensor, pair.left - pair.right)

    close(tacit.compile(One().eval(), Pair(A, B), input_range=(-1, 1)).check(Pair(A, B)), A - B)


def test_inputs_of_an_exported_program_are_found_by_name_whatever_their_order() -> None:
    n = {0: torch.export.Dim.DYNAMIC}
    shapes = ({"second": n, "first": n}, [n, n])
    program = torch.export.export(Inside().eval(), ({"second": B, "first": A}, [C, A.clone()]), dynamic_shapes=shapes)
    secure = tacit.compile(program, ({"first": A, "second": B}, [C, A]), input_range=(-1, 1))
    close(secure.check({"first": A, "second": B}, [C, A]), A - 3 * B + 2 * C - A)


# --- tensors ---


class Odd(torch.Tensor):
    """A tensor whose own functions cannot be asked."""

    @classmethod
    def __torch_function__(cls, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("not here")


def unreadable() -> dict[str, tuple[Any, str]]:
    return {
        "sparse": (A.to_sparse(), r"to_dense\(\)"),
        "compressed rows": (A.to_sparse_csr(), r"to_dense\(\)"),
        "of another library": (A.to_mkldnn(), r"to_dense\(\)"),
        "without values": (A.to("meta"), "without values"),
        "not initialised": (nn.UninitializedParameter(), "without values"),
        "quantised": (torch.quantize_per_tensor(A, 0.01, 0, torch.quint8), r"dequantize\(\)"),
        "complex": (A.to(torch.complex64), "real and imaginary"),
        "fake": (FakeTensorMode().from_tensor(A), "FakeTensor, which only stands for"),
        "nested": (torch.nested.nested_tensor([A[0], A[1]]), "to_padded_tensor"),
        "jagged": (torch.nested.nested_tensor([A[0], A[1]], layout=torch.jagged), "to_padded_tensor"),
        "an array": (UNFIT["an array"][0], r"torch\.as_tensor"),
        "a list": (UNFIT["a list"][0], r"torch\.tensor"),
    }


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_tensors_that_cannot_be_read_are_refused_with_a_remedy(masked: tacit.Secure) -> None:
    for value, told in unreadable().values():
        with pytest.raises(tacit.InputError, match=f"input 'mask' .*{told}"):
            masked(A, value)
        with pytest.raises(tacit.CompileError, match=f"argument 2.*{told}"):
            compiled((A, value))


def test_tensors_of_other_kinds_are_taken_as_numbers(masked: tacit.Secure) -> None:
    small = (A.half(), A.bfloat16(), A.to(torch.float8_e4m3fn))
    own = (A.clone().requires_grad_(), nn.Parameter(A), A.as_subclass(Odd))
    for value in (*small, *own, A.double(), A.t().contiguous().t(), A[:1].expand(3, 4)):
        with torch._C.DisableTorchFunctionSubclass():
            plain = value.detach().as_subclass(Tensor).float()
        found = masked.reference(value, B)
        assert type(found) is Tensor and not found.requires_grad
        close(found, plain * B)


def test_examples_may_require_gradients() -> None:
    x = A.clone().requires_grad_()
    close(compiled((x, nn.Parameter(B))).reference(x, B), A * B)
    assert x.grad is None
