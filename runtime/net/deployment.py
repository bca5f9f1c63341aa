"""deployment.toml: who takes part, where they listen, which certificates they show, and what is allowed.

The file is public and the same on every host. A role is played by whoever holds the key of a certificate that is pinned
here under that role: P0, P1 and P2 have one each, clients and owners may be several.
"""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from tacit.ir.cost import ROLES
from tacit.ir.errors import DeploymentError, RefusedError
from tacit.runtime.channel import NETWORKS

DEPLOYMENT_FILE, CERTIFICATE_FILE, KEY_FILE = "deployment.toml", "cert.pem", "key.pem"
FORMAT = 1
_PARTIES = 3


@dataclass(frozen=True)
class Limits:
    """What a party grants others. Times in seconds, rates in bytes per second; `requests_per_minute` 0: unlimited."""

    batch: int = 1024  # elements of one request
    in_flight: int = 4  # requests computed side by side
    queue: int = 64  # requests of all clients that wait
    per_client: int = 16  # requests of one client, waiting or computed
    client_bytes: int = 1 << 31  # of shares that P1 holds for one client
    requests_per_minute: int = 0  # of one client
    connections: int = 256
    per_member: int = 32  # connections of one member
    request_seconds: float = 30.0
    handshake_seconds: float = 5.0
    frame_seconds: float = 10.0  # for a frame to arrive once it has begun, beside its size over the least rate
    least_rate: float = 100_000.0
    heartbeat_seconds: float = 2.0
    silence_seconds: float = 10.0
    value_elements: int = 1 << 28  # of one value of a plan, for a batch of one: vgg19 has a weight of 2^27
    batch_bytes: int = 1 << 36  # that a plan may send for a batch of one, and as much once for the session
    session_seconds: float = 120.0  # to open a session, or to push a model
    drain_seconds: float = 30.0

    @property
    def longest(self) -> float:
        """The longest that anything may take."""
        return max(self.request_seconds, self.session_seconds)


@dataclass(frozen=True)
class StoreSettings:
    """Material dealt ahead: below `low_water` the store of a batch size is filled to `target` in the background.

    `batches` are the sizes kept from the start; others are kept once they were asked for, `sizes` at most.
    `capacity_bytes` bounds what lies on disk at one party.
    """

    low_water: int = 4
    target: int = 8
    sizes: int = 4
    batches: tuple[int, ...] = ()
    capacity_bytes: int = 1 << 30


@dataclass(frozen=True)
class Member:
    """One pinned identity. Parties have an address; `listen` and `metrics` say where they bind, if not there."""

    name: str
    role: int
    sha256: str
    address: tuple[str, int] | None = None
    listen: tuple[str, int] | None = None
    metrics: tuple[str, int] | None = None


@dataclass(frozen=True)
class Deployment:
    """What all participants agree on beforehand."""

    members: tuple[Member, ...]
    authority: str  # the certificate, in PEM, that signed all others
    limits: Limits = field(default_factory=Limits)
    store: StoreSettings = field(default_factory=StoreSettings)
    network: str = "virtual"  # an emulated network between the processes: one of NETWORKS
    plan: str = ""  # the digest of the only plan that may be pushed; empty: any that the owner pushes

    def party(self, rank: int) -> Member:
        return next(m for m in self.members if m.role == rank)

    def pinned(self, sha256: str) -> Member | None:
        """Who shows the certificate with that fingerprint."""
        return next((m for m in self.members if m.sha256 == sha256), None)

    def text(self) -> str:
        """The file; `Deployment.parse` reads it back."""
        rows = [f"format = {FORMAT}", f"network = {json.dumps(self.network)}", f"plan = {json.dumps(self.plan)}"]
        rows += ["# The certificate that signed those of all members.", f'authority = """\n{self.authority}"""']
        for name, table in (("limits", self.limits), ("store", self.store)):
            rows += ["", f"[{name}]", *(f"{f.name} = {_value(getattr(table, f.name))}" for f in fields(table))]
        for member in self.members:
            rows += ["", "[[member]]", f"name = {json.dumps(member.name)}", f'role = "{ROLES[member.role]}"']
            rows += [f'sha256 = "{member.sha256}"']
            for key in ("address", "listen", "metrics"):
                if (place := getattr(member, key)) is not None:
                    rows.append(f"{key} = {json.dumps(place_text(place))}")
        return "\n".join(rows) + "\n"

    @staticmethod
    def parse(text: str) -> Deployment:
        """Raises DeploymentError, naming what is wrong."""
        try:
            table = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise DeploymentError(f"{DEPLOYMENT_FILE} is not TOML: {error}") from None
        if table.pop("format", None) != FORMAT:
            raise DeploymentError(f"{DEPLOYMENT_FILE} does not have format = {FORMAT}")
        members = _take(table, "member", list)
        found = Deployment(
            tuple(_member(m) for m in members),
            _take(table, "authority", str),
            _settings(Limits, _take(table, "limits", dict)),
            _settings(StoreSettings, _take(table, "store", dict)),
            _take(table, "network", str),
            _take(table, "plan", str),
        )
        if table:
            raise DeploymentError(f"{DEPLOYMENT_FILE} has unknown entries: {', '.join(sorted(table))}")
        return found._checked()

    def _checked(self) -> Deployment:
        if self.network not in NETWORKS:
            raise DeploymentError(f"network has to be one of {', '.join(NETWORKS)}, not '{self.network}'")
        for rank in range(_PARTIES):
            found = [m for m in self.members if m.role == rank]
            if len(found) != 1 or found[0].address is None:
                raise DeploymentError(f"{DEPLOYMENT_FILE} needs exactly one member {ROLES[rank]}, with an address")
        for key in ("name", "sha256"):
            values = [getattr(m, key) for m in self.members]
            if len(set(values)) != len(values):
                raise DeploymentError(f"{DEPLOYMENT_FILE}: two members have the same {key}")
        return self


