"""Trees of files as tar archives, out of a root and into one, without ever leaving it: both ends of `isopod cp` on a machine.

Every name is resolved by the kernel from the descriptor of the root (openat2(2), RESOLVE_IN_ROOT): links, absolute ones and `..` too, lead
where they lead for a process whose root that is. Nothing is entered (no chroot, no code of the tree is loaded), nothing but regular files
and folders is ever opened, and each is opened relative to its parent's descriptor, not through a link. So a tree that changes meanwhile,
also one whose owner means harm, costs an error or an odd archive, and never a file outside.

Out: POSIX pax; hard links stay such; sockets are left out; a file that shrinks is filled up with zeros, one that grows is cut.
In: a name with `..` is refused. A `confined` archive may neither be led through a link by what it brought before, nor bring an entry
that was not asked for. Each file appears under its name when it is whole, in the place of one that is there; folders are merged; neither
replaces the other. The last entry's folder attributes are set at the end. Compressed archives are understood.

Sources: POSIX.1-2017, pax; openat2(2), symlink(7).
"""

import errno
import os
import stat
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import IO, Final, NamedTuple, Protocol, cast

from isopod.world.host import libc

DEPTH_MAX: Final = 400
"""Folders in folders: each is a descriptor."""
HEADER_BYTES_MAX: Final = 1 << 20
"""Of a header that describes another; they are read into memory."""
N_LINKS_MAX: Final = 40
N_HARD_LINKS_MAX: Final = 1 << 20
"""So many names of files with several are remembered; those beyond become files of their own."""
N_LEFT_OUT_MAX: Final = 100
CHUNK_BYTES: Final = 256 << 10
_FOLDER: Final = os.O_PATH | os.O_DIRECTORY
_XATTR: Final = "security.capability"
_PAX_XATTR: Final = "SCHILY.xattr." + _XATTR
_LINK: Final = os.O_NOFOLLOW | os.O_CLOEXEC
_SPECIAL: Final = 0o6000


