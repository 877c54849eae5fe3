"""KeyedLocks: one lock per key, as long as somebody wants it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class KeyedLocks:
    """Mutual exclusion among those who name the same key; waiters are served in order."""

    def __init__(self) -> None:
        self._locks: dict[str, asyncio.Lock] = {}
        self._n_users: dict[str, int] = {}

    def __len__(self) -> int:
        """Return the number of keys in use."""
        return len(self._locks)

    @asynccontextmanager
    async def hold(self, key: str) -> AsyncIterator[None]:
        """Hold the lock of `key` for the block."""
        lock = self._locks.setdefault(key, asyncio.Lock())
        self._n_users[key] = self._n_users.get(key, 0) + 1
        try:
            async with lock:
                yield
        finally:
            self._n_users[key] -= 1
            if not self._n_users[key]:
                del self._locks[key], self._n_users[key]
