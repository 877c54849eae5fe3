"""The image store: making, naming, finding, sharing and removing images, on both Worlds."""

import asyncio
import json
from collections.abc import AsyncIterator

import pytest

from isopod.api.messages import Image, ImageConfig, RemovedImage
from isopod.engine.images.store import ImageStore
from isopod.world.errors import BadRecord, InUse, InvalidArgument, NotFound, Unsupported
from isopod.world.world import World
from tests.engine.images.build import ImageSpec, compress, docker_archive, layer_paths, n_per_layer, open_store, sha256, source, tar, tree

pytestmark = pytest.mark.usefixtures("form")

ROOTFS = tar({"bin": None, "bin/sh": b"#!shell", "etc": None, "etc/motd": b"hello\n"})


async def load_one(store: ImageStore, *layers: bytes, names: tuple[str, ...] = (), created: str | None = None) -> Image:
    archive = docker_archive([ImageSpec(layers, names, created=created or "2024-01-01T00:00:00Z")])
    return (await store.load(source(archive)))[0]


async def remove(store: ImageStore, name: str) -> RemovedImage:
    return await store.remove(name, used_by=lambda _: None)


@pytest.mark.row("R32", "R38")
@pytest.mark.parametrize("compression", ["plain", "gzip", "zstd"])
async def test_import_makes_a_one_layer_image(world: World, folder: str, compression: str) -> None:
    store = await open_store(world, folder)

    image = await store.import_rootfs("isopod/busybox", source(compress(ROOTFS, compression), step=1000), command=("/bin/sh",))

    assert image == store.resolve("isopod/busybox") == store.list()[0]
    assert image.names == ("isopod/busybox:latest",)
    assert image.config == ImageConfig(command=("/bin/sh",))
    assert image.created_at_ns == pytest.approx(world.clock.now_ns(), abs=60e9)
    (layer,) = image.layers
    assert layer.diff_id == sha256(ROOTFS)
    assert (layer.n_entries, layer.created_by) == (4, "isopod import")
    assert image.size_bytes == layer.unpacked_bytes >= 13
    (lower,) = await store.layer_folders(image)
    assert await world.disk.read(f"{lower}/etc/motd") == b"hello\n"
    assert await world.disk.list(f"{folder}/images/tmp") == []


async def test_what_was_made_is_there_after_opening_again(world: World, folder: str) -> None:
    store = await open_store(world, folder)
    image = await store.import_rootfs("a:1", source(ROOTFS))
    other = await load_one(store, tar({"x": b"1"}), names=("b:2", "c:3"))
    before = await tree(world.disk, folder)

    again = await open_store(world, folder)

    assert again.list() == store.list() == [image, other]
    assert again.resolve("c:3") == other
    assert await tree(world.disk, folder) == before


async def test_names_ids_and_their_beginnings(world: World, folder: str) -> None:
    store = await open_store(world, folder)
    image = await load_one(store, ROOTFS, names=("busybox:latest", "busybox:1.36"))
    digits = image.id.removeprefix("sha256:")

    for text in ("busybox", "busybox:latest", "busybox:1.36", image.id, digits, digits[:12], f"sha256:{digits[:12]}"):
        assert store.resolve(text) == image
    for text in ("busybox:2", "docker.io/library/busybox", "f" * 64, "sha256:" + "f" * 64, "sha256:zz"):
        with pytest.raises(NotFound, match="no such image") as caught:
            store.resolve(text)
        assert caught.value.hint == "`isopod images` lists what is there"
    with pytest.raises(InvalidArgument):
        store.resolve("Not A Name")


async def test_a_beginning_of_several_ids_is_refused(world: World, folder: str) -> None:
    store = await open_store(world, folder)
    images = [await load_one(store, tar({"n": str(i).encode()})) for i in range(17)]  # by the pigeonhole two begin alike
    first = sorted(image.id.removeprefix("sha256:")[0] for image in images)
    twice = next(digit for digit in first if first.count(digit) > 1)

    with pytest.raises(InvalidArgument, match="images begin so"):
        store.resolve(twice)


async def test_a_name_is_found_before_the_beginning_of_an_id(world: World, folder: str) -> None:
    store = await open_store(world, folder)
    other = await load_one(store, tar({"x": b"1"}))
    named = await store.import_rootfs(other.id.removeprefix("sha256:")[:6], source(ROOTFS))

    assert store.resolve(other.id.removeprefix("sha256:")[:6]) == named
    assert store.resolve(other.id.removeprefix("sha256:")[:7]) == other


