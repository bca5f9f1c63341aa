"""Plans: golden texts, what each pass does, schedules, costs against the literature."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import models
import pytest
import torch
from models import images, seeded
from torch import nn

import tacit
from tacit import networks
from tacit.capture import Capture
from tacit.export import export
from tacit.ir.op import Level
from tacit.ir.ops.nonlinear import ReLU
from tacit.ir.ops.roles import Input
from tacit.ir.plan import Plan
from tacit.ir.types import Batch, Type
from tacit.passes import PIPELINE, Draft, run_pipeline
from tacit.runtime.reference import interpret

Tensor = torch.Tensor
GOLDEN = Path(__file__).parent / "golden"
SMALL = nn.Sequential(
    nn.Conv2d(1, 3, 3, bias=False), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(), nn.AvgPool2d(2),
    nn.Flatten(), nn.Linear(3, 4), nn.LogSoftmax(1),
)  # fmt: skip


def golden(name: str, text: str, rewrite: bool) -> None:
    path = GOLDEN / f"{name}.txt"
    if rewrite:
        path.write_text(text)
    assert text == path.read_text(), (
        f"{path.name} differs; if that is meant, run pytest --rewrite-golden and review the diff"
    )


@pytest.fixture
def rewrite(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--rewrite-golden"))


NETWORKS = {
    "mlp": (networks.MLP, (1, 28, 28), {"reveal": "correct"}),
    "lenet": (networks.LeNet, (1, 28, 28), {"reveal": "argmax"}),
    "residual": (models.Residual, (3, 6, 6), {}),
    "branches": (models.Branches, (1, 5, 5), {}),
    "network_b_securenn": (networks.NetworkB, (1, 28, 28), {"reveal": "argmax", "protocol": "securenn"}),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_golden_plan(name: str, rewrite: bool) -> None:
    network, shape, options = NETWORKS[name]
    secure = tacit.compile(
        seeded(network()), images(2, *shape), input_range=(-1, 1), frac_bits=12, name=name, **options
    )
    golden(name, str(secure.plan), rewrite)
    assert Plan.parse(str(secure.plan)) == secure.plan


# --- passes ---


def stages(model: nn.Module, x: Tensor, reveal: str, protocol: str = "fused") -> list[tuple[str, Draft]]:
    """The draft after capture and after every pass."""
    capture = Capture(export(model, (x,)), [(-1.0, 1.0)])
    plan = capture.run("stages", reveal)
    label = plan.find(Input)[0].op.label  # type: ignore[attr-defined]
    draft = Draft(plan.with_nodes(plan.nodes, protocol=protocol), capture.weights, {label: x}, interpret, frac_bits=14)
    out = [("capture", draft)]
    for one in PIPELINE:
        draft = one(draft)
        draft.plan.verify()
        out.append((one.__name__, draft))
    return out


@pytest.mark.parametrize("protocol", ["fused", "securenn"])
@pytest.mark.parametrize(
    "name", ["small", "residual", "norm_first", "used_twice", "relu_used_twice", "branches", "constants"]
)
def test_every_pass_keeps_the_result(name: str, protocol: str) -> None:
    """At the model level to rounding of float64; from real to fixed within tolerance; below it to the bit, but where
    weights are rounded again."""
    cases = {
        "small": (nn.Sequential(*list(SMALL)[:-1]), (1, 8, 8)),
        "residual": (models.Residual(), (3, 6, 6)),
        "norm_first": (models.NormFirst(), (2, 3, 3)),
        "used_twice": (models.UsedTwice(), (1, 5, 5)),
        "relu_used_twice": (models.ReluUsedTwice(), (1, 6, 6)),
        "branches": (models.Branches(), (1, 5, 5)),
        "constants": (models.Constants(), (3, 4, 4)),
    }
    model, shape = cases[name]
    x = images(5, *shape).double()
    before: Tensor | None = None
    level = Level.MODEL
    for title, draft in stages(seeded(model).double(), x, "logits", protocol):
        label = draft.plan.find(Input)[0].op.label  # type: ignore[attr-defined]
        result = draft.plan.node(draft.plan.result)
        after = interpret(draft.plan, draft.weights, {label: x})[result.name]
        exact = draft.plan.level is not Level.MODEL and level is not Level.MODEL
        after = after if draft.plan.level is Level.MODEL else after.double() / 2.0**result.type.frac
        if before is not None:
            # The textbook suite truncates after its ReLU and compares all bits in max pool: one unit of rounding apart.
            loose = (title == "lower_to_protocol" and protocol == "securenn") or title == "fit_small_ring"
            limit = 2**-9 if (level is not draft.plan.level and not exact) or loose else 1e-9
            assert (after - before).abs().max() <= limit, title
        before, level = after, draft.plan.level


def test_golden_stages(rewrite: bool) -> None:
    """What each pass does to one small network, to be read as a diff."""
    texts, last = [], ""
    for title, draft in stages(seeded(SMALL), images(2, 1, 8, 8), "argmax"):
        text = str(draft.plan)
        texts.append(f"--- {title}{' (no change)' if text == last else ''}\n{'' if text == last else text}")
        last = text
    golden("stages", "\n".join(texts), rewrite)


def after(title: str, model: nn.Module, shape: tuple[int, ...], reveal: str = "logits") -> Plan:
    return next(d.plan for t, d in stages(seeded(model), images(2, *shape), reveal) if t == title)


def ops(plan: Plan) -> list[str]:
    return [node.op.name.removeprefix("model.") for node in plan.nodes if not node.op.declares]


def test_batch_norm_is_folded_only_where_the_layer_has_no_other_use() -> None:
    assert ops(after("fold_batch_norm", models.Residual(), (3, 6, 6))).count("mul") == 0
    assert ops(after("fold_batch_norm", models.UsedTwice(), (1, 5, 5))) == ["conv2d", "mul", "add", "add"]


def test_max_pool_moves_before_relu_only_where_the_relu_has_no_other_use() -> None:
    title = "move_max_pool_before_relu"
    moved = ops(after(title, nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2)), (1, 6, 6)))
    assert moved == ["conv2d", "max_pool2d", "relu"]
    kept = ops(after(title, models.ReluUsedTwice(), (1, 6, 6)))
    assert kept.index("relu") < kept.index("max_pool2d")


def test_softmax_is_dropped_before_argmax_alone() -> None:
    assert "softmax" not in ops(after("drop_softmax_before_argmax", SMALL, (1, 8, 8), "argmax"))


def test_truncation_is_fused_into_relu() -> None:
    plan = after("fuse_truncation_into_relu", nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), (4,))
    assert ops(plan) == ["fixed.linear", "add", "fixed.relu", "fixed.linear", "add"]


def test_weight_masks_are_opened_once_and_before_everything() -> None:
    layer = nn.Linear(4, 4)
    plan = after("hoist_weight_openings", nn.Sequential(layer, nn.ReLU(), layer), (4,))
    names = [node.op.name for node in plan.nodes]
    assert names.count("mask") == 1
    assert names.count("linear") == 2
    assert all(a.op.session or not b.op.session for a, b in zip(plan.nodes, plan.nodes[1:], strict=False))


def test_dump_writes_the_plan_after_every_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TACIT_DUMP", str(tmp_path))
    draft = stages(seeded(nn.Linear(4, 4)), images(2, 4), "logits")[0][1]
    run_pipeline(draft)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["00_capture.txt"] + [f"{i:02}_{one.__name__}.txt" for i, one in enumerate(PIPELINE, 1)]
    assert all(Plan.parse((tmp_path / name).read_text()) for name in names)


def test_ops_stand_only_at_their_levels() -> None:
    plan = after("choose_scale", nn.Linear(4, 4), (4,))
    with pytest.raises(tacit.PlanError, match="may not stand at the protocol level"):
        plan.with_nodes(plan.nodes, level=Level.PROTOCOL).verify()


# --- schedule ---


def test_independent_messages_share_a_round() -> None:
    """Two branches cost the rounds of one: 1 to share, 1 to open, 3 for the ReLUs, 1 to reveal."""
    plan = tacit.compile(seeded(models.Branches()), images(2, 1, 5, 5)).plan
    assert plan.cost().rounds == 6
    starts = Counter(plan.schedule.start[n.name] for n in plan.nodes if n.op.name in ("conv2d", "relu"))
    assert sorted(starts.values()) == [2, 2]


def test_truncations_before_a_sum_are_not_repeated() -> None:
    plan = tacit.compile(seeded(models.Residual()), images(2, 3, 6, 6)).plan
    assert [n.op.name for n in plan.nodes].count("trunc") <= 1


# --- whole plans: declared equals counted ---


@pytest.mark.parametrize("protocol", ["fused", "securenn"])
@pytest.mark.parametrize(("network", "largest"), [(networks.MLP, 200), (networks.LeNet, 24), (models.Residual, 400)])
def test_declared_bytes_and_rounds_equal_the_counted_ones(
    network: type[nn.Module], largest: int, protocol: str
) -> None:
    """Of batches that are little, and of one of which each party has a thread."""
    shape = (3, 6, 6) if network is models.Residual else (1, 28, 28)
    secure = tacit.compile(
        seeded(network()), images(2, *shape), reveal="argmax", protocol=protocol, input_range=(-1, 1)
    )
    assert not secure.plan.cost(batch=largest).little
    for batch in (1, 7, largest):
        secure(images(batch, *shape))
        run, cost = secure.last_run, secure.plan.cost(batch=batch)
        assert run is not None
        assert (run.rounds, run.online_bytes, run.offline_bytes) == (cost.rounds, cost.online_bytes, cost.offline_bytes)
        assert run.online_links == cost._links("online")
        assert sum(p["online"] for p in cost.per_party.values()) == cost.online_bytes
        assert sum(row.cost.offline_bytes for row in cost.per_op if not row.session) == cost.offline_bytes
        dealt = Counter[int]()
        for need in secure.plan.requirements(batch=batch):
            for link, size in need.item.offline.items():
                dealt[link[1]] += size
        assert sum(dealt.values()) == cost.offline_bytes
    assert secure.session().weight_meter.bytes == secure.plan.cost().session_bytes


# SecureNN (PETS 2019), inference at batch 1: megabytes as published.
PUBLISHED = {"A": (networks.NetworkA, 2.1), "B": (networks.NetworkB, 8.86), "C": (networks.LeNet, 18.94)}


def textbook_megabytes(network: type[nn.Module]) -> float:
    secure = tacit.compile(seeded(network()), images(2, 1, 28, 28), reveal="argmax", protocol="securenn")
    cost = secure.plan.cost(batch=1)
    return (cost.online_bytes + cost.offline_bytes) / 1e6


@pytest.mark.parametrize("name", PUBLISHED)
def test_textbook_suite_reproduces_the_published_megabytes(name: str) -> None:
    network, published = PUBLISHED[name]
    assert textbook_megabytes(network) == pytest.approx(published, rel=0.05)


def test_network_d_s_published_figure_holds_its_largest_product_twice() -> None:
    """4.05 MB are published for D. The table's own formulas give 2.46: three products and 1080 ReLUs.

    The difference, 1.59 MB, is within 1% what the 980 x 100 layer costs a second time.
    """
    ring = 8
    products = [(196, 25, 5), (1, 980, 100), (1, 100, 10)]
    sizes = [(2 * m * n + 2 * n * v + m * v) * ring for m, n, v in products]
    formulas = (sum(sizes) + 1080 * 704 + 9 * (8 * 64 + 29 * ring)) / 1e6
    assert textbook_megabytes(networks.NetworkD) == pytest.approx(formulas, rel=0.05)
    assert formulas + sizes[1] / 1e6 == pytest.approx(4.05, rel=0.01)
    assert formulas < 0.62 * 4.05


def test_fused_relu_takes_three_rounds_and_at_most_110_bytes() -> None:
    """At the window of the trained MLP, 37 bits with 17 truncated; offline material included."""
    for window, truncate, limit in ((37, 17, 95), (37, 16, 110), (40, 16, 110)):
        cost = ReLU(truncate, window).cost(Type("secret", (1000,), 30, window))
        assert cost.rounds == 3
        assert (cost.online_bytes + cost.offline_bytes) / 1000 <= limit


def test_batch_is_symbolic() -> None:
    plan = tacit.compile(seeded(networks.MLP()), images(2, 1, 28, 28)).plan
    assert all(isinstance(n.type.shape[0], Batch) for n in plan.nodes if not n.op.session)
    costs = [plan.cost(batch=n).online_bytes for n in (8, 16, 24)]
    assert costs[2] - costs[1] == costs[1] - costs[0]
