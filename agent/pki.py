"""Who belongs to a fleet: a small certificate authority, and the TLS contexts made from it.

A node is reached by addresses that change, so a certificate says nothing of them. It names the node, its id
and its role, and belonging means to hold one that the fleet's authority has signed. Both ends of a connection
are verified, under TLS 1.3 alone; what a role allows the application decides after the handshake.

Files in ``DIR/fleet``, a directory of mode 0700: ``ca.pem``, ``identity.pem``, ``identity.key``, and, only
where the fleet was founded, ``ca.key``. Nothing is revoked: whoever shall leave, the fleet is founded
anew without it.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from agent import state
from agent.membership import CA as CA
from agent.membership import CA_KEY as CA_KEY
from agent.membership import CERTIFICATE as CERTIFICATE
from agent.membership import KEY as KEY
from agent.membership import REMEDY, as_identity, is_member, is_there, read
from agent.membership import ROLES as ROLES
from agent.membership import Identity as Identity
from agent.membership import PkiError as PkiError
from agent.membership import Role as Role
from agent.membership import client_context as client_context
from agent.membership import fleet_dir as fleet_dir
from agent.membership import peer as peer
from agent.membership import server_context as server_context

VALID_FOR = timedelta(days=3650)
# A member whose clock is behind must still find its new certificate valid.
CLOCKS_DIFFER_BY = timedelta(days=1)

# RFC 5280, A.1: ub-common-name.
NAME_LENGTH = 64


def founded_here(directory: Path) -> bool:
    """Whether the fleet's authority, which signs certificates, is in ``directory``; raises PkiError."""
    return is_there(fleet_dir(directory) / CA_KEY)


def create_ca(directory: Path, name: str) -> None:
    """Found a fleet: make its authority. Raises PkiError where ``directory`` belongs to a fleet already."""
    folder = fleet_dir(directory)
    for each in (CA, CA_KEY, CERTIFICATE):
        if is_there(folder / each):
            raise PkiError(f"there is a fleet in {folder} already; remove that directory to found another")
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, _name(f"SOLLOL fleet of {name}"))])
    certificate = (
        _builder(subject, subject, key.public_key(), datetime.now(UTC) + VALID_FOR)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(key_cert_sign=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    state.write_private(folder / CA_KEY, _pem(key))
    state.write_private(folder / CA, certificate.public_bytes(serialization.Encoding.PEM))


def new_request(name: str, node_id: str) -> tuple[bytes, bytes]:
    """Return a new private key and a request to certify it, both PEM. The key stays where it was made."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = [
        x509.NameAttribute(NameOID.COMMON_NAME, _name(name)),
        x509.NameAttribute(NameOID.SERIAL_NUMBER, node_id),
    ]
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name(subject))
    return _pem(key), request.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def check_request(request: bytes) -> x509.CertificateSigningRequest:
    """Parse a request and check that who made it holds its key; raises PkiError."""
    try:
        parsed = x509.load_pem_x509_csr(request)
        sound = parsed.is_signature_valid
    except (ValueError, InvalidSignature, TypeError) as error:
        raise PkiError("the certificate request cannot be read") from error
    if not sound or not isinstance(parsed.public_key(), ec.EllipticCurvePublicKey):
        raise PkiError("the certificate request is not signed by its own EC key")
    _one(parsed.subject, NameOID.COMMON_NAME)
    _one(parsed.subject, NameOID.SERIAL_NUMBER)
    return parsed


def issue(directory: Path, request: bytes, role: Role) -> bytes:
    """Certify ``request`` with ``role``, which is the issuer's to give; PEM. Raises PkiError."""
    asked = check_request(request)
    ca, ca_key = _certificate(directory, CA), _ca_key(directory)
    subject = [
        x509.NameAttribute(NameOID.COMMON_NAME, _one(asked.subject, NameOID.COMMON_NAME)),
        x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, role),
        x509.NameAttribute(NameOID.SERIAL_NUMBER, _one(asked.subject, NameOID.SERIAL_NUMBER)),
    ]
    usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    certificate = (
        _builder(x509.Name(subject), ca.subject, asked.public_key(), ca.not_valid_after_utc)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False
        )
        .sign(ca_key, hashes.SHA256())
    )
    return certificate.public_bytes(serialization.Encoding.PEM)


def save_identity(directory: Path, ca: bytes, certificate: bytes, key: bytes) -> Identity:
    """Keep what makes this node a member, after checking that it belongs together; raises PkiError."""
    try:
        issuer, member = x509.load_pem_x509_certificate(ca), x509.load_pem_x509_certificate(certificate)
        member.verify_directly_issued_by(issuer)
        own = serialization.load_pem_private_key(key, None)
    except (ValueError, TypeError, InvalidSignature) as error:
        raise PkiError("the certificate was not issued by the authority that came with it") from error
    if own.public_key() != member.public_key():
        raise PkiError("the certificate is not for this node's key")
    identity = _identity(member)
    folder = fleet_dir(directory)
    for name, content in ((CA, ca), (KEY, key), (CERTIFICATE, certificate)):
        state.write_private(folder / name, content)
    return identity


def identity(directory: Path) -> Identity | None:
    """Who this node is in its fleet; None if it joined none. Raises PkiError if that cannot be read."""
    if not is_member(directory):
        return None
    return _identity(_certificate(directory, CERTIFICATE))


def authority(directory: Path) -> bytes:
    """Return the certificate of the fleet's authority, PEM; raises PkiError."""
    return read(fleet_dir(directory) / CA)


def _certificate(directory: Path, name: str) -> x509.Certificate:
    path = fleet_dir(directory) / name
    try:
        return x509.load_pem_x509_certificate(read(path))
    except ValueError as error:
        raise PkiError(f"{path} does not hold a certificate; {REMEDY}") from error


def _ca_key(directory: Path) -> ec.EllipticCurvePrivateKey:
    path = fleet_dir(directory) / CA_KEY
    try:
        key = serialization.load_pem_private_key(read(path), None)
    except (ValueError, TypeError) as error:
        raise PkiError(f"{path} does not hold a private key; found the fleet anew") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise PkiError(f"{path} does not hold an EC key; found the fleet anew")
    return key


def _identity(certificate: x509.Certificate) -> Identity:
    subject = certificate.subject
    return as_identity(
        _one(subject, NameOID.COMMON_NAME),
        _one(subject, NameOID.ORGANIZATIONAL_UNIT_NAME),
        _one(subject, NameOID.SERIAL_NUMBER),
    )


def _one(subject: x509.Name, oid: x509.ObjectIdentifier) -> str:
    found = subject.get_attributes_for_oid(oid)
    if len(found) != 1 or not isinstance(found[0].value, str):
        raise PkiError("the certificate does not name a node, its role and its id")
    return found[0].value


def _name(text: str) -> str:
    return text.encode()[:NAME_LENGTH].decode(errors="ignore") or "unnamed"


def _builder(subject: x509.Name, issuer: x509.Name, key: Any, not_after: datetime) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime.now(UTC) - CLOCKS_DIFFER_BY)
        .not_valid_after(not_after)
    )


def _key_usage(*, digital_signature: bool = False, key_cert_sign: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        key_cert_sign=key_cert_sign,
        crl_sign=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
