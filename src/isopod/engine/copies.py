"""Copies: files out of containers and into them, whatever keeps them apart.

Of one that runs, or is paused, its root as its own processes see it. One that does not run is held still meanwhile: its root is mounted
for the copy, with its volumes, and nobody starts or removes it before that is undone. A virtual machine must run: its files lie on a disk
that only its own kernel may read.
"""

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Final

from isopod.api.machines import CopyFrom, CopyTo, PathFacts, StatPath
from isopod.engine.containers import Containers
from isopod.engine.images.store import ImageStore
from isopod.engine.isolation import Files
from isopod.world.errors import InvalidArgument, NotFound

PATH_BYTES_MAX: Final = 4096
_RUNS: Final = ("running", "paused")
_PACKED: Final = ((b"\x1f\x8b", "gzip -dc"), (b"BZh", "bzip2 -dc"), (b"\xfd7zXZ", "xz -dc"), (b"\x28\xb5\x2f\xfd", "zstd -dc"))


class Copies:
    """Copies files of containers.

    Args:
        containers: Who they are, and their locks.
        images: What those that do not run are mounted from.
    """

    def __init__(self, containers: Containers, images: ImageStore) -> None:
        self._containers = containers
        self._images = images

    async def look(self, request: StatPath) -> PathFacts:
        """Return what is at a path; that nothing is there, but its folder, is an answer too.

        Raises:
            NotFound: No such container, or a folder on the way is missing.
            WrongState: It is a virtual machine that does not run.
        """
        path = _checked(request.path)
        async with self._files(request.name) as files:
            return await files.look(path, follow=request.follow)

    async def read(self, request: CopyFrom) -> AsyncGenerator[bytes, None]:
        """Yield a tar archive of a file or folder; its names begin with the last part of the path.

        Raises:
            NotFound: No such container, file or folder.
            WrongState: It is a virtual machine that does not run.
            RuntimeFailed: It broke off.
        """
        path = _checked(request.path)
        async with self._files(request.name) as files, aclosing(files.read(path)) as pieces:
            async for piece in pieces:
                yield piece

    async def write(self, request: CopyTo, pieces: AsyncIterator[bytes]) -> None:
        """Unpack a tar archive in a folder.

        Raises:
            NotFound: No such container or folder.
            WrongState: It is a virtual machine that does not run.
            InvalidArgument: It is no archive, or leads out of the root.
            RuntimeFailed: It broke off; what was unpacked stays.
        """
        path = _checked(request.path)
        async with self._files(request.name) as files:
            await files.write(path, pieces if files.unpacks else _unpacked(request.name, pieces))

    @asynccontextmanager
    async def _files(self, name: str) -> AsyncIterator[Files]:
        entry = self._containers.entry(name)
        isolation = self._containers.isolation(entry.record)
        if entry.record.status in _RUNS or isolation.needs_running:
            async with isolation.files(entry.record, None) as files:
                yield files
            return
        async with entry.lock:
            if self._containers.is_gone(entry):
                raise NotFound("container", entry.last.name, "it was removed meanwhile")
            record = entry.record
            image = None if record.status in _RUNS else self._images.resolve(record.image_id)
            async with isolation.files(record, image) as files:
                yield files


def _checked(path: str) -> str:
    if not path.startswith("/") or "\0" in path or len(path.encode(errors="replace")) > PATH_BYTES_MAX:
        raise InvalidArgument("path", path[:200], "want an absolute path inside the container")
    return path


async def _unpacked(name: str, pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Pass an archive on, unless it is a compressed one."""
    is_first = True
    async for piece in pieces:
        tool = next((tool for magic, tool in _PACKED if piece.startswith(magic)), "") if is_first else ""
        if tool:
            why, hint = "a guest takes archives that are not compressed", f"{tool} ARCHIVE | isopod cp - {name}:PATH"
            raise InvalidArgument("archive", name, why, hint)
        is_first = False
        yield piece
