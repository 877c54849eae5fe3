"""ContainerFiles: the files of one container as archives, by a helper process for each copy.

The helper (`Processes.own_program("copier")`) sees what the container's first process has as its root, volumes and memory file systems too;
of a container that does not run, the overlay that the caller mounted. What it meets there is the container's and not to be trusted, so it
does the work, and the daemon only moves bytes: a helper that hangs is ended, and so is one whose container ended.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any, Final, NamedTuple, Self

import msgspec

from isopod.api.machines import PathFacts
from isopod.engine.launch import ENVIRONMENT
from isopod.world.errors import InvalidArgument, IsopodError, NotFound, RuntimeFailed, from_os_error
from isopod.world.processes import Pipe, PipeDirection, Process, ProcessIdentity
from isopod.world.world import World

IDLE_LIMIT_S: Final = 60.0
"""So long may a helper neither give nor take anything."""
_ANSWER_BYTES_MAX: Final = 64 << 10
_IN: Final = "_COPY_IN"
_OUT: Final = "_COPY_OUT"
_SAYS: Final = "_COPY_SAYS"


class Bind(NamedTuple):
    """A file or folder of the host that a container shows."""

    source: str
    target: str
    read_only: bool


class ContainerFiles:
    """See `isolation.Files`.

    Args:
        world: Where the container is.
        name: Its name, for errors.
        root: Its first process, or the folder that is its root.
        binds: What is shown in that folder.
    """

    unpacks: Final = True

    def __init__(self, world: World, name: str, root: ProcessIdentity | str, binds: Sequence[Bind] = ()) -> None:
        self._world = world
        self._name = name
        self._process = root if isinstance(root, ProcessIdentity) else None
        self._root: dict[str, Any] = (
            {"folder": root, "binds": list(binds)} if isinstance(root, str) else {"pid": root.pid, "ticks": root.started_ticks}
        )

    async def look(self, path: str, *, follow: bool) -> PathFacts:
        """Ask what is at a path."""
        async with _Helper(self._world, self._name, self._process) as helper:
            await helper.start({"op": "look", "root": self._root, "path": path, "follow": follow}, {})
            return msgspec.convert(await helper.answer(), PathFacts)

    async def read(self, path: str) -> AsyncGenerator[bytes, None]:
        """Yield an archive of what is at a path."""
        async with _Helper(self._world, self._name, self._process) as helper:
            await helper.start({"op": "archive", "root": self._root, "path": path}, {_OUT: "read"})
            await helper.answer()
            async with aclosing(helper.pieces()) as pieces:
                async for piece in pieces:
                    yield piece
            await helper.finish()

    async def write(self, path: str, pieces: AsyncIterator[bytes]) -> None:
        """Unpack an archive in a folder."""
        async with _Helper(self._world, self._name, self._process) as helper:
            await helper.start({"op": "extract", "root": self._root, "path": path}, {_IN: "write"})
            async for piece in pieces:
                if not await helper.feed(piece):
                    break
            helper.close(_IN)
            await helper.answer()


class _Helper:
    """One run of the program, ended on the way out."""

    def __init__(self, world: World, name: str, watched: ProcessIdentity | None) -> None:
        self._world = world
        self._name = name
        self._watched = watched
        self._process: Process | None = None
        self._guard: asyncio.Task[None] | None = None
        self._said = b""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_ended: object) -> None:
        if self._guard is not None:
            self._guard.cancel()
        if self._process is not None:
            for pipe in self._process.pipes.values():
                pipe.close()
            await self._process.end()

    async def start(self, request: dict[str, Any], pipes: dict[str, PipeDirection]) -> None:
        """Start it. Raises UnavailableError."""
        processes = self._world.processes
        argv = [*processes.own_program("copier"), msgspec.json.encode(request).decode()]
        try:
            self._process = await processes.spawn(argv, env=ENVIRONMENT, pipes={_SAYS: "read", **pipes})
        except OSError as error:
            raise from_os_error(error, "start the copy of files of", self._name) from error
        if self._watched is not None:
            self._guard = asyncio.get_running_loop().create_task(self._end_with(self._watched), name=f"copy of {self._name}")

    async def answer(self) -> dict[str, Any]:
        """Return what it says next.

        Raises:
            NotFound, InvalidArgument: As it says.
            RuntimeFailed: It could not, or ended without a word.
        """
        while b"\n" not in self._said:
            data = await self._within(self._pipe(_SAYS).read())
            if not data or len(self._said) > _ANSWER_BYTES_MAX:
                raise RuntimeFailed("copy files of", self._name, self._why_not())
            self._said += data
        line, _, self._said = self._said.partition(b"\n")
        found = msgspec.json.decode(line)
        if "ok" in found:
            return dict(found["ok"])
        raise self._refusal(str(found["error"]["code"]), str(found["error"]["message"]))

    async def pieces(self) -> AsyncGenerator[bytes, None]:
        """Yield what it writes."""
        while data := await self._within(self._pipe(_OUT).read()):
            yield data

    async def feed(self, data: bytes) -> bool:
        """Give it something to read; False if it takes no more."""
        try:
            await self._within(self._pipe(_IN).write(data))
        except (BrokenPipeError, ConnectionResetError):
            return False
        return True

    async def finish(self) -> None:
        """See that what it wrote is whole. Raises RuntimeFailed."""
        assert self._process is not None, "it was started"
        if await self._within(self._process.wait()):
            await self.answer()  # why it broke off

    def close(self, name: str) -> None:
        """Close a pipe."""
        self._pipe(name).close()

    def _pipe(self, name: str) -> Pipe:
        assert self._process is not None, "it was started"
        return self._process.pipes[name]

    async def _within(self, step: Any) -> Any:
        try:
            async with asyncio.timeout(IDLE_LIMIT_S):
                return await step
        except TimeoutError as error:
            raise RuntimeFailed("copy files of", self._name, f"nothing moved for {IDLE_LIMIT_S:g} s") from error

    async def _end_with(self, watched: ProcessIdentity) -> None:
        """End the helper when the container ends: it holds on to the container's mounts."""
        await self._world.processes.wait_gone(watched)
        if self._process is not None:
            await self._process.end()

    def _why_not(self) -> str:
        ended = self._guard is not None and self._guard.done()
        return "it ended meanwhile" if ended else "the helper ended without a word"

    def _refusal(self, code: str, why: str) -> IsopodError:
        if code == "not_found":
            return NotFound(f"path in {self._name}", why)
        if code == "invalid":
            return InvalidArgument("copy", self._name, why)
        return RuntimeFailed("copy files of", self._name, why)
