"""Asides: what a client does beside plain operations: stale and cached reads, watches, locks and leases; and its notes of them.

Nothing is judged here. What was answered goes into notes, which `isopod.testing.reads` and `isopod.testing.leasing` compare with the truth
after the run. A watch goes on beside whatever its client does next; everything else is done one at a time, as the client does it.
"""

import asyncio
from collections.abc import Callable
from typing import Final

from isopod.api.store.holding import HeldLease
from isopod.api.store.messages import Consistency
from isopod.api.store.operations import StoreOperations
from isopod.testing.leasing import Hold
from isopod.testing.plan import Step
from isopod.testing.reads import Acknowledged, Listed, Read, Watched
from isopod.world.errors import IsopodError, RevisionCompacted

TIMEOUT_S: Final = 5.0
PROGRESS_S: Final = 0.5
LOOK_S: Final = 0.05
RETRY_S: Final = 0.2
GONE: Final = "gone"
FORGET_BEHIND: Final = 20
"""A client that has changes forgotten leaves so many."""


class Asides:
    """One client's.

    Args:
        client: Who it is.
        now_ns: The simulation's time.
        replica: Says which life of which node answers this client's reads, "" if that may be any, `GONE` if it has left.
    """

    def __init__(self, client: int, now_ns: Callable[[], int], replica: Callable[[], str] = lambda: "") -> None:
        self.reads: list[Read] = []
        self.watched: list[Watched] = []
        self.listed: list[Listed] = []
        self.holds: list[Hold] = []
        self.acknowledged: list[Acknowledged] = []
        self.n_resumed = 0
        self._client = client
        self._now_ns = now_ns
        self._replica = replica
        self._tasks: list[asyncio.Task[None]] = []
        self._do = {
            "stale": self._read,
            "cached": self._read,
            "watch": self._begin_watch,
            "lock": self._lock,
            "lease": self._lease,
            "forget": self._forget,
        }

    def can(self, what: str) -> bool:
        """Return whether this is done here."""
        return what in self._do

    async def do(self, store: StoreOperations, step: Step) -> None:
        """Do it, and note what was answered. Raises what the store raises."""
        await self._do[step.do](store, step)

    def has_seen(self, revision: int) -> bool:
        """Return whether every watch that goes on was told up to that revision."""
        going = [watched for watched, task in zip(self.watched, self._tasks, strict=True) if not task.done()]
        return all(watched.revision >= revision for watched in going)

    def acknowledge(self, revision: int) -> None:
        """Note that an answer told of a revision, now."""
        self.acknowledged.append(Acknowledged(self._now_ns(), revision))

    # -- reads -----------------------------------------------------------------------------------------------------------------------

    async def _read(self, store: StoreOperations, step: Step) -> None:
        consistency: Consistency = "stale" if step.do == "stale" else "cached"
        invoked_ns, before = self._now_ns(), self._replica()
        if before == GONE:
            return
        found = await store.get(step.key, consistency=consistency, max_age_s=step.amount, timeout_s=TIMEOUT_S)
        replica = before if before == self._replica() else ""
        self.reads.append(
            Read(
                self._client,
                step.key,
                consistency,
                invoked_ns,
                self._now_ns(),
                found.entry,
                found.revision,
                found.age_s,
                step.amount,
                replica,
            )
        )

    async def _forget(self, store: StoreOperations, step: Step) -> None:
        revision = (await store.get(step.key, timeout_s=TIMEOUT_S)).revision
        if revision > FORGET_BEHIND:
            await store.compact(revision - FORGET_BEHIND, timeout_s=TIMEOUT_S)

    # -- watches ---------------------------------------------------------------------------------------------------------------------

    async def _begin_watch(self, store: StoreOperations, step: Step) -> None:
        """Watch from the first revision on, or list what is there and watch what comes: beside whatever comes next."""
        from_revision = int(step.amount) or await self._list(store, step.key) + 1
        self._watch(store, step.key, from_revision)

    def _watch(self, store: StoreOperations, prefix: str, from_revision: int) -> None:
        watched = Watched(self._client, prefix, from_revision)
        self.watched.append(watched)
        self._tasks.append(asyncio.get_running_loop().create_task(self._follow(store, watched)))

    async def _list(self, store: StoreOperations, prefix: str) -> int:
        found = await store.range(prefix, timeout_s=TIMEOUT_S)
        self.listed.append(Listed(self._client, prefix, found.revision, found.entries))
        return found.revision

    async def _follow(self, store: StoreOperations, watched: Watched) -> None:
        while True:
            try:
                async with store.watch(watched.prefix, from_revision=watched.revision + 1, progress_s=PROGRESS_S) as watch:
                    async for changes in watch:
                        watched.items.append((self._now_ns(), changes.revision, list(changes.entries)))
                        self.n_resumed = max(self.n_resumed, getattr(watch, "n_resumed", 0))
            except RevisionCompacted:
                watched.forgotten_ns = self._now_ns()
                break
            except IsopodError:
                await asyncio.sleep(RETRY_S)  # from behind what was told
        while True:
            try:
                self._watch(store, watched.prefix, await self._list(store, watched.prefix) + 1)
            except IsopodError:
                await asyncio.sleep(RETRY_S)
            else:
                return

    # -- leases ----------------------------------------------------------------------------------------------------------------------

    async def _lock(self, store: StoreOperations, step: Step) -> None:
        """Try to take a lock; hold it for a while, as long as it may be believed in; let go."""
        loop = asyncio.get_running_loop()
        async with HeldLease(store, ttl_s=step.amount) as held:
            revision = await store.put_if(step.key, step.value.encode(), revision=0, lease=held.lease, timeout_s=TIMEOUT_S)
            if revision is None:
                return
            self.acknowledge(revision)
            began_ns, left_s = self._now_ns(), held.left_s
            if not left_s:
                return
            place, until_s = len(self.holds), loop.time() + step.lasts_ms / 1000
            asked_ns = began_ns + int((left_s - step.amount) * 1e9)
            self.holds.append(Hold(self._client, step.key, revision, began_ns, asked_ns, step.amount))
            while left_s and loop.time() < until_s:
                asked_ns = self._now_ns() + int((left_s - step.amount) * 1e9)
                self.holds[place] = self.holds[place]._replace(asked_ns=asked_ns)
                await asyncio.sleep(min(LOOK_S, left_s))
                left_s = held.left_s if held.is_held else 0.0
            if left_s:
                self.holds[place] = self.holds[place]._replace(ended_ns=self._now_ns())

    async def _lease(self, store: StoreOperations, step: Step) -> None:
        """Write a key that nobody keeps alive."""
        asked_ns = self._now_ns()
        lease = await store.lease_grant(step.amount, timeout_s=TIMEOUT_S)
        revision = await store.put(step.key, step.value.encode(), lease=lease, timeout_s=TIMEOUT_S)
        self.acknowledge(revision)
        self.holds.append(Hold(self._client, step.key, revision, self._now_ns(), asked_ns, step.amount, excludes=False))
