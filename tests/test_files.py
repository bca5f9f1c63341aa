"""Files: what is saved comes back, the weights are the owner's alone, and an edited file is refused."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import stat
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import tacit
from tacit.secure import PLAN_FILE, WEIGHTS_FILE

Tensor = torch.Tensor
X = torch.rand(4, 1, 6, 6, generator=torch.Generator().manual_seed(0))
TARGETS = torch.tensor([0, 1, 2, 0])
VARIANTS = [("fused", "logits"), ("fused", "argmax"), ("fused", "correct"), ("securenn", "correct")]


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 3)).eval()


def compiled(protocol: str = "fused", reveal: str = "logits", seed: int = 0) -> tacit.Secure:
    return tacit.compile(network(seed), X, reveal=reveal, protocol=protocol, input_range=(0, 1), name="net")


@pytest.fixture(scope="module")
def secure() -> tacit.Secure:
    return compiled()


@pytest.fixture
def folder(secure: tacit.Secure, tmp_path: Path) -> Path:
    secure.save(tmp_path)
    return tmp_path


# --- round trips ---


@pytest.mark.parametrize(("protocol", "reveal"), VARIANTS)
def test_a_saved_model_gives_the_same_answers(protocol: str, reveal: str, tmp_path: Path) -> None:
    before = compiled(protocol, reveal)
    before.save(tmp_path / "new" / "folder")
    after = tacit.load(tmp_path / "new" / "folder")
    inputs = (X, TARGETS) if reveal == "correct" else (X,)
    assert after.plan == before.plan
    assert torch.equal(after.reference(*inputs), before.reference(*inputs))
    assert after.check(*inputs).dtype == before.reference(*inputs).dtype


@pytest.mark.parametrize(("protocol", "reveal"), VARIANTS)
def test_a_plan_is_its_text(protocol: str, reveal: str) -> None:
    plan = compiled(protocol, reveal).plan
    parsed = tacit.Plan.parse(str(plan))
    assert parsed == plan
    assert str(parsed) == str(plan)
    assert hashlib.sha256(str(plan).encode()).hexdigest() == plan.digest == parsed.digest


def test_a_double_precision_model_stays_one(tmp_path: Path) -> None:
    model = nn.Linear(3, 2).double().eval()
    x = torch.rand(2, 3, dtype=torch.float64)
    tacit.compile(model, x).save(tmp_path)
    answer = tacit.load(tmp_path)(x)
    assert answer.dtype == torch.float64
    torch.testing.assert_close(answer, model(x), atol=2**-8, rtol=0)


def test_saving_again_replaces_both_files(folder: Path) -> None:
    other = compiled(reveal="argmax", seed=1)
    other.save(folder)
    assert tacit.load(folder).plan == other.plan
    assert sorted(p.name for p in folder.iterdir()) == [PLAN_FILE, WEIGHTS_FILE]


def test_only_the_owner_can_read_the_weights(secure: tacit.Secure, tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        secure.save(tmp_path)
        secure.save(tmp_path)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / WEIGHTS_FILE).stat().st_mode) == 0o600


def test_the_plan_holds_no_weight() -> None:
    """Other weights of the same magnitude give the same text, with ranges that come from calibration data alone."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 3)).eval()
    plans = []
    for sign in (1, -1):
        with torch.no_grad():
            model[1].weight.fill_(0.7239).mul_(sign)
            model[1].bias.fill_(0.4187).mul_(sign)
        plans.append(str(tacit.compile(model, X, input_range=(-1, 1), frac_bits=12, name="net").plan))
    assert plans[0] == plans[1]
    assert not any(digits in plans[0] for digits in ("7239", "4187", str(round(0.7239 * 2**16))))


def test_the_plan_holds_no_path_of_this_machine(folder: Path) -> None:
    text = (folder / PLAN_FILE).read_text()
    assert str(Path.home()) not in text
    assert ".py" not in text


# --- an edited plan ---


def refused(text: str, *, drawn: bool = True) -> None:
    with pytest.raises(tacit.PlanError) as caught:
        tacit.Plan.parse(text)
    assert not drawn or "^^^^" in str(caught.value)


def test_a_changed_digit_in_any_line_is_pointed_at(secure: tacit.Secure) -> None:
    lines = str(secure.plan).rstrip("\n").split("\n")
    tried = 0
    for i, line in enumerate(lines):
        for digit in list(re.finditer(r"\d", line)):
            new = str((int(digit[0]) + 1) % 10)
            changed = [*lines[:i], line[: digit.start()] + new + line[digit.end() :], *lines[i + 1 :]]
            refused("\n".join(changed) + "\n")
            tried += 1
    assert tried > 200


