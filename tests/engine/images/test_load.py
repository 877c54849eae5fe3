"""Loading archives: both formats in their forms, and every way in which an archive can be wrong."""

import asyncio
import gzip
import io
import json
import tarfile
from collections.abc import Callable, Sequence

import pytest
import zstandard

from isopod.world.disk import UnpackLimits
from isopod.world.errors import BadArchive, CorruptError, DigestMismatch, Unsupported
from isopod.world.world import World
from tests.engine.images import build
from tests.engine.images.build import (
    ImageSpec,
    compress,
    docker_archive,
    dump,
    link,
    n_per_layer,
    oci_layout,
    open_store,
    sha256,
    source,
    tar,
    tree,
)

pytestmark = pytest.mark.usefixtures("form")

BASE = tar({"etc": None, "etc/motd": b"hello\n"})
TOP = tar({"top": b"top" * 1000})
APP = ImageSpec([BASE, TOP], ["app:1", "app:latest"], config={"Cmd": ["/app"], "Env": ["A=1"], "StopSignal": "SIGINT"})
TOOL = ImageSpec([BASE], ["tool:2"])
ENTRY_AT_ROOT = "../../../../isopod-escaped"


def docker_old(images: Sequence[ImageSpec]) -> bytes:
    return docker_archive(images)


def docker_new(images: Sequence[ImageSpec]) -> bytes:
    return docker_archive(images, form="new")


def docker_hybrid(images: Sequence[ImageSpec]) -> bytes:
    """What docker save writes since 25: both formats in one."""
    archive = oci_layout([image._replace(names=[f"docker.io/library/{name}" for name in image.names]) for image in images])
    manifest = [
        {
            "Config": f"blobs/sha256/{image.id[7:]}",
            "RepoTags": image.names,
            "Layers": [f"blobs/sha256/{sha256(layer)[7:]}" for layer in image.layers],
        }
        for image in images
    ]
    end = len(archive.rstrip(b"\0"))
    return archive[: end + -end % 512] + tar({"manifest.json": dump(manifest)})


def oci(images: Sequence[ImageSpec]) -> bytes:
    return oci_layout(images)


def oci_gzip(images: Sequence[ImageSpec]) -> bytes:
    return oci_layout([image._replace(compression="gzip") for image in images])


def oci_zstd(images: Sequence[ImageSpec]) -> bytes:
    return oci_layout([image._replace(compression="zstd") for image in images], annotation=build.REF_NAME)


FORMATS = [docker_old, docker_new, docker_hybrid, oci, oci_gzip, oci_zstd]


@pytest.mark.row("R38")
@pytest.mark.parametrize("make", FORMATS)
async def test_formats(world: World, folder: str, make: Callable[[Sequence[ImageSpec]], bytes]) -> None:
    store = await open_store(world, folder)

    images = await store.load(source(make([APP, TOOL])))

    if make in (oci, oci_gzip, oci_zstd):  # one descriptor per name: an image comes once nevertheless
        assert [image.id for image in images] == [APP.id, TOOL.id]
    app, tool = images
    assert app == store.resolve("app") == store.resolve("app:1") == store.resolve(APP.id)
    assert (app.names, tool.names) == (("app:1", "app:latest"), ("tool:2",))
    assert app.config.command == ("/app",)
    assert app.config.env == {"A": "1"}
    assert app.config.stop_signal == 2
    assert app.created_at_ns == 1_714_979_289_123_456_000
    assert app.architecture == "amd64"
    assert [(layer.diff_id, layer.created_by) for layer in app.layers] == [(sha256(BASE), "step 0"), (sha256(TOP), "step 1")]
    top, base = await store.layer_folders(app)
    assert [base] == (await store.layer_folders(tool))
    assert await world.disk.read(f"{top}/top") == b"top" * 1000
    assert await world.disk.read(f"{base}/etc/motd") == b"hello\n"
    assert await world.disk.list(f"{folder}/images/tmp") == []
    assert len(await world.disk.list(f"{folder}/images/layers")) == 2 * n_per_layer()


@pytest.mark.parametrize("compression", ["plain", "gzip", "zstd"])
@pytest.mark.parametrize("step", [1, 511, 4099, 1 << 30])
async def test_an_archive_comes_in_pieces_of_any_size(world: World, folder: str, compression: str, step: int) -> None:
    store = await open_store(world, folder)
    archive = compress(docker_archive([APP]), compression)

    (image,) = await store.load(source(archive, step=step))

    assert image.id == APP.id


