"""What happened when, at each party of a session in one process: names, times and sizes, never a value."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from tacit.ir.cost import Link


@dataclass(frozen=True)
class Slice:
    """A stretch of one party's time, in seconds of the performance counter. kind: op, round, send or wait."""

    rank: int
    kind: str
    name: str
    begin: float
    end: float
    link: Link | None = None
    size: int = 0


class Profile(dict[tuple[str, str, int], float]):
    """Seconds of work by phase ("offline", "online"), line and party; waiting for others is not in it."""

    def work(self, phase: str, line: str, rank: int, begin: float) -> None:
        """Book what a party did for a line from `begin` to now."""
        key = (phase, line, rank)
        self[key] = self.get(key, 0.0) + time.perf_counter() - begin

    def round(self, step: int, rank: int, begin: float) -> None:
        """A party has finished a round that it began at `begin`."""


@dataclass
class Timeline(Profile):
    """A profile that keeps every stretch of time. Parties append from threads of their own."""

    slices: list[Slice] = field(default_factory=list)
    phases: dict[str, tuple[float, float]] = field(default_factory=dict)  # begin and end of "offline" and "online"

    def work(self, phase: str, line: str, rank: int, begin: float) -> None:
        super().work(phase, line, rank, begin)
        self.slices.append(Slice(rank, "op", line, begin, time.perf_counter()))

    def round(self, step: int, rank: int, begin: float) -> None:
        self.slices.append(Slice(rank, "round", f"round {step + 1}", begin, time.perf_counter()))

    def others(self, rank: int, begin: float) -> None:
        """Since `begin` it was the turn of the other parties in the thread that all share."""
        self.slices.append(Slice(rank, "wait", "turns of the others", begin, time.perf_counter()))

    def message(self, kind: str, link: Link, size: int, begin: float) -> None:
        """A "send" at the first end of the link, or the "wait" for a message at the other."""
        rank = link[0] if kind == "send" else link[1]
        self.slices.append(Slice(rank, kind, kind, begin, time.perf_counter(), link, size))
