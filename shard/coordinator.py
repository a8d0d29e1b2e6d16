"""The life of models that span several machines: survey, plan, lease, load; and again without whoever failed.

:meth:`Coordinator.start` is what :class:`shard.runners.Runners` calls for a model that shall be loaded. It
asks the agents what they have free now, lets ``shard/plan.py`` decide, leases an rpc-server on every machine
of the plan, and starts llama-server over them. Whoever fails meanwhile is left out of the next plan, unless
the model fits nowhere else. How a plan comes about is ``shard/survey.py``, what a loaded model needs to be
watched for ``shard/sharded_server.py``.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
import time
from collections import Counter
from collections.abc import Coroutine, Mapping
from datetime import UTC, datetime
from secrets import token_hex
from typing import Any

from agent import llama_cpp
from agent.lease import Lease, TunnelError
from agent.report import ShardLoad, ShardPlan, ShardShare
from shard.agents import Agents
from shard.llama_server import Launch, LlamaServerError, Unloadable
from shard.load import Load, measured
from shard.models import ServedModel
from shard.plan import Plan, TooBig
from shard.plan_journal import PlanJournal
from shard.reporter import LocalMachine
from shard.runners import NoRoom
from shard.sharded_server import ShardedServer
from shard.survey import LOCAL, Place, Surveyor, too_big, tunnel_port

log = logging.getLogger(__name__)

#: How many plans one load may need: each failure leaves one machine out.
ATTEMPTS = 5
#: How many may fail without a machine to blame: then it is the model's fault, or the request's.
BLAMELESS_ATTEMPTS = 2
#: Who has failed is left out of plans for so long, where the others suffice.
BLAMED_S = 30.0
#: A load in which nothing has moved for so long is stuck. The coordinator's own part is read from disk
#: without a sign of it, so this allows for 30 GB of a slow disk (100 MB/s).
STUCK_S = 300.0


class Broken(Exception):
    """A load ended because of ``node`` (None: nobody in particular)."""

    def __init__(self, node: str | None, reason: str) -> None:
        super().__init__(reason)
        self.node = node
        self.reason = reason


class Coordinator:
    """Starts sharded models. ``context`` is the fleet's for TLS, None if this machine has joined none."""

    def __init__(
        self,
        agents: Agents,
        local: LocalMachine,
        context: ssl.SSLContext | None,
        journal: PlanJournal,
    ) -> None:
        self.agents = agents
        self.surveyor = Surveyor(agents, local, context, self._held, self._serving)
        self.journal = journal
        self._context = context
        self._loads: dict[str, Load] = {}
        self._blamed: dict[str, tuple[float, str]] = {}
        self._lost: dict[str, str] = {}  # model → why its last plan ended, until the next is made
        self._one_at_a_time = asyncio.Lock()
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

    def _held(self, model: ServedModel | None) -> dict[Place, int]:
        """What is held for ``model``, and free again when it is loaded anew; None: for every model."""
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

    def _serving(self) -> bool:
        return any(load.server is not None and load.server.requests for load in self._loads.values())

    # Loading

    async def start(self, model: ServedModel, launch: Launch) -> ShardedServer:
        """Return a server with ``model`` loaded over as many machines as it needs.

        Raises NoRoom if it fits nowhere, LlamaServerError if it could not be loaded all the same. Loads are
        serial, as Ollama's are: two plans must not count on the same memory.
        """
        await self.settled()  # else a plan might have in it whoever has just failed
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
        found = await self.surveyor.survey(model, launch, avoid)
        back: list[str] = []
        if isinstance(found.planned, TooBig):
            # Before a request is refused, everybody is asked once more.
            await self.agents.refresh()
            self.surveyor.forget_unreached()
            found = await self.surveyor.survey(model, launch, avoid)
            # Who does not even report stays out, however young its last report is.
            back = [node for node in avoid if self.agents.reports(node)]
        while isinstance(found.planned, TooBig) and back:
            del avoid[back.pop()]
            found = await self.surveyor.survey(model, launch, avoid)
        if isinstance(found.planned, TooBig):
            without = "; ".join(f"{node} is left out: {why}" for node, why in found.left_out.items())
            sentence = too_big(model.name, found.planned) + (f" ({without})" if without else "")
            alone = await self.surveyor.survey(model, launch, alone=True)
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
            update={"shares": [measured(share, server) for share in load.plan.shares]}
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
            peer = self.surveyor.peer(node)
            return await Lease.open(
                peer.host, tunnel_port(peer), self._context, device=device, build=build, threads=None
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
        await self._judge(load, server)
        await server.stop()
        if self._loads.get(load.model.key) is load:
            del self._loads[load.model.key]

    async def _judge(self, load: Load, server: ShardedServer) -> None:
        """Blame whoever made an ended model end, once."""
        culprit = await server.inquest()
        if culprit is not None and not load.judged:
            load.judged = True
            self.blame(*culprit)
            self._lost[load.model.key] = f"the plan before was lost: {culprit[1]}"

    def blame(self, node: str, reason: str) -> None:
        """Leave ``node`` out of plans for a while, where the others suffice."""
        self._blamed[node] = (time.monotonic() + BLAMED_S, f"it failed lately: {reason}")
        self.surveyor.forget_link(node)
        self.blames += 1

    async def settled(self) -> None:
        """Wait until it is known of every model that has ended by whose fault it did."""
        ended = [load for load in self._loads.values() if load.server and load.server.exited.done()]
        await asyncio.gather(*(self._judge(load, load.server) for load in ended if load.server))

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


async def _close(leases: Mapping[Place, Lease]) -> None:
    await asyncio.gather(*(lease.close() for lease in leases.values()))