async def test_compressed_streams_may_have_several_members_and_padding(world: World, folder: str) -> None:
    store = await open_store(world, folder)
    archive = docker_archive([APP])
    third = len(archive) // 3
    parts = [archive[:third], archive[third : 2 * third], archive[2 * third :]]

    for whole in (b"".join(map(gzip.compress, parts)), b"".join(map(zstandard.ZstdCompressor().compress, parts))):
        for padding in (b"", bytes(5000)):
            (image,) = await store.load(source(whole + padding, step=1000))
            assert image.id == APP.id
            await store.remove("app:1", used_by=lambda _: None)
            await store.remove("app", used_by=lambda _: None)


async def test_a_large_compressed_archive_is_expanded_in_steps(world: World, folder: str) -> None:
    store = await open_store(world, folder)
    image = ImageSpec([tar({"zeros": bytes(40 << 20), "noise": b"".join(bytes([i & 255, i >> 8 & 255]) for i in range(1 << 20))})], ["z"])

    for compression in ("gzip", "zstd"):
        (loaded,) = await store.load(source(compress(docker_archive([image]), compression)))
        assert loaded.id == image.id
        assert loaded.size_bytes >= 42 << 20


async def test_nested_indexes_lead_to_this_machines_image(world: World, folder: str) -> None:
    store = await open_store(world, folder)
    others = [APP._replace(architecture="arm64"), APP._replace(architecture="unknown", os="unknown")]

    (image,) = await store.load(source(oci_layout([APP, *others], nested=True)))

    assert image.id == APP.id
    assert image.names == ("app:1", "app:latest")


async def test_a_reference_that_is_only_a_tag_names_nothing(world: World, folder: str) -> None:
    store = await open_store(world, folder)

    (image,) = await store.load(source(oci_layout([TOOL._replace(names=["latest"])], annotation=build.REF_NAME)))

    assert image.names == ()
    assert store.resolve(TOOL.id) == image


async def test_links_lead_to_equal_layers_in_both_senses(world: World, folder: str) -> None:
    store = await open_store(world, folder)
    files: dict[str, bytes | tarfile.TarInfo | None] = {
        "a/layer.tar": BASE,
        "b/layer.tar": link("b/layer.tar", "../a/layer.tar"),
        "c/layer.tar": link("c/layer.tar", "a/layer.tar", hard=True),
        "d/layer.tar": link("d/layer.tar", "../b/layer.tar"),
    }
    spec = ImageSpec([BASE] * 4)
    manifest = [{"Config": "c.json", "RepoTags": ["l:1"], "Layers": [f"{x}/layer.tar" for x in "abcd"]}]

    (image,) = await store.load(source(tar({**files, "c.json": spec.config_json(), "manifest.json": dump(manifest)})))

    assert len(image.layers) == 4
    assert len(await store.layer_folders(image)) == 1


async def test_an_image_of_no_layers_loads(world: World, folder: str) -> None:
    store = await open_store(world, folder)

    (image,) = await store.load(source(docker_archive([ImageSpec([], ["scratch:1"])])))

    assert image.layers == ()
    assert (await store.layer_folders(image)) == []


def docker_with(config: bytes | None = None, manifest: object = None, **files: bytes) -> bytes:
    """Return a docker-archive of one layer with parts replaced."""
    spec = ImageSpec([BASE], ["x:1"])
    entry = {"Config": "config.json", "RepoTags": ["x:1"], "Layers": ["layer.tar"]}
    contents: dict[str, bytes | tarfile.TarInfo | None] = {"layer.tar": BASE, "config.json": config or spec.config_json()}
    contents["manifest.json"] = dump([entry] if manifest is None else manifest)
    return tar({**contents, **files})


def layout_with(index: object = None, layout: bytes | None = None, **descriptor: object) -> bytes:
    """Return an OCI layout of one layer with parts of its manifest's descriptor replaced."""
    archive = oci_layout([TOOL])
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        contents = {name: files.extractfile(name).read() for name in files.getnames() if name != "blobs/sha256"}  # type: ignore[union-attr]
    known = json.loads(contents["index.json"])
    known["manifests"][0].update(descriptor)
    contents["index.json"] = dump(known if index is None else index)
    if layout:
        contents["oci-layout"] = layout
    return tar(contents)


