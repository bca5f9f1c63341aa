"""Certificates for trying out: a private authority and one certificate per member, with ECDSA keys on P-256."""

from __future__ import annotations

import datetime
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from tacit.ir.cost import CLIENT, OWNER, ROLES
from tacit.ir.errors import DeploymentError
from tacit.ir.files import write_whole
from tacit.runtime.net.deployment import CERTIFICATE_FILE, DEPLOYMENT_FILE, KEY_FILE, Deployment, Limits, Member

Key = ec.EllipticCurvePrivateKey
_DAY = datetime.timedelta(days=1)
DAYS = 365


def init_deployment(
    folder: str | os.PathLike[str],
    addresses: Sequence[tuple[str, int]],
    *,
    metrics: Sequence[tuple[str, int] | None] = (None, None, None),
    listen: Sequence[tuple[str, int] | None] = (None, None, None),
    clients: int = 1,
    limits: Limits | None = None,
    network: str = "virtual",
    plan: str = "",
) -> Deployment:
    """Write deployment.toml and a folder with cert.pem and key.pem for each member; raises DeploymentError.

    The authority's key signs these certificates and is forgotten: nobody can add a member later without a new
    deployment. Folders have mode 0700, keys 0600. Where it fails, nothing of it stays.
    """
    target = Path(folder)
    if (target / DEPLOYMENT_FILE).exists():
        raise DeploymentError(f"{target / DEPLOYMENT_FILE} exists already; choose another folder or remove it")
    roles: dict[str, int] = {role: rank for rank, role in enumerate(ROLES)}
    roles |= {f"client{i}": CLIENT for i in range(2, clients + 1)}
    authority_key = ec.generate_private_key(ec.SECP256R1())
    authority = _authority(authority_key)
    identities, members = {}, []
    for name, role in roles.items():
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = issue(name, key, authority, authority_key)
        identities[target / name] = certificate, key
        places: Mapping[str, tuple[str, int] | None] = (
            {}
            if role in (CLIENT, OWNER)
            else {"address": addresses[role], "listen": listen[role], "metrics": metrics[role]}
        )
        members.append(Member(name, role, certificate.fingerprint(hashes.SHA256()).hex(), **places))
    pem = authority.public_bytes(serialization.Encoding.PEM).decode()
    text = Deployment(tuple(members), pem, limits or Limits(), network=network, plan=plan).text()
    made = Deployment.parse(text)
    with ExitStack() as undo:
        target.mkdir(parents=True, exist_ok=True)
        for place, identity in identities.items():
            if not place.exists():
                undo.callback(shutil.rmtree, place, ignore_errors=True)
            write_identity(place, *identity)
        write_whole(target / DEPLOYMENT_FILE, text.encode())
        undo.pop_all()
    return made


def _authority(key: Key) -> x509.Certificate:
    name = _name("Tacit deployment authority")
    usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
    return (
        _builder(name, name, key, DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )


def issue(
    name: str, key: Key, authority: x509.Certificate, authority_key: Key, *, days: float = DAYS
) -> x509.Certificate:
    """A certificate for both ends of TLS; a negative number of days makes one that has expired."""
    purposes = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    usage = x509.KeyUsage(True, False, False, False, False, False, False, False, False)
    issuer_key = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key())
    return (
        _builder(_name(name), authority.subject, key, days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(issuer_key, critical=False)
        .sign(authority_key, hashes.SHA256())
    )


def _builder(subject: x509.Name, issuer: x509.Name, key: Key, days: float) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    begin = now - _DAY if days > 0 else now + days * _DAY - _DAY
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(now + days * _DAY)
    )


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def write_identity(folder: Path, certificate: x509.Certificate, key: Key) -> None:
    folder.mkdir(mode=0o700, exist_ok=True)
    folder.chmod(0o700)
    write_whole(folder / CERTIFICATE_FILE, certificate.public_bytes(serialization.Encoding.PEM))
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    write_whole(folder / KEY_FILE, pem, private=True)


def fingerprint(pem: bytes) -> str:
    """SHA-256 of a certificate; raises DeploymentError where it is none."""
    try:
        return x509.load_pem_x509_certificate(pem).fingerprint(hashes.SHA256()).hex()
    except ValueError:
        raise DeploymentError(f"{CERTIFICATE_FILE} does not hold a certificate in PEM") from None
