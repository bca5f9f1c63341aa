"""torchvision's 80 classification models at full image size: compiled, verified, costed, round-tripped."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache

import pytest
import torch
from typer.testing import CliRunner

import tacit
from tacit import cli, zoo
from tacit.ir.ops.roles import Reveal
from tacit.runtime.net.deployment import Limits
from tacit.runtime.net.pushing import read_plan

FAST = ("resnet18", "shufflenet_v2_x0_5")
NAMES = zoo.names()
RESNET50_SECONDS, SLOWEST_SECONDS = 20, 400  # of all cores together


fast = cache(zoo.compile_one)


def checked(row: zoo.Row, secure: tacit.Secure | None) -> zoo.Row:
    """The model compiles, and its plan says the same after a round trip; its costs are those of its lines."""
    assert secure is not None, row.error
    plan = secure.plan.verify()
    assert read_plan(str(plan), Limits()) == plan  # as a party takes it: within the default limits
    assert plan.node(plan.result).type.at(1).dims == (1, 1000)
    assert [node.op.name for node in plan.find(Reveal)] == ["reveal"]
    cost = plan.cost()
    assert cost.rounds == row.rounds > 10
    assert sum(entry.cost.online_bytes for entry in cost.per_op if not entry.session) == row.online_bytes > 0
    needs = sum(size for need in plan.requirements() for size in need.item.offline.values())
    assert needs == row.offline_bytes > 0
    return row


def test_there_are_eighty() -> None:
    assert len(NAMES) == 80


@pytest.mark.parametrize("name", FAST)
def test_a_model_of_the_fast_ones(name: str) -> None:
    checked(*fast(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_model(name: str) -> None:
    row = checked(*zoo.compile_one(name))
    assert row.cpu_seconds < (RESNET50_SECONDS if name == "resnet50" else SLOWEST_SECONDS)


@pytest.mark.slow
def test_memory_is_in_proportion_to_the_model() -> None:
    """The float32 weights, the ring integers, and one layer at a time: in a process of its own."""
    command = [sys.executable, "-c", "from tacit.cli import main; main()", "zoo", "vgg19", "--json"]
    found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    row = json.loads(found.stdout)
    assert row["error"] == ""
    assert row["peak_bytes"] < 24 * row["parameters"] + 2**30


def test_the_peak_of_memory_is_not_that_of_the_process_that_started_it() -> None:
    """The kernel hands the parent's peak on to what getrusage says."""
    child = "from tacit.machine import peak_memory; print(peak_memory())"
    parent = f"import subprocess, sys; x = b'x' * 2**30; subprocess.run([sys.executable, '-c', {child!r}], check=True)"
    found = subprocess.run([sys.executable, "-c", parent], capture_output=True, text=True, check=True, timeout=120)
    assert 2**20 < int(found.stdout) < 2**30


def test_an_unknown_model_is_refused() -> None:
    with pytest.raises(tacit.CompileError, match="resnet51"):
        zoo.build("resnet51")


# One of each family at least, on images as small as they take.
ENCRYPTED = (
    "alexnet", "convnext_tiny", "densenet121", "densenet169", "efficientnet_b0", "efficientnet_v2_s", "googlenet",
    "inception_v3", "mnasnet0_5", "mnasnet1_0", "mobilenet_v2", "mobilenet_v3_large", "mobilenet_v3_small",
    "regnet_x_400mf", "regnet_x_800mf", "regnet_y_400mf", "resnet18", "resnet34", "resnet50", "resnext50_32x4d",
    "shufflenet_v2_x0_5", "shufflenet_v2_x1_0", "squeezenet1_0", "squeezenet1_1", "swin_t",
    "vgg11", "vgg11_bn", "vgg13", "wide_resnet50_2",
)  # fmt: skip
SMALLEST = {"inception_v3": 75}


def encrypted(name: str, size: int = 64) -> None:
    """The whole of a real architecture: a secure run equal to the oracle in every bit, and close to float32."""
    model, images = zoo.build(name)
    x = images[:, :, :size, :size]
    with pytest.warns(tacit.RangeWarning, match="2 of the example"):
        secure = tacit.compile(model, x)
    answer = secure.check(x)
    with torch.no_grad():
        expected = model(x)
    assert (answer - expected).abs().max() < 0.01 * expected.abs().max()
    first, second = expected.topk(2, dim=1).values.T
    told_apart = first - second > 2.0**-8 * expected.abs().max()  # classes of a random network may lie closer
    assert torch.equal(answer.argmax(1)[told_apart], expected.argmax(1)[told_apart])


def test_a_small_image_goes_through_encrypted() -> None:
    encrypted("squeezenet1_1")


@pytest.mark.slow
@pytest.mark.parametrize("name", ENCRYPTED)
def test_every_family_goes_through_encrypted(name: str) -> None:
    encrypted(name, SMALLEST.get(name, 64))


def test_the_command_prints_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoo, "compile_one", fast)
    shown = CliRunner().invoke(cli.app, ["zoo", "shufflenet_v2_x0_5"])
    assert shown.exit_code == 0
    header, rule, row = shown.output.splitlines()
    assert header.count("|") == rule.count("|") == row.count("|") == 7
    assert row.startswith("| shufflenet_v2_x0_5 | 1.4 M |")
    failed = CliRunner().invoke(cli.app, ["zoo", "resnet51"])
    assert failed.exit_code == 1
