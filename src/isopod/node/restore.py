"""`isopod restore`: a backup of records and networks put in the place of what a stopped node has. On the host only."""

from collections.abc import Mapping

import msgspec

from isopod.engine.backup import BACKUP_BYTES_MAX, Restored, read_backup, restore
from isopod.node.configure import read_configuration
from isopod.node.node import LOCK, owner_of
from isopod.runtime.logger import Logger
from isopod.world.errors import AlreadyServing, NotFound, Unsupported, from_os_error
from isopod.world.host import daemon
from isopod.world.host.loop import new_loop
from isopod.world.host.world import make_host_world
from isopod.world.world import World


def restore_file(path: str, flags: Mapping[str, str], *, force: bool) -> Restored:
    """Restore from a file.

    Args:
        path: The backup, an absolute path.
        flags: The node's settings by flag: where its folders are.
        force: Also if files of containers will be removed because of it.

    Raises:
        NotFound: There is no such file.
        BadRecord, DigestMismatch: It is no backup, of a newer isopod, or damaged; nothing was changed.
        AlreadyServing: The node runs.
        InUse: The backup does not know containers whose files are there, and `force` is not set.
        UnavailableError: The disk failed.
    """
    if not daemon.is_root():
        raise Unsupported("restoring without root", "the node's folders are root's", "run it as root: sudo isopod restore FILE")
    paths = read_configuration(flags, daemon.environment()).config.paths
    loop = new_loop("uvloop")
    world = make_host_world()
    try:
        return loop.run_until_complete(restore_into(world, path, paths, force=force))
    finally:
        world.close()
        loop.close()


async def restore_into(world: World, path: str, paths: Mapping[str, str], *, force: bool) -> Restored:
    """Restore on a World. Raises as `restore_file`."""
    try:
        if await world.disk.stat(path) is None:
            raise NotFound("backup", path, "`isopod backup FILE` makes one")
        contents = read_backup(await world.disk.read(path, n_bytes_max=BACKUP_BYTES_MAX), path)
        await world.disk.make_directory(paths["root"], mode=0o711)
        lock_path = f"{paths['root']}/{LOCK}"
        lock = await world.disk.lock(lock_path, msgspec.json.encode({"pid": world.processes.own_pid()}))
    except OSError as error:
        raise from_os_error(error, "restore from", path) from error
    if lock is None:
        raise AlreadyServing(paths["root"], await owner_of(world.disk, lock_path))
    try:
        return await restore(
            world,
            contents,
            metadata=paths["metadata"],
            networks=paths["networks"],
            containers=paths["containers"],
            force=force,
            logger=Logger(lambda _: None, world.clock),
        )
    finally:
        lock.close()
