"""Archives of images: what a docker-archive or an OCI layout, as one uncompressed tar in a file, says it holds.

Two formats. docker-archive: `manifest.json` names a configuration and layer files per image (old form VERSION/layer.tar, equal layers
as links; new form blobs/sha256/HEX). OCI layout: `index.json` leads by digests, maybe through nested indexes, to manifests, configurations
and layers. An archive that is both (docker save since 25) is read as docker-archive, since there the names are the user's own.

Rules: nothing is unpacked here, and names inside the archive are only compared with each other, never used as paths of the host. JSON is
bounded, unknown fields are ignored, and whatever is missing or of a wrong type is named. Digests of JSON files are verified here; those
of layers are handed on to who unpacks them.
Source: OCI image specification 1.1 (image-layout.md, image-index.md, manifest.md); docker image specification 1.2, "combined image JSON".
"""

from collections.abc import Sequence
from posixpath import dirname, normpath
from typing import Final, NamedTuple, TypeVar

import msgspec

from isopod.engine.images.config import CONFIG_BYTES_MAX, ParsedConfig, check_digest, digest_bytes, parse_config
from isopod.engine.images.failures import disk_failures
from isopod.engine.images.names import parse_name
from isopod.engine.images.spool import UPLOAD
from isopod.world.disk import ArchiveMember, Disk, OpenFile
from isopod.world.errors import BadArchive, DigestMismatch, InvalidArgument, Unsupported
from isopod.world.ids import ImageName

N_MEMBERS_MAX: Final = 100_000
N_IMAGES_MAX: Final = 256
JSON_BYTES_MAX: Final = CONFIG_BYTES_MAX
JSON_BYTES_TOTAL_MAX: Final = 64 << 20
_INDEX_DEPTH_MAX: Final = 4
_LINK_HOPS_MAX: Final = 8
_INDEX_TYPES: Final = ("application/vnd.oci.image.index.v1+json", "application/vnd.docker.distribution.manifest.list.v2+json")
_MANIFEST_TYPES: Final = ("application/vnd.oci.image.manifest.v1+json", "application/vnd.docker.distribution.manifest.v2+json")
_CONFIG_TYPES: Final = ("application/vnd.oci.image.config.v1+json", "application/vnd.docker.container.image.v1+json")
_LAYER_TYPES: Final = (
    "application/vnd.oci.image.layer.v1.tar",
    "application/vnd.oci.image.layer.v1.tar+gzip",
    "application/vnd.oci.image.layer.v1.tar+zstd",
    "application/vnd.docker.image.rootfs.diff.tar",
    "application/vnd.docker.image.rootfs.diff.tar.gzip",
    "application/vnd.docker.image.rootfs.diff.tar.zstd",
)
_NAME_ANNOTATIONS: Final = ("io.containerd.image.name", "org.opencontainers.image.ref.name")

T = TypeVar("T")


class LayerSource(NamedTuple):
    """Where in the archive a layer lies, and what it must be."""

    file: str
    """Its name in the archive, for errors."""
    offset: int
    n_bytes: int
    diff_id: str
    blob_digest: str
    """The digest of the bytes as they lie there, "" if the format does not say."""


class ImageSource(NamedTuple):
    """One image of an archive."""

    identifier: str
    config_json: bytes
    config: ParsedConfig
    names: tuple[ImageName, ...]
    layers: tuple[LayerSource, ...]
    """From the bottom up."""


class _DockerImage(msgspec.Struct, frozen=True):
    config: str = msgspec.field(name="Config")
    names: list[str] | None = msgspec.field(name="RepoTags", default=None)
    layers: list[str] | None = msgspec.field(name="Layers", default=None)


class _Platform(msgspec.Struct, frozen=True):
    architecture: str = ""
    os: str = ""


class _Descriptor(msgspec.Struct, frozen=True):
    media_type: str = msgspec.field(name="mediaType")
    digest: str
    size: int
    platform: _Platform | None = None
    annotations: dict[str, str] | None = None


class _Index(msgspec.Struct, frozen=True):
    manifests: list[_Descriptor]


class _Manifest(msgspec.Struct, frozen=True):
    config: _Descriptor
    layers: list[_Descriptor]


class _Layout(msgspec.Struct, frozen=True):
    version: str = msgspec.field(name="imageLayoutVersion")


