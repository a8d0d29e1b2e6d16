"""Heads that no two servers read alike, that mean somebody else, or that are too large."""

from __future__ import annotations

from tests.hostile.forms import BODY, CHAT, LAST, MIB, OK_LENGTH, SMUGGLED, Attack, head, post, sized


def _within(name: str, field: bytes, **kwargs: object) -> Attack:
    """A request that is sound but for one field."""
    return Attack(name, post(f"Content-Length: {len(BODY)}", field), **kwargs)  # type: ignore[arg-type]


SYNTAX = (
    _within("field folded", b"X-Note: a\r\n b"),
    _within("field folded by a tab", b"X-Note: a\r\n\tb"),
    Attack("first field folded", head("POST /api/chat HTTP/1.1", b" X: y", OK_LENGTH, host=b"") + BODY),
    _within("bare LF between fields", b"X-Note: a\nX-Other: b"),
    Attack("bare LFs throughout", b"GET /api/version HTTP/1.1\nHost: localhost\nConnection: close\n\n"),
    Attack("bare LF at the end", b"GET /api/version HTTP/1.1\r\nHost: localhost\r\n\n"),
    _within("bare CR in a value", b"X-Note: a\rX-Injected: b"),
    _within("NUL in a value", b"X-Note: a\x00b"),
    _within("control character in a value", b"X-Note: a\x01b"),
    _within("DEL in a value", b"X-Note: a\x7fb"),
    _within("space before the colon", b"X-Note : a"),
    _within("tab before the colon", b"X-Note\t: a"),
    _within("field without a name", b": a"),
    _within("field without a colon", b"X-Note"),
    _within("space in a name", b"X Note: a"),
    _within("NUL in a name", b"X\x00Note: a"),
    _within("letters beyond ASCII in a name", "X-Nöte: a".encode()),
    Attack("HTTP/0.9", b"GET /api/version\r\n\r\n"),
    Attack("HTTP/1.2", head("GET /api/version HTTP/1.2"), (505,)),
    Attack("HTTP/2.0 in text", head("GET /api/version HTTP/2.0"), (505,)),
    Attack("HTTP/3.7", head("GET /api/version HTTP/3.7"), (505,)),
    Attack("the preface of HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", (505,)),
    Attack("HTTP/1.1 in small letters", head("GET /api/version http/1.1")),
    Attack("HTTP/1.10", head("GET /api/version HTTP/1.10")),
    Attack("HTTP/1,1", head("GET /api/version HTTP/1,1")),
    Attack("no version", head("GET /api/version HTTP/")),
    Attack("four words in the request line", head("GET /api/version HTTP/1.1 HTTP/1.1")),
    Attack("two spaces in the request line", head("GET  /api/version HTTP/1.1")),
    Attack("tabs in the request line", head("GET\t/api/version\tHTTP/1.1")),
    Attack("space before the method", head(" GET /api/version HTTP/1.1")),
    Attack("method with a bracket", head("GE(T /api/version HTTP/1.1")),
    Attack("method with a colon", head("GET: /api/version HTTP/1.1")),
    Attack("method beyond ASCII", head("GÉT /api/version HTTP/1.1")),
    Attack("NUL in the target", head(b"GET /api/\x00version HTTP/1.1")),
    Attack("bare CR in the target", head(b"GET /api/version?\rX:y HTTP/1.1")),
    Attack("control character in the target", head(b"GET /api/version?\x01 HTTP/1.1")),
    Attack("target without a slash", head("GET api/version HTTP/1.1")),
    Attack("not HTTP", b"hello\r\n\r\n"),
    Attack("bare LFs before a request", b"\n\n\n\n" + LAST),
    Attack("Host missing", head("GET /api/version HTTP/1.1", host=b"")),
    Attack("Host twice", head("GET /api/version HTTP/1.1", "Host: evil.example")),
    Attack("Host with a path", head("GET /api/version HTTP/1.1", host=b"localhost/evil") + LAST, (403, 200)),
    Attack(
        "Host with a user",
        head("GET /api/version HTTP/1.1", host=b"localhost@evil.example") + LAST,
        (403, 200),
    ),
    Attack("HTTP/1.0 without Host", head("GET /api/version HTTP/1.0", host=b""), (200,)),
    Attack("empty lines before a request", b"\r\n\r\n" + LAST, (200,)),
)

