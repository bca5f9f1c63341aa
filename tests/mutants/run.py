"""Lay out copies of the tree, change them, run the tests that should notice."""

from __future__ import annotations

import fnmatch
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import tacit
from mutants.mutant import MARKS, REACHED, STALE, Mutant, NotApplied, Wrap, applied

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {"compiler": "tacit", "ir": "tacit/ir", "passes": "tacit/passes", "runtime": "tacit/runtime"}
_PASSED, _FAILED = 0, 1  # pytest's
_SLIPS = "NameError|TypeError|AttributeError|KeyError|UnboundLocalError|IndentationError|SyntaxError"
CAUGHT, SURVIVED, EQUIVALENT, BROKEN = "caught", "SURVIVED", "nothing to catch", "NOT APPLIED"


@dataclass(frozen=True)
class Result:
    """How a mutant fared: by which test it was caught, or why not."""

    mutant: Mutant
    verdict: str
    detail: str
    seconds: float


@dataclass(frozen=True)
class Outcome:
    """One run of pytest: the first test that failed, or what else ended it."""

    code: int | None  # None: out of time
    failed: str
    output: str

    @property
    def slip(self) -> str:
        """The error of the mutation itself, where that rather than a claim of a test seems to be what failed."""
        found = re.search(rf"^\S+:\d+: ((?:{_SLIPS}).*)$", self.output, re.MULTILINE)
        return found.group(1) if found else ""


def chosen(mutants: Sequence[Mutant], patterns: Sequence[str]) -> list[Mutant]:
    """Those whose name fits a pattern; all of them without patterns."""
    return [m for m in mutants if not patterns or any(fnmatch.fnmatchcase(m.name, p) for p in patterns)]


def files(root: Path, patterns: Sequence[str]) -> list[str]:
    """The test files that fit the patterns, in the patterns' order, each once."""
    found = [str(path.relative_to(root)) for p in patterns for path in sorted(root.glob(p))]
    return list(dict.fromkeys(found))


class Copy:
    """A copy of the tree with the package as pip would lay it out, in front of the installed one.

    Times of change and caches of compiled code come along: kernels are not compiled again.
    """

    def __init__(self, folder: Path) -> None:
        self.tree, self.packages, self.marks = folder / "tree", folder / "packages", folder / "marks"
        shutil.copytree(Path(str(tacit.__file__)).parent, self.packages / "tacit")
        self.tree.mkdir()
        for path in ROOT.iterdir():
            if path.name.startswith(".") or path.name in ("build", *PACKAGES) or path.name.endswith(".egg-info"):
                continue
            copy = shutil.copytree if path.is_dir() else shutil.copy2
            copy(path, self.tree / path.name)
        for name, package in PACKAGES.items():
            (self.tree / name).symlink_to(self.packages / package)

    @contextmanager
    def changed(self, mutant: Mutant) -> Iterator[None]:
        """The tree with the mutant's changes; raises NotApplied."""
        before = {path: (path.read_text(), path.stat()) for path in {self.tree / c.path for c in mutant.changes}}
        try:
            for change in mutant.changes:
                path = self.tree / change.path
                path.write_text(applied(path.read_text(), change))
            self.marks.unlink(missing_ok=True)
            yield
        finally:
            for path, (text, was) in before.items():
                path.write_text(text)
                os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns))

    def marked(self) -> set[str]:
        return set(self.marks.read_text().split()) if self.marks.exists() else set()

    def test(self, test: str, seconds: float) -> Outcome:
        """Run a test file until the first test that fails."""
        command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "--tb=line", "--no-header", test]
        env = os.environ | {"PYTHONPATH": str(self.packages), "OMP_NUM_THREADS": "1", MARKS: str(self.marks)}
        running = subprocess.Popen(
            command, cwd=self.tree, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )  # fmt: skip
        try:
            output, _ = running.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            return Outcome(None, f"{test} has no end within {seconds:g} s", "")
        finally:
            with suppress(ProcessLookupError):  # what the tests left behind, too
                os.killpg(running.pid, signal.SIGKILL)
            running.wait()
        found = re.search(r"^(?:FAILED|ERROR) (?:tests/)?(.+?)(?: - |$)", output, re.MULTILINE)
        return Outcome(running.returncode, found.group(1) if found else "", output)


def unchanged(copy: Copy, mutants: Sequence[Mutant], seconds: float) -> str:
    """What fails in the tree as it is, or nothing."""
    for test in files(copy.tree, [t for m in mutants for t in m.tests]):
        outcome = copy.test(test, seconds)
        if outcome.code != _PASSED:
            return outcome.failed or f"{test}: {outcome.output[-1000:]}"
    return ""


def examine(copy: Copy, mutant: Mutant, seconds: float) -> Result:
    """Run a mutant's tests, file by file, until one notices."""
    begin = time.monotonic()

    def result(verdict: str, detail: str) -> Result:
        return Result(mutant, verdict, detail, time.monotonic() - begin)

    if mutant.proof:
        return result(EQUIVALENT, mutant.proof)
    try:
        with copy.changed(mutant):
            tests = files(copy.tree, mutant.tests)
            for test in tests:
                outcome = copy.test(test, seconds)
                if STALE in copy.marked():
                    return result(BROKEN, "the code that it was made for is not what runs")
                if outcome.slip or outcome.code not in (None, _PASSED, _FAILED):
                    return result(BROKEN, outcome.slip or outcome.output[-300:])
                if outcome.code != _PASSED:
                    return result(CAUGHT, outcome.failed)
            if any(isinstance(c, Wrap) for c in mutant.changes) and REACHED not in copy.marked():
                return result(BROKEN, "no test calls what is changed")
            return result(SURVIVED, " ".join(Path(t).stem for t in tests))
    except NotApplied as error:
        return result(BROKEN, str(error))


def examine_all(folder: Path, mutants: Sequence[Mutant], jobs: int, seconds: float) -> Iterator[Result]:
    """All of them, `jobs` at a time, each in a copy that no other uses; in their order."""
    free: queue.SimpleQueue[Copy] = queue.SimpleQueue()
    for i in range(jobs):
        free.put(Copy(folder / str(i)))

    def one(mutant: Mutant) -> Result:
        copy = free.get()
        try:
            return examine(copy, mutant, seconds)
        finally:
            free.put(copy)

    with ThreadPoolExecutor(jobs) as pool:
        waiting = [pool.submit(one, mutant) for mutant in mutants]
        for future in waiting:
            yield future.result()


def summary(results: Sequence[Result]) -> str:
    """The last line of the report."""

    def named(verdict: str) -> tuple[int, str]:
        names = [r.mutant.name for r in results if r.verdict == verdict]
        return len(names), f" ({', '.join(names)})" if names else ""

    caught, _ = named(CAUGHT)
    survived, broken, equivalent = named(SURVIVED), named(BROKEN), named(EQUIVALENT)
    out = f"{len(results)} mutants: {caught} caught, {survived[0]} survived{survived[1]}"
    out += f", {broken[0]} not applied{broken[1]}" if broken[0] else ""
    return out + (f", {equivalent[0]} with nothing to catch{equivalent[1]}" if equivalent[0] else "")
