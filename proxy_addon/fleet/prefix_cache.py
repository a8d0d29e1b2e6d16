"""What prompts a node's runners have evaluated and still hold, as far as this proxy has sent them.

A runner keeps in each slot what that evaluated last, and begins a prompt after what it has in common with it
(llama.cpp ``tools/server``): in the free slot that shares the most, else in the one unused for longest. The
same is done here with chains of hashes (``prefix.py``). What llama-server may put aside into RAM is not
counted on.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from proxy_addon.prefix import Prefix

#: Share of a prompt that a slot must hold to be preferred (llama-server ``--slot-prompt-similarity``).
SIMILAR = 0.1


@dataclass(eq=False, slots=True)
class Slot:
    """One sequence of a runner."""

    held: dict[bytes, int] = field(default_factory=dict)  #: hash of each known beginning → its tokens
    last: bytes = b""  #: hash of the whole prompt
    output_tokens: int = 0  #: of the answer, which is held as well
    users: int = 0  #: requests that were given it and have not ended; all but one wait

    def take(self, prefix: Prefix) -> None:
        """Hold ``prefix`` from now on."""
        self.held, self.last, self.output_tokens = dict(prefix), prefix[-1][0], 0
        self.users += 1

    def ended(self, prefix: Prefix, output_tokens: int) -> None:
        """A request that took this slot is over; ``output_tokens`` were written after its prompt."""
        self.users -= 1
        if self.last == prefix[-1][0]:
            self.output_tokens = output_tokens

    def cached_tokens(self, prefix: Prefix) -> int:
        """Tokens at the beginning of ``prefix`` that are held."""
        held, found, tokens = self.held, b"", 0
        if prefix[0][0] in held:
            found, tokens = prefix[0]
            if len(prefix) > 1 and prefix[1][0] in held:  # mostly all but a new turn
                found, tokens = next(link for link in reversed(prefix) if link[0] in held)
        if found != self.last:
            return tokens
        # It goes on where the former prompt ended, hence with the answer.
        return min(tokens + self.output_tokens, prefix[-1][1])


class PrefixCache:
    """What one node holds, by the model's canonical name."""

    __slots__ = ("_runners",)

    def __init__(self) -> None:
        self._runners: dict[str, list[Slot]] = {}  #: the slot unused for longest comes first

    def note(self, key: str, prefix: Prefix, slots: int) -> Slot | None:
        """The prompt ``prefix`` is sent to the model ``key``, whose runner has so many ``slots``.

        Returns the slot that it is expected to take, which wants to hear when the request has ``ended``;
        None for a request without a prompt.
        """
        if not prefix:
            return None
        runner = self._runners.setdefault(key, [])
        runner[:0] = [Slot() for _ in range(slots - len(runner))]
        del runner[: len(runner) - slots]
        slot, tokens = _best(runner, prefix)
        if tokens <= SIMILAR * prefix[-1][1]:
            slot = min(runner, key=lambda slot: slot.users)
        runner.remove(slot)
        runner.append(slot)
        slot.take(prefix)
        return slot

    def cached_tokens(self, key: str, prefix: Prefix) -> int:
        """How many tokens of ``prefix`` the model ``key`` would not have to evaluate here."""
        runner = self._runners.get(key)
        if not runner or not prefix:
            return 0
        first = prefix[0][0]
        for slot in runner:
            if first in slot.held:
                return _best(runner, prefix)[1]
        return 0

    def forget(self, key: str) -> None:
        """The runner of the model ``key`` is gone, or another."""
        self._runners.pop(key, None)


def _best(runner: list[Slot], prefix: Prefix) -> tuple[Slot, int]:
    """The slot that holds most of ``prefix``, and how many tokens; of those that are free, if any is."""
    best, most, free, first = runner[0], 0, False, prefix[0][0]
    for slot in runner:
        if slot.users:
            if free:
                continue
        elif not free:
            best, most, free = slot, 0, True
        if first in slot.held:
            tokens = slot.cached_tokens(prefix)
            if tokens > most:
                best, most = slot, tokens
    return best, most
