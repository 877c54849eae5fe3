"""Disk: the port to files.

Paths are absolute strings. Failures are OSErrors with the errno of the host's kernel, in both Worlds; callers wrap them once
(`errors.from_os_error`). What is not made durable (`write_atomic`, `File.sync`, `sync_directory`) may be gone after a crash.

Two kinds of open files: `OpenFile` is for the small files of a control plane, answered from the page cache where they can be; a
`DataFile` is for data, never blocks the loop, and may go past the page cache. A cancelled operation on a data file is told so only
when the kernel is done with its buffer.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Final, Literal, NamedTuple, Protocol

Data = bytes | bytearray | memoryview
"""What may be written: contiguous bytes."""
Target = bytearray | memoryview
"""What may be read into."""
IO_BYTES_MAX: Final = 1 << 30
"""The most that one operation on a data file moves; more is EINVAL."""
BATCH_MAX: Final = 1024
"""The most pieces of one batch; more is EINVAL."""

IoBackend = Literal["threads", "io_uring", "sim"]

Progress = Callable[[int], None]
"""Called with the number of compressed bytes consumed so far; from any thread, at most some tens of times a second."""


class FileStat(NamedTuple):
    """What isopod asks about a file."""

    size_bytes: int
    mode: int
    modified_at_ns: int
    inode: int
    is_directory: bool
    is_symlink: bool
    uid: int = 0
    """The owner."""


class UnpackLimits(NamedTuple):
    """Bounds on what an archive may become; over any of them it is refused."""

    unpacked_bytes_max: int = 64 << 30
    n_entries_max: int = 4_000_000
    entry_bytes_max: int = 32 << 30
    path_bytes_max: int = 4096
    ratio_max: int = 1200
    """Unpacked over compressed bytes, applied once 64 MiB came out (deflate itself reaches 1032)."""


class Unpacked(NamedTuple):
    """What a layer was: digests are "sha256:" and 64 hexadecimal digits."""

    blob_digest: str
    diff_id: str
    n_blob_bytes: int
    n_unpacked_bytes: int
    n_entries: int


class Indexed(NamedTuple):
    """A layer kept as its tar, with an index to mount it by."""

    layer: Unpacked
    n_tar_bytes: int
    """Of the tar's file: padded with zeros to a multiple of 512."""
    n_index_bytes: int
    index_digest: str


class Packed(NamedTuple):
    """A tar that was written."""

    diff_id: str
    n_bytes: int
    n_entries: int


class ArchiveMember(NamedTuple):
    """One regular file of an uncompressed outer tar (docker-archive, OCI layout)."""

    name: str
    offset: int
    n_bytes: int
    link_target: str
    """Non-empty for a link inside the archive (docker-archive links equal layers)."""


class OpenFile(Protocol):
    """An open file. Who opened it closes it."""

    async def read_at(self, offset: int, n_bytes: int) -> bytes:
        """Return up to `n_bytes` from `offset`; fewer at the end of the file."""

    async def append(self, data: Data) -> None:
        """Write all of `data` at the end."""

    async def sync(self) -> None:
        """Make data and size durable (fdatasync)."""

    def size_bytes(self) -> int:
        """Return the size now."""

    def close(self) -> None:
        """Close; further calls raise ValueError."""


class OpenFlags(NamedTuple):
    """How a data file is opened. The names of the constructors are those of Seastar's users."""

    write: bool = False
    create: bool = False
    exclusive: bool = False
    """With `create`: EEXIST if there is something."""
    truncate: bool = False
    direct: bool = False
    """Past the page cache (O_DIRECT) where the file system can; where it cannot, `DataFile.alignment` says why."""

    @staticmethod
    def read_only(*, direct: bool = False) -> "OpenFlags":
        """For reading a file that exists."""
        return OpenFlags(direct=direct)

    @staticmethod
    def read_write(*, direct: bool = False) -> "OpenFlags":
        """For reading and writing a file that exists."""
        return OpenFlags(write=True, direct=direct)

    @staticmethod
    def create_or_open(*, direct: bool = False) -> "OpenFlags":
        """For reading and writing a file, made if it is missing."""
        return OpenFlags(write=True, create=True, direct=direct)

    @staticmethod
    def create_new(*, direct: bool = False) -> "OpenFlags":
        """For reading and writing a file that does not exist yet."""
        return OpenFlags(write=True, create=True, exclusive=True, direct=direct)


