"""Two rings: the identities at the edges of the smaller one, plans that use both, and plans that claim too much."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from models import images, seeded
from torch import nn

import tacit
from tacit import networks
from tacit.ir.errors import PlanError
from tacit.ir.ops.linear import Product
from tacit.ir.ops.nonlinear import ReLU, Trunc
from tacit.ir.ops.roles import Weight
from tacit.ir.plan import Plan
from tacit.ir.types import Type
from tacit.passes import Draft, stages
from tacit.passes.rings import fit_small_ring
from tacit.runtime import ring
from tacit.runtime.product import tiled
from tacit.runtime.words import Words

Tensor = torch.Tensor
N = 8
RINGS = {32: torch.int32, 64: torch.int64}


# --- every x and every mask of a ring of 8 bits ---


@pytest.mark.parametrize("target", [4, 8, 16])
@pytest.mark.parametrize("f", [1, 2, 3])
def test_a_kept_truncation_needs_no_offset(f: int, target: int) -> None:
    """The fused ReLU takes all of its ring, and its result comes out in any other."""
    for x, r in itertools.product(range(-(1 << (N - 1)), (1 << (N - 1)) - (1 << f)), range(1 << N)):
        c = (x + r) % (1 << N)
        y = (c >> f) - (r >> f) + ((r >> (N - 1)) * (1 - (c >> (N - 1))) << (N - f))
        truth = (x + (1 << f) - 1 - c % (1 << f)) >> f
        negative = ((c >> f) - (r >> f)) >> (N - 1 - f) & 1
        assert negative == (truth < 0)
        assert negative or (y - truth) % (1 << target) == 0


@pytest.mark.parametrize("target", [4, 8, 16])
@pytest.mark.parametrize("f", [1, 2, 3])
def test_a_truncation_comes_out_in_any_ring(f: int, target: int) -> None:
    quarter = 1 << (N - 2)
    for x, r in itertools.product(range(-quarter, quarter), range(1 << N)):
        c = (x + quarter + r) % (1 << N)
        y = (c >> f) - (r >> f) + ((r >> (N - 1)) * (1 - (c >> (N - 1))) << (N - f)) - (1 << (N - 2 - f))
        assert (y - ((x + (1 << f) - 1 - c % (1 << f)) >> f)) % (1 << target) == 0


# --- the kernels, at the edges of 32 and 64 bits: every x there against every mask there ---


def pairs(bits: int, width: int, f: int) -> tuple[Tensor, Tensor]:
    """(x, r) in the words of the ring: x as wide as the kernel takes, near all powers of two; r anywhere."""
    most = (1 << (width - 1)) - (1 << f)
    near = [s * (1 << k) + d for k in range(width) for s in (1, -1) for d in (-1, 0, 1, 1 << f, -(1 << f))]
    xs = sorted({x for x in [*near, 0, most - 1, -(1 << (width - 1))] if -(1 << (width - 1)) <= x < most})
    rs = sorted({ring.wrapped((1 << k) + d, bits) for k in range(bits) for d in (-1, 0, 1, 1 << f)})
    both = torch.tensor(list(itertools.product(xs, rs)))
    return both[:, 0].to(RINGS[bits]), both[:, 1].to(RINGS[bits])


def shared(value: Tensor, target: int) -> tuple[Tensor, Tensor]:
    words = torch.randint(-(2**62), 2**62, value.shape, generator=torch.Generator().manual_seed(len(value)))
    mine = words.to(RINGS[target])
    return mine, value.to(RINGS[target]) - mine


@pytest.mark.parametrize("f", [1, 12, 15, 24])
@pytest.mark.parametrize(("source", "target"), [(32, 32), (32, 64), (64, 32), (64, 64)])
def test_truncation_at_the_edges_of_its_range(source: int, target: int, f: int) -> None:
    x, r = pairs(source, source - 1, f)
    c = x + (1 << (source - 2)) + r
    parts = [shared(v, target) for v in (ring.shift_right(r, f), ring.bit(r, source - 1))]
    y = sum(ring.truncate(c, *(part[i] for part in parts), f, first=i == 0) for i in (0, 1))
    truth = (x.long() + (1 << f) - 1 - ring.low_bits(c, f)) >> f
    assert torch.equal(y, truth.to(RINGS[target]))


@pytest.mark.parametrize("f", [1, 12, 15, 24])
@pytest.mark.parametrize(("source", "target"), [(32, 32), (32, 64), (64, 32), (64, 64)])
def test_relu_with_truncation_at_the_edges_of_its_ring(source: int, target: int, f: int) -> None:
    x, r = pairs(source, source, f)
    c = x + r
    truth = (x.long() + ((1 << f) - 1 - ring.low_bits(c, f))) >> f
    if source == 64:  # x + t must not wrap here
        truth = (x >> f) + (ring.low_bits(x, f) + (1 << f) - 1 - ring.low_bits(c, f) >> f)
    for rho in (torch.zeros(len(x), dtype=torch.uint8), torch.ones(len(x), dtype=torch.uint8)):
        shifted, top = ring.shift_right(r, f), ring.bit(r, source - 1)
        dealt = (shifted, top, rho, ring.gate(rho, shifted), rho & top)
        parts = [shared(v, target) for v in dealt]
        e = ring.bit(c, 3)  # any bit that both know: DReLU = e xor flip xor rho
        flip = e ^ rho ^ (truth >= 0)
        y = sum(ring.relu_truncate(c, *(part[i] for part in parts), flip, e, f, first=i == 0) for i in (0, 1))
        assert torch.equal(y, truth.clamp(min=0).to(RINGS[target]))


@pytest.mark.parametrize("shape", [(4, 1, 1), (5, 7, 63), (64, 3, 64), (70, 33, 65), (9, 100, 129)])
@pytest.mark.parametrize("dtype", RINGS.values())
def test_products_wrap_in_their_own_ring(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    m, k, n = shape
    generator = torch.Generator().manual_seed(k)
    x, w = (torch.randint(-(2**62), 2**62, s, generator=generator).to(dtype) for s in ((m, k), (k, n)))
    out = torch.empty((m, n), dtype=dtype)
    tiled(x.numpy(), w.numpy(), out.numpy())
    assert torch.equal(out, x @ w)
    assert torch.equal(ring.matmul(x[:3], w), (x @ w)[:3])


# --- plans ---


class Both(nn.Module):
    """A wide layer that fits 32 bits, and one behind it that does not."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(20, 12)
        self.second = nn.Linear(12, 6)
        self.last = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(1000 * self.second(torch.relu(self.first(x)))))


