"""The demo's last act: two nodes hold a model together of which neither has the room for all.

Nothing here needs root or a network of its own: a coordinator and two agents on loopback, which lend a part
of this machine's memory each, so little that the model fits none of them.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from proxy_addon.demo_stage import Stage, free_ports

#: The demo's model under a name that the other nodes do not have.
MODEL = "big:270m"
LENDERS = ("lender1", "lender2")
#: Gemma's 18 layers with their output layer, cache and buffers take 286 MiB at a context of 4096.
LENDS = "240MiB"
PROMPT = "The capital of France is"


async def show(stage: Stage, model: Path) -> None:
    """Found a fleet, plan for one of its nodes and for both, and ask the proxy for the model."""
    stage.act("A model that fits on no single node, answered by two")
    url = f"http://127.0.0.1:{stage.shard_port}"
    state = ("--state-dir", str(stage.state / "coordinator"))
    ports = free_ports(2 * len(LENDERS))
    agents = [f"127.0.0.1:{port}" for port in ports[::2]]
    tunnels = [f"127.0.0.1:{port}" for port in ports[1::2]]
    # The coordinator's own memory is left out, as on a small machine that only stores the file.
    given = ("--model", f"{MODEL}={model}", "--memory", "0B", "--no-mdns", *state)
    token = await _token(stage, url, *state)
    await stage.start(
        "coordinator", "shard", "serve", "--listen", f"127.0.0.1:{stage.shard_port}",
        "--agents", ",".join(agents), "--threads", "1", *given,
    )  # fmt: skip
    await stage.until("the coordinator", partial(_coordinates, stage, url))

    for count, (name, agent, tunnel) in enumerate(zip(LENDERS, agents, tunnels, strict=True), 1):
        token = token or await _token(stage, url, *state)
        own = ("--state-dir", str(stage.state / name))
        status, text = await stage.sollol("agent", "join", url, token, "--name", name, *own)
        stage.holds(status == 0, text.partition("\n")[0])
        token = ""  # each works once
        await stage.start(
            name, "agent", "--listen", agent, "--tunnel", tunnel, "--memory", LENDS, "--threads", "1",
            "--no-mdns", "--ollama", url, *own,
        )  # fmt: skip
        await stage.until(f"the agent {name}", partial(_lends, stage, agent))
        among = ",".join(agents[:count])
        stage.console.print(f"[dim]$ sollol shard plan {MODEL} --agents {among}")
        status, text = await stage.sollol("shard", "plan", MODEL, "--agents", among, *given)
        stage.console.print(text, markup=False)
        if count < len(LENDERS):
            stage.holds(status == 1 and "Too big by" in text, f"{name} alone has no room for it")
        else:
            stage.holds(status == 0, "together they have")

    await stage.until("the coordinator's node", partial(_fits, stage))
    await _ask(stage, url, agents)


async def _ask(stage: Stage, url: str, agents: list[str]) -> None:
    said = await stage.chat(MODEL, PROMPT)
    stage.holds(said.done and said.pieces > 1, f"{said.pieces} pieces came one by one, then done")
    plan_id = said.headers.get("x-sollol-shard-plan")
    loads = (await stage.get(f"{url}/v1/report"))["shard"]["loads"]
    shares = [
        share
        for load in loads
        if load["phase"] == "ready" and load["plan"]["id"] == plan_id
        for share in load["plan"]["shares"]
    ]
    stage.holds(
        sorted(share["node"] for share in shares if share["layers"]) == sorted(agents),
        "layers lay on both: " + ", ".join(f"{share['layers']} on {share['node']}" for share in shares),
    )
    for name, agent in zip(LENDERS, agents, strict=True):
        servers = (await stage.get(f"http://{agent}/v1/report"))["rpc"]["servers"]
        running = [server for server in servers if server["state"] == "running"]
        held_bytes = sum(server["memory_bytes"] for server in running)
        stage.holds(
            len(running) == 1 and held_bytes > 0,
            f"{name} at {agent} runs a ggml-rpc-server, which holds {held_bytes >> 20} MiB",
        )
    request_id = said.headers["x-sollol-request-id"]
    stage.console.print(f"[dim]$ sollol explain {request_id}")
    status, text = await stage.sollol("explain", request_id, "--url", stage.url)
    stage.console.print(text, markup=False)
    stage.holds(status == 0 and f"plan {plan_id}" in text, "sollol explain tells who held which layers")


async def _token(stage: Stage, url: str, *state: str) -> str:
    """Have a token made with which one node may join; the first time, found the fleet."""
    _, text = await stage.sollol("shard", "init", "--url", url, *state)
    tokens = [word for word in text.split() if word.startswith("sollol-")]
    stage.holds(len(tokens) == 1, f"sollol shard init made a token: sollol agent join {url} sollol-…")
    return tokens[0]


async def _coordinates(stage: Stage, url: str) -> bool:
    return await stage.get(f"{url}/v1/report") is not None


async def _lends(stage: Stage, agent: str) -> bool:
    rpc: dict[str, Any] = (await stage.get(f"http://{agent}/v1/report") or {}).get("rpc") or {}
    return bool(rpc.get("devices") and rpc.get("tunnel_port"))


async def _fits(stage: Stage) -> bool:
    """Whether the proxy knows that the coordinator can serve."""
    rows = (await stage.get(f"{stage.url}/sollol/nodes"))["nodes"]
    row = next(row for row in rows if row["name"] == f"127.0.0.1:{stage.shard_port}")
    models = (row["shard"] or {}).get("models", ())
    return row["state"] == "up" and bool(row["models"]) and any(model["fits"] for model in models)