class Alignment(NamedTuple):
    """What direct operations on a file must keep to. 1 and 1 for a file that is not direct."""

    is_direct: bool
    memory_bytes: int
    """Addresses of buffers are multiples of it."""
    offset_bytes: int
    """Offsets and lengths are multiples of it."""
    why: str
    """One line: where these facts are from, or why the file is not direct."""


class IoFacts(NamedTuple):
    """How data files are read and written, and why so."""

    backend: IoBackend
    why: str


class IoStatistics(NamedTuple):
    """What data files have done since the World began."""

    n_reads: int = 0
    n_writes: int = 0
    n_syncs: int = 0
    n_bytes_read: int = 0
    n_bytes_written: int = 0
    n_errors: int = 0
    n_in_flight: int = 0
    n_inline: int = 0
    """Reads that the page cache answered at once, without a thread."""


class DataFile(OpenFile, Protocol):
    """A file for data: positional, batched, off the loop. Who opened it closes it. Operations may overlap; their order is then open."""

    @property
    def path(self) -> str:
        """Where it was opened."""

    @property
    def alignment(self) -> Alignment:
        """What direct operations must keep to."""

    async def read_into(self, offset: int, target: Target) -> int:
        """Read from `offset` until `target` is full or the file ends; return the number of bytes. Of a direct file offset, length and
        memory are aligned (EINVAL)."""

    async def write_at(self, offset: int, data: Data) -> None:
        """Write all of `data` at `offset`. Of a direct file offset and length are aligned (EINVAL), and so is memory, or it is copied."""

    async def write_durable(self, offset: int, data: Data) -> None:
        """Do `write_at` and make these bytes durable, in one trip off the loop. What else was written to the file may or may not be
        durable afterwards, and its size is only if it did not change: for logs whose space was allocated before. A failure leaves open
        what reached the device; after one, writing the same again proves nothing, for the kernel may have dropped the pages."""

    def may_write_now(self, n_bytes: int) -> bool:
        """Whether `write_durable_now` is worth its while for so many bytes: the last durable writes took no longer than going off the
        loop and coming back costs. A guess from what was measured; the next one may still take long."""

    def write_durable_now(self, offset: int, data: Data) -> None:
        """Do `write_durable` in the loop's own thread: nothing else happens meanwhile. Only right after `may_write_now` said so."""

    async def read_many(self, extents: Sequence[tuple[int, int]]) -> list[bytes]:
        """Do `read_at` for each (offset, length), all under way at once; the first failure is raised after all have ended."""

    async def write_many(self, pieces: Sequence[tuple[int, Data]]) -> None:
        """Do `write_at` for each (offset, data), all under way at once; the first failure is raised after all have ended."""

    async def truncate(self, n_bytes: int) -> None:
        """Cut or extend (with zeros, without space of their own) to `n_bytes`."""

    async def allocate(self, offset: int, n_bytes: int) -> None:
        """Reserve space, so that writing there cannot fail for want of it; the file grows if it must. ENOSPC."""


class MappedBytes(Protocol):
    """A file's bytes in memory, as long as the file was when it was mapped. Synchronous: what is not in memory yet makes the loop wait
    for the disk, see `prefetch`. Who mapped it closes it.

    A file that became shorter is ESTALE in every call, where the bare memory would kill the process (SIGBUS). The size is looked at
    before each step of at most 1 MiB; only a file cut by another process within those microseconds is not caught.
    """

    @property
    def size_bytes(self) -> int:
        """The length of the map."""

    def read(self, offset: int, n_bytes: int) -> bytes:
        """Return up to `n_bytes` from `offset`; fewer at the end."""

    def find(self, needle: bytes, start: int, end: int) -> int:
        """Return the first offset of `needle` wholly inside start..end, -1 if there is none."""

    def write(self, offset: int, data: Data) -> None:
        """Replace bytes. EBADF if it was not mapped for writing, EINVAL outside of the map."""

    def move(self, target: int, source: int, n_bytes: int) -> None:
        """Copy bytes inside the map; the two ranges may overlap. EBADF, EINVAL."""

    async def prefetch(self, offset: int, n_bytes: int) -> None:
        """Have bytes read into memory, off the loop."""

    async def sync(self, offset: int, n_bytes: int) -> None:
        """Make (at least) these bytes durable."""

    def close(self) -> None:
        """Unmap; twice is fine, further calls raise ValueError. What was written stays."""


