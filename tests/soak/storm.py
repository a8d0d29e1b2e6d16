"""Does what the schedule says, writes it into the ledger, notes what went wrong with the deeds themselves."""

from __future__ import annotations

import asyncio
import signal
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Coroutine, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import aiohttp
import orjson

from tests.soak.house import FLEETING, MADE, WIDE
from tests.soak.ledger import GRACE_S, Ledger
from tests.soak.processes import START_LIMIT_S, Node, Proxy
from tests.soak.schedule import Event

#: For a pull, a delete, a create: as long as the slowest node may hang (``house.SETTINGS``), twice.
DEED_LIMIT_S = 60.0
#: Until a changed configuration shows, or a hurt node is used again (an ejection lasts up to a minute).
SHOWS_LIMIT_S = 90.0
ASK_S = 0.1  #: between two looks at what only shows to those who ask
SERVES_S = 3.0  #: at least so long a proxy serves until the next one, however slowly this one started
BROKEN_CONFIG = b"nodes: [127.0.0.1:1\nretry: {rounds: many}\n"


class Broken(Exception):
    """Nothing more can be learned from this run."""


class Storm:
    """One fleet under fire."""

    def __init__(
        self,
        nodes: Sequence[Node],
        proxy: Proxy,
        ledger: Ledger,
        session: aiohttp.ClientSession,
        log: Path,
    ) -> None:
        self.nodes = nodes
        self.proxy = proxy
        self.ledger = ledger
        self.violations: list[str] = []
        self.done: Counter[str] = Counter()
        self._session = session
        self._log = log
        self._began_s = time.monotonic()
        self._busy = {node.name: asyncio.Lock() for node in nodes}
        self._models: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._proxy_busy = asyncio.Lock()
        self._deeds: dict[str, Callable[[Event], Coroutine[Any, Any, None]]] = {
            "kill": self._kill,
            "stop": self._stop,
            "pull": self._pull,
            "create": self._create,
            "delete": self._delete,
            "reload": self._reload,
            "restart": self._restart,
            "upgrade": self._upgrade,
        }

    async def run(self, events: Iterable[Event]) -> None:
        """Let everything befall the fleet; returns once the last of it is over."""
        began_s = time.monotonic()
        async with asyncio.TaskGroup() as under_way:
            for event in events:
                await asyncio.sleep(max(0.0, began_s + event.at_s - time.monotonic()))
                self.note(asdict(event))
                self.done[event.kind] += 1
                under_way.create_task(self._deeds[event.kind](event))

    def note(self, what: dict[str, Any]) -> None:
        """A line in the log of the storm."""
        with self._log.open("ab") as log:
            log.write(orjson.dumps({"now_s": time.monotonic(), **what}) + b"\n")

    def violated(self, what: str) -> None:
        """Note a violation that is not of a client's request."""
        now_s = time.monotonic()
        self.violations.append(f"{what}; at {now_s:.2f} s: {self.ledger.states(now_s, now_s) or 'all well'}")
        self.note({"violation": what})

    # nodes

    async def _kill(self, event: Event) -> None:
        node = self.nodes[event.node]
        async with self._busy[node.name]:
            span = self.ledger.trouble(node.host_port, "killed", time.monotonic())
            for model in (*FLEETING, MADE):
                self.ledger.loses(model, span.from_s, node.host_port)
            await node.kill()
            await asyncio.sleep(event.for_s)
            await node.start()
            span.to_s = time.monotonic()

    async def _stop(self, event: Event) -> None:
        node = self.nodes[event.node]
        async with self._busy[node.name]:
            span = self.ledger.trouble(node.host_port, "stopped", time.monotonic())
            node.signal(signal.SIGSTOP)
            await asyncio.sleep(event.for_s)
            node.signal(signal.SIGCONT)
            span.to_s = time.monotonic()

    # models

    def _at(self, event: Event) -> tuple[str, AbstractAsyncContextManager[Any]]:
        """Where a deed is asked for. A node of whom it is asked directly must not be hurt meanwhile."""
        if event.through_proxy:
            return self.proxy.url, nullcontext()
        node = self.nodes[event.node]
        return node.url, self._busy[node.name]

    def _out(self, event: Event) -> bool:
        """Whether the node that would be asked directly is hurt now."""
        return not event.through_proxy and self._busy[self.nodes[event.node].name].locked()

    async def _pull(self, event: Event) -> None:
        """To one node, or through the proxy to two, or to whichever it chooses."""
        async with self._models[event.model]:
            if event.variant == "anywhere":
                return await self._pull_anywhere(event)
            if self._out(event):
                return
            url, safe = self._at(event)
            following = (event.node + 1) % len(self.nodes)
            targets = [self.nodes[i].host_port for i in (event.node, following)[: 1 + event.through_proxy]]
            headers = {"x-sollol-target": ",".join(targets)} if event.through_proxy else {}
            from_s = time.monotonic()
            async with safe:
                status, last, _ = await self._ask("POST", f"{url}/api/pull", {"model": event.model}, headers)
            to_s = time.monotonic()
            if status == 400 and any(
                f"{target} is not in the fleet" in last["error"]
                and self.ledger.in_trouble(target, from_s, to_s, GRACE_S)
                for target in targets
            ):
                return  # its name is refused like a misspelt one, and nothing is pulled
            succeeded = status == 200 and last.get("status") == "success"
            failed = {row["node"] for row in last.get("failed") or ()} if succeeded else set(targets)
            for target in targets:
                if self._hurt(target, from_s, to_s):
                    continue
                if target in failed:
                    self.violated(f"a pull of {event.model} to {target} ended with {status} {last}")
                else:
                    self.ledger.gains(target, event.model, to_s)

    async def _pull_anywhere(self, event: Event) -> None:
        """It must succeed while any node is well. Who has the model then is not said, and not counted on."""
        from_s = time.monotonic()
        status, last, _ = await self._ask("POST", f"{self.proxy.url}/api/pull", {"model": event.model}, {})
        to_s = time.monotonic()
        well = [node.host_port for node in self.nodes if not self._hurt(node.host_port, from_s, to_s)]
        if well and not (status == 200 and last.get("status") == "success"):
            self.violated(f"a pull of {event.model} ended with {status} {last} though {well[0]} was well")

    async def _create(self, event: Event) -> None:
        async with self._models[event.model]:
            from_s = time.monotonic()
            body = {"model": event.model, "from": WIDE}
            status, last, where = await self._ask("POST", f"{self.proxy.url}/api/create", body, {})
            to_s = time.monotonic()
            hurt = any(self._hurt(node.host_port, from_s, to_s) for node in self.nodes)
            if status == 200 and last.get("status") == "success":
                if where and not hurt:
                    self.ledger.gains(where, event.model, to_s)
            elif not hurt:
                self.violated(f"a create of {event.model} ended with {status} {last}")

    async def _delete(self, event: Event) -> None:
        async with self._models[event.model]:
            if self._out(event):
                return
            node = None if event.through_proxy else self.nodes[event.node].host_port
            from_s = time.monotonic()
            self.ledger.loses(event.model, from_s, node)
            url, safe = self._at(event)
            async with safe:
                status, last, _ = await self._ask("DELETE", f"{url}/api/delete", {"model": event.model}, {})
            hurt = any(self._hurt(each.host_port, from_s, time.monotonic()) for each in self.nodes)
            if status not in (200, 404) and not hurt:
                self.violated(f"a delete of {event.model} ended with {status} {last}")

    def _hurt(self, node: str, from_s: float, to_s: float) -> bool:
        """Whether ``node`` or the proxy had a trouble of its own, which excuses what failed meanwhile."""
        return any(self.ledger.in_trouble(who, from_s, to_s, GRACE_S) for who in (node, "proxy"))

    async def _ask(
        self, method: str, url: str, body: dict[str, Any], headers: dict[str, str]
    ) -> tuple[int, dict[str, Any], str]:
        """The status, the last line and the node of an answer; status 0 where the connection broke."""
        try:
            async with (
                asyncio.timeout(DEED_LIMIT_S),
                self._session.request(method, url, json=body, headers=headers) as answer,
            ):
                lines = (await answer.read()).strip().split(b"\n")
                last = orjson.loads(lines[-1]) if lines[-1] else {}
                return answer.status, last, answer.headers.get("x-sollol-node", "")
        except TimeoutError:
            self.violated(f"{method} {url} {body} hung for {DEED_LIMIT_S:g} s")
            return 0, {}, ""
        except aiohttp.ClientError as problem:
            return 0, {"error": repr(problem)}, ""

    # the proxy

    async def _reload(self, event: Event) -> None:
        async with self._proxy_busy:
            good = self.proxy.config.read_bytes()
            node = self.nodes[event.node]
            if event.variant == "broken":
                self.proxy.write(BROKEN_CONFIG)
            elif event.variant == "without":
                self.ledger.trouble(node.host_port, "unlisted", time.monotonic())
                self.proxy.configure(without=node)
            else:
                self.proxy.configure(rounds=6 if event.variant == "limits" else 5)
            left_out = {node.host_port} if event.variant == "without" else set()
            refusals = self._refusals()
            self.proxy.signal(signal.SIGHUP)
            if event.variant == "broken":
                await self._shows(lambda: self._refused_since(refusals), "a broken configuration is refused")
                self.proxy.write(good)
                return
            wanted = {each.host_port for each in self.nodes} - left_out
            await self._shows(lambda: self._lists(wanted), f"the configuration {event.variant!r} is taken")
            now_s = time.monotonic()
            for span in self.ledger.troubles:
                if span.what == "unlisted" and span.who not in left_out:
                    span.to_s = min(span.to_s, now_s)

    def _refusals(self) -> int:
        return self.proxy.log.read_text().count(self.proxy.config.name)

    async def _refused_since(self, refusals: int) -> bool:
        return self._refusals() > refusals

    async def _lists(self, wanted: set[str]) -> bool:
        rows = await self.listed()
        return wanted == {name for name, state in rows.items() if state != "leaving"}

    async def listed(self) -> dict[str, str]:
        """The nodes that the proxy knows, and what it thinks of them; none where it does not answer."""
        try:
            async with self._session.get(f"{self.proxy.url}/sollol/nodes") as answer:
                return {row["name"]: row["state"] for row in (await answer.json())["nodes"]}
        except aiohttp.ClientError:
            return {}

    async def _shows(
        self, holds: Callable[[], Coroutine[Any, Any, bool]], what: str, limit_s: float = SHOWS_LIMIT_S
    ) -> None:
        deadline_s = time.monotonic() + limit_s
        while not await holds():
            if not self.proxy.running:
                raise Broken(f"the proxy has ended by itself; see {self.proxy.log}")
            if time.monotonic() > deadline_s:
                return self.violated(f"it did not come true within {limit_s:g} s that {what}")
            await asyncio.sleep(ASK_S)

    async def ready(self) -> None:
        """Return once the proxy answers."""

        async def answers() -> bool:
            try:
                async with self._session.get(f"{self.proxy.url}/sollol/healthz") as answer:
                    return answer.status in (200, 503)
            except aiohttp.ClientError:
                return False

        await self._shows(answers, "the proxy answers", START_LIMIT_S)

    async def all_up(self) -> None:
        """Return once the proxy gives work to every node."""

        async def up() -> bool:
            rows = await self.listed()
            return len(rows) == len(self.nodes) and set(rows.values()) <= {"up", "returning", "new"}

        await self._shows(up, "every node is up")

    async def _restart(self, _: Event) -> None:
        """As a supervisor does it: end the old process, then start the new one."""
        async with self._proxy_busy:
            span = self.ledger.trouble("proxy", "restart", time.monotonic())
            self.proxy.signal(signal.SIGTERM)
            status = await self.proxy.ended()
            if status != 0:
                self.violated(f"the proxy ended with status {status}")
            await self.proxy.start()
            await self.ready()
            span.to_s = time.monotonic()
            await asyncio.sleep(SERVES_S)

    async def _upgrade(self, _: Event) -> None:
        """Start the new process beside the old one, which leaves by itself."""
        async with self._proxy_busy:
            span = self.ledger.trouble("proxy", "upgrade", time.monotonic())
            old = self.proxy.retire()
            await self.proxy.start()
            try:
                async with asyncio.timeout(START_LIMIT_S):
                    status = await old.wait()
            except TimeoutError:
                self.violated(f"the old process has not left {START_LIMIT_S:g} s after the new one's start")
            else:
                if status != 0:
                    self.violated(f"the old process ended with status {status}")
            await self.ready()
            span.to_s = time.monotonic()
            await asyncio.sleep(SERVES_S)
