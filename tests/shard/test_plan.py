"""Plans against every plan there is, where those can be counted; and the promises of a refusal."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.links import Link
from shard import plan as planning
from shard.plan import Device, Host, Plan, TooBig, largest_num_ctx, plan
from shard.shape import LayerShape, ModelShape, compute_buffer_bytes, input_buffer_bytes, kv_bytes

MIB, GIB = 1 << 20, 1 << 30
NUM_CTX, NUM_BATCH = 512, 64

Links = Mapping[tuple[str, str], Link]


def model(*layers: LayerShape, output_bytes: int = 50 * MIB, embedding_bytes: int = 20 * MIB) -> ModelShape:
    return ModelShape("test", layers, embedding_bytes, output_bytes, 32_000, 2_048, 8_192)


def layers(count: int, size_bytes: int = 100 * MIB) -> list[LayerShape]:
    return [LayerShape(size_bytes, float(size_bytes), 4096.0)] * count


def gpu(host: str, free_bytes: int, bandwidth_bytes_s: float = 400e9, name: str = "CUDA0") -> Device:
    return Device(host, name, "gpu", free_bytes, bandwidth_bytes_s)


def host(name: str, *devices: Device, has_model: bool = False) -> Host:
    return Host(name, devices, has_model)


def all_links(
    hosts: list[Host], rtt_s: float = 0.0003, bytes_s: float = 118e6
) -> dict[tuple[str, str], Link]:
    pairs = itertools.permutations([host.name for host in hosts], 2)
    return {pair: Link(rtt_s, bytes_s) for pair in pairs}


# -- exhaustively -------------------------------------------------------------------------------------------


def held_bytes(
    shape: ModelShape, device: Device, coordinator: str, start: int, end: int, output: bool, embeddings: bool
) -> int:
    """What a device holds, by the rules of the issue, without the planner's help."""
    held = sum(
        layer.weight_bytes + kv_bytes(layer, NUM_CTX, 1, NUM_BATCH) for layer in shape.layers[start:end]
    )
    held += compute_buffer_bytes(shape, NUM_CTX, NUM_BATCH, output=output, embeddings=embeddings)
    if output:
        held += shape.output_bytes
    if device.kind == "cpu" and device.host == coordinator:
        held += shape.embedding_bytes + input_buffer_bytes(shape, NUM_CTX, NUM_BATCH)
    return held


def cost_ms(
    shape: ModelShape, device: Device, link: Link | None, start: int, end: int, output: bool
) -> float:
    """What a token costs there, by the formula in the planner's documentation."""
    read = 0.0
    for layer in shape.layers[start:end]:
        cells = min(NUM_CTX / 2, layer.window if layer.window is not None else NUM_CTX)
        read += layer.active_bytes + cells * layer.kv_bytes_per_cell + layer.state_bytes
    read += shape.output_bytes if output else 0
    spent_s = read / (device.bandwidth_bytes_s * planning.BANDWIDTH_SHARE[device.kind])
    if link is not None:
        activations = shape.embedding_length * 4
        out = shape.vocab * 4 if output else activations
        spent_s += link.rtt_s + (activations + out) / link.bytes_s + planning.RPC_SERVER_MS / 1e3
    return spent_s * 1e3


def every_plan(
    shape: ModelShape, hosts: list[Host], links: Links, embeddings: bool
) -> Iterator[tuple[int, float]]:
    """Nodes and ms/token of every plan whose devices hold what they get."""
    count = len(shape.layers)
    for coordinator in (host.name for host in hosts if host.has_model):
        devices = [
            (device, links.get((coordinator, host.name)))
            for host in hosts
            if host.name == coordinator or (coordinator, host.name) in links
            for device in host.devices
        ]
        for used in range(1, len(devices) + 1):
            for order in itertools.permutations(devices, used):
                if any(link is None and device.kind == "cpu" for device, link in order[1:]):
                    continue
                for cuts in itertools.combinations(range(1, count + 1), used - 1):
                    bounds = list(itertools.pairwise([0, *cuts, count]))
                    parts = [
                        (device, link, start, end, index == used - 1)
                        for index, ((device, link), (start, end)) in enumerate(
                            zip(order, bounds, strict=True)
                        )
                    ]
                    if all(
                        held_bytes(shape, device, coordinator, start, end, output, embeddings)
                        <= device.free_bytes
                        for device, _, start, end, output in parts
                    ):
                        nodes = {coordinator} | {device.host for device, *_ in parts}
                        yield len(nodes), sum(cost_ms(shape, *part) for part in parts)


layer = st.builds(
    LayerShape,
    weight_bytes=st.integers(20, 120).map(lambda mib: mib * MIB),
    active_bytes=st.integers(5, 120).map(lambda mib: float(mib * MIB)),
    kv_bytes_per_cell=st.sampled_from([0.0, 4096.0, 65536.0]),
    window=st.sampled_from([None, None, 128]),
)


