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
    memory_bandwidth_bytes_s: float | None = Field(None, description="measured: all threads together")
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
    num_parallel: int | None = Field(
        None, description="requests that a runner serves at a time, by those that run; None if none is seen"
    )
    requests_in_flight: int | None = Field(
        None, description="sum of what the proxies told this agent lately; None if none did"
    )


class RpcDevice(_Part):
    """What a ggml-rpc-server of this node can compute on. Memory figures are the agent's own."""

    name: str = Field(description="as llama.cpp calls it: CUDA0, Vulkan0, Metal, CPU")
    kind: Literal["gpu", "cpu"]
    gpu_index: int | None = Field(None, description="of Report.gpus; None for the CPU")
    memory_total_bytes: int
    memory_free_bytes: int
    memory_bandwidth_bytes_s: float | None = None


class RpcServer(_Part):
    """A ggml-rpc-server that the agent runs for one coordinator's model."""

    id: str
    device: str
    coordinator: str = Field(description="name in the coordinator's certificate")
    pid: int
    port: int = Field(description="on loopback")
    state: Literal["running", "stopped", "exited"]
    memory_bytes: int = Field(description="what the process holds: resident memory, and the GPU's where told")


class Rpc(_Part):
    """How this node lends itself to models that span several nodes."""

    build: str | None = Field(None, description="of its ggml-rpc-server; equal builds speak to each other")
    tunnel_port: int | None = Field(None, description="where tunnels are accepted; None: it joined no fleet")
    devices: list[RpcDevice] = []
    servers: list[RpcServer] = []
    lends_bytes: int | None = Field(
        None, description="the most that its owner lets others use of each device; None: whatever is free"
    )
    error: str | None = Field(None, description="why it cannot lend itself")


class ShardShare(_Part):
    """The part of a sharded model that one device holds."""

    node: str
    device: str
    first_layer: int
    layers: int
    output: bool = Field(description="whether the output layer lies here")
    memory_bytes: int = Field(description="expected: weights, KV cache, compute buffers")
    used_bytes: int | None = Field(None, description="as measured once loaded")
    ms_per_token: float = Field(description="expected")


class ShardPlan(_Part):
    """A plan, as kept in the coordinator's journal."""

    id: str
    model: str
    made_at: datetime
    reason: str = Field(description="why it was made: a request, or what made the plan before it fail")
    num_ctx: int
    parallel: int
    shares: list[ShardShare]
    ms_per_token: float = Field(description="expected")
    load_s: float = Field(description="expected")


class ShardLoad(_Part):
    """A sharded model that is loading or loaded."""

    model: str
    phase: Literal["planning", "starting", "loading", "ready", "failed"]
    progress: float = Field(ge=0, le=1)
    eta_s: float | None = None
    since_s: float = Field(description="how long it has been in this phase")
    plan: ShardPlan | None = None
    error: str | None = None


class ShardModel(_Part):
    """What a coordinator expects of a model that it could serve now; the prior of placement."""

    model: str
    fits: bool
    why: str = Field("", description="why not, and by how much it is too big")
    largest_num_ctx: int | None = None
    decode_tok_s: float | None = None
    prefill_tok_s: float | None = None
    load_s: float | None = None


class Shard(_Part):
    """A coordinator's own part of its report."""

    models: list[ShardModel] = []
    loads: list[ShardLoad] = []
    plans: list[ShardPlan] = Field([], description="the latest, newest last")


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
    rpc: Rpc | None = None
    shard: Shard | None = None
    stale: dict[str, str] = Field({}, description="part (gpus, host, ollama.resident, …) → why it is old")
