"""What is written is there whole or not at all, whatever goes wrong, and at whatever moment."""

from __future__ import annotations

import os
import resource
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from test_processes import in_a_fork
from torch import nn

import tacit
from tacit import bug, plots, saved
from tacit.cli_shared import save_answer
from tacit.ir.errors import DeploymentError, WeightsError
from tacit.ir.files import require_folder, require_place, write_whole
from tacit.runtime.net.certificates import init_deployment
from tacit.saved import PLAN_FILE, WEIGHTS_FILE, read_plan

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
X = torch.rand(3, 6, generator=torch.Generator().manual_seed(0))
PLACES = [("127.0.0.1", port) for port in (7600, 7601, 7602)]


def compiled(width: int, seed: int) -> tacit.Secure:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 3)).eval()
    return tacit.compile(model, X, input_range=(0, 1), name="net")


@pytest.fixture(scope="module")
def models() -> dict[str, tacit.Secure]:
    """Of the last two plans are the same, weights are not."""
    model = nn.Linear(6, 3).eval()
    once, again = (tacit.compile(model, X, input_range=(0, 1), frac_bits=12, name="net") for _ in range(2))
    shifted = {label: value + 1 for label, value in again.weights.items()}
    return {"small": compiled(4, 0), "large": compiled(40, 1), "once": once, "again": tacit.Secure(again.plan, shifted)}


def same(found: tacit.Secure, wanted: tacit.Secure) -> bool:
    return found.plan == wanted.plan and all(torch.equal(found.weights[k], w) for k, w in wanted.weights.items())


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def events(folder: Path, act: Callable[[int], None]) -> None:
    """Call `act` with the number of each operation on files of the folder, before it happens, in this process."""
    count = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        mine = any(str(folder) in os.fsdecode(x) for x in arguments if isinstance(x, (str, bytes, os.PathLike)))
        if event == "fcntl.flock" or (event in ("open", "os.rename", "os.remove", "os.mkdir", "os.chmod") and mine):
            count += 1
            act(count)

    sys.addaudithook(hook)


def stopped(at: int, how: Callable[[], None], folder: Path, work: Callable[[], Any]) -> int:
    """Run `work` in a process that is stopped before its operation number `at`; how many came, 0 if it was stopped."""
    last = [0]

    def act(number: int) -> None:
        last[0] = number
        if number == at:
            how()

    pid = os.fork()
    if pid == 0:
        events(folder, act)
        try:
            work()
        except KeyboardInterrupt:
            os._exit(0)
        except BaseException:
            os._exit(255)
        os._exit(last[0])
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    assert 0 <= code < 255
    return code


def killed() -> None:
    os._exit(0)


def interrupted() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("how", [killed, interrupted])
@pytest.mark.parametrize(("old", "new"), [("small", "large"), ("once", "again"), (None, "small")])
def test_a_save_that_is_stopped_leaves_one_model(
    models: dict[str, tacit.Secure], tmp_path: Path, how: Callable[[], None], old: str | None, new: str
) -> None:
    """At every operation: what was there can be loaded, or what was to come; read as a plan; and saved over."""
    outcomes, at = set(), 0
    while True:
        at += 1
        folder = tmp_path / str(at)
        if old is not None:
            models[old].save(folder)
        ended = stopped(at, how, folder, lambda folder=folder: models[new].save(folder))  # type: ignore[misc]
        mode = folder / WEIGHTS_FILE
        assert not mode.exists() or stat.S_IMODE(mode.stat().st_mode) == 0o600
        shown = read_plan(folder).digest if old is not None or (folder / WEIGHTS_FILE).exists() else None
        try:
            found = tacit.load(folder)
        except FileNotFoundError:
            assert old is None
            outcomes.add("none")
        else:
            (kept,) = [name for name in (old, new) if name is not None and same(found, models[name])]
            assert shown == found.plan.digest
            outcomes.add(kept)
        if how is interrupted and folder.exists():
            assert names(folder) in ([], [PLAN_FILE, WEIGHTS_FILE])
        models["large"].save(folder)
        assert same(tacit.load(folder), models["large"]) and names(folder) == [PLAN_FILE, WEIGHTS_FILE]
        if ended:
            break
    assert at > 8 and outcomes == {old or "none", new}


