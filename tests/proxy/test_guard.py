"""The guard's table of cases: who is refused with which status, and what a let-through request looks like."""

from __future__ import annotations

import orjson
import pytest
from mitmproxy import http
from mitmproxy.proxy.mode_specs import ProxyMode
from mitmproxy.test import tflow

from agent import cors
from proxy_addon import access, record
from proxy_addon.fleet.node import Fleet, Node
from proxy_addon.guard import Guard
from proxy_addon.intake import Intake
from proxy_addon.settings import Settings


def guard(**overrides: object) -> Guard:
    fleet = Fleet()
    fleet.add(Node("10.0.0.2", 11434))
    fleet.add(Node("127.0.0.1", 11500))
    return Guard(Settings.model_validate(overrides), fleet)


def flow(
    method: str = "POST",
    path: str = "/api/chat",
    client: str = "127.0.0.1",
    mode: str = "reverse:http://fleet.invalid:11434",
    url: str = "",
    **headers: str,
) -> http.HTTPFlow:
    made = tflow.tflow()
    made.client_conn.peername = (client, 40000)
    made.client_conn.proxy_mode = ProxyMode.parse(mode)
    made.request = http.Request.make(method, url or f"http://fleet.invalid:11434{path}")
    fields = {"host": "localhost:11434"} | {name.replace("_", "-"): value for name, value in headers.items()}
    made.request.headers.update(fields)
    return made


def enter(by: Guard, asked: http.HTTPFlow) -> record.Record:
    Intake(by.settings, lambda: 0.0).requestheaders(asked)
    by.requestheaders(asked)
    seen = record.of(asked)
    assert seen is not None
    return seen


def refused(by: Guard, asked: http.HTTPFlow) -> tuple[int, str]:
    """Status and sentence of the refusal; (0, "") where the request passes."""
    seen = enter(by, asked)
    if asked.response is None:
        assert seen.outcome is None
        return 0, ""
    assert seen.outcome == "refused"
    return asked.response.status_code, orjson.loads(asked.response.content or b"")["error"]


@pytest.mark.parametrize(
    ("client", "status"),
    [
        ("127.0.0.1", 0),
        ("127.8.8.8", 0),
        ("10.1.2.3", 0),
        ("172.31.255.255", 0),
        ("172.32.0.1", 403),
        ("192.168.0.9", 0),
        ("169.254.3.3", 0),
        ("100.64.0.1", 0),
        ("100.128.0.1", 403),
        ("8.8.8.8", 403),
        ("::1", 0),
        ("::ffff:10.0.0.1", 0),
        ("::ffff:8.8.8.8", 403),
        ("fe80::1%eth0", 0),
        ("fd00::1", 0),
        ("2001:db8::1", 403),
    ],
)
def test_client_networks(client: str, status: int) -> None:
    assert (refused(guard(), flow(client=client)))[0] == status


def test_client_networks_as_configured() -> None:
    strict = guard(guard={"clients": ["10.9.0.0/16"]})
    assert refused(strict, flow(client="10.9.1.1")) == (0, "")
    assert refused(strict, flow(client="127.0.0.1")) == (
        403,
        "clients at 127.0.0.1 are not served here; guard.clients lists the networks that are",
    )


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 0),
        ("LOCALHOST:11434", 0),
        ("127.0.0.1:11434", 0),
        ("[::1]:11434", 0),
        ("::1", 0),
        ("192.168.1.5", 0),
        ("0.0.0.0:11434", 0),
        ("gpu.local:11434", 0),
        ("a.localhost", 0),
        ("host.docker.internal:11434", 0),
        ("ai.example", 0),
        ("evil.example", 403),
        ("evil.example:11434", 403),
        ("localhost.evil.example", 403),
        ("8.8.8.8:11434", 403),
        ("notlocal", 403),
    ],
)
def test_host_on_a_loopback_listener(host: str, status: int) -> None:
    assert (refused(guard(guard={"hosts": ["AI.example"]}), flow(host=host)))[0] == status


