"""Small image archives in memory: layers from dicts, docker-archives (both forms) and OCI layouts from layers, and hostile variants."""

import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, NamedTuple

import zstandard

from isopod.engine.images.store import ImageStore, LayerForm, StoreOptions
from isopod.runtime.logger import Logger
from isopod.world.disk import Disk, UnpackLimits
from isopod.world.world import World

Json = dict[str, Any]

CONFIG_TYPE = "application/vnd.oci.image.config.v1+json"
MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
INDEX_TYPE = "application/vnd.oci.image.index.v1+json"
LAYER_TYPE = "application/vnd.oci.image.layer.v1.tar"
NAME = "io.containerd.image.name"
REF_NAME = "org.opencontainers.image.ref.name"


class Chosen:
    """How `open_store` lets layers be kept; set by the fixture `form`."""

    form: LayerForm = "directory"


chosen = Chosen()


async def open_store(world: World, folder: str, lines: list[bytes] | None = None, *, limits: UnpackLimits | None = None) -> ImageStore:
    """Open the store of a folder."""
    logger = Logger((lines if lines is not None else []).append, world.clock)
    options = StoreOptions(limits or UnpackLimits(), mounts=f"{folder}/mounts", form=chosen.form)
    return await ImageStore.open(world, f"{folder}/images", logger=logger, options=options)


def layer_paths(folder: str, diff_id: str, form: LayerForm | None = None) -> list[str]:
    """Return what a stored layer consists of, without its record."""
    base = f"{folder}/images/layers/{diff_id.replace(':', '-')}"
    return [base] if (form or chosen.form) == "directory" else [f"{base}.erofs", f"{base}.tar"]


def n_per_layer() -> int:
    """Return how many entries a layer has in the folder of layers."""
    return 2 if chosen.form == "directory" else 3


class ImageSpec(NamedTuple):
    """What an image of an archive is to be: layers are uncompressed tars, from the bottom up."""

    layers: Sequence[bytes]
    names: Sequence[str] = ()
    config: Mapping[str, Any] = {"Cmd": ["/bin/sh"]}
    architecture: str = "amd64"
    os: str = "linux"
    created: str | None = "2024-05-06T07:08:09.123456Z"
    compression: str = "plain"

    def config_json(self) -> bytes:
        document: Json = {
            "architecture": self.architecture,
            "os": self.os,
            "config": dict(self.config),
            "rootfs": {"type": "layers", "diff_ids": [sha256(layer) for layer in self.layers]},
            "history": [{"created_by": f"step {i}"} for i in range(len(self.layers))] + [{"created_by": "ENV", "empty_layer": True}],
        }
        if self.created:
            document["created"] = self.created
        return dump(document)

    @property
    def id(self) -> str:
        return sha256(self.config_json())


def dump(document: object) -> bytes:
    return json.dumps(document).encode() + b"\n"


def sha256(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def tar(entries: Mapping[str, bytes | tarfile.TarInfo | None]) -> bytes:
    """Return a tar of files (bytes), folders (None) and whatever else (a TarInfo)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, content in entries.items():
            info = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            if content is None:
                info.type, info.mode = tarfile.DIRTYPE, 0o755
            data = content if isinstance(content, bytes) else b""
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def link(name: str, target: str, *, hard: bool = False) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = tarfile.LNKTYPE if hard else tarfile.SYMTYPE, target
    return info


def compress(data: bytes, compression: str) -> bytes:
    if compression == "gzip":
        return gzip.compress(data, mtime=0)
    return zstandard.ZstdCompressor().compress(data) if compression == "zstd" else data


def docker_archive(images: Sequence[ImageSpec], *, form: str = "old", extra: Mapping[str, bytes] | None = None) -> bytes:
    """Return a docker-archive: VERSION/layer.tar with equal layers as links ("old"), or blobs/sha256/HEX ("new")."""
    files: dict[str, bytes | tarfile.TarInfo | None] = {}
    manifest = []
    for number, image in enumerate(images):
        config = image.config_json()
        paths = []
        for position, layer in enumerate(image.layers):
            if form == "new":
                paths.append(f"blobs/sha256/{hex_of(layer)}")
                files[paths[-1]] = layer
                continue
            path = f"v{number}-{position}/layer.tar"
            equal = next((name for name, content in files.items() if content == layer), None)
            files[path] = link(path, f"../{equal}") if equal else layer
            paths.append(path)
        config_path = f"blobs/sha256/{hex_of(config)}" if form == "new" else f"{hex_of(config)}.json"
        files[config_path] = config
        manifest.append({"Config": config_path, "RepoTags": list(image.names) or None, "Layers": paths, "Unknown": {"a": 1}})
    files["manifest.json"] = dump(manifest)
    files.update(extra or {})
    return tar(files)


def oci_layout(
    images: Sequence[ImageSpec], *, nested: bool = False, annotation: str = NAME, extra: Mapping[str, bytes] | None = None
) -> bytes:
    """Return an OCI layout. `nested` puts all images as the platforms of one image behind one index."""
    blobs: dict[str, bytes] = {}

    def put(data: bytes, media_type: str, **more: object) -> Json:
        blobs[f"blobs/sha256/{hex_of(data)}"] = data
        return {"mediaType": media_type, "digest": sha256(data), "size": len(data), **more}

    descriptors = []
    for image in images:
        suffix = {"plain": "", "gzip": "+gzip", "zstd": "+zstd"}[image.compression]
        manifest = dump(
            {
                "schemaVersion": 2,
                "mediaType": MANIFEST_TYPE,
                "config": put(image.config_json(), CONFIG_TYPE),
                "layers": [put(compress(layer, image.compression), LAYER_TYPE + suffix) for layer in image.layers],
            }
        )
        if nested:
            descriptors.append(put(manifest, MANIFEST_TYPE, platform={"architecture": image.architecture, "os": image.os}))
        else:
            descriptors += [put(manifest, MANIFEST_TYPE, annotations={annotation: name}) for name in image.names]
            descriptors += [] if image.names else [put(manifest, MANIFEST_TYPE)]
    if nested:
        inner = dump({"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": descriptors})
        descriptors = [put(inner, INDEX_TYPE, annotations={annotation: name}) for name in images[0].names]
    files: dict[str, bytes | tarfile.TarInfo | None] = {
        "oci-layout": dump({"imageLayoutVersion": "1.0.0"}),
        "blobs/sha256": None,
        **blobs,
        "index.json": dump({"schemaVersion": 2, "manifests": descriptors}),
    }
    files.update(extra or {})
    return tar(files)


def hex_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


async def tree(disk: Disk, folder: str) -> list[str]:
    """Return the paths of everything below a folder, sorted."""
    found = []
    for name in await disk.list(folder):
        path = f"{folder}/{name}"
        stat = await disk.stat(path)
        found.append(path)
        if stat is not None and stat.is_directory:
            found += await tree(disk, path)
    return found


async def source(data: bytes, *, step: int = 64 << 10) -> AsyncIterator[bytes]:
    """Yield `data` in pieces of `step` bytes, an empty one in between."""
    for start in range(0, len(data), step):
        yield data[start : start + step]
        yield b""
