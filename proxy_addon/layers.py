"""The addon that puts our HTTP layers in place of mitmproxy's, on every connection."""

from __future__ import annotations

from mitmproxy import ctx
from mitmproxy.proxy.layer import NextLayer

from proxy_addon.http_stream import install


class Layers:
    """Lets mitmproxy choose the layer, then makes the choice ours."""

    def next_layer(self, next_layer: NextLayer) -> None:
        """Decide first what mitmproxy would decide (it does nothing the second time), then replace."""
        ctx.master.addons.get("nextlayer").next_layer(next_layer)
        install(next_layer)
