"""The host's data files and maps: full disks, what is not a file, direct I/O that a file system refuses, and bare maps."""

import errno
import os
import signal
import socket
import subprocess
import sys
from typing import Final

import pytest

from isopod.world.disk import OpenFlags
from isopod.world.host.files_direct import facts
from isopod.world.world import World
from tests.world.host.enclosed import run_enclosed

BARE: Final = """
import mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDWR)
memory = mmap.mmap(fd, 65536)
os.ftruncate(fd, 10)
memory.find(b"y")
"""


@pytest.mark.host
@pytest.mark.row("S7")
def test_a_full_disk_is_told_by_every_way_of_writing(folder: str) -> None:
    run_enclosed("tests.world.host.full_data_disk", folder)


@pytest.mark.host
@pytest.mark.row("S8")
def test_a_bare_map_of_a_cut_file_would_kill_the_process(folder: str) -> None:
    """What `MappedBytes` is guarded against (tests/world/test_mapped.py has the other half)."""
    with open(f"{folder}/a", "wb") as file:
        file.write(b"x" * 65536)
    done = subprocess.run([sys.executable, "-c", BARE, f"{folder}/a"], capture_output=True, timeout=30, check=False)
    assert done.returncode == -signal.SIGBUS


async def test_what_is_no_file_is_refused_without_waiting(host_world: World, folder: str) -> None:
    os.mkfifo(f"{folder}/fifo")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{folder}/socket")
        for name, flags, numbers in (
            ("fifo", OpenFlags.read_only(), (errno.EINVAL,)),
            ("fifo", OpenFlags.read_write(), (errno.EINVAL,)),
            ("socket", OpenFlags.read_only(), (errno.ENXIO,)),
            (".", OpenFlags.read_only(), (errno.EISDIR,)),
        ):
            with pytest.raises(OSError) as caught:
                await host_world.disk.open_file(f"{folder}/{name}", flags)
            assert caught.value.errno in numbers
        with pytest.raises(OSError) as caught:
            await host_world.disk.map_file(f"{folder}/fifo")
        assert caught.value.errno == errno.EINVAL
        with pytest.raises(OSError) as caught:
            await host_world.disk.copy_file(f"{folder}/fifo", f"{folder}/copy")
        assert caught.value.errno == errno.EINVAL
    assert sorted(os.listdir(folder)) == ["fifo", "socket"]


async def test_a_file_system_without_direct_io_says_so_and_works(host_world: World) -> None:
    """/proc refuses O_DIRECT at the opening."""
    file = await host_world.disk.open_file("/proc/self/status", OpenFlags.read_only(direct=True))
    assert not file.alignment.is_direct
    assert (file.alignment.memory_bytes, file.alignment.offset_bytes) == (1, 1)
    assert "O_DIRECT was refused" in file.alignment.why
    assert (await file.read_at(0, 5)) == b"Name:"
    file.close()


def test_the_facts_of_a_direct_file_are_kept_by_the_kernel(folder: str) -> None:
    try:
        fd = os.open(f"{folder}/a", os.O_RDWR | os.O_CREAT | os.O_DIRECT)
    except OSError as error:
        pytest.skip(f"no O_DIRECT in {folder}: {error.strerror}")
    try:
        found = facts(fd)
        if found.is_direct:
            assert found.offset_bytes in (1, 512, 1024, 2048, 4096)
            assert found.memory_bytes <= 4096
    finally:
        os.close(fd)


async def test_a_copy_of_a_file_that_tells_no_size_is_whole(host_world: World, folder: str) -> None:
    assert await host_world.disk.copy_file("/proc/self/cmdline", f"{folder}/a") > 0
    with open("/proc/self/cmdline", "rb") as file:
        assert await host_world.disk.read(f"{folder}/a") == file.read()
