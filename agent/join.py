"""How a node joins a fleet: with a one-time token, over plain HTTP that needs no trust.

The node sends its certificate request; the private key never travels. Request and answer each carry an
HMAC-SHA256 keyed with the token's secret, which never travels either: the fleet learns that the request comes
from whoever was given the token, the node that the authority and the certificate come from whoever gave it.
Somebody in between can spoil the attempt, and nothing else.

The founder must know the secret to check an HMAC, so ``DIR/fleet/tokens`` keeps secrets, readable by their
owner alone, until they are used or expire.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import logging
import os
import re
import secrets
import socket
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import aiohttp
from aiohttp import web
from yarl import URL

from agent import pki, state

logger = logging.getLogger(__name__)

PATH = "/sollol/shard/join"

TOKEN_LIVES_S = 3600.0
# What became of a token is remembered for so long, to be told apart from one that never was.
REMEMBERED_S = 86400.0

# 160 bits: 32 letters of base32 without padding.
SECRET_BYTES = 20
NONCE_BYTES = 16

# A request is about 900 bytes, an answer 1700.
LARGEST_MESSAGE_BYTES = 16384

TIMEOUT_S = 10.0
DOOR_S = 2.0

_TOKEN = re.compile(r"sollol-([0-9a-f]{8})-([a-z2-7]{32})")
_ID = re.compile(r"[0-9a-f]{8}")


class CannotJoin(Exception):
    """The node did not join; the text is one sentence."""


class Refused(Exception):
    """A request to join is refused; the text is one sentence for the one who asks."""


# -- Messages: pure functions on bytes ------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Token:
    """What the founder hands to a person, and that person to ``sollol agent join``."""

    id: str
    secret: bytes

    def __str__(self) -> str:
        return f"sollol-{self.id}-{base64.b32encode(self.secret).decode().lower()}"

    @classmethod
    def parse(cls, text: str) -> Token:
        """Raises CannotJoin for what is no token."""
        found = _TOKEN.fullmatch(text.strip().lower())
        if found is None:
            raise CannotJoin(
                "a token looks like sollol-1a2b3c4d- and 32 letters and digits; it was cut or misspelt"
            )
        return cls(found[1], base64.b32decode(found[2].upper()))


@dataclass(frozen=True, slots=True)
class Request:
    """A request to join, as it came; trusted only once :meth:`signed_with` holds."""

    token_id: str
    nonce: str
    csr: str
    mac: str

    def signed_with(self, secret: bytes) -> bool:
        """Whether who made this knew the token's secret."""
        return hmac.compare_digest(
            self.mac.encode(), _mac(secret, "request", self.token_id, self.nonce, self.csr).encode()
        )


def make_request(token: Token, nonce: str, csr: bytes) -> bytes:
    """The body of a request to join."""
    text = csr.decode()
    mac = _mac(token.secret, "request", token.id, nonce, text)
    return json.dumps({"token": token.id, "nonce": nonce, "csr": text, "mac": mac}).encode()


def parse_request(body: bytes) -> Request:
    """Raises Refused for what is no request to join."""
    fields = _fields(body, ("token", "nonce", "csr", "mac"))
    if fields is None or not _ID.fullmatch(fields["token"]):
        raise Refused("this is no request to join a fleet")
    return Request(fields["token"], fields["nonce"], fields["csr"], fields["mac"])


def make_answer(secret: bytes, nonce: str, ca: bytes, certificate: bytes) -> bytes:
    """The body that makes the one who asked a member."""
    issued = {"ca": ca.decode(), "certificate": certificate.decode()}
    mac = _mac(secret, "answer", nonce, issued["ca"], issued["certificate"])
    return json.dumps(issued | {"mac": mac}).encode()


def check_answer(body: bytes, token: Token, nonce: str) -> tuple[bytes, bytes]:
    """Return the authority's and the node's certificate; raises CannotJoin if another made this answer."""
    fields = _fields(body, ("ca", "certificate", "mac"))
    if fields is None:
        raise CannotJoin("what answered is no coordinator of a fleet")
    mac = _mac(token.secret, "answer", nonce, fields["ca"], fields["certificate"])
    if not hmac.compare_digest(fields["mac"].encode(), mac.encode()):
        raise CannotJoin("the answer does not come from whoever issued the token: nothing was accepted")
    return fields["ca"].encode(), fields["certificate"].encode()


def _mac(secret: bytes, *parts: str) -> str:
    mac = hmac.new(secret, digestmod=hashlib.sha256)
    for part in ("sollol join 1", *parts):
        content = part.encode()
        mac.update(len(content).to_bytes(4) + content)  # so that no two lists of parts read the same
    return mac.hexdigest()


