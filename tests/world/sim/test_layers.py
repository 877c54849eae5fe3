"""Archives in the simulation give the results that the Rust core gives."""

import gzip
import hashlib
import io
import tarfile
from typing import Any

import pytest
import zstandard

from isopod.world.disk import UnpackLimits
from isopod.world.errors import BadArchive
from isopod.world.sim import SimWorld


def entry(name: str, data: bytes = b"", **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, data


def make_tar(*entries: tuple[tarfile.TarInfo, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for info, data in entries:
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


ORDINARY = make_tar(
    entry("bin", type=tarfile.DIRTYPE, mode=0o755),
    entry("bin/tool", b"program", mode=0o4755, uid=3, gid=4),
    entry("bin/link", type=tarfile.SYMTYPE, linkname="tool"),
    entry("bin/hard", type=tarfile.LNKTYPE, linkname="bin/tool"),
    entry("etc/.wh.gone"),
    entry("opt/.wh..wh..opq"),
    entry("dev/null", type=tarfile.CHRTYPE, devmajor=1, devminor=3),
)


@pytest.mark.parametrize("wrap", [bytes, gzip.compress, zstandard.compress], ids=["plain", "gzip", "zstd"])
async def test_a_layer_unpacks_in_overlay_form(sim_world: SimWorld, wrap: Any) -> None:
    disk, view = sim_world.world.disk, sim_world.machine.view
    blob = wrap(ORDINARY)
    await disk.write("/home/layer", blob)
    seen: list[int] = []
    unpacked = await disk.unpack_layer("/home/layer", "/home/out", progress=seen.append)
    assert unpacked.diff_id == "sha256:" + hashlib.sha256(ORDINARY).hexdigest()
    assert unpacked.blob_digest == "sha256:" + hashlib.sha256(blob).hexdigest()
    assert (unpacked.n_blob_bytes, unpacked.n_unpacked_bytes, unpacked.n_entries) == (len(blob), 7, 7)
    assert seen[-1] == len(blob)
    tool = view.node("/home/out/bin/tool").inode
    assert (bytes(tool.data), tool.mode, tool.uid, tool.gid, tool.n_links) == (b"program", 0o4755, 3, 4, 2)
    assert view.node("/home/out/bin/hard").inode is tool
    assert view.node("/home/out/etc/gone", follow=False).inode.is_whiteout
    assert view.node("/home/out/opt").inode.is_opaque


async def test_packing_and_unpacking_are_inverse(sim_world: SimWorld) -> None:
    disk = sim_world.world.disk
    await disk.write("/home/layer", ORDINARY)
    await disk.unpack_layer("/home/layer", "/home/one")
    first = await disk.pack_layer("/home/one", "/home/one.tar")
    await disk.unpack_layer("/home/one.tar", "/home/two")
    second = await disk.pack_layer("/home/two", "/home/two.tar")
    assert first == second
    assert await disk.digest("/home/one.tar") == first.diff_id


@pytest.mark.parametrize(
    "bad, name",
    [
        (entry("../evil", b"x"), "../evil"),
        (entry("a/../../evil", b"x"), "a/../../evil"),
        (entry("/etc/evil", b"x"), "/etc/evil"),
        (entry("hard", type=tarfile.LNKTYPE, linkname="../evil"), "../evil"),
        (entry("hard", type=tarfile.LNKTYPE, linkname="absent"), "hard"),
        (entry("big", b"x" * 101), "big"),
        (entry("bin/tool/below", b"x"), "bin/tool/below"),
    ],
)
async def test_a_hostile_entry_is_named_and_nothing_is_left(sim_world: SimWorld, bad: tuple[tarfile.TarInfo, bytes], name: str) -> None:
    disk = sim_world.world.disk
    await disk.write("/home/layer", make_tar(entry("bin/tool", b"fine"), bad))
    with pytest.raises(BadArchive) as refused:
        await disk.unpack_layer("/home/layer", "/home/out", limits=UnpackLimits(entry_bytes_max=100))
    assert refused.value.entry == name
    assert await disk.stat("/home/out") is None


@pytest.mark.parametrize("blob", [b"not a tar", gzip.compress(ORDINARY)[:-20], zstandard.compress(ORDINARY)[:-9], ORDINARY[:700]])
async def test_damage_is_refused(sim_world: SimWorld, blob: bytes) -> None:
    disk = sim_world.world.disk
    await disk.write("/home/layer", blob)
    with pytest.raises(BadArchive):
        await disk.unpack_layer("/home/layer", "/home/out")
    assert await disk.stat("/home/out") is None


async def test_a_bomb_is_refused(sim_world: SimWorld) -> None:
    disk = sim_world.world.disk
    await disk.write("/home/layer", gzip.compress(make_tar(entry("zeros", bytes(1 << 20)))))
    with pytest.raises(BadArchive, match="more than allowed"):
        await disk.unpack_layer("/home/layer", "/home/out", limits=UnpackLimits(unpacked_bytes_max=1 << 19))


async def test_an_outer_archive_is_listed_with_offsets(sim_world: SimWorld) -> None:
    disk = sim_world.world.disk
    tar = make_tar(entry("manifest.json", b"[]"), entry("a/layer.tar", type=tarfile.SYMTYPE, linkname="../b/layer.tar"))
    await disk.write("/home/outer", tar)
    first, second = await disk.index_archive("/home/outer")
    assert (first.name, tar[first.offset : first.offset + first.n_bytes], first.link_target) == ("manifest.json", b"[]", "")
    assert (second.name, second.link_target) == ("a/layer.tar", "../b/layer.tar")


async def test_a_full_disk_leaves_no_half_layer(sim_world: SimWorld) -> None:
    disk = sim_world.world.disk
    await disk.write("/home/layer", make_tar(entry("a", bytes(1000)), entry("b", bytes(1000))))
    sim_world.disk.capacity_bytes = sim_world.disk.used_bytes + 1500
    with pytest.raises(OSError):
        await disk.unpack_layer("/home/layer", "/home/out")
    assert await disk.stat("/home/out") is None
    assert await disk.free_bytes("/home") == 1500


async def test_what_was_unpacked_is_durable_once_its_name_is(sim_world: SimWorld) -> None:
    disk = sim_world.world.disk
    await disk.write_atomic("/home/layer", ORDINARY)
    await disk.unpack_layer("/home/layer", "/home/unnamed")
    sim_world.disk.crash()
    assert await disk.list("/home") == ["layer"]
    await disk.unpack_layer("/home/layer", "/home/named")
    await disk.sync_directory("/home")
    sim_world.disk.crash()
    assert await disk.list("/home/named/bin") == ["hard", "link", "tool"]
    assert await disk.read("/home/named/bin/tool") == b"program"
