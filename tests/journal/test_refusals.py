"""What a journal refuses, each with its own error and a hint: foreign and newer files, folders that will not do, two openers, sizes."""

import os
import struct

import pytest

from isopod.journal import Journal, JournalSettings
from isopod.journal.crc import crc32c
from isopod.journal.folder import Manifest, pack_manifest
from isopod.journal.layout import SEGMENT_HEADER_BYTES
from isopod.world.errors import (
    Exhausted,
    InUse,
    InvalidArgument,
    IsopodError,
    JournalDamaged,
    JournalForeign,
    KernelError,
    TooLarge,
    WrongState,
)
from isopod.world.world import World
from tests.journal.histories import FORMAT, SMALL, files_in, put_file, record_history, reopened

ONE = [[(1, b"one")]]


async def refused(world: World, folder: str, kind: type[IsopodError], match: str, *, name: str = FORMAT) -> IsopodError:
    """Open a journal that must be refused, for that reason and with a hint."""
    with pytest.raises(kind, match=match) as caught:
        await Journal.open(world, folder, format=name, settings=SMALL)
    assert caught.value.hint, "what to do is missing"
    return caught.value


async def test_another_users_journal(world: World, folder: str) -> None:
    history = await record_history(world, f"{folder}/j", ONE)
    await refused(world, f"{folder}/j", JournalForeign, "a journal of 'test 1', not 'raft log 1'", name="raft log 1")
    assert await reopened(world, f"{folder}/j") == history.records, "it was left alone"


async def test_a_newer_journal(world: World, folder: str) -> None:
    history = await record_history(world, f"{folder}/j", ONE)
    newer = Manifest(format="isopod journal", version=2, name=FORMAT, id="0" * 32, floor_lsn=0).sealed()
    await world.disk.write(f"{folder}/j/journal.json", pack_manifest(newer))
    error = await refused(world, f"{folder}/j", JournalForeign, "journal version 2; this isopod reads 1")
    assert "not older" in error.hint

    await world.disk.write(f"{folder}/j/journal.json", history.files["journal.json"])
    header = bytearray(history.files["current.wal"][: SEGMENT_HEADER_BYTES - 4])
    header[8:10] = struct.pack("<H", 7)
    newer_segment = bytes(header) + struct.pack("<I", crc32c(header)) + history.files["current.wal"][SEGMENT_HEADER_BYTES:]
    await put_file(world, f"{folder}/j/current.wal", newer_segment)
    await refused(world, f"{folder}/j", JournalForeign, "journal version 7")


async def test_files_that_are_no_journal(world: World, folder: str) -> None:
    history = await record_history(world, f"{folder}/j", ONE)
    await put_file(world, f"{folder}/j/current.wal", b"#!/bin/sh\necho hello\n" + bytes(4096))
    await refused(world, f"{folder}/j", JournalForeign, "not a segment of a journal")
    await put_file(world, f"{folder}/j/current.wal", history.files["current.wal"])
    await world.disk.write(f"{folder}/j/journal.json", b'{"format": "something", "version": 1, "name": "x", "id": "", "floor_lsn": 0}')
    await refused(world, f"{folder}/j", JournalDamaged, "checksum")
    await world.disk.write(f"{folder}/j/journal.json", b"not json")
    await refused(world, f"{folder}/j", JournalDamaged, "cannot be read")
    await world.disk.write(f"{folder}/j/journal.json", history.files["journal.json"])
    assert await reopened(world, f"{folder}/j") == history.records


async def test_another_journals_segment(world: World, folder: str) -> None:
    await record_history(world, f"{folder}/j", ONE)
    other = await record_history(world, f"{folder}/k", ONE)
    await put_file(world, f"{folder}/j/current.wal", other.files["current.wal"])
    await refused(world, f"{folder}/j", JournalForeign, "belongs to another journal")


async def test_a_journal_that_is_open(world: World, folder: str) -> None:
    journal = await Journal.open(world, f"{folder}/j", format=FORMAT, settings=SMALL)
    error = await refused(world, f"{folder}/j", InUse, "in use by process")
    assert f"process {world.processes.own_pid()}" in error.message
    assert await journal.commit([(1, b"still mine")]) == 1
    await journal.close()
    assert len(await reopened(world, f"{folder}/j")) == 1


async def test_a_folder_that_is_none(world: World, folder: str) -> None:
    await world.disk.write(f"{folder}/file", b"")
    await refused(world, f"{folder}/file", JournalForeign, "not a folder")
    with pytest.raises(InvalidArgument, match="not an absolute path"):
        await Journal.open(world, "relative", format=FORMAT)


