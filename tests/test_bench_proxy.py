"""The proxy benchmark's own instruments: what it counts, what it would overlook, and how it starts others."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging.config
import math
import os
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import psutil
import pytest
from ruamel.yaml import YAML

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

import bench_proxy_check
import bench_proxy_report as report
from bench_proxy import QUICK, Bench, lasted
from bench_proxy_check import check
from bench_proxy_client import LAST, Request, SmallTask, StreamTask, answer_end, quantile, small, streams
from bench_proxy_node import FIXED, Connection, taken, unchunked
from bench_proxy_results import Figures, Many, Results, Small, Streams
from bench_proxy_subjects import (
    DIRECT,
    ENVOY,
    LITELLM,
    OLLAMA,
    OPENAI,
    OWN,
    SUBJECTS,
    Cores,
    Running,
    node,
    running,
)  # fmt: skip
from bench_routing_subjects import ROOT, Broken, Place, filled, program

CORE = min(os.sched_getaffinity(0))
EMBED = b"POST /api/embed HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}"


def test_where_an_answer_ends_is_told_by_its_framing() -> None:
    whole = b"HTTP/1.1 200 OK\r\ncontent-length:  3\r\n\r\nabc"
    assert answer_end(whole) == len(whole)
    assert answer_end(whole[:-1]) is None
    assert answer_end(b"HTTP/1.1 200 OK\r\nTransfer-") is None
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"
    assert answer_end(chunked) == len(chunked)
    assert answer_end(chunked[:-2]) is None


def test_the_node_reads_requests_one_after_the_other_however_they_are_framed() -> None:
    first = taken(EMBED + b"GET")
    assert first is not None
    assert (first[1], first[2]) == (b"{}", len(EMBED))
    assert taken(EMBED[:-1]) is None
    chunked = (
        b"POST /api/embed HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n{\r\n1;x=y\r\n}\r\n0\r\n\r\n"
    )
    found = taken(chunked + b"next")
    assert found is not None
    assert (found[1], found[2]) == (b"{}", len(chunked))
    assert unchunked(b"5\r\nabc", 0) is None


def test_the_fixed_answers_are_json() -> None:
    for body in FIXED.values():
        json.loads(body)
    assert [model["name"] for model in json.loads(FIXED[b"/api/tags"])["models"]] == [
        "llama3.2:latest",
        "embed:latest",
    ]


def test_quantiles_of_few_and_of_none() -> None:
    assert quantile([1.0, 2.0, 3.0], 0.5) == 2.0
    assert quantile([1.0, 2.0, 3.0], 0.99) == 3.0
    assert math.isnan(quantile([], 0.5))


def test_proxy_and_others_have_a_core_each_where_there_are_two() -> None:
    assert Cores.of({3, 1, 2}) == Cores(proxy=3, others=1)
    assert Cores.of({7}) == Cores(7, 7)


@contextlib.asynccontextmanager
async def served(make: Callable[[], asyncio.Protocol]) -> AsyncIterator[int]:
    server = await asyncio.get_running_loop().create_server(make, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


async def test_the_node_answers_what_comes_at_once_one_after_the_other() -> None:
    stream = OLLAMA.stream(2, 1000.0).bytes()
    async with served(Connection) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(EMBED + stream + EMBED)
        for path in (b"/api/embed", b"/api/chat", b"/api/embed"):
            head = await reader.readuntil(b"\r\n\r\n")
            if path == b"/api/chat":
                assert b"chunked" in head
                assert (await reader.readuntil(LAST)).count(b'"done":false') == 2
            else:
                assert await reader.readexactly(len(FIXED[path])) == FIXED[path]
        writer.close()


@pytest.mark.parametrize("api", [OLLAMA, OPENAI], ids=["ollama", "openai"])
async def test_every_chunk_of_every_stream_is_counted(api: object) -> None:
    assert isinstance(api, type(OLLAMA))
    async with served(Connection) as port:
        found = await streams(StreamTask(port, api.stream(5, 1000.0), 4, 5, 1000.0))
    assert (found.asked, found.came, found.wrong) == (20, 20, {})
    assert found.open_most >= 1


async def test_chunks_that_never_come_count_as_late() -> None:
    async with served(Connection) as port:
        found = await streams(StreamTask(port, OLLAMA.stream(5, 1000.0), 4, 7, 1000.0))
    assert (found.asked, found.came) == (28, 20)
    assert found.late >= 8


async def test_a_stamp_that_comes_in_two_pieces_is_seen_once() -> None:
    class Dribbling(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            assert isinstance(transport, asyncio.Transport)
            self.transport = transport

        def data_received(self, data: bytes) -> None:
            task = asyncio.create_task(self.dribble())
            task.add_done_callback(lambda _: self.transport.close())

        async def dribble(self) -> None:
            line = b'{"response":" @1:1@","done":false}\n'
            body = b"%x\r\n%b\r\n" % (len(line), line)
            for byte in b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + body * 2 + b"0\r\n\r\n":
                self.transport.write(bytes([byte]))
                await asyncio.sleep(0)

    async with served(Dribbling) as port:
        found = await streams(StreamTask(port, OLLAMA.stream(2, 1000.0), 1, 2, 1000.0))
    assert (found.came, found.late, found.wrong) == (2, 2, {})  # the stamps are of long ago


async def test_refusals_and_broken_connections_are_no_answers() -> None:
    async with served(Connection) as port:
        found = await small(SmallTask(port, Request("/nowhere", "{}"), 2, 0.05, warm_s=0.0))
        assert found.answered > 0
        assert found.wrong == {"HTTP/1.1 404 Not Found": found.answered}
        assert math.isnan(found.p50_ms)
        found = await small(SmallTask(port, OLLAMA.small(), 2, 0.05, warm_s=0.0))
        assert (found.wrong, found.answered > 2) == ({}, True)


def a_small(concurrency: int, p50_ms: float, cpu_us: float = 400.0, wrong: int = 0) -> Small:
    refused = {"HTTP/1.1 503": wrong} if wrong else {}
    return Small(p50_ms, 2 * p50_ms, 100.0, 250, refused, concurrency, cpu_us)


def figures(name: str, *p50_ms: float, stream_ms: float = 2.0, many: Many | None = None) -> Figures:
    small = [a_small(many, ms) for ms in p50_ms for many in report.CONCURRENCIES]
    its = [Streams(3200, 3200, 0, 90.0, 80.0, 10.0, 32, {}, stream_ms)]
    return Figures(name, SUBJECTS[name].title, "1.0", small=small, streams=its, many=many)


MANY = Many(320_000, 320_000, 0, 90.0, 80.0, 10.0, 1000, {}, 1000, 0.6, 100.0, 119.0)
ABOUT = {
    "date": "2026-01-01", "quick": False, "rounds": 3, "machine": "2 cores", "python": "CPython 3.13.5",
    "yardstick_us": 20.0, "foreign_share": 0.01,
}  # fmt: skip


def results(own: Figures) -> Results:
    others = [
        figures(DIRECT, 0.1, 0.9, 0.2),
        figures(ENVOY, 0.3),
        figures(LITELLM, 8.1, 8.9, 8.2, stream_ms=90.0),
    ]
    return Results(dict(ABOUT), [*others, own])


def test_what_is_added_is_counted_round_by_round() -> None:
    kept = results(figures(OWN, 1.0, 1.8, 1.3))
    own = kept.of(OWN)
    assert own is not None
    assert kept.added_ms(own, DIRECT, 1, lambda s: s.p50_ms) == pytest.approx(0.9)


def verdicts(own: Figures) -> list[str]:
    return [row[2] for row in report.targets(results(own))[1]]


def test_the_aims_are_held_against_the_same_run() -> None:
    assert verdicts(figures(OWN, 1.0, 1.8, 1.3, many=MANY)) == ["yes"] * 8
    slow = dataclasses.replace(MANY, came=319_999, late=1, most_mb=121.0)
    assert verdicts(figures(OWN, 1.2, 2.0, 1.3, stream_ms=3.0, many=slow)) == [
        "no", "no", "yes", "no", "yes", "yes", "no", "no",
    ]  # fmt: skip
    few = dataclasses.replace(MANY, open_most=999)
    assert verdicts(figures(OWN, 1.0, 1.8, 1.3, many=few))[-1] == "not measured"
    assert verdicts(figures(OWN)) == [
        *("not measured", "not measured", "yes", "yes", "not measured", "not measured"),
    ]
    costly = figures(OWN, 1.0, 1.8, 1.3)
    costly.small = [
        dataclasses.replace(s, cpu_us=451.0 if s.concurrency == 1 else 449.0) for s in costly.small
    ]
    assert verdicts(costly)[-2:] == ["yes", "no"]


def test_results_are_read_as_they_were_kept(tmp_path: Path) -> None:
    kept = results(figures(OWN, 1.0, 1.8, 1.3, many=MANY))
    kept.save(tmp_path / "kept.json")
    assert report.document(Results.load(tmp_path / "kept.json")) == report.document(kept)


def test_who_is_missing_and_what_went_wrong_is_said() -> None:
    own = figures(OWN, 1.0, 1.8, 1.3)
    own.small.append(a_small(16, 1.0, wrong=3))
    kept = results(own)
    kept.figures.append(Figures("herd", "ollama-herd", note="not installed"))
    assert list(report.notes(kept)) == ["`sollol proxy`: HTTP/1.1 503 3 times", "ollama-herd: not installed"]
    assert "ollama-herd: not installed" in report.text(kept)
    assert "- ollama-herd: not installed" in report.document(kept)


def test_the_page_is_renewed_between_its_marks_alone() -> None:
    kept = results(figures(OWN, 1.0, 1.8, 1.3))
    page = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n"
    renewed = report.renewed(page, kept)
    assert renewed.startswith("before\n")
    assert renewed.endswith("\nafter\n")
    assert "old" not in renewed
    assert report.renewed(renewed, kept) == renewed
    with pytest.raises(ValueError, match="lacks"):
        report.renewed("nothing", kept)
    assert report.BEGIN in report.DOC.read_text("utf-8")


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.1234, "0.12"), (1.234, "1.23"), (12.34, "12.3"), (1234.5, "1,234"), (math.nan, "-")],
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert report.number(value) == text


@pytest.mark.parametrize("name", [DIRECT, "nginx", "haproxy", "envoy", "mitmdump", OWN])
async def test_proxies_as_configured_stream_and_change_nothing(name: str, tmp_path: Path) -> None:
    if name in ("haproxy", "envoy"):
        try:
            program(name)
        except Broken as error:
            pytest.skip(str(error))
    async with node(CORE, tmp_path) as place, running(SUBJECTS[name], place, CORE, tmp_path / name) as one:
        await check(one, place.address)
        if one.family:
            assert one.family.cpu_s() > 0
            assert one.family.rss_mb() > 1


@contextlib.asynccontextmanager
async def relayed(place: Place, spoilt: Callable[[bytes], bytes]) -> AsyncIterator[Running]:
    """A proxy that does something to what a node says."""

    async def relay(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter, do: Callable[[bytes], bytes]
    ) -> None:
        while data := await reader.read(1 << 16):
            writer.write(do(data))
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(*place.address.split(":"))
        await asyncio.gather(relay(reader, back, bytes), relay(there, writer, spoilt))

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield Running(SUBJECTS[DIRECT], server.sockets[0].getsockname()[1], None)


async def test_the_check_finds_a_proxy_that_gathers_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_proxy_check, "LIMIT_S", 2.0)
    kept: list[bytes] = []

    def gathered(data: bytes) -> bytes:
        kept.append(data)
        if b"content-length" not in kept[0].lower() and not data.endswith(LAST):
            return b""
        whole = b"".join(kept)
        kept.clear()
        return whole

    async with node(CORE, tmp_path) as place, relayed(place, gathered) as one:
        with pytest.raises(Broken, match="holds a stream's first pieces back"):
            await check(one, place.address)


async def test_the_check_finds_a_proxy_that_changes_pieces(tmp_path: Path) -> None:
    def changed(data: bytes) -> bytes:
        return data.replace(b'"done":false', b'"gone":false')

    async with node(CORE, tmp_path) as place, relayed(place, changed) as one:
        with pytest.raises(Broken, match="loses or changes pieces"):
            await check(one, place.address)


async def test_one_that_ends_under_way_is_noted_and_the_others_go_on(tmp_path: Path) -> None:
    async with node(CORE, tmp_path) as place, running(SUBJECTS["nginx"], place, CORE, tmp_path / "n") as one:
        assert one.family
        psutil.Process(one.family.pid).kill()
        bench, found = Bench(QUICK, Cores(CORE, CORE), tmp_path), figures("nginx")
        await asyncio.to_thread(psutil.wait_procs, [psutil.Process(one.family.pid)], 10)
        assert not await lasted(found, bench.measure(one, found, 0))
    assert "it ended" in found.note


async def test_one_that_is_not_installed_is_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench_proxy_subjects.ROOT", tmp_path)
    with pytest.raises(Broken, match="make bench-proxy"):
        SUBJECTS[LITELLM].version()


def test_the_files_of_litellm_are_what_it_reads(tmp_path: Path) -> None:
    config = YAML(typ="safe").load(filled("litellm.yaml", tmp_path, node="127.0.0.1:1").read_text())
    served_by = {one["model_name"]: one["litellm_params"]["api_base"] for one in config["model_list"]}
    assert served_by == dict.fromkeys(("llama3.2", "embed"), "http://127.0.0.1:1")
    quiet = json.loads((ROOT / "scripts/peers/quiet-log.json").read_text())
    logging.config.DictConfigurator(quiet)
    assert quiet["loggers"]["uvicorn.access"]["level"] == "ERROR"
