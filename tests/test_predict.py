"""What-if: predicted times beside emulated runs, plans beside plans."""

from __future__ import annotations

import json
import math
import statistics
from functools import cache
from pathlib import Path

import pytest
import torch
from test_cli import fails, succeeds, told

import tacit
from tacit import machine as machines
from tacit import networks
from tacit.compare import compare_plans, comparison_text
from tacit.ir.predict import FINDERS, Machine, Pace, Prediction, network_model, predict
from tacit.ir.view.page import page, time_text
from tacit.runtime.channel import NETWORKS

TURNS = Pace({"phase": 1e-4, "items": 5e-5, "ring": 1e-8}, {"round": 3e-4, "wake": 1e-5})
MACHINE = Machine("tests", TURNS, Pace({"items": 1e-4, "ring": 2e-8}, {"round": 6e-4}))


@cache
def compiled(name: str, protocol: str = "fused", reveal: str = "argmax") -> tacit.Secure:
    torch.manual_seed(0)
    model = {"mlp": networks.MLP, "lenet": networks.LeNet}[name]().eval()
    x = torch.rand(2, 1, 28, 28)
    return tacit.compile(model, x, reveal=reveal, protocol=protocol, input_range=(0, 1), name=name)


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of which all coefficients are known, instead of this one."""
    monkeypatch.setattr("tacit.ir.predict.FINDERS", [lambda measure: MACHINE])


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    for name, secure in (("fused", compiled("mlp")), ("textbook", compiled("mlp", "securenn"))):
        secure.save(tmp_path / name)
    return tmp_path


# --- networks ---


def test_networks_by_name_and_by_figures() -> None:
    for name, link in NETWORKS.items():
        model = network_model(name)
        assert (model.rtt_seconds == 0) if link is None else (model.rtt_seconds == 2 * link.latency_seconds)
        assert link is None or model.bytes_per_second == link.bytes_per_second
    found = network_model("rtt=40ms,rate=350Mbit")
    assert (found.rtt_seconds, found.bytes_per_second) == (NETWORKS["wan"].latency_seconds * 2, 350e6 / 8)  # type: ignore[union-attr]
    assert network_model("rtt=1.5s,rate=2kbit").bytes_per_second == 250
    for wrong in ("moon", "rtt=40,rate=1Mbit", "rtt=1ms,rate=0Mbit", "rate=1Mbit,rtt=1ms", ""):
        with pytest.raises(tacit.InputError, match="network has to be"):
            network_model(wrong)


def test_a_slower_network_costs_its_latency_and_its_rate(known: None) -> None:
    plan = compiled("mlp").plan
    near, far = (predict(plan, MACHINE, network=f"rtt={ms}ms,rate=1Gbit") for ms in (1, 101))
    assert far.online_s - near.online_s == pytest.approx(0.05 * plan.cost().rounds)
    assert far.offline_s - near.offline_s == pytest.approx(0.05)
    slow = predict(plan, MACHINE, network="rtt=1ms,rate=10Mbit")
    busiest = max(plan.cost()._links("online").values())
    assert slow.online_s - near.online_s > busiest / 10e6 * 8 - busiest / 1e9 * 8
    assert set(near.lines) == {node.name for node in plan.nodes if not node.op.session}
    assert plan.cost().prediction is None
    assert plan.cost(network="lan").prediction == predict(plan, MACHINE, network="lan")


# --- the machine ---


def test_fitting_finds_the_coefficients_it_was_made_with() -> None:
    work, overhead = {"a": 3e-6, "b": 0.0, "c": 5e-9}, {True: {"round": 1e-4}, False: {"round": 7e-4}}
    points = []
    for a, b, c, rounds in ((1, 5, 1e3, 3), (10, 1, 1e5, 9), (3, 7, 1e4, 2), (100, 2, 10, 1), (1, 1, 1e6, 5)):
        features = {"a": float(a), "b": float(b), "c": float(c), "round": float(rounds)}
        for little in (True, False):
            seconds = sum(value * features[key] for key, value in work.items()) * (1 if little else 0.6)
            points.append(machines.Point(little, features, seconds + rounds * overhead[little]["round"]))
    found = machines.fit(points, ("a", "b", "c"), ("round",))
    assert found[True] == pytest.approx(work | overhead[True], rel=1e-4, abs=1e-12)
    assert found[False] == pytest.approx({k: 0.6 * v for k, v in work.items()} | overhead[False], rel=1e-4, abs=1e-12)


def test_the_measurement_is_kept_and_damage_is_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(machines, "measure", lambda: MACHINE)
    assert machines.cached() is None
    assert machines.machine() == MACHINE
    monkeypatch.setattr(machines, "measure", lambda: pytest.fail("measured twice"))
    assert machines.machine() == machines.cached() == MACHINE
    for damaged in ("{", "[]", '{"name": 1}', '{"name": "x", "turns": {"offline": 3, "online": {}}}'):
        machines.cache_file().write_text(damaged)
        assert machines.cached() is None


def test_a_measurement_knows_all_that_a_prediction_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two networks, once: enough to see that every figure is found, too little for a good one."""
    shapes = [
        (machines._perceptron(60, 30), (60,), "argmax", (1, 2000)),
        (machines._stack(32, 2), (32,), "logits", (1,)),
    ]
    monkeypatch.setattr(machines, "_networks", lambda: shapes)
    monkeypatch.setattr(machines, "_ROUNDS", 1)
    monkeypatch.setattr(machines, "_RUNS", 1)
    monkeypatch.setattr(machines, "_MANY", 200)
    found = machines.measure()
    for pace in (found.turns, found.threads):
        for phase, figures in (("offline", pace.offline), ("online", pace.online)):
            assert figures.keys() >= {*machines.WORK[phase], *machines.OVERHEAD[phase], "wake"}
            assert all(0 <= value < math.inf for value in figures.values())
    assert 0 < predict(compiled("mlp").plan, found).total_s < math.inf


