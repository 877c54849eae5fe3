"""The host's time and chance.

Identifiers come from the operating system's generator; the named streams are ordinary generators, each seeded from it
(in the simulation they derive from one seed).
"""

import random
import secrets
import time


class HostClock:
    """`Clock` by clock_gettime(2)."""

    def now_ns(self) -> int:
        """See `Clock.now_ns`."""
        return time.time_ns()

    def monotonic_ns(self) -> int:
        """See `Clock.monotonic_ns`."""
        return time.monotonic_ns()


class HostRandom:
    """`Random` by getrandom(2)."""

    def __init__(self) -> None:
        self._streams: dict[str, random.Random] = {}

    def stream(self, name: str) -> random.Random:
        """See `Random.stream`."""
        found = self._streams.get(name)
        if found is None:
            found = self._streams[name] = random.Random(secrets.randbits(256))  # noqa: S311 - jitter, not secrets
        return found

    def token_hex(self, n_bytes: int) -> str:
        """See `Random.token_hex`."""
        return secrets.token_hex(n_bytes)
