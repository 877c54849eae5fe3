"""What the tests of the core share: tars built in memory, trees compared, and scripts run in namespaces of their own."""

import io
import json
import os
import stat
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

from isopod import _core

SOURCE: Final = str(Path(__file__).resolve().parents[2] / "src")
OPAQUE: Final = "trusted.overlay.opaque"

Form = Literal["directory", "erofs"]
Member = tuple[tarfile.TarInfo, bytes]


class Unpacked(NamedTuple):
    """What `unpack_layer` returns."""

    blob_digest: str
    diff_id: str
    n_blob_bytes: int
    n_unpacked_bytes: int
    n_entries: int


class Indexed(NamedTuple):
    """What `index_layer` returns, flat."""

    layer: Unpacked
    n_tar_bytes: int
    n_index_bytes: int
    index_digest: str


class Chosen:
    """What `unpack` makes; set by the fixture `form`."""

    form: Form = "directory"


chosen: Final = Chosen()


class Limits(NamedTuple):
    """Bounds that no honest archive of these tests meets."""

    unpacked_bytes_max: int = 1 << 30
    n_entries_max: int = 10_000
    entry_bytes_max: int = 1 << 30
    path_bytes_max: int = 4096
    ratio_max: int = 1200


class Facts(NamedTuple):
    """All that is compared of a file."""

    mode: int
    owner: tuple[int, int]
    mtime_ns: int
    contents: bytes
    device: int
    xattrs: tuple[tuple[str, bytes], ...]
    same_as: str
    """The first name of the same file."""


def unpack_file(
    path: Path,
    target: Path,
    *,
    offset: int = 0,
    n_bytes: int | None = None,
    limits: Limits = Limits(),  # noqa: B008 - an immutable tuple
    progress: Callable[[int], None] | None = None,
) -> Unpacked:
    """Unpack a file; in the form "erofs" write its tar and index beside the target, and mount them there."""
    fd = os.open(path, os.O_RDONLY)
    try:
        if chosen.form == "directory":
            return Unpacked(*_core.unpack_layer(fd, str(target), offset, n_bytes, *limits, progress))
        indexed = index_fd(fd, target, offset=offset, n_bytes=n_bytes, limits=limits, progress=progress)
    finally:
        os.close(fd)
    mount(target)
    return indexed.layer


def index_fd(
    fd: int,
    target: Path,
    *,
    offset: int = 0,
    n_bytes: int | None = None,
    limits: Limits = Limits(),  # noqa: B008 - an immutable tuple
    progress: Callable[[int], None] | None = None,
) -> Indexed:
    """Write tar and index of an open layer to TARGET.tar and TARGET.erofs; nothing is left of them on failure."""
    paths = [target.with_name(target.name + suffix) for suffix in (".tar", ".erofs")]
    fds = [os.open(each, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600) for each in paths]
    try:
        layer, (n_tar_bytes, n_index_bytes, digest) = _core.index_layer(fd, fds[0], fds[1], offset, n_bytes, *limits, progress)
        assert (n_tar_bytes, n_index_bytes) == tuple(each.stat().st_size for each in paths)
        assert digest == _core.sha256_file(fds[1])
        return Indexed(Unpacked(*layer), n_tar_bytes, n_index_bytes, digest)
    except BaseException:
        for each in paths:
            each.unlink()
        raise
    finally:
        for each_fd in fds:
            os.close(each_fd)


def mount(target: Path) -> None:
    """Mount TARGET.tar by TARGET.erofs at the new folder TARGET."""
    target.mkdir()
    _core.mount_erofs(str(target), f"{target}.erofs", f"{target}.tar")


def made_at(target: Path) -> list[Path]:
    """Return what `unpack` leaves on the disk."""
    return [target] if chosen.form == "directory" else [target, Path(f"{target}.tar"), Path(f"{target}.erofs")]


def discard(target: Path) -> None:
    """Remove what `unpack` made."""
    if chosen.form == "erofs":
        _core.unmount(str(target), False)
    for path in made_at(target):
        _core.remove_tree(str(path)) if path == target else path.unlink()


def unpack(data: bytes, target: Path, *, limits: Limits = Limits()) -> Unpacked:  # noqa: B008 - an immutable tuple
    """Unpack bytes."""
    blob = target.parent / "blob"
    blob.write_bytes(data)
    try:
        return unpack_file(blob, target, limits=limits)
    finally:
        blob.unlink()


