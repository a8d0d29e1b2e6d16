"""What a node says of itself: the schema of ``GET /v1/report``, owned by the producer.

The proxy and the coordinator read reports; only the agent writes them. Every quantity carries its unit in
its name. ``None`` means "this machine cannot tell", never "zero". A part that could not be refreshed keeps
its last value and is named in :attr:`Report.stale` with the reason, so that one broken source never hides
the rest.

Versioning: readers ignore fields they do not know and refuse a report whose ``schema_version`` is larger
than :data:`SCHEMA_VERSION`; a change that an old reader would misread raises the number.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

SCHEMA_VERSION = 1

NodeKind = Literal["ollama", "shard"]


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore")


class GpuProcess(_Part):
    """A process that holds memory of a GPU."""

    pid: int
    name: str | None = None
    memory_used_bytes: int | None = None


class Gpu(_Part):
    """One accelerator. Unified-memory machines report one Gpu whose memory is what the GPU may wire."""

    index: int
    name: str
    uuid: str | None = None
    vendor: Literal["nvidia", "amd", "apple"]
    memory_total_bytes: int
    memory_free_bytes: int
    memory_used_bytes: int
    utilisation: float | None = Field(None, ge=0, le=1, description="share of the last sample period")
    temperature_c: float | None = None
    power_w: float | None = None
    power_limit_w: float | None = None
    memory_bandwidth_bytes_s: float | None = Field(None, description="2 × max memory clock × bus width")
    processes: list[GpuProcess] = []


class Disk(_Part):
    """The file system that holds Ollama's model store."""

    path: str
    total_bytes: int
    free_bytes: int


class Host(_Part):
    """CPU, memory and disk of the machine."""

    hostname: str
    cpu_count: int
    cpu_utilisation: float | None = Field(None, ge=0, le=1)
    load_1m: float | None = None
    ram_total_bytes: int
    ram_available_bytes: int
    model_store: Disk | None = None


class Model(BaseModel):
    """A row of Ollama's ``/api/tags``, kept whole: fields not named here are carried along."""

    model_config = ConfigDict(extra="allow")

    name: str
    model: str | None = None
    modified_at: datetime
    size: int = Field(description="bytes on disk")
    digest: str = Field(description="hex sha256 of the manifest, no prefix")
    details: dict[str, Any] = {}


class Resident(BaseModel):
    """A row of Ollama's ``/api/ps``, kept whole: fields not named here are carried along."""

    model_config = ConfigDict(extra="allow")

    name: str
    model: str | None = None
    size: int = Field(description="bytes: weights + KV + compute buffers")
    size_vram: int = Field(0, description="bytes on accelerators; less than size is CPU offload")
    digest: str = ""
    expires_at: datetime | None = None
    context_length: int | None = None
    details: dict[str, Any] = {}


class Ollama(_Part):
    """The Ollama server beside the agent."""

    url: str
    reachable: bool
    error: str | None = None
    version: str | None = None
    models: list[Model] = []
    resident: list[Resident] = []
    connections: int | None = Field(None, description="established TCP connections, idle ones included")
    requests_in_flight: int | None = Field(
        None, description="sum of what the proxies told this agent lately; None if none did"
    )


class Report(_Part):
    """One sample of one node."""

    schema_version: int = SCHEMA_VERSION
    agent_version: str
    node_id: str = Field(description="random, made once, kept over restarts")
    kind: NodeKind = "ollama"
    sampled_at: datetime
    sample_age_s: float = Field(ge=0, description="age of the newest sample when the report was served")
    host: Host
    gpus: list[Gpu] = []
    ollama: Ollama
    stale: dict[str, str] = Field({}, description="part (gpus, host, ollama.resident, …) → why it is old")
