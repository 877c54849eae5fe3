"""The host's files.

Calls that answer from the page cache run inline: a thread would cost more than they do. What waits for a device (fsync) or works
through much data runs in the workers. Archives are the Rust core's business. Data files (`open_file`) have a back end that is chosen once,
when the first of them is opened; see `files_io` and `uring`.
"""

import asyncio
import fcntl
import os
import stat as stat_bits
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Final, Literal, TypeVar

from isopod import _core
from isopod.world.disk import (
    ArchiveMember,
    Data,
    FileStat,
    FolderWatches,
    Indexed,
    IoFacts,
    IoStatistics,
    MappedBytes,
    OpenFile,
    OpenFlags,
    Packed,
    Progress,
    Unpacked,
    UnpackLimits,
    Watch,
)
from isopod.world.errors import BadArchive, Unsupported
from isopod.world.host import files, libc, sendfile, uring
from isopod.world.host.files_data import HostDataFile, open_data_file, open_data_file_beneath
from isopod.world.host.files_io import FileIo, ThreadIo
from isopod.world.host.inotify import FolderWatch, ManyFoldersWatch
from isopod.world.host.mapped import map_file
from isopod.world.host.workers import Workers
from isopod.world.send_pieces import send_in_pieces

T = TypeVar("T")

FileIoChoice = Literal["auto", "threads", "io_uring"]
"""Who reads and writes data files; "auto" takes io_uring where the kernel lets it."""
INLINE_BYTES_MAX: Final = 256 << 10
"""Above it reading and writing goes to a thread: some 50 us of copying."""


