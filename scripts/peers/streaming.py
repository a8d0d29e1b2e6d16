"""The least addon with which mitmdump passes answers on as they come."""

from mitmproxy.http import HTTPFlow


def responseheaders(flow: HTTPFlow) -> None:
    """Pass the body on unread."""
    assert flow.response
    flow.response.stream = True
