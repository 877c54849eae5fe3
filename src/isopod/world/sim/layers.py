"""Layers in memory: what the Rust core does with archives on the host, on simulated inodes.

Same results for ordinary archives (digests, counts, refusals with the entry named), by Python's own tarfile, zlib and zstandard on bytes.
Not the safe unpacker: it never sees a real file system, so a hostile archive can spoil nothing but the simulation.
Source: OCI image specification 1.1, layer.md (whiteouts, opaque folders).
"""

import errno
import hashlib
import io
import os
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, Final

from isopod.world.disk import ArchiveMember, Packed, Unpacked, UnpackLimits
from isopod.world.errors import BadArchive
from isopod.world.sim.inodes import OPAQUE, Inode

zstandard: Any
try:
    import zstandard
except ImportError:  # it is a test's dependency: without it zstd layers are refused
    zstandard = None

_GZIP: Final = b"\x1f\x8b"
_ZSTD: Final = b"\x28\xb5\x2f\xfd"
_WHITEOUT: Final = ".wh."
_OPAQUE_NAME: Final = ".wh..wh..opq"
_ALL: Final = "the archive"
_RATIO_FLOOR_BYTES: Final = 64 << 20


def unpack(blob: bytes, folder: Inode, limits: UnpackLimits) -> Unpacked:
    """Unpack a layer into an empty folder.

    Args:
        blob: The layer, plain or compressed.
        folder: Where to; it is left half filled on failure.
        limits: Bounds on what it may become.

    Raises:
        BadArchive: An entry is unsafe, damaged or over a limit.
    """
    tar = decompress(blob, limits)
    n_entries = n_unpacked = 0
    for entry in _entries(tar):
        n_entries += 1
        n_unpacked += entry.size if entry.isreg() else 0
        if n_entries > limits.n_entries_max:
            raise BadArchive(entry.name, f"more than {limits.n_entries_max} entries")
        if entry.size > limits.entry_bytes_max or n_unpacked > limits.unpacked_bytes_max:
            raise BadArchive(entry.name, "larger than allowed")
        _place(entry, tar, folder, limits)
    return Unpacked(_sha256(blob), _sha256(tar), len(blob), n_unpacked, n_entries)


def pack(folder: Inode, path: str, limits: UnpackLimits) -> tuple[Packed, bytes]:
    """Write a folder in overlayfs form as a layer tar; names sorted, so equal trees give equal bytes.

    Args:
        folder: What to write.
        path: Its name, for errors.
        limits: Bounds on the archive and on one file.

    Raises:
        OSError: EFBIG: over a limit.
    """
    buffer = io.BytesIO()
    n_entries = 0
    names: dict[int, str] = {}
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, inode in _walk(folder, ""):
            entry = _entry_of(name, inode, names)
            if entry.size > limits.entry_bytes_max or archive.offset + tarfile.BLOCKSIZE + entry.size > limits.unpacked_bytes_max:
                raise _too_large(name)
            archive.addfile(entry, io.BytesIO(bytes(inode.data)) if entry.isreg() else None)
            n_entries += 1
            if inode.is_opaque:
                archive.addfile(tarfile.TarInfo(f"{name}/{_OPAQUE_NAME}"))
                n_entries += 1
    data = buffer.getvalue()
    if len(data) > limits.unpacked_bytes_max:
        raise _too_large(path)
    return Packed(_sha256(data), len(data), n_entries), data


def index(tar: bytes) -> Sequence[ArchiveMember]:
    """List the regular files and links of an uncompressed outer tar."""
    members = []
    for entry in _entries(tar):
        if entry.isreg():
            members.append(ArchiveMember(entry.name, entry.offset_data, entry.size, ""))
        elif entry.islnk() or entry.issym():
            members.append(ArchiveMember(entry.name, entry.offset_data, 0, entry.linkname))
    return members


def _too_large(path: str) -> OSError:
    return OSError(errno.EFBIG, os.strerror(errno.EFBIG), path)


