"""What a party tells about itself: counters for Prometheus, JSON lines for the log. Neither ever holds a secret."""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from collections import Counter as Counts
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from tacit.ir.cost import ROLES
from tacit.runtime.channel import Meter
from tacit.runtime.net.frames import Phase

_LINES = 20
_BUCKETS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)


class Metrics:
    """The counters of one process, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        made: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("tacit_requests", "Requests by how they ended", ["outcome"], **made)
        self.refusals = Counter("tacit_refusals", "What was refused, by what it was", ["what"], **made)
        self.payload = Counter(
            "tacit_payload_bytes", "Bytes of messages that this party sent", ["phase", "target"], **made
        )
        self.rounds = Counter("tacit_rounds", "Rounds of the requests: the deepest chain of messages sent", **made)
        self.seconds = Histogram("tacit_request_seconds", "From start to end of a request", buckets=_BUCKETS, **made)
        self.in_flight = Gauge("tacit_in_flight", "Requests under way", **made)
        self.waiting = Gauge("tacit_waiting", "Requests that wait for their turn", **made)
        self.store = Gauge("tacit_store_batches", "Batches dealt ahead", ["elements"], **made)
        self.dealt = Counter("tacit_dealt_batches", "Batches dealt ahead so far", **made)
        self.connected = Gauge("tacit_connected", "Whether a party is connected", ["party"], **made)
        self.ready = Gauge("tacit_ready", "Whether requests are served", **made)
        self.sessions = Counter("tacit_sessions", "Sessions opened or resumed", ["how"], **made)

    def sent(self, phase: Phase, meter: Meter) -> None:
        for (_, target), size in meter.traffic.items():
            self.payload.labels(phase.name.lower(), ROLES[target]).inc(size)
        if phase is Phase.ONLINE:
            self.rounds.inc(meter.rounds)

    def opened(self, *meters: Meter) -> None:
        """What opening a session took."""
        for meter in meters:
            for (_, target), size in meter.traffic.items():
                self.payload.labels("session", ROLES[target]).inc(size)

    def serve(self, address: tuple[str, int]) -> Any:
        """Text exposition over HTTP; returns the server."""
        server, _ = start_http_server(address[1], addr=address[0], registry=self.registry)
        return server

    def figures(self) -> dict[str, float]:
        """Everything as flat numbers, for `tacit status`."""
        out = {}
        for family in self.registry.collect():
            for sample in family.samples:
                if not sample.name.endswith(("_created", "_bucket")):
                    labels = ",".join(f"{k}={v}" for k, v in sorted(sample.labels.items()))
                    out[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
        return out


class Log:
    """Structured log: one JSON object a line on stderr. Only what is passed by name is written, and that is public.

    No event is written more than `_LINES` times in a second, so that a flood of bad handshakes does not fill a disk.
    The next line of that event says how many were `suppressed`. The counters count all of them.
    """

    def __init__(self, role: str) -> None:
        self._role = role
        self._lock = threading.Lock()
        self._second: dict[str, tuple[int, int]] = {}  # by event: a second, and the lines in it
        self._suppressed: Counts[str] = Counts()
        self._logger = logging.Logger(f"tacit.{role}", logging.INFO)
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        self._logger.addHandler(handler)

    def __call__(self, event: str, **fields: str | int | float | bool) -> None:
        now = time.time()
        with self._lock:
            second, lines = self._second.get(event, (0, 0))
            lines = lines if second == int(now) else 0
            self._second[event] = int(now), lines + 1
            if lines >= _LINES:
                self._suppressed[event] += 1
                return
            if missed := self._suppressed.pop(event, 0):
                fields["suppressed"] = missed
        self._logger.info(json.dumps({"time": round(now, 3), "role": self._role, "event": event} | fields))
