"""Finds, starts and supervises one ``llama-server`` process that serves one GGUF to us alone.

The programs are those that ``agent/llama_cpp.py`` finds, then :mod:`shard.portable_server`. One that dies of
an illegal instruction is left out from then on and the next takes its place.

It listens on a Unix socket in a directory that only we can enter: a loopback port would be open to every
local user and every web page (llama-server allows all origins), and a free port cannot be reserved for a
child, so that on a busy machine another process takes it first (seen in this project's tests).
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import logging
import os
import re
import signal
import sys
import tempfile
import time
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import aiohttp

from agent import llama_cpp
from agent.child import dies_with_us
from agent.llama_cpp import Program

log = logging.getLogger(__name__)

# Between two questions for /health; a child that exits is noticed at once, not at the next question.
HEALTH_INTERVAL_S = 0.02
# OLLAMA_LOAD_TIMEOUT's default: a load that takes longer is taken for stuck.
LOAD_TIMEOUT_S = 300.0
STOP_GRACE_S = 5.0
_TAIL_LINES = 60
_LONGEST_LINE_BYTES = 2**16
# A refusal is told to its client, and quotes what the client sent: that is nobody else's to read.
_QUOTED = re.compile(r"(got exception: ).*")

# What a log line must contain to be the reason for an exit, most telling first.
_REASONS = (
    "out of memory",
    "failed to allocate",
    "error:",
    " E ",
    "GGML_ASSERT",
    "terminate called",
    "invalid",
)
# load_tensors, llama_kv_cache and sched_reserve say one such line for every buffer.
_BUFFER = re.compile(
    r"\s(?P<device>\S+(?:\[[^\]]+\])?) (?P<what>model|KV|RS|compute|output)"
    r" buffer size = +(?P<mib>[\d.]+) MiB"
)
_OUT_OF_MEMORY = ("out of memory", "failed to allocate", "bad_alloc")

# Ollama gives a model without a chat template the template "{{ .Prompt }}": the texts, nothing around them.
PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message.content }}{% if not loop.last %}{{ '\\n\\n' }}{% endif %}"
    "{% endfor %}"
)

_unusable: set[tuple[str, ...]] = set()


class LlamaServerError(Exception):
    """llama-server could not be started or has died; the message is Ollama's wording of it."""


class Unloadable(LlamaServerError):
    """To try again, or to make room, would not help."""


@dataclass(frozen=True, slots=True)
class Launch:
    """Everything that a running process cannot change: a request that needs another value reloads."""

    model: Path
    num_ctx: int
    parallel: int = 1
    threads: int = 0
    num_batch: int = 512
    num_gpu: int = -1
    chat_template: str | None = None
    pooling: str | None = "last"  #: how a model that embeds sums up a text; None: as its file says
    embeddings: bool = False  #: costs logits for every token of every batch: a generative model does without
    alias: str = ""
    mmproj: Path | None = None
    adapters: tuple[Path, ...] = ()
    context_shift: bool = False

    def serves(self, wanted: Launch) -> bool:
        """Return whether a process of this launch can do what ``wanted`` would: who embeds also generates."""
        return self == wanted or (self.embeddings and self == replace(wanted, embeddings=True))

    def flags(self, socket: Path, placement: Sequence[str] = ()) -> list[str]:
        """Return llama-server's command line after the program, to listen on the Unix ``socket``.

        ``placement`` are the flags that say which layers lie where (``shard/plan.py``), in place of
        ``num_gpu``. Weights are not repacked then: a layer's result must not depend on where it lies, and an
        rpc-server does not repack.
        """
        num_batch = str(min(self.num_batch, self.num_ctx))
        values: dict[str, str | None] = {
            "--model": str(self.model),
            "--alias": self.alias or None,
            "--host": str(socket),
            "--ctx-size": str(self.num_ctx * self.parallel),
            "--parallel": str(self.parallel),
            "--threads": str(self.threads) if self.threads > 0 else None,
            "--batch-size": num_batch,
            "--ubatch-size": num_batch,
            "--gpu-layers": str(self.num_gpu) if self.num_gpu >= 0 and not placement else None,
            # The host-side prompt cache and its checkpoints cost RAM beyond what was asked for.
            "--cache-ram": "0",
            "--ctx-checkpoints": "0",
            "--pooling": self.pooling if self.embeddings else None,
            "--chat-template": self.chat_template,
            "--mmproj": str(self.mmproj) if self.mmproj else None,
        }
        switches = ["--jinja", "--no-warmup", "--no-ui", "--offline"]
        if self.embeddings:
            switches.append("--embeddings")
        if self.context_shift:
            switches.append("--context-shift")
        if placement:
            # At verbosity 4 it says what every device holds; nothing at that level is said per token.
            switches += ["--no-repack", "--verbosity", "4"]
        for adapter in self.adapters:
            switches += ["--lora", str(adapter)]
        given = [part for flag, value in values.items() if value is not None for part in (flag, value)]
        # --rpc must stand before the --device that names its servers, and --jinja before the template: only
        # then is a --chat-template that is no built-in name accepted.
        return [*placement, *switches, *given]


