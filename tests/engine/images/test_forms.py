"""The two forms of layers: chosen by what the machine can, mixed in one store, made of each other, mounted once, checked, cleared."""

import dataclasses
import json
from collections.abc import Iterator

import pytest

from isopod.api.messages import Image
from isopod.engine.images.layers import LayerDisk
from isopod.engine.images.store import ImageStore, LayerForm, StoreOptions
from isopod.runtime.logger import Logger
from isopod.world.errors import BadRecord, Unsupported
from isopod.world.host import mountspace
from isopod.world.sim import SimWorld
from isopod.world.world import World
from tests.engine.images.build import ImageSpec, docker_archive, layer_paths, sha256, source, tar, tree
from tests.engine.images.test_faults import N_CALLS_MAX, Killed, Mortal
from tests.world.test_index_layer import unaligned_hole

pytestmark = [pytest.mark.row("V4", "E15"), pytest.mark.usefixtures("form")]
BASE = tar({"etc": None, "etc/motd": b"hello\n", "bin": None, "bin/sh": b"#!"})
TOP = tar({"etc": None, "etc/.wh.motd": b"", "top": b"top" * 1000})
APP = ImageSpec([BASE, TOP], ["app:1"])
TOOL = ImageSpec([BASE], ["tool:1"])


@pytest.fixture
def form(request: pytest.FixtureRequest, folder: str) -> Iterator[None]:
    """Unmount on the host what a test leaves mounted; each test chooses the form itself."""
    yield
    if "sim" not in request.node.name:
        mountspace.unmount_tree(folder)


async def open_as(
    world: World, folder: str, form: LayerForm = "auto", *, mounts: str | None = None, lines: list[bytes] | None = None
) -> ImageStore:
    logger = Logger((lines if lines is not None else []).append, world.clock)
    options = StoreOptions(mounts=f"{folder}/mounts" if mounts is None else mounts, form=form)
    return await ImageStore.open(world, f"{folder}/images", logger=logger, options=options)


async def load(store: ImageStore, *specs: ImageSpec) -> Image:
    return (await store.load(source(docker_archive(specs))))[0]


async def remove(store: ImageStore, name: str) -> None:
    await store.remove(name, used_by=lambda _: None)


async def check_app(world: World, folder: str, lowers: list[str]) -> None:
    """Lay the image's folders over each other and look at them."""
    for name in ("upper", "work", "merged"):
        await world.disk.make_directory(f"{folder}/check/{name}")
    merged = f"{folder}/check/merged"
    await world.kernel.mount_overlay(merged, lowers=lowers, upper=f"{folder}/check/upper", work=f"{folder}/check/work")
    try:
        assert await world.disk.list(f"{merged}/etc") == []
        assert await world.disk.read(f"{merged}/top") == b"top" * 1000
        assert await world.disk.read(f"{merged}/bin/sh") == b"#!"
    finally:
        await world.kernel.unmount(merged)
        await world.disk.remove_tree(f"{folder}/check")


async def check_disks(world: World, folder: str, disks: tuple[LayerDisk, ...]) -> None:
    """Mount an image's disks as a guest would, and look at them."""
    lowers = []
    for number, disk in enumerate(disks):
        lowers.append(f"{folder}/guest{number}")
        await world.disk.make_directory(lowers[-1])
        await world.kernel.mount_erofs(lowers[-1], index=disk.index, tar=disk.tar)
    try:
        await check_app(world, folder, lowers)
    finally:
        for lower in lowers:
            await world.kernel.unmount(lower)
            await world.disk.remove_tree(lower)


async def test_the_form_is_found_by_trying(world: World, folder: str) -> None:
    store = await open_as(world, folder)

    assert (store.layer_form.value, store.layer_form.why) == ("erofs", "the kernel mounts layers from files, and overlays on them")
    assert world.kernel.mounts_below(folder) == []
    assert await world.disk.list(f"{folder}/images/tmp") == []
    assert (await open_as(world, folder, "directory")).layer_form.value == "directory"
    assert (await open_as(world, folder, mounts="")).layer_form.why == "no folder for mounts was given"


async def test_an_older_kernel_keeps_directories(sim_world: SimWorld, folder: str) -> None:
    sim_world.kernel.knows_erofs = False
    lines: list[bytes] = []

    store = await open_as(sim_world.world, folder, lines=lines)

    opened = [json.loads(line) for line in lines if b"image.store_opened" in line]
    assert [(line["layers"], line["why"]) for line in opened] == [("directory", "the kernel does not know EROFS")]
    await load(store, APP)
    assert await sim_world.world.disk.list(f"{folder}/images/layers/{sha256(TOP).replace(':', '-')}") == ["etc", "top"]
    with pytest.raises(Unsupported, match="the kernel does not know EROFS") as caught:
        await open_as(sim_world.world, folder, "erofs")
    assert caught.value.hint