def test_a_folder_that_cannot_be_written_to_is_still_read(models: dict[str, tacit.Secure], tmp_path: Path) -> None:
    """Half-way between two models, by whoever may not rename anything."""
    models["small"].save(tmp_path)
    for at in range(1, 30):
        stopped(at, killed, tmp_path, lambda: models["large"].save(tmp_path))
        if saved._plan_named_in(tmp_path / WEIGHTS_FILE) == models["large"].plan.digest:
            break
    assert (tmp_path / f"{PLAN_FILE}.new").exists()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saved.os, "replace", _not_permitted)
        assert same(tacit.load(tmp_path), models["large"])
        assert read_plan(tmp_path) == models["large"].plan
    assert same(tacit.load(tmp_path), models["large"]) and names(tmp_path) == [PLAN_FILE, WEIGHTS_FILE]


def _not_permitted(*_: object) -> None:
    raise PermissionError(13, "Permission denied")


def test_savers_and_loaders_side_by_side(models: dict[str, tacit.Secure], tmp_path: Path) -> None:
    """Also in other processes; nobody finds a mixture, or nothing."""
    models["small"].save(tmp_path)
    wrong: list[str] = []

    def save(name: str) -> None:
        for _ in range(15):
            models[name].save(tmp_path)

    def load() -> None:
        for _ in range(15):
            found = tacit.load(tmp_path)
            if not any(same(found, models[name]) for name in ("small", "large")):
                wrong.append("mixed")

    def noted(work: Callable[..., None], *arguments: str) -> None:
        try:
            work(*arguments)
        except Exception as error:
            wrong.append(repr(error))

    jobs: list[tuple[Any, ...]] = [(save, "small"), (save, "large"), (load,), (load,)]
    threads = [threading.Thread(target=noted, args=job) for job in jobs]
    for thread in threads:
        thread.start()
    in_a_fork(lambda: [noted(*job) for job in jobs] and wrong)
    for thread in threads:
        thread.join()
    assert not wrong and names(tmp_path) == [PLAN_FILE, WEIGHTS_FILE]


def test_whoever_keeps_a_folder_locked_is_told_of(models: dict[str, tacit.Secure], tmp_path: Path) -> None:
    models["small"].save(tmp_path)
    with saved._alone_in(tmp_path):
        assert same(tacit.load(tmp_path), models["small"])
        with pytest.raises(TimeoutError, match="locked"), saved._alone_in(tmp_path, patience=0):
            pass


# --- a full disk, and places that cannot be written to ---