class Watch(Protocol):
    """Changes in one directory. Names may repeat; after an overflow "" is delivered: look at everything."""

    def __aiter__(self) -> AsyncIterator[str]:
        """Iterate over the names of entries that were created, written, closed, moved in or removed."""


class FolderChange(NamedTuple):
    """What changed in one of many folders.

    Args:
        folder: As it was given to `add`; "" when changes were lost: look at everything.
        name: The entry that was made, removed, or moved in or out; "" when the folder itself is gone: it is watched no more.
    """

    folder: str
    name: str


class FolderWatches(Protocol):
    """Which entries come and go in many folders, told in one place at the price of one descriptor. Changes may be told more than once,
    and in the simulation of what is written to a file as well."""

    def add(self, path: str) -> None:
        """Watch a folder from now on; twice is once. The last component may be a symlink to one.

        Raises:
            OSError: ENOENT, ENOTDIR, EACCES; ENOSPC, the kernel's limit of watches is reached.
        """

    def remove(self, path: str) -> None:
        """Watch a folder no more; one that is not watched is fine. What was not read yet may still be told."""

    def __aiter__(self) -> AsyncIterator[FolderChange]:
        """Iterate over the changes."""


class Disk(Protocol):
    """Files and folders."""

    async def read(self, path: str, *, n_bytes_max: int = 64 << 20) -> bytes:
        """Return a whole small file; EFBIG if it is larger than `n_bytes_max`."""

    async def read_beneath(self, root: str, path: str, *, n_bytes_max: int = 1 << 20) -> bytes:
        """Return a regular file inside the folder `root`, every symlink resolved as if `root` were "/" (openat2 RESOLVE_IN_ROOT), so that
        a container's files can be read without ever leaving it. FileNotFoundError if there is none, EFBIG if it is too large."""

    async def write(self, path: str, data: bytes, *, mode: int = 0o600) -> None:
        """Create or replace a file, not durable, not atomic."""

    async def write_atomic(self, path: str, data: bytes, *, mode: int = 0o600) -> None:
        """Create or replace a file so that a crash leaves the old or the new one: temporary file, fsync, rename, fsync of the folder."""

    async def open_read(self, path: str) -> OpenFile:
        """Open for reading."""

    async def open_append(self, path: str, *, mode: int = 0o600) -> OpenFile:
        """Open for appending, creating the file."""

    async def open_file(self, path: str, flags: OpenFlags = OpenFlags(), *, mode: int = 0o600) -> DataFile:  # noqa: B008 - a tuple
        """Open a regular file or block device for data. EISDIR for a folder, EINVAL for pipes and sockets.

        Args:
            path: The file.
            flags: How.
            mode: Permission bits if it is created, less the umask.
        """

    async def open_file_beneath(self, root: str, path: str) -> DataFile:
        """Open a regular file or block device inside the folder `root` for reading, without following any symlink below it, whoever
        changes the folder meanwhile. ELOOP for a symlink, EXDEV for what leads outside, else as `open_file`.

        Args:
            root: The folder.
            path: The file, relative to it.
        """

    async def map_file(self, path: str, *, write: bool = False) -> MappedBytes:
        """Map a regular file that is not empty (EINVAL) into memory, shared with all who have it open.

        Args:
            path: The file.
            write: Whether it may be changed. Space it does not have yet (holes) must be allocated before it is written to.
        """

    async def send_file(self, file: OpenFile, transport: asyncio.WriteTransport, *, offset: int, n_bytes: int) -> int:
        """Send a part of a file over a connection, in the kernel where it can be done (sendfile, splice), else in pieces.

        What was written to the transport before goes first; nobody else writes to it meanwhile. Returns when the last byte was taken by
        the kernel or by the transport's buffer. A cancelled or failed call has sent an unknown part: the connection is then of no use.

        Args:
            file: One of this disk's, opened for reading.
            transport: The connection (TCP, Unix, TLS) or the writing end of a pipe.
            offset: Where in the file, in bytes.
            n_bytes: How many; fewer are sent if the file ends before.

        Returns:
            The number of bytes sent.

        Raises:
            OSError: ConnectionError: the connection ended or was closed meanwhile. Else the disk failed.
        """

    async def copy_file(self, source: str, target: str, *, mode: int = 0o600) -> int:
        """Copy a regular file to a new one (EEXIST), in the kernel where it can be done; not durable. On any failure `target` is removed.
        Returns the number of bytes."""

    async def compress_file(self, source: str, target: str, *, level: int = 3, mode: int = 0o600) -> int:
        """Write a file's bytes as one zstd frame with a checksum to a new file (EEXIST), durable but for its name; off the loop. On any
        failure `target` is removed. Returns the number of bytes written."""

    def io_facts(self) -> IoFacts:
        """Return how data files are read and written."""

    def io_statistics(self) -> IoStatistics:
        """Return what data files have done."""

    async def list(self, path: str) -> Sequence[str]:
        """Return the sorted names in a folder; [] if the folder does not exist."""

    async def stat(self, path: str) -> FileStat | None:
        """Return facts about a path without following a last symlink; None if there is nothing."""

    async def make_directory(self, path: str, *, mode: int = 0o700) -> None:
        """Create a folder with exactly `mode`, whatever the umask, and its missing parents with `mode` less what lets others write; one
        that exists is left as it is."""

    async def rename(self, source: str, target: str) -> None:
        """Move within one file system, replacing a file at `target`."""

    async def remove(self, path: str) -> None:
        """Remove a file or an empty folder; nothing there is fine."""

    async def remove_tree(self, path: str) -> None:
        """Remove a folder with all it holds, never crossing into a mounted file system (EBUSY); nothing there is fine."""

    async def sync_directory(self, path: str) -> None:
        """Make the names in a folder durable."""

    async def free_bytes(self, path: str) -> int:
        """Return what an unprivileged writer could still store there."""

    async def tree_bytes(self, path: str) -> int:
        """Return the bytes allocated under a folder, hard links counted once."""

    def watch(self, path: str) -> AbstractAsyncContextManager[Watch]:
        """Watch one folder, from the moment the context is entered."""

    def watch_folders(self) -> AbstractAsyncContextManager[FolderWatches]:
        """Watch many folders, none at first. EMFILE, the kernel's limit for the user or the process is reached."""

    async def lock(self, path: str, contents: bytes) -> OpenFile | None:
        """Take an exclusive advisory lock on a file (created if missing) and write `contents` into it; None if another process holds it.
        Closing the returned file, or dying, releases it. A symlink at `path` is not followed: ELOOP."""

    async def lock_shared(self, path: str) -> OpenFile | None:
        """Take an advisory lock that several may have on a file that exists, and write nothing; None if somebody has it exclusively.
        Released as that of `lock`, and links are not followed either."""

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
        """Unpack a tar (plain, gzip or zstd, detected) below the empty or missing folder `target`, in overlayfs form (whiteouts as 0/0
        devices, opaque folders by xattr). On any failure `target` is removed. What it returned from is durable, the name `target`
        excepted (`sync_directory` of its parent).

        Raises:
            BadArchive: An entry is unsafe, damaged, or over a limit.
            OSError: The disk failed.
        """

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
        """Write a layer (plain, gzip or zstd, detected) as an uncompressed tar and as an EROFS index over it, two new files (EEXIST):
        mounted together (`Kernel.mount_erofs`) they show what `unpack_layer` would make. On any failure both are removed. What it
        returned from is durable, the two names excepted.

        Raises:
            BadArchive: An entry is unsafe, damaged, or over a limit.
            Unsupported: The layer is fine, but an index cannot say it; `unpack_layer` can.
            OSError: The disk failed.
        """

    async def pack_layer(
        self,
        source: str,
        target: str,
        *,
        limits: UnpackLimits = UnpackLimits(),  # noqa: B008 - an immutable tuple
    ) -> Packed:
        """Write the folder `source` (overlayfs form) as an OCI layer tar to the new file `target`, holes of files left out. On any failure
        `target` is removed.

        Args:
            source: The folder. It must not change meanwhile.
            target: The file.
            limits: What a later `unpack_layer` will have: a file over `entry_bytes_max`, holes included, and what brings the archive or
                the sum of all files, holes included, over `unpacked_bytes_max` is refused. The others are not looked at.

        Raises:
            BadArchive: An entry has no form in an archive.
            OSError: EFBIG: over a limit, the file in the source named. Else the disk failed.
        """

    async def index_archive(self, source: str) -> Sequence[ArchiveMember]:
        """List the members of an outer tar without unpacking it. Raises BadArchive."""

    async def digest(self, path: str) -> str:
        """Return "sha256:..." of a file's bytes."""
