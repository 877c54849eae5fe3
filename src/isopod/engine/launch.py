"""Launch: a program beside the daemon that is started in two steps. What conmon and isopod's own shim have in common.

Spawned, the program waits on its start pipe; only when the caller has recorded who it is does `Launch.create` let it go on. A pipe that
closes without the word (the daemon was killed just then) lets it go on too: the next daemon finds it among the strays. It tells what
came of it on its sync pipe, one JSON object a line: {"data": PID} or {"data": -1, "message": WHY}. Whatever fails after the spawn ends the
program's whole session.

Source: conmon(8) 2.1; the pipe messages as conmon 2.1.6 sends them, checked by experiment.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import msgspec

from isopod.world.errors import IsopodError, RuntimeFailed, from_os_error
from isopod.world.processes import Pipe, PipeDirection, Process, ProcessIdentity
from isopod.world.world import World

CREATE_TIMEOUT_S: Final = 60.0
START_PIPE: Final = "_OCI_STARTPIPE"
SYNC_PIPE: Final = "_OCI_SYNCPIPE"
ENVIRONMENT: Final = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
"""All that a program gets: the daemon's own environment may hold secrets."""
_LINE_BYTES_MAX: Final = 64 << 10

Explain = Callable[[str], IsopodError]
"""Makes the error of what the program gave as its reason."""


class PipeMessage(msgspec.Struct):
    """What a program says on a pipe."""

    data: int
    message: str = ""


class SyncPipe:
    """A program's messages, one JSON object a line."""

    def __init__(self, pipe: Pipe) -> None:
        self._pipe = pipe
        self._buffer = b""

    async def next(self) -> PipeMessage | None:
        """Return the next message, None at the end or for anything that is not one."""
        while b"\n" not in self._buffer:
            data = await self._pipe.read()
            if not data or len(self._buffer) > _LINE_BYTES_MAX:
                return None
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        try:
            return msgspec.json.decode(line, type=PipeMessage)
        except msgspec.DecodeError:
            return None

    def close(self) -> None:
        """Close our end."""
        self._pipe.close()


class Launch:
    """A program that waits for the word. `create` is called once, or `abort`.

    Args:
        process: The program, spawned with its two pipes.
        name: The container's name, for errors.
        explain: Makes the error of a reason it gives.
    """

    def __init__(self, process: Process, name: str, explain: Explain) -> None:
        self._process = process
        self._name = name
        self._explain = explain

    @property
    def supervisor(self) -> ProcessIdentity:
        """Who the program is."""
        return self._process.identity

    async def create(self) -> int:
        """Let the program go on; return the pid of the process it started.

        Raises:
            CommandNotRunnable: The command is missing or not executable.
            RuntimeFailed: It refused, or did not answer in time.
        """
        start, sync = self._process.pipes[START_PIPE], SyncPipe(self._process.pipes[SYNC_PIPE])
        try:
            async with asyncio.timeout(CREATE_TIMEOUT_S):
                await start.write(b"\0")
                return expect_pid(await sync.next(), self._name, self._explain)
        except (TimeoutError, OSError) as error:
            await self.abort()
            raise RuntimeFailed("create", self._name, why_not(error, CREATE_TIMEOUT_S)) from error
        except BaseException:
            await self.abort()
            raise
        finally:
            start.close()
            sync.close()

    async def wait_supervisor(self) -> None:
        """Return when the program ended (also reaps it)."""
        await self._process.wait()

    async def abort(self) -> None:
        """End the program and what it started so far; the container, if there is one, is the caller's to delete."""
        await end_process(self._process)


async def spawn(world: World, argv: Sequence[str], pipes: Mapping[str, PipeDirection], name: str) -> Process:
    """Start a program in a session of its own, with nothing of the daemon's environment.

    Args:
        world: Where.
        argv: Program and arguments.
        pipes: The pipes it gets.
        name: The container's name, for errors.

    Raises:
        UnavailableError: It could not be started.
    """
    try:
        return await world.processes.spawn(argv, env=ENVIRONMENT, pipes=pipes)
    except OSError as error:
        raise from_os_error(error, "start the supervisor of", name) from error


async def end_process(process: Process) -> None:
    """Close our pipes, and kill a program's whole session."""
    for pipe in process.pipes.values():
        pipe.close()
    await process.end()


def expect_pid(message: PipeMessage | None, name: str, explain: Explain) -> int:
    """Return the pid that a message tells.

    Raises:
        RuntimeFailed: The program ended without a word.
        IsopodError: As `explain` makes it.
    """
    if message is None:
        raise RuntimeFailed("create", name, "the supervisor ended without a word")
    if message.data <= 0:
        raise explain(message.message)
    return message.data


def why_not(error: BaseException, limit_s: float) -> str:
    """Return the reason in a failure or a time-out, in words."""
    return f"no answer within {limit_s:g} s" if isinstance(error, TimeoutError) else str(error)
