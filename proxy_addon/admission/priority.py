"""Whose request it is, and how urgent: from the client's key or network, the header, the body. Pure."""

from __future__ import annotations

import hmac
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address
from typing import Any

from proxy_addon.ask import BadRequest
from proxy_addon.settings import Admission, ClientClass, priority_of

HEADER = "x-sollol-priority"
FIELD = "priority"  #: of the body; Ollama passes over fields that it does not know, native and /v1 alike
KEY_HEADERS = ("authorization", "x-api-key")
SHOWN = 40  #: characters of a wrong value in an error


@dataclass(frozen=True, slots=True)
class Client:
    """Who asks: ``name`` is what requests share that are one client's."""

    name: str
    of: ClientClass | None = None

    @property
    def weight(self) -> float:
        """Its share beside other clients."""
        return self.of.weight if self.of is not None else 1.0


def client_of(headers: Mapping[str, str], address: str, classes: tuple[ClientClass, ...]) -> Client:
    """The first of ``classes`` that fits, by key or by network; else the address alone.

    All who send a class's key are one client, in its networks each address is one.
    """
    if not classes:
        return Client(address)
    keys = [key for name in KEY_HEADERS if (key := _key(name, headers.get(name, "")))]
    ip = ip_address(address) if address else None
    if isinstance(ip, IPv6Address) and ip.ipv4_mapped:
        ip = ip.ipv4_mapped
    for of in classes:
        if any(_is_key_of(key, of) for key in keys):
            return Client(of.name, of)
        if ip is not None and any(ip in network for network in of.networks):
            return Client(address, of)
    return Client(address)


def strip_keys(headers: MutableMapping[str, str], classes: tuple[ClientClass, ...]) -> None:
    """Remove the keys of ``classes``: they are this proxy's affair, no node should see them."""
    for name in KEY_HEADERS:
        key = _key(name, headers.get(name, ""))
        if key and any(_is_key_of(key, of) for of in classes):
            del headers[name]


def priority(
    body: Mapping[str, Any], headers: Mapping[str, str], of: ClientClass | None, settings: Admission
) -> int:
    """1 to 10: what the body says, else the header, else the class, else the settings; no more than allowed.

    Raises:
        BadRequest: 400 with a sentence for a value that is no priority.
    """
    most = of.max_priority if of is not None else settings.max_priority
    asked: int | None = None
    if body.get(FIELD) is not None:
        asked = _read(FIELD, body[FIELD])
    elif HEADER in headers:
        asked = _read(HEADER, headers[HEADER])
    elif of is not None:
        asked = of.priority
    return min(settings.priority if asked is None else asked, most)


def _read(name: str, value: Any) -> int:
    try:
        return priority_of(value)
    except ValueError as exc:
        shown = repr(value)
        shown = shown if len(shown) <= SHOWN else shown[: SHOWN - 1] + "…"
        raise BadRequest(400, f"{name} {exc}, not {shown}") from exc


def _key(header: str, value: str) -> str:
    if header != "authorization":
        return value.strip()
    scheme, _, key = value.strip().partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""


def _is_key_of(key: str, of: ClientClass) -> bool:
    return of.key is not None and hmac.compare_digest(
        key.encode("utf-8", "surrogateescape"), of.key.get_secret_value().encode()
    )