@st.composite
def fleets(draw: st.DrawFn) -> tuple[list[Host], Links]:
    """At most four hosts and five devices in all, links of all kinds, some missing."""
    left = 5
    found = []
    for index in range(draw(st.integers(1, 4))):
        name, kinds = f"h{index}", draw(st.lists(st.sampled_from(["gpu", "cpu"]), max_size=min(3, left)))
        left -= len(kinds)
        devices = [
            Device(
                name,
                f"D{number}",
                kind,
                draw(st.integers(0, 600)) * MIB,
                draw(st.sampled_from([20e9, 40e9, 300e9, 300e9, 1000e9])),
            )
            for number, kind in enumerate(kinds)
            if kind == "gpu" or number == 0
        ]
        found.append(Host(name, tuple(devices), index == 0 or draw(st.booleans())))
    links = {
        (one.name, other.name): Link(
            draw(st.sampled_from([0.0001, 0.001, 0.01])), draw(st.sampled_from([10e6, 118e6, 1e9]))
        )
        for one, other in itertools.permutations(found, 2)
        if draw(st.integers(0, 9))
    }
    return found, links


@settings(max_examples=150, deadline=None)
@given(st.lists(layer, min_size=1, max_size=8), st.sampled_from([10, 50, 200]), fleets(), st.booleans())
def test_no_plan_is_better(
    made_of: list[LayerShape], output_mib: int, fleet: tuple[list[Host], Links], embeddings: bool
) -> None:
    shape = model(*made_of, output_bytes=output_mib * MIB)
    hosts, links = fleet
    best = min(every_plan(shape, hosts, links, embeddings), default=None)
    found = plan(shape, hosts, links, num_ctx=NUM_CTX, num_batch=NUM_BATCH, embeddings=embeddings)
    if best is None:
        assert isinstance(found, TooBig)
        assert found.missing_bytes > 0
        return
    assert isinstance(found, Plan)
    nodes, ms = best
    assert len(found.nodes) == nodes
    assert found.ms_per_token == pytest.approx(ms, abs=1e-9)
    place = 0
    for share in found.shares:
        assert share.first_layer == place
        place += share.layers
        held = held_bytes(
            shape, share.device, found.coordinator, share.first_layer, place, share.output, embeddings
        )
        assert share.memory_bytes == held <= share.device.free_bytes
    assert place == len(shape.layers)
    assert [share.output for share in found.shares] == [False] * (len(found.shares) - 1) + [True]
    assert sum(share.ms for share in found.shares) == pytest.approx(found.ms_per_token)


@settings(max_examples=60, deadline=None)
@given(st.lists(layer, min_size=1, max_size=8), fleets())
def test_what_is_missing_is_enough_and_no_more(
    made_of: list[LayerShape], fleet: tuple[list[Host], Links]
) -> None:
    hosts, links = fleet
    reached = {host.name for host in hosts if host.has_model}
    reached |= {other for one, other in links if one in reached}
    devices = [device for host in hosts if host.name in reached for device in host.devices]
    shape = model(*made_of)
    found = plan(shape, hosts, links, num_ctx=NUM_CTX, num_batch=NUM_BATCH)
    if isinstance(found, Plan) or not devices:
        return
    freest = max(devices, key=lambda device: device.free_bytes)
    step = planning.MISSING_STEP_BYTES

    def fits_with(more_bytes: int) -> bool:
        more = replace(freest, free_bytes=freest.free_bytes + more_bytes)
        larger = [
            replace(host, devices=tuple(more if device == freest else device for device in host.devices))
            for host in hosts
        ]
        return isinstance(plan(shape, larger, links, num_ctx=NUM_CTX, num_batch=NUM_BATCH), Plan)

    assert fits_with(found.missing_bytes)
    assert not fits_with(found.missing_bytes - step)


# -- by hand ------------------------------------------------------------------------------------------------


def test_a_node_that_is_not_needed_is_left_out() -> None:
    hosts = [
        host("a", gpu("a", 2 * GIB), has_model=True),
        host("b", gpu("b", 2 * GIB, 1000e9)),
        host("c", gpu("c", 2 * GIB)),
    ]
    found = plan(model(*layers(8)), hosts, all_links(hosts), num_ctx=NUM_CTX)
    assert isinstance(found, Plan)
    assert found.nodes == ("a",)
    assert "a holds it alone" in found.reason