async def _bounded(stream: aiohttp.StreamReader) -> bytes:
    """Return all that ``stream`` brings; nothing, which is no message, where that is too long to be one."""
    content = b""
    async for chunk in stream.iter_any():
        content += chunk
        if len(content) > LARGEST_MESSAGE_BYTES:
            return b""
    return content


def _fields(body: bytes, names: tuple[str, ...]) -> dict[str, str] | None:
    """Return the texts of these names in a JSON object; None unless it has them all."""
    try:
        found: Any = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or not all(isinstance(found.get(name), str) for name in names):
        return None
    return {name: found[name] for name in names}


# -- The founder's half ---------------------------------------------------------------------------------


class Tokens:
    """The tokens issued in ``directory``: a file each, so that one process may issue what another takes."""

    def __init__(self, directory: Path, clock: Callable[[], float] = time.time) -> None:
        self._folder = pki.fleet_dir(directory) / "tokens"
        self._clock = clock

    def issue(self, role: pki.Role) -> Token:
        """Make a token that grants ``role`` once, within the next hour."""
        self._forget_old()
        token = Token(secrets.token_hex(4), secrets.token_bytes(SECRET_BYTES))
        kept = {
            "role": role,
            "secret": token.secret.hex(),
            "expires_at_s": self._clock() + TOKEN_LIVES_S,
        }
        state.write_private(self._path(token.id), json.dumps(kept).encode())
        return token

    def check(self, request: Request) -> tuple[pki.Role, bytes]:
        """Return the role that the request's token grants, and its secret; raises Refused."""
        try:
            kept = json.loads(self._path(request.token_id).read_bytes())
            role, secret, expires_at_s = kept["role"], bytes.fromhex(kept["secret"]), kept["expires_at_s"]
        except FileNotFoundError:
            if self._used(request.token_id).exists():
                raise Refused("the token was used already; have a new one issued") from None
            raise Refused("the token is not known here; have a new one issued") from None
        except (OSError, ValueError, KeyError) as error:
            logger.error("%s cannot be read: %s", self._path(request.token_id), error)
            raise Refused("the token cannot be read here; the coordinator's log says why") from error
        if not request.signed_with(secret):
            raise Refused("the request was not made with the token's secret")
        if self._clock() >= expires_at_s:
            raise Refused("the token has expired; have a new one issued")
        return role, secret

    def use(self, token_id: str) -> None:
        """Use a token up; raises Refused for all but the first of those that try."""
        try:
            self._path(token_id).rename(self._used(token_id))
        except FileNotFoundError:
            raise Refused("the token was used already; have a new one issued") from None
        os.truncate(self._used(token_id), 0)

    def _path(self, token_id: str) -> Path:
        return self._folder / f"{token_id}.json"

    def _used(self, token_id: str) -> Path:
        return self._folder / f"{token_id}.used"

    def _forget_old(self) -> None:
        for path in self._folder.glob("*.*"):
            if self._clock() - path.stat().st_mtime > REMEMBERED_S:
                path.unlink(missing_ok=True)


def init_fleet(directory: Path, name: str) -> pki.Identity:
    """Found a fleet in ``directory`` and make this node its coordinator, unless it is one already.

    Raises PkiError, and OSError where the directory cannot be written.
    """
    found = pki.identity(directory)
    if found is not None and pki.founded_here(directory):
        return found
    if found is not None:
        raise pki.PkiError(
            f"{found.name} is a member of a fleet that was founded elsewhere, where its tokens are issued; "
            f"to found another here, remove {pki.fleet_dir(directory)}"
        )
    pki.create_ca(directory, name)
    key, csr = pki.new_request(name, state.node_id(directory))
    return pki.save_identity(
        directory, pki.authority(directory), pki.issue(directory, csr, "coordinator"), key
    )


def issue_token(directory: Path, role: pki.Role = "agent") -> str:
    """Return a new token as text; raises PkiError where no fleet was founded."""
    if not pki.founded_here(directory):
        raise pki.PkiError(
            f"no fleet was founded in {directory}; run `sollol shard init` on the coordinator's machine"
        )
    return str(Tokens(directory).issue(role))


def answer(directory: Path, body: bytes, tokens: Tokens | None = None) -> bytes:
    """Make the sender of ``body`` a member of the fleet founded in ``directory``; raises Refused."""
    tokens = tokens or Tokens(directory)
    request = parse_request(body)
    role, secret = tokens.check(request)
    try:
        pki.check_request(request.csr.encode())
        tokens.use(request.token_id)
        certificate = pki.issue(directory, request.csr.encode(), role)
        return make_answer(secret, request.nonce, pki.authority(directory), certificate)
    except pki.PkiError as error:
        raise Refused(str(error)) from error


