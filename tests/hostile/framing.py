"""Bodies of which two servers could disagree where they end."""

from __future__ import annotations

from tests.hostile.forms import BODY, CHAT, LAST, MIB, OK_LENGTH, SMUGGLED, Attack, chunked, head, post


def _length(text: str | bytes) -> bytes:
    value = text.encode() if isinstance(text, str) else text
    return post(b"Content-Length: " + value, body=BODY + SMUGGLED)


def _coding(text: str | bytes) -> bytes:
    value = text.encode("latin-1") if isinstance(text, str) else text
    return post(b"Transfer-Encoding:" + value, body=b"0\r\n\r\n" + SMUGGLED)


#: Two ways to read where the body ends.
LENGTHS = (
    Attack("CL.TE", post("Content-Length: 5", "Transfer-Encoding: chunked", body=b"0\r\n\r\n" + SMUGGLED)),
    Attack("TE.CL", post("Transfer-Encoding: chunked", "Content-Length: 4", body=b"5c\r\n" + SMUGGLED)),
    Attack("CL twice, unlike", post("Content-Length: 0", OK_LENGTH, body=SMUGGLED)),
    Attack("CL twice, alike", post(OK_LENGTH, OK_LENGTH)),
    Attack("CL list, alike", _length(f"{len(BODY)}, {len(BODY)}")),
    Attack("CL list, unlike", _length(f"0, {len(BODY)}")),
    Attack("CL +5", _length("+5")),
    Attack("CL -1", _length("-1")),
    Attack("CL hexadecimal", _length("0x5")),
    Attack("CL with a leading zero", _length("005")),
    Attack("CL with an underscore", _length("1_0")),
    Attack("CL 5.0", _length("5.0")),
    Attack("CL 5 5", _length("5 5")),
    Attack("CL empty", _length("")),
    Attack("CL of Arabic digits", _length("\u0665")),
    Attack("CL with a vertical tab", _length(b"\x0b5")),
    Attack("CL of 400 digits", _length("9" * 400)),
    Attack("CL of 20 digits", _length("18446744073709551621")),
    Attack("CL of a terabyte", _length("1099511627776"), answers=(413,)),
    Attack("CL folded", post(b"Content-Length:\r\n 0", body=SMUGGLED)),
    Attack("CL with NUL", _length(b"0\x00")),
)

CODINGS = (
    Attack("TE xchunked", _coding(" xchunked")),
    Attack("TE chunked, identity", _coding(" chunked, identity")),
    Attack("TE identity, chunked", _coding(" identity, chunked")),
    Attack("TE identity", _coding(" identity")),
    Attack("TE gzip", _coding(" gzip")),
    Attack(
        "TE gzip, chunked", post("Transfer-Encoding: gzip, chunked", body=b"0\r\n\r\n") + LAST, (501, 200)
    ),
    Attack("TE chunked twice in a list", _coding(" chunked, chunked")),
    Attack("TE in quotes", _coding(' "chunked"')),
    Attack("TE with a parameter", _coding(" chunked;a=b")),
    Attack("TE with a leading comma", _coding(" ,chunked")),
    Attack("TE with a vertical tab", _coding(b" \x0bchunked")),
    Attack("TE with NUL", _coding(b" chunked\x00")),
    Attack("TE with a Kelvin sign", _coding("chun\u212aed".encode())),
    Attack("TE empty", _coding("")),
    Attack(
        "TE twice",
        post("Transfer-Encoding: chunked", "Transfer-Encoding: identity", body=b"0\r\n\r\n" + SMUGGLED),
    ),
    Attack(
        "TE twice, alike",
        post("Transfer-Encoding: chunked", "Transfer-Encoding: chunked", body=b"0\r\n\r\n" + SMUGGLED),
    ),
    Attack("TE folded", post(b"Transfer-Encoding:\r\n chunked", body=b"0\r\n\r\n" + SMUGGLED)),
    Attack(
        "TE behind a bare LF",
        post(b"X: y\nTransfer-Encoding: chunked", "Content-Length: 5", body=b"0\r\n\r\n" + SMUGGLED),
    ),
    Attack("TE behind a bare CR", post(b"X: y\rTransfer-Encoding: chunked", OK_LENGTH)),
    Attack("TE with a space before the colon", post("Transfer-Encoding : chunked", OK_LENGTH)),
    Attack(
        "TE in HTTP/1.0",
        head("POST /api/chat HTTP/1.0", "Transfer-Encoding: chunked") + b"0\r\n\r\n" + SMUGGLED,
    ),
    Attack(
        "TE with a leading tab",
        post(b"Transfer-Encoding:\tchunked", body=b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)) + LAST,
        answers=(200, 200),
        reaches=(CHAT,),
    ),
    Attack(
        "TE in capitals",
        post(b"TRANSFER-ENCODING: CHUNKED", body=b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)) + LAST,
        answers=(200, 200),
        reaches=(CHAT,),
    ),
)

