"""Whether the port to listen on is free, and if not, who holds it and what can be done."""

from __future__ import annotations

import errno
import http.client
import json
import socket

from proxy_addon.fleet.addresses import reachable

PROBE_TIMEOUT_S = 2.0
ELSEWHERE_PORT = 11500
MOVED_OLLAMA_PORT = 11433


def port_conflict(listen_host: str, port: int) -> str | None:
    """Return one sentence that says why ``listen_host:port`` cannot be listened on, None if it can.

    Binds for a moment, and where somebody else holds the port asks over HTTP who it is (at most 2 s). For an
    Ollama the sentence has the two ways out.
    """
    where = f"[{listen_host}]:{port}" if ":" in listen_host else f"{listen_host}:{port}"
    try:
        found = socket.getaddrinfo(
            listen_host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except OSError as error:
        return f"cannot listen on {where}: {listen_host} is no address of this machine ({error.strerror})"
    for family, kind, protocol, _, address in found:
        try:
            # The options of asyncio's servers, or a port just left would look taken.
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                probe.bind(address)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return f"cannot listen on {where}: {_held(reachable(str(address[0])), port)}"
            if error.errno == errno.EAFNOSUPPORT and len(found) > 1:
                continue
            return f"cannot listen on {where}: {error.strerror}"
    return None


def _held(host: str, port: int) -> str:
    elsewhere = f"sollol proxy --listen 127.0.0.1:{_other_than(port, ELSEWHERE_PORT)}"
    moved = f"127.0.0.1:{_other_than(port, MOVED_OLLAMA_PORT)}"
    match _holder(host, port):
        case "sollol":
            return (
                "another SOLLOL holds the port; use that one, take over from it (as its user, with its"
                f" --state-dir), or listen elsewhere ({elsewhere})"
            )
        case "ollama":
            return (
                f"Ollama holds the port; either listen elsewhere ({elsewhere}), or move Ollama (start it with"
                f" OLLAMA_HOST={moved}) and name it (sollol proxy --nodes {moved})"
            )
        case _:
            return f"another program holds the port; listen elsewhere ({elsewhere})"


def _other_than(taken: int, port: int) -> int:
    return port if port != taken else port - 1


def _holder(host: str, port: int) -> str | None:
    connection = http.client.HTTPConnection(host, port, timeout=PROBE_TIMEOUT_S)
    try:
        connection.request("GET", "/api/version", headers={"Host": f"localhost:{port}"})
        answer = connection.getresponse()
        body = answer.read(4096)
        if any(name.lower().startswith("x-sollol") for name in answer.headers):
            return "sollol"
        found = json.loads(body) if answer.status == 200 else None
        return "ollama" if isinstance(found, dict) and "version" in found else None
    except (OSError, http.client.HTTPException, ValueError):
        return None  # whoever it is, it is no Ollama that answers
    finally:
        connection.close()
