"""Mutants of the protocols: what is fresh is not, what is masked is not, what is uniform is not."""

from __future__ import annotations

from mutants.mutant import Change, Edit, Mutant, Rebind, Wrap

JOINT = ("tests/test_joint_view*.py", "tests/test_conditional_views.py")
LEAKAGE = ("tests/test_leakage.py",)
MASKS = ("tests/test_weight_masks.py",)
MEANING = ("tests/test_ops.py", "tests/test_rings.py")
STREAMS = ("tests/test_stream.py", "tests/test_protocols.py")
P2_VIEW = ("tests/test_joint_view_p2.py", "tests/test_leakage.py")


def blinding(what: str) -> tuple[Change, ...]:
    """What P0 and P1 draw alike for a comparison, changed by one statement on `m`."""
    source = f"""
        def mutant(plain, self, digits, n):
            m = plain(self, digits, n)
            if m:
                {what}
            return m
    """
    return (Wrap("runtime/party.py", "Party.common_blinding", source),)


def first_of(key: str, *, along: int) -> tuple[Change, ...]:
    """One value of `key` for all positions (0) or for all elements (last)."""
    return blinding(f'm["{key}"] = m["{key}"].narrow({along}, 0, 1).expand_as(m["{key}"]).contiguous()')


def material(path: str, kind: str, what: str) -> tuple[Change, ...]:
    """The material of a subprotocol, changed by one statement on `m`."""
    source = f"""
        def mutant(plain, self, party):
            m = plain(self, party)
            if party.rank != P2 and m:
                {what}
            return m
    """
    return (Wrap(path, f"{kind}.deal", source),)


def dealt_bits(path: str, kind: str, what: str) -> tuple[Change, ...]:
    """The bits rho that P2 draws in dealing: `bits(shape)` draws them, `r` is the mask that is compared."""
    source = f"""
        def mutant(plain, self, party):
            class Own:
                def __init__(self, bits):
                    self.plain = bits

                def bits(self, shape):
                    bits, r = self.plain, seen["r"]
                    return ({what}).contiguous()

            seen, mask, own = {{}}, party.mask, party.own

            def noted(kind, shape, **bits):
                seen[kind] = mask(kind, shape, **bits)
                return seen[kind]

            party.mask, party.own = noted, lambda: Own(own().bits)
            try:
                return plain(self, party)
            finally:
                del party.mask, party.own
    """
    return (Wrap(path, f"{kind}.deal", source),)


def masks(path: str, kind: str, of: str, what: str) -> tuple[Change, ...]:
    """The mask `of` a subprotocol: `mask` is what was drawn, `first` the first mask of this node."""
    source = f"""
        def mutant(plain, self, party):
            drawn, draw = [], party.mask

            def changed(kind, shape, **bits):
                mask = draw(kind, shape, **bits)
                drawn.append(mask)
                first = drawn[0]
                return ({what}).contiguous() if kind == "{of}" else mask

            party.mask = changed
            try:
                return plain(self, party)
            finally:
                del party.mask
    """
    return (Wrap(path, f"{kind}.deal", source),)


def shared_in_the_clear(role: str) -> tuple[Change, ...]:
    """P0's share of what a role outside brings is zero."""
    source = f"""
        def mutant(plain, self, party, material, *values):
            class Zero:
                def words(self, shape, dtype):
                    import torch

                    return torch.zeros(shape, dtype=dtype)

            if self.owner == {role} and party.rank in (P0, self.owner):
                party.prf = lambda peer: Zero()
            return (yield from plain(self, party, material, *values))
    """
    return (Wrap("ir/ops/roles.py", "Sharing.run", source),)


SELECT, SPLINE, TEXTBOOK = "ir/ops/comparison.py", "ir/ops/spline.py", "ir/ops/securenn.py"

