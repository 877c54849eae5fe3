"""A seeded workload on a journal, a model of what it may have left, and the check of a recovery against it.

The model knows every batch that was appended, by LSN, and what was acknowledged: durable LSNs, compactions, snapshots. After a crash the
journal must hold a prefix of the batches, whole ones, with all that was acknowledged, and nothing else.
"""

import asyncio
import random

import msgspec

from isopod.journal import Journal, JournalSettings, Record
from isopod.world.errors import DiskFull, IsopodError, JournalFailed
from isopod.world.world import World
from tests.journal.histories import FORMAT, SMALL, records_of


class Model:
    """What one journal's folder may hold."""

    def __init__(self) -> None:
        self.batches: list[list[Record]] = []
        self.durable_lsn = 0
        self.floor_asked = 0
        self.floor_done = 0
        self.snapshots: dict[int, bytes] = {}
        self.snapshot_done = 0

    def appended(self, last_lsn: int, batch: list[tuple[int, bytes]]) -> None:
        first = last_lsn - len(batch) + 1
        assert not self.batches or first > self.batches[-1][-1].lsn
        self.batches.append([Record(first + n, kind, payload) for n, (kind, payload) in enumerate(batch)])

    def refused(self, first_lsn: int, error: IsopodError) -> None:
        """Queued batches were dropped: they must never be seen again. With a failed journal nothing is known."""
        if isinstance(error, DiskFull):
            self.batches = [batch for batch in self.batches if batch[0].lsn < first_lsn]

    async def recovered(self, journal: Journal) -> None:
        """Check what a recovery found, and take it for what is: what was not acknowledged and is gone will not come back."""
        assert journal.last_lsn == journal.durable_lsn >= self.durable_lsn, (journal.last_lsn, self.durable_lsn)
        floor = journal.first_lsn - 1
        assert self.floor_done <= floor <= self.floor_asked
        kept = [batch for batch in self.batches if batch[-1].lsn <= journal.last_lsn]
        everything = [record for batch in kept for record in batch]
        assert journal.last_lsn == (everything[-1].lsn if everything else 0), "a batch was torn apart, or there is one that nobody wrote"
        found = await records_of(journal)
        assert found == [record for record in everything if record.lsn > floor]
        archived = await records_of(journal, archived=True)
        assert archived == everything[len(everything) - len(archived) :]
        snapshot = await journal.load_snapshot()
        assert (snapshot[0] if snapshot else 0) >= self.snapshot_done
        if snapshot is not None:
            assert self.snapshots[snapshot[0]] == snapshot[1]
        self.batches = kept
        self.durable_lsn = max(journal.last_lsn, floor)
        self.floor_asked = self.floor_done = floor
        self.snapshot_done = snapshot[0] if snapshot else 0


def make_batch(chance: random.Random) -> list[tuple[int, bytes]]:
    """Return a batch: mostly small, now and then over sectors, with zeros in it."""
    n_records = chance.choice((1, 1, 1, 2, 5))
    sizes = (0, 3, 40, 40, 200, 600, 1500)
    batch = []
    for _ in range(n_records):
        n_bytes = chance.choice(sizes)
        payload = bytes(n_bytes) if chance.random() < 0.1 else chance.randbytes(n_bytes)
        batch.append((chance.randrange(256), payload))
    return batch if sum(len(payload) for _, payload in batch) < 3000 else batch[:1]


async def open_journal(world: World, folder: str, settings: JournalSettings = SMALL) -> Journal:
    return await Journal.open(world, folder, format=FORMAT, settings=settings)


async def work(
    world: World, folder: str, model: Model, chance: random.Random, *, settings: JournalSettings = SMALL, n_steps: int = 60
) -> None:
    """Open, recover, and write until the steps are done or the process is ended. Full disks are taken as they come."""
    journal = await open_journal(world, folder, settings)
    await model.recovered(journal)
    journal.on_refused(model.refused)
    journal.on_durable(lambda lsn: setattr(model, "durable_lsn", max(model.durable_lsn, lsn)))
    try:
        await asyncio.gather(*(_writer(world, journal, model, chance, n_steps=n_steps // 3) for _ in range(3)))
    finally:
        await journal.close()


async def _writer(world: World, journal: Journal, model: Model, chance: random.Random, *, n_steps: int) -> None:
    for _ in range(n_steps):
        what = chance.random()
        try:
            if what < 0.75:
                batch = make_batch(chance)
                lsn = journal.append(batch)
                model.appended(lsn, batch)
                if chance.random() < 0.8:
                    await journal.wait_durable(lsn)
                    assert model.durable_lsn >= lsn
            elif what < 0.85:
                lsn = journal.durable_lsn
                data = msgspec.json.encode({"lsn": lsn, "n": chance.randrange(1000)})
                if lsn not in model.snapshots:
                    model.snapshots[lsn] = data
                    await journal.snapshot(data, lsn)
                    model.snapshot_done = max(model.snapshot_done, lsn)
            elif what < 0.92:
                lsn = min(model.snapshot_done, journal.durable_lsn)
                model.floor_asked = max(model.floor_asked, lsn)
                await journal.compact(lsn)
                model.floor_done = max(model.floor_done, lsn)
            elif what < 0.95:
                await journal.rotate()
            else:
                await asyncio.sleep(chance.random() * 0.003)
        except DiskFull:
            await asyncio.sleep(0.001)
        except JournalFailed:
            return
        except IsopodError:
            if journal.failure is None:
                raise
            return
