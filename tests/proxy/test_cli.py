"""The command line as its user meets it: help, sentences instead of tracebacks, tables."""

from __future__ import annotations

import asyncio
import io
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path
from threading import Thread
from typing import Any

import orjson
import pytest
from mitmproxy import http
from mitmproxy.test import tflow
from rich.console import Console
from typer.testing import CliRunner, Result

from agent.report import Resident
from proxy_addon import cli
from proxy_addon.admin import Admin
from proxy_addon.commands import explain
from proxy_addon.commands.client import NoAnswer, human_bytes, human_s
from proxy_addon.commands.models import by_model
from proxy_addon.placement.decision import Candidate, Decision
from proxy_addon.record import Record
from proxy_addon.settings import Settings, Source
from tests.proxy.test_admin import admin, let_wait
from tests.proxy.test_telemetry import KEY, fleet, record

__all__ = ["admin", "fleet"]  # the fixtures


def run(*args: str, env: dict[str, str] | None = None) -> Result:
    return CliRunner().invoke(cli.app, args, env=env, prog_name="sollol")


@contextmanager
def serving(answer: Any) -> Iterator[str]:
    """A server in a thread, for the commands run their own loop; ``answer(path)`` is (status, body)."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body = answer(self.path)
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def url(admin: Admin) -> Iterator[str]:
    """A proxy's own pages, answered by the real addon."""

    def answer(path: str) -> tuple[int, bytes]:
        flow = tflow.tflow()
        flow.request = http.Request.make("GET", f"http://x{path}")
        admin.request(flow)
        assert flow.response is not None
        return flow.response.status_code, flow.response.content or b""

    with serving(answer) as base:
        yield base


async def journalled(admin: Admin, *made: Record) -> None:
    """Have these requests in the journal."""
    for each in made:
        admin.journal.add(each)
    await admin.journal.close()


def test_help_lists_every_command_and_no_later_one() -> None:
    shown = run("--help")
    assert shown.exit_code == 0
    listed = [line.split()[0] for line in shown.output.partition("Commands:")[2].splitlines() if line.strip()]
    assert listed == ["proxy", "agent", "shard", "status", "explain", "replay", "models", "demo"]


def test_version() -> None:
    assert run("--version").output == f"sollol {version('sollol')}\n"


def test_an_unknown_command_is_told() -> None:
    shown = run("frobnicate")
    assert shown.exit_code == 2
    assert "No such command 'frobnicate'" in shown.output


MODULES = """
import sys
from proxy_addon import cli
try:
    cli.app({args!r}, prog_name="sollol")
except SystemExit as end:
    assert not end.code, end.code
loaded = {{name.partition(".")[0] for name in sys.modules}}
print("LOADED", *sorted(loaded & {{"mitmproxy", "shard", "aiohttp", "proxy_addon", "agent"}}))
"""


