"""What the machines have free now, how far away they are, and the plan that follows from it.

Nothing is started here. A survey is as good as the reports it was made from; whoever starts a model has the
agents asked anew before.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import ssl
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from agent import llama_cpp
from agent.lease import TunnelError, measure, measured_by
from agent.links import Link
from agent.report import Report, ShardModel
from shard.agents import Agents, Peer
from shard.hosts import hosts as hosts_of
from shard.llama_server import Launch, LlamaServerError
from shard.models import ServedModel
from shard.options import resolve
from shard.plan import Host, Plan, TooBig, choose, largest_num_ctx
from shard.reporter import LocalMachine
from shard.shape import ModelShape, read_shape

LOCAL = "this machine"
#: Links are measured again when they are used after so long.
LINK_S = 600.0
#: Who could not be reached through its tunnel is tried again after so long.
UNREACHED_S = 5.0
#: Another machine is worth a word if a token takes it no longer than this share of the time here.
BETTER = 0.9
#: So many other machines are looked at that could coordinate, those with the fastest devices.
COORDINATORS_TRIED = 3
#: Beside a projector's weights, while it encodes an image: an allowance, not a measurement.
PROJECTOR_SCRATCH_BYTES = 256 << 20

Place = tuple[str, str]  # (node, device)


@dataclass(frozen=True, slots=True)
class Survey:
    """What was planned, from what, and who was left out and why."""

    shape: ModelShape
    hosts: list[Host]
    planned: Plan | TooBig
    left_out: dict[str, str]
    links: Mapping[tuple[str, str], Link]


def beside_projector(host: Host, size_bytes: int) -> Host:
    """What ``host`` has left where llama-server runs with an ``mmproj`` file of ``size_bytes``.

    It goes to the first local device, a GPU where there is one, with its weights as they are in the file.
    """
    if not host.devices:
        return host
    first, *others = sorted(host.devices, key=lambda device: device.kind != "gpu")
    taken_bytes = size_bytes + PROJECTOR_SCRATCH_BYTES
    return replace(host, devices=(replace(first, free_bytes=max(first.free_bytes - taken_bytes, 0)), *others))


class Surveyor:
    """Surveys for one coordinator. ``context`` is the fleet's for TLS, None if it has joined none.

    ``held`` tells what is held on every device for a model, or (None) for all; ``serving`` whether requests
    are being answered, whose tokens a measurement would disturb.
    """

    def __init__(
        self,
        agents: Agents,
        local: LocalMachine,
        context: ssl.SSLContext | None,
        held: Callable[[ServedModel | None], Mapping[Place, int]],
        serving: Callable[[], bool],
    ) -> None:
        self.agents = agents
        self._local = local
        self._context = context
        self._held = held
        self._serving = serving
        self._links: dict[str, tuple[float, Link | str]] = {}
        self._shapes: dict[str, ModelShape] = {}

    async def survey(
        self,
        model: ServedModel,
        launch: Launch,
        avoid: Mapping[str, str] | None = None,
        *,
        alone: bool = False,
    ) -> Survey:
        """Return the best plan with what is known now; nobody of ``avoid`` is in it.

        With ``alone`` as if no other model were loaded.
        """
        shape = await self.shape(model)
        reports, left_out = self._reports()
        reports = {name: report for name, report in reports.items() if name not in (avoid or {})}
        found, why = hosts_of(
            reports,
            LOCAL,
            [LOCAL],
            given_back=self._held(None if alone else model),
            build=self._build(),
        )
        if launch.mmproj is not None:
            size_bytes = launch.mmproj.stat().st_size
            found = [beside_projector(host, size_bytes) if host.name == LOCAL else host for host in found]
        links, unreached = await self._links_to([host.name for host in found if host.name != LOCAL])
        found = [host for host in found if host.name not in unreached]
        planned = await asyncio.to_thread(
            choose,
            shape,
            found,
            links,
            num_ctx=launch.num_ctx,
            parallel=launch.parallel,
            num_batch=launch.num_batch,
            embeddings=launch.embeddings,
            coordinator=LOCAL,
        )
        return Survey(shape, found, planned, left_out | dict(why) | unreached | dict(avoid or {}), links)

    async def elsewhere(self, model: ServedModel, launch: Launch, own: Survey) -> Plan | None:
        """Return the plan of another machine that has the model, if it is better than ``own``.

        Who coordinates has its own devices without a link. The agents measure the links between each other.
        """
        holders = [
            peer.name
            for peer in self.agents
            if peer.report and any(row.digest == model.digest for row in peer.report.ollama.models)
        ]
        found = [replace(host, has_model=host.name in holders) for host in own.hosts if host.name != LOCAL]
        fastest = sorted((host for host in found if host.has_model), key=_bandwidth_bytes_s, reverse=True)
        links: dict[tuple[str, str], Link] = {}
        for host in fastest[:COORDINATORS_TRIED]:
            for other in found:
                if other.name != host.name:
                    # Whom it does not reach takes no part around it.
                    with contextlib.suppress(TunnelError):
                        links[host.name, other.name] = await self._link_between(host.name, other.name)
        tried = {host.name for host in fastest[:COORDINATORS_TRIED]}
        if not tried:
            return None
        planned = await asyncio.to_thread(
            choose,
            own.shape,
            [replace(host, has_model=host.name in tried) for host in found],
            links,
            num_ctx=launch.num_ctx,
            parallel=launch.parallel,
            num_batch=launch.num_batch,
            embeddings=launch.embeddings,
        )
        if isinstance(planned, TooBig):
            return None
        if isinstance(own.planned, TooBig) or planned.ms_per_token < BETTER * own.planned.ms_per_token:
            return planned
        return None

    async def _link_between(self, one: str, other: str) -> Link:
        """Let an agent measure its link to another; raises TunnelError."""
        assert self._context is not None
        near, far = self.peer(one), self.peer(other)
        return await measured_by(near.host, tunnel_port(near), self._context, far.host, tunnel_port(far))

    async def shape(self, model: ServedModel) -> ModelShape:
        """Return what ``model`` weighs, read once."""
        if model.digest not in self._shapes:
            self._shapes[model.digest] = await asyncio.to_thread(read_shape, model.header)
        return self._shapes[model.digest]

    def _reports(self) -> tuple[dict[str, Report], dict[str, str]]:
        now_s = time.monotonic()
        reports, left_out = {LOCAL: self._local.report()}, {}
        names: dict[str, str] = {}  # by the node's id: a machine that was named and announces itself is one
        for peer in self.agents:
            report = peer.fresh(now_s)
            if report is None:
                left_out[peer.name] = peer.error or "its report is old"
            elif self._context is None:
                left_out[peer.name] = "this machine has joined no fleet: run `sollol shard init`"
            elif peer.here and (report.rpc is None or report.rpc.lends_bytes is None):
                left_out[peer.name] = "it is this machine's own agent"
            elif (name := names.setdefault(report.node_id, peer.name)) != peer.name:
                left_out[peer.name] = f"it is {name} under another address"
            else:
                reports[peer.name] = report
        return reports, left_out

    async def expectation(self, model: ServedModel, num_ctx: int, parallel: int) -> ShardModel:
        """Return what ``model`` would get now: a plan's speeds, or by how much it is too big."""
        launch = model.launch(
            resolve({"num_ctx": num_ctx}, model.header.context_length), parallel=parallel, threads=0
        )
        try:
            found = await self.survey(model, launch)
        except LlamaServerError as error:
            return ShardModel(model=model.name, fits=False, why=str(error))
        planned = found.planned
        if isinstance(planned, TooBig):
            return ShardModel(
                model=model.name,
                fits=False,
                why=too_big(model.name, planned),
                largest_num_ctx=planned.largest_num_ctx,
            )
        return ShardModel(
            model=model.name,
            fits=True,
            largest_num_ctx=await self._largest_num_ctx(model, launch, found),
            decode_tok_s=1000 / planned.ms_per_token if planned.ms_per_token else None,
            prefill_tok_s=planned.prefill_tok_s,
            load_s=planned.load_s,
        )

    async def _largest_num_ctx(self, model: ServedModel, launch: Launch, found: Survey) -> int | None:
        """Return up to which context a model fits that fits at that of ``launch``; None: any."""
        trained = model.header.context_length
        if trained is None:
            return None
        return await asyncio.to_thread(
            largest_num_ctx,
            found.shape,
            found.hosts,
            found.links,
            most=max(trained, launch.num_ctx),
            parallel=launch.parallel,
            num_batch=launch.num_batch,
            coordinator=LOCAL,
        )

    def forget_link(self, name: str) -> None:
        """Measure the link to this node anew when it is needed next."""
        self._links.pop(name, None)

    def forget_unreached(self) -> None:
        """Try those again whom the latest surveys did not reach."""
        self._links = {name: known for name, known in self._links.items() if isinstance(known[1], Link)}

    def peer(self, name: str) -> Peer:
        """Return the agent of a node; raises TunnelError where it has gone."""
        try:
            return self.agents[name]
        except KeyError:
            raise TunnelError(f"{name} has taken its leave") from None

    async def _links_to(self, names: Sequence[str]) -> tuple[dict[tuple[str, str], Link], dict[str, str]]:
        """Return the links to these nodes, and for those whose tunnel does not let us in the reason.

        They are measured one after the other, lest they share what they measure.
        """
        links: dict[tuple[str, str], Link] = {}
        unreached: dict[str, str] = {}
        for name in names:
            try:
                links[LOCAL, name] = await self._link(self.peer(name))
            except TunnelError as error:
                unreached[name] = str(error)
        return links, unreached

    async def _link(self, peer: Peer) -> Link:
        at_s, known = self._links.get(peer.name, (float("-inf"), ""))
        # To measure takes a link for half a second: not from tokens that flow over it.
        kept_s = (math.inf if self._serving() else LINK_S) if isinstance(known, Link) else UNREACHED_S
        if time.monotonic() - at_s >= kept_s:
            assert self._context is not None
            try:
                known = await measure(peer.host, tunnel_port(peer), self._context)
            except TunnelError as error:
                known = str(error)
            self._links[peer.name] = (time.monotonic(), known)
        if isinstance(known, Link):
            return known
        raise TunnelError(known)

    def _build(self) -> str | None:
        program = llama_cpp.program("llama-server")
        return program.build if program else None


def tunnel_port(peer: Peer) -> int:
    """Return where an agent accepts tunnels; raises TunnelError where it accepts none."""
    port = peer.report.rpc.tunnel_port if peer.report and peer.report.rpc else None
    if port is None:
        raise TunnelError(f"{peer.name} has joined no fleet")
    return port


def too_big(name: str, found: TooBig) -> str:
    """Return the sentence for a model that fits nowhere, in words that a router knows from Ollama."""
    sentence = (
        f"model requires more system memory ({_size(found.needed_bytes)}) than is available "
        f"({_size(found.available_bytes)}): {name} is {_size(found.missing_bytes)} too big "
        f"for all machines together at num_ctx {found.num_ctx}"
    )
    return sentence + (f"; it would fit at {found.largest_num_ctx}" if found.largest_num_ctx else "")


def _bandwidth_bytes_s(host: Host) -> float:
    return max((device.bandwidth_bytes_s for device in host.devices), default=0.0)


def _size(size_bytes: float) -> str:
    return f"{size_bytes / 2**30:.1f} GiB" if size_bytes >= 2**30 else f"{size_bytes / 2**20:.0f} MiB"