def both() -> tacit.Secure:
    return tacit.compile(seeded(Both()), images(4, 20), input_range=(-1, 1), frac_bits=10)


def rings_of(plan: Plan) -> set[int]:
    return {node.type.ring for node in plan.nodes}


def test_a_plan_in_both_rings_is_exact_and_reads_back(tmp_path: Path) -> None:
    secure, x = both(), images(7, 20, seed=3)
    plan = secure.plan
    assert rings_of(plan) == {32, 64} and "ring=2^32+2^64" in str(plan)
    assert Plan.parse(str(plan)).verify() == plan
    answer = secure.check(x)
    assert secure.last_run is not None
    assert secure.last_run.online_bytes == plan.cost(batch=7).online_bytes
    assert secure.last_run.offline_bytes == plan.cost(batch=7).offline_bytes
    secure.save(tmp_path)
    again = tacit.load(tmp_path)
    assert {v.dtype for v in again.weights.values()} == {torch.int32, torch.int64}
    assert torch.equal(again.reference(x), secure.reference(x))
    assert torch.allclose(again(x), answer, rtol=2**-6)


def test_values_in_the_small_ring_take_half_the_bytes() -> None:
    secure = tacit.compile(seeded(nn.Linear(20, 12)), images(4, 20), input_range=(-1, 1), frac_bits=10)
    assert rings_of(secure.plan) == {32}
    cost = secure.plan.cost(batch=5)
    assert cost.online_bytes == 4 * 5 * (20 + 2 * 20 + 2 * 12)
    assert cost.offline_bytes == 4 * 5 * 12


def test_the_textbook_suite_stays_in_64_bits() -> None:
    secure = tacit.compile(
        seeded(nn.Linear(20, 12)), images(4, 20), input_range=(-1, 1), frac_bits=10, protocol="securenn"
    )
    assert rings_of(secure.plan) == {64}


