"""What clients, nodes and others on the network say: understood, or refused with the documented error."""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Callable
from typing import Any, cast

import orjson
import pytest
import zstandard
from hypothesis import example, given
from hypothesis import strategies as st
from yarl import URL
from zeroconf.asyncio import AsyncServiceInfo

from agent import cors, host_header
from agent.announce import read_announcement
from agent.json_lines import JsonLines, NoMessage
from agent.ollama import names, runners
from agent.ollama.client import OllamaError, parse_ps, parse_tags, split_lines
from proxy_addon import access
from proxy_addon.ask import Ask, BadRequest, parse
from proxy_addon.endpoints import ENDPOINTS, Endpoint, match
from proxy_addon.fleet.addresses import from_ollama_host
from proxy_addon.fleet.discovery import announced_node
from proxy_addon.fleet.polls import PollFailed, parse_report, parse_version
from proxy_addon.fleet.shapes import blob_of, lacking, options_of
from proxy_addon.record import Record
from proxy_addon.relay import Framing, Tee, judge_start, read_stats
from proxy_addon.retry import Meaning, classify
from shard import translate
from shard.options import resolve

#: That are numbers in JSON as orjson writes it.
numbers = st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False)
json_values = st.recursive(
    st.none() | st.booleans() | numbers | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=10,
)  # fmt: skip


def objects(*keys: str) -> st.SearchStrategy[dict[str, Any]]:
    """Objects with some of these keys, and anything in them."""
    return st.dictionaries(st.sampled_from(keys), json_values, max_size=len(keys))


# -- names -------------------------------------------------------------------------------------------------


@given(
    st.text(max_size=30)
    | st.from_regex(r"([a-z.]+(:\d+)?/)?([a-z]+/)?[A-Za-z0-9._-]+(:[\w-]+)?", fullmatch=True)
)
def test_the_canonical_form_of_a_name_is_its_own_and_that_of_its_display(name: str) -> None:
    try:
        key = names.canonical(name)
    except ValueError:
        return
    assert names.canonical(key) == key == key.lower()
    assert names.canonical(names.display(name)) == key
    assert not name.isascii() or names.canonical(f" {name.upper()} ") == key


# -- asks --------------------------------------------------------------------------------------------------

endpoints = st.sampled_from(ENDPOINTS)
ASKED = (
    *("model", "name", "source", "stream", "options", "messages", "prompt", "input", "tools", "keep_alive"),
    *("shift", "max_tokens", "format", "images", "system", "suffix", "think", "max_output_tokens"),
)


def asked(endpoint: Endpoint, content: bytes, headers: dict[str, str]) -> Ask | None:
    try:
        return parse(endpoint, endpoint.path.replace("*", "x"), headers, content, "10.0.0.1")
    except BadRequest as bad:
        assert 400 <= bad.status < 500 and bad.message
        return None


@given(endpoints, objects(*ASKED))
@example(match("/api/chat"), {"model": "m", "messages": [{"role": 1, "content": [{"type": 1, "text": {}}]}]})
@example(match("/api/generate"), {"model": "m", "options": {"num_ctx": 1e300, "num_predict": -1.5}})
@example(match("/v1/messages"), {"model": "m", "system": [[1]], "messages": [{"content": [{"source": 1}]}]})
def test_a_body_of_any_shape_is_an_ask_or_refused(endpoint: Endpoint, body: dict[str, Any]) -> None:
    ask = asked(endpoint, orjson.dumps({"model": "llama3.2", **body}), {})
    if ask is not None:
        assert ask.prompt_tokens >= 0 and ask.images >= 0 and (ask.max_tokens or 0) >= 0
        orjson.dumps([ask.reload_key, ask.num_ctx, ask.keep_alive])  # what the journal must be able to write


@given(
    endpoints,
    st.binary(max_size=60),
    st.sampled_from(["", "zstd", "gzip", "identity", "ZSTD "]),
    st.text(max_size=40),
)
@example(match("/v1/audio/transcriptions"), b"--b\r\n\r\n", "", "multipart/form-data; boundary=b")
@example(match("/v1/chat/completions"), b"1e999", "", "")
def test_any_bytes_are_an_ask_or_refused(
    endpoint: Endpoint, content: bytes, encoding: str, kind: str
) -> None:
    asked(
        endpoint,
        content,
        {"content-encoding": encoding, "content-type": kind} if encoding else {"content-type": kind},
    )


@given(
    st.dictionaries(st.text(max_size=5), json_values, max_size=3), st.integers(0, 60), st.binary(max_size=4)
)
def test_what_zstd_has_packed_is_read_and_what_is_damaged_refused(
    more: dict[str, Any], at: int, wrong: bytes
) -> None:
    endpoint = match("/v1/embeddings")
    assert endpoint is not None
    plain = orjson.dumps({**more, "model": "llama3.2", "input": "x"})
    packed = zstandard.ZstdCompressor().compress(plain)
    zstd = {"content-encoding": "zstd"}
    whole = asked(endpoint, packed, zstd)
    assert whole is None or whole.key == names.canonical("llama3.2")
    assert (whole is None) == (asked(endpoint, plain, {}) is None)
    asked(endpoint, packed[:at] + wrong + packed[at + len(wrong) :], zstd)