def linked_to(target: str) -> bytes:
    """Return a docker-archive whose layer is a link."""
    config = ImageSpec([BASE]).config_json()
    return tar({"config.json": config, "layer.tar": link("layer.tar", target), "manifest.json": dump([ENTRY])})


ENTRY = {"Config": "config.json", "Layers": ["layer.tar"]}
HOSTILE: dict[str, tuple[bytes, type[CorruptError | Unsupported], str]] = {
    "nothing": (b"", BadArchive, "nothing was sent"),
    "no tar": (b"hello" * 1024, BadArchive, "archive entry"),
    "empty tar": (tar({}), BadArchive, "neither manifest.json .* nor index.json"),
    "some tar": (BASE, BadArchive, "neither manifest.json .* nor index.json"),
    "cut gzip": (compress(docker_archive([APP]), "gzip")[:-100], BadArchive, "gzip data is cut off"),
    "cut zstd": (compress(docker_archive([APP]), "zstd")[:-100], BadArchive, "zstd data is cut off"),
    "damaged gzip": (compress(docker_archive([APP]), "gzip")[:-8] + b"checksum", BadArchive, "damaged gzip"),
    "damaged zstd": (compress(docker_archive([APP]), "zstd")[:50] + b"x" * 50, BadArchive, "zstd data"),
    "garbage behind gzip": (compress(docker_archive([APP]), "gzip") + b"garbage", BadArchive, "damaged gzip"),
    "manifest is no JSON": (docker_with(**{"manifest.json": b"{"}), BadArchive, "'manifest.json'"),
    "manifest of another shape": (docker_with(manifest={"Config": 1}), BadArchive, "'manifest.json'"),
    "manifest of no image": (docker_with(manifest=[]), BadArchive, "names 0 images"),
    "deep manifest": (docker_with(**{"manifest.json": b"[" * 60_000}), BadArchive, "'manifest.json'"),
    "too many images": (docker_with(manifest=[ENTRY] * 257), BadArchive, "names 257 images"),
    "huge manifest": (docker_with(**{"manifest.json": b" " * (4 << 20) + b"[]"}), BadArchive, "larger than JSON may be"),
    "config is missing": (docker_with(manifest=[{"Config": "other.json"}]), BadArchive, "'other.json': is named, but not in"),
    "config outside": (docker_with(manifest=[{"Config": "/etc/passwd"}]), BadArchive, "'/etc/passwd': is named, but not in"),
    "layer outside": (docker_with(manifest=[{**ENTRY, "Layers": ["../../etc/passwd"]}]), BadArchive, r"'../../etc/passwd'"),
    "config is no config": (docker_with(config=b"[]"), BadArchive, "'config.json': not an image configuration"),
    "config of another digest": (
        docker_with(manifest=[{**ENTRY, "Config": "f" * 64 + ".json"}], **{"f" * 64 + ".json": b"{}"}),
        DigestMismatch,
        "f" * 64,
    ),
    "too few layers": (docker_with(manifest=[{**ENTRY, "Layers": []}]), BadArchive, "names 0 layers, but the configuration 1"),
    "bad name": (docker_with(manifest=[{**ENTRY, "RepoTags": ["../x"]}]), BadArchive, "image name '../x'"),
    "wrong layer": (docker_with(**{"layer.tar": TOP}), DigestMismatch, "layer layer.tar: want " + sha256(BASE)),
    "layer is no tar": (docker_with(**{"layer.tar": b"x" * 2048}), BadArchive, "archive entry"),
    "chain of links": (
        linked_to("layer.tar"),
        BadArchive,
        "'layer.tar': is a chain of links",
    ),
    "link outside": (
        tar(
            {
                "config.json": ImageSpec([BASE]).config_json(),
                "layer.tar": link("layer.tar", "../../etc/passwd"),
                "manifest.json": dump([ENTRY]),
            }
        ),
        BadArchive,
        "'layer.tar': is named, but not in the archive",
    ),
    "windows": (docker_archive([TOOL._replace(os="windows")]), Unsupported, "windows/amd64, this machine is linux/amd64"),
    "other machine": (docker_archive([TOOL._replace(architecture="arm64")]), Unsupported, "linux/arm64, this machine is linux/amd64"),
    "no such platform": (oci_layout([TOOL._replace(architecture="arm64")], nested=True), Unsupported, "it is for linux/arm64"),
    "layout of the future": (layout_with(layout=dump({"imageLayoutVersion": "2.0.0"})), Unsupported, "version '2.0.0'"),
    "index of no image": (layout_with(index={"manifests": []}), BadArchive, "names 0 images"),
    "index of another shape": (layout_with(index={"manifests": 3}), BadArchive, "'index.json'"),
    "index of a stranger": (layout_with(mediaType="application/zip"), Unsupported, "application/zip"),
    "blob outside": (layout_with(digest="sha256:../../../etc/passwd"), BadArchive, "not a sha256 digest"),
    "blob is missing": (layout_with(digest="sha256:" + "0" * 64), BadArchive, "is named, but not in the archive"),
    "blob of another size": (layout_with(size=1), BadArchive, "but index.json says 1"),
    "another algorithm": (layout_with(digest="sha512:" + "0" * 128), BadArchive, "not a sha256 digest"),
}