def candidates() -> list[Program]:
    """Return the programs that may serve here, best first, without those that cannot run on this CPU.

    Raises LlamaServerError if there is none.
    """
    found = list(llama_cpp.find("llama-server").programs)
    if importlib.util.find_spec("xllamacpp"):
        # `make install` puts the libgomp that a minimal system lacks beside llama-server: both need it.
        environment = found[-1].environment if found else os.environ
        found.append(Program((sys.executable, "-m", "shard.portable_server"), environment, "xllamacpp"))
    usable = [program for program in found if program.command not in _unusable]
    if not usable:
        raise LlamaServerError(
            "no llama-server was found: put one on PATH, or install one "
            '(in SOLLOL\'s source folder: pip install ".[shard]")'
        )
    return usable


class LlamaServer:
    """One running process; made by :meth:`start`, ended by :meth:`stop`."""

    def __init__(
        self,
        launch: Launch,
        process: asyncio.subprocess.Process,
        directory: tempfile.TemporaryDirectory[str],
        started: float,
    ) -> None:
        self.launch = launch
        self._directory = directory
        self._started = started
        self.pid = process.pid
        self.load_s = 0.0
        self.requests = 0  #: being served now
        self.heard_at_s = started  #: when a request was begun, or a piece of an answer came, last
        self._buffers: dict[tuple[str, str], int] = {}  # (device, what) → bytes
        self.plan_id: str | None = None  #: of the plan by which it lies on several machines
        self._verdict: str | None = None
        self._process = process
        self._tail: deque[str] = deque(maxlen=_TAIL_LINES)
        self._reader = asyncio.create_task(self._read_log())
        self.exited: asyncio.Task[int] = asyncio.create_task(self._wait())
        self.http = aiohttp.ClientSession(
            "http://llama-server",
            # Generation may take any time, and the slots' queue is ours: neither limit may end it.
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=10),
            # A kept connection may be closed by the child at the moment it is used again.
            connector=aiohttp.UnixConnector(str(_socket_in(directory)), limit=0, force_close=True),
        )

    @classmethod
    async def start(cls, launch: Launch) -> Self:
        """Return a server that has loaded its model. Cancelling this ends the child.

        Raises LlamaServerError with the reason from the child's log if it exits or does not get ready
        within :data:`LOAD_TIMEOUT_S`.
        """
        while True:
            program = (await asyncio.to_thread(candidates))[0]
            server = await cls.spawn(program, launch)
            try:
                await server.ready()
            except BaseException:
                await server.stop()
                if not server.died_of(signal.SIGILL):
                    raise
                _unusable.add(program.command)
                log.warning("%s needs instructions that this CPU lacks; trying the next", program.command[0])
                # With no candidate left, "illegal instruction" says more than "none was found".
                if not _left():
                    raise
                continue
            return server

    @classmethod
    async def spawn(cls, program: Program, launch: Launch, placement: Sequence[str] = ()) -> Self:
        """Return a server that has begun to load. Raises LlamaServerError if the program does not run."""
        started = time.monotonic()
        # In /tmp whatever TMPDIR says: a socket's path may have no more than 107 bytes.
        directory = tempfile.TemporaryDirectory(prefix="sollol-", dir="/tmp")
        try:
            process = await asyncio.create_subprocess_exec(
                *program.command,
                *launch.flags(_socket_in(directory), placement),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                # Else a debugger, where there is one, holds the dying process for seconds and talks over it.
                env={**program.environment, "GGML_NO_BACKTRACE": "1"},
                preexec_fn=dies_with_us(),
                # A Ctrl-C at the terminal is for the parent, which ends its children in order.
                start_new_session=True,
            )
        except OSError as error:
            directory.cleanup()
            name = program.command[0]
            raise LlamaServerError(f"error starting llama-server: {name}: {error.strerror}") from error
        return cls(launch, process, directory, started)

    async def _read_log(self) -> None:
        assert self._process.stdout is not None
        async for line in _lines(self._process.stdout):
            self._tail.append(line)
            self._note_buffer(line)
            log.debug("llama-server[%d] %s", self.pid, line)

    def _note_buffer(self, line: str) -> None:
        if found := _BUFFER.search(line):
            key, size = (found["device"], found["what"]), round(float(found["mib"]) * 2**20)
            # Weights and caches come in several buffers; compute buffers are said again when they grow.
            self._buffers[key] = size if found["what"] == "compute" else self._buffers.get(key, 0) + size

    def held_bytes(self, device: str) -> int | None:
        """Return what llama.cpp said that it holds on ``device`` (its name: ``CPU``, ``RPC0[host:port]``).

        None if it has not said; it does so only where layers were placed (:meth:`Launch.flags`).
        """
        found = [size for (where, _), size in self._buffers.items() if where == device]
        return sum(found) if found else None

    async def _wait(self) -> int:
        code = await self._process.wait()
        await self._reader
        return code

    async def ready(self, limit_s: float = LOAD_TIMEOUT_S) -> None:
        """Wait until the model is loaded. Raises LlamaServerError if that fails, or takes ``limit_s``."""
        health = asyncio.create_task(self._poll_health())
        try:
            async with asyncio.timeout(limit_s):
                await asyncio.wait({health, self.exited}, return_when=asyncio.FIRST_COMPLETED)
        except TimeoutError:
            raise LlamaServerError(f"timed out waiting for llama-server to start - {self.reason()}") from None
        finally:
            health.cancel()
        if self.exited.done():
            raise LlamaServerError(self.obituary())
        self.load_s = time.monotonic() - self._started

    async def _poll_health(self) -> None:
        while True:
            # Refused until it listens, 503 while it loads.
            with contextlib.suppress(aiohttp.ClientError):
                async with self.http.get("/health") as response:
                    if response.status == 200:
                        return
            await asyncio.sleep(HEALTH_INTERVAL_S)

    def died_of(self, signum: signal.Signals) -> bool:
        """Return whether the process has ended by this signal."""
        return self._process.returncode == -signum

    def reason(self) -> str:
        """Return the line of the log's tail that says most about a failure, "" if none says anything."""
        for telling in _REASONS:
            for line in reversed(self._tail):
                if telling in line:
                    return line.strip()
        return ""

    def fail(self, reason: str) -> None:
        """End the child at once because it cannot go on; requests are told ``reason``."""
        if self._verdict is None and not self.exited.done():
            self._verdict = reason
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    def obituary(self) -> str:
        """Return Ollama's sentence for an exited process, which a router classifies by."""
        if self._verdict is not None:
            return f"llama-server process has terminated: {self._verdict}"
        if any(sign in line for sign in _OUT_OF_MEMORY for line in self._tail):
            return f"llama-server reported out-of-memory during startup: {self.reason()}"
        code = self._process.returncode
        if code is not None and code < 0:
            ended = f"signal: {signal.strsignal(-code) or -code}".lower()
        else:
            ended = f"exit status {code}"
        reason = self.reason()
        return f"llama-server process has terminated: {ended}" + (f": {reason}" if reason else "")

    @contextlib.asynccontextmanager
    async def request(
        self, method: str, path: str, body: Mapping[str, Any] | None = None
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """Give a response of the child; leaving the block early closes the connection, which cancels.

        Raises LlamaServerError if the child has died. Read the body through :meth:`chunks`.
        """
        self.requests += 1
        self.heard_at_s = time.monotonic()
        try:
            try:
                response = await self.http.request(method, path, json=body)
            except aiohttp.ClientError as error:
                raise LlamaServerError(await self._why_lost(error)) from error
            try:
                yield response
            finally:
                response.close()
        finally:
            self.requests -= 1

    async def chunks(self, response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
        """Yield a response's body as it arrives. Raises LlamaServerError if the child dies meanwhile."""
        try:
            async for chunk in response.content.iter_any():
                self.heard_at_s = time.monotonic()
                yield chunk
        except aiohttp.ClientError as error:
            raise LlamaServerError(await self._why_lost(error)) from error

    async def post(self, path: str, body: Mapping[str, Any]) -> tuple[int, bytes]:
        """Return status and whole body of a POST; raises as :meth:`request`."""
        async with self.request("POST", path, body) as response:
            return response.status, b"".join([chunk async for chunk in self.chunks(response)])

    async def _why_lost(self, error: aiohttp.ClientError) -> str:
        # A broken connection usually means an exit that is a moment away from being noticed.
        await asyncio.wait({self.exited}, timeout=1.0)
        if self.exited.done():
            return f"model runner has unexpectedly stopped: {self.obituary()}"
        return f"an error was encountered while running the model: {error or type(error).__name__}"

    async def stop(self) -> None:
        """End the child, by force after :data:`STOP_GRACE_S`; safe to call twice."""
        await self.http.close()
        if not self.exited.done():
            with contextlib.suppress(ProcessLookupError):
                self._process.terminate()
            done, _ = await asyncio.wait({self.exited}, timeout=STOP_GRACE_S)
            if not done:
                log.warning("llama-server[%d] did not end when asked to; killing it", self.pid)
                with contextlib.suppress(ProcessLookupError):
                    self._process.kill()
        await self.exited
        self._directory.cleanup()


async def _lines(log_of_child: asyncio.StreamReader) -> AsyncIterator[str]:
    """Yield whole lines, which a child writes in pieces, without what they quote of requests."""
    rest = b""
    while chunk := await log_of_child.read(65536):
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            yield _QUOTED.sub(r"\1…", line.decode("utf-8", "replace"))
        # The end of a line that is longer than any of its own is not worth the memory.
        rest = rest[:_LONGEST_LINE_BYTES]
    if rest:
        yield _QUOTED.sub(r"\1…", rest.decode("utf-8", "replace"))


def _socket_in(directory: tempfile.TemporaryDirectory[str]) -> Path:
    return Path(directory.name) / "llama.sock"


def _left() -> bool:
    try:
        return bool(candidates())
    except LlamaServerError:
        return False
