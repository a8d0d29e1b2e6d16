"""What a request wants: model, context, expected tokens, client. Parsed once, from headers and body.

Nothing of a prompt is kept: an :class:`Ask` holds lengths and names only, so that it can be logged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from email.message import Message
from typing import Any

import orjson
import zstandard

from agent.ollama import names
from proxy_addon.analysis import Complexity, Kind
from proxy_addon.endpoints import ENDPOINTS, Endpoint, Handling, Task

BYTES_PER_TOKEN = 4.0  #: English text in common BPE vocabularies; learning corrects it per model
TOKENS_PER_IMAGE = 768  #: between gemma3's 256 and llava's 2,880: an image is worth a long paragraph
ZSTD_LIMIT_BYTES = 20 << 20  #: Ollama's own cap on a decoded /v1 body
LARGEST_INT = (1 << 63) - 1  #: that of Ollama, and of the JSON in which the journal is written

#: Options that make Ollama reload a runner when they change (``server/sched.go`` ``needsReload``).
RELOAD_OPTIONS = ("num_ctx", "num_batch", "num_gpu", "main_gpu", "use_mmap", "num_thread")

#: Bodies that the proxy passes on unread: they name no model, or are a model's bytes.
_OPAQUE = frozenset(
    e.path
    for e in ENDPOINTS
    if e.path == "/api/blobs/*" or (e.handling is Handling.PIN and e.path != "/api/push")
)

ReloadKey = tuple[tuple[str, Any], ...]
#: Growing prefixes of a prompt, the shortest first: keyed hash of the text so far, and its estimated tokens.
Prefix = tuple[tuple[bytes, int], ...]


class BadRequest(Exception):
    """The request cannot be understood. ``message`` goes to the client with HTTP ``status``."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


@dataclass(slots=True)
class Ask:
    """One request, reduced to what placing it needs."""

    endpoint: Endpoint
    model: str = ""  #: as the client wrote it: answers echo it
    key: str = ""  #: canonical name, "" where the endpoint needs no model
    stream: bool = False
    num_ctx: int | None = None
    reload_key: ReloadKey = ()  #: the reload-forcing options that were set, sorted by name
    prompt_tokens: int = 0  #: estimate
    max_tokens: int | None = None  #: the client's cap on output tokens
    keep_alive: Any = None
    load_only: bool = False  #: empty prompt: load the model (or, with keep_alive 0, unload it)
    unload: bool = False
    images: int = 0
    tools: int = 0
    kind: Kind = "generation"  #: what is asked for, by the words of the request; see analysis.py
    complexity: Complexity = "simple"
    requires_gpu: bool = False
    prefix: Prefix = ()  #: what the prompt begins with; never written down
    priority: int = 5  #: 1 (batch) to 10 (critical), already capped by what the client may ask for
    client: str = ""  #: its address, or the name of its class where a key names it
    weight: float = 1.0  #: of the client, beside others of the same priority
    body: dict[str, Any] = field(default_factory=dict, repr=False)  #: emptied when the request is placed

    @property
    def task(self) -> Task:
        """Generation or embedding."""
        return self.endpoint.task


def parse(endpoint: Endpoint, path: str, headers: Mapping[str, str], content: bytes, client: str) -> Ask:
    """Read one request.

    Raises:
        BadRequest: with Ollama's status and a sentence, for broken JSON, a missing or invalid model name,
            an undecodable zstd body or a field of the wrong type.
    """
    ask = Ask(endpoint, client=client, stream=endpoint.stream_default)
    if endpoint.path.endswith("/models/*"):
        return _name(ask, path.rsplit("/v1/models/", 1)[1])
    if endpoint.path == "/v1/audio/transcriptions":
        ask.prompt_tokens = len(content) // 4000  # 16 kHz PCM speech: about 3 tokens and 32 kB a second
        return _name(ask, _form_field(headers.get("content-type", ""), content, "model"))
    if endpoint.handling is Handling.ANSWER or endpoint.path in _OPAQUE:
        return ask
    body = ask.body = _json(endpoint, headers, content)
    ask.stream = _typed(body, "stream", bool, endpoint.stream_default)
    if endpoint.path == "/api/copy":
        return _name(ask, _typed(body, "source", str, ""), "source")
    _name(ask, _typed(body, "model", str, "") or _typed(body, "name", str, ""))
    if endpoint.handling is Handling.ROUTE:
        _inference(ask, body)
    return ask


def _name(ask: Ask, name: str, field_name: str = "model") -> Ask:
    if not name:
        raise BadRequest(400, f"{field_name} is required")
    try:
        ask.key = names.canonical(name)
    except ValueError as exc:
        raise BadRequest(400, str(exc)) from exc
    ask.model = name
    return ask


def _json(endpoint: Endpoint, headers: Mapping[str, str], content: bytes) -> dict[str, Any]:
    encoding = headers.get("content-encoding", "").strip().lower()
    if encoding == "zstd" and endpoint.protocol != "native":
        content = _unzstd(content)
    elif encoding not in ("", "identity"):
        raise BadRequest(415, f"content-encoding {encoding} is not understood here")
    if not content:
        raise BadRequest(400, "missing request body")
    try:
        body = orjson.loads(content)
    except orjson.JSONDecodeError as exc:
        raise BadRequest(400, f"the request body is not valid JSON: {exc}") from exc
    if not isinstance(body, dict):
        raise BadRequest(400, "the request body must be a JSON object")
    return body


