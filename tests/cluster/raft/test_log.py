"""RaftLog on both Worlds: what was written is there again, exactly, and what does not count any more is not."""

import pytest

from isopod.cluster.raft.codec import HardState, decode_hard_state, encode_hard_state
from isopod.cluster.raft.core import ConfState
from isopod.cluster.raft.log import RaftLog, Recovered
from isopod.cluster.raft.ports import SnapshotOffer
from isopod.cluster.raft.settings import RaftSettings
from isopod.cluster.raft.snapshots import Captured, Snapshot, SnapshotHeader, crc_of, pack_snapshot, parse_snapshot
from isopod.journal import JournalSettings
from isopod.world import errors
from isopod.world.sim import SimWorld
from isopod.world.world import World

VOTERS = ConfState(voters=(1, 2, 3))
SMALL = JournalSettings(segment_bytes=3 << 20, compress=False, archive_n_max=0)


async def reopen(world: World, folder: str, log: RaftLog | None = None, *, node_id: int = 1) -> tuple[RaftLog, Recovered]:
    if log is not None:
        await log.close()
    return await RaftLog.open(
        world, folder, cluster_id="c", node_id=node_id, bootstrap=(VOTERS, b"empty"), journal_settings=SMALL, incarnation=None
    )


async def settle(log: RaftLog) -> None:
    """Wait until everything is durable."""
    await log._journal.commit([(5, b"\x92\x63\xa1x")])


def snapshot(index: int, term: int = 1, machine: bytes = b"state") -> Snapshot:
    return Snapshot(SnapshotHeader("c", index, term, VOTERS, 17), machine)


@pytest.mark.row("B13")
async def test_entries_and_promises_are_there_again(world: World, folder: str) -> None:
    log, found = await reopen(world, folder)
    assert found.records == []
    assert decode_hard_state(found.hard_state) == HardState(1, 0, 1)
    assert found.snapshot == Snapshot(SnapshotHeader("c", 1, 1, VOTERS, 0), b"empty")
    told: list[int] = []
    log.on_durable(told.append)
    tickets = [log.append(b"a", 2, 2, hard_state=encode_hard_state(HardState(2, 1, 1))), log.append(b"bc", 3, 4, hard_state=b"")]
    log.defer(encode_hard_state(HardState(2, 1, 3)))
    tickets.append(log.append(b"d", 4, 4, hard_state=b""))
    await settle(log)
    assert told[-1] == tickets[-1] == 3
    log, found = await reopen(world, folder, log)
    assert found.records == [b"a", b"bc", b"d"]
    assert decode_hard_state(found.hard_state) == HardState(2, 1, 3)
    assert log.boot == 2
    await log.close()


@pytest.mark.row("B13")
async def test_a_joiner_that_lost_power_before_its_first_snapshot_starts_again(sim_world: SimWorld, folder: str) -> None:
    world = sim_world.world

    async def join() -> tuple[RaftLog, Recovered]:
        return await RaftLog.open(
            world, folder, cluster_id="c", node_id=4, bootstrap=None, journal_settings=SMALL, incarnation="joined before"
        )

    async def live() -> Recovered:
        log, found = await join()
        await settle(log)
        return found

    first = await sim_world.spawn_node(live()).wait()
    assert first == Recovered(first.hard_state, None, [])
    sim_world.power_cut()

    log, found = await join()

    assert found == Recovered(found.hard_state, None, [])
    assert (log.boot, log.snapshot.index) == (2, 0)
    await log.close()


async def test_a_commit_index_behind_the_snapshot_is_fitted(world: World, folder: str) -> None:
    log, _ = await reopen(world, folder)
    log.append(b"b", 2, 5, hard_state=encode_hard_state(HardState(2, 0, 2)))
    await log.save_snapshot(snapshot(4, 2))
    log, found = await reopen(world, folder, log)
    assert decode_hard_state(found.hard_state) == HardState(2, 0, 4)
    await log.close()


@pytest.mark.row("B13")
async def test_a_log_that_lost_committed_entries_is_refused(world: World, folder: str) -> None:
    """With them a vote may be lost: such a node must not vote again."""
    log, _ = await reopen(world, folder)
    log.append(b"a", 2, 2, hard_state=encode_hard_state(HardState(2, 0, 9)))
    await settle(log)
    with pytest.raises(errors.BadRecord, match="ends at entry 2, but 9 was committed"):
        await reopen(world, folder, log)


