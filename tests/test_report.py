"""The report: one page, complete, escaped, with a leakage statement that the plan's own costs bear out."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from dataclasses import replace
from functools import cache
from html import escape, unescape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from harness import params
from PIL import Image
from test_cli import succeeds
from torch import nn

import tacit
from tacit import networks
from tacit.ir.cost import CLIENT, P0, P1, P2, ROLES
from tacit.ir.op import Level, Sample
from tacit.ir.plan import Plan
from tacit.ir.seen import of_randomness
from tacit.ir.view.leakage import Leakage, leakage
from tacit.ir.view.page import help_of, page
from tacit.vision import import_torchvision

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
browser = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium is installed: the page is not looked at in a browser"
)


@cache
def plan_of(name: str, protocol: str = "fused", reveal: str = "argmax") -> Plan:
    torch.manual_seed(0)
    x = torch.rand(2, 1, 28, 28)
    model = {"mlp": networks.MLP, "lenet": networks.LeNet, "linear": Straight}[name]().eval()
    return tacit.compile(model, x, reveal=reveal, protocol=protocol, input_range=(0, 1), name=name).plan


class Straight(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(784, 3))


class Elements(HTMLParser):
    """Tags with their attributes, in order; complains of what does not close."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in ("meta", "rect", "path", "wbr"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag in ("rect", "path"):
            return
        assert self.open.pop() == tag

    def ids(self) -> set[str]:
        found = [attrs["id"] for _, attrs in self.found if attrs.get("id")]
        assert len(found) == len(set(found))
        return {str(i) for i in found}


def readable(html: str) -> str:
    return unescape(re.sub(r"<[^>]+>", "", re.sub(r"<(style|script)>.*?</\1>", "", html, flags=re.DOTALL)))


@pytest.mark.parametrize("name", ["mlp", "lenet", "linear"])
def test_the_page_is_whole_and_asks_for_nothing(name: str) -> None:
    plan = plan_of(name)
    html = page(plan)
    elements = Elements(html)
    ids = elements.ids()
    assert {f"l-{node.name}" for node in plan.nodes} <= ids
    for tag, attrs in elements.found:
        assert "src" not in attrs and tag not in ("link", "img", "iframe", "object")
        if attrs.get("href"):
            assert str(attrs["href"]).startswith("#") and str(attrs["href"])[1:] in ids
    assert re.findall(r"https?://[^\"' ]+", html) == ["http://www.w3.org/2000/svg"]
    assert "url(" not in html and "@import" not in html
    assert "default-src 'none'" in html


def test_the_text_of_the_plan_stands_on_the_page_as_it_is() -> None:
    plan = plan_of("mlp")
    lines = [readable(line) for line in re.findall(r"<div(?: id='l-\w+')?>(.*?)</div>", page(plan))]
    told = "\n".join(lines)
    assert all(line in told for line in str(plan).rstrip("\n").split("\n"))


def test_every_op_has_help_from_its_docstring() -> None:
    plan = plan_of("lenet")
    html = page(plan)
    for op in {node.op.name for node in plan.nodes}:
        assert len(help_of(op)) > 10
        assert f"<dd id='h-{op}'>{escape(help_of(op))}</dd>" in html
        assert f"data-op='{op}'" in html


def test_what_a_plan_names_is_escaped() -> None:
    plan = plan_of("mlp")
    evil = "<script>alert(1)</script>'\"&"
    nodes = [replace(node, path=evil) if node.path == "fc1" else node for node in plan.nodes]
    html = page(Plan("mlp", tuple(nodes), plan.result, reveal=plan.reveal))
    assert "<script>alert" not in html
    assert escape(evil) in html
    Elements(html)
    assert "<script" not in Plan("mlp", tuple(nodes), plan.result)._repr_html_()


@pytest.mark.parametrize("protocol", ["fused", "securenn"])
def test_the_statement_lists_every_byte_that_each_role_is_sent(protocol: str) -> None:
    plan = plan_of("mlp", protocol)
    cost = plan.cost()
    views = {view.role: view for view in leakage(plan).views}
    assert tuple(views) == (*ROLES, "network")
    for phase in ("online", "offline", "session"):
        sent = cost._links(phase)
        for rank, role in enumerate(ROLES):
            declared = sum(r.size for r in views[role].received if r.phase == phase)
            assert declared == sum(size for (_, target), size in sent.items() if target == rank)
        passing = sum(r.size for r in views["network"].received if r.phase == phase)
        assert passing == sum(sent.values())
    assert not views["owner"].received
    assert all(view.statements for view in views.values())


