"""HeldLease: a lease that is kept alive for as long as a block runs, and whether it may still be believed in.

    async with HeldLease(store, ttl_s=10.0) as held:
        await store.put("leaders/backup", b"me", lease=held.lease)
        while held.is_held: ...

The holder reckons for himself: the lease lives for its time from when the last request that was answered was *sent*. The store ends it
later than that, never sooner, whatever wall clocks, leaders and networks do meanwhile, unless the leader's clock runs faster than the
holder's by more than the store waits (50 ms). So what must be done by one at a time is done while `is_held`.
"""

import asyncio
from typing import Final, Self

from isopod.api.store.operations import StoreOperations
from isopod.world.errors import IsopodError

KEEPS_PER_TTL: Final = 3
RETRY_S: Final = 0.1
REVOKE_S: Final = 1.0


class HeldLease:
    """Use in `async with`: entering grants the lease, leaving revokes it if that goes quickly.

    Args:
        store: A replica or a client.
        ttl_s: Its time.
    """

    def __init__(self, store: StoreOperations, *, ttl_s: float) -> None:
        self.lease = 0
        self.lost = asyncio.Event()
        """Set when it can be believed in no more."""
        self._store = store
        self._ttl_s = ttl_s
        self._ends_at = 0.0
        self._task: asyncio.Task[None] | None = None

    @property
    def is_held(self) -> bool:
        """Whether it certainly still lives."""
        return self.left_s > 0 and not self.lost.is_set()

    @property
    def left_s(self) -> float:
        """For how many seconds it certainly lives."""
        return max(0.0, self._ends_at - asyncio.get_running_loop().time())

    async def __aenter__(self) -> Self:
        asked_at = asyncio.get_running_loop().time()
        self.lease = await self._store.lease_grant(self._ttl_s)
        self._ends_at = asked_at + self._ttl_s
        self._task = asyncio.get_running_loop().create_task(self._keep(), name="store lease")
        return self

    async def __aexit__(self, *_: object) -> None:
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        self._ends_at = 0.0
        self.lost.set()
        try:
            await self._store.lease_revoke(self.lease, timeout_s=REVOKE_S)
        except IsopodError:
            return  # it ends by itself

    async def _keep(self) -> None:
        """Keep it alive until it is lost."""
        loop = asyncio.get_running_loop()
        pause_s = self._ttl_s / KEEPS_PER_TTL
        while True:
            await asyncio.sleep(min(pause_s, self.left_s))
            asked_at = loop.time()
            if asked_at >= self._ends_at:
                break
            try:
                [left_s] = await self._store.lease_keep([self.lease], timeout_s=self.left_s)
            except IsopodError:
                pause_s = RETRY_S
                continue
            if not left_s:
                break
            self._ends_at = asked_at + left_s
            pause_s = self._ttl_s / KEEPS_PER_TTL
        self._ends_at = 0.0
        self.lost.set()