@dataclass(frozen=True)
class Identity:
    """A folder with cert.pem and key.pem, and the member that they belong to."""

    folder: Path
    member: Member

    @property
    def certificate(self) -> Path:
        return self.folder / CERTIFICATE_FILE

    @property
    def key(self) -> Path:
        return self.folder / KEY_FILE


def check_batch(batch: int, limits: Limits) -> None:
    """Raises RefusedError for a batch that is larger than allowed."""
    if batch > limits.batch:
        raise RefusedError(f"a batch of {batch} is more than the {limits.batch} allowed")


def load_deployment(path: str | os.PathLike[str]) -> Deployment:
    """Raises DeploymentError."""
    try:
        return Deployment.parse(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise DeploymentError(f"{path} cannot be read: {getattr(error, 'strerror', None) or 'not text'}") from None


def load_identity(deployment: Deployment, folder: str | os.PathLike[str]) -> Identity:
    """The identity in a folder; raises DeploymentError unless its certificate is pinned and its key private."""
    from tacit.runtime.net.certificates import fingerprint

    place = Path(folder)
    for name in (CERTIFICATE_FILE, KEY_FILE):
        if not (place / name).is_file():
            raise DeploymentError(f"{place / name} does not exist; `tacit deploy init` makes identities for trying out")
    mode = (place / KEY_FILE).stat().st_mode & 0o777
    if mode & 0o077:
        raise DeploymentError(f"{place / KEY_FILE} has mode {mode:04o}: a key is for its owner alone (chmod 600)")
    member = deployment.pinned(fingerprint((place / CERTIFICATE_FILE).read_bytes()))
    if member is None:
        raise DeploymentError(f"{place / CERTIFICATE_FILE} is not pinned in the deployment")
    return Identity(place, member)


def place_text(place: tuple[str, int]) -> str:
    host, port = place
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def parse_place(text: str) -> tuple[str, int]:
    """host:port, or [IPv6]:port; raises DeploymentError."""
    found = re.fullmatch(r"(?:\[([0-9a-fA-F:.]+)\]|([^\s:\[\]]+)):(\d{1,5})", text)
    if not found or int(found.group(3)) > 65535:
        raise DeploymentError(f"'{text}' is not an address, as in 192.0.2.7:7600 or [2001:db8::7]:7600")
    return found.group(1) or found.group(2), int(found.group(3))


_T = TypeVar("_T")


def _value(value: Any) -> str:
    return json.dumps(list(value) if isinstance(value, tuple) else value)


def _take(table: dict[str, Any], key: str, kind: type[_T]) -> _T:
    value = table.pop(key, None)
    if not isinstance(value, kind):
        raise DeploymentError(f"{DEPLOYMENT_FILE}: '{key}' is missing or not a {kind.__name__}")
    return value


def _member(table: Mapping[str, Any]) -> Member:
    rest = dict(table) if isinstance(table, dict) else {}
    name, role, sha256 = (_take(rest, key, str) for key in ("name", "role", "sha256"))
    if role not in ROLES:
        raise DeploymentError(f"member '{name}': role has to be one of {', '.join(ROLES)}, not '{role}'")
    if not re.fullmatch(r"[0-9a-f]{64}", sha256):
        raise DeploymentError(f"member '{name}': sha256 has to be 64 hexadecimal digits")
    places = {k: parse_place(_take(rest, k, str)) for k in ("address", "listen", "metrics") if k in rest}
    if rest:
        raise DeploymentError(f"member '{name}' has unknown entries: {', '.join(sorted(rest))}")
    return Member(name, ROLES.index(role), sha256, **places)


def _settings(kind: type[_T], table: Mapping[str, Any]) -> _T:
    known = {f.name: f for f in fields(kind)}  # type: ignore[arg-type]
    out: dict[str, Any] = {}
    for key, value in table.items():
        if key not in known:
            raise DeploymentError(f"{DEPLOYMENT_FILE}: unknown limit '{key}'; known: {', '.join(known)}")
        default: Any = known[key].default
        if isinstance(default, tuple):
            if not isinstance(value, list) or not all(type(v) is int and v > 0 for v in value):
                raise DeploymentError(f"{DEPLOYMENT_FILE}: '{key}' has to be a list of positive whole numbers")
            out[key] = tuple(value)
            continue
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or value < 0 or (isinstance(default, int) and not isinstance(value, int)):
            raise DeploymentError(f"{DEPLOYMENT_FILE}: '{key}' has to be a number like {default}, not {value!r}")
        out[key] = type(default)(value)
    return kind(**out)