@pytest.mark.parametrize("network", [networks.MLP, networks.LeNet])
def test_the_largest_layers_of_the_benchmarks_are_in_32_bits(network: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model, x = network().eval(), images(8, 1, 28, 28).abs()
    plan = tacit.compile(model, x, input_range=(0, 1)).plan
    products = [node for node in plan.nodes if isinstance(node.op, Product)]
    weights = {node.name: plan.node(node.args[1]).type for node in products}
    work = {n.name: n.type.at(1).numel * weights[n.name].numel // weights[n.name].dims[0] for n in products}
    assert plan.node(max(work, key=work.__getitem__)).type.ring == 32


def draft_of(model: nn.Module, x: Tensor, frac_bits: int | None) -> Draft:
    from tacit.driver import prepare

    found = dict(stages(prepare(model, x, input_range=(-1, 1), frac_bits=frac_bits)))
    return found["bound_ranges"]


def test_weights_give_up_bits_only_where_the_logits_bear_it() -> None:
    model, x = seeded(nn.Sequential(nn.Linear(60, 40), nn.ReLU(), nn.Linear(40, 3))), images(8, 60)
    fine, coarse = draft_of(model, x, 12), draft_of(model, x, 8)
    spared = fit_small_ring(fine)
    weights = {n.op.label: n.type.frac for n in spared.plan.nodes if n.op.name == "weight"}  # type: ignore[attr-defined]
    assert weights["0.weight"] < 16
    # Eight bits are too few for these logits already; and what fits is left as it is.
    assert fit_small_ring(coarse).plan is coarse.plan


@pytest.mark.parametrize("protocol", ["fused", "securenn"])
def test_weights_are_held_in_small_words_until_their_ring_is_chosen(protocol: str) -> None:
    from tacit.driver import prepare

    model, x = seeded(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))), images(8, 6)
    drafts = dict(stages(prepare(model, x, input_range=(-1, 1), frac_bits=20, protocol=protocol)))
    assert drafts["bound_ranges"].weights["0.weight"].dtype == torch.int32
    last = drafts["number_lines"]
    for node in last.plan.nodes:
        if isinstance(node.op, Weight):
            small = drafts["bound_ranges"].weights[node.op.label]
            assert small.dtype == last.weights[node.op.label].dtype
            words = Words(last.plan, last.weights)[node.op.label]
            assert words.dtype == node.type.dtype and torch.equal(small.long(), words.long())


def test_overflow_of_the_small_ring_is_found() -> None:
    small, pattern = images(64, 4096), torch.tensor([1.0, -1.0] * 2048)
    model = seeded(nn.Sequential(nn.Linear(4096, 8), nn.ReLU(), nn.Linear(8, 2)))
    with torch.no_grad():
        model[0].weight.copy_(pattern)
    secure = tacit.compile(
        model, small[:4], input_range=(-1, 1), ranges="measured", margin=2, calibration=small, frac_bits=7
    )
    linear = next(node for node in secure.plan.nodes if node.op.name == "linear")
    assert linear.type.ring == 32
    assert torch.equal(secure.reference(small, check=True), secure.reference(small))
    with pytest.raises(tacit.RangeError, match=r"module '0' .*linear"):
        secure.reference(pattern.expand(3, 4096), check=True)


# --- plans that claim too much ---


def refused(old: str, new: str) -> str:
    text = str(both().plan)
    line = next(line for line in text.split("\n") if old in line)
    with pytest.raises(PlanError) as caught:
        Plan.parse(text.replace(line, line.replace(old, new, 1)))
    assert "^^^" in str(caught.value) and line.split(":")[0].strip() in str(caught.value)
    return str(caught.value)


def test_a_width_beyond_the_ring_is_refused() -> None:
    plan = both().plan
    wide = next(n for n in plan.nodes if n.type.kind == "secret" and n.type.width > 32)
    assert "do not fit the ring of 32 bits" in refused(f"{wide.type}", f"{wide.type}".replace(">", ", r32>"))


def test_a_ring_that_does_not_exist_is_refused() -> None:
    assert "a ring has 64 or 32 bits, not 16" in refused(", r32>", ", r16>")


def test_operands_of_two_rings_are_refused() -> None:
    plan = both().plan
    bias = next(n for n in plan.nodes if n.op.name == "weight" and n.type.ring == 32 and len(n.type.shape) == 1)
    text = str(plan)
    line = next(line for line in text.split("\n") if line.strip().startswith(f"%{bias.name} "))
    with pytest.raises(PlanError, match="operands of two rings"):
        Plan.parse(text.replace(line, line.replace(", r32>", ">")))


def test_a_comparison_or_a_truncation_too_wide_for_its_ring_is_refused() -> None:
    with pytest.raises(PlanError, match="window of 33 bits"):
        ReLU(8, 33).infer(Type("secret", (4,), 20, 32, 32))
    with pytest.raises(PlanError, match="too wide to be truncated: at most b31"):
        Trunc(8).infer(Type("secret", (4,), 20, 32, 32))
