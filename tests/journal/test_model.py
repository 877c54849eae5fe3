"""Random operations against a model: after any sequence of them the journal holds what the model says (hypothesis shrinks what fails)."""

import asyncio

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from isopod.journal import Journal
from isopod.journal.verify import verify
from isopod.world.sim import SimWorld
from tests.journal.histories import SMALL, records_of
from tests.journal.workload import Model, open_journal

SETTINGS = SMALL._replace(compress=True, archive_n_max=2, snapshots_kept=2)
PAYLOADS = st.one_of(st.binary(max_size=40), st.integers(0, 1500).map(bytes), st.integers(1, 1500).map(lambda n: b"\x01" * n))
BATCHES = st.lists(st.tuples(st.integers(0, 255), PAYLOADS), min_size=1, max_size=2)


class JournalMachine(RuleBasedStateMachine):
    """Every rule runs the simulation until its operation has ended."""

    def __init__(self) -> None:
        super().__init__()
        self.sim = SimWorld(1)
        self.sim.disk.faults.keeps_unsynced = True
        self.model = Model()
        self.journal: Journal | None = None

    def teardown(self) -> None:
        if self.journal is not None:
            self.sim.run(self.journal.close())
        self.sim.close()

    @initialize()
    def begin(self) -> None:
        self.open()

    def open(self) -> Journal:
        self.journal = self.sim.run(self._open())
        return self.journal

    async def _open(self) -> Journal:
        journal = await open_journal(self.sim.world, "/j", SETTINGS)
        journal.on_durable(self._is_durable)
        await self.model.recovered(journal)
        return journal

    def _is_durable(self, lsn: int) -> None:
        self.model.durable_lsn = lsn

    def opened(self) -> Journal:
        return self.journal or self.open()

    @rule(batch=BATCHES)
    def commit(self, batch: list[tuple[int, bytes]]) -> None:
        journal = self.opened()

        async def body() -> None:
            self.model.appended(journal.append(batch), batch)
            await journal.wait_durable(journal.last_lsn)

        self.sim.run(body())
        assert journal.durable_lsn == journal.last_lsn

    @rule(batches=st.lists(BATCHES, max_size=4))
    def append(self, batches: list[list[tuple[int, bytes]]]) -> None:
        journal = self.opened()

        async def body() -> None:
            for batch in batches:
                self.model.appended(journal.append(batch), batch)
            await asyncio.sleep(0.0005)

        self.sim.run(body())

    @rule(lag=st.integers(0, 5))
    def snapshot(self, lag: int) -> None:
        journal = self.opened()
        lsn = max(journal.durable_lsn - lag, journal.first_lsn - 1, self.model.snapshot_done)
        self.model.snapshots[lsn] = b"[%d]" % lsn
        self.sim.run(journal.snapshot(self.model.snapshots[lsn], lsn))
        self.model.snapshot_done = lsn

    @rule()
    def compact(self) -> None:
        journal = self.opened()
        self.model.floor_asked = self.model.floor_done = max(self.model.floor_done, self.model.snapshot_done)
        self.sim.run(journal.compact(self.model.snapshot_done))

    @rule()
    def rotate(self) -> None:
        self.sim.run(self.opened().rotate())

    @rule()
    def tidy(self) -> None:
        self.sim.run(self.opened().tidy())

    @rule()
    def close(self) -> None:
        self.sim.run(self.opened().close())
        self.journal = None
        assert self.sim.run(verify(self.sim.world, "/j")).problems == []

    @rule(is_power=st.booleans())
    def crash(self, is_power: bool) -> None:
        """Leave an open journal behind: its process ends with whatever it had under way."""
        if self.journal is not None:
            self.sim.run(self.journal.close())
        self.journal = None

        async def node() -> None:
            journal = await self._open()
            for n in range(6):
                batch = [(n, bytes([n + 1]) * 150 * n)]
                self.model.appended(journal.append(batch), batch)
                await asyncio.sleep(0.0007)
            await asyncio.sleep(10)

        async def body() -> None:
            handle = self.sim.spawn_node(node())
            await asyncio.sleep(0.003 + 0.004 * self.sim.random.stream("test").random())
            assert not handle.done()
            handle.kill()
            if is_power:
                self.sim.power_cut()

        self.sim.run(body())

    @invariant()
    def it_holds_what_the_model_says(self) -> None:
        if self.journal is not None:
            durable = self.journal.durable_lsn
            found = self.sim.run(records_of(self.journal))
            everything = [record for batch in self.model.batches for record in batch]
            assert found == [record for record in everything if self.journal.first_lsn <= record.lsn <= durable]


@pytest.mark.row("R19", "R25", "R26", "R27")
def test_any_sequence_of_operations() -> None:
    run_state_machine_as_test(
        JournalMachine,
        settings=settings(max_examples=40, stateful_step_count=25, deadline=None, derandomize=True, suppress_health_check=[*HealthCheck]),
    )
