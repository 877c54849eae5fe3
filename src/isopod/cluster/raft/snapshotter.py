"""Snapshotter: makes snapshots of the own machine when enough log came, lets go of the log behind them, and takes in those of the leader.

One at a time. The machine is captured within a turn, packed and written beside everything else. A snapshot that cannot be made (the disk is
full) is logged and tried again later: the log grows meanwhile, and nothing is lost.
"""

import asyncio
from typing import Final

from isopod.cluster.raft.core import CorePanicked, describe_message
from isopod.cluster.raft.driver import Driver
from isopod.cluster.raft.metrics import RaftMetrics
from isopod.cluster.raft.ports import Capturable, NodeId, Preparable, SnapshotOffer
from isopod.cluster.raft.snapshots import Captured, PartFile, SnapshotHeader
from isopod.runtime.logger import Logger
from isopod.runtime.scheduling import SchedulingGroup
from isopod.world.errors import ForeignCluster, InUse, InvalidArgument, IsopodError, from_os_error
from isopod.world.failpoints import Failpoint

RETRY_S: Final = 10.0
PACKING: Final = SchedulingGroup("raft-snapshot", 500)
"""Nobody waits for it, but until it is done the log grows: so it gets a fair part of a busy loop, in pieces that delay nobody for long."""


class Snapshotter:
    """Watches one driver.

    Args:
        driver: Whose machine.
        logger: Told of every snapshot.
        metrics: Counts.
        before_snapshot: The failpoint.
    """

    def __init__(self, driver: Driver, *, logger: Logger, metrics: RaftMetrics, before_snapshot: Failpoint) -> None:
        self._driver = driver
        self._logger = logger
        self._metrics = metrics
        self._before_snapshot = before_snapshot
        self._loop = driver.loop
        self._task: asyncio.Task[None] | None = None
        self._receiving: _Receiving | None = None
        self._made_at = self._loop.time()
        self._not_before = 0.0
        self._entry_bytes = driver.log.entry_bytes
        self._n_bytes = driver.log.snapshot.n_bytes

    @property
    def is_busy(self) -> bool:
        """Whether a snapshot is being made."""
        return self._task is not None

    def look(self) -> None:
        """Make a snapshot if one is due; called after each slice of entries."""
        driver, settings = self._driver, self._driver.settings
        n_entries = driver.applied - driver.log.snapshot.index
        if n_entries <= 0 or self._task is not None:
            return
        now = self._loop.time()
        n_bytes = driver.log.entry_bytes - self._entry_bytes
        is_due = (
            n_entries >= settings.snapshot_log_entries
            or n_bytes >= max(settings.snapshot_log_bytes, self._n_bytes)
            or now - self._made_at >= settings.snapshot_age_s
        )
        if is_due and now >= self._not_before and not driver.log.is_full:
            self.start()

    def start(self) -> "asyncio.Task[None]":
        """Make a snapshot now; if one is being made, that one is returned."""
        if self._task is None:
            driver = self._driver
            cluster_id = driver.log.identity.cluster_id
            header = SnapshotHeader(cluster_id, driver.applied, driver.applied_term, driver.conf_state, driver.last_stamp_ns)
            machine = driver.machine
            captured = Captured(header, machine.capture() if isinstance(machine, Capturable) else (machine.snapshot(),))
            self._task = self._loop.create_task(self._make(captured), name="raft snapshot", context=PACKING.context())
        return self._task

    def want(self) -> None:
        """A new member needs a snapshot that knows it: make one, unless one is being made or could not be just now."""
        if self._task is None and self._loop.time() >= self._not_before and self._driver.applied > self._driver.log.snapshot.index:
            self.start()

    async def receive(self, sender: NodeId, offer: SnapshotOffer) -> "_Receiving":
        """See `TransportSink.open_receiver`."""
        _check_offer(sender, offer)
        if self._receiving is not None:
            if self._receiving.sender == sender:
                self._receiving.abandon()
            else:
                raise InUse("the snapshot receiver", str(offer.index), f"node {self._receiving.sender}", "try again when it has ended")
        self._receiving = receiving = _Receiving(self, sender, offer)
        try:
            await receiving.open()
        except BaseException:
            self._end(receiving)
            raise
        return receiving

    async def close(self) -> None:
        """End what is under way; what was received in part stays for the next try."""
        if self._receiving is not None:
            self._receiving.abandon()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _make(self, snapshot: Captured) -> None:
        began = self._loop.time()
        index = snapshot.header.index
        driver = self._driver
        try:
            if self._before_snapshot.armed:
                await self._before_snapshot.hit()
            record = await driver.log.save_snapshot(snapshot)
            if record.index == index and driver.is_open:
                self._n_bytes = record.n_bytes
                driver.core.snapshot_made(index, b"")
                driver.wake()  # who waited for it is sent it now
                self._metrics.snapshots_made.inc()
                await self._compact(index)
            duration_s = self._loop.time() - began
            self._logger.info("raft.snapshot", node=driver.node_id, index=index, n_bytes=record.n_bytes, duration_s=duration_s)
        except (IsopodError, OSError) as error:
            failure = from_os_error(error, "make", "a snapshot") if isinstance(error, OSError) else error
            self._metrics.snapshots_failed.inc()
            self._not_before = self._loop.time() + RETRY_S
            self._logger.warning("raft.snapshot_failed", node=driver.node_id, index=index, why=failure.message, hint=failure.hint)
        except (CorePanicked, ValueError) as error:
            driver.fatal(f"snapshot {index} does not fit the core: {error}")
        finally:
            self._task = None
            self._made_at = self._loop.time()
            self._entry_bytes = driver.log.entry_bytes

    async def _compact(self, index: int) -> None:
        driver = self._driver
        keep_from = min(index, driver.log.index_to_keep_from(driver.settings))
        if keep_from >= driver.core.status().first_index:
            driver.core.compact(keep_from)
        await driver.log.compact(keep_from)

    def _end(self, receiving: "_Receiving") -> None:
        if self._receiving is receiving:
            self._receiving = None


