"""The owner's weights on their way to P0 and P1: the receiving end at a party, and the owner's side.

The owner offers the plan's text to all three; P0 is given a fresh key from which its shares follow, P1 is sent the
rest. Only once all three have what they need does the owner tell them to commit; P0 last, which opens a session for it.
"""

from __future__ import annotations

import hashlib
import math
import os
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from tacit.ir.cost import OWNER, P0, P1, P2, ROLES
from tacit.ir.errors import PlanError, ProtocolError, RefusedError
from tacit.ir.op import Level
from tacit.ir.plan import Plan
from tacit.ir.types import dim_at
from tacit.runtime.channel import NETWORKS, Meter
from tacit.runtime.net.deployment import Deployment, Identity, Limits
from tacit.runtime.net.engine import Engine
from tacit.runtime.net.flow import Flow, FlowChannel, Payload, budget, traffic
from tacit.runtime.net.frames import PLAN_BYTES, Fields, FrameError, Header, Phase
from tacit.runtime.net.handshake import Hello, dial
from tacit.runtime.net.link import Caller, Link
from tacit.runtime.net.seats import share_weights, warm_up
from tacit.runtime.net.store import Model
from tacit.runtime.net.wire import context
from tacit.runtime.prf import KEY_BYTES

Tensor = torch.Tensor
_PUSH = 1  # the number under which the weights travel


@dataclass
class _Offer:
    link: Link
    push: str
    plan: Plan
    seed: bytes
    flow: Flow


class Receiver:
    """One push at a time, from an owner's connection."""

    def __init__(self, engine: Engine, pinned: str, activate: Callable[[], None]) -> None:
        self._engine = engine
        self._pinned = pinned
        self._activate = activate
        self._offer: _Offer | None = None
        self._lock = threading.Lock()

    def room(self, link: Link, header: Header) -> tuple[Payload, Callable[[Payload], None]]:
        """Weights are announced: exactly those of the plan that was offered."""
        offer = self._offer
        if link.role != OWNER or offer is None or offer.link is not link or header.request != _PUSH:
            raise FrameError("data that nobody has asked for")
        payload = offer.flow.room(OWNER, header.phase, header.length)
        return payload, lambda content: offer.flow.put(OWNER, header.phase, header.depth, content)

    def answer(self, link: Link, what: str, fields: Fields) -> dict[str, Any]:
        return self._take_offer(link, fields) if what == "offer" else self._commit(link, fields)

    def _take_offer(self, link: Link, fields: Fields) -> dict[str, Any]:
        text = fields.text("plan", PLAN_BYTES)
        digest = text_digest(text)
        if self._pinned and digest != self._pinned:
            raise RefusedError(f"plan digest {digest[:16]}..., the deployment has {self._pinned[:16]}...")
        plan = read_plan(text, self._engine.limits)
        push = fields.hexadecimal("push", 16).hex()
        seed = fields.hexadecimal("seed", KEY_BYTES) if self._engine.rank == P0 else b""
        book = traffic(plan, 1, session=True, only=lambda op: op == "weight")
        seconds = self._engine.limits.session_seconds
        flow = Flow(_PUSH, 1, budget(book, self._engine.rank), time.monotonic() + seconds, seconds)
        with self._lock:
            if self._offer is not None and self._offer.link.open and self._offer.link is not link:
                raise RefusedError("another owner is pushing a model")
            self._offer = _Offer(link, push, plan, seed, flow)
        warm_up(plan, self._engine.rank)
        return {"plan": plan.digest}

    def _commit(self, link: Link, fields: Fields) -> dict[str, Any]:
        with self._lock:
            offer, self._offer = self._offer, None
        if offer is None or offer.link is not link or offer.push != fields.text("push", 64):
            raise RefusedError("no model was offered")
        engine, shares = self._engine, {}
        if engine.rank != P2:
            channel = FlowChannel(offer.flow, engine.rank, Phase.ONLINE, engine.send_to(offer.flow))
            shares = share_weights(offer.plan, engine.rank, channel, offer.seed)
        model = Model(offer.push, offer.plan, shares)
        engine.store.save_model(model)
        engine.model = model
        engine.log("model stored", plan=offer.plan.digest[:16])
        self._activate()
        return {"plan": offer.plan.digest}


