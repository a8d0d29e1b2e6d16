"""What a real llama-server does with a plan's flags: each layer where the plan has it, and no more memory."""

from __future__ import annotations

import re
import subprocess
import threading
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent import llama_cpp
from agent.links import Link
from shard.gguf import read_header
from shard.plan import Device, Host, Plan, plan
from shard.shape import read_shape
from tests.shard.projection import BOUND_S, rpc_servers

MIB = 1 << 20
LINK = Link(0.0002, 1e9)

#: What is free on the coordinator's CPU and on each rpc-server, in MiB. Gemma has 74 MiB of layers with their
#: KV; the output layer takes 170 MiB, the embedding 173, each device's scratch 10.
FLEETS = {
    "two, no layer local": (0, (235, 46)),
    "two, layers on the local CPU": (214, (41, 203)),
    "three": (0, (41, 203, 41)),
    "three, layers on the local CPU": (204, (36, 35, 198)),
}

_ASSIGNED = re.compile(r"layer\s+(\d+) assigned to device (\w+)")
_BUFFER = re.compile(r"(?:RPC\d+\[(\S+)\]|CPU\w*) +(model|KV|compute) buffer size = +([\d.]+) MiB")


@pytest.fixture(scope="module")
def endpoints() -> Iterator[list[str]]:
    """Three rpc-servers, used by one llama-server after another."""
    with rpc_servers(3) as found:
        yield found


def planned(model: Path, local_mib: int, free_mib: tuple[int, ...]) -> Plan:
    """The plan for hosts of which each one is needed."""
    local = Device("local", "CPU", "cpu", local_mib * MIB, 20e9)
    others = [
        Host(f"node{index}", (Device(f"node{index}", "CPU", "cpu", free * MIB, (30 + index) * 1e9),))
        for index, free in enumerate(free_mib)
    ]
    hosts = [Host("local", (local,), has_model=True), *others]
    links = {("local", host.name): LINK for host in others}
    found = plan(read_shape(read_header(model)), hosts, links, num_ctx=512, num_batch=256)
    assert isinstance(found, Plan), found
    return found


@pytest.mark.parametrize("fleet", FLEETS)
def test_layers_lie_as_planned(fleet: str, gguf_path: Path, endpoints: list[str], tmp_path: Path) -> None:
    local_mib, free_mib = FLEETS[fleet]
    made = planned(gguf_path, local_mib, free_mib)
    shares = made.shares
    assert (shares[0].device.host == "local") == bool(local_mib)
    where = {share.device: endpoint for share, endpoint in zip(made.remote(), endpoints, strict=False)}
    assert len(where) == len(free_mib)
    flags = made.flags({(device.host, device.name): endpoint for device, endpoint in where.items()})
    assigned, held = run(gguf_path, made, flags, tmp_path / "socket.sock")

    names = {device: f"RPC{index}" for index, device in enumerate(where)}
    expected = Counter({names.get(share.device, "CPU"): share.layers + share.output for share in shares})
    assert Counter(assigned.values()) == expected
    for share in shares:
        layers = range(share.first_layer, share.first_layer + share.layers + share.output)
        assert {assigned[layer] for layer in layers} == {names.get(share.device, "CPU")}
        buffers = held[where.get(share.device, "CPU")]
        assert sum(buffers.values()) * MIB <= share.memory_bytes + MIB
        if share.device in where:
            assert buffers["model"] * MIB == pytest.approx(share.weight_bytes, rel=0.02)
            assert buffers["KV"] * MIB == pytest.approx(share.kv_bytes, rel=0.02)


def run(
    model: Path, made: Plan, flags: list[str], listen: Path
) -> tuple[dict[int, str], dict[str, dict[str, float]]]:
    """Where a llama-server with ``flags`` says that each layer lies, and its MiB by endpoint and kind."""
    program = llama_cpp.program("llama-server")
    assert program is not None
    command = [
        *program.command, *flags, "--model", str(model), "--host", str(listen), "--no-warmup", "--no-repack",
        "--ctx-size", str(made.num_ctx), "--parallel", "1", "-b", "256", "-ub", "256",
        "--cache-ram", "0", "--ctx-checkpoints", "0", "--offline", "-lv", "5",
    ]  # fmt: skip
    process = subprocess.Popen(
        command, env=dict(program.environment), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    bound = threading.Timer(BOUND_S, process.kill)
    bound.start()
    assigned: dict[int, str] = {}
    held: dict[str, dict[str, float]] = defaultdict(Counter)
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if match := _ASSIGNED.search(line):
                assigned[int(match[1])] = match[2]
            elif match := _BUFFER.search(line):
                held[match[1] or "CPU"][match[2]] += float(match[3])
            if "server is listening" in line or "all slots are idle" in line:
                return assigned, held
    finally:
        bound.cancel()
        process.kill()
        process.wait()
        process.stdout.close()
    raise AssertionError("llama-server did not come up")