CHUNKS = (
    Attack("chunk size of 40 digits", chunked(end=b"f" * 40 + b"\r\n")),
    Attack("chunk size of 17 digits", chunked(end=b"1" + b"0" * 15 + b"5\r\n12345\r\n0\r\n\r\n")),
    Attack("chunk size -1", chunked(end=b"-1\r\n\r\n")),
    Attack("chunk size +5", chunked(end=b"+5\r\n12345\r\n0\r\n\r\n")),
    Attack("chunk size 0x5", chunked(end=b"0x5\r\n12345\r\n0\r\n\r\n")),
    Attack("chunk size with an underscore", chunked(end=b"1_0\r\n" + b"0" * 16 + b"\r\n0\r\n\r\n")),
    Attack("chunk size missing", chunked(end=b"\r\n\r\n0\r\n\r\n")),
    Attack("chunk size behind a space", chunked(end=b" 5\r\n12345\r\n0\r\n\r\n")),
    Attack("chunk longer than its size", chunked(end=b"5\r\n1234567\r\n0\r\n\r\n" + SMUGGLED)),
    Attack("chunk without CRLF behind it", chunked(end=b"5\r\n123450\r\n\r\n" + SMUGGLED)),
    Attack("chunk size ended by a bare LF", chunked(end=b"5\n12345\r\n0\r\n\r\n" + SMUGGLED)),
    Attack("chunk size ended by a bare CR", chunked(end=b"5\rX\r\n12345\r\n0\r\n\r\n")),
    Attack("chunk extension with a bare LF", chunked(end=b"5;a\nb\r\n12345\r\n0\r\n\r\n" + SMUGGLED)),
    Attack("chunk extension of a megabyte", chunked(end=b"5;a=" + b"b" * MIB + b"\r\n12345\r\n0\r\n\r\n")),
    Attack("chunk extensions", chunked(BODY, size='%x;name=value;q="x y"') + LAST, (200, 200), (CHAT,)),
    Attack("chunks of one byte", chunked(*(bytes([byte]) for byte in BODY)) + LAST, (200, 200), (CHAT,)),
    Attack(
        "trailers announced",
        chunked(BODY, end=b"0\r\nX-Sum: 1\r\n\r\n", fields=["Trailer: X-Sum"]) + LAST,
        (400, 200),
    ),
    Attack("trailers", chunked(BODY, end=b"0\r\nX-Sum: 1\r\n\r\n") + LAST, (200, 200), (CHAT,)),
    Attack(
        "a length among the trailers",
        chunked(BODY, end=b"0\r\nContent-Length: 9\r\n\r\n") + LAST,
        (200, 200),
        (CHAT,),
    ),
    Attack("trailers of a megabyte", chunked(BODY, end=b"0\r\n" + b"X: y\r\n" * (MIB // 6))),
    Attack("a broken trailer", chunked(BODY, end=b"0\r\nno colon\r\n\r\n")),
)