@pytest.mark.parametrize(
    ("args", "loaded"),
    [
        (["--help"], "proxy_addon"),
        (["agent", "--help"], "agent proxy_addon"),
        (["proxy", "--help"], "aiohttp proxy_addon"),
    ],
)
def test_a_command_imports_what_it_needs(args: list[str], loaded: str) -> None:
    """An agent's machine never imports mitmproxy."""
    done = subprocess.run(
        [sys.executable, "-c", MODULES.format(args=args)],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout.splitlines()[-1] == f"LOADED {loaded}"


@pytest.mark.parametrize("args", [["--help"], ["proxy", "--help"], ["proxy", "-h"]])
def test_the_installed_script(args: list[str]) -> None:
    script = Path(sys.executable).with_name("sollol")
    done = subprocess.run([script, *args], capture_output=True, text=True, check=True, timeout=60)
    assert "Serve the whole fleet as one Ollama server." in done.stdout


def test_nothing_of_proxy_addon_names_shard_in_an_import() -> None:
    sources = Path(cli.__file__).parent.rglob("*.py")
    lines = [line for source in sources for line in source.read_text().splitlines()]
    assert [line for line in lines if line.strip().startswith(("import shard", "from shard"))] == []


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        (
            "gguf",
            "sollol x: the Python module gguf is missing:"
            ' in SOLLOL\'s source folder, pip install ".[shard]" brings it\n',
        ),
        ("surely_not_there", "sollol x: the Python module surely_not_there is missing\n"),
    ],
)
def test_a_missing_module_is_told(name: str, sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setitem(cli.COMMANDS, "x", ("m:a", ""))
    monkeypatch.setattr(cli, "import_module", missing)
    shown = run("x")
    assert (shown.exit_code, shown.output) == (1, sentence)


@pytest.mark.parametrize(("name", "told"), [("ollama", True), ("surely_not_there", False)])
def test_a_module_that_a_running_command_misses(
    name: str, told: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(prog_name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(cli, "app", missing)
    with pytest.raises(SystemExit if told else ModuleNotFoundError) as ended:
        cli.main()
    brings = 'in SOLLOL\'s source folder, pip install ".[demo]" brings it'
    sentence = f"sollol: the Python module ollama is missing: {brings}\n"
    assert capsys.readouterr().err == (sentence if told else "")
    assert not told or (isinstance(ended.value, SystemExit) and ended.value.code == 1)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Settings]:
    """What the launcher was given in place of being run."""
    given: list[Settings] = []

    def launch(settings: Settings, source: Source) -> int:
        assert source.read() == settings
        given.append(settings)
        return 3

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("proxy_addon.start.run", launch)
    return given


def test_proxy_flags_become_settings(launched: list[Settings], tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("listen: a:1\nplacement: score\npoll: {interval_s: 5}")
    shown = run(
        *("proxy", "--config", "own.yaml", "--listen", ":8000", "--nodes", "a,b:1", "--nodes", "c"),
        *("--mode", "regular@8080", "--mode", "socks5", "--set", "retry.rounds=2", "--state-dir", "/tmp/s"),
        *("--workers", "4"),
        env={"SOLLOL_POLL__INTERVAL_S": "7", "SOLLOL_PLACEMENT": "least_loaded"},
    )
    assert shown.exit_code == 3, shown.output
    [settings] = launched
    assert str(settings.listen) == "127.0.0.1:8000"
    assert [str(node) for node in settings.nodes] == ["a:11434", "b:1", "c:11434"]
    assert settings.modes == ("regular@8080", "socks5")
    assert (settings.retry.rounds, settings.poll.interval_s, settings.placement) == (2, 7, "least_loaded")
    assert (settings.state_dir, settings.workers) == (Path("/tmp/s"), 4)


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (
            ("--set", "timeouts.conect_s=1"),
            "--set timeouts.conect_s: timeouts.conect_s is not a setting; did you",
        ),
        (("--listen", "a:b"), "--listen: listen should be host:port, not 'a:b'"),
        (("--config", "none.yaml"), "none.yaml: cannot be read: No such file or directory"),
    ],
)
def test_a_mistaken_setting_is_one_sentence(
    launched: list[Settings], args: tuple[str, ...], sentence: str
) -> None:
    shown = run("proxy", *args)
    assert shown.exit_code == 2
    assert shown.output.startswith(f"sollol proxy: {sentence}")
    assert shown.output.count("\n") == 1
    assert launched == []


def test_status_is_a_table(url: str, admin: Admin) -> None:
    admin.fleet.nodes["a:1"].resident[KEY] = Resident(name="gemma3:latest", size=10, size_vram=6)
    admin.fleet.nodes["b:1"].poll_error = "connection refused"
    admin.telemetry.observe(record())
    shown = run("status", "--url", url)
    assert shown.exit_code == 0, shown.output
    lines = shown.output.splitlines()
    assert lines[0] == (
        "degraded: 1 of 2 nodes up, 0 requests in flight, 0 waiting, 1 done, placed by finish_time"
    )
    assert lines[1].split("  ")[0] == "NODE"
    row = [cell.strip() for cell in lines[2].split("  ") if cell.strip()]
    assert row == ["a:1", "up", "0/1", "gemma3:latest", "15.3 GiB of 18.6 GiB", "30%", "1", "0", "1.5 s", "-"]
    assert [line.strip() for line in lines[-2:]] == [
        "a:1: gemma3:latest is 40 % on the CPU",
        "b:1: connection refused",
    ]


def test_status_names_who_waits_first(url: str, admin: Admin) -> None:
    let_wait(admin, **dict.fromkeys("abcdefg", 5))
    lines = [line.rstrip() for line in run("status", "--url", url).output.splitlines()]
    assert lines[-6] == "waiting 1: gemma3:latest for 10.0.0.9, priority 5, 3.0 s so far, 4.0 s to go"
    assert lines[-1] == "and 2 more wait"


def test_status_for_a_script(url: str) -> None:
    assert orjson.loads(run("status", "--json", env={"SOLLOL_URL": url}).output)["status"] == "degraded"


@pytest.mark.parametrize("ask", [(), ("second",)])
def test_explain_tells_the_way_and_the_reason(url: str, admin: Admin, ask: tuple[str, ...]) -> None:
    first, second = record(), record()
    first.id, second.id = "first", "second"
    rows = (
        Candidate("b:1", cost=9.5, terms={"wait_s": 9.0, "decode_s": 0.5}),
        Candidate("a:1", cost=1.25, terms={"decode_s": 1.25}, notes=("resident", "CPU offload 40 %")),
        Candidate("[fe80::2]:1", excluded="[Errno 111] :x: refused"),
    )
    second.decisions = [Decision("finish_time", "a:1", rows, "a:1 finishes first")]
    asyncio.run(journalled(admin, first, second))
    shown = run("explain", *ask, "--url", url)
    assert shown.exit_code == 0, shown.output
    table = [line.split() for line in shown.output.splitlines()]
    assert shown.output.startswith("request second: /api/chat x from ")
    assert "decision 1 by finish_time: a:1 finishes first" in shown.output
    at = table.index(["CANDIDATE", "COST", "wait_s", "decode_s", "NOTES"])
    assert table[at + 1] == ["a:1", "1.250", "-", "1.250", "resident,", "CPU", "offload", "40", "%"]
    assert table[at + 2] == ["b:1", "9.500", "9.000", "0.500"]
    assert table[at + 3][:4] == ["[fe80::2]:1", "-", "-", "-"]
    assert "may not serve: [Errno 111] :x: refused" in shown.output
    assert ["b:1", "0", "ms", "500", "ms", "died"] in table
    assert "prompt tokens 5, output tokens 7" in shown.output


ENTRY: dict[str, Any] = {
    "id": "x",
    **dict.fromkeys(("at", "client", "protocol", "path", "outcome", "node", "model"), "text"),
    **{"status": 200, "duration_s": 1.5, "first_byte_s": 0.5, "shard_plan": "p"},
    **{"kind": "generation", "complexity": "simple", "requires_gpu": True, "priority": 5},
    **{"queued_s": 1.5, "queue_position": 3, "expected_wait_s": 2.0},
    "decisions": [
        {
            **{"policy": "score", "node": "a:1", "reason": "text", "candidates_left_out": 2},
            "candidates": [
                {"node": "a:1", "cost": 1.5, "terms": {"decode_s": 1.5}, "notes": ["resident"]},
                {"node": "b:1", "excluded": "is down"},
            ],
        }
    ],
    "attempts": [{"node": "a:1", "started_s": 0.1, "ended_s": None, "outcome": "ok", "detail": ""}],
    "stats": {"output_tokens": 7, "load_s": None},
}
NOTE = {"note": "action", "id": "x", "at": "text", "data": {"does": "load", "after_s": 3.25, "why": None}}


def spoiled(value: Any) -> Iterator[Any]:
    """``value`` with one thing in it missing or of another kind, in every way."""
    for part in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        shortened = value.copy()
        del shortened[part]
        yield shortened
        for wrong in (None, 7, "text", [], {}, [None], {"x": 1}, *spoiled(value[part])):
            changed = value.copy()
            changed[part] = wrong
            yield changed


def test_explain_shows_an_entry_or_says_that_it_cannot() -> None:
    answers = [None, 7, [], {}, *spoiled(ENTRY), *spoiled(NOTE)]
    told = 0
    for answer in answers:
        console = Console(width=200, file=io.StringIO())
        try:
            explain.show(answer, console)
        except NoAnswer as exc:
            assert "this entry cannot be shown" in str(exc)
            assert console.file.getvalue() == ""  # type: ignore[attr-defined]  # a StringIO: nothing half
            told += 1
    assert len(answers) / 4 < told < len(answers)


def test_what_explain_cannot_show_is_one_sentence() -> None:
    with serving(lambda _: (200, orjson.dumps({**ENTRY, "decisions": [{"nodes": 1}]}))) as url:
        shown = run("explain", "x", "--url", url)
        assert shown.exit_code == 1
        assert shown.output == (
            "sollol explain: this entry cannot be shown, for another version of SOLLOL has written it or it"
            " is damaged; --json prints it as it is\n"
        )
        assert orjson.loads(run("explain", "x", "--json", "--url", url).output)["id"] == "x"
        shown = run("explain", "--url", url)
        assert shown.output == (
            f"sollol explain: the proxy at {url} is of another version: it tells of no requests\n"
        )


def test_explain_tells_what_was_asked_for_and_how_long_it_waited() -> None:
    with serving(lambda _: (200, orjson.dumps(ENTRY))) as url:
        shown = run("explain", "x", "--url", url).output
    wanted = "\nasked for generation (simple, with a GPU), priority 5"
    assert f"{wanted}, waited 1.5 s in line at place 3, 2.0 s expected\n" in shown


def test_explain_lists_what_the_proxy_did_by_itself(url: str, admin: Admin) -> None:
    async def note() -> str:
        noted = admin.journal.note(
            "action", {"does": "load", "model": "gemma3", "node": None, "after_s": 3.25}
        )
        await admin.journal.close()
        return noted

    shown = run("explain", "--kind", "action", "--url", url)
    assert shown.output == "sollol explain: the proxy has noted no 'action' yet\n"
    entry_id = asyncio.run(note())
    shown = run("explain", "--kind", "action", "--url", url)
    assert shown.exit_code == 0
    cells = [cell.strip() for cell in shown.output.splitlines()[1].split("  ") if cell.strip()]
    assert cells[1:] == [entry_id, "does load, model gemma3, after 3.2 s"]
    assert run("explain", entry_id, "--url", url).output.splitlines()[1:] == [
        "does load",
        "model gemma3",
        "after 3.2 s",
    ]
    mistaken = run("explain", entry_id, "--kind", "action", "--url", url)
    assert (mistaken.exit_code, mistaken.output) == (
        2,
        "sollol explain: an ID says what is meant: leave out --kind\n",
    )


def test_explain_without_anything_to_explain(url: str) -> None:
    shown = run("explain", "--url", url)
    assert (shown.exit_code, shown.output) == (
        1,
        "sollol explain: the proxy has not placed any request yet\n",
    )
    shown = run("explain", "a b", "--url", url)
    assert shown.output == f"sollol explain: the proxy at {url} says: no request 'a b' is in the journal\n"


def test_models_by_node(url: str, admin: Admin) -> None:
    shown = run("models", "--url", url)
    lines = [line.split() for line in shown.output.splitlines()]
    assert lines == [
        ["MODEL", "VERSION", "SIZE", "IN", "MEMORY", "ON", "STORED", "ON"],
        ["gemma3:latest", "dddddddddddd", "1", "B", "-", "a:1"],
    ]


def test_two_versions_of_a_model_are_two_rows() -> None:
    def node(name: str, digest: str, *resident: str) -> dict[str, Any]:
        models = [{"name": "m", "digest": digest, "size": 1}]
        return {"name": name, "models": models, "resident": [{"name": name_} for name_ in resident]}

    rows = by_model([node("a", "1"), node("b", "2", "m"), node("c", "1", "m", "x")])
    assert [(row["digest"], row["stored"], row["in_memory"]) for row in rows] == [
        ("1", ["a", "c"], ["c"]),
        ("2", ["b"], ["b"]),
    ]


@pytest.mark.parametrize("command", ["status", "explain", "models"])
def test_nobody_there(command: str) -> None:
    with serving(lambda _: (200, b"")) as gone:
        pass
    shown = run(command, "--url", gone)
    assert shown.exit_code == 1
    assert shown.output == (
        f"sollol {command}: no proxy answers at {gone} (Connection refused): start one with `sollol proxy`, "
        "or name it with --url\n"
    )


def test_somebody_else_there() -> None:
    with serving(lambda _: (404, b"404 page not found")) as ollama:
        shown = run("status", "--url", ollama)
    assert (shown.exit_code, shown.output) == (
        1,
        f"sollol status: what listens at {ollama} is not a SOLLOL proxy (HTTP 404)\n",
    )


@pytest.mark.parametrize("url_", ["ftp://x", "http://"])
def test_what_is_no_url(url_: str) -> None:
    assert run("status", "--url", url_).output == f"sollol status: {url_} is not the URL of a proxy\n"


def test_quantities_for_people() -> None:
    assert [human_bytes(n) for n in (None, 5, 2048, 5 << 30, 5 << 40)] == [
        "-",
        "5 B",
        "2.0 KiB",
        "5.0 GiB",
        "5.0 TiB",
    ]
    assert [human_s(n) for n in (None, 0.0123, 1.26)] == ["-", "12 ms", "1.3 s"]
