"""ASGI: runs an unmodified ASGI application (Starlette, FastAPI, Django) as a handler.

    application = AsgiApplication(starlette_app, logger=logger)
    await application.start()                       # lifespan
    server = HttpServer(world, application, ...)
    ...
    await server.drain(10.0)
    await application.stop()

Each request's application runs in a task of its own: unlike a handler it is not cancelled when its client goes, but told (`http.disconnect`
from `receive`, an OSError from `send`), and it may go on after its response, for `orphan_s` at most. A piece of a streamed response is
taken over only when the one before was written, so a slow client slows the application down.
Source: ASGI 3.0, HTTP and WebSocket spec 2.4, lifespan 2.0.
"""

import asyncio
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from typing import Any, Final, Protocol

from isopod.net.http.asgi_websocket import answer_websocket
from isopod.net.http.messages import Answer, HeaderPairs, HttpError, Request, Response
from isopod.runtime.logger import Logger
from isopod.runtime.waiters import Waiters
from isopod.world.errors import DeadlineExceeded, Disconnected, RuntimeFailed

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
AsgiApp = Callable[[Scope, Receive, Send], Awaitable[None]]

LIFESPAN_S: Final = 30.0
ORPHAN_S: Final = 60.0
_OURS: Final = frozenset(("connection", "transfer-encoding", "keep-alive"))
"""Fields that are the server's to write; an application's own are dropped, as ASGI wants."""


class Owner(Protocol):
    """What an exchange needs of its application."""

    app: AsgiApp
    logger: Logger
    orphan_s: float

    def scope(self, request: Request, kind: str) -> dict[str, Any]:
        """Return the scope of a request."""

    def spawn(self, coroutine: Any) -> "asyncio.Task[None]":
        """Run a coroutine to its end, whoever waits for it."""