COMPARING = (
    Mutant("no-refresh", "c at P2, which dealt both shares", blinding('m["z"].zero_()'), P2_VIEW),
    Mutant("constant-flip", "every carry at P2", blinding('m["beta"].zero_()'), P2_VIEW),
    Mutant("constant-shift", "the deciding digit at P2", blinding('m["shift"].zero_()'), P2_VIEW),
    Mutant("one-flip-for-a-tensor", "which carries are alike, at P2", first_of("beta", along=0), P2_VIEW),
    Mutant("one-shift-for-a-tensor", "which deciding digits are alike, at P2", first_of("shift", along=0), P2_VIEW),
    Mutant("one-refresh-for-all-positions", "differences of digits, at P2", first_of("z", along=0), P2_VIEW),
    Mutant("one-refresh-for-a-tensor", "differences of elements, at P2", first_of("z", along=1), P2_VIEW),
    Mutant("one-factor-for-all-positions", "ratios of digits, at P2", first_of("s", along=0), P2_VIEW),
    Mutant("one-factor-for-a-tensor", "ratios of elements, at P2", first_of("s", along=1), P2_VIEW),
    Mutant("factors-of-one", "the digits that differ, at P2", blinding('m["s"].fill_(1)'), P2_VIEW),
    Mutant(
        "flips-in-pairs",
        "which of two neighbours' carries are alike, at P2",
        blinding('m["beta"][1::2] = m["beta"][: 2 * (n // 2) : 2]'),
        P2_VIEW,
    ),
    Mutant(
        "factors-may-be-zero",
        "right answers, and places of zeros",
        (
            Wrap(
                "runtime/prf.py",
                "Stream.blinding",
                """
                def mutant(plain, self, p, shape):
                    s, z = plain(self, p, shape)
                    return s - 1, z
                """,
            ),
        ),
        (*P2_VIEW, "tests/test_protocols.py"),
    ),
    Mutant(
        "prime-too-small",
        "right answers, and that there is one zero at most",
        (
            Wrap(
                "ir/digits.py",
                "prime_for",
                """
                def mutant(plain, positions):
                    return plain(positions // 2)
                """,
            ),
        ),
        (*P2_VIEW, "tests/test_protocols.py"),
    ),
    Mutant(
        "biased-sampling",
        "uniformity modulo p",
        (
            Wrap(
                "runtime/prf.py",
                "_radix",
                """
                def mutant(plain, bounds):
                    return plain(bounds)[0], 65536
                """,
            ),
        ),
        ("tests/test_protocols.py", *LEAKAGE),
    ),
    Mutant(
        "knots-share-their-blinding",
        "how the knots' bits are related, at P2",
        material(
            SPLINE,
            "Piecewise",
            "m.update({f'{k} {i}': m[f'{k} 0'] for i in range(1, self.knots) for k in ('s', 'z', 'beta', 'shift')})",
        ),
        LEAKAGE + JOINT,
    ),
    Mutant(
        "knots-share-their-flip",
        "the segment, at P2",
        material(SPLINE, "Piecewise", "m.update({f'beta {i}': m['beta 0'] for i in range(1, self.knots)})"),
        LEAKAGE + JOINT,
    ),
)

ANSWERING = (
    Mutant("constant-rho", "every sign at P0 and P1", dealt_bits(SELECT, "Select", "bits(shape) * 0"), JOINT),
    Mutant(
        "one-rho-for-a-tensor",
        "every sign but one bit, at P0 and P1",
        dealt_bits(SELECT, "Select", "bits((1,)).expand(shape)"),
        JOINT,
    ),
    Mutant(
        "one-rho-for-a-row",
        "which signs of an element are alike, at P0 and P1",
        dealt_bits(SELECT, "Select", "bits((*shape[:-1], 1)).expand(shape)"),
        JOINT,
    ),
    Mutant(
        "rho-from-the-mask",
        "the sign of a known value's neighbour: rho is a function of r",
        dealt_bits(SELECT, "Select", "(r.reshape(shape) >> 3 & 1).to(bits(shape).dtype)"),
        JOINT,
    ),
    Mutant(
        "constant-rho-of-knots",
        "the segment, at P0 and P1",
        dealt_bits(SPLINE, "Piecewise", "bits(shape) * 0"),
        JOINT,
    ),
    Mutant(
        "one-rho-for-all-knots",
        "the segment, at P0 and P1",
        dealt_bits(SPLINE, "Piecewise", "bits((1, shape[1])).expand(shape)"),
        JOINT,
    ),
    Mutant(
        "two-knots-share-a-rho",
        "whether a value lies between them, at P0 and P1",
        dealt_bits(SPLINE, "Piecewise", "bits(shape)[[0, *range(shape[0] - 1)]]"),
        JOINT,
    ),
)

