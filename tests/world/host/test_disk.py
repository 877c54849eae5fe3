"""The host's disk: full file systems, kills, links that lead outside, archives' errors, cancelled calls."""

import asyncio
import errno
import io
import os
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable

import pytest

from isopod.world.disk import UnpackLimits
from isopod.world.errors import BadArchive
from isopod.world.host import files
from isopod.world.host.inotify import FolderWatch, parse_events
from isopod.world.host.workers import Workers
from isopod.world.world import World
from tests.world.host.enclosed import run_enclosed


@pytest.mark.host
@pytest.mark.row("R38")
def test_a_full_disk_keeps_the_old_file_and_nothing_else(folder: str) -> None:
    run_enclosed("tests.world.host.full_disk", folder)


async def test_a_file_system_that_takes_no_files_is_reported(host_world: World) -> None:
    with pytest.raises(OSError) as caught:
        await host_world.disk.write_atomic("/proc/self/isopod", b"x")
    assert caught.value.errno in (errno.ENOENT, errno.EACCES, errno.EPERM)


async def test_leftovers_of_a_crash_are_not_listed_and_do_not_hold_a_folder(host_world: World, folder: str) -> None:
    os.mkdir(f"{folder}/d")
    await host_world.disk.write(f"{folder}/d/{files.TEMPORARY_PREFIX}0123", b"half")
    assert await host_world.disk.list(f"{folder}/d") == []
    await host_world.disk.remove(f"{folder}/d")
    assert os.listdir(folder) == []


async def test_modes_do_not_depend_on_the_umask(host_world: World, folder: str) -> None:
    old = os.umask(0o077)
    try:
        await host_world.disk.write(f"{folder}/a", b"", mode=0o666)
        await host_world.disk.write_atomic(f"{folder}/b", b"", mode=0o644)
    finally:
        os.umask(old)
    assert [os.stat(f"{folder}/{name}").st_mode & 0o777 for name in "ab"] == [0o666, 0o644]


async def test_a_link_in_a_container_never_leads_out(host_world: World, folder: str) -> None:
    os.makedirs(f"{folder}/root/etc")
    await host_world.disk.write(f"{folder}/secret", b"host")
    await host_world.disk.write(f"{folder}/root/real", b"inside")
    os.symlink("/real", f"{folder}/root/etc/absolute")
    os.symlink("../../../secret", f"{folder}/root/etc/up")
    os.symlink(f"{folder}/secret", f"{folder}/root/etc/host")
    os.symlink("/proc/self/root", f"{folder}/root/magic")
    os.mkfifo(f"{folder}/root/fifo")
    root = f"{folder}/root"
    assert await host_world.disk.read_beneath(root, "etc/absolute") == b"inside"
    for path in ("etc/up", "etc/host", "magic/etc/passwd", "fifo"):
        with pytest.raises(FileNotFoundError):
            await host_world.disk.read_beneath(root, path)


async def test_reading_a_file_whose_size_says_nothing(host_world: World) -> None:
    assert b"Name:" in await host_world.disk.read("/proc/self/status")
    with pytest.raises(OSError) as caught:
        await host_world.disk.read("/proc/self/status", n_bytes_max=10)
    assert caught.value.errno == errno.EFBIG


async def test_a_lock_dies_with_its_holder(host_world: World, folder: str) -> None:
    path = f"{folder}/lock"
    holder = await host_world.processes.spawn([sys.executable, "-c", HOLD, path], env={}, pipes={"HELD": "read"})
    assert await holder.pipes["HELD"].read() == b"held"
    assert await host_world.disk.lock(path, b"ours") is None
    assert host_world.processes.signal(holder.identity, 9)
    await holder.wait()
    held = await host_world.disk.lock(path, b"ours")
    assert held is not None
    held.close()
    holder.pipes["HELD"].close()


HOLD = """
import fcntl, os, signal, sys
fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
fcntl.flock(fd, fcntl.LOCK_EX)
os.write(int(os.environ["HELD"]), b"held")
signal.pause()
"""