class AsgiApplication:
    """An ASGI application as a `Handler`.

    Args:
        app: The application.
        logger: For its failures.
        root_path: Where it is mounted, as it shall see it.
        orphan_s: How long it may go on for a client that has gone, or after its response.
    """

    def __init__(self, app: AsgiApp, *, logger: Logger, root_path: str = "", orphan_s: float = ORPHAN_S) -> None:
        self.app = app
        self.logger = logger
        self.orphan_s = orphan_s
        self._root_path = root_path
        self._state: dict[str, Any] = {}
        self._tasks: dict[asyncio.Task[None], None] = {}
        self._lifespan: _Lifespan | None = None

    async def start(self, timeout_s: float = LIFESPAN_S) -> None:
        """Run the application's start-up, if it has a lifespan.

        Raises:
            RuntimeFailed: It said that it failed.
            DeadlineExceeded: It took too long.
        """
        self._lifespan = _Lifespan(self.app, self._state)
        await self._lifespan.start(timeout_s)

    async def stop(self, timeout_s: float = LIFESPAN_S) -> None:
        """Cancel what still runs, then run the application's shut-down. Raises as `start`."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._lifespan is not None:
            lifespan, self._lifespan = self._lifespan, None
            await lifespan.stop(timeout_s)

    def __call__(self, request: Request) -> Awaitable[Answer]:
        """Answer a request. An `AsgiApplication` is a `Handler`."""
        if request.headers.combined("upgrade").lower() == "websocket" and request.method == "GET":
            return answer_websocket(self, request)
        return _Exchange(self, request).answer()

    def scope(self, request: Request, kind: str) -> dict[str, Any]:
        """Return the scope of a request.

        Args:
            request: The request.
            kind: "http" or "websocket".

        Raises:
            HttpError: 400: the path is badly encoded.
        """
        is_tls = request.scheme == "https"
        return {
            "type": kind,
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": request.version,
            "method": request.method,
            "scheme": request.scheme if kind == "http" else "wss" if is_tls else "ws",
            "path": self._root_path + request.path,
            "raw_path": request.raw_path.encode("latin-1"),
            "query_string": request.query.encode("latin-1"),
            "root_path": self._root_path,
            "headers": list(request.headers.lowered),
            "client": _pair(request.peer),
            "server": _pair(request.transport_info("sockname")) or _path(request.transport_info("sockname")),
            "state": self._state.copy(),
            "extensions": {},
        }

    def spawn(self, coroutine: Any) -> "asyncio.Task[None]":
        """See `Owner`."""
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(coroutine)
        self._tasks[task] = None
        task.add_done_callback(self._tasks.pop)
        return task


class _Exchange:
    """One request in the hands of the application."""

    def __init__(self, owner: Owner, request: Request) -> None:
        self._owner = owner
        self._request = request
        loop = asyncio.get_running_loop()
        self._loop = loop
        self._answer: asyncio.Future[Response] = loop.create_future()
        self._gone: asyncio.Future[None] = loop.create_future()
        self._start: Message | None = None
        self._body: AsyncIterator[bytes] | None = None
        self._body_ended = False
        self._refusal: HttpError | None = None
        self._stream: _Stream | None = None
        self._is_complete = False

    async def answer(self) -> Answer:
        """Run the application until it has an answer."""
        scope = self._owner.scope(self._request, "http")
        task = self._owner.spawn(self._run(scope))
        task.add_done_callback(self._on_ended)
        try:
            return await self._answer
        except BaseException:
            self.leave()
            self._cancel_later(task)
            raise

    def leave(self) -> None:
        """The client is gone, or has its answer: the application is told when it asks."""
        if not self._gone.done():
            self._gone.set_result(None)

    async def _run(self, scope: Scope) -> None:
        try:
            await self._owner.app(scope, self._receive, self._send)
        except Exception as error:  # noqa: BLE001 - the root of the application
            failure = self._refusal or error
            if not self._answer.done():
                self._answer.set_exception(failure)
                return
            if self._stream is not None and not self._stream.is_ended:
                self._stream.fail(failure)
            elif not isinstance(error, OSError | Disconnected):
                self._report(error)

    def _on_ended(self, task: "asyncio.Task[None]") -> None:
        problem = RuntimeError(
            "the ASGI application was cancelled" if task.cancelled() else "the ASGI application ended without a response"
        )
        if not self._answer.done():
            self._answer.set_exception(problem)
        elif self._stream is not None:
            self._stream.fail(problem)
        if self._answer.done() and not self._answer.cancelled():
            self._answer.exception()  # seen, whether or not somebody still waits

    def _report(self, error: BaseException) -> None:
        self._owner.logger.error(
            "asgi.failed_after_response",
            method=self._request.method,
            path=self._request.raw_path,
            traceback="".join(traceback.format_exception(error)),
        )

    def _cancel_later(self, task: "asyncio.Task[None]") -> None:
        timer = self._loop.call_later(self._owner.orphan_s, task.cancel)
        task.add_done_callback(lambda _: timer.cancel())

    async def _receive(self) -> Message:
        if not self._body_ended and not self._gone.done():
            if self._body is None:
                self._body = aiter(self._request.stream())
            try:
                piece = await anext(self._body, None)
            except HttpError as error:
                self._refusal = error  # whatever the application makes of it, the client is told this
                raise
            except Disconnected:
                self.leave()
            else:
                self._body_ended = piece is None
                return {"type": "http.request", "body": piece or b"", "more_body": piece is not None}
        if not self._is_complete:
            await asyncio.shield(self._gone)
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        kind = message["type"]
        if self._is_complete:
            raise RuntimeError(f"{kind} after the end of the response")
        if self._gone.done():
            raise OSError("the client is gone")
        if kind == "http.response.start" and self._start is None:
            self._start = message
        elif kind == "http.response.body" and self._start is not None:
            await self._send_body(_as_bytes(message.get("body", b"")), has_more=bool(message.get("more_body", False)))
        else:
            raise RuntimeError(f"{kind} is out of turn")

    async def _send_body(self, body: bytes, *, has_more: bool) -> None:
        assert self._start is not None
        self._is_complete = not has_more
        if self._stream is None:
            if self._refusal is not None:
                self._answer.set_exception(self._refusal)
                return
            response = Response(int(self._start["status"]), _headers(self._start, None if has_more else len(body)), body)
            if has_more:
                self._stream = _Stream(self)
                response.body = self._stream
            if self._answer.done():
                raise OSError("the client is gone")
            self._answer.set_result(response)
        if self._stream is not None:
            if body:
                await self._stream.put(body)
            if not has_more:
                self._stream.end()


class _Stream(AsyncIterator[bytes]):
    """A response's body on its way from the application to the connection: one piece at a time."""

    def __init__(self, exchange: _Exchange) -> None:
        self._exchange = exchange
        self._piece: bytes | None = None
        self._error: BaseException | None = None
        self._changed = Waiters()
        self.is_ended = False

    async def put(self, piece: bytes) -> None:
        """Hand over a piece once there is room. Raises OSError if nobody takes any."""
        while self._piece is not None and not self.is_ended:
            await self._changed.wait()
        if self.is_ended:
            raise OSError("the client is gone")
        self._piece = piece
        self._changed.wake()

    def end(self) -> None:
        """No more pieces."""
        self.is_ended = True
        self._changed.wake()

    def fail(self, error: BaseException) -> None:
        """Break the stream, unless it has ended."""
        if not self.is_ended:
            self._error = error
            self.end()

    async def __anext__(self) -> bytes:
        while self._piece is None:
            if self._error is not None:
                raise self._error
            if self.is_ended:
                raise StopAsyncIteration
            await self._changed.wait()
        piece, self._piece = self._piece, None
        self._changed.wake()
        return piece

    async def aclose(self) -> None:
        """Nobody takes pieces any more."""
        self.is_ended = True
        self._exchange.leave()
        self._changed.wake()


