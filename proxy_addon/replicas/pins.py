"""Whether a pinned model is where it should be, and what to do about it: pure, time passed in."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from agent.ollama import names
from proxy_addon.replicas.actions import Action, Keep, Load, Unload

FOREVER_S = 100 * 365.25 * 86400  #: Ollama's "for ever" is Go's longest duration, 292 years
KEEP_EVERY_S = 10.0  #: a client that names a keep_alive in every request makes no more of ours than that
PAUSE_S, LONGEST_PAUSE_S = 1.0, 300.0  #: from one load to the next, where the model does not stay
UNSTEADY = 3  #: loads in a row, of which none lasted, from which on this is said


@dataclass(frozen=True, slots=True)
class Pin:
    """A model (canonical name) that is to stay in memory, on ``node`` or wherever suits best."""

    model: str
    node: str | None = None


@dataclass(frozen=True, slots=True)
class Stand:
    """How a pin stands: the node that should have the model, None with the reason ``why`` there is none."""

    node: str | None
    why: str = ""
    loading: bool = False
    stays_s: float | None = None  #: until it expires there; None: it is not in that node's memory
    also: frozenset[str] = frozenset()  #: other nodes that have it in memory though no pin wants it there


@dataclass(frozen=True, slots=True)
class Past:
    """What is remembered of a pin."""

    node: str | None = None  #: where the model was last held
    loads: int = 0  #: in a row, of which none lasted
    load_again_s: float = -math.inf  #: the next load is not before
    keep_again_s: float = -math.inf
    error: str = ""  #: of the last load, where it failed
    left: frozenset[str] = frozenset()  #: nodes that held it, and were lost then


@dataclass(frozen=True, slots=True)
class Held:
    """What to do about a pin now, what to remember, when to look again, and what is wrong with it."""

    action: Action | None
    past: Past
    next_s: float = math.inf
    trouble: str = ""


def hold(pin: Pin, stand: Stand, past: Past, now_s: float) -> Held:
    """What ``pin`` needs now."""
    model = names.display(pin.model)
    if stand.node is None:
        return Held(None, past, trouble=f"{model} cannot be pinned: {stand.why}")
    if stand.node != past.node:
        left = past.left | {past.node} if past.node is not None else past.left
        past = Past(stand.node, left=left - {stand.node})
    if stand.loading:
        return Held(None, past, trouble=_trouble(model, past))
    if stand.stays_s is None:
        return _load(pin, stand.node, model, past, now_s)
    if back := min(past.left & stand.also, default=None):
        action = Unload(pin.model, back, f"its pin has moved to {stand.node}")
        return Held(action, replace(past, left=past.left - {back}), now_s)
    if past.loads and now_s >= past.load_again_s:  # it has stayed for as long as the pause was
        past = replace(past, loads=0, error="")
    lasted_s = past.load_again_s if past.loads else math.inf
    if stand.stays_s >= FOREVER_S:
        return Held(None, past, lasted_s, _trouble(model, past))
    if now_s < past.keep_again_s:
        return Held(None, past, min(past.keep_again_s, lasted_s), _trouble(model, past))
    # What expires soon is told sooner again; half of what is left is never too late.
    again_s = now_s + min(max(stand.stays_s / 2, PAUSE_S), KEEP_EVERY_S)
    reason = f"it is pinned, and would have been gone in {max(stand.stays_s, 0):.0f} s"
    return Held(Keep(pin.model, stand.node, reason), replace(past, keep_again_s=again_s), again_s)


def _load(pin: Pin, node: str, model: str, past: Past, now_s: float) -> Held:
    if now_s < past.load_again_s:
        return Held(None, past, past.load_again_s, _trouble(model, past))
    pause_s = min(PAUSE_S * 2.0**past.loads, LONGEST_PAUSE_S)
    reason = "it is pinned and not in memory" + (", again" if past.loads else "")
    past = replace(past, loads=past.loads + 1, load_again_s=now_s + pause_s)
    action = Load(pin.model, node, reason, pinned=True)
    return Held(action, past, now_s + pause_s, _trouble(model, past))


def _trouble(model: str, past: Past) -> str:
    if past.error:
        return f"{model} is pinned but cannot be loaded on {past.node}: {past.error}"
    if past.loads > UNSTEADY:
        return f"{model} is pinned but does not stay in the memory of {past.node}"
    return ""