@pytest.mark.parametrize("what", HOSTILE)
async def test_what_is_wrong_is_named_and_leaves_nothing(world: World, folder: str, what: str) -> None:
    archive, error, why = HOSTILE[what]
    store = await open_store(world, folder)
    await store.load(source(docker_archive([ImageSpec([tar({"here": b"before"})], ["here:1"])])))
    before, images = await tree(world.disk, folder), store.list()

    with pytest.raises(error, match=why):
        await store.load(source(archive))

    assert await tree(world.disk, folder) == before
    assert store.list() == images


@pytest.mark.parametrize("make", [docker_old, docker_new, oci, oci_gzip, oci_zstd])
async def test_all_or_nothing_when_the_last_layer_is_bad(world: World, folder: str, make: Callable[[Sequence[ImageSpec]], bytes]) -> None:
    store = await open_store(world, folder)
    before = await tree(world.disk, folder)
    evil = ImageSpec([TOP, tar({"a": b"fine", ENTRY_AT_ROOT: b"evil"})], ["evil:1"])

    with pytest.raises(BadArchive, match="isopod-escaped"):
        await store.load(source(make([APP, evil])))

    assert await tree(world.disk, folder) == before
    assert store.list() == []
    assert await world.disk.stat("/isopod-escaped") is None


@pytest.mark.parametrize("part", ["config", "manifest", "layer"])
async def test_a_flipped_bit_in_a_blob_is_noticed(world: World, folder: str, part: str) -> None:
    store = await open_store(world, folder)
    archive = oci_layout([APP])
    marker = {"config": b'"architecture"', "manifest": b'"schemaVersion": 2, "mediaType"', "layer": b"hello\n"}[part]
    assert marker in archive
    flipped = archive.replace(marker, marker[:1] + bytes([marker[1] ^ 1]) + marker[2:], 1)

    with pytest.raises(DigestMismatch, match="found sha256:"):
        await store.load(source(flipped))
    assert store.list() == []
    assert await world.disk.list(f"{folder}/images/layers") == []


async def test_a_blob_that_expands_to_the_right_layer_must_still_be_the_right_blob(world: World, folder: str) -> None:
    store = await open_store(world, folder)
    blob = compress(BASE, "gzip")
    other = blob[:4] + b"\1\2\3\4" + blob[8:]  # another time in the header of gzip
    archive = oci_layout([TOOL._replace(compression="gzip")])

    with pytest.raises(DigestMismatch, match=f"want {sha256(blob)}, found {sha256(other)}"):
        await store.load(source(archive.replace(blob, other)))
    assert await world.disk.list(f"{folder}/images/layers") == []


async def test_a_layer_must_match_its_blob_digest_and_its_diff_id(world: World, folder: str) -> None:
    store = await open_store(world, folder)
    lying = ImageSpec([BASE], ["x:1"], compression="gzip")
    config = json.loads(lying.config_json())
    config["rootfs"]["diff_ids"] = [sha256(TOP)]
    archive = oci_layout([lying])
    old, new = dump(json.loads(lying.config_json())), dump(config)
    # The whole chain of digests is right; only what the configuration says of the layer is not.
    manifest_start = archive.index(b'{"schemaVersion": 2, "mediaType"')
    manifest = archive[manifest_start : archive.index(b"\n", manifest_start) + 1]
    changed = manifest.replace(sha256(old).encode(), sha256(new).encode())
    for before, after in ((old, new), (manifest, changed)):
        assert len(before) == len(after)
        archive = archive.replace(before, after)
        archive = _rename(archive, sha256(before)[7:], sha256(after)[7:])

    with pytest.raises(DigestMismatch, match=f"want {sha256(TOP)}, found {sha256(BASE)}"):
        await store.load(source(archive))


