"""Workers: processes that take connections, beside the one that has the figures.

A worker does what costs time by the byte: TLS, HTTP, the kernel's copies. What is shown stays in one place: a worker asks for each
request, and gets a whole answer, or a stream of pieces of which WINDOW are under way at once. So a thousand sandboxes are kept once, and an
answer is as consistent as without workers.

    client --> this process accepts --connection--> worker --Ask--> this process --Head, Piece...--> worker --> client

A worker that dies is started again; its connections die with it, its requests are forgotten. With one shard there are no workers: this
process serves by itself. Rejected: a copy of the figures in every worker (some 200 MB each), and letting the kernel choose by SO_REUSEPORT
(a few scrapers that keep their connections would all meet one worker).
"""

import asyncio
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import partial
from typing import Any, Final

import msgspec

from isopod.net.http.headers import Headers
from isopod.net.http.messages import Answer, Request, Response
from isopod.pulse.security import SOCKET_MODE
from isopod.pulse.settings import PulseSettings
from isopod.runtime.companion import STOP, Outcome
from isopod.runtime.logger import Logger
from isopod.runtime.shards.connections import Distribution
from isopod.world.errors import Disconnected, IsopodError, UnavailableError, from_code, from_os_error
from isopod.world.network import Address
from isopod.world.shards import Channel, ChannelSettings, Part, ShardProcess
from isopod.world.world import World

ENTRY: Final = "isopod.pulse.worker:serve"
RELOAD: Final = b"reload"
"""To a worker: the files for TLS are to be read again."""
WINDOW: Final = 2
"""Pieces of an answer between the processes."""
PIECE_BYTES_MAX: Final = 1 << 20
CPUS_PER_SHARD: Final = 8
SHARDS_MAX: Final = 4
"""By default; a setting may ask for more."""
START_S: Final = 20.0
STOP_S: Final = 1.8
PAUSE_S: Final = 1.0
CHANNEL: Final = ChannelSettings(ring_bytes=1 << 20)


class Told(msgspec.Struct, frozen=True):
    """What a worker is told first. A channel's end comes with it."""

    settings: PulseSettings
    number: int


class Ask(msgspec.Struct, frozen=True, tag="ask", array_like=True):
    """Worker: somebody asks."""

    number: int
    method: str
    target: str
    headers: tuple[tuple[str, str], ...]
    version: str
    peer: str
    scheme: str
    own: tuple[str, int] | None
    """The address that was connected to; None for a Unix socket."""


class More(msgspec.Struct, frozen=True, tag="more", array_like=True):
    """Worker: a piece was sent on."""

    number: int


class Drop(msgspec.Struct, frozen=True, tag="drop", array_like=True):
    """Worker: nobody wants the answer any more."""

    number: int


class Gone(msgspec.Struct, frozen=True, tag="gone", array_like=True):
    """Worker: a connection ended."""


class Head(msgspec.Struct, frozen=True, tag="head", array_like=True):
    """The answer; its body is a stream if it is None."""

    number: int
    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes | None


class Piece(msgspec.Struct, frozen=True, tag="piece", array_like=True):
    """A piece of a stream; an empty one ends it."""

    number: int
    data: bytes


class Cut(msgspec.Struct, frozen=True, tag="cut", array_like=True):
    """The answer ends here, and is not whole."""

    number: int


ToMain = Ask | More | Drop | Gone
ToWorker = Head | Piece | Cut


