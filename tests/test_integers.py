"""Inputs of integers and truth values: tables, bags, features, masks; arithmetic, which is exact; what is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from test_capture import CLOSE, random
from torch import nn

import tacit
from tacit.ir.ops.roles import Input

Tensor = torch.Tensor


class Model(nn.Module):
    """A forward written as a function of the model and its inputs."""

    def __init__(self, forward: Callable[..., Tensor], **members: nn.Module | Tensor) -> None:
        super().__init__()
        self._forward = forward
        for name, member in members.items():
            if isinstance(member, nn.Module):
                self.add_module(name, member)
            else:
                self.register_buffer(name, member)

    def forward(self, a: Tensor, b: Tensor | None = None) -> Tensor:
        return self._forward(self, a) if b is None else self._forward(self, a, b)


def whole(high: int, *shape: int, low: int = 0, dtype: torch.dtype = torch.int64, seed: int = 0) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def table(rows: int, features: int = 3, **options: int) -> nn.Embedding:
    torch.manual_seed(rows)
    return nn.Embedding(rows, features, **options)


def values(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(len(shape)))


def bag(rows: int, mode: str = "mean", **options: int) -> nn.EmbeddingBag:
    torch.manual_seed(rows)
    return nn.EmbeddingBag(rows, 3, mode=mode, **options)


def agrees(model: nn.Module, *inputs: Tensor, close: float = CLOSE, **options: object) -> tacit.Secure:
    """The secure run is that of the oracle, bit for bit, and that of PyTorch; the oracle alone of the last row."""
    secure = tacit.compile(model.eval(), inputs if len(inputs) > 1 else inputs[0], **options)  # type: ignore[arg-type]
    assert tacit.Plan.parse(str(secure.plan)) == secure.plan
    last = tuple(x[-1:] for x in inputs)
    for some, found in ((inputs, secure.check(*inputs)), (last, secure.reference(*last, check=True))):
        expected = model(*some).detach()
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
        if expected.is_floating_point():
            torch.testing.assert_close(found, expected, atol=close, rtol=0)
        else:
            assert torch.equal(found, expected)
    return secure


TOKENS = whole(4, 3, 6)
LOOKUPS: dict[str, tuple[nn.Module, Tensor]] = {
    "a column": (Model(lambda m, c: m.e(c[:, 1]), e=table(5)), TOKENS),
    "one number each": (Model(lambda m, c: m.e(c), e=table(5)), TOKENS[:, 0]),
    "by index": (Model(lambda m, c: m.w[c] + m.w.index_select(0, c[:, 0])[:, None], w=values(5, 3)), TOKENS),
    "numbers by index": (Model(lambda m, c: m.w[c].cumsum(1), w=values(5)), TOKENS),
    "matrices by index": (Model(lambda m, c: m.w[c[:, 0]], w=values(5, 2, 3)), TOKENS),
    "a column each": (Model(lambda m, c: m.e(c[:, 0]) + m.f(c[:, 1]), e=table(7), f=table(4)), TOKENS),
    "unbind": (Model(lambda m, c: m.e(c.unbind(1)[2]) * m.f(c.unbind(1)[4]), e=table(7), f=table(4)), TOKENS),
    "split": (Model(lambda m, c: m.e(c.split(2, 1)[1]) - m.f(c.chunk(3, 1)[2]), e=table(7), f=table(4)), TOKENS),
    "reshape": (Model(lambda m, c: m.e(c.reshape(c.shape[0], 2, 3)).sum(1), e=table(5)), TOKENS),
    "flattened": (Model(lambda m, c: m.e(c.reshape(-1)).view(c.shape[0], -1), e=table(5)), TOKENS),
    "turned": (Model(lambda m, c: m.e(c.t()).transpose(0, 1), e=table(5)), TOKENS),
    "converted": (Model(lambda m, c: m.e(c.long()) + m.e(c.int()), e=table(5)), TOKENS.to(torch.int16)),
    "offsets": (Model(lambda m, c: m.e(c[:, :3] + m.o).sum(1), e=table(12), o=torch.tensor([0, 4, 8])), TOKENS),
    "offsets, flattened": (
        Model(lambda m, c: m.e(c.reshape(-1) + m.o.repeat(len(c))), e=table(24), o=torch.arange(6) * 4),
        TOKENS,
    ),
    "numbers": (Model(lambda m, c: m.e(c + 1) + m.e(2 * c[:, :1]) - m.e(3 - c), e=table(7)), TOKENS),
    "two tables": (Model(lambda m, c: m.e(c) + m.f(c), e=table(7), f=table(4)), TOKENS),
    "padding": (Model(lambda m, c: m.e(c), e=table(5, padding_idx=0)), TOKENS),
    "behind a constant": (Model(lambda m, c: m.e(F.pad(c, (1, 0), value=4)), e=table(5)), TOKENS),
    "computed": (Model(lambda m, c: m.e((c > 1).long()) + m.e(c.clamp(max=1).clamp(0, 1)), e=table(2)), TOKENS),
    "of a float": (Model(lambda m, x: m.e(x.argmax(1)), e=table(6)), random(3, 6)),
    "a bag": (bag(4), TOKENS),
    "a bag of sums": (Model(lambda m, c: m.e(c[:, 1:4]), e=bag(4, "sum")), TOKENS),
    "a bag with padding": (bag(4, padding_idx=2), torch.cat([TOKENS, torch.full((1, 6), 2)])),
    "a bag of sums with padding": (bag(4, "sum", padding_idx=1), TOKENS),
    "a bag with weights": (
        Model(lambda m, c: m.e(c, per_sample_weights=m.w.expand(len(c), -1)), e=bag(4, "sum"), w=random(6)),
        TOKENS,
    ),
    "one hot": (Model(lambda m, c: F.one_hot(c, 4).float().mean(1)), TOKENS),
    "one hot of a column": (Model(lambda m, c: F.one_hot(c[:, 2], 5)), TOKENS),
}


@pytest.mark.parametrize("name", LOOKUPS)
def test_integers_are_looked_up_in_tables(name: str) -> None:
    model, x = LOOKUPS[name]
    agrees(model, x)


def test_a_column_is_as_cheap_as_an_input() -> None:
    columns = tacit.compile(Model(lambda m, c: m.e(c[:, 1]), e=table(5)).eval(), TOKENS).plan.cost(batch=4)
    alone = tacit.compile(Model(lambda m, c: m.e(c), e=table(5)).eval(), TOKENS[:, 1]).plan.cost(batch=4)
    shared = 3 * 5 * 8 * 4  # five more columns for the input to share, in words of 8 bytes
    assert columns.rounds == alone.rounds
    assert columns.online_bytes - alone.online_bytes < shared
    assert columns.offline_bytes == alone.offline_bytes


def test_every_index_of_its_table_is_taken_and_no_other() -> None:
    model = Model(
        lambda m, c: m.e(c[:, 0]) + m.f(c[:, 1] + 2) + m.f(c[:, 2]) + m.e(c[:, 2]), e=table(7), f=table(5)
    ).eval()
    secure = tacit.compile(model, torch.zeros(2, 4, dtype=torch.int64))
    (line,) = (n.op for n in secure.plan.nodes if isinstance(n.op, Input))
    assert (line.along, line.lows, line.highs) == ((1,), (0, -2, 0, -4), (6, 2, 4, 4))
    for column, (low, high) in enumerate(zip(line.lows[:3], line.highs[:3], strict=True)):
        for value, fits in ((low - 1, False), (low, True), (high, True), (high + 1, False)):
            c = torch.zeros(1, 4, dtype=torch.int64)
            c[0, column] = value
            if fits:
                torch.testing.assert_close(secure(c), model(c).detach(), atol=CLOSE, rtol=0)
                continue
            with pytest.raises(IndexError):
                model(c)
            with pytest.raises(tacit.InputError, match="1 of 4 values lie outside the range of their place"):
                secure(c)


LOGITS = random(3, 6)
MASK = torch.tensor([[1, 0, 1, 1, 0, 1], [1, 1, 1, 1, 1, 1], [0, 0, 1, 0, 1, 1]]).bool()
MIXED: dict[str, tuple[nn.Module, Tensor, Tensor]] = {
    "as a float": (Model(lambda m, x, k: x * k.float()), LOGITS, MASK),
    "as it is": (Model(lambda m, x, k: x * k + k), LOGITS, MASK),
    "of integers": (Model(lambda m, x, k: x * k.to(x.dtype)), LOGITS, MASK.long()),
    "a choice": (Model(lambda m, x, k: torch.where(k, x, m.w)), LOGITS, MASK),
    "filled": (Model(lambda m, x, k: x.masked_fill(~k, -2.0)), LOGITS, MASK),
    "logic": (Model(lambda m, x, k: x * ((k | (x > 0)) & ~(k == (x < 0.5)))), LOGITS, MASK),
    "a softmax": (Model(lambda m, x, k: x.masked_fill(k.logical_not(), -torch.inf).softmax(1)), LOGITS, MASK),
    "a mean": (Model(lambda m, x, k: (x * k).sum(1) / k.sum(1).clamp(min=1)), LOGITS, MASK),
    "features": (Model(lambda m, x, c: torch.cat([x, m.e(c[:, 0]), c[:, 1:] / 4], 1), e=table(4)), LOGITS, TOKENS),
    "compared": (Model(lambda m, x, c: (c > x) * 2.0 + (c >= 1) - (c == 3).float()), LOGITS, TOKENS),
}  # fmt: skip
for _model, *_ in MIXED.values():
    _model.register_buffer("w", random(6, seed=3))


@pytest.mark.parametrize("name", MIXED)
def test_masks_and_integers_beside_floats(name: str) -> None:
    model, x, k = MIXED[name]
    agrees(model, x, k)


def test_a_mask_of_keys_in_attention() -> None:
    x = random(3, 4, 5)
    model = Model(lambda m, x, k: F.scaled_dot_product_attention(x, x, x, attn_mask=k[:, None, :4]))
    agrees(model, x, MASK[:, 2:])


def test_an_embedding_averaged_without_its_padding() -> None:
    def forward(m: Model, c: Tensor) -> Tensor:
        kept = (c != 2).unsqueeze(-1)
        out: Tensor = (m.e(c) * kept).sum(1) / kept.sum(1).clamp(min=1)
        return out

    agrees(Model(forward, e=table(4)), TOKENS)


EXACT: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "sums": (lambda m, a, b: 3 * a - b + m.w - 7, (whole(99, 3, 6), whole(99, 3, 6, low=-99))),
    "products": (lambda m, a, b: a * b * m.w - a**2, (whole(99, 3, 6), whole(99, 3, 6, low=-99))),
    "along a dimension": (lambda m, a: a.sum(1) + a.cumsum(1)[:, 3] + a.amax(1), (whole(99, 3, 6),)),
    "steps": (lambda m, a: a.clamp(-3, 5).abs() + a.relu() - a.sign(), (whole(99, 3, 6, low=-99),)),
    "the larger": (lambda m, a, b: torch.maximum(a, b) + torch.where(a > b, a, 0), (TOKENS, TOKENS.flip(1))),
    "in order": (lambda m, a: a.sort(1).values * a.argsort(1), (torch.stack([torch.randperm(6) for _ in range(3)]),)),
    "moved": (lambda m, a: torch.stack([a[:, m.w], a.flip(1)], 1).roll(1, 2), (TOKENS,)),
    "truth values": (lambda m, a, b: (a + b) ^ (a * b), (MASK, MASK.flip(1))),
    "to truth values": (lambda m, a: a.bool(), (TOKENS,)),
    "counts": (lambda m, a: a.sum(1) - (~a).sum(1), (MASK,)),
    "bytes": (lambda m, a: a.long() * 255 - (a > 200).long(), (whole(256, 3, 6, dtype=torch.uint8),)),
}


@pytest.mark.parametrize("name", EXACT)
def test_arithmetic_of_integers_is_exact(name: str) -> None:
    forward, inputs = EXACT[name]
    agrees(Model(forward, w=torch.tensor([1, 0, 3, 2, 5, 4])), *inputs)


@pytest.mark.parametrize(
    ("dtype", "low", "high"),
    [(torch.uint8, 0, 255), (torch.int8, -128, 127), (torch.int16, -2048, 2048), (torch.int32, -2048, 2048)],
)
def test_images_and_features_of_integers(dtype: torch.dtype, low: int, high: int) -> None:
    torch.manual_seed(0)
    x = whole(min(high, 1000), 3, 1, 4, 4, low=max(low, -1000), dtype=dtype)
    x[0, 0, 0, 0] = min(high, 1000)
    secure = agrees(Model(lambda m, x: m.c(x.float() / (high + 1)), c=nn.Conv2d(1, 2, 3)), x)
    (line,) = (n.op for n in secure.plan.nodes if isinstance(n.op, Input))
    assert (line.low, line.high, line.integers) == (low, high, True)


def test_the_range_of_integers_may_be_given() -> None:
    secure = tacit.compile(Model(lambda m, c: c * 2).eval(), TOKENS.to(torch.uint8), input_range=(-0.5, 9.5))
    assert torch.equal(secure(torch.full((1, 6), 9)), torch.full((1, 6), 18))
    for outside in (-1, 10):
        with pytest.raises(tacit.InputError, match="outside the range"):
            secure(torch.full((1, 6), outside))
    with pytest.raises(tacit.CompileError, match="example_inputs holds integers"):
        tacit.compile(Model(lambda m, c: c * 2).eval(), TOKENS, input_range=(0, 2))


def test_types_of_integer_inputs() -> None:
    secure = tacit.compile(Model(lambda m, k: k.float()).eval(), MASK)
    assert torch.equal(secure(MASK.to(torch.int8)), MASK.float())
    with pytest.raises(tacit.InputError, match=r"float32, the plan takes integers, as torch.int64 or torch.bool"):
        secure(MASK.float())
    numbers = tacit.compile(Model(lambda m, c: c.float()).eval(), TOKENS)
    with pytest.raises(tacit.InputError, match=r"torch.bool, the plan takes integers, as torch.int64$"):
        numbers(MASK)


REFUSED: dict[str, tuple[Callable[..., Tensor], Tensor, str]] = {
    "a bag's maximum": (lambda m, c: m.bag(c), TOKENS, r"embedding\(x\).amax"),
    "bags of other lengths": (lambda m, c: m.sums(c.reshape(-1), torch.arange(len(c)) * 3), TOKENS, "one length"),
    "indices that may lie outside": (lambda m, c: m.e(c[:, 0] * c[:, 1]), TOKENS, "input_range which integers"),
    "a constant outside": (lambda m, c: m.e(F.pad(c, (1, 0), value=9)), TOKENS, "a constant among its indices"),
    "no index for both": (lambda m, c: m.e(c) + m.e(c + 9), TOKENS, "no integer fits all tables"),
    "bytes that may wrap": (lambda m, c: c + 1, TOKENS.to(torch.uint8), r"x.long\(\)"),
    "a conversion that may wrap": (lambda m, c: (c * 99).to(torch.int8), TOKENS, "outside of \\[-128, 127\\]"),
    "floats rounded": (lambda m, x: m.e(x.long()), LOGITS, "a conversion of floats to torch.int64"),
    "a sum without a form": (lambda m, c: c.prod(1), TOKENS, "prod"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_of_integers(name: str) -> None:
    forward, x, told = REFUSED[name]
    model = Model(forward, e=table(5), bag=bag(4, "max"), sums=bag(4, "sum"))
    with pytest.raises(tacit.CompileError, match=told):
        tacit.compile(model.eval(), x)