def test_host_is_free_on_a_listener_for_others() -> None:
    """As with Ollama: a server that listens for the network is called by names that it cannot know."""
    assert refused(guard(listen="0.0.0.0:11434"), flow(host="gpu.example")) == (0, "")


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://localhost", 0),
        ("http://localhost:3000", 0),
        ("https://127.0.0.1:1", 0),
        ("app://obsidian.md", 0),
        ("vscode-webview://abc", 0),
        ("https://chat.example", 0),
        ("https://evil.example", 403),
        ("http://localhost.evil.example", 403),
        ("null", 403),
    ],
)
def test_origin(origin: str, status: int) -> None:
    asked = flow(origin=origin)
    assert (refused(guard(guard={"origins": ["https://*.example:7", "https://chat.example"]}), asked))[
        0
    ] == status
    assert "origin" not in asked.request.headers
    if status == 0:
        asked.response = http.Response.make(200)
        guard().responseheaders(asked)
        assert asked.response.headers["access-control-allow-origin"] == origin
    else:
        assert asked.response is not None
        assert "access-control-allow-origin" not in asked.response.headers


def test_a_page_of_the_very_host_needs_no_leave() -> None:
    asked = flow(host="ai.lan:80", origin="http://ai.lan:80")
    assert refused(guard(listen="0.0.0.0:80"), asked) == (0, "")
    assert "origin" not in asked.request.headers


@pytest.mark.parametrize("origin", ["http://localhost:3000", ""])
def test_preflight_is_answered_here(origin: str) -> None:
    headers = {"origin": origin, "access_control_request_headers": "x-stainless-os"} if origin else {}
    asked = flow("OPTIONS", **headers)
    enter(guard(), asked)
    assert asked.response is not None
    assert asked.response.status_code == 204
    assert asked.response.headers.get("access-control-allow-origin", "") == origin
    assert asked.response.headers.get("access-control-allow-headers", "") == headers.get(
        "access_control_request_headers", ""
    )


def test_preflight_of_a_foreign_page_is_refused() -> None:
    assert (refused(guard(), flow("OPTIONS", origin="https://evil.example")))[0] == 403


def test_a_pattern_with_a_star_matches_no_overlap() -> None:
    assert not cors.admitted("ab", ("ab*b",))
    assert cors.admitted("abb", ("ab*b",))
    assert cors.admitted("anything", ("*",))


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/api/chat", {"content_length": "1000"}, 0),
        ("/api/chat", {"content_length": "1001"}, 413),
        ("/api/chat", {"content_length": "x"}, 400),
        ("/api/chat", {"content_length": "²"}, 400),
        ("/api/chat", {"content_length": "9" * 5000}, 400),
        ("/api/blobs/sha256:00", {"content_length": "99999999999"}, 0),
        ("/api/chat", {"transfer_encoding": "chunked"}, 0),
        ("/api/chat", {"transfer_encoding": "Chunked"}, 0),
        ("/api/chat", {"transfer_encoding": "gzip, chunked"}, 501),
        ("/api/chat", {"transfer_encoding": "chunked", "trailer": "x-sum"}, 400),
    ],
)
def test_framing_and_size(path: str, headers: dict[str, str], status: int) -> None:
    small = guard(guard={"body_limit_bytes": 1000})
    assert (refused(small, flow(path=path, **headers)))[0] == status


def test_a_page_can_read_why_its_body_was_refused() -> None:
    asked = flow(content_length="1001", origin="http://localhost")
    assert refused(guard(guard={"body_limit_bytes": 1000}), asked) == (
        413,
        "the request body is larger than 1000 bytes (guard.body_limit_bytes)",
    )
    assert asked.response is not None
    assert asked.response.headers["access-control-allow-origin"] == "http://localhost"


@pytest.mark.parametrize("mode", ["regular@8080", "socks5@1080", "transparent@1081"])
@pytest.mark.parametrize(
    ("url", "status"),
    [
        ("http://10.0.0.2:11434/api/tags", 0),
        ("http://127.0.0.1:11500/api/tags", 0),
        ("http://LOCALHOST:11500/api/tags", 0),
        ("http://localhost:11434/api/tags", 0),  # our own port
        ("http://gpu.lan:11434/", 0),  # a configured name, whose nodes have addresses
        ("http://10.0.0.2:22/", 403),
        ("http://10.0.0.3:11434/", 403),
        ("https://10.0.0.2:11434/", 403),
        ("http://example.com/", 403),
    ],
)
def test_targets_of_the_proxy_modes(mode: str, url: str, status: int) -> None:
    asked = flow("GET", url=url, mode=mode, host="localhost:11434")
    assert (refused(guard(nodes="gpu.lan"), asked))[0] == status