async def test_a_name_that_is_taken_moves(world: World, folder: str) -> None:
    store = await open_store(world, folder)
    old = await load_one(store, tar({"x": b"1"}), names=("app:1", "app:2"))
    new = await store.import_rootfs("app:1", source(ROOTFS))

    assert store.resolve("app:1") == new
    assert store.resolve("app:2").id == old.id
    assert store.resolve(old.id).names == ("app:2",)
    await store.import_rootfs("app:2", source(ROOTFS))
    assert store.resolve(old.id).names == ()
    assert (await open_store(world, folder)).list() == store.list()


async def test_newest_first(world: World, folder: str) -> None:
    store = await open_store(world, folder)
    for year in ("2021", "2023", "2022"):
        await load_one(store, tar({"x": year.encode()}), names=(f"y:{year}",), created=f"{year}-01-01T00:00:00Z")

    assert [image.names[0] for image in store.list()] == ["y:2023", "y:2022", "y:2021"]


async def test_loading_an_image_again_only_adds_names(world: World, folder: str) -> None:
    store = await open_store(world, folder)
    first = await load_one(store, ROOTFS, names=("a:1",))

    second = await load_one(store, ROOTFS, names=("b:1",))

    assert second.id == first.id
    assert store.list() == [second]
    assert second.names == ("a:1", "b:1")


async def test_removing_a_name_keeps_the_image_until_the_last(world: World, folder: str) -> None:
    store = await open_store(world, folder)
    empty = await tree(world.disk, folder)
    image = await load_one(store, ROOTFS, names=("a:1", "a:2"))

    with pytest.raises(InUse, match="the names a:1, a:2"):
        await remove(store, image.id)
    assert await remove(store, "a:1") == RemovedImage(untagged="a:1")
    with pytest.raises(NotFound):
        store.resolve("a:1")
    assert await remove(store, "a:2") == RemovedImage(untagged="a:2", deleted=image.id)
    assert store.list() == []
    assert set(await tree(world.disk, folder)) - set(empty) == {f"{folder}/images/index.json"}


async def test_removing_by_id_takes_the_one_name_along(world: World, folder: str) -> None:
    store = await open_store(world, folder)
    named = await load_one(store, ROOTFS, names=("a:1",))
    nameless = await load_one(store, tar({"x": b"1"}))

    assert await remove(store, named.id) == RemovedImage(untagged="a:1", deleted=named.id)
    assert await remove(store, nameless.id.removeprefix("sha256:")[:20]) == RemovedImage(deleted=nameless.id)
    with pytest.raises(NotFound):
        await remove(store, "a:1")


async def test_an_image_that_a_container_needs_stays(world: World, folder: str) -> None:
    store = await open_store(world, folder)
    image = await load_one(store, ROOTFS, names=("a:1", "a:2"))
    users = {image.id: "web"}

    await store.remove("a:1", used_by=users.get)
    with pytest.raises(InUse, match="a:2 is in use by container web") as caught:
        await store.remove("a:2", used_by=users.get)
    assert "isopod rm web" in caught.value.hint
    users.clear()
    await store.remove("a:2", used_by=users.get)
    assert store.list() == []


async def test_an_image_that_is_held_stays(world: World, folder: str) -> None:
    store = await open_store(world, folder)
    image = await load_one(store, ROOTFS, names=("a:1",))

    with store.hold(image.id), store.hold(image.id), pytest.raises(InUse):
        await remove(store, "a:1")
    assert (await remove(store, "a:1")).deleted == image.id
    with pytest.raises(NotFound), store.hold(image.id):
        pass


async def test_an_image_cannot_be_held_while_it_goes(world: World, folder: str) -> None:
    store = await open_store(world, folder)
    image = await load_one(store, ROOTFS, names=("a:1",))
    removing = asyncio.get_running_loop().create_task(remove(store, "a:1"))

    while not removing.done():
        try:
            with store.hold(image.id):
                await asyncio.sleep(0)  # a removal that begins now is refused
        except NotFound:
            break
        except InUse:
            pytest.fail("hold never refuses so")
        await asyncio.sleep(0)

    outcome = (await asyncio.gather(removing, return_exceptions=True))[0]
    assert isinstance(outcome, RemovedImage | InUse)
    assert (image.id in [each.id for each in store.list()]) == isinstance(outcome, InUse)