OPENING = (
    Mutant("inputs-in-the-clear", "inputs, at P1", shared_in_the_clear("CLIENT"), ("tests/test_conditional_views.py",)),
    Mutant("weights-in-the-clear", "weights, at P1", shared_in_the_clear("OWNER"), MASKS),
    Mutant(
        "rho-comes-back",
        "which signs of two inferences are alike, at P0 and P1",
        (
            Wrap(
                "runtime/party.py",
                "Party.own",
                """
                def mutant(plain, self):
                    if P2 not in self._opened:
                        place = self.sized.index | (_ONLINE if self.online else 0)
                        self._opened[P2] = self.streams.open(P2, 0, place)
                    return plain(self)
                """,
            ),
        ),
        ("tests/test_conditional_views.py", *LEAKAGE),
    ),
    Mutant(
        "lines-share-their-streams",
        "differences of values of two layers, at P0 and P1",
        (
            Wrap(
                "runtime/party.py",
                "Party.prf",
                """
                def mutant(plain, self, peer):
                    if peer <= P2 and peer not in self._opened:
                        self._opened[peer] = self.streams.open(peer, self.batch_id, _ONLINE if self.online else 0)
                    return plain(self, peer)
                """,
            ),
        ),
        ("tests/test_conditional_views.py", *LEAKAGE),
    ),
    Mutant(
        "payload-behind-the-mask-of-x",
        "the difference of the two, at P0 and P1",
        masks(SELECT, "Select", "payload r", "mask * 0 + first"),
        LEAKAGE + JOINT,
    ),
    Mutant(
        "one-mask-for-neighbours",
        "differences of neighbours, at P0 and P1",
        masks(SELECT, "Select", "r", "mask[..., [i // 2 * 2 for i in range(shape[-1])]]"),
        JOINT,
    ),
    Mutant(
        "one-mask-for-a-batch",
        "differences of inputs, at P0 and P1",
        masks("ir/ops/linear.py", "Triple", "triple a", "mask[:1].expand_as(mask)"),
        JOINT,
    ),
    Mutant(
        "even-masks",
        "the lowest bit of what is opened, at P0 and P1",
        masks(SELECT, "Truncate", "r", "mask & -2"),
        JOINT,
    ),
    Mutant(
        "streams-for-every-batch",
        "differences of two clients' inputs: masks come back in every inference",
        (
            Wrap(
                "runtime/prf.py",
                "Streams.open",
                """
                def mutant(plain, self, peer, batch, node):
                    return plain(self, peer, 0, node)
                """,
            ),
        ),
        (*MASKS, *LEAKAGE, *STREAMS),
    ),
    Mutant(
        "material-is-not-consumed",
        "differences of two inputs under the same masks, at P0 and P1",
        (
            Wrap(
                "runtime/session.py",
                "Session._material",
                """
                def mutant(plain, self, dealt):
                    import copy

                    return copy.deepcopy(dealt.material)
                """,
            ),
        ),
        LEAKAGE,
    ),
    Mutant(
        "one-stream-for-dealing-and-running",
        "inputs of the textbook suite, at P0",
        (Rebind("runtime/party.py", "_ONLINE", "0"),),
        LEAKAGE,
    ),
    Mutant(
        "one-mask-for-all-weights",
        "differences of weights, at P0 and P1",
        (
            Wrap(
                "runtime/party.py",
                "Party.prf",
                """
                def mutant(plain, self, peer):
                    if self.sized.node.op.name == "mask" and peer not in self._opened:
                        place = _ONLINE if self.online else 0
                        self._opened[peer] = self.streams.open(peer, self.batch_id, place)
                    return plain(self, peer)
                """,
            ),
        ),
        MASKS,
    ),
    Mutant(
        "one-mask-for-the-rows-of-a-weight",
        "differences of rows of a weight, at P0 and P1",
        masks("ir/ops/roles.py", "OpenMasked", "weight mask", "mask[:1].expand_as(mask)"),
        MASKS,
    ),
    Mutant(
        "unit-vector-in-the-clear",
        "the mask of an index, and the index with it, at P1",
        (
            Wrap(
                "runtime/party.py",
                "Party.share",
                """
                def mutant(plain, self, kind, shape, value, *, bits=RING_BITS):
                    if kind != "unit vector" or self.rank == P1:
                        return plain(self, kind, shape, value, bits=bits)
                    element = small_ring(bits)
                    self._note(kind, shape, element, DEALT)
                    share0 = torch.zeros(shape, dtype=self.ring.WORDS[element.word_bytes])
                    if self.rank == P0:
                        return share0
                    self.channel.send(P1, [self.ring.correction(value, share0)])
                """,
            ),
        ),
        ("tests/test_conditional_views.py", *LEAKAGE),
    ),
    Mutant(
        "answer-not-refreshed",
        "how the answer was computed, at the client",
        material("ir/ops/roles.py", "RevealTo", 'm["z"].zero_()'),
        LEAKAGE,
    ),
)