def test_any_host_s_11434_when_configured() -> None:
    free = guard(guard={"any_11434": True})
    assert refused(free, flow(url="http://10.7.7.7:11434/", mode="regular")) == (0, "")
    assert refused(free, flow(url="http://10.7.7.7:80/", mode="regular")) == (
        403,
        "only plain HTTP to the nodes of the fleet (10.0.0.2:11434, 127.0.0.1:11500) or to port 11434 of any "
        "host is served, not 10.7.7.7:80",
    )


def test_a_sentence_about_a_large_fleet_stays_a_sentence() -> None:
    refusal = access.target(("http", "x", 1), False, False, [f"n{i:02}" for i in range(100)])
    assert refusal is not None
    assert "n09, …)" in refusal.message
    assert "n10" not in refusal.message


def test_connect_is_refused() -> None:
    asked = flow("CONNECT", mode="regular")
    guard().http_connect(asked)
    assert asked.response is not None
    assert asked.response.status_code == 403


def test_a_request_that_comes_back_is_a_loop() -> None:
    first, second = guard(), guard()
    asked = flow()
    first.stamp(asked.request.headers)
    second.stamp(asked.request.headers)
    second.stamp(asked.request.headers)  # a retry
    assert asked.request.headers[access.HOPS_HEADER] == f"{first.proxy_id},{second.proxy_id}"
    assert (refused(guard(), asked))[0] == 0
    assert (refused(first, asked))[0] == 508


def test_a_refusal_speaks_the_protocol_of_its_path() -> None:
    asked = flow(path="/v1/messages?beta=true", client="8.8.8.8")
    enter(guard(), asked)
    assert asked.response is not None
    assert orjson.loads(asked.response.content or b"")["error"]["type"] == "permission_error"


@pytest.mark.parametrize(
    ("peer", "headers", "client"),
    [
        ("127.0.0.1", {}, "127.0.0.1"),
        ("127.0.0.1", {"x_forwarded_for": "10.1.1.1"}, "10.1.1.1"),
        ("127.0.0.1", {"x_real_ip": "10.1.1.1"}, "10.1.1.1"),
        ("127.0.0.1", {"x_forwarded_for": "10.1.1.1", "x_real_ip": "10.2.2.2"}, "10.1.1.1"),
        ("127.0.0.1", {"x_forwarded_for": "10.9.9.9, 10.1.1.1"}, "10.1.1.1"),  # the first is a client's word
        ("127.0.0.1", {"x_forwarded_for": "10.1.1.1, 192.168.7.1"}, "10.1.1.1"),  # through two of ours
        ("127.0.0.1", {"x_forwarded_for": "[fd00::1]:443"}, "fd00::1"),
        ("127.0.0.1", {"x_forwarded_for": "10.1.1.1:5000"}, "10.1.1.1"),
        ("127.0.0.1", {"x_forwarded_for": "10.1.1.1, unknown"}, "127.0.0.1"),
        ("::ffff:127.0.0.1", {"x_forwarded_for": "10.1.1.1"}, "10.1.1.1"),
        ("10.3.3.3", {"x_forwarded_for": "10.1.1.1", "x_real_ip": "10.1.1.1"}, "10.3.3.3"),  # nobody's word
    ],
)
def test_a_trusted_proxy_names_the_client(peer: str, headers: dict[str, str], client: str) -> None:
    by = guard(guard={"trusted_proxies": ["127.0.0.0/8", "192.168.7.0/24"]})
    assert enter(by, flow(client=peer, **headers)).client == client


def test_nobody_is_trusted_unless_named() -> None:
    assert enter(guard(), flow(x_forwarded_for="10.1.1.1", x_real_ip="10.1.1.1")).client == "127.0.0.1"


def test_whom_a_trusted_proxy_names_must_be_admitted() -> None:
    by = guard(guard={"trusted_proxies": ["127.0.0.1"]})
    status, sentence = refused(by, flow(x_forwarded_for="203.0.113.9"))
    assert status == 403 and "203.0.113.9" in sentence