async def test_equal_layers_are_stored_once_and_go_with_their_last_image(world: World, folder: str) -> None:
    store = await open_store(world, folder)
    base, top_a, top_b = ROOTFS, tar({"a": b"a"}), tar({"b": b"b"})
    a = await load_one(store, base, top_a, names=("a",))
    b = await load_one(store, base, top_b, names=("b",))

    stored = sorted(path for layer in (base, top_a, top_b) for path in layer_paths(folder, sha256(layer)))
    names = await world.disk.list(f"{folder}/images/layers")
    assert [f"{folder}/images/layers/{name}" for name in names if not name.endswith(".json")] == stored
    own, shared = await store.layer_folders(a)
    assert shared == (await store.layer_folders(b))[1]
    await remove(store, "a")
    assert await world.disk.stat(own) is None
    assert [await world.disk.stat(path) for path in layer_paths(folder, sha256(top_a))] == [None] * (n_per_layer() - 1)
    assert await world.disk.read(f"{shared}/etc/motd") == b"hello\n"
    await remove(store, "b")
    assert await world.disk.list(f"{folder}/images/layers") == []


async def test_a_layer_that_stands_twice_in_an_image_is_laid_once(world: World, folder: str) -> None:
    store = await open_store(world, folder)
    x, y = tar({"x": b"x"}), tar({"y": b"y"})

    image = await load_one(store, x, y, x)

    assert [layer.diff_id for layer in image.layers] == [sha256(x), sha256(y), sha256(x)]
    assert [folder.rpartition("-")[2] for folder in (await store.layer_folders(image))] == [sha256(each)[7:] for each in (x, y)]
    assert image.size_bytes == sum(layer.unpacked_bytes for layer in image.layers[:2])


@pytest.mark.row("R9")
async def test_commit_adds_a_layer_with_its_whiteouts(world: World, folder: str) -> None:
    store = await open_store(world, folder)
    base = await store.import_rootfs("base", source(ROOTFS), command=("/bin/sh",))
    changes = f"{folder}/changes.tar"
    await world.disk.write(changes, tar({"etc": None, "etc/new": b"changed", "etc/.wh.motd": b"", "bin": None, "bin/.wh..wh..opq": b""}))
    await world.disk.unpack_layer(changes, f"{folder}/upper")

    image = await store.commit("mine:1", base, f"{folder}/upper", ImageConfig(command=("echo",), env={"A": "1"}))

    assert image == store.resolve("mine:1")
    assert image.config == ImageConfig(command=("echo",), env={"A": "1"})
    assert image.layers[:1] == base.layers
    assert [layer.created_by for layer in image.layers] == ["isopod import", "isopod commit"]
    upper, lower = await store.layer_folders(image)
    assert lower == (await store.layer_folders(base))[0]
    assert await world.disk.read(f"{upper}/etc/new") == b"changed"
    assert await world.disk.list(f"{upper}/etc") == ["motd", "new"]  # the whiteout is an entry of its own
    assert store.resolve("base") == base
    await remove(store, "base")
    assert await world.disk.read(f"{lower}/etc/motd") == b"hello\n"
    assert (await open_store(world, folder)).list() == [image]


async def test_a_commit_of_a_commit_stacks(world: World, folder: str) -> None:
    store = await open_store(world, folder)
    image = await store.import_rootfs("base", source(ROOTFS))
    for number in range(3):
        upper = f"{folder}/upper{number}"
        await world.disk.make_directory(upper, mode=0o755)
        await world.disk.write(f"{upper}/file", str(number).encode())
        image = await store.commit(f"step:{number}", image, upper, image.config)

    contents = [await world.disk.read(f"{path}/file") for path in (await store.layer_folders(image))[:3]]
    assert contents == [b"2", b"1", b"0"]
    assert len(image.layers) == 4


async def test_commit_wants_its_base_and_room_for_a_layer(world: World, folder: str) -> None:
    store = await open_store(world, folder)
    tall = await load_one(store, *[tar({"n": str(i).encode()}) for i in range(127)], names=("tall",))
    gone = await load_one(store, ROOTFS, names=("gone",))
    await remove(store, "gone")

    with pytest.raises(Unsupported, match="more than 127 layers"):
        await store.commit("x", tall, folder, ImageConfig())
    with pytest.raises(NotFound):
        await store.commit("x", gone, folder, ImageConfig())
    with pytest.raises(InvalidArgument):
        await store.commit("No Name", tall, folder, ImageConfig())
    assert [image.names for image in store.list()] == [("tall:latest",)]


