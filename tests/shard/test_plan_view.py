"""What people and programs read of a plan, at several widths, in colour and without."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console, RenderableType

from agent.links import Link
from shard import plan_view
from shard.plan import Device, Host, Plan, TooBig, plan
from shard.shape import LayerShape, ModelShape

GIB = 1 << 30
LAYERS = 80
SHAPE = ModelShape(
    "llama",
    tuple([LayerShape(GIB // 2, GIB / 2, 4096.0)] * LAYERS),
    600 << 20,
    800 << 20,
    128_256,
    8192,
    131_072,
)
HOSTS = [
    Host(
        f"node-{index}",
        (
            Device(f"node-{index}", "CUDA0", "gpu", (14 + index) * GIB, (400 + 50 * index) * 1e9),
            Device(f"node-{index}", "CPU", "cpu", 4 * GIB, 40e9),
        ),
        has_model=index == 0,
    )
    for index in range(4)
]
LINKS = {(one.name, other.name): Link(0.0003, 118e6) for one in HOSTS for other in HOSTS if one is not other}
LEFT_OUT = {"old[box]": "its report is 42 s old"}


def made(parallel: int = 1) -> Plan:
    found = plan(SHAPE, HOSTS, LINKS, num_ctx=8192, parallel=parallel)
    assert isinstance(found, Plan)
    return found


def refused() -> TooBig:
    found = plan(SHAPE, HOSTS[:2], LINKS, num_ctx=8192)
    assert isinstance(found, TooBig)
    return found


def text_of(shown: RenderableType, width: int, encoding: str = "utf-8") -> str:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding)
    Console(file=file, width=width).print(shown)
    file.flush()
    return raw.getvalue().decode(encoding)


@pytest.mark.parametrize("width", [30, 60, 80, 200])
def test_nothing_is_wider_than_the_terminal_and_all_is_said(width: int) -> None:
    text = text_of(plan_view.render(made(), SHAPE, HOSTS, LEFT_OUT), width)
    assert "\x1b" not in text
    assert all(len(line) <= width for line in text.splitlines())
    words = " ".join(text.split())
    assert f"{1e3 / made().ms_per_token:.1f} tokens/s" in words
    assert "old[box]: its report is 42 s old" in words
    assert "Not needed: node-" in words


def test_the_table_at_eighty_columns() -> None:
    lines = text_of(plan_view.render(made(), SHAPE, HOSTS, {}), 80).splitlines()
    head = next(line for line in lines if "layers" in line)
    assert head.split() == ["device", "layers", "weights", "KV", "buffers", "total", "of", "free", "ms/token"]
    for share in made().shares:
        last = share.first_layer + share.layers - 1
        row = next(line for line in lines if f" {share.first_layer}-{last} " in line)
        assert f"{share.device.host} {share.device.name}" in row
        assert f"{share.memory_bytes / share.device.free_bytes:.0%}" in row
        assert ("+ out" in row) == share.output
        assert row.split()[-1] == f"{share.ms:.1f}"


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize("width", [20, 80, 200])
def test_the_picture_gives_each_device_its_part(width: int, encoding: str) -> None:
    shares = made().shares
    bar, letters = text_of(plan_view.Picture(shares, LAYERS), width, encoding).splitlines()[:2]
    width = min(width, 100)
    assert len(bar) == width == len(letters)
    parts = [bar.count(fill) for fill in ("ABCD" if encoding == "ascii" else "█▓▒░")][: len(shares)]
    assert sum(parts) == width
    for share, part in zip(shares, parts, strict=True):
        exact = (share.layers + share.output) * width / (LAYERS + 1)
        assert part == pytest.approx(exact, abs=2)
        assert part >= 1
    assert letters.split() == list("ABCD")[: len(shares)]


def test_colours_where_there_are_any() -> None:
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system="standard")
    console.print(plan_view.Picture(made().shares, LAYERS))
    assert console.file.getvalue().count("\x1b[") > 2 * len(made().shares)  # type: ignore[attr-defined]


def test_several_requests_at_once_are_told() -> None:
    text = " ".join(text_of(plan_view.render(made(2), SHAPE, HOSTS, {}), 80).split())
    assert "2 requests at once, each with a context of 8192" in text


def test_too_big_says_by_how_much_and_what_would_fit() -> None:
    found = refused()
    text = " ".join(text_of(plan_view.render_too_big(found, SHAPE, HOSTS[:2], LEFT_OUT), 80).split())
    assert f"Too big by {found.missing_bytes / GIB:.1f} GiB" in text
    assert f"needs {found.needed_bytes / GIB:.1f} GiB" in text
    assert "no context, however small" in text
    assert "node-1 CUDA0 15.0Gi" in text and "old[box]" in text
    smaller = TooBig(GIB, 2 * GIB, GIB, 8192, 2048)
    assert "It would fit with a context of 2048." in text_of(
        plan_view.render_too_big(smaller, SHAPE, [], {}), 80
    )


def test_json_has_it_all() -> None:
    answer = json.loads(plan_view.as_json(made(), SHAPE, HOSTS, LEFT_OUT))
    assert answer["fits"] is True and answer["coordinator"] == "node-0"
    assert [share["memory_bytes"] for share in answer["shares"]] == [
        share.memory_bytes for share in made().shares
    ]
    assert answer["left_out"] == LEFT_OUT and len(answer["hosts"]) == 4
    refusal = json.loads(plan_view.as_json(refused(), SHAPE, HOSTS, {}))
    assert refusal["fits"] is False and refusal["missing_bytes"] == refused().missing_bytes
