"""Every setting of the proxy: one typed tree, the same names in ``sollol.yaml``, ``SOLLOL_*`` and ``--set``.

Later sources win: defaults, file, variables (``SOLLOL_TIMEOUTS__CONNECT_S=5``), ``--set``, flags. Units are
in the names. :func:`load` reads them all.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from mitmproxy.proxy import mode_specs
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    IPvAnyNetwork,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails

from agent.ollama import names
from agent.report import NodeKind
from proxy_addon.analysis import Kind
from proxy_addon.settings_sources import Layer, SettingsError, dotted, from_file, from_pairs, from_variables

__all__ = ["Address", "NodeSettings", "Settings", "SettingsError", "Source", "load"]

OLLAMA_PORT, SHARD_PORT = 11434, 11436
SHARD_SCHEME = "shard://"
PREFIX = "SOLLOL_"
#: Variables of the other parts (and of the command line), which share the prefix.
FOREIGN = re.compile(
    r"SOLLOL_(AGENT_(?!TOKEN$)|(SHARD|LLAMA|RPC|NVML|DEMO|BENCH|TEST)_(?!_)|(PROXY_ARGS|URL|CONFIG)$)"
)
FLAGS = {
    "--listen": "listen",
    "--nodes": "nodes",
    "--mode": "modes",
    "--state-dir": "state_dir",
    "--workers": "workers",
}
MODES = ("regular", "socks5", "transparent", "reverse")  #: those in which the guard knows what is asked

#: The names that a priority may be given by.
PRIORITIES = {"critical": 10, "high": 8, "normal": 5, "low": 3, "batch": 1}

Policy = Literal["finish_time", "score", "least_loaded", "round_robin"]


def _split(value: Any) -> Any:
    """A list may be written as one text with commas: variables and flags have nothing else."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def priority_of(value: Any) -> int:
    """A priority from its number or its name. Raises ValueError, whose text goes on from what it is of."""
    if isinstance(value, str):
        text = value.strip().lower()
        found = PRIORITIES.get(text) or (int(text[:3]) if text.isascii() and text.isdecimal() else 0)
    else:
        found = value if isinstance(value, int) and not isinstance(value, bool) else 0
    if not 1 <= found <= 10:
        raise ValueError(f"should be 1 to 10, or one of {', '.join(PRIORITIES)}")
    return found


def _switch(value: Any) -> Any:
    """YAML 1.1 reads a bare ``off`` as false."""
    return "off" if value is False else value


def _known_mode(spec: str) -> str:
    try:
        mode = mode_specs.ProxyMode.parse(spec)
    except ValueError as exc:
        raise ValueError(f"should be a mode such as regular@8080 ({exc})") from exc
    if mode.type_name not in MODES:
        raise ValueError(f"should be one of the modes {', '.join(MODES)}")
    return re.sub(r"@\[(.*)\]:", r"@\1:", spec)  # IPv6 as in any address; mitmproxy wants it bare


Mode = Annotated[str, AfterValidator(_known_mode)]
Listed = BeforeValidator(_split)
Names = Annotated[tuple[str, ...], Listed]
ModelName = Annotated[str, AfterValidator(names.canonical)]
Networks = Annotated[tuple[IPvAnyNetwork, ...], Listed]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _empty(cls, value: Any) -> Any:
        """A table whose lines are all commented out is YAML's null."""
        return {} if value is None else value


class Address(_Part):
    """A host and a port; written ``host:port``, ``[v6]:port``, ``:port`` or ``http://host:port``."""

    host: str = Field(min_length=1, description="name or address")
    port: int = Field(OLLAMA_PORT, ge=0, le=65535)

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        return _address(value) if isinstance(value, str) else value


