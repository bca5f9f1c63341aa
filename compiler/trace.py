"""Traces in the format of Chrome's and Perfetto's viewers: a track for each party, slices, and flows for messages.

Times come from one clock, since all parties are threads of one process. A trace holds names of lines and modules, sizes
and times: nothing secret.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch

from tacit.ir.cost import CLIENT, P0, P1, P2, ROLES, Link
from tacit.ir.files import write_whole
from tacit.ir.plan import Plan
from tacit.runtime.session import Run, Session
from tacit.runtime.timeline import Slice, Timeline

Tensor = torch.Tensor
Event = dict[str, Any]
_TRACKS = (P0, P1, P2, CLIENT)
_OFFLINE_TRACKS = (P0, P1, P2)
_US = 1e6


def traced(session: Session, inputs: Mapping[str, Tensor], file: str | os.PathLike[str]) -> tuple[Tensor, Run]:
    """Deal and infer once, and write the trace; the answer, still in ring integers, and what was measured."""
    timeline = Timeline()
    answer, run, _ = session.request(inputs, timeline=timeline)
    tracks = {"offline": _OFFLINE_TRACKS, "online": _TRACKS}
    phases = {name: (begin, end, tracks[name]) for name, (begin, end) in timeline.phases.items()}
    events = list(_events(session.plan, timeline.slices, phases))
    told = {"plan": session.plan.name, "digest": session.plan.digest, "batch": run.batch, "rounds": run.rounds}
    told |= {"online_seconds": run.online_seconds, "offline_seconds": run.offline_seconds}
    write_whole(file, json.dumps({"traceEvents": events, "displayTimeUnit": "ms", "otherData": told}).encode())
    return answer, run


_Phases = Mapping[str, tuple[float, float, Sequence[int]]]


def _events(plan: Plan, slices: Sequence[Slice], phases: _Phases) -> Iterator[Event]:
    origin = min(begin for begin, _, _ in phases.values())
    yield {"ph": "M", "name": "process_name", "pid": 1, "args": {"name": f"tacit: {plan.name}"}}
    for rank in _TRACKS:
        yield {"ph": "M", "name": "thread_name", "pid": 1, "tid": rank, "args": {"name": ROLES[rank]}}
        yield {"ph": "M", "name": "thread_sort_index", "pid": 1, "tid": rank, "args": {"sort_index": rank}}
    for phase, (begin, end, ranks) in phases.items():
        for rank in ranks:
            yield _complete(rank, phase, "phase", begin - origin, end - origin, {})
            mine = [s for s in slices if s.rank == rank and begin <= s.begin and s.end <= end]
            for name, kind, a, b in _between(mine, begin, end):
                yield _complete(rank, name, kind, a - origin, b - origin, {})
            for one in mine:
                yield _slice(plan, one, origin)
    yield from _flows(slices, origin)


def _complete(rank: int, name: str, kind: str, begin: float, end: float, args: Mapping[str, Any]) -> Event:
    times = {"ts": begin * _US, "dur": (end - begin) * _US}
    return {"ph": "X", "pid": 1, "tid": rank, "name": name, "cat": kind, **times, "args": dict(args)}


def _between(mine: Sequence[Slice], begin: float, end: float) -> Iterator[tuple[str, str, float, float]]:
    """What lies between the slices of a party, as name, kind, begin and end.

    Before the first and after the last it waits for the others. In between it is the executor that works, or
    the system that gives the core to another thread. Such a stretch ends where a round ends, so that slices nest.
    """
    leaves = sorted((s for s in mine if s.kind != "round"), key=lambda s: s.begin)
    first, last = min((s.begin for s in leaves), default=end), max((s.end for s in leaves), default=end)
    borders = sorted({edge for s in mine if s.kind == "round" for edge in (s.begin, s.end)})
    done = begin
    for stop in [*(s.begin for s in leaves), end]:
        if stop > done:
            name, kind = ("wait for the others", "wait") if done < first or done >= last else ("executor", "executor")
            cuts = [done, *(edge for edge in borders if done < edge < stop), stop]
            yield from ((name, kind, a, b) for a, b in pairwise(cuts))
        done = max(done, *(s.end for s in leaves if s.begin == stop), stop)


def _slice(plan: Plan, one: Slice, origin: float) -> Event:
    begin, end = one.begin - origin, one.end - origin
    if one.kind == "op":
        node = plan.node(one.name)
        return _complete(one.rank, node.op.name, "op", begin, end, {"line": f"%{one.name}", "module": node.path})
    if one.link is None:
        return _complete(one.rank, one.name, one.kind, begin, end, {})
    source, target = (ROLES[rank] for rank in one.link)
    name = f"send to {target}" if one.kind == "send" else f"wait for {source}"
    return _complete(one.rank, name, one.kind, begin, end, {"bytes": one.size})


def _flows(slices: Sequence[Slice], origin: float) -> Iterator[Event]:
    """Messages of a link arrive in the order in which they were sent: the n-th send belongs to the n-th wait."""
    ends: dict[str, dict[Link, list[Slice]]] = {"send": defaultdict(list), "wait": defaultdict(list)}
    for one in sorted(slices, key=lambda s: s.begin):
        if one.link is not None:
            ends[one.kind][one.link].append(one)
    number = 0
    for link, sent in ends["send"].items():
        for send, wait in zip(sent, ends["wait"][link], strict=True):
            number += 1
            common = {"cat": "message", "name": "message", "id": number, "pid": 1, "args": {"bytes": send.size}}
            yield {"ph": "s", "tid": link[0], "ts": (send.begin - origin) * _US, **common}
            yield {"ph": "f", "bp": "e", "tid": link[1], "ts": (wait.end - origin) * _US - 0.001, **common}