def text_digest(text: str) -> str:
    """The digest of the plan with that text: known before anything of it is read."""
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()


def read_plan(text: str, limits: Limits) -> Plan:
    """A plan that came from elsewhere, verified and within the limits; raises ProtocolError, which names the line."""
    try:
        plan = Plan.parse(text).verify()
    except PlanError as error:
        where = f", line {error.line}" if error.line else ""
        raise ProtocolError(f"the plan is not valid{where}: {str(error).splitlines()[0]}") from None
    if plan.level is not Level.PROTOCOL:
        raise ProtocolError("the plan is not at the protocol level")
    _check_size(plan, limits)
    return plan


def _check_size(plan: Plan, limits: Limits) -> None:
    """What a plan asks for, before anything of it is allocated; raises ProtocolError."""
    for line, node in enumerate(plan.nodes, 2):
        elements = math.prod(dim_at(dim, 1) for dim in node.type.shape)
        if elements > limits.value_elements:
            raise ProtocolError(
                f"the plan, line {line}: %{node.name} has {elements} elements, "
                f"value_elements is {limits.value_elements}"
            )
    sent = {True: 0, False: 0}
    for line, row in enumerate(plan.cost(batch=1).per_op, 2):
        sent[row.session] += row.total_bytes
        if sent[row.session] > limits.batch_bytes:
            raise ProtocolError(
                f"the plan, line {line}: up to %{row.name} it sends {sent[row.session]} bytes, "
                f"batch_bytes is {limits.batch_bytes}"
            )


def push(deployment: Deployment, identity: Identity, plan: Plan, weights: Mapping[str, Tensor]) -> Meter:
    """The owner's side: share the weights with P0 and P1, the plan with all, and wait until it is served.

    Returns what was counted. Raises RefusedError with a party's reason, PartyError where one is not there.
    """
    if identity.member.role != OWNER:
        raise RefusedError(f"{identity.member.name} may not push a model: it is {ROLES[identity.member.role]}")
    tls, links = context(deployment, identity, server=False), dict[int, Link]()
    seconds, name, seed = deployment.limits.session_seconds, os.urandom(16).hex(), os.urandom(KEY_BYTES)
    handler = Caller()
    try:
        for rank in (P0, P1, P2):
            wire, peer = dial(deployment, tls, identity.member, rank, Hello("control"))
            links[rank] = Link(wire, peer, handler, deployment.limits, NETWORKS[deployment.network], dialled=True)
            links[rank].start()
        threading.Thread(target=handler.beat, args=(links, deployment.limits.heartbeat_seconds), daemon=True).start()
        text = str(plan)
        with ThreadPoolExecutor(3) as pool:
            offers = [
                pool.submit(
                    link.call, "offer", seconds, plan=text, push=name, **({"seed": seed.hex()} if rank == P0 else {})
                )
                for rank, link in links.items()
            ]
            for offer in offers:
                if offer.result().text("plan", 64) != plan.digest:
                    raise ProtocolError("a party read another plan than the one that was offered")
            flow = Flow(_PUSH, 1, {}, time.monotonic() + seconds, seconds)
            channel = FlowChannel(
                flow,
                OWNER,
                Phase.ONLINE,
                lambda to, phase, depth, message: links[to].send(_PUSH, phase, depth, message),
            )
            share_weights(plan, OWNER, channel, seed, weights)
            for commit in [pool.submit(links[rank].call, "commit", seconds, push=name) for rank in (P1, P2)]:
                commit.result()
            links[P0].call("commit", seconds, push=name)
        return channel.meter
    finally:
        handler.done.set()
        for link in links.values():
            link.close("done")
        for link in links.values():
            link.join(2.0)
