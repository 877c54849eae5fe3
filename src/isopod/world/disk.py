"""Disk: the port to files.

Paths are absolute strings. Failures are OSErrors with the errno of the host's kernel, in both Worlds; callers wrap them once
(`errors.from_os_error`). What is not made durable (`write_atomic`, `File.sync`, `sync_directory`) may be gone after a crash.
"""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import NamedTuple, Protocol

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

    async def append(self, data: bytes) -> None:
        """Write all of `data` at the end."""

    async def sync(self) -> None:
        """Make data and size durable (fdatasync)."""

    def size_bytes(self) -> int:
        """Return the size now."""

    def close(self) -> None:
        """Close; further calls raise ValueError."""


class Watch(Protocol):
    """Changes in one directory. Names may repeat; after an overflow "" is delivered: look at everything."""

    def __aiter__(self) -> AsyncIterator[str]:
        """Iterate over the names of entries that were created, written, closed, moved in or removed."""


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

    async def lock(self, path: str, contents: bytes) -> OpenFile | None:
        """Take an exclusive advisory lock on a file (created if missing) and write `contents` into it; None if another process holds it.
        Closing the returned file, or dying, releases it. A symlink at `path` is not followed: ELOOP."""

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