def _rename(archive: bytes, old: str, new: str) -> bytes:
    """Rename a blob, in its header (whose checksum is written again) and in whatever names it."""
    data = bytearray(archive.replace(old.encode(), new.encode()))
    start = data.index(f"blobs/sha256/{new}".encode())
    data[start + 148 : start + 156] = b" " * 8
    data[start + 148 : start + 156] = b"%06o\0 " % sum(data[start : start + 512])
    return bytes(data)


@pytest.mark.parametrize("media_type", ["application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", build.LAYER_TYPE + "+xz"])
async def test_foreign_layers_are_refused(world: World, folder: str, media_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "LAYER_TYPE", media_type)
    store = await open_store(world, folder)

    with pytest.raises(Unsupported, match="layer media type"):
        await store.load(source(oci_layout([TOOL])))
    assert store.list() == []


async def test_an_index_that_leads_in_circles_is_refused(world: World, folder: str) -> None:
    store = await open_store(world, folder)
    blobs: dict[str, bytes] = {}
    inner = {"mediaType": build.INDEX_TYPE, "digest": "sha256:" + "0" * 64, "size": 1}
    for _ in range(5):
        index = dump({"manifests": [inner]})
        blobs[f"blobs/sha256/{sha256(index)[7:]}"] = index
        inner = {"mediaType": build.INDEX_TYPE, "digest": sha256(index), "size": len(index)}

    with pytest.raises(BadArchive, match="more than 4 indexes deep"):
        await store.load(
            source(tar({"oci-layout": dump({"imageLayoutVersion": "1.0.0"}), "index.json": dump({"manifests": [inner]}), **blobs}))
        )


@pytest.mark.parametrize("compression", ["gzip", "zstd"])
async def test_an_outer_bomb_is_refused(world: World, folder: str, compression: str) -> None:
    small = await open_store(world, folder, limits=UnpackLimits(unpacked_bytes_max=3 << 20))
    before = await tree(world.disk, folder)
    bomb = compress(bytes(20 << 20), compression)

    with pytest.raises(BadArchive, match="larger than 3145728 bytes"):
        await small.load(source(bomb))
    with pytest.raises(BadArchive):
        await small.import_rootfs("bomb", source(bomb))
    assert await tree(world.disk, folder) == before


async def test_an_outer_bomb_is_refused_by_its_ratio(world: World, folder: str) -> None:
    store = await open_store(world, folder)
    bomb = compress(bytes(100 << 20), "zstd")

    with pytest.raises(BadArchive, match="expands to more than 1200 times"):
        await store.load(source(bomb))
    assert await world.disk.list(f"{folder}/images/tmp") == []


@pytest.mark.parametrize("name", [ENTRY_AT_ROOT, "/isopod-escaped", "a/../../isopod-escaped"])
async def test_a_hostile_root_file_system_is_refused(world: World, folder: str, name: str) -> None:
    store = await open_store(world, folder)
    before = await tree(world.disk, folder)

    with pytest.raises(BadArchive, match="isopod-escaped") as caught:
        await store.import_rootfs("evil", source(tar({"ok": b"x", name: b"evil"})))

    assert caught.value.entry == name
    assert await tree(world.disk, folder) == before
    assert store.list() == []


async def test_the_names_of_the_outer_archive_are_never_paths(world: World, folder: str) -> None:
    store = await open_store(world, folder)
    spec = ImageSpec([BASE], ["x:1"])
    manifest = [{"Config": "../../c.json", "RepoTags": ["x:1"], "Layers": ["../../l.tar"]}]
    archive = tar({"../../c.json": spec.config_json(), "../../l.tar": BASE, "manifest.json": dump(manifest)})

    await asyncio.gather(store.load(source(archive)), return_exceptions=True)  # taken or refused, but never followed

    assert await world.disk.stat(f"{folder}/c.json") is None
    assert [path for path in await tree(world.disk, folder) if path.endswith(("c.json", "l.tar"))] == []
