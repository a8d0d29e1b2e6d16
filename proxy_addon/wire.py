"""What hangs below a flow: its connections, whether the lane carries them or mitmproxy's layers."""

from __future__ import annotations

from typing import Any

from mitmproxy import ctx, http
from mitmproxy.connection import Client, Connection, Server

from proxy_addon.lane.exchange import LaneFlow


def break_off(flow: http.HTTPFlow) -> bool:
    """End the attempt under way as if its node had; False where no node is connected."""
    if isinstance(flow, LaneFlow):
        return flow.exchange.node.break_off()
    return _abort(flow.client_conn, flow.server_conn)


def stalls(flow: http.HTTPFlow) -> bool:
    """Whether the client does not take what it is sent, so that its node is read no further either."""
    if isinstance(flow, LaneFlow):
        return flow.exchange.client.is_full
    io = _io(flow.client_conn, flow.client_conn)
    return bool(io and io.writer and io.writer.transport.get_write_buffer_size())


def hang_up(flow: http.HTTPFlow) -> None:
    """End the client's connection as if it had left."""
    if isinstance(flow, LaneFlow):
        flow.exchange.client.abort()
    else:
        _abort(flow.client_conn, flow.client_conn)


def close(client: Client) -> None:
    """Close the connection of a client of the layers, once what it was sent has gone."""
    io = _io(client, client)
    if io is not None and io.writer is not None:
        io.writer.close()


def cancel_connect(client: Client, server: Server) -> None:
    """End a connect of the layers that takes too long: mitmproxy then reports it as failed."""
    io = _io(client, server)
    if io is not None and io.handler is not None and io.writer is None:
        io.handler.cancel()


def _io(client: Client, connection: Connection) -> Any:  # mitmproxy's ConnectionIO
    handler = ctx.master.addons.get("proxyserver").connections.get(client.id)
    return handler.transports.get(connection) if handler is not None else None


def _abort(client: Client, connection: Connection) -> bool:
    io = _io(client, connection)
    if io is None or io.writer is None:
        return False
    io.writer.transport.abort()
    return True
