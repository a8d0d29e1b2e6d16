"""What coordinators report of sharded models, by the names under which the proxy knows models. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from agent.ollama import names
from agent.report import Report, ShardLoad, ShardModel, ShardPlan


def key_of(name: str) -> str | None:
    """The canonical form of ``name``; None for what nobody can ask for."""
    try:
        return names.canonical(name)
    except ValueError:
        return None


def priors(report: Report | None) -> dict[str, ShardModel]:
    """What the coordinator expects of each model, by canonical name; nothing for any other node."""
    if report is None or report.shard is None:
        return {}
    return {key: model for model in report.shard.models if (key := key_of(model.model)) is not None}


def loads(report: Report | None) -> list[ShardLoad]:
    """The models that are loading or loaded."""
    return report.shard.loads if report is not None and report.shard is not None else []


def plans(report: Report | None) -> Iterator[ShardPlan]:
    """Every plan in the report, the oldest first; one that is in use may come twice."""
    if report is not None and report.shard is not None:
        yield from report.shard.plans
        yield from (load.plan for load in report.shard.loads if load.plan is not None)


def plan_in_use(report: Report | None, key: str) -> str | None:
    """The id of the plan by which the model ``key`` (canonical) is loaded."""
    found = (load.plan.id for load in loads(report) if load.plan is not None and key_of(load.model) == key)
    return next(found, None)