def test_no_emulated_network_is_faster_than_its_latency_and_rate() -> None:
    """The part of a prediction that the network decides, of a machine that takes no time itself; others only add."""
    secure, nothing, wan = compiled("mlp"), Pace({}, {}), NETWORKS["wan"]
    assert wan is not None
    secure.session(wan)
    for batch in (1, 50):
        least = predict(secure.plan, Machine("none", nothing, nothing), batch=batch, network="wan").total_s
        assert least >= wan.latency_seconds * secure.plan.cost().rounds
        assert measured(secure, torch.rand(batch, 1, 28, 28), runs=2) > 0.95 * least
    secure.session(None)


@pytest.mark.slow
def test_predictions_are_what_emulated_networks_take() -> None:
    """Within a fifth where the network decides; where it is all work, the typical error is below a fifth.

    Takes a machine that does nothing else.
    """
    here, errors = machines.measure(), []
    for name, network, batches in (("mlp", "virtual", (1, 200)), ("mlp", "lan", (1, 200)), ("mlp", "wan", (1, 200)),
                                   ("lenet", "virtual", (16,)), ("lenet", "wan", (16,))):  # fmt: skip
        secure = compiled(name)
        secure.session(NETWORKS[network])
        for batch in batches:
            seconds = measured(secure, torch.rand(batch, 1, 28, 28))
            found = predict(secure.plan, here, batch=batch, network=network).total_s
            errors.append(abs(found / seconds - 1))
            assert network != "wan" or errors[-1] < 0.2, (name, batch, found, seconds)
    secure.session(None)
    assert statistics.median(errors) < 0.2, errors


def measured(secure: tacit.Secure, x: torch.Tensor, runs: int = 6) -> float:
    times = []
    for i in range(runs):
        secure(x)
        run = secure.last_run
        assert run is not None
        times += [run.offline_seconds + run.online_seconds] if i else []
    return statistics.median(times)


# --- the commands ---


def test_cost_with_a_network(known: None, saved: Path) -> None:
    found = told("cost", saved / "fused", "--network", "wan", "--batch", 2)
    expected = predict(compiled("mlp").plan, MACHINE, batch=2, network="wan")
    assert found["prediction"]["online_s"] == pytest.approx(expected.online_s)
    assert f"predicted {time_text(expected.total_s)} on wan" in succeeds(
        "cost", saved / "fused", "--network", "wan", "--batch", 2
    )
    assert "network has to be" in fails("cost", saved / "fused", "--network", "moon")


def test_two_plans_beside_one_another(known: None, saved: Path) -> None:
    plans = [compiled("mlp").plan, compiled("mlp", "securenn").plan]
    found = compare_plans(*plans, batch=3, network="lan")
    for total, plan in zip((found.before, found.after), plans, strict=True):
        cost = plan.cost(batch=3)
        assert (total["rounds"], total["online_bytes"]) == (cost.rounds, cost.online_bytes)
    for key in ("online_bytes", "offline_bytes", "session_bytes"):
        assert sum(row.before[key] or 0 for row in found.layers) == found.before[key]
        assert sum(row.after[key] or 0 for row in found.layers) == found.after[key]
    text = comparison_text(found)
    assert "fc1" in text
    assert f"{found.before['rounds']:.0f} -> {found.after['rounds']:.0f}" in text
    printed = succeeds("cost", saved / "textbook", "--compare", saved / "fused", "--batch", 3, "--network", "lan")
    assert printed == text + "\n"
    same = compare_plans(plans[0], plans[0])
    assert not [row for row in same.layers if row.changed]
    assert told("cost", saved / "textbook", "--compare", saved / "fused")["after"]["rounds"] == plans[1].cost().rounds


def test_the_report_shows_prediction_and_measurement(known: None, saved: Path, tmp_path: Path) -> None:
    times = {"batch": 4, "offline_seconds": 0.25, "online_seconds": 0.5}
    (tmp_path / "run.json").write_text(json.dumps(times))
    options = ["--html", tmp_path / "r.html", "--network", "wan", "--batch", "4", "--measured", tmp_path / "run.json"]
    succeeds("show", saved / "fused", *options)
    html = (tmp_path / "r.html").read_text()
    expected = predict(compiled("mlp").plan, MACHINE, batch=4, network="wan")
    assert html == page(compiled("mlp").plan, batch=4, prediction=expected, measured={"offline": 0.25, "online": 0.5})
    assert "<b>750 ms</b>" in html
    assert f"<b>{time_text(expected.total_s)}</b><span>predicted on wan" in html
    assert html.count("class=time") == sum(row["seconds"] > 0 for row in rows(expected))
    (tmp_path / "run.json").write_text("[]")
    assert "is not what" in fails("show", saved / "fused", *options)
    for other in ({"batch": 8}, {"batches": 2}):
        (tmp_path / "run.json").write_text(json.dumps(times | other))
        assert "measured with another batch than 4" in fails("show", saved / "fused", *options)


def rows(found: Prediction) -> list[dict[str, float]]:
    from tacit.ir.view.layers import layers

    every = layers(compiled("mlp").plan, batch=4, seconds=found.lines)
    return [r for r in every if r["rounds"] or r["online_bytes"] or r["offline_bytes"] or r["session_bytes"]]


def test_plans_know_this_machine() -> None:
    assert machines.find in FINDERS
