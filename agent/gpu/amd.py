"""AMD GPUs through the files of the amdgpu driver (kernel documentation, gpu/amdgpu)."""

from __future__ import annotations

from pathlib import Path

from agent.gpu.source import Reading
from agent.report import Gpu


def amd_cards(sysfs: Path = Path("/sys")) -> list[Path]:
    """Return the device directories of the cards that amdgpu runs, in the order of their numbers."""
    # card0, but not card0-DP-1, which is a connector.
    cards = [card for card in (sysfs / "class/drm").glob("card*") if card.name[4:].isdigit()]
    devices = [card / "device" for card in sorted(cards, key=lambda card: int(card.name[4:]))]
    return [device for device in devices if (device / "mem_info_vram_total").exists()]


class AmdGpus:
    """Every card seen since the agent started.

    Bandwidth stays unknown: the driver tells the memory clock, but neither the width of the bus nor how many
    transfers the memory makes in a clock.
    """

    def __init__(self, sysfs: Path = Path("/sys")) -> None:
        self._sysfs = sysfs
        self._last: dict[Path, Gpu] = {}

    def read(self) -> Reading:
        """Return every card seen so far; those that failed with their last values and the reason."""
        failures: dict[Path, str] = {}
        for device in dict.fromkeys([*self._last, *amd_cards(self._sysfs)]):
            try:
                self._last[device] = _sample(device)
            except (OSError, ValueError) as error:
                failures[device] = f"amdgpu: {error}"
        gpus = [gpu.model_copy(update={"index": index}) for index, gpu in enumerate(self._last.values())]
        stale = {f"gpus.{i}": failures[device] for i, device in enumerate(self._last) if device in failures}
        never_read = [reason for device, reason in failures.items() if device not in self._last]
        if never_read:
            stale["gpus"] = "; ".join(never_read)
        return Reading(gpus, stale)


def _sample(device: Path) -> Gpu:
    total = int((device / "mem_info_vram_total").read_text())
    used = int((device / "mem_info_vram_used").read_text())
    hwmon = next(iter(sorted(device.glob("hwmon/hwmon*"))), device / "hwmon")
    # Newer GPUs tell only the momentary draw, older ones only the average.
    power_w = _scaled(hwmon / "power1_average", 1e-6) or _scaled(hwmon / "power1_input", 1e-6)
    busy = _scaled(device / "gpu_busy_percent", 1e-2)
    return Gpu(
        index=0,  # read() numbers them
        name=_line(device / "product_name") or f"AMD GPU {_line(device / 'device') or 'of unknown model'}",
        uuid=_line(device / "unique_id"),
        vendor="amd",
        memory_total_bytes=total,
        memory_free_bytes=max(total - used, 0),
        memory_used_bytes=used,
        utilisation=None if busy is None else min(max(busy, 0.0), 1.0),
        temperature_c=_scaled(hwmon / "temp1_input", 1e-3),
        power_w=power_w,
        power_limit_w=_scaled(hwmon / "power1_cap", 1e-6),
    )


def _line(path: Path) -> str | None:
    try:
        return path.read_text().strip() or None
    except OSError:  # this card or kernel has no such file, or the card sleeps
        return None


def _scaled(path: Path, factor: float) -> float | None:
    text = _line(path)
    return None if text is None else round(float(text) * factor, 6)