async def test_a_layer_is_unpacked_and_digested(host_world: World, folder: str) -> None:
    write_tar(f"{folder}/layer.tar", {"etc/hostname": b"isopod\n"})
    reports: list[int] = []
    done = await host_world.disk.unpack_layer(f"{folder}/layer.tar", f"{folder}/out", progress=reports.append)
    assert await host_world.disk.read(f"{folder}/out/etc/hostname") == b"isopod\n"
    assert done.blob_digest == done.diff_id == await host_world.disk.digest(f"{folder}/layer.tar")
    assert done.n_blob_bytes == os.stat(f"{folder}/layer.tar").st_size
    packed = await host_world.disk.pack_layer(f"{folder}/out", f"{folder}/again.tar")
    assert packed.n_bytes == os.stat(f"{folder}/again.tar").st_size
    assert packed.diff_id == await host_world.disk.digest(f"{folder}/again.tar")


async def test_a_hostile_entry_is_named_and_leaves_nothing(host_world: World, folder: str) -> None:
    write_tar(f"{folder}/layer.tar", {"good": b"x", "../evil": b"x"})
    with pytest.raises(BadArchive) as caught:
        await host_world.disk.unpack_layer(f"{folder}/layer.tar", f"{folder}/out")
    assert caught.value.entry == "../evil"
    assert os.listdir(folder) == ["layer.tar"]


async def test_a_limit_is_kept(host_world: World, folder: str) -> None:
    write_tar(f"{folder}/layer.tar", {"big": bytes(1 << 16)})
    with pytest.raises(BadArchive, match="big"):
        await host_world.disk.unpack_layer(f"{folder}/layer.tar", f"{folder}/out", limits=UnpackLimits(entry_bytes_max=1 << 10))
    assert not os.path.exists(f"{folder}/out")


async def test_members_of_an_outer_tar_are_found(host_world: World, folder: str) -> None:
    write_tar(f"{folder}/outer.tar", {"manifest.json": b"[]", "layer": b"12345"})
    members = await host_world.disk.index_archive(f"{folder}/outer.tar")
    assert [(member.name, member.n_bytes) for member in members] == [("manifest.json", 2), ("layer", 5)]
    reader = await host_world.disk.open_read(f"{folder}/outer.tar")
    assert await reader.read_at(members[1].offset, members[1].n_bytes) == b"12345"
    reader.close()


async def test_a_failed_pack_leaves_no_file(host_world: World, folder: str) -> None:
    with pytest.raises(FileNotFoundError):
        await host_world.disk.pack_layer(f"{folder}/missing", f"{folder}/new.tar")
    assert os.listdir(folder) == []


async def test_closing_during_a_sync_closes_after_it(host_world: World, folder: str) -> None:
    file = await host_world.disk.open_append(f"{folder}/log")
    await file.append(b"x")
    syncing = asyncio.ensure_future(file.sync())
    await asyncio.sleep(0)
    file.close()
    await syncing
    with pytest.raises(ValueError):
        file.size_bytes()


async def test_a_cancelled_call_ends_only_after_its_thread_has() -> None:
    workers = Workers()
    started, go, ended = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        started.set()
        go.wait(10)
        ended.set()

    task = asyncio.ensure_future(workers.quick(work))
    while not started.is_set():
        await asyncio.sleep(0.001)
    for _ in range(3):
        task.cancel()
        await asyncio.sleep(0.01)
        assert not task.done()
    go.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended.is_set()
    workers.close()


async def test_a_cancelled_long_call_is_told_to_stop() -> None:
    workers = Workers()
    n_checks = 0

    def work(check: Callable[[], None]) -> None:
        nonlocal n_checks
        while True:
            n_checks += 1
            check()
            threading.Event().wait(0.001)

    task = asyncio.ensure_future(workers.bulk_abortable(work))
    while n_checks == 0:
        await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    workers.close()


async def test_a_call_that_never_began_is_dropped() -> None:
    workers = Workers()
    go = threading.Event()
    ran: list[int] = []
    blockers = [asyncio.ensure_future(workers.bulk(go.wait, 10)) for _ in range(3)]
    waiting = asyncio.ensure_future(workers.bulk(ran.append, 1))
    await asyncio.sleep(0.01)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    go.set()
    await asyncio.gather(*blockers)
    workers.close()
    assert ran == []


