"""mitmproxy's HTTP layer with our streams in it: upstream connections can be forgotten, sends are joined."""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from typing import Any

from mitmproxy import ctx
from mitmproxy.connection import Client, Server
from mitmproxy.proxy import commands, events, layer
from mitmproxy.proxy.layers.http import GetHttpConnection, HttpLayer
from mitmproxy.proxy.layers.http._http1 import Http1Client

from proxy_addon.http_stream import FleetStream, ForgetUpstream
from proxy_addon.lean_addons import LeanAddons

NOBODY = -1  #: no stream has this id; what is said to it is dropped

Commands = Generator[commands.Command, Any, None]


class FleetLayer(HttpLayer):
    """The HTTP layer that makes :class:`FleetStream` and forgets upstream connections when told to."""

    def make_stream(self, stream_id: int) -> Commands:
        """As the parent, with our stream."""
        self.streams[stream_id] = FleetStream(self.context.fork(), stream_id)
        yield from self.event_to_child(self.streams[stream_id], events.Start())

    def event_to_child(self, child: layer.Layer, event: events.Event) -> Commands:
        """As the parent; also carries out :class:`ForgetUpstream`, and hooks that need not wait."""
        for command in super().event_to_child(child, event):
            if isinstance(command, ForgetUpstream):
                # Its state machine must go first: a late ConnectionClosed would hit the retried stream.
                forgotten = self.connections.pop(command.connection, None)
                speaker = getattr(forgotten, "child_layer", None)  # of an HttpClient
                if isinstance(speaker, Http1Client):
                    speaker.stream_id = NOBODY  # it may be about to say more of what it has read
                if forgotten and command.connection.connected:
                    yield commands.CloseConnection(command.connection)
            elif isinstance(command, commands.StartHook) and isinstance(ctx.master.addons, LeanAddons):
                if _run(command, self.context.client):
                    source = self.command_sources.pop(command)
                    yield from self.event_to_child(source, events.HookCompleted(command))
            else:
                yield command

    def get_connection(self, event: GetHttpConnection, *, reuse: bool = True) -> Commands:
        """As the parent, but a failed connect is not remembered: the node may be back."""
        for connection in [c for c in self.connections if isinstance(c, Server) and c.error]:
            if connection not in self.waiting_for_establishment:
                del self.connections[connection]
        yield from super().get_connection(event, reuse=reuse)

    def _handle_event(self, event: events.Event) -> Commands:
        if (
            isinstance(event, events.ConnectionEvent)
            and event.connection not in self.connections
            and event.connection is not self.context.server
        ):
            return  # the last words of a forgotten connection
        yield from _coalesced(super()._handle_event(event))


def _run(hook: commands.StartHook, client: Client) -> bool:
    """Run ``hook`` on all addons and return whether that is done; if not, the layer hears of it later.

    mitmproxy makes a task of every hook and has it wait for its turn to report back. Most hooks never wait,
    so that this costs them a turn of the loop each: measured, a fifth of a small request.
    """
    task = asyncio.ensure_future(ctx.master.addons.handle_lifecycle(hook))  # runs at once: eager tasks
    if task.done():
        task.result()
        return True
    handler = ctx.master.addons.get("proxyserver").connections.get(client.id)

    def report(_: asyncio.Task[None]) -> None:
        reporting = asyncio.ensure_future(handler.server_event(events.HookCompleted(hook)))
        _REPORTING.add(reporting)
        reporting.add_done_callback(_REPORTING.discard)

    _REPORTING.add(task)
    task.add_done_callback(_REPORTING.discard)
    task.add_done_callback(report)
    return False


_REPORTING: set[asyncio.Future[None]] = set()  #: the loop itself holds tasks only weakly


def _coalesced(source: Commands) -> Commands:
    """``source`` with neighbouring pieces for one connection made one: a head and its body are one packet.

    Each piece would be a send of its own, and sending is what a small request costs most.
    """
    waiting: commands.SendData | None = None
    for command in source:
        if isinstance(command, commands.SendData):
            if waiting is not None and waiting.connection is command.connection:
                waiting.data += command.data
                continue
            waiting, command = command, waiting
            if command is None:
                continue
        elif waiting is not None and not isinstance(command, commands.Log):
            yield waiting
            waiting = None
        yield command
    if waiting is not None:
        yield waiting


def install(next_layer: layer.NextLayer) -> None:
    """Put :class:`FleetLayer` in place of an HttpLayer that ``next_layer`` has just chosen, however deep."""
    candidate: Any = next_layer.layer
    while candidate is not None:
        if type(candidate) is HttpLayer:
            candidate.__class__ = FleetLayer
        candidate = getattr(candidate, "child_layer", None)