async def test_parallel_loads_of_the_same_layers_share_them(world: World, folder: str) -> None:
    store = await open_store(world, folder)
    layers = [tar({f"f{i}": bytes([i]) * 10_000}) for i in range(4)]

    images = await asyncio.gather(*[load_one(store, *layers, tar({"own": str(n).encode()}), names=(f"p:{n}",)) for n in range(5)])

    assert len({image.id for image in images}) == 5
    assert len(await world.disk.list(f"{folder}/images/layers")) == n_per_layer() * (4 + 5)
    for image in images:
        assert await world.disk.read(f"{(await store.layer_folders(image))[-1]}/f0") == bytes(10_000)
    assert await world.disk.list(f"{folder}/images/tmp") == []


async def test_loads_and_removals_of_the_same_layers_do_not_disturb_each_other(world: World, folder: str) -> None:
    store = await open_store(world, folder)
    shared = tar({"shared": b"s" * 5000})

    async def cycle(number: int) -> None:
        for _ in range(4):
            image = await load_one(store, shared, tar({"own": str(number).encode()}), names=(f"c:{number}",))
            with store.hold(image.id):
                assert await world.disk.read(f"{(await store.layer_folders(image))[-1]}/shared") == b"s" * 5000
            await remove(store, f"c:{number}")

    await asyncio.gather(*[cycle(number) for number in range(4)])

    assert store.list() == []
    assert await world.disk.list(f"{folder}/images/layers") == []
    assert await world.disk.list(f"{folder}/images/records") == []


async def test_progress_is_told_to_its_end(world: World, folder: str) -> None:
    store = await open_store(world, folder)
    archive = docker_archive([ImageSpec([ROOTFS, tar({"x": b"x" * 100_000})], ["a:1"])])
    told: list[tuple[int, int, str]] = []

    await store.load(source(archive), progress=lambda done, total, what: told.append((done, total, what)))

    n_layer_bytes = len(ROOTFS) + len(tar({"x": b"x" * 100_000}))
    received = [each for each in told if each[2] == "receive"]
    unpacked = [each for each in told if each[2] == "unpack"]
    assert received + unpacked == told
    assert received[-1] == (len(archive), len(archive), "receive")
    assert unpacked[-1] == (n_layer_bytes, n_layer_bytes, "unpack")
    assert [done for done, _, _ in unpacked] == sorted(done for done, _, _ in unpacked)


async def test_a_source_that_fails_leaves_nothing(world: World, folder: str) -> None:
    store = await open_store(world, folder)
    before = await tree(world.disk, folder)

    class Gone(Exception):
        pass

    async def failing() -> AsyncIterator[bytes]:
        yield ROOTFS[:700]
        raise Gone

    for attempt in (store.import_rootfs("a", failing()), store.load(failing())):
        with pytest.raises(Gone):
            await attempt
    assert await tree(world.disk, folder) == before
    assert store.list() == []


async def test_a_damaged_record_is_set_aside_and_the_others_load(world: World, folder: str) -> None:
    store = await open_store(world, folder)
    bad = await load_one(store, ROOTFS, tar({"b": b"b"}), names=("bad:1",))
    good = await load_one(store, ROOTFS, names=("good:1",))
    path = f"{folder}/images/records/{bad.id[7:]}.json"
    await world.disk.write(path, b'{"image": 5}')
    lines: list[bytes] = []

    again = await open_store(world, folder, lines)

    assert again.list() == [good]
    for text in ("bad:1", bad.id):
        with pytest.raises(BadRecord, match="records/") as caught:
            again.resolve(text)
        assert caught.value.hint == "remove the image, or load it again"
    assert await world.disk.stat(path + ".damaged") is not None
    errors = [json.loads(line) for line in lines if b'"level":"error"' in line]
    assert [line["event"] for line in errors] == ["image.record_damaged"]
    assert path in errors[0]["why"]
    # Its layers are kept: a container may still run from them.
    await remove(again, "good:1")
    for path in [path for layer in bad.layers for path in layer_paths(folder, layer.diff_id)]:
        assert await world.disk.stat(path) is not None
    # Loading it again mends it, and the next start collects again.
    mended = await load_one(again, ROOTFS, tar({"b": b"b"}), names=("bad:1",))
    assert again.resolve("bad:1") == mended == bad
    assert await world.disk.stat(path + ".damaged") is None
    final = await open_store(world, folder)
    await remove(final, "bad:1")
    assert await world.disk.list(f"{folder}/images/layers") == []


