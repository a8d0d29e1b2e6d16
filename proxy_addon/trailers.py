"""Trailers of chunked bodies dropped, as RFC 9110 §6.5.1 allows; mitmproxy raises on them and hangs."""

from __future__ import annotations

from typing import Any

import h11
from mitmproxy.proxy.layers.http import _http1


class _WithoutTrailers:
    """A body reader whose end carries no trailers."""

    def __init__(self, reader: Any) -> None:
        self._reader = reader

    def __call__(self, buffer: Any) -> Any:
        return self._bare(self._reader(buffer))

    def read_eof(self) -> Any:
        return self._bare(self._reader.read_eof())

    @staticmethod
    def _bare(event: Any) -> Any:
        return h11.EndOfMessage() if isinstance(event, h11.EndOfMessage) and event.headers else event


def drop() -> None:
    """Have mitmproxy's HTTP/1 layers drop trailers from now on; harmless the second time."""
    parent = _http1.make_body_reader
    if getattr(parent, "drops_trailers", False):
        return

    def make_body_reader(expected_size: int | None) -> Any:
        reader = parent(expected_size)
        return _WithoutTrailers(reader) if expected_size is None else reader

    make_body_reader.drops_trailers = True  # type: ignore[attr-defined]
    _http1.make_body_reader = make_body_reader