class TreeError(Exception):
    """Why an archive was refused. `code` is "not_found" or "invalid"."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Facts(NamedTuple):
    """What is somewhere."""

    kind: str
    """"file", "folder", "link", "other" or "nothing" (but its folder is there)."""
    path: str
    """Where the links led: its last part is no link if they were followed."""
    mode: int
    n_bytes: int


class Wishes(NamedTuple):
    """How an archive is unpacked."""

    top: str | None = None
    """The first part that every name must have; "" for names that are all below one folder; None for any names."""
    name: str = ""
    """What that part becomes; "" for nothing: what is below it goes right into the folder."""
    confined: bool = False
    """Whether no link is followed below the folder."""
    owners: bool = True
    """Whether files get the owners of the archive."""
    special: bool = True
    """Whether files keep set-user-id, and devices are made."""


class Reader(Protocol):
    """Where an archive comes from."""

    def read(self, n_bytes: int, /) -> bytes:
        """Return the next bytes, at most so many; b"" at the end."""


class Writer(Protocol):
    """Where an archive goes."""

    def write(self, data: bytes, /) -> object:
        """Take all of `data`."""


def look(root_fd: int, path: str, *, follow: bool) -> Facts:
    """Return what is at `path`, an absolute one inside the root; with `follow` what its last link leads to.

    Raises:
        OSError: ENOENT, ENOTDIR: a folder on the way is missing; ELOOP: links that lead nowhere.
    """
    for _ in range(N_LINKS_MAX):
        parent, name = split(path)
        with _opened(libc.open_in_root(root_fd, parent, _FOLDER)) as fd:
            if not name:
                found = os.stat(".", dir_fd=fd)
                return Facts("folder", path, stat.S_IMODE(found.st_mode), found.st_size)
            try:
                found = os.stat(name, dir_fd=fd, follow_symlinks=False)
            except FileNotFoundError:
                return Facts("nothing", path, 0, 0)
            if not (follow and stat.S_ISLNK(found.st_mode)):
                return Facts(_kind(found.st_mode), path, stat.S_IMODE(found.st_mode), found.st_size)
            target = os.readlink(name, dir_fd=fd)
        path = target if target.startswith("/") else f"{parent.rstrip('/')}/{target}"
    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)


def split(path: str) -> tuple[str, str]:
    """Return (folder, name) of an absolute path; the name is "" where the path can only mean a folder."""
    folder, _, name = path.rpartition("/")
    return (path, "") if name in ("", ".", "..") else (folder or "/", name)


def pack(root_fd: int, path: str, out: Writer, *, name: str | None = None) -> None:
    """Write the archive of a file or folder; a link at the end of `path` is packed as one.

    Args:
        root_fd: The root.
        path: Absolute, inside it.
        out: Where to.
        name: What it is called in the archive, "" for only what is in the folder; None for its own name.

    Raises:
        OSError: It, or something in it, cannot be read.
    """
    parent, last = split(path)
    packer = _Packer(out)
    if last:
        with _opened(libc.open_in_root(root_fd, parent, _FOLDER)) as fd:
            packer.entry(fd, last, last if name is None else name, depth=0)
    else:
        own = path.rstrip("/.").rpartition("/")[2] or "."
        with _opened(libc.open_in_root(root_fd, path, os.O_RDONLY | os.O_DIRECTORY)) as fd:
            packer.folder(fd, own if name is None else name, depth=0)
    packer.finish()


def unpack(root_fd: int, folder: str, source: Reader, wishes: Wishes = Wishes()) -> list[str]:  # noqa: B008 - a tuple
    """Unpack an archive below a folder.

    Args:
        root_fd: The root.
        folder: Absolute, inside it; it exists.
        source: The archive.
        wishes: How.

    Returns:
        The first names of what was left out because it is no file, folder, link or pipe.

    Raises:
        OSError: The kernel refused.
        TreeError: It is no archive, or leads elsewhere.
    """
    before = os.umask(0)
    try:
        with _opened(libc.open_in_root(root_fd, folder, _FOLDER)) as base:
            return _Unpacker(root_fd, folder, base, wishes).run(source)
    except tarfile.TarError as error:
        raise TreeError("invalid", f"it is no archive, or a damaged one: {error}") from error
    except (ValueError, EOFError) as error:
        raise TreeError("invalid", f"the archive makes no sense: {error}") from error
    finally:
        os.umask(before)


# --- out --------------------------------------------------------------------------------------------------------------


class _Packer:
    """One archive on its way out."""

    def __init__(self, out: Writer) -> None:
        self._out = out
        self._links: dict[tuple[int, int], str] = {}

    def entry(self, folder_fd: int, name: str, as_name: str, *, depth: int) -> None:
        """Write what is called `name` in a folder."""
        found = os.stat(name, dir_fd=folder_fd, follow_symlinks=False)
        if stat.S_ISDIR(found.st_mode):
            with _opened(os.open(name, os.O_RDONLY | os.O_DIRECTORY | _LINK, dir_fd=folder_fd)) as fd:
                self.folder(fd, as_name, depth=depth)
        elif stat.S_ISREG(found.st_mode):
            # It may be something else by now: a pipe must not keep us waiting.
            with _opened(os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | _LINK, dir_fd=folder_fd)) as fd:
                self._file(fd, as_name)
        elif not stat.S_ISSOCK(found.st_mode):
            info = _info(as_name, found)
            info.type = _TYPES[stat.S_IFMT(found.st_mode)]
            if info.issym():
                info.linkname = os.readlink(name, dir_fd=folder_fd)
            elif not info.isfifo():
                info.devmajor, info.devminor = os.major(found.st_rdev), os.minor(found.st_rdev)
            self._header(info)

    def folder(self, fd: int, as_name: str, *, depth: int) -> None:
        """Write a folder and what is in it; without a name only that."""
        if depth > DEPTH_MAX:
            raise OSError(errno.ENAMETOOLONG, f"folders are nested more than {DEPTH_MAX} deep", as_name)
        if as_name:
            info = _info(as_name, os.fstat(fd))
            info.type = tarfile.DIRTYPE
            self._header(info)
        for child in sorted(os.listdir(fd)):
            with suppress(FileNotFoundError):  # it went meanwhile
                self.entry(fd, child, f"{as_name}/{child}" if as_name else child, depth=depth + 1)

    def finish(self) -> None:
        """Write the end."""
        self._out.write(bytes(2 * tarfile.BLOCKSIZE))

    def _file(self, fd: int, as_name: str) -> None:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            return
        info = _info(as_name, found)
        if found.st_nlink > 1:
            first = self._links.get((found.st_dev, found.st_ino))
            if first is not None:
                info.type, info.linkname = tarfile.LNKTYPE, first
                self._header(info)
                return
            if len(self._links) < N_HARD_LINKS_MAX:
                self._links[found.st_dev, found.st_ino] = as_name
        info.size = found.st_size
        with suppress(OSError):
            info.pax_headers = {**info.pax_headers, _PAX_XATTR: os.getxattr(fd, _XATTR).decode("utf-8", "surrogateescape")}
        self._header(info)
        left = found.st_size
        while left and (data := os.read(fd, min(CHUNK_BYTES, left))):
            self._out.write(data)
            left -= len(data)
        left += -found.st_size % tarfile.BLOCKSIZE
        while left:
            self._out.write(bytes(min(CHUNK_BYTES, left)))
            left -= min(CHUNK_BYTES, left)

    def _header(self, info: tarfile.TarInfo) -> None:
        self._out.write(info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape"))


_TYPES: Final = {
    stat.S_IFLNK: tarfile.SYMTYPE,
    stat.S_IFIFO: tarfile.FIFOTYPE,
    stat.S_IFCHR: tarfile.CHRTYPE,
    stat.S_IFBLK: tarfile.BLKTYPE,
}


def _info(name: str, found: os.stat_result) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.mode, info.uid, info.gid = stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid
    seconds, rest_ns = divmod(found.st_mtime_ns, 10**9)
    info.mtime = max(0, seconds)
    if rest_ns and seconds >= 0:
        info.pax_headers = {"mtime": f"{seconds}.{rest_ns:09}"}
    return info


# --- in ---------------------------------------------------------------------------------------------------------------


class _Member(tarfile.TarInfo):
    """A header; one that describes another is bounded, because it is read into memory."""

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        longs = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
        if self.size < 0 or (self.type in longs and self.size > HEADER_BYTES_MAX):
            raise tarfile.ReadError(f"a header of {self.size} bytes")
        return super()._proc_member(archive)  # type: ignore[misc,no-any-return] # the one place where the library lets its caller look


class _Unpacker:
    """One archive on its way in."""

    def __init__(self, root_fd: int, folder: str, base: int, wishes: Wishes) -> None:
        self._root = root_fd
        self._folder = folder.rstrip("/")
        self._base = base
        self._wishes = wishes
        self._late: list[tuple[list[str], tarfile.TarInfo]] = []
        self._left_out: list[str] = []

    def run(self, source: Reader) -> list[str]:
        """Unpack all of it."""
        stream = cast("IO[bytes]", source)  # nothing but `read` is used of a stream
        encoding, errors = "utf-8", "surrogateescape"
        with tarfile.open(fileobj=stream, mode="r|*", bufsize=CHUNK_BYTES, tarinfo=_Member, encoding=encoding, errors=errors) as archive:
            for member in archive:
                archive.members.clear()  # type: ignore[attr-defined] # else it remembers each
                parts = self._parts(member.name)
                if parts:
                    self._entry(archive, member, parts)
        for parts, member in reversed(self._late):
            self._finish_folder(parts, member)
        return self._left_out

    def _parts(self, name: str) -> list[str]:
        """Return where an entry goes, [] for the folder itself."""
        parts = [part for part in name.split("/") if part not in ("", ".")]
        if ".." in parts:
            raise TreeError("invalid", f"{name[:200]!r} leads out of the folder")
        if self._wishes.top is None:
            return parts
        if self._wishes.top:
            if not parts or parts[0] != self._wishes.top:
                raise TreeError("invalid", f"{name[:200]!r} was not asked for")
            del parts[0]
        return [self._wishes.name, *parts] if self._wishes.name else parts

    def _entry(self, archive: tarfile.TarFile, member: tarfile.TarInfo, parts: list[str]) -> None:
        name = parts[-1]
        with self._parent(parts) as fd:
            if member.isdir():
                self._make_folder(fd, name, parts, member)
            elif member.isreg():
                self._make_file(fd, name, archive, member)
            elif member.issym():
                self._place(fd, name, member, lambda temporary: os.symlink(member.linkname, temporary, dir_fd=fd))
            elif member.islnk():
                self._make_link(fd, name, member)
            elif member.isfifo() or (member.isdev() and self._wishes.special):
                device = 0 if member.isfifo() else os.makedev(member.devmajor, member.devminor)
                kind = stat.S_IFIFO if member.isfifo() else stat.S_IFCHR if member.ischr() else stat.S_IFBLK
                self._place(fd, name, member, lambda temporary: os.mknod(temporary, kind | self._mode(member), device, dir_fd=fd))
            elif len(self._left_out) < N_LEFT_OUT_MAX:
                self._left_out.append(member.name)

    @contextmanager
    def _parent(self, parts: list[str]) -> Iterator[int]:
        """Open the folder of an entry, after making those that are missing."""
        folder = parts[:-1]
        try:
            fd = self._open(folder)
        except FileNotFoundError:
            for n_above in range(len(folder)):
                with _opened(self._open(folder[:n_above])) as above, suppress(FileExistsError):
                    os.mkdir(folder[n_above], 0o755, dir_fd=above)
            fd = self._open(folder)
        with _opened(fd):
            yield fd

    def _open(self, parts: list[str]) -> int:
        """Open a folder below ours."""
        if not parts:
            return os.dup(self._base)
        if not self._wishes.confined:
            return libc.open_in_root(self._root, f"{self._folder}/{'/'.join(parts)}", _FOLDER)
        try:
            return libc.open_beneath(self._base, "/".join(parts), _FOLDER)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise TreeError("invalid", f"{'/'.join(parts)[:200]!r} leads through a link") from error
            raise

    def _make_folder(self, fd: int, name: str, parts: list[str], member: tarfile.TarInfo) -> None:
        try:
            os.mkdir(name, 0o700, dir_fd=fd)
        except FileExistsError:
            found = os.stat(name, dir_fd=fd, follow_symlinks=False)
            if stat.S_ISLNK(found.st_mode) and not self._wishes.confined:
                os.close(self._open(parts))  # a link to a folder is as good as one
                return
            if not stat.S_ISDIR(found.st_mode):
                raise OSError(errno.ENOTDIR, "a folder cannot replace what is no folder", "/".join(parts)) from None
        self._late.append((parts, member))

    def _finish_folder(self, parts: list[str], member: tarfile.TarInfo) -> None:
        """Give a folder its attributes, now that all is in it."""
        with self._parent(parts) as above, _opened(os.open(parts[-1], os.O_RDONLY | os.O_DIRECTORY | _LINK, dir_fd=above)) as fd:
            self._describe(fd, member)

    def _make_file(self, fd: int, name: str, archive: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        def make(temporary: str) -> None:
            with suppress(FileNotFoundError):
                os.unlink(temporary, dir_fd=fd)  # of one that was killed under the same number
            with _opened(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _LINK, 0o600, dir_fd=fd)) as file:
                self._fill(file, archive, member)

        self._place(fd, name, member, make)

    def _fill(self, file: int, archive: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        content = archive.extractfile(member)
        assert content is not None, "it is a regular file"
        left = member.size
        while left:
            data = content.read(min(CHUNK_BYTES, left))
            if not data:
                raise TreeError("invalid", f"the archive ends within {member.name[:200]!r}")
            if data.count(0) == len(data):
                os.lseek(file, len(data), os.SEEK_CUR)  # a hole stays one
            else:
                _write_all(file, data)
            left -= len(data)
        os.ftruncate(file, member.size)
        self._describe(file, member)

    def _make_link(self, fd: int, name: str, member: tarfile.TarInfo) -> None:
        target = self._parts(member.linkname)
        if not target:
            raise TreeError("invalid", f"{member.name[:200]!r} is a hard link to a folder")
        with _opened(self._open(target[:-1])) as other:
            self._place(
                fd, name, None, lambda temporary: os.link(target[-1], temporary, src_dir_fd=other, dst_dir_fd=fd, follow_symlinks=False)
            )

    def _place(self, fd: int, name: str, member: tarfile.TarInfo | None, make: Callable[[str], None]) -> None:
        """Make something beside its place, and move it there when it is whole.

        Args:
            fd: The folder.
            name: What it is to be called.
            member: What it is; None if it has its attributes already.
            make: Makes it under another name.
        """
        temporary = f".isopod-cp-{os.getpid()}-{name}"[:64]
        try:
            make(temporary)
            if member is not None and not member.isreg():
                self._describe_name(fd, temporary, member)
            try:
                os.rename(temporary, name, src_dir_fd=fd, dst_dir_fd=fd)
            except OSError as error:
                if error.errno != errno.EBUSY or member is None or not member.isreg():
                    raise
                _overwrite(fd, temporary, name)  # something is mounted there, as on /etc/hosts of a container
        finally:
            with suppress(FileNotFoundError):
                os.unlink(temporary, dir_fd=fd)

    def _mode(self, member: tarfile.TarInfo) -> int:
        return member.mode & 0o7777 & ~(0 if self._wishes.special else _SPECIAL)

    def _describe(self, fd: int, member: tarfile.TarInfo) -> None:
        """Give an open file or folder its owner, mode and time. In this order: a change of owner takes set-user-id away."""
        if self._wishes.owners:
            os.fchown(fd, member.uid, member.gid)
        os.fchmod(fd, self._mode(member))
        capability = member.pax_headers.get(_PAX_XATTR)
        if capability is not None and self._wishes.special and member.isreg():
            with suppress(OSError):  # a file system without them
                os.setxattr(fd, _XATTR, capability.encode("utf-8", "surrogateescape"))
        time_ns = _time_ns(member)
        os.utime(fd, ns=(time_ns, time_ns))

    def _describe_name(self, fd: int, name: str, member: tarfile.TarInfo) -> None:
        if self._wishes.owners:
            os.chown(name, member.uid, member.gid, dir_fd=fd, follow_symlinks=False)
        time_ns = _time_ns(member)
        os.utime(name, ns=(time_ns, time_ns), dir_fd=fd, follow_symlinks=False)


def _time_ns(member: tarfile.TarInfo) -> int:
    whole, _, part = str(member.pax_headers.get("mtime", "")).partition(".")
    if whole.isascii() and whole.isdigit() and len(whole) <= 11:
        return int(whole) * 10**9 + (int(part[:9].ljust(9, "0")) if part.isascii() and part.isdigit() else 0)
    return int(min(max(member.mtime, 0), 1 << 33)) * 10**9


def _overwrite(folder_fd: int, source: str, target: str) -> None:
    """Write one file's bytes into another, which keeps all else."""
    with (
        _opened(os.open(source, os.O_RDONLY | _LINK, dir_fd=folder_fd)) as whole,
        _opened(os.open(target, os.O_WRONLY | os.O_TRUNC | os.O_NONBLOCK | os.O_NOCTTY | _LINK, dir_fd=folder_fd)) as file,
    ):
        while data := os.read(whole, CHUNK_BYTES):
            _write_all(file, data)


def _kind(mode: int) -> str:
    return "file" if stat.S_ISREG(mode) else "folder" if stat.S_ISDIR(mode) else "link" if stat.S_ISLNK(mode) else "other"


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


@contextmanager
def _opened(fd: int) -> Iterator[int]:
    try:
        yield fd
    finally:
        os.close(fd)