#: Who is meant: other hosts, other pages, other proxies.
TARGETS = (
    Attack("foreign Host", head("GET /api/version HTTP/1.1", host=b"evil.example") + LAST, (403, 200)),
    Attack(
        "foreign Host behind an own one",
        head("GET /api/version HTTP/1.1", host=b"localhost.evil.example") + LAST,
        (403, 200),
    ),
    Attack("foreign Origin", sized(BODY, "/api/chat", "Origin: https://evil.example") + LAST, (403, 200)),
    Attack("Origin null", sized(BODY, "/api/chat", "Origin: null") + LAST, (403, 200)),
    Attack(
        "Origin twice",
        sized(BODY, "/api/chat", "Origin: http://localhost", "Origin: https://evil.example") + LAST,
        (403, 200),
    ),
    Attack(
        "foreign Origin, OpenAI",
        sized(BODY, "/v1/chat/completions", "Origin: https://evil.example") + LAST,
        (403, 200),
        protocol="openai",
    ),
    Attack(
        "foreign Origin, Anthropic",
        sized(BODY, "/v1/messages", "Origin: https://evil.example") + LAST,
        (403, 200),
        protocol="anthropic",
    ),
    Attack(
        "absolute form of a foreign host",
        head("GET http://evil.example/api/version HTTP/1.1") + LAST,
        (403, 200),
    ),
    Attack(
        "absolute form of an own host",
        head("POST http://localhost/api/chat HTTP/1.1", OK_LENGTH) + BODY + LAST,
        (200, 200),
        (CHAT,),
    ),
    Attack(
        "absolute form with a foreign Host",
        head("GET http://localhost/api/version HTTP/1.1", host=b"evil.example") + LAST,
        (403, 200),
    ),
    Attack(
        "absolute form of a metadata service",
        head("GET http://169.254.169.254/latest/meta-data HTTP/1.1") + LAST,
        (404, 200),
    ),
    Attack("absolute form with a user", head("GET http://localhost@evil.example/ HTTP/1.1")),
    Attack("absolute form of another scheme", head("GET gopher://evil.example:70/ HTTP/1.1")),
    Attack("absolute form of https", head("GET https://localhost/api/version HTTP/1.1") + LAST, (200, 200)),
    Attack("CONNECT elsewhere", head("CONNECT evil.example:443 HTTP/1.1"), (403,)),
    Attack("CONNECT to a node", head("CONNECT 127.0.0.1:11434 HTTP/1.1") + SMUGGLED, (403,)),
    Attack(
        "upgrade to h2c",
        head(
            "GET /api/version HTTP/1.1",
            "Upgrade: h2c",
            "Connection: Upgrade, HTTP2-Settings",
            "HTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA",
        )
        + LAST,
        (200, 200),
    ),
    Attack(
        "upgrade to a web socket",
        head(
            "GET /api/version HTTP/1.1",
            "Upgrade: websocket",
            "Connection: Upgrade",
            "Sec-WebSocket-Version: 13",
            "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==",
        )
        + LAST,
        (200, 200),
    ),
)

#: More than a request needs.
GIANTS = (
    Attack("one field of a megabyte", head("GET /api/version HTTP/1.1", b"X: " + b"a" * MIB), (431,)),
    Attack("100,000 fields", head("GET /api/version HTTP/1.1", *[b"X: a"] * 100_000), (431,)),
    Attack("a request line of a megabyte", head(b"GET /" + b"a" * MIB + b" HTTP/1.1"), (431,)),
    Attack("a head that never ends", b"GET / HTTP/1.1\r\n" + b"X: a\r\n" * (MIB // 6), (431,)),
    Attack("a line that never ends", b"G" * MIB, (431,)),
)
