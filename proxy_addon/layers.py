"""The addon that puts our HTTP layers in place of mitmproxy's, on every connection."""

from __future__ import annotations

import asyncio
import logging
from functools import partial
from typing import Any

from mitmproxy import ctx
from mitmproxy.addonmanager import Loader
from mitmproxy.connection import Client
from mitmproxy.net.tls import starts_like_tls_record
from mitmproxy.proxy import commands, events
from mitmproxy.proxy.layer import CommandGenerator, Layer, NextLayer

from proxy_addon import http1
from proxy_addon.clients import Clients
from proxy_addon.http_layer import install
from proxy_addon.settings import Settings
from proxy_addon.strict_server import StrictServer

log = logging.getLogger(__name__)


class Layers:
    """Lets mitmproxy choose the layer, then makes the choice ours."""

    def __init__(self, settings: Settings, clients: Clients) -> None:
        self.clients = StrictServer.clients = clients
        self._silent: dict[str, asyncio.TimerHandle] = {}  # by id of the client
        self.reconfigure(settings)

    def reconfigure(self, settings: Settings) -> None:
        """Judge clients by ``settings`` from now on."""
        self.settings = StrictServer.settings = settings

    def load(self, _loader: Loader) -> None:
        """Mend what hangs below the layers."""
        http1.mend()

    def client_connected(self, client: Client) -> None:
        """One more, if there may be; nobody is silent for ever."""
        if not self.clients.enter(client, partial(_close, client)):
            _close(client)
        loop = asyncio.get_running_loop()
        # Until its first bytes a connection has no layer that could have a limit.
        self._silent[client.id] = loop.call_later(self.settings.timeouts.keepalive_s, _close, client)

    def client_disconnected(self, client: Client) -> None:
        """Close what mitmproxy leaves open.

        It closes by cancelling the task that reads; if that has just read more and waits for its turn to say
        so, it ends without having closed anything.
        """
        self.clients.leave(client)
        self._speaks(client)
        _close(client)

    def _speaks(self, client: Client) -> None:
        timer = self._silent.pop(client.id, None)
        if timer is not None:
            timer.cancel()

    def next_layer(self, next_layer: NextLayer) -> None:
        """Decide first what mitmproxy would decide (it does nothing the second time), then replace.

        TLS is taken only where it was loaded into a mitmdump, whose owner may have given it a certificate.
        """
        addons = ctx.master.addons
        self._speaks(next_layer.context.client)
        if addons.get("tlsconfig") is None and starts_like_tls_record(next_layer.data_client()):
            next_layer.layer = PlainOnly(next_layer.context)
            return
        addons.get("nextlayer").next_layer(next_layer)
        install(next_layer)


def _connections() -> dict[str, Any]:
    """mitmproxy's, by id of the client."""
    return ctx.master.addons.get("proxyserver").connections  # type: ignore[no-any-return]


def _close(client: Client) -> None:
    handler = _connections().get(client.id)
    io = handler.transports.get(client) if handler is not None else None
    if io is not None and io.writer is not None:
        io.writer.close()


class PlainOnly(Layer):
    """Closes a connection that begins with TLS, where mitmproxy without certificates would let it hang."""

    def _handle_event(self, event: events.Event) -> CommandGenerator[None]:
        if isinstance(event, events.Start):
            client = self.context.client
            log.info("%s speaks TLS, but this port is plain HTTP: use http://.", client.peername[0])
            yield commands.CloseConnection(client)
