"""What makes this node a member of its fleet, and whom it takes for one: the half of it that runs all day.

Certificates are made in ``agent/pki.py``. Here they are only used, for which the standard library suffices:
whoever keeps a tunnel open does without the memory that ``cryptography`` takes.
"""

from __future__ import annotations

import ssl
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

Role = Literal["coordinator", "agent"]
ROLES: tuple[Role, ...] = get_args(Role)

CA, CA_KEY, CERTIFICATE, KEY = "ca.pem", "ca.key", "identity.pem", "identity.key"


class PkiError(Exception):
    """A certificate, key or request does not serve; the text is one sentence."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Whom a certificate names."""

    name: str
    role: Role
    node_id: str


def fleet_dir(directory: Path) -> Path:
    """Where the certificates of the node with the state in ``directory`` lie."""
    return directory / "fleet"


def is_member(directory: Path) -> bool:
    """Whether the node with the state in ``directory`` has joined a fleet; raises PkiError."""
    return is_there(fleet_dir(directory) / CERTIFICATE)


def server_context(directory: Path) -> ssl.SSLContext:
    """The context that accepts members of this node's fleet and nobody else; raises PkiError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.num_tickets = 0  # a session is never resumed
    return _between_members(context, directory)


def client_context(directory: Path) -> ssl.SSLContext:
    """The context that connects to members of this node's fleet and nobody else; raises PkiError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    return _between_members(context, directory)


def peer(certificate: Mapping[str, Any] | None) -> Identity:
    """Whom the verified certificate of the other side names, from ``SSLObject.getpeercert``.

    Raises PkiError for a certificate that the authority signed but that is not a member's.
    """
    pairs: Iterable[tuple[tuple[str, str], ...]] = (certificate or {}).get("subject", ())
    subject = dict(pair for pairs_of_one in pairs for pair in pairs_of_one)
    return as_identity(
        subject.get("commonName"), subject.get("organizationalUnitName"), subject.get("serialNumber")
    )


def _between_members(context: ssl.SSLContext, directory: Path) -> ssl.SSLContext:
    folder = fleet_dir(directory)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    for name in (CA, CERTIFICATE, KEY):
        read(folder / name)
    try:
        context.load_verify_locations(folder / CA)
    except (ssl.SSLError, OSError) as error:
        raise PkiError(f"{folder / CA} does not hold a certificate; {REMEDY}") from error
    try:
        context.load_cert_chain(folder / CERTIFICATE, folder / KEY)
    except (ssl.SSLError, OSError) as error:
        raise PkiError(
            f"{folder / CERTIFICATE} and {KEY} do not hold a certificate and its key; {REMEDY}"
        ) from error
    return context


REMEDY = "remove the directory and join the fleet again"


def is_there(path: Path) -> bool:
    """Unlike ``path.exists()`` not False for what may not be looked at: a member would pass for none."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise PkiError(f"{path} cannot be read: {error.strerror}") from error
    return True


def read(path: Path) -> bytes:
    """Return what a file of the fleet's holds; raises PkiError."""
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise PkiError(f"{path} is missing; this node is no member of a fleet until it joins one") from error
    except OSError as error:
        raise PkiError(f"{path} cannot be read: {error.strerror}") from error


def as_identity(name: str | None, role: str | None, node_id: str | None) -> Identity:
    """Return whom these parts of a certificate's subject name; raises PkiError if one is missing."""
    known: Role | None = next((each for each in ROLES if each == role), None)
    if not name or known is None or not node_id:
        raise PkiError("the certificate does not name a node, its role and its id")
    return Identity(name, known, node_id)
