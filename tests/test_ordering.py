"""topk, sort and their likes: against PyTorch where all elements differ, and by index where they are equal."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from test_capture import CLOSE, Model, ops
from torch import nn

import tacit
from tacit.ir.ops.ordering import by_ranks

Tensor = torch.Tensor


def apart(*shape: int, seed: int = 0) -> Tensor:
    """Numbers from -1 to 1, all at least 2^-7 from one another along every line."""
    generator = torch.Generator().manual_seed(seed)
    count = shape[0] if len(shape) == 1 else int(torch.tensor(shape[1:]).prod())
    rows = [(torch.randperm(count, generator=generator) / (count - 1) * 2 - 1) for _ in range(shape[0])]
    return torch.stack(rows).view(shape)


def checked(function: Callable[[Tensor], object], x: Tensor, **options: object) -> tuple[object, tacit.Secure]:
    model = Model(lambda m, x: function(x)).eval()  # type: ignore[arg-type, return-value]
    secure = tacit.compile(model, x, input_range=(-1, 1), **options)  # type: ignore[arg-type]
    assert tacit.Plan.parse(str(secure.plan)) == secure.plan
    secure.reference(x, check=True)
    answer = secure.check(x)
    run, cost = secure.last_run, secure.plan.cost(batch=len(x))
    assert run is not None
    assert (run.rounds, run.online_bytes, run.offline_bytes) == (cost.rounds, cost.online_bytes, cost.offline_bytes)
    return answer, secure


ROWS, LINES, LONG = apart(3, 9), apart(2, 4, 5, 3), apart(2, 60)
VALUES: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
    "topk": (lambda x: x.topk(3).values, ROWS),
    "topk of one": (lambda x: x.topk(1).values, ROWS),
    "topk of all": (lambda x: x.topk(9).values, ROWS),
    "topk, smallest": (lambda x: x.topk(2, largest=False).values, ROWS),
    "topk of one element": (lambda x: x[:, :1].topk(1).values, ROWS),
    "topk along another dimension": (lambda x: x.topk(2, 1).values, LINES),
    "topk behind a product": (lambda x: (x * 0.3).relu().topk(3).values, ROWS),
    "topk of many": (lambda x: x.topk(3).values, LONG),
    "the smallest of many": (lambda x: x.topk(2, largest=False).values, LONG),
    "sort": (lambda x: x.sort(2).values, LINES),
    "sort, descending": (lambda x: x.sort(dim=1, descending=True).values, ROWS),
    "sort, stable": (lambda x: torch.sort(x, stable=True, dim=1)[0], ROWS),
    "kthvalue": (lambda x: x.kthvalue(2).values, ROWS),
    "kthvalue of many, kept": (lambda x: x.kthvalue(2, keepdim=True).values, LONG),
    "median of an even number": (lambda x: x.median(1).values, LINES),
    "median, kept": (lambda x: x.median(-1, keepdim=True).values, LINES),
}
INDICES: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
    "topk": (lambda x: x.topk(3).indices, ROWS),
    "topk of one element": (lambda x: x[:, :1].topk(1).indices, ROWS),
    "topk of all": (lambda x: x.topk(9, sorted=True)[1], ROWS),
    "topk along another dimension": (lambda x: x.topk(4, 2, largest=False)[1], LINES),
    "topk of many": (lambda x: x.topk(2).indices, LONG),
    "sort": (lambda x: x.sort(-1)[1], LINES),
    "argsort": (lambda x: x.argsort(1), LINES),
    "argsort, stable": (lambda x: torch.argsort(x, dim=1, descending=True, stable=True), ROWS),
    "kthvalue": (lambda x: x.kthvalue(4).indices, ROWS),
}


@pytest.mark.parametrize("name", VALUES)
def test_values(name: str) -> None:
    function, x = VALUES[name]
    answer, _ = checked(function, x)
    torch.testing.assert_close(answer, function(x), atol=CLOSE, rtol=0)


@pytest.mark.parametrize("name", INDICES)
def test_indices(name: str) -> None:
    function, x = INDICES[name]
    assert torch.equal(checked(function, x)[0], function(x))  # type: ignore[arg-type]


def test_both_and_the_textbook_suite() -> None:
    for protocol in ("fused", "securenn"):
        (values, indices), secure = checked(lambda x: x.topk(3), ROWS, protocol=protocol)  # type: ignore[misc]
        expected = ROWS.topk(3)
        torch.testing.assert_close(values, expected.values, atol=CLOSE, rtol=0)
        assert torch.equal(indices.long(), expected.indices)
        assert ops(secure).count("one_hot") == 1  # what gives the values gives the indices


@pytest.mark.parametrize("n", [4, 40])
@pytest.mark.parametrize("largest", [True, False])
def test_of_equals_the_first_comes_first(n: int, largest: bool) -> None:
    x = (torch.arange(n).flip(0) // 3 / n).expand(2, n).contiguous()
    answer, _ = checked(lambda x: x.topk(4, largest=largest).indices, x)
    assert torch.equal(answer, x.sort(dim=1, descending=largest, stable=True).indices[:, :4])  # type: ignore[arg-type]


def test_the_way_that_costs_less_is_taken() -> None:
    assert by_ranks(1, 10, 10) and by_ranks(1, 32, 5) and not by_ranks(1, 1000, 5) and not by_ranks(100, 40, 2)
    few, many = (checked(lambda x: x.topk(2).values, x)[1] for x in (ROWS, LONG))
    assert few.plan.cost().rounds == 7  # five, between the input and the answer
    assert "one_hot" in ops(few) and "one_hot" not in ops(many)
    assert max(node.type.width for node in many.plan.nodes if node.op.name == "relu") <= 14 + 6 + 1  # and no tower


def test_the_best_classes_of_a_network() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 10), Model(lambda m, x: x.topk(5).indices)).eval()
    x = torch.rand(20, 8)
    secure = tacit.compile(model, x, input_range=(0, 1))
    logits = model[:3](x)
    assert (secure(x) == model(x)).float().mean() > 0.9  # neighbours closer than 2^-8 may swap
    found = logits.gather(1, secure(x))
    torch.testing.assert_close(found, logits.topk(5).values, atol=2 * CLOSE, rtol=0)


@pytest.mark.parametrize("protocol", ["fused", "securenn"])
def test_what_is_known_to_be_zero_can_be_compared(protocol: str) -> None:
    x = ROWS
    for function in (lambda x: (x * 0).relu() + x, lambda x: ((x * 0) >= 0).float(), lambda x: x.clamp(0, 0) + x):
        answer, _ = checked(function, x, protocol=protocol)
        torch.testing.assert_close(answer, function(x), atol=CLOSE, rtol=0)
    answer, _ = checked(lambda x: torch.where(x * 0 >= 0, x, 1 - x), x, protocol=protocol)
    torch.testing.assert_close(answer, x, atol=CLOSE, rtol=0)
