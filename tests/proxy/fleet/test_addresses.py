from __future__ import annotations

import socket

import pytest

from proxy_addon.fleet.addresses import Own, from_ollama_host, local_addresses, reachable
from proxy_addon.settings import Address

FORMS = [
    ("", None),
    ("  ", None),
    ('"10.0.0.5"', "10.0.0.5:11434"),
    ("10.0.0.5", "10.0.0.5:11434"),
    ("10.0.0.5:8000", "10.0.0.5:8000"),
    ("gpu1", "gpu1:11434"),
    ("GPU1.Local:80", "gpu1.local:80"),
    (":8000", "127.0.0.1:8000"),
    (":", "127.0.0.1:11434"),
    ("0.0.0.0", "127.0.0.1:11434"),
    ("0.0.0.0:8000", "127.0.0.1:8000"),
    ("localhost:8000", "127.0.0.1:8000"),
    ("http://h", "h:80"),
    ("HTTP://h:11434", "h:11434"),
    ("http://h:11434/", "h:11434"),
    ("http://0.0.0.0", "127.0.0.1:80"),
    ("http://", "127.0.0.1:80"),
    ("[::1]", "[::1]:11434"),
    ("[::1]:8000", "[::1]:8000"),
    ("::1", "[::1]:11434"),
    ("[::]:8000", "[::1]:8000"),
    ("http://[fd00::5]", "[fd00::5]:80"),
    ("h:nonsense", "h:11434"),  # as Ollama: a port that is none falls back to the default
    ("h:99999", "h:11434"),
    ("http://h:-1", "h:80"),
]


@pytest.mark.parametrize(("text", "expected"), FORMS)
def test_ollama_host(text: str, expected: str | None) -> None:
    found = from_ollama_host(text)
    assert (str(found) if found else None) == expected


@pytest.mark.parametrize(
    ("text", "why"),
    [("https://h", "plain HTTP"), ("ftp://h", "plain HTTP"), ("http://h/ollama", "without a path")],
)
def test_ollama_host_that_can_be_no_node(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=f"OLLAMA_HOST={text} is not used.*{why}"):
        from_ollama_host(text)


@pytest.mark.parametrize(
    ("host", "expected"),
    [("", "127.0.0.1"), ("0.0.0.0", "127.0.0.1"), ("::", "::1"), ("LocalHost", "127.0.0.1"), ("h", "h")],
)
def test_reachable(host: str, expected: str) -> None:
    assert reachable(host) == expected


@pytest.mark.parametrize(
    ("listen", "address", "port", "own"),
    [
        ("127.0.0.1:11434", "127.0.0.1", 11434, True),
        ("127.0.0.1:11434", "127.0.0.1", 11435, False),
        ("127.0.0.1:11434", "127.0.0.2", 11434, False),
        ("127.0.0.1:11434", "10.0.0.1", 11434, False),
        ("localhost:11434", "::1", 11434, True),
        ("gpu1:11434", "GPU1", 11434, True),
        ("0.0.0.0:11434", "127.0.0.1", 11434, True),
        ("0.0.0.0:11434", "::1", 11434, True),
        ("0.0.0.0:11434", "192.0.2.1", 11434, False),
        ("[::]:11434", "127.0.0.1", 11434, True),
        ("[::1]:11434", "0:0:0:0:0:0:0:1", 11434, True),
        ("127.0.0.1:11434", "::ffff:127.0.0.1", 11434, True),
        ("127.0.0.1:0", "127.0.0.1", 0, False),  # an ephemeral port is not known yet
    ],
)
def test_own(listen: str, address: str, port: int, own: bool) -> None:
    assert Own.of(Address.model_validate(listen)).covers(address, port) is own


def test_all_interfaces_are_own() -> None:
    listen = Address(host="0.0.0.0", port=11434)
    for address in local_addresses():
        assert Own.of(listen).covers_any(["192.0.2.1", address], 11434)
    name = socket.gethostbyname(socket.gethostname())
    assert name in local_addresses()
