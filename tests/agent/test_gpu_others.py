"""AMD through sysfs, Apple through sysctl, none, and several at once."""

from pathlib import Path

import pytest

from agent import gpu
from agent.gpu import AmdGpus, AppleGpu, NoGpu, Reading, Several, detect
from agent.gpu.apple import REREAD_S, usable_bytes
from agent.report import Gpu
from tests.agent.conftest import Clock

GIB = 1 << 30


@pytest.fixture
def sysfs(tmp_path: Path) -> Path:
    """Two cards, as the amdgpu driver lays them out: the second tells less."""
    cards = {
        "card0": {
            "mem_info_vram_total": str(16 * GIB),
            "mem_info_vram_used": str(3 * GIB),
            "gpu_busy_percent": "42",
            "product_name": "AMD Radeon RX 6800",
            "unique_id": "a1b2c3d4e5f60718",
            "hwmon/hwmon4/temp1_input": "51000",
            "hwmon/hwmon4/power1_average": "98000000",
            "hwmon/hwmon4/power1_cap": "203000000",
        },
        "card10": {
            "mem_info_vram_total": str(8 * GIB),
            "mem_info_vram_used": "0",
            "device": "0x744c",
            "hwmon/hwmon7/power1_input": "25000000",
        },
        "card2": {"vendor": "0x8086"},
    }
    for card, files in cards.items():
        for name, text in files.items():
            path = tmp_path / "class/drm" / card / "device" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text + "\n")
    (tmp_path / "class/drm/card0-DP-1").mkdir()
    return tmp_path


def test_amd_reports_what_sysfs_tells(sysfs: Path) -> None:
    reading = AmdGpus(sysfs).read()
    assert reading.stale == {}
    first, second = reading.gpus
    assert first == Gpu(
        index=0,
        name="AMD Radeon RX 6800",
        uuid="a1b2c3d4e5f60718",
        vendor="amd",
        memory_total_bytes=16 * GIB,
        memory_free_bytes=13 * GIB,
        memory_used_bytes=3 * GIB,
        utilisation=0.42,
        temperature_c=51,
        power_w=98,
        power_limit_w=203,
    )
    assert (second.index, second.name, second.power_w, second.temperature_c, second.utilisation) == (
        1,
        "AMD GPU 0x744c",
        25,
        None,
        None,
    )


def test_an_amd_card_that_vanishes_keeps_its_last_values(sysfs: Path) -> None:
    gpus = AmdGpus(sysfs)
    gpus.read()
    (sysfs / "class/drm/card0/device/mem_info_vram_used").unlink()
    (sysfs / "class/drm/card10/device/mem_info_vram_used").write_text(str(GIB))
    reading = gpus.read()
    assert [gpu.memory_used_bytes for gpu in reading.gpus] == [3 * GIB, GIB]
    assert list(reading.stale) == ["gpus.0"]
    assert reading.stale["gpus.0"].startswith("amdgpu: ")


def test_an_amd_card_that_never_answered_is_said(sysfs: Path) -> None:
    (sysfs / "class/drm/card0/device/mem_info_vram_total").write_text("garbage")
    reading = AmdGpus(sysfs).read()
    assert [gpu.name for gpu in reading.gpus] == ["AMD GPU 0x744c"]
    assert list(reading.stale) == ["gpus"]


@pytest.mark.parametrize(
    ("ram_gib", "limit_mb", "usable"),
    [
        (24, 0, 16 * GIB),
        (36, 0, 24 * GIB),
        (128, 0, 96 * GIB),
        (128, 122880, 120 * GIB),
        (16, 999999, 16 * GIB),
    ],
)
def test_apple_usable_share(ram_gib: int, limit_mb: int, usable: int) -> None:
    assert usable_bytes(ram_gib * GIB, limit_mb) == usable


def test_apple_reports_one_gpu_whose_memory_is_what_it_may_wire(clock: Clock) -> None:
    kernel = {
        "hw.memsize": str(64 * GIB),
        "machdep.cpu.brand_string": "Apple M2 Max",
        "iogpu.wired_limit_mb": "0",
    }
    available = [60 * GIB]
    gpus = AppleGpu(kernel.get, lambda: available[0], clock)
    (first,) = gpus.read().gpus
    assert (first.name, first.memory_total_bytes, first.memory_free_bytes, first.memory_used_bytes) == (
        "Apple M2 Max",
        48 * GIB,
        48 * GIB,
        0,
    )
    assert first.memory_bandwidth_bytes_s == 400e9
    available[0] = 10 * GIB
    kernel["iogpu.wired_limit_mb"] = str(56 << 10)
    assert gpus.read().gpus[0].memory_total_bytes == 48 * GIB  # asking starts a process, so not each second
    clock.now_s += REREAD_S
    (later,) = gpus.read().gpus
    assert (later.memory_total_bytes, later.memory_free_bytes) == (56 * GIB, 10 * GIB)


def test_apple_kernel_that_does_not_answer_leaves_the_last_values(clock: Clock) -> None:
    kernel = {"hw.memsize": str(16 * GIB)}
    gpus = AppleGpu(kernel.get, lambda: GIB, clock)
    before = gpus.read().gpus
    kernel.clear()
    clock.now_s += REREAD_S
    reading = gpus.read()
    assert reading.gpus == before
    assert reading.stale == {"gpus": "sysctl: hw.memsize is unknown"}
    assert AppleGpu(kernel.get, lambda: GIB, clock).read() == reading.__class__((), reading.stale)


class Fixed:
    def __init__(self, count: int, stale: dict[str, str]) -> None:
        self._reading = Reading([_gpu(index) for index in range(count)], stale)

    def read(self) -> Reading:
        return self._reading


def _gpu(index: int) -> Gpu:
    return Gpu(
        index=index, name="x", vendor="amd", memory_total_bytes=1, memory_free_bytes=1, memory_used_bytes=0
    )


def test_several_sources_are_numbered_through() -> None:
    both = Several([Fixed(2, {"gpus.1": "lost", "gpus": "a"}), Fixed(2, {"gpus.0": "gone", "gpus": "b"})])
    reading = both.read()
    assert [gpu.index for gpu in reading.gpus] == [0, 1, 2, 3]
    assert reading.stale == {"gpus.1": "lost", "gpus.2": "gone", "gpus": "a; b"}


def test_detect(sysfs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "nvml_present", lambda: False)
    assert isinstance(detect(sysfs), AmdGpus)
    assert isinstance(detect(tmp_path / "empty"), NoGpu)
    assert NoGpu().read() == Reading()
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    assert isinstance(detect(sysfs), AppleGpu)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert isinstance(detect(sysfs), NoGpu)
