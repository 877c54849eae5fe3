"""User snapshots: written whole or not at all, and used only where they fit."""

import json

import msgspec
import pytest

from isopod.engine.vm.snapshots import META_FILE, Shape, Snapshots
from isopod.world.errors import AlreadyExists, BadRecord, NotFound, RuntimeFailed, Unsupported
from isopod.world.world import World

SHAPE = Shape("qemu", "QEMU 7.2", "digest", "tcg", "microvm", 1, 1 << 20, ("/a", "/b"), 1)


async def written(world: World, folder: str, *names: str) -> Snapshots:
    await world.disk.write(f"{folder}/upper.img", b"disk")
    found = Snapshots(world, f"{folder}/snapshots", "box")

    async def save(part: str) -> None:
        await world.disk.write(f"{part}/state", b"memory")

    for name in names:
        await found.write(name, SHAPE, upper=f"{folder}/upper.img", save=save)
    return found


@pytest.mark.row("V6")
@pytest.mark.host
async def test_there_and_back(host_world: World, folder: str) -> None:
    snapshots = await written(host_world, folder, "one", "two")
    assert [each.name for each in await snapshots.list()] == ["two", "one"]
    assert (await snapshots.list())[0].disk_bytes > 0
    await host_world.disk.write(f"{folder}/upper.img", b"changed since")
    await snapshots.check("one", SHAPE)
    await snapshots.restore_disk("one", f"{folder}/upper.img")
    assert await host_world.disk.read(f"{folder}/upper.img") == b"disk"
    await snapshots.remove("one")
    assert [each.name for each in await snapshots.list()] == ["two"]
    with pytest.raises(NotFound):
        await snapshots.check("one", SHAPE)
    with pytest.raises(NotFound):
        await snapshots.remove("one")


@pytest.mark.row("V6")
@pytest.mark.host
@pytest.mark.parametrize(
    "change",
    [{"vmm": "QEMU 9"}, {"guest": "other"}, {"vcpus": 2}, {"memory_bytes": 2}, {"accelerator": "kvm"}, {"disks": ("/a",)}, {"n_nics": 0}],
    ids=lambda change: next(iter(change)),
)
async def test_one_that_does_not_fit(host_world: World, folder: str, change: dict[str, object]) -> None:
    snapshots = await written(host_world, folder, "one")
    with pytest.raises(Unsupported, match=f"another {next(iter(change))}"):
        await snapshots.check("one", msgspec.structs.replace(SHAPE, **change))


@pytest.mark.row("V6")
@pytest.mark.host
async def test_one_of_another_version_or_damaged(host_world: World, folder: str) -> None:
    snapshots = await written(host_world, folder, "one")
    path = f"{folder}/snapshots/one/{META_FILE}"
    facts = json.loads(await host_world.disk.read(path))
    await host_world.disk.write(path, json.dumps({"version": 2, "shape": "round"}).encode())
    with pytest.raises(Unsupported, match="of version 2"):
        await snapshots.check("one", SHAPE)
    assert await snapshots.list() == []
    for text in (b"{", b"\xff", b"{}"):
        await host_world.disk.write(path, text)
        with pytest.raises(BadRecord):
            await snapshots.check("one", SHAPE)
    await host_world.disk.write(path, json.dumps(facts).encode())
    await snapshots.check("one", SHAPE)
    await host_world.disk.remove(f"{folder}/snapshots/one/upper.img")
    with pytest.raises(BadRecord, match="the disk is missing"):
        await snapshots.check("one", SHAPE)


@pytest.mark.host
async def test_a_name_is_used_once(host_world: World, folder: str) -> None:
    snapshots = await written(host_world, folder, "one")
    with pytest.raises(AlreadyExists):
        await snapshots.write("one", SHAPE, upper=f"{folder}/upper.img", save=lambda _: _nothing())


@pytest.mark.host
async def test_a_failure_leaves_nothing(host_world: World, folder: str) -> None:
    snapshots = await written(host_world, folder)

    async def fail(part: str) -> None:
        await host_world.disk.write(f"{part}/state", b"half")
        raise RuntimeFailed("save", "box", "no")

    with pytest.raises(RuntimeFailed):
        await snapshots.write("one", SHAPE, upper=f"{folder}/upper.img", save=fail)
    with pytest.raises(RuntimeFailed, match="No such file"):
        await snapshots.write("one", SHAPE, upper=f"{folder}/missing.img", save=lambda _: _nothing())
    assert await host_world.disk.list(f"{folder}/snapshots") == []


async def _nothing() -> None:
    """Save nothing."""
