"""Disks: what a virtual machine's block devices are made of.

Layers come from the image store as they are. What the guest writes goes to one more disk, an empty ext4 on a sparse file in the machine's
durable folder: made once, kept from start to start. Its tables are not written at its making (measured: 4 ms and 150 KB for 10 GiB,
which is cheaper than copying a prepared one), and the kernel finds them marked as zeroed, so that it does not write them later either.
Source: mke2fs(8), ext4(5).
"""

from collections.abc import Sequence
from typing import Final

from isopod.engine.images.layers import LayerDisk
from isopod.engine.vm.machine import Disk
from isopod.world.disk import OpenFlags
from isopod.world.errors import RuntimeFailed, ToolMissing, from_os_error
from isopod.world.world import World

UPPER_SERIAL: Final = "upper"
MAKE_TIMEOUT_S: Final = 60.0
COPY_TIMEOUT_S: Final = 600.0
_MAKER: Final = "mke2fs"
_COPIER: Final = "cp"
_OPTIONS: Final = (
    *("-q", "-F", "-t", "ext4", "-m", "0", "-L", "isopod", "-O", "^resize_inode,sparse_super2", "-J", "size=8"),
    *("-E", "lazy_itable_init=1,lazy_journal_init=1,packed_meta_blocks=1"),
)


async def make_upper(world: World, path: str, n_bytes: int) -> None:
    """Make the disk that takes what a guest writes, unless it is there.

    Args:
        world: Where.
        path: Its file, in a folder that exists.
        n_bytes: Its size.

    Raises:
        ToolMissing, RuntimeFailed, UnavailableError: As they say; there is nothing at `path` then.
    """
    try:
        if await world.disk.stat(path) is not None:
            return
        part = f"{path}.part"
        await world.disk.remove(part)
        file = await world.disk.open_file(part, OpenFlags.create_new())
        try:
            await file.truncate(n_bytes)
        finally:
            file.close()
        await _format(world, part)
        await world.disk.rename(part, path)
    except OSError as error:
        raise from_os_error(error, "make", path) from error


async def copy_sparse(world: World, source: str, target: str, *, durable: bool = True) -> None:
    """Copy a disk's file with its holes.

    Args:
        world: Where.
        source: The file, which nobody writes meanwhile.
        target: The new one; on a failure it is removed.
        durable: Whether it outlives a crash of the host, its name excepted.

    Raises:
        ToolMissing, RuntimeFailed, UnavailableError: As they say.
    """
    program = world.processes.which(_COPIER)
    if program is None:
        raise ToolMissing(_COPIER, "coreutils")
    try:
        done = await world.processes.run([program, "--sparse=always", "--reflink=auto", "--", source, target], timeout_s=COPY_TIMEOUT_S)
        if done.returncode == 0:
            if durable:
                await _sync(world, target)
            return
        await world.disk.remove(target)
    except BaseException as error:
        await world.disk.remove(target)
        if isinstance(error, OSError):
            raise from_os_error(error, "copy", source) from error
        raise
    raise RuntimeFailed("copy", source, " ".join(done.stderr.decode(errors="replace").split())[:300])


def as_disks(layers: Sequence[LayerDisk], upper: str) -> tuple[Disk, ...]:
    """Return a machine's disks.

    Args:
        layers: The image's, top first.
        upper: The disk that is written to.
    """
    disks = []
    for number, layer in enumerate(layers):
        disks.append(Disk(layer.index, f"l{number}i", read_only=True))
        if layer.tar is not None:
            disks.append(Disk(layer.tar, f"l{number}t", read_only=True))
    return (*disks, Disk(upper, UPPER_SERIAL, read_only=False))


def layer_serials(disks: Sequence[Disk]) -> list[list[str | None]]:
    """Return the pairs of serials by which a guest is told of its layers, top first."""
    serials = [disk.serial for disk in disks]
    indexes = [serial for serial in serials if serial.endswith("i") and serial != UPPER_SERIAL]
    return [[serial, f"{serial[:-1]}t" if f"{serial[:-1]}t" in serials else None] for serial in indexes]


async def _sync(world: World, path: str) -> None:
    file = await world.disk.open_file(path, OpenFlags.read_write())
    try:
        await file.sync()
    finally:
        file.close()


async def _format(world: World, path: str) -> None:
    program = world.processes.which(_MAKER)
    if program is None:
        raise ToolMissing(_MAKER, "e2fsprogs")
    done = await world.processes.run([program, *_OPTIONS, path], timeout_s=MAKE_TIMEOUT_S)
    if done.returncode != 0:
        await world.disk.remove(path)
        raise RuntimeFailed("format", path, " ".join(done.stderr.decode(errors="replace").split())[:300] or "mke2fs gave no reason")
