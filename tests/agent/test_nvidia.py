"""NVML through the real pynvml and ctypes, on a driver that misbehaves as told."""

import itertools
import os
from pathlib import Path

import psutil
import pytest

from agent import gpu
from agent.gpu import NvidiaGpus, detect
from agent.gpu.nvidia import RETRY_FIRST_S, RETRY_LONGEST_S, bandwidth_bytes_s
from tests.agent.conftest import Clock
from tests.agent.nvml_stub import GIB, Driver

GPU_IS_LOST, UNKNOWN, DRIVER_NOT_LOADED = 15, 999, 9


def test_reports_everything_the_driver_tells(driver: Driver) -> None:
    driver.have(2)
    driver.say(gpu1_compute=f"{os.getpid()}:1073741824,999999:-", gpu1_graphics=f"{os.getpid()}:5")
    reading = NvidiaGpus().read()
    assert reading.stale == {}
    assert [gpu.index for gpu in reading.gpus] == [0, 1]
    gpu = reading.gpus[1]
    assert (gpu.name, gpu.uuid, gpu.vendor) == ("NVIDIA GeForce RTX 3090", "GPU-00000001", "nvidia")
    assert (gpu.memory_total_bytes, gpu.memory_used_bytes, gpu.memory_free_bytes) == (
        24 * GIB,
        4 * GIB,
        20 * GIB,
    )
    assert (gpu.utilisation, gpu.temperature_c, gpu.power_w, gpu.power_limit_w) == (0.37, 61, 212.5, 350)
    assert gpu.memory_bandwidth_bytes_s == 936.096e9  # the published 936 GB/s of this card
    mine, gone = gpu.processes
    assert (mine.pid, mine.name, mine.memory_used_bytes) == (os.getpid(), psutil.Process().name(), GIB)
    assert (gone.pid, gone.name, gone.memory_used_bytes) == (999999, None, None)


def test_what_a_gpu_does_not_have_is_none(driver: Driver) -> None:
    driver.have(1)
    for field in ("gpu_util", "temp", "power", "limit", "clock", "width", "compute", "graphics", "uuid"):
        driver.say(**{f"gpu0_{field}": "unsupported"})
    reading = NvidiaGpus().read()
    gpu = reading.gpus[0]
    assert reading.stale == {}
    assert gpu.memory_total_bytes == 24 * GIB
    known = {"index", "name", "vendor", "memory_total_bytes", "memory_free_bytes", "memory_used_bytes"}
    assert {name for name, value in gpu if value is not None} - {"processes"} == known
    assert gpu.processes == []


def test_a_gpu_that_shares_the_cpus_memory_reports_that(driver: Driver) -> None:
    driver.have(1)
    driver.say(gpu0_total="unsupported")
    assert NvidiaGpus().read().gpus[0].memory_total_bytes == psutil.virtual_memory().total


def test_a_lost_gpu_keeps_its_last_values_and_leaves_the_others_fresh(driver: Driver) -> None:
    driver.have(3)
    gpus = NvidiaGpus()
    gpus.read()
    driver.say(gpu1_error=GPU_IS_LOST, gpu1_used=9, gpu2_used=7)
    reading = gpus.read()
    assert reading.stale == {"gpus.1": "NVML: GPU is lost"}
    assert [gpu.memory_used_bytes for gpu in reading.gpus] == [0, 4 * GIB, 7]


def test_a_lost_gpu_comes_back_through_a_fresh_session(driver: Driver, clock: Clock) -> None:
    driver.have(2)
    gpus = NvidiaGpus(clock)
    gpus.read()
    driver.say(gpu0_error=GPU_IS_LOST)
    assert gpus.read().stale == {"gpus.0": "NVML: GPU is lost"}
    # The driver drops it and numbers the other anew; a report does neither.
    driver.say(count=1, order="1", gpu1_used=77)
    clock.now_s += RETRY_FIRST_S
    reading = gpus.read()
    assert reading.stale == {"gpus.0": "the driver no longer lists this GPU"}
    assert [(gpu.index, gpu.uuid) for gpu in reading.gpus] == [(0, "GPU-00000000"), (1, "GPU-00000001")]
    assert reading.gpus[1].memory_used_bytes == 77
    driver.say(count=2, order=None, gpu0_error=None, gpu0_used=5)
    clock.now_s += 2 * RETRY_FIRST_S
    reading = gpus.read()
    assert reading.stale == {}
    assert [gpu.memory_used_bytes for gpu in reading.gpus] == [5, 77]