@pytest.mark.parametrize("how", ["other config", "other id", "missing", "not json", "bad layer"])
async def test_every_kind_of_damage_is_noticed(world: World, folder: str, how: str) -> None:
    store = await open_store(world, folder)
    image = await load_one(store, ROOTFS, names=("a:1",))
    path = f"{folder}/images/records/{image.id[7:]}.json"
    text = (await world.disk.read(path)).decode()
    if how == "missing":
        await world.disk.remove(path)
    else:
        broken = {
            "other config": text.replace("/bin/sh", "/bin/zz"),
            "other id": text.replace(image.id, "sha256:" + "0" * 64),
            "not json": text[:-5],
            "bad layer": text.replace(image.layers[0].diff_id, "sha256:../../../etc"),
        }[how]
        assert broken != text
        await world.disk.write(path, broken.encode())

    again = await open_store(world, folder)

    assert again.list() == []
    with pytest.raises(BadRecord):
        again.resolve("a:1")


async def test_a_missing_layer_damages_its_images_only(world: World, folder: str) -> None:
    store = await open_store(world, folder)
    await load_one(store, ROOTFS, tar({"b": b"b"}), names=("bad:1",))
    good = await load_one(store, ROOTFS, names=("good:1",))
    for path in layer_paths(folder, sha256(tar({"b": b"b"}))):
        found = await world.disk.stat(path)
        assert found is not None
        await (world.disk.remove_tree(path) if found.is_directory else world.disk.remove(path))

    again = await open_store(world, folder)

    assert again.list() == [good]
    with pytest.raises(BadRecord, match=r"its layer .* is missing"):
        again.resolve("bad:1")


async def test_a_damaged_layer_record_is_set_aside(world: World, folder: str) -> None:
    store = await open_store(world, folder)
    image = await load_one(store, ROOTFS, names=("a:1",))
    record = layer_paths(folder, image.layers[0].diff_id, "directory")[0] + ".json"
    await world.disk.write(record, b"nonsense")

    again = await open_store(world, folder)

    assert again.list() == []
    assert await world.disk.stat(record + ".damaged") is not None
    assert (await load_one(again, ROOTFS, names=("a:1",))).id == image.id
    assert await world.disk.read(f"{(await again.layer_folders(image))[0]}/etc/motd") == b"hello\n"


async def test_a_damaged_image_can_be_removed_and_is_remembered_until_then(world: World, folder: str) -> None:
    store = await open_store(world, folder)
    bad = await load_one(store, tar({"b": b"b"}), names=("bad:1", "bad:2"))
    good = await load_one(store, ROOTFS, names=("good:1",))
    await world.disk.write(f"{folder}/images/records/{bad.id[7:]}.json", b"")
    await open_store(world, folder)
    again = await open_store(world, folder)
    await again.import_rootfs("bad:2", source(ROOTFS))  # writes the index; a name that is taken again is no longer the damaged one's

    again = await open_store(world, folder)
    with pytest.raises(BadRecord):
        again.resolve("bad:1")
    with pytest.raises(InUse, match="container web"):
        await again.remove("bad:1", used_by=lambda _: "web")
    assert await remove(again, "bad:1") == RemovedImage(untagged="bad:1", deleted=bad.id)
    with pytest.raises(NotFound):
        again.resolve("bad:1")
    assert [path for path in await tree(world.disk, folder) if path.endswith(".damaged")] == []
    final = await open_store(world, folder)
    assert final.resolve("good:1") == good
    assert final.resolve("bad:2").layers[0].diff_id == good.layers[0].diff_id
    assert len(await world.disk.list(f"{folder}/images/layers")) == n_per_layer()


async def test_a_damaged_index_costs_the_names_not_the_images(world: World, folder: str) -> None:
    store = await open_store(world, folder)
    image = await load_one(store, ROOTFS, names=("a:1",))
    await world.disk.write(f"{folder}/images/index.json", b"{")

    for _ in range(2):
        again = await open_store(world, folder)
        assert [(each.id, each.names) for each in again.list()] == [(image.id, ())]
    assert await world.disk.read(f"{folder}/images/index.json.damaged") == b"{"


async def test_strangers_in_the_store_are_cleared(world: World, folder: str) -> None:
    store = await open_store(world, folder)
    image = await load_one(store, ROOTFS, names=("a:1",))
    before = await tree(world.disk, folder)
    await world.disk.make_directory(f"{folder}/images/tmp/old/deep")
    await world.disk.write(f"{folder}/images/tmp/old/deep/file", b"x")
    await world.disk.make_directory(f"{folder}/images/layers/sha256-{'9' * 64}/usr")
    await world.disk.write(f"{folder}/images/records/{'8' * 64}.json", b"{}")
    await world.disk.write(f"{folder}/images/records/half.tmp", b"{}")

    again = await open_store(world, folder)

    assert again.list() == [image]
    assert await tree(world.disk, folder) == before