class HostDisk:
    """`Disk` by the kernel's file systems. `close` ends the back end of data files.

    Args:
        workers: For calls that block.
        file_io: Who reads and writes data files. io_uring falls back to threads where the kernel refuses it; `io_facts` says why.
    """

    def __init__(self, workers: Workers, file_io: FileIoChoice = "auto") -> None:
        self._workers = workers
        self._choice: FileIoChoice = file_io
        self._io: FileIo | None = None
        self._why = ""

    async def read(self, path: str, *, n_bytes_max: int = 64 << 20) -> bytes:
        """See `Disk.read`."""
        if os.stat(path).st_size <= INLINE_BYTES_MAX:
            return files.read_file(path, n_bytes_max)
        return await self._workers.quick(files.read_file, path, n_bytes_max)

    async def read_beneath(self, root: str, path: str, *, n_bytes_max: int = 1 << 20) -> bytes:
        """See `Disk.read_beneath`."""
        return files.read_file_beneath(root, path, n_bytes_max)

    async def write(self, path: str, data: bytes, *, mode: int = 0o600) -> None:
        """See `Disk.write`."""
        if len(data) <= INLINE_BYTES_MAX:
            files.write_file(path, data, mode)
        else:
            await self._workers.quick(files.write_file, path, data, mode)

    async def write_atomic(self, path: str, data: bytes, *, mode: int = 0o600) -> None:
        """See `Disk.write_atomic`. A cancelled call ends only after the write has: what it left is then known to be there or not."""
        await self._workers.quick(files.write_atomic, path, data, mode)

    async def open_read(self, path: str) -> OpenFile:
        """See `Disk.open_read`."""
        return HostFile(os.open(path, os.O_RDONLY | os.O_CLOEXEC), self._workers)

    async def open_append(self, path: str, *, mode: int = 0o600) -> OpenFile:
        """See `Disk.open_append`."""
        return HostFile(os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, mode), self._workers)

    async def open_file(self, path: str, flags: OpenFlags = OpenFlags(), *, mode: int = 0o600) -> HostDataFile:  # noqa: B008 - a tuple
        """See `Disk.open_file`."""
        return open_data_file(path, flags, mode, io=self._data_io(), workers=self._workers)

    async def open_file_beneath(self, root: str, path: str) -> HostDataFile:
        """See `Disk.open_file_beneath`."""
        return open_data_file_beneath(root, path, io=self._data_io(), workers=self._workers)

    async def map_file(self, path: str, *, write: bool = False) -> MappedBytes:
        """See `Disk.map_file`."""
        return map_file(path, write=write, workers=self._workers)

    async def send_file(self, file: OpenFile, transport: asyncio.WriteTransport, *, offset: int, n_bytes: int) -> int:
        """See `Disk.send_file`."""
        if isinstance(file, HostFile) or (isinstance(file, HostDataFile) and not file.alignment.is_direct):
            return await sendfile.send(file, transport, offset, n_bytes, workers=self._workers)
        return await send_in_pieces(file.read_at, transport, offset, n_bytes)

    async def copy_file(self, source: str, target: str, *, mode: int = 0o600) -> int:
        """See `Disk.copy_file`. A cancelled call stops after the present 16 MiB."""
        return await self._workers.bulk_abortable(lambda check: files.copy_file(source, target, mode, check))

    async def compress_file(self, source: str, target: str, *, level: int = 3, mode: int = 0o600) -> int:
        """See `Disk.compress_file`. A cancelled call stops after the present 1 MiB."""
        return await self._workers.bulk_abortable(lambda check: files.compress_file(source, target, level, mode=mode, check=check))

    def io_facts(self) -> IoFacts:
        """See `Disk.io_facts`."""
        return IoFacts(self._data_io().kind, self._why)

    def io_statistics(self) -> IoStatistics:
        """See `Disk.io_statistics`."""
        return self._data_io().tally.snapshot()

    def close(self) -> None:
        """Wait for what data files have under way, and end their back end."""
        if self._io is not None:
            self._io.close()

    async def list(self, path: str) -> Sequence[str]:
        """See `Disk.list`."""
        return files.list_names(path)

    async def stat(self, path: str) -> FileStat | None:
        """See `Disk.stat`."""
        try:
            found = os.lstat(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        return FileStat(
            size_bytes=found.st_size,
            mode=stat_bits.S_IMODE(found.st_mode),
            modified_at_ns=found.st_mtime_ns,
            inode=found.st_ino,
            is_directory=stat_bits.S_ISDIR(found.st_mode),
            is_symlink=stat_bits.S_ISLNK(found.st_mode),
            uid=found.st_uid,
        )

    async def make_directory(self, path: str, *, mode: int = 0o700) -> None:
        """See `Disk.make_directory`."""
        files.make_directory(path, mode)

    async def rename(self, source: str, target: str) -> None:
        """See `Disk.rename`."""
        os.rename(source, target)

    async def remove(self, path: str) -> None:
        """See `Disk.remove`."""
        files.remove(path)

    async def remove_tree(self, path: str) -> None:
        """See `Disk.remove_tree`."""
        await self._workers.bulk(_remove_tree, path)

    async def sync_directory(self, path: str) -> None:
        """See `Disk.sync_directory`."""
        await self._workers.quick(files.sync_directory, path)

    async def free_bytes(self, path: str) -> int:
        """See `Disk.free_bytes`."""
        found = os.statvfs(path)
        return found.f_bavail * found.f_frsize

    async def tree_bytes(self, path: str) -> int:
        """See `Disk.tree_bytes`."""
        return await self._workers.bulk(_core.tree_bytes, path)

    def watch(self, path: str) -> AbstractAsyncContextManager[Watch]:
        """See `Disk.watch`."""
        return _open_watch(path)

    def watch_folders(self) -> AbstractAsyncContextManager[FolderWatches]:
        """See `Disk.watch_folders`."""
        return _open_watches()

    async def lock(self, path: str, contents: bytes) -> OpenFile | None:
        """See `Disk.lock`. The lock is flock(2)'s: it belongs to the open file, so a second one in this process is refused as well."""
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(fd, 0)
            files.write_all(fd, contents)
        except BlockingIOError:
            os.close(fd)
            return None
        except BaseException:
            os.close(fd)
            raise
        return HostFile(fd, self._workers)

    async def lock_shared(self, path: str) -> OpenFile | None:
        """See `Disk.lock_shared`."""
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return None
        except BaseException:
            os.close(fd)
            raise
        return HostFile(fd, self._workers)

    async def unpack_layer(
        self,
        source: str,
        target: str,
        *,
        offset: int = 0,
        n_bytes: int | None = None,
        limits: UnpackLimits = UnpackLimits(),  # noqa: B008 - an immutable tuple
        progress: Progress | None = None,
    ) -> Unpacked:
        """See `Disk.unpack_layer`. A cancelled call stops at its next report of progress."""

        def work(check: Callable[[], None]) -> Unpacked:
            def report(n_consumed: int) -> None:
                check()
                if progress is not None:
                    progress(n_consumed)

            unpacked = _with_file(source, lambda fd: Unpacked(*_core.unpack_layer(fd, target, offset, n_bytes, *limits, report)))
            _sync_tree(target)
            return unpacked

        return await self._workers.bulk_abortable(work)

    async def index_layer(
        self,
        source: str,
        tar: str,
        index: str,
        *,
        offset: int = 0,
        n_bytes: int | None = None,
        limits: UnpackLimits = UnpackLimits(),  # noqa: B008 - an immutable tuple
        progress: Progress | None = None,
    ) -> Indexed:
        """See `Disk.index_layer`. A cancelled call stops at its next report of progress."""

        def work(check: Callable[[], None]) -> Indexed:
            def report(n_consumed: int) -> None:
                check()
                if progress is not None:
                    progress(n_consumed)

            def write(tar_fd: int, index_fd: int) -> Indexed:
                layer, rest = _with_file(source, lambda fd: _core.index_layer(fd, tar_fd, index_fd, offset, n_bytes, *limits, report))
                return Indexed(Unpacked(*layer), *rest)

            return _with_new_files(tar, index, write)

        return await self._workers.bulk_abortable(work)

    async def pack_layer(
        self,
        source: str,
        target: str,
        *,
        limits: UnpackLimits = UnpackLimits(),  # noqa: B008 - an immutable tuple
    ) -> Packed:
        """See `Disk.pack_layer`. A cancelled call stops at its next report of progress."""
        return await self._workers.bulk_abortable(lambda check: _pack_layer(source, target, limits, check))

    async def index_archive(self, source: str) -> Sequence[ArchiveMember]:
        """See `Disk.index_archive`."""
        return await self._workers.bulk(_with_file, source, lambda fd: [ArchiveMember(*row) for row in _core.index_archive(fd)])

    async def digest(self, path: str) -> str:
        """See `Disk.digest`."""
        return await self._workers.bulk(_with_file, path, _core.sha256_file)

    def _data_io(self) -> FileIo:
        """Return the back end of data files, chosen at the first call."""
        if self._io is None:
            refused = "not asked for" if self._choice == "threads" else uring.refusal()
            self._io = ThreadIo(self._workers) if refused else uring.UringIo()
            self._why = f"no io_uring: {refused}" if refused else "the kernel has io_uring"
        return self._io


class HostFile:
    """`OpenFile` over a descriptor, which it owns. A `close` during a call in a thread takes effect when that call ends."""

    def __init__(self, fd: int, workers: Workers) -> None:
        self._fd = fd
        self._workers = workers
        self._n_calls = 0
        self._is_closed = False

    async def read_at(self, offset: int, n_bytes: int) -> bytes:
        """See `OpenFile.read_at`."""
        self._check_open()
        if n_bytes <= INLINE_BYTES_MAX:
            return os.pread(self._fd, n_bytes, offset)
        return await self._in_thread(lambda: os.pread(self._fd, n_bytes, offset))

    async def append(self, data: Data) -> None:
        """See `OpenFile.append`."""
        self._check_open()
        if len(data) <= INLINE_BYTES_MAX:
            files.write_all(self._fd, data)
        else:
            await self._in_thread(lambda: files.write_all(self._fd, data))

    async def sync(self) -> None:
        """See `OpenFile.sync`."""
        self._check_open()
        await self._in_thread(lambda: os.fdatasync(self._fd))

    def size_bytes(self) -> int:
        """See `OpenFile.size_bytes`."""
        self._check_open()
        return os.fstat(self._fd).st_size

    def fileno(self) -> int:
        """Return the descriptor, for the host's own use (sendfile)."""
        self._check_open()
        return self._fd

    def enter(self) -> None:
        """Keep it open until `leave`."""
        self._n_calls += 1

    def leave(self) -> None:
        """Note that a call has ended; the last one closes a file that was closed meanwhile."""
        self._n_calls -= 1
        if self._is_closed and self._n_calls == 0:
            os.close(self._fd)

    def close(self) -> None:
        """See `OpenFile.close`. Closing twice is fine."""
        if not self._is_closed:
            self._is_closed = True
            if self._n_calls == 0:
                os.close(self._fd)

    def _check_open(self) -> None:
        if self._is_closed:
            raise ValueError("the file is closed")

    async def _in_thread(self, call: Callable[[], T]) -> T:
        self.enter()
        try:
            return await self._workers.quick(call)
        finally:
            self.leave()


@asynccontextmanager
async def _open_watch(path: str) -> AsyncIterator[Watch]:
    watch = FolderWatch(path)
    try:
        yield watch
    finally:
        watch.close()


@asynccontextmanager
async def _open_watches() -> AsyncIterator[FolderWatches]:
    watches = ManyFoldersWatch()
    try:
        yield watches
    finally:
        watches.close()


def _with_file(path: str, use: Callable[[int], T]) -> T:
    """Give `use` an open file; the core's complaints about archives become errors of the tree."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return use(fd)
    except _core.ArchiveError as error:
        entry, why = error.args
        raise BadArchive(entry, why) from error
    except _core.NotIndexable as error:
        entry, why = error.args
        raise Unsupported(f"an index of a layer with {entry!r}" if entry else "an index of this layer", why) from error
    finally:
        os.close(fd)


def _with_new_files(first: str, second: str, use: Callable[[int, int], T]) -> T:
    """Give `use` two new files; make what it wrote durable, or remove both."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    made: list[tuple[str, int]] = []
    try:
        for path in (first, second):
            made.append((path, os.open(path, flags, 0o600)))
        result = use(made[0][1], made[1][1])
        for _, fd in made:
            os.fdatasync(fd)
    except BaseException:
        for path, _ in made:
            os.unlink(path)
        raise
    finally:
        for _, fd in made:
            os.close(fd)
    return result


def _sync_tree(target: str) -> None:
    """Make an unpacked tree durable, or remove it: syncing file by file would wait for the device thousands of times."""
    try:
        libc.sync_file_system(target)
    except OSError:
        _remove_tree(target)
        raise


def _remove_tree(path: str) -> None:
    try:
        _core.remove_tree(path)
    except FileNotFoundError:
        return


def _pack_layer(source: str, target: str, limits: UnpackLimits, check: Callable[[], None]) -> Packed:
    fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        return Packed(*_core.pack_layer(source, fd, limits.unpacked_bytes_max, limits.entry_bytes_max, lambda _: check()))
    except _core.ArchiveError as error:
        os.unlink(target)
        entry, why = error.args
        raise BadArchive(entry, why) from error
    except BaseException:
        os.unlink(target)
        raise
    finally:
        os.close(fd)