def test_the_caret_is_under_the_edited_line(secure: tacit.Secure) -> None:
    text = str(secure.plan)
    edited = text.replace("relu ", "rely ")
    with pytest.raises(tacit.PlanError, match="there is no op 'rely'") as caught:
        tacit.Plan.parse(edited)
    drawing = str(caught.value).split("\n")
    culprit = next(i for i, line in enumerate(drawing) if "rely" in line and "|" in line)
    assert set(drawing[culprit + 1].split("|")[1].strip()) == {"^"}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("plan net ", "plan other "),
        ("protocol=fused", "protocol=securenn"),
        ("reveal=logits", "reveal=argmax"),
        ("reveal %", "reveal %%"),
        ("return %y", "return %0"),
        ("return %y", "return %nothing"),
        ("@4", "@5"),
        ("stride=2x2", "stride=1x1"),
        ("window=", "kindow="),
        ("owner", "client"),
        ("low=0.0", "low=zero"),
        ("ring=2^32", "ring=2^64"),
        (", r32>", ">"),
        (", r32>", ", r16>"),
        ("level=protocol", "level=fixed"),
        ("level=protocol, protocol=fused", "protocol=fused, level=protocol"),
    ],
)
def test_an_edited_word_is_refused(secure: tacit.Secure, old: str, new: str) -> None:
    text = str(secure.plan)
    assert old in text or old == "owner"
    edited = text.replace(old, new, 1) if old in text else text.replace("label=4.bias", "label=4.bias, owner=client")
    refused(edited)


def test_swapped_doubled_and_dropped_lines_are_refused(secure: tacit.Secure) -> None:
    lines = str(secure.plan).rstrip("\n").split("\n")
    for i in range(1, len(lines) - 4):
        refused("\n".join([*lines[:i], lines[i + 1], lines[i], *lines[i + 2 :]]))
        refused("\n".join([*lines[: i + 1], lines[i], *lines[i + 1 :]]))
        refused("\n".join([*lines[:i], *lines[i + 1 :]]))


def test_a_missing_seal_or_tail_is_refused(secure: tacit.Secure) -> None:
    lines = str(secure.plan).rstrip("\n").split("\n")
    for length in range(len(lines)):
        refused("\n".join(lines[:length]), drawn=False)
    refused("\n".join([*lines, "one line more"]), drawn=False)
    refused("", drawn=False)


def test_a_type_that_does_not_follow_is_refused_even_if_sealed_again(secure: tacit.Secure) -> None:
    """The seal guards against slips; what a line claims is derived anew."""
    plan = secure.plan
    relu = next(n for n in plan.nodes if n.op.name == "relu")
    wrong = [
        n if n is not relu else type(n)(n.name, n.op, n.args, n.type.with_(frac=n.type.frac + 1), n.path)
        for n in plan.nodes
    ]
    with pytest.raises(tacit.PlanError, match="is declared"):
        tacit.Plan.parse(str(plan.with_nodes(wrong)))


# --- damaged and foreign weights ---


def test_every_flipped_byte_of_the_weights_is_noticed(folder: Path) -> None:
    path = folder / WEIGHTS_FILE
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    for place in range(8 + size, len(content), 7):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(tacit.WeightsError, match="was changed"):
            tacit.load(folder)


@pytest.mark.parametrize("kept", [0, 5, 8, 100, -8, -1])
def test_a_truncated_weight_file_is_refused(folder: Path, kept: int) -> None:
    path = folder / WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(tacit.WeightsError):
        tacit.load(folder)


def test_weights_of_another_plan_are_refused(folder: Path, tmp_path: Path) -> None:
    compiled(reveal="argmax").save(tmp_path / "other")
    shutil.copy(tmp_path / "other" / WEIGHTS_FILE, folder)
    with pytest.raises(tacit.WeightsError, match="another plan"):
        tacit.load(folder)


@pytest.mark.parametrize("change", ["fewer", "more", "shape", "dtype"])
def test_weights_that_do_not_match_the_plan_are_refused(secure: tacit.Secure, folder: Path, change: str) -> None:
    """Even with a fingerprint of their own."""
    weights = load_file(folder / WEIGHTS_FILE)
    label = "4.bias"
    if change == "fewer":
        del weights[label]
    elif change == "more":
        weights["more"] = weights[label].clone()
    elif change == "shape":
        weights[label] = weights[label].repeat(2)
    else:
        weights[label] = weights[label].double()
    tacit.Secure(secure.plan, weights).save(folder)
    with pytest.raises(tacit.WeightsError, match="more" if change == "more" else label):
        tacit.load(folder)


def test_a_weight_file_without_our_metadata_is_refused(folder: Path) -> None:
    save_file(load_file(folder / WEIGHTS_FILE), folder / WEIGHTS_FILE)
    with pytest.raises(tacit.WeightsError):
        tacit.load(folder)


@pytest.mark.parametrize("dtype", ["torch.load", "torch.int64", "nothing"])
def test_an_answer_type_that_is_not_a_float_is_refused(folder: Path, dtype: str) -> None:
    path = folder / WEIGHTS_FILE
    with safe_open(path, framework="pt") as opened:
        metadata = opened.metadata()
    save_file(load_file(path), path, metadata | {"dtype": dtype})
    with pytest.raises(tacit.WeightsError):
        tacit.load(folder)


def test_missing_files_are_named(folder: Path) -> None:
    (folder / WEIGHTS_FILE).unlink()
    with pytest.raises(FileNotFoundError, match=WEIGHTS_FILE):
        tacit.load(folder)
    with pytest.raises(FileNotFoundError, match=PLAN_FILE):
        tacit.load(folder / "nothing")


def test_a_plan_file_that_is_not_text_is_refused(folder: Path) -> None:
    (folder / PLAN_FILE).write_bytes(b"\xff\xfe\x00plan")
    with pytest.raises(tacit.PlanError):
        tacit.load(folder)
