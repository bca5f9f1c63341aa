"""Mutants of the networked parties: what is on disk, who is believed, what is let in."""

from __future__ import annotations

import textwrap

from mutants.mutant import Edit, Mutant, Wrap

FILES, REFUSALS, PRIVACY, PARTIES = (
    f"tests/test_net_{name}.py" for name in ("files", "refusals", "privacy", "parties")
)
NET = "runtime/net"


def instead(source: str) -> str:
    """The mutation, with `Instead(object, name=value)`: the object with some of its attributes replaced."""
    text = textwrap.dedent(source)
    head, body = text.strip().split("\n", 1)
    return f"{head}\n{textwrap.indent(_INSTEAD.strip(), '    ')}\n\n{body}"


_INSTEAD = """
class Instead:
    def __init__(self, plain, **instead):
        self.__dict__.update(instead, _plain=plain)

    def __getattr__(self, name):
        return getattr(self._plain, name)
"""


def wrapped(file: str, function: str, source: str) -> tuple[Wrap, ...]:
    return (Wrap(f"{NET}/{file}", function, source),)


DISK = (
    Mutant(
        "ledger-not-synced",
        "a batch used before a power cut may be used again",
        (Edit(f"{NET}/ledger.py", "Ledger._write", "os.fdatasync(self._file)", "pass"),),
        (FILES,),
    ),
    Mutant(
        "ledger-after-use",
        "a batch whose request died half-way may be used again",
        wrapped(
            "engine.py",
            "Engine._run_in",
            instead(
                """
                def mutant(plain, self, session, job, flow):
                    late = []
                    ledger = Instead(self.store.ledger, consume=lambda *line: late.append(line))
                    try:
                        plain(Instead(self, store=Instead(self.store, ledger=ledger)), session, job, flow)
                    finally:
                        for line in late:
                            self.store.ledger.consume(*line)
                    if not late:  # the ledger is written elsewhere by now
                        mark("stale")
                """
            ),
        ),
        ("tests/test_net_once.py", "tests/test_net_failures.py"),
    ),
    Mutant(
        "ledger-not-read",
        "after a restart, every batch may be used again",
        wrapped(
            "ledger.py",
            "Ledger._load",
            """
            def mutant(plain, self):
                self._end = self._length = 0
            """,
        ),
        (FILES,),
    ),
    Mutant(
        "ids-not-reserved",
        "after a restart, P0 gives out ids again that it had given out",
        wrapped(
            "store.py",
            "Store.reserve",
            """
            def mutant(plain, self, beyond):
                return beyond + _RESERVE
            """,
        ),
        (
            FILES,
            PARTIES,
        ),
    ),
    Mutant(
        "resume-ignores-the-ledger",
        "requests: P1 and P2 offer batches that they refuse later",
        wrapped(
            "resuming.py",
            "resume_answer",
            instead(
                """
                def mutant(plain, engine, fields):
                    asked = []

                    class Forgetful:
                        def __init__(self, nonce):
                            asked.append(nonce)
                            self._used = plain_ledger.used(nonce)
                            self.highest = self._used.highest

                        def __contains__(self, batch_id):
                            return False

                        def __len__(self):
                            return len(self._used)

                    plain_ledger = engine.store.ledger
                    ledger = Instead(plain_ledger, used=Forgetful)
                    answer = plain(Instead(engine, store=Instead(engine.store, ledger=ledger)), fields)
                    if not asked:  # it is asked elsewhere by now
                        mark("stale")
                    return answer
                """
            ),
        ),
        ("tests/test_net_restore.py",),
    ),
    Mutant(
        "folders-not-synced",
        "after a power cut a file's name may be gone: the ledger, a reservation, a session",
        (
            Wrap(
                "ir/files.py",
                "sync_folder",
                """
            def mutant(plain, folder):
                pass
            """,
            ),
        ),
        ("tests/test_net_state.py",),
    ),
    Mutant(
        "files-for-everybody-to-read",
        "shares and keys, to all on the host",
        (
            *wrapped(
                "files.py",
                "write_file",
                """
                def mutant(plain, path, raw):
                    plain(path, raw)
                    path.chmod(0o644)
                """,
            ),
            *wrapped(
                "store.py",
                "Store.__init__",
                """
                def mutant(plain, self, folder):
                    plain(self, folder)
                    folder.chmod(0o755)
                """,
            ),
            *wrapped(
                "ledger.py",
                "Ledger.__init__",
                """
                def mutant(plain, self, path):
                    plain(self, path)
                    path.chmod(0o644)
                """,
            ),
        ),
        (FILES,),
    ),
    Mutant(
        "damaged-material-is-used",
        "wrong answers",
        wrapped(
            "store.py",
            "_unpack",
            """
            def mutant(plain, raw, batch_id):
                return plain(hashlib.sha256(raw[32:]).digest() + raw[32:], batch_id)
            """,
        ),
        (FILES,),
    ),
)