class _Receiving:
    """One snapshot that comes in: `SnapshotReceiver`.

    Args:
        owner: Told of its end.
        sender: From whom.
        offer: What was announced.
    """

    def __init__(self, owner: Snapshotter, sender: NodeId, offer: SnapshotOffer) -> None:
        self.sender = sender
        self.offset = 0
        self._owner = owner
        self._offer = offer
        self._part: PartFile | None = None

    async def open(self) -> None:
        """Look how much is there already. A snapshot that brings nothing new is not asked for: the core will say so to the leader."""
        driver = self._owner._driver
        if self._offer.index <= driver.applied:
            self.offset = self._offer.n_bytes
            return
        self._part = await driver.log.snapshots.open_receiver(self._offer)
        self.offset = self._part.offset

    async def write(self, data: bytes) -> None:
        """See `SnapshotReceiver.write`."""
        if self._part is not None:
            await self._part.write(data)
            self.offset = self._part.offset

    async def finish(self) -> None:
        """See `SnapshotReceiver.finish`."""
        driver = self._owner._driver
        try:
            if self._part is None:
                driver.take(self.sender, (self._offer.message,))
                return
            snapshot = await self._part.finish()
            cluster_id = driver.log.identity.cluster_id
            if (snapshot.header.index, snapshot.header.term) != (self._offer.index, self._offer.term):
                raise InvalidArgument(
                    "snapshot", self._offer.index, f"its file is of {snapshot.header.index} in term {snapshot.header.term}"
                )
            if snapshot.header.cluster_id != cluster_id:
                raise ForeignCluster(f"the snapshot of node {self.sender}", snapshot.header.cluster_id, cluster_id)
            if isinstance(driver.machine, Preparable):
                for _ in driver.machine.prepare(snapshot.machine):
                    await asyncio.sleep(0)
            driver.step_snapshot(self.sender, snapshot, self._offer.message)
        finally:
            self.abandon()

    def abandon(self) -> None:
        """See `SnapshotReceiver.abandon`."""
        if self._part is not None:
            self._part.close()
        self._owner._end(self)


def _check_offer(sender: NodeId, offer: SnapshotOffer) -> None:
    """Refuse a snapshot whose message is of another one: the core would take what nobody received.

    Raises:
        InvalidArgument: It is.
    """
    try:
        found = describe_message(offer.message)
    except ValueError as error:
        raise InvalidArgument("snapshot", offer.index, f"its message cannot be read: {error}") from None
    if (found.kind, found.sender, found.snapshot_index) != ("MsgSnapshot", sender, offer.index):
        raise InvalidArgument("snapshot", offer.index, f"its message is a {found.kind} of {found.snapshot_index} by node {found.sender}")
