"""Layers as tar and index, in both Worlds: written, mounted, seen, refused; nothing is left of what failed."""

import asyncio
import errno
import gzip
import hashlib
import io
import tarfile
from collections.abc import Mapping

import pytest

from isopod.world.disk import Disk, UnpackLimits
from isopod.world.errors import BadArchive, Unsupported
from isopod.world.sim import SimWorld
from isopod.world.world import World

pytestmark = pytest.mark.row("V4")


def tar(entries: Mapping[str, bytes | str | None]) -> bytes:
    """Return a tar of files (bytes), folders (None) and symbolic links (their targets)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, content in entries.items():
            info = tarfile.TarInfo(name)
            if content is None:
                info.type, info.mode = tarfile.DIRTYPE, 0o755
            elif isinstance(content, str):
                info.type, info.linkname = tarfile.SYMTYPE, content
            data = content if isinstance(content, bytes) else b""
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def sha256(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


async def tree(disk: Disk, folder: str) -> list[str]:
    """Return the paths of everything below a folder, sorted."""
    found = []
    for name in await disk.list(folder):
        path = f"{folder}/{name}"
        stat = await disk.stat(path)
        found += [path, *(await tree(disk, path) if stat is not None and stat.is_directory else [])]
    return found


LAYER = tar({"etc": None, "etc/motd": b"hello\n" * 300, "etc/.wh.gone": b"", "link": "etc/motd", "empty": b""})


async def index(world: World, folder: str, blob: bytes) -> str:
    """Write a layer's tar and index; return the index' digest."""
    await world.disk.write(f"{folder}/blob", blob)
    done = await world.disk.index_layer(f"{folder}/blob", f"{folder}/tar", f"{folder}/index")
    assert done.layer[:3] == (sha256(blob), sha256(LAYER), len(blob))
    assert done.layer.n_entries == 5
    for path, n_bytes in ((f"{folder}/tar", done.n_tar_bytes), (f"{folder}/index", done.n_index_bytes)):
        found = await world.disk.stat(path)
        assert found is not None
        assert (found.size_bytes, n_bytes % 512) == (n_bytes, 0)
    assert await world.disk.digest(f"{folder}/index") == done.index_digest
    return done.index_digest


async def test_a_layer_is_mounted_and_seen(world: World, folder: str) -> None:
    digest = await index(world, folder, gzip.compress(LAYER, mtime=0))
    assert await world.disk.read(f"{folder}/tar") == LAYER
    target = f"{folder}/at"
    await world.disk.make_directory(target)
    assert world.kernel.erofs_supported()
    await world.kernel.mount_erofs(target, index=f"{folder}/index", tar=f"{folder}/tar")
    try:
        assert world.kernel.mounts_below(folder) == [target]
        names = [path.removeprefix(target) for path in await tree(world.disk, target)]
        assert names == ["/empty", "/etc", "/etc/gone", "/etc/motd", "/link"]
        assert await world.disk.read(f"{target}/link") == b"hello\n" * 300
        with pytest.raises(OSError, match="Read-only") as caught:
            await world.disk.write(f"{target}/new", b"x")
        assert caught.value.errno == errno.EROFS
        for name in ("upper", "work", "merged", "below/etc"):
            await world.disk.make_directory(f"{folder}/{name}")
        await world.disk.write(f"{folder}/below/etc/gone", b"hidden")
        lowers, merged = [target, f"{folder}/below"], f"{folder}/merged"
        await world.kernel.mount_overlay(merged, lowers=lowers, upper=f"{folder}/upper", work=f"{folder}/work")
        assert await world.disk.list(f"{merged}/etc") == ["motd"]
        await world.disk.write(f"{merged}/etc/motd", b"changed")
        assert await world.disk.read(f"{merged}/link") == b"changed"
        assert await world.disk.read(f"{target}/etc/motd") == b"hello\n" * 300
    finally:
        for path in reversed(world.kernel.mounts_below(folder)):
            await world.kernel.unmount(path)
    assert world.kernel.mounts_below(folder) == []
    for path in ("tar", "index", "blob"):
        await world.disk.remove(f"{folder}/{path}")
    assert await index(world, folder, LAYER) == digest


async def test_refused_layers_leave_nothing(world: World, folder: str) -> None:
    attempts = {
        "climbs": (tar({"../evil": b"x"}), UnpackLimits(), BadArchive),
        "large": (LAYER, UnpackLimits(entry_bytes_max=100), BadArchive),
        "cut": (gzip.compress(LAYER)[:-9], UnpackLimits(), BadArchive),
    }
    for blob, limits, kind in attempts.values():
        await world.disk.write(f"{folder}/blob", blob)
        with pytest.raises(kind):
            await world.disk.index_layer(f"{folder}/blob", f"{folder}/tar", f"{folder}/index", limits=limits)
        assert await world.disk.list(folder) == ["blob"]


@pytest.mark.parametrize("name", ["tar", "index"])
async def test_what_is_there_already_stays(world: World, folder: str, name: str) -> None:
    await world.disk.write(f"{folder}/blob", LAYER)
    await world.disk.write(f"{folder}/{name}", b"mine")
    with pytest.raises(FileExistsError):
        await world.disk.index_layer(f"{folder}/blob", f"{folder}/tar", f"{folder}/index")
    assert await world.disk.list(folder) == ["blob", name]
    assert await world.disk.read(f"{folder}/{name}") == b"mine"


async def test_what_is_no_index_is_not_mounted(world: World, folder: str) -> None:
    await index(world, folder, LAYER)
    await world.disk.write(f"{folder}/nonsense", bytes(4096))
    await world.disk.make_directory(f"{folder}/at")
    for what in ("nonsense", "missing"):
        with pytest.raises(OSError, match=r"argument|directory") as caught:
            await world.kernel.mount_erofs(f"{folder}/at", index=f"{folder}/{what}", tar=f"{folder}/tar")
        assert caught.value.errno == (errno.EINVAL if what == "nonsense" else errno.ENOENT)
    assert world.kernel.mounts_below(folder) == []


async def test_a_withdrawn_caller_leaves_nothing(world: World, folder: str) -> None:
    await world.disk.write(f"{folder}/blob", gzip.compress(tar({f"f{n}": bytes(400_000) for n in range(40)}), compresslevel=1))
    task = asyncio.get_running_loop().create_task(world.disk.index_layer(f"{folder}/blob", f"{folder}/tar", f"{folder}/index"))
    while await world.disk.stat(f"{folder}/tar") is None and not task.done():
        await asyncio.sleep(0.001)
    task.cancel()
    (outcome,) = await asyncio.gather(task, return_exceptions=True)
    left = await world.disk.list(folder)
    assert left == (["blob"] if isinstance(outcome, BaseException) else ["blob", "index", "tar"])


async def test_a_full_disk_leaves_nothing_in_the_simulation(sim_world: SimWorld, folder: str) -> None:
    disk = sim_world.world.disk
    await disk.write(f"{folder}/blob", LAYER)
    for spare in (0, 1000, len(LAYER), len(LAYER) + 100):
        sim_world.disk.capacity_bytes = sim_world.disk.used_bytes + spare
        with pytest.raises(OSError, match="No space") as caught:
            await disk.index_layer(f"{folder}/blob", f"{folder}/tar", f"{folder}/index")
        assert caught.value.errno == errno.ENOSPC
        assert await disk.list(folder) == ["blob"]


@pytest.mark.host
async def test_a_full_disk_leaves_nothing_on_the_host(host_world: World, folder: str) -> None:
    disk, small = host_world.disk, f"{folder}/small"
    await disk.write(f"{folder}/blob", tar({"f": bytes(900_000)}))
    await disk.make_directory(small)
    await host_world.kernel.mount_tmpfs(small, n_bytes=512 << 10)
    try:
        with pytest.raises(OSError, match="No space"):
            await disk.index_layer(f"{folder}/blob", f"{small}/tar", f"{small}/index")
        assert await disk.list(small) == []
    finally:
        await host_world.kernel.unmount(small)


@pytest.mark.host
async def test_what_an_index_cannot_say_is_unsupported(host_world: World, folder: str) -> None:
    await host_world.disk.write(f"{folder}/blob", unaligned_hole())
    with pytest.raises(Unsupported, match="'f'.*multiple of 512"):
        await host_world.disk.index_layer(f"{folder}/blob", f"{folder}/tar", f"{folder}/index")
    assert await host_world.disk.list(folder) == ["blob"]


def unaligned_hole() -> bytes:
    """Return a layer whose one file has a hole that no index can say, as GNU tar never writes it."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        info = tarfile.TarInfo("f")
        info.size = 6
        info.pax_headers = {"GNU.sparse.size": "9000", "GNU.sparse.map": "0,3,8000,3"}
        archive.addfile(info, io.BytesIO(b"abcdef"))
    return buffer.getvalue()


async def test_a_kernel_without_erofs(sim_world: SimWorld, folder: str) -> None:
    world = sim_world.world
    await index(world, folder, LAYER)
    sim_world.kernel.knows_erofs = False
    assert not world.kernel.erofs_supported()
    with pytest.raises(OSError, match="No such device"):
        await world.kernel.mount_erofs(folder, index=f"{folder}/index", tar=f"{folder}/tar")