ADMISSION = (
    Mutant(
        "any-role-is-believed",
        "a client may speak as a party",
        wrapped(
            "handshake.py",
            "_check",
            """
            def mutant(plain, fields, member, me, mine):
                import dataclasses

                role = fields.text("role", 16)
                believed = ROLES.index(role) if role in ROLES else member.role
                return plain(fields, dataclasses.replace(member, role=believed), me, mine)
            """,
        ),
        (REFUSALS,),
    ),
    Mutant(
        "every-purpose-is-permitted",
        "a client may push weights or open the link of a party",
        wrapped(
            "handshake.py",
            "permitted",
            """
            def mutant(plain, me, member, purpose):
                return ""
            """,
        ),
        (REFUSALS,),
    ),
    Mutant(
        "caller-believes-any-pinned-certificate",
        "a client may answer as P1",
        (Edit(f"{NET}/handshake.py", "dial", "found is None or found.role != rank", "found is None"),),
        (REFUSALS,),
    ),
    Mutant(
        "tls-sessions-may-be-resumed",
        "a connection that does not prove its key anew",
        wrapped(
            "wire.py",
            "context",
            """
            def mutant(plain, deployment, identity, *, server):
                made = plain(deployment, identity, server=server)
                if server:
                    made.num_tickets = 2
                return made
            """,
        ),
        (REFUSALS,),
    ),
    Mutant(
        "tls-1-2-is-accepted",
        "certificates in the clear",
        wrapped(
            "wire.py",
            "context",
            """
            def mutant(plain, deployment, identity, *, server):
                made = plain(deployment, identity, server=server)
                made.minimum_version = ssl.TLSVersion.TLSv1_2
                return made
            """,
        ),
        (REFUSALS,),
    ),
)

COMPRESSION = Mutant(
    "compression-not-refused",
    "what is equal in secret and known text, by its length",
    (Edit(f"{NET}/wire.py", "context", "made.options |= ssl.OP_NO_COMPRESSION", "pass"),),
    proof="TLS 1.3 compresses nothing (RFC 8446, section 4.1.2), and nothing older is spoken",
)

SESSIONS = (
    Mutant(
        "pair-keys-ignore-the-nonce",
        "that a session has keys of its own",
        wrapped(
            "opening.py",
            "agree",
            """
            def mutant(plain, low, high, low_part, high_part, nonce, model):
                return plain(low, high, low_part, high_part, "00" * 16, model)
            """,
        ),
        (PRIVACY,),
    ),
    Mutant(
        "pair-keys-ignore-one-side",
        "that either side's randomness is enough",
        wrapped(
            "opening.py",
            "agree",
            """
            def mutant(plain, low, high, low_part, high_part, nonce, model):
                return plain(low, high, low_part, low_part, nonce, model)
            """,
        ),
        (PRIVACY,),
    ),
    Mutant(
        "pair-keys-survive-a-push",
        "differences of the old and the new weights: one mask hides both",
        wrapped(
            "opening.py",
            "agree",
            """
            def mutant(plain, low, high, low_part, high_part, nonce, model):
                return bytes([low, high] * (KEY_BYTES // 2))
            """,
        ),
        (PRIVACY,),
    ),
)

TRAFFIC = (
    Mutant(
        "serials-unchecked",
        "that a frame is taken once, and in its order",
        wrapped(
            "frames.py",
            "Header.parse",
            """
            def mutant(plain, raw, serial, role):
                return plain(raw, HEADER.unpack(raw)[3], role)
            """,
        ),
        (REFUSALS,),
    ),
    Mutant(
        "data-beyond-the-plan",
        "memory, to whoever sends",
        wrapped(
            "flow.py",
            "Flow.room",
            """
            def mutant(plain, self, source, phase, size):
                self._left[phase, source] = max(size, self._left.get((phase, source), 0))
                return plain(self, source, phase, size)
            """,
        ),
        (
            REFUSALS,
            "tests/test_net_flow.py",
        ),
    ),
    Mutant(
        "p2-is-told-the-client",
        "who asks, at P2",
        (
            Edit(
                f"{NET}/coordinator.py",
                "Coordinator._start",
                "self._tell_start(P2, job, seconds=self._limits.request_seconds)",
                "self._tell_start(P2, job, seconds=left, client=visit.client, number=visit.number)",
            ),
        ),
        ("tests/test_net_asker.py",),
    ),
    Mutant(
        "visits-by-number-alone",
        "a client's answer, to another that drew the same number",
        wrapped(
            "lobby.py",
            "Lobby.__init__",
            """
            def mutant(plain, self, limits):
                class ByNumber(dict):
                    def __contains__(self, key):
                        return super().__contains__(key[1])

                    def __getitem__(self, key):
                        return super().__getitem__(key[1])

                    def __setitem__(self, key, value):
                        super().__setitem__(key[1], value)

                    def get(self, key, default=None):
                        return super().get(key[1], default)

                    def pop(self, key, *default):
                        return super().pop(key[1], *default)

                plain(self, limits)
                self._visits = ByNumber()
            """,
        ),
        ("tests/test_net_asker.py",),
    ),
)

MUTANTS = (*DISK, *ADMISSION, COMPRESSION, *SESSIONS, *TRAFFIC)
