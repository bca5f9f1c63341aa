"""What a networked participant hands the executor for each line: keys, types, operands, material."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from tacit.ir.cost import CLIENT, OWNER, P0, P1, P2
from tacit.ir.op import Material
from tacit.ir.ops.roles import Input, Weight
from tacit.ir.plan import Node, Plan
from tacit.runtime.channel import Channel
from tacit.runtime.net.flow import Blank, FlowChannel
from tacit.runtime.party import Party, Seat, Values, deal, execute
from tacit.runtime.prf import KEY_BYTES, Streams

Tensor = torch.Tensor
Dealt = dict[str, list[Material]]
_WARM_BATCHES = (1, 9)  # few rows and many take different kernels


class Seats:
    """One participant's view of a plan within a session. `shared` holds the session's values by line."""

    def __init__(self, plan: Plan, rank: int, keys: Mapping[int, bytes], shared: Values) -> None:
        self.plan = plan
        self.rank = rank
        self.keys = keys
        self._streams = Streams(keys)
        self.shared = shared

    def seat(
        self,
        channel: Channel,
        batch_id: int,
        batch: int,
        *,
        material: Mapping[str, list[Material]] | None = None,
        brought: Mapping[str, Tensor] | None = None,
        outside: bytes | None = None,
    ) -> Seat:
        """`brought`: the inputs or weights of a role outside, by label. `outside`: the key it shares with P0.

        That key is fresh for each request and each push, so its streams are those of batch 0 on both sides.
        """

        sized = self.plan.at(batch)

        def found(node: Node) -> Party:
            streams, of_batch = self._streams, batch_id
            if isinstance(node.op, (Input, Weight)) and outside is not None:
                role = CLIENT if isinstance(node.op, Input) else OWNER
                streams, of_batch = Streams({role if self.rank == P0 else P0: outside}), 0
            party = Party(self.rank, channel, streams, sized[node.name], of_batch, self.shared)
            if material is not None:
                party.material = material.get(node.name, [])
            if brought is not None and isinstance(node.op, (Input, Weight)):
                party.value = brought.get(node.op.label)
            return party

        return found

    def deal(self, channel: Channel, batch_id: int, batch: int) -> Dealt:
        """Offline: the material of one batch."""
        material: Dealt = {}
        nodes = [n for n in self.plan.nodes if not n.op.session]
        deal(nodes, self.seat(channel, batch_id, batch), material)
        return material


def weight_lines(plan: Plan) -> set[str]:
    return {n.name for n in plan.find(Weight)}


def share_weights(
    plan: Plan, rank: int, channel: Channel, seed: bytes, weights: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The lines `weight` of the session, at P0, P1 or the owner: shares by label at the parties."""
    lines = weight_lines(plan)
    values: Values = {}
    seats, material = Seats(plan, rank, {}, {}), Dealt()
    deal(plan.find(Weight), seats.seat(channel, 0, 1), material)  # nothing, in the form that the executor expects
    seat = seats.seat(channel, 0, 1, material=material, brought=weights, outside=seed)
    execute(plan, plan.session_schedule.part(lines), channel, seat, values)
    return {plan.node(name).op.label: share for name, share in values.items() if share is not None}  # type: ignore[attr-defined]


def open_masks(
    plan: Plan, rank: int, channel: Channel, offline: Channel, keys: Mapping[int, bytes], shares: Mapping[str, Tensor]
) -> Values:
    """The rest of the session's lines, given shares of the weights: their masks are opened to P0 and P1."""
    values = weight_values(plan, shares)
    seats = Seats(plan, rank, keys, values)
    material: Dealt = {}
    deal([n for n in plan.nodes if n.op.session], seats.seat(offline, 0, 1), material)
    if isinstance(offline, FlowChannel):
        offline.flush()
    lines = weight_lines(plan)
    execute(
        plan,
        plan.session_schedule.part(plan.session_schedule.start.keys() - lines),
        channel,
        seats.seat(channel, 0, 1, material=material),
        values,
    )
    return values


def weight_values(plan: Plan, shares: Mapping[str, Tensor]) -> Values:
    """The shares by line, in the layout that products want."""
    from tacit.runtime.ring import column_major

    return {
        n.name: column_major(shares[n.op.label])  # type: ignore[attr-defined]
        for n in plan.find(Weight)
        if n.op.label in shares  # type: ignore[attr-defined]
    }


def warm_up(plan: Plan, rank: int) -> None:
    """Run a party's program on zeros, alone: its kernels are compiled before a request waits for them."""
    if rank not in (P0, P1, P2):
        return
    keys = {peer: bytes(KEY_BYTES) for peer in range(5)}
    blank = Blank(rank)
    shares = share_weights(plan, rank, blank, bytes(KEY_BYTES)) if rank != P2 else {}
    values = open_masks(plan, rank, blank, blank, keys, shares)
    seats = Seats(plan, rank, keys, values)
    for batch in _WARM_BATCHES:
        material = seats.deal(blank, 1, batch)
        seat = seats.seat(blank, 1, batch, material=material, outside=bytes(KEY_BYTES))
        execute(plan, plan.schedule, blank, seat, dict(values), keep=False)
