"""The addon that puts our HTTP layers in place of mitmproxy's, on every connection."""

from __future__ import annotations

import logging

from mitmproxy import ctx
from mitmproxy.addonmanager import Loader
from mitmproxy.connection import Client
from mitmproxy.net.tls import starts_like_tls_record
from mitmproxy.proxy import commands, events
from mitmproxy.proxy.layer import CommandGenerator, Layer, NextLayer

from proxy_addon import http1
from proxy_addon.http_layer import install
from proxy_addon.settings import Settings
from proxy_addon.strict_server import StrictServer

log = logging.getLogger(__name__)


class Layers:
    """Lets mitmproxy choose the layer, then makes the choice ours."""

    def __init__(self, settings: Settings) -> None:
        self.reconfigure(settings)

    def reconfigure(self, settings: Settings) -> None:
        """Judge clients by ``settings`` from now on."""
        StrictServer.settings = settings

    def load(self, _loader: Loader) -> None:
        """Mend what hangs below the layers."""
        http1.mend()

    def client_disconnected(self, client: Client) -> None:
        """Close what mitmproxy leaves open.

        It closes by cancelling the task that reads; if that has just read more and waits for its turn to say
        so, it ends without having closed anything.
        """
        handler = ctx.master.addons.get("proxyserver").connections.get(client.id)
        io = handler.transports.get(client) if handler is not None else None
        if io is not None and io.writer is not None:
            io.writer.close()

    def next_layer(self, next_layer: NextLayer) -> None:
        """Decide first what mitmproxy would decide (it does nothing the second time), then replace.

        TLS is taken only where it was loaded into a mitmdump, whose owner may have given it a certificate.
        """
        addons = ctx.master.addons
        if addons.get("tlsconfig") is None and starts_like_tls_record(next_layer.data_client()):
            next_layer.layer = PlainOnly(next_layer.context)
            return
        addons.get("nextlayer").next_layer(next_layer)
        install(next_layer)


class PlainOnly(Layer):
    """Closes a connection that begins with TLS, where mitmproxy without certificates would let it hang."""

    def _handle_event(self, event: events.Event) -> CommandGenerator[None]:
        if isinstance(event, events.Start):
            client = self.context.client
            log.info("%s speaks TLS, but this port is plain HTTP: use http://.", client.peername[0])
            yield commands.CloseConnection(client)
