"""The benchmark runs and its figures are of one piece; no claim about time is made here."""

from __future__ import annotations

import json
import time

import pytest
import torch
from models import images, seeded
from torch import nn
from typer.testing import CliRunner

import tacit
from tacit.bench import MODELS, bench, text
from tacit.cli import app
from tacit.runtime.channel import LinkModel


def test_figures_of_one_piece() -> None:
    found = bench("d", batch=3, runs=2, per_op=True)
    assert found.total_s <= found.online_s + found.offline_s + 1e-3
    assert found.spread_s[0] <= found.total_s <= found.spread_s[1]
    assert found.plaintext_s > 0 < found.stream_s
    assert found.online_bytes > found.batch * 1000
    assert {row["op"] for row in found.per_op} >= {"conv2d", "relu", "argmax_by_wins"}
    assert f"{found.rounds} rounds" in text(found)


def test_command_prints_one_json_object() -> None:
    done = CliRunner().invoke(app, ["bench", "a", "--batch", "2", "--runs", "1", "--json"])
    figures = json.loads(done.stdout)
    wanted = "plaintext_s total_s online_s offline_s rounds online_bytes offline_bytes peak_rss_bytes batch"
    assert set(wanted.split()) <= set(figures)


def test_unknown_names() -> None:
    with pytest.raises(tacit.CompileError, match="mlp, lenet"):
        bench("none")
    with pytest.raises(tacit.CompileError, match="virtual, lan, wan"):
        bench("mlp", network="moon")


@pytest.mark.parametrize("name", ["alexnet", "vgg16", "resnet18", "resnet18-cifar"])
def test_large_subjects_can_be_made(name: str) -> None:
    with torch.device("meta"):
        model = MODELS[name].make()
    assert sum(p.numel() for p in model.parameters()) > 10**7


def test_emulated_links_take_their_latency_and_rate() -> None:
    """Not below rounds times latency plus the bytes of the busiest link."""
    secure = tacit.compile(seeded(nn.Sequential(nn.Linear(6, 5), nn.ReLU())), images(2, 6), input_range=(-1, 1))
    x = images(50, 6)
    plain = secure(x)
    secure.session(LinkModel(latency_seconds=0.02, bytes_per_second=1e6))
    begin = time.perf_counter()
    assert (secure(x) - plain).abs().max() < 2**-8
    run = secure.last_run
    assert run is not None
    assert time.perf_counter() - begin >= run.online_seconds >= run.rounds * 0.02
    secure.session(LinkModel(latency_seconds=0.0, bytes_per_second=1e4))
    secure(x)
    run = secure.last_run
    assert run is not None
    assert run.online_seconds >= max(run.online_links.values()) / 1e4
