"""Which nodes can lend what, from reports as agents make them."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from agent.report import Gpu, Ollama, Report, Rpc, RpcDevice
from agent.report import Host as Machine
from shard import hosts as lending
from shard.hosts import hosts

MIB, GIB = 1 << 20, 1 << 30


def card(free_bytes: int, total_bytes: int = 24 * GIB, index: int = 0, **more: Any) -> Gpu:
    return Gpu(
        index=index,
        name="a GPU",
        vendor=more.pop("vendor", "nvidia"),
        memory_total_bytes=total_bytes,
        memory_free_bytes=free_bytes,
        memory_used_bytes=total_bytes - free_bytes,
        **more,
    )


def on_gpu(gpu: Gpu, name: str = "CUDA0", **more: Any) -> RpcDevice:
    return RpcDevice(
        name=name,
        kind="gpu",
        gpu_index=gpu.index,
        memory_total_bytes=gpu.memory_total_bytes,
        memory_free_bytes=more.pop("memory_free_bytes", gpu.memory_free_bytes),
        **more,
    )


def on_cpu(free_bytes: int = 16 * GIB, total_bytes: int = 32 * GIB, **more: Any) -> RpcDevice:
    return RpcDevice(
        name="CPU", kind="cpu", memory_total_bytes=total_bytes, memory_free_bytes=free_bytes, **more
    )


def report(*devices: RpcDevice, gpus: tuple[Gpu, ...] = (), **more: Any) -> Report:
    rpc = {"build": "b1", "tunnel_port": 11437, "devices": list(devices)} | more.pop("rpc", {})
    machine = {"ram_total_bytes": 32 * GIB, "ram_available_bytes": 16 * GIB} | more.pop("machine", {})
    return Report(
        agent_version="1",
        node_id="id",
        sampled_at=datetime(2026, 1, 1, tzinfo=UTC),
        sample_age_s=more.pop("sample_age_s", 0.5),
        host=Machine(hostname="h", cpu_count=8, **machine),
        gpus=list(gpus),
        ollama=Ollama(url="http://127.0.0.1:11434", reachable=True),
        rpc=Rpc(**rpc),
        **more,
    )


def free_of(made: Report, **more: Any) -> dict[str, int]:
    found, _ = hosts({"a": made}, "a", ["a"], **more)
    return {device.name: device.free_bytes for device in found[0].devices}


def test_a_margin_is_kept_free() -> None:
    gpu = card(20 * GIB)
    assert free_of(report(on_gpu(gpu), on_cpu(), gpus=(gpu,))) == {
        "CUDA0": 20 * GIB - GIB - 457 * MIB,
        "CPU": 15 * GIB,
    }


def test_a_small_device_keeps_a_tenth() -> None:
    small = on_cpu(3 * GIB, 4 * GIB)
    machine = {"ram_total_bytes": 4 * GIB, "ram_available_bytes": 3 * GIB}
    assert free_of(report(small, machine=machine)) == {"CPU": 3 * GIB - int(0.1 * 4 * GIB)}


def test_what_the_owner_lends_needs_no_further_margin() -> None:
    """``lends_bytes`` caps what the agent calls free; the margin comes off what is really free."""
    lent = report(on_cpu(300 * MIB), rpc={"lends_bytes": 300 * MIB})
    assert free_of(lent) == {"CPU": 300 * MIB}
    nearly_full = report(
        on_cpu(300 * MIB), rpc={"lends_bytes": 300 * MIB}, machine={"ram_available_bytes": GIB + 100 * MIB}
    )
    assert free_of(nearly_full) == {"CPU": 100 * MIB}


def test_what_the_replaced_model_holds_counts_as_free() -> None:
    made = report(on_cpu())
    assert free_of(made, given_back={("a", "CPU"): 2 * GIB, ("b", "CPU"): 9 * GIB}) == {"CPU": 17 * GIB}
    lent = report(on_cpu(0), rpc={"lends_bytes": 300 * MIB})
    assert free_of(lent, given_back={("a", "CPU"): 400 * MIB}) == {"CPU": 300 * MIB}


def test_unified_memory_is_lent_once() -> None:
    gpu = card(20 * GIB, vendor="apple")
    made = report(on_gpu(gpu, "MTL0"), on_cpu(), gpus=(gpu,), machine={"ram_available_bytes": 12 * GIB})
    assert free_of(made) == {"MTL0": 12 * GIB - GIB - 457 * MIB}


def test_a_device_without_room_is_not_offered() -> None:
    gpu = card(GIB)
    assert list(free_of(report(on_gpu(gpu), on_cpu(), gpus=(gpu,)))) == ["CPU"]


def test_bandwidth_as_measured_else_as_usual() -> None:
    gpu, other = card(20 * GIB), card(20 * GIB, index=1, vendor="amd")
    made = report(
        on_gpu(gpu, memory_bandwidth_bytes_s=936e9), on_gpu(other, "ROCm0"), on_cpu(), gpus=(gpu, other)
    )
    measured = made.model_copy(
        update={"host": made.host.model_copy(update={"memory_bandwidth_bytes_s": 61e9})}
    )
    for one, cpu_bytes_s in ((made, lending.CPU_BANDWIDTH_BYTES_S), (measured, 61e9)):
        found, _ = hosts({"a": one}, "a", [])
        assert {device.name: device.bandwidth_bytes_s for device in found[0].devices} == {
            "CUDA0": 936e9,
            "ROCm0": lending.GPU_BANDWIDTH_BYTES_S["amd"],
            "CPU": cpu_bytes_s,
        }


@pytest.mark.parametrize(
    ("made", "why"),
    [
        (report(on_cpu(), rpc={"build": "b2"}), "is build b2, the coordinator's llama-server is build b1"),
        (report(on_cpu(), rpc={"build": None}), "it has no ggml-rpc-server"),
        (report(on_cpu(), rpc={"tunnel_port": None}), "it has not joined"),
        (report(on_cpu(), rpc={"error": "its rpc-server needs AVX2"}), "its rpc-server needs AVX2"),
        (report(on_cpu(), sample_age_s=42.0), "its report is 42 s old"),
        (report(on_cpu(), stale={"host": "psutil failed"}), "psutil failed"),
        (report(on_cpu(0), machine={"ram_available_bytes": 0}), "it has no memory to lend"),
        (report(on_cpu()).model_copy(update={"rpc": None}), "its agent is too old"),
    ],
)
def test_who_is_left_out_and_why(made: Report, why: str) -> None:
    found, left_out = hosts({"a": report(on_cpu()), "b": made}, "a", ["a"])
    assert [host.name for host in found] == ["a"]
    assert list(left_out) == ["b"] and why in left_out["b"]


def test_the_build_compared_with_is_the_one_told() -> None:
    reports = {"a": report(on_cpu(), rpc={"build": None}), "b": report(on_cpu())}
    assert hosts(reports, "a", [], build="b1").left_out == {}
    assert "b1" in hosts(reports, "a", [], build="b3").left_out["b"]


def test_the_coordinator_needs_no_tunnel_to_itself_and_may_have_no_room() -> None:
    full = report(on_cpu(0), rpc={"tunnel_port": None}, machine={"ram_available_bytes": 0})
    found, left_out = hosts({"a": full, "b": report(on_cpu())}, "a", ["a"])
    assert [(host.name, host.has_model, len(host.devices)) for host in found] == [
        ("a", True, 0),
        ("b", False, 1),
    ]
    assert left_out == {}