# -- answers of nodes --------------------------------------------------------------------------------------


def tee(framing: Framing, path: str) -> tuple[Tee, Record]:
    endpoint = match(path)
    assert endpoint is not None
    record = Record("0" * 16, endpoint.protocol, 0.0, "", endpoint=endpoint)
    record.ask = Ask(endpoint, stream=True)
    return Tee(record, framing, lambda: 0.0), record


FINAL = b'{"done":true,"done_reason":"stop","prompt_eval_count":7,"eval_count":3,"eval_duration":9000}\n'
lines = st.lists(st.binary(max_size=30).map(lambda text: text.replace(b"\n", b" ") + b"\n"), max_size=6)
cuts = st.lists(st.integers(0, 300), max_size=8)


@given(lines, st.booleans(), cuts)
@example([], True, [1, 2, 3, 40])
@example([b"x" * 30 + b"\n"] * 6, True, list(range(0, 300, 40)))
def test_a_stream_and_its_statistics_are_the_same_however_it_is_cut(
    of: list[bytes], ended: bool, at: list[int]
) -> None:
    whole = b"".join(of) + (FINAL if ended else b"")
    heard = []
    for places in ([], sorted(min(place, len(whole)) for place in at), list(range(0, len(whole), 60))):
        through, record = tee("ndjson", "/api/chat")
        parts = [whole[a:b] for a, b in zip([0, *places], [*places, len(whole)], strict=True)]
        out = b"".join(through(part) or b"" for part in parts if part)
        assert whole.startswith(out) and (not out or out.endswith(b"\n"))
        out += through(b"") or b""
        heard.append((out, record.stats, record.outcome))
    if ended:
        assert heard[0][0] == whole and heard[0][1] is not None and heard[0][1].output_tokens == 3
    assert all(out == heard[0][0] and outcome == heard[0][2] for out, _, outcome in heard)
    assert len({repr(stats) for _, stats, _ in heard}) == 1 or not ended


@given(st.sampled_from(["ndjson", "sse", "whole", "opaque"]), st.binary(max_size=80), st.booleans())
@example("ndjson", b'{"error":{"message":1}}\n', False)
@example("sse", b'data: {"error":[]}\n\n', True)
def test_a_beginning_is_judged_once_and_for_all(framing: Framing, begun: bytes, ended: bool) -> None:
    verdict, detail = judge_start(framing, begun, ended)
    assert (verdict == "wait") <= (not ended) and (verdict == "first_line") <= bool(detail)
    if verdict not in ("wait", "empty") and framing != "whole":
        assert judge_start(framing, begun, True) == (verdict, detail)
        assert (
            judge_start(framing, bytearray(begun + b"\n\nmore"), False)[0] == verdict
            or framing == "opaque"
            or ended
        )


@given(st.binary(max_size=120))
@example(b'"eval_count":' + b"9" * 5000)
@example(b'"done_reason":"\xff"')
def test_statistics_are_read_of_any_bytes(tail: bytes) -> None:
    stats = read_stats(tail)
    assert stats is None or (stats.output_tokens or 0) >= 0


rows = st.lists(
    objects(
        "name",
        "model",
        "size",
        "digest",
        "modified_at",
        "details",
        "size_vram",
        "expires_at",
        "context_length",
    )
)


