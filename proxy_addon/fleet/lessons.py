"""What one measurement changes in what is known of a node: its speeds alone, and what company costs."""

from __future__ import annotations

from proxy_addon.fleet.measured import ModelOnNode, OfNode

PREFILL_GAIN_UP = 0.05  #: of a prefill speed that may be due to a cache that nobody knows of
SLOWDOWN_GAIN = 0.1
SHARED = 0.5  #: less company than this on average says nothing of what company costs
ALONE = 0.1  #: less other models than this are none
MOST_CROWDING = 1.0  #: a batch is never slower than its sequences one after the other
MOST_SHARING = 2.0  #: taking turns loses the turns, and hardly more than as much again


def slowdown(learned: OfNode, beside: float, runners: float) -> float:
    """How many times longer a token takes than alone: see :meth:`Speeds.slowdown`."""
    crowd = 1 + learned.crowding.value * max(beside, 0.0)
    return crowd * (1 + learned.sharing.value * max(runners, 0.0)) if runners else crowd


def prefill(
    learned: OfNode,
    here: ModelOnNode,
    bounds: tuple[float, float],
    cache_known: bool,
    promised_tok_s: float | None,
) -> None:
    """Learn a prefill speed within ``bounds``. No ``promised_tok_s``: it is not this machine's alone."""
    low, high = bounds
    gain_up = 1.0 if cache_known else PREFILL_GAIN_UP
    here.prefill_tok_s.add_between(low, high, gain_up)
    if promised_tok_s is not None:
        learned.prefill.add_between(low / promised_tok_s, high / promised_tok_s, gain_up)


def decode(
    learned: OfNode,
    here: ModelOnNode,
    tok_s: float,
    beside: float,
    runners: float,
    promised_tok_s: float | None,
) -> None:
    """Learn from ``tok_s`` in company the speed alone, and what a change tells of the node's other models."""
    if here.decode_tok_s.n:
        _company(learned, here.decode_tok_s.value / tok_s, beside, runners)
    alone_tok_s = tok_s * slowdown(learned, beside, runners)
    # The more company, the more of what is seen is due to that.
    changed = here.decode_tok_s.add(alone_tok_s, 1 / (1 + beside + runners))
    if promised_tok_s is not None:
        learned.decode.add(alone_tok_s / promised_tok_s)
    if not changed:
        return
    for model in learned.models.values():
        if model is not here:
            model.decode_tok_s.shift(changed)
        if changed > 0:  # prompts of a few tokens, as probes have, tell nothing of prefill
            model.prefill_tok_s.shift(changed)
    if changed > 0:
        learned.prefill.shift(changed)


def _company(learned: OfNode, longer: float, beside: float, runners: float) -> None:
    """Learn from a token that took ``longer`` than alone. Only one kind of company tells of its cost."""
    if beside >= SHARED and runners < ALONE:
        learned.crowding.add(_within((longer - 1) / beside, MOST_CROWDING), SLOWDOWN_GAIN)
    elif runners >= SHARED:
        longer /= 1 + learned.crowding.value * beside
        learned.sharing.add(_within((longer - 1) / runners, MOST_SHARING), SLOWDOWN_GAIN)


def _within(value: float, most: float) -> float:
    return min(max(value, 0.0), most)
