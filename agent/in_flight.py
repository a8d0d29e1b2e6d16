"""What the proxies have in flight here, as they say themselves: the state that several proxies share."""

from __future__ import annotations

import re

HEADER = "x-sollol-in-flight"

# A proxy polls every second; one that has not for this long has died, and its requests with it.
KEPT_S = 5.0

# More proxies than any fleet has, so that a caller who invents names cannot fill the memory.
MOST_PROXIES = 256

_HEADER_VALUE = re.compile(r"([A-Za-z0-9_.-]{1,64})=([0-9]{1,6})")


def parse(value: str) -> tuple[str, int]:
    """Return (proxy id, requests) of a header ``<proxy_id>=<n>``; raise ValueError with a sentence if bad."""
    match = _HEADER_VALUE.fullmatch(value.strip())
    if match is None:
        raise ValueError(f"{HEADER} must be <proxy id>=<number of requests>, not {value!r}")
    return match[1], int(match[2])


class InFlight:
    """The latest count of every proxy that was heard within the last :data:`KEPT_S`."""

    def __init__(self) -> None:
        self._told: dict[str, tuple[float, int]] = {}

    def tell(self, proxy_id: str, requests: int, now_s: float) -> None:
        """Take a proxy's own count, in place of its former one."""
        self._forget(now_s)
        if proxy_id in self._told or len(self._told) < MOST_PROXIES:
            self._told[proxy_id] = (now_s, requests)

    def total(self, now_s: float) -> int | None:
        """Return the sum over all proxies, None if none was heard lately."""
        self._forget(now_s)
        return sum(requests for _, requests in self._told.values()) if self._told else None

    def _forget(self, now_s: float) -> None:
        self._told = {proxy: told for proxy, told in self._told.items() if now_s - told[0] < KEPT_S}
