"""Where a body ends (RFC 9112 §6): followers that are fed what arrives, in pieces of any size. Pure.

A follower gives back the payload; its ``ended`` says that the body is complete, and its ``rest`` then is what
came behind it. Extensions of chunks and trailers are read over, as RFC 9110 §6.5.1 and RFC 9112 §7.1.1 allow.
"""

from __future__ import annotations

import re

#: A size is at most 15 hex digits (an exabyte), an extension at most as long as a line may be.
_SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})(?:[ \t]*;[^\x00-\x08\x0a-\x1f\x7f]*)?\r\n")
#: What may become a size.
_BEGUN_SIZE = re.compile(rb"[0-9A-Fa-f]{1,15}(?:[ \t]*(?:;[^\x00-\x08\x0a-\x1f\x7f]*)?)?\r?\Z")
LONGEST_LINE = 4096  #: of a chunk's size with its extensions
LONGEST_TRAILERS = 8192
#: So many chunks in one piece of the stream that are shorter than that on average are an attack: a megabyte
#: in chunks of one byte takes a second to follow.
SHREDS, SHRED_BYTES = 1024, 16
_CRLF = b"\r\n"
END = b"0\r\n\r\n"  #: of a chunked body without trailers


class FramingError(ValueError):
    """The bytes are not a body of this framing; the sentence says what is wrong.

    ``payload`` is what stood in order before it.
    """

    payload = b""


class Chunked:
    """Follows a chunked body (RFC 9112 §7.1)."""

    __slots__ = ("_held", "_in_trailers", "_left", "ended", "rest")

    def __init__(self) -> None:
        self._left = 0  # of the chunk under way, with the CRLF behind it
        self._held = b""  # the beginning of what cannot be understood yet
        self._in_trailers = False
        self.ended = False
        self.rest = b""

    @property
    def between(self) -> bool:
        """Whether everything that was fed has ended with a chunk, and the body goes on behind it."""
        return not (self._left or self._held or self._in_trailers or self.ended)

    def whole(self, data: bytes) -> int:
        """How many of the first bytes of ``data``, fed :attr:`between` two chunks, are whole chunks.

        These may be passed on as they are and need not be fed; the last one of a body is not among them.
        """
        at, length = 0, len(data)
        while at < length:
            size = _SIZE.match(data, at)
            if size is None:
                break
            payload = int(size[1], 16)
            after = size.end() + payload + 2
            if not payload or after > length or data[after - 2 : after] != _CRLF:
                break
            at = after
        return at

    def awaits(self, data: bytes) -> bool:
        """Whether ``data`` is the beginning of a chunk with a payload, of which more is to come."""
        size = _SIZE.match(data)
        if size is None:
            return not data.startswith(b"0") and _BEGUN_SIZE.match(data) is not None
        return int(size[1], 16) > 0 and len(data) < size.end() + int(size[1], 16) + 2

    def step(self, data: bytes) -> int:
        """How many of the first bytes of ``data`` to feed, to be :attr:`between` two chunks the sooner."""
        if self._in_trailers:
            return len(data)
        if self._left and not self._held:
            return min(self._left, len(data))
        return data.find(b"\n") + 1 or len(data)

    def feed(self, data: bytes) -> bytes:
        """The payload in ``data``. Raises FramingError if it is not chunked."""
        payload: list[bytes] = []
        try:
            self._follow(data, payload)
        except FramingError as error:
            error.payload = b"".join(payload)
            raise
        return b"".join(payload)

    def _follow(self, data: bytes, payload: list[bytes]) -> None:
        if self._held:
            data, self._held = self._held + data, b""
        at, length = 0, len(data)
        while at < length:
            if self._left > 2:
                piece = data[at : at + self._left - 2]
                payload.append(piece)
                if len(payload) == SHREDS and sum(map(len, payload)) < SHREDS * SHRED_BYTES:
                    raise FramingError("it comes in too many too small chunks")
                at += len(piece)
                self._left -= len(piece)
            elif self._left:
                if not _CRLF.startswith(data[at : at + 2]):
                    raise FramingError("a chunk does not end where its size says")
                if length - at < 2:
                    break
                at += 2
                self._left = 0
            elif self._in_trailers:
                after = _trailers_end(data, at)
                if after is None:
                    break
                self.ended, self.rest = True, data[after:]
                return
            else:
                size = _SIZE.match(data, at)
                if size is None:
                    _must_be_begun(data, at)
                    break
                at = size.end()
                self._left = int(size[1], 16) + 2
                if self._left == 2:
                    self._left, self._in_trailers = 0, True
        self._held = data[at:]

    def end(self) -> None:
        """The connection has ended. Raises FramingError if the body has not."""
        if not self.ended:
            raise FramingError("the connection ended before the last chunk")


def _must_be_begun(data: bytes, at: int) -> None:
    if len(data) - at > LONGEST_LINE or not _BEGUN_SIZE.match(data, at):
        raise FramingError("the size of a chunk is not a number")


_TRAILER = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+:[^\x00-\x08\x0a-\x1f\x7f]*\r\n")


def _trailers_end(data: bytes, at: int) -> int | None:
    """Where the trailers and the empty line behind them end; None if they have not come yet."""
    begun = at
    while (field := _TRAILER.match(data, at)) is not None:
        at = field.end()
    if at - begun > LONGEST_TRAILERS or len(data) - begun > LONGEST_TRAILERS + LONGEST_LINE > at:
        raise FramingError("the trailers are too long")
    if data.startswith(_CRLF, at):
        return at + 2
    if data.find(_CRLF, at) >= 0 or b"\n" in data[at:]:
        raise FramingError("a trailer is not one")
    return None


class Length:
    """Follows a body of ``length`` bytes."""

    __slots__ = ("_left", "ended", "rest", "total")

    def __init__(self, length: int) -> None:
        self.total = self._left = length
        self.ended = not length
        self.rest = b""

    def feed(self, data: bytes) -> bytes:
        """What of ``data`` is the body's."""
        left = self._left
        if len(data) < left:
            self._left = left - len(data)
            return data
        self._left, self.ended, self.rest = 0, True, data[left:]
        return data[:left]

    def end(self) -> None:
        """The connection has ended. Raises FramingError if the body has not."""
        if not self.ended:
            raise FramingError(f"the connection ended {self._left} bytes before the body did")


class UntilClose:
    """Follows a body that ends with its connection, as HTTP/1.0 has them."""

    __slots__ = ("ended", "rest")

    def __init__(self) -> None:
        self.ended = False
        self.rest = b""

    def feed(self, data: bytes) -> bytes:
        """All of it."""
        return data

    def end(self) -> None:
        """The connection has ended, and so has the body."""
        self.ended = True


Follower = Chunked | Length | UntilClose


def chunk(data: bytes) -> bytes:
    """``data`` as a chunk; of nothing, nothing, for an empty chunk would be the end."""
    return b"%x\r\n%b\r\n" % (len(data), data) if data else b""