async def read_archive(disk: Disk, path: str, architecture: str) -> list[ImageSource]:
    """Return the images of an archive that fit this machine.

    Args:
        disk: Where it lies.
        path: The tar, uncompressed.
        architecture: This machine's, by its OCI name.

    Raises:
        BadArchive: It is neither format, or damaged; the message names the file in it.
        DigestMismatch: A JSON file is not what its digest says.
        Unsupported: Another platform, foreign layers, or a media type of the future.
        DiskFull, KernelError: The disk failed.
    """
    with disk_failures("read", path):
        members = await disk.index_archive(path)
        if len(members) > N_MEMBERS_MAX:
            raise BadArchive(UPLOAD, f"holds more than {N_MEMBERS_MAX} files")
        file = await disk.open_read(path)
        try:
            archive = _Archive(file, members)
            if archive.has("manifest.json"):
                images = await _read_docker_archive(archive)
            elif archive.has("index.json"):
                images = await _read_oci_layout(archive, architecture)
            else:
                raise BadArchive(UPLOAD, "holds neither manifest.json (docker-archive) nor index.json (OCI layout)")
        finally:
            file.close()
    for image in images:
        _check_platform(image, architecture)
    return images


class _Archive:
    """The members of an outer tar by their normalised names; the last of equal names counts, as for tar itself."""

    def __init__(self, file: OpenFile, members: Sequence[ArchiveMember]) -> None:
        self._file = file
        self._members = {normpath(member.name): member for member in members}
        self._json_bytes = 0

    def has(self, name: str) -> bool:
        return name in self._members

    def find(self, name: str) -> ArchiveMember:
        """Return the file of that name, links inside the archive followed."""
        spot = normpath(name)
        for _ in range(_LINK_HOPS_MAX):
            member = self._members.get(spot)
            if member is None:
                raise BadArchive(name, "is named, but not in the archive")
            if not member.link_target:
                return member
            # A symlink counts from its own folder, a hard link from the archive's root; the index does not tell them apart.
            beside, below = normpath(f"{dirname(spot)}/{member.link_target}").lstrip("/"), normpath(member.link_target)
            spot = beside if beside in self._members else below
        raise BadArchive(name, "is a chain of links")

    def find_blob(self, descriptor: _Descriptor, file: str) -> ArchiveMember:
        """Return the blob a descriptor in `file` leads to."""
        digest = check_digest(descriptor.digest, file)
        member = self.find(f"blobs/sha256/{digest.removeprefix('sha256:')}")
        if member.n_bytes != descriptor.size:
            raise BadArchive(member.name, f"has {member.n_bytes} bytes, but {file} says {descriptor.size}")
        return member

    async def read(self, member: ArchiveMember) -> bytes:
        """Return a JSON file's bytes, within bounds."""
        self._json_bytes += member.n_bytes
        if member.n_bytes > JSON_BYTES_MAX or self._json_bytes > JSON_BYTES_TOTAL_MAX:
            raise BadArchive(member.name, f"is larger than JSON may be here ({JSON_BYTES_MAX} bytes a file)")
        return await self._file.read_at(member.offset, member.n_bytes)

    async def read_json(self, name: str, kind: type[T]) -> T:
        """Return a JSON file, decoded."""
        return _decode(await self.read(self.find(name)), kind, name)

    async def read_blob(self, descriptor: _Descriptor, file: str) -> bytes:
        """Return a JSON blob, its digest verified."""
        member = self.find_blob(descriptor, file)
        data = await self.read(member)
        _verify(member.name, descriptor.digest, data)
        return data


async def _read_docker_archive(archive: _Archive) -> list[ImageSource]:
    manifest = await archive.read_json("manifest.json", list[_DockerImage])
    if not manifest or len(manifest) > N_IMAGES_MAX:
        raise BadArchive("manifest.json", f"names {len(manifest)} images")
    return [await _read_docker_image(archive, entry) for entry in manifest]


async def _read_docker_image(archive: _Archive, entry: _DockerImage) -> ImageSource:
    config_json = await archive.read(archive.find(entry.config))
    digits = entry.config.rpartition("/")[2].removesuffix(".json")
    if len(digits) == 64:  # named by its digest, as docker does; other tools choose other names
        _verify(entry.config, f"sha256:{digits}", config_json)
    config = parse_config(config_json, entry.config)
    members = [(name, archive.find(name)) for name in entry.layers or []]
    _check_count(len(members), config, "manifest.json")
    layers = [
        LayerSource(name, member.offset, member.n_bytes, diff_id, "")
        for (name, member), diff_id in zip(members, config.diff_ids, strict=True)
    ]
    return ImageSource(digest_bytes(config_json), config_json, config, _parse_names(entry.names or [], "manifest.json"), tuple(layers))


