"""Worker: a process that serves connections and knows nothing: it asks the agent's process for every answer (see `workers`)."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Final

import msgspec

from isopod.net.http.messages import HttpError, Request, Response
from isopod.net.http.server import HttpServer
from isopod.net.tls import ReloadingTls
from isopod.pulse.security import LIMITS, open_tls
from isopod.pulse.workers import CHANNEL, RELOAD, Ask, Cut, Drop, Gone, Head, More, Piece, Told, ToMain, ToWorker
from isopod.runtime.companion import STOP, Outcome
from isopod.runtime.logger import Logger
from isopod.runtime.metrics import Registry
from isopod.world.errors import Disconnected, IsopodError
from isopod.world.network import ProtocolFactory, ServerTls
from isopod.world.shards import Channel, Link, Part
from isopod.world.world import World

DRAIN_S: Final = 1.2
MAIN: Final = "isopod-pulse"


async def serve(world: World, link: Link) -> None:
    """Be a worker: an `Entry` of `isopod.world.shards`."""
    told: asyncio.Queue[tuple[bytes, tuple[Part, ...]]] = asyncio.Queue()
    link.start(lambda message, parts: told.put_nowait((message, tuple(parts))), lambda: told.put_nowait((STOP, ())))
    message, parts = await told.get()
    if message == STOP:
        return
    first = msgspec.json.decode(message, type=Told)
    logger = Logger(link.write_log, world.clock).bind(part="pulse", worker=first.number)
    logger.set_level(first.settings.log_level)
    try:
        tls = await open_tls(world, first.settings, logger)
    except IsopodError as error:
        _close(parts)
        link.send(msgspec.json.encode(Outcome(code=error.code, message=error.message, hint=error.hint)))
        await told.get()  # the agent has read it
        return
    asker = Asker(world.shards.open_channel(parts[0], CHANNEL, MAIN))
    server = HttpServer(world, asker.answer, logger=logger, metrics=Registry(), limits=LIMITS)
    link.send(msgspec.json.encode(Outcome()))
    try:
        await _Connections(world, asker, server.factory(MAIN), tls).serve(told)
        await server.drain(DRAIN_S)
    finally:
        await server.close()
        asker.close()
        if tls is not None:
            await tls.close()


class _Connections:
    """Takes connections as they come.

    Args:
        world: The ports.
        asker: Told of those that ended.
        factory: Makes their protocols.
        tls: Secures them.
    """

    def __init__(self, world: World, asker: "Asker", factory: ProtocolFactory, tls: ReloadingTls[ServerTls] | None) -> None:
        self._shards = world.shards
        self._asker = asker
        self._factory = factory
        self._tls = tls
        self._n = 0
        self._tasks: dict[int, asyncio.Task[None]] = {}

    async def serve(self, told: asyncio.Queue[tuple[bytes, tuple[Part, ...]]]) -> None:
        """Take connections until told to stop."""
        try:
            while True:
                message, parts = await told.get()
                if message == STOP:
                    _close(parts)
                    return
                if message == RELOAD and self._tls is not None:
                    await self._tls.reload()
                for part in parts:
                    self._n += 1
                    task = asyncio.get_running_loop().create_task(self._adopt(part), name=f"pulse connection {self._n}")
                    self._tasks[self._n] = task
                    task.add_done_callback(partial(self._adopted, self._n))
        finally:
            tasks = tuple(self._tasks.values())
            for task in tasks:  # TLS that was just begun
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _adopt(self, part: Part) -> None:
        try:
            await self._shards.adopt(part, self._factory, on_gone=self._asker.on_gone, tls=None if self._tls is None else self._tls.tls)
        except OSError:
            self._asker.on_gone()

    def _adopted(self, number: int, _: asyncio.Task[None]) -> None:
        del self._tasks[number]


class Asker:
    """Asks the agent's process.

    Args:
        channel: To it.
    """

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._n_asked = 0
        self._waiting: dict[int, asyncio.Future[Head]] = {}
        self._bodies: dict[int, Body] = {}
        self._decoder = msgspec.msgpack.Decoder(ToWorker)
        self._encode = msgspec.msgpack.Encoder().encode
        self._is_closed = False
        channel.start(self._on_messages, lambda _: self.close())

    async def answer(self, request: Request) -> Response:
        """Return the answer to a request.

        Raises:
            HttpError: 503: the agent's process is gone.
        """
        if self._is_closed:
            raise HttpError(503, "the agent is ending")
        self._n_asked += 1
        number = self._n_asked
        own = request.transport_info("sockname")
        waiting = self._waiting[number] = asyncio.get_running_loop().create_future()
        self.send(
            Ask(
                number=number,
                method=request.method,
                target=request.target,
                headers=request.headers.pairs,
                version=request.version,
                peer=str(request.peer[0] if isinstance(request.peer, tuple) else request.peer),
                scheme=request.scheme,
                own=(str(own[0]), int(own[1])) if isinstance(own, tuple) else None,
            )
        )
        try:
            head = await waiting
        except asyncio.CancelledError:
            self.send(Drop(number))
            raise
        finally:
            del self._waiting[number]
        return Response(head.status, head.headers, self._bodies[number] if head.body is None else head.body)

    def send(self, message: ToMain) -> None:
        """Send a message."""
        self._channel.send(self._encode(message))

    def on_gone(self) -> None:
        """A connection ended."""
        self.send(Gone())

    def forget(self, number: int) -> None:
        """A body has ended."""
        self._bodies.pop(number, None)

    def close(self) -> None:
        """Ask no more; what was asked fails."""
        self._is_closed = True
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(HttpError(503, "the agent is ending"))
        for body in tuple(self._bodies.values()):
            body.put(None)
        self._channel.close()

    def _on_messages(self, messages: Sequence[bytes]) -> None:
        for message in messages:
            told = self._decoder.decode(message)
            if isinstance(told, Head):
                waiting = self._waiting.get(told.number)
                if waiting is None or waiting.done():
                    continue
                if told.body is None:
                    self._bodies[told.number] = Body(self, told.number)
                waiting.set_result(told)
            elif told.number in self._bodies:
                self._bodies[told.number].put(told.data if isinstance(told, Piece) else None)
            elif isinstance(told, Cut) and told.number in self._waiting and not self._waiting[told.number].done():
                self._waiting[told.number].set_exception(HttpError(500, "the agent failed to answer", "see its log"))


class Body:
    """The pieces of an answer as they come. Cut where it must not look whole.

    Args:
        asker: Gets them.
        number: Of the request.
    """

    def __init__(self, asker: Asker, number: int) -> None:
        self._asker = asker
        self._number = number
        self._pieces: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._is_over = False

    def put(self, piece: bytes | None) -> None:
        """Take a piece in; an empty one is the end, None that there is no end."""
        self._pieces.put_nowait(piece)

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        if self._is_over:
            raise StopAsyncIteration
        piece = await self._pieces.get()
        if piece:
            self._asker.send(More(self._number))
            return piece
        self._is_over = True
        self._asker.forget(self._number)
        if piece is None:
            raise Disconnected("the agent's process")
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """Nobody takes it any more."""
        if not self._is_over:
            self._is_over = True
            self._asker.forget(self._number)
            self._asker.send(Drop(self._number))


def _close(parts: Sequence[Part]) -> None:
    for part in parts:
        part.close()