def test_the_statement_follows_the_plan() -> None:
    straight, compares = leakage(plan_of("linear", reveal="logits")), leakage(plan_of("mlp"))
    dealer = {name: found.views[P2] for name, found in (("linear", straight), ("mlp", compares))}
    assert not [r for r in dealer["linear"].received if r.phase == "online"]
    assert any("no message while an inference runs" in s.why for s in dealer["linear"].statements)
    assert not any("no message while" in s.why for s in dealer["mlp"].statements)
    assert by(compares, P2, "Blinded comparison vectors") == ("relu", "argmax_by_wins")
    assert any("windows of 2 lines" in line for line in compares.disclosed)
    assert not any("windows" in line for line in straight.disclosed)
    assert any("0 to 1" in line for line in compares.disclosed)
    text = readable(page(plan_of("mlp")))
    for found in (*compares.disclosed, *compares.assumptions):
        assert found in text


def test_the_figures_are_those_of_the_plan() -> None:
    plan = plan_of("lenet")
    text = readable(page(plan, batch=3))
    assert f"{plan.cost(batch=3).rounds}rounds" in text
    for need in {need.kind for need in plan.requirements()}:
        assert need in text
    assert f"{sum(n.count for n in plan.requirements(batch=3) if n.kind == 'triple a'):,}" in text
    assert plan.digest in text


def test_a_deep_network_stays_small() -> None:
    """As many layers as a ResNet-50 has, each of them narrow."""
    resnet = import_torchvision().models.resnet
    torch.manual_seed(0)
    model, x = (
        resnet.ResNet(resnet.Bottleneck, [3, 4, 6, 3], width_per_group=4, num_classes=10),
        torch.randn(1, 3, 32, 32),
    )
    html = page(tacit.compile(model.eval(), x, calibration=x.expand(64, 3, 32, 32)).plan)
    assert len(html.encode()) < 1_000_000
    assert html.count('class="frame') >= 4 + 16  # the stages, the blocks
    Elements(html).ids()


def test_the_command_writes_it_and_a_notebook_frames_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of("mlp")
    (tmp_path / "plan.txt").write_text(str(plan))
    monkeypatch.setattr("tacit.ir.predict.FINDERS", [])
    succeeds("show", tmp_path / "plan.txt", "--html", tmp_path / "report.html")
    assert plan.digest in (tmp_path / "report.html").read_text()
    framed = plan._repr_html_()
    inner = re.fullmatch(r'<iframe srcdoc="([^"]*)" [^<>]*></iframe>', framed)
    assert inner is not None and unescape(inner[1]) == page(plan)


# --- in a browser ---


