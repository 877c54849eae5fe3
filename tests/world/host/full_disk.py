"""A full disk, as a program that runs enclosed: a small memory file system is filled, then written to."""

import errno
import os
import sys

from isopod.world.host.loop import new_loop
from isopod.world.host.world import make_host_world
from isopod.world.world import World


async def atomic_writes_fail_whole(world: World, folder: str) -> None:
    """The old file stays, no other name appears, and the space that the failed write took is free again."""
    disk = world.disk
    await world.kernel.mount_tmpfs(folder, n_bytes=1 << 20)
    await disk.write_atomic(f"{folder}/record", b"old")
    await disk.write(f"{folder}/filler", bytes(512 << 10))
    for _ in range(5):
        free_bytes = await disk.free_bytes(folder)
        try:
            await disk.write_atomic(f"{folder}/record", bytes(800 << 10))
        except OSError as error:
            assert error.errno == errno.ENOSPC
        else:
            raise AssertionError("more was written than fits")
        assert await disk.free_bytes(folder) == free_bytes
        assert sorted(os.listdir(folder)) == ["filler", "record"]
        assert await disk.read(f"{folder}/record") == b"old"
    await world.kernel.unmount(folder)


def main(folder: str) -> None:
    """Run it."""
    world = make_host_world()
    loop = new_loop("uvloop")
    try:
        loop.run_until_complete(atomic_writes_fail_whole(world, folder))
    finally:
        loop.close()
        world.close()


if __name__ == "__main__":
    main(sys.argv[1])