class _Lifespan:
    """The application's start-up and shut-down."""

    def __init__(self, app: AsgiApp, state: dict[str, Any]) -> None:
        self._app = app
        self._state = state
        self._inbox: asyncio.Queue[Message] = asyncio.Queue(2)
        self._outcome: asyncio.Future[str] | None = None  # "" or what failed
        self._task: asyncio.Task[None] | None = None
        self._is_supported = True

    async def start(self, timeout_s: float) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run())
        await self._step("startup", timeout_s)

    async def stop(self, timeout_s: float) -> None:
        assert self._task is not None
        try:
            if not self._task.done() and self._is_supported:
                await self._step("shutdown", timeout_s)
        finally:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _step(self, name: str, timeout_s: float) -> None:
        self._outcome = asyncio.get_running_loop().create_future()
        self._inbox.put_nowait({"type": f"lifespan.{name}"})
        try:
            async with asyncio.timeout(timeout_s):
                problem = await self._outcome
        except TimeoutError:
            assert self._task is not None
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            raise DeadlineExceeded(f"the ASGI application's {name}", timeout_s) from None
        if problem:
            raise RuntimeFailed(name, "the ASGI application", problem)

    async def _run(self) -> None:
        scope = {"type": "lifespan", "asgi": {"version": "3.0", "spec_version": "2.0"}, "state": self._state}
        try:
            await self._app(scope, self._inbox.get, self._send)
        except Exception:  # noqa: BLE001 - an application that knows no lifespan raises, whatever it likes
            self._is_supported = False
        self._settle("")

    async def _send(self, message: Message) -> None:
        _, _, event = str(message["type"]).rpartition(".")
        self._settle(str(message.get("message", "")) or "it failed" if event == "failed" else "")

    def _settle(self, problem: str) -> None:
        if self._outcome is not None and not self._outcome.done():
            self._outcome.set_result(problem)


def _headers(start: Message, n_bytes: int | None) -> HeaderPairs:
    """Return an application's fields; the length of a whole body, if it is right, is left to the server."""
    pairs = [(bytes(name).decode("latin-1").lower(), bytes(value).decode("latin-1")) for name, value in start.get("headers", ())]
    length = str(n_bytes)
    return tuple([pair for pair in pairs if pair[0] not in _OURS and not (pair[0] == "content-length" and pair[1] == length)])


def _as_bytes(body: object) -> bytes:
    if isinstance(body, bytes):
        return body
    if isinstance(body, bytearray | memoryview):
        return bytes(body)
    raise TypeError(f"a body is bytes, not {type(body).__name__}")  # `bytes` makes so many zeros of a number


def _pair(address: object) -> tuple[str, int] | None:
    return (str(address[0]), int(address[1])) if isinstance(address, tuple) and len(address) > 1 else None


def _path(address: object) -> tuple[str, None] | None:
    return (address, None) if isinstance(address, str) and address else None
