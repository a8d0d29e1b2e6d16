"""A model on its way over several machines: its phase, how far it is, and what it took in the end."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Literal

from agent.report import ShardLoad, ShardPlan, ShardShare
from shard.models import ServedModel
from shard.sharded_server import ShardedServer

Phase = Literal["planning", "starting", "loading", "ready", "failed"]


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
    judged: bool = False  #: it has ended, and whoever made it end was blamed

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


def measured(share: ShardShare, server: ShardedServer) -> ShardShare:
    """Return ``share`` with the memory that llama.cpp said it took there."""
    lease = server.leases.get((share.node, share.device))
    if lease is None:
        return share
    held = server.held_bytes(f"RPC0[{lease.endpoint}]")
    return share.model_copy(update={"used_bytes": held})