def n_shards(settings: PulseSettings, world: World) -> int:
    """Return how many processes serve: what the settings say, else one for every CPUS_PER_SHARD processors."""
    if settings.shards:
        return settings.shards
    n_cpus = sum(len(node.cpus) for node in world.shards.topology())
    return min(SHARDS_MAX, max(1, n_cpus // CPUS_PER_SHARD))


class Workers:
    """The workers of one server. Start it once, and stop it.

    Args:
        world: Where processes are started.
        settings: Of the agent.
        answer: Answers a request.
        logger: Told of workers that come and go.
    """

    def __init__(
        self, world: World, settings: PulseSettings, answer: Callable[[Request], Answer | Awaitable[Answer]], logger: Logger
    ) -> None:
        self._world = world
        self._settings = settings
        self._answer = answer
        self._logger = logger
        self._workers: dict[int, _Worker] = {}
        self._keeping: list[asyncio.Task[None]] = []
        self._distribution: Distribution | None = None
        self.n_restarts = 0

    async def start(self, address: Address, n: int) -> Address:
        """Start workers, and listen.

        Args:
            address: Where.
            n: How many.

        Raises:
            IsopodError: A worker cannot be started, or says that it cannot serve.
            OSError: As `Network.listen`.
        """
        for number in range(n):
            self._workers[number] = await self._begin(number)
        self._distribution = distribution = Distribution(tuple(range(n)), self._hand_out)
        distribution.listener = await self._world.shards.accept(address, distribution.take, mode=SOCKET_MODE)
        loop = asyncio.get_running_loop()
        self._keeping = [loop.create_task(self._keep(number), name=f"pulse worker {number}") for number in range(n)]
        return distribution.address

    async def stop(self) -> None:
        """Accept no more, have the workers end their answers, and end them."""
        if self._distribution is not None:
            await self._distribution.close()
        for task in self._keeping:
            task.cancel()
        await asyncio.gather(*self._keeping, return_exceptions=True)
        await asyncio.gather(*(worker.stop() for worker in self._workers.values()))
        self._workers.clear()

    def reload(self) -> None:
        """Have the workers read the files for TLS again."""
        for worker in self._workers.values():
            worker.process.link.send(RELOAD)

    def pids(self) -> list[int]:
        """Return the workers' process numbers."""
        return [worker.process.identity.pid for worker in self._workers.values()]

    # --- inside -------------------------------------------------------------------------------------------------------

    def _hand_out(self, number: int, part: Part) -> bool:
        worker = self._workers.get(number)
        if worker is None:
            return False
        worker.process.link.send(b"", (part,))
        return True

    async def _begin(self, number: int) -> "_Worker":
        name = f"isopod-pulse-{number}"
        try:
            process = await self._world.shards.start(ENTRY, name=name)
        except OSError as error:
            raise from_os_error(error, "start", name) from error
        ours, theirs = self._world.shards.pair(CHANNEL)
        try:
            said: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
            process.link.start(partial(_on_outcome, said), partial(_on_closed, said))
            process.link.send(msgspec.json.encode(Told(self._settings, number)), (theirs,))
            async with asyncio.timeout(START_S):
                outcome = await said
            if outcome.code:
                raise from_code(outcome.code, outcome.message, outcome.hint)
        except BaseException as error:
            ours.close()
            await process.end()
            if isinstance(error, TimeoutError):
                raise UnavailableError(f"{name} did not start within {START_S:g} s", "see the agent's log") from None
            raise
        worker = _Worker(process, self._answer, lambda: self._on_gone(number), logger=self._logger)
        worker.open(self._world.shards.open_channel(ours, CHANNEL, name))
        self._logger.info("pulse.worker", number=number, pid=process.identity.pid)
        return worker

    def _on_gone(self, number: int) -> None:
        if self._distribution is not None:
            self._distribution.on_gone(number, 1)

    async def _keep(self, number: int) -> None:
        """Start a worker again whenever it dies."""
        while True:
            worker = self._workers.get(number)
            if worker is not None:
                code = await worker.process.wait()
                del self._workers[number]
                await worker.stop()
                if self._distribution is not None:
                    self._distribution.forget(number)
                self._logger.error("pulse.worker_died", number=number, code=code)
            await asyncio.sleep(PAUSE_S)
            try:
                self._workers[number] = await self._begin(number)
                self.n_restarts += 1
            except IsopodError as error:
                self._logger.error("pulse.worker_not_started", number=number, why=error.message)


class _Worker:
    """One worker, as this process sees it, and the requests it asked.

    Args:
        process: It.
        answer: Answers a request.
        on_gone: Told of each of its connections that ended.
        logger: Told of answers that failed.
    """

    def __init__(
        self,
        process: ShardProcess,
        answer: Callable[[Request], Answer | Awaitable[Answer]],
        on_gone: Callable[[], None],
        *,
        logger: Logger,
    ) -> None:
        self.process = process
        self._answer = answer
        self._on_gone = on_gone
        self._logger = logger
        self._channel: Channel | None = None
        self._asked: dict[int, tuple[asyncio.Task[None], asyncio.Semaphore]] = {}
        self._decoder = msgspec.msgpack.Decoder(ToMain)
        self._encode = msgspec.msgpack.Encoder().encode

    def open(self, channel: Channel) -> None:
        """Listen to what it asks."""
        self._channel = channel
        channel.start(self._on_messages, lambda _: self._forget())

    async def stop(self) -> None:
        """Have it go; kill it if it does not. What it asked is forgotten."""
        self.process.link.send(STOP)
        try:
            async with asyncio.timeout(STOP_S):
                await self.process.wait()
        except TimeoutError:
            pass  # killed below
        finally:
            self._forget()
            await asyncio.gather(*(task for task, _ in self._asked.values()), return_exceptions=True)
            if self._channel is not None:
                self._channel.close()
            await self.process.end()

    def _on_messages(self, messages: list[bytes]) -> None:
        for message in messages:
            told = self._decoder.decode(message)
            if isinstance(told, Ask):
                window = asyncio.Semaphore(WINDOW)
                task = asyncio.get_running_loop().create_task(self._serve(told, window), name=f"pulse ask {told.number}")
                self._asked[told.number] = (task, window)
                task.add_done_callback(partial(self._ended, told))
            elif isinstance(told, Gone):
                self._on_gone()
            else:
                task_and_window = self._asked.get(told.number)
                if task_and_window is None:
                    continue  # it has ended meanwhile
                if isinstance(told, More):
                    task_and_window[1].release()
                else:
                    task_and_window[0].cancel()

    def _ended(self, ask: Ask, task: asyncio.Task[None]) -> None:
        self._asked.pop(ask.number, None)
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, Disconnected):
            # As by one process; of the target only the path, since a query may hold anything.
            self._logger.error(
                "http.handler_failed",
                method=ask.method,
                path=ask.target.partition("?")[0],
                error=f"{type(error).__name__}: {error}",
                traceback="".join(traceback.format_exception(error)),
            )
        if task.cancelled() or error is not None:
            self._send(Cut(ask.number))

    async def _serve(self, ask: Ask, window: asyncio.Semaphore) -> None:
        transport = _Own(ask.own)
        request = Request(ask.method, ask.target, Headers(ask.headers), ask.version, b"", ask.peer, ask.scheme, transport)
        answer = self._answer(request)
        response = answer if isinstance(answer, Response) else await answer  # type: ignore[misc]  # a server of figures upgrades nothing
        assert isinstance(response, Response)
        body, headers = response.body, response.headers
        if isinstance(body, bytes) and len(body) <= PIECE_BYTES_MAX:
            self._send(Head(ask.number, response.status, headers, body))
            return
        if isinstance(body, bytes):
            headers = (*headers, ("content-length", str(len(body))))
        self._send(Head(ask.number, response.status, headers, None))
        pieces = aiter(_once(body) if isinstance(body, bytes) else body)
        try:
            async for piece in pieces:
                for begin in range(0, len(piece), PIECE_BYTES_MAX):
                    await window.acquire()
                    self._send(Piece(ask.number, bytes(piece[begin : begin + PIECE_BYTES_MAX])))
            self._send(Piece(ask.number, b""))
        finally:
            close = getattr(pieces, "aclose", None)
            if close is not None:
                await close()

    def _send(self, message: ToWorker) -> None:
        if self._channel is not None:
            self._channel.send(self._encode(message))

    def _forget(self) -> None:
        for task, _ in self._asked.values():
            task.cancel()


async def _once(body: bytes) -> AsyncIterator[bytes]:
    yield body


class _Own:
    """What a request knows of its connection, which is another process's."""

    def __init__(self, own: tuple[str, int] | None) -> None:
        self._own = own

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """See `asyncio.BaseTransport`."""
        return self._own if name == "sockname" and self._own is not None else default


def _on_outcome(said: asyncio.Future[Outcome], message: bytes, parts: Sequence[Part]) -> None:
    for part in parts:
        part.close()
    if not said.done():
        said.set_result(msgspec.json.decode(message, type=Outcome))


def _on_closed(said: asyncio.Future[Outcome]) -> None:
    if not said.done():
        said.set_result(Outcome(code="unavailable", message="a worker ended when it was started", hint="see the agent's log"))