def test_an_overflow_and_the_folder_s_end_say_look_at_everything() -> None:
    def event(mask: int, name: bytes) -> bytes:
        return b"".join(number.to_bytes(4, sys.byteorder) for number in (1, mask, 0, len(name))) + name

    data = event(0x100, b"created\0\0\0") + event(0x4000, b"") + event(0x400, b"") + event(0x8000, b"") + event(0x8, b"x\0")
    assert list(parse_events(data)) == ["created", "", "", "x"]


async def test_too_many_unread_names_become_one(folder: str) -> None:
    watch = FolderWatch(folder, n_names_max=8)
    for index in range(30):
        os.close(os.open(f"{folder}/{index}", os.O_CREAT | os.O_WRONLY))
    assert await asyncio.wait_for(anext(watch), 40) == ""
    watch.close()
    with pytest.raises(StopAsyncIteration):
        while True:
            assert int(await anext(watch)) > 8


def test_the_lean_command_line_can_import_the_package_without_the_rest() -> None:
    loaded = "[name for name in sys.modules if name.startswith('isopod.') or name in ('asyncio', 'uvloop')]"
    program = f"import sys; import isopod.world.host; print({loaded})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env={"PYTHONPATH": "src"}, check=True)
    assert done.stdout.strip() == "['isopod.world', 'isopod.world.host']"


def write_tar(path: str, entries: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, data in entries.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


async def test_a_lock_is_not_taken_through_a_link(host_world: World, folder: str) -> None:
    os.symlink(f"{folder}/precious", f"{folder}/lock")
    with open(f"{folder}/precious", "wb") as file:
        file.write(b"kept")
    with pytest.raises(OSError) as caught:
        await host_world.disk.lock(f"{folder}/lock", b"pid")
    assert caught.value.errno == errno.ELOOP
    assert await host_world.disk.read(f"{folder}/precious") == b"kept"


async def test_a_folder_has_the_mode_asked_for_whatever_the_umask(host_world: World, folder: str) -> None:
    before = os.umask(0o077)
    try:
        await host_world.disk.make_directory(f"{folder}/a/b", mode=0o755)
        await host_world.disk.make_directory(f"{folder}/c", mode=0o3777)
    finally:
        os.umask(before)
    found = [await host_world.disk.stat(f"{folder}/{path}") for path in ("a", "a/b", "c")]
    assert [each.mode for each in found if each is not None] == [0o755, 0o755, 0o3777]


@pytest.mark.host
async def test_stat_tells_the_owner(host_world: World, folder: str) -> None:
    await host_world.disk.write(f"{folder}/a", b"")
    os.chown(f"{folder}/a", 4711, 4712)
    os.symlink("a", f"{folder}/link")
    found = [await host_world.disk.stat(f"{folder}/{name}") for name in ("a", "link")]
    assert [each.uid for each in found if each is not None] == [4711, os.geteuid()]


async def test_a_folder_where_the_kernel_takes_none_is_refused(host_world: World) -> None:
    with pytest.raises(OSError, match="No such file"):
        await host_world.disk.make_directory("/proc/isopod/root")


async def test_opening_beneath_a_root_on_a_real_kernel(host_world: World, folder: str) -> None:
    os.makedirs(f"{folder}/root/sub")
    os.symlink(folder, f"{folder}/root/up")
    os.symlink("sub", f"{folder}/root/inside")
    os.mkfifo(f"{folder}/root/fifo")
    await host_world.disk.write(f"{folder}/root/sub/file", b"x")
    await host_world.disk.write(f"{folder}/file", b"secret")
    n_open = len(os.listdir("/proc/self/fd"))
    refused = [("up/file", errno.ELOOP), ("inside/file", errno.ELOOP), ("inside", errno.ELOOP), ("fifo", errno.EINVAL)]
    for path, number in [*refused, ("sub/../../file", errno.EXDEV)]:
        with pytest.raises(OSError) as caught:
            await host_world.disk.open_file_beneath(f"{folder}/root", path)
        assert caught.value.errno == number, path
    assert len(os.listdir("/proc/self/fd")) == n_open