def _address(text: str, port: int = OLLAMA_PORT) -> dict[str, Any]:
    """Host and port of ``text``, by Ollama's reading of OLLAMA_HOST (``envconfig.Host``)."""
    scheme, separator, rest = text.strip().rpartition("://")
    if separator and scheme != "http":
        raise ValueError("should be host:port of a plain HTTP server")
    rest = rest.removesuffix("/")
    default = "80" if separator else str(port)
    if rest.startswith("["):
        host, bracket, tail = rest[1:].partition("]")
        given = tail.removeprefix(":") or default
        broken = not bracket or (tail and not tail.startswith(":"))
    elif rest.count(":") > 1:
        host, given, broken = rest, default, False
    else:
        host, _, given = rest.partition(":")
        given = given or default
        broken = False
    if broken or not given.isdecimal() or any(c in "/?#@ " for c in host):
        raise ValueError("should be host:port")
    return {"host": host or "127.0.0.1", "port": given}


class NodeSettings(Address):
    """A node that is always part of the fleet."""

    port: int = Field(OLLAMA_PORT, ge=1, le=65535, description="where its Ollama listens")
    kind: NodeKind = Field(
        "ollama", description="what answers there: an Ollama, or `sollol shard serve`; also shard://HOST:PORT"
    )
    agent: str | None = Field(None, description="base URL of its agent; default http://HOST:11435")
    parallel: PositiveInt | None = Field(
        None, description="its OLLAMA_NUM_PARALLEL, which Ollama does not report; unset: learned, 1 at first"
    )
    priority: int = Field(5, ge=1, le=10, description="only the policy score reads it")
    preferred_tasks: Annotated[frozenset[str], Listed] = Field(
        frozenset(), description="generation, embedding; only the policy score reads it"
    )

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        if isinstance(value, str) and value.strip().startswith(SHARD_SCHEME):
            return _address(value.strip().removeprefix(SHARD_SCHEME), SHARD_PORT) | {"kind": "shard"}
        return _address(value) if isinstance(value, str) else value

    @field_validator("agent")
    @classmethod
    def _agent_url(cls, value: str | None) -> str | None:
        return f"http://{value}" if value and "://" not in value else value


class Discovery(_Part):
    """Where nodes are found besides ``nodes``."""

    mdns: bool = Field(True, description="agents that announce themselves on the local network")
    ollama_host: bool = Field(True, description="the server that $OLLAMA_HOST names")
    localhost: bool = Field(
        True, description="this machine's Ollama at 127.0.0.1:11434, where nobody is named"
    )
    agents: bool = Field(True, description="look for agents that nobody named, at http://HOST:11435")
    dns_refresh_s: PositiveFloat = Field(30, description="how often names of nodes are resolved again")


class Pull(_Part):
    """What a pull without a target does."""

    replicas: PositiveInt = Field(1, description="how many nodes a new model is pulled to")


class Shard(_Part):
    """What goes to a coordinator (`sollol shard serve`) besides models that no other node holds."""

    models: Annotated[frozenset[ModelName], Listed] = Field(
        frozenset(), description="names of models that only coordinators serve, whoever holds them"
    )
    min_gpu_share: float = Field(
        0, ge=0, le=1, description="a node with less of a model on its GPUs does not count as holding it"
    )
    wait_s: NonNegativeFloat = Field(
        60, description="for a coordinator to come back, if nobody else can serve"
    )


class Timeouts(_Part):
    """Limits of one attempt on one node."""

    connect_s: PositiveFloat = Field(2, description="to an established connection")
    first_byte_s: PositiveFloat = Field(120, description="to the first byte of an answer, model resident")
    load_s: PositiveFloat = Field(600, description="added to first_byte_s where the model must be loaded")
    idle_s: PositiveFloat = Field(300, description="between two pieces of a streamed answer")
    whole_answer_s: PositiveFloat = Field(1800, description="to the head of an answer that is not streamed")
    drain_s: NonNegativeFloat = Field(60, description="for answers in progress when the proxy is told to end")
    head_s: PositiveFloat = Field(30, description="for a client to send the head of a request, once begun")
    body_s: PositiveFloat = Field(60, description="between two pieces of a request's body")
    keepalive_s: PositiveFloat = Field(600, description="for a client's kept connection without a request")