async def test_a_deferred_commit_index_is_written_only_as_far_as_the_log_reaches(world: World, folder: str) -> None:
    """What a full disk refused is not in the log, and nothing was lost."""
    log, _ = await reopen(world, folder)
    log.append(b"a", 2, 4, hard_state=encode_hard_state(HardState(2, 0, 2)))
    log.defer(encode_hard_state(HardState(2, 0, 9)))
    log, found = await reopen(world, folder, log)
    assert decode_hard_state(found.hard_state) == HardState(2, 0, 4)
    log.defer(encode_hard_state(HardState(2, 0, 9)))
    await log.save_snapshot(snapshot(3, 2))
    log, found = await reopen(world, folder, log)
    assert decode_hard_state(found.hard_state) == HardState(2, 0, 4)
    await log.close()


@pytest.mark.row("B16")
async def test_members_come_from_the_snapshot(world: World, folder: str) -> None:
    log, _ = await reopen(world, folder)
    log.append(b"a", 2, 8, hard_state=b"")
    header = SnapshotHeader("c", 5, 1, ConfState(voters=(1, 2), learners=(7,)), 99)
    await log.save_snapshot(Snapshot(header, b"state"))
    log, found = await reopen(world, folder, log)
    assert found.snapshot == Snapshot(header, b"state")
    assert found.records == [b"a"], "what the snapshot does not cover is there too"
    await log.close()


@pytest.mark.row("B15")
async def test_compaction_keeps_a_bounded_tail_and_everything_that_is_no_entry(world: World, folder: str) -> None:
    log, _ = await reopen(world, folder)
    log.learn_peer(2, "disk2")
    settings = RaftSettings(keep_log_entries=10, keep_log_bytes=1 << 20)
    for index in range(2, 400):
        log.append(b"%d" % index + bytes(20_000), index, index, hard_state=encode_hard_state(HardState(3, 2, index)))
    await settle(log)
    assert log.index_to_keep_from(settings) == 0, "nothing goes without a snapshot"
    await log.save_snapshot(snapshot(390, 3))
    keep_from = log.index_to_keep_from(settings)
    assert keep_from == 380
    await log.compact(keep_from)
    log, found = await reopen(world, folder, log)
    first = int(found.records[0].rstrip(b"\0"))
    assert 230 <= first <= 381, "whole segments go"
    assert found.records[-1].startswith(b"399")
    assert decode_hard_state(found.hard_state) == HardState(3, 2, 399)
    assert log.incarnation_of(2) == "disk2"
    assert log.snapshot.index == 390
    await log.close()


async def test_a_received_snapshot_takes_the_logs_place(world: World, folder: str) -> None:
    log, _ = await reopen(world, folder)
    log.append(b"old", 2, 3, hard_state=encode_hard_state(HardState(2, 0, 2)))
    await log.snapshots.save(snapshot(50, 4))
    from isopod.cluster.raft.log import SnapshotRecord

    ticket = log.install(SnapshotRecord(50, 4, 5), b"replaced", hard_state=encode_hard_state(HardState(4, 0, 50)))
    assert ticket == 2
    log, found = await reopen(world, folder, log)
    assert found.snapshot == snapshot(50, 4)
    assert found.records[-1] == b"replaced"
    assert decode_hard_state(found.hard_state) == HardState(4, 0, 50)
    await log.close()


async def test_an_incarnation_stays_and_another_is_refused(world: World, folder: str) -> None:
    log, _ = await reopen(world, folder)
    incarnation = log.identity.incarnation
    assert len(incarnation) == 16
    log, _ = await reopen(world, folder, log)
    assert log.identity.incarnation == incarnation
    await log.close()
    with pytest.raises(errors.IdentityConflict, match="incarnation"):
        await RaftLog.open(world, folder, cluster_id="c", node_id=1, bootstrap=None, incarnation="other", journal_settings=SMALL)
    with pytest.raises(errors.IdentityConflict, match="node 1's"):
        await reopen(world, folder, node_id=2)
    with pytest.raises(errors.ForeignCluster):
        await RaftLog.open(world, folder, cluster_id="d", node_id=1, bootstrap=None, journal_settings=SMALL)