def test_a_gpu_without_a_handle_is_named_and_the_other_is_read(driver: Driver) -> None:
    driver.have(2)
    driver.say(gpu0_handle_error=GPU_IS_LOST)
    reading = NvidiaGpus().read()
    assert [gpu.uuid for gpu in reading.gpus] == ["GPU-00000001"]
    assert reading.stale == {"gpus": "NVML: GPU is lost"}


def test_a_driver_that_goes_away_and_comes_back(driver: Driver, clock: Clock) -> None:
    driver.have(2)
    gpus = NvidiaGpus(clock)
    before = gpus.read().gpus
    driver.say(init=UNKNOWN)
    reading = gpus.read()
    assert reading.gpus == before
    assert reading.stale == {"gpus.0": "NVML: Unknown Error", "gpus.1": "NVML: Unknown Error"}
    driver.say(init=DRIVER_NOT_LOADED)
    clock.now_s += RETRY_FIRST_S
    reading = gpus.read()
    assert reading.gpus == before
    assert reading.stale == {"gpus.0": "NVML: Driver Not Loaded", "gpus.1": "NVML: Driver Not Loaded"}
    driver.say(init=0, gpu0_used=3)
    clock.now_s += RETRY_LONGEST_S
    reading = gpus.read()
    assert reading.stale == {}
    assert reading.gpus[0].memory_used_bytes == 3


def test_a_driver_that_is_not_loaded_yet_is_said(driver: Driver, clock: Clock) -> None:
    driver.say(init=DRIVER_NOT_LOADED)
    gpus = NvidiaGpus(clock)
    assert gpus.read().stale == {"gpus": "NVML: Driver Not Loaded"}
    driver.have(1)
    assert gpus.read().gpus == []  # not before its time: initialising may start a process
    clock.now_s += RETRY_FIRST_S
    reading = gpus.read()
    assert (len(reading.gpus), reading.stale) == (1, {})


def test_a_trouble_that_stays_is_asked_after_less_and_less_often(driver: Driver, clock: Clock) -> None:
    driver.say(init=DRIVER_NOT_LOADED)
    gpus = NvidiaGpus(clock)
    starts = []
    start = gpus._start
    gpus._start = lambda: (starts.append(clock.now_s), start())  # type: ignore[method-assign]
    for _ in range(300):
        gpus.read()
        clock.now_s += 1
    waits = [later - earlier for earlier, later in itertools.pairwise(starts)]
    assert waits[:5] == [2, 4, 8, 16, 32]
    assert set(waits[5:]) == {RETRY_LONGEST_S}


def test_the_names_of_ended_processes_are_forgotten(driver: Driver) -> None:
    driver.have(1)
    driver.say(gpu0_compute=f"{os.getpid()}:1")
    gpus = NvidiaGpus()
    gpus.read()
    driver.say(gpu0_compute="")
    gpus.read()
    assert gpus._process_names == {}


def test_detect_takes_nvidia_where_its_library_is(
    driver: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "nvml_present", lambda: True)
    assert isinstance(detect(tmp_path), NvidiaGpus)


@pytest.mark.parametrize(
    ("clock_mhz", "width_bits", "bytes_s"),
    [(2619, 5120, 3352.32e9), (1215, 5120, 1555.2e9), (0, 384, None), (9751, 0, None)],
)
def test_bandwidth(clock_mhz: int, width_bits: int, bytes_s: float | None) -> None:
    assert bandwidth_bytes_s(clock_mhz, width_bits) == bytes_s