class Retry(_Part):
    """Other nodes after a failure. The budget bounds what a sick fleet is asked on top of the requests."""

    rounds: PositiveInt = Field(5, description="tries of every candidate until the client gets an error")
    backoff_s: NonNegativeFloat = Field(0.1, description="the first pause, once all candidates were tried")
    backoff_max_s: NonNegativeFloat = Field(2, description="the longest pause; each is twice the one before")
    budget_ratio: NonNegativeFloat = Field(0.2, description="retries per request over budget_window_s")
    budget_min_per_s: NonNegativeFloat = Field(3, description="retries that are always allowed, besides")
    budget_window_s: PositiveFloat = Field(10, description="over which requests and retries are counted")


class Poll(_Part):
    """The active look at every node."""

    interval_s: PositiveFloat = Field(1, description="between two looks")
    timeout_s: PositiveFloat = Field(3, description="until a poll counts as failed")
    failures_to_lose: PositiveInt = Field(2, description="failed polls in a row until a node counts as lost")


Priority = Annotated[int, BeforeValidator(priority_of)]


class Admission(_Part):
    """Who waits, and how long. Requests wait in the proxy until a slot that serves them well is free."""

    ageing_s: PositiveFloat = Field(
        30, description="waiting this long is worth one priority: bounds every wait; see admission.md"
    )
    ahead_s: NonNegativeFloat = Field(
        0.05, description="a request is sent to a node whose slot will be free within that"
    )
    max_queue: PositiveInt = Field(1000, description="requests that may wait; beyond: 503")
    max_wait_s: PositiveFloat = Field(600, description="the longest wait; then 503")
    priority: Priority = Field(
        5, description="of a request that names none: 1 to 10, or critical, high, normal, low, batch"
    )
    max_priority: Priority = Field(10, description="the highest that a client of no class may ask for")


class ClientClass(_Part):
    """Clients known by key or network. The first class that fits a request is its client's."""

    name: str = Field(min_length=1, description="in metrics, the queue and the journal")
    key: SecretStr | None = Field(
        None, description="its bearer token (or x-api-key): all who send it are one client"
    )
    networks: Networks = Field((), description="its networks: every address in them is a client of its own")
    priority: Priority | None = Field(None, description="of its requests that name none")
    max_priority: Priority = Field(10, description="the highest it may ask for")
    weight: PositiveFloat = Field(1, description="its share beside other clients of the same priority")
    max_in_flight: PositiveInt | None = Field(None, description="its requests here at once; beyond: 429")
    rate_per_s: PositiveFloat | None = Field(None, description="its requests a second; beyond: 429")
    burst: PositiveInt = Field(10, description="requests at once that rate_per_s lets through")

    @model_validator(mode="after")
    def _known_by_something(self) -> ClientClass:
        if self.key is None and not self.networks:
            raise ValueError("should have a key or networks")
        return self


class PinnedModel(_Part):
    """A model that stays in memory; written ``model``, ``model@host:port``, or as a table."""

    model: ModelName = Field(description="its name")
    node: str | None = Field(None, description="host:port of the node; unset: whichever suits best")

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        model, _, node = value.partition("@")
        return {"model": model, "node": node or None}

    @field_validator("node")
    @classmethod
    def _node_name(cls, value: str | None) -> str | None:
        return str(NodeSettings.model_validate(value)) if value else None


class Replicas(_Part):
    """How hot models are spread, where ``replicas`` is ``auto``."""

    pressure_s: PositiveFloat = Field(
        2, description="expected wait for a slot of a model from which a second node is made ready"
    )
    sustain_s: NonNegativeFloat = Field(10, description="how long that must have lasted")
    idle_s: PositiveFloat = Field(300, description="a replica that nobody used so long is given up")
    cooldown_s: PositiveFloat = Field(60, description="between two changes to the same model or node")


#: Loopback, link-local, private (RFC 1918, RFC 4193), carrier-grade NAT (RFC 6598), which Tailscale uses.
NEAR: tuple[IPv4Network | IPv6Network, ...] = (
    *map(IPv4Network, ("127.0.0.0/8", "169.254.0.0/16", "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16")),
    IPv4Network("100.64.0.0/10"),
    *map(IPv6Network, ("::1/128", "fe80::/10", "fc00::/7")),
)