def pack(source: Path, *, n_bytes_max: int = 1 << 40, entry_bytes_max: int = 1 << 40) -> bytes:
    """Return the archive of a folder, after checking what `pack_layer` says about it."""
    path = source.parent / "packed"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    try:
        diff_id, n_bytes, n_entries = _core.pack_layer(str(source), fd, n_bytes_max, entry_bytes_max, None)
        assert diff_id == _core.sha256_file(fd)
    finally:
        os.close(fd)
    data = path.read_bytes()
    path.unlink()
    assert n_bytes == len(data)
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        assert len(archive.getmembers()) == n_entries
    return data


def entry(name: str, kind: bytes = tarfile.REGTYPE, data: bytes = b"", **facts: Any) -> Member:
    """Describe one entry."""
    info = tarfile.TarInfo(name)
    info.type = kind
    info.size = len(data)
    for key, value in facts.items():
        setattr(info, key, value)
    return info, data


def folder(name: str, **facts: Any) -> Member:
    """Describe a folder."""
    return entry(name, tarfile.DIRTYPE, **{"mode": 0o755, **facts})


def symlink(name: str, target: str, **facts: Any) -> Member:
    """Describe a symbolic link."""
    return entry(name, tarfile.SYMTYPE, linkname=target, **facts)


def hard_link(name: str, target: str) -> Member:
    """Describe a hard link."""
    return entry(name, tarfile.LNKTYPE, linkname=target)


def device(name: str, kind: bytes, major: int, minor: int, **facts: Any) -> Member:
    """Describe a device."""
    return entry(name, kind, devmajor=major, devminor=minor, **facts)


def tar(*members: Member, form: int = tarfile.PAX_FORMAT) -> bytes:
    """Build an archive."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as archive:
        for info, data in members:
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def header(name: bytes, kind: bytes = b"0", *, size: bytes = b"00000000000\0", **fields: bytes) -> bytes:
    """Build one header block by hand, its checksum right."""
    places = {"mode": 100, "uid": 108, "gid": 116, "mtime": 136, "link": 157, "magic": 257, "major": 329, "minor": 337, "rest": 345}
    block = bytearray(512)
    block[0 : len(name)] = name
    block[124 : 124 + len(size)] = size
    block[156:157] = kind
    for key, value in {"magic": b"ustar\x0000", **fields}.items():
        block[places[key] : places[key] + len(value)] = value
    block[148:156] = b"        "
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def pax(*records: tuple[bytes, bytes], kind: bytes = b"x") -> bytes:
    """Build an extended header by hand."""
    body = b""
    for key, value in records:
        rest = len(key) + len(value) + 3
        n_bytes = rest + len(str(rest))
        n_bytes = rest + len(str(n_bytes))
        body += b"%d %s=%s\n" % (n_bytes, key, value)
    return header(b"PaxHeaders/x", kind, size=b"%011o\0" % len(body)) + padded(body)


def padded(data: bytes) -> bytes:
    """Fill up to a block."""
    return data + bytes(-len(data) % 512)


END: Final = bytes(1024)


def tree(root: Path) -> dict[str, Facts]:
    """Return the facts of a folder and all in it, by name."""
    found: dict[str, Facts] = {}
    first: dict[int, str] = {}
    for name in sorted(_names(root)):
        path = root / name
        status = path.lstat()
        contents = b""
        if stat.S_ISLNK(status.st_mode):
            contents = os.fsencode(path.readlink())
        elif stat.S_ISREG(status.st_mode):
            contents = path.read_bytes()
        same_as = name if stat.S_ISDIR(status.st_mode) else first.setdefault(status.st_ino, name)
        attributes = tuple(
            (key, os.getxattr(path, key, follow_symlinks=False)) for key in sorted(os.listxattr(path, follow_symlinks=False))
        )
        owner = (status.st_uid, status.st_gid)
        found[name] = Facts(status.st_mode, owner, status.st_mtime_ns, contents, status.st_rdev, attributes, same_as)
    return found


def is_whiteout(path: Path) -> bool:
    """Tell whether overlayfs takes this for a whiteout."""
    status = path.lstat()
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == 0


def is_opaque(path: Path) -> bool:
    """Tell whether overlayfs takes this folder for opaque."""
    return OPAQUE in os.listxattr(path) and os.getxattr(path, OPAQUE) == b"y"


def in_namespaces(script: str, *arguments: str) -> Any:
    """Run a script in mount and network namespaces of its own, where `_core` is imported; return what it prints, which is JSON."""
    command = ["unshare", "--mount", "--net", sys.executable, "-c", f"import json, os, sys\nfrom isopod import _core\n{script}", *arguments]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": SOURCE}, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def _names(root: Path) -> Iterator[str]:
    yield "."
    for where, folders, files in os.walk(root):
        for name in (*folders, *files):
            yield os.path.relpath(Path(where) / name, root)
