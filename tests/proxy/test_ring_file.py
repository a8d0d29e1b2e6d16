"""Two processes may append to one journal, each below a header of its own."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from proxy_addon.ring_file import RingFile, read_lines


def ring(folder: Path, header: bytes, file_bytes: int = 1 << 20) -> RingFile:
    return RingFile(folder / "now", folder / "before", header, file_bytes)


async def test_what_two_append_in_turns_stands_below_the_right_header(tmp_path: Path) -> None:
    old, new = ring(tmp_path, b"H1"), ring(tmp_path, b"H2")
    for writer, line in ((old, b"a1"), (old, b"a2"), (new, b"b1"), (new, b"b2"), (old, b"a3")):
        writer.append(line + b"\n")
        await writer.keep()
    await asyncio.gather(old.close(), new.close())
    lines = [line.strip() for line in read_lines(tmp_path / "now", tmp_path / "before") if line.strip()]
    assert lines == [b"H1", b"a1", b"a2", b"H2", b"b1", b"b2", b"H1", b"a3"]


async def test_one_that_turns_the_file_over_takes_the_other_along(tmp_path: Path) -> None:
    old, new = ring(tmp_path, b"H1", 12), ring(tmp_path, b"H2", 12)
    for number in range(4):
        for writer in (old, new):
            writer.append(b"line %d\n" % number)
            await writer.keep()
    await asyncio.gather(old.close(), new.close())
    for name in ("now", "before"):
        first, *rest = (tmp_path / name).read_bytes().split(b"\n")
        assert first in (b"H1", b"H2") and any(rest)
    assert old.lost == new.lost == 0


WRITER = """
import asyncio, sys
from pathlib import Path
from proxy_addon.ring_file import RingFile
async def write():
    folder, name = Path(sys.argv[1]), sys.argv[2].encode()
    ring = RingFile(folder / "now", folder / "before", b"H" + name, 1 << 30)
    for number in range(200):
        ring.append(name * 5000 + b"\\n")
        if number % 10 == 0:
            await ring.keep()
    await ring.close()
asyncio.run(write())
"""


async def test_processes_that_write_at_once_do_not_mix_their_lines(tmp_path: Path) -> None:
    writers = [
        await asyncio.create_subprocess_exec(sys.executable, "-c", WRITER, str(tmp_path), name)
        for name in ("x", "y")
    ]
    assert [await writer.wait() for writer in writers] == [0, 0]
    below, count = b"", 0
    for line in read_lines(tmp_path / "now", tmp_path / "before"):
        line = line.strip()
        if line.startswith(b"H"):
            below = line[1:]
        elif line:
            assert line == below * 5000
            count += 1
    assert count == 400