@given(
    st.binary(max_size=60) | rows.map(lambda of: orjson.dumps({"models": of})) | json_values.map(orjson.dumps)
)
@pytest.mark.parametrize(
    ("read", "error"),
    [
        (parse_tags, OllamaError),
        (parse_ps, OllamaError),
        (parse_version, PollFailed),
        (parse_report, PollFailed),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_a_node_or_its_agent_answers_is_read_or_refused(
    read: Callable[[bytes], object], error: type[Exception], body: bytes
) -> None:
    try:
        read(body)
    except error as refused:
        assert str(refused)


@given(json_values | st.text())
@example("num_ctx 1e400\nnum_batch nan\nuse_mmap maybe\nnum_gpu " + "9" * 5000)
def test_what_a_node_shows_of_a_model_is_used_or_passed_over(told: Any) -> None:
    blob_of(told)
    orjson.dumps(options_of(told))
    if isinstance(told, dict):
        lacking(told)


@given(
    st.sampled_from(["status", "first_line", "reset", "connect", "empty"]),
    st.integers(100, 599),
    st.text(),
    endpoints,
)
def test_every_failure_has_a_meaning(phase: str, status: int, text: str, endpoint: Endpoint) -> None:
    assert classify(phase, status, text, endpoint) in Meaning


@given(st.binary(max_size=80), cuts)
def test_lines_are_the_same_however_they_come(data: bytes, at: list[int]) -> None:
    whole, rest = split_lines(data)
    found: list[bytes] = []
    held = b""
    places = sorted(min(place, len(data)) for place in at)
    for a, b in zip([0, *places], [*places, len(data)], strict=True):
        more, held = split_lines(held + data[a:b])
        found += more
    assert (found, held) == (whole, rest)


# -- others on the network ---------------------------------------------------------------------------------


@given(
    st.dictionaries(
        st.sampled_from([b"node", b"kind", b"ollama", b"version", b"\xff"]),
        st.none() | st.binary(max_size=12),
    ),
    st.integers(0, 65535),
)
@example({b"node": b"n", b"ollama": b"99999"}, 11435)
@example({b"node": b"n", b"ollama": b"0"}, 11435)
@example({b"node": b"n", b"ollama": "٣".encode()}, 11435)
def test_a_node_that_is_announced_can_be_polled(properties: dict[bytes, bytes | None], port: int) -> None:
    info = AsyncServiceInfo(
        "_sollol._tcp.local.",
        "x._sollol._tcp.local.",
        port,
        properties=properties,
        addresses=[b"\x0a\x00\x00\x01"],
    )
    told = read_announcement(info)
    node = announced_node(told) if told is not None else None
    if node is not None:
        assert URL(node.url).port == node.port and node.agent_url and URL(node.agent_url).port == port


@given(st.lists(st.lists(st.sampled_from([*runners.FLAGS, "--parallel=3", "-1", "x"]) | st.text(max_size=5))))
@example([[next(iter(runners.FLAGS)), "9" * 5000]])
def test_any_command_line_is_a_runners_or_not(of: list[list[str]]) -> None:
    slots = runners.most_slots(of)
    assert slots is None or slots > 0


TRUSTED = (ipaddress.ip_network("127.0.0.0/8"),)


@given(
    st.text(max_size=40)
    | st.lists(st.ip_addresses().map(str) | st.sampled_from(["127.0.0.1", "[::1]:80", "x"])).map(", ".join)
)
def test_a_proxys_word_is_an_address_and_a_strangers_is_not_believed(word: str) -> None:
    headers = {"x-forwarded-for": word}
    ipaddress.ip_address(access.behind("127.0.0.1", headers, TRUSTED))
    assert access.behind("10.0.0.9", headers, TRUSTED) == "10.0.0.9"


@given(st.text(max_size=40), st.text(max_size=40))
def test_host_and_origin_are_judged_whatever_they_are(host: str, origin: str) -> None:
    host_header.is_own(host_header.name_of(host))
    cors.same_origin(origin, host)
    assert isinstance(cors.admitted(origin, cors.DEFAULT_ORIGINS), bool)
    try:
        from_ollama_host(host)
    except ValueError as refused:
        assert str(refused)


@given(
    st.lists(st.dictionaries(st.text(max_size=5), json_values, max_size=3), max_size=4),
    cuts,
    st.binary(max_size=10),
)
def test_messages_are_the_same_however_they_come(
    of: list[dict[str, Any]], at: list[int], wrong: bytes
) -> None:
    class Deaf:
        def pause_reading(self) -> None: ...

        def resume_reading(self) -> None: ...

    async def hear(parts: list[bytes]) -> list[Any]:
        heard: list[Any] = []
        lines_ = JsonLines()
        lines_.connection_made(cast(asyncio.Transport, Deaf()))
        for part in parts:
            lines_.data_received(part)
        lines_.eof_received()
        try:
            while (message := await lines_.receive()) is not None:
                heard.append(message)
        except NoMessage as refused:
            heard.append(str(refused))
        return heard

    sent = b"".join(orjson.dumps(message) + b"\n" for message in of)
    for data in (sent, sent + wrong):
        places = sorted(min(place, len(data)) for place in at)
        parts = [data[a:b] for a, b in zip([0, *places], [*places, len(data)], strict=True)]
        heard = asyncio.run(hear(parts))
        assert heard[: len(of)] == of and heard == asyncio.run(hear([data]))


# -- translation for llama-server --------------------------------------------------------------------------

TRANSLATED = (
    *("messages", "prompt", "suffix", "system", "images", "format", "tools", "think", "raw", "context"),
    *("top_logprobs", "logprobs", "input", "truncate", "dimensions", "template"),
)


@given(objects(*TRANSLATED))
@example({"messages": [{"role": [], "content": {}, "images": [1], "tool_calls": [{"function": 1}]}]})
@example({"messages": [{"tool_calls": 1}]})
@pytest.mark.parametrize(
    "make",
    [
        lambda asked: translate.chat_body(asked, resolve({}, None)),
        lambda asked: translate.generate_messages(asked),
        lambda asked: translate.embed_inputs(asked),
        lambda asked: translate.infill_body({"suffix": "x", **asked}, resolve({}, None)),
        lambda asked: translate.think_of(asked),
    ],
    ids=["chat", "generate", "embed", "infill", "think"],
)
def test_a_request_of_any_shape_is_translated_or_refused(
    make: Callable[[dict[str, Any]], object], request_: dict[str, Any]
) -> None:
    try:
        orjson.dumps(make(request_))
    except translate.Refusal as refused:
        assert 400 <= refused.status < 600 and refused.message
