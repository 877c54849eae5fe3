"""A full disk under data files, as a program that runs enclosed: a small memory file system is filled by each way of writing."""

import errno
import os
import sys
from collections.abc import Awaitable

from isopod.world.disk import OpenFlags
from isopod.world.host.disk import HostDisk
from isopod.world.host.loop import new_loop
from isopod.world.host.workers import Workers
from isopod.world.host.world import make_host_world
from isopod.world.world import World


async def refused(work: Awaitable[object]) -> None:
    """Expect ENOSPC."""
    try:
        await work
    except OSError as error:
        assert error.errno == errno.ENOSPC, error
    else:
        raise AssertionError("more was written than fits")


async def every_way_of_writing_says_so(world: World, disk: HostDisk, folder: str) -> None:
    """ENOSPC from each, the file stays readable, and what failed gives its space back."""
    await world.kernel.mount_tmpfs(folder, n_bytes=1 << 20)
    file = await disk.open_file(f"{folder}/a", OpenFlags.create_new())
    await file.write_at(0, b"x" * 4096)
    await refused(file.allocate(0, 2 << 20))
    assert file.size_bytes() == 4096
    await refused(file.write_at(4096, bytes(2 << 20)))
    await refused(file.write_many([(2 << 20, b"y" * 4096), (3 << 20, bytes(1 << 20))]))
    assert await file.read_at(0, 4096) == b"x" * 4096
    await file.truncate(700 << 10)
    await file.allocate(0, 700 << 10)
    await refused(disk.copy_file(f"{folder}/a", f"{folder}/b"))
    assert os.listdir(folder) == ["a"]
    await file.truncate(0)
    await file.write_at(0, bytes(900 << 10))
    assert disk.io_statistics().n_in_flight == 0
    file.close()
    await world.kernel.unmount(folder)


def main(folder: str) -> None:
    """Run it with each back end."""
    loop = new_loop("uvloop")
    world = make_host_world()
    for choice in ("threads", "io_uring"):
        workers = Workers()
        disk = HostDisk(workers, choice)
        loop.run_until_complete(every_way_of_writing_says_so(world, disk, folder))
        disk.close()
        workers.close()
    world.close()
    loop.close()


if __name__ == "__main__":
    main(sys.argv[1])
