"""NVIDIA GPUs through NVML, the driver's own management library."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import psutil

from agent.gpu.source import Reading
from agent.report import Gpu, GpuProcess

# Initialising NVML may load the driver or wake every GPU, so a trouble that stays is asked after less often.
RETRY_FIRST_S = 2.0
RETRY_LONGEST_S = 60.0


def bandwidth_bytes_s(max_memory_clock_mhz: int, bus_width_bits: int) -> float | None:
    """Return the peak memory bandwidth, 2 × clock × bus width (two transfers a clock), None if unknown."""
    if max_memory_clock_mhz <= 0 or bus_width_bits <= 0:
        return None
    return 2 * max_memory_clock_mhz * 1e6 * bus_width_bits / 8


def nvml_present() -> bool:
    """Return whether NVIDIA's management library can be loaded; pynvml, 10 MB, is imported only then."""
    try:
        ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return False
    return True


@dataclass
class _Device:
    """A GPU that the driver listed: its handle, and what does not change while the driver stays."""

    key: str
    handle: Any
    name: str
    uuid: str | None
    memory_bandwidth_bytes_s: float | None


class NvidiaGpus:
    """Every GPU that NVML has listed since the agent started.

    Handles die with the driver, and a lost GPU comes back only to a fresh session: after any failure NVML is
    shut down and initialised again, less often the longer the trouble lasts.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        import pynvml

        self._nvml: ModuleType = pynvml
        self._clock = clock
        self._devices: list[_Device] = []
        # By UUID: when a GPU falls off the bus, the driver renumbers the others, but a report does not.
        self._last: dict[str, Gpu] = {}
        self._trouble: str | None = None
        self._restart_at: float | None = float("-inf")
        self._retry_s = RETRY_FIRST_S
        self._process_names: dict[int, str | None] = {}
        # Answers that say "this GPU has no such thing", as opposed to "this GPU is in trouble".
        self._absent = (
            pynvml.NVML_ERROR_NOT_SUPPORTED,
            pynvml.NVML_ERROR_NO_PERMISSION,
            pynvml.NVML_ERROR_FUNCTION_NOT_FOUND,
            pynvml.NVML_ERROR_NO_DATA,
        )

    def read(self) -> Reading:
        """Return every GPU seen so far; those that failed with their last values and the reason."""
        if self._restart_at is not None and self._clock() >= self._restart_at:
            self._start()
        fresh: dict[str, Gpu] = {}
        failures: dict[str, str] = {}
        for device in self._devices:
            try:
                fresh[device.key] = self._sample(device)
            except self._nvml.NVMLError as error:
                failures[device.key] = f"NVML: {error}"
        self._forget_ended_processes(fresh.values())
        self._last |= fresh
        gpus = [gpu.model_copy(update={"index": index}) for index, gpu in enumerate(self._last.values())]
        missing = self._trouble or "the driver no longer lists this GPU"
        stale = {
            f"gpus.{index}": failures.get(key, missing)
            for index, key in enumerate(self._last)
            if key not in fresh
        }
        if self._trouble and not stale:
            stale["gpus"] = self._trouble
        self._plan_restart(needed=bool(stale))
        return Reading(gpus, stale)

    def _plan_restart(self, *, needed: bool) -> None:
        if not needed:
            self._restart_at, self._retry_s = None, RETRY_FIRST_S
        elif self._restart_at is None:
            self._restart_at = self._clock() + self._retry_s
            self._retry_s = min(self._retry_s * 2, RETRY_LONGEST_S)

    def _start(self) -> None:
        nvml = self._nvml
        # It refuses when it is not up or the driver took it down, which is the state that we want.
        with suppress(nvml.NVMLError):
            nvml.nvmlShutdown()
        self._devices, self._trouble, self._restart_at = [], None, None
        try:
            nvml.nvmlInit()
            for index in range(nvml.nvmlDeviceGetCount()):
                try:
                    self._devices.append(self._describe(nvml.nvmlDeviceGetHandleByIndex(index)))
                except nvml.NVMLError as error:  # a lost GPU may be counted but have no handle
                    self._trouble = f"NVML: {error}"
        except nvml.NVMLError as error:
            self._trouble = f"NVML: {error}"

    def _describe(self, handle: Any) -> _Device:
        nvml = self._nvml
        uuid = self._optional(nvml.nvmlDeviceGetUUID, handle)
        clock_mhz = self._optional(nvml.nvmlDeviceGetMaxClockInfo, handle, nvml.NVML_CLOCK_MEM)
        width_bits = self._optional(nvml.nvmlDeviceGetMemoryBusWidth, handle)
        return _Device(
            key=uuid or f"without UUID {len(self._devices)}",
            handle=handle,
            name=nvml.nvmlDeviceGetName(handle),
            uuid=uuid,
            memory_bandwidth_bytes_s=bandwidth_bytes_s(clock_mhz or 0, width_bits or 0),
        )

    def _sample(self, device: _Device) -> Gpu:
        nvml, handle = self._nvml, device.handle
        total, free, used = self._memory(handle)
        utilisation = self._optional(nvml.nvmlDeviceGetUtilizationRates, handle)
        return Gpu(
            index=0,  # read() numbers them
            name=device.name,
            uuid=device.uuid,
            vendor="nvidia",
            memory_total_bytes=total,
            memory_free_bytes=free,
            memory_used_bytes=used,
            utilisation=None if utilisation is None else min(utilisation.gpu / 100, 1.0),
            temperature_c=self._optional(nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU),
            power_w=_watts(self._optional(nvml.nvmlDeviceGetPowerUsage, handle)),
            power_limit_w=_watts(self._optional(nvml.nvmlDeviceGetEnforcedPowerLimit, handle)),
            memory_bandwidth_bytes_s=device.memory_bandwidth_bytes_s,
            processes=self._processes(handle),
        )

    def _memory(self, handle: Any) -> tuple[int, int, int]:
        memory = self._optional(self._nvml.nvmlDeviceGetMemoryInfo, handle)
        if memory is not None:
            return memory.total, memory.free, memory.used
        # Boards whose GPU shares the CPU's memory (Jetson, DGX Spark) answer "not supported".
        ram = psutil.virtual_memory()
        return ram.total, ram.available, ram.total - ram.available

    def _processes(self, handle: Any) -> list[GpuProcess]:
        nvml = self._nvml
        used: dict[int, int | None] = {}
        asks = (nvml.nvmlDeviceGetComputeRunningProcesses_v3, nvml.nvmlDeviceGetGraphicsRunningProcesses_v3)
        for process in (process for ask in asks for process in self._optional(ask, handle) or ()):
            # A process that both computes and draws is listed twice, each time with all its memory.
            sizes = [size for size in (used.get(process.pid), process.usedGpuMemory) if size is not None]
            used[process.pid] = max(sizes, default=None)
        return [
            GpuProcess(pid=pid, name=self._process_name(pid), memory_used_bytes=size)
            for pid, size in sorted(used.items())
        ]

    def _process_name(self, pid: int) -> str | None:
        if pid not in self._process_names:
            try:
                self._process_names[pid] = psutil.Process(pid).name()
            except psutil.Error:  # ended already, or of another PID namespace
                self._process_names[pid] = None
        return self._process_names[pid]

    def _forget_ended_processes(self, gpus: Iterable[Gpu]) -> None:
        running = {process.pid for gpu in gpus for process in gpu.processes}
        self._process_names = {pid: name for pid, name in self._process_names.items() if pid in running}

    def _optional(self, ask: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return ask(*arguments)
        except self._nvml.NVMLError as error:
            if error.value in self._absent:
                return None
            raise


def _watts(milliwatts: int | None) -> float | None:
    return None if milliwatts is None else milliwatts / 1000
