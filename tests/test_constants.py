"""Constants with a batch dimension, and values written to parts of them and of one another."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from test_capture import random
from test_integers import Model, agrees
from torch import nn

import tacit

Tensor = torch.Tensor
Forward = Callable[[Model, Tensor], Tensor]
ROWS, STEPS = random(3, 6), random(3, 4, 6)


def members() -> dict[str, nn.Module | Tensor]:
    torch.manual_seed(0)
    return {
        "a": nn.Linear(6, 6),
        "b": nn.Linear(6, 6),
        "wide": nn.Linear(6, 33),
        "narrow": nn.Linear(33, 6),
        "norm": nn.LayerNorm(6),
        "attention": nn.MultiheadAttention(6, 2, batch_first=True),
        "row": random(6, seed=1),
        "table": random(4, 6, seed=2),
        "i": torch.tensor([4, 1]),
    }


REPEATED: dict[str, tuple[Forward, Tensor]] = {
    "a start state": (lambda m, x: m.a(m.row.expand(len(x), -1)) + m.b(x), ROWS),
    "through layers": (lambda m, x: x * m.narrow(m.wide(m.a(m.row.repeat(x.shape[0], 1))).tanh()), ROWS),
    "a code": (lambda m, x: x * (1 + m.norm(m.row.unsqueeze(0).expand(x.size(0), -1))), ROWS),
    "like the input": (lambda m, x: m.row.expand_as(x) * x + m.a(m.row[None].expand_as(x)), ROWS),
    "in an einsum": (lambda m, x: torch.einsum("bi,bij->bj", x, m.table.T.expand(len(x), -1, -1)), ROWS),
    "prompts": (lambda m, x: torch.cat([m.a(m.table.expand(len(x), -1, -1)), x], 1), STEPS),
    "side by side": (lambda m, x: torch.stack([x, torch.ones_like(x), m.row.expand(len(x), -1)], 1), ROWS),
    "in front": (lambda m, x: torch.stack([x, x.new_full((len(x), 6), 0.5), 2 * x]).sum(0), ROWS),
    "queries": (lambda m, x: m.attention(m.table.expand(len(x), -1, -1), x, x)[0], STEPS),
    "a matrix for each": (lambda m, x: m.table.expand(len(x), -1, -1) @ x.transpose(1, 2), STEPS),
    "flattened": (lambda m, x: (x.reshape(-1, 6) * m.table.repeat(len(x), 1)).view(x.shape), STEPS),
    "flattened, then a layer": (lambda m, x: x.flatten(0, 1) + m.a(m.table.repeat(len(x), 1)).relu(), STEPS),
}  # fmt: skip


@pytest.mark.parametrize("name", REPEATED)
def test_a_constant_may_repeat_along_the_batch(name: str) -> None:
    forward, x = REPEATED[name]
    agrees(Model(forward, **members()), x)


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: x + torch.arange(x.shape[0])[:, None],
        lambda m, x: x + 1e-5 * torch.arange(x.shape[0])[:, None],
        lambda m, x: x * m.a(torch.ones(x.shape[0], 6).cumsum(0)),
    ],
)
def test_a_constant_that_depends_on_the_place_is_refused(forward: Forward) -> None:
    with pytest.raises(tacit.CompileError, match="depends on the place in the batch"):
        tacit.compile(Model(forward, **members()).eval(), ROWS)


def slots(m: Model, x: Tensor) -> Tensor:
    out, h = x.new_zeros(len(x), 3, 6), x
    for t in range(3):
        h = m.a(h).relu()
        out[:, t] = h
    return out


def columns(m: Model, x: Tensor) -> Tensor:
    out = x.new_zeros(x.size(0), 9)
    out[:, 1:7] = m.a(x)
    out[:, 8:] += 2
    return out


def strided(m: Model, x: Tensor) -> Tensor:
    out = torch.ones(x.shape[0], 4, 12)
    out[:, :, ::2] = x
    out[:, 2, 1::4] = x[:, 0, :3]
    return out


def last(m: Model, x: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    out[..., 0] = x[..., 1]
    out[..., -1] = 0.25
    return out


def sequence_first(m: Model, x: Tensor) -> Tensor:
    out = torch.full((4, x.shape[0], 6), 0.5)
    for t in range(2):
        out[t] = x * (t + 1)
    return out.transpose(0, 1)


def copied(m: Model, x: Tensor) -> Tensor:
    out = torch.empty_like(x).copy_(m.row)
    out[:, 1:4].copy_(x[:, :1])
    out[:, 5].mul_(2)
    return out + x


def of_itself(m: Model, x: Tensor) -> Tensor:
    x = x.clone()
    x[:, 0] = 0
    x[:, 1:3] = m.row[:2]
    x[:, 3] += x[:, 2]
    return x


def parameters(m: Model, x: Tensor) -> Tensor:
    out = m.table.repeat(x.shape[0], 1, 1)
    out[:, 1] = x
    out[:, 2:, 3] = x[:, :2]
    return out


def indexed(m: Model, x: Tensor) -> Tensor:
    out = torch.zeros(len(x), 6)
    out[:, [0, 5, 2]] = x[:, :3]
    out[:, m.i] = x[:, 3:4]
    return out


def masked_columns(m: Model, x: Tensor) -> Tensor:
    x = x.clone()
    x[:, torch.tensor([True, False, True, False, False, True])] = 0.5
    return x


def two_indices(m: Model, x: Tensor) -> Tensor:
    out = torch.zeros(x.shape[0], 3, 4, 6)
    out[:, torch.tensor([0, 2]), torch.tensor([1, 3])] = x[:, :2]
    return out


def summed(m: Model, x: Tensor) -> Tensor:
    out: Tensor = torch.ones(len(x), 3, 6).index_add(1, torch.tensor([0, 2, 2, 2]), x)
    return torch.ops.aten.index_put(out, [None, torch.tensor([1, 1])], x[:, :2], True)  # type: ignore[no-any-return]


def clipped(m: Model, x: Tensor) -> Tensor:
    x = x.clone()
    x[x < 0] = 0
    x[x > 0.5] = m.row[0]
    return x


def rows(m: Model, x: Tensor) -> Tensor:
    x = x.clone()
    x[x.sum(-1) < 0] = -1.0
    x[:, :, 0][x[:, :, 0] > 0] = 1.0
    return x


def truths(m: Model, x: Tensor) -> Tensor:
    chosen = torch.zeros(x.shape[0], 6, dtype=torch.bool)
    chosen[:, 1] = x[:, 0] > 0
    chosen[: x.shape[0], 2] = True
    return torch.where(chosen, 1.0, x)


WRITTEN: dict[Forward, Tensor] = {
    slots: ROWS,
    columns: ROWS,
    strided: STEPS,
    last: STEPS,
    sequence_first: ROWS,
    copied: ROWS,
    of_itself: ROWS,
    parameters: ROWS,
    indexed: ROWS,
    masked_columns: ROWS,
    two_indices: STEPS,
    summed: STEPS,
    clipped: ROWS,
    rows: STEPS,
    truths: ROWS,
    lambda m, x: torch.select_scatter(torch.zeros(len(x), 3, 6), x, 1, 2): ROWS,
    lambda m, x: torch.slice_scatter(x, 2 * x[:, :2], 1, 1, 3): STEPS,
    lambda m, x: F.pad(x, (1, 2)).masked_fill_(F.pad(x, (1, 2)) < -0.5, 0.0): ROWS,
}


@pytest.mark.parametrize("forward", WRITTEN, ids=lambda forward: forward.__name__)
def test_values_are_written_to_parts(forward: Forward) -> None:
    agrees(Model(forward, **members()), WRITTEN[forward])


def rows_of_the_batch(m: Model, x: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    out[1:] = x[1:]
    return out


def scaled_where_negative(m: Model, x: Tensor) -> Tensor:
    x = x.clone()
    x[x < 0] *= 0.1
    return x


def several_where_negative(m: Model, x: Tensor) -> Tensor:
    x = x.clone()
    return x.index_put_((x < 0,), m.row)


def rounded(m: Model, x: Tensor) -> Tensor:
    out = torch.zeros(x.shape[0], 6, dtype=torch.int64)
    out[:, 1] = x[:, 0]
    return out


@pytest.mark.parametrize(
    ("forward", "told"),
    [
        (rows_of_the_batch, "acts along the batch"),
        (scaled_where_negative, r"as in torch.where\(mask, x, 0\)"),
        (several_where_negative, r"torch.where\(mask, values, x\)"),
        (rounded, "make what they are written to float"),
    ],
)
def test_writes_that_are_refused_say_what_to_write_instead(forward: Forward, told: str) -> None:
    with pytest.raises(tacit.CompileError, match=told):
        tacit.compile(Model(forward, **members()).eval(), ROWS)
