"""Companion: a process beside this one: started, told what to do, started again if it dies, and told to stop.

It ends with its parent, however that ends: its link closes, and the kernel kills it. What it runs is an `Entry` of `isopod.world.shards`
that reads one message, answers with an `Outcome`, and ends when it reads `STOP`.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import Final, Protocol

import msgspec

from isopod.runtime.logger import Logger
from isopod.world.errors import IsopodError, UnavailableError, from_code, from_os_error
from isopod.world.shards import Link, Part, ShardProcess
from isopod.world.world import World

START_S: Final = 20.0
STOP_S: Final = 5.0
"""After being told to stop it is ended when so much time is over."""
PAUSE_FIRST_S: Final = 0.5
PAUSE_MAX_S: Final = 30.0
STEADY_S: Final = 60.0
"""One that lived so long did not die of being started."""
STOP: Final = b"stop"


class Outcome(msgspec.Struct, frozen=True):
    """What a companion says once: where it serves, or why it does not."""

    address: str = ""
    code: str = ""
    message: str = ""
    hint: str = ""


class Companion:
    """Start it once, and stop it.

    Args:
        world: Where the process is started.
        logger: Where its comings and goings are reported.
        entry: What it runs, "MODULE:FUNCTION".
        told: The message it is given.
        word: What it is, as one word: it begins its events, and the process is called isopod-WORD.
    """

    def __init__(self, world: World, logger: Logger, *, entry: str, told: bytes, word: str) -> None:
        self.name = f"isopod-{word}"
        self.address = ""
        """Where it serves."""
        self.n_restarts = 0
        self._world = world
        self._logger = logger
        self._entry = entry
        self._told = told
        self._word = word
        self._process: ShardProcess | None = None
        self._watching: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int:
        """The process's, 0 while there is none."""
        return self._process.identity.pid if self._process is not None else 0

    async def start(self) -> None:
        """Start it; return when it serves.

        Raises:
            IsopodError: It says that it cannot.
        """
        await self._begin()
        self._watching = asyncio.get_running_loop().create_task(self._watch(), name=self.name)

    async def stop(self) -> None:
        """Have it end its calls and go; kill it if it does not."""
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        process, self._process = self._process, None
        if process is None:
            return
        process.link.send(STOP)
        try:
            async with asyncio.timeout(STOP_S):
                await process.wait()
        except TimeoutError:
            self._logger.warning(f"{self._word}.killed", why=f"it did not stop within {STOP_S:g} s")
        finally:
            await process.end()

    # --- inside -------------------------------------------------------------------------------------------------------

    async def _begin(self) -> None:
        try:
            process = await self._world.shards.start(self._entry, name=self.name)
        except OSError as error:
            raise from_os_error(error, "start", self.name) from error
        try:
            self.address = await self._introduce(process)
        except BaseException:
            await process.end()
            raise
        self._process = process
        self._logger.info(f"node.{self._word}", address=self.address, pid=process.identity.pid)

    async def _introduce(self, process: ShardProcess) -> str:
        """Tell it what it is to do; return where it serves."""
        said: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()

        def on_message(message: bytes, parts: Sequence[Part]) -> None:
            for part in parts:
                part.close()
            if not said.done():
                said.set_result(msgspec.json.decode(message, type=Outcome))

        def on_closed() -> None:
            if not said.done():
                said.set_result(Outcome(code="unavailable", message=f"{self.name} ended when it was started", hint="see the node's log"))

        process.link.start(on_message, on_closed)
        process.link.send(self._told)
        try:
            async with asyncio.timeout(START_S):
                outcome = await said
        except TimeoutError:
            raise UnavailableError(f"{self.name} did not start within {START_S:g} s", "see the node's log") from None
        if outcome.code:
            raise from_code(outcome.code, outcome.message, outcome.hint)
        return outcome.address

    async def _watch(self) -> None:
        """Start it again whenever it dies, later each time it does so soon."""
        loop = asyncio.get_running_loop()
        pause_s = PAUSE_FIRST_S
        while True:
            process = self._process
            if process is not None:
                begun_s = loop.time()
                code = await process.wait()
                self._process = None
                await process.end()
                self._logger.error(f"{self._word}.died", code=code, pid=process.identity.pid)
                pause_s = PAUSE_FIRST_S if loop.time() - begun_s >= STEADY_S else min(PAUSE_MAX_S, pause_s * 2)
            await asyncio.sleep(pause_s)
            try:
                await self._begin()
                self.n_restarts += 1
            except IsopodError as error:
                pause_s = min(PAUSE_MAX_S, pause_s * 2)
                self._logger.error(f"{self._word}.not_started", why=error.message, again_in_s=pause_s)


class Service(Protocol):
    """What a companion serves with."""

    async def start(self) -> str:
        """Serve; return where. Raises IsopodError."""

    async def stop(self) -> None:
        """Serve no more; may be called after a failed start."""


async def attend(link: Link, make: Callable[[bytes], Service]) -> None:
    """Be a companion: read the message, serve, and answer with where or why not, until told to stop or the parent is gone.

    Args:
        link: To the parent.
        make: Makes of the message what serves.
    """
    told: asyncio.Queue[bytes] = asyncio.Queue()

    def on_message(message: bytes, parts: Sequence[Part]) -> None:
        for part in parts:
            part.close()
        told.put_nowait(message)

    link.start(on_message, lambda: told.put_nowait(STOP))
    message = await told.get()
    if message == STOP:
        return
    service = make(message)
    try:
        try:
            address = await service.start()
        except IsopodError as error:
            link.send(msgspec.json.encode(Outcome(code=error.code, message=error.message, hint=error.hint)))
            await told.get()  # the parent has read it
            return
        link.send(msgspec.json.encode(Outcome(address=address)))
        while await told.get() != STOP:
            pass
    finally:
        await service.stop()
