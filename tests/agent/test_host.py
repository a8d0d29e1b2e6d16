"""The host through psutil, and connections as the kernel lists them."""

import asyncio
import os
import socket
from pathlib import Path

import psutil

from agent.host import HostReader, connections, disk, established

PROC_NET_TCP = """\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:2CAA 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1 1 0 100
   1: 0100007F:2CAA 0100007F:D431 01 00000000:00000000 00:00000000 00000000     0        0 2 1 0 20
   2: 0100007F:D431 0100007F:2CAA 01 00000000:00000000 00:00000000 00000000     0        0 3 1 0 20
   3: 0100007F:2CAA 0100007F:D432 06 00000000:00000000 03:00000000 00000000     0        0 0 3 0
   4: 0101A8C0:2CAA 0201A8C0:D433 01 00000000:00000000 00:00000000 00000000     0        0 4 1 0 20
"""


def test_established_counts_the_servers_end_only() -> None:
    assert established(PROC_NET_TCP.splitlines(), 11434) == 2
    assert established(PROC_NET_TCP.splitlines(), 80) == 0


def test_connections_of_this_machine() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert connections(port) == 0
        with socket.create_connection(("127.0.0.1", port)), server.accept()[0]:
            assert connections(port) == 1


def test_connections_are_unknown_without_the_kernels_tables(tmp_path: Path) -> None:
    assert connections(1, tmp_path) is None


def test_host_is_what_psutil_says(tmp_path: Path) -> None:
    reader = HostReader(tmp_path)
    first, second = reader.read(), reader.read()
    assert first.hostname == socket.gethostname()
    assert first.cpu_count == os.cpu_count()
    assert first.ram_total_bytes == psutil.virtual_memory().total
    assert 0 < first.ram_available_bytes <= first.ram_total_bytes
    assert first.cpu_utilisation is None
    assert second.cpu_utilisation is not None
    assert first.load_1m is not None
    assert first.model_store is not None
    assert first.model_store.total_bytes == psutil.disk_usage(str(tmp_path)).total


def test_disk_of_a_store_that_is_not_made_yet_is_its_parents(tmp_path: Path) -> None:
    found = disk(tmp_path / "not/yet")
    assert found is not None
    assert (found.path, found.total_bytes) == (
        str(tmp_path / "not/yet"),
        psutil.disk_usage(str(tmp_path)).total,
    )


def test_disk_that_may_not_be_looked_at_is_unknown(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert disk(tmp_path / "file/below") is None  # "not a directory": any refusal but "not there"


async def test_nothing_of_it_needs_a_loop() -> None:
    host = await asyncio.to_thread(HostReader(None).read)
    assert host.model_store is None