def handler(directory: Path) -> Callable[[web.Request], Awaitable[web.Response]]:
    """Return what serves ``POST`` of :data:`PATH` for the fleet founded in ``directory``."""

    async def handle(request: web.Request) -> web.Response:
        try:
            async with asyncio.timeout(TIMEOUT_S):
                body = await _bounded(request.content)
            answered = answer(directory, body)
        except TimeoutError:
            logger.warning("%s is too slow to join", request.remote)
            refused = web.json_response({"error": "the request takes too long"}, status=408)
            refused.force_close()
            return refused
        except Refused as refused:
            logger.warning("%s may not join: %s", request.remote, refused)
            return web.json_response({"error": str(refused)}, status=403)
        logger.info("%s joined the fleet", request.remote)
        return web.Response(body=answered, content_type="application/json")

    return handle


# -- The joining half -----------------------------------------------------------------------------------


async def join(url: str, token: str, directory: Path, name: str | None = None) -> pki.Identity:
    """Make the node with the state in ``directory`` a member of the fleet at ``url``; raises CannotJoin.

    A member of another fleet leaves that one.
    """
    given, where = Token.parse(token), _address(url)
    nonce = secrets.token_hex(NONCE_BYTES)
    try:
        if pki.founded_here(directory):
            raise CannotJoin(
                f"a fleet was founded in {directory}; its founder cannot join another, unless you give it up "
                f"by removing {pki.fleet_dir(directory)}"
            )
        _check_writable(pki.fleet_dir(directory))
        key, csr = pki.new_request(name or socket.gethostname(), state.node_id(directory))
        body = await _post(where, make_request(given, nonce, csr))
        ca, certificate = check_answer(body, given, nonce)
        return pki.save_identity(directory, ca, certificate, key)
    except (pki.PkiError, ValueError) as error:
        raise CannotJoin(str(error)) from error
    except OSError as error:
        raise CannotJoin(
            f"the certificate cannot be kept: {error.filename or directory}: {error.strerror}"
        ) from error


async def join_and_say(url: str, token: str, directory: Path, name: str | None = None) -> list[str]:
    """Join as :func:`join` does; return what a person is to know of it, a line each."""
    try:
        before = pki.authority(directory) if pki.identity(directory) else None
    except pki.PkiError:
        before = None  # what was there cannot be used, and is replaced
    member = await join(url, token, directory, name)
    lines = [
        f"{member.name} has joined the fleet as {member.role}.",
        f"Its certificate is in {pki.fleet_dir(directory)}.",
    ]
    if before not in (None, pki.authority(directory)):
        lines.append("It was a member of another fleet, which it has left.")
    return lines


async def door(url: str) -> Literal["open", "closed", "nobody"]:
    """Return whether nodes may join at ``url``; it is closed where a server knows of no fleet.

    Raises CannotJoin for what is no URL.
    """
    where = _address(url)
    try:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=DOOR_S)) as session,
            session.get(where) as response,
        ):
            return "open" if response.status == web.HTTPMethodNotAllowed.status_code else "closed"
    except (aiohttp.ClientError, TimeoutError):
        return "nobody"


def _check_writable(folder: Path) -> None:
    """Find out before a token is spent; raises OSError."""
    probe = folder / "probe"
    state.write_private(probe, b"")
    probe.unlink()


def _address(url: str) -> URL:
    try:
        parsed = URL(url if "://" in url else f"http://{url}")
    except ValueError:
        parsed = URL()
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise CannotJoin(f"a coordinator's address looks like http://10.0.0.2:11436, not {url!r}")
    return parsed if parsed.path not in ("", "/") else parsed.with_path(PATH)


async def _post(url: URL, body: bytes) -> bytes:
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
    try:
        async with (
            aiohttp.ClientSession(timeout=timeout) as session,
            session.post(url, data=body, headers={"Content-Type": "application/json"}) as response,
        ):
            content = await _bounded(response.content)
            if response.status == 200:
                return content
    except TimeoutError as error:
        raise CannotJoin(f"{url.authority} does not answer within {TIMEOUT_S:g} s") from error
    except aiohttp.ClientConnectorError as error:
        why = os.strerror(error.os_error.errno).lower() if error.os_error.errno else str(error)
        raise CannotJoin(f"{url.authority} cannot be reached: {why}") from error
    except aiohttp.ClientError as error:
        raise CannotJoin(f"{url.authority} cannot be reached: {error}") from error
    refused = _fields(content, ("error",)) if response.status == 403 else None
    if refused is None:
        raise CannotJoin(f"{url.authority} is no coordinator of a fleet: it answers {response.status}")
    raise CannotJoin(f"{url.authority} refuses: {refused['error']}")
