"""The life of models that span several machines: survey, plan, lease, load; and again without whoever failed.

:meth:`Coordinator.start` is what :class:`shard.runners.Runners` calls for a model that shall be loaded. It
asks the agents what they have free now, lets ``shard/plan.py`` decide, leases an rpc-server on every machine
of the plan, and starts llama-server over them. Whoever fails meanwhile is left out of the next plan, unless
the model fits nowhere else. What a loaded model needs to be watched for is ``shard/sharded_server.py``.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import ssl
import time
from collections import Counter
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from secrets import token_hex
from typing import Any, Literal

from agent import llama_cpp
from agent.lease import Lease, TunnelError, measure, measured_by
from agent.links import Link
from agent.report import Report, ShardLoad, ShardModel, ShardPlan, ShardShare
from shard.agents import Agents, Peer
from shard.hosts import hosts as hosts_of
from shard.llama_server import Launch, LlamaServerError, Unloadable
from shard.models import ServedModel
from shard.options import resolve
from shard.plan import Host, Plan, TooBig, choose, largest_num_ctx
from shard.plan_journal import PlanJournal
from shard.reporter import LocalMachine
from shard.runners import NoRoom
from shard.shape import ModelShape, read_shape
from shard.sharded_server import Place, ShardedServer

log = logging.getLogger(__name__)

LOCAL = "this machine"
#: How many plans one load may need: each failure leaves one machine out.
ATTEMPTS = 5
#: How many may fail without a machine to blame: then it is the model's fault, or the request's.
BLAMELESS_ATTEMPTS = 2
#: Who has failed is left out of plans for so long, where the others suffice.
BLAMED_S = 30.0
#: A load in which nothing has moved for so long is stuck. The coordinator's own part is read from disk
#: without a sign of it, so this allows for 30 GB of a slow disk (100 MB/s).
STUCK_S = 300.0
#: Links are measured again when they are used after so long.
LINK_S = 600.0
#: Who could not be reached through its tunnel is tried again after so long.
UNREACHED_S = 5.0

#: Another machine is worth a word if a token takes it no longer than this share of the time here.
BETTER = 0.9
#: So many other machines are looked at that could coordinate, those with the fastest devices.
COORDINATORS_TRIED = 3

Phase = Literal["planning", "starting", "loading", "ready", "failed"]


class Broken(Exception):
    """A load ended because of ``node`` (None: nobody in particular)."""

    def __init__(self, node: str | None, reason: str) -> None:
        super().__init__(reason)
        self.node = node
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Survey:
    """What was planned, from what, and who was left out and why."""

    shape: ModelShape
    hosts: list[Host]
    planned: Plan | TooBig
    left_out: dict[str, str]
    links: Mapping[tuple[str, str], Link]


@dataclass(eq=False)
class Load:
    """A model on its way, or loaded."""

    model: ServedModel
    phase: Phase = "planning"
    since_s: float = field(default_factory=time.monotonic)
    plan: ShardPlan | None = None
    server: ShardedServer | None = None
    remote_bytes: int = 0  #: weights that go to other machines
    error: str | None = None

    def enter(self, phase: Phase) -> None:
        """Begin the next phase."""
        self.phase, self.since_s = phase, time.monotonic()

    def seen(self, now_s: float) -> ShardLoad:
        """Return it as the report shows it."""
        in_phase_s = now_s - self.since_s
        progress, eta_s = (1.0, None) if self.phase == "ready" else (0.0, None)
        if self.phase == "loading" and self.server is not None and self.plan is not None:
            progress, eta_s = load_progress(
                self.server.received_bytes(), self.remote_bytes, in_phase_s, self.plan.load_s
            )
        return ShardLoad(
            model=self.model.name,
            phase=self.phase,
            progress=progress,
            eta_s=eta_s,
            since_s=in_phase_s,
            plan=self.plan,
            error=self.error,
        )


def load_progress(
    received_bytes: int, remote_bytes: int, in_phase_s: float, planned_s: float
) -> tuple[float, float | None]:
    """Return how much of a load is done, 0 to 0.99, and how many seconds it will still take.

    By the bytes that other machines have received where there are any, else by the time that was planned.
    """
    if remote_bytes > 0:
        done = min(received_bytes / remote_bytes, 0.99)
        return done, in_phase_s * (1 - done) / done if done > 0.01 else planned_s
    done = min(in_phase_s / planned_s, 0.99) if planned_s > 0 else 0.0
    return done, max(planned_s - in_phase_s, 0.0)


class Coordinator:
    """Starts sharded models. ``context`` is the fleet's for TLS, None if this machine has joined none."""

    def __init__(
        self,
        agents: Agents,
        local: LocalMachine,
        context: ssl.SSLContext | None,
        journal: PlanJournal,
        *,
        threads: int = 0,
    ) -> None:
        self.agents = agents
        self.local = local
        self.journal = journal
        self._context = context
        self._threads = threads
        self._loads: dict[str, Load] = {}
        self._links: dict[str, tuple[float, Link | str]] = {}  # or why there is none
        self._blamed: dict[str, tuple[float, str]] = {}
        self._lost: dict[str, str] = {}  # model → why its last plan ended, until the next is made
        self._one_at_a_time = asyncio.Lock()
        self._shapes: dict[str, ModelShape] = {}
        self._watching: set[asyncio.Task[None]] = set()
        self.blames = 0  #: how often a machine was found to have failed
        self.plans_made = 0
        self.replans_made = 0

    # What others see

    def loads(self) -> list[ShardLoad]:
        """Return the models that are loading or loaded, and those whose last load failed."""
        now_s = time.monotonic()
        return [load.seen(now_s) for load in self._loads.values()]

    def load_of(self, model: ServedModel) -> ShardLoad | None:
        """Return how far ``model`` is, None if nobody has asked for it."""
        load = self._loads.get(model.key)
        return load.seen(time.monotonic()) if load else None

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

    # Planning

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
            given_back=self._given_back(None if alone else model),
            build=self._build(),
        )
        found = [self._beside_projector(host, launch) for host in found]
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
        near, far = self._peer(one), self._peer(other)
        return await measured_by(
            near.host, self._tunnel_port(near), self._context, far.host, self._tunnel_port(far)
        )

    async def shape(self, model: ServedModel) -> ModelShape:
        """Return what ``model`` weighs, read once."""
        if model.digest not in self._shapes:
            self._shapes[model.digest] = await asyncio.to_thread(read_shape, model.header)
        return self._shapes[model.digest]

    def _reports(self) -> tuple[dict[str, Report], dict[str, str]]:
        now_s = time.monotonic()
        reports, left_out = {LOCAL: self.local.report()}, {}
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

    def _given_back(self, model: ServedModel | None) -> dict[Place, int]:
        """What is held for ``model`` and is free again when it is loaded anew; None: for every model."""
        freed: Counter[Place] = Counter()
        for key, load in self._loads.items():
            if load.server is None or load.server.exited.done() or (model is not None and key != model.key):
                continue
            for place, lease in load.server.leases.items():
                freed[place] += lease.latest.memory_bytes if lease.latest else 0
            for share in load.plan.shares if load.plan else ():
                if share.node == LOCAL:
                    freed[LOCAL, share.device] += share.memory_bytes
        return dict(freed)

    def _beside_projector(self, host: Host, launch: Launch) -> Host:
        # llama-server puts the projector on its first local device.
        if host.name != LOCAL or launch.mmproj is None or not host.devices:
            return host
        size = launch.mmproj.stat().st_size
        first, *others = sorted(host.devices, key=lambda device: device.kind != "gpu")
        smaller = replace(first, free_bytes=max(first.free_bytes - size, 0))
        return replace(host, devices=(smaller, *others))

    async def _links_to(self, names: Sequence[str]) -> tuple[dict[tuple[str, str], Link], dict[str, str]]:
        """Return the links to these nodes, and for those whose tunnel does not let us in the reason.

        They are measured one after the other, lest they share what they measure.
        """
        links: dict[tuple[str, str], Link] = {}
        unreached: dict[str, str] = {}
        for name in names:
            try:
                links[LOCAL, name] = await self._link(self._peer(name))
            except TunnelError as error:
                unreached[name] = str(error)
        return links, unreached

    async def _link(self, peer: Peer) -> Link:
        at_s, known = self._links.get(peer.name, (float("-inf"), ""))
        # To measure takes a link for half a second: not from tokens that flow over it.
        serving = any(load.server is not None and load.server.requests for load in self._loads.values())
        kept_s = math.inf if isinstance(known, Link) and serving else LINK_S
        if time.monotonic() - at_s >= (kept_s if isinstance(known, Link) else UNREACHED_S):
            assert self._context is not None
            try:
                known = await measure(peer.host, self._tunnel_port(peer), self._context)
            except TunnelError as error:
                known = str(error)
            self._links[peer.name] = (time.monotonic(), known)
        if isinstance(known, Link):
            return known
        raise TunnelError(known)

    def _peer(self, name: str) -> Peer:
        try:
            return self.agents[name]
        except KeyError:
            raise TunnelError(f"{name} has taken its leave") from None

    def _tunnel_port(self, peer: Peer) -> int:
        port = peer.report.rpc.tunnel_port if peer.report and peer.report.rpc else None
        if port is None:
            raise TunnelError(f"{peer.name} has joined no fleet")
        return port

    def _build(self) -> str | None:
        program = llama_cpp.program("llama-server")
        return program.build if program else None

    # Loading

    async def start(self, model: ServedModel, launch: Launch) -> ShardedServer:
        """Return a server with ``model`` loaded over as many machines as it needs.

        Raises NoRoom if it fits nowhere, LlamaServerError if it could not be loaded all the same. Loads are
        serial, as Ollama's are: two plans must not count on the same memory.
        """
        load = self._loads[model.key] = Load(model)
        try:
            async with self._one_at_a_time:
                return await self._start(load, launch)
        except LlamaServerError as error:
            load.error = str(error)
            load.enter("failed")
            raise
        except asyncio.CancelledError:
            del self._loads[model.key]
            raise

    async def _start(self, load: Load, launch: Launch) -> ShardedServer:
        lost = self._lost.pop(load.model.key, None)
        why, blameless = lost or "a request", 0
        for attempt in range(ATTEMPTS):
            load.enter("planning")
            made = await self._plan(load.model, launch)
            load.plan = self._record(load.model, launch, made, why)
            self.plans_made += 1
            self.replans_made += attempt > 0 or lost is not None
            load.remote_bytes = sum(share.weight_bytes for share in made.shares if share.device.host != LOCAL)
            try:
                return await self._load(load, launch, made)
            except Broken as broken:
                log.warning("%s: the plan failed: %s", load.model.name, broken.reason)
                why = f"the plan before failed: {broken.reason}"
                if broken.node is not None:
                    self.blame(broken.node, broken.reason)
                    continue
                blameless += 1
                if blameless == BLAMELESS_ATTEMPTS:
                    break
        raise Unloadable(f"llama-server process has terminated: {attempt + 1} plans failed; {why}")

    async def _plan(self, model: ServedModel, launch: Launch) -> Plan:
        """Plan without those who failed lately.

        Where the model does not fit the others, who failed first is taken back first. Raises NoRoom where
        it would fit in place of models that are loaded, Unloadable where it would not even then.
        """
        now_s = time.monotonic()
        blamed = [(until_s, node, why) for node, (until_s, why) in self._blamed.items() if until_s > now_s]
        avoid = {node: why for _, node, why in sorted(blamed, reverse=True)}
        await self.agents.refresh(but=avoid)
        found = await self.survey(model, launch, avoid)
        if isinstance(found.planned, TooBig) and avoid:
            await self.agents.refresh()
        while isinstance(found.planned, TooBig) and avoid:
            avoid.popitem()
            found = await self.survey(model, launch, avoid)
        if isinstance(found.planned, TooBig):
            without = "; ".join(f"{node} is left out: {why}" for node, why in found.left_out.items())
            sentence = too_big(model.name, found.planned) + (f" ({without})" if without else "")
            alone = await self.survey(model, launch, alone=True)
            raise Unloadable(sentence) if isinstance(alone.planned, TooBig) else NoRoom(sentence)
        return found.planned

    async def _load(self, load: Load, launch: Launch, made: Plan) -> ShardedServer:
        load.enter("starting")
        programs = llama_cpp.find("llama-server").programs
        if not programs:
            raise LlamaServerError("no llama-server that can use other machines was found; install one")
        program, leases = programs[0], await self._lease(made, programs[0].build)
        try:
            endpoints = {place: lease.endpoint for place, lease in leases.items()}
            server = await ShardedServer.spawn(program, launch, made.flags(endpoints))
        except BaseException:
            await _close(leases)
            raise
        assert load.plan is not None
        server.adopt(load.plan, leases)
        load.server = server
        load.enter("loading")
        try:
            await server.ready(STUCK_S + 4 * made.load_s)
        except LlamaServerError as error:
            culprit = await server.inquest()
            await server.stop()
            node, reason = culprit or (None, str(error))
            raise Broken(node, reason) from error
        except asyncio.CancelledError:
            await server.stop()
            raise
        server.loading = False
        load.plan = load.plan.model_copy(
            update={"shares": [_measured(share, server) for share in load.plan.shares]}
        )
        self.journal.add(load.plan)
        load.enter("ready")
        self._background(self._follow(load, server))
        log.info("%s is loaded over %d devices in %.1f s", load.model.name, len(made.shares), server.load_s)
        return server

    async def _lease(self, made: Plan, build: str) -> dict[Place, Lease]:
        """Lease an rpc-server on every other machine of the plan. Raises Broken, with none kept."""
        places = [share.device for share in made.shares if share.device.host != LOCAL]

        async def take(node: str, device: str) -> Lease:
            assert self._context is not None
            peer = self._peer(node)
            return await Lease.open(
                peer.host, self._tunnel_port(peer), self._context, device=device, build=build, threads=None
            )

        taken = await asyncio.gather(
            *(take(place.host, place.name) for place in places), return_exceptions=True
        )
        leases = {
            (place.host, place.name): lease
            for place, lease in zip(places, taken, strict=True)
            if isinstance(lease, Lease)
        }
        for place, failure in zip(places, taken, strict=True):
            if isinstance(failure, BaseException):
                await _close(leases)
                if isinstance(failure, TunnelError):
                    raise Broken(place.host, str(failure)) from failure
                raise failure
        return leases

    async def _follow(self, load: Load, server: ShardedServer) -> None:
        """Wait for the end of a loaded model; blame whoever caused it."""
        await server.exited
        if (culprit := await server.inquest()) is not None:
            self.blame(*culprit)
            self._lost[load.model.key] = f"the plan before was lost: {culprit[1]}"
        await server.stop()
        if self._loads.get(load.model.key) is load:
            del self._loads[load.model.key]

    def blame(self, node: str, reason: str) -> None:
        """Leave ``node`` out of plans for a while, where the others suffice."""
        self._blamed[node] = (time.monotonic() + BLAMED_S, f"it failed lately: {reason}")
        self._links.pop(node, None)
        self.blames += 1

    async def settled(self) -> None:
        """Wait until every model that has ended is known to have, and by whose fault."""
        ending = [
            self._follow_up(load)
            for load in self._loads.values()
            if load.server and load.server.exited.done()
        ]
        await asyncio.gather(*ending)

    async def _follow_up(self, load: Load) -> None:
        assert load.server is not None
        if (culprit := await load.server.inquest()) is not None:
            self.blame(*culprit)

    def _record(self, model: ServedModel, launch: Launch, made: Plan, why: str) -> ShardPlan:
        kept = ShardPlan(
            id=token_hex(6),
            model=model.name,
            made_at=datetime.now(UTC),
            reason=why,
            num_ctx=launch.num_ctx,
            parallel=launch.parallel,
            shares=[
                ShardShare(
                    node=share.device.host,
                    device=share.device.name,
                    first_layer=share.first_layer,
                    layers=share.layers,
                    output=share.output,
                    memory_bytes=share.memory_bytes,
                    ms_per_token=share.ms,
                )
                for share in made.shares
            ],
            ms_per_token=made.ms_per_token,
            load_s=made.load_s,
        )
        self.journal.add(kept)
        return kept

    def _background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._watching.add(task)
        task.add_done_callback(self._watching.discard)


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


def _measured(share: ShardShare, server: ShardedServer) -> ShardShare:
    lease = server.leases.get((share.node, share.device))
    if lease is None:
        return share
    held = server.held_bytes(f"RPC0[{lease.endpoint}]")
    return share.model_copy(update={"used_bytes": held})


async def _close(leases: Mapping[Place, Lease]) -> None:
    await asyncio.gather(*(lease.close() for lease in leases.values()))
