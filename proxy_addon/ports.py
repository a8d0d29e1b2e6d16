"""The ports to listen on: taken over from the process that has them, else bound; shared out among workers."""

from __future__ import annotations

import contextlib
import resource
import socket
from collections import defaultdict

from proxy_addon import handover, sockets
from proxy_addon.fleet.port_conflict import port_conflict
from proxy_addon.handover import Inherited
from proxy_addon.settings import Address, Settings
from proxy_addon.sockets import Sockets


class Taken(Exception):
    """A port cannot be listened on; the message is the sentence for whoever starts the proxy."""


def acquire(settings: Settings, workers: int) -> tuple[Sockets, Inherited | None]:
    """Sockets for all that ``settings`` want to listen on, at least ``workers`` for each address.

    Raises Taken.
    """
    wanted = sockets.spots(settings)
    inherited = handover.ask(settings.state_dir, wanted)
    found = dict(inherited.sockets) if inherited is not None else {}
    try:
        for spot in wanted:
            if spot not in found:
                if (conflict := port_conflict(*spot)) is not None:
                    raise Taken(conflict)
                found[spot] = sockets.bind(spot)
            for group in by_address(found[spot]):
                for _ in range(len(group), workers):
                    found[spot] += sockets.again(group[:1])
    except OSError as error:
        sockets.close_all(found)
        raise Taken(
            f"cannot listen on {Address(host=spot[0] or '*', port=spot[1])}: {error.strerror}"
        ) from error
    except Taken:
        sockets.close_all(found)
        raise
    return found, inherited


def by_address(listening: list[socket.socket]) -> list[list[socket.socket]]:
    """``listening`` in groups that share an address."""
    groups: dict[object, list[socket.socket]] = defaultdict(list)
    for one in listening:
        groups[one.getsockname()].append(one)
    return list(groups.values())


def share(listening: Sockets, worker: int, of: int) -> Sockets:
    """Those of worker number ``worker`` of ``of``: of each address every ``of``-th, so that none is left."""
    return {
        spot: [one for group in by_address(each) for one in group[worker - 1 :: of]]
        for spot, each in listening.items()
    }


def as_bound(listening: Sockets) -> Sockets:
    """``listening`` by the ports that they have, where any port would do."""
    return {(host, each[0].getsockname()[1]): each for (host, _), each in listening.items()}


def bound_to(settings: Settings, listening: Sockets) -> Settings:
    """``settings`` with the port that ``listen`` has."""
    host = settings.listen.host
    port = listening[host, settings.listen.port][0].getsockname()[1]
    return settings.model_copy(update={"listen": Address(host=host, port=port)})


def raise_descriptor_limit() -> None:
    """Allow as many open connections as the system lets this process have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY or soft < hard:
        with contextlib.suppress(ValueError, OSError):  # macOS says infinity, and takes less
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