def chromium(folder: Path, html: str, *options: str) -> str:
    """What a fresh headless browser prints for a page."""
    assert CHROMIUM is not None
    path = folder / "page.html"
    path.write_text(html, encoding="utf-8")
    quiet = ["--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update"]
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-sync", *quiet, *options]
    command += [f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=2000", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


# What a person with a keyboard does; the answers go to the title, where the test reads them.
ACTIONS = """
const told = [], op = document.querySelector("button[data-op=relu]"), tip = document.getElementById("tip");
op.focus(); told.push(tip.hidden, tip.textContent.length > 20, document.activeElement === op);
document.dispatchEvent(new KeyboardEvent("keydown", {key: "Escape"})); told.push(tip.hidden);
const graph = document.getElementById("graph"), before = +graph.getAttribute("width");
document.querySelector("[data-zoom=in]").click(); told.push(+graph.getAttribute("width") > before);
document.getElementById("stage").dispatchEvent(new KeyboardEvent("keydown", {key: "1"}));
told.push(Math.round(graph.getAttribute("width")));
const box = document.querySelector("svg a"); box.focus(); told.push(document.activeElement === box);
told.push(document.documentElement.scrollWidth <= innerWidth);
document.title = JSON.stringify(told);
"""


@browser
@pytest.mark.parametrize("size", ["1280,900", "500,900"])
def test_a_browser_runs_it_and_a_keyboard_reaches_everything(tmp_path: Path, size: str) -> None:
    html = page(plan_of("mlp")).replace("</body>", f"<script>{ACTIONS}</script></body>")
    dom = chromium(tmp_path, html, f"--window-size={size}", "--dump-dom")
    assert 'data-ready="yes"' in dom
    width = int(re.findall(r'viewBox="0 0 (\d+)', html)[0])
    title = re.findall(r"<title>(\[.*?\])</title>", dom)
    assert title == [f"[false,true,true,true,true,{width},true,true]"]


@browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_screenshot_in_both_schemes_has_contrast(tmp_path: Path, scheme: str) -> None:
    picture = tmp_path / "shot.png"
    dark = "--blink-settings=preferredColorScheme=" + ("0" if scheme == "dark" else "1")
    chromium(tmp_path, page(plan_of("mlp")), "--window-size=1280,1600", f"--screenshot={picture}", dark)
    pixels = luminance(picture)
    background = float(pixels.median())
    assert background < 0.15 if scheme == "dark" else background > 0.9
    assert float((pixels - background).abs().max()) > 0.7  # ink that can be read
    assert float(((pixels - background).abs() > 0.3).float().mean()) > 0.005


def luminance(picture: Path) -> torch.Tensor:
    with Image.open(picture) as image:
        return torch.from_numpy(np.array(image.convert("L"), dtype=np.float32)) / 255


def by(found: Leakage, rank: int, words: str) -> tuple[str, ...]:
    """The ops that cause what a role sees, by words of that statement; nothing where it is not stated."""
    return tuple(op for s in found.views[rank].statements if words in s.what for op in s.ops)


@pytest.mark.parametrize(**params(Level.PROTOCOL))
def test_nobody_is_sent_a_byte_of_which_nothing_is_said(sample: Sample) -> None:
    """And nothing is said of what is not sent. What P0 holds without a message is said of every plan."""
    for part in sample.op.parts(*(t.at(2) for t in sample.args)):
        for sent, said in (
            (part.cost().online, part.seen()),
            (sum((item.offline for item in part.randomness()), Counter()), of_randomness(part.randomness())),
        ):
            assert {target for _, target in sent} == set(said), type(part).__name__
        assert all(s.what.endswith(".") and s.why.endswith(".") for found in part.all_seen().values() for s in found)


def test_each_statement_comes_from_the_ops_that_cause_it() -> None:
    reveals = {reveal: leakage(plan_of("mlp", reveal=reveal)) for reveal in ("argmax", "logits", "correct")}
    assert {name: by(found, P2, "exactly one is zero") for name, found in reveals.items()} == {
        "argmax": ("argmax_by_wins",),
        "logits": (),
        "correct": ("argmax_by_wins",),
    }
    assert by(reveals["logits"], P2, "Blinded comparison vectors") == ("relu",)
    assert "equal" in by(reveals["correct"], P2, "Blinded comparison vectors")
    assert by(reveals["argmax"], CLIENT, "the class of each") == ("argmax_by_wins", "reveal")
    assert by(reveals["correct"], CLIENT, "one sum over its whole batch") == ("sum_batch", "reveal")
    assert by(reveals["correct"], CLIENT, "Its own inputs (x, targets)") == ("input",)
    assert by(reveals["logits"], CLIENT, "what the model returns") == ("add", "reveal")
    textbook = leakage(plan_of("mlp", "securenn"))
    assert by(textbook, P2, "ShareConvert") == ("securenn.relu", "securenn.argmax")
    assert by(textbook, P0, "From P2, the bits with which comparisons end") == ()
    assert by(reveals["logits"], P0, "Corrections") == () != by(reveals["logits"], P1, "Corrections")


class Several(nn.Module):
    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"gelu": nn.functional.gelu(x), "softmax": x.softmax(1)}


def test_splines_and_several_results_are_stated() -> None:
    found = leakage(tacit.compile(Several().eval(), torch.rand(2, 5), input_range=(-1, 1)).plan)
    assert by(found, P2, "comparisons of one value with all knots") == ("spline",)
    assert by(found, CLIENT, "all results of the model") == ("pack", "reveal")
    assert (
        sum(line.startswith("The ranges over which functions of one number are fitted") for line in found.disclosed)
        == 1
    )
    assert not any("fitted" in line for line in leakage(plan_of("mlp")).disclosed)


def test_a_plan_that_needs_no_dealer_says_so() -> None:
    found = leakage(tacit.compile(nn.Flatten().eval(), torch.rand(2, 5, 2), input_range=(-1, 1)).plan)
    (only,) = found.views[P2].statements
    assert "needs no dealt randomness" in only.what
    assert not found.views[P2].received