async def _read_oci_layout(archive: _Archive, architecture: str) -> list[ImageSource]:
    layout = await archive.read_json("oci-layout", _Layout)
    if not layout.version.startswith("1."):
        raise Unsupported(f"OCI layout version {layout.version[:20]!r}", "this isopod reads version 1")
    index = await archive.read_json("index.json", _Index)
    if not index.manifests or len(index.manifests) > N_IMAGES_MAX:
        raise BadArchive("index.json", f"names {len(index.manifests)} images")
    fitting = _fitting(index.manifests, architecture)
    return [await _read_oci_image(archive, descriptor, architecture) for descriptor in fitting]


async def _read_oci_image(archive: _Archive, top: _Descriptor, architecture: str) -> ImageSource:
    descriptor, file = await _find_manifest(archive, top, architecture)
    manifest = _decode(await archive.read_blob(descriptor, file), _Manifest, descriptor.digest)
    if manifest.config.media_type not in _CONFIG_TYPES:
        raise Unsupported(f"media type {manifest.config.media_type[:100]!r}", "this is not the configuration of an image")
    config_json = await archive.read_blob(manifest.config, descriptor.digest)
    config = parse_config(config_json, manifest.config.digest)
    _check_count(len(manifest.layers), config, descriptor.digest)
    layers = []
    for layer, diff_id in zip(manifest.layers, config.diff_ids, strict=True):
        if layer.media_type not in _LAYER_TYPES:
            raise Unsupported(f"layer media type {layer.media_type[:100]!r}", "want a tar, plain or compressed by gzip or zstd")
        member = archive.find_blob(layer, descriptor.digest)
        layers.append(LayerSource(member.name, member.offset, member.n_bytes, diff_id, layer.digest))
    return ImageSource(manifest.config.digest, config_json, config, _annotated_names(top), tuple(layers))


async def _find_manifest(archive: _Archive, descriptor: _Descriptor, architecture: str) -> tuple[_Descriptor, str]:
    """Follow nested indexes to this platform's manifest; returns its descriptor and the file that holds it."""
    file = "index.json"
    for _ in range(_INDEX_DEPTH_MAX):
        if descriptor.media_type in _MANIFEST_TYPES:
            return descriptor, file
        if descriptor.media_type not in _INDEX_TYPES:
            raise Unsupported(f"media type {descriptor.media_type[:100]!r}", f"{file} leads to something that is no image")
        index = _decode(await archive.read_blob(descriptor, file), _Index, descriptor.digest)
        file = descriptor.digest
        descriptor = _fitting(index.manifests, architecture)[0]
    raise BadArchive(file, f"more than {_INDEX_DEPTH_MAX} indexes deep")


def _fitting(descriptors: Sequence[_Descriptor], architecture: str) -> list[_Descriptor]:
    """Return those for this platform, or of no platform in particular; at least one."""
    ours = _Platform(architecture=architecture, os="linux")
    fitting = [each for each in descriptors if each.platform in (None, ours)]
    if not fitting:
        others = dict.fromkeys(f"{each.platform.os}/{each.platform.architecture}" for each in descriptors if each.platform)
        raise Unsupported("this image", f"it is for {', '.join(others)[:200] or 'no platform'}, this machine is linux/{architecture}")
    return fitting


def _check_platform(image: ImageSource, architecture: str) -> None:
    system, machine = image.config.operating_system or "linux", image.config.architecture or architecture
    if (system, machine) != ("linux", architecture):
        raise Unsupported("this image", f"it is for {system[:40]}/{machine[:40]}, this machine is linux/{architecture}")


def _check_count(n_layers: int, config: ParsedConfig, file: str) -> None:
    if n_layers != len(config.diff_ids):
        raise BadArchive(file, f"names {n_layers} layers, but the configuration {len(config.diff_ids)}")


def _annotated_names(descriptor: _Descriptor) -> tuple[ImageName, ...]:
    """Return the name an index gives an image. A reference name may be only a tag ("latest"): that names no image."""
    annotations = descriptor.annotations or {}
    for key in _NAME_ANNOTATIONS:
        name = annotations.get(key, "")
        if ":" in name or "/" in name:
            return _parse_names([name], "index.json")
    return ()


def _parse_names(names: Sequence[str], file: str) -> tuple[ImageName, ...]:
    try:
        return tuple(dict.fromkeys(parse_name(name) for name in names))
    except InvalidArgument as error:
        raise BadArchive(file, str(error)) from error


def _verify(file: str, digest: str, data: bytes) -> None:
    found = digest_bytes(data)
    if found != digest:
        raise DigestMismatch(file, digest, found)


def _decode(data: bytes, kind: type[T], file: str) -> T:
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadArchive(file, str(error)) from error
    except RecursionError:
        raise BadArchive(file, "is nested too deeply") from None
