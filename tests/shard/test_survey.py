"""What a survey takes off before it plans."""

from __future__ import annotations

from shard.plan import Device, Host
from shard.survey import LOCAL, PROJECTOR_SCRATCH_BYTES, beside_projector

GIB = 1 << 30


def test_a_projector_takes_its_file_and_room_to_work_from_the_first_gpu() -> None:
    cpu, gpu = Device(LOCAL, "CPU", "cpu", 8 * GIB, 1e10), Device(LOCAL, "CUDA0", "gpu", 4 * GIB, 1e11)
    left = {
        device.name: device.free_bytes for device in beside_projector(Host(LOCAL, (cpu, gpu)), GIB).devices
    }
    assert left == {"CPU": 8 * GIB, "CUDA0": 3 * GIB - PROJECTOR_SCRATCH_BYTES}
    alone = beside_projector(Host(LOCAL, (cpu,)), 9 * GIB)
    assert [device.free_bytes for device in alone.devices] == [0]
    assert beside_projector(Host(LOCAL, ()), GIB) == Host(LOCAL, ())