class Guard(_Part):
    """Who may ask, and what."""

    clients: Networks = Field(NEAR, description="networks whose machines may ask")
    trusted_proxies: Networks = Field(
        (), description="web servers before this proxy, whose X-Forwarded-For or X-Real-IP names the client"
    )
    hosts: Names = Field((), description="Host names that are let through besides this machine's own")
    origins: Names = Field((), description="browser origins besides Ollama's defaults; * matches any text")
    body_limit_bytes: PositiveInt = Field(100 << 20, description="of a request; blobs are not limited")
    buffered_bytes: PositiveInt = Field(
        1 << 30, description="of the bodies of all requests under way, in each worker; beyond, 503"
    )
    head_limit_bytes: PositiveInt = Field(64 << 10, description="of a request's line and headers")
    max_connections: PositiveInt = Field(
        8192, description="of clients at once; beyond, those idle for longest are closed first"
    )
    any_11434: bool = Field(False, description="proxy modes: let port 11434 of any host through")


class Settings(_Part):
    """The whole tree."""

    listen: Address = Field(
        Address(host="127.0.0.1", port=OLLAMA_PORT), description="where apps find the fleet"
    )
    modes: Annotated[tuple[Mode, ...], Listed] = Field(
        (), description="further ways to listen: regular, socks5, transparent, reverse; see operations.md"
    )
    nodes: Annotated[tuple[NodeSettings, ...], Listed] = Field(
        (), description="Ollama servers; each a host:port or a table as below"
    )
    discovery: Discovery = Discovery()
    placement: Policy = Field("finish_time", description="how a node is chosen; see placement.md")
    specialise: dict[Kind, Names] = Field(
        {}, description="kind of task → nodes (host:port) that should do it; see placement.md"
    )
    specialise_factor: float = Field(
        2, ge=1, description="how many times longer a preferred node may take than another one"
    )
    embeddings_max_vram_bytes: PositiveInt | None = Field(
        None, description="nodes with more GPU memory serve no embeddings while another node can"
    )
    admission: Admission = Admission()
    clients: tuple[ClientClass, ...] = Field((), description="classes of clients; each a table as below")
    replicas: Annotated[Literal["off", "auto"], BeforeValidator(_switch)] = Field(
        "off", description="auto: hot models are loaded on a second node before the queue grows"
    )
    replication: Replicas = Replicas()
    pin: Annotated[tuple[PinnedModel, ...], Listed] = Field(
        (), description="models that stay in memory: model or model@host:port"
    )
    routing_metadata: Literal["headers", "body"] = Field(
        "headers",
        description="where answers name their node; body: in _sollol_routing of the final object, too",
    )
    pull: Pull = Pull()
    shard: Shard = Shard()
    signed_in_node: str | None = Field(None, description="host:port; push and cloud models go there")
    splice: bool = Field(
        True,
        description="plain HTTP/1.1 past mitmproxy's layers, bodies socket to socket; see performance.md",
    )
    workers: int = Field(1, ge=1, le=64, description="processes that share the port; see operations.md")
    timeouts: Timeouts = Timeouts()
    retry: Retry = Retry()
    poll: Poll = Poll()
    guard: Guard = Guard()
    agent_token: SecretStr | None = Field(None, description="bearer token that the agents ask for")
    state_dir: Path = Field(
        default_factory=lambda: _xdg("XDG_STATE_HOME", ".local/state"),
        description="learned speeds and the journal of requests",
    )

    @field_validator("specialise")
    @classmethod
    def _node_names(cls, value: dict[Kind, Names]) -> dict[Kind, Names]:
        return {
            kind: tuple(str(NodeSettings.model_validate(n)) for n in nodes) for kind, nodes in value.items()
        }

    @field_validator("signed_in_node")
    @classmethod
    def _node_name(cls, value: str | None) -> str | None:
        return str(NodeSettings.model_validate(value)) if value else None

    @field_validator("state_dir")
    @classmethod
    def _home(cls, value: Path) -> Path:
        return value.expanduser()