@contextmanager
def full(size: int) -> Iterator[None]:
    """No file may be longer."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [0, 700, 1500])
def test_a_full_disk_leaves_the_old_model(models: dict[str, tacit.Secure], tmp_path: Path, size: int) -> None:
    models["small"].save(tmp_path / "old")
    for folder in (tmp_path / "old", tmp_path / "new"):
        with full(size), pytest.raises(OSError, match=rf"too large.*{folder}"):
            models["large"].save(folder)
    assert same(tacit.load(tmp_path / "old"), models["small"])
    assert names(tmp_path / "old") == [PLAN_FILE, WEIGHTS_FILE] and names(tmp_path / "new") == []


WRITERS: dict[str, Callable[[Path], Any]] = {
    "a text": lambda path: write_whole(path, b"x" * 100),
    "an array": lambda path: save_answer(path, torch.zeros(100)),
    "arrays": lambda path: save_answer(path, {"a": torch.zeros(100), "b": torch.zeros(3)}),
    "a plot": lambda path: plots._save(plots.require_matplotlib()(), path),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_leaves_the_old_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / "out.svg"
    with full(10), pytest.raises(OSError, match=f"too large.*{path}"):
        WRITERS[name](path)
    assert names(tmp_path) == []
    path.write_text("before")
    with full(10), pytest.raises(OSError, match=f"too large.*{path}"):
        WRITERS[name](path)
    assert names(tmp_path) == ["out.svg"] and path.read_text() == "before"


def test_a_full_disk_leaves_no_piece_of_a_deployment(tmp_path: Path) -> None:
    for size in (10, 700, 1500):  # at the first certificate, and at deployment.toml
        with full(size), pytest.raises(OSError, match="too large"):
            init_deployment(tmp_path, PLACES)
        assert names(tmp_path) == []
    with pytest.raises(DeploymentError):
        init_deployment(tmp_path, PLACES, network="moon")
    assert names(tmp_path) == []
    init_deployment(tmp_path, PLACES)


def test_a_mistake_is_told_of_where_its_report_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bug.tempfile, "tempdir", str(tmp_path))
    with full(10), pytest.raises(tacit.CompilerBug, match="TMPDIR"), bug.reported({}):
        raise KeyError("on purpose")
    assert names(tmp_path) == []
    monkeypatch.setattr(bug.tempfile, "tempdir", str(tmp_path / "none"))
    with pytest.raises(tacit.CompilerBug, match="TMPDIR"), bug.reported({}):
        raise KeyError("on purpose")


def test_places_that_cannot_be_written_to(models: dict[str, tacit.Secure], tmp_path: Path) -> None:
    """The same is found beforehand, and by writing."""
    (tmp_path / "file").write_text("before")
    (tmp_path / "folder").mkdir()
    for place, error in (
        (tmp_path / "none" / "x", FileNotFoundError),
        (tmp_path / "file" / "x", NotADirectoryError),
        (tmp_path / "folder", IsADirectoryError),
    ):
        for attempt in (require_place, lambda path: write_whole(path, b"x")):
            with pytest.raises(error, match=str(place)):
                attempt(place)
    for place in (tmp_path / "file", tmp_path / "file" / "x"):
        for attempt in (require_folder, models["small"].save):
            with pytest.raises(NotADirectoryError, match=str(tmp_path / "file")):
                attempt(place)
    require_folder(tmp_path / "folder" / "a" / "b")
    for name in (PLAN_FILE, WEIGHTS_FILE):
        place = tmp_path / name
        (place / name).mkdir(parents=True)
        with pytest.raises(IsADirectoryError, match=name):
            models["small"].save(place)
        assert names(place) == [name]
    with pytest.raises(FileNotFoundError, match="trace"):
        models["small"].trace(X, tmp_path / "none" / "trace.json")
    assert models["small"].last_run is None


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_of_others(models: dict[str, tacit.Secure], tmp_path: Path) -> None:
    models["small"].save(tmp_path)
    tmp_path.chmod(0o500)
    try:
        for attempt in (models["large"].save, require_folder):
            with pytest.raises(PermissionError, match=str(tmp_path)):
                attempt(tmp_path)
        assert same(tacit.load(tmp_path), models["small"])
    finally:
        tmp_path.chmod(0o700)


def test_what_a_file_is_stays(tmp_path: Path) -> None:
    """Its mode, and that it is a link; a pipe is written to."""
    (tmp_path / "real").write_text("before")
    (tmp_path / "real").chmod(0o640)
    (tmp_path / "link").symlink_to("real")
    write_whole(tmp_path / "link", b"after")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "after"
    assert stat.S_IMODE((tmp_path / "real").stat().st_mode) == 0o640
    write_whole(tmp_path / "real", b"secret", private=True)
    assert stat.S_IMODE((tmp_path / "real").stat().st_mode) == 0o600
    before = os.umask(0o027)
    try:
        write_whole(tmp_path / "new", b"")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o640
    for place in ("/dev/null", tmp_path / "pipe"):
        if place != "/dev/null":
            os.mkfifo(place)
            reader = os.open(place, os.O_RDONLY | os.O_NONBLOCK)
        require_place(place)
        write_whole(place, b"told")
    assert os.read(reader, 10) == b"told" and stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    os.close(reader)


def test_weights_of_another_model_are_not_taken_for_half_a_save(
    models: dict[str, tacit.Secure], tmp_path: Path
) -> None:
    for name in ("small", "large"):
        models[name].save(tmp_path / name)
    (tmp_path / "small" / WEIGHTS_FILE).replace(tmp_path / "large" / WEIGHTS_FILE)
    (tmp_path / "large" / f"{PLAN_FILE}.new").write_text("half a plan")
    with pytest.raises(WeightsError, match="another plan"):
        tacit.load(tmp_path / "large")
