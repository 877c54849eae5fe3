"""When a snapshot is due, and what may be compacted after it. The user drives it: nothing here runs by itself.

    schedule = SnapshotSchedule(world, journal)
    ...
    if schedule.is_due():                          # now and then: a timer, a turn of the main loop
        await schedule.take(state.to_json(), journal.durable_lsn)

`take` compacts only up to the oldest snapshot that is kept: each of them, with the records after it, gives the whole state. A journal
that is compacted up to its newest snapshot has nothing to fall back to when that one is damaged.
"""

from isopod.journal.journal import Journal
from isopod.world.world import World


class SnapshotSchedule:
    """Decides by time and by number of records; see `JournalSettings.snapshot_interval_s` and `snapshot_records`.

    Args:
        world: Its clock.
        journal: Which journal; its settings say how often.
        lsn: The LSN of the snapshot that there is, 0 for none.
    """

    def __init__(self, world: World, journal: Journal, *, lsn: int = 0) -> None:
        self._clock = world.clock
        self._journal = journal
        self._lsn = lsn
        self._made_ns = world.clock.monotonic_ns()
        self._is_taking = False

    def is_due(self) -> bool:
        """Return whether something was written since the last snapshot, and long enough ago or enough of it. False while one is made."""
        n_since = self._journal.durable_lsn - self._lsn
        if n_since <= 0 or self._is_taking:
            return False
        settings = self._journal.settings
        elapsed_s = (self._clock.monotonic_ns() - self._made_ns) / 1e9
        return n_since >= settings.snapshot_records or elapsed_s >= settings.snapshot_interval_s

    async def take(self, data: bytes, lsn: int) -> None:
        """Store a snapshot, and compact up to the oldest one that is kept. A failure leaves it due.

        Args:
            data: The state as JSON.
            lsn: The last record in it.

        Raises:
            IsopodError: As `Journal.snapshot` and `Journal.compact`.
        """
        self._is_taking = True
        try:
            await self._journal.snapshot(data, lsn)
            self._lsn = lsn
            self._made_ns = self._clock.monotonic_ns()
            kept = await self._journal.snapshot_lsns()
            await self._journal.compact(min(kept))
        finally:
            self._is_taking = False