async def test_a_kernel_that_refuses_to_mount_files_keeps_directories(sim_world: SimWorld, folder: str) -> None:
    sim_world.kernel.fail_next(15)  # ENOTBLK, as before Linux 6.12
    store = await open_as(sim_world.world, folder)
    assert store.layer_form.value == "directory"
    assert "mounts no layers from files here" in store.layer_form.why
    assert await sim_world.world.disk.list(f"{folder}/images/tmp") == []


async def test_forms_are_mixed_in_one_store(world: World, folder: str) -> None:
    tool = await load(await open_as(world, folder, "directory"), TOOL)
    store = await open_as(world, folder)
    app = await load(store, APP)

    top, base = await store.layer_folders(app)

    assert [base] == await store.layer_folders(tool) == layer_paths(folder, sha256(BASE), "directory")
    assert top.startswith(f"{folder}/mounts/")
    assert world.kernel.mounts_below(folder) == [top]
    await check_app(world, folder, [top, base])
    await remove(store, "app:1")
    assert world.kernel.mounts_below(folder) == []
    assert await world.disk.stat(top) is None
    assert await world.disk.read(f"{base}/etc/motd") == b"hello\n"
    assert len(await world.disk.list(f"{folder}/images/layers")) == 2


async def test_a_layer_is_mounted_once_and_found_again(world: World, folder: str) -> None:
    store = await open_as(world, folder)
    await load(store, APP, TOOL)
    assert world.kernel.mounts_below(folder) == []  # not before somebody needs it
    folders = await store.layer_folders(store.resolve("app:1"))
    assert await store.layer_folders(store.resolve("tool:1")) == folders[1:]

    again = await open_as(world, folder)

    assert world.kernel.mounts_below(folder) == sorted(folders)
    assert await again.layer_folders(again.resolve("app:1")) == folders
    assert world.kernel.mounts_below(folder) == sorted(folders)
    await check_app(world, folder, list(folders))
    await remove(again, "app:1")
    assert world.kernel.mounts_below(folder) == folders[1:]
    await again.unmount()
    assert world.kernel.mounts_below(folder) == []
    assert await world.disk.read(f"{(await again.layer_folders(again.resolve('tool:1')))[0]}/etc/motd") == b"hello\n"


async def test_what_is_mounted_for_no_layer_is_unmounted(world: World, folder: str) -> None:
    store = await open_as(world, folder)
    app = await load(store, APP)
    top, base = await store.layer_folders(app)
    for path in (f"{folder}/images/index.json", f"{folder}/images/records/{app.id[7:]}.json"):
        await world.disk.remove(path)
    for path in (f"{folder}/mounts/trial", f"{folder}/mounts/trial-merged"):  # as a killed daemon leaves them
        await world.kernel.mount_tmpfs(path, n_bytes=1 << 20)

    again = await open_as(world, folder)

    assert again.list() == []
    assert world.kernel.mounts_below(folder) == []
    assert await world.disk.list(f"{folder}/images/layers") == []
    assert [await world.disk.stat(path) for path in (top, base)] == [None, None]


async def test_guests_get_the_files_that_containers_use(world: World, folder: str) -> None:
    store = await open_as(world, folder)
    app = await load(store, APP)

    disks = await store.layer_disks(app)

    expected = [layer_paths(folder, sha256(layer), "erofs") for layer in (TOP, BASE)]
    assert [[disk.index, disk.tar] for disk in disks] == expected
    assert await world.disk.read(disks[1].tar or "") == BASE
    await check_disks(world, folder, disks)
    await check_app(world, folder, list(await store.layer_folders(app)))


async def test_files_for_guests_are_made_of_directories(world: World, folder: str) -> None:
    store = await open_as(world, folder, "directory")
    app = await load(store, APP)

    disks = await store.layer_disks(app)

    await check_disks(world, folder, disks)
    assert list(await store.layer_folders(app)) == [layer_paths(folder, sha256(layer), "directory")[0] for layer in (TOP, BASE)]
    before = await tree(world.disk, folder)
    again = await open_as(world, folder, "directory")
    assert await again.layer_disks(app) == disks == await again.layer_disks(app)
    assert await tree(world.disk, folder) == before
    await remove(again, "app:1")
    assert await world.disk.list(f"{folder}/images/layers") == []


async def test_directories_are_made_where_files_cannot_be_mounted(sim_world: SimWorld, folder: str) -> None:
    world = sim_world.world
    app = await load(await open_as(world, folder), APP)
    sim_world.kernel.knows_erofs = False
    store = await open_as(world, folder)

    folders = await store.layer_folders(app)

    assert list(folders) == [layer_paths(folder, sha256(layer), "directory")[0] for layer in (TOP, BASE)]
    await check_app(world, folder, list(folders))
    assert len(await store.layer_disks(app)) == 2
    again = await open_as(world, folder)
    assert await again.layer_folders(app) == folders
    await remove(again, "app:1")
    assert await world.disk.list(f"{folder}/images/layers") == []