def _unzstd(content: bytes) -> bytes:
    try:
        with zstandard.ZstdDecompressor().stream_reader(content, read_across_frames=True) as reader:
            plain = reader.read(ZSTD_LIMIT_BYTES + 1)
    except zstandard.ZstdError as exc:
        raise BadRequest(400, f"the request body is not valid zstd: {exc}") from exc
    if len(plain) > ZSTD_LIMIT_BYTES:
        raise BadRequest(413, f"the decompressed request body is larger than {ZSTD_LIMIT_BYTES >> 20} MiB")
    return plain


def _typed[T](body: Mapping[str, Any], name: str, kind: type[T], default: T) -> T:
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise BadRequest(400, f"{name} must be {_KIND[kind]}, not {type(value).__name__}")
    return value


_KIND: dict[type, str] = {
    str: "a string",
    bool: "true or false",
    int: "a whole number",
    dict: "an object",
    list: "a list",
}


def _int(body: Mapping[str, Any], name: str) -> int | None:
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value):
        raise BadRequest(400, f"{name} must be a whole number, not {type(value).__name__}")
    if abs(value) > LARGEST_INT:
        raise BadRequest(400, f"{name} must be a whole number of at most 63 bits")
    return int(value)


def _inference(ask: Ask, body: Mapping[str, Any]) -> None:
    options = _typed(body, "options", dict, {})
    ask.num_ctx = _int(options, "num_ctx")
    ask.reload_key = tuple(
        (name, options[name]) for name in sorted(RELOAD_OPTIONS) if options.get(name) is not None
    )
    native = ask.endpoint.protocol == "native"
    limit = _int(options, "num_predict") if native else None
    for name in () if native else ("max_tokens", "max_completion_tokens", "max_output_tokens"):
        limit = limit if limit is not None else _int(body, name)
    ask.max_tokens = limit if limit is not None and limit >= 0 else None
    ask.keep_alive = body.get("keep_alive")
    ask.tools = len(_typed(body, "tools", list, []))
    text, ask.images = _measure(body)
    ask.prompt_tokens = int(text / BYTES_PER_TOKEN) + ask.images * TOKENS_PER_IMAGE
    if native and ask.task is Task.GENERATE:
        messages = _typed(body, "messages", list, [])
        ask.load_only = not messages if ask.endpoint.path == "/api/chat" else not body.get("prompt")
        ask.unload = ask.load_only and _is_zero(ask.keep_alive)


def _is_zero(keep_alive: Any) -> bool:
    if isinstance(keep_alive, str):
        return keep_alive.strip().rstrip("hmsnuµ") == "0"
    return keep_alive is not None and not isinstance(keep_alive, bool) and keep_alive == 0


_PROMPT_FIELDS = ("prompt", "system", "suffix", "template", "input", "instructions", "messages", "tools")


def _measure(body: Mapping[str, Any]) -> tuple[int, int]:
    """Characters of text that the model will read, and the number of images, wherever the body has them."""
    characters = 0
    images = len(body["images"]) if isinstance(body.get("images"), list) else 0
    todo: list[Any] = [body.get(name) for name in _PROMPT_FIELDS]
    while todo:
        value = todo.pop()
        if isinstance(value, str):
            characters += len(value)
        elif isinstance(value, list):
            if value and isinstance(value[0], int):  # token ids
                characters += int(len(value) * BYTES_PER_TOKEN)
            else:
                todo.extend(value)
        elif isinstance(value, dict):
            if value.get("type") in ("image_url", "input_image", "image"):
                images += 1
                continue
            for name, inner in value.items():
                if name == "images" and isinstance(inner, list):
                    images += len(inner)
                else:
                    todo.append(inner)
    return characters, images


def _form_field(content_type: str, content: bytes, name: str) -> str:
    """The text of one field of a multipart form, "" if it has none of that ``name``.

    Raises:
        BadRequest: if the body is no multipart form with a boundary.
    """
    kind, boundary = _parameter(content_type, "boundary")
    if kind != "multipart/form-data" or not boundary:
        raise BadRequest(400, "expected a multipart/form-data body with a boundary")
    for part in content.split(b"--" + boundary.encode()):
        head, separator, value = part.partition(b"\r\n\r\n")
        if separator and _field_name(head) == name:
            return value.removesuffix(b"\r\n").decode("utf-8", "replace")
    return ""


def _field_name(head: bytes) -> str | None:
    """The name of the form field whose part begins with ``head``; a file's name is another thing."""
    for line in head.decode("utf-8", "replace").splitlines():
        header, _, value = line.partition(":")
        if header.strip().lower() == "content-disposition":
            return _parameter(value, "name")[1]
    return None


def _parameter(header: str, name: str) -> tuple[str, str | None]:
    """The value of a header without its parameters, in lower case, and the parameter ``name``."""
    message = Message()
    message["content-type"] = header.strip()
    found = message.get_param(name)
    return header.partition(";")[0].strip().lower(), found if isinstance(found, str) else None