async def test_a_snapshot_file_that_is_damaged_or_gone_is_told(world: World, folder: str) -> None:
    log, _ = await reopen(world, folder)
    path = log.snapshots.file(1, 1)
    whole = await world.disk.read(path)
    for place in (0, 12, len(whole) // 2, len(whole) - 1):
        await world.disk.write(path, whole[:place] + bytes((whole[place] ^ 1,)) + whole[place + 1 :])
        with pytest.raises(errors.BadRecord):
            await reopen(world, folder, log)
    await world.disk.remove(path)
    with pytest.raises(errors.NotFound):
        await reopen(world, folder)


async def test_a_journal_whose_records_are_too_small_is_refused(world: World, folder: str) -> None:
    with pytest.raises(errors.InvalidArgument, match="at least"):
        await RaftLog.open(
            world, folder, cluster_id="c", node_id=1, bootstrap=None, journal_settings=JournalSettings(segment_bytes=1 << 20)
        )  # fmt: skip


async def test_a_journal_of_other_records_is_no_raft_log(world: World, folder: str) -> None:
    log, _ = await reopen(world, folder)
    await log._journal.commit([(77, b"later")])
    await log.close()
    with pytest.raises(errors.BadRecord, match="kind 77"):
        await reopen(world, folder)


@pytest.mark.parametrize("cut", [0, 1, 8, 11, 12, 20, -1])
def test_a_cut_snapshot_is_none(cut: int) -> None:
    data = pack_snapshot(snapshot(5))
    assert parse_snapshot(data, "x") == snapshot(5)
    assert crc_of(data) == int.from_bytes(data[-4:], "little")
    with pytest.raises(errors.BadRecord):
        parse_snapshot(data[:cut], "x")


async def test_a_snapshot_that_just_came_is_not_taken_for_an_old_one(world: World, folder: str) -> None:
    """It came while one made here was written, and is installed only afterwards: the log will name it."""
    log, _ = await reopen(world, folder)
    folder_of = log.snapshots
    await folder_of.save(snapshot(50, 2))
    await folder_of.save(snapshot(20, 1))
    await folder_of.save(snapshot(10, 1))
    part = f"{folder_of.path}/incoming-{60:020d}-{2:020d}-aaaaaaaa.part"
    await world.disk.write(part, b"x")
    await folder_of.remove_but([(20, 1)])
    names = await world.disk.list(folder_of.path)
    assert sorted(names) == sorted(path.rpartition("/")[2] for path in (folder_of.file(20, 1), folder_of.file(50, 2), part))
    await folder_of.remove_but([(60, 2), (50, 2)])
    assert list(await world.disk.list(folder_of.path)) == [folder_of.file(50, 2).rpartition("/")[2]]
    await log.close()


async def test_a_snapshot_is_written_piece_by_piece_and_what_a_crash_leaves_goes(world: World, folder: str) -> None:
    log, _ = await reopen(world, folder)
    header = SnapshotHeader("c", 9, 1, VOTERS, 17)
    pieces = (b"", b"one", b"", bytes(3 << 20), b"two")
    n_bytes = await log.snapshots.save(Captured(header, iter(pieces)))
    whole = await log.snapshots.load(9, 1)
    assert whole == Snapshot(header, b"".join(pieces))
    assert n_bytes == len(pack_snapshot(whole))
    await world.disk.write(log.snapshots.file(11, 1) + ".making", b"half")
    log, _ = await reopen(world, folder, log)
    assert not [name for name in await world.disk.list(log.snapshots.path) if name.endswith(".making")]
    await log.close()


async def test_more_than_a_snapshot_can_be_is_not_received(sim_world: SimWorld, folder: str) -> None:
    log, _ = await reopen(sim_world.world, folder)
    for n_bytes in (0, -1, 1 << 40):
        with pytest.raises(errors.TooLarge):
            await log.snapshots.open_receiver(SnapshotOffer(b"", 9, 1, n_bytes, 0))
    await log.close()