def test_a_slow_node_and_a_slow_link_are_used_only_when_memory_forces_them() -> None:
    hosts = [
        host("a", gpu("a", GIB), has_model=True),
        host("fast", gpu("fast", GIB, 900e9)),
        host("far", gpu("far", GIB, 900e9)),
        host("slow", gpu("slow", GIB, 30e9)),
    ]
    links = all_links(hosts) | {("a", "far"): Link(0.02, 10e6)}
    shape = model(*layers(15))
    found = plan(shape, hosts, links, num_ctx=NUM_CTX)
    assert isinstance(found, Plan) and set(found.nodes) == {"a", "fast"}
    without_fast = [each for each in hosts if each.name != "fast"]
    forced = plan(shape, without_fast, links, num_ctx=NUM_CTX)
    assert isinstance(forced, Plan) and len(forced.nodes) == 2
    everything = plan(model(*layers(34)), hosts, links, num_ctx=NUM_CTX)
    assert isinstance(everything, Plan) and len(everything.nodes) == 4


def test_the_output_layer_goes_where_its_logits_are_cheapest() -> None:
    hosts = [
        host("a", gpu("a", GIB), has_model=True),
        host("near", gpu("near", GIB)),
        host("far", gpu("far", GIB)),
    ]
    links = all_links(hosts) | {("a", "far"): Link(0.0003, 10e6)}
    found = plan(model(*layers(24)), hosts, links, num_ctx=NUM_CTX)
    assert isinstance(found, Plan)
    assert len(found.shares) == 3
    assert found.shares[-1].device.host == "a"


def test_the_best_of_the_nodes_with_the_file_coordinates() -> None:
    hosts = [
        host("a", gpu("a", GIB, 100e9), has_model=True),
        host("b", gpu("b", GIB, 900e9), has_model=True),
        host("c", gpu("c", GIB, 900e9)),
    ]
    shape = model(*layers(15))
    found = plan(shape, hosts, all_links(hosts), num_ctx=NUM_CTX)
    assert isinstance(found, Plan) and found.coordinator == "b"
    told = plan(shape, hosts, all_links(hosts), num_ctx=NUM_CTX, coordinator="a")
    assert isinstance(told, Plan) and told.coordinator == "a"
    assert told.ms_per_token > found.ms_per_token


def test_nobody_with_the_file_is_an_error() -> None:
    hosts = [host("a", gpu("a", GIB))]
    with pytest.raises(ValueError, match="no host has the model's file"):
        plan(model(*layers(1)), hosts, {}, num_ctx=NUM_CTX)
    with pytest.raises(ValueError, match="b is no known host"):
        plan(model(*layers(1)), hosts, {}, num_ctx=NUM_CTX, coordinator="b")


def test_the_largest_context_is_the_largest_that_fits() -> None:
    hosts = [host("a", gpu("a", GIB), has_model=True)]
    shape = model(*[LayerShape(80 * MIB, 80.0 * MIB, 16384.0)] * 8)
    found = plan(shape, hosts, {}, num_ctx=32_000)
    assert isinstance(found, TooBig)
    largest = found.largest_num_ctx
    assert largest is not None and 0 < largest < 32_000 and largest % 256 == 0
    assert isinstance(plan(shape, hosts, {}, num_ctx=largest), Plan)
    assert isinstance(plan(shape, hosts, {}, num_ctx=largest + 256), TooBig)
    # The same is said of a model that fits at a smaller one, up to what it was trained for.
    assert largest_num_ctx(shape, hosts, {}, most=32_000) == largest
    assert largest_num_ctx(shape, hosts, {}, most=1000) == 1000
    assert largest_num_ctx(model(*layers(20)), hosts, {}, most=4096) is None


def test_no_context_fits_what_has_too_many_weights() -> None:
    hosts = [host("a", gpu("a", GIB), has_model=True)]
    found = plan(model(*layers(20)), hosts, {}, num_ctx=4096)
    assert isinstance(found, TooBig) and found.largest_num_ctx is None
    assert found.available_bytes == GIB < found.needed_bytes


def test_no_more_than_fifteen_rpc_devices_are_used() -> None:
    def fleet(count: int) -> list[Host]:
        others = [host(f"n{index:02}", gpu(f"n{index:02}", 300 * MIB)) for index in range(count)]
        return [host("a", has_model=True), *others]

    shape = model(*layers(15, 200 * MIB), output_bytes=MIB)
    fits = plan(shape, fleet(15), all_links(fleet(15)), num_ctx=NUM_CTX, num_batch=NUM_BATCH)
    assert isinstance(fits, Plan) and len(fits.remote()) == 15
    shape = model(*layers(16, 200 * MIB), output_bytes=MIB)
    many = plan(shape, fleet(17), all_links(fleet(17)), num_ctx=NUM_CTX, num_batch=NUM_BATCH)
    assert isinstance(many, TooBig)


