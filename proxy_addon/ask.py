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
from proxy_addon.analysis import Complexity, Kind, complexity_of, kind_of, needs_gpu
from proxy_addon.endpoints import ENDPOINTS, Endpoint, Handling, Task
from proxy_addon.prefix import Prefix, prefix_of
from proxy_addon.prompt import parts_of, question

ZSTD_LIMIT_BYTES = 20 << 20  #: Ollama's own cap on a decoded /v1 body
ORDER_LIMIT_BYTES = (
    1 << 20
)  #: of a body without a prompt, such as a pull's; a create's licences are far shorter
LARGEST_INT = (1 << 63) - 1  #: that of Ollama, and of the JSON in which the journal is written

#: Options that make Ollama reload a runner when they change (``server/sched.go`` ``needsReload``), and their
#: types. So does ``shift``, which stands beside the options.
RELOAD_OPTIONS: tuple[tuple[str, type], ...] = (
    ("main_gpu", int),
    ("num_batch", int),
    ("num_ctx", int),
    ("num_gpu", int),
    ("num_thread", int),
    ("use_mmap", bool),
)
#: What asks for nothing else than a request without the option: Ollama's own defaults (``api/types.go``).
_UNSET = frozenset({("main_gpu", 0), ("num_thread", 0)})

#: Bodies that the proxy passes on unread: they name no model, or are a model's bytes.
_OPAQUE = frozenset(
    e.path
    for e in ENDPOINTS
    if e.path == "/api/blobs/*" or (e.handling is Handling.PIN and e.path != "/api/push")
)

ReloadKey = tuple[tuple[str, int | bool], ...]


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
    plain: frozenset[str] = frozenset()  #: those that were set to what Ollama does anyway
    usual: ReloadKey = ()  #: what a request that sets none of them asks for: what the Modelfile sets
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
    prefix: Prefix = field(default=(), repr=False)  #: what the prompt begins with; never written down
    priority: int = 5  #: 1 (batch) to 10 (critical), already capped by what the client may ask for
    client: str = ""  #: its address, or the name of its class where a key names it
    weight: float = 1.0  #: of the client, beside others of the same priority
    body: dict[str, Any] = field(default_factory=dict, repr=False)  #: emptied when the request is placed

    @property
    def task(self) -> Task:
        """Generation or embedding."""
        return self.endpoint.task

    def settle(self, usual: ReloadKey) -> None:
        """Take over what the model's Modelfile sets, where the request says nothing; harmless twice."""
        if usual != self.usual:
            self.usual = usual
            found = {name: value for name, value in usual if name not in self.plain}
            self.reload_key = tuple(sorted((found | dict(self.reload_key)).items()))
            self.num_ctx = num_ctx_of(self.reload_key)


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
    if endpoint.handling is not Handling.ROUTE and len(content) > ORDER_LIMIT_BYTES:
        raise BadRequest(
            413, f"a request body of {endpoint.path} is at most {ORDER_LIMIT_BYTES >> 20} MiB long"
        )
    body = ask.body = _json(endpoint, headers, content)
    _one_reading(body)
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


#: Fields by which a request is placed. Ollama, as all of Go, takes them in any case, and the last one counts.
_DECISIVE = frozenset(("model", "name", "source", "stream", "options", "keep_alive", "messages", "prompt"))


def _one_reading(body: Mapping[str, Any]) -> None:
    """Refuse a body in which a node would find another model or prompt than we do."""
    for name in body.keys() - _DECISIVE:
        if (meant := name.casefold()) in _DECISIVE:
            raise BadRequest(400, f"the field {meant} must be written in lower case, not {name}")


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
    native = ask.endpoint.protocol == "native"
    options = _typed(body, "options", dict, {}) if native else {}  # elsewhere Ollama reads none
    if named := _runner_options(options, body if native else {}):
        ask.reload_key = normal(named)
        ask.plain = frozenset(named.keys() - dict(ask.reload_key).keys())
        ask.num_ctx = num_ctx_of(ask.reload_key)
    limit = _int(options, "num_predict")
    for name in () if native else ("max_tokens", "max_completion_tokens", "max_output_tokens"):
        limit = limit if limit is not None else _int(body, name)
    ask.max_tokens = limit if limit is not None and limit >= 0 else None
    ask.keep_alive = _scalar(body.get("keep_alive"))
    ask.tools = len(_typed(body, "tools", list, []))
    if native and ask.task is Task.GENERATE:
        messages = _typed(body, "messages", list, [])
        ask.load_only = not messages if ask.endpoint.path == "/api/chat" else not body.get("prompt")
        ask.unload = ask.load_only and _is_zero(ask.keep_alive)
    _read(ask, body)


def _read(ask: Ask, body: Mapping[str, Any]) -> None:
    """Take the measures of the prompt."""
    parts = parts_of(body)
    ask.prompt_tokens = int(sum(part.tokens for part in parts))
    ask.images = sum(len(part.media) for part in parts)
    ask.kind = kind_of(ask.task, question(parts))
    ask.complexity = complexity_of(ask.prompt_tokens)
    ask.requires_gpu = needs_gpu(ask.task, ask.complexity, ask.images)
    if ask.task is Task.GENERATE and not ask.load_only:
        ask.prefix = prefix_of(parts)


def _runner_options(options: Mapping[str, Any], body: Mapping[str, Any]) -> dict[str, int | bool]:
    """What of a request shapes the runner."""
    found: dict[str, int | bool] = {}
    for name, kind in RELOAD_OPTIONS if options else ():
        value = _int(options, name) if kind is int else _typed(options, name, kind, None)
        if value is not None:
            found[name] = value
    if _typed(body, "shift", bool, True) is False:  # without it almost all models shift
        found["shift"] = False
    return found


def normal(options: Mapping[str, int | bool]) -> ReloadKey:
    """``options`` that shape a runner, without those that say no more than the default does."""
    return tuple(
        sorted(
            (name, value)
            for name, value in options.items()
            # A number of layers below 0 is "as many as fit", like none at all.
            if (name, value) not in _UNSET and not (name == "num_gpu" and value < 0)
        )
    )


def num_ctx_of(reload_key: ReloadKey) -> int | None:
    """The context that is asked for, None where it is not."""
    return next((int(value) for name, value in reload_key if name == "num_ctx"), None)


def _scalar(value: Any) -> Any:
    """``value``, if it is not a whole tree: what outlives the body must be small."""
    return value if isinstance(value, int | float) or (isinstance(value, str) and len(value) < 64) else None


def _is_zero(keep_alive: Any) -> bool:
    if isinstance(keep_alive, str):
        return keep_alive.strip().rstrip("hmsnuµ") == "0"
    return keep_alive is not None and not isinstance(keep_alive, bool) and keep_alive == 0


def _form_field(content_type: str, content: bytes, name: str) -> str:
    """The text of one field of a multipart form, "" if it has none of that ``name``.

    Raises:
        BadRequest: if the body is no multipart form with a boundary.
    """
    kind, boundary = _parameter(content_type, "boundary")
    if kind != "multipart/form-data" or not boundary or len(boundary) > 70:  # RFC 2046 §5.1.1
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