@pytest.mark.host
async def test_a_layer_that_no_index_can_say_is_kept_as_a_directory(host_world: World, folder: str) -> None:
    lines: list[bytes] = []
    store = await open_as(host_world, folder, lines=lines)

    image = await load(store, ImageSpec([BASE, unaligned_hole()], ["odd:1"]))

    (line,) = [json.loads(line) for line in lines if b"layer.kept_as_directory" in line]
    assert "multiple of 512" in line["why"]
    top, base = await store.layer_folders(image)
    content = b"abc" + bytes(7997) + b"def" + bytes(997)
    assert (top, host_world.kernel.mounts_below(folder)) == (layer_paths(folder, sha256(unaligned_hole()), "directory")[0], [base])
    assert await host_world.disk.read(f"{top}/f") == content
    # A guest gets it as well: packed anew, its holes lie where an index can say it.
    disk = (await store.layer_disks(image))[0]
    await host_world.disk.make_directory(f"{folder}/at")
    await host_world.kernel.mount_erofs(f"{folder}/at", index=disk.index, tar=disk.tar)
    assert await host_world.disk.read(f"{folder}/at/f") == content


# --- damage -------------------------------------------------------------------------------------------------------------


async def test_a_flipped_byte_in_an_index_is_found_before_it_is_mounted(world: World, folder: str) -> None:
    lines: list[bytes] = []
    app = await load(await open_as(world, folder), APP)
    path = layer_paths(folder, sha256(TOP), "erofs")[0]
    data = bytearray(await world.disk.read(path))
    data[-300] ^= 1
    await world.disk.write(path, bytes(data))
    store = await open_as(world, folder, lines=lines)
    assert store.list() == [app]  # only its length is looked at before it is needed

    for attempt in (store.layer_disks, store.layer_folders):
        with pytest.raises(BadRecord) as caught:
            await attempt(app)
        assert caught.value.hint == "load the image again"

    assert len([line for line in lines if b"layer.damaged" in line]) == 1
    assert world.kernel.mounts_below(folder) == []
    await load(store, APP)
    await check_app(world, folder, list(await store.layer_folders(app)))
    await store.unmount()
    await check_disks(world, folder, await store.layer_disks(app))


@pytest.mark.parametrize("which", [0, 1], ids=["index", "tar"])
@pytest.mark.parametrize("how", ["shorter", "longer", "missing"])
async def test_files_of_another_length_damage_their_images(world: World, folder: str, which: int, how: str) -> None:
    store = await open_as(world, folder)
    app = await load(store, APP, TOOL)
    path = layer_paths(folder, sha256(TOP), "erofs")[which]
    data = await world.disk.read(path)
    await world.disk.remove(path)
    if how != "missing":
        await world.disk.write(path, data[:-512] if how == "shorter" else data + bytes(512))

    again = await open_as(world, folder)

    assert [image.names for image in again.list()] == [("tool:1",)]
    with pytest.raises(BadRecord, match=r"its layer .* is missing"):
        again.resolve("app:1")
    assert (await load(again, APP, TOOL)).id == app.id
    await check_app(world, folder, list(await again.layer_folders(again.resolve("app:1"))))


# --- killed -------------------------------------------------------------------------------------------------------------


async def whole_layers(world: World, folder: str) -> list[str]:
    """Open the store as after a restart; every layer must be whole, and nothing else there. Returns what the layers consist of."""
    store = await open_as(world, folder, "directory")
    assert await world.disk.list(f"{folder}/images/tmp") == []
    names = list(await world.disk.list(f"{folder}/images/layers"))
    for layer in (BASE, TOP):
        base = sha256(layer).replace(":", "-")
        own = [name for name in names if name.startswith(base)]
        assert own in ([base, f"{base}.json"], [base, f"{base}.erofs", f"{base}.json", f"{base}.tar"])
    await check_app(world, folder, list(await store.layer_folders(store.resolve("app:1"))))
    return names


@pytest.mark.parametrize("power", [False, True], ids=["killed", "power-lost"])
async def test_making_files_may_be_broken_off_at_every_step(sim_world: SimWorld, folder: str, *, power: bool) -> None:
    world, lengths = sim_world.world, []
    for n_calls in range(N_CALLS_MAX):
        where, life = f"{folder}/{n_calls}", [1 << 30]
        await load(await open_as(world, where, "directory"), APP)
        store = await open_as(dataclasses.replace(world, disk=Mortal(world.disk, life)), where, "directory")
        life[0] = n_calls
        died = False
        try:
            await store.layer_disks(store.resolve("app:1"))
        except Killed:
            died = True
        if power:
            sim_world.disk.crash()
        lengths.append(len(await whole_layers(world, where)))
        again = await open_as(world, where, "directory")
        await check_disks(world, where, await again.layer_disks(again.resolve("app:1")))
        if not died:
            break
    assert lengths == sorted(lengths)
    assert (lengths[0], lengths[-1]) == (4, 8)
    assert len(lengths) > 10