def load(
    config_path: Path | None,
    env: Mapping[str, str],
    sets: Sequence[str] = (),
    flags: Mapping[str, str | Sequence[str]] | None = None,
) -> Settings:
    """The settings of all sources. ``config_path`` None: ``./sollol.yaml``, else the user's, if any.

    ``flags`` are the command-line flags that stand for a setting (:data:`FLAGS`): ``{"--listen": ":80"}``.

    Raises:
        SettingsError: one sentence: the place (file and line, variable or argument), the key, the mistake.
    """
    path = config_path or _default_file(env)
    layer = from_file(path) if path else Layer()
    layer = from_variables(env, PREFIX, FOREIGN).over(layer)
    layer = from_pairs(sets).over(layer)
    for flag, value in (flags or {}).items():
        layer.put((FLAGS[flag],), value, flag)
    try:
        return Settings.model_validate(layer.values)
    except ValidationError as exc:
        raise SettingsError(_sentence(exc.errors()[0], layer)) from exc


@dataclass(frozen=True, slots=True)
class Source:
    """Where the settings of a process come from, so that they can be read again; see :func:`load`."""

    config_path: Path | None
    env: Mapping[str, str]
    sets: Sequence[str] = ()
    flags: Mapping[str, str | Sequence[str]] | None = None

    @property
    def file(self) -> Path | None:
        """The file among them, if there is one now."""
        return self.config_path or _default_file(self.env)

    def read(self) -> Settings:
        """The settings as they are now. Raises SettingsError."""
        return load(self.config_path, self.env, self.sets, self.flags)


def _default_file(env: Mapping[str, str]) -> Path | None:
    home = Path(env.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    return next((p for p in (Path("sollol.yaml"), home / "sollol" / "sollol.yaml") if p.is_file()), None)


def _xdg(variable: str, default: str) -> Path:
    return Path(os.environ.get(variable) or Path.home() / default) / "sollol"


def _sentence(error: ErrorDetails, layer: Layer) -> str:
    key = error["loc"]
    place = layer.place(key)
    where = f"{place}: " if place else ""
    if error["type"] == "extra_forbidden":
        return f"{where}{dotted(key)} is not a setting{_hint(key)}"
    if error["type"] == "missing":
        return f"{where}{dotted(key)} is missing"
    message = _MUST.get(error["type"]) or error["msg"].removeprefix("Value error, ").removeprefix("Input ")
    shown = "" if _is_secret(key) else f", not {_short(error['input'])}"
    return f"{where}{dotted(key)} {message}{shown}"


def _is_secret(key: tuple[str | int, ...]) -> bool:
    """Whether the value at ``key`` may have a secret in it: a token, a client's key, or all of a client."""
    return key[0] == "agent_token" or (key[0] == "clients" and (len(key) <= 2 or key[-1] == "key"))


#: pydantic's error types in plain words, where its own message is not plain.
_MUST = {
    **dict.fromkeys(("float_type", "float_parsing", "finite_number"), "should be a number"),
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), "should be a whole number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "should be true or false"),
    **dict.fromkeys(("tuple_type", "frozen_set_type"), "should be a list"),
    **dict.fromkeys(("model_type", "model_attributes_type"), "should be a table of settings"),
    "ip_any_network": "should be a network such as 10.0.0.0/8",
    "string_type": "should be text",
}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


def _hint(key: tuple[str | int, ...]) -> str:
    """What the writer of an unknown key may have meant."""
    names = _names()
    wrong = str(key[-1]).lower()
    parent = dotted(part for part in key[:-1] if isinstance(part, str))
    siblings = [name.rpartition(".")[2] for name in names if name.rpartition(".")[0] == parent]
    if close := difflib.get_close_matches(wrong, siblings, 1):
        return f"; did you mean {close[0]}?"
    if elsewhere := [name for name in names if name.rpartition(".")[2] == wrong]:
        return f"; did you mean {elsewhere[0]}?"
    return f"; there are {', '.join(sorted(siblings))}" if siblings else ""


def _names(model: type[BaseModel] = Settings, above: str = "") -> list[str]:
    """Every key of the tree, dotted; the keys of a list's entries stand below the list's own."""
    found = []
    for name, info in model.model_fields.items():
        found.append(above + name)
        for kind in (info.annotation, *get_args(info.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                found += _names(kind, f"{above}{name}.")
    return found