TEXTBOOK_SUITE = (
    Mutant(
        "converted-shares-not-refreshed",
        "that ShareConvert can be simulated alone",
        material(TEXTBOOK, "ShareConvert", 'm["refresh"].zero_()'),
        JOINT,
    ),
    Mutant(
        "top-bit-not-refreshed",
        "that ComputeMSB can be simulated alone",
        material(TEXTBOOK, "ComputeMSB", 'm["refresh"].zero_()'),
        JOINT,
    ),
    Mutant(
        "a-share-in-the-clear",
        "P0's share of the operand, at P2",
        material(TEXTBOOK, "ShareConvert", 'm["r0"].zero_()'),
        ("tests/test_conditional_views.py",),
    ),
    Mutant(
        "hidden-by-a-constant",
        "the operand, at P2",
        material(TEXTBOOK, "ShareConvert", 'm["r"].zero_()'),
        JOINT,
    ),
)

WINS, BY_WINS = "ir/ops/wins.py", ("tests/test_argmax.py",)
ARGMAX = (
    Mutant("wins-not-turned", "the answer, at P2", material(WINS, "Winner", 'm["turn"].zero_()'), BY_WINS),
    Mutant(
        "one-turn-for-a-batch",
        "which answers of a batch are alike, at P2",
        material(WINS, "Winner", 'm["turn"] = m["turn"][:1].expand_as(m["turn"]).contiguous()'),
        BY_WINS,
    ),
    Mutant(
        "wins-not-refreshed",
        "the order of the logits, at P2, which dealt both shares of every rho",
        material(WINS, "Winner", 'm["z"].zero_()'),
        BY_WINS,
    ),
    Mutant(
        "wins-not-multiplied", "how many each class beats, at P2", material(WINS, "Winner", 'm["s"].fill_(1)'), BY_WINS
    ),
    Mutant(
        "one-factor-for-the-wins-of-a-row",
        "the order of the logits, at P2",
        material(WINS, "Winner", 'm["s"] = m["s"][:1].expand_as(m["s"]).contiguous()'),
        BY_WINS,
    ),
    Mutant(
        "comparisons-of-wins-drop-low-bits",
        "circles of nearly equal logits, at P2",
        (
            Edit(
                WINS,
                "ArgmaxByWins.parts",
                "Select((pairs, n), self.window, relu=False",
                "Select((pairs, n), self.window, min(6, self.window - 5), relu=False",
            ),
        ),
        (*BY_WINS, *MEANING),
    ),
    Mutant(
        "logits-compared-as-they-are",
        "whether logits left their range, at P2: classes that beat one another in a circle",
        (
            Edit(
                WINS,
                "ArgmaxByWins.run",
                "party.ring.pair_differences(comparable)",
                "party.ring.pair_differences(x if x.dtype == comparable.dtype else comparable)",
            ),
        ),
        BY_WINS,
    ),
    Mutant(
        "a-window-for-logits-in-range-alone",
        "whether logits left their range, at P2",
        (
            Edit(
                WINS,
                "ArgmaxByWins.parts",
                "Select((pairs, n), self.window, relu=False",
                "Select((pairs, n), self.window - 2, relu=False",
            ),
        ),
        BY_WINS,
    ),
)

MUTANTS = COMPARING + ANSWERING + OPENING + TEXTBOOK_SUITE + ARGMAX