def _sha256(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def decompress(blob: bytes, limits: UnpackLimits) -> bytes:
    """Return a layer's tar. Raises BadArchive: damaged, or over a limit."""
    bound = min(limits.unpacked_bytes_max, max(_RATIO_FLOOR_BYTES, len(blob) * limits.ratio_max))
    if blob.startswith(_GZIP):
        return _gunzip(blob, bound)
    if blob.startswith(_ZSTD):
        return _unzstd(blob, bound)
    if len(blob) > limits.unpacked_bytes_max:
        raise BadArchive(_ALL, "larger than allowed")
    return blob


def _gunzip(blob: bytes, bound: int) -> bytes:
    out = bytearray()
    try:
        while blob:
            inflate = zlib.decompressobj(wbits=31)
            out += inflate.decompress(blob, bound + 1 - len(out))
            if len(out) > bound:
                raise BadArchive(_ALL, "decompresses to more than allowed")
            if not inflate.eof:
                raise BadArchive(_ALL, "compressed data is cut off")
            blob = inflate.unused_data.lstrip(b"\0")
    except zlib.error as error:
        raise BadArchive(_ALL, f"damaged gzip data: {error}") from error
    return bytes(out)


def _unzstd(blob: bytes, bound: int) -> bytes:
    if zstandard is None:
        raise BadArchive(_ALL, "zstd data, and Python's zstandard is not installed")
    try:
        with zstandard.ZstdDecompressor().stream_reader(blob, read_across_frames=True) as reader:
            out = reader.read(bound + 1)
    except zstandard.ZstdError as error:
        raise BadArchive(_ALL, f"damaged zstd data: {error}") from error
    if len(out) > bound:
        raise BadArchive(_ALL, "decompresses to more than allowed")
    return bytes(out)


def _entries(tar: bytes) -> Iterator[tarfile.TarInfo]:
    if len(tar) % tarfile.BLOCKSIZE or not tar:
        raise BadArchive(_ALL, "not a tar, or cut off")
    try:
        with tarfile.open(fileobj=io.BytesIO(tar), mode="r:", errorlevel=2) as archive:
            for entry in archive:
                if entry.offset_data + (entry.size if entry.isreg() else 0) > len(tar):
                    raise BadArchive(entry.name, "cut off")
                yield entry
    except tarfile.TarError as error:
        raise BadArchive(_ALL, f"damaged tar: {error}") from error


def _parts(name: str, what: str, limits: UnpackLimits) -> list[str]:
    if name.startswith("/"):
        raise BadArchive(name, f"{what} is absolute")
    if "\0" in name or len(name.encode(errors="surrogateescape")) > limits.path_bytes_max:
        raise BadArchive(name, f"{what} is too long or malformed")
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise BadArchive(name, f"{what} climbs out with '..'")
    return parts


def _place(entry: tarfile.TarInfo, tar: bytes, root: Inode, limits: UnpackLimits) -> None:
    parts = _parts(entry.name, "name", limits)
    if not parts:
        _dress(root, entry)
        return
    folder = _descend(root, parts[:-1], entry.name)
    name = parts[-1]
    if name == _OPAQUE_NAME:
        folder.xattrs[OPAQUE] = b"y"
    elif name.startswith(_WHITEOUT):
        _place_whiteout(folder, name.removeprefix(_WHITEOUT), entry.name)
    elif entry.islnk():
        _place_link(root, folder, entry, limits)
    else:
        _place_new(folder, name, entry, tar)


def _place_whiteout(folder: Inode, hidden: str, full_name: str) -> None:
    if hidden in ("", ".", ".."):
        raise BadArchive(full_name, "whiteout of nothing")
    folder.attach(hidden, folder.file_system.new("device", 0))


def _place_link(root: Inode, folder: Inode, entry: tarfile.TarInfo, limits: UnpackLimits) -> None:
    parts = _parts(entry.linkname, "link target", limits)
    found = _descend(root, parts[:-1], entry.name).names.get(parts[-1]) if parts else None
    if found is None or found.kind == "directory":
        raise BadArchive(entry.name, f"hard link to {entry.linkname!r}, which the archive does not hold")
    name = entry.name.rstrip("/").rpartition("/")[2]
    if folder.names.get(name) is not found:
        folder.attach(name, found)


def _place_new(folder: Inode, name: str, entry: tarfile.TarInfo, tar: bytes) -> None:
    old = folder.names.get(name)
    if entry.isdir():
        inode = old if old is not None and old.kind == "directory" else folder.file_system.new("directory", 0o755)
    elif entry.isreg():
        inode = folder.file_system.new("file", 0o644)
        inode.fill(tar[entry.offset_data : entry.offset_data + entry.size])
    elif entry.issym():
        inode = folder.file_system.new("symlink", 0o777)
        inode.target = entry.linkname
    elif entry.isfifo():
        inode = folder.file_system.new("fifo", 0o644)
    elif entry.ischr() or entry.isblk():
        inode = folder.file_system.new("device", 0o600)
        inode.device = (entry.devmajor, entry.devminor)
    else:
        raise BadArchive(entry.name, f"unknown type {entry.type!r}")
    _dress(inode, entry)
    if inode is not old:
        folder.attach(name, inode)


def _dress(inode: Inode, entry: tarfile.TarInfo) -> None:
    inode.uid, inode.gid = entry.uid, entry.gid
    inode.mode = entry.mode & 0o7777 if inode.kind != "symlink" else 0o777
    inode.modified_at_ns = int(entry.mtime * 1e9)
    for key, value in entry.pax_headers.items():
        if key.startswith("SCHILY.xattr."):
            inode.xattrs[key.removeprefix("SCHILY.xattr.")] = value.encode(errors="surrogateescape")


def _descend(root: Inode, parts: Sequence[str], full_name: str) -> Inode:
    node = root
    for part in parts:
        child = node.names.get(part)
        if child is None:
            child = node.file_system.new("directory", 0o755)
            node.attach(part, child)
        if child.kind != "directory":
            raise BadArchive(full_name, f"{part!r} on the way is no folder")
        node = child
    return node


def _walk(folder: Inode, prefix: str) -> Iterator[tuple[str, Inode]]:
    for name in sorted(folder.names):
        inode = folder.names[name]
        if inode.kind == "socket":
            continue
        path = f"{prefix}{name}"
        yield path, inode
        if inode.kind == "directory":
            yield from _walk(inode, path + "/")


def _entry_of(path: str, inode: Inode, names: dict[int, str]) -> tarfile.TarInfo:
    if inode.is_whiteout:
        folder, slash, name = path.rpartition("/")
        return tarfile.TarInfo(f"{folder}{slash}{_WHITEOUT}{name}")
    entry = tarfile.TarInfo(path)
    entry.uid, entry.gid, entry.mode = inode.uid, inode.gid, inode.mode
    entry.mtime = inode.modified_at_ns // 1_000_000_000
    entry.pax_headers = {
        f"SCHILY.xattr.{key}": value.decode(errors="surrogateescape") for key, value in inode.xattrs.items() if key != OPAQUE
    }
    if inode.number in names and inode.kind == "file":
        entry.type, entry.linkname = tarfile.LNKTYPE, names[inode.number]
        return entry
    names[inode.number] = path
    if inode.kind == "file":
        entry.size = len(inode.data)
    elif inode.kind == "symlink":
        entry.type, entry.linkname = tarfile.SYMTYPE, inode.target
    elif inode.kind == "directory":
        entry.type = tarfile.DIRTYPE
    elif inode.kind == "fifo":
        entry.type = tarfile.FIFOTYPE
    elif inode.kind == "device":
        entry.type = tarfile.CHRTYPE
        entry.devmajor, entry.devminor = inode.device
    else:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), path)
    return entry