def test_flags() -> None:
    cpu = Device("a", "CPU", "cpu", 600 * MIB, 30e9)
    hosts = [
        host("a", gpu("a", 600 * MIB, 900e9), cpu, has_model=True),
        host("b", gpu("b", 600 * MIB)),
        host("c", gpu("c", 600 * MIB, name="Vulkan1")),
    ]
    found = plan(
        model(*layers(16)), hosts, all_links(hosts, bytes_s=5e6), num_ctx=NUM_CTX, num_batch=NUM_BATCH
    )
    assert isinstance(found, Plan)
    assert [share.device.name for share in found.shares] == ["CPU", "CUDA0", "Vulkan1", "CUDA0"] or [
        share.device.host for share in found.shares
    ] == ["a", "b", "c", "a"]
    flags = found.flags({("b", "CUDA0"): "127.0.0.1:1001", ("c", "Vulkan1"): "127.0.0.1:1002"})
    counts = [share.layers + share.output for share in found.shares[1:]]
    assert flags == [
        "--rpc", "127.0.0.1:1001,127.0.0.1:1002", "-dev", "RPC0,RPC1,CUDA0", "-ngl", str(sum(counts)),
        "-ts", ",".join(map(str, counts)), "-sm", "layer", "-fit", "off",
    ]  # fmt: skip
    assert sum(counts) == 17 - found.shares[0].layers


def test_flags_of_a_cpu_alone() -> None:
    hosts = [host("a", Device("a", "CPU", "cpu", 4 * GIB, 30e9), has_model=True)]
    found = plan(model(*layers(4)), hosts, {}, num_ctx=NUM_CTX)
    assert isinstance(found, Plan)
    assert found.flags({}) == ["-dev", "none", "-ngl", "0", "-sm", "layer", "-fit", "off"]


def test_equal_fleets_give_equal_plans_in_any_order() -> None:
    hosts = [host(name, gpu(name, GIB), has_model=True) for name in "abcd"]
    shape = model(*layers(24))
    plans = {
        repr(plan(shape, list(order), all_links(hosts), num_ctx=NUM_CTX))
        for order in itertools.permutations(hosts)
    }
    assert len(plans) == 1


def test_a_large_fleet_is_planned() -> None:
    """Fifteen unlike nodes that are nearly all needed for 126 layers of two sizes."""
    hosts = [
        host(f"n{index:02}", gpu(f"n{index:02}", (16 * GIB) + index * 300 * MIB, (300 + 37 * index) * 1e9))
        for index in range(15)
    ]
    hosts[0] = replace(hosts[0], has_model=True)
    sizes = [1800 if index % 3 else 1500 for index in range(126)]
    shape = model(*[LayerShape(size * MIB, float(size * MIB), 4096.0) for size in sizes])
    found = plan(shape, hosts, all_links(hosts), num_ctx=8192)
    assert isinstance(found, Plan)
    assert all(share.memory_bytes <= share.device.free_bytes for share in found.shares)
    assert sum(share.layers for share in found.shares) == 126


# -- GPUs or fewer nodes ------------------------------------------------------------------------------------


def test_a_second_gpu_is_taken_rather_than_most_layers_on_a_cpu() -> None:
    shape = model(*layers(30))
    cpu = Device("a", "CPU", "cpu", 64 * GIB, 40e9)
    hosts = [
        host("a", cpu, gpu("a", 2 * GIB), has_model=True),
        host("b", gpu("b", 2 * GIB)),
    ]
    fewest = plan(shape, hosts, all_links(hosts), num_ctx=NUM_CTX)
    assert isinstance(fewest, Plan) and fewest.nodes == ("a",)
    chosen = planning.choose(shape, hosts, all_links(hosts), num_ctx=NUM_CTX)
    assert isinstance(chosen, Plan) and chosen.ms_per_token < fewest.ms_per_token
    assert {share.device.kind for share in chosen.shares} == {"gpu"}


def test_a_cpu_is_used_where_memory_or_a_slow_link_forces_it() -> None:
    shape = model(*layers(30))
    cpu = Device("a", "CPU", "cpu", 64 * GIB, 40e9)
    hosts = [host("a", cpu, gpu("a", 2 * GIB), has_model=True), host("b", gpu("b", GIB // 2))]
    small = planning.choose(shape, hosts, all_links(hosts), num_ctx=NUM_CTX)
    assert isinstance(small, Plan) and any(share.device.kind == "cpu" for share in small.shares)
    hosts = [host("a", cpu, gpu("a", 2 * GIB), has_model=True), host("b", gpu("b", 2 * GIB))]
    far = planning.choose(shape, hosts, all_links(hosts, rtt_s=5.0), num_ctx=NUM_CTX)
    assert isinstance(far, Plan) and far.nodes == ("a",)
    assert isinstance(planning.choose(shape, hosts[:1], {}, num_ctx=NUM_CTX), Plan)