async def test_a_symbolic_link(host_world: World, folder: str) -> None:
    await host_world.disk.make_directory(f"{folder}/real")
    os.symlink(f"{folder}/real", f"{folder}/link")
    error = await refused(host_world, f"{folder}/link", InvalidArgument, "symbolic link")
    assert "leads to" in error.hint
    assert os.listdir(f"{folder}/real") == []


async def test_a_lock_that_is_a_symbolic_link(host_world: World, folder: str) -> None:
    await host_world.disk.make_directory(f"{folder}/j")
    os.symlink("/etc/passwd", f"{folder}/j/lock")
    await refused(host_world, f"{folder}/j", KernelError, "symbolic links")


async def test_a_folder_that_everybody_may_write_to(host_world: World, folder: str) -> None:
    await host_world.disk.make_directory(f"{folder}/j")
    os.chmod(f"{folder}/j", 0o777)
    error = await refused(host_world, f"{folder}/j", InvalidArgument, "everybody may write to it")
    assert error.hint.startswith("chmod o-w")


async def test_a_place_that_cannot_be_written_to(host_world: World) -> None:
    error = await refused(host_world, "/proc/journal", KernelError, "cannot open the journal in /proc/journal")
    assert "writable file system" in error.hint


async def test_files_are_for_their_owner_alone(host_world: World, folder: str) -> None:
    await record_history(host_world, f"{folder}/j", ONE)
    assert os.stat(f"{folder}/j").st_mode & 0o777 == 0o700
    for name in await files_in(host_world, f"{folder}/j"):
        assert os.stat(f"{folder}/j/{name}").st_mode & 0o077 == 0, name


@pytest.mark.row("R27")
async def test_sizes(world: World, folder: str) -> None:
    settings = SMALL._replace(record_bytes_max=2000, queue_bytes_max=5000)
    journal = await Journal.open(world, f"{folder}/j", format=FORMAT, settings=settings)
    with pytest.raises(TooLarge, match="record of 2001 bytes is over 2000"):
        journal.append([(1, bytes(2001))])
    with pytest.raises(TooLarge, match="batch of"):
        journal.append([(1, bytes(1500))] * 3)
    with pytest.raises(InvalidArgument, match="at least one record"):
        journal.append([])
    for bad in ([(256, b"")], [(-1, b"")], [(1, "text")], [(1, None)], ["x"]):
        with pytest.raises(InvalidArgument, match="pairs of a kind"):
            journal.append(bad)  # type: ignore[arg-type]  # what a caller without types may do
    assert journal.last_lsn == 0, "nothing was queued"
    assert [journal.append([(1, bytes(2000))]) for _ in range(2)] == [1, 2]
    with pytest.raises(Exhausted, match="bytes wait for the disk") as caught:
        journal.append([(1, bytes(2000))])
    assert caught.value.retryable
    await journal.wait_durable(2)
    assert await journal.commit([(1, bytes(2000))]) == 3
    await journal.close()


async def test_a_closed_journal(world: World, folder: str) -> None:
    journal = await Journal.open(world, f"{folder}/j", format=FORMAT, settings=SMALL)
    await journal.close()
    await journal.close()
    with pytest.raises(WrongState, match="is closed"):
        journal.append([(1, b"")])
    for call in (journal.commit([(1, b"")]), journal.snapshot(b"{}", 0), journal.compact(0), journal.rotate()):
        with pytest.raises(WrongState, match="is closed"):
            await call


async def test_lsns_that_are_none(world: World, folder: str) -> None:
    journal = await Journal.open(world, f"{folder}/j", format=FORMAT, settings=SMALL)
    await journal.commit([(1, b"")])
    for call in (journal.wait_durable(2), journal.snapshot(b"{}", 2), journal.compact(2), journal.compact(-1)):
        with pytest.raises(InvalidArgument, match="lsn"):
            await call
    await journal.close()


@pytest.mark.parametrize(
    "settings",
    [
        JournalSettings(segment_bytes=100),
        JournalSettings(record_bytes_max=0),
        JournalSettings(snapshots_kept=0),
        JournalSettings(archive_age_s_max=-1.0),
        JournalSettings(group_bytes_max=0),
    ],
)
async def test_settings_that_make_no_sense(world: World, folder: str, settings: JournalSettings) -> None:
    with pytest.raises(InvalidArgument, match="want"):
        await Journal.open(world, f"{folder}/j", format=FORMAT, settings=settings)
    with pytest.raises(InvalidArgument, match="printable"):
        await Journal.open(world, f"{folder}/j", format="")
    assert await world.disk.stat(f"{folder}/j") is None
