"""What is wrong with a request's head: the strict reading of RFC 9112 (§2.2, §3, §5). Pure.

mitmproxy's parser, like most, mends what it can: it splits the request line at any white space, ends a line
at a bare LF, strips a vertical tab from a length, passes on a folded value, NUL and a bare CR as they came.
Each of these is read otherwise by some other server, so that one of the two can be made to see a request
where the other sees a body.
"""

from __future__ import annotations

import re

from proxy_addon.access import Refusal

_TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
_LINE = re.compile(rb"%b ([^\x00-\x20\x7f]+) HTTP/(1\.[01])\r\n" % _TOKEN)
#: All fields and the empty line behind them. Values are visible text, spaces and tabs, and bytes beyond ASCII
#: (RFC 9110 §5.5).
FIELDS = re.compile(rb"(?:%b:[^\x00-\x08\x0a-\x1f\x7f]*\r\n)*\r\n" % _TOKEN)
_HOST = re.compile(rb"\r\nhost:", re.IGNORECASE)
#: Where a head ends for a parser that takes a bare LF for a line's end; so nothing hides behind one.
_END = re.compile(rb"\n\r?\n")

#: Pattern of a fault, and what is said of it; the first that is found.
_FAULTS = tuple(
    (re.compile(pattern), status, sentence)
    for pattern, status, sentence in (
        (rb"(?<!\r)\n|\r(?!\n)", 400, "a line of the request's head does not end with CR and LF"),
        (rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", 400, "the request's head has a control character"),
        (rb"\r\n[ \t]", 400, "a header of the request is folded, which HTTP/1.1 has given up"),
        (
            rb"\A%b [^ \r]+ HTTP/(?!1\.[01]\r)[0-9]\.[0-9]\r\n" % _TOKEN,
            505,
            "only HTTP/1.1 and HTTP/1.0 are served",
        ),
    )
)


def end_of(begun: bytes) -> int:
    """Where the head that ``begun`` begins with ends, its empty line included; -1 if it goes on."""
    end = _END.search(begun)
    return end.end() if end else -1


def refusal(head: bytes) -> Refusal | None:
    """Why the request with this whole ``head`` is refused, None if every server reads it alike.

    How the body is framed is another matter: mitmproxy judges that strictly, and :func:`access.framing`.
    """
    line = _LINE.match(head)
    if line is not None and FIELDS.fullmatch(head, line.end()):
        hosts = len(_HOST.findall(head))
        if hosts == 1:
            return None
        if hosts == 0 and (line[2] == b"1.0" or not line[1].startswith(b"/")):
            return None  # whom it is for stands in the target, if anywhere
        return Refusal(400, f"the request has {'more than one' if hosts else 'no'} Host header")
    for pattern, status, sentence in _FAULTS:
        if pattern.search(head):
            return Refusal(status, sentence)
    if line is None:
        return Refusal(400, "the request's first line is not METHOD TARGET HTTP/1.1")
    return Refusal(400, "a line of the request's head is not NAME: VALUE")


def too_large(limit_bytes: int) -> Refusal:
    """The refusal of a head of more than ``limit_bytes``."""
    return Refusal(
        431, f"the request's line and headers are larger than {limit_bytes} bytes (guard.head_limit_bytes)"
    )
